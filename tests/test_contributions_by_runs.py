"""Scores that need many runs, integrated gradients, ablation, Shapley values: against closed forms and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from hypothesis import given
from hypothesis import strategies as st
from networks import RandomNetwork, Record, networks, small_network, unchanged
from torch import Tensor, nn

from pathwaylib import (
    Contributions,
    NeuronIntGrad,
    NeuronMCT,
    PathwayError,
    ablation,
    cifar10,
    integrated_gradients,
    load_model,
    shapley,
    taylor,
)
from pathwaylib.neurons import run


def losses_of_sites(network: RandomNetwork, x: Tensor, target: int) -> list[Tensor]:
    """Return Φ_t(x) - Φ_t(site ← 0) for each site, from the reference network."""
    record = Record()
    with torch.no_grad():
        full = network.reference(x, record=record)[:, target]
        found = []
        for site in range(len(record.post)):
            masks = [torch.ones_like(a) for a in record.post]
            masks[site].zero_()
            found.append(full - network.reference(x, masks)[:, target])
    return found


# --- integrated gradients ---


@given(networks(), st.integers(1, 3), st.integers(0, 2))
def test_exact_integrals_are_complete(network: RandomNetwork, count: int, target: int) -> None:
    x = network.inputs(count)
    with unchanged(network, x):
        found = integrated_gradients(network, x, target, exact=True)
    for score, lost in zip(found.scores, losses_of_sites(network, x, target), strict=True):
        torch.testing.assert_close(score.flatten(1).sum(1), lost, rtol=1e-9, atol=1e-9 * (1 + float(lost.abs().max())))


@given(networks(), st.integers(0, 2))
def test_the_midpoint_rule_tends_to_the_exact_integral(network: RandomNetwork, target: int) -> None:
    x = network.inputs(2)
    exact = integrated_gradients(network, x, target, exact=True)
    errors = []
    for n_steps in (8, 512):
        found = integrated_gradients(network, x, target, n_steps=n_steps)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found.scores, exact.scores, strict=True)))
    scale = max(float(score.abs().max()) for score in exact.scores)
    # Each kink costs at most half a step's gradient jump: 64 times the steps, at most a 64th of the worst case.
    assert errors[1] <= errors[0] + 1e-12 * scale
    assert errors[1] <= 0.05 * scale + 1e-12


def test_the_error_falls_like_one_over_the_steps() -> None:
    model, x = load_model("cifar10-vgg"), cifar10("test")[:16][0]
    exact = losses_by_rerun(model, x)
    medians = []
    for n_steps in (4, 16, 64):
        found = integrated_gradients(model, x, n_steps=n_steps)
        error = [
            ((score.flatten(1).sum(1) - lost).abs() / response).median()
            for score, (lost, response) in zip(found.scores[:-1], exact[:-1], strict=True)
        ]
        medians.append(torch.stack(error).mean())
    assert medians[1] < medians[0] / 2
    assert medians[2] < medians[1] / 2
    assert medians[2] < 0.02


def losses_by_rerun(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (what the response loses without the site, the response) for each site, by an independent whole run."""
    with torch.no_grad():
        logits = model(x)
        target = logits.argmax(1)[:, None]
        full = logits.gather(1, target)[:, 0]
        sites = len(taylor(model, x[:1]).sites)
        return [
            (
                full
                - run(
                    model,
                    x,
                    lambda call, z, s=site: call.function(z) * (call.index != s),  # type: ignore[misc]
                ).gather(1, target)[:, 0],
                full.abs(),
            )
            for site in range(sites)
        ]


@given(networks(forms=("plain", "twice")), st.integers(0, 2))
def test_into_a_linear_readout_all_scores_agree(network: RandomNetwork, target: int) -> None:
    if network.blocks[-1].pool == "max":
        return
    x = network.inputs(2)
    first = taylor(network, x, target).scores[-1]
    for other in (
        integrated_gradients(network, x, target, n_steps=1),
        integrated_gradients(network, x, target, exact=True),
        ablation(network, x, target),
    ):
        torch.testing.assert_close(other.scores[-1], first, rtol=1e-9, atol=1e-9 * (1 + float(first.abs().max())))


