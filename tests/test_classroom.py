"""What a course gets besides the chapters: questions on the static page, rubrics, slides; in a real browser."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import nbformat
import pytest
import slides
from nbformat import v4
from playwright.sync_api import Browser
from sphinx.errors import ExtensionError
from test_site import Visit, pages  # noqa: F401, the fixture

from pathwaylib.grading import Compared, load_assignment

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
QUIZZES = sorted((ROOT / "book" / "_quizzes").glob("*.yml"))
EXTENSION = runpy.run_path(str(ROOT / "book" / "_ext" / "classroom.py"))


# --- Questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", QUIZZES, ids=lambda path: path.stem)
def test_questions_are_fit_to_be_asked(path: Path) -> None:
    assert path.with_suffix(".ipynb").name in {chapter.name for chapter in CHAPTERS}
    asked = EXTENSION["questions"](path)
    assert 2 <= len(asked) <= 4
    for entry in asked:
        texts = [next(answer[kind] for kind in ("right", "wrong") if kind in answer) for answer in entry["answers"]]
        assert len(texts) == len(set(texts)) >= 3
    # The right answer does not stand in one place.
    assert len({next(i for i, answer in enumerate(entry["answers"]) if "right" in answer) for entry in asked}) > 1


def test_every_finished_chapter_asks() -> None:
    asking = {path.stem for path in QUIZZES}
    assert {chapter.stem for chapter in CHAPTERS if int(chapter.stem[:2]) <= 12} <= asking


def test_faulty_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "quiz.yml"
    faults = {
        "exactly one answer must be right": "- {question: a, answers: [{wrong: b, why: c}]}",
        "says `why`": "- {question: a, answers: [{right: b}]}",
        "is `right` or `wrong`": "- {question: a, answers: [{right: b, wrong: c, why: d}]}",
        "needs `question` and `answers`": "- {question: a}",
    }
    for message, text in faults.items():
        path.write_text(text)
        with pytest.raises(ExtensionError, match=message):
            EXTENSION["questions"](path)


@pytest.mark.browser
def test_every_chapter_shows_its_questions(pages: list[Path]) -> None:  # noqa: F811
    shown = {path.stem: path.read_text(encoding="utf-8") for path in pages}
    for quiz in QUIZZES:
        asked = EXTENSION["questions"](quiz)
        page = shown[quiz.stem]
        assert page.count('class="quiz-question"') == page.count('class="quiz-right"') == len(asked)
        assert page.count('class="quiz-wrong"') == sum(len(entry["answers"]) - 1 for entry in asked)


@pytest.mark.browser
def test_questions_answer_by_keyboard(browser: Browser, pages: list[Path]) -> None:  # noqa: F811
    path = next(path for path in pages if path.stem == QUIZZES[0].stem)
    with Visit(browser) as visit:
        page = visit.open(path)
        first = page.locator(".quiz-question").first
        assert first.locator("details[open]").count() == 0
        first.locator("summary").first.focus()
        for number in range(first.locator("summary").count()):
            page.keyboard.press("Enter")
            (opened,) = first.locator("details[open]").all()
            right = "quiz-right" in (opened.get_attribute("class") or "")
            said = opened.inner_text().split("\n", 1)[1].strip()
            assert said.startswith("Right." if right else "No."), (number, said)
            page.keyboard.press("Tab")
        assert page.locator(".quiz script").count() == 0


@pytest.mark.browser
def test_the_instructors_page_shows_the_rubrics(pages: list[Path]) -> None:  # noqa: F811
    text = next(path for path in pages if path.stem == "instructors").read_text(encoding="utf-8")
    keys = [
        load_assignment(ROOT / "assignments", path.stem) for path in sorted((ROOT / "assignments").glob("[1-9]*.py"))
    ]
    assert len(keys) == 4
    for key in keys:
        for question in key.questions:
            assert f">{question.name}<" in text
            mistakes = [
                share
                for part in question.parts
                if isinstance(part.judge, Compared)
                for _, share in part.judge.mistakes.values()
            ]
            assert all(f"({share:.0%})" in text for share in mistakes)


# --- Slides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_slides_say_what_the_chapter_says(chapter: Path) -> None:
    notebook = nbformat.read(chapter, as_version=4)
    deck = slides.Deck(notebook)
    page = deck.html()
    assert page.count("<section") >= 10
    assert page.count("<section") == page.count("</section>")
    for left in ("{glue", "{cite", "{doc}", "{exercise}", "{prf:", ":::", "$$"):
        assert left not in page, f"{left} is shown raw"
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert page.count("<img") == page.count('alt="')
    assert 'alt=""' not in page
    solutions = [cell.source for cell in notebook.cells if "exercise-solution" in cell.metadata.get("tags", ())]
    assert not any(line in page for source in solutions for line in source.splitlines() if line.startswith("def "))


def test_slides_hold_what_a_lecture_needs() -> None:
    theorem = "````{prf:theorem} Big\n:label: thm\n\nLet $a > 0$.\n\n$$\nb = a\n$$\n````"
    claim = v4.new_output("display_data", {"text/plain": "Share $s$: 3"}, metadata={"pathwaylib_claim": {}})
    glued = v4.new_output(
        "display_data",
        {"application/papermill.record/text/plain": "'42 %'"},
        metadata={"scrapbook": {"name": "application/papermill.record/share", "mime_prefix": ""}},
    )
    cells = [
        v4.new_markdown_cell("# 1. Title\n\n**The question.** Why?\n\n**After this chapter you can**\n\n- say so."),
        v4.new_markdown_cell(
            f"## 1.1 First\n\nLead with {{glue:text}}`share`.\n\nUnsaid.\n\n{theorem}\n\nWords:\n\n$$\nc < d\n$$"
        ),
        v4.new_code_cell("1", outputs=[claim, glued]),
        v4.new_markdown_cell(f"{slides.PREDICT} Which?\n\n## 1.2 Summary\n\n- The end.\n\n## Exercises"),
        v4.new_markdown_cell("::::{exercise} Try it\n:label: ex\n::::"),
    ]
    found = slides.Deck(v4.new_notebook(cells=cells)).slides()
    texts = [re.sub(r"<[^>]+>", " ", slide) for slide in found]
    assert "Why?" in texts[0]
    assert "say so" in texts[1]
    assert "Lead with 42 %." in texts[2]
    assert "Unsaid" not in " ".join(texts)
    assert "(Big). Let  \\(a &gt; 0\\) ." in texts[2]
    assert "\\[b = a\\]" in found[2]
    assert "Words:" in texts[2]
    assert "\\[c &lt; d\\]" in found[2]
    assert "Which?" in texts[3]
    assert "predict" in found[3]
    assert "Share  \\(s\\) : 3" in texts[4]
    assert "The end." in texts[5]
    assert "Try it" in texts[6]
    assert len(texts) == 7


@pytest.mark.browser
def test_a_deck_fits_its_window_and_moves_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / slides.MATHJAX.name).write_bytes(slides.MATHJAX.read_bytes())
    deck = tmp_path / "deck.html"
    deck.write_text(slides.Deck(nbformat.read(CHAPTERS[4], as_version=4)).html(), encoding="utf-8")
    with Visit(browser, {"width": 1280, "height": 720}) as visit:
        page = visit.open(deck)
        page.wait_for_timeout(300)  # for the slides to be fitted
        assert page.locator("mjx-container svg").count() > 20
        assert page.locator("[data-mjx-error]").count() == 0
        tall = "[...document.querySelectorAll('section')].filter(s => s.scrollHeight > innerHeight + 2).length"
        assert page.evaluate(tall) == 0
        page.keyboard.press("ArrowRight")
        page.keyboard.press("PageDown")
        page.wait_for_timeout(200)
        at = "[...document.querySelectorAll('section')].findIndex(s => Math.abs(s.getBoundingClientRect().top) < 5)"
        assert page.evaluate(at) == 2
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(200)
        assert page.evaluate(at) == 1
        assert visit.outside() == []
        assert visit.complaints == []
