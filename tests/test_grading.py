"""Assignments and their grader: right answers earn everything, and no submission can do more than answer."""

from __future__ import annotations

import ast
import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import notebooks
import pytest
import torch
from nbformat import v4
from safetensors.torch import save
from torch import nn

from pathwaylib import Pathway, PathwayError, planted_network
from pathwaylib.exercises.judging import Verdict, as_tensors
from pathwaylib.grade import main, shield
from pathwaylib.grading import (
    Assignment,
    Compared,
    Limits,
    Part,
    Question,
    grade,
    load_assignment,
    read_submission,
    report,
    student_seed,
)
from pathwaylib.grading.exchange import decode, encode
from pathwaylib.grading.process import Ran, _answer, one_line, run_submission
from pathwaylib.grading.runner import run_cell

ROOT = Path(__file__).parents[1]
ASSIGNMENTS = ROOT / "assignments"
NAMES = sorted(path.stem for path in ASSIGNMENTS.glob("*.ipynb"))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    for name in NAMES:
        notebooks.release(ASSIGNMENTS / f"{name}.ipynb", folder)
    return folder


def key_of(name: str) -> Assignment:
    return load_assignment(ASSIGNMENTS, name)


def parts(key: Assignment, student: str) -> Iterator[tuple[str, Part, int]]:
    for question in key.questions:
        for part in question.parts:
            yield question.name, part, student_seed(student, key.name, "" if part.own else "!")


# --- The assignments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_solutions_earn_every_point_for_every_student(name: str, released: Path) -> None:
    """The teachers' version, run here: it is ours, and may be trusted."""
    key = key_of(name)
    assert key.points == 25
    assert 4 <= len(key.questions) <= 6
    code = [source for _, source in read_submission(released / "instructor" / f"{name}.ipynb").cells[1:]]
    for student in ("ada", "ben"):
        names: dict[str, Any] = {}
        for source in code:
            exec(source.replace('student = ""', f"student = {student!r}"), names)
        for question, part, seed in parts(key, student):
            tests = part.tests(seed)
            answer = names[question]
            found = [as_tensors(answer(*make()) if callable(answer) else answer) or () for make in tests]
            verdict, share = part.judge(found, tests)
            assert share == 1, f"{question}, {part.title}, {student}: {verdict.message}"


@pytest.mark.parametrize("name", NAMES)
def test_what_students_are_given_runs_and_earns_nothing(name: str, released: Path) -> None:
    given: dict[str, Any] = {}
    submission = read_submission(released / "student" / f"{name}.ipynb")
    assert (submission.assignment, submission.student) == (name, None)
    for _, source in submission.cells[1:]:
        exec(source, given)
    for question, part, seed in parts(key_of(name), "ada"):
        answer = given[question]
        # None and ... are what the runner calls unfinished.
        assert (answer(*part.tests(seed)[0]()) if callable(answer) else answer) in (None, ...)


@pytest.mark.parametrize("name", NAMES)
def test_typical_mistakes_are_told_and_cost_alike(name: str) -> None:
    """Each earns less than everything in some part, says so, and earns the same whoever makes it."""
    key = key_of(name)
    for question in key.questions:
        earned: dict[str, set[float]] = {}
        said: set[str] = set()
        known = {
            message: mistake
            for part in question.parts
            if isinstance(part.judge, Compared)
            for message, mistake in part.judge.mistakes.items()
        }
        for message, (mistake, _) in known.items():
            for student in ("ada", "ben"):
                points = 0.0
                for part in question.parts:
                    tests = part.tests(student_seed(student, name, "" if part.own else "!"))
                    verdict, share = part.judge([as_tensors(mistake(*make())) or () for make in tests], tests)
                    said.add(verdict.message)
                    points += share * part.points
                earned.setdefault(message, set()).add(points)
            assert message in said
            assert len(earned[message]) == 1, f"{question.name}: {message!r} earns {earned[message]}"
            assert 0 < min(earned[message]) < question.points


