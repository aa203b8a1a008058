"""Paired differences and ranks, against SciPy's tests and rankings worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import friedmanchisquare, ttest_rel

from pathwaylib import Interval, PathwayError, bootstrap_interval, paired_difference, rank_stability


def test_paired_difference_is_the_t_test_in_other_units() -> None:
    rng = np.random.default_rng(0)
    difficulty = 10 * rng.normal(size=80)
    first, second = difficulty + rng.normal(0.5, 1, 80), difficulty + rng.normal(0, 1, 80)
    found = paired_difference(first, second)
    assert found.difference == bootstrap_interval(first - second)
    assert found.effect * np.sqrt(80) == pytest.approx(ttest_rel(first, second).statistic)
    assert found.share.value == np.mean(first > second)
    # What both have in common does not count: the two means alone could never tell them apart.
    width = found.difference.high - found.difference.low
    assert width < 0.2 * (bootstrap_interval(first).high - bootstrap_interval(first).low)
    turned = paired_difference(second, first)
    assert turned.difference.value == -found.difference.value
    assert turned.effect == -found.effect


def test_paired_difference_of_equal_methods() -> None:
    same = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert same.difference == Interval(0, 0, 0)
    assert (same.effect, same.share) == (0, Interval(0.5, 0.5, 0.5))
    assert paired_difference([1.0, 2.0], [2.0, 3.0]).effect == -np.inf
    assert paired_difference([0.1] * 3, [0.0] * 3).effect == np.inf  # the rounded deviation of equal tenths is not 0


def test_differences_that_only_rounding_tells_apart_are_equal() -> None:
    assert paired_difference([1.3, 2.3, 4.3], [1.0, 2.0, 4.0]).effect == np.inf
    assert paired_difference([1.0, 2.0, 4.0], [1.3, 2.3, 4.3]).effect == -np.inf
    small = 1e-9 * np.array([1.0, 2.0, 4.0])
    assert paired_difference(1 + small, np.ones(3)).effect == pytest.approx(np.mean(small) / np.std(small, ddof=1))


def test_bfloat16_scores_are_taken_as_they_are() -> None:
    first, second = torch.rand(9).bfloat16().requires_grad_(), torch.rand(9).bfloat16()
    one, other = first.detach().float().numpy(), second.float().numpy()
    assert bootstrap_interval(first) == bootstrap_interval(one)
    assert paired_difference(first, second) == paired_difference(one, other)
    assert rank_stability({"a": first, "b": second}) == rank_stability({"a": one, "b": other})


@pytest.mark.parametrize(
    ("first", "second"), [([1.0, 2.0], [1.0, 2.0, 3.0]), ([1.0], [2.0]), ([1.0, np.nan], [1.0, 2.0])]
)
def test_paired_difference_refuses(first: list[float], second: list[float]) -> None:
    with pytest.raises(PathwayError):
        paired_difference(first, second)


@pytest.mark.parametrize("ties", [False, True])
def test_agreement_is_friedmans_statistic(ties: bool) -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(12, 4)) + np.arange(4) / 2
    if ties:
        table = table.round()
    found = rank_stability(dict(zip("abcd", table.T, strict=True)))
    assert found.agreement == pytest.approx(friedmanchisquare(*table.T).statistic / (12 * 3))


def test_ranks() -> None:
    clear = rank_stability({"good": [5.0, 6, 7], "bad": [1.0, 2, 1], "middle": [3.0, 3, 4]})
    assert clear.ranks == {"good": Interval(1, 1, 1), "bad": Interval(3, 3, 3), "middle": Interval(2, 2, 2)}
    assert clear.agreement == pytest.approx(1)
    assert rank_stability({"a": [5.0, 6], "b": [1.0, 2]}, largest_best=False).ranks["b"].value == 1
    rng = np.random.default_rng(2)
    noise = rank_stability({name: rng.normal(size=50) for name in "abcde"})
    assert noise.agreement < 0.15
    assert max(interval.high - interval.low for interval in noise.ranks.values()) >= 2
    equal = rank_stability({"a": [1.0, 1], "b": [1.0, 1]})
    assert equal.ranks["a"].value == equal.ranks["b"].value == 1.5


@pytest.mark.parametrize("scale", [1.0, 1e-200, -1e200, 0.0])
def test_equal_scores_share_a_rank_in_any_order_of_their_repetitions(scale: float) -> None:
    scores = scale * np.array([0.1, 0.2, 0.3])
    found = rank_stability({"a": scores, "b": scores[::-1], "c": scores - 1e-9 * abs(scale)})
    assert found.ranks["a"].value == found.ranks["b"].value
    assert found.ranks["c"].value == (3 if scale else 2)  # little, but no rounding


@pytest.mark.parametrize(
    "scores",
    [
        {"a": [1.0, 2.0]},
        {"a": [1.0, 2.0], "b": [1.0]},
        {"a": [1.0], "b": [2.0]},
        {"a": [1.0, 2.0], "b": [np.inf, 1.0]},
    ],
)
def test_ranks_refuse(scores: dict[str, list[float]]) -> None:
    with pytest.raises(PathwayError):
        rank_stability(scores)


@pytest.mark.parametrize("options", [{"level": 2}, {"resamples": 0}])
def test_ranks_refuse_draws_that_give_no_interval(options: dict[str, int]) -> None:
    with pytest.raises(PathwayError, match=r"give a level in \(0, 1\) and at least one resample"):
        rank_stability({"a": [1.0, 2.0], "b": [2.0, 1.0]}, **options)
