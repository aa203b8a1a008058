"""Chapter 11: a learned pathway generator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..generator import DistanceAwareQuantizer
from ..neurons import masked
from ..pathway import Pathway
from ..zoo import load_model
from .judging import Answer, Verdict, call_answer, judge, observed


def _maps_and_filter(seed: int) -> tuple[Tensor, Tensor, int]:
    """Return maps, a filter per channel and a side; the maps of one test are small enough as they are."""
    generator = torch.Generator().manual_seed(seed)
    height, width, side = [(16, 16, 4), (20, 12, 3), (4, 4, 4)][seed]
    weight = torch.randn(3, 1, 3, 3, generator=generator)
    return torch.randn(2, 3, height, width, generator=generator), weight, side


def check_embedding(answer: Answer) -> Verdict:
    """Check ``answer(maps, weight, side)``: the maps of every step, from the given ones to at most ``side`` pixels.

    Example:
        >>> check_embedding(lambda maps, weight, side: [maps])
        ✗ only the given maps are returned: halve until they are at most `side` pixels high and wide
    """

    def halve(maps: Tensor, weight: Tensor) -> Tensor:
        return F.gelu(F.conv2d(maps, weight, stride=2, padding=1, groups=maps.shape[1]))

    def steps(
        step: Callable[[Tensor, Tensor], Tensor], size: Callable[[list[int]], int] = max, extra: int = 0
    ) -> Callable[[Tensor, Tensor, int], list[Tensor]]:
        def found(maps: Tensor, weight: Tensor, side: int) -> list[Tensor]:
            pyramid = [maps]
            while size(list(pyramid[-1].shape[2:])) > side:
                pyramid.append(step(pyramid[-1], weight))
            for _ in range(extra):
                pyramid.append(step(pyramid[-1], weight))
            return pyramid

        return found

    right = steps(halve)
    return judge(
        answer,
        [partial(_maps_and_filter, seed) for seed in range(3)],
        right,
        {
            "only the given maps are returned: halve until they are at most `side` pixels high and wide": (
                lambda maps, weight, side: [maps]
            ),
            "only the last maps are returned: the decoder needs those of every step, the given ones first": (
                lambda *given: right(*given)[-1:]
            ),
            "the given maps are missing: they come first": lambda *given: right(*given)[1:] or [torch.zeros(0)],
            "the order is turned round: the largest maps come first": lambda *given: right(*given)[::-1],
            "a GELU is missing after each convolution": steps(
                lambda maps, weight: F.conv2d(maps, weight, stride=2, padding=1, groups=maps.shape[1])
            ),
            "this is a ReLU: use F.gelu, so that what is negative keeps a slope": steps(
                lambda maps, weight: F.conv2d(maps, weight, stride=2, padding=1, groups=maps.shape[1]).relu()
            ),
            "you stop as soon as one side is small enough: both must be": steps(halve, min),
            "you halve once too often: maps of exactly `side` pixels are small enough": steps(halve, max, 1),
        },
        "right: one filter per channel, used again and again, and the maps of every step kept",
    )


def check_quantizer(answer: Answer) -> Verdict:
    """Check ``answer(v, gamma, sharpest)``: the distance-aware masks of scores, and the slope that comes back.

    Example:
        >>> check_quantizer(lambda v, gamma, sharpest: (v > 0).double())
        ✗ no gradient comes back: a step has no slope, use the soft choice
    """

    def scores(seed: int) -> tuple[Tensor, float, float]:
        v = 1.5 * torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        # Near the border too; never on it, where the sharpness has no slope.
        v = torch.cat([v, v / 40])
        return v, *((2.0, 40.0), (3.0, 12.0))[seed]

    def with_slope(quantize: Answer) -> Answer:
        def found(v: Tensor, gamma: float, sharpest: float) -> Any:
            leaf = v.clone().requires_grad_()
            mask = quantize(leaf, gamma, sharpest)
            if not isinstance(mask, Tensor) or mask.shape != v.shape:
                return mask
            if not mask.requires_grad:
                return mask.detach(), torch.full_like(v, torch.nan)
            return mask.detach(), torch.autograd.grad(mask.sum(), leaf)[0]

        return found

    def soft(
        attached: bool = False, stretched: bool = True, adapted: bool = True, capped: bool = True
    ) -> Callable[[Tensor, float, float], Tensor]:
        def quantize(v: Tensor, gamma: float, sharpest: float) -> Tensor:
            gap = 2 * v.sigmoid() - 1
            beta = gamma / (gap if attached else gap.detach()).abs()
            beta = beta.clamp(max=sharpest) if capped else beta
            mask = ((beta if adapted else sharpest) * gap).sigmoid()
            edge = torch.tensor(gamma, dtype=v.dtype).sigmoid()
            return (mask - 1 + edge) / (2 * edge - 1) if stretched else mask

        return quantize

    def straight(v: Tensor, gamma: float, sharpest: float) -> Tensor:
        return (v > 0).to(v.dtype) + v.sigmoid() - v.sigmoid().detach()

    return judge(
        with_slope(answer) if callable(answer) else answer,
        [partial(scores, seed) for seed in range(2)],
        with_slope(lambda v, gamma, sharpest: DistanceAwareQuantizer(gamma, sharpest)(v)),
        {
            "no gradient comes back: a step has no slope, use the soft choice": with_slope(
                lambda v, gamma, sharpest: (v > 0).to(v.dtype)
            ),
            "the masks are right, and the slope is 0 away from the border: no gradient may go through the sharpness": (
                with_slope(soft(attached=True))
            ),
            "the masks do not reach 0 and 1: stretch [σ(−γ), σ(γ)] to [0, 1]": with_slope(soft(stretched=False)),
            "the sharpness is the same for all: divide γ by the score's own gap |2u − 1|": (
                with_slope(soft(adapted=False))
            ),
            "the sharpness has no upper end: at the border it would be infinite": with_slope(soft(capped=False)),
            "this is straight-through: a step forwards, the slope of a sigmoid backwards": with_slope(straight),
            "this is a plain sigmoid of the scores: it is far from the bits": with_slope(
                lambda v, gamma, sharpest: v.sigmoid()
            ),
        },
        "right: bits away from the border, and a slope everywhere",
    )


def check_class_term(answer: Answer) -> Verdict:
    """Check ``answer(masks, classes)``: 1 minus the mean soft IoU over pairs of one class; 0 where there is no pair.

    Example:
        >>> check_class_term(lambda masks, classes: masks.mean())
        ✗ the shape is right, but 100% of the values are wrong, for example 0.4636 where 0.6512 is right
    """

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        masks = torch.rand(6, 10, generator=torch.Generator().manual_seed(seed))
        return masks, torch.tensor([[0, 1, 0, 2, 1, 0], [1, 1, 1, 1, 0, 0], [0, 1, 2, 3, 4, 5]][seed])

    def term(
        *, own: bool = False, every: bool = False, fuzzy: bool = False, sums: bool = False, none: float = 0.0
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def found(masks: Tensor, classes: Tensor) -> Tensor:
            a, b = masks[:, None], masks[None]
            both = torch.minimum(a, b) if fuzzy else a * b
            either = torch.maximum(a, b) if fuzzy else a + b if sums else a + b - a * b
            ious = both.sum(2) / either.sum(2)
            pairs = (classes[:, None] == classes) | every
            pairs &= ~torch.eye(len(masks), dtype=torch.bool) | own
            return 1 - ious[pairs].mean() if bool(pairs.any()) else masks.new_tensor(none)

        return found

    right = term()
    return judge(
        answer,
        [partial(batch, seed) for seed in range(3)],
        right,
        {
            "each input is compared with itself too: leave those pairs out": term(own=True),
            "all pairs are compared: only those of one class count": term(every=True),
            "this is the overlap: the term is 1 minus it, for a loss falls when it gets better": (
                lambda masks, classes: 1 - right(masks, classes)
            ),
            "the union counts what both have twice: Σ (a + b − ab)": term(sums=True),
            "this takes the smaller and the larger of both masks: here the intersection is Σ ab": term(fuzzy=True),
            "where no two inputs share a class the term is 0": term(none=1.0),
            "where no two inputs share a class a mean over nothing is NaN: return 0": term(none=float("nan")),
        },
        "right: pairs of one class, no input with itself, and 0 where there is none",
    )


def check_code(answer: Answer) -> Verdict:
    """Check ``answer(model) -> Pathway``: for each class of ``cifar10-vgg`` a blind pathway that makes it the answer.

    Example:
        >>> def everything(model):
        ...     return Pathway(tuple(torch.ones_like(a) > 0 for a in observed(model, torch.rand(10, 3, 32, 32)).post),
        ...         tuple(f"relu_{i}" for i in range(8)))
        >>> check_code(everything)
        ✗ site 0 keeps 32768 neurons: all sites but the last must keep none, so that no image gets through
    """
    model = load_model("cifar10-vgg")
    pathway = call_answer(answer, (model,))
    if isinstance(pathway, Verdict):
        return pathway
    images = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = observed(model, images)
    fits = isinstance(pathway, Pathway) and [m.shape for m in pathway.masks] == [a.shape for a in seen.post]
    if not fits or pathway.sites != seen.sites:
        return Verdict(False, "return one Pathway of ten entries over the sites of the network, see `observe`")
    for site, kept in enumerate(pathway.site_sizes[:, :-1].amax(0).tolist()):
        if kept:
            return Verdict(
                False, f"site {site} keeps {kept} neurons: all sites but the last must keep none, so that no image "
                "gets through"
            )  # fmt: skip
    return _judge_code(model, images, pathway)


def _judge_code(model: nn.Module, images: Tensor, pathway: Pathway) -> Verdict:
    with torch.no_grad(), masked(pathway):
        called = model(images).argmax(1).tolist()
    wrong = [(wanted, found) for wanted, found in enumerate(called) if wanted != found]
    if wrong:
        wanted, found = wrong[0]
        count = 10 - len(wrong)
        return Verdict(
            False,
            f"{count} of 10 classes: with entry {wanted} the network calls class {found}. Keep the channels that speak "
            f"for class {wanted} more than for the others",
        )
    return Verdict(True, "right: ten blind pathways, and each makes its class the answer to every image")
