"""Key of assignment 3: what is asked, the oracles, and what typical mistakes are worth. Not for students."""
# ruff: noqa: D103, the names say what the oracles and mistakes compute

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from pathwaylib import CriticalNeurons, Pathway, load_model, neuron_recovery, planted
from pathwaylib.exercises.judging import Arguments, Verdict
from pathwaylib.grading import Checked, Compared, Part, Question

TITLE = "Assignment 3: removing pixels, sanity checks and planted truth"
FRACTIONS = (0.1, 0.3, 0.5)


# --- Inputs ----------------------------------------------------------------------------------------------------------


def images_and_maps(seed: int, *fractions: float) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, maps = torch.rand(3, 3, 6, 7, generator=generator), torch.randn(3, 3, 6, 7, generator=generator)
    return x, maps, fractions[0], torch.rand(3, generator=generator)


def some_pixels(seed: int) -> Sequence[Arguments]:
    return [partial(images_and_maps, seed + i, fraction) for i, fraction in enumerate((0.1, 0.45, 0.8))]


def none_or_all(seed: int) -> Sequence[Arguments]:
    return [partial(images_and_maps, seed + i, fraction) for i, fraction in enumerate((0.0, 1.0))]


def to_degrade(seed: int) -> tuple[Any, ...]:
    model, x = load_model("planted-cnn"), planted(4, seed=seed)[:][0]
    return model, x, gradient_times_input(model, x), FRACTIONS, x.mean((0, 2, 3))


def degradations(seed: int) -> Sequence[Arguments]:
    return [partial(to_degrade, seed), partial(to_degrade, seed + 1)]


def to_check(seed: int) -> tuple[Any, ...]:
    """The shipped network, a copy whose last layer is drawn anew, and images that the two call differently."""
    model, x = load_model("planted-cnn"), planted(4, seed=seed)[:][0]
    fresh = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        fresh[-1].weight.copy_(torch.randn(fresh[-1].weight.shape, generator=generator) * 0.2)
    return model, fresh, x


def networks_to_check(seed: int) -> Sequence[Arguments]:
    return [partial(to_check, seed), partial(to_check, seed + 1)]


