"""Watch and mask the neurons of a forward run: the only module that intercepts one.

A **site** is one call of a piecewise-linear activation (ReLU, ReLU6, leaky ReLU), counted in the order of
execution, so a module that is called twice is two sites and a functional call needs no module at all. Calls are
caught by a :class:`torch.overrides.TorchFunctionMode`; no hook is left behind, also when the run fails.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from .errors import PathwayError
from .pathway import Pathway, class_indices

Target = int | list[int] | Tensor | None
_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True)
class Site:
    """One activation call of a running network.

    Attributes:
        index: position in the order of execution.
        kind: ``"relu"``, ``"relu6"`` or ``"leaky_relu"``.
        function: the activation out of place, ``pre -> post``.
        in_place: whether the network asked for its own tensor to be overwritten.
    """

    index: int
    kind: str
    function: Callable[[Tensor], Tensor]
    in_place: bool

    @property
    def name(self) -> str:
        """Name of the site, such as ``relu_0``: its kind and its position in the run."""
        return f"{self.kind}_{self.index}"

    def activate(self, pre: Tensor) -> Tensor:
        """Apply the activation so that a backward pass works, also where ``pre`` is about to be overwritten."""
        # The backward pass of a ReLU reads its result, that of the others what they were given.
        return self.function(pre.clone() if self.in_place and self.kind != "relu" else pre)


@dataclass(frozen=True, eq=False)
class Activations:
    """What a forward run showed at its sites.

    Attributes:
        sites: name of each site, in the order of execution.
        kinds: activation of each site: ``"relu"``, ``"relu6"`` or ``"leaky_relu"``.
        pre: pre-activations z, one tensor ``(B, ...)`` per site.
        post: activations a, shaped like ``pre``.
        logits: response of the network ``(B, K)``.
    """

    sites: tuple[str, ...]
    kinds: tuple[str, ...]
    pre: tuple[Tensor, ...]
    post: tuple[Tensor, ...]
    logits: Tensor

    def active(self) -> Pathway:
        """Return the pathway of all neurons whose activation is not 0; its complement is the dead neurons."""
        return Pathway(tuple(a.detach() != 0 for a in self.post), self.sites)


Visitor = Callable[[Site, Tensor], Tensor]
"""Called at each site with the pre-activation; returns what the network goes on with.

