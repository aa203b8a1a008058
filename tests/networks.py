"""Random small networks that spell their activations in every way there is, and the same networks in plain code.

``forward`` is what a careless author writes: shared modules, in-place calls whose result is thrown away, sums added in
place. ``reference`` computes the same function out of place, from comparisons instead of activations, so that masks can
be put in by hand: the library never sees it, and it decides what the library should have answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.1
CHANNELS, SIZE, WIDTH, CLASSES = 4, 7, 6, 3


@dataclass(frozen=True)
class Spelling:
    """One way to call an activation.

    Attributes:
        kind: which activation it is.
        call: gets the network (for its modules) and the tensor; what it returns is what the network goes on with.
        in_place: the tensor given holds the result afterwards.
    """

    kind: str
    call: Callable[[nn.ModuleDict, Tensor], Tensor]
    in_place: bool = False


def _discarded(call: Callable[[Tensor], object]) -> Callable[[nn.ModuleDict, Tensor], Tensor]:
    def go_on(modules: nn.ModuleDict, z: Tensor) -> Tensor:
        call(z)  # the return value is thrown away
        return z

    return go_on


def _modules() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "relu": nn.ReLU(),
            "relu_in_place": nn.ReLU(inplace=True),
            "relu6": nn.ReLU6(),
            "relu6_in_place": nn.ReLU6(inplace=True),
            "hardtanh": nn.Hardtanh(0, 6),
            "leaky": nn.LeakyReLU(SLOPE),
            "leaky_in_place": nn.LeakyReLU(SLOPE, inplace=True),
        }
    )


# The modules are shared: a network that uses one of these spellings twice calls one module twice.
SPELLINGS = {
    "nn.ReLU": Spelling("relu", lambda m, z: m["relu"](z)),
    "nn.ReLU(inplace=True)": Spelling("relu", lambda m, z: m["relu_in_place"](z), in_place=True),
    "nn.ReLU(inplace=True), discarded": Spelling(
        "relu", lambda m, z: _discarded(m["relu_in_place"])(m, z), in_place=True
    ),
    "F.relu": Spelling("relu", lambda m, z: F.relu(z)),
    "F.relu(z, True)": Spelling("relu", lambda m, z: F.relu(z, True), in_place=True),
    "F.relu(input=, inplace=)": Spelling("relu", lambda m, z: F.relu(input=z, inplace=True), in_place=True),
    "F.relu_": Spelling("relu", lambda m, z: F.relu_(z), in_place=True),
    "torch.relu": Spelling("relu", lambda m, z: torch.relu(z)),
    "torch.relu_, discarded": Spelling("relu", _discarded(torch.relu_), in_place=True),
    "Tensor.relu": Spelling("relu", lambda m, z: z.relu()),
    "Tensor.relu_": Spelling("relu", lambda m, z: z.relu_(), in_place=True),
    "Tensor.relu_, discarded": Spelling("relu", _discarded(lambda z: z.relu_()), in_place=True),
    "nn.ReLU6": Spelling("relu6", lambda m, z: m["relu6"](z)),
    "nn.ReLU6(inplace=True)": Spelling("relu6", lambda m, z: m["relu6_in_place"](z), in_place=True),
    "nn.Hardtanh(0, 6)": Spelling("relu6", lambda m, z: m["hardtanh"](z)),
    "F.relu6": Spelling("relu6", lambda m, z: F.relu6(z)),
    "F.relu6(inplace=True)": Spelling("relu6", lambda m, z: F.relu6(z, inplace=True), in_place=True),
    "F.hardtanh(z, 0, 6)": Spelling("relu6", lambda m, z: F.hardtanh(z, 0, 6)),
    "F.hardtanh_, discarded": Spelling("relu6", _discarded(lambda z: F.hardtanh_(z, 0.0, 6.0)), in_place=True),
    "nn.LeakyReLU": Spelling("leaky_relu", lambda m, z: m["leaky"](z)),
    "nn.LeakyReLU(inplace=True)": Spelling("leaky_relu", lambda m, z: m["leaky_in_place"](z), in_place=True),
    "F.leaky_relu": Spelling("leaky_relu", lambda m, z: F.leaky_relu(z, SLOPE)),
    "F.leaky_relu(negative_slope=)": Spelling("leaky_relu", lambda m, z: F.leaky_relu(z, negative_slope=SLOPE)),
    "F.leaky_relu_, discarded": Spelling("leaky_relu", _discarded(lambda z: F.leaky_relu_(z, SLOPE)), in_place=True),
}


def activation(kind: str, z: Tensor) -> Tensor:
    """Return the activation by comparisons; its derivative at a kink is PyTorch's."""
    zero = torch.zeros_like(z)
    if kind == "relu":
        return torch.where(z > 0, z, zero)
    if kind == "relu6":
        return torch.where(z <= 0, zero, torch.where(z >= 6, zero + 6, z))
    return torch.where(z > 0, z, SLOPE * z)


