"""Chapter 10: planted truth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..contributions import integrated_gradients, taylor
from ..evaluation import pointing_game
from ..explainers import explainers
from ..planting import critical_sets
from .judging import Answer, Verdict, call_answer, judge, judge_network, observed


def _maps_and_masks(seed: int) -> tuple[Tensor, Tensor]:
    """Return whole numbers, so that maxima tie, and masks."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 3, (4, 3, 4), generator=generator).float()
    maps[0] *= float(seed > 0)  # one map of zeros
    mask = torch.rand(4, 3, 4, generator=generator) < 0.4
    mask[:, 0, 0] = True
    return maps, mask


def check_pointing(answer: Answer) -> Verdict:
    """Check ``answer(maps, mask) -> (B,)``: the share of the largest entries of each map that lie in the mask.

    Example:
        >>> check_pointing(lambda maps, mask: mask.flatten(1).gather(1, maps.flatten(1).argmax(1)[:, None])[:, 0])
        ✗ argmax takes the first of several equal maxima: count all, return the share inside
    """

    def largest(maps: Tensor) -> Tensor:
        return maps == maps.amax((1, 2), keepdim=True)

    def share(maps: Tensor, mask: Tensor) -> Tensor:
        return (largest(maps) & mask).sum((1, 2)) / largest(maps).sum((1, 2))

    return judge(
        answer,
        [partial(_maps_and_masks, seed) for seed in (1, 2, 0)],
        share,
        {
            "argmax takes the first of several equal maxima: count all, return the share inside": lambda maps, mask: (
                mask.flatten(1).gather(1, maps.flatten(1).argmax(1)[:, None])[:, 0]
            ),
            "one of the largest inside is not enough where others tie outside: return the share inside": (
                lambda maps, mask: (largest(maps) & mask).any(2).any(1)
            ),
            "where maxima tie you ask that all lie inside: return the share inside": (
                lambda maps, mask: ~(largest(maps) & ~mask).any(2).any(1)
            ),
            "this is the largest value over the batch: each map has its own maximum": (
                lambda maps, mask: ((maps == maps.max()) & mask).sum((1, 2)) / (maps == maps.max()).sum((1, 2))
            ),
            "this is the share of the mask that is largest: divide by the number of largest entries": (
                lambda maps, mask: (largest(maps) & mask).sum((1, 2)) / mask.sum((1, 2))
            ),
            "a map of zeros has its maximum everywhere and scores at chance: do not leave it out": (
                lambda maps, mask: share(maps, mask) * (maps.amax((1, 2)) > 0)
            ),
            "this is one number for the batch: return one per input, shape (B,)": (
                lambda maps, mask: share(maps, mask).mean()
            ),
        },
        "right: 0 or 1 where one entry is the largest, what a random choice would hit where several tie",
    )


def check_slope_misses(answer: Answer) -> Verdict:
    """Check ``answer() -> (model, x)``: NeuronMCT's score of a neuron is 0, though the response cannot do without it.

    ``x`` is one input. The neuron has to be in every smallest set of active neurons that gives the logits.

    Example:
        >>> from pathwaylib import sleeper_network
        >>> check_slope_misses(sleeper_network)
        ✗ every neuron that is needed has a slope; the smallest score is 1: let what reads a neuron saturate
    """

    def misses(model: nn.Module, x: Tensor, needed: Tensor) -> Verdict:
        scores = torch.cat([part.flatten() for part in taylor(model, x).scores]).abs()
        least = float(scores[needed].min())
        if least > 1e-6:
            return Verdict(
                False,
                f"every neuron that is needed has a slope; the smallest score is {least:.3g}: let what reads a neuron "
                "saturate",
            )
        missed = int((scores[needed] <= 1e-6).sum())
        return Verdict(
            True, f"right: of {int(needed.sum())} neurons that are needed, NeuronMCT gives {missed} a score of 0"
        )

    return _judge_needed(answer, misses)


