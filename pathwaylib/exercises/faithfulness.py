"""Checks of chapter 7: removing pixels, and what the removal proves."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn

from ..data import planted
from ..evaluation.faithfulness import degradation, lerf_minus_morf
from ..explainers import explain, explainers
from ..zoo import load_model
from .judging import Answer, Verdict, as_tensors, call_answer, judge


def check_most_relevant(answer: Answer) -> Verdict:
    """Check ``answer(scores, count, generator) -> bool (B, P)``: exactly ``count`` of the largest, ties at random.

    ``scores`` is ``(B, P)``, one number per pixel. Which of several equal pixels go is the generator's choice, made
    for each image on its own.

    Example:
        >>> def marked(scores, count, generator):
        ...     shuffled = torch.stack([torch.randperm(scores.shape[1], generator=generator) for _ in scores])
        ...     order = scores.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
        ...     first = shuffled.gather(1, order)[:, :count]
        ...     return torch.zeros_like(scores, dtype=torch.bool).scatter(1, first, True)
        >>> check_most_relevant(marked)
        ✓ right: exactly as many as asked for, the largest first, and no place is favoured among equals
    """
    generator = torch.Generator().manual_seed(0)
    distinct = torch.stack([torch.randperm(12, generator=generator) for _ in range(3)]).float() - 6
    tied = torch.tensor([[2.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, -1.0]]).expand(3, -1)
    tests = [(distinct, 5), (distinct, 0), (distinct, 12), (tied, 4), (tied, 2)]
    for scores, count in tests:
        value = call_answer(answer, (scores.clone(), count, torch.Generator().manual_seed(1)))
        if isinstance(value, Verdict):
            return value
        if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != scores.shape:
            what = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            return Verdict(False, f"return truth values of shape {tuple(scores.shape)}, one per pixel, not {what}")
        verdict = _judge_marks(value, scores, count)
        if verdict is not None:
            return verdict
    constant = torch.zeros(600, 8)
    runs = [call_answer(answer, (constant.clone(), 3, torch.Generator().manual_seed(seed))) for seed in (2, 2, 3)]
    for value in runs:
        if isinstance(value, Verdict):
            return value
    marks, again, other = runs
    share = marks.double().mean(0)
    if bool((marks == marks[0]).all()):
        return Verdict(False, "every image of a constant map loses the same pixels: let chance order the equal ones")
    # Five standard errors of a share of 3 / 8 over 600 images.
    if float((share - 3 / 8).abs().max()) > 0.1:
        favourite = int(share.argmax())
        return Verdict(False, f"in a constant map pixel {favourite} goes in {share.max():.0%} of the images, not 38 %")
    if not torch.equal(marks, again) or torch.equal(marks, other):
        return Verdict(
            False, "draw from the generator that is given, and from nothing else: the same seed, the same marks"
        )
    return Verdict(
        True, "right: exactly as many as asked for, the largest first, and no place is favoured among equals"
    )


def _judge_marks(marks: Tensor, scores: Tensor, count: int) -> Verdict | None:
    """Return what is wrong with the marks, if anything is."""
    numbers = marks.sum(1).tolist()
    if numbers != [count] * len(marks):
        found = next(number for number in numbers if number != count)
        if count == 0:
            return Verdict(
                False, f"{found} pixels go where none should: `order[-0:]` is the whole order, not nothing of it"
            )
        more = "a threshold takes all that tie with it" if found > count else "each image must lose that many"
        return Verdict(False, f"{found} pixels go where {count} should: {more}")
    if 0 < count < scores.shape[1]:
        gone, left = scores.masked_fill(~marks, torch.nan), scores.masked_fill(marks, torch.nan)
        if bool((_least(gone) < -_least(-left)).any()):
            if bool((-_least(-gone) <= _least(left)).all()):
                return Verdict(False, "the least relevant pixels go: the largest scores come first here")
            return Verdict(False, "a pixel stays that is more relevant than one that goes (signs count: -3 is below 1)")
    return None


def _least(values: Tensor) -> Tensor:
    """Return the least number of each row, NaN aside."""
    return values.nan_to_num(torch.inf).amin(1)


def check_matching_attribution(answer: Answer) -> Verdict:
    """Check ``answer(w, x, fill) -> (B, D)``: attributions that predict every drop of Φ(x) = ⟨w, x⟩ exactly.

    ``w`` and ``fill`` are ``(D,)``, ``x`` is ``(B, D)``; what is removed becomes ``fill``.

    Example:
        >>> check_matching_attribution(lambda w, x, fill: w * (x - fill))
        ✓ right: the sum over any set is what the response loses without it
    """

    def arguments(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn(7, generator=generator),
            torch.rand(3, 7, generator=generator),
            torch.rand(7, generator=generator),
        )

    return judge(
        answer,
        [partial(arguments, seed) for seed in range(3)],
        lambda w, x, fill: w * (x - fill),
        {
            "this is input × gradient: right where removed pixels become 0, and here they become `fill`": (
                lambda w, x, fill: w * x
            ),
            "this is the gradient: it does not know how far a pixel moves when it is removed": (
                lambda w, x, fill: w.expand_as(x)
            ),
            "this is what the response gains: a drop is Φ(x) minus Φ without the pixels": (
                lambda w, x, fill: w * (fill - x)
            ),
            "without the sign, pixels that speak against the class look like those that speak for it": (
                lambda w, x, fill: (w * (x - fill)).abs()
            ),
            "this is one number per image: return one per pixel": lambda w, x, fill: (w * (x - fill)).sum(1),
        },
        "right: the sum over any set is what the response loses without it",
    )


def check_correlation(answer: Answer) -> Verdict:
    """Check ``answer(sums, drops) -> float``: Pearson's correlation of two vectors, 0 where one does not vary.

    Example:
        >>> def correlation(sums, drops):
        ...     a, b = sums - sums.mean(), drops - drops.mean()
        ...     return (a @ b) / (a.norm() * b.norm()).clamp(min=1e-12)
        >>> check_correlation(correlation)
        ✓ right: 1 for proportional, 0 for a map that says the same everywhere
    """

    def arguments(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sums = torch.randn(20, dtype=torch.float64, generator=generator)
        noise = torch.randn(20, dtype=torch.float64, generator=generator)
        drops = {0: 2 * sums + noise + 3, 1: -sums + 5, 2: noise, 3: 0.5 * noise - sums.exp()}.get(seed, noise)
        return (torch.full_like(sums, 0.25) if seed == 4 else sums), drops

    def pearson(sums: Tensor, drops: Tensor, least: float = 1e-12) -> Tensor:
        a, b = sums - sums.mean(), drops - drops.mean()
        found: Tensor = (a @ b) / (a.norm() * b.norm()).clamp(min=least)
        return found

    def ranks(values: Tensor) -> Tensor:
        places: Tensor = values.argsort().argsort()
        return places.double()

    return judge(
        answer,
        [partial(arguments, seed) for seed in range(5)],
        pearson,
        {
            "a constant map gives 0 / 0 = nan: its correlation is 0 here": lambda a, b: pearson(a, b, 0.0),
            "this is the cosine: take the means away first": (
                lambda a, b: (a @ b) / (a.norm() * b.norm()).clamp(min=1e-12)
            ),
            "this is the covariance: divide it by both spreads": (
                lambda a, b: ((a - a.mean()) * (b - b.mean())).mean()
            ),
            "this is Spearman's correlation: it asks for the order alone, sensitivity-n for the values": (
                lambda a, b: pearson(ranks(a), ranks(b)) if float(a.std()) else a.new_zeros(())
            ),
            "this is the square of the correlation: its sign is lost": lambda a, b: pearson(a, b) ** 2,
            "this is its absolute value: a map that is exactly wrong would look right": lambda a, b: pearson(
                a, b
            ).abs(),
        },
        "right: 1 for proportional, 0 for a map that says the same everywhere",
    )


_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.3, 0.6, 0.9, 0.95, 0.98)


@cache
def _planted_test() -> tuple[nn.Module, Tensor, Tensor, float]:
    """Return the network, images, fill and the gradient's own score."""
    model, x = load_model("planted-cnn"), planted(n=24, seed=5)[:][0]
    fill = x.mean((0, 2, 3))
    gradient = explain(explainers()["gradient"], model, x)
    return model, x, fill, _score(model, x, gradient, fill)


