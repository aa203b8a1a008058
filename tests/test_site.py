"""The built site in a real browser: complete, quiet, and asking no other host for anything."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import threading
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from playwright.sync_api import Browser, Page
from pypdf import PdfReader

import pathwaylib

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1440, "height": 900}

pytestmark = pytest.mark.browser


def sources() -> list[Path]:
    patterns = ("_*.yml", "book/**/*", "pathwaylib/*.py")
    return [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]


@pytest.fixture(scope="module")
def pages() -> list[Path]:
    """Every page of the book, from a site that is not older than its sources."""
    index = SITE / "index.html"
    if not index.is_file() or any(path.stat().st_mtime > index.stat().st_mtime for path in sources()):
        subprocess.run(["make", "html"], cwd=ROOT, check=True)
    found = sorted((SITE / "book").glob("*.html"))
    assert len(found) > 5
    return found


class Visit:
    """One page in a fresh tab, with everything it asked for and complained about."""

    def __init__(self, browser: Browser, viewport: dict[str, int] = DESKTOP, scheme: str = "light") -> None:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
        self.page: Page = context.new_page()
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"not loaded: {request.url}"))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)

    def open(self, path: Path) -> Page:
        self.page.goto(path.as_uri(), wait_until="load")
        self.page.evaluate("async () => { await window.MathJax?.startup?.promise; }")
        return self.page

    def outside(self) -> list[str]:
        return [url for url in self.requested if not url.startswith(("file:", "data:", "blob:"))]

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.context.close()


def test_pages_ask_no_other_host_and_do_not_complain(browser: Browser, pages: list[Path]) -> None:
    for path in pages:
        with Visit(browser) as visit:
            visit.open(path)
            visit.page.wait_for_load_state("networkidle")
            assert visit.outside() == [], path.name
            assert visit.complaints == [], path.name
            assert any(url.endswith(".css") or ".css?" in url for url in visit.requested)


def test_formulas_are_drawn(browser: Browser, pages: list[Path]) -> None:
    drawn = 0
    for path in pages:
        with Visit(browser) as visit:
            page = visit.open(path)
            formulas = page.locator(".math")
            drawn += formulas.count()
            assert page.locator(".math mjx-container > svg").count() >= formulas.count(), path.name
            assert page.locator("mjx-merror, [data-mjx-error]").count() == 0, path.name
    assert drawn > 20


def test_bibliography_lists_every_reference(browser: Browser, pages: list[Path]) -> None:
    entries = (ROOT / "book" / "references.bib").read_text().count("\n@") + 1
    with Visit(browser) as visit:
        page = visit.open(SITE / "book" / "bibliography.html")
        assert page.locator("div.citation").count() == entries
        assert "Khakzar" in page.inner_text("article")


def test_api_reference_has_every_public_name(browser: Browser, pages: list[Path]) -> None:
    with Visit(browser) as visit:
        page = visit.open(SITE / "book" / "api.html")
        there = set(page.locator("dt[id^='pathwaylib.']").evaluate_all("terms => terms.map(term => term.id)"))
    assert {f"pathwaylib.{name}" for name in pathwaylib.__all__} <= there


def test_ledger_lists_the_claims_of_the_chapters(browser: Browser, pages: list[Path]) -> None:
    claims = sum(path.read_text().count('"pathwaylib_claim"') for path in (ROOT / "book").glob("*.ipynb"))
    assert claims > 0
    with Visit(browser) as visit:
        page = visit.open(SITE / "book" / "claims.html")
        assert page.locator(".claims-ledger tbody tr").count() == claims
        assert page.locator(".claims-ledger tbody tr td:last-child a").count() == claims


def test_chapters_show_every_claim_once(browser: Browser, pages: list[Path]) -> None:
    folded = 0
    for path in (ROOT / "book").glob("*.ipynb"):
        claims = path.read_text().count('"pathwaylib_claim"')
        with Visit(browser) as visit:
            page = visit.open(SITE / "book" / path.with_suffix(".html").name)
            lists = page.locator("details.claims-made")
            inside = lists.locator("li").count()
            folded += inside
            alone = page.locator(".cell_output pre").filter(has_text=re.compile(r"\): holds")).count()
            assert inside + alone == claims, path.name
            if inside:
                assert not lists.first.locator("li").first.is_visible()
                lists.first.locator("summary").press("Enter")
                assert lists.first.locator("li").first.is_visible()
    assert folded


def test_search_finds_a_word(browser: Browser, pages: list[Path]) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Keep the test's output readable."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Visit(browser) as visit:
            visit.page.goto(f"http://127.0.0.1:{server.server_port}/search.html?q=sparsity")
            # Results appear one after the other.
            visit.page.wait_for_selector("#search-results li a[href*=notation]")
            assert all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in visit.requested)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_pages_fit_the_window(browser: Browser, pages: list[Path], viewport: dict[str, int]) -> None:
    for path in pages:
        with Visit(browser, viewport) as visit:
            page = visit.open(path)
            width = page.evaluate("document.scrollingElement.scrollWidth")
            assert width <= viewport["width"], f"{path.name} is {width} pixels wide"
            # Displayed formulas and tables scroll in boxes of their own; a formula within a line would be cut off.
            cut = page.evaluate(
                """width => [...document.querySelectorAll("section mjx-container:not([display=true])")]
                .filter(formula => !formula.closest("table") && formula.getBoundingClientRect().right > width)
                .map(formula => formula.closest("p, li")?.innerText)""",
                viewport["width"],
            )
            assert cut == [], f"{path.name}: set these formulas on lines of their own"


def test_figures_are_described_and_keep_their_colours_in_the_dark(browser: Browser, pages: list[Path]) -> None:
    figures = 0
    for path in pages:
        with Visit(browser, scheme="dark") as visit:
            page = visit.open(path)
            assert page.evaluate("document.documentElement.dataset.theme") == "dark"
            for image in page.locator(".cell_output img").all():
                figures += 1
                assert (image.get_attribute("alt") or "").strip(), path.name
                style = image.evaluate("i => [getComputedStyle(i).backgroundColor, getComputedStyle(i).filter]")
                assert style == ["rgba(0, 0, 0, 0)", "none"], path.name
    assert figures > 0


def test_interactive_figures_move_by_keyboard(browser: Browser, pages: list[Path]) -> None:
    moved = 0
    drawn = "drawn => drawn.toDataURL ? drawn.toDataURL() : drawn.outerHTML"
    picture = f"figure => [...figure.querySelectorAll('canvas, svg, .bar')].map({drawn}).join()"
    for path in pages:
        with Visit(browser) as visit:
            page = visit.open(path)
            for figure in page.locator(".pathwaylib-figure").all():
                slider = figure.locator("input[type=range]").first
                slider.focus()
                page.keyboard.press("Home")
                page.wait_for_timeout(200)
                before = figure.evaluate(picture)
                page.keyboard.press("End")
                page.wait_for_timeout(200)
                assert figure.evaluate(picture) != before, path.name
                moved += 1
            assert visit.outside() == [], path.name
            assert visit.complaints == [], path.name
    assert moved > 0


# Colours are what changes in the dark, and what is drawn on a phone; the rest is the same page.
@pytest.mark.parametrize(
    ("scheme", "viewport", "rules"),
    [("light", DESKTOP, {}), ("dark", PHONE, {"runOnly": ["color-contrast", "link-in-text-block", "target-size"]})],
    ids=["light", "dark-phone"],
)
def test_axe_finds_nothing_serious(
    browser: Browser, pages: list[Path], scheme: str, viewport: dict[str, int], rules: dict[str, object]
) -> None:
    axe = (ROOT / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    found = []
    for path in pages:
        with Visit(browser, viewport, scheme) as visit:
            page = visit.open(path)
            page.evaluate("document.querySelectorAll('details').forEach(folded => { folded.open = true })")
            page.evaluate(axe)
            result = page.evaluate("rules => axe.run(document, {resultTypes: ['violations'], ...rules})", rules)
            for violation in result["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    examples = [node["html"][:200] for node in violation["nodes"][:3]]
                    found.append((path.name, violation["id"], len(violation["nodes"]), examples))
    assert found == []


def test_pages_are_light(pages: list[Path]) -> None:
    for path in pages:
        text = path.read_text(encoding="utf-8")
        pictures = {path.parent / source for source in re.findall(r'src="(\.\./_images/[^"]+)"', text)}
        weight = sum(file.stat().st_size for file in (path, *pictures))
        assert weight <= 1_500_000, f"{path.name} and its {len(pictures)} pictures weigh {weight:,} bytes"


def test_links_within_the_book_lead_somewhere(pages: list[Path]) -> None:
    names = {path: set(re.findall(r'\b(?:id|name)="([^"]+)"', path.read_text(encoding="utf-8"))) for path in pages}
    followed = 0
    for path in pages:
        for link in set(re.findall(r'<a [^>]*href="([^"]+)"', path.read_text(encoding="utf-8"))):
            address, _, anchor = unquote(unescape(link)).partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            target = (path.parent / address.partition("?")[0]).resolve() if address else path
            assert target.is_file(), f"{path.name} links to {link}"
            followed += 1
            if anchor and target in names:
                assert anchor in names[target], f"{path.name} links to {link}"
    assert followed > 100


def test_a_shared_link_shows_title_words_and_the_tab_an_icon(pages: list[Path]) -> None:
    for path in pages:
        head = path.read_text(encoding="utf-8").partition("<body")[0]
        tags = dict(re.findall(r'<meta property="(og:[a-z_]+)" content="([^"]*)"', head))
        assert tags["og:title"], path.name
        assert tags["og:description"], path.name
        icon = re.search(r'<link rel="icon" href="([^"]+)"', head)
        assert icon, path.name
        assert (path.parent / icon[1]).is_file(), path.name


def test_the_book_prints_with_contents_bookmarks_and_page_numbers(
    browser: Browser, pages: list[Path], tmp_path: Path
) -> None:
    target = tmp_path / "book.pdf"
    # In a process of its own: this one's Playwright is in use.
    chosen = "[('book/intro', ''), ('book/bibliography', 'Appendices')]"
    call = f"import pathlib, pdf, sys; pdf.main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), {chosen})"
    subprocess.run([sys.executable, "-c", call, SITE, target], cwd=ROOT / "tools", check=True)
    printed = PdfReader(target)
    marks = [(mark.title, printed.get_destination_page_number(mark)) for mark in printed.outline]
    assert [title for title, _ in marks] == ["Contents", "Critical Pathways", "Bibliography"]
    assert "Khakzar" in printed.pages[marks[2][1]].extract_text()
    contents = printed.pages[0].extract_text()
    assert re.search(rf"Bibliography\s*{marks[2][1] + 1}\b", contents)
    assert printed.pages[-1].extract_text().rstrip().endswith(str(len(printed.pages)))
