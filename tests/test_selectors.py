"""Selectors: exact sizes, the right neurons, reproducible draws, nothing else touched."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import RandomNetwork, networks, small_network, unchanged

from pathwaylib import ActiveNeurons, NeuronMCT, Pathway, PathwayError, RandomSelection, masked, observe, taylor

SELECTORS = [
    NeuronMCT(0.7),
    ActiveNeurons(),
    RandomSelection(0.7),
    RandomSelection(0.7, generator=torch.Generator().manual_seed(3)),
    RandomSelection(0.7, active_only=True),
]


def same(a: Pathway, b: Pathway) -> bool:
    return a.sites == b.sites and all(torch.equal(p, q) for p, q in zip(a.masks, b.masks, strict=True))


@given(networks(), st.sampled_from([0.0, 0.35, 0.5, 0.9, 0.99]))
def test_neuron_mct_keeps_k_or_all_that_contribute(network: RandomNetwork, sparsity: float) -> None:
    x = network.inputs(3)
    pathway = NeuronMCT(sparsity)(network, x)
    scores = torch.cat([score.flatten(1) for score in taylor(network, x).scores], 1)
    k = round((1 - Fraction(str(sparsity))) * scores.shape[1])
    assert pathway.sizes.tolist() == [min(k, positive) for positive in (scores != 0).sum(1).tolist()]
    assert pathway.targets is not None
    assert torch.equal(pathway.targets, network.reference(x).argmax(1))


@given(networks())
def test_neuron_mct_of_a_batch_is_the_loop(network: RandomNetwork) -> None:
    x = network.inputs(3)
    targets = [0, 1, 2]
    together, scores = NeuronMCT(0.6)(network, x, targets).flatten(), taylor(network, x, targets).scores
    magnitude = torch.cat([score.flatten(1) for score in scores], 1).abs()
    for index in range(3):
        alone = NeuronMCT(0.6)(network, x[index : index + 1], index).flatten()[0]
        assert alone.sum() == together[index].sum()
        # Where rounding differs between batch sizes, neurons that tie in exact arithmetic may change places.
        moved = magnitude[index][alone != together[index]]
        assert not len(moved) or float(moved.max() - moved.min()) <= 1e-9 * float(magnitude[index].max())


@given(networks())
def test_active_neurons_are_those_that_are_not_zero(network: RandomNetwork) -> None:
    x = network.inputs(2)
    pathway = ActiveNeurons()(network, x)
    with torch.no_grad():
        post = observe(network, x).post
        plain = network(x)
        with masked(pathway):
            assert torch.equal(network(x), plain)
    for mask, a in zip(pathway.masks, post, strict=True):
        assert torch.equal(mask, a != 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.9, 0.999])
def test_random_selection_keeps_exactly_k(sparsity: float) -> None:
    network = small_network()
    x = network.inputs(4)
    k = round((1 - Fraction(str(sparsity))) * observe(network, x).active().neurons)
    pathway = RandomSelection(sparsity)(network, x)
    assert pathway.sizes.tolist() == [k] * 4
    if 0 < sparsity < 0.999:
        rows = pathway.flatten()
        assert not torch.equal(rows[0], rows[1])  # each input draws its own


def test_random_selection_among_active_neurons() -> None:
    network = small_network()
    x = network.inputs(4)
    active = observe(network, x).active()
    pathway = RandomSelection(0.9, active_only=True)(network, x)
    assert not (pathway & ~active).sizes.any()
    assert pathway.sizes.tolist() == [round(active.neurons * Fraction("0.1"))] * 4
    everything = RandomSelection(0.0, active_only=True)(network, x)
    assert same(everything, active)  # k is more than there are


def test_random_selection_is_uniform_over_positions() -> None:
    network = small_network()
    x = network.inputs(1).expand(400, -1, -1, -1)
    frequency = torch.cat([f.flatten() for f in RandomSelection(0.5)(network, x).frequency()])
    # Binomial(400, 1/2) / 400 has a standard deviation of 0.025.
    assert float((frequency - 0.5).abs().max()) < 5 * 0.025
    assert abs(float(frequency.std()) - 0.025) < 0.005


def test_random_selection_draws_from_its_generator_alone() -> None:
    network = small_network()
    x = network.inputs(2)
    unseeded = RandomSelection(0.5)
    with unchanged(network, x):
        assert same(unseeded(network, x), unseeded(network, x))
    generator = torch.Generator().manual_seed(7)
    drawing = RandomSelection(0.5, generator=generator)
    first, second = drawing(network, x), drawing(network, x)
    assert not same(first, second)  # a generator moves on
    generator.manual_seed(7)
    assert same(drawing(network, x), first)
    torch.manual_seed(123)
    assert same(RandomSelection(0.5, generator=torch.Generator().manual_seed(7))(network, x), first)


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_selectors_change_nothing_and_note_the_target(selector: object) -> None:
    network = small_network()
    x = network.inputs(3).requires_grad_()
    with unchanged(network, x):
        predicted, given_target = selector(network, x), selector(network, x, [2, 0, 1])
    assert predicted.targets.tolist() == network(x).argmax(1).tolist()
    assert given_target.targets.tolist() == [2, 0, 1]
    assert all(mask.dtype == torch.bool and not mask.requires_grad for mask in predicted.masks)


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@pytest.mark.parametrize(
    ("x", "target", "message"),
    [
        (torch.rand(2, 3, 7, 7).double(), 3, "target"),
        (torch.rand(2, 3, 7, 7).double(), [0], r"\(1,\) for 2 inputs"),
        (torch.rand(0, 3, 7, 7).double(), None, "at least one"),
        (torch.full((1, 3, 7, 7), torch.nan).double(), None, "NaN"),
        (torch.ones(1, 3, 7, 7, dtype=torch.uint8), None, "uint8"),
    ],
)
def test_selectors_answer_bad_input(selector: object, x: torch.Tensor, target: object, message: str) -> None:
    network = small_network()
    with unchanged(network, x), pytest.raises(PathwayError, match=message):
        selector(network, x, target)


@pytest.mark.parametrize("selector", [NeuronMCT, RandomSelection])
@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 2, float("nan")])
def test_sparsity_is_checked_when_the_selector_is_made(selector: type, sparsity: float) -> None:
    with pytest.raises(PathwayError, match=rf"sparsity is {sparsity}"):
        selector(sparsity=sparsity)


@pytest.mark.parametrize("selector", [NeuronMCT(), RandomSelection()], ids=repr)
def test_selectors_are_frozen(selector: object) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        selector.sparsity = 0.5


def test_default_sparsity_is_the_papers() -> None:
    assert NeuronMCT().sparsity == RandomSelection().sparsity == 0.9


@pytest.mark.cuda
def test_generator_of_one_device_serves_another() -> None:
    network = small_network()
    x = network.inputs(2)
    here = RandomSelection(0.5)(network, x)
    there = RandomSelection(0.5)(network.cuda(), x.cuda())
    assert same(here, there.to("cpu"))
