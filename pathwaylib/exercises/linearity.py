"""Chapter 5: how far a linear map holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..linearity import LinearRegion, linear_region
from ..neurons import observe, response
from .judging import Answer, Verdict, judge, judge_network


def _layer(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a layer's weight and bias, inputs, and which neurons are kept: for odd seeds none of the last input's."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 4, generator=generator) * torch.rand(7, 1, generator=generator).exp()
    bias, x = torch.randn(7, generator=generator), torch.randn(5, 4, generator=generator)
    kept = torch.rand(5, 7, generator=generator) < 0.5
    kept[:, 0] = True
    if seed % 2:
        kept[-1] = False
    return weight, bias, x, kept


def check_layer_radius(answer: Answer) -> Verdict:
    """Check ``answer(weight, bias, x, kept) -> (B,)``: the radius in which no kept neuron of a layer changes sign.

    ``kept`` is one bit per neuron and input, ``(B, n)``; the radius is infinite where nothing is kept.

    Example:
        >>> def radius(weight, bias, x, kept):
        ...     distance = (x @ weight.T + bias).abs() / weight.norm(dim=1)
        ...     return distance.masked_fill(~kept, torch.inf).amin(1)
        >>> check_layer_radius(radius)
        ✓ right: the distance to the nearest kink of a kept neuron
        >>> check_layer_radius(lambda weight, bias, x, kept: radius(weight, bias, x, torch.ones_like(kept)))
        ✗ removed neurons bind too: they are 0 whatever their sign, so leave them out
    """

    def radius(
        size: Callable[[Tensor], Tensor] = torch.abs,
        length: Callable[[Tensor], Tensor] = lambda weight: weight.norm(dim=1),
        keep: Callable[[Tensor], Tensor] = lambda kept: kept,
    ) -> Answer:
        def found(weight: Tensor, bias: Tensor, x: Tensor, kept: Tensor) -> Tensor:
            distance = size(x @ weight.T + bias) / length(weight)
            least: Tensor = distance.masked_fill(~keep(kept), torch.inf).amin(1)
            return least

        return found

    def first_by_value(weight: Tensor, bias: Tensor, x: Tensor, kept: Tensor) -> Tensor:
        z = (x @ weight.T + bias).abs().masked_fill(~kept, torch.inf)
        least = z.min(1)
        distance: Tensor = least.values / weight.norm(dim=1)[least.indices]
        return distance

    right = radius()
    return judge(
        answer,
        tuple(partial(_layer, seed) for seed in range(4)),
        right,
        {
            "removed neurons bind too: they are 0 whatever their sign, so leave them out": (
                radius(keep=torch.ones_like)
            ),
            "the kept neurons are left out: True keeps a neuron": radius(keep=torch.logical_not),
            "these are pre-activations, not distances: divide each by the length of its gradient": (
                radius(length=lambda weight: torch.ones(len(weight)))
            ),
            "this is the distance of the neuron of least |z|; another may be nearer, because its gradient is longer": (
                first_by_value
            ),
            "the gradient's length is squared: divide by the 2-norm itself": (
                radius(length=lambda weight: weight.square().sum(1))
            ),
            "the gradient's length is taken in the 1-norm: a Euclidean ball needs the 2-norm": (
                radius(length=lambda weight: weight.abs().sum(1))
            ),
            "the signs are kept: a neuron that is off is as far from its kink as |z| says": radius(size=lambda z: z),
            "only neurons that are on bind here: one that is off can wake up": (
                radius(size=lambda z: z.masked_fill(z <= 0, torch.inf))
            ),
            "dead neurons are put at distance 0: use the pre-activation z, not the activation": radius(size=torch.relu),
            "this is one radius for the whole batch: return one per input, shape (B,)": (
                lambda *arguments: right(*arguments).min()
            ),
        },
        "right: the distance to the nearest kink of a kept neuron",
    )


def _window(seed: int) -> tuple[Tensor, Tensor]:
    """Return the entries of a pooling window and their gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, generator=generator), 2 * torch.randn(4, 3, generator=generator)