@pytest.mark.parametrize(("name", "question"), [("1_responses", "woken"), ("1_responses", "smallest")])
def test_no_constant_is_right_for_any_student(name: str, question: str) -> None:
    """Of random networks some have nothing to find; every student also meets one that has."""
    key = key_of(name)
    for student in (f"s{number}" for number in range(6)):
        for asked, part, seed in parts(key, student):
            if asked == question and isinstance(part.judge, Compared):
                tests = part.tests(seed)
                right = [as_tensors(part.judge.oracle(*make())) or () for make in tests]
                for fill in (torch.zeros_like, torch.ones_like):
                    assert part.judge([tuple(map(fill, answer)) for answer in right], tests)[1] < 1, (part, student)


def test_a_map_is_diffuse_whatever_its_scale() -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[0, 0] = True
    (inside,) = [
        part for question in key_of("3_evaluation").questions for part in question.parts if "2 %" in part.title
    ]
    for level, share in ((1.0, 1), (1e-320, 1), (1e308, 1), (0.0, 0)):
        spread = torch.full(mask.shape, level, dtype=torch.float64)
        assert inside.judge([(spread,)], [lambda: (mask,)])[1] == share
    two_outside = torch.zeros(mask.shape, dtype=torch.float64)
    two_outside[0, :3] = 1.7e308
    assert inside.judge([(two_outside,)], [lambda: (mask,)])[1] == 0


@pytest.mark.parametrize("name", NAMES)
def test_released_notebooks_hold_no_solution(name: str, released: Path) -> None:
    master = nbformat.read(ASSIGNMENTS / f"{name}.ipynb", as_version=4)
    student = (released / "student" / f"{name}.ipynb").read_text(encoding="utf-8")
    teacher = (released / "instructor" / f"{name}.ipynb").read_text(encoding="utf-8")
    shown = "\n".join(cell.source for cell in nbformat.reads(student, 4).cells)
    secrets = 0
    for cell in master.cells:
        tags = cell.metadata.get("tags", ())
        if "solution" in tags or "instructor" in tags:
            assert cell.source in "\n".join(cell.source for cell in nbformat.reads(teacher, 4).cells)
        if "solution" in tags:
            returned = [line for line in cell.source.splitlines() if line.strip().startswith("return ")]
            for line in returned:
                secrets += 1
                assert line not in shown
        if "instructor" in tags:
            assert cell.source not in shown
    assert secrets >= 4
    assert "For teachers" not in student
    assert "solution" not in student
    assert f'"assignment": "{name}"' in student
    assert "    ...\\n" in student
    assert "    ...\\n" not in teacher


def test_masters_are_stored_clean() -> None:
    assert len(NAMES) == 4
    for name in NAMES:
        path = ASSIGNMENTS / f"{name}.ipynb"
        notebook = notebooks.read(path)
        assert nbformat.writes(notebooks.normalised(notebook)) == nbformat.writes(notebooks.read(path))
        assert not any(cell.get("outputs") for cell in notebook.cells)
        tagged = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", ())]
        assert tagged.count("stub") == tagged.count("solution") == tagged.count("instructor")
        stated = sum(
            int(cell.source.split(" points)")[0].rsplit("(", 1)[1])
            for cell in notebook.cells
            if cell.source.startswith("## ") and " points)" in cell.source
        )
        assert stated == 25
        assert notebooks.INSTALL_CELL in {cell.source for cell in notebook.cells}


def test_seeds_are_stable_and_differ() -> None:
    assert student_seed("ada", "1_responses") == 96586559
    seeds = {student_seed(who, name, secret) for who in ("ada", "ben") for name in NAMES for secret in ("", "x", "y")}
    assert len(seeds) == 2 * 4 * 3


def test_arguments_arrive_as_they_were_sent() -> None:
    planted = planted_network(2, seed=0)
    pathway = planted.critical.pathway()
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()).double()
    tensors: dict[str, torch.Tensor] = {}
    told = json.loads(json.dumps(encode((planted.model, planted.x, pathway, convolution, 0.5, "x"), tensors)))
    model, x, sent, double, number, text = decode(told, tensors)
    assert torch.equal(model(x), planted.model(planted.x))
    assert isinstance(sent, Pathway)
    assert (sent.iou(pathway) == 1).all()
    image = torch.rand(1, 1, 11, 11, dtype=torch.float64)
    assert torch.equal(double(image), convolution(image))
    assert (number, text) == (0.5, "x")
    x.zero_()
    assert not torch.equal(x, decode(told, tensors)[1])


