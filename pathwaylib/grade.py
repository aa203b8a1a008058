"""``python -m pathwaylib.grade submission.ipynb``: grade submissions of the book's assignments.

Exit codes: 0, everything was run and graded, whatever the points; 1, graded, but some submission could not be read,
does not say whose or which it is, or had to be stopped; 2, the command itself is wrong (no such file or assignment,
nobody to grade, ...).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .commandline import run_app
from .errors import PathwayError
from .files import atomic_write
from .grading.process import Limits, one_line
from .grading.questions import Assignment
from .grading.report import Report, Submission, default_folder, grade, load_assignment, read_submission

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SECRET = "PATHWAYS_GRADING_SECRET"


@app.command()
def grade_command(
    submissions: Annotated[list[Path], typer.Argument(help="Notebooks that were handed in.")],
    student: Annotated[
        str | None, typer.Option(help="Whose submission it is; else what the notebook gives to `student`.")
    ] = None,
    assignment: Annotated[str | None, typer.Option(help="Name of the assignment; else the notebook's own.")] = None,
    assignments: Annotated[
        Path | None, typer.Option(help="Folder with the keys; else `assignments` of the repository.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the reports to this file.")] = None,
    seconds: Annotated[float, typer.Option(help="For the notebook, and again for each part of a question.")] = 60.0,
    memory: Annotated[float, typer.Option(help="Gigabytes of address space for the student's process.")] = 8.0,
    within: Annotated[
        str, typer.Option(help="Start the student's process by this command, such as one that makes a container.")
    ] = "",
) -> None:
    """Grade submissions.

    Each runs in a process of its own, with limits of time and memory, and what it answers is read as data. That is a
    process, not a container: it can read the files that you can read, and use the network. Grade strangers' work as a
    user who owns nothing, or give --within.

    Hidden inputs depend on the student; set PATHWAYS_GRADING_SECRET, and nobody can foresee them.

    Exit codes: 0, all graded; 1, graded, but some submission was unreadable, does not say whose or which it is, or had
    to be stopped; 2, the command is wrong.
    """
    if student is not None and len(submissions) > 1:
        raise PathwayError(f"student is {student!r} for {len(submissions)} submissions; give it for one at a time")
    folder = assignments or default_folder()
    if not folder.is_dir():
        raise PathwayError(f"no folder {folder}; give --assignments, the folder `assignments` of the repository")
    limits = Limits(seconds, memory, within)
    load = cache(partial(load_assignment, folder))
    if assignment:
        load(assignment)
    # First everything that can be wrong with the command, then what takes time.
    ready: list[tuple[Submission, Assignment, str]] = []
    unreadable: list[str] = []
    unnamed: list[str] = []
    for path in submissions:
        if not path.exists():
            raise PathwayError(f"no file {path}")
        try:
            submission = read_submission(path)
        except PathwayError as error:
            unreadable.append(str(error))
            continue
        try:
            ready.append((submission, *named(submission, student, assignment, load)))
        except PathwayError as error:
            unnamed.append(str(error))
    unreadable += unnamed
    if unnamed and not ready:
        raise PathwayError("\n".join(unreadable))
    if json_file is not None:
        require_writable(json_file)
    console = Console()
    reports = []
    for submission, key, whose in ready:
        report = grade(submission, key, whose, limits=limits, secret=os.environ.get(SECRET, ""))
        reports.append(report)
        show(report, key.title, console)
    if len(reports) > 1:
        summary = Table("student", "assignment", "points", title="All submissions")
        for report in reports:
            summary.add_row(Text(report.student), report.assignment, f"{report.points:g} / {report.out_of}")
        console.print(summary)
    for line in unreadable:
        Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False, style="red")
    if json_file is not None:
        with atomic_write(json_file) as temporary:
            told = {"reports": [report.as_json() for report in reports], "unreadable": unreadable}
            # Other characters escaped: a file's name may hold some that no encoding has.
            temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if unreadable or any(report.stopped for report in reports):
        raise typer.Exit(1)


def named(
    submission: Submission, student: str | None, assignment: str | None, load: Callable[[str], Assignment]
) -> tuple[Assignment, str]:
    """Return which assignment a submission is and whose, as the command says, or else the notebook."""
    path = submission.path
    whose = one_line(student or "").strip() or submission.student
    if whose is None:
        raise PathwayError(f"{path} does not say `student = ...`; give --student")
    name = assignment or submission.assignment
    if name is None:
        raise PathwayError(f"{path} does not say which assignment it is; give --assignment")
    try:
        return load(name), whose
    except PathwayError as error:
        raise PathwayError(f"{path} names another assignment: {error}; give --assignment") from error


def require_writable(path: Path) -> None:
    """Raise :class:`PathwayError` where the grades could not be written, before hours are spent on them."""
    if path.suffix == ".ipynb":  # `--json *.ipynb` would overwrite the first of them
        raise PathwayError(f"--json is {path}, a notebook; give the file for the grades, such as grades.json")
    if path.exists() and not path.is_file():
        raise PathwayError(f"--json is {path}, which is no file but a folder or a device; give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise PathwayError(f"--json is {path}, which cannot be written ({error}); give another file") from error


def show(report: Report, title: str, console: Console) -> None:
    """Print a report; what comes from a submission is printed as plain text."""
    table = Table("question", "part", "points", "why", title=Text(f"{title}: {report.student}"))
    last = ""
    for mark in report.marks:
        question = mark.question if mark.question != last else ""
        table.add_row(question, mark.part, f"{mark.points:g} / {mark.out_of}", Text(mark.message))
        last = mark.question
    table.add_section()
    table.add_row("all", "", f"{report.points:g} / {report.out_of}", "")
    console.print(table)
    for line in report.stopped:
        console.print(Text(f"Stopped: {line}", style="red"))
    for line in report.remarks:
        console.print(Text(f"Remark: {line}", style="yellow"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can mend ends it with exit code 2 and no traceback."""
    run_app(app, "python -m pathwaylib.grade", arguments)


def shield() -> None:
    """Keep the user's other processes, such as a student's, out of this one's memory and environment (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def end_in_order() -> None:
    """Let a request to end, and a terminal that closes, end the student's process too, as Ctrl-C does."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    shield()
    end_in_order()
    main()