@dataclass(frozen=True)
class Block:
    """One layer and its activation.

    Attributes:
        form: ``plain``; ``residual``: the input is added before the activation; ``twice``: layer and activation run
            twice; ``added``: ``h = relu(z); h += z``.
        spelling: a key of ``SPELLINGS``.
        norm: batch normalisation after the layer.
        groups: of the convolution.
        bias: of the layer.
        pool: ``none``, ``max`` or ``average``, after the activation (images only).
    """

    form: str
    spelling: str
    norm: bool = False
    groups: int = 1
    bias: bool = True
    pool: str = "none"


@dataclass
class Record:
    """What the reference saw at its activations."""

    pre: list[Tensor] = field(default_factory=list)
    post: list[Tensor] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)


class RandomNetwork(nn.Module):
    """A network of random blocks and random weights, in float64 and eval mode."""

    def __init__(
        self, blocks: Sequence[Block], *, images: bool, pooled_head: bool, bias: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.images = images
        self.pooled_head = pooled_head
        self.modules_of_spellings = _modules()
        layers: list[nn.Module] = []
        norms: list[nn.Module] = []
        size = SIZE
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1, bias=bias) if images else nn.Linear(3, WIDTH, bias=bias)
        for block in blocks:
            if images:
                layers.append(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=block.groups, bias=block.bias))
                norms.append(nn.BatchNorm2d(CHANNELS) if block.norm else nn.Identity())
                size -= block.pool != "none"
            else:
                layers.append(nn.Linear(WIDTH, WIDTH, bias=block.bias))
                norms.append(nn.BatchNorm1d(WIDTH) if block.norm else nn.Identity())
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(norms)
        features = WIDTH if not images else CHANNELS if pooled_head else CHANNELS * size**2
        self.head = nn.Linear(features, CLASSES, bias=bias)
        self.double().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in self.state_dict().items():
                if name.endswith("running_var"):
                    value.uniform_(0.5, 2, generator=generator)
                elif value.is_floating_point():
                    # About 2 / sqrt(fan-in) keeps the signal alive and lets some ReLU6 saturate.
                    value.normal_(0, 2 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.5, generator=generator)

    def inputs(self, count: int, seed: int = 0) -> Tensor:
        """Return random inputs in [0, 1]."""
        shape = (count, 3, SIZE, SIZE) if self.images else (count, 3)
        return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block, layer, norm in zip(self.blocks, self.layers, self.norms, strict=True):
            spelling = SPELLINGS[block.spelling]
            z = norm(layer(h))
            if block.form == "residual":
                z = z + h
            h = spelling.call(self.modules_of_spellings, z)
            if block.form == "added":
                h += z
            if block.form == "twice":
                h = spelling.call(self.modules_of_spellings, norm(layer(h)))
            h = self._pool(block, h)
        return self._readout(h)

    def reference(
        self,
        x: Tensor,
        masks: Sequence[Tensor] | None = None,
        added: Sequence[Tensor] | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Compute the same logits in plain code: activation times ``masks`` plus ``added``, site by site."""
        calls = 0

        def activate(kind: str, z: Tensor) -> Tensor:
            nonlocal calls
            a = activation(kind, z)
            if masks is not None:
                a = a * masks[calls].to(a.dtype)
            if added is not None:
                a = a + added[calls]
            if record is not None:
                record.pre.append(z)
                record.post.append(a)
                record.kinds.append(kind)
            calls += 1
            return a

        h = self.stem(x)
        for block, layer, norm in zip(self.blocks, self.layers, self.norms, strict=True):
            spelling = SPELLINGS[block.spelling]
            z = norm(layer(h))
            if block.form == "residual":
                z = z + h
            a = activate(spelling.kind, z)
            if block.form == "added":
                h = a + (a if spelling.in_place else z)  # in place, z has become a
            elif block.form == "twice":
                h = activate(spelling.kind, norm(layer(a)))
            else:
                h = a
            h = self._pool(block, h)
        return self._readout(h)

    def _pool(self, block: Block, h: Tensor) -> Tensor:
        if not self.images or block.pool == "none":
            return h
        return F.max_pool2d(h, 2, 1) if block.pool == "max" else F.avg_pool2d(h, 2, 1)

    def _readout(self, h: Tensor) -> Tensor:
        if self.images:
            h = h.mean((2, 3)) if self.pooled_head else h.flatten(1)
        return self.head(h)


FORMS = ("plain", "residual", "twice", "added")


@st.composite
def networks(
    draw: st.DrawFn,
    *,
    forms: Sequence[str] = FORMS,
    kinds: Sequence[str] = ("relu", "relu6", "leaky_relu"),
    homogeneous: bool = False,
) -> RandomNetwork:
    """Draw a network of one to four blocks; a homogeneous one has no biases and no normalisation."""
    spellings = [name for name, spelling in SPELLINGS.items() if spelling.kind in kinds]
    block = st.builds(
        Block,
        form=st.sampled_from(forms),
        spelling=st.sampled_from(spellings),
        norm=st.just(False) if homogeneous else st.booleans(),
        groups=st.sampled_from([1, 2, 4]),
        bias=st.just(False) if homogeneous else st.booleans(),
        pool=st.sampled_from(["none", "none", "max", "average"]),
    )
    blocks = draw(st.lists(block, min_size=1, max_size=4))
    return RandomNetwork(
        blocks,
        images=draw(st.booleans()),
        pooled_head=draw(st.booleans()),
        bias=not homogeneous,
        seed=draw(st.integers(0, 2**16)),
    )


def small_network(seed: int = 0, spelling: str = "nn.ReLU") -> RandomNetwork:
    """Return a convolutional network of three sites, for tests that need just any network."""
    blocks = [Block("plain", spelling), Block("twice", spelling, pool="max")]
    return RandomNetwork(blocks, images=True, pooled_head=False, seed=seed)


@contextmanager
def unchanged(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """Assert that a block leaves the network, the tensors and the global random state exactly as they were."""

    def of_model() -> dict[str, object]:
        return {
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "identity": {name: id(p) for name, p in model.named_parameters()},
            "training": {name: module.training for name, module in model.named_modules()},
            "hooks": {
                name: [sorted(value) for key, value in sorted(vars(module).items()) if "hook" in key and value]
                for name, module in model.named_modules()
            },
            "own forward": [name for name, module in model.named_modules() if "forward" in vars(module)],
        }

    def of_tensors() -> list[object]:
        return [(tensor.requires_grad, tensor.is_leaf, tensor._backward_hooks) for tensor in tensors]

    watched = [*model.parameters(), *model.buffers(), *tensors]
    before_model, before_tensors, random_state = of_model(), of_tensors(), torch.get_rng_state()
    values = [tensor.detach().clone() for tensor in watched]
    gradients = [None if tensor.grad is None else tensor.grad.clone() for tensor in watched]
    grad_mode = torch.is_grad_enabled()
    try:
        yield
    finally:
        assert of_model() == before_model
        assert of_tensors() == before_tensors
        assert torch.equal(torch.get_rng_state(), random_state)
        assert torch.is_grad_enabled() == grad_mode
        for tensor, value, gradient in zip(watched, values, gradients, strict=True):
            assert torch.equal(tensor.detach().nan_to_num(), value.nan_to_num())
            assert (tensor.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(tensor.grad, gradient)
