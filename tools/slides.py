"""Make lecture slides of the chapters: their headings, questions, formulas, figures, claims and summaries.

    python tools/slides.py book/*.ipynb --to _build/slides

Nothing is written for the slides alone: they are cut from the stored notebooks, so they say what the chapters say. A
deck is one HTML page with its figures inside; the formulas are set by the copy of MathJax that lies beside the decks.
"""

from __future__ import annotations

import argparse
import ast
import codecs
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import cast

import latexcodec  # noqa: F401 (registers ulatex)
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode
from notebooks import read
from pybtex.database import Entry, parse_file

ROOT = Path(__file__).parents[1]
BIBLIOGRAPHY = ROOT / "book" / "references.bib"
MATHJAX = ROOT / "node_modules" / "mathjax" / "es5" / "tex-svg-full.js"
PREDICT = "> **Predict before you look.**"
ENDS = ("summary", "in short")
LONG = 700  # characters of prose that still fit under a heading

STYLE = """
:root { color-scheme: light dark; --ink: #20262d; --paper: #fff; --soft: #5c646d; --blue: #1f66b3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #121212; --soft: #a3abb3; --blue: #7db8f5; } }
* { box-sizing: border-box; }
html { scroll-snap-type: y mandatory; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 2.9vmin/1.45 system-ui, sans-serif;
  counter-reset: slide; }
section { min-height: 100vh; padding: 5vmin 9vmin 8vmin; scroll-snap-align: start; position: relative;
  display: flex; flex-direction: column; justify-content: center; counter-increment: slide; }
section::after { content: counter(slide); position: absolute; right: 4vmin; bottom: 3vmin; color: var(--soft);
  font-size: 2vmin; }
h1 { font-size: 6.5vmin; line-height: 1.15; margin: 0 0 3vmin; }
h2 { font-size: 4.4vmin; line-height: 1.2; margin: 0 0 2vmin; color: var(--blue); }
p, ul, ol, blockquote, table { margin: 0.6em 0; max-width: 115vmin; }
li { margin: 0.25em 0; }
blockquote { border-inline-start: 0.6vmin solid var(--blue); padding-inline-start: 3vmin; margin-inline: 0; }
.predict blockquote { font-size: 1.25em; }
figure { margin: 0; text-align: center; }
figure img { max-width: 100%; max-height: 62vh; min-height: 38vh; object-fit: contain; }
figcaption { color: var(--soft); font-size: 0.72em; max-width: 120vmin; margin: 1vmin auto 0; }
.claims li { font-size: 0.85em; }
table { border-collapse: collapse; font-size: 0.85em; }
td, th { padding: 0.2em 0.8em; border-block-end: 1px solid var(--soft); text-align: start; }
code { font-size: 0.92em; }
mjx-container[display="true"] { overflow: auto hidden; }
@media print { section { break-after: page; height: 100vh; } }
"""

SCRIPT = """
// Arrow keys and Page Up or Down go from slide to slide; what is too long is set smaller.
const slides = [...document.querySelectorAll('section')];
const current = () => slides.reduce((best, slide) =>
  Math.abs(slide.getBoundingClientRect().top) < Math.abs(best.getBoundingClientRect().top) ? slide : best);
addEventListener('keydown', (event) => {
  const step = {ArrowRight: 1, ArrowDown: 1, PageDown: 1, ' ': 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1}[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const next = slides[slides.indexOf(current()) + (event.shiftKey ? -step : step)];
  if (next) next.scrollIntoView();
});
const fit = () => slides.forEach((slide) => {
  slide.style.fontSize = '';
  for (let size = 2.8; size > 1.6 && slide.scrollHeight > innerHeight + 1; size -= 0.1) {
    slide.style.fontSize = `${size}vmin`;
  }
});
addEventListener('resize', fit);
addEventListener('load', () => (window.MathJax?.startup?.promise ?? Promise.resolve()).then(fit));
"""


@dataclass
class Part:
    """What stands under one heading of a chapter, in order."""

    heading: str
    blocks: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)  # data URI, alt text
    claims: list[str] = field(default_factory=list)


