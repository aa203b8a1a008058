"""Follow a run and refuse what is not known to be piecewise linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ..errors import PathwayError
from ..neurons import Site, apply_mask, run, tensors_of
from ..pathway import Pathway

KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0)}


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
_ANOTHER = "make the pathway with this network"


class Watch(TorchFunctionMode, ABC):
    """Visitor and function mode of one run: shown every site and every max-pooling; refuses what may not be linear.

    :meth:`follow` uses it as both, for a whole network. Only values that move with the image are of interest:
    those that carry a tangent or a gradient graph.
    """

    def __init__(self, pathway: Pathway | None = None) -> None:
        super().__init__()
        self.visit = (lambda site, z: site.function(z)) if pathway is None else apply_mask(pathway)
        self.masks = None if pathway is None else pathway.masks
        self.sites = 0
        self.pools = 0

    def __call__(self, site: Site, z: Tensor) -> Tensor:
        """Count the site and pass it on."""
        self.sites += 1
        if self.masks is not None and self.sites > len(self.masks):
            raise PathwayError(f"the run has more sites than the pathway, {len(self.masks)}; {_ANOTHER}")
        return self.at_site(site, z)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        sites = self.sites
        depends = [moves(tensor) for tensor in tensors_of((args, kwargs))]
        if not any(depends):
            return self.call(func, args, kwargs)
        name = name_of(func)
        if _normalises_by_batch(name, args, kwargs):
            raise _not_linear(name)  # before PyTorch, which wants more than one image
        result = self.call(func, args, kwargs)
        if self.sites != sites:
            return result
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

    def follow(self, model: nn.Module, x: Tensor) -> Tensor:
        """Run ``model`` on ``x``, watched; return the logits."""
        logits = run(model, x, self, within=self)
        if self.masks is not None and self.sites < len(self.masks):
            raise PathwayError(f"the run has {self.sites} sites, the pathway {len(self.masks)}; {_ANOTHER}")
        return logits

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one of the network's calls."""
        return func(*args, **kwargs)

    def kept(self, site: Site, z: Tensor) -> Tensor:
        """Return the mask of the site's kept neurons, to be broadcast over the batch."""
        return z.new_ones(1, *z.shape[1:], dtype=torch.bool) if self.masks is None else self.masks[site.index]

    @abstractmethod
    def at_site(self, site: Site, z: Tensor) -> Tensor:
        """Note a site; return what the network goes on with."""

    @abstractmethod
    def at_pool(self, name: str, windows: Tensor, given: Tensor) -> None:
        """Note a max-pooling of ``given`` ``(B, C, H, W)``; see :func:`_windows`."""


def require_single(x: Tensor) -> None:
    """Raise where rounding would hide the kinks, and move the borders of the regions."""
    if torch.finfo(x.dtype).bits < 32:
        raise PathwayError(f"the network is {x.dtype}, too coarse to find its kinks; use float32, better float64")


def moves(tensor: Tensor) -> bool:
    """Tell whether a tensor depends on the image: it has a gradient graph or a tangent."""
    return tensor.requires_grad or forward_ad.unpack_dual(tensor).tangent is not None


def name_of(func: Callable[..., Any]) -> str:
    """Return the name a torch function is called by."""
    name: str = getattr(func, "__name__", repr(func))
    return getattr(func, "__self__", func).__name__ if name == "__get__" else name  # a property goes by its own name


def _normalises_by_batch(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a call is a batch normalisation without running statistics, which evaluation mode has, too."""
    return name == "batch_norm" and bool(kwargs.get("training", args[5] if len(args) > 5 else False))


def _not_linear(name: str) -> PathwayError:
    return PathwayError(
        f"the network calls {name} on values that depend on the image, which is not known to be piecewise linear; "
        "ReLU, ReLU6, leaky ReLU, 2-d max-pooling and functions linear in evaluation mode (convolution, batch "
        "normalisation, average pooling, sums, ...) are"
    )


def _check_linear(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], depends: int, result: Any) -> None:
    """Raise where a call of which ``depends`` tensors depend on the image is not known to be linear in them."""
    plain = name.replace("_", "")
    if plain in _CONSTANT:
        return
    linear = plain in _LINEAR or (plain in _LINEAR_IN_ONE and depends == 1)
    if plain in ("div", "truediv", "divide", "idiv", "itruediv"):
        linear = linear and moves(args[0]) and not kwargs.get("rounding_mode")
    if plain in _LINEAR_IN_EVAL:
        linear = depends == 1
    if not linear:
        raise _not_linear(name)
    results = tensors_of(result)
    if plain != "setitem" and not (results and all(moves(tensor) for tensor in results)):
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
            kernel = pair(call["kernel_size"])[axis]
            stride = pair(call.get("stride") or call["kernel_size"])[axis]
            padding, dilation = pair(call.get("padding", 0))[axis], pair(call.get("dilation", 1))[axis]
            index = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel) * dilation
            index[(index < 0) | (index >= size)] = -1
        axes.append(index)
    rows, columns = axes[0][:, None, :, None], axes[1][None, :, None, :]
    index = torch.where((rows < 0) | (columns < 0), -1, rows * given.shape[3] + columns)
    return index.flatten(2).flatten(0, 1).to(given.device)


def pair(value: int | Sequence[int]) -> Sequence[int]:
    """Spell out what PyTorch takes for both axes of a map."""
    if isinstance(value, int):
        return (value, value)
    return value if len(value) == 2 else (value[0], value[0])


def gather(maps: Tensor, windows: Tensor, padding: float) -> Tensor:
    """Return the entries of each window, ``(B, C, windows, entries)``."""
    return maps.flatten(2)[..., windows.clamp(min=0)].masked_fill(windows < 0, padding)
