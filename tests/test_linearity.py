"""Radii against brute-force Jacobians, the certificate against trials, kinks along lines against scanning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision.models as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Block, RandomNetwork, Record, networks, small_network, unchanged
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pathwaylib import (
    Binding,
    LinearRegion,
    NeuronMCT,
    Pathway,
    PathwayError,
    RandomSelection,
    cifar10,
    first_kink,
    linear_pieces,
    linear_region,
    load_model,
    masked,
    planted,
)
from pathwaylib.linearity import walk
from pathwaylib.neurons import apply_mask, run

KINKS = {"relu": [0.0], "leaky_relu": [0.0], "relu6": [0.0, 6.0]}


class Conditions:
    """Everything that can bind in the reference network, computed in plain code."""

    def __init__(self, network: RandomNetwork, pathway: Pathway | None) -> None:
        self.network = network
        self.masks = None if pathway is None else pathway.masks
        self.kinds: list[str] = []

    def values(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the pre-activations and the inputs of max-pooling, ``(B, ...)`` each."""
        record, pooled = Record(), []
        with self._seen_pools(pooled):
            self.network.reference(x, self.masks, record=record)
        self.kinds = record.kinds
        return record.pre, pooled

    @contextmanager
    def _seen_pools(self, pooled: list[Tensor]) -> Iterator[None]:
        plain = self.network._pool

        def see(block: Block, h: Tensor) -> Tensor:
            if self.network.images and block.pool == "max":
                pooled.append(h)
            return plain(block, h)

        self.network.__dict__["_pool"] = see
        try:
            yield
        finally:
            del self.network.__dict__["_pool"]

    def kept(self, site: int, like: Tensor) -> Tensor:
        return torch.ones_like(like, dtype=torch.bool) if self.masks is None else self.masks[site].expand_as(like)

    def pattern(self, x: Tensor) -> Tensor:
        """Return which linear piece of every kept activation and which winner of every window, ``(B, n)``."""
        pre, pooled = self.values(x)
        parts = []
        for site, z in enumerate(pre):
            piece = torch.bucketize(z, torch.tensor(KINKS[self.kinds[site]], dtype=z.dtype))
            parts.append((piece * self.kept(site, z)).flatten(1))
        for p in pooled:
            parts.append(windows(p).argmax(-1).flatten(1))
        return torch.cat(parts, 1)

    def radius(self, x: Tensor) -> float:
        """Return R of one image from full Jacobians."""
        pre, pooled = self.values(x)
        of_pre, of_pooled = jacrev(self.values)(x)
        best = torch.inf
        for site, (z, jacobian) in enumerate(zip(pre, of_pre, strict=True)):
            lengths = jacobian.flatten(z.ndim).norm(dim=-1)
            gap = torch.stack([(z - kink).abs() for kink in KINKS[self.kinds[site]]]).amin(0)
            binds = self.kept(site, z) & (lengths > 1e-12)
            best = min([best, *(gap / lengths)[binds].tolist()])
        for p, jacobian in zip(pooled, of_pooled, strict=True):
            entries = windows(p)  # (1, C, windows, 4)
            winner = entries.argmax(-1, keepdim=True)
            gradients = windows(jacobian.flatten(p.ndim).movedim(-1, 0)[:, 0])  # (D, C, windows, 4)
            relative = gradients - gradients.gather(-1, winner.expand(len(gradients), *winner.shape[1:]))
            lengths = relative.norm(dim=0)[None]
            gap = entries.gather(-1, winner) - entries
            best = min([best, *(gap / lengths)[lengths > 1e-12].tolist()])
        return best


def windows(maps: Tensor) -> Tensor:
    """Return the entries of the 2 x 2 windows of stride 1, ``(B, C, windows, 4)``."""
    return torch.stack([maps[..., :-1, :-1], maps[..., :-1, 1:], maps[..., 1:, :-1], maps[..., 1:, 1:]], -1).flatten(
        -3, -2
    )


def pathway_of(network: nn.Module, x: Tensor, kind: str) -> Pathway | None:
    if kind == "full":
        return None
    if kind == "contribution":
        return NeuronMCT(0.5)(network, x)
    return RandomSelection(0.4, torch.Generator().manual_seed(0))(network, x)  # holds dead neurons


