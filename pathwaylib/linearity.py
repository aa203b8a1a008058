"""Where a network, or a pathway network, is exactly linear: around an image, and along a line.

A piecewise-linear network is linear until one of its **conditions** changes: a neuron passes a kink of its activation,
or a max-pooling window gets another winner. Every condition is a function of the image that is itself linear until
the first change, so its distance is its value divided by the length of its gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal

import torch
from scipy.stats import chi2
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from .errors import PathwayError
from .neurons import Site, Target, apply_mask, check_model, resolve_target, run
from .pathway import Pathway

_HIDDEN = (
    "backward and forward derivatives of the network differ; does it hide a dependence on the image from gradients? "
    "In single precision rounding can be the cause: use float64"
)
_GEOMETRY = (("stride", 1), ("padding", 0), ("dilation", 1))
_KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0)}


def _words(names: str) -> set[str]:
    return set(names.split())


# Names without underscores, so that `add` stands for `add_` too.
_POOLS = {"maxpool2d", "maxpool2dwithindices", "adaptivemaxpool2d", "adaptivemaxpool2dwithindices"}
_LINEAR = _words(
    "add iadd radd sub isub rsub subtract neg positive cat concat concatenate stack hstack vstack mean sum nansum "
    "avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d pad interpolate upsample "
    "reshape reshapeas view viewas flatten unflatten ravel permute transpose swapaxes movedim t squeeze unsqueeze "
    "expand expandas broadcastto repeat repeatinterleave tile roll flip narrow select indexselect getitem setitem "
    "split splitwithsizes tensorsplit chunk unbind unfold fold pixelshuffle pixelunshuffle channelshuffle "
    "clone contiguous to type typeas float double half bfloat16 cpu cuda copy maskedfill alias T mT"
)
_LINEAR_IN_EVAL = {"batchnorm", "dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout"}
_LINEAR_IN_ONE = _words(
    "mul imul rmul multiply div idiv itruediv truediv divide linear conv1d conv2d conv3d convtranspose1d "
    "convtranspose2d convtranspose3d matmul rmatmul imatmul mm bmm mv addmm baddbmm einsum"
)
# What these return says nothing about the values.
_CONSTANT = _words(
    "size dim numel nelement len shape ndim dtype device requiresgrad layout iscuda issparse isquantized "
    "isfloatingpoint iscontiguous stride storageoffset elementsize zeroslike oneslike emptylike newzeros newones "
    "newempty newfull fulllike gradfn isleaf names version hash"
)


@dataclass(frozen=True)
class Binding:
    """The condition that ends a linear region.

    Attributes:
        site: name of the activation call, such as ``relu_3``, or of the pooling call, such as ``max_pool_0``.
        neuron: position of the neuron in its site, such as (channel, row, column); of a pooling window: of its winner.
        rival: of a pooling window, the position that would win next; else None.
    """

    site: str
    neuron: tuple[int, ...]
    rival: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class LinearRegion:
    """A ball around each image in which the network is linear, and its linear map there.

    Attributes:
        radius: R, ``(B,)``, Euclidean, in units of the image; infinite where nothing binds.
        binding: the condition that changes first, per image; None where none does.
        direction: unit vector to that condition, shaped like the images; 0 where there is none. ``x + R direction`` is
            the nearest point at which the condition changes.
        gradient: ∇Φ_t(x), shaped like the images.
        offset: ``(B,)``: inside, Φ_t(x + δ) = ⟨gradient, x + δ⟩ + offset.
        certified: whether R is exact, up to rounding, ``(B,)``.
        confidence: probability with which R is exact, 1 where certified.
        asleep: kept neurons whose activation inside the pathway network is 0, ``(B,)``.
        targets: the class of each image's response, ``(B,)``.
    """

    radius: Tensor
    binding: tuple[Binding | None, ...]
    direction: Tensor
    gradient: Tensor
    offset: Tensor
    certified: Tensor
    confidence: float
    asleep: Tensor
    targets: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Return the linear map ⟨gradient, x⟩ + offset of each image's region at ``x``, ``(B,)``."""
        return (self.gradient * x).flatten(1).sum(1) + self.offset


