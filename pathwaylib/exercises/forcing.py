"""Chapter 12: explain or decide?"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..evaluation.forcing import divergence, forced
from ..evaluation.pathways import pathway_logits
from ..pathway import Pathway
from ..selectors import ActiveNeurons
from .judging import Answer, Arguments, Verdict, judge, judge_network, network_and_pathway, observed


def _answers_of_a_network(seed: int) -> tuple[Tensor, Tensor, int]:
    """Return logits inside a pathway and without it, and the pathway's class."""
    generator = torch.Generator().manual_seed(seed)
    inside, whole = torch.randn(2, 40, 4, generator=generator)
    target = seed % 4
    inside[:, target] += 1
    return inside, whole, target


def check_forcing_rate(answer: Answer) -> Verdict:
    """Check ``answer(inside, whole, target) -> share`` of the inputs of other classes that a pathway forces.

    ``inside`` and ``whole`` are logits (B, K) of the same inputs, in the pathway network and in the whole one.

    Example:
        >>> def rate(inside, whole, target):
        ...     others = whole.argmax(1) != target
        ...     return (inside.argmax(1)[others] == target).float().mean()
        >>> check_forcing_rate(rate)
        ✓ right: of the inputs that the whole network calls otherwise, the share that is called the pathway's class
        >>> check_forcing_rate(lambda inside, whole, target: (inside.argmax(1) == target).float().mean())
        ✗ inputs of the pathway's own class count too: for them its class is no news. Leave them out
    """

    def rate(inside: Tensor, whole: Tensor, target: int) -> Tensor:
        return (inside.argmax(1)[whole.argmax(1) != target] == target).double().mean()

    def called(inside: Tensor, whole: Tensor, target: int) -> Tensor:
        return inside.argmax(1) == target

    mistakes: dict[str, Answer] = {
        "inputs of the pathway's own class count too: for them its class is no news. Leave them out": (
            lambda inside, whole, target: called(inside, whole, target).double().mean()
        ),
        "you divide by all inputs; divide by those that the whole network calls otherwise": (
            lambda inside, whole, target: (called(inside, whole, target) & (whole.argmax(1) != target)).double().mean()
        ),
        "this is the share whose answer changes at all: an answer that changes to a third class is not forced": (
            lambda inside, whole, target: (
                (inside.argmax(1) != whole.argmax(1))[whole.argmax(1) != target].double().mean()
            )
        ),
        "this is the share that keeps its own answer, the opposite of what is asked": (
            lambda inside, whole, target: (
                (inside.argmax(1) == whole.argmax(1))[whole.argmax(1) != target].double().mean()
            )
        ),
    }
    tests: list[Arguments] = [partial(_answers_of_a_network, seed) for seed in range(4)]
    praise = "right: of the inputs that the whole network calls otherwise, the share that is called the pathway's class"
    return judge(answer, tests, rate, mistakes, praise)


