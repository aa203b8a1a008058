"""Where the function along a line has its kinks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import PathwayError
from ..neurons import Site, check_batch, check_model, per_input, refuse_inference_mode
from ..pathway import Pathway
from .piecewise import KINKS, Watch, gather, require_single


def first_kink(model: nn.Module, x: Tensor, direction: Tensor, pathway: Pathway | None = None) -> Tensor:
    """Return how far each image can move along a direction before a condition changes.

    Exact up to rounding, by one forward run with tangents, unless a condition holds with equality at ``x`` itself.
    That one is passed over: it lies at distance 0 and not ahead. The run then stays on one side of it (a ReLU counts as
    off), whatever the direction, and kinks that depend on the other side are missed: start a hair ahead, or use
    :func:`linear_pieces`, which does.

    Args:
        model: a piecewise-linear network in eval mode, see :func:`linear_region`.
        x: images ``(B, ...)``.
        direction: shaped like ``x``, or like one image.
        pathway: of these images; None means the full network.

    Returns:
        ``(B,)``, in lengths of ``direction``: the kink is at ``x + distance * direction``. Infinite where there is
        none.

    Raises:
        PathwayError: as :func:`linear_region`, and if ``direction`` does not fit the images.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        ...     _ = net[0].bias.copy_(torch.tensor([-3.0, 4.0]))
        >>> first_kink(net, torch.zeros(1, 1), torch.ones(1)), first_kink(net, torch.zeros(1, 1), -torch.ones(1))
        (tensor([3.]), tensor([2.]))
    """
    return _along(model, x, direction, pathway)(x.new_zeros(len(x)))


def linear_pieces(
    model: nn.Module, x: Tensor, direction: Tensor, length: float = 1.0, pathway: Pathway | None = None
) -> tuple[Tensor, ...]:
    """Return the positions of all kinks along a line from each image: between two of them the network is linear.

    One forward run per kink; images of a batch walk side by side. See :func:`walk` for what counts as one kink.

    Args:
        model: a piecewise-linear network in eval mode, see :func:`linear_region`.
        x: images ``(B, ...)``.
        direction: shaped like ``x``, or like one image.
        length: of the walk, in lengths of ``direction``.
        pathway: of these images, the same all along the line; None means the full network.

    Returns:
        One tensor per image, increasing, above 0 and below ``length``: the kinks are at ``x + position * direction``.

    Raises:
        PathwayError: as :func:`first_kink`, and if ``length`` is not positive and finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        ...     _ = net[0].bias.copy_(torch.tensor([-0.25, -1.0]))
        >>> [round(float(position), 4) for position in linear_pieces(net, torch.zeros(1, 1), torch.ones(1))[0]]
        [0.25, 0.5]
    """
    return walk(_along(model, x, direction, pathway), x.new_zeros(len(x)), length)


def walk(next_kink: Callable[[Tensor], Tensor], start: Tensor, length: float = 1.0) -> tuple[Tensor, ...]:
    """Step from kink to kink until ``start + length``; return the kinks' positions, per walker.

    At a kink itself the conditions cannot tell its two sides apart. So every step, the first included, ends a
    hair (for float64 about 4e-11 of the length) behind a kink; kinks closer to each other than that count as one.

    Args:
        next_kink: gets positions ``(B,)``, returns the distance from each to the next kink, infinite where none is.
        start: positions ``(B,)``.
        length: of the walk.

    Raises:
        PathwayError: if ``length`` is not positive and finite.

    Example:
        >>> walk(lambda t: t.ceil() - t, torch.tensor([0.5], dtype=torch.float64), 3)
        (tensor([1., 2., 3.], dtype=torch.float64),)
    """
    if not 0 < length < float("inf"):
        raise PathwayError(f"length is {length}; give a positive, finite length")
    hair = length * torch.finfo(start.dtype).eps ** (2 / 3)
    end = start + length
    position, last, step = start + hair, start, torch.full_like(start, hair)
    kinks: list[list[Tensor]] = [[] for _ in start]
    while True:
        distance = next_kink(position)
        kink = position + distance
        ahead = kink < end
        if not bool(ahead.any()):
            return tuple(torch.stack(found) if found else start.new_empty(0) for found in kinks)
        for walker in (ahead & (kink > last + 2 * hair)).nonzero()[:, 0].tolist():
            kinks[walker].append(kink[walker])
        # A condition that hardly changes along the line can seem not passed yet, by rounding: step on faster.
        step = torch.where(distance < 2 * step, 2 * step, hair)
        last = torch.where(ahead, kink, end)
        position = torch.where(ahead, kink + step, end)


def _along(model: nn.Module, x: Tensor, direction: Tensor, pathway: Pathway | None) -> Callable[[Tensor], Tensor]:
    """Return the function that finds the distance from a position on each image's line to the next kink."""
    check_model(model, x)
    require_single(x)
    check_batch(x, pathway)
    if direction.shape not in (x.shape, x.shape[1:]):
        raise PathwayError(
            f"the direction has shape {tuple(direction.shape)}, the images {tuple(x.shape)}; give one per image, or one"
        )
    tangent = direction.detach().to(x).expand_as(x)

    def next_kink(position: Tensor) -> Tensor:
        point = x.detach() + per_input(position, x) * tangent
        kinks = KinkDistance(pathway)
        with torch.no_grad(), forward_ad.dual_level():
            kinks.follow(model, moving(point, tangent))
        return x.new_full((len(x),), torch.inf) if kinks.distance is None else kinks.distance

    return next_kink