def linear_region(
    model: nn.Module,
    x: Tensor,
    pathway: Pathway | None = None,
    target: Target = None,
    *,
    mode: Literal["exact", "fast"] = "exact",
    confidence: float = 0.999,
    probes: int = 16,
    memory: int = 2**32,
    generator: torch.Generator | None = None,
) -> LinearRegion:
    """Return the largest ball around each image in which no condition of the pathway network changes.

    Conditions are the kept neurons' signs (for ReLU6 both its kinks) and the winners of max-pooling windows; removed
    neurons impose nothing. Networks may also hold whatever is linear in evaluation mode: convolutions, batch
    normalisation, average pooling, sums, concatenation. Rounding is not part of the guarantee: use float64.

    Args:
        model: a piecewise-linear network in eval mode.
        x: images ``(B, ...)``.
        pathway: of these images; None means the full network.
        target: class or classes of the response; None means the pathway's targets, else the predicted class of the
            full network.
        mode: ``"exact"`` computes the gradient of every condition; ``"fast"`` estimates their lengths by random
            forward-mode probes and computes only those that may still be the nearest.
        confidence: of the fast mode: probability, over the probes, that the radius is exact.
        probes: of the fast mode.
        memory: bytes that the exact mode may spend on the gradients it shares between layers; where they do not fit,
            every gradient is computed on its own, which is several times slower.
        generator: draws the probes, on the CPU; None draws the same ones at every call (seed 0).

    Raises:
        PathwayError: as :func:`pathwaylib.observe`; if the network calls a function that is not known to be
            piecewise linear; if the pathway is not of this network and these images; if an option is out of range.

    Equation: R = min abs(z_j(x)) / ‖∇z_j(x)‖₂ over the kept neurons j, with z taken in Φ_P; for a pooling window with
    winner w, (p_w - p_k) / ‖∇(p_w - p_k)‖₂ over its other entries k.

    Source: Khakzar et al., CVPR 2021, after Lee, Alvarez-Melis and Jaakkola, *Towards Robust, Locally Linear Deep
    Networks* (ICLR 2019). Pooling, ReLU6 and the fast mode are ours.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        ...     _ = net[0].bias.copy_(torch.tensor([-1.0, 3.0]))
        >>> region = linear_region(net, torch.tensor([[1.0, 2.0]]))  # z = (10, 5), with gradients of length 5 and 1
        >>> region.radius, region.binding
        (tensor([2.]), (Binding(site='relu_0', neuron=(0,), rival=None),))
    """
    if mode not in ("exact", "fast"):
        raise PathwayError(f"mode is {mode!r}; choose 'exact' or 'fast'")
    if not 0 < confidence < 1:
        raise PathwayError(f"confidence is {confidence}; give a number between 0 and 1")
    if probes < 1:
        raise PathwayError(f"probes is {probes}; give at least 1")
    check_model(model, x)
    _check_batch(x, pathway)
    if target is None and pathway is not None and pathway.targets is not None:
        target = pathway.targets
    with torch.no_grad():
        targets = resolve_target(run(model, x.detach(), lambda site, z: site.function(z)), target)
    generator = generator or torch.Generator().manual_seed(0)
    found = []
    for index, image in enumerate(x.detach().split(1)):
        inside = None if pathway is None else pathway[index % len(pathway)]
        probe = _Probe(model, image, inside, 1 if mode == "exact" else probes, generator)
        with torch.enable_grad():
            graph = _Graph(model, image, inside)
            response = graph.logits[0, targets[index]]
            gradient = torch.autograd.grad(response, graph.x, retain_graph=True)[0]
            if mode == "exact":
                nearest, certified = _settle_all(model, graph, probe, inside, memory), True
            else:
                nearest, certified = _settle_promising(graph, probe, confidence)
        found.append((nearest, gradient, response.detach(), certified, graph.asleep))
    nearests, gradients, responses, certificates, asleep = zip(*found, strict=True)
    gradient = torch.cat(gradients)
    return LinearRegion(
        radius=x.new_tensor([nearest.distance for nearest in nearests]),
        binding=tuple(nearest.binding for nearest in nearests),
        direction=torch.stack([nearest.direction for nearest in nearests]).view_as(x),
        gradient=gradient,
        offset=torch.stack(responses) - (gradient * x.detach()).flatten(1).sum(1),
        certified=torch.tensor(certificates, device=x.device),
        confidence=1.0 if all(certificates) else confidence,
        asleep=torch.tensor(asleep, device=x.device),
        targets=targets,
    )


def first_kink(model: nn.Module, x: Tensor, direction: Tensor, pathway: Pathway | None = None) -> Tensor:
    """Return how far each image can move along a direction before a condition changes.

    Exact up to rounding, by one forward run with tangents. A condition that holds with equality at ``x`` itself is
    passed over: it lies at distance 0 and not ahead.

    Args:
        model: a piecewise-linear network in eval mode, see :func:`linear_region`.
        x: images ``(B, ...)``.
        direction: shaped like ``x``, or like one image.
        pathway: of these images; None means the full network.

    Returns:
        ``(B,)``, in lengths of ``direction``: the kink is at ``x + distance * direction``. Infinite where there is
        none.

    Raises:
        PathwayError: as :func:`linear_region`, and if ``direction`` does not fit the images.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        ...     _ = net[0].bias.copy_(torch.tensor([-3.0, 4.0]))
        >>> first_kink(net, torch.zeros(1, 1), torch.ones(1)), first_kink(net, torch.zeros(1, 1), -torch.ones(1))
        (tensor([3.]), tensor([2.]))
    """
    return _along(model, x, direction, pathway)(x.new_zeros(len(x)))


def linear_pieces(
    model: nn.Module, x: Tensor, direction: Tensor, length: float = 1.0, pathway: Pathway | None = None
) -> tuple[Tensor, ...]:
    """Return the positions of all kinks along a line from each image: between two of them the network is linear.

    One forward run per kink; images of a batch walk side by side. See :func:`walk` for what counts as one kink.

    Args:
        model: a piecewise-linear network in eval mode, see :func:`linear_region`.
        x: images ``(B, ...)``.
        direction: shaped like ``x``, or like one image.
        length: of the walk, in lengths of ``direction``.
        pathway: of these images, the same all along the line; None means the full network.

    Returns:
        One tensor per image, increasing, above 0 and below ``length``: the kinks are at ``x + position * direction``.

    Raises:
        PathwayError: as :func:`first_kink`, and if ``length`` is not positive and finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        ...     _ = net[0].bias.copy_(torch.tensor([-0.25, -1.0]))
        >>> [round(float(position), 4) for position in linear_pieces(net, torch.zeros(1, 1), torch.ones(1))[0]]
        [0.25, 0.5]
    """
    return walk(_along(model, x, direction, pathway), x.new_zeros(len(x)), length)