def test_by_hand() -> None:
    # a = (2), then relu(a - 1) - 3 relu(a - 1.5): slope 0, then 1, then -2 along the way from 0 to 2.
    network = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    with torch.no_grad():
        for layer, weight, bias in ((0, [[2.0]], [0.0]), (2, [[1.0], [1.0]], [-1.0, -1.5]), (4, [[1.0, -3.0]], [0.0])):
            network[layer].weight.copy_(torch.tensor(weight))
            network[layer].bias.copy_(torch.tensor(bias))
    x = torch.ones(1, 1, dtype=torch.float64)
    exact = integrated_gradients(network, x, 0, exact=True)
    # 2 * (0.5 * 0 + 0.25 * 1 + 0.25 * -2)
    torch.testing.assert_close(exact.scores[0], torch.tensor([[-0.5]], dtype=torch.float64), rtol=0, atol=1e-12)
    # Midpoints at 1/4 and 3/4 of the way; the second one is on the kink at 1.5, where PyTorch's slope is that before.
    two = integrated_gradients(network, x, 0, n_steps=2)
    torch.testing.assert_close(two.scores[0], torch.tensor([[1.0]], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(taylor(network, x, 0).scores[0], torch.tensor([[-4.0]], dtype=torch.float64))


@pytest.mark.parametrize("site", [1, 2])
def test_captum_agrees_where_it_applies(site: int) -> None:
    # Captum scales from the layer's activation at a baseline image; without biases that is 0 for a black image.
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for channels in ((3, 4), (4, 5), (5, 4)):
        layers += [nn.Conv2d(*channels, 3, padding=1, bias=False), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 3, bias=False)).double().eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.3, generator=generator)
    x = torch.rand(3, 3, 6, 6, dtype=torch.float64, generator=generator)
    captum = LayerIntegratedGradients(network, network[2 * site + 1])
    theirs = captum.attribute(x, target=1, n_steps=64, method="riemann_middle")
    ours = integrated_gradients(network, x, 1, n_steps=64).scores[site]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@given(networks(), st.integers(1, 12))
