"""The pathway: one bit per neuron and per input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from .errors import PathwayError
from .files import load_tensors, save_tensors

_FORMAT = "pathwaylib-pathway-1"


@dataclass(frozen=True, eq=False)
class Pathway:
    """Which neurons are kept, for each input of a batch.

    Attributes:
        masks: one bool tensor ``(B, ...)`` per site; True keeps the neuron.
        sites: name of each site, in the order of execution.
        targets: the class each input's pathway was selected for, int64 ``(B,)``, where a selector made it.

    Raises:
        PathwayError: if masks, sites and targets do not fit together.

    Example:
        >>> a = Pathway((torch.tensor([[True, True, False, False]]),), ("relu_0",))
        >>> b = Pathway((torch.tensor([[True, False, True, False]]),), ("relu_0",))
        >>> a.sizes, a.sparsity, a.iou(b)
        (tensor([2]), tensor([0.5000]), tensor([0.3333]))
        >>> (a & b).sizes, (a | b).sizes, (~a).sizes
        (tensor([1]), tensor([3]), tensor([2]))
    """

    masks: tuple[Tensor, ...]
    sites: tuple[str, ...]
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", tuple(self.masks))
        object.__setattr__(self, "sites", tuple(self.sites))
        if not self.masks or len(self.masks) != len(self.sites):
            raise PathwayError(
                f"{len(self.masks)} masks for {len(self.sites)} sites; give one mask per site, at least one"
            )
        for mask, site in zip(self.masks, self.sites, strict=True):
            if mask.dtype != torch.bool or mask.ndim < 2:
                raise PathwayError(
                    f"the mask of {site!r} is {mask.dtype} of shape {tuple(mask.shape)}; give bool tensors (batch, ...)"
                )
        if len({len(mask) for mask in self.masks}) > 1:
            raise PathwayError(f"the masks have different batch sizes: {[len(mask) for mask in self.masks]}")
        if self.targets is not None:
            object.__setattr__(self, "targets", class_indices(self.targets, len(self)))

    def __len__(self) -> int:
        """Return the number of inputs B."""
        return len(self.masks[0])

    def __repr__(self) -> str:
        kept = ", ".join(f"{share:.3f}" for share in (1 - self.sparsity[:3]).tolist())
        more = ", ..." if len(self) > 3 else ""
        return f"Pathway({len(self)} inputs, {len(self.sites)} sites, {self.neurons} neurons, kept share {kept}{more})"

    @property
    def neurons(self) -> int:
        """Number of neurons N of one input, all sites together."""
        return sum(mask.shape[1:].numel() for mask in self.masks)

    @property
    def site_sizes(self) -> Tensor:
        """Kept neurons per input and site, ``(B, S)``."""
        return torch.stack([mask.flatten(1).sum(1) for mask in self.masks], 1)

    @property
    def sizes(self) -> Tensor:
        """Kept neurons per input, ``(B,)``."""
        return self.site_sizes.sum(1)

    @property
    def sparsity(self) -> Tensor:
        """Removed share of the neurons per input, ``(B,)``: removed / N."""
        return 1 - self.sizes / self.neurons

    def flatten(self) -> Tensor:
        """Return all bits in site order as one bool tensor ``(B, N)``."""
        return torch.cat([mask.flatten(1) for mask in self.masks], 1)

    def iou(self, other: Pathway, *, per_site: bool = False) -> Tensor:
        """Return intersection over union with ``other``, input by input.

        Two empty pathways count as equal (1). A pathway of one input is compared with every input of the other.

        Args:
            other: a pathway over the same sites.
            per_site: keep the sites apart.

        Returns:
            ``(B,)``, or ``(B, S)`` per site, in [0, 1].

        Raises:
            PathwayError: if the pathways are of different networks or batch sizes.
        """
        both, either = (self & other).site_sizes, (self | other).site_sizes
        if not per_site:
            both, either = both.sum(1), either.sum(1)
        return torch.where(either > 0, both / either.clamp(min=1), 1.0)

    def frequency(self) -> tuple[Tensor, ...]:
        """Return, per site, the share of inputs that keep each neuron: float tensors without batch dimension."""
        return tuple(mask.float().mean(0) for mask in self.masks)

    def restrict(self, sites: Collection[int]) -> Pathway:
        """Return the pathway that masks these sites alone; at all others every neuron is kept.

        Args:
            sites: positions in the order of execution, such as ``range(2)`` for the first two.

        Raises:
            PathwayError: if there is no such site.

        Example:
            >>> pathway = Pathway((torch.tensor([[True, False]]), torch.tensor([[False, False]])), ("relu_0", "relu_1"))
            >>> pathway.restrict([0]).masks
            (tensor([[ True, False]]), tensor([[True, True]]))
        """
        if not set(sites) <= set(range(len(self.sites))):
            raise PathwayError(f"sites {sorted(sites)}; the pathway has the sites 0 to {len(self.sites) - 1}")
        masks = tuple(mask if index in sites else torch.ones_like(mask) for index, mask in enumerate(self.masks))
        return Pathway(masks, self.sites, self.targets)

    def __and__(self, other: Pathway) -> Pathway:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: Pathway) -> Pathway:
        return self._combine(other, torch.logical_or)

    def __invert__(self) -> Pathway:
        return Pathway(tuple(~mask for mask in self.masks), self.sites)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Pathway:
        """Return the pathways of some inputs; an integer keeps the batch dimension."""
        if isinstance(index, SupportsIndex) and not (isinstance(index, Tensor) and index.ndim):
            index = [int(index)]  # also numpy's integers and tensors of no dimension
        targets = None if self.targets is None else self.targets[index]
        return Pathway(tuple(mask[index] for mask in self.masks), self.sites, targets)

    @classmethod
    def cat(cls, parts: Sequence[Pathway]) -> Pathway:
        """Put the pathways of several batches together.

        Raises:
            PathwayError: if there are none, or they are of different networks.

        Example:
            >>> part = Pathway((torch.tensor([[True, False]]),), ("relu_0",))
            >>> Pathway.cat([part, ~part]).masks[0].int()
            tensor([[1, 0],
                    [0, 1]], dtype=torch.int32)
        """
        if not parts:
            raise PathwayError("there are no pathways to put together; give at least one")
        for part in parts[1:]:
            _check_same_network(parts[0], part)
        targets = [part.targets for part in parts if part.targets is not None]
        return cls(
            tuple(torch.cat(masks) for masks in zip(*(part.masks for part in parts), strict=True)),
            parts[0].sites,
            torch.cat(targets) if len(targets) == len(parts) else None,
        )

    def to(self, device: torch.device | str) -> Pathway:
        """Return the pathway on ``device``."""
        targets = None if self.targets is None else self.targets.to(device)
        return Pathway(tuple(mask.to(device) for mask in self.masks), self.sites, targets)

    def _combine(self, other: Pathway, operation: Callable[[Tensor, Tensor], Tensor]) -> Pathway:
        if not isinstance(other, Pathway):
            raise TypeError(f"a pathway cannot be combined with a {type(other).__name__}")
        _check_same_network(self, other)
        if len(self) != len(other) and 1 not in (len(self), len(other)):
            raise PathwayError(f"the pathways hold {len(self)} and {len(other)} inputs; compare equal numbers, or one")
        return Pathway(tuple(operation(a, b) for a, b in zip(self.masks, other.masks, strict=True)), self.sites)

    def save(self, path: str | PathLike[str]) -> None:
        """Store the pathway as bit-packed safetensors, one bit per neuron, atomically.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp()) / "pathway.safetensors"
            >>> Pathway((torch.eye(3, dtype=torch.bool),), ("relu_0",)).save(path)
            >>> Pathway.load(path).masks[0].int()
            tensor([[1, 0, 0],
                    [0, 1, 0],
                    [0, 0, 1]], dtype=torch.int32)
        """
        packed = {
            f"{index:04d}": torch.from_numpy(np.packbits(mask.cpu().numpy().ravel()))
            for index, mask in enumerate(self.masks)
        }
        if self.targets is not None:
            packed["targets"] = self.targets
        shapes = [list(mask.shape) for mask in self.masks]
        metadata = {"format": _FORMAT, "sites": json.dumps(self.sites), "shapes": json.dumps(shapes)}
        save_tensors(Path(path), packed, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Pathway:
        """Read a pathway that :meth:`save` wrote; nothing in the file is executed.

        Raises:
            FileNotFoundError: if there is no such file.
            PathwayError: if the file is damaged or not a pathway.
        """
        tensors, metadata = load_tensors(Path(path))
        try:
            if metadata.get("format") != _FORMAT:
                raise ValueError("pathways are written by Pathway.save")
            sites, shapes = json.loads(metadata["sites"]), json.loads(metadata["shapes"])
            if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
                raise ValueError("the names of the sites are no names")
            masks = tuple(_unpacked(tensors[f"{index:04d}"], shape) for index, shape in enumerate(shapes))
            if not any(math.prod(mask.shape[1:]) for mask in masks):
                raise ValueError("no site has a neuron")  # the number of inputs would be any number
            targets = tensors.get("targets")
            if targets is not None and targets.dtype != torch.int64:
                raise ValueError(f"targets are {targets.dtype}")
            return cls(masks, tuple(sites), targets)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PathwayError(f"{path} is damaged or not a pathway file ({error}); write it again") from error


def _unpacked(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask that a file says to have this shape, if it holds as many bits."""
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"a mask of shape {shape}")
    count = math.prod(shape)
    # The shape as a whole: of (2 ** 40, 0) the length alone promises bits that are not there.
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(f"{packed.dtype} of shape {tuple(packed.shape)} for a mask of shape {shape}")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).view(shape)