def walk(next_kink: Callable[[Tensor], Tensor], start: Tensor, length: float = 1.0) -> tuple[Tensor, ...]:
    """Step from kink to kink until ``start + length``; return the kinks' positions, per walker.

    At a kink itself the conditions cannot tell its two sides apart. So every step, the first included, ends a
    hair (for float64 about 4e-11 of the length) behind a kink; kinks closer to each other than that count as one.

    Args:
        next_kink: gets positions ``(B,)``, returns the distance from each to the next kink, infinite where none is.
        start: positions ``(B,)``.
        length: of the walk.

    Raises:
        PathwayError: if ``length`` is not positive and finite.

    Example:
        >>> walk(lambda t: t.ceil() - t, torch.tensor([0.5], dtype=torch.float64), 3)
        (tensor([1., 2., 3.], dtype=torch.float64),)
    """
    if not 0 < length < float("inf"):
        raise PathwayError(f"length is {length}; give a positive, finite length")
    hair = length * torch.finfo(start.dtype).eps ** (2 / 3)
    end = start + length
    position, last, step = start + hair, start, torch.full_like(start, hair)
    kinks: list[list[Tensor]] = [[] for _ in start]
    while True:
        distance = next_kink(position)
        kink = position + distance
        ahead = kink < end
        if not bool(ahead.any()):
            return tuple(torch.stack(found) if found else start.new_empty(0) for found in kinks)
        for walker in (ahead & (kink > last + 2 * hair)).nonzero()[:, 0].tolist():
            kinks[walker].append(kink[walker])
        # A condition that hardly changes along the line can seem not passed yet, by rounding: step on faster.
        step = torch.where(distance < 2 * step, 2 * step, hair)
        last = torch.where(ahead, kink, end)
        position = torch.where(ahead, kink + step, end)


def _along(model: nn.Module, x: Tensor, direction: Tensor, pathway: Pathway | None) -> Callable[[Tensor], Tensor]:
    """Return the function that finds the distance from a position on each image's line to the next kink."""
    check_model(model, x)
    _check_batch(x, pathway)
    if direction.shape not in (x.shape, x.shape[1:]):
        raise PathwayError(
            f"the direction has shape {tuple(direction.shape)}, the images {tuple(x.shape)}; give one per image, or one"
        )
    tangent = direction.detach().to(x).expand_as(x)

    def next_kink(position: Tensor) -> Tensor:
        point = x.detach() + position.view(-1, *[1] * (x.ndim - 1)) * tangent
        kinks = KinkDistance(pathway)
        with torch.no_grad(), forward_ad.dual_level():
            run(model, moving(point, tangent), kinks, within=kinks)
        return x.new_full((len(x),), torch.inf) if kinks.distance is None else kinks.distance

    return next_kink


def _check_batch(x: Tensor, pathway: Pathway | None) -> None:
    if pathway is not None and len(pathway) not in (1, len(x)):
        raise PathwayError(
            f"the pathway holds {len(pathway)} inputs, the images {len(x)}; give one each, or one for all"
        )


class _Watch(TorchFunctionMode):
    """Visitor and function mode of one run: shown every site and every max-pooling; refuses what may not be linear.

    Use it as both: ``run(model, x, watch, within=watch)``. Only values that move with the image are of interest:
    those that carry a tangent or a gradient graph.
    """

    def __init__(self, pathway: Pathway | None = None) -> None:
        super().__init__()
        self.visit = (lambda site, z: site.function(z)) if pathway is None else apply_mask(pathway)
        self.masks = None if pathway is None else pathway.masks
        self.sites = 0
        self.pools = 0

    def __call__(self, site: Site, z: Tensor) -> Tensor:
        self.sites += 1
        return self.at_site(site, z)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        sites = self.sites
        depends = [_moves(tensor) for tensor in _tensors((args, kwargs))]
        result = self.call(func, args, kwargs)
        if not any(depends) or self.sites != sites:
            return result
        name = _name(func)
        if name.replace("_", "") not in _POOLS:
            _check_linear(name, args, kwargs, sum(depends), result)
            return result
        given: Tensor = args[0] if args else kwargs["input"]
        if not isinstance(result, Tensor) or given.ndim != 4:
            raise PathwayError(
                f"the network calls {name} in a way that is not covered: pool (batch, channels, height, width) without "
                "asking for the indices"
            )
        windows = _windows(name, args, kwargs, given, result)
        self.pools += 1
        self.at_pool(f"max_pool_{self.pools - 1}", windows, given)
        return result

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one of the network's calls."""
        return func(*args, **kwargs)

    def kept(self, site: Site, z: Tensor) -> Tensor:
        """Return the mask of the site's kept neurons, to be broadcast over the batch."""
        return z.new_ones(1, *z.shape[1:], dtype=torch.bool) if self.masks is None else self.masks[site.index]

    def at_site(self, site: Site, z: Tensor) -> Tensor:
        """Note a site; return what the network goes on with."""
        raise NotImplementedError

    def at_pool(self, name: str, windows: Tensor, given: Tensor) -> None:
        """Note a max-pooling of ``given`` ``(B, C, H, W)``; see :func:`_windows`."""
        raise NotImplementedError


class KinkDistance(_Watch):
    """Visitor and function mode that finds the distance to the nearest kink along the tangents of a run.

    Give the network, or one of its sites, a dual tensor (:mod:`torch.autograd.forward_ad`): every later
    pre-activation then moves at a known rate. What carries no tangent imposes nothing.

    Args:
        pathway: of the pathway network; None means the full one.

    Attributes:
        distance: ``(B,)``: the least positive step along the tangents at which a condition changes, infinite where
            there is none; None before anything that moves was seen.

    Raises:
        PathwayError: during the run, if what moves enters a function that is not known to be piecewise linear.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
        >>> kinks = KinkDistance()
        >>> with torch.no_grad(), forward_ad.dual_level():
        ...     _ = net[0].weight.fill_(2), net[0].bias.fill_(1)  # z = 2 x + 1
        ...     x = moving(torch.ones(1, 1), -torch.ones(1, 1))
        ...     _ = run(net, x, kinks, within=kinks)
        >>> kinks.distance
        tensor([1.5000])
    """

    def __init__(self, pathway: Pathway | None = None) -> None:
        super().__init__(pathway)
        self.distance: Tensor | None = None

    def at_site(self, site: Site, z: Tensor) -> Tensor:
        """Take the site's kinks into account; return its activation."""
        value, rate = forward_ad.unpack_dual(z)
        if rate is not None:
            for kink in _KINKS[site.kind]:
                self._note(((kink - value) / rate).masked_fill(~self.kept(site, z), torch.inf))
        return self.visit(site, z)

    def at_pool(self, name: str, windows: Tensor, given: Tensor) -> None:
        """Take the windows' rivals into account."""
        value, rate = forward_ad.unpack_dual(given)
        if rate is not None:
            values, rates = _gather(value, windows, -torch.inf), _gather(rate, windows, 0)
            winner = values.argmax(-1, keepdim=True)
            self._note((values.gather(-1, winner) - values) / (rates - rates.gather(-1, winner)))

    def _note(self, distances: Tensor) -> None:
        ahead = torch.where(distances > 0, distances, torch.inf).flatten(1).amin(1)
        self.distance = ahead if self.distance is None else self.distance.minimum(ahead)


