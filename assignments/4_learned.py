"""Key of assignment 4: what is asked, the oracles, and what typical mistakes are worth. Not for students."""
# ruff: noqa: D103, the names say what the oracles and mistakes compute

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathwaylib import DistanceAwareQuantizer, NeuronMCT, Pathway, forced, load_model, masked, planted
from pathwaylib.exercises.judging import Arguments
from pathwaylib.grading import Compared, Part, Question
from pathwaylib.pathway import split_sites

TITLE = "Assignment 4: learned pathways"
Weights = tuple[float, float]


# --- Inputs ----------------------------------------------------------------------------------------------------------


def to_quantise(seed: int, largest: float) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.rand(4, 9, generator=generator, dtype=torch.float64) - 1) * largest
    return scores, 1.0 + float(torch.rand((), generator=generator)) * 2, 40.0


def far(seed: int) -> Sequence[Arguments]:
    return [partial(to_quantise, seed + i, 4.0) for i in range(2)]


def near(seed: int) -> Sequence[Arguments]:
    return [partial(to_quantise, seed + i, 0.05) for i in range(2)]


def batch(seed: int, weights: Weights, classes: int = 3) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    whole, inside = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    masks = torch.rand(6, 12, generator=generator)
    return whole, inside, masks, torch.randperm(6, generator=generator) % classes, *weights


def batches(seed: int, weights: Weights) -> Sequence[Arguments]:
    return [partial(batch, seed + i, weights) for i in range(2)]


def no_pairs(seed: int) -> Sequence[Arguments]:
    return [partial(batch, seed, (0.5, 2.0), classes=6)]


def bits(seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(12, 10, generator=generator) < 0.5
    predicted = torch.randint(0, 3, (12,), generator=generator)  # class 3 of 4 has no input
    return masks, predicted, 4, 0.5


def classes(seed: int) -> Sequence[Arguments]:
    return [partial(bits, seed + i) for i in range(3)]


def to_force(seed: int) -> tuple[Any, ...]:
    """Pathways of one image for each class, on images of the shipped network; a dense one and a sparse one."""
    model, x = load_model("planted-cnn"), planted(24, seed=seed)[:][0]
    predicted = model(x).argmax(1)
    first = torch.stack([(predicted == k).int().argmax() for k in range(4)])
    return model, x, NeuronMCT(sparsity=0.97 if seed % 2 else 0.8)(model, x[first], torch.arange(4))


def forcing(seed: int) -> Sequence[Arguments]:
    return [partial(to_force, seed), partial(to_force, seed + 1)]


def to_see(seed: int, where: int | None) -> tuple[Any, ...]:
    """Random pathways of the shipped network, of which some keep nothing at a site."""
    model, x = load_model("planted-cnn"), planted(4, seed=seed)[:][0]
    shapes = [(16, 32, 32), (32, 32, 32), (32, 16, 16), (32, 16, 16)]
    generator = torch.Generator().manual_seed(seed)
    masks = list(split_sites(torch.rand(4, 65536, generator=generator) < 0.3, shapes))
    for row in range(4):
        if where is not None and torch.rand((), generator=generator) < 0.5:
            masks[where][row] = False
    return model, x, Pathway(tuple(masks), tuple(f"relu_{site}" for site in range(4)))


def cut_at_the_end(seed: int) -> Sequence[Arguments]:
    return [partial(to_see, seed + i, 3) for i in range(2)]


def cut_before(seed: int) -> Sequence[Arguments]:
    return [partial(to_see, seed + i, i % 3) for i in range(3)]


# --- Oracles and mistakes --------------------------------------------------------------------------------------------


def slope(scores: Tensor, gamma: float, sharpest: float) -> Tensor:
    leaf = scores.clone().requires_grad_()
    return torch.autograd.grad(DistanceAwareQuantizer(gamma, sharpest)(leaf).sum(), leaf)[0]


def slope_of_values(scores: Tensor, gamma: float, sharpest: float) -> Tensor:
    """The slope of the masks as they are, with a gradient through β."""
    leaf = scores.clone().requires_grad_()
    gap = (leaf / 2).tanh()
    beta = (gamma / gap.abs()).clamp(max=sharpest)
    soft = (1 + (beta * gap / 2).tanh() / torch.tensor(gamma / 2).tanh()) / 2
    return torch.autograd.grad(soft.sum(), leaf)[0]


def slope_of_sigmoid(scores: Tensor, gamma: float, sharpest: float) -> Tensor:
    return scores.sigmoid() * (1 - scores.sigmoid())


def loss(
    whole: Tensor,
    inside: Tensor,
    masks: Tensor,
    predicted: Tensor,
    sparsity: float,
    overlap: float,
    *,
    turned: bool = False,
    own: bool = False,
    summed: bool = False,
    overlap_sign: float = -1.0,
) -> Tensor:
    p, q = (inside, whole) if turned else (whole, inside)
    faithful = F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="sum", log_target=True)
    pairs = [
        (masks[i] @ masks[j]) / (masks[i].sum() + masks[j].sum() - masks[i] @ masks[j])
        for i in range(len(masks))
        for j in range(len(masks))
        if predicted[i] == predicted[j] and (own or i != j)
    ]
    alike = 1 + overlap_sign * torch.stack(pairs).mean() if pairs else torch.zeros(())
    return faithful / (1 if summed else len(whole)) + sparsity * masks.mean() + overlap * alike


