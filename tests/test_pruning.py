"""Pruning selectors against slow loops in plain code, and the five-neuron network against all of its subsets."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import RandomNetwork, Record, networks, small_network, unchanged
from torch import Tensor, nn

from pathwaylib import (
    DistillationGuidedRouting,
    GreedyPruning,
    NeuronMCT,
    Pathway,
    PathwayError,
    dead_share,
    masked,
    observe,
    prediction_kept,
    sleeper_network,
    taylor,
)

SELECTORS = [
    GreedyPruning(0.7, steps=3),
    GreedyPruning(0.7, steps=3, schedule="linear"),
    GreedyPruning(0.2, steps=3, revive=True),  # more score above 0 than have to leave, or the target plays no part
    GreedyPruning(0.7, steps=3, batch_size=2),
    DistillationGuidedRouting(0.7, iterations=5),
    DistillationGuidedRouting(0.7, iterations=5, start="random"),
    DistillationGuidedRouting(0.7, iterations=5, batch_size=2),
]


def wide_network(seed: int = 0) -> nn.Sequential:
    """Return a float64 network of 40 + 60 + 100 = 200 neurons: every tenth of them is a whole number."""
    network = nn.Sequential(
        *(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 100), nn.ReLU(), nn.Linear(100, 4))
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3, generator=generator)
    return network.double().eval()


def wide_inputs(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inside(a: Pathway, b: Pathway) -> bool:
    return not bool((a & ~b).sizes.any())


# --- the five neurons ---

NAMES = "abcud"


def sleeper_logits(kept: str) -> tuple[int, int]:
    """Compute the network of the docstring by hand, with the neurons of ``kept``."""
    a, b, c = (value if name in kept else 0 for name, value in zip("abc", (1, 2, 3), strict=True))
    u = max(0, a + b + c + 1) if "u" in kept else 0
    d = max(0, 7 - 2 * (a + b + c)) if "d" in kept else 0
    return u + d, 4


def names(pathway: Pathway) -> str:
    return "".join(itertools.compress(NAMES, pathway.flatten()[0].tolist()))


def subsets() -> list[str]:
    return ["".join(chosen) for size in range(6) for chosen in itertools.combinations(NAMES, size)]


def test_the_smallest_equivalent_subset_of_the_sleeper_is_one_dead_neuron() -> None:
    network, x = sleeper_network()
    seen = observe(network, x)
    equivalent = []
    for kept in subsets():
        bits = torch.tensor([[name in kept for name in NAMES]])
        pathway = Pathway((bits[:, :3], bits[:, 3:]), seen.sites)
        with masked(pathway):
            logits = network(x)
        assert logits.tolist() == [list(sleeper_logits(kept))]
        if torch.equal(logits, seen.logits):
            equivalent.append(kept)
            assert prediction_kept(network, x, pathway).all()
    assert len(subsets()) == 32
    assert equivalent == ["d", "aud", "abcu", "abcud"]
    assert names(seen.active()) == "abcu"  # d is dead


def test_the_response_of_the_sleeper_alone_ignores_the_image() -> None:
    network, x = sleeper_network()
    only_d = Pathway((torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[False, True]])), ("relu_0", "relu_1"))
    other = x.clone().requires_grad_()
    with masked(only_d):
        response = network(other)[0, 0]
        assert torch.equal(network(x + 3), network(x))
    assert torch.autograd.grad(response, other)[0].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("schedule", ["geometric", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_monotone_greedy_never_finds_the_sleeper(schedule: str, steps: int) -> None:
    network, x = sleeper_network()
    found = [names(GreedyPruning(s, steps=steps, schedule=schedule)(network, x)) for s in (0.8, 0.6, 0.4, 0.2, 0.0)]
    # One neuron is asked for: u, the largest score, which alone gives 1 and not 7. At sparsity 0, d scores 0.
    assert found == ["u", "cu", "bcu", "abcu", "abcu"]
    assert not prediction_kept(network, x, GreedyPruning(0.8, steps=steps)(network, x)).any()


def test_reviving_greedy_finds_the_sleeper_or_not_depending_on_the_number_of_rounds() -> None:
    network, x = sleeper_network()
    found = {steps: names(GreedyPruning(0.8, steps=steps, revive=True)(network, x)) for steps in (1, 2, 4)}
    assert found == {1: "d", 2: "b", 4: "d"}


def test_routing_never_finds_the_sleeper() -> None:
    network, x = sleeper_network()
    for start in ("ones", "random"):
        gates = DistillationGuidedRouting(start=start).gates(network, x).scores
        assert float(gates[1][0, 0]) > float(gates[1][0, 1])  # u above d
        assert names(DistillationGuidedRouting(0.8, start=start)(network, x)) == "u"


def test_sleeper_network_draws_nothing_and_is_new_each_time() -> None:
    state = torch.get_rng_state()
    (network, x), (other, _) = sleeper_network(), sleeper_network()
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    assert x.shape == (1, 2)
    assert network[0].weight is not other[0].weight


# --- greedy pruning ---


def slow_scores(network: RandomNetwork, x: Tensor, masks: Sequence[Tensor], target: int) -> Tensor:
    """Return |a ∂Φ_t/∂a| of one image inside the masked network, flat, from the plain reference."""
    record = Record()
    added = [torch.zeros(mask.shape, dtype=x.dtype, requires_grad=True) for mask in masks]
    logits = network.reference(x, masks, added, record)
    gradients = torch.autograd.grad(logits[0, target], added)
    # What is added behind the mask has the derivative of the masked activation.
    return torch.cat([(a * g).flatten().abs() for a, g in zip(record.post, gradients, strict=True)]).detach()


def slow_counts(neurons: int, k: int, steps: int, schedule: str) -> list[int]:
    linear = [round(neurons - (neurons - k) * r / steps) for r in range(1, steps)]
    geometric = [round(neurons * (k / neurons) ** (r / steps)) for r in range(1, steps)]
    return [*(linear if schedule == "linear" else geometric), k]


def slow_greedy(
    network: RandomNetwork, x: Tensor, target: int, selector: GreedyPruning
) -> tuple[list[set[int]], set[int]]:
    """Prune one image by sorted lists; return the neurons in after each round, and those that tied at its border."""
    with torch.no_grad():
        network.reference(x, record=(record := Record()))
    shapes = [a.shape for a in record.post]
    sizes = [a.numel() for a in record.post]
    neurons = sum(sizes)
    k = round((1 - Fraction(str(selector.sparsity))) * neurons)
    alive, rounds, tied = set(range(neurons)), [], set()
    for index, count in enumerate(slow_counts(neurons, k, selector.steps, selector.schedule)):
        bits = torch.tensor([neuron in alive for neuron in range(neurons)])
        masks = [part.view(shape) for part, shape in zip(bits.split(sizes), shapes, strict=True)]
        scores = slow_scores(network, x, masks, target).tolist()
        if selector.revive:
            leaving = sorted((n for n in range(neurons) if scores[n] > 0), key=scores.__getitem__)
            alive = set(range(neurons)) - set(leaving[: neurons - count])
            if index + 1 == selector.steps and len(alive) > count:
                tied = alive
        else:
            if not index:
                alive = {n for n in alive if scores[n] > 0}
            order = sorted(alive, key=scores.__getitem__)
            out = max(0, len(alive) - count)
            if out and scores[order[out - 1]] == scores[order[out]]:
                tied = {n for n in alive if scores[n] == scores[order[out]]}
            alive = set(order[out:])
        rounds.append(alive)
    return rounds, tied


def kept_set(pathway: Pathway, image: int) -> set[int]:
    return set(pathway.flatten()[image].nonzero()[:, 0].tolist())


@settings(max_examples=30)
@given(
    networks(),
    st.booleans(),
    st.sampled_from(["geometric", "linear"]),
    st.integers(1, 5),
    st.sampled_from([0.3, 0.5, 0.8]),
)
def test_greedy_is_the_slow_loop(
    network: RandomNetwork, revive: bool, schedule: str, steps: int, sparsity: float
) -> None:
    selector = GreedyPruning(sparsity, steps=steps, revive=revive, schedule=schedule)
    x, targets = network.inputs(2), [2, 0]
    pathway = selector(network, x, targets)
    for image, target in enumerate(targets):
        rounds, tied = slow_greedy(network, x[image : image + 1], target, selector)
        kept, expected = kept_set(pathway, image), rounds[-1]
        if revive and tied:  # only score-0 neurons are left, and more than k of them
            assert kept <= expected
            assert len(kept) == round((1 - Fraction(str(sparsity))) * pathway.neurons)
        elif not tied:
            assert kept == expected


@pytest.mark.parametrize("selector", [GreedyPruning(0.9, steps=4), GreedyPruning(0.3, steps=3, revive=True)], ids=repr)
def test_the_slow_loop_decides(selector: GreedyPruning) -> None:
    # The test above says little where neurons tie: here it has to speak, and to differ from one-shot pruning.
    network = small_network(seed=1)
    x = network.inputs(1)
    rounds, tied = slow_greedy(network, x, 1, selector)
    assert not tied
    assert kept_set(selector(network, x, 1), 0) == rounds[-1]
    assert kept_set(dataclasses.replace(selector, steps=1)(network, x, 1), 0) != rounds[-1]


@given(networks(), st.sampled_from([0.0, 0.35, 0.5, 0.9, 0.99]), st.integers(1, 4))
def test_monotone_greedy_keeps_k_live_neurons_or_all_that_contribute(
    network: RandomNetwork, sparsity: float, steps: int
) -> None:
    x = network.inputs(3)
    pathway = GreedyPruning(sparsity, steps=steps)(network, x)
    contributing = taylor(network, x).top(0.0)
    k = round((1 - Fraction(str(sparsity))) * pathway.neurons)
    assert pathway.sizes.tolist() == [min(k, positive) for positive in contributing.sizes.tolist()]
    assert inside(pathway, contributing)
    assert not dead_share(pathway, observe(network, x)).any()


@given(networks(), st.sampled_from([0.0, 0.35, 0.5, 0.9, 0.99]), st.integers(1, 4))
def test_reviving_greedy_keeps_exactly_k(network: RandomNetwork, sparsity: float, steps: int) -> None:
    pathway = GreedyPruning(sparsity, steps=steps, revive=True)(network, network.inputs(3))
    assert pathway.sizes.tolist() == [round((1 - Fraction(str(sparsity))) * pathway.neurons)] * 3


@given(networks(), st.sampled_from([0.35, 0.9]))
def test_one_monotone_round_is_neuron_mct(network: RandomNetwork, sparsity: float) -> None:
    x = network.inputs(3)
    assert torch.equal(
        GreedyPruning(sparsity, steps=1)(network, x).flatten(), NeuronMCT(sparsity)(network, x).flatten()
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=repr)
@pytest.mark.parametrize("swapped", [False, True])
def test_neurons_cut_off_in_an_earlier_round_leave_first_and_what_is_out_stays_out(
    order: tuple[int, ...], swapped: bool
) -> None:
    # n₁ and n₂ feed m₁ alone, which scores lowest and leaves in the first of two rounds (6 → 4 → 3 neurons),
    # with n₃, which is dead. Then four neurons score 0, and wherever they stand, m₁ and n₃ must not come back.
    n, m = list(order), [1, 0] if swapped else [0, 1]
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        for layer, weight, bias in (
            (network[0], torch.eye(4, 3)[n], torch.zeros(4)),
            (network[2], torch.tensor([[1, 0, 0, 0], [0, 4, 5, 1]])[m][:, n], torch.tensor([5, -20])[m]),
            (network[4], torch.tensor([[1, 1], [0, 0]]), torch.zeros(2)),
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    x = torch.tensor([[3.0, 3.0, 2.0]])
    first, second = (score[0].tolist() for score in taylor(network, x, 0).scores)
    assert first == [[3, 12, 10, 0][index] for index in n]
    assert second == [[8, 2][index] for index in m]
    pathway = GreedyPruning(0.5, steps=2, schedule="linear")(network, x, 0)
    first, second = (mask[0].tolist() for mask in pathway.masks)
    assert second == [index == 0 for index in m]
    assert first[n.index(0)]
    assert first[n.index(1)] != first[n.index(2)]
    assert sum(first) == 2  # with one of the two that score 0 by now: k scored above 0 in the whole network


def rounds_of(revive: bool) -> list[Pathway]:
    """Return the pathways after 1 to 9 rounds of one run: in equal steps, a run cut short is a run to less sparsity."""
    network, x = wide_network(), wide_inputs(6)
    runs = [GreedyPruning(r / 10, steps=r, schedule="linear", revive=revive) for r in range(1, 10)]
    return [selector(network, x) for selector in runs]


def test_monotone_rounds_are_nested() -> None:
    rounds = rounds_of(revive=False)
    assert all(inside(later, earlier) for earlier, later in itertools.pairwise(rounds))
    assert rounds[-1].sizes.tolist() == [20] * 6
    # Scoring again matters: one-shot pathways of the same size are others.
    assert not torch.equal(rounds[-1].flatten(), NeuronMCT(0.9)(wide_network(), wide_inputs(6)).flatten())


def test_reviving_rounds_are_not_nested_and_hold_dead_neurons() -> None:
    rounds = rounds_of(revive=True)
    assert not all(inside(later, earlier) for earlier, later in itertools.pairwise(rounds))
    assert [pathway.sizes.tolist() for pathway in rounds] == [[200 - 20 * r] * 6 for r in range(1, 10)]
    assert (dead_share(rounds[-1], observe(wide_network(), wide_inputs(6))) > 0).all()


def test_geometric_rounds_leave_small_steps_for_the_end() -> None:
    # 200 → 2 neurons in two rounds: by way of 20, or linearly by way of 101, which are more than score above 0.
    network, x = wide_network(), wide_inputs(8)
    geometric, linear = (
        GreedyPruning(0.99, steps=2, schedule=schedule)(network, x) for schedule in ("geometric", "linear")
    )
    assert torch.equal(linear.flatten(), NeuronMCT(0.99)(network, x).flatten())
    assert not torch.equal(geometric.flatten(), linear.flatten())
    assert inside(geometric, NeuronMCT(0.9)(network, x))


# --- distillation-guided routing ---


def slow_routing(network: RandomNetwork, x: Tensor, start: list[Tensor], selector: DistillationGuidedRouting) -> Tensor:
    """Route one image in plain code; return its best gates, flat."""
    with torch.no_grad():
        logits = network.reference(x)
    wanted, predicted = logits.softmax(1), int(logits.argmax())
    gates, velocities = start, [torch.zeros_like(gate) for gate in start]
    best, best_key, since = torch.cat([gate.flatten() for gate in start]), (True, math.inf), 0
    for _ in range(selector.iterations + 1):
        gates = [gate.detach().requires_grad_() for gate in gates]
        routed = network.reference(x, gates)
        cross_entropy = -(wanted * routed.log_softmax(1)).sum()
        loss = cross_entropy + selector.gamma * sum(gate.sum() for gate in gates)
        key = (int(routed.argmax()) != predicted, loss.item())  # one that keeps the prediction comes first
        since += 1
        if key < best_key:
            best, best_key, since = torch.cat([gate.detach().flatten() for gate in gates]), key, 0
        if since == selector.patience:
            break
        gradients = torch.autograd.grad(loss, gates)
        velocities = [selector.momentum * v + g for v, g in zip(velocities, gradients, strict=True)]
        gates = [
            (gate.detach() - selector.learning_rate * v).clamp(min=0) for gate, v in zip(gates, velocities, strict=True)
        ]
    return best


@given(
    networks(),
    st.sampled_from(["ones", "random"]),
    st.sampled_from([0.0, 0.002, 0.05]),
    st.sampled_from([1, 3, 50]),
    st.sampled_from([0.0, 0.9]),
)
def test_routing_is_the_slow_loop(
    network: RandomNetwork, start: str, gamma: float, patience: int, momentum: float
) -> None:
    selector = DistillationGuidedRouting(
        iterations=15,
        learning_rate=0.1,
        momentum=momentum,
        gamma=gamma,
        start=start,
        patience=patience,
        generator=torch.Generator().manual_seed(5),
    )
    x = network.inputs(3)
    found = torch.cat([gate.flatten(1) for gate in selector.gates(network, x).scores], 1)
    shapes = [a.shape[1:] for a in observe(network, x).post]
    generator = torch.Generator().manual_seed(5)
    for image in range(3):
        drawn = torch.ones(found.shape[1]) if start == "ones" else 1 - torch.rand(found.shape[1], generator=generator)
        parts = drawn.double().split([shape.numel() for shape in shapes])
        gates = [part.view(1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        expected = slow_routing(network, x[image : image + 1], gates, selector)
        torch.testing.assert_close(found[image], expected, rtol=1e-5, atol=1e-8)


@given(networks())
def test_best_gates_keep_the_prediction_and_are_no_worse_than_all_ones(network: RandomNetwork) -> None:
    x = network.inputs(3)
    gates = DistillationGuidedRouting(learning_rate=0.1).gates(network, x).scores
    with torch.no_grad():
        full, routed = network.reference(x), network.reference(x, gates)
    assert torch.equal(full.argmax(1), routed.argmax(1))
    assert all((gate >= 0).all() for gate in gates)
    assert (sum(gate.flatten(1).sum(1) for gate in gates) < sum(gate[0].numel() for gate in gates)).all()


def test_gates_of_dead_neurons_sink_together_between_the_useful_and_the_harmful() -> None:
    # Behind one site no neuron can wake, so the gates of dead neurons follow the closed form of momentum.
    network = nn.Sequential(nn.Linear(5, 50), nn.ReLU(), nn.Linear(50, 4)).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
    x = wide_inputs(4)
    active = observe(network, x).active().masks[0]
    selector = DistillationGuidedRouting(iterations=12, learning_rate=0.02, gamma=0.05, patience=13)
    gates = selector.gates(network, x).scores[0]
    sunk = [1 - 0.02 * 0.05 * sum((1 - 0.9**step) / 0.1 for step in range(1, steps + 1)) for steps in range(13)]
    for image in range(4):
        dead, alive = gates[image][~active[image]], gates[image][active[image]]
        assert len(dead.unique()) == 1
        assert min(abs(float(dead[0]) - level) for level in sunk[1:]) < 1e-12
        assert float(alive.min()) < float(dead[0]) < float(alive.max())
    # Where k is more than the useful neurons, dead ones that tie fill it up.
    useful = [int((gates[image] > gates[image][~active[image]][0]).sum()) for image in range(4)]
    pathway = DistillationGuidedRouting(0.2, iterations=12, learning_rate=0.02, patience=13)(network, x)
    assert pathway.sizes.tolist() == [40] * 4
    assert max(useful) < 40
    assert (dead_share(pathway, Pathway((active,), ("relu_0",))) > 0).all()


def test_a_gate_of_zero_is_never_kept() -> None:
    network, x = wide_network(), wide_inputs(3)
    selector = DistillationGuidedRouting(0.0, iterations=200, learning_rate=0.2, patience=200)
    gates = torch.cat([gate.flatten(1) for gate in selector.gates(network, x).scores], 1)
    assert (gates == 0).any(1).all()
    assert torch.equal(selector(network, x).flatten(), gates > 0)


def test_a_finished_image_does_not_depend_on_the_others() -> None:
    # Alone, an image stops as soon as it has waited long enough; in a batch it must not use the others' longer run.
    network, x = wide_network(), wide_inputs(8)
    selector = DistillationGuidedRouting(iterations=80, learning_rate=0.5, gamma=0.01, patience=1)
    together = selector.gates(network, x).scores
    for image in range(8):
        for both, alone in zip(together, selector.gates(network, x[image : image + 1]).scores, strict=True):
            torch.testing.assert_close(both[image], alone[0], rtol=1e-9, atol=1e-12)
    longer = dataclasses.replace(selector, patience=80).gates(network, x).scores
    waiting = (together[0] != longer[0]).any(1)
    assert waiting.any()
    assert not waiting.all()


def test_routing_starts_from_its_generator_alone() -> None:
    network, x = wide_network(), wide_inputs(4)
    unseeded = DistillationGuidedRouting(0.5, iterations=2, start="random")
    with unchanged(network, x):
        first, again = unseeded(network, x).flatten(), unseeded(network, x).flatten()
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    generator = torch.Generator().manual_seed(7)
    drawing = DistillationGuidedRouting(0.5, iterations=2, start="random", generator=generator)
    batch, moved_on = drawing(network, x).flatten(), drawing(network, x).flatten()
    assert not torch.equal(batch, moved_on)
    generator.manual_seed(7)  # a loop over the images draws what the batch drew
    loop = torch.cat([drawing(network, image).flatten() for image in x.split(1)])
    assert torch.equal(batch, loop)


def test_routing_shows_progress_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    network, x = wide_network(), wide_inputs(1)
    silent = DistillationGuidedRouting(iterations=3)(network, x)
    assert capsys.readouterr() == ("", "")
    shown = DistillationGuidedRouting(iterations=3, progress=True)(network, x)
    assert "routing" in capsys.readouterr().err
    assert torch.equal(silent.flatten(), shown.flatten())


# --- both ---


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
@pytest.mark.parametrize(
    "selector",
    [
        GreedyPruning(0.8, steps=4),
        GreedyPruning(0.8, steps=4, revive=True),
        DistillationGuidedRouting(0.6, iterations=10),
        DistillationGuidedRouting(0.6, iterations=10, start="random"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("target", [None, 1, [0, 2, 1, 1, 0]], ids=repr)
def test_batches_do_not_change_the_pathway(selector: GreedyPruning, batch_size: int, target: object) -> None:
    network = small_network()
    x = network.inputs(5)
    whole = selector(network, x, target)
    parts = dataclasses.replace(selector, batch_size=batch_size)(network, x, target)
    assert torch.equal(parts.flatten(), whole.flatten())
    assert parts.sites == whole.sites
    assert torch.equal(parts.targets, whole.targets)


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@pytest.mark.parametrize("spelling", ["nn.ReLU", "nn.ReLU(inplace=True)", "F.leaky_relu_, discarded", "nn.ReLU6"])
def test_selectors_change_nothing_and_note_the_target(selector: GreedyPruning, spelling: str) -> None:
    network = small_network(spelling=spelling)
    x = network.inputs(3).requires_grad_()
    with unchanged(network, x):
        predicted, given_target = selector(network, x), selector(network, x, [1, 2, 0])
        with torch.no_grad():
            again = selector(network, x)
    assert torch.equal(predicted.flatten(), again.flatten())
    assert predicted.targets.tolist() == network(x).argmax(1).tolist()
    assert given_target.targets.tolist() == [1, 2, 0]
    assert all(mask.dtype == torch.bool and not mask.requires_grad for mask in predicted.masks)
    # Greedy pruning explains the target; routing compares all classes.
    same = torch.equal(predicted.flatten(), given_target.flatten())
    assert same == isinstance(selector, DistillationGuidedRouting)


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_no_gradient_reaches_a_tensor_that_the_network_does_not_register(selector: GreedyPruning) -> None:
    network, scale = small_network(), torch.ones((), dtype=torch.float64, requires_grad=True)
    with network.stem.register_forward_hook(lambda module, given, result: result * scale):
        selector(network, network.inputs(2))
    assert scale.grad is None


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_a_network_that_fails_midway_is_left_as_it_was(selector: GreedyPruning) -> None:
    network = small_network()
    x = network.inputs(3)
    calls = itertools.count(1)

    def fail(*_: object) -> None:
        if next(calls) == 2:
            raise RuntimeError("midway")

    with network.head.register_forward_hook(fail), unchanged(network, x), pytest.raises(RuntimeError, match="midway"):
        selector(network, x)


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@pytest.mark.parametrize(
    ("x", "target", "message"),
    [
        (torch.rand(2, 3, 7, 7).double(), 3, "target"),
        (torch.rand(3, 3, 7, 7).double(), [0], r"\(1,\) for 3 inputs"),
        (torch.rand(0, 3, 7, 7).double(), None, "at least one"),
        (torch.full((1, 3, 7, 7), torch.nan).double(), None, "NaN"),
        (torch.ones(1, 3, 7, 7, dtype=torch.uint8), None, "uint8"),
        ([[0.0]], None, "list"),
    ],
)
def test_selectors_answer_bad_input(selector: GreedyPruning, x: Tensor, target: object, message: str) -> None:
    network = small_network()
    with unchanged(network), pytest.raises(PathwayError, match=message):
        selector(network, x, target)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (GreedyPruning, "sparsity", [1, -0.1, math.nan]),
        (GreedyPruning, "steps", [0, -1, 2.5, True]),
        (GreedyPruning, "schedule", ["cubic"]),
        (GreedyPruning, "batch_size", [0, 1.5]),
        (DistillationGuidedRouting, "sparsity", [1, -0.1, math.nan]),
        (DistillationGuidedRouting, "iterations", [0, 2.5]),
        (DistillationGuidedRouting, "learning_rate", [0, -0.1, math.nan, math.inf]),
        (DistillationGuidedRouting, "momentum", [1, -0.1, math.nan]),
        (DistillationGuidedRouting, "gamma", [-0.1, math.nan, math.inf]),
        (DistillationGuidedRouting, "start", ["zeros"]),
        (DistillationGuidedRouting, "patience", [0, None]),
        (DistillationGuidedRouting, "batch_size", [0, 1.5]),
    ],
)
def test_parameters_are_checked_when_the_selector_is_made(kind: type, name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(PathwayError, match=f"^{name} is {value!r};"):
            kind(**{name: value})


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selectors_take_any_precision(selector: GreedyPruning, dtype: torch.dtype) -> None:
    network = wide_network().to(dtype)
    pathway = selector(network, wide_inputs(3).to(dtype))
    assert pathway.sizes.tolist() == [round(200 * (1 - Fraction(str(selector.sparsity))))] * 3


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_selectors_are_frozen(selector: GreedyPruning) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        selector.sparsity = 0.5