def moving(value: Tensor, rate: Tensor) -> Tensor:
    """Return a dual tensor: ``value``, which changes at ``rate``. To be used inside ``forward_ad.dual_level()``."""
    with warnings.catch_warnings():
        # On its first use PyTorch compiles parts of its forward mode with a function that it has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        dual: Tensor = forward_ad.make_dual(value, rate)
        return dual


def _moves(tensor: Tensor) -> bool:
    return tensor.requires_grad or forward_ad.unpack_dual(tensor).tangent is not None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _name(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", repr(func))
    return getattr(func, "__self__", func).__name__ if name == "__get__" else name  # a property goes by its own name


def _check_linear(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], depends: int, result: Any) -> None:
    """Raise where a call of which ``depends`` tensors depend on the image is not known to be linear in them."""
    plain = name.replace("_", "")
    if plain in _CONSTANT:
        return
    linear = plain in _LINEAR or (plain in _LINEAR_IN_ONE and depends == 1)
    if plain in ("div", "truediv", "divide", "idiv", "itruediv"):
        linear = linear and _moves(args[0]) and not kwargs.get("rounding_mode")
    if plain in _LINEAR_IN_EVAL:
        linear = depends == 1
    if not linear:
        raise PathwayError(
            f"the network calls {name} on values that depend on the image, which is not known to be piecewise linear; "
            "ReLU, ReLU6, leaky ReLU, 2-d max-pooling and functions linear in evaluation mode (convolution, batch "
            "normalisation, average pooling, sums, ...) are"
        )
    results = _tensors(result)
    if plain != "setitem" and not (results and all(_moves(tensor) for tensor in results)):
        raise PathwayError(f"the network hides from gradients how the result of {name} depends on the image")


def _windows(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Tensor, result: Tensor) -> Tensor:
    """Return which entries of a flattened map each pooling window reads, ``(windows, entries)``; -1 is padding."""
    call = dict(zip(("input", "kernel_size", "stride", "padding", "dilation"), args, strict=False)) | kwargs
    axes = []
    for axis, (size, count) in enumerate(zip(given.shape[2:], result.shape[2:], strict=True)):
        if name.startswith("adaptive"):
            starts = [window * size // count for window in range(count)]
            ends = [ceil((window + 1) * size / count) for window in range(count)]
            offsets = torch.arange(max(end - start for start, end in zip(starts, ends, strict=True)))
            index = torch.tensor(starts)[:, None] + offsets
            index[index >= torch.tensor(ends)[:, None]] = -1
        else:
            kernel = _pair(call["kernel_size"])[axis]
            stride = _pair(call.get("stride") or call["kernel_size"])[axis]
            padding, dilation = _pair(call.get("padding", 0))[axis], _pair(call.get("dilation", 1))[axis]
            index = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel) * dilation
            index[(index < 0) | (index >= size)] = -1
        axes.append(index)
    rows, columns = axes[0][:, None, :, None], axes[1][None, :, None, :]
    index = torch.where((rows < 0) | (columns < 0), -1, rows * given.shape[3] + columns)
    return index.flatten(2).flatten(0, 1).to(given.device)


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    if isinstance(value, int):
        return (value, value)
    return value if len(value) == 2 else (value[0], value[0])


def _gather(maps: Tensor, windows: Tensor, padding: float) -> Tensor:
    """Return the entries of each window, ``(B, C, windows, entries)``."""
    return maps.flatten(2)[..., windows.clamp(min=0)].masked_fill(windows < 0, padding)


# --- the conditions around an image ---


@dataclass(frozen=True, eq=False)
class _Node:
    """The conditions of one site or one max-pooling, for one image.

    Attributes:
        order: position in the run.
        name: of the site or pooling.
        shape: of its map, without the batch.
        entries: flat positions in the map that conditions read, ``(E,)``.
        rates: of these entries along the probes, ``(m, E)``.
        gap: how much the condition's function has to change, signed, ``(n,)``.
        plus: index into ``entries`` of each condition's entry, ``(n,)``.
        minus: the same for what is subtracted from it; None at sites.
    """

    order: int
    name: str
    shape: torch.Size
    entries: Tensor
    rates: Tensor
    gap: Tensor
    plus: Tensor
    minus: Tensor | None = None

    def condition_rates(self) -> Tensor:
        """Return the rates of the conditions' functions along the probes, ``(m, n)``."""
        return self.rates[:, self.plus] - (0 if self.minus is None else self.rates[:, self.minus])

    def binding(self, condition: int) -> Binding:
        """Return the public description of a condition."""
        neuron = self._position(self.plus[condition])
        return Binding(self.name, neuron, None if self.minus is None else self._position(self.minus[condition]))

    def _position(self, entry: Tensor) -> tuple[int, ...]:
        return tuple(int(index) for index in torch.unravel_index(self.entries[entry], self.shape))


