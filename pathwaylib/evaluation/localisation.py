"""Held against the truth: do attributions fall on the known pixels, and pathways on the known neurons?

Every measure of maps takes attributions ``(B, C, H, W)`` or ``(B, H, W)``, sums their channels, and looks at one part
of the sum: its absolute value, or what is positive of it. Each gives its chance level too, what a map that knows
nothing scores.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import PathwayError
from ..pathway import Pathway
from ..planting import CriticalNeurons

Part = Literal["absolute", "positive"]


class Localisation(NamedTuple):
    """How well maps meet a mask, and how well by chance.

    Attributes:
        score: one number per input ``(B,)``, in [0, 1].
        chance: what is expected of a map whose pixels are in random order ``(B,)``: the mask's share of the pixels.
    """

    score: Tensor
    chance: Tensor


def pointing_game(maps: Tensor, mask: Tensor, *, part: Part = "absolute") -> Localisation:
    """Tell whether the largest attribution lies inside the mask.

    Where several pixels share the maximum, the score is the share of them inside: what a random choice among them is
    expected to hit. So a map of zeros scores at chance, and so does one whose positive part is empty.

    Args:
        maps: attributions ``(B, C, H, W)`` or ``(B, H, W)``.
        mask: bool ``(B, H, W)``; True where the truth is, at least one pixel per input.
        part: which part of the summed channels to look at.

    Returns:
        :class:`Localisation`; the score is 0 or 1 except where maxima tie.

    Raises:
        PathwayError: if the shapes do not fit, a map is not finite, or a mask is empty.

    Equation: ``|M ∩ T| / |M|``, with T the mask and M the pixels of largest attribution.

    Source: Zhang, Bargal, Lin, Brandt, Shen, Sclaroff, *Top-down Neural Attention by Excitation Backprop* (IJCV 2018),
    there with a tolerance of 15 pixels, here without.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [0.0, 0.0]], [[2.0, 2.0], [0.0, 1.0]]])
        >>> mask = torch.tensor([[[True, False], [False, False]]]).expand(2, 2, 2)
        >>> pointing_game(maps, mask)
        Localisation(score=tensor([1.0000, 0.5000]), chance=tensor([0.2500, 0.2500]))
    """
    values, inside, chance = _prepared(maps, mask, part)
    largest = (values == values.amax(1, keepdim=True)).to(values.dtype)
    return Localisation((largest * inside).sum(1) / largest.sum(1), chance)


def mass_inside(maps: Tensor, mask: Tensor, *, part: Part = "absolute") -> Localisation:
    """Return the share of a map's mass that lies inside the mask.

    A map without mass, such as that of a pathway through which nothing flows, says nothing about the mask: it
    scores 0.

    Args:
        maps: attributions ``(B, C, H, W)`` or ``(B, H, W)``.
        mask: bool ``(B, H, W)``; True where the truth is, at least one pixel per input.
        part: which part of the summed channels is the mass.

    Returns:
        :class:`Localisation`; the score is 1 where all mass is inside.

    Raises:
        PathwayError: if the shapes do not fit, a map is not finite, or a mask is empty.

    Equation: Σ_{p ∈ T} m_p / Σ_p m_p, with m = ``|Σ_c A_c|`` or max(Σ_c A_c, 0).

    Source: Arras, Osman, Samek, *CLEVR-XAI: A Benchmark Dataset for the Ground Truth Evaluation of Neural Network
    Explanations* (Information Fusion 2022), there the "relevance mass accuracy".

    Example:
        >>> maps = torch.tensor([[[3.0, -1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
        >>> mask = torch.tensor([[[True, False], [False, False]]]).expand(2, 2, 2)
        >>> mass_inside(maps, mask).score, mass_inside(maps, mask, part="positive").score
        (tensor([0.7500, 0.0000]), tensor([1., 0.]))
    """
    values, inside, chance = _prepared(maps, mask, part)
    # Scaled first, so that the sum of tiny or huge numbers neither vanishes nor overflows; it is then at least 1, or 0.
    largest = values.amax(1, keepdim=True)
    values = values / torch.where(largest > 0, largest, 1)
    return Localisation((values * inside).sum(1) / values.sum(1).clamp(min=1), chance)


def top_k_intersection(maps: Tensor, mask: Tensor, *, part: Part = "absolute") -> Localisation:
    """Return the share of the mask that the map's largest pixels cover, as many of them as the mask has.

    Where pixels tie at the border, the score is what a random choice among them is expected to cover. So a map of
    zeros scores at chance.

    Args:
        maps: attributions ``(B, C, H, W)`` or ``(B, H, W)``.
        mask: bool ``(B, H, W)``; True where the truth is, at least one pixel per input.
        part: which part of the summed channels ranks the pixels.

    Returns:
        :class:`Localisation`; the score is 1 where the largest pixels are the mask.

    Raises:
        PathwayError: if the shapes do not fit, a map is not finite, or a mask is empty.

    Equation: ``|top_k ∩ T| / k`` with ``k = |T|``.

    Source: Arras, Osman, Samek (Information Fusion 2022), there the "relevance rank accuracy".

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [1.0, 0.0]]])
        >>> mask = torch.tensor([[[True, True], [False, False]]])
        >>> top_k_intersection(maps, mask).score  # the second place goes to one of two equal pixels
        tensor([0.7500])
    """
    values, inside, chance = _prepared(maps, mask, part)
    size = inside.sum(1, keepdim=True)
    border = values.sort(1, descending=True).values.gather(1, size - 1)
    above, tied = (values > border).to(values.dtype), (values == border).to(values.dtype)
    places = size[:, 0] - above.sum(1)
    covered = (above * inside).sum(1) + places * (tied * inside).sum(1) / tied.sum(1)
    return Localisation(covered / size[:, 0], chance)


def _prepared(maps: Tensor, mask: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps and masks as ``(B, pixels)``, and the masks' share of the pixels."""
    if part not in get_args(Part):
        raise PathwayError(f"part is {part!r}; choose {' or '.join(map(repr, get_args(Part)))}")
    if mask.dtype != torch.bool or mask.ndim != 3:
        raise PathwayError(f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; give bool (batch, height, width)")
    if maps.ndim not in (3, 4) or len(maps) != len(mask) or maps.shape[-2:] != mask.shape[-2:]:
        raise PathwayError(
            f"maps of shape {tuple(maps.shape)} for masks of shape {tuple(mask.shape)}; give (batch, channels, height, "
            "width) or (batch, height, width)"
        )
    inside = mask.flatten(1).to(maps.device)
    if not bool(inside.any(1).all()):
        raise PathwayError(f"mask {int(inside.any(1).int().argmin())} is empty; leave out inputs without a truth")
    precise = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    summed = (precise.sum(1) if maps.ndim == 4 else precise).flatten(1)
    if not bool(summed.isfinite().all()):
        raise PathwayError("the maps hold NaN or infinity, or their channels overflow")
    return summed.abs() if part == "absolute" else summed.clamp(min=0), inside, inside.to(summed.dtype).mean(1)


class NeuronRecovery(NamedTuple):
    """How well pathways meet the critical neurons.

    Attributes:
        precision: share of the pathway's neurons that were needed ``(B,)``; 0 for an empty pathway.
        recall: share of what was needed that the pathway holds ``(B,)``.
    """

    precision: Tensor
    recall: Tensor


def neuron_recovery(pathway: Pathway, critical: CriticalNeurons) -> NeuronRecovery:
    """Hold pathways against the neurons that are known to make the responses.

    Of neurons that can stand in for each other one is needed: the first in a pathway counts, further ones are spare,
    and lower the precision. A random pathway's precision is about the share of critical neurons in the network, its
    recall about its own share.

    Args:
        pathway: ``B`` pathways.
        critical: the truth for the same inputs, such as that of :func:`pathwaylib.planted_network`.

    Returns:
        :class:`NeuronRecovery`. At the true size, where a pathway has as many neurons as there are groups, precision
        and recall are the same.

    Raises:
        PathwayError: if the two are of different networks or numbers of inputs.

    Equation: with h groups of which the pathway P holds a member, out of g: precision = ``h / |P|``, recall = h / g.

    Example:
        >>> from pathwaylib import ActiveNeurons
        >>> from pathwaylib.planting import planted_network
        >>> planted = planted_network(n=1, classes=2, parts=2, idle=1)  # 5 critical neurons
        >>> pathway = ActiveNeurons()(planted.model, planted.x)
        >>> recovery = neuron_recovery(pathway, planted.critical)
        >>> recovery.recall, recovery.precision == 5 / pathway.sizes
        (tensor([1.]), tensor([True]))
    """
    shapes = [mask.shape for mask in pathway.masks]
    if pathway.sites != critical.sites or shapes != [group.shape for group in critical.groups]:
        raise PathwayError(
            f"the pathway has masks of shapes {[tuple(shape) for shape in shapes]}, the truth "
            f"{[tuple(group.shape) for group in critical.groups]}; give both for the same network and inputs"
        )
    hits = critical.within(pathway)
    return NeuronRecovery(hits / pathway.sizes.clamp(min=1), hits / critical.sizes)