At a site in place the pre-activation is about to be overwritten: a visitor that keeps it must clone it, and may
overwrite it itself.
"""


def _spellings() -> dict[Callable[..., Any], tuple[str, tuple[str, ...], bool]]:
    """Map every way to call an activation to (its name, its parameters in order, always in place?)."""
    inner = torch._C._nn  # the spellings without a public alias
    bounds = ("input", "min_val", "max_val")
    return {
        F.relu: ("relu", ("input", "inplace"), False),
        torch.relu: ("relu", ("input",), False),
        torch.Tensor.relu: ("relu", ("input",), False),
        torch.relu_: ("relu", ("input",), True),
        torch.Tensor.relu_: ("relu", ("input",), True),
        F.relu6: ("relu6", ("input", "inplace"), False),
        inner.relu6: ("relu6", ("input",), False),
        inner.relu6_: ("relu6", ("input",), True),
        # nn.ReLU6 is a hard tanh between 0 and 6.
        F.hardtanh: ("hardtanh", (*bounds, "inplace"), False),
        inner.hardtanh: ("hardtanh", bounds, False),
        inner.hardtanh_: ("hardtanh", bounds, True),
        F.leaky_relu: ("leaky_relu", ("input", "negative_slope", "inplace"), False),
        inner.leaky_relu: ("leaky_relu", ("input", "negative_slope"), False),
        inner.leaky_relu_: ("leaky_relu", ("input", "negative_slope"), True),
    }


_SPELLINGS = _spellings()


class _Interception(TorchFunctionMode):
    """Hand every activation call to a visitor; every other function runs as it is."""

    def __init__(self, visitor: Visitor) -> None:
        super().__init__()
        self.visitor = visitor
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _SPELLINGS:
            return func(*args, **kwargs)
        name, parameters, always_in_place = _SPELLINGS[func]
        call = dict(zip(parameters, args, strict=False)) | kwargs
        if name == "hardtanh" and (call.get("min_val"), call.get("max_val")) != (0, 6):
            return func(*args, **kwargs)
        _refuse_checkpointing()
        site = self._site(name, call, always_in_place or bool(call.get("inplace")))
        self.calls += 1
        given: Tensor = call["input"]
        result = self.visitor(site, given)
        # In place, the network may go on with the tensor it passed or with the one it gets back: both hold the result.
        return given.copy_(result) if site.in_place and result is not given else result

    def _site(self, name: str, call: dict[str, Any], in_place: bool) -> Site:
        if name == "relu":
            return Site(self.calls, "relu", torch.relu, in_place)
        if name == "leaky_relu":
            slope = call.get("negative_slope", 0.01)
            return Site(self.calls, "leaky_relu", lambda pre: F.leaky_relu(pre, slope), in_place)
        return Site(self.calls, "relu6", F.relu6, in_place)


def _refuse_checkpointing() -> None:
    """Raise where the run is inside an activation checkpoint, whose second run in the backward pass escapes us."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith(("torch/utils/checkpoint.py", "torch\\utils\\checkpoint.py")):
            raise PathwayError(
                "the network runs under activation checkpointing, which repeats its forward run unwatched in the "
                "backward pass; turn checkpointing off (for example model.gradient_checkpointing_disable())"
            )
        frame = frame.f_back  # type: ignore[assignment]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients for ``model``'s parameters; restore every ``requires_grad`` after it.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with frozen(layer):
        ...     layer.weight.requires_grad
        False
        >>> layer.weight.requires_grad
        True
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def copied(model: _Network) -> _Network:
    """Return a deep copy of a network, also of one that keeps tensors of its last run with their gradient graph.

    So does :func:`torch.nn.utils.weight_norm`, whose hook computes the weight in each run. The copy keeps such tensors
    without the graph.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> net.seen = net(torch.ones(1, 2))
        >>> net.seen.requires_grad, copied(net).seen.requires_grad
        (True, False)
    """
    kept = [tensor for module in model.modules() for tensor in tensors_of(vars(module)) if not tensor.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in kept})


def run(model: nn.Module, x: Tensor, visitor: Visitor, within: AbstractContextManager[object] | None = None) -> Tensor:
    """Run ``model`` on ``x`` with ``visitor`` called at every site; return the logits ``(B, K)``.

    The building block of everything that watches or changes activations. Parameters get no gradients; ``x`` gets
    them where it asks for them.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        visitor: gets the :class:`Site` and the pre-activation, returns what the network goes on with.
        within: a context that the network runs in; a function mode there sees every call before the visitor does.

    Raises:
        PathwayError: if ``model`` or ``x`` cannot be used, or no activation call was seen.
    """
    check_model(model, x)
    with frozen(model), _Interception(visitor) as interception, within or nullcontext():
        logits = model(x.clone())  # a network may change its input in place; the caller's images stay as they are
    if not interception.calls:
        raise PathwayError(
            f"no ReLU, ReLU6 or leaky ReLU call was seen while {type(model).__name__} ran; traced, scripted or "
            "compiled networks hide theirs (pass the original module), and other activations have no sites"
        )
    return checked_logits(model, x, logits)


