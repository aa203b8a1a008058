"""Print the built site into one PDF with bookmarks and a page of contents.

python tools/pdf.py _build/html _build/critical-pathways.pdf
"""

from __future__ import annotations

import html
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from playwright.sync_api import Page, sync_playwright
from pypdf import PdfReader, PdfWriter
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import chromium  # noqa: E402

PAPER = {"format": "A4", "scale": 0.75, "margin": {"top": "16mm", "bottom": "18mm", "left": "15mm", "right": "15mm"}}
NUMBERS = '<div style="font-size: 8px; width: 100%; text-align: center"><span class="pageNumber"></span></div>'

# The theme leaves room for its sidebars, and keeps cells whole, which leaves pages half empty.
STYLE = """
.bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, .prev-next-footer, .bd-footer, #jb-print-toc {
  display: none !important
}
.bd-container, .bd-container__inner, .bd-main, .bd-content, .bd-article-container, .bd-article {
  max-width: none !important; width: 100% !important; margin: 0 !important; padding: 0 !important
}
pre, .highlight, [class*="highlight-"], .cell, .cell_input, .cell_output, .admonition, blockquote {
  break-inside: auto !important
}
pre { white-space: pre-wrap !important; overflow-wrap: anywhere }
img, canvas { max-width: 100% !important }
.cell_output img, tr, .pathwaylib-figure { break-inside: avoid }
h1, h2, h3 { break-after: avoid }
mjx-container svg * { stroke: none !important }
"""


@dataclass(frozen=True)
class Part:
    """A page of the site, printed."""

    title: str
    caption: str
    pdf: PdfReader


def order() -> list[tuple[str, str]]:
    """Return the book's pages as the contents list them: file, and caption of the part that it opens."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [(contents["root"], "")]
    for part in contents["parts"]:
        listed += [(chapter["file"], "" if n else part["caption"]) for n, chapter in enumerate(part["chapters"])]
    return listed


def printed(page: Page, file: Path) -> tuple[str, PdfReader]:
    """Print one page of the site; return its title too."""
    page.goto(file.resolve().as_uri(), wait_until="load")
    page.evaluate("async () => { await window.MathJax?.startup?.promise; }")
    page.add_style_tag(content=STYLE)
    # What is folded on the screen, such as solutions, stays folded: a reader of paper should try first, too.
    title = page.locator("article h1").first.evaluate(
        "h => [...h.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('')"
    )
    return title.strip(), PdfReader(io.BytesIO(page.pdf(print_background=True, **PAPER)))


def contents(page: Page, parts: list[Part], offset: int) -> PdfReader:
    """Print the list of titles with the numbers of their pages, after ``offset`` pages of its own."""
    rows, number = [], offset + 1
    for part in parts:
        if part.caption:
            rows.append(
                f'<tr><th colspan="2" style="text-align: left; padding-top: 1em">{html.escape(part.caption)}</th></tr>'
            )
        rows.append(f'<tr><td>{html.escape(part.title)}</td><td style="text-align: right">{number}</td></tr>')
        number += len(part.pdf.pages)
    style = "font-family: sans-serif; font-size: 12pt"
    page.set_content(
        f'<body style="{style}"><h1>Contents</h1><table style="width: 100%">{"".join(rows)}</table></body>'
    )
    return PdfReader(io.BytesIO(page.pdf(**PAPER)))


def main(site: Path, target: Path, pages: list[tuple[str, str]]) -> None:
    """Print the pages, put the contents in front, number and merge them."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.find(), args=chromium.ARGUMENTS)
        page = browser.new_page(color_scheme="light")
        parts = []
        for file, caption in tqdm(pages, unit="page"):
            title, pdf = printed(page, site / f"{file}.html")
            parts.append(Part(title, caption, pdf))
        front = contents(page, parts, 1)
        if len(front.pages) > 1:
            front = contents(page, parts, len(front.pages))
        total = len(front.pages) + sum(len(part.pdf.pages) for part in parts)
        # Chromium numbers the pages of one print only, so the numbers are printed by themselves and laid over.
        page.set_content("".join('<p style="break-after: page">&nbsp;</p>' for _ in range(total - 1)) + "<p>&nbsp;</p>")
        numbers = PdfReader(
            io.BytesIO(
                page.pdf(display_header_footer=True, header_template="<i></i>", footer_template=NUMBERS, **PAPER)
            )
        )
        browser.close()
    assert len(numbers.pages) == total
    writer = PdfWriter()
    writer.add_metadata({"/Title": "Critical Pathways", "/Author": "The Critical Pathways authors"})
    for sheet in front.pages:
        writer.add_page(sheet)
    writer.add_outline_item(title="Contents", page_number=0)
    for part in parts:
        first = len(writer.pages)
        for sheet in part.pdf.pages:
            writer.add_page(sheet)
        writer.add_outline_item(title=part.title, page_number=first)
    for sheet, number in zip(writer.pages, numbers.pages, strict=True):
        sheet.merge_page(number)
    target.parent.mkdir(parents=True, exist_ok=True)
    writer.write(target)
    print(f"{target}: {total} pages, {target.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), order())