def check_integral_misses(answer: Answer) -> Verdict:
    """Check ``answer() -> (model, x)``: a needed neuron has integrated gradient 0, though its first-order score is not.

    ``x`` is one input. The neuron has to be in every smallest set of active neurons that gives the logits.

    Example:
        >>> from pathwaylib import sleeper_network
        >>> check_integral_misses(sleeper_network)
        ✗ no needed neuron with a first-order score has integrated gradient 0; the smallest is 0.167: let the response \
rise and fall by as much while the neuron grows from 0
    """

    def misses(model: nn.Module, x: Tensor, needed: Tensor) -> Verdict:
        seen = needed & (torch.cat([part.flatten() for part in taylor(model, x).scores]).abs() > 0.1)
        if not bool(seen.any()):
            return Verdict(
                False, "no neuron that is needed has a first-order score above 0.1: NeuronMCT has to find it"
            )
        # Many steps: what is left of the rule's own error is far below the bound.
        integrals = integrated_gradients(model, x, n_steps=4096, batch_size=4096).scores
        least = float(torch.cat([part.flatten() for part in integrals]).abs()[seen].min())
        if least > 5e-3:
            return Verdict(
                False,
                f"no needed neuron with a first-order score has integrated gradient 0; the smallest is {least:.3g}: "
                "let the response rise and fall by as much while the neuron grows from 0",
            )
        return Verdict(
            True, "right: a neuron that is needed, and that NeuronMCT finds, has an integrated gradient of 0"
        )

    return _judge_needed(answer, misses)


def _judge_needed(answer: Answer, misses: Callable[[nn.Module, Tensor, Tensor], Verdict]) -> Verdict:
    """Judge a network and an input by which neurons every smallest critical set holds, ``(N,)``."""

    def check(model: nn.Module, x: Tensor) -> Verdict:
        needed = critical_sets(model, x, at_most=100_000).flatten().all(0)
        if not bool(needed.any()):
            return Verdict(
                False, "no neuron is in every smallest set of active neurons that gives the logits: none is needed"
            )
        return misses(model, x, needed)

    return judge_network(answer, check, most=40)


def two_glyphs() -> Tensor:
    """Return an image ``(1, 1, 12, 24)`` with a cross in its left half and a square, twice as bright, in its right.

    Example:
        >>> two_glyphs()[0, 0, :, :12].max(), two_glyphs()[0, 0, :, 12:].max()
        (tensor(0.5000), tensor(1.))
    """
    image = torch.zeros(1, 1, 12, 24)
    image[..., 3:9, 5:7] = image[..., 5:7, 3:9] = 0.5
    image[..., 3:9, 15:21] = 1.0
    return image


def check_cam_misses(answer: Answer) -> Verdict:
    """Check ``answer(x) -> model``: the network looks at the left half of the image, Grad-CAM points at the right one.

    ``x`` is :func:`two_glyphs`. The logits must not depend on the right half at all.

    Example:
        >>> check_cam_misses(lambda x: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).eval())
        ✗ the logits change with the right half of the image: give the weights that read it the value 0
    """
    x = two_glyphs()
    model = call_answer(answer, (x.clone(),))
    if isinstance(model, Verdict):
        return model
    if not isinstance(model, nn.Module):
        return Verdict(False, f"return a network, an nn.Module; you returned a {type(model).__name__}")
    right = torch.zeros(1, 12, 24, dtype=torch.bool)
    right[:, :, 12:] = True
    try:
        logits = observed(model, x).logits
        target = logits.argmax(1)
        noise = torch.rand(32, *x.shape[1:], generator=torch.Generator().manual_seed(0))
        elsewhere = observed(model, torch.where(right, noise, x)).logits
        if not torch.allclose(elsewhere, logits.expand_as(elsewhere), atol=1e-5):
            return Verdict(
                False, "the logits change with the right half of the image: give the weights that read it the value 0"
            )
        blank = observed(model, torch.where(right, x, 0)).logits
        if torch.allclose(blank, logits, atol=1e-5):
            return Verdict(False, "the logits are the same without the left glyph: the network looks at nothing")
        cam = explainers()["Grad-CAM"](model, x, target)
        hit = float(pointing_game(cam, right).score)
    except Exception as error:  # a reader's network may fail in any way
        return Verdict(False, f"your network could not be explained: {str(error).splitlines()[0]}")
    if not bool(cam.any()):
        return Verdict(False, "Grad-CAM is 0 everywhere: the mean gradient of the last maps must be above 0")
    if hit < 1:
        where = "in both halves" if hit > 0 else "in the left half, where the network looks"
        return Verdict(False, f"Grad-CAM's maximum is {where}: which value of the last map would be larger than there?")
    return Verdict(True, "right: the response depends on the left glyph alone, and Grad-CAM points at the other one")
