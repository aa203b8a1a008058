"""The one error family of pathwaylib."""

from __future__ import annotations


class PathwayError(ValueError):
    """An input pathwaylib cannot work with; the message says what was given and what to do.

    Every check of the package raises this class (a :class:`ValueError`), so one ``except`` clause
    catches them all.

    Example:
        >>> try:
        ...     raise PathwayError("sparsity is 1.2; give a number in [0, 1), for example 0.9")
        ... except ValueError as error:
        ...     print(error)
        sparsity is 1.2; give a number in [0, 1), for example 0.9
    """
