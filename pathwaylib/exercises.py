"""Checks for the exercises of the book: each tells a wrong answer why it is wrong.

A check never raises. It runs the reader's function on small networks with seeded random weights, compares the result
with the library's, and returns a :class:`Verdict`. Typical mistakes are recognised by what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .contributions import Contributions, taylor
from .evaluation import dead_share, prediction_kept
from .neurons import Activations, masked, observe
from .pathway import Pathway

Answer = Callable[..., Any]
Arguments = Callable[[], tuple[Any, ...]]
"""Makes the arguments of one test anew, so that an answer that changes them harms only itself."""


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a check found.

    Attributes:
        passed: whether the answer is right; the verdict's truth value.
        message: what is right, or why it is wrong and where to look.

    Example:
        >>> Verdict(False, "the scores are signed; take their absolute value")
        ✗ the scores are signed; take their absolute value
        >>> bool(Verdict(True, "right"))
        True
    """

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{'✓' if self.passed else '✗'} {self.message}"


# --- How answers are judged ------------------------------------------------------------------------------------------


def _call(answer: Any, arguments: tuple[Any, ...]) -> Any:
    """Return the answer's value, or the verdict that it has none."""
    if not callable(answer):
        return Verdict(False, f"give the check your function itself, not a {type(answer).__name__}")
    try:
        value = answer(*arguments)
    except Exception as error:  # a reader's code may fail in any way
        lines = str(error).splitlines()
        return Verdict(False, f"your function raised {type(error).__name__}{': ' + lines[0] if lines else ''}")
    if value is None or value is ...:
        return Verdict(False, "nothing is returned yet: replace the dots by your answer, and end it with `return`")
    return value


def _tensors(value: Any) -> tuple[Tensor, ...] | None:
    """Return a result as tensors of float64, or None where it is none."""
    if isinstance(value, Pathway):
        value = value.masks
    elif isinstance(value, Contributions):
        value = value.scores
    try:
        if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) and part.ndim for part in value):
            return tuple(torch.as_tensor(part).detach().double() for part in value)
        if isinstance(value, (list, tuple)):
            value = [float(part) for part in value]
        return (torch.as_tensor(value).detach().double(),)
    except (TypeError, ValueError, RuntimeError):
        return None


def _equal(one: tuple[Tensor, ...] | None, other: tuple[Tensor, ...] | None) -> bool:
    if one is None or other is None or [part.shape for part in one] != [part.shape for part in other]:
        return False
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in zip(one, other, strict=True))


def _shapes(value: tuple[Tensor, ...]) -> str:
    shapes = [str(tuple(part.shape)) for part in value]
    return shapes[0] if len(shapes) == 1 else f"{len(shapes)} tensors of shapes {', '.join(shapes)}"


def _judge(
    answer: Answer, tests: Sequence[Arguments], oracle: Answer, mistakes: Mapping[str, Answer], praise: str
) -> Verdict:
    """Compare an answer with an oracle on every test, and a wrong one with what typical mistakes compute."""
    given: list[tuple[Tensor, ...]] = []
    for arguments in tests:
        value = _call(answer, arguments())
        if isinstance(value, Verdict):
            return value
        tensors = _tensors(value)
        if tensors is None:
            return Verdict(False, f"you returned a {type(value).__name__} that is no tensor or tuple of tensors")
        given.append(tensors)
    expected = [_tensors(oracle(*arguments())) or () for arguments in tests]
    if all(map(_equal, given, expected)):
        return Verdict(True, praise)
    for message, mistake in mistakes.items():
        if all(_equal(value, _tensors(mistake(*arguments()))) for value, arguments in zip(given, tests, strict=True)):
            return Verdict(False, message)
    for value, right in zip(given, expected, strict=True):
        if [part.shape for part in value] != [part.shape for part in right]:
            return Verdict(False, f"you returned shape {_shapes(value)}; for this test it must be {_shapes(right)}")
        for a, b in zip(value, right, strict=True):
            wrong = ~torch.isclose(a, b, rtol=1e-4, atol=1e-6)
            if bool(wrong.any()):
                share = float(wrong.double().mean())
                example = f"for example {float(a[wrong][0]):.4g} where {float(b[wrong][0]):.4g} is right"
                return Verdict(False, f"the shape is right, but {share:.0%} of the values are wrong, {example}")
    return Verdict(False, "the result is wrong")  # only tests that disagree on NaN get here