def test_batches_and_steps_can_be_grouped_at_will(network: RandomNetwork, batch_size: int) -> None:
    x = network.inputs(5)
    together = integrated_gradients(network, x, [0, 1, 2, 1, 0], n_steps=6)
    grouped = integrated_gradients(network, x, [0, 1, 2, 1, 0], n_steps=6, batch_size=batch_size)
    assert grouped.targets is not None
    assert grouped.targets.tolist() == [0, 1, 2, 1, 0]
    for a, b in zip(together.scores, grouped.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(networks())
def test_dead_neurons_score_zero(network: RandomNetwork) -> None:
    x, record = network.inputs(2), Record()
    with torch.no_grad():
        network.reference(x, record=record)
    for scores in (integrated_gradients(network, x, n_steps=3), ablation(network, x)):
        for score, a in zip(scores.scores, record.post, strict=True):
            assert (score[a == 0] == 0).all()


def test_selector_takes_the_largest_integrated_gradients() -> None:
    network = small_network()
    x = network.inputs(4)
    selected = NeuronIntGrad(sparsity=0.8, n_steps=5, batch_size=3)(network, x, 2)
    expected = integrated_gradients(network, x, 2, n_steps=5).top(0.8)
    assert torch.equal(selected.flatten(), expected.flatten())
    assert not torch.equal(selected.flatten(), NeuronMCT(sparsity=0.8)(network, x, 2).flatten())
    assert selected.targets is not None
    assert selected.targets.tolist() == [2] * 4


# --- ablation ---


@given(networks(), st.integers(0, 2), st.integers(1, 20))
def test_ablation_is_the_loss_without_the_neuron(network: RandomNetwork, target: int, batch_size: int) -> None:
    x, record = network.inputs(2), Record()
    with unchanged(network, x):
        found = ablation(network, x, target, batch_size=batch_size)
    with torch.no_grad():
        full = network.reference(x, record=record)
    generator = torch.Generator().manual_seed(0)
    for site, a in enumerate(record.post):
        for neuron in torch.randperm(a[0].numel(), generator=generator)[:6].tolist():
            masks = [torch.ones_like(post) for post in record.post]
            masks[site].flatten(1)[:, neuron] = 0
            with torch.no_grad():
                lost = (full - network.reference(x, masks))[:, target]
            score = found.scores[site].flatten(1)[:, neuron]
            torch.testing.assert_close(score, lost, rtol=1e-9, atol=1e-9 * (1 + float(full.abs().max())))


def test_ablation_of_a_network_that_computes_in_half_precision() -> None:
    class Casting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    network = Casting(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    nn.init.constant_(network[0].bias, 2)  # all neurons speak
    found = ablation(network, torch.rand(2, 3), 0)
    assert found.scores[0].dtype == torch.float32
    assert found.scores[0].any()


# --- Shapley values ---


class Interacting(nn.Module):
    """Two layers of three neurons, few enough for all 64 subsets, with much interaction between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.2, 1.5, generator=generator)

    def with_masks(self, x: Tensor, masks: Tensor) -> Tensor:
        hidden = self.one(x).clamp(min=0) * masks[:, :3]
        return self.head(self.two(hidden).clamp(min=0) * masks[:, 3:])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))))


def test_shapley_values_agree_with_all_subsets() -> None:
    network = Interacting().double().eval()
    x = torch.tensor([[0.9, 0.4, 0.7]], dtype=torch.float64)
    subsets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    with torch.no_grad():
        value = {
            tuple(s.tolist()): v.item() for s, v in zip(subsets, network.with_masks(x, subsets)[:, 1], strict=True)
        }
    exact = torch.zeros(6, dtype=torch.float64)
    for bits, response in value.items():
        size = int(sum(bits))
        for neuron in range(6):
            if not bits[neuron]:
                weight = math.factorial(size) * math.factorial(5 - size) / math.factorial(6)
                exact[neuron] += weight * (value[(*bits[:neuron], 1.0, *bits[neuron + 1 :])] - response)
    with unchanged(network, x):
        found = shapley(network, x, 1, permutations=400, generator=torch.Generator().manual_seed(1))
    values, errors = (torch.cat([part.flatten() for part in parts]) for parts in (found.scores, found.standard_errors))
    assert (errors > 0).any()
    assert ((values - exact).abs() <= 4 * errors + 1e-12).all()
    # The error is honest: a quarter of the orders, about twice the standard error.
    fewer = shapley(network, x, 1, permutations=100, generator=torch.Generator().manual_seed(2))
    ratio = torch.cat([e.flatten() for e in fewer.standard_errors])[errors > 0].mean() / errors[errors > 0].mean()
    assert 1.5 < ratio < 2.7


@given(networks(), st.integers(1, 30))
def test_shapley_values_add_up(network: RandomNetwork, batch_size: int) -> None:
    if network.images:
        return  # hundreds of neurons: the same code, only slower
    x, record = network.inputs(2), Record()
    found = shapley(network, x, 2, permutations=2, batch_size=batch_size)
    with torch.no_grad():
        full = network.reference(x, record=record)
        empty = network.reference(x, [torch.zeros_like(a) for a in record.post])
    total = sum(score.flatten(1).sum(1) for score in found.scores)
    torch.testing.assert_close(total, (full - empty)[:, 2], rtol=1e-9, atol=1e-9)


def test_shapley_draws_from_the_generator_only() -> None:
    network = small_network()
    x = network.inputs(1)
    first, again, other = (
        shapley(network, x, 0, permutations=2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.scores, again.scores, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.scores, other.scores, strict=True))
    unseeded = [shapley(network, x, 0, permutations=2).scores[0] for _ in range(2)]
    assert torch.equal(*unseeded)


# --- bad input ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: integrated_gradients(m, x, n_steps=0), "n_steps is 0"),
        (lambda m, x: integrated_gradients(m, x, batch_size=0), "batch_size is 0"),
        (lambda m, x: integrated_gradients(m, x, 9), "out of range"),
        (lambda m, x: integrated_gradients(m, x[:0]), "at least one"),
        (lambda m, x: ablation(m, x, batch_size=-1), "batch_size is -1"),
        (lambda m, x: ablation(m, x, [0, 1]), "targets of shape"),
        (lambda m, x: shapley(m, x, permutations=1), "permutations is 1"),
        (lambda m, x: shapley(m.train(), x, permutations=2), "training mode"),
        (lambda m, x: NeuronIntGrad(sparsity=1), "sparsity is 1"),
    ],
)
def test_bad_input_is_answered(call, message: str) -> None:  # type: ignore[no-untyped-def]
    network = small_network()
    with pytest.raises(PathwayError, match=message):
        call(network, network.inputs(3))


@pytest.mark.cuda
def test_on_a_gpu_as_on_the_processor() -> None:
    network = small_network()
    x = network.inputs(2)
    here = [f(network, x, 0) for f in (integrated_gradients, ablation)]
    network.cuda()
    for score, there in zip(here, [f(network, x.cuda(), 0) for f in (integrated_gradients, ablation)], strict=True):
        assert isinstance(there, Contributions)
        for a, b in zip(score.scores, there.scores, strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-8)


class Pair(nn.Module):
    """Returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.layer(x)), x


@pytest.mark.parametrize("score", [integrated_gradients, ablation], ids=lambda score: score.__name__)
def test_a_network_that_returns_no_logits_is_answered(score) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PathwayError, match="Pair returned tuple"):
        score(Pair().eval(), torch.rand(2, 3))
