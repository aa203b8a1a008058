"""What a course needs on the site: questions to check oneself after each chapter, and the rubrics of the assignments.

The questions lie in ``book/_quizzes``, a file for each chapter, and are put behind it when the site is built: in the
notebook itself they would be markup that Colab shows raw. They are plain HTML, each answer a ``<details>`` element, so
that they work without a script, by keyboard, and from files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from pathwaylib.grading import Compared, Question, load_assignment
from pathwaylib.grading.report import default_folder

HEADING = """## Check yourself

Answer in your head, then open the answer that you would give: it says whether it is right, and why.

```{{quiz}} {name}
```
"""


def questions(path: Path) -> list[dict[str, Any]]:
    """Read the questions of a chapter: each a ``question``, and ``answers`` of which one is ``right``."""
    asked: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for entry in asked:
        if set(entry) != {"question", "answers"}:
            raise ExtensionError(f"{path.name}: a question needs `question` and `answers`, and has {sorted(entry)}")
        answers = entry["answers"]
        if any(len({"right", "wrong"} & set(answer)) != 1 or not answer.get("why") for answer in answers):
            raise ExtensionError(f"{path.name}: an answer is `right` or `wrong`, and says `why`: {entry['question']}")
        if sum("right" in answer for answer in answers) != 1:
            raise ExtensionError(f"{path.name}: exactly one answer must be right: {entry['question']}")
    return asked


def quiz_of(app: Sphinx, name: str) -> Path:
    """Return where the questions of a document would be."""
    return Path(app.srcdir) / "book" / "_quizzes" / f"{Path(name).name}.yml"


def append_quiz(app: Sphinx, name: str, content: list[str]) -> None:
    """Put a chapter's questions behind it."""
    if Path(app.env.doc2path(name)).suffix != ".ipynb" or not quiz_of(app, name).is_file():
        return
    notebook = json.loads(content[0])
    cell = {"cell_type": "markdown", "id": "quiz", "metadata": {}, "source": HEADING.format(name=Path(name).name)}
    notebook["cells"].append(cell)
    content[0] = json.dumps(notebook)


class Quiz(SphinxDirective):
    """The questions of a chapter."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a group of folded answers for each question."""
        path = quiz_of(self.env.app, self.arguments[0])
        self.env.note_dependency(str(path))
        quiz = nodes.container(classes=["quiz"])
        for number, entry in enumerate(questions(path)):
            label = f"quiz-question-{number}"
            quiz += _html(f'<div class="quiz-question" role="group" aria-labelledby="{label}"><div id="{label}">')
            quiz += self._parsed(entry["question"])
            quiz += _html("</div>")
            for answer in entry["answers"]:
                kind = "right" if "right" in answer else "wrong"
                # Those of one name close each other.
                quiz += _html(f'<details class="quiz-{kind}" name="quiz-{number}"><summary>')
                quiz += self._inline(answer[kind])
                quiz += _html("</summary>")
                quiz += self._parsed(f"**{'Right.' if kind == 'right' else 'No.'}** {answer['why']}")
                quiz += _html("</details>")
            quiz += _html("</div>")
        return [quiz]

    def _parsed(self, text: str) -> list[nodes.Node]:
        container = nodes.Element()
        self.state.nested_parse(StringList(text.splitlines(), self.env.docname), self.content_offset, container)
        return container.children

    def _inline(self, text: str) -> list[nodes.Node]:
        # A summary holds phrases, no paragraph.
        return [child for paragraph in self._parsed(text) for child in paragraph.children]


def _html(text: str) -> nodes.raw:
    return nodes.raw("", text, format="html")


class Rubrics(SphinxDirective):
    """Points and known mistakes of every assignment, from the keys that the grader uses."""

    def run(self) -> list[nodes.Node]:
        """Return for each assignment its table, and what its mistakes are worth."""
        lines: list[str] = []
        folder = default_folder()
        for path in sorted(folder.glob("[0-9]*.py")):
            self.env.note_dependency(str(path))
            key = load_assignment(folder, path.stem)
            lines += [f"**{key.title}** ({key.points} points)", "", "| question | points | for |", "|---|---|---|"]
            lines += [_row(question) for question in key.questions]
            lines += ["", "Common wrong answers, and what is left of the points:", ""]
            lines += [
                f"- `{question.name}`: {mistake}" for question in key.questions for mistake in _mistakes(question)
            ]
            lines += [""]
        container = nodes.container(classes=["rubrics"])
        self.state.nested_parse(StringList(lines, self.env.docname), self.content_offset, container)
        return [container]


def _row(question: Question) -> str:
    parts = "; ".join(f"{part.title} ({part.points})" for part in question.parts)
    return f"| {question.title}, `{question.name}` | {question.points} | {parts} |"


def _mistakes(question: Question) -> list[str]:
    judges = [part.judge for part in question.parts if isinstance(part.judge, Compared)]
    # Parts of one question share their mistakes.
    worth = {message: share for judge in judges for message, (_, share) in judge.mistakes.items()}
    return [f"{message} ({share:.0%})" for message, share in worth.items()]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("quiz", Quiz)
    app.add_directive("rubrics", Rubrics)
    app.connect("source-read", append_quiz)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
