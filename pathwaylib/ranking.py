"""Keep the largest: exactly k neurons per input, over all sites together, with ties broken position-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import PathwayError
from .pathway import split_sites


def kept_neurons(neurons: int, sparsity: float) -> int:
    """Return k, how many of ``neurons`` a pathway of this sparsity keeps: ``round((1 - sparsity) * neurons)``.

    Raises:
        PathwayError: if ``sparsity`` is outside [0, 1).

    Example:
        >>> kept_neurons(122_880, 0.9)
        12288
    """
    if not 0 <= sparsity < 1:
        raise PathwayError(f"sparsity is {sparsity}; give a number in [0, 1), for example 0.9 to keep a tenth")
    # Exact: 1 - 0.9 in floating point lies below a tenth and can round the wrong way.
    return round((1 - Fraction(str(sparsity))) * neurons)


def largest(scores: Sequence[Tensor], k: int | Sequence[int]) -> tuple[Tensor, ...]:
    """Mark, per input, the ``k`` entries of largest absolute value that are not 0; see :meth:`Contributions.top`.

    Args:
        scores: one tensor ``(B, ...)`` per site.
        k: entries to keep per input over all sites together, at most N: one number for all, or one for each.

    Returns:
        Bool tensors shaped like ``scores``.

    Example:
        >>> largest([torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[-2.0, 0.0], [5.0, 0.0]])], 2)
        (tensor([[ True, False],
                [False, False]]), tensor([[ True, False],
                [ True, False]]))
    """
    shapes = [score.shape[1:] for score in scores]
    sizes = [shape.numel() for shape in shapes]
    batch, device = len(scores[0]), scores[0].device
    precision = torch.float64 if scores[0].dtype == torch.float64 else torch.float32
    kept = torch.zeros(batch, sum(sizes), dtype=torch.bool, device=device)
    # One image at a time through the same memory: for large networks, touching fresh memory costs more than sorting.
    magnitude = torch.empty(sum(sizes), dtype=precision, device=device)
    mark = _mark_on_cpu if device.type == "cpu" else _mark
    parts = magnitude.split(sizes)
    for image, (marks, wanted) in enumerate(zip(kept, [k] * batch if isinstance(k, int) else k, strict=True)):
        if not wanted:
            continue
        for part, score in zip(parts, scores, strict=True):
            torch.abs(score[image].detach().flatten().to(precision), out=part)
        border, count = mark(magnitude, wanted, marks)
        if count > wanted:
            tied = (magnitude == border).nonzero()[:, 0]
            marks[tied[_scatter(tied).argsort(descending=True)[: count - wanted]]] = False
    return split_sites(kept, shapes)


def _scatter(indices: Tensor) -> Tensor:
    """Give each index its place in a fixed, random-looking order: the one-to-one mixing of splitmix64 (Steele, 2014).

    Unlike a stored permutation it costs nothing for the indices nobody asks about.
    """
    mixed = indices + 0x1E3779B97F4A7C15
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # int64 products wrap around; the mask makes the arithmetic shift a logical one.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed ^ ((mixed >> 31) & ((1 << 33) - 1))


def _mark(magnitude: Tensor, k: int, marks: Tensor) -> tuple[float, int]:
    """Mark the positive entries at or above the k-th largest; return that border and the number of marks."""
    border = float(magnitude.topk(k, sorted=False).values.amin())
    marks.copy_(magnitude >= max(border, _least(magnitude)))
    return border, int(marks.count_nonzero())


def _mark_on_cpu(magnitude: Tensor, k: int, marks: Tensor) -> tuple[float, int]:
    """Do what :func:`_mark` does with numpy, whose selection and comparisons are several times faster on the CPU."""
    values = everything = magnitude.numpy()
    # A sample bounds the border from below (by four standard deviations): few values are left to select from.
    step = max(1, len(everything) // 8192)
    sample = everything[::step]
    above = int(k / step + 4 * math.sqrt(k / step)) + 1
    if above < len(sample):
        candidates = np.compress(everything >= _kth_largest(sample, above), everything)
        if len(candidates) >= k:
            values = candidates
    border = _kth_largest(values, k)
    np.greater_equal(everything, max(border, _least(magnitude)), out=marks.numpy())
    return border, int(np.count_nonzero(marks.numpy()))


def _kth_largest(values: NDArray[np.floating[Any]], k: int) -> float:
    # Negated, because numpy is ten times slower where the many zeros of dead neurons come first.
    return -float(np.partition(-values, k - 1)[k - 1])


def _least(values: Tensor) -> float:
    """Return the least positive number (a subnormal one): a border of 0 then marks what is above 0 and nothing else."""
    limits = torch.finfo(values.dtype)
    return float(limits.smallest_normal * limits.eps)