def parts_of(notebook: NotebookNode) -> list[Part]:
    """Cut a chapter at its headings."""
    parts: list[Part] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for block in re.split(r"\n{2,}", _joined(cell.source)):
                if heading := re.match(r"#{1,4} (.*)", block):
                    parts.append(Part(heading[1]))
                    block = block[heading.end() :].strip()
                if block:
                    parts[-1].blocks.append(block)
        elif not any(tag.startswith("exercise") for tag in cell.metadata.get("tags", ())):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            for output in cell.outputs:
                if "pathwaylib_claim" in output.get("metadata", {}):
                    parts[-1].claims.append("".join(output.data["text/plain"]))
                elif image := output.get("data", {}).get("image/png"):
                    parts[-1].figures.append((f"data:image/png;base64,{''.join(image.split())}", alt))
    return parts


def _joined(text: str) -> str:
    """Keep what belongs together, a directive or a formula, in one block."""
    return re.sub(
        r"^(:{3,}|`{3,})\{.*?^\1[ \t]*$|^\$\$.*?^\$\$",
        lambda found: re.sub(r"\n{2,}", "\n \n", found[0]),
        text,
        flags=re.S | re.M,
    )


class Deck:
    """A chapter's slides."""

    def __init__(self, notebook: NotebookNode) -> None:
        self.parts = parts_of(notebook)
        self.glued = {
            output.metadata.scrapbook.name.removeprefix("application/papermill.record/"): ast.literal_eval(
                "".join(text)
            )
            for cell in notebook.cells
            for output in cell.get("outputs", ())
            if "scrapbook" in output.get("metadata", {})
            for text in output.data.values()
        }
        self.markdown = MarkdownIt("commonmark", {"html": True, "typographer": True}).enable(
            ["table", "replacements", "smartquotes"]
        )
        self.markdown.use(dollarmath_plugin, renderer=_math)

    def html(self) -> str:
        """Return the page."""
        title = self.parts[0].heading
        slides = "\n".join(self.slides())
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n'
            f'<script defer src="{MATHJAX.name}"></script>\n</head>\n<body>\n{slides}\n<script>{SCRIPT}</script>\n'
            "</body>\n</html>\n"
        )

    def slides(self) -> list[str]:
        """Return each slide as HTML."""
        head, *rest = self.parts
        question = next((block for block in head.blocks if block.startswith("**The question.**")), "")
        found = [self._slide("", f"# {head.heading}\n\n{question}", kind="title")]
        able = next((i for i, block in enumerate(head.blocks) if block.startswith("**After this chapter")), None)
        if able is not None:
            found.append(self._slide(head.blocks[able].strip("*"), head.blocks[able + 1]))
        for part in rest:
            if part.heading.split(" ", 1)[-1].lower() not in (*ENDS, "exercises") and part.heading.lower() not in ENDS:
                found += self._section(part)
        exercises = [
            title for part in self.parts for block in part.blocks for title in re.findall(r"\{exercise\} (.*)", block)
        ]
        for part in rest:
            if any(part.heading.lower().endswith(end) for end in ENDS) and part.blocks:
                bullets = [block for block in part.blocks if block.startswith(("- ", "* "))]
                found.append(self._slide("Summary", "\n\n".join(bullets or part.blocks[:3])))
                break
        if exercises:
            found.append(self._slide("Exercises", "\n".join(f"- {title}" for title in exercises)))
        return found

    def _section(self, part: Part) -> list[str]:
        found, chosen, length = [], [], 0
        for before, block in zip(["", *part.blocks], part.blocks, strict=False):
            if block.startswith(PREDICT):
                if chosen:
                    found.append(self._slide(part.heading, "\n\n".join(chosen)))
                    chosen, length = [], 0
                found.append(self._slide(part.heading, block, kind="predict"))
                continue
            statement = _statement(block)
            if not statement and (block.startswith((":::", "```", "(", "*The ")) or not _is_key(block, chosen, found)):
                continue
            if block.startswith("$$") and before not in chosen and not before.startswith((":::", "```")):
                chosen.append(before)  # a formula needs the words that lead to it
                length += len(before)
            chosen.append(statement or block)
            length += len(block)
            if length > LONG:
                found.append(self._slide(part.heading, "\n\n".join(chosen)))
                chosen, length = [], 0
        if chosen:
            found.append(self._slide(part.heading, "\n\n".join(chosen)))
        for source, alt in part.figures:
            picture = f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{escape(alt)}</figcaption></figure>'
            found.append(f"<section><h2>{self._phrase(part.heading)}</h2>{picture}</section>")
        if part.claims:
            items = "".join(f"<li>{self._phrase(claim)}</li>" for claim in part.claims[:6])
            title = f"{self._phrase(part.heading)}: what the code checks"
            found.append(f'<section class="claims"><h2>{title}</h2><ul>{items}</ul></section>')
        return found

    def _slide(self, heading: str, text: str, kind: str = "") -> str:
        title = f"<h2>{self._phrase(heading)}</h2>" if heading else ""
        return f"<section{f' class={kind}' if kind else ''}>{title}{self.markdown.render(self._plain(text))}</section>"

    def _phrase(self, text: str) -> str:
        return str(self.markdown.renderInline(self._plain(text)))

    def _plain(self, text: str) -> str:
        """Write roles as what they show."""
        text = re.sub(r"\{glue:text\}`([^`]+)`", lambda found: self.glued.get(found[1], "…"), text)
        text = re.sub(r"\s*\{cite:p\}`[^`]+`", "", text)
        text = re.sub(r"\{cite:t\}`([^`]+)`", lambda found: _cited(found[1]), text)
        text = re.sub(r"\{(?:doc|prf:ref|ref|numref)\}`([^`<]+?)(?: *<[^`]*)?`", r"*\1*", text)
        return text.replace("\n \n", "\n\n")


