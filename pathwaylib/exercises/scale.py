"""Checks of chapter 14: pathways of a whole data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .judging import Answer, Verdict, judge


def _lists(seed: int) -> tuple[Tensor, Tensor, int]:
    """Return lengths and positions of the lists of a column; one list is empty, one holds the last neuron."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(5, 9, generator=generator) < 0.4
    masks[seed % 5] = False
    masks[(seed + 1) % 5, -1] = True
    return masks.sum(1), masks.nonzero()[:, 1], masks.shape[1]


def check_bits(answer: Answer) -> Verdict:
    """Check ``answer(lengths, positions, neurons) -> (B, neurons)``: the bits of pathways stored as lists.

    ``lengths`` ``(B,)`` says how many neurons each pathway keeps, ``positions`` which, one pathway after another.

    Example:
        >>> def bits(lengths, positions, neurons):
        ...     found = torch.zeros(len(lengths), neurons, dtype=torch.bool)
        ...     found[torch.arange(len(lengths)).repeat_interleave(lengths), positions] = True
        ...     return found
        >>> check_bits(bits)
        ✓ right: each position sets one bit in the row of its own pathway
        >>> check_bits(lambda lengths, positions, neurons: (positions[:, None] == torch.arange(neurons)).any(0))
        ✗ all pathways are joined into one: `lengths` says where each list ends
    """

    def bits(lengths: Tensor, positions: Tensor, neurons: int) -> Tensor:
        lists = positions.split(lengths.tolist())
        return torch.stack([(one[:, None] == torch.arange(neurons)).any(0) for one in lists])

    def joined(lengths: Tensor, positions: Tensor, neurons: int) -> Tensor:
        return (positions[:, None] == torch.arange(neurons)).any(0)

    mistakes: dict[str, Answer] = {
        "all pathways are joined into one: `lengths` says where each list ends": joined,
        "every pathway has the neurons of all: `lengths` says where each list ends": (
            lambda lengths, positions, neurons: joined(lengths, positions, neurons).expand(len(lengths), -1)
        ),
        "positions are counted from 0": lambda lengths, positions, neurons: bits(lengths, positions - 1, neurons),
        "there is one row per position: positions of one pathway share a row": (
            lambda lengths, positions, neurons: positions[:, None] == torch.arange(neurons)
        ),
        "these are the bits of the neurons that are left out": (
            lambda lengths, positions, neurons: ~bits(lengths, positions, neurons)
        ),
    }
    tests = [partial(_lists, seed) for seed in range(4)]
    return judge(answer, tests, bits, mistakes, "right: each position sets one bit in the row of its own pathway")


