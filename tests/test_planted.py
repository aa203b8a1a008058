"""Planted truth: the planted neurons are the critical ones by exhaustive search, the planted tag is what is used."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pathwaylib import (
    GreedyPruning,
    NeuronIntGrad,
    NeuronMCT,
    Pathway,
    PathwayError,
    ablation,
    load_model,
    masked,
    model_card,
    observe,
    planted,
    shapley,
    sleeper_network,
)
from pathwaylib.evaluation import neuron_recovery
from pathwaylib.planting import PlantedNetwork, critical_sets, planted_network
from pathwaylib.training import accuracy

EVERYTHING: dict[str, Any] = {"dead": 3, "idle": 2, "cancelling": 2, "sleepers": True}


@st.composite
def members(draw: st.DrawFn, most: int = 2) -> PlantedNetwork:
    """Draw a member of the family."""
    return planted_network(
        n=3,
        seed=draw(st.integers(0, 2**16)),
        classes=draw(st.integers(2, 3)),
        parts=draw(st.integers(1, 2)),
        copies=draw(st.integers(1, most)),
        saturated=draw(st.booleans()),
        dead=draw(st.integers(0, most)),
        idle=draw(st.integers(0, 1)),
        cancelling=draw(st.integers(0, most)),
        sleepers=draw(st.booleans()),
    )


def logits_of(planted: PlantedNetwork, pathway: Pathway) -> Tensor:
    with torch.no_grad(), masked(pathway):
        return planted.model(planted.x)


# --- The truth is the truth ------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(network=members())
def test_the_planted_neurons_are_what_exhaustive_search_finds(network: PlantedNetwork) -> None:
    """Every smallest set of active neurons with the same logits has one member of each group, and all such sets are."""
    for index in range(2):
        found = critical_sets(network.model, network.x[index : index + 1]).flatten()
        groups = network.critical.flatten()[index]
        members_of = [(groups == group).nonzero()[:, 0].tolist() for group in range(int(groups.max()) + 1)]
        choices = {frozenset(choice) for choice in itertools.product(*members_of)}
        assert {frozenset(bits.nonzero()[:, 0].tolist()) for bits in found} == choices
        assert int(network.critical.sizes[index]) == len(members_of)


@given(network=members(most=4))
def test_the_network_does_its_task_and_its_parts_are_what_they_are_called(network: PlantedNetwork) -> None:
    seen = observe(network.model, network.x)
    critical = network.critical.pathway()
    assert torch.equal(seen.logits.argmax(1), network.labels)
    others = seen.logits.scatter(1, network.labels[:, None], 0)
    assert others.count_nonzero() == 0  # cancelling is complete, to the last bit
    active = seen.active()
    assert not (critical & ~active).sizes.any()
    kinds = network.kinds
    assert sum(int(kind.sizes[0]) for kind in kinds.values()) == active.neurons
    assert torch.equal(torch.stack([kind.flatten() for kind in kinds.values()]).sum(0), torch.ones(3, active.neurons))
    assert torch.equal(kinds["critical"].flatten(), critical.flatten())
    for kind, share in {"dead": 0, "sleepers": 0, "idle": 1, "cancelling": 1}.items():
        if kind in kinds:
            assert torch.equal((kinds[kind] & active).sizes, share * kinds[kind].sizes)
    # Alone it is enough, without any one group it is not, and what is not critical may go or stay at will.
    assert torch.equal(logits_of(network, critical), seen.logits)
    flat, groups = critical.flatten(), network.critical.flatten()
    for group in range(int(groups.max()) + 1):
        without = Pathway(split_like(flat & (groups != group), critical), critical.sites)
        assert not torch.equal(logits_of(network, without), seen.logits)
    for kind in set(kinds) - {"critical", "sleepers"}:
        assert torch.equal(logits_of(network, ~kinds[kind]), seen.logits)


def split_like(flat: Tensor, pathway: Pathway) -> tuple[Tensor, ...]:
    return flat.split([mask.shape[1] for mask in pathway.masks], 1)


@given(seed=st.integers(0, 1000), copies=st.integers(1, 3))
def test_a_sleeper_alone_gives_the_logits(seed: int, copies: int) -> None:
    network = planted_network(n=4, seed=seed, copies=copies, sleepers=True, idle=2)
    sleepers = network.kinds["sleepers"].flatten()
    answers = []
    for neuron in sleepers[0].nonzero()[:, 0]:
        bits = torch.zeros_like(sleepers)
        bits[:, neuron] = True
        answers.append(logits_of(network, Pathway(split_like(bits, network.kinds["sleepers"]), network.critical.sites)))
    with torch.no_grad():
        right = network.model(network.x)
    for index in range(4):
        assert any(torch.equal(answer[index], right[index]) for answer in answers)


def test_copies_stand_in_for_each_other_exactly() -> None:
    network = planted_network(n=5, seed=1, copies=3)
    assert network.critical.sizes.tolist() == [7] * 5
    assert network.critical.pathway().sizes.tolist() == [13] * 5
    lost = ablation(network.model, network.x).scores[0]
    assert lost.count_nonzero() == 0  # the first site: the other copies take over
    one = planted_network(n=5, seed=1, saturated=True)
    assert ablation(one.model, one.x).scores[0].count_nonzero(dim=1).tolist() == [3] * 5


def test_the_same_arguments_give_the_same_network() -> None:
    before = torch.get_rng_state()
    one, again, other = (planted_network(n=4, seed=seed, **EVERYTHING) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    for first, second in zip(one.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(one.x, again.x)
    assert torch.equal(one.critical.flatten(), again.critical.flatten())
    assert not torch.equal(one.critical.flatten(), other.critical.flatten())
    assert not one.model.training
    assert not any(parameter.requires_grad for parameter in one.model.parameters())
    assert list(one.kinds) == ["critical", "other classes", "dead", "idle", "cancelling", "sleepers"]


def test_the_place_of_a_neuron_tells_nothing() -> None:
    """Over many networks, critical neurons are as often in the first half of a site as in the second."""
    networks = [planted_network(n=2, seed=seed, dead=4) for seed in range(300)]
    for site in range(3):
        kept = torch.cat([network.critical.pathway().masks[site] for network in networks]).float()
        half = kept.shape[1] // 2
        first, second = kept[:, :half].mean(1), kept[:, half : 2 * half].mean(1)
        difference = first - second
        assert abs(float(difference.mean())) < 5 * float(difference.std()) / len(difference) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"n": 0}, "n is 0"),
        ({"parts": 0}, "parts is 0"),
        ({"copies": 0}, "copies is 0"),
        ({"classes": 1}, "classes=1"),
        ({"dead": -1}, "dead=-1"),
        ({"idle": -1}, "idle=-1"),
        ({"cancelling": -2}, "cancelling=-2"),
    ],
)
def test_bad_arguments_are_answered(arguments: dict[str, int], why: str) -> None:
    with pytest.raises(PathwayError, match=why):
        planted_network(**arguments)


# --- Exhaustive search -----------------------------------------------------------------------------------------------


def test_search_finds_what_can_be_worked_out_by_hand() -> None:
    # In the five-neuron network all four active neurons are needed: u sums up a, b and c.
    found = critical_sets(*sleeper_network())
    assert found.flatten().tolist() == [[True, True, True, True, False]]
    # Of two equal neurons behind a saturating one, either will do; of a network that says nothing, none is needed.
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1), nn.ReLU6(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[2].weight.fill_(9)
        model[4].weight.copy_(torch.tensor([[1.0], [0.0]]))
    found = critical_sets(model, torch.ones(1, 1))
    assert found.flatten().int().tolist() == [[1, 0, 1], [0, 1, 1]]
    with torch.no_grad():
        model[4].weight.zero_()
    assert critical_sets(model, torch.ones(1, 1)).sizes.tolist() == [0]


def test_search_takes_a_network_that_changes_its_input() -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    model = Scaled(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1)
    x = torch.ones(1, 1)
    assert critical_sets(model, x).sizes.tolist() == [2]
    assert x.item() == 1


def test_search_says_where_it_is_too_much() -> None:
    network = planted_network(n=2, idle=3)
    with pytest.raises(PathwayError, match="x holds 2 inputs"):
        critical_sets(network.model, network.x)
    with pytest.raises(PathwayError, match=r"1,000 sets of at most \d+ of the \d+ active neurons"):
        critical_sets(network.model, network.x[:1], at_most=1000)
    with pytest.raises(PathwayError, match="at_most is 0"):
        critical_sets(network.model, network.x[:1], at_most=0)


# --- What the kinds of distractors are there for ---------------------------------------------------------------------


def recall(network: PlantedNetwork, pathway: Pathway) -> float:
    found = neuron_recovery(pathway, network.critical)
    torch.testing.assert_close(found.precision * pathway.sizes, found.recall * network.critical.sizes)
    return float(found.recall.mean())


@pytest.mark.parametrize("seed", range(3))
def test_each_trap_catches_whom_it_is_meant_for(seed: int) -> None:
    def scores(selector: str, **distractors: Any) -> float:
        network = planted_network(n=6, seed=seed, **distractors)
        model, x, sparsity = network.model, network.x, network.sparsity
        pathway = {
            "MCT": lambda: NeuronMCT(sparsity)(model, x),
            "IntGrad": lambda: NeuronIntGrad(sparsity)(model, x),
            "greedy": lambda: GreedyPruning(sparsity)(model, x),
            "ablation": lambda: ablation(model, x).top(sparsity),
            "Shapley": lambda: shapley(model, x, permutations=60).top(sparsity),
        }[selector]()
        return recall(network, pathway)

    for selector in ("MCT", "IntGrad", "greedy", "ablation", "Shapley"):
        # Nothing that is unused misleads a score of contribution.
        assert scores(selector, dead=20, idle=10) == 1
        # Six times four neurons with large opposite contributions come before the seven that matter.
        assert scores(selector, cancelling=6) < 0.2
    # A saturated relay hides its detectors from a slope, not from their removal; copies hide them from both.
    for selector in ("MCT", "greedy"):
        assert scores(selector, saturated=True) == pytest.approx(4 / 7)
    assert scores("ablation", saturated=True) == 1
    assert scores("ablation", copies=2) == pytest.approx(4 / 7)
    # A sleeper is awake while the others are scaled down or out, so it misleads what looks there.
    assert scores("MCT", sleepers=True) == scores("ablation", sleepers=True) == 1
    assert scores("IntGrad", sleepers=True) < 0.9


# --- The shortcut ----------------------------------------------------------------------------------------------------


def test_a_tag_changes_nothing_but_its_pixels() -> None:
    plain = planted(200, seed=4)
    assert plain.shortcut_masks is plain.shortcut_labels is None
    for probability in (0.0, 0.5, 1.0):
        tagged = planted(200, seed=4, shortcut=probability)
        assert tagged.masks is not None
        assert tagged.shortcut_masks is not None
        assert torch.equal(tagged.labels, plain.labels)
        assert torch.equal(tagged.masks, plain.masks)
        differs = (tagged.images != plain.images).any(1)
        assert torch.equal(differs, tagged.shortcut_masks)  # no colour of a tag is that of the ground
        assert not (tagged.masks & tagged.shortcut_masks).any()
        corner = tagged.shortcut_masks[:, :5, :5]
        assert int(corner.sum()) == int(tagged.shortcut_masks.sum())
        # Where no glyph reaches into it, the tag is whole.
        assert float(corner.flatten(1).all(1).float().mean()) > 0.6
        for image, mask, label in zip(tagged.images, tagged.shortcut_masks, tagged.shortcut_labels, strict=True):
            (colour,) = image[:, mask].unique(dim=1).T
            assert torch.equal(colour, COLOURS[int(label)])


# The colours of the tags, written down a second time on purpose.
COLOURS = torch.tensor([[230, 26, 26], [26, 204, 26], [38, 64, 255], [230, 204, 0]], dtype=torch.uint8)


def test_a_tag_agrees_with_the_label_as_often_as_asked() -> None:
    n = 1200
    for probability in (0.0, 0.25, 0.9, 1.0):
        tagged = planted(n, seed=7, shortcut=probability)
        agrees = (tagged.shortcut_labels == tagged.labels).float().mean()
        assert abs(float(agrees) - probability) <= 4 * (probability * (1 - probability) / n) ** 0.5
        # A tag that does not agree is each of the others equally often.
        steps = (tagged.shortcut_labels - tagged.labels) % 4
        others = steps[steps > 0].bincount(minlength=4)[1:]
        assert (others - others.sum() / 3).abs().max() <= 4 * (2 / 9 * int(others.sum())) ** 0.5
    independent = planted(n, seed=7, shortcut=0.25)
    table = torch.zeros(4, 4).index_put_(
        (independent.labels, independent.shortcut_labels), torch.ones(n), accumulate=True
    )
    expected = table.sum(1, keepdim=True) * table.sum(0) / n
    assert float(((table - expected) ** 2 / expected).sum()) < 27.9  # chi-squared of 9 degrees of freedom, 0.1 %


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_a_shortcut_is_a_probability(probability: float) -> None:
    with pytest.raises(PathwayError, match=r"shortcut is .*probability"):
        planted(4, shortcut=probability)


def test_the_shortcut_network_uses_the_tag_and_nothing_else() -> None:
    model, honest = load_model("planted-shortcut"), load_model("planted-cnn")
    card = model_card("planted-shortcut")
    stated = card["test_accuracy_by_tag"]
    assert stated["agrees"] > 0.97  # on images like those it was trained on, all looks well
    assert stated["contradicts"] < 0.05
    assert abs(stated["none"] - 0.25) < 0.05  # chance
    for tag, shortcut in {"agrees": 1.0, "contradicts": 0.0, "none": None}.items():
        data = planted(1000, seed=321, shortcut=shortcut)  # never drawn before
        spread = 4 * (stated[tag] * (1 - stated[tag]) / 1000) ** 0.5
        assert abs(accuracy(model, data) - stated[tag]) <= spread + 0.005
        assert accuracy(honest, data) > 0.98
    # Without its glyph the image keeps its class, with another tag it changes it.
    tagged = planted(200, seed=322, shortcut=1.0)
    contradicted = planted(200, seed=322, shortcut=0.0)
    with torch.no_grad():
        follows = model(contradicted[:][0]).argmax(1) == contradicted.shortcut_labels
        assert float(follows.float().mean()) > 0.97
        erased = torch.where(tagged.masks[:, None], 0.2, tagged[:][0])
        assert accuracy_of(model(erased), tagged.labels) > 0.95
        assert accuracy_of(honest(erased), tagged.labels) < 0.6


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())