def checked_logits(model: nn.Module, x: Tensor, logits: object) -> Tensor:
    """Return what ``model`` returned for ``x`` if it is finite logits."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise PathwayError(
            f"{type(model).__name__} returned {got}; a network must return logits of shape ({len(x)}, classes)"
        )
    if not bool(logits.detach().isfinite().all()):
        weights = [(name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor)]
        broken = next((name for name, value in weights if not bool(value.isfinite().all())), None)
        where = f"its weight {broken!r} holds NaN or infinity" if broken else "an overflow inside the network"
        raise PathwayError(f"{type(model).__name__} returned logits that are not finite: {where}")
    return logits


def observe(model: nn.Module, x: Tensor) -> Activations:
    """Run ``model`` on ``x`` and return its pre-activations, activations and logits.

    The recorded tensors are the observer's own: a network that changes an activation in place changes a copy. They
    carry a gradient graph where gradients are enabled and ``x`` requires them.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``, floating point.

    Returns:
        :class:`Activations`, one entry per activation call.

    Raises:
        PathwayError: if ``model`` or ``x`` cannot be used, or no activation call was seen.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> seen = observe(net, torch.rand(5, 2))
        >>> seen.sites, seen.post[0].shape, seen.logits.shape
        (('relu_0',), torch.Size([5, 3]), torch.Size([5, 2]))
    """
    sites, pre, post, logits = record(model, x, keep_pre=True)
    return Activations(tuple(site.name for site in sites), tuple(site.kind for site in sites), pre, post, logits)


def record(
    model: nn.Module, x: Tensor, *, keep_pre: bool
) -> tuple[tuple[Site, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Run ``model`` and return its sites, pre-activations (none unless ``keep_pre``), activations and logits.

    Cloning every activation would cost a fifth of the run. So the network gets the recorded tensors themselves, and
    where PyTorch's version counters show that it changed one, the run is repeated with clones.
    """
    for private in (False, True):
        recorder = _Recorder(keep_pre, private)
        logits = run(model, x, recorder)
        if recorder.untouched():
            break
    return tuple(recorder.sites), tuple(recorder.pre), tuple(recorder.post), logits


class _Recorder:
    """The visitor that keeps what it sees; ``private`` keeps clones that the network cannot reach."""

    def __init__(self, keep_pre: bool, private: bool) -> None:
        self.keep_pre = keep_pre
        self.private = private
        self.sites: list[Site] = []
        self.pre: list[Tensor] = []
        self.post: list[Tensor] = []
        self.versions: list[tuple[Tensor, int]] = []

    def __call__(self, site: Site, z: Tensor) -> Tensor:
        # Tensors of inference mode have no version counter. A view overwritten in place leaves our result behind: the
        # network may go on with what it is a view of.
        private = self.private or z.is_inference() or (site.in_place and z._is_view())
        overwrite = site.in_place and site.kind == "relu" and not (self.keep_pre or private)
        if (site.in_place and not overwrite) or (private and self.keep_pre):
            z = z.clone()
        a = torch.relu_(z) if overwrite else site.function(z)
        self.sites.append(site)
        self.post.append(a)
        if self.keep_pre:
            self.pre.append(z)
        if private:
            return a.clone()
        self.versions += [(tensor, tensor._version) for tensor in ((z, a) if self.keep_pre else (a,))]
        return a

    def untouched(self) -> bool:
        """Tell whether nothing recorded was changed since."""
        return all(tensor._version == version for tensor, version in self.versions)


@contextmanager
def masked(pathway: Pathway, *, runs: int | None = None) -> Iterator[None]:
    """Run every forward pass of the block inside the pathway network: each activation times its bit.

    Later sites see the masked values of earlier ones. A pathway of one entry serves a batch of any size.

    Args:
        pathway: one bit per neuron, ``(B, ...)`` per site.
        runs: number of forward passes in the block, to be held against the calls seen; None: any number.

    Raises:
        PathwayError: if the sites of the run differ from the pathway's.

    Equation: the pathway network Φ_P of *Neural Response Interpretation through the Lens of Critical Pathways*
    (CVPR 2021): a ← m ⊙ a at every site, m ∈ {0, 1}.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.rand(5, 2)
        >>> with masked(observe(net, x).active()):
        ...     same = bool((net(x) == net(x)).all())
        >>> same
        True
    """
    visitor = apply_mask(pathway)
    with _Interception(visitor) as interception:
        yield
    complete, rest = divmod(interception.calls, len(pathway.sites))
    if rest or not complete or (runs is not None and complete != runs):
        raise PathwayError(
            f"the pathway has {len(pathway.sites)} sites, but {interception.calls} activation calls were seen; "
            "run the network the pathway was made for, whole, inside masked(...)"
        )