# --- The command, as a teacher gives it ------------------------------------------------------------------------------


def submitted(path: Path, *cells: str, student: str = "ada", assignment: str | None = "3_evaluation") -> Path:
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in ("", f"student = {student!r}", *cells)])
    if assignment is not None:
        notebook.metadata["pathways"] = {"assignment": assignment}
    nbformat.write(notebook, path)
    return path


def run(*arguments: str | Path) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    return 0


def test_a_handed_in_notebook_is_graded_in_a_process_of_its_own(released: Path, tmp_path: Path) -> None:
    """The solution of assignment 3, with one function wrong, one missing, and one that is not finished."""
    notebook = notebooks.read(released / "instructor" / "3_evaluation.ipynb")
    for cell in notebook.cells:
        cell.source = cell.source.replace('student = ""', 'student = "Ada"').replace("1.01", "0.0")
    notebook.cells.append(
        v4.new_code_cell("del recovery\ndef survival(*_):\n    ...\n%matplotlib inline\n!echo 25 / 25")
    )
    notebooks.write(notebook, tmp_path / "ada.ipynb")
    assert run(tmp_path / "ada.ipynb", "--json", tmp_path / "grades.json") == 0
    (report,) = json.loads((tmp_path / "grades.json").read_text())["reports"]
    points: dict[str, float] = {}
    for mark in report["marks"]:
        points[mark["question"]] = points.get(mark["question"], 0) + mark["points"]
    assert points == {"removed": 5, "score": 6, "survival": 0, "recovery": 0, "points_and_lies": 2}
    assert (report["points"], report["out_of"], report["student"], report["stopped"]) == (13, 25, "Ada", [])
    messages = {mark["question"]: mark["message"] for mark in report["marks"]}
    assert "nothing is returned yet" in messages["survival"]
    assert "recovery is not defined" in messages["recovery"]


def test_wrong_commands_and_files_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1_evil.py").write_text("raise SystemExit('run')")
    assert run(tmp_path / "none.ipynb") == 2
    assert run(submitted(tmp_path / "a.ipynb", student="")) == 2
    assert "--student" in capsys.readouterr().err
    assert run(submitted(tmp_path / "a.ipynb", assignment=None)) == 2
    assert "--assignment" in capsys.readouterr().err
    # A name out of a submission leads to no other file.
    for name in ("../1_evil", str(tmp_path / "1_evil"), "1_evil", "1_responses.py"):
        assert run(submitted(tmp_path / "a.ipynb", assignment=name)) == 2
        assert "1_responses, 2_contributions" in " ".join(capsys.readouterr().err.split())
    for limit in ("--seconds", "--memory"):
        for value in ("0", "nan", "1e11", "1e308"):
            assert run(tmp_path / "a.ipynb", limit, value) == 2
            assert "give a number above 0" in " ".join(capsys.readouterr().err.split())
    assert run(tmp_path / "a.ipynb", tmp_path / "a.ipynb", "--student", "ada") == 2
    with pytest.raises(PathwayError, match="no assignment"):
        load_assignment(tmp_path / "nowhere", "1")
    for number, text in enumerate(["{", "[]", '{"cells": 3}', '{"cells": [{"cell_type": "code"}]}', "[" * 100_000]):
        broken = tmp_path / f"broken-{number}.ipynb"
        broken.write_text(text)
        assert run(broken) == 1, text[:20]


KEY = """
from pathwaylib.grading import Checked, Part, Question
TITLE = "Tiny"
QUESTIONS = [Question("f", "F", (Part("p", 1, lambda seed: [lambda: ()], Checked(None)),))]
"""


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[str, str]:
    """The options of a folder with one small key, ``1_tiny``."""
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "1_tiny.py").write_text(KEY)
    return "--assignments", str(folder)


