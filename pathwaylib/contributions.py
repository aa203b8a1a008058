"""How much each neuron contributes to the response: one score per neuron, all sites together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pad_sequence

from .errors import PathwayError, require_at_least_one
from .linearity import KinkDistance, moving, walk
from .neurons import Target, check_model, leaf, masked, observe, per_input, record, resolve_target, response, targets_of
from .pathway import Pathway, holds_integers, split_sites
from .ranking import kept_neurons, largest
from .rerun import Rerun


@dataclass(frozen=True, eq=False)
class Contributions:
    """One signed score per neuron and input, in units of the response.

    Attributes:
        scores: one tensor ``(B, ...)`` per site.
        sites: name of each site, in the order of execution.
        targets: the class whose response is explained, int64 ``(B,)``.
        standard_errors: of scores that are estimated by sampling, shaped like ``scores``.
        logits: response of the network ``(B, K)``, where one run of it gave the scores.
    """

    scores: tuple[Tensor, ...]
    sites: tuple[str, ...]
    targets: Tensor | None = None
    standard_errors: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None

    def top(self, sparsity: float) -> Pathway:
        """Keep, per input, the neurons of largest absolute score over all sites together.

        Exactly ``round((1 - sparsity) N)`` neurons are kept (halves round to even), except that a neuron whose
        score is 0 is never kept: where fewer neurons score above 0 the pathway is smaller, as ``Pathway.sizes``
        tells. Neurons that tie at the border are kept in a fixed, scattered order of the positions,
        which favours no position and does not depend on the rest of the batch.

        Args:
            sparsity: share of the neurons to remove, in [0, 1).

        Raises:
            PathwayError: if ``sparsity`` is out of range.

        Example:
            >>> scores = Contributions((torch.tensor([[0.1, -3.0, 0.0, 2.0]]),), ("relu_0",))
            >>> scores.top(0.5).masks[0]
            tensor([[False,  True, False,  True]])
        """
        neurons = sum(score[0].numel() for score in self.scores)
        return Pathway(largest(self.scores, kept_neurons(neurons, sparsity)), self.sites, self.targets)

    def top_k(self, sizes: Tensor) -> Pathway:
        """Keep, per input, as many neurons as asked for that input; otherwise as :meth:`top`.

        What makes selectors comparable with one that finds the size of each pathway itself.

        Args:
            sizes: neurons to keep, int64 ``(B,)``, from 0 to N each.

        Raises:
            PathwayError: if there is not one whole number for each input, or one is out of range.

        Example:
            >>> scores = Contributions((torch.tensor([[1.0, 3.0, 2.0], [4.0, 6.0, 5.0]]),), ("relu_0",))
            >>> scores.top_k(torch.tensor([1, 2])).masks[0].int().tolist()
            [[0, 1, 0], [0, 1, 1]]
        """
        neurons = sum(score[0].numel() for score in self.scores)
        fits = sizes.shape == self.scores[0].shape[:1] and holds_integers(sizes)
        if not fits or not 0 <= int(sizes.min()) <= int(sizes.max()) <= neurons:
            raise PathwayError(
                f"{sizes.dtype} sizes of shape {tuple(sizes.shape)} for {len(self.scores[0])} inputs of {neurons} "
                "neurons; give one number of neurons for each input, as an integer"
            )
        return Pathway(largest(self.scores, sizes.tolist()), self.sites, self.targets)


def taylor(model: nn.Module, x: Tensor, target: Target = None) -> Contributions:
    """First-order estimate of what the response loses without each neuron, all sites in one backward pass.

    For a linear readout the estimate is exact; where later activations switch, it is not.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        target: class or classes to explain; None means the predicted class.

    Returns:
        :class:`Contributions`, signed, in units of the response.

    Raises:
        PathwayError: as :func:`pathwaylib.observe`, if a target is out of range, or if an activation carries no
            gradient.

    Equation: c_j = a_j ∂Φ_t(x)/∂a_j. Its absolute value is the marginal contribution (NeuronMCT).

    Source: Khakzar et al., CVPR 2021, section 3; Molchanov et al., CVPR 2019.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.rand(1, 2)
        >>> scores = taylor(net, x, target=0)
        >>> lost = net(x)[0, 0] - net[2].bias[0]  # what the response loses without all three neurons
        >>> torch.allclose(scores.scores[0].sum(), lost, atol=1e-6)
        True
    """
    check_model(model, x)
    with torch.enable_grad():
        sites, _, post, logits = record(model, leaf(x), keep_pre=False)
        cut = next((site.name for site, a in zip(sites, post, strict=True) if not a.requires_grad), None)
        if cut:
            raise PathwayError(
                f"the activation of {cut} carries no gradient: {type(model).__name__} computes it under "
                "torch.no_grad(), or not from the image; let gradients pass, or use integrated_gradients or ablation"
            )
        targets = resolve_target(logits, target)
        # Down to the sites and not to the image: the first layer's backward pass is saved.
        gradients = torch.autograd.grad(response(logits, targets).sum(), post, materialize_grads=True)
    scores = tuple(a.detach() * gradient for a, gradient in zip(post, gradients, strict=True))
    return Contributions(scores, tuple(site.name for site in sites), targets, logits=logits.detach())


def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    *,
    n_steps: int = 32,
    exact: bool = False,
    batch_size: int = 64,
) -> Contributions:
    """Average the gradient while a site's activations grow from 0, one site at a time.

    Each site is scaled on its own; the sites after it are computed from the scaled one. Along the way the gradient
    of a ReLU network is piecewise constant. The midpoint rule therefore beats rules for smooth functions; with
    ``exact`` the pieces themselves are summed, from kink to kink. Only what lies after the site is computed again.

    Args:
        model: a network in eval mode; for ``exact`` a piecewise-linear one, see :func:`pathwaylib.linear_region`.
        x: images ``(B, ...)``.
        target: class or classes to explain; None means the predicted class.
        n_steps: steps of the midpoint rule, at least 1; unused where ``exact``.
        exact: sum the linear pieces. As many runs as there are kinks, thousands for early sites of a large network;
            give float64 images and weights.
        batch_size: images times steps in one run: bounds the memory.

    Returns:
        :class:`Contributions`, signed, in units of the response. They sum, per site, to Φ_t(x) - Φ_t(site ← 0):
        up to rounding where ``exact``, else with an error that falls like 1 / n_steps.

    Raises:
        PathwayError: as :func:`pathwaylib.observe`; if a target is out of range; if ``n_steps`` or ``batch_size`` is
            below 1; where ``exact``, if the network is not known to be piecewise linear.

    Equation: c_j = a_j ∫₀¹ ∂Φ_t/∂a_j (α a) dα, with a the activations of the site of neuron j.

    Source: Khakzar et al., CVPR 2021, section 3 (NeuronIntGrad); Sundararajan et al., ICML 2017.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        >>> x = torch.rand(2, 4, dtype=torch.float64)
        >>> scores = integrated_gradients(net.eval(), x, target=1, exact=True)
        >>> lost = (net(x) - net[2:](torch.zeros(2, 8, dtype=torch.float64)))[:, 1]  # without the first site
        >>> torch.allclose(scores.scores[0].sum(1), lost)
        True
    """
    require_at_least_one(n_steps=n_steps, batch_size=batch_size)
    targets = targets_of(model, x, target, batch_size)
    parts = []
    for images, classes in zip(x.detach().split(batch_size), targets.split(batch_size), strict=True):
        # As many steps at once as the batch has room for, the same number each time.
        room = 1 if exact else batch_size // len(images)
        together = max(divisor for divisor in range(1, room + 1) if n_steps % divisor == 0)
        rerun = Rerun(model, _repeat(images, together))
        midpoints = ((torch.arange(n_steps) + 0.5) / n_steps).to(x).view(-1, together)
        scores = []
        for site, a in enumerate(rerun.post):
            if exact:
                mean = _mean_gradient_of_pieces(rerun, site, classes)
            else:
                mean = _mean_gradient(rerun, site, classes.repeat(together), midpoints)
            scores.append(a[: len(images)] * mean)
        parts.append(Contributions(tuple(scores), tuple(site.name for site in rerun.sites), classes))
    return _join(parts)


def _mean_gradient_of_pieces(rerun: Rerun, site: int, targets: Tensor) -> Tensor:
    """Average the gradient over the way from 0 piece by piece, each found by its kinks and weighed by its length."""
    a = rerun.post[site]

    def scaled(scale: Tensor) -> Tensor:
        return per_input(scale, a) * a

    def next_kink(scale: Tensor) -> Tensor:
        kinks = KinkDistance()
        with torch.no_grad(), forward_ad.dual_level():
            rerun(site, moving(scaled(scale), a), kinks, within=kinks)
        return torch.full_like(scale, torch.inf) if kinks.distance is None else kinks.distance

    inner = walk(next_kink, a.new_zeros(len(a)))
    borders = pad_sequence([torch.cat([a.new_zeros(1), kinks, a.new_ones(1)]) for kinks in inner], True, 1.0).T
    total = torch.zeros_like(a)
    for start, end in itertools.pairwise(borders):
        piece = rerun.gradient(site, scaled((start + end) / 2), targets)
        total += per_input(end - start, a) * piece
    return total


def _mean_gradient(rerun: Rerun, site: int, targets: Tensor, scales: Tensor) -> Tensor:
    """Average the gradient over ``scales`` ``(runs, steps per run)`` of a site's activation."""
    a = rerun.post[site]
    total = torch.zeros_like(a[: len(a) // scales.shape[1]])
    for steps in scales:
        each = per_input(steps.repeat_interleave(len(a) // len(steps)), a)
        total += rerun.gradient(site, each * a, targets).unflatten(0, (len(steps), -1)).sum(0)
    return total / scales.numel()


def ablation(model: nn.Module, x: Tensor, target: Target = None, *, batch_size: int = 256) -> Contributions:
    """Run the network without each neuron in turn: the exact loss of the response, a forward run per active neuron.

    A neuron that is dead on the image contributes 0 and needs no run; only what lies after the neuron's site is
    computed again.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        target: class or classes to explain; None means the predicted class.
        batch_size: neurons removed, one each, in one run: bounds the memory.

    Returns:
        :class:`Contributions`, signed, in units of the response.

    Raises:
        PathwayError: as :func:`pathwaylib.observe`, if a target is out of range, or if ``batch_size`` is below 1.

    Equation: c_j = Φ_t(x) - Φ_t(x; a_j ← 0).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.rand(1, 2)
        >>> exact, estimated = ablation(net, x), taylor(net, x)  # equal into a linear readout
        >>> torch.allclose(exact.scores[0], estimated.scores[0], atol=1e-6)
        True
    """
    require_at_least_one(batch_size=batch_size)
    targets = targets_of(model, x, target, batch_size)
    parts = []
    for image, chosen in zip(x.detach().split(1), targets.split(1), strict=True):
        with torch.no_grad():
            rerun = Rerun(model, _repeat(image, batch_size))
            scores = tuple(_losses(rerun, site, chosen) for site in range(len(rerun.sites)))
        parts.append(Contributions(scores, tuple(site.name for site in rerun.sites), chosen))
    return _join(parts)


def _losses(rerun: Rerun, site: int, target: Tensor) -> Tensor:
    """Return what the response of one image loses without each neuron of a site, ``(1, ...)``."""
    a = rerun.post[site].flatten(1)
    lost = torch.zeros_like(a[0], dtype=rerun.logits.dtype)  # under autocast the activations may be of another type
    for neurons in a[0].nonzero()[:, 0].split(len(a)):
        without = a.clone()
        without[torch.arange(len(neurons)), neurons] = 0
        responses = (rerun.logits - rerun(site, without.view_as(rerun.post[site])))[:, int(target)]
        lost[neurons] = responses[: len(neurons)]
    return lost.view_as(rerun.post[site][:1])


def shapley(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    *,
    permutations: int,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> Contributions:
    """Estimate each neuron's Shapley value: its mean gain over random orders in which the neurons are put in.

    Fair by axiom and dear to compute, N forward runs per order: for small networks, as the yardstick of the others.
    A neuron that is dead on the whole image may have a value, since it can wake while others are out.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        target: class or classes to explain; None means the predicted class.
        permutations: random orders per image, at least 2.
        generator: draws the orders, on the CPU; None draws the same ones at every call (seed 0).
        batch_size: pathway networks in one run: bounds the memory.

    Returns:
        :class:`Contributions`, signed, in units of the response, with ``standard_errors`` over the orders. They sum,
        whatever the number of orders, to Φ_t(x) less the response with every neuron out.

    Raises:
        PathwayError: as :func:`pathwaylib.observe`, if a target is out of range, if ``permutations`` is below 2, or
            if ``batch_size`` is below 1.

    Equation: c_j = E_π[Φ_t,S∪j(x) - Φ_t,S(x)], with S the neurons before j in the random order π and Φ_S the network
    of the pathway S.

    Source: Shapley (1953); Castro, Gómez and Tejada, *Polynomial calculation of the Shapley value based on
    sampling* (Computers & Operations Research, 2009).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.rand(1, 2)
        >>> values = shapley(net, x, permutations=4)
        >>> torch.allclose(values.scores[0], taylor(net, x).scores[0], atol=1e-6)  # nothing interacts here
        True
    """
    require_at_least_one(batch_size=batch_size)
    if permutations < 2:
        raise PathwayError(f"permutations is {permutations}; standard errors need at least 2")
    generator = generator or torch.Generator().manual_seed(0)
    targets = targets_of(model, x, target, batch_size)
    parts = []
    for image, chosen in zip(x.detach().split(1), targets.split(1), strict=True):
        with torch.no_grad():
            everything = observe(model, image).active()
            gains = [_gains(model, image, chosen, everything, generator, batch_size) for _ in range(permutations)]
        values = torch.stack(gains)
        errors = values.std(0) / math.sqrt(permutations)
        shapes = [mask.shape[1:] for mask in everything.masks]
        mean, error = (split_sites(flat[None], shapes) for flat in (values.mean(0), errors))
        parts.append(Contributions(mean, everything.sites, chosen, error))
    return _join(parts)


def _gains(
    model: nn.Module, image: Tensor, target: Tensor, like: Pathway, generator: torch.Generator, batch_size: int
) -> Tensor:
    """Put the neurons in, in a random order; return what each adds to the response, ``(N,)``."""
    # When each neuron comes in, from 1 to N; after round r those with a turn of at most r are in.
    turns = (torch.randperm(like.neurons, generator=generator) + 1).to(image.device)
    responses = []
    for rounds in torch.arange(like.neurons + 1, device=image.device).split(batch_size):
        inside = split_sites(turns <= rounds[:, None], [mask.shape[1:] for mask in like.masks])
        with masked(Pathway(inside, like.sites), runs=1):
            responses.append(model(_repeat(image, len(rounds)))[:, int(target)])
    return torch.cat(responses).diff()[turns - 1]


def _repeat(images: Tensor, times: int) -> Tensor:
    return images.repeat(times, *[1] * (images.ndim - 1))


def _join(parts: list[Contributions]) -> Contributions:
    """Put the contributions of several batches together."""

    def cat(tensors: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(site) for site in zip(*tensors, strict=True))

    errors = [part.standard_errors for part in parts if part.standard_errors]
    targets = torch.cat([part.targets for part in parts if part.targets is not None])
    return Contributions(cat(part.scores for part in parts), parts[0].sites, targets, cat(errors) or None)