def _score(model: nn.Module, x: Tensor, maps: Tensor, fill: Tensor) -> float:
    lerf, morf = (
        degradation(model, x, maps, order=order, ranking="strongest", fill=fill, fractions=_FRACTIONS)
        for order in ("lerf", "morf")
    )
    return float(lerf_minus_morf(lerf, morf).mean())


def check_impostor(answer: Answer) -> Verdict:
    """Check ``answer(x) -> (B, H, W)``: a map made without the network that degradation takes for a good explanation.

    The test: 24 images of ``planted``, network ``planted-cnn``, the mean colour as fill. LeRF − MoRF must reach 0.5.

    Example:
        >>> check_impostor(lambda x: torch.zeros(len(x), *x.shape[2:]))
        ✗ LeRF − MoRF is ...; reach 0.50, the gradient has ... What sets the pixels apart that matter here?
    """
    model, x, fill, own = _planted_test()
    value = call_answer(answer, (x.clone(),))
    if isinstance(value, Verdict):
        return value
    tensors = as_tensors(value)
    if tensors is None or len(tensors) != 1 or tensors[0].shape != (len(x), *x.shape[2:]):
        return Verdict(False, f"return one number per pixel, a tensor of shape {(len(x), *x.shape[2:])}")
    maps = tensors[0]
    if not bool(maps.isfinite().all()):
        return Verdict(False, "the map holds NaN or infinity")
    # "strongest" takes absolute values; what is given is an order, so it starts at 0.
    score = _score(model, x, (maps - maps.amin((1, 2), keepdim=True))[:, None], fill)
    if score < 0.5:
        return Verdict(
            False,
            f"LeRF − MoRF is {score:.2f}; reach 0.50, the gradient has {own:.2f}. What sets the pixels apart that "
            "matter here?",
        )
    return Verdict(True, f"right: {score:.2f}, the gradient has {own:.2f}, and your map never saw the network")