class _Probe(_Watch):
    """Collects the conditions that can bind: those whose function moves along random directions of the image.

    What does not move along a random direction is locally constant, but for an event of probability 0.
    """

    def __init__(
        self, model: nn.Module, image: Tensor, pathway: Pathway | None, probes: int, generator: torch.Generator
    ) -> None:
        super().__init__(pathway)
        self.nodes: list[_Node] = []
        shape = (probes, *image.shape[1:])
        self.directions = torch.randn(shape, generator=generator, dtype=torch.float64).to(image)
        with torch.no_grad(), forward_ad.dual_level():
            run(model, moving(image.expand(shape).clone(), self.directions), self, within=self)

    def at_site(self, site: Site, z: Tensor) -> Tensor:
        value, rate = forward_ad.unpack_dual(z)
        if rate is not None:
            alive = (self.kept(site, z)[0] & (rate != 0).any(0)).flatten().nonzero()[:, 0]
            gaps = torch.stack([kink - value[0].flatten()[alive] for kink in _KINKS[site.kind]])
            gap = gaps.gather(0, gaps.abs().argmin(0, keepdim=True))[0]
            self._add(site.name, z, alive, rate, gap, torch.arange(len(alive), device=z.device))
        return self.visit(site, z)

    def at_pool(self, name: str, windows: Tensor, given: Tensor) -> None:
        value, rate = forward_ad.unpack_dual(given)
        if rate is None:
            return
        values, rates = _gather(value[:1], windows, -torch.inf)[0], _gather(rate, windows, 0)
        winner = values.argmax(-1, keepdim=True)
        relative = rates - rates.gather(-1, winner.expand(len(rates), *winner.shape))
        rivals = (relative != 0).any(0) & (windows >= 0)
        # Of the rivals that stand still, only the highest can be the first to win.
        still = rivals & (rates == 0).all(0)
        highest = values.masked_fill(~still, -torch.inf).argmax(-1, keepdim=True)
        rivals &= ~still | torch.zeros_like(still).scatter(-1, highest, True)
        channel, window, rival = rivals.nonzero(as_tuple=True)
        first = channel * given[0, 0].numel()
        won, lost = (first + windows[window, place] for place in (winner[channel, window, 0], rival))
        entries, where = torch.cat([won, lost]).unique(return_inverse=True)
        flat = value[0].flatten()
        self._add(name, given, entries, rate, flat[lost] - flat[won], *where.split(len(won)))

    def _add(
        self,
        name: str,
        z: Tensor,
        entries: Tensor,
        rate: Tensor,
        gap: Tensor,
        plus: Tensor,
        minus: Tensor | None = None,
    ) -> None:
        if not len(gap):
            return
        rates = rate.flatten(1)[:, entries]
        self.nodes.append(_Node(len(self.nodes), name, z.shape[1:], entries, rates, gap, plus, minus))


class _Graph(_Watch):
    """One image's run with a gradient graph from everything that has conditions back to the image.

    Where ``cut``, the graph is cut at the sites: a value then depends only on the activations it is computed from.
    """

    def __init__(self, model: nn.Module, image: Tensor, pathway: Pathway | None, *, cut: bool = False) -> None:
        super().__init__(pathway)
        self.cut = cut
        self.x = image.clone().requires_grad_()
        self.values: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}
        self.asleep = 0
        self.logits = run(model, self.x, self, within=self)

    def at_site(self, site: Site, z: Tensor) -> Tensor:
        self.values[site.name] = z.clone()
        kept = self.kept(site, z)
        if not self.cut:
            a = self.visit(site, z.clone())  # the network may overwrite what the backward pass needs
            self.asleep += int((kept & (a == 0)).sum())
            return a.clone()
        pre = z.detach().clone().requires_grad_()
        a = self.visit(site, pre.clone())
        self.slopes[site.name] = torch.autograd.grad(a.sum(), pre)[0].flatten()
        self.leaves[site.name] = a.detach().clone().requires_grad_()
        return self.leaves[site.name].clone()  # the network may overwrite its own

    def at_pool(self, name: str, windows: Tensor, given: Tensor) -> None:
        self.values[name] = given.clone()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.cut and func is torch.conv2d:
            call = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
            call |= kwargs
            if call["input"].ndim == 4 and not isinstance(call.get("padding"), str):
                geometry = [tuple(_pair(call.get(name, default))) for name, default in _GEOMETRY]
                return _Convolution.apply(
                    call["input"], call["weight"], call.get("bias"), *geometry, call.get("groups", 1)
                )
        return func(*args, **kwargs)


class _Nearest:
    """The nearest of the conditions whose gradients it was shown."""

    def __init__(self, image: Tensor) -> None:
        self.distance = torch.inf
        self.direction = torch.zeros_like(image[0])
        self.node: _Node | None = None
        self.condition = 0

    @property
    def binding(self) -> Binding | None:
        """The public description of the nearest condition."""
        return None if self.node is None else self.node.binding(self.condition)

    def offer(self, node: _Node, conditions: Tensor, gradients: Tensor) -> None:
        """Take in the gradients ``(n, D)`` of some conditions of a node."""
        lengths = gradients.norm(dim=1)
        distances = torch.where(lengths > 0, node.gap[conditions].abs() / lengths, torch.inf)
        distance, place = distances.min(0)
        if not bool(distance.isfinite()):
            return
        # Two conditions can be one and the same, say a neuron's and that of a pooling that reads it: the first counts.
        margin = 1e-9 * self.distance if self.node is not None else 0.0
        earlier = self.node is not None and node.order < self.node.order
        if float(distance) < self.distance + (margin if earlier else -margin):
            self.node, self.condition = node, int(conditions[place])
            sign = 1 if node.gap[self.condition] >= 0 else -1
            self.direction = (sign * gradients[place] / lengths[place]).view_as(self.direction)
        self.distance = min(self.distance, float(distance))