def apply_mask(pathway: Pathway) -> Visitor:
    """Return the visitor that multiplies each activation by its bit (see :func:`masked`)."""

    def multiply(site: Site, z: Tensor) -> Tensor:
        position = site.index % len(pathway.sites)
        mask, name = pathway.masks[position], pathway.sites[position]
        fits = mask.shape[1:] == z.shape[1:] and mask.shape[0] in (1, z.shape[0])
        if not fits or name.rpartition("_")[0] != site.kind:
            raise PathwayError(
                f"site {position} of the run is a {site.kind} of shape {tuple(z.shape)}, but the pathway has "
                f"{name!r} of shape {tuple(mask.shape)} there; make the pathway with this network, for this batch"
            )
        if mask.device != z.device:
            raise PathwayError(
                f"the pathway is on {mask.device}, the run on {z.device}; use pathway.to({str(z.device)!r})"
            )
        if site.kind != "relu":
            # These map 0 to 0, so masking before the activation equals masking after it.
            return site.function(_times(z, mask))
        if torch._C._len_torch_function_stack() or z.dtype == torch.float16:
            # Inside another block the activation has to be called, so that the outer one sees it too. In half precision
            # it takes -infinity away, which no factor 0 does.
            return _times(site.function(z), mask)
        # ReLU and mask as one factor. The backward pass of torch.relu needs its result, which `h = relu(x); h += x`
        # overwrites; that of a product with bits needs only the bits.
        bits = _bits((z.detach() > 0).logical_and_(mask), z)
        return z.mul_(bits) if site.in_place else z * bits

    return multiply


def _times(a: Tensor, mask: Tensor) -> Tensor:
    if a.dtype == torch.float16:
        return a.masked_fill(~mask, 0)  # it overflows easily, and infinity times 0 is NaN
    return a * _bits(mask, a)


def _bits(mask: Tensor, like: Tensor) -> Tensor:
    # Bytes convert to floating point several times faster than bools.
    return mask.view(torch.uint8).to(like.dtype)