def _masks_and_classes(seed: int) -> tuple[Tensor, Tensor, int, float]:
    """Return masks, predicted classes, a class and a share τ that some neurons reach exactly."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.arange(24) % 3
    masks = torch.rand(24, 30, generator=generator) < 0.5
    masks[predicted == 1, 0] = torch.arange(8) < 4  # a share of exactly one half of class 1
    return masks, predicted, seed % 3, 0.5


def check_class_relevant(answer: Answer) -> Verdict:
    """Check ``answer(masks, predicted, number, share) -> bool (N,)``: the class-relevant pathway of a class.

    ``masks`` (B, N) are the pathways of training inputs, ``predicted`` (B,) their predicted classes.

    Example:
        >>> def relevant(masks, predicted, number, share):
        ...     return masks[predicted == number].float().mean(0) >= share
        >>> check_class_relevant(relevant)
        ✓ right: the neurons that at least this share of the class's own pathways keep
        >>> check_class_relevant(lambda masks, predicted, number, share: masks.float().mean(0) >= share)
        ✗ you count over the inputs of all classes: choose those of the class first
    """

    def relevant(masks: Tensor, predicted: Tensor, number: int, share: float) -> Tensor:
        return masks[predicted == number].double().mean(0) >= share

    mistakes: dict[str, Answer] = {
        "you count over the inputs of all classes: choose those of the class first": (
            lambda masks, predicted, number, share: masks.double().mean(0) >= share
        ),
        "a neuron that reaches the share exactly belongs to it: at least, not more than": (
            lambda masks, predicted, number, share: masks[predicted == number].double().mean(0) > share
        ),
        "you divide the count in the class by all inputs: divide by the members of the class": (
            lambda masks, predicted, number, share: masks[predicted == number].double().sum(0) / len(masks) >= share
        ),
        "this is every neuron that any pathway of the class keeps: count how many do": (
            lambda masks, predicted, number, share: masks[predicted == number].any(0)
        ),
        "this is what all pathways of the class share: count how many do": (
            lambda masks, predicted, number, share: masks[predicted == number].all(0)
        ),
    }
    tests: list[Arguments] = [partial(_masks_and_classes, seed) for seed in range(3)]
    return judge(
        answer,
        tests,
        relevant,
        mistakes,
        "right: the neurons that at least this share of the class's own pathways keep",
    )


def _network_and_order(seed: int) -> tuple[nn.Sequential, Tensor, Pathway, Tensor]:
    """Return a network, inputs, their pathways, and for each input another one."""
    model, x, pathway = network_and_pathway(seed, kept=0.7)
    order = torch.tensor([*range(1, len(x)), 0])  # no input gets itself
    return model, x, pathway, order


def check_others_loss(answer: Answer) -> Verdict:
    """Check ``answer(model, x, pathway, order) -> loss``: the mean divergence of *other* inputs under each mask.

    Input ``x[order[i]]`` is run under the mask of input ``i``; the loss is the mean of KL(Φ(x') ‖ Φ_P(x')), in nats.

    Example:
        >>> from pathwaylib import divergence
        >>> check_others_loss(lambda model, x, pathway, order: divergence(model, x[order], pathway).mean())
        ✓ right: each mask is judged by what it leaves of another input's answer
        >>> check_others_loss(lambda model, x, pathway, order: divergence(model, x, pathway).mean())
        ✗ each mask meets its own input: run x[order] under the pathways as they are
    """

    def turned(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
        whole = pathway_logits(model, x, None, len(x)).log_softmax(1)
        inside = pathway_logits(model, x, pathway, len(x)).log_softmax(1)
        return F.kl_div(whole, inside, reduction="none", log_target=True).sum(1)

    mistakes: dict[str, Answer] = {
        "each mask meets its own input: run x[order] under the pathways as they are": (
            lambda model, x, pathway, order: divergence(model, x, pathway).mean()
        ),
        "you moved the masks instead of the images: input x[order[i]] belongs under mask i": (
            lambda model, x, pathway, order: divergence(model, x, pathway[order]).mean()
        ),
        "the divergence is the other way round: the whole network's answer comes first": (
            lambda model, x, pathway, order: turned(model, x[order], pathway).mean()
        ),
        "this is the sum over the inputs; give the mean": (
            lambda model, x, pathway, order: divergence(model, x[order], pathway).sum()
        ),
        "this is the mean over inputs *and* classes (what reduction='mean' does): sum over the classes": (
            lambda model, x, pathway, order: (
                divergence(model, x[order], pathway).mean() / observed(model, x).logits.shape[1]
            )
        ),
    }
    tests: list[Arguments] = [partial(_network_and_order, seed) for seed in range(4)]
    return judge(
        answer,
        tests,
        lambda model, x, pathway, order: divergence(model, x[order], pathway).mean(),
        mistakes,
        "right: each mask is judged by what it leaves of another input's answer",
    )


def check_deciding_pattern(answer: Answer) -> Verdict:
    """Check ``answer() -> model, x``: the active neurons of either of two inputs force its class on 1,000 random ones.

    ``x`` has shape (2, D), entries in [0, 1]; the network calls its rows class 0 and class 1, and calls each class at
    least a quarter of 1,000 random inputs from [0, 1]^D.

    Example:
        >>> check_deciding_pattern(lambda: (nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), torch.rand(2, 2)))
        ✗ the network does not call the two rows class 0 and class 1
    """
    return judge_network(answer, _judge_pattern, most=100, inputs=2)


def _judge_pattern(model: nn.Module, x: Tensor) -> Verdict:
    if x.ndim != 2 or not bool(((x >= 0) & (x <= 1)).all()):
        return Verdict(False, f"x is of shape {tuple(x.shape)}; give two inputs (2, D) with entries from 0 to 1")
    if observed(model, x).logits.argmax(1).tolist() != [0, 1]:
        return Verdict(False, "the network does not call the two rows class 0 and class 1")
    others = torch.rand(1_000, x.shape[1], generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    calls = pathway_logits(model, others, None, 1_000).argmax(1).bincount(minlength=2) / 1_000
    if float(calls[:2].min()) < 0.25:
        return Verdict(
            False,
            f"of random inputs it calls {float(calls[0]):.0%} class 0 and {float(calls[1]):.0%} class 1: let it "
            "call each at least a quarter, or there is nothing to force",
        )
    pathway = ActiveNeurons()(model, x)
    if bool((pathway.sizes == 0).any()):
        return Verdict(False, "no neuron is active on one of the inputs: then the biases decide, not a pattern")
    rates = [float(forced(model, others, pathway[row]).float().mean()) for row in (0, 1)]
    if min(rates) < 1:
        return Verdict(
            False,
            f"inside the active neurons of the two inputs {rates[0]:.0%} and {rates[1]:.0%} of random inputs get the "
            "class: which neuron of the other class is still in, or does no kept neuron fire?",
        )
    return Verdict(True, "right: which neurons are on decides the class, and the input does not matter any more")