def _settle_all(model: nn.Module, graph: _Graph, probe: _Probe, pathway: Pathway | None, memory: int) -> _Nearest:
    """Compute the gradient of every condition."""
    nearest = _Nearest(graph.x.detach())
    shared = sum(len(node.entries) for node in probe.nodes if node.minus is None) * graph.x[0].nbytes
    if shared <= memory:
        chain = _Chain(model, graph.x.detach(), pathway, probe)
    for node in probe.nodes:
        parts = chain.gradients(node) if shared <= memory else _one_by_one(graph, node, probe)
        for conditions, gradients in parts:
            nearest.offer(node, conditions, gradients)
    return nearest


def _settle_promising(graph: _Graph, probe: _Probe, confidence: float) -> tuple[_Nearest, bool]:
    """Compute gradients in order of promise, until with this confidence no other condition can be nearer.

    The squared rates of a condition, divided by its squared gradient, add up to a χ² variable with one degree of
    freedom per probe. Its quantile at (1 - confidence) / n bounds all n gradients at once.
    """
    nearest = _Nearest(graph.x.detach())
    counts = [len(node.gap) for node in probe.nodes]
    if not sum(counts):
        return nearest, True
    quantile = float(chi2.ppf((1 - confidence) / sum(counts), len(probe.directions)))
    bounds = [node.gap.abs() / (node.condition_rates().square().sum(0) / quantile).sqrt() for node in probe.nodes]
    bound, order = torch.cat(bounds).sort()
    owners = torch.repeat_interleave(torch.tensor(counts)).to(order.device)[order]
    starts = torch.tensor([0, *counts]).cumsum(0).to(order.device)
    settled = 0
    for part in torch.arange(len(order), device=order.device).split(16):
        if float(bound[part[0]]) > nearest.distance:
            break
        for owner in owners[part].unique().tolist():
            conditions = order[part[owners[part] == owner]] - starts[owner]
            for chosen, gradients in _one_by_one(graph, probe.nodes[owner], probe, conditions):
                nearest.offer(probe.nodes[owner], chosen, gradients)
        settled += len(part)
    return nearest, settled == len(order)


