"""Chapter 2: pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contributions import taylor
from ..neurons import Target, masked, response
from ..pathway import Pathway, split_sites
from .judging import (
    Answer,
    Verdict,
    judge,
    judge_network,
    mark,
    network_and_pathway,
    observed,
    small_network,
    top,
)

_SEEDS = (4, 7, 14, 21)  # neurons wake up in these networks, and the pathways change some predictions


def _round(seed: int, k: int) -> tuple[nn.Sequential, Tensor, Pathway, int]:
    """Return a network, inputs, a random pathway for them, and how many neurons are to be left."""
    return *network_and_pathway(seed, kept=0.8), k


def check_prune_round(answer: Answer) -> Verdict:
    """Check ``answer(model, x, pathway, k) -> masks``: one monotone round of greedy pruning, one mask per site.

    The k largest ``|a ∂Φ_P,t/∂a|`` of each input inside the pathway network, over all sites together and never one of
    0, where t is the class that the whole network predicts.

    Example:
        >>> check_prune_round(lambda model, x, pathway, k: pathway)
        ✗ no neuron is removed: of the pathway's neurons keep the k of largest score
    """

    def scores(model: nn.Module, x: Tensor, pathway: Pathway, target: Target) -> tuple[Tensor, ...]:
        with masked(pathway):
            return taylor(model, x, target).scores

    def target_of(model: nn.Module, x: Tensor) -> Tensor:
        return observed(model, x).logits.argmax(1)

    def inside(keep: Callable[[Tensor, int], Tensor]) -> Answer:
        return lambda model, x, pathway, k: mark(
            scores(model, x, pathway, target_of(model, x)), lambda flat: keep(flat, k)
        )

    def largest(flat: Tensor, k: int) -> Tensor:
        return top(flat.abs(), k) & (flat != 0)

    def each_site(model: nn.Module, x: Tensor, pathway: Pathway, k: int) -> tuple[Tensor, ...]:
        found = scores(model, x, pathway, target_of(model, x))
        return tuple(mark([score], lambda flat: largest(flat, k))[0] for score in found)

    return judge(
        answer,
        [partial(_round, seed, k) for seed in _SEEDS for k in (4, 40)],
        inside(largest),
        {
            "no neuron is removed: of the pathway's neurons keep the k of largest score": (
                lambda model, x, pathway, k: pathway
            ),
            "the neurons are scored in the whole network, so some that are out come back: score them inside "
            "`with masked(pathway):`": (
                lambda model, x, pathway, k: mark(taylor(model, x).scores, lambda flat: largest(flat, k))
            ),
            "the neurons are scored in the whole network: score them inside `with masked(pathway):`": (
                lambda model, x, pathway, k: mark(
                    [s * mask for s, mask in zip(taylor(model, x).scores, pathway.masks, strict=True)],
                    lambda flat: largest(flat, k),
                )
            ),
            "this explains the class that the pathway network predicts: take the whole network's": (
                lambda model, x, pathway, k: mark(scores(model, x, pathway, None), lambda flat: largest(flat, k))
            ),
            "the signed scores are ranked: a strongly negative contribution counts too, so take absolute values": (
                inside(lambda flat, k: top(flat, k) & (flat != 0))
            ),
            "neurons of score 0 are kept: where fewer than k score above 0, keep only those": (
                inside(lambda flat, k: top(flat.abs(), k))
            ),
            "the neurons of score 0 come back: this is the revive rule, in the monotone one they leave first": (
                inside(lambda flat, k: largest(flat, k) | (flat == 0))
            ),
            "each site keeps its own k: rank the neurons of all sites together": each_site,
            "the inputs of the batch compete for k places: rank each input's neurons apart": (
                inside(lambda flat, k: largest(flat.view(1, -1), k).view_as(flat))
            ),
            "k neurons are removed: k is the number to keep": (
                inside(lambda flat, k: ~top(-flat.abs(), k) & (flat != 0))
            ),
            "the masks are inverted: True keeps a neuron": inside(lambda flat, k: ~largest(flat, k)),
        },
        "right: the k neurons of largest score in the pathway network, and none comes back",
    )


def _gates(seed: int) -> tuple[nn.Sequential, Tensor, tuple[Tensor, ...], float, float]:
    """Return a network, inputs, random gates, a step size and γ that take some gates to 0."""
    model, x = small_network(seed)
    generator = torch.Generator().manual_seed(seed)
    gates = tuple(torch.rand(a.shape, generator=generator) for a in observed(model, x).post)
    return model, x, gates, 0.5, 0.2 + 0.1 * seed


def _gated(model: nn.Sequential, x: Tensor, gates: Sequence[Tensor], before: bool = False) -> Tensor:
    """Run layer by layer, each activation (or pre-activation) times its gate."""
    remaining = iter(gates)
    for layer in model:
        if isinstance(layer, nn.ReLU):
            gate = next(remaining)
            x = layer(x * gate) if before else layer(x) * gate
        else:
            x = layer(x)
    return x


def check_gate_step(answer: Answer) -> Verdict:
    """Check ``answer(model, x, gates, eta, gamma) -> gates``: one step of plain gradient descent on the routing loss.

    Each input's loss is CE(softmax Φ(x), softmax Φ_λ(x)) + γ Σ λ; gates below 0 are set to 0.

    Example:
        >>> check_gate_step(lambda model, x, gates, eta, gamma: gates)
        ✗ these are the gates you were given: take a step against the gradient
    """

    def step(
        *,
        reduction: str = "sum",
        hard: bool = False,
        swapped: bool = False,
        penalty: float = 1.0,
        mean_penalty: bool = False,
        sign: float = 1.0,
        clamp: bool = True,
        above: bool = False,
    ) -> Answer:
        def stepped(
            model: nn.Sequential, x: Tensor, gates: Sequence[Tensor], eta: float, gamma: float
        ) -> tuple[Tensor, ...]:
            wanted = observed(model, x).logits.softmax(1)
            leaves = [gate.detach().clone().requires_grad_() for gate in gates]
            logits = _gated(model, x, leaves)
            if swapped:
                loss = -(logits.softmax(1) * wanted.log()).sum()
            else:
                loss = F.cross_entropy(logits, wanted.argmax(1) if hard else wanted, reduction=reduction)
            size = torch.stack([leaf.mean() if mean_penalty else leaf.sum() for leaf in leaves]).sum()
            slopes = torch.autograd.grad(loss + penalty * gamma * size, leaves)
            new = (leaf.detach() - sign * eta * slope for leaf, slope in zip(leaves, slopes, strict=True))
            return tuple(gate.clamp(min=0, max=1) if above else gate.clamp(min=0) if clamp else gate for gate in new)

        return stepped

    return judge(
        answer,
        [partial(_gates, seed) for seed in range(4)],
        step(),
        {
            "these are the gates you were given: take a step against the gradient": (
                lambda model, x, gates, eta, gamma: gates
            ),
            "gates fall below 0, which turns the sign of a neuron: clamp them at 0": step(clamp=False),
            "the step goes up the gradient: subtract": step(sign=-1.0),
            "the cross-entropy is averaged over the batch, so γ weighs B times too much: sum over the inputs": (
                step(reduction="mean")
            ),
            "the penalty is missing: add γ times the sum of the gates": step(penalty=0.0),
            "the penalty is subtracted: small gates are wanted, so add it": step(penalty=-1.0),
            "the penalty is the mean of the gates: sum them": step(mean_penalty=True),
            "the cross-entropy is that of the predicted class: compare with all probabilities softmax Φ(x)": (
                step(hard=True)
            ),
            "the probabilities are swapped: those of the whole network are the wanted ones": step(swapped=True),
            "gates above 1 are cut off: only those below 0 are": step(above=True),
        },
        "right: one step of gradient descent, and no gate below 0",
    )


def check_woken_response(answer: Answer) -> Verdict:
    """Check ``answer(model, x, pathway) -> (B,)``: what the pathway network's response loses without woken neurons.

    Woken are the pathway's neurons that are dead in the whole network and active in the pathway network.

    Example:
        >>> check_woken_response(lambda model, x, pathway: torch.zeros(len(x)))
        ✗ nothing is lost: observe the network a second time, inside `with masked(pathway):`, to find who woke up
    """

    def logits(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        with masked(pathway):
            return observed(model, x).logits

    def predicted(model: nn.Module, x: Tensor) -> Tensor:
        return observed(model, x).logits.argmax(1)

    def woken(model: nn.Module, x: Tensor, pathway: Pathway) -> Pathway:
        with masked(pathway):
            awake = observed(model, x).active()
        return pathway & awake & ~observed(model, x).active()

    def lost(model: nn.Module, x: Tensor, pathway: Pathway, without: Pathway) -> Tensor:
        return response(logits(model, x, pathway) - logits(model, x, pathway & ~without), predicted(model, x))

    def right(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        return lost(model, x, pathway, woken(model, x, pathway))

    def of_pathways_class(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        inside = logits(model, x, pathway)
        return response(inside - logits(model, x, pathway & ~woken(model, x, pathway)), inside.argmax(1))

    return judge(
        answer,
        [partial(network_and_pathway, seed) for seed in _SEEDS],
        right,
        {
            "nothing is lost: observe the network a second time, inside `with masked(pathway):`, to find who woke up": (
                lambda model, x, pathway: torch.zeros(len(x))
            ),
            "the sign is wrong: it is the response of the pathway network minus that without its woken neurons": (
                lambda *arguments: -right(*arguments)
            ),
            "this compares with the whole network: compare with the pathway network": (
                lambda model, x, pathway: response(
                    observed(model, x).logits - logits(model, x, pathway & ~woken(model, x, pathway)),
                    predicted(model, x),
                )
            ),
            "the woken neurons are removed from the whole network, where they are dead: remove them from the pathway": (
                lambda model, x, pathway: response(
                    logits(model, x, pathway) - logits(model, x, ~woken(model, x, pathway)), predicted(model, x)
                )
            ),
            "this is the response that is left: subtract it from the pathway network's": (
                lambda model, x, pathway: response(
                    logits(model, x, pathway & ~woken(model, x, pathway)), predicted(model, x)
                )
            ),
            "this is the response of the class that the pathway network predicts: take the whole network's": (
                of_pathways_class
            ),
            "these are all logits: return the response, the logit of the class the whole network predicts": (
                lambda model, x, pathway: (
                    logits(model, x, pathway) - logits(model, x, pathway & ~woken(model, x, pathway))
                )
            ),
            "this is summed over the batch: return one number per input, shape (B,)": (
                lambda *arguments: right(*arguments).sum()
            ),
            "this is averaged over the batch: return one number per input, shape (B,)": (
                lambda *arguments: right(*arguments).mean()
            ),
        },
        "right: what the woken neurons carry inside the pathway network",
    )


def check_sleeper(answer: Answer) -> Verdict:
    """Check ``answer() -> (model, x)``: every smallest equivalent subset of at most three neurons is dead, not empty.

    ``x`` is one input. All subsets are tried; one is equivalent if it has the logits of the whole network.

    Example:
        >>> from pathwaylib import sleeper_network
        >>> check_sleeper(sleeper_network)
        ✗ the network has 5 neurons; build one of at most 3
    """
    return judge_network(answer, _judge_sleeper, most=3)


def _judge_sleeper(model: nn.Module, x: Tensor) -> Verdict:
    seen = observed(model, x)
    active = seen.active()
    subsets = torch.cartesian_prod(*[torch.tensor([False, True])] * active.neurons).view(-1, active.neurons)
    masks = split_sites(subsets, [mask.shape[1:] for mask in active.masks])
    with masked(Pathway(masks, active.sites)):
        logits = observed(model, x.expand(len(subsets), *x.shape[1:])).logits
    equivalent = subsets[torch.isclose(logits, seen.logits, rtol=1e-5, atol=1e-6).all(1)]
    sizes = equivalent.sum(1)
    smallest = equivalent[sizes == sizes.min()]
    if not int(sizes.min()):
        return Verdict(False, "without any neuron the logits are the same: the empty subset is the smallest")
    used = (smallest & active.flatten()).any(1)
    if bool(used.any()):
        chosen = ", ".join(str(int(index)) for index in smallest[used][0].nonzero()[:, 0])
        return Verdict(
            False,
            f"a smallest equivalent subset holds a neuron that is active on x: {{{chosen}}}, neurons counted from 0; "
            "let no subset of that size with an active neuron give these logits",
        )
    many = f"{len(smallest)} subsets" if len(smallest) > 1 else "the only one"
    return Verdict(
        True, f"right: {many} of the smallest size, {int(sizes.min())}, among {len(subsets)}, all made of dead neurons"
    )
