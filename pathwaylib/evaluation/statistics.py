"""Means with the interval that says how far to trust them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

from ..errors import PathwayError

_DRAWS_AT_ONCE = 4_000_000  # values held at a time: 32 MB


class Interval(NamedTuple):
    """A statistic of a sample and the interval around it; unpacks as ``value, low, high``.

    Attributes:
        value: the statistic of the sample itself.
        low: lower end of the interval.
        high: upper end of the interval.

    Example:
        >>> print(Interval(0.5, 0.25, 0.75))
        0.500 [0.250, 0.750]
        >>> Interval(0.5, 0.25, 0.75).bounds
        (0.25, 0.75)
    """

    value: float
    low: float
    high: float

    @property
    def bounds(self) -> tuple[float, float]:
        """``(low, high)``, as :func:`pathwaylib.claim` takes it."""
        return self.low, self.high

    def __str__(self) -> str:
        """Return the three numbers, rounded to three decimals."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_interval(
    values: Tensor | NDArray[Any] | Sequence[float],
    statistic: Callable[..., Any] = np.mean,
    *,
    level: float = 0.95,
    resamples: int = 4_000,
    seed: int | np.random.Generator = 0,
) -> Interval:
    """Return a statistic of a sample with its percentile bootstrap interval.

    The sample is drawn again from itself, with replacement, ``resamples`` times; the interval holds the middle
    ``level`` of the statistics of these draws. A sample of equal values gives an interval of width 0: the bootstrap
    knows nothing of what was not drawn. (Of ``n`` successes in ``n`` trials one may say, by the rule of three, that
    the rate is above ``1 - 3 / n``.)

    Args:
        values: one number or truth value per input, shape ``(B,)``, at least two.
        statistic: function of a sample; one that takes ``axis=`` is computed for many draws at once.
        level: share of the draws inside the interval, in (0, 1).
        resamples: number of draws.
        seed: of the draws, or the generator that makes them. The same seed gives the same interval.

    Returns:
        :class:`Interval`, which unpacks as ``value, low, high``.

    Raises:
        PathwayError: if there are fewer than two values, one is not finite, the shape is not ``(B,)``, or ``level``
            or ``resamples`` is out of range.

    Equation: [low, high] = quantiles (1 ∓ level) / 2 of T(x*), where each of the B entries of x* is drawn uniformly
    from x.

    Source: Efron and Tibshirani, *An Introduction to the Bootstrap* (1993), chapter 13; computed by SciPy.

    Example:
        >>> kept = [True] * 90 + [False] * 10
        >>> value, low, high = bootstrap_interval(kept)
        >>> value, 0.80 < low < value < high < 0.98
        (0.9, True)
    """
    sample = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2:
        raise PathwayError(f"values of shape {sample.shape}; an interval needs one number per input, at least two")
    if not np.isfinite(sample).all():
        raise PathwayError("the values hold NaN or infinity; leave those inputs out, and say how many they were")
    if not 0 < level < 1 or resamples < 1:
        raise PathwayError(f"level={level}, resamples={resamples}: give a level in (0, 1) and at least one resample")
    value = float(statistic(sample))
    if (sample == sample[0]).all():
        return Interval(value, value, value)
    found = bootstrap(
        (sample,),
        statistic,
        n_resamples=resamples,
        batch=max(1, _DRAWS_AT_ONCE // len(sample)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))