def bits_and_groups(seed: int, *, copies: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.full((4, 20), -1)
    for row in groups:
        members = torch.randperm(20, generator=generator)[: 8 if copies else 4]
        row[members] = torch.arange(len(members)) % 4
    bits = torch.rand(4, 20, generator=generator) < 0.4
    bits[0] = False
    return bits, groups


def single(seed: int) -> Sequence[Arguments]:
    return [partial(bits_and_groups, seed + i, copies=False) for i in range(2)]


def groups_of_two(seed: int) -> Sequence[Arguments]:
    return [partial(bits_and_groups, seed + i, copies=True) for i in range(2)]


def glyphs(seed: int) -> Sequence[Arguments]:
    return [lambda at=at: (planted(1, seed=seed + at).masks[0],) for at in range(2)]


# --- Oracles and mistakes --------------------------------------------------------------------------------------------


def removed(
    x: Tensor, maps: Tensor, fraction: float, fill: Tensor, *, least: bool = False, absolute: bool = False
) -> Tensor:
    found = x.clone()
    count = round(fraction * x.shape[2] * x.shape[3])
    for image, scores in zip(found, maps.abs().sum(1) if absolute else maps.sum(1), strict=True):
        order = scores.flatten().argsort(descending=not least)[:count]
        image[:, order // x.shape[3], order % x.shape[3]] = fill[:, None]
    return found


def gradient_times_input(model: nn.Module, x: Tensor, target: Tensor | None = None) -> Tensor:
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    target = logits.argmax(1) if target is None else target
    return torch.autograd.grad(logits.gather(1, target[:, None]).sum(), leaf)[0] * x


def score(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    fractions: Sequence[float],
    fill: Tensor,
    *,
    anew: bool = False,
    logit: bool = False,
) -> Tensor:
    target = model(x).argmax(1)

    def answer(images: Tensor) -> Tensor:
        logits = model(images)
        chosen = logits.argmax(1) if anew else target
        return (logits if logit else logits.softmax(1)).gather(1, chosen[:, None])[:, 0]

    with torch.no_grad():
        differences = [
            answer(removed(x, maps, f, fill, least=True)) - answer(removed(x, maps, f, fill)) for f in fractions
        ]
    return torch.stack(differences).mean(0)


def first_only(model: nn.Module, x: Tensor, maps: Tensor, fractions: Sequence[float], fill: Tensor) -> Tensor:
    target = model(x).argmax(1, keepdim=True)
    with torch.no_grad():
        kept = [model(removed(x, maps, f, fill, least=True)).softmax(1).gather(1, target)[:, 0] for f in fractions]
    return torch.stack(kept).mean(0)


def survival(
    model: nn.Module,
    fresh: nn.Module,
    x: Tensor,
    *,
    anew: bool = False,
    absolute: bool = False,
    ranks: bool = True,
) -> Tensor:
    target = model(x).argmax(1)
    one = gradient_times_input(model, x, target).sum(1).flatten(1)
    other = gradient_times_input(fresh, x, None if anew else target).sum(1).flatten(1)
    if absolute:
        one, other = one.abs(), other.abs()
    correlation = spearmanr if ranks else pearsonr
    return torch.tensor(
        [correlation(a.double().numpy(), b.double().numpy())[0] for a, b in zip(one, other, strict=True)]
    )


def recovery(bits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    found = neuron_recovery(Pathway((bits,), ("relu_0",)), CriticalNeurons((groups,), ("relu_0",)))
    return found.precision, found.recall


def by_neurons(bits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    hits = (bits & (groups >= 0)).sum(1)
    return hits / bits.sum(1).clamp(min=1), hits / (groups >= 0).sum(1)


def swapped(bits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    precision, recall = recovery(bits, groups)
    return recall, precision


def as_map(given: tuple[Tensor, ...], mask: Tensor) -> Tensor | None:
    return given[0] if len(given) == 1 and given[0].shape == mask.shape else None


def points_inside(given: tuple[Tensor, ...], mask: Tensor) -> Verdict:
    found = as_map(given, mask)
    if found is None:
        return Verdict(False, f"return one map of the mask's shape {tuple(mask.shape)}")
    largest = found == found.max()
    if bool((largest & mask).any()) and not bool((largest & ~mask).any()):
        return Verdict(True, "right")
    return Verdict(False, "the largest value lies outside the mask, or is shared with a pixel outside")


def is_diffuse(given: tuple[Tensor, ...], mask: Tensor) -> Verdict:
    found = as_map(given, mask)
    if found is None:
        return Verdict(False, f"return one map of the mask's shape {tuple(mask.shape)}")
    mass = found.abs() / found.abs().max()  # a sum of huge numbers would overflow
    inside = float(((mass * mask).sum() / mass.sum()).nan_to_num(1.0))  # NaN: all is 0
    if inside < 0.02:
        return Verdict(True, "right")
    return Verdict(False, f"{inside:.1%} of the map's mass lies inside the mask; below 2 % was asked for")


REMOVED = Compared(
    removed,
    {
        "the least relevant pixels are removed": (partial(removed, least=True), 0.4),
        "the maps are made absolute first: the most relevant pixel is the one of the largest signed sum": (
            partial(removed, absolute=True),
            0.4,
        ),
    },
)
RECOVERY = Compared(
    recovery,
    {
        "neurons are counted, not groups: of neurons that can stand in for each other one is needed": (by_neurons, 0.4),
        "the two are the wrong way round": (swapped, 0.5),
    },
)

QUESTIONS = [
    Question(
        "removed",
        "Pixels out",
        (Part("a share of the pixels", 3, some_pixels, REMOVED), Part("none, or all", 2, none_or_all, REMOVED)),
    ),
    Question(
        "score",
        "LeRF − MoRF",
        (
            Part(
                "right score",
                6,
                degradations,
                Compared(
                    score,
                    {
                        "the sign is turned round: LeRF minus MoRF": (lambda *arguments: -score(*arguments), 0.6),
                        "the class is predicted anew on the degraded images; it stays that of the untouched ones": (
                            partial(score, anew=True),
                            0.5,
                        ),
                        "these are logits; probabilities were asked": (partial(score, logit=True), 0.5),
                        "only the least relevant pixels are removed; MoRF is missing": (first_only, 0.3),
                    },
                ),
            ),
        ),
    ),
    Question(
        "survival",
        "A sanity check",
        (
            Part(
                "right similarity",
                5,
                networks_to_check,
                Compared(
                    survival,
                    {
                        "the fresh network is asked about its own class, not about the trained network's": (
                            partial(survival, anew=True),
                            0.4,
                        ),
                        "the maps are made absolute: signs were to be kept": (partial(survival, absolute=True), 0.6),
                        "this is Pearson's correlation of the values; take ranks": (
                            partial(survival, ranks=False),
                            0.6,
                        ),
                    },
                ),
            ),
        ),
    ),
    Question(
        "recovery",
        "Precision and recall",
        (
            Part("every neuron is its own group", 2, single, RECOVERY),
            Part("neurons that stand in for each other", 3, groups_of_two, RECOVERY),
        ),
    ),
    Question(
        "points_and_lies",
        "A map that points right and lies",
        (
            Part("wins the pointing game", 2, glyphs, Checked(points_inside)),
            Part("less than 2 % of its mass inside", 2, glyphs, Checked(is_diffuse)),
        ),
    ),
]
