"""What an assignment asks, and how the answers, which are data, are judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..exercises.judging import Answer, Arguments, Verdict, judge

Given = tuple[Tensor, ...]
"""One answer: what a function returned for one call, as tensors of float64."""
Judge = Callable[[Sequence[Given], Sequence[Arguments]], tuple[Verdict, float]]


def student_seed(student: str, assignment: str, secret: str = "") -> int:
    """Return the seed of a student's own data: the same on every machine, another for every student.

    Args:
        student: the student's identifier; case and surrounding spaces do not matter.
        assignment: name of the assignment.
        secret: known to the teacher alone, for inputs that nobody can foresee.

    Returns:
        A number from 0 to 2³¹ − 1.

    Example:
        >>> student_seed("Ada ", "1_responses") == student_seed("ada", "1_responses")
        True
        >>> student_seed("ada", "1_responses"), student_seed("ada", "1_responses", secret="x")
        (96586559, 894548434)
    """
    # A terminal gives bytes that are no text as surrogates, which no encoding has.
    text = "\n".join([student.strip().casefold(), assignment]).encode(errors="backslashreplace")
    key = hashlib.sha256(secret.encode(errors="backslashreplace")).digest()
    digest = hashlib.blake2b(text, digest_size=8, key=key).digest()
    return int.from_bytes(digest) % 2**31


@dataclass(frozen=True)
class Part:
    """One line of the rubric.

    Attributes:
        title: what earns the points.
        points: how many.
        tests: makes the arguments of each call from a seed.
        judge: gets the answers and the arguments; returns the verdict and the share of the points.
        own: the tests are drawn from the student's public seed, as in the notebook, and not from the hidden one.
        finite: answers may not hold NaN or infinity.
    """

    title: str
    points: int
    tests: Callable[[int], Sequence[Arguments]]
    judge: Judge
    own: bool = False
    finite: bool = True


@dataclass(frozen=True)
class Question:
    """A function or a value that a submission has to define.

    Attributes:
        name: its name in the notebook; a name that is not callable is taken as the answer itself.
        title: what it is about.
        parts: its points.
    """

    name: str
    title: str
    parts: tuple[Part, ...]

    @property
    def points(self) -> int:
        """Points of all parts together."""
        return sum(part.points for part in self.parts)


@dataclass(frozen=True)
class Assignment:
    """A graded assignment.

    Attributes:
        name: name of its files.
        title: its heading.
        questions: in the order of the notebook.
    """

    name: str
    title: str
    questions: tuple[Question, ...] = field(repr=False)

    @property
    def points(self) -> int:
        """Points of all questions together."""
        return sum(question.points for question in self.questions)


@dataclass(frozen=True)
class Compared:
    """Judge answers by comparison with an oracle; a recognised mistake may be worth a share of the points.

    Attributes:
        oracle: gets the arguments of a call and returns what is right.
        mistakes: what to say to an answer that computes what a wrong function does, that function, and the share of
            the points that it earns.
    """

    oracle: Answer
    mistakes: Mapping[str, tuple[Answer, float]] = field(default_factory=dict)

    def __call__(self, answers: Sequence[Given], tests: Sequence[Arguments]) -> tuple[Verdict, float]:
        """Return the verdict, and the share of the points."""
        # A single tensor as itself: in a tuple, numbers without dimensions would be joined to one vector.
        given = iter([answer[0] if len(answer) == 1 else answer for answer in answers])
        functions = {message: mistake for message, (mistake, _) in self.mistakes.items()}
        verdict = judge(lambda *_: next(given), tests, self.oracle, functions, "right")
        share = self.mistakes[verdict.message][1] if verdict.message in self.mistakes else 0.0
        return verdict, 1.0 if verdict else share


@dataclass(frozen=True)
class Checked:
    """Judge something built: ``check`` gets the answer, a tuple of tensors, then the arguments of its call."""

    check: Callable[..., Verdict]

    def __call__(self, answers: Sequence[Given], tests: Sequence[Arguments]) -> tuple[Verdict, float]:
        """Return the verdict, and the share of the points."""
        verdicts = [self.check(given, *arguments()) for given, arguments in zip(answers, tests, strict=True)]
        verdict = next((verdict for verdict in verdicts if not verdict), Verdict(True, "right"))
        return verdict, float(bool(verdict))
