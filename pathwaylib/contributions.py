"""How much each neuron contributes to the response: one score per neuron, all sites together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import PathwayError
from .neurons import Target, check_model, record, resolve_target, response
from .pathway import Pathway


@dataclass(frozen=True, eq=False)
class Contributions:
    """One signed score per neuron and input, in units of the response.

    Attributes:
        scores: one tensor ``(B, ...)`` per site.
        sites: name of each site, in the order of execution.
        targets: the class whose response is explained, int64 ``(B,)``.
    """

    scores: tuple[Tensor, ...]
    sites: tuple[str, ...]
    targets: Tensor | None = None

    def top(self, sparsity: float) -> Pathway:
        """Keep, per input, the neurons of largest absolute score over all sites together.

        Exactly ``round((1 - sparsity) N)`` neurons are kept (halves round to even), except that a neuron whose
        score is 0 is never kept: where fewer neurons score above 0 the pathway is smaller, as ``Pathway.sizes``
        tells. Neurons that tie at the border are kept in a fixed, scattered order of the positions,
        which favours no position and does not depend on the rest of the batch.

        Args:
            sparsity: share of the neurons to remove, in [0, 1).

        Raises:
            PathwayError: if ``sparsity`` is out of range.

        Example:
            >>> scores = Contributions((torch.tensor([[0.1, -3.0, 0.0, 2.0]]),), ("relu_0",))
            >>> scores.top(0.5).masks[0]
            tensor([[False,  True, False,  True]])
        """
        neurons = sum(score[0].numel() for score in self.scores)
        return Pathway(largest(self.scores, kept_neurons(neurons, sparsity)), self.sites, self.targets)


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


def largest(scores: Sequence[Tensor], k: int) -> tuple[Tensor, ...]:
    """Mark, per input, the ``k`` entries of largest absolute value that are not 0; see :meth:`Contributions.top`.

    Args:
        scores: one tensor ``(B, ...)`` per site.
        k: entries to keep per input over all sites together, at most N.

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
    for image, marks in enumerate(kept if k else ()):
        for part, score in zip(parts, scores, strict=True):
            torch.abs(score[image].detach().flatten().to(precision), out=part)
        border, count = mark(magnitude, k, marks)
        if count > k:
            tied = (magnitude == border).nonzero()[:, 0]
            marks[tied[_scatter(tied).argsort(descending=True)[: count - k]]] = False
    return tuple(part.unflatten(1, shape) for part, shape in zip(kept.split(sizes, 1), shapes, strict=True))


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


def taylor(model: nn.Module, x: Tensor, target: Target = None) -> Contributions:
    """First-order estimate of what the response loses without each neuron, all sites in one backward pass.

    For a linear readout the estimate is exact; where later activations switch, it is not.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        target: class or classes to explain; None means the predicted class.

    Returns:
        :class:`Contributions`, signed, in units of the response.

    Raises:
        PathwayError: as :func:`pathwaylib.observe`, and if a target is out of range.

    Equation: c_j = a_j ∂Φ_t(x)/∂a_j. Its absolute value is the marginal contribution (NeuronMCT).

    Source: Khakzar et al., CVPR 2021, section 3; Molchanov et al., CVPR 2019.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.rand(1, 2)
        >>> scores = taylor(net, x, target=0)
        >>> lost = net(x)[0, 0] - net[2].bias[0]  # what the response loses without all three neurons
        >>> torch.allclose(scores.scores[0].sum(), lost, atol=1e-6)
        True
    """
    check_model(model, x)
    with torch.enable_grad():
        sites, _, post, logits = record(model, x.detach().requires_grad_(), keep_pre=False)
        targets = resolve_target(logits, target)
        # Down to the sites and not to the image: the first layer's backward pass is saved.
        gradients = torch.autograd.grad(response(logits, targets).sum(), post, materialize_grads=True)
    scores = tuple(a.detach() * gradient for a, gradient in zip(post, gradients, strict=True))
    return Contributions(scores, tuple(site.name for site in sites), targets)
