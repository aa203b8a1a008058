"""The ball around an image in which a network is linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import chi2
from torch import Tensor, nn

from ..errors import PathwayError
from ..neurons import Target, check_batch, check_model, targets_of
from ..pathway import Pathway
from .chain import Chain
from .conditions import Binding, Graph, Node, Probe, one_by_one
from .piecewise import require_single


@dataclass(frozen=True, eq=False)
class LinearRegion:
    """A ball around each image in which the network is linear, and its linear map there.

    Attributes:
        radius: R, ``(B,)``, Euclidean, in units of the image; infinite where nothing binds.
        binding: the condition that changes first, per image; None where none does.
        direction: unit vector to that condition, shaped like the images; 0 where there is none. ``x + R direction`` is
            the nearest point at which the condition changes.
        gradient: ∇Φ_t(x), shaped like the images.
        offset: ``(B,)``: inside, Φ_t(x + δ) = ⟨gradient, x + δ⟩ + offset.
        certified: whether R is exact, up to rounding, ``(B,)``.
        confidence: probability with which R is exact, 1 where certified.
        asleep: kept neurons whose activation inside the pathway network is 0, ``(B,)``.
        targets: the class of each image's response, ``(B,)``.
    """

    radius: Tensor
    binding: tuple[Binding | None, ...]
    direction: Tensor
    gradient: Tensor
    offset: Tensor
    certified: Tensor
    confidence: float
    asleep: Tensor
    targets: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Return the linear map ⟨gradient, x⟩ + offset of each image's region at ``x``, ``(B,)``."""
        return (self.gradient * x).flatten(1).sum(1) + self.offset


def linear_region(
    model: nn.Module,
    x: Tensor,
    pathway: Pathway | None = None,
    target: Target = None,
    *,
    mode: Literal["exact", "fast"] = "exact",
    confidence: float = 0.999,
    probes: int = 16,
    memory: int = 2**32,
    generator: torch.Generator | None = None,
) -> LinearRegion:
    """Return the largest ball around each image in which no condition of the pathway network changes.

    Conditions are the kept neurons' signs (for ReLU6 both its kinks) and the winners of max-pooling windows; removed
    neurons impose nothing. Networks may also hold whatever is linear in evaluation mode: convolutions, batch
    normalisation, average pooling, sums, concatenation. Rounding is not part of the guarantee: use float64.

    Args:
        model: a piecewise-linear network in eval mode.
        x: images ``(B, ...)``.
        pathway: of these images; None means the full network.
        target: class or classes of the response; None means the pathway's targets, else the predicted class of the
            full network.
        mode: ``"exact"`` computes the gradient of every condition; ``"fast"`` estimates their lengths by random
            forward-mode probes and computes only those that may still be the nearest.
        confidence: of the fast mode: probability, over the probes, that the radius is exact.
        probes: of the fast mode.
        memory: bytes that the exact mode may spend on the gradients it shares between layers; where they do not fit,
            every gradient is computed on its own, which is several times slower.
        generator: draws the probes, on the CPU; None draws the same ones at every call (seed 0).

    Raises:
        PathwayError: as :func:`pathwaylib.observe`; if the network calls a function that is not known to be
            piecewise linear; if the pathway is not of this network and these images; if an option is out of range.

    Equation: R = min abs(z_j(x)) / ‖∇z_j(x)‖₂ over the kept neurons j, with z taken in Φ_P; for a pooling window with
    winner w, (p_w - p_k) / ‖∇(p_w - p_k)‖₂ over its other entries k.

    Source: Khakzar et al., CVPR 2021, after Lee, Alvarez-Melis and Jaakkola, *Towards Robust, Locally Linear Deep
    Networks* (ICLR 2019). Pooling, ReLU6 and the fast mode are ours.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        ...     _ = net[0].bias.copy_(torch.tensor([-1.0, 3.0]))
        >>> region = linear_region(net, torch.tensor([[1.0, 2.0]]))  # z = (10, 5), with gradients of length 5 and 1
        >>> region.radius, region.binding
        (tensor([2.]), (Binding(site='relu_0', neuron=(0,), rival=None),))
    """
    if mode not in ("exact", "fast"):
        raise PathwayError(f"mode is {mode!r}; choose 'exact' or 'fast'")
    if not 0 < confidence < 1:
        raise PathwayError(f"confidence is {confidence}; give a number between 0 and 1")
    if probes < 1:
        raise PathwayError(f"probes is {probes}; give at least 1")
    check_model(model, x)
    require_single(x)
    check_batch(x, pathway)
    if target is None and pathway is not None and pathway.targets is not None:
        target = pathway.targets.expand(len(x))
    targets = targets_of(model, x, target)
    generator = generator or torch.Generator().manual_seed(0)
    found = []
    for index, image in enumerate(x.detach().split(1)):
        inside = None if pathway is None else pathway[index % len(pathway)]
        probe = Probe(model, image, inside, 1 if mode == "exact" else probes, generator)
        with torch.enable_grad():
            graph = Graph(model, image, inside)
            response = graph.logits[0, targets[index]]
            gradient = torch.autograd.grad(response, graph.x, retain_graph=True)[0]
            if mode == "exact":
                nearest, certified = _settle_all(model, graph, probe, inside, memory), True
            else:
                nearest, certified = _settle_promising(graph, probe, confidence)
        found.append((nearest, gradient, response.detach(), certified, graph.asleep))
    nearests, gradients, responses, certificates, asleep = zip(*found, strict=True)
    gradient = torch.cat(gradients)
    return LinearRegion(
        radius=x.new_tensor([nearest.distance for nearest in nearests]),
        binding=tuple(nearest.binding for nearest in nearests),
        direction=torch.stack([nearest.direction for nearest in nearests]).view_as(x),
        gradient=gradient,
        offset=torch.stack(responses) - (gradient * x.detach()).flatten(1).sum(1),
        certified=torch.tensor(certificates, device=x.device),
        confidence=1.0 if all(certificates) else confidence,
        asleep=torch.tensor(asleep, device=x.device),
        targets=targets,
    )


