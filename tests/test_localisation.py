"""Localisation against known masks and neurons: closed forms, plain definitions in loops, ties by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import unchanged
from torch import Tensor, nn

from pathwaylib import Pathway, PathwayError
from pathwaylib.evaluation import (
    Localisation,
    NeuronRecovery,
    mass_inside,
    neuron_recovery,
    pointing_game,
    top_k_intersection,
)
from pathwaylib.planting import CriticalNeurons

Measure = Callable[..., Localisation]
MEASURES: list[Measure] = [pointing_game, mass_inside, top_k_intersection]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(count: int, *shape: int, seed: int = 0) -> Tensor:
    found = torch.rand(count, *shape, generator=seeded(seed)) < 0.3
    found[:, 0, 0] = True  # none is empty
    return found


# --- Maps: closed forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_a_map_of_the_mask_scores_one_and_its_opposite_nothing(measure: Measure) -> None:
    mask = masks(5, 6, 7)
    mask[:, -1, -1] = False
    assert measure(mask.float(), mask).score.tolist() == [1] * 5
    # As many pixels as the mask has lie outside, or the ranking would have to take some inside.
    small = torch.zeros_like(mask)
    small[:, 0, :3] = True
    assert measure((~small).float(), small).score.tolist() == [0] * 5


@pytest.mark.parametrize("measure", MEASURES)
def test_the_chance_level_is_the_share_of_the_mask(measure: Measure) -> None:
    mask = masks(4, 5, 5)
    shares = [float(one.float().mean()) for one in mask]
    assert measure(torch.randn(4, 3, 5, 5), mask).chance.tolist() == pytest.approx(shares)
    # And it is what maps in random order score on average.
    drawn = torch.randn(40_000, 5, 5, generator=seeded(1))
    scores = measure(drawn, mask[:1].expand(len(drawn), 5, 5)).score
    assert float(scores.mean()) == pytest.approx(shares[0], abs=5 * float(scores.std()) / len(drawn) ** 0.5)


@pytest.mark.parametrize("part", ["absolute", "positive"])
def test_a_constant_map_scores_at_chance_and_a_map_of_zeros_as_documented(part: str) -> None:
    mask = masks(3, 4, 6)
    for measure in MEASURES:
        found = measure(torch.full((3, 2, 4, 6), 0.7), mask, part=part)
        torch.testing.assert_close(found.score, found.chance)
        zero = measure(torch.zeros(3, 2, 4, 6), mask, part=part)
        torch.testing.assert_close(zero.score, torch.zeros(3) if measure is mass_inside else zero.chance)


def test_what_speaks_against_the_class_counts_or_not() -> None:
    maps = torch.tensor([[[-4.0, 1.0], [2.0, -1.0]]])
    mask = torch.tensor([[[True, False], [True, False]]])
    assert mass_inside(maps, mask).score.item() == pytest.approx(6 / 8)
    assert mass_inside(maps, mask, part="positive").score.item() == pytest.approx(2 / 3)
    assert pointing_game(maps, ~mask).score.item() == 0
    assert pointing_game(maps.abs(), mask).score.item() == 1
    only = torch.tensor([[[True, False], [False, False]]])
    assert pointing_game(maps, only).score.item() == 1
    assert pointing_game(maps, only, part="positive").score.item() == 0
    # In the positive part -4 and -1 tie at 0, behind 2 and 1.
    assert top_k_intersection(maps, mask).score.item() == 1
    assert top_k_intersection(maps, mask, part="positive").score.item() == 0.5


# --- Maps: the definitions in loops, ties by trying every order ------------------------------------------------------


def by_enumeration(values: list[float], inside: list[bool]) -> tuple[float, float, float]:
    """Average over all orders of the pixels that break ties: first place inside, the share, the first k inside."""
    size = sum(inside)
    pointing, covered = [], []
    for order in itertools.permutations(range(len(values))):
        ranked = sorted(order, key=lambda pixel: -values[pixel])  # stable: equal values stay in this order
        pointing.append(float(inside[ranked[0]]))
        covered.append(sum(inside[pixel] for pixel in ranked[:size]) / size)
    total = sum(values)
    share = sum(v for v, i in zip(values, inside, strict=True) if i) / total if total else 0.0
    return sum(pointing) / len(pointing), share, sum(covered) / len(covered)


@given(
    values=st.lists(st.integers(-3, 3), min_size=6, max_size=6),
    bits=st.integers(1, 63),
    part=st.sampled_from(["absolute", "positive"]),
)
def test_scores_are_the_definitions_averaged_over_the_orders_of_ties(values: list[int], bits: int, part: str) -> None:
    inside = [bool(bits >> pixel & 1) for pixel in range(6)]
    maps = torch.tensor(values, dtype=torch.float64).view(1, 2, 3)
    mask = torch.tensor(inside).view(1, 2, 3)
    parts = [float(abs(v) if part == "absolute" else max(v, 0)) for v in values]
    found = tuple(measure(maps, mask, part=part).score.item() for measure in MEASURES)
    assert found == pytest.approx(by_enumeration(parts, inside), abs=1e-12)


@given(seed=st.integers(0, 1000), exponent=st.integers(-30, 30), part=st.sampled_from(["absolute", "positive"]))
def test_scores_know_no_scale_no_batch_and_no_channels(seed: int, exponent: int, part: str) -> None:
    maps, mask = torch.randn(4, 3, 5, 6, generator=seeded(seed)), masks(4, 5, 6, seed=seed)
    for measure in MEASURES:
        whole = measure(maps, mask, part=part)
        assert ((whole.score >= 0) & (whole.score <= 1)).all()
        torch.testing.assert_close(measure(maps * 10.0**exponent, mask, part=part).score, whole.score)
        torch.testing.assert_close(measure(maps.sum(1), mask, part=part).score, whole.score)
        for index in range(4):
            one = measure(maps[index : index + 1], mask[index : index + 1], part=part)
            torch.testing.assert_close(one.score[0], whole.score[index])
            assert one.chance[0] == whole.chance[index]


def test_tiny_and_huge_maps_give_numbers() -> None:
    mask = masks(1, 3, 3)
    expected = mass_inside(torch.arange(9.0).view(1, 3, 3), mask).score
    for scale in (1e-42, 3e37):
        torch.testing.assert_close(
            mass_inside(scale * torch.arange(9.0).view(1, 3, 3), mask).score, expected, rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_any_number_type_will_do(dtype: torch.dtype) -> None:
    maps, mask = torch.tensor([[[1, 3], [2, 0]]]).to(dtype), torch.tensor([[[False, True], [True, False]]])
    for measure, score in zip(MEASURES, (1, 5 / 6, 1), strict=True):
        assert measure(maps, mask).score.item() == pytest.approx(score, rel=1e-3)


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_given_is_changed(measure: Measure) -> None:
    maps, mask = torch.randn(2, 3, 4, 4, requires_grad=True), masks(2, 4, 4)
    with unchanged(nn.Identity(), maps, mask):
        assert not measure(maps, mask).score.requires_grad


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("maps", "mask", "part", "why"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), "absolute", r"torch\.float32.*give bool"),
        (torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4).bool(), "absolute", r"\(2, 3, 4, 4\).*give bool"),
        (torch.zeros(2, 3, 4, 4), torch.ones(2, 4, 5).bool(), "absolute", r"maps of shape \(2, 3, 4, 4\)"),
        (torch.zeros(3, 4, 4), torch.ones(2, 4, 4).bool(), "absolute", r"maps of shape \(3, 4, 4\)"),
        (torch.zeros(2, 4), torch.ones(2, 4, 4).bool(), "absolute", r"maps of shape \(2, 4\)"),
        (torch.full((2, 4, 4), torch.nan), torch.ones(2, 4, 4).bool(), "absolute", "NaN"),
        (torch.full((2, 2, 4, 4), 3e38), torch.ones(2, 4, 4).bool(), "absolute", "overflow"),
        (torch.zeros(2, 4, 4), torch.tensor([[True], [False]])[..., None].expand(2, 4, 4), "absolute", "mask 1 is"),
        (torch.zeros(2, 4, 4), torch.ones(2, 4, 4).bool(), "negative", "'negative'; choose 'absolute' or 'positive'"),
    ],
)
def test_what_does_not_fit_is_refused(measure: Measure, maps: Tensor, mask: Tensor, part: str, why: str) -> None:
    with pytest.raises(PathwayError, match=why):
        measure(maps, mask, part=part)


@pytest.mark.slow
def test_without_ties_the_scores_are_those_of_quantus() -> None:
    """Its metrics of the same names, which take positive maps and resolve ties by position."""
    import quantus

    maps, mask = torch.rand(6, 1, 8, 8, generator=seeded(3)), masks(6, 8, 8, seed=3)
    given = {
        "model": nn.Identity(),
        "x_batch": maps.numpy(),
        "y_batch": torch.zeros(6).long().numpy(),
        "a_batch": maps.numpy(),
        "s_batch": mask[:, None].numpy(),
        "device": "cpu",
    }
    theirs = [
        quantus.PointingGame(disable_warnings=True, abs=True, normalise=False),
        quantus.RelevanceMassAccuracy(disable_warnings=True, abs=True, normalise=False),
        quantus.RelevanceRankAccuracy(disable_warnings=True, abs=True, normalise=False),
    ]
    for measure, metric in zip(MEASURES, theirs, strict=True):
        assert measure(maps, mask).score.tolist() == pytest.approx([float(v) for v in metric(**given)], abs=1e-5)


# --- Neurons ---------------------------------------------------------------------------------------------------------


def pathway_of(rows: list[list[int]]) -> Pathway:
    bits = torch.tensor(rows).bool()
    return Pathway((bits[:, :3], bits[:, 3:]), ("relu_0", "relu_1"))


# One truth: neuron 0 or 1, neuron 3; the other: neuron 4 alone.
TRUTH = CriticalNeurons(
    (torch.tensor([[0, 0, -1], [-1, -1, -1]]), torch.tensor([[1, -1], [-1, 0]])), ("relu_0", "relu_1")
)


@pytest.mark.parametrize(
    ("rows", "precision", "recall"),
    [
        ([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]], [1, 1], [1, 1]),
        ([[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]], [1, 1 / 2], [1, 1]),
        ([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], [2 / 3, 1 / 5], [1, 1]),  # a spare copy is not needed
        ([[1, 1, 0, 0, 0], [1, 0, 0, 1, 0]], [1 / 2, 0], [1 / 2, 0]),
        ([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0]], [0, 0], [0, 0]),  # an empty pathway holds nothing that was needed
    ],
)
def test_recovery_counts_groups(rows: list[list[int]], precision: list[float], recall: list[float]) -> None:
    assert TRUTH.sizes.tolist() == [2, 1]
    assert TRUTH.pathway().sizes.tolist() == [3, 1]
    found = neuron_recovery(pathway_of(rows), TRUTH)
    assert isinstance(found, NeuronRecovery)
    assert found.precision.tolist() == pytest.approx(precision)
    assert found.recall.tolist() == pytest.approx(recall)


@given(seed=st.integers(0, 1000))
def test_recovery_is_counted_in_a_loop(seed: int) -> None:
    generator = seeded(seed)
    flat = torch.randint(-1, 3, (4, 9), generator=generator)
    flat[:, :3] = torch.arange(3)  # no group is empty
    kept = torch.rand(4, 9, generator=generator) < 0.4
    sites = ("relu_0", "relu6_1")
    critical = CriticalNeurons((flat[:, :4], flat[:, 4:]), sites)
    found = neuron_recovery(Pathway((kept[:, :4], kept[:, 4:]), sites), critical)
    for row, bits, precision, recall in zip(flat.tolist(), kept.tolist(), *map(Tensor.tolist, found), strict=True):
        held = {group for group, bit in zip(row, bits, strict=True) if bit and group >= 0}
        assert recall == pytest.approx(len(held) / 3)
        assert precision == pytest.approx(len(held) / max(1, sum(bits)))


def test_recovery_refuses_what_is_of_another_network() -> None:
    one = pathway_of([[1, 0, 0, 1, 0]])
    with pytest.raises(PathwayError, match="the same network and inputs"):
        neuron_recovery(one, TRUTH)
    other = Pathway(pathway_of([[1] * 5] * 2).masks, ("relu_0", "relu6_1"))
    with pytest.raises(PathwayError, match="the same network and inputs"):
        neuron_recovery(other, TRUTH)