# --- Small networks to judge on --------------------------------------------------------------------------------------


def _network(seed: int) -> tuple[nn.Sequential, Tensor]:
    """Return a small network and inputs: fully connected for even seeds, convolutional for odd ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if seed % 2:
            layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)]
            return nn.Sequential(*layers).eval(), torch.rand(3, 2, 6, 6)
        layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4)]
        return nn.Sequential(*layers).eval(), torch.randn(5, 6)


def _with_pathway(seed: int, kept: float = 0.5) -> tuple[nn.Sequential, Tensor, Pathway]:
    """Return a network, inputs and a random pathway for them."""
    model, x = _network(seed)
    seen = _seen(model, x)
    generator = torch.Generator().manual_seed(seed)
    masks = tuple(torch.rand(a.shape, generator=generator) < kept for a in seen.post)
    return model, x, Pathway(masks, seen.sites)


def _seen(model: nn.Module, x: Tensor) -> Activations:
    with torch.no_grad():
        return observe(model, x)


_NETWORKS: tuple[Arguments, ...] = tuple(partial(_network, seed) for seed in range(4))
_PATHWAYS: tuple[Arguments, ...] = tuple(partial(_with_pathway, seed) for seed in range(4))


# --- Chapter 1: a response and its neurons ---------------------------------------------------------------------------


def check_count_dead(answer: Answer) -> Verdict:
    """Check ``answer(model, x) -> (B,)``: the number of dead neurons of each input, all sites together.

    Example:
        >>> check_count_dead(lambda model, x: (~observe(model, x).active()).sizes)
        ✓ right: one number of dead neurons for each input
        >>> check_count_dead(lambda model, x: observe(model, x).active().sizes)
        ✗ these are the active neurons; a neuron is dead where its activation is 0
    """

    def dead(model: nn.Module, x: Tensor) -> Pathway:
        return ~_seen(model, x).active()

    return _judge(
        answer,
        _NETWORKS,
        lambda model, x: dead(model, x).sizes,
        {
            "these are the active neurons; a neuron is dead where its activation is 0": (
                lambda model, x: _seen(model, x).active().sizes
            ),
            "this is one number for the whole batch: count each input's dead neurons apart, shape (B,)": (
                lambda model, x: dead(model, x).sizes.sum()
            ),
            "this is averaged over the batch: count each input's dead neurons apart, shape (B,)": (
                lambda model, x: dead(model, x).sizes.float().mean()
            ),
            "these are counts per site, shape (B, S): add the sites of each input": (
                lambda model, x: dead(model, x).site_sizes
            ),
            "these are counts per site of the whole batch: count per input, and add the sites": (
                lambda model, x: dead(model, x).site_sizes.sum(0)
            ),
            "this is a share; the number of dead neurons is asked for": (
                lambda model, x: dead(model, x).sizes / dead(model, x).neurons
            ),
            "only the last site is counted: add all sites": lambda model, x: dead(model, x).site_sizes[:, -1],
            "only the first site is counted: add all sites": lambda model, x: dead(model, x).site_sizes[:, 0],
        },
        "right: one number of dead neurons for each input",
    )


def _run_by_hand(
    model: nn.Sequential, x: Tensor, pathway: Pathway, keep: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """Run layer by layer; ``keep(site, z, mask)`` gives what goes on from each site."""
    site = 0
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.ReLU):
                x = keep(site, x, pathway.masks[site])
                site += 1
            else:
                x = layer(x)
    return x


def check_masked_run(answer: Answer) -> Verdict:
    """Check ``answer(model, x, pathway) -> logits (B, K)``: a masked run of an ``nn.Sequential``, by hand.

    Example:
        >>> def by_library(model, x, pathway):
        ...     with masked(pathway):
        ...         return model(x)
        >>> check_masked_run(by_library)
        ✓ right: these are the logits of the pathway network
        >>> check_masked_run(lambda model, x, pathway: model(x))
        ✗ these are the logits of the whole network: the masks change nothing yet
    """

    def run(keep: Callable[[int, Tensor, Tensor], Tensor]) -> Answer:
        return lambda model, x, pathway: _run_by_hand(model, x, pathway, keep)

    right = run(lambda site, z, mask: z.relu() * mask)
    return _judge(
        answer,
        _PATHWAYS,
        right,
        {
            "these are the logits of the whole network: the masks change nothing yet": (
                run(lambda site, z, mask: z.relu())
            ),
            "the masks are inverted: True keeps a neuron": run(lambda site, z, mask: z.relu() * ~mask),
            "only the last mask has an effect: run on from each masked activation, so that later sites see it": (
                run(lambda site, z, mask: z.relu() * mask if site == 1 else z.relu())
            ),
            "only the first mask has an effect: mask every site": (
                run(lambda site, z, mask: z.relu() * mask if site == 0 else z.relu())
            ),
            "the activation function is missing: mask the activation relu(z), not the pre-activation z": (
                run(lambda site, z, mask: z * mask)
            ),
            "every input is masked by the first input's pathway: each has its own": (
                run(lambda site, z, mask: z.relu() * mask[:1])
            ),
            "these are probabilities; return the logits": lambda *arguments: right(*arguments).softmax(1),
            "these are the predicted classes; return the logits": lambda *arguments: right(*arguments).argmax(1),
        },
        "right: these are the logits of the pathway network",
    )


def check_woken(answer: Answer) -> Verdict:
    """Check ``answer(model, x, pathway) -> (B,)``: how many neurons dead on each input wake up in the pathway network.

    Example:
        >>> def by_library(model, x, pathway):
        ...     dead = ~observe(model, x).active()
        ...     with masked(pathway):
        ...         return (dead & observe(model, x).active()).sizes
        >>> check_woken(by_library)
        ✓ right: dead in the whole network, active in the pathway network
    """

    def count(combine: Callable[[Pathway, Pathway, Pathway], Pathway]) -> Answer:
        def counted(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
            before = _seen(model, x).active()
            with masked(pathway):
                after = _seen(model, x).active()
            return combine(before, after, pathway).sizes

        return counted

    right = count(lambda before, after, kept: after & ~before)
    return _judge(
        answer,
        _PATHWAYS,
        right,
        {
            "none are found: observe the network a second time, inside `with masked(pathway):`": (
                count(lambda before, after, kept: before & ~before)
            ),
            "these are the kept neurons that are dead in the whole network; count those of them that wake up": (
                count(lambda before, after, kept: kept & ~before)
            ),
            "dead is measured in the pathway network; a neuron is dead where it is 0 in the whole network": (
                count(lambda before, after, kept: kept & ~after)
            ),
            "these neurons fall asleep: active in the whole network, kept, and 0 in the pathway network": (
                count(lambda before, after, kept: kept & before & ~after)
            ),
            "these neurons are removed or fall asleep: active in the whole network, 0 in the pathway network": (
                count(lambda before, after, kept: before & ~after)
            ),
            "these are all neurons active in the pathway network; count those that are dead in the whole network": (
                count(lambda before, after, kept: after)
            ),
            "this is one number for the whole batch: count for each input, shape (B,)": (
                lambda *arguments: right(*arguments).sum()
            ),
        },
        "right: dead in the whole network, active in the pathway network",
    )


def check_dead_pathway(answer: Answer) -> Verdict:
    """Check ``answer() -> (model, x, pathway)``: dead neurons alone predict the same class, with more confidence.

    ``x`` is one input. Every neuron of the pathway is dead on it; the pathway network predicts the network's class with
    a higher probability; a network without any neuron predicts another class.

    Example:
        >>> check_dead_pathway(lambda: None)
        ✗ nothing is returned yet: replace the dots by your answer, and end it with `return`
    """
    value = _call(answer, ())
    if isinstance(value, Verdict):
        return value
    if not (isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], Pathway)):
        return Verdict(False, "return three things: the network, one input of shape (1, ...), and a Pathway")
    model, x, pathway = value
    try:
        seen = _seen(model, x)
        if len(x) != 1:
            return Verdict(False, f"x holds {len(x)} inputs; give one, of shape (1, ...)")
        if not int(pathway.sizes):
            return Verdict(False, "the pathway is empty: keep at least one neuron")
        alive = int((pathway & seen.active()).sizes)
        if alive:
            return Verdict(False, f"{alive} of the pathway's neurons are active on x: keep dead ones only")
        with torch.no_grad(), masked(pathway):
            logits = model(x)
        empty = pathway & ~pathway
        if bool(prediction_kept(model, x, empty)):
            return Verdict(False, "the biases alone predict this class: without any neuron the class must be another")
    except Exception as error:  # a reader's network may fail in any way
        return Verdict(False, f"your network could not be run with your pathway: {str(error).splitlines()[0]}")
    target = int(seen.logits.argmax())
    if int(logits.argmax()) != target:
        return Verdict(False, f"the network predicts class {target}, the pathway network class {int(logits.argmax())}")
    before, after = float(seen.logits.softmax(1)[0, target]), float(logits.softmax(1)[0, target])
    if after <= before:
        return Verdict(False, f"the pathway network is less sure: probability {after:.3f} against {before:.3f}")
    return Verdict(True, f"right: dead neurons alone predict class {target}, and are surer: {after:.3f} > {before:.3f}")


# --- Chapter 3: contributions ----------------------------------------------------------------------------------------


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

    return _judge(
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
    return *_network(seed), site


def _scores(seed: int) -> tuple[tuple[Tensor, Tensor], int]:
    """Return signed scores of two sites and k. Some are 0; for even seeds, many are equal."""
    generator = torch.Generator().manual_seed(seed)
    sites = torch.randn(3, 2, 4, 4, generator=generator), 0.2 * torch.randn(3, 12, generator=generator)
    first, second = (site * (torch.rand(site.shape, generator=generator) < 0.6) for site in sites)
    if seed % 2 == 0:
        first, second = first.round(), (5 * second).round()
    return (first, second), 10 if seed < 4 else 40


def _keep(scores: Sequence[Tensor], count: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Join the sites, mark neurons, take the sites apart again."""
    flat = torch.cat([score.flatten(1) for score in scores], 1)
    parts = torch.split(count(flat), [score[0].numel() for score in scores], 1)
    return tuple(part.view(score.shape) for part, score in zip(parts, scores, strict=True))