def _pathways(seed: int) -> tuple[Tensor, Tensor]:
    """Return pathways, none of them empty, and the predicted class of each."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(14, 12, generator=generator) < torch.rand(12, generator=generator)
    masks[:, seed % 12] = True
    return masks, torch.arange(14) % 3


def check_typicality(answer: Answer) -> Verdict:
    """Check ``answer(masks, predicted) -> (B,)``: how usual each pathway is among the others of its class.

    Of each neuron it keeps, take the share of the *other* pathways of the class that keep it too; then the mean.

    Example:
        >>> def typicality(masks, predicted):
        ...     same = (predicted[:, None] == predicted).double().fill_diagonal_(0)
        ...     shares = same @ masks.double() / same.sum(1, keepdim=True)
        ...     return (shares * masks).sum(1) / masks.sum(1)
        >>> check_typicality(typicality)
        ✓ right: a pathway is compared with the others, and with those of its class alone
        >>> def with_itself(masks, predicted):
        ...     same = (predicted[:, None] == predicted).double()
        ...     return (same @ masks.double() / same.sum(1, keepdim=True) * masks).sum(1) / masks.sum(1)
        >>> check_typicality(with_itself)
        ✗ each pathway is compared with itself too: with few images, even the strangest one then looks usual
    """

    def usual(
        masks: Tensor, predicted: Tensor, own: bool = False, all_classes: bool = False, every: bool = False
    ) -> Tensor:
        same = (predicted[:, None] == predicted).double()
        if all_classes:
            same = torch.ones_like(same)
        if not own:
            same.fill_diagonal_(0)
        shares = same @ masks.double() / same.sum(1, keepdim=True)
        return shares.mean(1) if every else (shares * masks).sum(1) / masks.sum(1)

    def own_left_in_the_count(masks: Tensor, predicted: Tensor) -> Tensor:
        """Leave the image itself out above the fraction, and forget it below."""
        members = (predicted[:, None] == predicted).sum(1)
        return usual(masks, predicted) * (members - 1) / members

    mistakes: dict[str, Answer] = {
        "each pathway is compared with itself too: with few images, even the strangest one then looks usual": (
            partial(usual, own=True)
        ),
        "the pathway itself still counts in the divisor: of a class with n images, n - 1 are others": (
            own_left_in_the_count
        ),
        "pathways of all classes are compared: take those of the same predicted class": partial(
            usual, all_classes=True
        ),
        "the mean is over all neurons: take it over those that the pathway keeps": partial(usual, every=True),
        "this is the sum: divide by the number of neurons that the pathway keeps": (
            lambda masks, predicted: usual(masks, predicted) * masks.sum(1)
        ),
    }
    tests = [partial(_pathways, seed) for seed in range(4)]
    praise = "right: a pathway is compared with the others, and with those of its class alone"
    return judge(answer, tests, usual, mistakes, praise)


def _numbers_kept(seed: int) -> tuple[Tensor, int, int]:
    """Return how many of some pathways keep each neuron, how many pathways those are, and how many are drawn."""
    generator = torch.Generator().manual_seed(seed)
    images = 20
    return torch.randint(0, images + 1, (30,), generator=generator), images, (1, 5, 19, 20)[seed]


def check_union(answer: Answer) -> Verdict:
    """Check ``answer(kept_by, images, n) -> number``: neurons that at least one of ``n`` pathways keeps.

    ``kept_by`` ``(N,)`` says how many of the ``images`` pathways keep each neuron; ``n`` different ones are drawn from
    them at random, and the number is the mean over all draws.

    Example:
        >>> def union(kept_by, images, n):
        ...     return sum(1 - math.comb(images - m, n) / math.comb(images, n) for m in kept_by.tolist())
        >>> check_union(union)
        ✓ right: a neuron is missed where all n come from the pathways without it
        >>> check_union(lambda kept_by, images, n: n * kept_by.sum() / images)
        ✗ a neuron that two pathways keep is one neuron: sizes do not add up
    """

    def seen(kept_by: Tensor, images: int, n: int) -> float:
        return sum(1 - math.comb(images - kept, n) / math.comb(images, n) for kept in kept_by.tolist())

    def share(kept_by: Tensor, images: int) -> Tensor:
        return kept_by.double() / images

    mistakes: dict[str, Answer] = {
        "a neuron that two pathways keep is one neuron: sizes do not add up": (
            lambda kept_by, images, n: n * share(kept_by, images).sum()
        ),
        "the pathways are different ones: with each one drawn, fewer are left": (
            lambda kept_by, images, n: (1 - (1 - share(kept_by, images)) ** n).sum()
        ),
        "these are the neurons that are missed; the others are asked for": (
            lambda kept_by, images, n: len(kept_by) - seen(kept_by, images, n)
        ),
        "these are the neurons that all n keep: one is enough": (
            lambda kept_by, images, n: sum(math.comb(kept, n) / math.comb(images, n) for kept in kept_by.tolist())
        ),
        "this is a share of the neurons; their number is asked for": (
            lambda kept_by, images, n: seen(kept_by, images, n) / len(kept_by)
        ),
    }
    tests = [partial(_numbers_kept, seed) for seed in range(4)]
    return judge(
        answer, tests, seen, mistakes, "right: a neuron is missed where all n come from the pathways without it"
    )


def _sizes(images: int, neurons: int, sparsity: float) -> tuple[int, int, float]:
    return images, neurons, sparsity


def check_bytes(answer: Answer) -> Verdict:
    """Check ``answer(images, neurons, sparsity) -> bytes``: what pathways with their contributions take at least.

    Of ``k = round((1 - sparsity) * neurons)`` kept neurons, each has a contribution of two bytes. Which neurons these
    are takes ``neurons * H(k / neurons)`` bits, with the entropy ``H(d) = -d log2(d) - (1 - d) log2(1 - d)``.

    Example:
        >>> def least(images, neurons, sparsity):
        ...     k = round((1 - sparsity) * neurons)
        ...     d = k / neurons
        ...     bits = -neurons * (d * math.log2(d) + (1 - d) * math.log2(1 - d))
        ...     return images * (bits / 8 + 2 * k)
        >>> check_bytes(least)
        ✓ right: at usual sparsities most of it is the contributions, not the pathway
        >>> check_bytes(lambda images, neurons, sparsity: images * neurons / 8)
        ✗ this is a bit for every neuron, and no contribution: a sparse pathway takes less, its contributions more
    """

    def least(
        images: int,
        neurons: int,
        sparsity: float,
        log: Callable[[float], float] = math.log2,
        per_byte: float = 8,
        each: float = 2,
    ) -> float:
        kept = round((1 - sparsity) * neurons)
        density = kept / neurons
        entropy = -density * log(density) - (1 - density) * log(1 - density)
        return images * (neurons * entropy / per_byte + each * kept)

    mistakes: dict[str, Answer] = {
        "this is a bit for every neuron, and no contribution: a sparse pathway takes less, its contributions more": (
            lambda images, neurons, sparsity: images * neurons / 8
        ),
        "the contributions are missing: two bytes for each neuron kept": partial(least, each=0),
        "the logarithm is to base 2: the entropy is in bits": partial(least, log=math.log),
        "the entropy is in bits, and a byte has eight": partial(least, per_byte=1),
        "positions are stored as four bytes each here: which neurons are kept can be said in fewer": (
            lambda images, neurons, sparsity: images * 6 * round((1 - sparsity) * neurons)
        ),
        "sparsity is the share removed: 1 - sparsity is kept": (
            lambda images, neurons, sparsity: least(images, neurons, 1 - sparsity)
        ),
        "this is one image; multiply by the number of images": (
            lambda images, neurons, sparsity: least(1, neurons, sparsity)
        ),
    }
    tests = [
        partial(_sizes, *numbers) for numbers in ((1_000, 122_880, 0.95), (10, 1_000, 0.8), (1_281_167, 10_000, 0.99))
    ]
    return judge(
        answer, tests, least, mistakes, "right: at usual sparsities most of it is the contributions, not the pathway"
    )
