"""Chapter 3: contributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..contributions import Contributions, integrated_gradients, taylor
from ..evaluation import dead_share
from ..neurons import Site, masked, observe, response, run
from ..pathway import Pathway
from .judging import (
    Answer,
    Verdict,
    as_tensors,
    call_answer,
    equal,
    judge,
    judge_network,
    mark,
    network_and_pathway,
    observed,
    shape_of,
    small_network,
    top,
)


def check_channel_contribution(answer: Answer) -> Verdict:
    """Check ``answer(model, x, site) -> (B, C)``: the size of each channel's first-order contribution at one site.

    The channel is removed at all its positions, for the predicted class: |Σ_positions a ∂Φ_t/∂a|.

    Example:
        >>> check_channel_contribution(lambda model, x, site: taylor(model, x).scores[site].sum((2, 3)).abs())
        ✓ right: the size of each channel's first-order contribution
        >>> check_channel_contribution(lambda model, x, site: taylor(model, x).scores[site].abs().sum((2, 3)))
        ✗ the absolute value comes too early: positions of a channel may cancel, so sum first
    """

    def scores(combine: Callable[[Tensor], Tensor]) -> Answer:
        return lambda model, x, site: combine(taylor(model, x).scores[site])

    def gradient(model: nn.Module, x: Tensor, site: int) -> Tensor:
        seen = observe(model, x.requires_grad_())
        return torch.autograd.grad(seen.logits.amax(1).sum(), seen.post[site])[0]

    def of_all_logits(model: nn.Module, x: Tensor, site: int) -> Tensor:
        classes = model(x).shape[1]
        return sum((taylor(model, x, t).scores[site] for t in range(classes)), torch.zeros(())).sum((2, 3)).abs()

    return judge(
        answer,
        tuple(partial(_network_and_site, seed, site) for seed in (1, 3) for site in (0, 1)),
        scores(lambda c: c.sum((2, 3)).abs()),
        {
            "the absolute value comes too early: positions of a channel may cancel, so sum first": (
                scores(lambda c: c.abs().sum((2, 3)))
            ),
            "the absolute value is missing: the size of the contribution is asked for": scores(lambda c: c.sum((2, 3))),
            "this is the mean over the positions: removing a channel removes them all, so sum": (
                scores(lambda c: c.mean((2, 3)).abs())
            ),
            "these are the neurons' scores: sum over the positions of each channel": scores(lambda c: c.abs()),
            "the channels are summed: keep them, and sum over rows and columns": scores(lambda c: c.sum(1).abs()),
            "this is averaged over the batch: return one row per input, shape (B, C)": (
                scores(lambda c: c.sum((2, 3)).abs().mean(0))
            ),
            "the response is averaged over the batch, which divides every score by B: sum it instead": (
                scores(lambda c: c.sum((2, 3)).abs() / len(c))
            ),
            "this is the gradient alone: multiply it by the activation before you sum": (
                lambda model, x, site: gradient(model, x, site).sum((2, 3)).abs()
            ),
            "this explains class 0 for every input: take each input's predicted class": (
                lambda model, x, site: taylor(model, x, 0).scores[site].sum((2, 3)).abs()
            ),
            "this explains the sum of all logits: take each input's predicted one": of_all_logits,
        },
        "right: the size of each channel's first-order contribution",
    )


def _network_and_site(seed: int, site: int) -> tuple[nn.Sequential, Tensor, int]:
    """Return a small network, inputs and the index of a site."""
    return *small_network(seed), site


def _scores(seed: int) -> tuple[tuple[Tensor, Tensor], int]:
    """Return signed scores of two sites and k. Some are 0; for even seeds, many are equal."""
    generator = torch.Generator().manual_seed(seed)
    sites = torch.randn(3, 2, 4, 4, generator=generator), 0.2 * torch.randn(3, 12, generator=generator)
    first, second = (site * (torch.rand(site.shape, generator=generator) < 0.6) for site in sites)
    if seed % 2 == 0:
        first, second = first.round(), (5 * second).round()
    return (first, second), 10 if seed < 4 else 40


def check_top_k(answer: Answer) -> Verdict:
    """Check ``answer(scores, k) -> masks``: the k largest absolute scores of each input, over all sites together.

    ``scores`` is a tuple of tensors ``(B, ...)``; a score of 0 is never kept; of equal scores any may be kept.

    Example:
        >>> def kept(flat, k):  # topk breaks ties, so that exactly k are kept
        ...     chosen = torch.zeros_like(flat, dtype=torch.bool)
        ...     return chosen.scatter(1, flat.topk(min(k, flat.shape[1])).indices, True) & (flat > 0)
        >>> check_top_k(lambda scores, k: mark(scores, lambda flat: kept(flat.abs(), k)))
        ✓ right: the k largest absolute scores of each input, never one of 0
    """
    mistakes: dict[str, Answer] = {
        "the signed scores are ranked: a strongly negative contribution counts too, so take absolute values": (
            lambda scores, k: mark(scores, lambda flat: top(flat, k) & (flat != 0))
        ),
        "each site keeps its own k: rank the neurons of all sites together": (
            lambda scores, k: tuple(mark([score], lambda flat: top(flat.abs(), k) & (flat != 0))[0] for score in scores)
        ),
        "each site keeps an equal part of k: rank the neurons of all sites together": (
            lambda scores, k: tuple(
                mark([score], lambda flat: top(flat.abs(), k // len(scores)) & (flat != 0))[0] for score in scores
            )
        ),
        "the inputs of the batch compete for k places: rank each input's neurons apart": (
            lambda scores, k: mark(scores, lambda flat: top(flat.abs().view(1, -1), k).view_as(flat) & (flat != 0))
        ),
        "the masks are inverted: True keeps a neuron": (
            lambda scores, k: mark(scores, lambda flat: ~(top(flat.abs(), k) & (flat != 0)))
        ),
        "the smallest scores are kept": (
            lambda scores, k: mark(scores, lambda flat: top(-flat.abs(), k) & (flat != 0))
        ),
    }
    distinct = [seed for seed in range(6) if seed % 2]
    results: dict[int, tuple[Tensor, ...]] = {}
    for seed in range(6):
        scores, k = _scores(seed)
        value = call_answer(answer, (tuple(score.clone() for score in scores), k))
        if isinstance(value, Verdict):
            return value
        masks = as_tensors(value)
        if masks is None or [mask.shape for mask in masks] != [score.shape for score in scores]:
            got = f"shape {shape_of(masks)}" if masks else f"a {type(value).__name__}"
            return Verdict(False, f"you returned {got}; return one mask per site, shaped like its scores")
        results[seed] = tuple(mask != 0 for mask in masks)
    for message, mistake in mistakes.items():
        if all(_same_but_zeros(results[seed], mistake(*_scores(seed)), _scores(seed)[0]) for seed in distinct):
            return Verdict(False, message)
    # First what goes wrong with distinct scores, then what ties bring to light.
    for seed in sorted(results, key=lambda seed: seed not in distinct):
        scores, k = _scores(seed)
        size = torch.cat([score.flatten(1) for score in scores], 1).abs()
        kept = torch.cat([mask.flatten(1) for mask in results[seed]], 1)
        if bool((kept & (size == 0)).any()):
            return Verdict(
                False, "neurons of score 0 are kept: where fewer than k scores differ from 0, keep only those"
            )
        wanted = (size > 0).sum(1).clamp(max=k)
        if bool((kept.sum(1) != wanted).any()):
            row = int((kept.sum(1) != wanted).nonzero()[0])
            why = "" if seed in distinct else " (many scores are equal here: a threshold keeps too many or too few)"
            return Verdict(False, f"{int(kept[row].sum())} neurons are kept where it should be {int(wanted[row])}{why}")
        least, most = size.masked_fill(~kept, torch.inf).amin(1), size.masked_fill(kept, 0).amax(1)
        if bool((least < most).any()):
            return Verdict(
                False, "the number is right, but a removed neuron has a larger absolute score than a kept one"
            )
    return Verdict(True, "right: the k largest absolute scores of each input, never one of 0")


def _same_but_zeros(given: Sequence[Tensor], wrong: Sequence[Tensor], scores: Sequence[Tensor]) -> bool:
    """Tell whether two answers agree, also where the given one keeps scores of 0."""
    return all(bool(((a == b) | (score == 0)).all()) for a, b, score in zip(given, wrong, scores, strict=True))


def _with_empty(seed: int) -> tuple[nn.Sequential, Tensor, Pathway]:
    """Return a network, inputs and a random pathway that is empty for the first input of odd seeds."""
    model, x, pathway = network_and_pathway(seed)
    if seed % 2:
        some = torch.ones(len(x), dtype=torch.bool)
        some[0] = False
        masks = tuple(mask & some.view(-1, *[1] * (mask.ndim - 1)) for mask in pathway.masks)
        pathway = Pathway(masks, pathway.sites)
    return model, x, pathway


def check_dead_share(answer: Answer) -> Verdict:
    """Check ``answer(model, x, pathway) -> (B,)``: the share of each pathway's neurons that are dead on its input.

    Example:
        >>> check_dead_share(lambda model, x, pathway: dead_share(pathway, observe(model, x)))
        ✓ right: the share of the pathway that is dead in the whole network
    """

    def active(model: nn.Module, x: Tensor) -> Pathway:
        return observed(model, x).active()

    def in_masked_run(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        with masked(pathway):
            return dead_share(pathway, active(model, x))

    def right(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        return dead_share(pathway, active(model, x))

    def dead_kept(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        return (pathway & ~active(model, x)).sizes

    return judge(
        answer,
        tuple(partial(_with_empty, seed) for seed in range(4)),
        right,
        {
            "an empty pathway gives 0 / 0 = nan: let its share be 0": (
                lambda model, x, pathway: dead_kept(model, x, pathway) / pathway.sizes
            ),
            "dead is measured in the pathway network: run the whole network, without masks": in_masked_run,
            "this divides by all N neurons: divide by the number of neurons in the pathway": (
                lambda model, x, pathway: dead_kept(model, x, pathway) / pathway.neurons
            ),
            "this is the share of the dead neurons that are kept: divide by the size of the pathway": (
                lambda model, x, pathway: dead_kept(model, x, pathway) / (~active(model, x)).sizes
            ),
            "this is the share of the whole network that is dead: look at the pathway's neurons only": (
                lambda model, x, pathway: (~active(model, x)).sizes / pathway.neurons
            ),
            "this is the active share: count the dead neurons": (
                lambda model, x, pathway: (pathway & active(model, x)).sizes / pathway.sizes.clamp(min=1)
            ),
            "this is a number of neurons: divide by the size of the pathway": dead_kept,
            "this is averaged over the batch: return one share per input, shape (B,)": (
                lambda *arguments: right(*arguments).mean()
            ),
            "this pools the batch: return one share per input, shape (B,)": (
                lambda model, x, pathway: dead_kept(model, x, pathway).sum() / pathway.sizes.sum()
            ),
        },
        "right: the share of the pathway that is dead in the whole network",
    )


def check_blind_spot(answer: Answer) -> Verdict:
    """Check ``answer() -> (model, x)``: a neuron whose first-order score is 0, and whose removal changes the response.

    ``x`` is one input. The response is that of the predicted class, and it has to change by at least 1.

    Example:
        >>> check_blind_spot(lambda: small_network(0))
        ✗ x holds 5 inputs; give x of shape (1, ...)
    """
    return judge_network(answer, _judge_blind_spot, most=1_000)


def _judge_blind_spot(model: nn.Module, x: Tensor) -> Verdict:
    first_order = taylor(model, x)
    lost = _ablate(model, x, first_order)
    score = torch.cat([part.flatten() for part in first_order.scores])
    blind = lost.abs().masked_fill(score.abs() > 1e-6, 0)
    if float(blind.max()) >= 1 - 1e-6:
        return Verdict(
            True, f"right: a neuron scores 0, and without it the response changes by {float(blind.max()):.2f}"
        )
    if float(lost.abs().max()) < 1 - 1e-6:
        return Verdict(
            False, f"no neuron changes the response by 1 when it is removed; at most {float(lost.abs().max()):.2f}"
        )
    at = int(lost.abs().argmax())
    return Verdict(
        False,
        f"removing a neuron changes the response by {float(lost[at].abs()):.2f}, but it scores {float(score[at]):.2f}, "
        "not 0: put it before a neuron that is dead now and wakes up without it",
    )


def _ablate(model: nn.Module, x: Tensor, scores: Contributions) -> Tensor:
    """Return what the response loses without each neuron, one at a time, all sites in a row: ``(N,)``."""
    sizes = [score[0].numel() for score in scores.scores]
    parts = torch.split(~torch.eye(sum(sizes), dtype=torch.bool), sizes, 1)
    masks = tuple(part.reshape(-1, *score.shape[1:]) for part, score in zip(parts, scores.scores, strict=True))
    assert scores.targets is not None
    target = int(scores.targets)
    with torch.no_grad():
        whole: Tensor = model(x)[0, target]
        with masked(Pathway(masks, scores.sites)):
            without: Tensor = model(x.expand(sum(sizes), *x.shape[1:]))[:, target]
    return whole - without


def check_midpoint_scores(answer: Answer) -> Verdict:
    """Check ``answer(model, x, site, n_steps) -> (B, ...)``: integrated gradients of one site by the midpoint rule.

    For the predicted class of each input; only this site is scaled.

    Example:
        >>> def scores(model, x, site, n_steps):
        ...     return integrated_gradients(model, x, n_steps=n_steps).scores[site]
        >>> check_midpoint_scores(scores)
        ✓ right: each activation times its mean gradient at the midpoints
        >>> check_midpoint_scores(lambda model, x, site, n_steps: taylor(model, x).scores[site])
        ✗ this is the first-order score: the gradient is taken at the full activation only
    """

    def sums(scale: Callable[[int, int], float], **options: bool) -> Answer:
        return lambda model, x, site, n_steps: _integrated(
            model, x, site, [scale(step, n_steps) for step in range(n_steps)], **options
        )

    def midpoint(step: int, n_steps: int) -> float:
        return (step + 0.5) / n_steps

    def changed(change: Callable[[Tensor, Tensor, int], Tensor]) -> Answer:
        def scores(model: nn.Module, x: Tensor, site: int, n_steps: int) -> Tensor:
            right = integrated_gradients(model, x, n_steps=n_steps).scores[site]
            return change(right, observed(model, x).post[site], n_steps)

        return scores

    return judge(
        answer,
        tuple(
            partial(_network_site_and_steps, *case) for case in ((1, 0, 4), (2, 0, 3), (3, 0, 5), (4, 0, 2), (2, 1, 4))
        ),
        lambda model, x, site, n_steps: integrated_gradients(model, x, n_steps=n_steps).scores[site],
        {
            "this takes the right end of each step: the midpoint rule looks at (step + 1/2) / n_steps": (
                sums(lambda step, n_steps: (step + 1) / n_steps)
            ),
            "this takes the left end of each step: the midpoint rule looks at (step + 1/2) / n_steps": (
                sums(lambda step, n_steps: step / n_steps)
            ),
            "this is the mean gradient alone: multiply it by the activation": sums(midpoint, times_activation=False),
            "this multiplies each gradient by the scaled activation: the full one goes in front of the integral": (
                sums(midpoint, times_scaled=True)
            ),
            "the gradients are summed over the steps: divide by n_steps": changed(lambda c, a, n_steps: c * n_steps),
            "all sites are scaled at once: scale this one, and compute the later ones from it": (
                sums(midpoint, all_sites=True)
            ),
            "the target changes on the way: take the class that is predicted at the full activation, at every step": (
                sums(midpoint, predict_anew=True)
            ),
            "this is the first-order score: the gradient is taken at the full activation only": (
                lambda model, x, site, n_steps: taylor(model, x).scores[site]
            ),
            "the absolute value is taken: the scores are signed, or they would not add up": (
                changed(lambda c, a, n_steps: c.abs())
            ),
            "this is averaged over the batch: the mean is over the steps, and each input keeps its own scores": (
                changed(lambda c, a, n_steps: c.mean(0))
            ),
            "the gradient is averaged over the batch: the mean is over the steps, and each input keeps its own": (
                sums(midpoint, batch_mean=True)
            ),
            "the response is averaged over the batch, which divides every score by B: sum it instead": (
                changed(lambda c, a, n_steps: c / len(c))
            ),
            "the scores are summed over the site: return one per neuron": changed(
                lambda c, a, n_steps: c.flatten(1).sum(1)
            ),
        },
        "right: each activation times its mean gradient at the midpoints",
    )


def _network_site_and_steps(seed: int, site: int, n_steps: int) -> tuple[nn.Sequential, Tensor, int, int]:
    """Return a small network, inputs, the index of a site and a number of steps."""
    return *small_network(seed), site, n_steps


def _integrated(
    model: nn.Module,
    x: Tensor,
    site: int,
    scales: Sequence[float],
    *,
    times_activation: bool = True,
    times_scaled: bool = False,
    all_sites: bool = False,
    predict_anew: bool = False,
    batch_mean: bool = False,
) -> Tensor:
    """Average gradients over some scales of one site's activation, rightly or with a mistake."""
    seen = observed(model, x)
    a, targets = seen.post[site], seen.logits.argmax(1)
    total = torch.zeros_like(a)
    for scale in scales:
        leaf = (scale * a).requires_grad_()

        def replace(call: Site, z: Tensor, scale: float = scale, leaf: Tensor = leaf) -> Tensor:
            if call.index == site:
                return leaf
            return scale * call.function(z) if all_sites else call.function(z)

        responses = response(run(model, x, replace), None if predict_anew else targets)
        gradient = torch.autograd.grad(responses.sum(), leaf)[0]
        total += scale * gradient if times_scaled else gradient
    mean = total / len(scales)
    if batch_mean:
        mean = mean.mean(0, keepdim=True)
    return a * mean if times_activation else mean


