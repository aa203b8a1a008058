"""The conditions around an image that end its linear region, and their gradients one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import PathwayError
from ..neurons import Site
from ..pathway import Pathway
from .convolution import sparse_convolution
from .kinks import moving
from .piecewise import KINKS, Watch, gather

HIDDEN = (
    "backward and forward derivatives of the network differ; does it hide a dependence on the image from gradients? "
    "In single precision rounding can be the cause: use float64"
)


@dataclass(frozen=True)
class Binding:
    """The condition that ends a linear region.

    Attributes:
        site: name of the activation call, such as ``relu_3``, or of the pooling call, such as ``max_pool_0``.
        neuron: position of the neuron in its site, such as (channel, row, column); of a pooling window: of its winner.
        rival: of a pooling window, the position that would win next; else None.
    """

    site: str
    neuron: tuple[int, ...]
    rival: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Node:
    """The conditions of one site or one max-pooling, for one image.

    Attributes:
        order: position in the run.
        name: of the site or pooling.
        shape: of its map, without the batch.
        entries: flat positions in the map that conditions read, ``(E,)``.
        rates: of these entries along the probes, ``(m, E)``.
        gap: how much the condition's function has to change, signed, ``(n,)``.
        plus: index into ``entries`` of each condition's entry, ``(n,)``.
        minus: the same for what is subtracted from it; None at sites.
    """

    order: int
    name: str
    shape: torch.Size
    entries: Tensor
    rates: Tensor
    gap: Tensor
    plus: Tensor
    minus: Tensor | None = None

    def condition_rates(self) -> Tensor:
        """Return the rates of the conditions' functions along the probes, ``(m, n)``."""
        return self.rates[:, self.plus] - (0 if self.minus is None else self.rates[:, self.minus])

    def binding(self, condition: int) -> Binding:
        """Return the public description of a condition."""
        neuron = self._position(self.plus[condition])
        return Binding(self.name, neuron, None if self.minus is None else self._position(self.minus[condition]))

    def _position(self, entry: Tensor) -> tuple[int, ...]:
        return tuple(int(index) for index in torch.unravel_index(self.entries[entry], self.shape))


class Probe(Watch):
    """Collects the conditions that can bind: those whose function moves along random directions of the image.

    What does not move along a random direction is locally constant, but for an event of probability 0.
    """

    def __init__(
        self, model: nn.Module, image: Tensor, pathway: Pathway | None, probes: int, generator: torch.Generator
    ) -> None:
        super().__init__(pathway)
        self.nodes: list[Node] = []
        shape = (probes, *image.shape[1:])
        self.directions = torch.randn(shape, generator=generator, dtype=torch.float64).to(image)
        with torch.no_grad(), forward_ad.dual_level():
            self.follow(model, moving(image.expand(shape).clone(), self.directions))

    def at_site(self, site: Site, z: Tensor) -> Tensor:
        """Take in the neurons of a site that move along the probes."""
        value, rate = forward_ad.unpack_dual(z)
        if rate is not None:
            alive = (self.kept(site, z)[0] & (rate != 0).any(0)).flatten().nonzero()[:, 0]
            gaps = torch.stack([kink - value[0].flatten()[alive] for kink in KINKS[site.kind]])
            gap = gaps.gather(0, gaps.abs().argmin(0, keepdim=True))[0]
            self._add(site.name, z, alive, rate, gap, torch.arange(len(alive), device=z.device))
        return self.visit(site, z)

    def at_pool(self, name: str, windows: Tensor, given: Tensor) -> None:
        """Take in the rivals of each window that can win."""
        value, rate = forward_ad.unpack_dual(given)
        if rate is None:
            return
        values, rates = gather(value[:1], windows, -torch.inf)[0], gather(rate, windows, 0)
        winner = values.argmax(-1, keepdim=True)
        relative = rates - rates.gather(-1, winner.expand(len(rates), *winner.shape))
        rivals = (relative != 0).any(0) & (windows >= 0)
        # Of the rivals that stand still, only the highest can be the first to win.
        still = rivals & (rates == 0).all(0)
        highest = values.masked_fill(~still, -torch.inf).argmax(-1, keepdim=True)
        rivals &= ~still | torch.zeros_like(still).scatter(-1, highest, True)
        channel, window, rival = rivals.nonzero(as_tuple=True)
        first = channel * given[0, 0].numel()
        won, lost = (first + windows[window, place] for place in (winner[channel, window, 0], rival))
        entries, where = torch.cat([won, lost]).unique(return_inverse=True)
        flat = value[0].flatten()
        self._add(name, given, entries, rate, flat[lost] - flat[won], *where.split(len(won)))

    def _add(
        self,
        name: str,
        z: Tensor,
        entries: Tensor,
        rate: Tensor,
        gap: Tensor,
        plus: Tensor,
        minus: Tensor | None = None,
    ) -> None:
        if not len(gap):
            return
        rates = rate.flatten(1)[:, entries]
        self.nodes.append(Node(len(self.nodes), name, z.shape[1:], entries, rates, gap, plus, minus))


