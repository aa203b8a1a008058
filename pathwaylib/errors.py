"""The one error family of pathwaylib."""

from __future__ import annotations

from collections.abc import Sequence


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


def require_at_least_one(**counts: int) -> None:
    """Raise :class:`PathwayError` where a count is not a whole number of at least 1.

    Example:
        >>> require_at_least_one(n_steps=32, batch_size=0)
        Traceback (most recent call last):
        ...
        pathwaylib.errors.PathwayError: batch_size is 0; give a whole number of at least 1
    """
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise PathwayError(f"{name} is {count!r}; give a whole number of at least 1")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise :class:`PathwayError` where a value is not one of the choices.

    Example:
        >>> require_choice("order", "random", ["morf", "lerf"])
        Traceback (most recent call last):
        ...
        pathwaylib.errors.PathwayError: order is 'random'; choose 'morf' or 'lerf'
    """
    if value not in choices:
        raise PathwayError(f"{name} is {value!r}; choose {' or '.join(map(repr, choices))}")