def check_pool_distance(answer: Answer) -> Verdict:
    """Check ``answer(p, gradients) -> number``: how far the winner of a max-pooling window certainly stays the same.

    ``p`` holds the window's entries ``(n,)``, ``gradients`` theirs with respect to the image ``(n, D)``.

    Example:
        >>> def distance(p, gradients):
        ...     winner = int(p.argmax())
        ...     rivals = [k for k in range(len(p)) if k != winner]
        ...     return min((p[winner] - p[k]) / (gradients[winner] - gradients[k]).norm() for k in rivals)
        >>> check_pool_distance(distance)
        ✓ right: the distance at which the first rival draws level with the winner
        >>> check_pool_distance(lambda p, gradients: (p.max() - p.sort().values[-2]) / gradients[p.argmax()].norm())
        ✗ the rivals move too: divide by the length of the difference of the two gradients
    """

    def over(
        lengths: Callable[[Tensor, Tensor], Tensor], pick: Callable[[Tensor, Tensor], Tensor] = lambda _, d: d.min()
    ) -> Answer:
        def found(p: Tensor, gradients: Tensor) -> Tensor:
            winner = int(p.argmax())
            rivals = [k for k in range(len(p)) if k != winner]
            gap = p[winner] - p[rivals]
            return pick(gap, gap / lengths(gradients[winner], gradients[rivals]))

        return found

    def relative(won: Tensor, lost: Tensor) -> Tensor:
        length: Tensor = (won - lost).norm(dim=1)
        return length

    def of_runner_up(gap: Tensor, distance: Tensor) -> Tensor:
        return distance[gap.argmin()]

    def alone(won: Tensor, lost: Tensor) -> Tensor:
        length: Tensor = won.norm()
        return length.expand(len(lost))

    return judge(
        answer,
        tuple(partial(_window, seed) for seed in range(8)),
        over(relative),
        {
            "only the runner-up is looked at: a lower entry that rises faster may draw level first": (
                over(relative, of_runner_up)
            ),
            "the rivals move too: divide by the length of the difference of the two gradients": over(alone),
            "this is the difference of the lengths: take the length of the difference": (
                over(lambda won, lost: (won.norm() - lost.norm(dim=1)).abs())
            ),
            "this is the sum of the lengths: right for opposite gradients only; take the length of the difference": (
                over(lambda won, lost: won.norm() + lost.norm(dim=1))
            ),
            "this is a sign's condition, |p| / length: what ends a pooling's piece is that a rival draws level": (
                lambda p, gradients: (p.abs() / gradients.norm(dim=1)).min()
            ),
            "the winner is compared with itself: 0 / 0 is nan, so leave it out": (
                lambda p, gradients: ((p.max() - p) / (gradients[p.argmax()] - gradients).norm(dim=1)).min()
            ),
            "this is a gap between values: divide it by how fast it can close": (
                over(lambda won, lost: torch.ones(len(lost)))
            ),
            "this is the last rival to draw level: take the first": over(relative, lambda _, distance: distance.max()),
        },
        "right: the distance at which the first rival draws level with the winner",
    )


def _moving_neurons(seed: int) -> tuple[Tensor, Tensor]:
    """Return pre-activations and their rates along a direction; some stand still, and one input's never cross."""
    generator = torch.Generator().manual_seed(seed)
    z, rate = torch.randn(4, 9, generator=generator), torch.randn(4, 9, generator=generator)
    rate[:, 3] = 0
    rate[-1] = z[-1]  # each moves away from its kink
    return z, rate