def answer_with(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Let every part of a submission be answered so, without a process."""
    monkeypatch.setattr(report, "run_submission", lambda _, asked, limits: Ran((answer,) * len(asked), (), ()))


def test_no_notebook_stops_the_others(
    tmp_path: Path, tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(monkeypatch, "it is wrong")
    faulty = [
        submitted(tmp_path / "nobody.ipynb", student="", assignment="1_tiny"),
        submitted(tmp_path / "which.ipynb", assignment=None),
        submitted(tmp_path / "unknown.ipynb", assignment="9_none"),
    ]
    good, grades = submitted(tmp_path / "good.ipynb", assignment="1_tiny"), tmp_path / "grades.json"
    assert run(*tiny, *faulty, good, "--json", grades) == 1
    told = json.loads(grades.read_text())
    assert [graded["submission"] for graded in told["reports"]] == [str(good)]
    shown = capsys.readouterr().err
    for path, line in zip(faulty, told["unreadable"], strict=True):
        assert line.startswith(f"{path} ")
        assert line in shown
        assert "; give --" in line
    # Nobody to grade: that is the command's fault, and all of them are named.
    assert run(*tiny, *faulty) == 2
    shown = capsys.readouterr().err
    assert all(str(path) in shown for path in faulty)
    # So is an assignment that the command names.
    assert run(*tiny, good, "--assignment", "9_none") == 2


def test_text_that_no_terminal_can_show_is_shown(
    tmp_path: Path, tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one_line("a\ud800\n\x1b") == "a\\ud800  "
    assert student_seed("\ud800", "1") == student_seed(one_line("\ud800"), "1")
    assert student_seed("a", "1", "\udcff") != student_seed("a", "1")
    answer_with(monkeypatch, "ValueError: zażółć")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    students = {"a.ipynb": "\ud800", "b.ipynb": "Łucja"}
    if sys.platform == "linux":  # elsewhere a file's name is text
        students[os.fsdecode(b"gr\xfcn.ipynb")] = "ada"
    paths = [submitted(tmp_path / name, student=student, assignment="1_tiny") for name, student in students.items()]
    grades = tmp_path / "grades.json"
    assert run(*tiny, *paths, "--json", grades) == 0
    told = json.loads(grades.read_text())["reports"]
    assert [graded["submission"] for graded in told] == list(map(str, paths))
    assert [graded["student"] for graded in told] == list(map(one_line, students.values()))
    assert run(*tiny, paths[0], "--student", "\udcff", "--json", grades) == 0
    assert json.loads(grades.read_text())["reports"][0]["student"] == "\\udcff"
    # One that cannot be read, too.
    paths[-1].write_text("[]")
    assert run(*tiny, paths[-1], "--json", grades) == 1
    assert str(paths[-1]) in json.loads(grades.read_text())["unreadable"][0]


def test_where_grades_cannot_be_written_nothing_is_graded(
    tmp_path: Path, tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(report, "run_submission")
    submission = submitted(tmp_path / "a.ipynb", assignment="1_tiny")
    before = submission.read_bytes()
    # The last is what `--json *.ipynb` comes to, without a name for the grades.
    for target in (tmp_path, submission / "grades.json", Path("/dev/null/grades.json"), submission):
        assert run(*tiny, submission, "--json", target) == 2
        assert f"--json is {target}" in capsys.readouterr().err.replace("\n", "")
    assert submission.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_ending_the_grader_ends_the_students_process(tmp_path: Path, tiny: tuple[str, str]) -> None:
    mark = tmp_path / "pid"
    cell = f"import os\nopen({str(mark)!r}, 'w').write(f'{{os.getpid()}}\\n')\nwhile True: pass"
    command = [sys.executable, "-m", "pathwaylib.grade", *tiny]
    with subprocess.Popen([*command, submitted(tmp_path / "a.ipynb", cell, assignment="1_tiny")]) as grader:
        deadline = time.monotonic() + 90
        while not (mark.exists() and mark.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            assert grader.poll() is None
            time.sleep(0.05)
        grader.send_signal(signal.SIGTERM)
        code = grader.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), signal.SIGKILL)
    assert code == 128 + signal.SIGTERM


def test_the_student_is_read_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "run"
    cell = f"student = open({str(mark)!r}, 'w').name"
    assert read_submission(submitted(tmp_path / "a.ipynb", student="ada")).student == "ada"
    notebook = v4.new_notebook(cells=[v4.new_code_cell(cell), v4.new_code_cell("student = ((")])
    nbformat.write(notebook, tmp_path / "b.ipynb")
    assert read_submission(tmp_path / "b.ipynb").student is None
    assert not mark.exists()
    # Such a cell's tree would take gigabytes of the grader's memory.
    assert read_submission(submitted(tmp_path / "c.ipynb", student="a" * 10**6)).student is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_no_notebook(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.ipynb")
    assert run(tmp_path / "a.ipynb") == 1


def test_only_the_install_cell_may_install(tmp_path: Path) -> None:
    for cells, words in (
        ((notebooks.INSTALL_CELL,), set()),
        ((notebooks.INSTALL_CELL + "\nopen('/proc/self/maps'), load_assignment",), {"/proc/", "load_assignment"}),
        (("", "subprocess.run('ls')"), {"subprocess."}),
    ):
        nbformat.write(v4.new_notebook(cells=list(map(v4.new_code_cell, cells))), tmp_path / "a.ipynb")
        found = grade(read_submission(tmp_path / "a.ipynb"), Assignment("a", "A", ()), "ada", limits=LIMITS)
        assert set(found.remarks) == {f"names {word!r}, which no answer needs" for word in words}


# --- What submissions try --------------------------------------------------------------------------------------------

LIMITS = Limits(seconds=90)  # importing PyTorch alone takes long on a busy machine


def attempt(*cells: str, names: tuple[str, ...] = ("f",), limits: Limits = LIMITS, **options: Any) -> Ran:
    asked = [(name, [(torch.tensor([1.0, 2.0]),)], options.get("finite", True)) for name in names]
    return run_submission(list(enumerate(cells)), asked, limits)


ATTACKS = """
import json, os, sys
from pathlib import Path
import torch
import pathwaylib, pathwaylib.exercises.judging as judging, pathwaylib.grading.questions as questions

# Whatever is printed or patched here stays here.
print(json.dumps({"points": 25, "reports": [{"points": 25}]}))
judging.equal = lambda *_: True
judging.judge = questions.judge = lambda *_: judging.Verdict(True, "right")
questions.Compared.__call__ = lambda *_: (judging.Verdict(True, "right"), 1.0)
sys.stdout.write("x" * 10_000_000)

here = Path.cwd()
def honest(x): return x.sum()
def not_finite(x): return x / 0
def other_form(x): return {"points": 25}
def a_string(x): return "25 / 25"
def raises(x): raise KeyError("[bold red]25[/] / 25\\x1b[2J" * 100)
def exits(x): sys.exit(0)
def changes_its_input(x): x.zero_(); return x
def too_large(x): return torch.zeros(2**22)  # 32 MB of float64
def asks(x): return input()
def no_room(x): return torch.zeros(2**36).sum()
def calls_names(x): return torch.tensor(float(len(os.environ.get("PATHWAYS_GRADING_SECRET", ""))))
def link(x): raise ValueError
def pipe(x): raise ValueError
def pickled(x): raise ValueError
def wrong_type(x): raise ValueError
def forges(x):
    from safetensors.torch import save_file
    for number in range(11, 15): (here / f"{number}.json").unlink()
    os.symlink("/dev/zero", here / "11.safetensors")
    os.mkfifo(here / "12.safetensors")
    (here / "13.safetensors").write_bytes(b"cposix\\nsystem\\n(S'touch /tmp/owned'\\ntR.")
    save_file({"0/0": torch.tensor(3)}, here / "14.safetensors")
    os._exit(0)
def after_all(x): return x.sum()
"""
"""The parts are numbered in this order, which those that leave files of their own know."""


def test_no_submission_can_do_more_than_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHWAYS_GRADING_SECRET", "hidden")
    names = tuple(node.name for node in ast.parse(ATTACKS).body if isinstance(node, ast.FunctionDef))
    assert names.index("link") == 11
    broken = ("1 / 0", "import sys; sys.exit()", "def (", "big = bytearray(2**40)", "%timeit f\n!ls")
    ran = attempt(*broken, ATTACKS, names=names, limits=Limits(seconds=90, within="nice -n 1"))
    assert [failure.split(":")[0] for failure in ran.failures] == ["cell 0", "cell 1", "cell 2", "cell 3"]
    answers = dict(zip(names, ran.answers, strict=True))
    for name in ("honest", "after_all"):
        assert torch.equal(answers[name][0][0], torch.tensor(3.0, dtype=torch.float64)), answers[name]  # type: ignore[index]
    assert answers["changes_its_input"][0][0].tolist() == [0, 0]  # type: ignore[index]
    assert answers["calls_names"][0][0] == 0, "the secret reached the student's process"  # type: ignore[index]
    told = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    assert "NaN or infinity" in told["not_finite"]
    assert "dict" in told["other_form"]
    assert "a str is no tensor" in told["a_string"]
    assert len(told["raises"]) <= 300
    assert "\x1b" not in told["raises"]
    assert "SystemExit" in told["exits"]
    assert "File too large" in told["too_large"] or "left a file" in told["too_large"]
    assert "EOFError" in told["asks"]
    assert "memory" in told["no_room"]
    assert "left a file that is no answer" in told["link"]
    assert "left a file that is no answer" in told["pipe"]
    assert "cannot be read" in told["pickled"]
    assert "not of float64" in told["wrong_type"]
    assert not Path("/tmp/owned").exists()
    assert ran.stopped == ("forges: ended its process",)
    # The grader's own judges are as they were.
    judge = Compared(lambda x: x.sum())
    assert judge([(torch.tensor(4.0),)], [lambda: (torch.ones(3),)])[1] == 0
    assert judge([(torch.tensor(3.0),)], [lambda: (torch.ones(3),)])[1] == 1


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("while True: pass", "took more than 2 s"),
        ("import os; os._exit(0)", "ended its process"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", "took more than 2 s"),
        # It answers to nobody any more, but its results are not waited for.
        ("import os\nif os.fork(): os._exit(0)\nwhile True: pass", "ended its process"),
    ],
)
def test_a_notebook_that_does_not_end_well_is_stopped(cell: str, why: str) -> None:
    started = time.monotonic()
    ran = attempt(cell, limits=Limits(seconds=2))
    assert time.monotonic() - started < 20
    assert ran.stopped == (f"the notebook: {ran.answers[0]}",)
    assert why in ran.answers[0]


def test_files_left_before_their_time_are_answers_and_nothing_else(tmp_path: Path) -> None:
    """A notebook that writes the answer files itself has answered, as far as they are right."""
    secret = tmp_path / "grades.json"
    secret.write_text("[]")
    cell = f"""
import os
open('ready', 'w').write('[' * 5000)
open('0.safetensors', 'wb').write(b'\\xff' * 100)
os.symlink({str(secret)!r}, '1.json')
os.mkdir('2.json')
os._exit(0)
"""
    ran = attempt(cell, names=("a", "b", "c", "d"))
    assert "cannot be read" in ran.answers[0]
    assert ran.answers[3] == "ended its process"
    assert ran.failures == ()
    assert "no answer" in ran.answers[1]
    assert "no answer" in ran.answers[2]
    assert secret.read_text() == "[]"


def test_what_cannot_be_started_is_said() -> None:
    for within in ("no-such-program", "nice '"):
        with pytest.raises(PathwayError, match="cannot be started"):
            attempt("f = 1.0", limits=Limits(within=within))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such nests, and no rm")
def test_a_nest_of_folders_that_cannot_be_removed_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    nest = "import os\nfor _ in range(1200):\n    os.mkdir('x')\n    os.chdir('x')\nos._exit(0)"
    try:
        assert attempt(nest).stopped == ("the notebook: ended its process",)
    finally:
        subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)  # pytest could not


def test_an_answer_of_a_form_that_no_question_asks_for_is_none(tmp_path: Path) -> None:
    for dimensions, kind in ((4, tuple), (65, str)):
        content = save({"0/0": torch.ones([1] * dimensions, dtype=torch.float64)})
        (tmp_path / "0.safetensors").write_bytes(content)
        assert isinstance(_answer(tmp_path, 0, 1, True), kind)


def test_an_answer_that_cannot_be_judged_costs_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("too\nlarge" * 1000)

    def wordy(*_: Any) -> Any:
        return Verdict(True, "long " * 1000), 1.0

    rubric = tuple(Part("p", 2, lambda _: [lambda: ()], judge) for judge in (fails, wordy))
    answer_with(monkeypatch, ((torch.ones(1),),))
    submission = read_submission(submitted(tmp_path / "a.ipynb"))
    found = grade(submission, Assignment("a", "A", (Question("f", "F", rubric),)), "ada", limits=LIMITS)
    assert [mark.points for mark in found.marks] == [0, 2]
    assert found.marks[0].message.startswith("the answer cannot be judged (RuntimeError: too large")
    assert max(len(mark.message) for mark in found.marks) <= 300


def test_lines_that_only_look_like_commands_are_run() -> None:
    """A remainder may begin a line: only what is no Python is left out."""
    cell = 'x = (17\n     % 5)\ny = """\n% a\n!b\n"""\nz = 17 \\\n    % 5\n'
    commands = (
        "",
        "%matplotlib inline\n",
        "%%time\n!echo it's (\n",
        "?sum\nsum?\n",
        "if 1:\n    %time f\n",
        "%cd a\r\n\r!ls\r",
    )
    for command in commands:
        names: dict[str, Any] = {}
        assert run_cell(1, command + cell + command, names) is None
        assert (names["x"], names["y"], names["z"]) == (2, "\n% a\n!b\n", 2)
    assert run_cell(1, "w = '\x0c\u2028'", names) is None
    assert names["w"] == "\x0c\u2028"
    assert "SyntaxError" in str(run_cell(1, "%matplotlib inline\ndef (", {}))
    # Nor do the runner's imports from the future reach it.
    assert run_cell(1, "def f(x: int): ...\nassert f.__annotations__ == {'x': int}", {}) is None


# --- The site without solutions --------------------------------------------------------------------------------------


def test_chapters_lose_their_solutions_and_nothing_else() -> None:
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        chapter = notebooks.read(path)
        short = notebooks.without_solutions(notebooks.read(path))
        text = "\n".join(cell.source for cell in short.cells)
        assert "solution-" not in text
        kept = {cell.id for cell in short.cells}
        for cell in chapter.cells:
            solves = "exercise-solution" in cell.metadata.get("tags", ()) or "{solution-" in cell.source
            assert solves != (cell.id in kept) or not solves
        stubs = [cell for cell in short.cells if "exercise-stub" in cell.metadata.get("tags", ())]
        solutions = [cell for cell in chapter.cells if "exercise-solution" in cell.metadata.get("tags", ())]
        assert len(stubs) == len(solutions) >= 3
        assert text.count("{exercise}") == len(stubs)
    broken = v4.new_notebook(cells=[v4.new_markdown_cell(":::{solution-start} x")])
    with pytest.raises(ValueError, match="solution-end"):
        notebooks.without_solutions(broken)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has this switch")
def test_the_grader_closes_its_memory_to_other_processes() -> None:
    """As root nothing is closed, so only the switch is looked at."""
    system = ctypes.CDLL(None)
    before = system.prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE
    try:
        shield()
        assert system.prctl(3, 0, 0, 0, 0) == 0
    finally:
        system.prctl(4, before, 0, 0, 0)


def test_help_says_what_a_process_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "process, not a container" in " ".join(capsys.readouterr().out.replace("│", " ").split())