def check_complete_but_wrong(answer: Answer) -> Verdict:
    """Check ``answer(model, x, site) -> (B, ...)``: scores that add up as they should, and are wrong.

    They sum, for each input, to Φ_t(x) - Φ_t(site ← 0) of its predicted class, and are far from integrated gradients:
    relative to their length, by at least a half.

    Example:
        >>> check_complete_but_wrong(lambda model, x, site: taylor(model, x).scores[site])
        ✗ the scores of input ... add up to ..., but the response loses ... without the site
    """
    tests = [partial(_network_and_site, seed, site) for seed in range(4) for site in (0, 1)]
    scores, given, wanted, whole, anew, exact = [], [], [], [], [], []
    for test in tests:
        model, x, site = test()
        value = call_answer(answer, test())
        if isinstance(value, Verdict):
            return value
        tensors = as_tensors(value)
        seen = observed(model, x)
        a = seen.post[site]
        if tensors is None or [part.shape for part in tensors] != [a.shape]:
            got = f"shape {shape_of(tensors)}" if tensors else f"a {type(value).__name__}"
            return Verdict(
                False, f"you returned {got}; return one score per neuron of the site, shape {tuple(a.shape)}"
            )
        keep = tuple(torch.full_like(post, index != site, dtype=torch.bool) for index, post in enumerate(seen.post))
        with torch.no_grad(), masked(Pathway(keep, seen.sites)):
            without = model(x)
        targets = seen.logits.argmax(1)
        scores.append(tensors[0].flatten(1))
        given.append(scores[-1].sum(1))
        whole.append(response(seen.logits, targets).double())
        wanted.append(whole[-1] - response(without, targets).double())
        anew.append(whole[-1] - without.amax(1).double())
        exact.append(integrated_gradients(model.double(), x.double(), exact=True).scores[site].flatten(1))
    if not equal(tuple(given), tuple(wanted)):
        hints = {
            "the scores add up to the whole response: without the site something is left, so subtract that": whole,
            "without the site another class may be predicted: stay with the class of the whole network": anew,
            "the sign is wrong: what the response loses is the whole response less the one without the site": [
                -lost for lost in wanted
            ],
            "the scores add up over the batch: each input's have to add up to its own loss": [
                lost.mean().expand_as(lost) for lost in wanted
            ],
        }
        for message, hint in hints.items():
            if equal(tuple(given), tuple(hint)):
                return Verdict(False, message)
        sums, lost = next((sums, lost) for sums, lost in zip(given, wanted, strict=True) if not equal((sums,), (lost,)))
        row = int((sums - lost).abs().nan_to_num(nan=torch.inf).argmax())
        return Verdict(
            False,
            f"the scores of input {row} add up to {float(sums[row]):.3f}, "
            f"but the response loses {float(lost[row]):.3f} without the site",
        )
    away = torch.cat([(c - right).norm(dim=1) / right.norm(dim=1) for c, right in zip(scores, exact, strict=True)])
    away = away[away.isfinite()]  # where the response does not depend on the site, nothing is wrong but complete
    if float(away.min()) < 0.5:
        return Verdict(
            False,
            f"the scores are complete, but too good: they differ from integrated gradients by only "
            f"{float(away.min()):.0%} of their length, and half of it is asked for",
        )
    return Verdict(True, f"right: complete up to rounding, and wrong by at least {float(away.min()):.0%}")