class KinkDistance(Watch):
    """Visitor and function mode that finds the distance to the nearest kink along the tangents of a run.

    Give the network, or one of its sites, a dual tensor (:mod:`torch.autograd.forward_ad`): every later
    pre-activation then moves at a known rate. What carries no tangent imposes nothing.

    Args:
        pathway: of the pathway network; None means the full one.

    Attributes:
        distance: ``(B,)``: the least positive step along the tangents at which a condition changes, infinite where
            there is none; None before anything that moves was seen.

    Raises:
        PathwayError: during the run, if what moves enters a function that is not known to be piecewise linear.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
        >>> kinks = KinkDistance()
        >>> with torch.no_grad(), forward_ad.dual_level():
        ...     _ = net[0].weight.fill_(2), net[0].bias.fill_(1)  # z = 2 x + 1
        ...     x = moving(torch.ones(1, 1), -torch.ones(1, 1))
        ...     _ = kinks.follow(net, x)
        >>> kinks.distance
        tensor([1.5000])
    """

    def __init__(self, pathway: Pathway | None = None) -> None:
        super().__init__(pathway)
        self.distance: Tensor | None = None

    def at_site(self, site: Site, z: Tensor) -> Tensor:
        """Take the site's kinks into account; return its activation."""
        value, rate = forward_ad.unpack_dual(z)
        if rate is not None:
            for kink in KINKS[site.kind]:
                self._note(((kink - value) / rate).masked_fill(~self.kept(site, z), torch.inf))
        return self.visit(site, z)

    def at_pool(self, name: str, windows: Tensor, given: Tensor) -> None:
        """Take the windows' rivals into account."""
        value, rate = forward_ad.unpack_dual(given)
        if rate is not None:
            values, rates = gather(value, windows, -torch.inf), gather(rate, windows, 0)
            winner = values.argmax(-1, keepdim=True)
            self._note((values.gather(-1, winner) - values) / (rates - rates.gather(-1, winner)))

    def _note(self, distances: Tensor) -> None:
        ahead = torch.where(distances > 0, distances, torch.inf).flatten(1).amin(1)
        self.distance = ahead if self.distance is None else self.distance.minimum(ahead)


def moving(value: Tensor, rate: Tensor) -> Tensor:
    """Return a dual tensor: ``value``, which changes at ``rate``. To be used inside ``forward_ad.dual_level()``."""
    refuse_inference_mode()  # it drops tangents in silence
    with warnings.catch_warnings():
        # On its first use PyTorch compiles parts of its forward mode with a function that it has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        dual: Tensor = forward_ad.make_dual(value, rate)
        return dual
