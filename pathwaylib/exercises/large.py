"""Checks of chapter 13: what changes when networks and images are large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..generator.network import RecursiveEmbedder
from .judging import Answer, Verdict, judge

_Shapes = Sequence[tuple[int, int, int]]


def _pre_activations(seed: int) -> tuple[list[Tensor]]:
    """Return pre-activations of two sites of very different size, some exactly on a kink."""
    generator = torch.Generator().manual_seed(seed)
    sites = [8 * torch.rand(2, 3, 5, 5, generator=generator) - 3, 12 * torch.rand(2, 7, generator=generator) - 2]
    for z in sites:
        z.flatten()[:3] = torch.tensor([0.0, 6.0, 0.0])
    return (sites,)


def check_states(answer: Answer) -> Verdict:
    """Check ``answer(pre) -> (3,)``: the shares of ReLU6 neurons that are dead, linear and saturated.

    ``pre`` holds the pre-activations of each site; a share is one of all neurons of all sites and inputs together. A
    neuron on a kink counts as dead at 0 and as saturated at 6: its activation is that of its neighbours there.

    Example:
        >>> def states(pre):
        ...     z = torch.cat([site.flatten() for site in pre])
        ...     return torch.stack([z <= 0, (z > 0) & (z < 6), z >= 6]).float().mean(1)
        >>> check_states(states)
        ✓ right: three states, two of which let no gradient through
        >>> check_states(lambda pre: torch.stack([states([site]) for site in pre]).mean(0))
        ✗ this is the mean over sites: a site of 7 neurons then counts as much as one of 75
    """

    def shares(z: Tensor) -> Tensor:
        parts = [z <= 0, (z > 0) & (z < 6), z >= 6]
        return torch.stack([part.double().mean() for part in parts])

    def joined(pre: Sequence[Tensor]) -> Tensor:
        return torch.cat([z.flatten() for z in pre])

    return judge(
        answer,
        [partial(_pre_activations, seed) for seed in range(3)],
        lambda pre: shares(joined(pre)),
        {
            "this is the mean over sites: a site of 7 neurons then counts as much as one of 75": (
                lambda pre: torch.stack([shares(z) for z in pre]).mean(0)
            ),
            "these are numbers of neurons, not shares: divide by how many there are": (
                lambda pre: shares(joined(pre)) * len(joined(pre))
            ),
            "the order is dead, linear, saturated": lambda pre: shares(joined(pre)).flip(0),
            "only a pre-activation of exactly 6 counts as saturated: whatever is above is cut to 6 too": (
                lambda pre: (
                    torch.stack([(joined(pre) <= 0), (joined(pre) > 0) & (joined(pre) != 6), joined(pre) == 6])
                    .double()
                    .mean(1)
                )
            ),
            "neurons on a kink count as linear: at 0 the activation is 0, at 6 it is 6": (
                lambda pre: (
                    torch.stack([joined(pre) < 0, (joined(pre) >= 0) & (joined(pre) <= 6), joined(pre) > 6])
                    .double()
                    .mean(1)
                )
            ),
        },
        "right: three states, two of which let no gradient through",
    )


def _neurons(seed: int) -> tuple[Tensor, Tensor]:
    """Return pre-activations and their gradients; for seed 3 one gradient is 0."""
    generator = torch.Generator().manual_seed(seed)
    z = 12 * torch.rand(9, generator=generator) - 3
    gradients = torch.randn(9, 4, generator=generator) * torch.rand(9, 1, generator=generator).exp()
    if seed == 3:
        gradients[2] = 0
    return z, gradients


def check_two_kinks(answer: Answer) -> Verdict:
    """Check ``answer(z, gradients) -> (n,)``: how far each ReLU6 neuron is from its nearest kink.

    ``z`` ``(n,)`` are pre-activations, ``gradients`` ``(n, D)`` theirs with respect to the image. A neuron that does
    not move with the image is infinitely far.

    Example:
        >>> check_two_kinks(lambda z, gradients: torch.minimum(z.abs(), (z - 6).abs()) / gradients.norm(dim=1))
        ✓ right: a ReLU6 neuron has two kinks, and the nearer one binds
        >>> check_two_kinks(lambda z, gradients: z.abs() / gradients.norm(dim=1))
        ✗ only the kink at 0 counts here: a neuron at z = 5.9 is nearly at its other one
    """

    def distance(
        gap: Callable[[Tensor], Tensor] = lambda z: torch.minimum(z.abs(), (z - 6).abs()),
        length: Callable[[Tensor], Tensor] = lambda gradients: gradients.norm(dim=1),
    ) -> Answer:
        return lambda z, gradients: gap(z) / length(gradients)

    return judge(
        answer,
        [partial(_neurons, seed) for seed in range(4)],
        distance(),
        {
            "only the kink at 0 counts here: a neuron at z = 5.9 is nearly at its other one": distance(torch.abs),
            "only the kink at 6 counts here": distance(lambda z: (z - 6).abs()),
            "this is the farther kink: the nearer one ends the linear region": (
                distance(lambda z: torch.maximum(z.abs(), (z - 6).abs()))
            ),
            "these are differences of z, not distances in the image: divide by the gradient's length": (
                distance(length=lambda gradients: torch.ones(len(gradients)))
            ),
            "the activation is used: a dead neuron's distance to 0 is that of z, not of a": (
                distance(lambda z: torch.minimum(z.clamp(0, 6), 6 - z.clamp(0, 6)))
            ),
            "the least of all is one number: return one per neuron": lambda z, g: distance()(z, g).min(),
        },
        "right: a ReLU6 neuron has two kinks, and the nearer one binds",
    )


def _picture(seed: int) -> tuple[int, int, float]:
    return [(640, 427, 0.875), (427, 640, 0.875), (500, 500, 1.0), (1000, 200, 0.5)][seed]


def check_central_box(answer: Answer) -> Verdict:
    """Check ``answer(width, height, crop) -> (left, top, right, bottom)``: the central square of a picture.

    Its side is ``crop`` times the picture's shorter side.

    Example:
        >>> def box(width, height, crop):
        ...     half = crop * min(width, height) / 2
        ...     return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half
        >>> check_central_box(box)
        ✓ right: square, central, and nothing is squeezed
        >>> check_central_box(lambda width, height, crop: (0, 0, width, height))
        ✗ this is the whole picture: resized to a square it would be squeezed
    """

    def box(width: float, height: float, side: float) -> tuple[float, float, float, float]:
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2

    return judge(
        answer,
        [partial(_picture, seed) for seed in range(4)],
        lambda width, height, crop: box(width, height, crop * min(width, height)),
        {
            "this is the whole picture: resized to a square it would be squeezed": (
                lambda width, height, crop: (0, 0, width, height)
            ),
            "width and height are exchanged: left and right go with the width": (
                lambda width, height, crop: box(height, width, crop * min(width, height))
            ),
            "the longer side is taken: the square then reaches over the edge": (
                lambda width, height, crop: box(width, height, crop * max(width, height))
            ),
            "`crop` is a share of the side here, not of the area": (
                lambda width, height, crop: box(width, height, crop**0.5 * min(width, height))
            ),
            "the square is in the upper left corner: centre it": (
                lambda width, height, crop: (0, 0, crop * min(width, height), crop * min(width, height))
            ),
            "these are left, top, width and height: the last two are the right and lower edge": (
                lambda width, height, crop: (
                    *box(width, height, crop * min(width, height))[:2],
                    crop * min(width, height),
                    crop * min(width, height),
                )
            ),
            "each side is cut by itself: the box is not square, and the picture would be squeezed": (
                lambda width, height, crop: (
                    (1 - crop) * width / 2,
                    (1 - crop) * height / 2,
                    (1 + crop) * width / 2,
                    (1 + crop) * height / 2,
                )
            ),
        },
        "right: square, central, and nothing is squeezed",
    )


_SITES: tuple[_Shapes, ...] = (
    ((4, 32, 32),),
    ((3, 7, 7), (2, 1, 1)),
    ((2, 15, 9), (5, 4, 4), (1, 5, 3)),
    ((2, 14, 14), (3, 28, 14)),
)


def check_pyramid(answer: Answer) -> Verdict:
    """Check ``answer(shapes, side) -> number``: numbers that a generator's embedders hold for one image.

    ``shapes`` lists ``(C, H, W)`` of each site. An embedder keeps the site's maps and every smaller version: each step
    halves them, rounding up, until neither side is longer than ``side``.

    Example:
        >>> def pyramid(shapes, side):
        ...     total = 0
        ...     for channels, height, width in shapes:
        ...         total += channels * height * width
        ...         while max(height, width) > side:
        ...             height, width = -(-height // 2), -(-width // 2)
        ...             total += channels * height * width
        ...     return total
        >>> check_pyramid(pyramid)
        ✓ right: little more than the activations themselves, since each step is a quarter of the one before
        >>> check_pyramid(lambda shapes, side: sum(c * h * w for c, h, w in shapes))
        ✗ these are the activations alone: the smaller maps are kept too
    """

    def held(shapes: _Shapes, side: int) -> float:
        with torch.random.fork_rng(devices=[]):
            found = [RecursiveEmbedder(c, 4, side)(torch.zeros(1, c, h, w))[1] for c, h, w in shapes]
        return float(sum(maps.numel() for pyramid in found for maps in pyramid))

    def count(
        shapes: _Shapes,
        side: int,
        halve: Callable[[int], int] = lambda n: -(-n // 2),
        until: Callable[[int, int], int] = max,
        first: bool = True,
        last: bool = True,
    ) -> float:
        total = 0
        for channels, height, width in shapes:
            sizes = [channels * height * width]
            while until(height, width) > side:
                height, width = halve(height), halve(width)
                sizes.append(channels * height * width)
            total += sum(sizes[0 if first else 1 : None if last else max(1, len(sizes) - 1)])
        return float(total)

    return judge(
        answer,
        [partial(_arguments, shapes, side) for shapes in _SITES for side in (4, 2)],
        held,
        {
            "these are the activations alone: the smaller maps are kept too": (
                lambda shapes, side: float(sum(c * h * w for c, h, w in shapes))
            ),
            "halves are rounded up: 7 pixels become 4, not 3": partial(count, halve=lambda n: n // 2),
            "the longer side decides when to stop": partial(count, until=min),
            "the site's own maps are kept too": partial(count, first=False),
            "the smallest maps count as well": partial(count, last=False),
            "4/3 is where an endless sum of quarters ends: the steps stop earlier, and sides are rounded": (
                lambda shapes, side: 4 / 3 * sum(c * h * w for c, h, w in shapes)
            ),
        },
        "right: little more than the activations themselves, since each step is a quarter of the one before",
    )


def _arguments(shapes: _Shapes, side: int) -> tuple[_Shapes, int]:
    return list(shapes), side
