"""Well-known networks, unchanged: every activation call is found, and pathways of all ones change no bit."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import timm
import torch
import torchvision.models as tv
from networks import unchanged
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pathwaylib import ActiveNeurons, NeuronMCT, Pathway, PathwayGradient, masked, observe, taylor

# Activation calls by the papers' own architectures, counted by hand; builder; image size.
NETWORKS: dict[str, tuple[int, Callable[[], nn.Module], int]] = {
    "vgg16": (15, lambda: tv.vgg16(init_weights=False), 32),  # 13 convolutions, 2 hidden linear layers
    "resnet50": (49, tv.resnet50, 48),  # stem, and 3 in each of 16 blocks, by 17 modules
    "googlenet": (57, lambda: tv.googlenet(init_weights=False), 48),  # 3 convolutions, 9 x 6: F.relu only
    "inception_v3": (94, lambda: tv.inception_v3(init_weights=False), 80),  # every convolution: F.relu only
    "densenet121": (121, tv.densenet121, 48),  # 1 stem, 58 x 2, 3 transitions, and F.relu at the end
    "mobilenet_v2": (35, tv.mobilenet_v2, 48),  # ReLU6: stem, 1 + 16 x 2, last convolution
    "res2net50": (81, lambda: timm.create_model("res2net50_26w_4s"), 48),  # stem, and 1 + 3 + 1 in each of 16 blocks
}


class CountsActivations(TorchDispatchMode):
    """Counts below the level at which pathwaylib intercepts: the operators that PyTorch's dispatcher runs."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("relu", "leaky_relu", "hardtanh", "relu6"):
            self.kinds.append("relu6" if name == "hardtanh" else name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_well_known_network(name: str) -> None:
    known, build, size = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build().eval()
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with CountsActivations() as counted:
            plain = network(x)
        seen = observe(network, x)
        assert seen.kinds == tuple(counted.kinds)
        assert len(seen.kinds) == known
        assert torch.equal(seen.logits, plain)
        ones = Pathway(tuple(torch.ones_like(a, dtype=torch.bool) for a in seen.post), seen.sites)
        for pathway in (ones, seen.active()):
            with masked(pathway):
                assert torch.equal(network(x), plain)

    with unchanged(network, x):
        scores = taylor(network, x)
        active = PathwayGradient(network, ActiveNeurons()).attribute(x, 1)
    contributing = sum((score != 0).flatten(1).sum(1) for score in scores.scores)
    for sparsity in (0.5, 0.9, 0.99):
        pathway = scores.top(sparsity)
        k = round((1 - Fraction(str(sparsity))) * pathway.neurons)
        assert pathway.sizes.tolist() == contributing.clamp(max=k).tolist()
        assert not (pathway & ~seen.active()).sizes.any()
    assert torch.equal(NeuronMCT(0.9)(network, x).flatten(), scores.top(0.9).flatten())

    images = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(images)[:, 1].sum(), images)
    torch.testing.assert_close(active, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
