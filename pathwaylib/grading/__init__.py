"""Graded assignments: a submission runs in a process of its own, and only data comes back to be judged.

The tasks are not here but in the folder ``assignments`` of the repository, which students are not given: each is a
notebook with its solution, and beside it a key, a module of :class:`Question` objects with the oracles.
"""

from .process import Limits
from .questions import Assignment, Checked, Compared, Part, Question, student_seed
from .report import Mark, Report, Submission, grade, load_assignment, read_submission

__all__ = [
    "Assignment",
    "Checked",
    "Compared",
    "Limits",
    "Mark",
    "Part",
    "Question",
    "Report",
    "Submission",
    "grade",
    "load_assignment",
    "read_submission",
    "student_seed",
]
