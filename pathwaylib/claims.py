"""Quantitative claims that check themselves.

A number in the book's prose is never typed: a notebook makes the claim once, here, and the prose quotes what was
glued. The book's claims ledger lists the records of all chapters.
"""

from __future__ import annotations

import math
from typing import SupportsFloat

from IPython import get_ipython
from IPython.display import display

from .errors import PathwayError

__all__ = ["CLAIM_METADATA", "claim"]

CLAIM_METADATA = "pathwaylib_claim"
"""Under this name a claim's record stands in the metadata of its output."""


def claim(
    key: str,
    statement: str,
    value: SupportsFloat,
    *,
    interval: tuple[SupportsFloat, SupportsFloat] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    digits: int = 2,
    unit: str = "",
) -> None:
    """Check a quantitative claim, show it in one line, and hand its numbers to the prose.

    In a notebook the value is glued under ``key`` and the interval under ``key_interval``, so that the text says
    ``{glue:text}`key``` and ``{glue:text}`key_interval```; the claims ledger reads the record from the output. What is
    shown is rounded, so a rerun compares equal; what is checked is not. Elsewhere the line is printed.

    Args:
        key: Unique name in the whole book, a Python identifier, for example ``"mct_keeps_80"``.
        statement: The claim in one sentence, as the ledger shows it; may hold ``$formulas$``.
        value: The number claimed, anything ``float()`` takes, such as a tensor of one element.
        interval: Its 95 % interval ``(low, high)``; must hold the value.
        at_least: The claim holds where ``value >= at_least``.
        at_most: The claim holds where ``value <= at_most``. Give one of the two or both.
        digits: Decimals shown.
        unit: Follows the number after a space, for example ``"%"``.

    Raises:
        AssertionError: The value does not meet the condition: the claim is wrong, and the notebook stops.
        PathwayError: The call is not a claim: no condition, a key that cannot be glued, a value that is not finite,
            an interval without its value.

    Example:
        >>> claim("kept", "The pathway keeps the prediction", 0.934, interval=(0.91, 0.955), at_least=0.9)
        The pathway keeps the prediction: 0.93 (95 % interval 0.91 to 0.95; at least 0.90): holds
        >>> claim("kept", "The pathway keeps the prediction", 0.934, interval=(0.89, 0.97), at_least=0.9)
        The pathway keeps the prediction: 0.93 (95 % interval 0.89 to 0.97; at least 0.90): holds, within uncertainty
        >>> claim("kept", "The pathway keeps the prediction", 0.87, at_least=0.9)
        Traceback (most recent call last):
        ...
        AssertionError: claim 'kept' fails: The pathway keeps the prediction: 0.87, but it says at least 0.90
    """
    if not key.isidentifier():
        raise PathwayError(f"key is {key!r}; give a name such as 'mct_keeps_80' (a Python identifier)")
    if at_least is None and at_most is None:
        raise PathwayError(f"claim {key!r} has no condition; give at_least= or at_most=, or both")
    lower = -math.inf if at_least is None else at_least
    upper = math.inf if at_most is None else at_most
    number = float(value)
    low, high = (number, number) if interval is None else (float(interval[0]), float(interval[1]))
    if not math.isfinite(number):
        raise PathwayError(f"claim {key!r} has the value {number}; only a finite number can be claimed")
    if not low <= number <= high:
        raise PathwayError(f"claim {key!r} has the interval ({low}, {high}), which does not hold its value {number}")

    def text(x: float) -> str:
        # + 0.0 turns a rounded -0.0 into 0.0, whose sign would differ between machines.
        return f"{round(x, digits) + 0.0:.{digits}f}" + (f" {unit}" if unit else "")

    bounds = [("at least", at_least), ("at most", at_most)]
    condition = ", ".join(f"{words} {text(bound)}" for words, bound in bounds if bound is not None)
    shown = text(number)
    if not lower <= number <= upper:
        raise AssertionError(f"claim {key!r} fails: {statement}: {shown}, but it says {condition}")
    # The value meets the condition; does its whole interval?
    verdict = "holds" if lower <= low and high <= upper else "holds, within uncertainty"
    span = "" if interval is None else f"{text(low)} to {text(high)}"
    line = f"{statement}: {shown} ({f'95 % interval {span}; ' if span else ''}{condition}): {verdict}"
    if get_ipython() is None:
        print(line)
        return
    record = {
        "key": key,
        "statement": statement,
        "value": shown,
        "interval": span,
        "condition": condition,
        "verdict": verdict,
    }
    display({"text/plain": line}, raw=True, metadata={CLAIM_METADATA: record})
    _glue(key, shown)
    if span:
        _glue(f"{key}_interval", span)


def _glue(name: str, text: str) -> None:
    """Emit what ``myst_nb.glue(name, text, display=False)`` emits, which must not be needed to run a chapter."""
    prefix = "application/papermill.record/"
    metadata = {"scrapbook": {"name": name, "mime_prefix": prefix}}
    display({f"{prefix}text/plain": repr(text)}, raw=True, metadata=metadata)
