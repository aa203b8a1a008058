"""Selectors that search for the smallest subset of neurons with the same response: Φ_P(x) ≈ Φ(x).

Pruning asks a different question than contribution. It looks at what remains after neurons have been taken away, so
it may keep neurons that did nothing on the image and woke up when others left: see :func:`sleeper_network`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .contributions import Contributions, taylor
from .errors import PathwayError, require_at_least_one, require_choice
from .neurons import Target, gated, record, refuse_inference_mode, resolve_target, response, targets_of
from .pathway import Pathway, split_sites
from .ranking import kept_neurons, largest

Schedule = Literal["geometric", "linear"]
Start = Literal["ones", "random"]


@dataclass(frozen=True)
class GreedyPruning:
    """Remove, round by round, the neurons of lowest ``|a ∂Φ_t/∂a|`` in the network that is left.

    Each round scores all neurons by one forward and one backward run of the whole batch inside the current pathway
    network; after round r of R, ``k_r`` neurons are left, and ``k_R = k``. Two rules decide about scores of 0:

    - ``revive=False`` (monotone, this library's): what is out stays out. A neuron that scores 0 in Φ(x) leaves at
      once, in later rounds scores of 0 are the first to leave. So no dead neuron is ever kept, the pathways of the
      rounds are nested, and exactly k neurons are left where at least k score above 0 in Φ(x); elsewhere the
      pathway is all those that do.
    - ``revive=True`` (the published code's): of all N neurons, the ``N − k_r`` that score lowest *above 0* are out
      for one round; the others are in. A neuron that is out scores 0, and so returns in the next round, and so do
      dead neurons. Where fewer than ``N − k_r`` score above 0, all of them are out and more than ``k_r`` are left, as
      in the published code. Only in the last round are the excess neurons of score 0 removed too, scattered as ties
      are, so that exactly k are left. Rounds swap neurons in and out instead of settling: expect the outcome to
      change with ``steps``.

    Neurons that tie are told apart as in :meth:`pathwaylib.Contributions.top`.

    Attributes:
        sparsity: share of the neurons to remove, in [0, 1).
        steps: number of rounds R, at least 1. With one monotone round this is :class:`pathwaylib.NeuronMCT`.
        revive: whether neurons of score 0 are put back, see above.
        schedule: ``"geometric"`` removes the same share of what is left in every round, which leaves small steps for
            the end, where each neuron matters most; ``"linear"`` removes the same number, as the published code does
            (99 rounds of 1 %), and at sparsity 0.99 takes nine tenths of what is left in the last of ten rounds.
        batch_size: images to run at once; None: all. It bounds the memory and does not change the result.

    Raises:
        PathwayError: if a parameter is out of range, or as :func:`pathwaylib.taylor`.

    Equation: ``s_j = |a_j ∂Φ_{P,t}(x)/∂a_j|`` inside Φ_P; k_r = round(N (k/N)^(r/R)), or round(N − (N − k) r/R).

    Source: Khakzar et al., *Neural Response Interpretation through the Lens of Critical Pathways* (CVPR 2021),
    section 3, and its public code for ``revive=True``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> x = torch.rand(2, 4)
        >>> GreedyPruning(sparsity=0.9)(net, x).sizes
        tensor([1, 1])
        >>> GreedyPruning(sparsity=0.5, revive=True)(net, x).sizes
        tensor([5, 5])
    """

    sparsity: float = 0.9
    steps: int = 10
    revive: bool = False
    schedule: Schedule = "geometric"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        kept_neurons(1, self.sparsity)
        require_at_least_one(steps=self.steps, batch_size=1 if self.batch_size is None else self.batch_size)
        require_choice("schedule", self.schedule, get_args(Schedule))

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        """Return the pathway of each image of ``x`` for its target (None: the predicted class)."""
        return _in_batches(self._prune, model, x, target, self.batch_size)

    def _prune(self, model: nn.Module, x: Tensor, target: Target) -> Pathway:
        seen = taylor(model, x, target)
        scores: Sequence[Tensor] = seen.scores
        pathway = Pathway(tuple(score != 0 for score in scores), seen.sites, seen.targets)
        counts = self._counts(sum(score[0].numel() for score in scores))
        for done, count in enumerate(counts):
            if not self.revive and int(pathway.sizes.max()) <= count:
                continue  # no image has a neuron to lose
            if done:
                scores = _scores(model, x, pathway)
            pathway = replace(pathway, masks=self._kept(scores, pathway, count, last=done + 1 == self.steps))
        return pathway

    def _counts(self, neurons: int) -> list[int]:
        """Return k_1, …, k_R."""
        k = kept_neurons(neurons, self.sparsity)
        shares = [done / self.steps for done in range(1, self.steps)]
        if self.schedule == "linear":
            return [*(round(neurons - (neurons - k) * share) for share in shares), k]
        return [*(round(neurons * (k / neurons) ** share) for share in shares), k]

    def _kept(self, scores: Sequence[Tensor], pathway: Pathway, count: int, *, last: bool) -> tuple[Tensor, ...]:
        # Only positive ranks are kept. float32 at least: what is tiny there is nothing to a network in half precision.
        ranks = [score.abs().to(torch.promote_types(score.dtype, torch.float32)) for score in scores]
        if not self.revive:
            tiny = torch.finfo(ranks[0].dtype).tiny
            inside = [rank.clamp(min=tiny) * mask for rank, mask in zip(ranks, pathway.masks, strict=True)]
            return largest(inside, count)
        zero = [rank == 0 for rank in ranks]
        kept = largest([rank.masked_fill(out, math.inf) for rank, out in zip(ranks, zero, strict=True)], count)
        return kept if last else tuple(mask | out for mask, out in zip(kept, zero, strict=True))


@dataclass(frozen=True, eq=False)
class DistillationGuidedRouting:
    """Keep the neurons of largest gate, where gates are trained to repeat the softmax output and to be small.

    One gate per neuron and image multiplies the activation. The gates of all images are trained at once by one SGD
    with momentum, clamped at 0 after each step; images do not influence each other, nor is the network changed. Of
    the iterates that keep the prediction, each image takes the one of smallest loss: the objective that is
    minimised, so the choice means something at ``gamma=0`` too (at the usual ``gamma`` the sum of the gates makes up
    nearly all of it, so this is also the smallest sum). Where none keeps the prediction, which can happen from random
    gates only, it is the one of smallest loss among all. A gate of 0 is never kept, so a pathway can be smaller than k.

    A dead neuron's activation is 0, and so is the gradient of the cross-entropy for its gate: it feels the push of γ
    alone, until the neuron wakes up. Gates of neurons that stay dead sink by the same amount per step and keep the
    order they started in, behind those that the response needs and ahead of those that hurt it. From ones they all
    tie, and fill what the needed neurons leave of k; from random gates, their share of the largest is about their
    share of the network. How many dead neurons a pathway holds is thus a matter of start, k and step size.

    Attributes:
        sparsity: share of the neurons to remove, in [0, 1).
        iterations: number of SGD steps, at least 1; the start counts as an iterate too.
        learning_rate: of SGD, above 0.
        momentum: of SGD, in [0, 1).
        gamma: weight γ of the sum of the gates, at least 0.
        start: ``"ones"``, or ``"random"`` for U(0, 1), drawn image by image.
        generator: draws the random start, on any device; None draws the same one at every call (seed 0).
        patience: an image is finished, and takes its best iterate so far, once that many iterates in a row were no
            better; the loop ends when all are finished.
        progress: show a progress bar.
        batch_size: images to train at once; None: all. It bounds the memory and does not change the result.

    Raises:
        PathwayError: if a parameter is out of range, or as :func:`pathwaylib.observe`. The target plays no part in
            the loss, which compares all classes; it is only checked and noted.

    Equation: min over λ ≥ 0 of CE(softmax Φ(x), softmax Φ_λ(x)) + γ Σ_j λ_j, where Φ_λ has a_j ← λ_j a_j.

    Source: Wang, Su, Zhang, Hu, *Interpret Neural Networks by Identifying Critical Data Routing Paths* (CVPR 2018),
    with a gate per neuron instead of one per channel, as in Khakzar et al., *Neural Response Interpretation through
    the Lens of Critical Pathways* (CVPR 2021). The default settings are this library's; the latter's public code takes
    1,000 steps of size 0.01 with momentum 0.9 and ``gamma=0.01``, and has both starts.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> DistillationGuidedRouting(sparsity=0.9)(net, torch.rand(2, 4)).sizes
        tensor([1, 1])
    """

    sparsity: float = 0.9
    iterations: int = 60
    learning_rate: float = 0.03
    momentum: float = 0.9
    gamma: float = 0.05
    start: Start = "ones"
    generator: torch.Generator | None = None
    patience: int = 10
    progress: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        kept_neurons(1, self.sparsity)
        batch_size = 1 if self.batch_size is None else self.batch_size
        require_at_least_one(iterations=self.iterations, patience=self.patience, batch_size=batch_size)
        require_choice("start", self.start, get_args(Start))
        if not 0 < self.learning_rate < math.inf:
            raise PathwayError(f"learning_rate is {self.learning_rate}; give a number above 0, for example 0.03")
        if not 0 <= self.momentum < 1:
            raise PathwayError(f"momentum is {self.momentum}; give a number in [0, 1), for example 0.9")
        if not 0 <= self.gamma < math.inf:
            raise PathwayError(f"gamma is {self.gamma}; give a number of at least 0, for example 0.05")

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        """Return the pathway of each image of ``x``; the target (None: the predicted class) is only noted."""
        drawing = replace(self, generator=self.generator or torch.Generator().manual_seed(0))  # one for all batches

        def route(model: nn.Module, x: Tensor, target: Target) -> Pathway:
            return drawing.gates(model, x, target).top(self.sparsity)

        return _in_batches(route, model, x, target, self.batch_size)

    def gates(self, model: nn.Module, x: Tensor, target: Target = None) -> Contributions:
        """Return the best gates λ ≥ 0 of each image, all images at once; the pathway is their ``top(sparsity)``.

        Raises:
            PathwayError: as the selector.

        Example:
            >>> net, x = sleeper_network()
            >>> [gate.shape for gate in DistillationGuidedRouting().gates(net, x).scores]
            [torch.Size([1, 3]), torch.Size([1, 2])]
        """
        refuse_inference_mode()
        with torch.no_grad():
            sites, _, post, logits = record(model, x, keep_pre=False)
        x = x.detach()
        targets, predicted, wanted = resolve_target(logits, target), logits.argmax(1), logits.softmax(1)
        gates = self._start(post)
        best = [gate.detach().clone() for gate in gates]
        best_kept, best_loss = torch.zeros_like(predicted, dtype=torch.bool), torch.full_like(logits[:, 0], math.inf)
        waited = torch.zeros_like(predicted)
        optimiser = torch.optim.SGD(gates, lr=self.learning_rate, momentum=self.momentum)
        for step in tqdm(range(self.iterations + 1), desc="routing", unit="step", disable=not self.progress):
            if step:
                optimiser.step()
                with torch.no_grad():
                    for gate in gates:
                        gate.clamp_(min=0)
            with torch.enable_grad():
                routed = gated(model, x, gates)
                # With λ ≥ 0 the sum is Σ|λ|, and pushes at 0 as it does above.
                size = torch.stack([gate.flatten(1).sum(1) for gate in gates]).sum(0)
                loss = F.cross_entropy(routed, wanted, reduction="none") + self.gamma * size
                total = loss.sum()
            kept = routed.detach().argmax(1) == predicted
            better = (kept & ~best_kept) | ((kept == best_kept) & (loss.detach() < best_loss))
            better &= waited < self.patience
            best_kept, best_loss = best_kept | (better & kept), torch.where(better, loss.detach(), best_loss)
            for found, gate in zip(best, gates, strict=True):
                found[better] = gate.detach()[better]
            waited = torch.where(better, 0, waited + 1)
            if bool((waited >= self.patience).all()):
                break
            optimiser.zero_grad()
            total.backward(inputs=gates)  # nothing else that asks for gradients gets any
        return Contributions(tuple(best), tuple(site.name for site in sites), targets)

    def _start(self, post: Sequence[Tensor]) -> list[Tensor]:
        if self.start == "ones":
            return [torch.ones_like(a).requires_grad_() for a in post]
        generator = self.generator or torch.Generator().manual_seed(0)
        neurons = sum(a[0].numel() for a in post)
        # Image by image, so that a batch draws what a loop would; in (0, 1], as a gate of 0 is never kept.
        drawn = 1 - torch.stack(
            [torch.rand(neurons, generator=generator, device=generator.device) for _ in range(len(post[0]))]
        )
        parts = split_sites(drawn.to(post[0].device, post[0].dtype), [a.shape[1:] for a in post])
        return [part.contiguous().requires_grad_() for part in parts]


def sleeper_network() -> tuple[nn.Sequential, Tensor]:
    """Build the five-neuron network whose smallest equivalent subset is one neuron that is dead on the image.

    The image is x = (1, 2). The neurons and their activations::

        first site   a = relu(x₁) = 1        b = relu(x₂) = 2        c = relu(x₁ + x₂) = 3
        second site  u = relu(a + b + c + 1) = relu(7) = 7     d = relu(7 − 2 (a + b + c)) = relu(−5) = 0
        logits       Φ₀ = u + d = 7                             Φ₁ = 4

    ``d`` is dead: its inhibitors a, b and c hold it down, and all of the response 7 comes through ``u``. Remove
    everything but ``d``, and its inhibitors are gone: d = relu(7 − 0) = 7, so Φ₀ = 7 and Φ₁ = 4, exactly as before.
    No smaller subset does it (without any neuron Φ₀ = 0) and no other single neuron either: ``u`` alone gives
    relu(1) = 1, and a, b or c alone reach no logit and give 0. So the smallest equivalent subset is {d}, a neuron
    the network did not use on this image, and inside it the response no longer depends on the image at all.

    Returns:
        The network in eval mode, and the image ``(1, 2)``.

    Source: the argument for finding dead neurons in pruned pathways is that of Khakzar et al., *Neural Response
    Interpretation through the Lens of Critical Pathways* (CVPR 2021); the network is this library's.

    Example:
        >>> from pathwaylib import masked, observe
        >>> net, x = sleeper_network()
        >>> observe(net, x).post[1].tolist(), net(x).tolist()
        ([[7.0, 0.0]], [[7.0, 4.0]])
        >>> only_d = Pathway((torch.tensor([[False] * 3]), torch.tensor([[False, True]])), ("relu_0", "relu_1"))
        >>> with masked(only_d):
        ...     net(x).tolist()
        [[7.0, 4.0]]
    """
    layers = [
        _linear([[1, 0], [0, 1], [1, 1]], [0, 0, 0]),
        _linear([[1, 1, 1], [-2, -2, -2]], [1, 7]),
        _linear([[1, 1], [0, 0]], [0, 4]),
    ]
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    return network.eval().requires_grad_(False), torch.tensor([[1.0, 2.0]])


def _linear(weight: list[list[int]], bias: list[int]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(bias), device="meta").to_empty(device="cpu")  # draws no random weights
    layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return layer


def _scores(model: nn.Module, x: Tensor, pathway: Pathway) -> tuple[Tensor, ...]:
    """Return a ∂Φ_P,t/∂a of every neuron inside the pathway network, 0 for those outside.

    The derivative by a bit m of the mask is that by the masked activation times the activation, so no activation has
    to be recorded.
    """
    gates = [mask.to(x.dtype).requires_grad_() for mask in pathway.masks]
    with torch.enable_grad():
        logits = gated(model, x.detach(), gates)
        gradients = torch.autograd.grad(response(logits, pathway.targets).sum(), gates, materialize_grads=True)
    return tuple(gate.detach() * gradient for gate, gradient in zip(gates, gradients, strict=True))


def _in_batches(
    select: Callable[[nn.Module, Tensor, Target], Pathway],
    model: nn.Module,
    x: Tensor,
    target: Target,
    batch_size: int | None,
) -> Pathway:
    """Select in batches of ``batch_size`` images and join the pathways."""
    if batch_size is None or batch_size >= len(x):
        return select(model, x, target)
    targets = targets_of(model, x, target, batch_size)
    batches = zip(x.detach().split(batch_size), targets.split(batch_size), strict=True)
    return Pathway.cat([select(model, images, chosen) for images, chosen in batches])
