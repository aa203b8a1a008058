"""Means with the interval that says how far to trust them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, rankdata
from torch import Tensor

from ..errors import PathwayError

_DRAWS_AT_ONCE = 4_000_000  # values held at a time: 32 MB
_DIGITS = 12  # of the largest number involved: beyond them float64 sums of equal numbers may differ


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
    sample = _numbers(values)
    if sample.ndim != 1 or len(sample) < 2:
        raise PathwayError(f"values of shape {sample.shape}; an interval needs one number per input, at least two")
    if not np.isfinite(sample).all():
        raise PathwayError("the values hold NaN or infinity; leave those inputs out, and say how many they were")
    _check_draws(level, resamples)
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


def _numbers(values: Tensor | NDArray[Any] | Sequence[float]) -> NDArray[np.float64]:
    # NumPy has no bfloat16, and not every device float64.
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)


def _check_draws(level: float, resamples: int) -> None:
    if not 0 < level < 1 or resamples < 1:
        raise PathwayError(f"level={level}, resamples={resamples}: give a level in (0, 1) and at least one resample")


class PairedDifference(NamedTuple):
    """How two methods differ on the same inputs.

    Attributes:
        difference: mean of first minus second, with its interval.
        effect: Cohen's d for pairs: the mean difference in standard deviations of the differences; 0 where all are
            equal to 0, infinite where all are equal and not 0.
        share: share of inputs on which the first is larger (an equal pair counts half), with its interval.
    """

    difference: Interval
    effect: float
    share: Interval


def paired_difference(
    first: Tensor | NDArray[Any] | Sequence[float],
    second: Tensor | NDArray[Any] | Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 4_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two methods input by input.

    What two methods score on one input goes up and down together: some inputs are easy for both. The differences are
    free of that, so their interval is narrower than those of the two means suggest.

    Args:
        first: one number per input, shape ``(B,)``, at least two.
        second: as many, for the same inputs in the same order.
        level: share of the draws inside the intervals, in (0, 1).
        resamples: number of draws of :func:`bootstrap_interval`.
        seed: of the draws.

    Returns:
        :class:`PairedDifference`.

    Raises:
        PathwayError: if the two do not have the same shape, or as :func:`bootstrap_interval`.

    Equation: d_i = a_i − b_i; effect = mean(d) / sd(d), with the sample's standard deviation.

    Source: Cohen, *Statistical Power Analysis for the Behavioral Sciences* (1988), section 2.3.5.

    Example:
        >>> found = paired_difference([2.0, 3.0, 4.0, 6.0], [1.0, 2.0, 3.0, 4.0])
        >>> found.difference.value, found.effect, found.share.value
        (1.25, 2.5, 1.0)
    """
    one, other = _numbers(first), _numbers(second)
    if one.shape != other.shape:
        raise PathwayError(f"{one.shape} and {other.shape} values; give both methods' values for the same inputs")
    differences = one - other
    interval = bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)
    share = bootstrap_interval((np.sign(differences) + 1) / 2, level=level, resamples=resamples, seed=seed)
    spread = differences.std(ddof=1)
    if spread > 10.0**-_DIGITS * max(np.abs(one).max(), np.abs(other).max()):
        effect = interval.value / spread
    else:  # rounding alone can give equal differences a standard deviation above 0
        effect = np.copysign(np.inf, interval.value) if interval.value else 0.0
    return PairedDifference(interval, float(effect), share)


class RankStability(NamedTuple):
    """How far a ranking of methods would come out again.

    Attributes:
        ranks: rank of each method with its interval, 1 the best; equal scores share the mean of their ranks.
        agreement: Kendall's coefficient of concordance W between the repetitions, in [0, 1]; 1: always the same order.
    """

    ranks: dict[str, Interval]
    agreement: float


def rank_stability(
    scores: Mapping[str, Tensor | NDArray[Any] | Sequence[float]],
    *,
    largest_best: bool = True,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> RankStability:
    """Rank methods by their mean score, and say how stable the ranking is.

    The intervals answer for the choice of the repetitions (inputs, or seeds of a training): they are drawn again, all
    methods together, and the methods ranked anew. The agreement is that of the rankings of the single repetitions.

    Args:
        scores: by method, one number per repetition; the same repetitions, in the same order, for all.
        largest_best: whether rank 1 is the largest score.
        level: share of the draws inside the intervals, in (0, 1).
        resamples: number of draws.
        seed: of the draws.

    Returns:
        :class:`RankStability`.

    Raises:
        PathwayError: if there are fewer than two methods or repetitions, their numbers differ, one is not finite, or
            ``level`` or ``resamples`` is out of range.

    Equation: W = 12 Σ_m (R_m − R̄)² / (n² (M³ − M) − n Σ T), with R_m the sum of a method's ranks over n repetitions,
    M methods, and T = Σ (t³ − t) over the groups of t equal scores in a repetition.

    Source: Kendall and Babington Smith, *The Problem of m Rankings* (1939).

    Example:
        >>> found = rank_stability({"a": [3.0, 5.0, 4.0], "b": [2.0, 1.0, 3.0]})
        >>> print(found.ranks["a"], found.agreement)
        1.000 [1.000, 1.000] 1.0
    """
    columns = [_numbers(values) for values in scores.values()]
    if len(columns) < 2 or len({column.shape for column in columns}) != 1 or columns[0].ndim != 1:
        raise PathwayError(
            f"scores of shapes {[column.shape for column in columns]}; give at least two methods, each with one number "
            "for every repetition"
        )
    table = np.stack(columns, 1) * (-1 if largest_best else 1)
    repetitions, methods = table.shape
    if repetitions < 2 or not np.isfinite(table).all():
        raise PathwayError(f"{repetitions} repetitions; give at least two, and finite scores")
    _check_draws(level, resamples)
    draws = np.random.default_rng(seed).integers(repetitions, size=(resamples, repetitions))
    largest = np.abs(table).max() or 1.0

    def ranks(means: NDArray[np.float64]) -> NDArray[np.float64]:
        # The mean of the same scores in another order may differ in its last bit: that is no rank.
        found: NDArray[np.float64] = rankdata((means / largest).round(_DIGITS), axis=-1)
        return found

    drawn = ranks(np.stack([table[draw].mean(0) for draw in draws]))
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    values = ranks(table.mean(0))
    found = {name: Interval(*map(float, row)) for name, *row in zip(scores, values, low, high, strict=True)}
    ranked = rankdata(table, axis=1)
    ties = sum((counts**3 - counts).sum() for counts in (np.unique(row, return_counts=True)[1] for row in table))
    spread = ((ranked.sum(0) - repetitions * (methods + 1) / 2) ** 2).sum()
    most = repetitions**2 * (methods**3 - methods) - repetitions * ties
    return RankStability(found, float(12 * spread / most) if most else 1.0)