def holds_integers(numbers: Tensor) -> bool:
    """Tell whether a tensor is of an integer type.

    Example:
        >>> [holds_integers(torch.tensor(number)) for number in (1, 1.0, True)]
        [True, False, False]
    """
    return not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)


def class_indices(targets: Tensor, count: int) -> Tensor:
    """Return the targets of ``count`` inputs as int64.

    Raises:
        PathwayError: if they are no integers, or not as many.

    Example:
        >>> class_indices(torch.tensor([3, 1], dtype=torch.uint8), 2)
        tensor([3, 1])
    """
    if not holds_integers(targets):
        raise PathwayError(f"the targets are {targets.dtype}; give class indices as integers")
    if targets.shape != (count,):
        raise PathwayError(f"targets of shape {tuple(targets.shape)} for {count} inputs; give one class per input")
    return targets.long()


def split_sites(flat: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Take what :meth:`Pathway.flatten` joins apart again: ``(B, N)`` into one tensor ``(B, ...)`` per site.

    Example:
        >>> [part.tolist() for part in split_sites(torch.arange(6)[None], [(2,), (2, 2)])]
        [[[0, 1]], [[[2, 3], [4, 5]]]]
    """
    parts = flat.split([math.prod(shape) for shape in shapes], 1)
    return tuple(part.reshape(len(flat), *shape) for part, shape in zip(parts, shapes, strict=True))


def _check_same_network(one: Pathway, other: Pathway) -> None:
    shapes = [[mask.shape[1:] for mask in pathway.masks] for pathway in (one, other)]
    if one.sites != other.sites or shapes[0] != shapes[1]:
        raise PathwayError(f"the pathways are of different networks: sites {_outline(one)} against {_outline(other)}")


def _outline(pathway: Pathway) -> str:
    return ", ".join(f"{site}{tuple(mask.shape[1:])}" for site, mask in zip(pathway.sites, pathway.masks, strict=True))