class Graph(Watch):
    """One image's run with a gradient graph from everything that has conditions back to the image.

    Where ``cut``, the graph is cut at the sites: a value then depends only on the activations it is computed from.
    """

    def __init__(self, model: nn.Module, image: Tensor, pathway: Pathway | None, *, cut: bool = False) -> None:
        super().__init__(pathway)
        self.cut = cut
        self.x = image.clone().requires_grad_()
        self.values: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}
        self.asleep = 0
        self.logits = self.follow(model, self.x)

    def at_site(self, site: Site, z: Tensor) -> Tensor:
        """Keep the pre-activation in the graph; cut the activation off where asked."""
        self.values[site.name] = z.clone()
        kept = self.kept(site, z)
        if not self.cut:
            a = self.visit(site, z.clone())  # the network may overwrite what the backward pass needs
            self.asleep += int((kept & (a == 0)).sum())
            return a.clone()
        pre = z.detach().clone().requires_grad_()
        a = self.visit(site, pre.clone())
        self.slopes[site.name] = torch.autograd.grad(a.sum(), pre)[0].flatten()
        self.leaves[site.name] = a.detach().clone().requires_grad_()
        return self.leaves[site.name].clone()  # the network may overwrite its own

    def at_pool(self, name: str, windows: Tensor, given: Tensor) -> None:
        """Keep what is pooled in the graph."""
        self.values[name] = given.clone()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function; a convolution between two sites with backward products that are sparse."""
        if self.cut and func is torch.conv2d and (convolved := sparse_convolution(args, kwargs)) is not None:
            return convolved
        return func(*args, **kwargs)


def one_by_one(
    graph: Graph, node: Node, probe: Probe, conditions: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute the gradients of (some of) a node's conditions by one vector-Jacobian product each, in batches."""
    value = graph.values[node.name]
    if conditions is None:
        conditions = torch.arange(len(node.gap), device=value.device)
    for part in conditions.split(at_once(value, graph.x)):
        seeds = value.new_zeros(len(part), value[0].numel())
        seeds.scatter_(1, node.entries[node.plus[part]][:, None], 1)
        if node.minus is not None:
            seeds.scatter_(1, node.entries[node.minus[part]][:, None], -1)
        (gradients,) = products(value, [graph.x], seeds)
        if gradients is None:
            raise PathwayError(HIDDEN)
        check_rates(gradients, node.condition_rates()[:, part], probe)
        yield part, gradients


def products(value: Tensor, inputs: list[Tensor], seeds: Tensor) -> list[Tensor | None]:
    """Return the vector-Jacobian products of ``seeds`` ``(n, ...)``, each ``(n, numel)``; None where unused."""
    used: list[int] = []

    def product(seed: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(value, inputs, seed, retain_graph=True, allow_unused=True)
        used[:] = [index for index, part in enumerate(found) if part is not None]
        return tuple(part for part in found if part is not None)

    products = torch.vmap(product)(seeds.view(-1, *value.shape))
    parts = dict(zip(used, products, strict=True))
    return [parts[index].flatten(1) if index in parts else None for index in range(len(inputs))]


def at_once(*tensors: Tensor) -> int:
    """Return how many vector-Jacobian products to batch: more than about 16 MB a tensor makes them slower."""
    return max(1, 2**24 // max(tensor.nbytes for tensor in tensors))


def check_rates(gradients: Tensor, rates: Tensor, probe: Probe) -> None:
    """Raise where gradients, from backward products, do not give the rates the forward run saw along the probes."""
    expected = gradients @ probe.directions.flatten(1).T
    tolerance = torch.finfo(gradients.dtype).eps ** 0.5 * gradients.norm(dim=1, keepdim=True)
    if not bool(((expected - rates.T).abs() <= 10 * tolerance).all()):
        raise PathwayError(HIDDEN)