def check_distance_along(answer: Answer) -> Verdict:
    """Check ``answer(z, rate) -> (B,)``: how far each input can move along a direction before a neuron changes sign.

    ``z`` are pre-activations and ``rate`` their derivatives along the direction, both ``(B, n)``. Infinite where
    none will change.

    Example:
        >>> def distance(z, rate):
        ...     distances = -z / rate
        ...     return torch.where(distances > 0, distances, torch.inf).amin(1)
        >>> check_distance_along(distance)
        ✓ right: the nearest kink ahead, and none that lies behind
        >>> check_distance_along(lambda z, rate: (z / rate).abs().amin(1))
        ✗ neurons that move away from their kink are counted: -z / rate is negative there
    """

    def nearest(distances: Callable[[Tensor, Tensor], Tensor]) -> Answer:
        def found(z: Tensor, rate: Tensor) -> Tensor:
            ahead = distances(z, rate)
            return torch.where(ahead > 0, ahead, torch.inf).amin(1)

        return found

    right = nearest(lambda z, rate: -z / rate)
    return judge(
        answer,
        tuple(partial(_moving_neurons, seed) for seed in range(4)),
        right,
        {
            "neurons that move away from their kink are counted: -z / rate is negative there": (
                lambda z, rate: (z / rate).abs().amin(1)
            ),
            "the sign is wrong: z + s rate = 0 at s = -z / rate": nearest(lambda z, rate: z / rate),
            "negative distances win: they lie behind the image, so look ahead only": (
                lambda z, rate: (-z / rate).amin(1)
            ),
            "the rate is missing: the distance is -z / rate": nearest(lambda z, rate: -z),
            "the ratio is upside down: the distance is -z / rate": nearest(lambda z, rate: -rate / z),
            "this is one distance for the whole batch: return one per input, shape (B,)": (
                lambda z, rate: right(z, rate).min()
            ),
        },
        "right: the nearest kink ahead, and none that lies behind",
    )


def sign_radius(model: nn.Module, x: Tensor) -> float:
    """Return the least distance to a change of sign of any neuron, whatever pooling does, for one input.

    This is the radius as it stands in the paper. Where a max-pooling binds it is too large; then the gradients used
    here, which follow the winners at ``x``, say nothing about it.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).eval()
        >>> with torch.no_grad():
        ...     _ = model[0].weight.fill_(2), model[0].bias.fill_(-6)
        >>> sign_radius(model, torch.zeros(1, 1))
        3.0
    """
    leaf = x.detach().clone().requires_grad_()
    best = float("inf")
    with torch.enable_grad():
        for z in observe(model, leaf).pre:
            for value in z.flatten():
                (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True, materialize_grads=True)
                length = float(gradient.norm())
                if length:
                    best = min(best, float(value.detach().abs()) / length)
    return best


def check_sign_radius_fails(answer: Answer) -> Verdict:
    """Check ``answer() -> (model, x)``: a network that stops being linear well before a neuron changes sign.

    ``x`` is one input. No neuron changes sign within twice the radius R, and yet beyond R the response leaves its
    linear map.

    Example:
        >>> from .judging import small_network
        >>> check_sign_radius_fails(lambda: (small_network(0)[0], torch.ones(1, 6)))
        ✗ what binds here is the sign of a neuron of relu_0, so signs alone give the right radius: let a pooling bind
    """
    return judge_network(answer, _judge_sign_radius, most=1_000)


def _judge_sign_radius(model: nn.Module, x: Tensor) -> Verdict:
    region = linear_region(model, x)
    binding, radius = region.binding[0], float(region.radius)
    if binding is None:
        return Verdict(False, "nothing binds: the network is linear everywhere, so let a pooling choose between pixels")
    if binding.rival is None:
        return Verdict(
            False,
            f"what binds here is the sign of a neuron of {binding.site}, so signs alone give the right radius: "
            "let a pooling bind",
        )
    if radius == 0:
        return Verdict(False, "two entries tie at x, so R is 0: move x off the tie")
    signs = sign_radius(model, x)
    if signs < 2 * radius:
        return Verdict(
            False, f"a neuron changes sign at {signs:.3g}, too close to R = {radius:.3g}: let it be 2 R or more"
        )
    if _leaves(model, x, region, 0.5 * radius):
        return Verdict(False, "the response is not linear inside R; is everything in the network piecewise linear?")
    if not _leaves(model, x, region, 2 * radius):
        return Verdict(False, "the winner changes at R, but the response stays linear: let the two entries act on it")
    return Verdict(True, f"right: linear up to R = {radius:.3g}, while no neuron changes sign before {signs:.3g}")


def _leaves(model: nn.Module, x: Tensor, region: LinearRegion, distance: float) -> bool:
    """Tell whether the response at some distance towards the binding condition is off its linear map."""
    point = x + distance * region.direction
    with torch.no_grad():
        found = float(response(model(point), region.targets))
    expected = float(region.predict(point))
    scale = distance * float(region.gradient.norm()) + 1e-3 * abs(expected)
    return abs(found - expected) > 0.01 * scale + 1e-6