def _is_key(block: str, chosen: list[str], found: list[str]) -> bool:
    """Tell what a section's slide shows: its first words, its first lists, and every formula that stands alone."""
    leads = not found and (not chosen or block.startswith(("- ", "1. ")))
    return leads or block.startswith("$$") or "\n$$" in block


def _statement(block: str) -> str:
    """Return a lemma or theorem as a quotation; nothing for other blocks."""
    found = re.match(
        r"(:{3,}|`{3,})\{prf:(lemma|theorem|proposition|corollary|definition)\} ?(.*?)\n(.*?)\1\s*$", block, re.S
    )
    if not found:
        return ""
    body = re.sub(r"^:\w+:.*\n", "", found[4], flags=re.M).strip().replace("\n \n", "\n\n")
    text = f"**{found[2].capitalize()}** ({found[3]}). {body}" if found[3] else f"**{found[2].capitalize()}.** {body}"
    return "\n".join(f"> {line}" for line in text.splitlines())


@cache
def _bibliography() -> Mapping[str, Entry]:
    return cast(Mapping[str, Entry], parse_file(str(BIBLIOGRAPHY)).entries)


def _cited(keys: str) -> str:
    """Name works as a sentence does: by one or two authors, or by the first of more, and the year."""
    return "; ".join(_named(_bibliography()[key.strip()]) for key in keys.split(","))


def _named(work: Entry) -> str:
    names = [" ".join([*author.prelast_names, *author.last_names]) for author in work.persons["author"]]
    plain = [re.sub(r"[{}]", "", codecs.decode(name, "ulatex")) for name in names]
    return f"{' and '.join(plain) if len(plain) < 3 else f'{plain[0]} et al.'} ({work.fields['year']})"


def _math(content: str, options: dict[str, bool]) -> str:
    left, right = ("\\[", "\\]") if options["display_mode"] else ("\\(", "\\)")
    return f"{left}{escape(content.strip())}{right}"


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, default=Path("_build/slides"))
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(MATHJAX, arguments.to / MATHJAX.name)
    for path in arguments.notebooks:
        page = Deck(read(path)).html()
        target = arguments.to / f"{path.stem}.html"
        target.write_text(page, encoding="utf-8")
        print(f"{target}: {page.count('<section')} slides")
    return 0


if __name__ == "__main__":
    sys.exit(main())
