"""A run taken up again at a site against the whole network run again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import RandomNetwork, networks, small_network, unchanged
from torch import Tensor, nn

from pathwaylib import Rerun, load_model, observe
from pathwaylib.neurons import Site, run


def whole_run(model: nn.Module, x: Tensor, site: int, activation: Tensor) -> Tensor:
    """Run the whole network with a site's activation replaced."""
    return run(model, x, lambda call, z: activation.clone() if call.index == site else call.activate(z).clone())


def same_from_every_site(model: nn.Module, x: Tensor, order: Callable[[int], range] = range) -> None:
    rerun = Rerun(model, x)
    torch.testing.assert_close(rerun.logits, observe(model, x).logits, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(0)
    for site in order(len(rerun.sites)):
        changed = rerun.post[site] * torch.rand(rerun.post[site].shape, generator=generator, dtype=x.dtype)
        results = []
        for again in (lambda a, s=site: rerun(s, a), lambda a, s=site: whole_run(model, x, s, a)):
            leaf = changed.clone().requires_grad_()
            logits = again(leaf)
            results.append((logits.detach(), torch.autograd.grad(logits[:, 0].sum(), leaf, materialize_grads=True)[0]))
        (logits, gradient), (expected, expected_gradient) = results
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@given(networks(), st.integers(1, 3))
def test_from_any_site_as_the_whole_network(network: RandomNetwork, count: int) -> None:
    x = network.inputs(count)
    with unchanged(network, x):
        same_from_every_site(network, x)


@given(networks())
def test_a_rerun_leaves_what_was_recorded(network: RandomNetwork) -> None:
    # Backwards, so that a later site's run would show in an earlier one's.
    same_from_every_site(network, network.inputs(2), lambda count: range(count - 1, -1, -1))
    rerun = Rerun(network, network.inputs(2))
    for site, a in enumerate(rerun.post):
        rerun(site, torch.full_like(a, 3))
    for site, a in enumerate(rerun.post):
        torch.testing.assert_close(rerun(site, a), rerun.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cifar10-vgg", "cifar10-resnet8", "planted-cnn"])
def test_on_our_networks(name: str) -> None:
    same_from_every_site(load_model(name).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64))


def calls_of(model: nn.Module, x: Tensor, site: int) -> int:
    """Count the convolutions that a rerun from the site computes."""
    rerun, computed = Rerun(model, x), 0

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal computed
            computed += func is torch.conv2d
            return func(*args, **(kwargs or {}))

    with Counting():
        rerun(site, rerun.post[site])
    return computed


def test_only_what_comes_after_is_computed() -> None:
    model, x = load_model("cifar10-resnet8"), torch.rand(1, 3, 32, 32)
    assert [calls_of(model, x, site) for site in (0, 3, 6)] == [8, 5, 0]


class OverwritesEarlyResult(nn.Module):
    """Adds to its own early result after the site: nothing before the site may be taken from memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        early += torch.relu(self.layer(early))
        return self.head(torch.relu(early))


class OverwritesThroughAView(nn.Module):
    """The site overwrites a tensor that the network reads through a view made before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        view = z.view(-1, 2, 2)
        torch.relu_(z)
        return self.head(view.flatten(1))


class OverwritesOneOfTwoResults(nn.Module):
    """The first site overwrites the values that `max` returned together with their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stack([self.stem(x), self.stem(-x)], 2).max(2)[0] - 0.5
        h = torch.relu_(torch.stack([z, z - 1], 2).max(2)[0])
        return self.head(torch.relu(h + torch.relu(self.layer(h))))


def test_an_overwritten_result_among_several_is_recalled_whole() -> None:
    network = OverwritesOneOfTwoResults().double().eval()
    x = torch.rand(3, 3, dtype=torch.float64)
    assert Rerun(network, x)._overwritten[0]  # a copy is recalled
    same_from_every_site(network, x)


@pytest.mark.parametrize("network", [OverwritesEarlyResult(), OverwritesThroughAView()])
def test_networks_that_overwrite_early_results(network: nn.Module) -> None:
    network.double().eval()
    x = torch.rand(3, 3, dtype=torch.float64)
    assert Rerun(network, x)._overwritten[0] is None  # nothing may be recalled
    same_from_every_site(network, x)


def test_the_visitor_sees_the_later_sites() -> None:
    network = small_network()
    rerun = Rerun(network, network.inputs(2))
    seen = []

    def visit(site: Site, z: Tensor) -> Tensor:
        seen.append(tuple(z.shape))
        return site.function(z)

    rerun(1, rerun.post[1], visit)
    assert seen == [tuple(a.shape) for a in rerun.post[2:]]
