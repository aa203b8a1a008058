"""Measures of a pathway, one number per input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import PathwayError
from ..neurons import Activations, Target, check_model, masked, response
from ..pathway import Pathway


def dead_share(pathway: Pathway, activations: Activations | Pathway) -> Tensor:
    """Return the share of a pathway's neurons that are dead on its input, in [0, 1].

    Dead is measured in the unmasked network: a neuron that wakes up inside the pathway network is still dead on
    the input. An empty pathway holds no dead neuron: its share is 0.

    Args:
        pathway: the neurons kept, for ``B`` inputs.
        activations: what the unmasked network showed on the same inputs (:func:`pathwaylib.observe`), or the
            pathway of its active neurons.

    Returns:
        Float tensor ``(B,)``.

    Raises:
        PathwayError: if the two are of different networks or numbers of inputs.

    Equation: ``|{j ∈ P : a_j(x) = 0}| / |P|``.

    Source: Khakzar et al., *Neural Response Interpretation through the Lens of Critical Pathways* (CVPR 2021),
    section 4.

    Example:
        >>> kept = Pathway((torch.tensor([[True, True, False, False]]),), ("relu_0",))
        >>> active = Pathway((torch.tensor([[True, False, True, False]]),), ("relu_0",))
        >>> dead_share(kept, active)
        tensor([0.5000])
    """
    active = activations if isinstance(activations, Pathway) else activations.active()
    return (pathway & ~active).sizes / pathway.sizes.clamp(min=1)


def _logits(model: nn.Module, x: Tensor, pathway: Pathway | None, batch_size: int) -> Tensor:
    check_model(model, x)
    if batch_size < 1:
        raise PathwayError(f"batch_size is {batch_size}; give the number of inputs to run at once, at least 1")
    if pathway is not None and len(pathway) not in (1, len(x)):
        raise PathwayError(f"the pathway holds {len(pathway)} inputs, the batch {len(x)}; give as many, or one for all")
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(x), batch_size):
            chosen = slice(start, start + batch_size)
            if pathway is None:
                parts.append(model(x[chosen]))
                continue
            with masked(pathway if len(pathway) == 1 else pathway[chosen]):
                parts.append(model(x[chosen]))
    return torch.cat(parts)


def prediction_kept(model: nn.Module, x: Tensor, pathway: Pathway, *, batch_size: int = 256) -> Tensor:
    """Tell for each input whether the pathway network predicts what the network predicts.

    The true label plays no part: a wrong prediction that the pathway repeats is kept.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        pathway: one pathway per input, or one for all.
        batch_size: inputs to run at once.

    Returns:
        Bool tensor ``(B,)``.

    Raises:
        PathwayError: if ``model`` or ``x`` cannot be used, or the pathway is not of this network and batch.

    Equation: argmax Φ_P(x) = argmax Φ(x).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.rand(5, 2)
        >>> everything = Pathway((torch.ones(1, 3, dtype=torch.bool),), ("relu_0",))
        >>> prediction_kept(net, x, everything)
        tensor([True, True, True, True, True])
    """
    return _logits(model, x, pathway, batch_size).argmax(1) == _logits(model, x, None, batch_size).argmax(1)


def confidence(
    model: nn.Module, x: Tensor, pathway: Pathway | None = None, target: Target = None, *, batch_size: int = 256
) -> Tensor:
    """Return the softmax probability of each input's target, in the pathway network where a pathway is given.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        pathway: one pathway per input, or one for all; None runs the whole network.
        target: class or classes; None means the class that the *whole* network predicts.
        batch_size: inputs to run at once.

    Returns:
        Float tensor ``(B,)``, in [0, 1].

    Raises:
        PathwayError: as :func:`pathwaylib.prediction_kept`, and if a target is out of range.

    Equation: softmax(Φ_P(x))_t.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> bool((confidence(net, torch.rand(5, 2)) >= 0.5).all())  # the larger of two probabilities
        True
    """
    if target is None and pathway is not None:
        target = _logits(model, x, None, batch_size).argmax(1)
    return response(_logits(model, x, pathway, batch_size).softmax(1), target)