def class_bits(masks: Tensor, predicted: Tensor, number: int, share: float, *, empty: bool = False) -> Tensor:
    rows = []
    for k in range(number):
        mine = masks[predicted == k]
        rows.append(mine.double().mean(0) >= share if len(mine) else torch.full((masks.shape[1],), empty))
    return torch.stack(rows)


def class_above(masks: Tensor, predicted: Tensor, number: int, share: float) -> Tensor:
    counts = torch.stack([masks[predicted == k].double().sum(0) for k in range(number)])
    return counts > share * torch.stack([(predicted == k).sum() for k in range(number)])[:, None]


def share_of_all(masks: Tensor, predicted: Tensor, number: int, share: float) -> Tensor:
    return torch.stack([masks[predicted == k].double().sum(0) / len(masks) >= share for k in range(number)])


def rates(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
    whole = model(x).argmax(1)
    return torch.stack(
        [forced(model, x[whole != k], of_class(pathway, k)).double().mean() for k in range(len(pathway))]
    )


def of_class(pathway: Pathway, k: int) -> Pathway:
    return Pathway(pathway[k : k + 1].masks, pathway.sites, torch.tensor([k]))


def rates_with_own(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
    found = []
    for k in range(len(pathway)):
        with masked(pathway[k : k + 1]), torch.no_grad():
            found.append((model(x).argmax(1) == k).double().mean())
    return torch.stack(found)


def changed(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
    """The share of other classes' inputs that are called anything but what they were."""
    whole, found = model(x).argmax(1), []
    for k in range(len(pathway)):
        others = whole != k
        with masked(pathway[k : k + 1]), torch.no_grad():
            found.append((model(x[others]).argmax(1) != whole[others]).double().mean())
    return torch.stack(found)


def unseen(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
    return torch.stack([(mask.flatten(1).sum(1) == 0) for mask in pathway.masks]).any(0)


def unseen_at_the_end(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
    return pathway.masks[-1].flatten(1).sum(1) == 0


def same_class(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
    found = []
    for k in range(len(pathway)):
        with masked(pathway[k : k + 1]), torch.no_grad():
            found.append(model(x).argmax(1).unique().numel() == 1)
    return torch.tensor(found)


SLOPE = Compared(
    slope,
    {
        "a gradient flows through β: it is a number here, not a function of the score": (slope_of_values, 0.4),
        "this is the slope of a sigmoid, the straight-through quantiser's": (slope_of_sigmoid, 0.2),
    },
)
LOSS = Compared(
    loss,
    {
        "the divergence is the other way round: KL(whole, inside)": (partial(loss, turned=True), 0.5),
        "the divergence is summed over the batch, not averaged": (partial(loss, summed=True), 0.5),
        "pairs of an input with itself count: they are always alike": (partial(loss, own=True), 0.5),
        "overlap is punished: the class term is 1 minus it": (
            lambda *arguments: loss(*arguments, overlap_sign=1.0) - arguments[5],
            0.5,
        ),
    },
)
BLIND = Compared(
    unseen,
    {
        "only the last site is looked at: a gap at any site cuts the chain": (unseen_at_the_end, 0.25),
        "the same class for all images is not blindness: the logits may still move": (same_class, 0.25),
    },
)

QUESTIONS = [
    Question(
        "slope",
        "The quantiser's slope",
        (Part("scores far from the border", 2, far, SLOPE), Part("scores next to it", 3, near, SLOPE)),
    ),
    Question(
        "loss",
        "Three wishes",
        (
            Part("faithfulness alone", 2, partial(batches, weights=(0.0, 0.0)), LOSS),
            Part("with sparsity", 1, partial(batches, weights=(4.0, 0.0)), LOSS),
            Part("with the class term", 2, partial(batches, weights=(0.5, 2.0)), LOSS),
            Part("no two inputs of a class", 1, no_pairs, LOSS),
        ),
    ),
    Question(
        "class_bits",
        "A pathway for each class",
        (
            Part(
                "right bits",
                4,
                classes,
                Compared(
                    class_bits,
                    {
                        "a class without inputs keeps nothing": (partial(class_bits, empty=True), 0.75),
                        "at least the share was asked, not more": (class_above, 0.5),
                        "the share is one of all inputs; it is one of the class's": (share_of_all, 0.25),
                    },
                ),
            ),
        ),
    ),
    Question(
        "rates",
        "Explain or decide?",
        (
            Part(
                "right rates",
                5,
                forcing,
                Compared(
                    rates,
                    {
                        "inputs of the pathway's own class count: only others can be forced": (rates_with_own, 0.4),
                        "any change of class counts: forced means called the pathway's class": (changed, 0.4),
                    },
                ),
            ),
        ),
    ),
    Question(
        "unseen",
        "Blind pathways",
        (Part("a gap at the last site", 2, cut_at_the_end, BLIND), Part("a gap before it", 3, cut_before, BLIND)),
    ),
]
