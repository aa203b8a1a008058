"""From scores to bits, so that a gradient comes back: the distance-aware quantiser, and the straight-through one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import PathwayError


class Quantizer(Protocol):
    """What every quantiser is: scores (any shape) to masks in [0, 1], with a gradient; 0 is the border."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Return a mask of the scores' shape."""
        ...


@dataclass(frozen=True)
class DistanceAwareQuantizer:
    """Soft argmax over the distances to 0 and 1, as sharp as the score's own distance from the border allows.

    A score s gives u = σ(s) in (0, 1), with the distances u to the bit 0 and 1 − u to the bit 1. A soft argmax with a
    fixed temperature would leave every score near the border half a bit. Here the sharpness β adapts to the gap of
    the two distances, ``β = γ / |2u − 1|``, at most ``sharpest``; then the soft argmax is the same for all scores with
    a gap above γ / ``sharpest``, and after rescaling it *is* the bit. Only scores next to the border stay soft. No
    gradient flows through β, so the slope is positive everywhere, and steep near the border.

    Attributes:
        gamma: sharpness of the soft argmax in units of the gap, above 0. Large values let little gradient through.
        sharpest: largest β, at least ``gamma``.

    Raises:
        PathwayError: if a parameter is out of range.

    Equation: ``m = (σ(β (2u − 1)) − σ(−γ)) / (σ(γ) − σ(−γ))``, ``u = σ(s)``, ``β = min(γ / |2u − 1|, β_max)``.

    Source: Kim, Lee, Ham, *Distance-aware Quantization* (ICCV 2021), for the two levels 0 and 1; used for pathways by
    Lin et al., *On Model Explanations with Transferable Neural Pathways* (2023).

    Example:
        >>> DistanceAwareQuantizer()(torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])).mul(100).round()
        tensor([  0.,   0.,  50., 100., 100.])
    """

    gamma: float = 2.0
    sharpest: float = 40.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= self.sharpest:
            raise PathwayError(
                f"gamma is {self.gamma}, sharpest {self.sharpest}; give a gamma above 0 and sharpest at least as large"
            )

    def __call__(self, scores: Tensor) -> Tensor:
        """Return a mask of the scores' shape."""
        gap = 2 * scores.sigmoid() - 1
        beta = (self.gamma / gap.detach().abs().clamp(min=self.gamma / self.sharpest)).to(gap.dtype)
        edge = torch.tensor(self.gamma, dtype=gap.dtype, device=gap.device)
        # σ(z) = (1 + tanh(z/2)) / 2, so the rescaling to [0, 1] is a quotient of two tanh.
        return (1 + (beta * gap / 2).tanh() / (edge / 2).tanh()) / 2


@dataclass(frozen=True)
class StraightThroughQuantizer:
    """The bit in the forward run, the slope of a sigmoid in the backward run.

    Source: Bengio, Léonard, Courville, *Estimating or Propagating Gradients Through Stochastic Neurons* (2013).

    Example:
        >>> StraightThroughQuantizer()(torch.tensor([-3.0, 0.5]))
        tensor([0., 1.])
    """

    def __call__(self, scores: Tensor) -> Tensor:
        """Return a mask of the scores' shape."""
        soft = scores.sigmoid()
        return (scores > 0).to(soft.dtype) + soft - soft.detach()