def _one_by_one(
    graph: _Graph, node: _Node, probe: _Probe, conditions: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute the gradients of (some of) a node's conditions by one vector-Jacobian product each, in batches."""
    value = graph.values[node.name]
    if conditions is None:
        conditions = torch.arange(len(node.gap), device=value.device)
    for part in conditions.split(_at_once(value, graph.x)):
        seeds = value.new_zeros(len(part), value[0].numel())
        seeds.scatter_(1, node.entries[node.plus[part]][:, None], 1)
        if node.minus is not None:
            seeds.scatter_(1, node.entries[node.minus[part]][:, None], -1)
        (gradients,) = _products(value, [graph.x], seeds)
        if gradients is None:
            raise PathwayError(_HIDDEN)
        _check_rates(gradients, node.condition_rates()[:, part], probe)
        yield part, gradients


def _products(value: Tensor, inputs: list[Tensor], seeds: Tensor) -> list[Tensor | None]:
    """Return the vector-Jacobian products of ``seeds`` ``(n, ...)``, each ``(n, numel)``; None where unused."""
    used: list[int] = []

    def product(seed: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(value, inputs, seed, retain_graph=True, allow_unused=True)
        used[:] = [index for index, part in enumerate(found) if part is not None]
        return tuple(part for part in found if part is not None)

    products = torch.vmap(product)(seeds.view(-1, *value.shape))
    parts = dict(zip(used, products, strict=True))
    return [parts[index].flatten(1) if index in parts else None for index in range(len(inputs))]


def _at_once(*tensors: Tensor) -> int:
    """Return how many vector-Jacobian products to batch: more than about 16 MB a tensor makes them slower."""
    return max(1, 2**24 // max(tensor.nbytes for tensor in tensors))


def _agree(gradients: Tensor, rates: Tensor, probe: _Probe) -> bool:
    """Tell whether gradients, from backward products, give the rates that the forward run saw along the probes."""
    expected = gradients @ probe.directions.flatten(1).T
    tolerance = torch.finfo(gradients.dtype).eps ** 0.5 * gradients.norm(dim=1, keepdim=True)
    return bool(((expected - rates.T).abs() <= 10 * tolerance).all())


def _check_rates(gradients: Tensor, rates: Tensor, probe: _Probe) -> None:
    if not _agree(gradients, rates, probe):
        raise PathwayError(_HIDDEN)


# --- the gradients of all conditions by the chain rule over sites ---


class _Convolution(torch.autograd.Function):
    """A 2-d convolution whose backward products take no longer than the few entries of their seeds require."""

    @staticmethod
    def forward(
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        result: Tensor = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weight = inputs[1]
        ctx.rest = (inputs[0].shape, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_ConvolutionBackward.apply(gradient, ctx.weight, *ctx.rest), None, None, None, None, None, None)


class _ConvolutionBackward(torch.autograd.Function):
    """The product of a convolution's Jacobian with a seed; of sparse seeds, when there are many at once."""

    @staticmethod
    def forward(gradient: Tensor, weight: Tensor, shape: torch.Size, *geometry: Any) -> Tensor:
        product: Tensor = conv2d_input(shape, weight, gradient, *geometry)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: no second derivatives are taken."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], gradient: Tensor, weight: Tensor, shape: torch.Size, *geometry: Any
    ) -> tuple[Tensor, int]:
        seeds = gradient.movedim(in_dims[0], 0)
        shape = torch.Size((len(seeds) * shape[0], *shape[1:]))
        flat = seeds.flatten(0, 1)
        if int(flat.count_nonzero()) * 32 > flat.numel():
            return conv2d_input(shape, weight, flat, *geometry).unflatten(0, seeds.shape[:2]), 0
        stride, padding, dilation, groups = geometry
        seed, channel, row, column = flat.nonzero(as_tuple=True)
        inputs, height, width = weight.shape[1:]
        # Where each weight of each seed's filter reads, in the padded input.
        sizes = [shape[axis + 2] + 2 * padding[axis] for axis in (0, 1)]
        across = torch.arange(inputs, device=flat.device)[:, None, None] * sizes[0]
        down = (across + torch.arange(height, device=flat.device)[:, None] * dilation[0]) * sizes[1]
        reads = down + torch.arange(width, device=flat.device) * dilation[1]
        first = channel // (len(weight) // groups) * inputs + seed * shape[1]
        first = (first * sizes[0] + row * stride[0]) * sizes[1] + column * stride[1]
        padded = flat.new_zeros(shape[0] * shape[1] * sizes[0] * sizes[1])
        values = weight[channel] * flat[seed, channel, row, column].view(-1, 1, 1, 1)
        padded.index_add_(0, (first.view(-1, 1, 1, 1) + reads).flatten(), values.flatten())
        maps = padded.view(*shape[:2], *sizes)
        maps = maps[:, :, padding[0] : padding[0] + shape[2], padding[1] : padding[1] + shape[3]]
        return maps.unflatten(0, seeds.shape[:2]), 0


@dataclass(frozen=True, eq=False)
class _Source:
    """What later values are computed from: the image, or the activations of a site.

    Attributes:
        leaf: where the graph is cut.
        places: for each flat position its index among the K that move, or -1, ``(numel,)``.
        rates: of those that move along the probe, ``(K,)``.
        gradients: of those that move with respect to the image, ``(K, D)``; None for the image itself.
    """

    leaf: Tensor
    places: Tensor
    rates: Tensor
    gradients: Tensor | None


@dataclass(frozen=True, eq=False)
class _Sparse:
    """A sparse matrix by rows.

    Attributes:
        starts: where each row starts in ``columns`` and ``values``, and where the last one ends, ``(rows + 1,)``.
        columns: of the entries.
        values: of the entries.
        width: number of columns.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return some rows as a sparse tensor."""
        counts = self.starts[rows + 1] - self.starts[rows]
        row = torch.repeat_interleave(counts)
        place = torch.arange(len(row), device=row.device) + (self.starts[rows] - counts.cumsum(0) + counts)[row]
        index = torch.stack([row, self.columns[place]])
        return torch.sparse_coo_tensor(
            index, self.values[place], (len(rows), self.width), is_coalesced=True, check_invariants=False
        )


class _Chain:
    """Gradients of all conditions of a run, node by node, each computed from those of the sites before it.

    Between two sites a network is local: an activation reads a small window of the one before. So one vector-Jacobian
    product serves many neurons whose windows are apart (Curtis, Powell and Reid, 1974), and of its result only the
    columns of activations that move count. Windows are learnt from a few neurons; where the matrix found with them
    does not give the rates that the probe saw, every neuron gets a product of its own.
    """

    def __init__(self, model: nn.Module, image: Tensor, pathway: Pathway | None, probe: _Probe) -> None:
        self.probe = probe
        self.graph = _Graph(model, image, pathway, cut=True)
        everything = torch.arange(image.numel(), device=image.device)
        self.sources = [_Source(self.graph.x, everything, probe.directions.flatten(), None)]

    def gradients(self, node: _Node) -> Iterator[tuple[Tensor, Tensor]]:
        """Give (conditions, their gradients ``(n, D)``) in parts; after it, a site is a source of the later nodes."""
        matrices = self._matrices(node, local=True) or self._matrices(node, local=False)
        if matrices is None:
            raise PathwayError(_HIDDEN)
        slopes = self.graph.slopes.get(node.name)
        alive = node.plus[:0] if slopes is None else (slopes[node.entries] != 0).nonzero()[:, 0]
        kept = node.rates.new_empty(len(alive), self.graph.x.numel())
        filled = 0
        for part in torch.arange(len(node.gap), device=node.gap.device).split(1024):
            gradients = self._dense(matrices, node.plus[part])
            if node.minus is not None:
                gradients -= self._dense(matrices, node.minus[part])
            yield part, gradients
            if slopes is not None:
                slope = slopes[node.entries[part]]
                rows = (slope != 0).nonzero()[:, 0]
                kept[filled : filled + len(rows)] = gradients[rows] * slope[rows, None]
                filled += len(rows)
        if slopes is not None:
            places = torch.full_like(slopes, -1, dtype=torch.long)
            places[node.entries[alive]] = torch.arange(len(alive), device=places.device)
            rates = node.rates[0, alive] * slopes[node.entries[alive]]
            self.sources.append(_Source(self.graph.leaves[node.name], places, rates, kept))

    def _dense(self, matrices: list[_Sparse | None], entries: Tensor) -> Tensor:
        """Apply the chain rule to some of a node's entries: their gradients with respect to the image."""
        total = self.graph.x.new_zeros(len(entries), self.graph.x.numel())
        for matrix, source in zip(matrices, self.sources, strict=True):
            if matrix is not None:
                total += matrix[entries].to_dense() if source.gradients is None else matrix[entries] @ source.gradients
        return total.detach()

    def _matrices(self, node: _Node, *, local: bool) -> list[_Sparse | None] | None:
        """Return the derivatives of a node's entries by what moves in each source; None if a window was too small."""
        value = self.graph.values[node.name]
        leaves = [source.leaf for source in self.sources]
        _, row, column = torch.unravel_index(node.entries, _as_maps(node.shape))
        windows = _learn_windows(value, leaves) if local else [_everything(leaf) for leaf in leaves]
        reads = []
        for source, window in zip(self.sources, windows, strict=True):
            maps = _as_maps(source.leaf.shape[1:])
            places = source.places.view(maps[0], -1)
            position, inside = _window_positions(window, row, column, maps)
            reads.append((places, position, inside & (places >= 0).any(0)[position]))
        # Raster order makes the first colour that fits a good one.
        order = (row * (int(column.max()) + 1) + column).argsort(stable=True)
        colour = _colours([(position[order], read[order]) for _, position, read in reads])[order.argsort()]
        found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in leaves]
        for colours in torch.arange(int(colour.max()) + 1).split(_at_once(value, *leaves)):
            mine = ((colour >= colours[0]) & (colour <= colours[-1])).nonzero()[:, 0]
            seed = colour[mine] - colours[0]
            seeds = value.new_zeros(len(colours), value.numel())
            seeds[seed, node.entries[mine]] = 1
            for index, product in enumerate(_products(value, leaves, seeds)):
                if product is not None:
                    places, position, read = reads[index]
                    entry, where = read[mine].nonzero(as_tuple=True)
                    at = position[mine[entry], where]
                    channel, pair = (places[:, at] >= 0).nonzero(as_tuple=True)
                    values = product.view(len(colours), *places.shape)[seed[entry[pair]], channel, at[pair]]
                    found[index].append((mine[entry[pair]], places[channel, at[pair]], values))
        matrices = [
            _by_rows(parts, len(node.entries), len(source.rates)) if parts else None
            for parts, source in zip(found, self.sources, strict=True)
        ]
        return matrices if self._gives_rates(matrices, node.rates[0]) else None

    def _gives_rates(self, matrices: list[_Sparse | None], rates: Tensor) -> bool:
        expected, magnitude = torch.zeros_like(rates), torch.zeros_like(rates)
        for matrix, source in zip(matrices, self.sources, strict=True):
            if matrix is not None:
                row = torch.repeat_interleave(matrix.starts.diff())
                terms = matrix.values * source.rates[matrix.columns]
                expected.index_add_(0, row, terms)
                magnitude.index_add_(0, row, terms.abs())
        return bool(((expected - rates).abs() <= torch.finfo(rates.dtype).eps ** 0.5 * magnitude).all())


@dataclass(frozen=True)
class _Window:
    """Which positions of a source a position p reads along an axis: ``stride p + first`` and ``size - 1`` more."""

    stride: int
    first: int
    size: int


def _as_maps(shape: Sequence[int]) -> tuple[int, int, int]:
    """Read a shape as (channels, height, width); what is not an image has one position."""
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (prod(shape), 1, 1)


def _everything(leaf: Tensor) -> tuple[_Window, _Window]:
    _, height, width = _as_maps(leaf.shape[1:])
    return _Window(0, 0, height), _Window(0, 0, width)


def _learn_windows(value: Tensor, leaves: list[Tensor]) -> list[tuple[_Window, _Window]]:
    """Learn from two positions which window of each source a position reads, of size 0 where it reads nothing."""
    channels, height, width = _as_maps(value.shape[1:])
    if height * width == 1:
        return [_everything(leaf) for leaf in leaves]
    positions = [((height - 1) * k // 3, (width - 1) * k // 3) for k in (1, 2)]
    seeds = value.new_zeros(2, channels, height, width)
    weights = torch.linspace(1, 2, channels).to(value).sqrt()  # irregular, so that channels do not cancel
    for seed, (row, column) in zip(seeds, positions, strict=True):
        seed[:, row, column] = weights
    windows = []
    for leaf, product in zip(leaves, _products(value, leaves, seeds), strict=True):
        maps = _as_maps(leaf.shape[1:])
        if product is None or not bool(product.any()):
            windows.append((_Window(0, 0, 0), _Window(0, 0, 0)))
            continue
        read = product.view(2, *maps).any(1)
        rows = _learn_window(read.any(2), [row for row, _ in positions], height)
        columns = _learn_window(read.any(1), [column for _, column in positions], width)
        windows.append((rows, columns))
    return windows


def _learn_window(read: Tensor, positions: list[int], length: int) -> _Window:
    """Return the smallest window that holds what was ``read`` ``(2, source length)`` from the given positions."""
    stride = round(read.shape[1] / length)
    sample, place = read.nonzero(as_tuple=True)
    offsets = place - stride * torch.tensor(positions, device=place.device)[sample]
    return _Window(stride, int(offsets.min()), int(offsets.max() - offsets.min()) + 1)


def _window_positions(
    windows: tuple[_Window, _Window], row: Tensor, column: Tensor, maps: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return the flat positions in a source's map that (row, column) read, ``(n, w)``, and which of them exist."""
    axes = []
    for window, position, length in zip(windows, (row, column), maps[1:], strict=True):
        index = position[:, None] * window.stride + window.first + torch.arange(window.size, device=row.device)
        axes.append((index.clamp(0, length - 1), (index >= 0) & (index < length)))
    (rows, rows_inside), (columns, columns_inside) = axes
    position = rows[:, :, None] * maps[2] + columns[:, None, :]
    return position.flatten(1), (rows_inside[:, :, None] & columns_inside[:, None, :]).flatten(1)


def _colours(reads: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Number neurons so that no two of one number read the same position: each gets the first number that fits.

    Args:
        reads: per source, positions in its map ``(n, w)`` and which of them each neuron reads.
    """
    colours = []
    taken: list[dict[int, int]] = [{} for _ in reads]  # per source and position, one bit for each number
    lists = [(position.tolist(), read.tolist()) for position, read in reads]
    for neuron in range(len(reads[0][0])):
        mine = [
            (bits, at)
            for bits, (position, read) in zip(taken, lists, strict=True)
            for at, is_read in zip(position[neuron], read[neuron], strict=True)
            if is_read
        ]
        full = 0
        for bits, at in mine:
            full |= bits.get(at, 0)
        free = ~full & (full + 1)
        for bits, at in mine:
            bits[at] = bits.get(at, 0) | free
        colours.append(free.bit_length() - 1)
    return torch.tensor(colours, device=reads[0][0].device)


def _by_rows(parts: list[tuple[Tensor, Tensor, Tensor]], height: int, width: int) -> _Sparse:
    row, column, value = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = row.argsort(stable=True)
    starts = torch.cat([row.new_zeros(1), row.bincount(minlength=height).cumsum(0)])
    return _Sparse(starts, column[order], value[order], width)
