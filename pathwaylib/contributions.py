"""How much each neuron contributes to the response: one score per neuron, all sites together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from .errors import PathwayError
from .neurons import Target, check_model, record, resolve_target, response
from .pathway import Pathway


@dataclass(frozen=True, eq=False)
class Contributions:
    """One signed score per neuron and input, in units of the response.

    Attributes:
        flat: the scores of all sites side by side, ``(B, N)``, sites in the order of execution.
        shapes: shape of each site without the batch dimension; their sizes add up to N.
        sites: name of each site.
        targets: the class whose response is explained, int64 ``(B,)``.
    """

    flat: Tensor
    shapes: tuple[torch.Size, ...]
    sites: tuple[str, ...]
    targets: Tensor | None = None

    @property
    def scores(self) -> tuple[Tensor, ...]:
        """The scores by site: views of ``flat``, one ``(B, ...)`` per site."""
        return _split(self.flat, self.shapes)

    def top(self, sparsity: float) -> Pathway:
        """Keep, per input, the neurons of largest absolute score over all sites together.

        Exactly ``round((1 - sparsity) N)`` neurons are kept (halves round to even), except that a neuron whose
        score is 0 is never kept: where fewer neurons score above 0 the pathway is smaller, as ``Pathway.sizes``
        tells. Neurons that tie at the border are kept in the order of a fixed random permutation of all neurons,
        which favours no position and does not depend on the rest of the batch.

        Args:
            sparsity: share of the neurons to remove, in [0, 1).

        Raises:
            PathwayError: if ``sparsity`` is out of range.

        Example:
            >>> scores = Contributions(torch.tensor([[0.1, -3.0, 0.0, 2.0]]), (torch.Size([4]),), ("relu_0",))
            >>> scores.top(0.5).masks[0]
            tensor([[False,  True, False,  True]])
        """
        kept = largest(self.flat, kept_neurons(self.flat.shape[1], sparsity))
        return Pathway(_split(kept, self.shapes), self.sites, self.targets)


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    parts = flat.split([shape.numel() for shape in shapes], 1)
    return tuple(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))


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


def largest(scores: Tensor, k: int) -> Tensor:
    """Mark the ``k`` entries of each row that are largest in absolute value and not 0; see :meth:`Contributions.top`.

    Args:
        scores: ``(B, N)``.
        k: entries to keep per row, at most N.

    Returns:
        Bool tensor ``(B, N)``.

    Example:
        >>> largest(torch.tensor([[3.0, 1.0, -2.0, 0.0], [0.0, 0.0, 5.0, 0.0]]), 2)
        tensor([[ True, False,  True, False],
                [False, False,  True, False]])
    """
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    kept = torch.zeros_like(scores, dtype=torch.bool)
    magnitude = torch.empty_like(scores[0])  # one row's worth of memory, touched again and again
    for row, row_kept in zip(scores, kept, strict=True) if k else ():
        torch.abs(row, out=magnitude)
        border = _kth_largest(magnitude, k)
        # The least positive number lets a border of 0 keep what is above it and nothing else.
        torch.ge(magnitude, max(border, torch.finfo(scores.dtype).smallest_normal), out=row_kept)
        excess = int(row_kept.count_nonzero()) - k
        if excess > 0:
            tied = (magnitude == border).nonzero()[:, 0]
            rank = torch.randperm(len(row), generator=torch.Generator().manual_seed(0)).to(tied.device)[tied]
            row_kept[tied[rank.argsort(descending=True)[:excess]]] = False
    return kept


def _kth_largest(values: Tensor, k: int) -> float:
    """Return the k-th largest of ``values`` ``(N,)``; on the CPU by numpy, whose selection is several times faster."""
    if values.device.type != "cpu":
        return float(values.topk(k, sorted=False).values.amin())
    everything = values.numpy()
    # A sample bounds the answer from below (by four standard deviations): few values are left to select from.
    step = max(1, len(everything) // 8192)
    sample = everything[::step]
    above = int(k / step + 4 * math.sqrt(k / step)) + 1
    if above < len(sample):
        bound = np.partition(sample, len(sample) - above)[len(sample) - above]
        candidates = np.compress(everything >= bound, everything)
        if len(candidates) >= k:
            everything = candidates
    return float(np.partition(everything, len(everything) - k)[len(everything) - k])


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
    with torch.enable_grad():
        check_model(model, x)
        sites, _, post, logits = record(model, x.detach().requires_grad_(), keep_pre=False)
        targets = resolve_target(logits, target)
        gradients = torch.autograd.grad(response(logits, targets).sum(), post, materialize_grads=True)
    shapes = tuple(a.shape[1:] for a in post)
    flat = logits.new_empty(len(x), sum(shape.numel() for shape in shapes))
    for part, a, gradient in zip(_split(flat, shapes), post, gradients, strict=True):
        torch.mul(a.detach(), gradient, out=part)
    return Contributions(flat, shapes, tuple(site.name for site in sites), targets)
