"""The gradients of all conditions by the chain rule over sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ..errors import PathwayError
from ..pathway import Pathway
from .conditions import HIDDEN, Graph, Node, Probe, at_once, products


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


class Chain:
    """Gradients of all conditions of a run, node by node, each computed from those of the sites before it.

    Between two sites a network is local: an activation reads a small window of the one before. So one vector-Jacobian
    product serves many neurons whose windows are apart (Curtis, Powell and Reid, 1974), and of its result only the
    columns of activations that move count. Windows are learnt from a few neurons; where the matrix found with them
    does not give the rates that the probe saw, every neuron gets a product of its own.
    """

    def __init__(self, model: nn.Module, image: Tensor, pathway: Pathway | None, probe: Probe) -> None:
        self.probe = probe
        self.graph = Graph(model, image, pathway, cut=True)
        everything = torch.arange(image.numel(), device=image.device)
        self.sources = [_Source(self.graph.x, everything, probe.directions.flatten(), None)]

    def gradients(self, node: Node) -> Iterator[tuple[Tensor, Tensor]]:
        """Give (conditions, their gradients ``(n, D)``) in parts; after it, a site is a source of the later nodes."""
        matrices = self._matrices(node, local=True) or self._matrices(node, local=False)
        if matrices is None:
            raise PathwayError(HIDDEN)
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

    def _matrices(self, node: Node, *, local: bool) -> list[_Sparse | None] | None:
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
        for colours in torch.arange(int(colour.max()) + 1).split(at_once(value, *leaves)):
            mine = ((colour >= colours[0]) & (colour <= colours[-1])).nonzero()[:, 0]
            seed = colour[mine] - colours[0]
            seeds = value.new_zeros(len(colours), value.numel())
            seeds[seed, node.entries[mine]] = 1
            for index, product in enumerate(products(value, leaves, seeds)):
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
    for leaf, product in zip(leaves, products(value, leaves, seeds), strict=True):
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
