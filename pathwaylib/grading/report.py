"""Grade one submission."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pathwaylib

from ..errors import PathwayError
from .process import MOST_BYTES, Limits, one_line, run_submission
from .questions import Assignment, student_seed

SUSPECT = ("pathwaylib.grade", "load_assignment", "assignments/", "submission.json", "/proc/", "ctypes", "subprocess.")
"""What no answer needs: a teacher is told where a submission names it."""
MOST_READ = 100_000
"""Characters of a cell that is searched for the student: the tree of a larger one takes gigabytes."""


@dataclass(frozen=True)
class Submission:
    """What a notebook says of itself, read as text; nothing of it is run.

    Attributes:
        path: its file.
        student: the literal given to ``student`` in the notebook, if any.
        assignment: name of the assignment in the notebook's metadata, if any.
        cells: number and source of each code cell.
    """

    path: Path
    student: str | None
    assignment: str | None
    cells: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Mark:
    """Points for one part of a question.

    Attributes:
        question: name of the function or value.
        part: what the points are for.
        points: those earned.
        out_of: those to be had.
        message: why.
    """

    question: str
    part: str
    points: float
    out_of: int
    message: str


@dataclass(frozen=True)
class Report:
    """A graded submission.

    Attributes:
        submission: its file.
        student: whose it is.
        assignment: name of the assignment.
        points: those earned.
        out_of: those to be had.
        marks: where they come from.
        stopped: what was ended before it answered; empty where all of it ran.
        remarks: what a teacher may want to look at.
    """

    submission: str
    student: str
    assignment: str
    points: float
    out_of: int
    marks: tuple[Mark, ...]
    stopped: tuple[str, ...]
    remarks: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        return asdict(self)


def load_assignment(folder: Path, name: str) -> Assignment:
    """Load the key of an assignment, a Python file of the teacher's.

    Args:
        folder: where the keys are.
        name: name of the assignment, which must be one of theirs.

    Returns:
        :class:`Assignment`.

    Raises:
        PathwayError: if there is no such assignment.
    """
    # From the listing: a name out of a submission must not lead to another file.
    found = {path.stem: path for path in sorted(folder.glob("[0-9]*.py"))}
    if name not in found:
        known = ", ".join(found) if found else "no assignment at all"
        raise PathwayError(f"no assignment {name!r} in {folder}, which holds {known}")
    spec = importlib.util.spec_from_file_location(f"assignment_{name}", found[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    questions = module.QUESTIONS
    return Assignment(name, module.TITLE, tuple(questions))


def read_submission(path: Path) -> Submission:
    """Read a submitted notebook, as text.

    Args:
        path: an ``.ipynb`` file.

    Returns:
        :class:`Submission`.

    Raises:
        PathwayError: if it is no notebook.
    """
    try:
        if not path.is_file():
            raise PathwayError(f"{path} is no file; give a notebook")
        if path.stat().st_size > 2 * MOST_BYTES:
            raise PathwayError(f"{path} has {path.stat().st_size:,} bytes; clear its outputs and give it again")
        told = json.loads(path.read_text(encoding="utf-8"))
        cells = tuple(
            (number, "".join(cell["source"]))
            for number, cell in enumerate(told["cells"])
            if cell["cell_type"] == "code"
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, PathwayError):
            raise
        raise PathwayError(f"{path} is no notebook that can be read ({type(error).__name__}: {error})") from error
    metadata = told.get("metadata")
    ours = metadata.get("pathways") if isinstance(metadata, dict) else None
    assignment = ours.get("assignment") if isinstance(ours, dict) else None
    return Submission(path, _student(cells), _name(assignment), cells)


def _student(cells: tuple[tuple[int, str], ...]) -> str | None:
    """Return the literal of the first ``student = "..."``."""
    for _, source in cells:
        if len(source) > MOST_READ:
            continue
        try:
            statements = ast.parse(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for statement in statements:
            if (
                isinstance(statement, ast.Assign)
                and any(isinstance(name, ast.Name) and name.id == "student" for name in statement.targets)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                return _name(statement.value.value)
    return None


def _name(value: object) -> str | None:
    """Return what a stranger gave as a name, if it is one."""
    return one_line(value).strip()[:100] or None if isinstance(value, str) else None


def default_folder() -> Path:
    """Return the folder of the assignments in a checkout of the repository."""
    return Path(pathwaylib.__file__).parents[1] / "assignments"


def grade(submission: Submission, assignment: Assignment, student: str, *, limits: Limits, secret: str = "") -> Report:
    """Run a submission in a process of its own and judge its answers in this one.

    The oracles are computed after the student's process has ended, from inputs that are drawn anew. An answer that no
    judge can take costs its part, and nothing else.

    Args:
        submission: what was handed in.
        assignment: its key.
        student: whose it is: decides the inputs.
        limits: of time and memory.
        secret: makes the hidden inputs unforeseeable.

    Returns:
        :class:`Report`.
    """
    seeds = {True: student_seed(student, assignment.name), False: student_seed(student, assignment.name, f"!{secret}")}
    rubric = [(question, part) for question in assignment.questions for part in question.parts]
    asked = [
        (question.name, [make() for make in part.tests(seeds[part.own])], part.finite) for question, part in rubric
    ]
    ran = run_submission(submission.cells, asked, limits)
    marks = []
    for (question, part), answers in zip(rubric, ran.answers, strict=True):
        if isinstance(answers, str):
            message, share = answers, 0.0
        else:
            tests = part.tests(seeds[part.own])
            try:
                verdict, share = part.judge(answers, tests)
                message = one_line(verdict.message)  # it may list the shapes of a stranger's many tensors
            except Exception as error:  # whatever a stranger's tensors make of a judge
                message, share = one_line(f"the answer cannot be judged ({type(error).__name__}: {error})"), 0.0
        marks.append(Mark(question.name, part.title, round(share * part.points, 2), part.points, message))
    sources = [source for _, source in submission.cells]
    # The first code cell installs the library where it is missing, by a subprocess.
    searched = {word: sources[1:] if word == "subprocess." else sources for word in SUSPECT}
    named = sorted(word for word in SUSPECT if any(word in source for source in searched[word]))
    remarks = [*ran.failures]
    if submission.student is not None and submission.student.casefold() != student.strip().casefold():
        remarks.append(f"the notebook says that it is {submission.student!r}'s")
    remarks += [f"names {word!r}, which no answer needs" for word in named]
    return Report(
        str(submission.path),
        student,
        assignment.name,
        round(sum(mark.points for mark in marks), 2),
        assignment.points,
        tuple(marks),
        ran.stopped,
        tuple(remarks),
    )
