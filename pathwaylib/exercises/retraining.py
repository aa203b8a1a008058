"""Chapter 8: remove and retrain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.stats import norm, t
from torch import Tensor

from ..data import planted
from ..evaluation.roar import remove_pixels
from .judging import Answer, Verdict, as_tensors, call_answer, judge


def _one_tensor(answer: Answer, arguments: tuple[object, ...], shape: tuple[int, ...]) -> Tensor | Verdict:
    """Return what an answer gives as one finite tensor of a shape, or why it is none."""
    value = call_answer(answer, arguments)
    if isinstance(value, Verdict):
        return value
    tensors = as_tensors(value)
    if tensors is None or len(tensors) != 1 or tensors[0].shape != shape:
        given = type(value).__name__ if tensors is None else [tuple(part.shape) for part in tensors]
        return Verdict(False, f"you returned {given}; give one tensor of shape {shape}, a value for each pixel")
    if not bool(tensors[0].isfinite().all()):
        return Verdict(False, "NaN or infinity is among the values")
    return tensors[0]


def check_gaps(answer: Answer) -> Verdict:
    """Check ``answer(scores, fraction, generator) -> bool (B, H, W)``: the most relevant pixels, ties by chance.

    Example:
        >>> def gaps(scores, fraction, generator):
        ...     count = round(fraction * scores[0].numel())
        ...     shuffled = torch.rand(scores.shape, generator=generator).flatten(1).argsort(1)
        ...     order = scores.flatten(1).gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
        ...     gone = torch.zeros_like(shuffled, dtype=torch.bool)
        ...     return gone.scatter(1, shuffled.gather(1, order[:, :count]), True).view(scores.shape)
        >>> check_gaps(gaps)
        ✓ right: exactly as many pixels of each image, the most relevant ones, equal ones by chance
        >>> check_gaps(lambda scores, fraction, generator: scores >= scores.quantile(1 - fraction))
        ✗ at fraction 0.0, 1 of 20 pixels of an image are marked; it must be 0
    """
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 5, 4, generator=generator)
    # One image whose scores are all higher, so that a threshold for the whole batch is seen.
    scores[0] += 3
    # -0.0 and 0.0 are equal; integers tie.
    for name, tested in (("", scores), (" where scores tie", scores.round())):
        for fraction in (0.0, 0.05, 0.33, 0.5, 1.0):
            count = round(fraction * 20)
            draw = torch.Generator().manual_seed(1)
            marked = _one_tensor(answer, (tested.clone(), fraction, draw), tuple(tested.shape))
            if isinstance(marked, Verdict):
                return marked
            gone = marked != 0
            wrong = [found for found in gone.flatten(1).sum(1).tolist() if found != count]
            if wrong:
                return Verdict(
                    False,
                    f"at fraction {fraction}{name}, {wrong[0]} of 20 pixels of an image are marked; it must be {count}",
                )
            for score, removed in zip(tested, gone, strict=True):
                if 0 < count < 20 and score[removed].min() < score[~removed].max():
                    opposite = score[removed].max() <= score[~removed].min()
                    what = "these are the least relevant ones" if opposite else "a pixel that stays has a higher score"
                    return Verdict(False, f"the number is right, but {what}: remove the largest scores of each image")
    flat = torch.zeros(400, 4, 4)
    drawn = [
        _one_tensor(answer, (flat.clone(), 0.5, torch.Generator().manual_seed(2)), tuple(flat.shape)) for _ in range(2)
    ]
    for one in drawn:
        if isinstance(one, Verdict):
            return one
    first, again = (one for one in drawn if isinstance(one, Tensor))
    if not torch.equal(first, again):
        return Verdict(False, "two runs with the same seed differ: draw from the generator that is given")
    # Five standard deviations of a share of 400 draws.
    if float(((first != 0).double().mean(0) - 0.5).abs().max()) > 5 * 0.5 / 400**0.5:
        return Verdict(
            False, "equal scores are broken by place: of 400 flat maps, some pixels leave far more often than others"
        )
    return Verdict(True, "right: exactly as many pixels of each image, the most relevant ones, equal ones by chance")


def check_leak(answer: Answer) -> Verdict:
    """Check ``answer(labels, masks) -> scores (B, H, W)``: a fifth of the image leaves, the glyph too, the label stays.

    The label must be told by the gaps alone, to the simplest of classifiers: the nearest mean of the gaps of a class.

    Example:
        >>> def leak(labels, masks):
        ...     scores = 2.0 * masks
        ...     for score, label in zip(scores, labels.tolist()):
        ...         score[5 * label : 5 * label + 3] += 1
        ...     return scores
        >>> check_leak(leak)
        ✓ right: no glyph is left, and the gaps alone tell 100% of the labels
        >>> check_leak(lambda labels, masks: masks.float())
        ✗ no glyph is left, but the gaps alone tell 36% of the labels; chance is 25%, more than 95% are asked for
    """
    data = planted(400, seed=8, size=20)
    assert data.masks is not None
    scores = _one_tensor(answer, (data.labels.clone(), data.masks.clone()), tuple(data.masks.shape))
    if isinstance(scores, Verdict):
        return scores
    white = type(data)(torch.full_like(data.images, 255), data.labels, data.classes)
    left = remove_pixels(white, scores, 0.2, fill=torch.zeros(3, dtype=torch.uint8))
    gone = left.images[:, 0] == 0
    whole = float((gone | ~data.masks).flatten(1).all(1).double().mean())
    if whole < 1:
        return Verdict(False, f"in {1 - whole:.0%} of the images a part of the glyph is left: give it the top scores")
    vectors, half = gone.flatten(1).double(), len(data) // 2
    means = torch.stack([vectors[:half][data.labels[:half] == label].mean(0) for label in range(len(data.classes))])
    found = torch.cdist(vectors[half:], means).argmin(1)
    told = float((found == data.labels[half:]).double().mean())
    if told <= 0.95:
        return Verdict(
            False,
            f"no glyph is left, but the gaps alone tell {told:.0%} of the labels; chance is 25%, "
            "more than 95% are asked for",
        )
    return Verdict(True, f"right: no glyph is left, and the gaps alone tell {told:.0%} of the labels")


def _seed_interval(
    quantile: Callable[[int], float] = lambda n: float(t.ppf(0.975, n - 1)), ddof: int = 1, root: bool = True
) -> Answer:
    """Return a function that gives the mean paired difference and its interval, with the parts that may be wrong."""

    def computed(first: Tensor, second: Tensor) -> tuple[float, float, float]:
        d = (first - second).numpy()
        margin = quantile(len(d)) * d.std(ddof=ddof) / (len(d) ** 0.5 if root else 1)
        return float(d.mean()), float(d.mean() - margin), float(d.mean() + margin)

    return computed


def _unpaired(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    n = len(first)
    value = float(first.mean() - second.mean())
    margin = float(t.ppf(0.975, 2 * n - 2)) * float(((first.var() + second.var()) / n).sqrt())
    return value, value - margin, value + margin


def _range(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    d = first - second
    return float(d.mean()), float(d.min()), float(d.max())


def check_seed_difference(answer: Answer) -> Verdict:
    """Check ``answer(first, second) -> (difference, low, high)``: Student's 95 % interval of paired differences.

    Example:
        >>> def difference(first, second):
        ...     d = first - second
        ...     margin = t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
        ...     return d.mean(), d.mean() - margin, d.mean() + margin
        >>> check_seed_difference(difference)
        ✓ right: the same seeds are compared, and few seeds give a wide interval
        >>> check_seed_difference(lambda first, second: ((first - second).mean(), 0.0, 1.0))
        ✗ the shape is right, but 67% of the values are wrong, for example 0 where -0.1296 is right
    """

    def accuracies(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shared = torch.rand(3 + seed, generator=generator, dtype=torch.float64) / 5
        parts = torch.rand(2, 3 + seed, generator=generator, dtype=torch.float64) / 10
        return 0.5 + shared + parts[0], 0.6 + shared + parts[1]

    return judge(
        answer,
        [partial(accuracies, seed) for seed in range(3)],
        _seed_interval(),
        {
            "1.96 is for many seeds: with few, take Student's t with one degree of freedom less than seeds": (
                _seed_interval(lambda n: float(norm.ppf(0.975)))
            ),
            "the degrees of freedom are one less than the number of seeds": (
                _seed_interval(lambda n: float(t.ppf(0.975, n)))
            ),
            "this quantile leaves 5 % on each side: a 95 % interval leaves 2.5 %": (
                _seed_interval(lambda n: float(t.ppf(0.95, n - 1)))
            ),
            "the standard deviation must divide by the number of seeds minus one": _seed_interval(ddof=0),
            "this is where single differences lie; the mean of n is √n times as certain": _seed_interval(root=False),
            "the two are treated as independent: take the differences of equal seeds first": _unpaired,
            "these are the least and the largest difference: they hold the mean for 3 seeds only 3 times in 4": _range,
        },
        "right: the same seeds are compared, and few seeds give a wide interval",
    )


def check_free_removal(answer: Answer) -> Verdict:
    """Check ``answer() -> (signal, covariance)``: the most important pixel can go for nothing, a lesser one cannot.

    The label is y = ±1, each half of the time, the pixels are y · signal plus Gaussian noise, so the best classifier
    is linear with weights w = covariance⁻¹ signal, and pixel j contributes w_j · signal_j to its response. Removing
    the pixel with the largest contribution must cost at most 0.5 points of the best accuracy, and removing one with
    at most half of its contribution at least 2.

    Example:
        >>> check_free_removal(lambda: ([1.0, 1.0, 0.5], [[1, 0.99, 0], [0.99, 1, 0], [0, 0, 1]]))
        ✓ right: pixel 0 contributes 0.50 and costs 0.05 points, pixel 2 contributes 0.25 and costs 2.68
        >>> check_free_removal(lambda: ([1.0, 0.5], [[1, 0], [0, 1]]))
        ✗ without pixel 0, of the largest contribution 1.00, the best accuracy falls by 17.68 points; at most 0.5
    """
    value = call_answer(answer, ())
    if isinstance(value, Verdict):
        return value
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        return Verdict(False, "return two things: the signal (one number per pixel) and the covariance of the noise")
    try:
        signal, covariance = (np.asarray(part, dtype=np.float64) for part in value)
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, "signal and covariance must be tensors or lists of numbers")
    pixels = len(signal) if signal.ndim == 1 else 0
    if pixels < 2 or covariance.shape != (pixels, pixels):
        return Verdict(False, f"shapes {signal.shape} and {covariance.shape}: give (n,) and (n, n), with n > 1")
    if not (np.isfinite(signal).all() and np.allclose(covariance, covariance.T)):
        return Verdict(False, "a covariance is symmetric, and all numbers are finite")
    if np.linalg.eigvalsh(covariance)[0] < 1e-9:
        return Verdict(False, "this is no covariance, or a singular one: its eigenvalues must be positive")

    def best_accuracy(kept: list[int]) -> float:
        part = signal[kept]
        return float(norm.cdf((part @ np.linalg.solve(covariance[np.ix_(kept, kept)], part)) ** 0.5))

    contribution = signal * np.linalg.solve(covariance, signal)
    everything = list(range(pixels))
    cost = [
        100 * (best_accuracy(everything) - best_accuracy([j for j in everything if j != pixel])) for pixel in everything
    ]
    top = int(contribution.argmax())
    if cost[top] > 0.5:
        return Verdict(
            False,
            f"without pixel {top}, of the largest contribution {contribution[top]:.2f}, the best accuracy falls by "
            f"{cost[top]:.2f} points; at most 0.5",
        )
    lesser = [pixel for pixel in everything if contribution[pixel] <= contribution[top] / 2]
    if not lesser:
        return Verdict(False, "no pixel has at most half of the largest contribution")
    worst = max(lesser, key=lambda pixel: cost[pixel])
    if cost[worst] < 2:
        return Verdict(
            False,
            f"pixel {top} is free, but so is each with at most half of its contribution: the dearest, pixel {worst}, "
            f"costs {cost[worst]:.2f} points; at least 2",
        )
    return Verdict(
        True,
        f"right: pixel {top} contributes {contribution[top]:.2f} and costs {cost[top]:.2f} points, pixel {worst} "
        f"contributes {contribution[worst]:.2f} and costs {cost[worst]:.2f}",
    )