pathways = st.sampled_from(["full", "contribution", "random"])


# --- the radius ---


@settings(max_examples=12)
@given(networks(), pathways)
def test_exact_radius_is_that_of_full_jacobians(network: RandomNetwork, kind: str) -> None:
    x = network.inputs(2)
    pathway = pathway_of(network, x, kind)
    region = linear_region(network, x, pathway)
    for index in range(2):
        conditions = Conditions(network, None if pathway is None else pathway[index])
        expected = conditions.radius(x[index : index + 1])
        assert float(region.radius[index]) == pytest.approx(expected, rel=1e-9)
    assert region.certified.all()
    assert region.confidence == 1


@settings(max_examples=12)
@given(networks(), pathways)
def test_the_three_ways_to_the_radius_agree(network: RandomNetwork, kind: str) -> None:
    x = network.inputs(2)
    pathway = pathway_of(network, x, kind)
    exact = linear_region(network, x, pathway)
    for other in (linear_region(network, x, pathway, memory=0), linear_region(network, x, pathway, mode="fast")):
        torch.testing.assert_close(other.radius, exact.radius, rtol=1e-9, atol=0)
        assert other.binding == exact.binding
        torch.testing.assert_close(other.direction, exact.direction, rtol=1e-6, atol=1e-9)
        assert torch.equal(other.gradient, exact.gradient)
        assert torch.equal(other.asleep, exact.asleep)


@given(networks(), pathways, st.integers(0, 2))
def test_gradient_offset_and_sleepers(network: RandomNetwork, kind: str, target: int) -> None:
    x = network.inputs(2)
    pathway = pathway_of(network, x, kind)
    masks = None if pathway is None else pathway.masks
    record = Record()
    region = linear_region(network, x, pathway, target, mode="fast")
    logits = network.reference(x, masks, record=record)[:, target].detach()
    gradient = jacrev(lambda images: network.reference(images, masks)[:, target].sum())(x)
    torch.testing.assert_close(region.gradient, gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(region.predict(x), logits, rtol=1e-9, atol=1e-9)
    kept = [torch.ones_like(a) if masks is None else masks[site] for site, a in enumerate(record.post)]
    asleep = sum(((a == 0) & (keep == 1)).flatten(1).sum(1) for a, keep in zip(record.post, kept, strict=True))
    assert region.asleep.tolist() == asleep.tolist()
    assert region.targets.tolist() == [target] * 2


def test_closed_form_of_one_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(9, 4, generator=generator).double(), torch.randn(9, generator=generator).double()
    network = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)).double().eval()
    with torch.no_grad():
        network[0].weight.copy_(weight)
        network[0].bias.copy_(bias)
    x = torch.randn(6, 4, generator=generator).double()
    distances = (x @ weight.T + bias).abs() / weight.norm(dim=1)
    region = linear_region(network, x)
    torch.testing.assert_close(region.radius, distances.amin(1), rtol=1e-12, atol=0)
    assert [binding.neuron for binding in region.binding if binding] == [(j,) for j in distances.argmin(1).tolist()]
    on_the_kink = x + region.radius[:, None] * region.direction
    z = on_the_kink @ weight.T + bias
    assert (z.gather(1, distances.argmin(1)[:, None]).abs() < 1e-12).all()


def scalar_network(activation: nn.Module, weight: float = 1.0) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(1, 1), activation, nn.Linear(1, 2)).double().eval()
    with torch.no_grad():
        network[0].weight.fill_(weight)
        network[0].bias.zero_()
    return network


def test_relu6_binds_at_both_ends() -> None:
    x = torch.tensor([[-1.0], [0.5], [2.0], [2.75], [4.0]], dtype=torch.float64)
    region = linear_region(scalar_network(nn.ReLU6(), 2.0), x)  # z = -2, 1, 4, 5.5, 8
    assert region.radius.tolist() == pytest.approx([1, 0.5, 1, 0.25, 1])
    assert region.direction[:, 0].tolist() == [1, -1, 1, 1, -1]


