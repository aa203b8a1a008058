"""Chapter 1: a response and its neurons."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..evaluation import prediction_kept
from ..neurons import masked
from ..pathway import Pathway
from .judging import NETWORKS, PATHWAYS, Answer, Verdict, call_answer, judge, observed


def check_count_dead(answer: Answer) -> Verdict:
    """Check ``answer(model, x) -> (B,)``: the number of dead neurons of each input, all sites together.

    Example:
        >>> from pathwaylib import observe
        >>> check_count_dead(lambda model, x: (~observe(model, x).active()).sizes)
        ✓ right: one number of dead neurons for each input
        >>> check_count_dead(lambda model, x: observe(model, x).active().sizes)
        ✗ these are the active neurons; a neuron is dead where its activation is 0
    """

    def dead(model: nn.Module, x: Tensor) -> Pathway:
        return ~observed(model, x).active()

    return judge(
        answer,
        NETWORKS,
        lambda model, x: dead(model, x).sizes,
        {
            "these are the active neurons; a neuron is dead where its activation is 0": (
                lambda model, x: observed(model, x).active().sizes
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
    return judge(
        answer,
        PATHWAYS,
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
        >>> from pathwaylib import observe
        >>> def by_library(model, x, pathway):
        ...     dead = ~observe(model, x).active()
        ...     with masked(pathway):
        ...         return (dead & observe(model, x).active()).sizes
        >>> check_woken(by_library)
        ✓ right: dead in the whole network, active in the pathway network
    """

    def count(combine: Callable[[Pathway, Pathway, Pathway], Pathway]) -> Answer:
        def counted(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
            before = observed(model, x).active()
            with masked(pathway):
                after = observed(model, x).active()
            return combine(before, after, pathway).sizes

        return counted

    right = count(lambda before, after, kept: after & ~before)
    return judge(
        answer,
        PATHWAYS,
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
    value = call_answer(answer, ())
    if isinstance(value, Verdict):
        return value
    if not (isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], Pathway)):
        return Verdict(False, "return three things: the network, one input of shape (1, ...), and a Pathway")
    model, x, pathway = value
    try:
        seen = observed(model, x)
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
