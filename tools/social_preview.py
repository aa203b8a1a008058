"""Draw the picture that a link to the book shows, from the diagram of its first page.

python tools/social_preview.py
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import chromium  # noqa: E402

PAGE = """<body style="margin: 0; padding: 40px 80px; background: #fff; color: #1d2733; font-family: 'DejaVu Sans'">
<h1 style="font-size: 76px; margin: 0 0 6px">Critical Pathways</h1>
<p style="font-size: 31px; margin: 0 0 24px; line-height: 1.35">
Read a neural network through the sparse paths its signal takes.<br>An executable book, and pathwaylib.</p>
{diagram}
</body>"""


def main() -> None:
    """Take a picture of the diagram beneath the title."""
    found = re.search(r"<svg.*?</svg>", (ROOT / "book" / "intro.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found, "book/intro.md has no diagram"
    diagram = re.sub('style="[^"]*"', 'style="height: 330px; display: block; margin: auto"', found[0], count=1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.find(), args=chromium.ARGUMENTS)
        page = browser.new_page(viewport={"width": 1200, "height": 630})
        page.set_content(PAGE.format(diagram=diagram))
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    colours = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    colours.save(ROOT / "book" / "_ext" / "social-preview.png", optimize=True)


if __name__ == "__main__":
    main()