def gated(model: nn.Module, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Run ``model`` with each activation times its gate, a real number; return the logits.

    Gates that ask for gradients get them.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> gated(net, torch.rand(5, 2), [torch.zeros(5, 3)]).allclose(net[2].bias.expand(5, 2))
        True
    """
    return run(model, x, lambda site, z: site.activate(z) * gates[site.index])


def leaf(x: Tensor) -> Tensor:
    """Return a copy of ``x`` that asks for gradients; the original may have been made in inference mode.

    Example:
        >>> with torch.inference_mode():
        ...     x = torch.ones(2)
        >>> leaf(x).requires_grad
        True
    """
    refuse_inference_mode()
    return x.detach().clone().requires_grad_()


def refuse_inference_mode() -> None:
    """Raise :class:`PathwayError` inside ``torch.inference_mode()``, where nothing can ask for gradients."""
    if torch.is_inference_mode_enabled():
        raise PathwayError("torch.inference_mode() rules out gradients, which are needed here; use torch.no_grad()")


def check_model(model: nn.Module, x: Tensor) -> None:
    """Raise :class:`PathwayError` where ``model`` and ``x`` cannot be explained, saying what to do."""
    if not isinstance(x, Tensor):
        raise PathwayError(
            f"the images are a {type(x).__name__}; give a tensor of shape (batch, channels, height, width)"
        )
    if not x.is_floating_point():
        raise PathwayError(f"the images are {x.dtype}; give floating-point images, for example images.float() / 255")
    if x.ndim < 2 or not len(x):
        raise PathwayError(f"the images have shape {tuple(x.shape)}; give a batch of at least one: (batch, ...)")
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise PathwayError(
                "the network is wrapped in DataParallel, whose threads escape observation; pass model.module"
            )
        if module.training:
            where = f"its part {name!r} is" if name else "it is"
            raise PathwayError(
                f"{type(model).__name__} cannot be explained while {where} in training mode, where its answer is "
                "random or depends on the batch; call model.eval() first"
            )
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise PathwayError(f"the network is spread over {' and '.join(sorted(devices))}; move it to one: model.to(...)")
    parameter = next(model.parameters(), x)  # a network without parameters takes images of any kind
    if parameter.device != x.device or parameter.dtype != x.dtype:
        raise PathwayError(
            f"the network is {parameter.dtype} on {parameter.device}, the images are {x.dtype} on {x.device}; "
            f"use x.to({str(parameter.device)!r}, {parameter.dtype})"
        )
    # The sum is several times cheaper to test; it settles the question unless it overflows.
    if not bool(x.detach().sum().isfinite()) and not bool(x.detach().isfinite().all()):
        raise PathwayError("the images hold NaN or infinity; clean them first, for example with torch.nan_to_num")


def input_like(model: nn.Module) -> Tensor:
    """Return a tensor of the type and on the device that the network takes: float32 on the CPU without parameters."""
    return next(model.parameters(), torch.zeros(()))


def check_gradient(model: nn.Module, result: Tensor) -> None:
    """Raise :class:`PathwayError` where what the network returned knows nothing of the image."""
    if not result.requires_grad:
        raise PathwayError(
            f"{type(model).__name__} passes no gradient to the image: it runs, at least in part, under torch.no_grad()"
        )


def check_batch(x: Tensor, pathway: Pathway | None) -> None:
    """Raise :class:`PathwayError` where a pathway holds neither one input nor those of ``x``."""
    if pathway is not None and len(pathway) not in (1, len(x)):
        raise PathwayError(f"the pathway holds {len(pathway)} inputs, the batch {len(x)}; give as many, or one for all")


def response(logits: Tensor, target: Target = None) -> Tensor:
    """Return the response Φ_t(x), the logit of each input's target, shape ``(B,)``; see :func:`resolve_target`."""
    return logits.gather(1, resolve_target(logits, target)[:, None])[:, 0]


def resolve_target(logits: Tensor, target: Target = None) -> Tensor:
    """Return the target of each input as an index tensor ``(B,)``.

    Args:
        logits: ``(B, K)``.
        target: a class for all inputs, one per input (list or tensor), or None for the predicted class.

    Raises:
        PathwayError: if a target is not a class of the network, or their number is not that of the inputs.

    Example:
        >>> resolve_target(torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
        tensor([1, 0])
        >>> resolve_target(torch.zeros(2, 4), 0)
        tensor([0, 0])
    """
    count, classes = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    chosen = torch.as_tensor(target, device=logits.device)
    chosen = class_indices(chosen.expand(count) if chosen.ndim == 0 else chosen, count)
    if bool(((chosen < 0) | (chosen >= classes)).any()):
        raise PathwayError(f"target {chosen.tolist()} is out of range; the network has classes 0 to {classes - 1}")
    return chosen


def targets_of(model: nn.Module, x: Tensor, target: Target = None, batch_size: int | None = None) -> Tensor:
    """Run ``model`` in batches and return the target of each input, as :func:`resolve_target` does.

    The network may be any: it is not observed.

    Raises:
        PathwayError: if ``model`` or ``x`` cannot be used, or a target is out of range.
    """
    check_model(model, x)
    with torch.no_grad():
        parts = x.detach().split(batch_size or len(x))
        # A network may change its input in place, hence the clone.
        logits = torch.cat([checked_logits(model, part, model(part.clone())) for part in parts])
    return resolve_target(logits, target)


def per_input(numbers: Tensor, like: Tensor) -> Tensor:
    """Give one number per input, ``(B,)``, the dimensions of ``like`` ``(B, ...)``, to be multiplied with it."""
    return numbers.view(-1, *[1] * (like.ndim - 1))


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a nest of arguments or results."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