def test_leaky_relu_and_a_neuron_on_its_kink() -> None:
    x = torch.tensor([[-3.0], [0.0], [2.0]], dtype=torch.float64)
    for activation in (nn.LeakyReLU(0.1), nn.ReLU()):
        assert linear_region(scalar_network(activation), x).radius.tolist() == [3, 0, 2]


def test_without_conditions_the_radius_is_infinite() -> None:
    network = small_network()
    x = network.inputs(2)
    nothing = ~pathway_of(network, x, "contribution")
    nothing = nothing & ~nothing
    for mode in ("exact", "fast"):
        region = linear_region(network, x, nothing, 1, mode=mode)
        assert region.radius.tolist() == [torch.inf] * 2
        assert region.binding == (None, None)
        assert not region.direction.any()
        assert region.certified.all()
        far = 1e6 * network.inputs(2, seed=1)
        with masked(nothing), torch.no_grad():
            torch.testing.assert_close(region.predict(far), network(far)[:, 1], rtol=1e-9, atol=1e-9)
    assert first_kink(network, x, x, nothing).tolist() == [torch.inf] * 2
    assert all(len(kinks) == 0 for kinks in linear_pieces(network, x, x, 5, nothing))


class Pooled(nn.Module):
    """Two pixels through ReLUs, the larger one wins."""

    def __init__(self, pool: Callable[[Tensor], Tensor], activation: nn.Module) -> None:
        super().__init__()
        self.pool, self.activation = pool, activation
        self.head = nn.Linear(1, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.activation(x)).flatten(1))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "nn.MaxPool2d": nn.MaxPool2d((1, 2)),
    "F.max_pool2d": lambda h: F.max_pool2d(h, (1, 2)),
    "torch.max_pool2d": lambda h: torch.max_pool2d(h, [1, 2]),
    "padded": lambda h: F.max_pool2d(h, (1, 3), stride=2, padding=(0, 1)),
    "ceil_mode": lambda h: F.max_pool2d(h, (1, 3), ceil_mode=True),
    "nn.AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(1),
    "F.adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(h, (1, 1)),
    "twice": lambda h: F.adaptive_max_pool2d(F.max_pool2d(h, 1), 1),
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_winner_binds_where_no_neuron_does(pool: str) -> None:
    # Pixels 5 and 4: the signs change at distances 5 and 4, the winner at 1 / sqrt(2).
    x = torch.tensor([5.0, 4.0], dtype=torch.float64).view(1, 1, 1, 2)
    network = Pooled(POOLS[pool], nn.ReLU()).eval()
    for mode in ("exact", "fast"):
        region = linear_region(network, x, mode=mode)
        assert float(region.radius) == pytest.approx(0.5**0.5)
        assert region.binding[0].neuron == (0, 0, 0)
        assert region.binding[0].rival == (0, 0, 1)
        assert region.direction.flatten().tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    # A loser that is out imposes nothing; a loser that sleeps is far below the winner's own condition.
    out = Pathway((torch.tensor([True, False]).view(1, 1, 1, 2),), ("relu_0",))
    region = linear_region(network, x, out)
    assert float(region.radius) == 5
    assert region.binding == (Binding("relu_0", (0, 0, 0)),)


def test_a_pool_of_negative_values_counts_still_rivals() -> None:
    # After a leaky ReLU and a shift, 0 can win against a removed neuron only at its own level.
    x = torch.tensor([5.0, 4.0], dtype=torch.float64).view(1, 1, 1, 2)
    shifted = Pooled(lambda h: F.adaptive_max_pool2d(h + torch.tensor([0.0, 3.0], dtype=h.dtype), 1), nn.ReLU()).eval()
    out = Pathway((torch.tensor([True, False]).view(1, 1, 1, 2),), ("relu_0",))
    region = linear_region(shifted, x, out)  # 5 against the constant 3
    assert float(region.radius) == 2
    assert region.binding == (Binding("max_pool_0", (0, 0, 0), (0, 0, 1)),)