class _Nearest:
    """The nearest of the conditions whose gradients it was shown."""

    def __init__(self, image: Tensor) -> None:
        self.distance = torch.inf
        self.direction = torch.zeros_like(image[0])
        self.node: Node | None = None
        self.condition = 0

    @property
    def binding(self) -> Binding | None:
        """The public description of the nearest condition."""
        return None if self.node is None else self.node.binding(self.condition)

    def offer(self, node: Node, conditions: Tensor, gradients: Tensor) -> None:
        """Take in the gradients ``(n, D)`` of some conditions of a node."""
        lengths = gradients.norm(dim=1)
        distances = torch.where(lengths > 0, node.gap[conditions].abs() / lengths, torch.inf)
        distance, place = distances.min(0)
        if not bool(distance.isfinite()):
            return
        # Two conditions can be one and the same, say a neuron's and that of a pooling that reads it: the first counts.
        margin = 1e-9 * self.distance if self.node is not None else 0.0
        earlier = self.node is not None and node.order < self.node.order
        if float(distance) < self.distance + (margin if earlier else -margin):
            self.node, self.condition = node, int(conditions[place])
            sign = 1 if node.gap[self.condition] >= 0 else -1
            self.direction = (sign * gradients[place] / lengths[place]).view_as(self.direction)
        self.distance = min(self.distance, float(distance))


def _settle_all(model: nn.Module, graph: Graph, probe: Probe, pathway: Pathway | None, memory: int) -> _Nearest:
    """Compute the gradient of every condition."""
    nearest = _Nearest(graph.x.detach())
    shared = sum(len(node.entries) for node in probe.nodes if node.minus is None) * graph.x[0].nbytes
    if shared <= memory:
        chain = Chain(model, graph.x.detach(), pathway, probe)
    for node in probe.nodes:
        parts = chain.gradients(node) if shared <= memory else one_by_one(graph, node, probe)
        for conditions, gradients in parts:
            nearest.offer(node, conditions, gradients)
    return nearest


def _settle_promising(graph: Graph, probe: Probe, confidence: float) -> tuple[_Nearest, bool]:
    """Compute gradients in order of promise, until with this confidence no other condition can be nearer.

    The squared rates of a condition, divided by its squared gradient, add up to a χ² variable with one degree of
    freedom per probe. Its quantile at (1 - confidence) / n bounds all n gradients at once.
    """
    nearest = _Nearest(graph.x.detach())
    counts = [len(node.gap) for node in probe.nodes]
    if not sum(counts):
        return nearest, True
    quantile = float(chi2.ppf((1 - confidence) / sum(counts), len(probe.directions)))
    bounds = [node.gap.abs() / (node.condition_rates().square().sum(0) / quantile).sqrt() for node in probe.nodes]
    bound, order = torch.cat(bounds).sort()
    owners = torch.repeat_interleave(torch.tensor(counts)).to(order.device)[order]
    starts = torch.tensor([0, *counts]).cumsum(0).to(order.device)
    settled = 0
    for part in torch.arange(len(order), device=order.device).split(16):
        if float(bound[part[0]]) > nearest.distance:
            break
        for owner in owners[part].unique().tolist():
            conditions = order[part[owners[part] == owner]] - starts[owner]
            for chosen, gradients in one_by_one(graph, probe.nodes[owner], probe, conditions):
                nearest.offer(probe.nodes[owner], chosen, gradients)
        settled += len(part)
    return nearest, settled == len(order)