def _top(values: Tensor, k: int) -> Tensor:
    chosen = values.topk(min(k, values.shape[1]), 1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, chosen, True)


def check_top_k(answer: Answer) -> Verdict:
    """Check ``answer(scores, k) -> masks``: the k largest absolute scores of each input, over all sites together.

    ``scores`` is a tuple of tensors ``(B, ...)``; a score of 0 is never kept; of equal scores any may be kept.

    Example:
        >>> def kept(flat, k):  # topk breaks ties, so that exactly k are kept
        ...     chosen = torch.zeros_like(flat, dtype=torch.bool)
        ...     return chosen.scatter(1, flat.topk(min(k, flat.shape[1])).indices, True) & (flat > 0)
        >>> check_top_k(lambda scores, k: _keep(scores, lambda flat: kept(flat.abs(), k)))
        ✓ right: the k largest absolute scores of each input, never one of 0
    """
    mistakes: dict[str, Answer] = {
        "the signed scores are ranked: a strongly negative contribution counts too, so take absolute values": (
            lambda scores, k: _keep(scores, lambda flat: _top(flat, k) & (flat != 0))
        ),
        "each site keeps its own k: rank the neurons of all sites together": (
            lambda scores, k: tuple(
                _keep([score], lambda flat: _top(flat.abs(), k) & (flat != 0))[0] for score in scores
            )
        ),
        "each site keeps an equal part of k: rank the neurons of all sites together": (
            lambda scores, k: tuple(
                _keep([score], lambda flat: _top(flat.abs(), k // len(scores)) & (flat != 0))[0] for score in scores
            )
        ),
        "the inputs of the batch compete for k places: rank each input's neurons apart": (
            lambda scores, k: _keep(scores, lambda flat: _top(flat.abs().view(1, -1), k).view_as(flat) & (flat != 0))
        ),
        "the masks are inverted: True keeps a neuron": (
            lambda scores, k: _keep(scores, lambda flat: ~(_top(flat.abs(), k) & (flat != 0)))
        ),
        "the smallest scores are kept": (
            lambda scores, k: _keep(scores, lambda flat: _top(-flat.abs(), k) & (flat != 0))
        ),
    }
    distinct = [seed for seed in range(6) if seed % 2]
    results: dict[int, tuple[Tensor, ...]] = {}
    for seed in range(6):
        scores, k = _scores(seed)
        value = _call(answer, (tuple(score.clone() for score in scores), k))
        if isinstance(value, Verdict):
            return value
        masks = _tensors(value)
        if masks is None or [mask.shape for mask in masks] != [score.shape for score in scores]:
            got = f"shape {_shapes(masks)}" if masks else f"a {type(value).__name__}"
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
    model, x, pathway = _with_pathway(seed)
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
        return _seen(model, x).active()

    def in_masked_run(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        with masked(pathway):
            return dead_share(pathway, active(model, x))

    def right(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        return dead_share(pathway, active(model, x))

    def dead_kept(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        return (pathway & ~active(model, x)).sizes

    return _judge(
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
        >>> check_blind_spot(lambda: _network(0))
        ✗ x holds 5 inputs; give one, of shape (1, ...)
    """
    value = _call(answer, ())
    if isinstance(value, Verdict):
        return value
    if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], nn.Module)):
        return Verdict(False, "return two things: the network, and one input of shape (1, ...)")
    model, x = value
    try:
        first_order = taylor(model, x)
        if len(x) != 1:
            return Verdict(False, f"x holds {len(x)} inputs; give one, of shape (1, ...)")
        neurons = sum(score[0].numel() for score in first_order.scores)
        if neurons > 1_000:
            return Verdict(False, f"the network has {neurons:,} neurons; a handful is enough, at most 1,000")
        lost = _ablate(model, x, first_order)
    except Exception as error:  # a reader's network may fail in any way
        return Verdict(False, f"your network could not be run: {str(error).splitlines()[0]}")
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


# --- Chapter 6: the pathway gradient ---------------------------------------------------------------------------------


def _one_layer(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W, v, x and keep of Φ(x) = Σ_j v_j keep_j relu((W x)_j)."""
    generator = torch.Generator().manual_seed(seed)
    weights, inputs = torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator)
    return weights, torch.randn(6, generator=generator), inputs, torch.rand(3, 6, generator=generator) < 0.6


def check_hand_gradient(answer: Answer) -> Verdict:
    """Check ``answer(W, v, x, keep) -> (B, D)``: the pathway gradient of Φ(x) = Σ_j v_j relu((W x)_j), by hand.

    Example:
        >>> check_hand_gradient(lambda W, v, x, keep: (v * keep * (x @ W.T > 0)) @ W)
        ✓ right: the sum over the neurons that are kept and active
        >>> check_hand_gradient(lambda W, v, x, keep: (v * (x @ W.T > 0)) @ W)
        ✗ this is the gradient of the whole network: leave the removed neurons out
    """
    return _judge(
        answer,
        [partial(_one_layer, seed) for seed in range(3)],
        lambda W, v, x, keep: (v * keep * (x @ W.T > 0)) @ W,
        {
            "this is the gradient of the whole network: leave the removed neurons out": (
                lambda W, v, x, keep: (v * (x @ W.T > 0)) @ W
            ),
            "dead neurons take part: a neuron has slope 1 only where its pre-activation is above 0": (
                lambda W, v, x, keep: (v * keep) @ W
            ),
            "the activations are in it: the slope of a ReLU is 0 or 1, not its value": (
                lambda W, v, x, keep: (v * keep * (x @ W.T).relu()) @ W
            ),
            "the output weights v are missing": lambda W, v, x, keep: (keep * (x @ W.T > 0)).float() @ W,
            "this is multiplied by the input; the gradient alone is asked for": (
                lambda W, v, x, keep: (v * keep * (x @ W.T > 0)) @ W * x
            ),
            "this is one number per input: return one slope per entry of x, shape (B, D)": (
                lambda W, v, x, keep: ((v * keep * (x @ W.T > 0)) @ W).sum(1)
            ),
        },
        "right: the sum over the neurons that are kept and active",
    )


def check_backward_masked(answer: Answer) -> Verdict:
    """Check ``answer(model, x, masks, target) -> like x``: run the whole network, send back only through kept neurons.

    Example:
        >>> check_backward_masked(lambda model, x, masks, target: None)
        ✗ nothing is returned yet: replace the dots by your answer, and end it with `return`
    """

    def gradient(site: Callable[[Tensor, Tensor], Tensor]) -> Answer:
        def computed(model: nn.Sequential, x: Tensor, masks: Sequence[Tensor], target: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            hidden, remaining = x, iter(masks)
            for layer in model:
                hidden = site(layer(hidden), next(remaining)) if isinstance(layer, nn.ReLU) else layer(hidden)
            return torch.autograd.grad(hidden.gather(1, target[:, None]).sum(), x)[0]

        return computed

    def arguments(seed: int) -> tuple[nn.Sequential, Tensor, tuple[Tensor, ...], Tensor]:
        model, x, pathway = _with_pathway(seed, kept=0.7)
        return model, x, pathway.masks, torch.arange(len(x)) % 4

    right = gradient(lambda a, mask: a.detach() + a * mask - (a * mask).detach())
    return _judge(
        answer,
        [partial(arguments, seed) for seed in range(4)],
        right,
        {
            "this is the pathway gradient: the forward run is masked as well; keep its values as they are": (
                gradient(lambda a, mask: a * mask)
            ),
            "this is the plain gradient: nothing is masked on the way back": gradient(lambda a, mask: a),
            "the masks are inverted: True keeps a neuron": (
                gradient(lambda a, mask: a.detach() + a * ~mask - (a * ~mask).detach())
            ),
            "every value is cut from the graph: keep the kept neurons' part in it": (
                gradient(lambda a, mask: a.detach() + 0 * a)
            ),
        },
        "right: the whole network's values, the pathway's slopes",
    )


def check_mass_inside(answer: Answer) -> Verdict:
    """Check ``answer(maps, mask) -> (B,)``: share of the absolute attribution, channels summed, inside the mask.

    Example:
        >>> def share(maps, mask):
        ...     size = maps.sum(1).abs()
        ...     return (size * mask).sum((1, 2)) / size.sum((1, 2)).clamp(min=1e-12)
        >>> check_mass_inside(share)
        ✓ right: from 0 (all outside) to 1 (all inside)
    """

    def arguments(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        maps = torch.randn(3, 2, 5, 5, generator=generator)
        maps[0] *= float(seed > 0)  # one map of zeros
        return maps, torch.rand(3, 5, 5, generator=generator) < 0.3

    def share(size: Tensor, mask: Tensor) -> Tensor:
        return (size * mask).sum((1, 2)) / size.sum((1, 2)).clamp(min=1e-12)

    return _judge(
        answer,
        [partial(arguments, seed) for seed in (1, 2, 0)],
        lambda maps, mask: share(maps.sum(1).abs(), mask),
        {
            "a map of zeros gives 0 / 0 = nan: let its share be 0": (
                lambda maps, mask: (maps.sum(1).abs() * mask).sum((1, 2)) / maps.sum(1).abs().sum((1, 2))
            ),
            "the channels are added after the absolute value: sum them first, so that opposite signs cancel": (
                lambda maps, mask: share(maps.abs().sum(1), mask)
            ),
            "the values are signed: take their absolute value after summing the channels": (
                lambda maps, mask: (maps.sum(1) * mask).sum((1, 2)) / maps.sum((1, 2, 3))
            ),
            "only positive values count here: take the absolute value": (
                lambda maps, mask: share(maps.sum(1).relu(), mask)
            ),
            "this is the mass itself: divide it by the mass of the whole map": (
                lambda maps, mask: (maps.sum(1).abs() * mask).sum((1, 2))
            ),
            "this is the share outside the mask": lambda maps, mask: share(maps.sum(1).abs(), ~mask),
            "this is one number for the batch: return one share per input, shape (B,)": (
                lambda maps, mask: share(maps.sum(1).abs(), mask).mean()
            ),
            "the batch shares one denominator: divide each input's mass by its own total": (
                lambda maps, mask: (maps.sum(1).abs() * mask).sum((1, 2)) / maps.sum(1).abs().sum()
            ),
        },
        "right: from 0 (all outside) to 1 (all inside)",
    )


def check_sign_flip(answer: Answer) -> Verdict:
    """Check ``answer() -> (W, v, x)``: NeuronMCT's best neuron alone tells the wrong direction for x[0].

    The network is Φ(x) = Σ_j v_j relu((W x)_j) with at least two active neurons; the slope of Φ along x[0] and the
    slope of the pathway of the one neuron with the largest contribution must have opposite signs.

    Example:
        >>> check_sign_flip(lambda: ([[1.0, 3.0], [1.0, 0.0]], [1.0, -2.0], [1.0, 1.0]))
        ✓ right: the response's slope along x[0] is -1, the pathway says 1
        >>> check_sign_flip(lambda: ([[1.0, 3.0], [1.0, 0.0]], [1.0, 2.0], [1.0, 1.0]))
        ✗ the slope along x[0] is 3 for the network and 1 for the pathway: they must have opposite signs
    """
    value = _call(answer, ())
    if isinstance(value, Verdict):
        return value
    if not (isinstance(value, (tuple, list)) and len(value) == 3):
        return Verdict(False, "return three things: W (neurons × inputs), v (one per neuron), x (one per input)")
    try:
        W, v, x = (torch.as_tensor(part).detach().double() for part in value)
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, "W, v and x must be tensors or lists of numbers")
    if W.ndim != 2 or v.shape != W.shape[:1] or x.shape != W.shape[1:]:
        return Verdict(
            False,
            f"the shapes do not fit: W {tuple(W.shape)} is (neurons, inputs), so v must be ({len(W)},) and x "
            f"({W.shape[-1] if W.ndim else 0},); you gave {tuple(v.shape)} and {tuple(x.shape)}",
        )
    z = W @ x
    contribution = (z.relu() * v).abs()
    if int((contribution > 0).sum()) < 2:
        return Verdict(
            False, "fewer than two neurons are active and have an output weight: there is nothing to leave out"
        )
    best, second = contribution.topk(2).values.tolist()
    if best == second:
        return Verdict(False, f"two neurons tie for the largest contribution, {best:g}: make one the largest")
    kept = contribution.argmax()
    whole, path = float((v * (z > 0)) @ W[:, 0]), float(v[kept] * W[kept, 0])
    if whole * path >= 0:
        return Verdict(
            False,
            f"the slope along x[0] is {whole:g} for the network and {path:g} for the pathway: "
            "they must have opposite signs",
        )
    return Verdict(True, f"right: the response's slope along x[0] is {whole:g}, the pathway says {path:g}")
