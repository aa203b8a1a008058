"""Selectors: each takes a network and images and returns one pathway per image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from .contributions import Contributions, integrated_gradients, taylor
from .neurons import Target, observe, resolve_target
from .pathway import Pathway
from .ranking import kept_neurons


class Selector(Protocol):
    """What every selector is: ``selector(model, x, target=None) -> Pathway``."""

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        """Return the pathway of each image of ``x`` for its target (None: the predicted class)."""
        ...


@dataclass(frozen=True)
class NeuronMCT:
    """Keep the neurons of largest marginal contribution ``|a ∂Φ_t/∂a|`` over all sites together.

    One forward and one backward pass. Neurons that are dead on the image score 0 and are never kept.

    Attributes:
        sparsity: share of the neurons to remove, in [0, 1).

    Raises:
        PathwayError: if ``sparsity`` is out of range, or as :func:`pathwaylib.taylor`.

    Source: Khakzar et al., *Neural Response Interpretation through the Lens of Critical Pathways* (CVPR 2021).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> pathway = NeuronMCT(sparsity=0.9)(net, torch.rand(2, 4))
        >>> pathway.sizes
        tensor([1, 1])
    """

    sparsity: float = 0.9

    def __post_init__(self) -> None:
        kept_neurons(1, self.sparsity)

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        """Return the pathway of each image of ``x`` for its target (None: the predicted class)."""
        return taylor(model, x, target).top(self.sparsity)


@dataclass(frozen=True)
class NeuronIntGrad:
    """Keep the neurons of largest integrated gradient ``|a ∫ ∂Φ_t/∂a (α a) dα|`` over all sites together.

    ``n_steps`` forward and backward passes per site. Neurons that are dead on the image score 0 and are never kept.

    Attributes:
        sparsity: share of the neurons to remove, in [0, 1).
        n_steps: steps of the midpoint rule.
        batch_size: images times steps in one run: bounds the memory.

    Raises:
        PathwayError: if ``sparsity`` is out of range, or as :func:`pathwaylib.integrated_gradients`.

    Source: Khakzar et al., *Neural Response Interpretation through the Lens of Critical Pathways* (CVPR 2021).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> x = torch.rand(2, 4)
        >>> pathway = NeuronIntGrad(sparsity=0.7)(net, x)
        >>> bool((pathway.flatten() == NeuronMCT(sparsity=0.7)(net, x).flatten()).all())  # into a linear readout
        True
    """

    sparsity: float = 0.9
    n_steps: int = 32
    batch_size: int = 64

    def __post_init__(self) -> None:
        kept_neurons(1, self.sparsity)

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        """Return the pathway of each image of ``x`` for its target (None: the predicted class)."""
        scores = integrated_gradients(model, x, target, n_steps=self.n_steps, batch_size=self.batch_size)
        return scores.top(self.sparsity)


@dataclass(frozen=True)
class ActiveNeurons:
    """Keep every neuron that is not dead on the image; the target is only noted.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> x = torch.rand(1, 4)
        >>> bool((ActiveNeurons()(net, x).masks[0] == (net[0](x) > 0)).all())
        True
    """

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        """Return the active neurons of each image of ``x``."""
        with torch.no_grad():
            seen = observe(model, x)
        return replace(seen.active(), targets=resolve_target(seen.logits, target))


@dataclass(frozen=True, eq=False)
class RandomSelection:
    """Keep neurons drawn at random, the control that every selector has to beat.

    Attributes:
        sparsity: share of the neurons to remove, in [0, 1).
        generator: draws the neurons, on any device; None draws the same ones at every call (seed 0).
        active_only: draw among the neurons that are not dead on the image (as many as there are, at most k).

    Raises:
        PathwayError: if ``sparsity`` is out of range.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> RandomSelection(sparsity=0.7)(net, torch.rand(2, 4)).sizes
        tensor([3, 3])
    """

    sparsity: float = 0.9
    generator: torch.Generator | None = None
    active_only: bool = False

    def __post_init__(self) -> None:
        kept_neurons(1, self.sparsity)

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        """Return random neurons for each image of ``x``."""
        generator = self.generator or torch.Generator().manual_seed(0)
        with torch.no_grad():
            seen = observe(model, x)
        # Uniform in (0, 1]: a score of 0 would mean "never keep".
        scores = [1 - torch.rand(a.shape, generator=generator, device=generator.device).to(a.device) for a in seen.post]
        if self.active_only:
            scores = [score * active for score, active in zip(scores, seen.active().masks, strict=True)]
        return Contributions(tuple(scores), seen.sites, resolve_target(seen.logits, target)).top(self.sparsity)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Return a pathway chosen before, for what takes a selector.

    Attributes:
        pathway: of the inputs it will be called with.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> x = torch.rand(1, 4)
        >>> pathway = NeuronMCT(sparsity=0.7)(net, x)
        >>> Chosen(pathway)(net, x) is pathway
        True
    """

    pathway: Pathway

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        """Return the pathway."""
        return self.pathway