class Shuffled(nn.Module):
    """Reads what the chain rule's windows do not foresee."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2)
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.between(torch.relu(self.first(x))))).flatten(1))


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h,
        lambda h: h.flip(3),
        lambda h: h.transpose(2, 3) + h,
        lambda h: F.interpolate(h, scale_factor=2, mode="bilinear"),
        lambda h: F.interpolate(h, scale_factor=2),
        lambda h: h.roll(3, 2),
        lambda h: h - h.mean((2, 3), keepdim=True),
        lambda h: torch.cat([h[:, :2], 2 * h[:, 2:] / 3], 1),
        lambda h: F.avg_pool2d(h, 3, 1, 1),
        lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
        lambda h: h.flatten(2).permute(0, 2, 1).reshape(h.shape),
        lambda h: F.dropout(h, 0.5, training=False),
    ],
)
def test_values_that_read_far_away(between: Callable[[Tensor], Tensor]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Shuffled(between)
        network(torch.rand(1, 2, 8, 8))
    network = network.double().eval()
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for pathway in (None, NeuronMCT(0.7)(network, x)):
        exact, slow = linear_region(network, x, pathway), linear_region(network, x, pathway, memory=0)
        torch.testing.assert_close(exact.radius, slow.radius, rtol=1e-9, atol=0)
        assert exact.binding == slow.binding


# --- the certificate ---


def states(network: RandomNetwork, pathway: Pathway | None, x: Tensor, binding: Binding) -> Tensor:
    """Return, per image, the binding neuron's piece, or whether the binding window's winner still leads."""
    conditions = Conditions(network, pathway)
    pre, pooled = conditions.values(x)
    index = int(binding.site.rpartition("_")[2])
    if binding.rival is None:
        kinks = torch.tensor(KINKS[conditions.kinds[index]], dtype=x.dtype)
        return torch.bucketize(pre[index][(slice(None), *binding.neuron)].contiguous(), kinks)
    p = pooled[index]
    return (p[(slice(None), *binding.neuron)] > p[(slice(None), *binding.rival)]).long()


@given(networks(), pathways)
def test_linear_inside_and_another_pattern_outside(network: RandomNetwork, kind: str) -> None:
    x = network.inputs(1)
    pathway = pathway_of(network, x, kind)
    region = linear_region(network, x, pathway, 0)
    radius, binding = float(region.radius), region.binding[0]
    if binding is None or radius == 0:
        return
    conditions = Conditions(network, pathway)
    random = torch.randn(40, *x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    random /= random.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    directions = torch.cat([random, region.direction, -region.direction])
    inside = x + 0.999 * radius * directions
    expected = network.reference(inside, conditions.masks)[:, 0].detach()
    torch.testing.assert_close(
        region.predict(inside), expected, rtol=1e-9, atol=1e-9 * (1 + float(expected.abs().max()))
    )
    assert (conditions.pattern(inside) == conditions.pattern(x)).all()
    line = torch.cat([x + step * radius * region.direction for step in (0.0, 0.999, 1.001)])
    before, near, after = states(network, pathway, line, binding).tolist()
    assert before == near != after


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "pathway"])
def test_ten_thousand_trials_on_a_trained_network(kind: str) -> None:
    network = load_model("planted-cnn").double()
    images = planted(4, seed=5).images.double()
    pathway = NeuronMCT(0.95)(network, images) if kind == "pathway" else None
    region = linear_region(network, images, pathway, mode="fast")
    assert (region.radius > 0).all()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for index in range(4):
        mine = None if pathway is None else pathway[index]
        visitor = (lambda site, z: site.function(z)) if mine is None else apply_mask(mine)
        for batch in range(6):
            noise = torch.randn(209, *images.shape[1:], dtype=torch.float64, generator=generator)
            noise /= noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            # The later batches lean ever more towards the binding condition.
            noise = noise * (0.5**batch if batch else 1) + (region.direction[index] if batch else 0)
            noise /= noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            inside = images[index] + 0.999 * region.radius[index] * noise
            with torch.no_grad():
                found = run(network, inside, visitor)[:, region.targets[index]]
            expected = (region.gradient[index] * inside).flatten(1).sum(1) + region.offset[index]
            worst = max(worst, float((found - expected).abs().max()))
    assert worst < 1e-9


def test_every_binding_neuron_changes_its_sign_just_outside() -> None:
    network = load_model("cifar10-resnet8").double()
    images = torch.rand(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pathway = NeuronMCT(0.98)(network, images)
    region = linear_region(network, images, pathway)

    def pre_activations(at: float) -> list[float]:
        seen: list[Tensor] = []
        mask = apply_mask(pathway)

        def see(site: object, z: Tensor) -> Tensor:
            seen.append(z.clone())
            return mask(site, z)

        with torch.no_grad():
            run(network, images + at * region.radius.view(-1, 1, 1, 1) * region.direction, see)
        return [
            float(seen[pathway.sites.index(binding.site)][(index, *binding.neuron)])
            for index, binding in enumerate(region.binding)
        ]

    for before, near, after in zip(*(pre_activations(at) for at in (0, 0.999, 1.001)), strict=True):
        assert before * near > 0
        assert before * after < 0
        assert abs(near / before) == pytest.approx(1e-3, rel=1e-4)


# --- along a line ---


@given(networks(), pathways, st.integers(0, 100))
def test_first_kink_against_patterns(network: RandomNetwork, kind: str, seed: int) -> None:
    x = network.inputs(2)
    pathway = pathway_of(network, x, kind)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    distance = first_kink(network, x, direction, pathway)
    region = linear_region(network, x, pathway, mode="fast")
    assert (distance * direction.flatten(1).norm(dim=1) >= region.radius * (1 - 1e-9)).all()
    for index in range(2):
        conditions = Conditions(network, None if pathway is None else pathway[index])
        reach = float(distance[index].clamp(max=1e6))
        inside = torch.linspace(0, 0.99999 * reach, 40, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
        patterns = conditions.pattern(x[index] + inside * direction[index])
        assert (patterns == patterns[:1]).all()
        if distance[index].isfinite():
            outside = conditions.pattern((x[index] + 1.00001 * reach * direction[index])[None])
            assert (outside != patterns[:1]).any()


@settings(max_examples=12)
@given(networks(), pathways, st.integers(0, 100))
def test_pieces_against_dense_scanning(network: RandomNetwork, kind: str, seed: int) -> None:
    x = network.inputs(2)
    pathway = pathway_of(network, x, kind)
    direction = torch.randn(x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    pieces = linear_pieces(network, x, direction, 0.5, pathway)
    for index, kinks in enumerate(pieces):
        conditions = Conditions(network, None if pathway is None else pathway[index])

        def pattern(at: Tensor, index: int = index, conditions: Conditions = conditions) -> Tensor:
            return conditions.pattern(x[index] + at.view(-1, *[1] * (x.ndim - 1)) * direction)

        assert (kinks.diff() > 0).all()
        edges = torch.cat([kinks.new_zeros(1), kinks, kinks.new_full((1,), 0.5)])
        inside = torch.stack([edges[:-1] + share * edges.diff() for share in (0.01, 0.5, 0.99)])
        first, middle, last = pattern(inside.flatten()).unflatten(0, inside.shape)
        assert torch.equal(first, middle)
        assert torch.equal(first, last)
        assert (middle[1:] != middle[:-1]).any(1).all()
        grid = torch.linspace(0, 0.5, 501, dtype=x.dtype)
        changes = (pattern(grid).diff(dim=0) != 0).any(1)
        holds = torch.bucketize(kinks, grid).sub(1).clamp(min=0).unique()
        assert set(changes.nonzero()[:, 0].tolist()) <= set(holds.tolist())


def test_pieces_of_a_line_by_hand() -> None:
    network = scalar_network(nn.ReLU6())
    kinks = linear_pieces(network, torch.tensor([[-1.0], [5.0], [7.0]]).double(), torch.tensor([2.0]).double(), 4)
    assert [part.tolist() for part in kinks] == [pytest.approx([0.5, 3.5]), pytest.approx([0.5]), []]
    assert first_kink(network, torch.zeros(1, 1).double(), torch.ones(1).double()).tolist() == [6]


def test_pieces_behind_a_neuron_that_wakes_at_once() -> None:
    # relu(x), which starts on its kink, and behind it relu(1 - 2 relu(x)): switches at x = 0.5.
    network = nn.Sequential(*scalar_network(nn.ReLU())[:2], *scalar_network(nn.ReLU(), -2.0)).eval()
    x, ahead = torch.zeros(1, 1).double(), torch.ones(1).double()
    with torch.no_grad():
        network[2].bias.fill_(1)
    assert linear_pieces(network, x, ahead)[0].tolist() == pytest.approx([0.5])
    assert first_kink(network, x + 1e-9, ahead).tolist() == pytest.approx([0.5])
    assert first_kink(network, x, ahead).isinf().all()  # as it says


def test_a_walk_passes_what_rounding_repeats() -> None:
    # A condition that, by rounding, keeps reporting itself a little ahead is passed in few steps.
    calls = 0

    def stubborn(position: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        ahead = torch.where(position < 0.5, 0.5 - position, torch.inf)
        return torch.where((position >= 0.5) & (position < 0.5 + 1e-5), 1e-13, ahead)

    (kinks,) = walk(stubborn, torch.zeros(1, dtype=torch.float64))
    assert kinks[0] == 0.5
    assert kinks[-1] < 0.5 + 2e-5
    assert calls < 60


# --- what is refused, and what is left alone ---


class Between(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.layer, self.head = nn.Conv2d(3, 4, 3), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.between(self.layer(x))).flatten(1))


def without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h * 2


NOT_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "softmax": lambda h: h.softmax(1),
    "squeeze and excitation": lambda h: h * F.hardsigmoid(h.mean((2, 3), keepdim=True)),
    "product": lambda h: h * h,
    "matmul": lambda h: h @ h,
    "square": torch.square,
    "quotient": lambda h: 1 / (h + 9),
    "floor division": lambda h: torch.div(h, 2, rounding_mode="floor"),
    "maximum": lambda h: torch.maximum(h, -h),
    "amax": lambda h: h - h.amax((2, 3), keepdim=True),
    "abs": abs,
    "clamp": lambda h: h.clamp(min=0),
    "hardtanh": F.hardtanh,
    "layer norm": lambda h: F.layer_norm(h, h.shape[1:]),
    "batch statistics": lambda h: F.instance_norm(h),
    "comparison": lambda h: torch.where(h > 0, h, h + 1),
    "number": lambda h: h + float(h.mean()),
    "integers": lambda h: h + h.long(),
    "detach": lambda h: h * h.detach(),
    "data": lambda h: h * h.data,
    "no_grad": without_gradients,
    "indices": lambda h: F.max_pool2d(h, 2, return_indices=True)[0],
    "one-dimensional pooling": lambda h: F.max_pool1d(h.flatten(2), 2),
    # By the batch's own mean and variance, whatever the mode.
    "batch normalisation": lambda h: F.batch_norm(h, None, None, training=True),
    "batch normalisation, spelt out": lambda h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
    "batch normalisation without statistics": lambda h: nn.BatchNorm2d(h.shape[1], track_running_stats=False).eval()(h),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    network, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval().to(dtype), torch.rand(1, 3).to(dtype)
    for call in (
        lambda: linear_region(network, x),
        lambda: first_kink(network, x, x),
        lambda: linear_pieces(network, x, x, 1.0),
    ):
        with pytest.raises(PathwayError, match=r"float16, too coarse to find its kinks; use float32"):
            call()


@pytest.mark.parametrize("name", NOT_LINEAR)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_functions_that_are_not_linear_are_refused(name: str) -> None:
    network = Between(NOT_LINEAR[name]).eval()
    x = torch.rand(2, 3, 7, 7)
    with torch.no_grad():
        network(x)
    with pytest.raises(PathwayError, match=r"not known to be piecewise linear|hides? |is not covered"):
        linear_region(network, x)


def test_normalisation_by_the_batch_is_refused_before_it_meets_a_single_image() -> None:
    normalise = nn.BatchNorm1d(4, track_running_stats=False)  # PyTorch refuses a single vector
    network = nn.Sequential(nn.Linear(3, 4), normalise, nn.ReLU(), nn.Linear(4, 2)).eval()
    with pytest.raises(PathwayError, match="calls batch_norm on values"):
        linear_region(network, torch.rand(2, 3))


def test_options_and_shapes_are_checked() -> None:
    network = small_network()
    x = network.inputs(2)
    pathway = NeuronMCT(0.5)(network, x)
    for options, message in (
        ({"mode": "quick"}, "mode is 'quick'"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"probes": 0}, "probes is 0"),
        ({"pathway": NeuronMCT(0.5)(network, network.inputs(3))}, "holds 3 inputs"),
        ({"target": 7}, "target .* is out of range"),
    ):
        with pytest.raises(PathwayError, match=message):
            linear_region(network, x, **options)
    with pytest.raises(PathwayError, match="direction has shape"):
        first_kink(network, x, torch.ones(3))
    for length in (0, -1, float("inf"), float("nan")):
        with pytest.raises(PathwayError, match="length is"):
            linear_pieces(network, x, x, length)
    shorter = Pathway(pathway.masks[:2], pathway.sites[:2])
    longer = Pathway((*pathway.masks, pathway.masks[0]), (*pathway.sites, "relu_3"))
    for wrong, message in ((shorter, "more sites than the pathway, 2"), (longer, "3 sites, the pathway 4")):
        with pytest.raises(PathwayError, match=message):
            linear_region(network, x, wrong)
        with pytest.raises(PathwayError, match=message):
            first_kink(network, x, x, wrong)
    other = small_network(spelling="nn.ReLU6")
    with pytest.raises(PathwayError, match="site 0 of the run"):
        linear_region(other, x, pathway)


@settings(max_examples=12)
@given(networks(), pathways)
def test_a_batch_is_the_loop(network: RandomNetwork, kind: str) -> None:
    x = network.inputs(3)
    pathway = pathway_of(network, x, kind)
    together = linear_region(network, x, pathway, [0, 1, 2])
    lines = linear_pieces(network, x, x, 0.2, pathway)
    for index in range(3):
        one = slice(index, index + 1)
        mine = None if pathway is None else pathway[index]
        alone = linear_region(network, x[one], mine, index)
        for field in ("radius", "direction", "gradient", "offset", "asleep"):
            torch.testing.assert_close(getattr(together, field)[one], getattr(alone, field), rtol=1e-9, atol=1e-9)
        assert together.binding[index] == alone.binding[0]
        (line,) = linear_pieces(network, x[one], x[one], 0.2, mine)
        torch.testing.assert_close(lines[index], line, rtol=1e-9, atol=1e-9)


def test_one_pathway_serves_many_images_and_targets_default() -> None:
    network = small_network()
    x = network.inputs(3)
    one = NeuronMCT(0.5)(network, x[:1], 2)
    region = linear_region(network, x, Pathway(one.masks, one.sites))
    assert region.targets.tolist() == network(x).argmax(1).tolist()
    assert linear_region(network, x, one).targets.tolist() == [2, 2, 2]
    repeated = Pathway(tuple(mask.expand(3, *mask.shape[1:]) for mask in one.masks), one.sites)
    torch.testing.assert_close(region.radius, linear_region(network, x, repeated).radius)


@settings(max_examples=12)
@given(networks(), pathways)
def test_nothing_is_changed(network: RandomNetwork, kind: str) -> None:
    x = network.inputs(2)
    pathway = pathway_of(network, x, kind)
    asked = x.clone().requires_grad_()
    found: list[LinearRegion] = []
    for images in (x, asked):
        with unchanged(network, images):
            found.append(linear_region(network, images, pathway))
            linear_region(network, images, pathway, mode="fast")
            first_kink(network, images, torch.ones_like(x), pathway)
    with unchanged(network, x), torch.no_grad():
        found.append(linear_region(network, x, pathway))
    for region in found:
        assert torch.equal(region.radius, found[0].radius)
        assert not region.gradient.requires_grad
        assert not region.offset.requires_grad
        assert not region.direction.requires_grad
    with unchanged(network, x), pytest.raises(PathwayError):
        linear_region(network, x, pathway, 99)


def test_fast_mode_draws_from_its_generator() -> None:
    network = small_network()
    x = network.inputs(2)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    region = linear_region(network, x, mode="fast", probes=2, generator=generator, confidence=0.9)
    assert not torch.equal(generator.get_state(), before)
    exact = linear_region(network, x)
    assert (region.radius >= exact.radius * (1 - 1e-9)).all()  # an estimate errs to one side only
    assert region.confidence in (0.9, 1.0)


def test_fast_mode_keeps_its_promise() -> None:
    # At confidence 0.9 at least 21.6 of 24 answers are exact on average, with a standard deviation of at most 1.5.
    network = small_network(2)
    x = network.inputs(24)
    exact = linear_region(network, x)
    fast = linear_region(network, x, mode="fast", probes=1, confidence=0.9)
    right = fast.radius <= exact.radius * (1 + 1e-9)
    assert int(right.sum()) >= 16
    assert right[fast.certified].all()


def test_near_certainty_settles_more_conditions() -> None:
    # One probe says little: to be this sure, nearly everything has to be computed, and the answers are exact.
    network = small_network(2)
    x = network.inputs(4)
    exact = linear_region(network, x)
    fast = linear_region(network, x, mode="fast", probes=1, confidence=1 - 1e-9)
    torch.testing.assert_close(fast.radius, exact.radius, rtol=1e-9, atol=0)


def test_single_precision_comes_close() -> None:
    network = small_network()
    x = network.inputs(3)
    exact = linear_region(network, x)
    rough = linear_region(network.float(), x.float())
    assert rough.radius.dtype == torch.float32
    torch.testing.assert_close(rough.radius.double(), exact.radius, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("build", [tv.resnet18, tv.densenet121, tv.mobilenet_v2, tv.googlenet])
def test_well_known_networks_are_linear_piece_by_piece(build: Callable[..., nn.Module]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(**({"init_weights": False} if build is tv.googlenet else {})).double().eval()
    x = torch.rand(1, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    distance = first_kink(network, x, direction)
    with torch.no_grad():
        start, middle, end = network(torch.cat([x + share * distance * direction for share in (0, 0.5, 0.999)]))
    slope = (end - start) / 0.999
    torch.testing.assert_close(middle, start + slope / 2, rtol=1e-9, atol=1e-9 * float(start.abs().max()))


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to compute: a measure of work that does not depend on the machine's load."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
def test_exact_mode_is_one_product_per_neuron_in_far_fewer_operations() -> None:
    network = load_model("cifar10-vgg").double()
    x = cifar10("test").images[:1].double()
    pathway = NeuronMCT(0.98)(network, x)

    def naive() -> float:
        pre: list[Tensor] = []
        mask = apply_mask(pathway)

        def see(site: object, z: Tensor) -> Tensor:
            pre.append(z)
            return mask(site, z)

        image = x.clone().requires_grad_()
        run(network, image, see)
        best = torch.inf
        for z, kept in zip(pre, pathway.masks, strict=True):
            for neuron in kept.flatten().nonzero()[:, 0].tolist():
                value = z.view(-1)[neuron]
                (gradient,) = torch.autograd.grad(value, image, retain_graph=True)
                best = min(best, float(value.detach().abs() / gradient.norm()))  # infinite where the gradient is 0
        return best

    with Operations() as ours:
        radius = float(linear_region(network, x, pathway).radius)
    with Operations() as naively:
        assert radius == pytest.approx(naive(), rel=1e-9)
    assert naively.count / ours.count >= 5  # 7.4 when written; how much faster it is: benchmarks/many_runs.py


@pytest.mark.cuda
def test_cuda() -> None:
    network = small_network()
    x = network.inputs(3)
    pathway = NeuronMCT(0.5)(network, x)
    expected = linear_region(network, x, pathway)
    network = network.cuda()
    for mode in ("exact", "fast"):
        found = linear_region(network, x.cuda(), pathway.to("cuda"), mode=mode)
        assert found.radius.is_cuda
        torch.testing.assert_close(found.radius.cpu(), expected.radius, rtol=1e-9, atol=0)
        assert found.binding == expected.binding
    distances = first_kink(network, x.cuda(), x.cuda())
    torch.testing.assert_close(distances.cpu(), first_kink(network.cpu(), x, x), rtol=1e-9, atol=0)
