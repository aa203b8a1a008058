"""Key of assignment 2: what is asked, the oracles, and what typical mistakes are worth. Not for students."""
# ruff: noqa: D103, the names say what the oracles and mistakes compute

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from pathwaylib import Pathway, ablation, integrated_gradients, linear_region, masked, observe, taylor
from pathwaylib.exercises.judging import Answer, Arguments, network_and_pathway, observed, small_network, top
from pathwaylib.grading import Compared, Part, Question
from pathwaylib.pathway import split_sites

TITLE = "Assignment 2: contributions, selection and the pathway gradient"


# --- Inputs ----------------------------------------------------------------------------------------------------------


def doubled(model: nn.Sequential, *tensors: Tensor) -> tuple[Any, ...]:
    return model.double(), *(tensor.double() for tensor in tensors)


def with_neuron(seed: int) -> tuple[Any, ...]:
    """A neuron that is active on the first input, so that something is lost."""
    model, x = doubled(*small_network(seed))
    site = seed // 2 % 2
    return model, x, site, int(observed(model, x).post[site][0].flatten().argmax())


def neurons(seed: int) -> Sequence[Arguments]:
    # Every student meets a neuron that tells the mistakes apart, or they would cost some and not others.
    telling = next(
        at
        for at in count(seed)
        if not any(close(loss_of_neuron, wrong, *with_neuron(at)) for wrong in (class_anew, first_order))
    )
    return [partial(with_neuron, at) for at in (seed, seed + 1, telling)]


def close(one: Answer, other: Answer, *arguments: Any) -> bool:
    return torch.allclose(one(*arguments), other(*arguments))


def to_select(seed: int, share: float) -> tuple[Any, ...]:
    model, x = doubled(*small_network(seed))
    return model, x, round(share * sum(a[0].numel() for a in observed(model, x).post))


def connected(seed: int) -> Sequence[Arguments]:
    return [partial(to_select, 2 * seed + 2 * i, 0.3) for i in range(2)]


def convolutional(seed: int) -> Sequence[Arguments]:
    return [partial(to_select, 2 * seed + 2 * i + 1, 0.2) for i in range(2)]


def too_many(seed: int) -> Sequence[Arguments]:
    return [partial(to_select, seed + i, 1.0) for i in range(2)]


def to_integrate(seed: int) -> tuple[Any, ...]:
    return (*doubled(*small_network(seed)), seed // 2 % 2, 4)


def integrals(seed: int) -> Sequence[Arguments]:
    # Only the first site has a later activation, and so a gap.
    return [partial(to_integrate, 4 * seed + i) for i in (0, 1, 2)]


def with_pathway(seed: int) -> tuple[Any, ...]:
    model, x, pathway = network_and_pathway(seed)
    return (*doubled(model, x), pathway)


def pathways(seed: int) -> Sequence[Arguments]:
    telling = next(
        at for at in count(seed) if not close(pathway_map, partial(pathway_map, anew=True), *with_pathway(at))
    )
    return [partial(with_pathway, at) for at in (seed, seed + 1, telling)]


def shallow(seed: int) -> tuple[Any, ...]:
    model, x, pathway = with_pathway(2 * seed)
    masks = pathway.masks[0].clone()
    masks[-1] = False  # nothing is kept: the radius is infinite
    return nn.Sequential(model[0], model[1], nn.Linear(8, 4).double()).eval(), x, Pathway((masks,), ("relu_0",))


def one_hidden_layer(seed: int) -> Sequence[Arguments]:
    def fixed(at: int) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):  # the last layer is drawn
            torch.manual_seed(at)
            return shallow(at)

    return [partial(fixed, seed + i) for i in range(2)]


def two_hidden_layers(seed: int) -> Sequence[Arguments]:
    return [partial(with_pathway, 2 * seed + 2 * i) for i in range(2)]


# --- Oracles and mistakes --------------------------------------------------------------------------------------------


def loss_of_neuron(model: nn.Sequential, x: Tensor, site: int, neuron: int) -> Tensor:
    return ablation(model, x).scores[site].flatten(1)[:, neuron]


def first_order(model: nn.Sequential, x: Tensor, site: int, neuron: int) -> Tensor:
    return taylor(model, x).scores[site].flatten(1)[:, neuron]


def without(model: nn.Sequential, x: Tensor, site: int, neuron: int | None = None) -> Tensor:
    masks = [torch.ones_like(a, dtype=torch.bool) for a in observed(model, x).post]
    masks[site].flatten(1)[:, slice(None) if neuron is None else neuron] = False
    with masked(Pathway(tuple(masks), observed(model, x).sites)):
        return model(x)


def class_anew(model: nn.Sequential, x: Tensor, site: int, neuron: int) -> Tensor:
    return model(x).amax(1) - without(model, x, site, neuron).amax(1)


def selected(
    model: nn.Sequential, x: Tensor, k: int, *, signed: bool = False, per_site: bool = False, zeros: bool = False
) -> tuple[Tensor, ...]:
    scores = taylor(model, x).scores
    shapes = [score.shape[1:] for score in scores]
    if per_site:
        return tuple(top(score.flatten(1).abs(), k).view(score.shape) & (score != 0) for score in scores)
    flat = torch.cat([score.flatten(1) for score in scores], 1)
    ranked = flat if signed else flat.abs()
    return split_sites(top(ranked, k) & (torch.ones_like(flat, dtype=torch.bool) if zeros else flat != 0), shapes)


def gap(model: nn.Sequential, x: Tensor, site: int, n: int, *, absolute: bool = False, baseline: bool = True) -> Tensor:
    scores = integrated_gradients(model, x, n_steps=n).scores[site].flatten(1)
    target = model(x).argmax(1, keepdim=True)
    left = without(model, x, site).gather(1, target)[:, 0] if baseline else 0.0
    return (scores.abs() if absolute else scores).sum(1) - (model(x).gather(1, target)[:, 0] - left)


def right_ends(model: nn.Sequential, x: Tensor, site: int, n: int) -> Tensor:
    cut = [index for index, layer in enumerate(model) if isinstance(layer, nn.ReLU)][site] + 1
    a, target = model[:cut](x), model(x).argmax(1, keepdim=True)
    total = torch.zeros_like(a)
    for step in range(n):
        leaf = ((step + 1) / n * a).requires_grad_()
        total += torch.autograd.grad(model[cut:](leaf).gather(1, target).sum(), leaf)[0] / n
    left = without(model, x, site).gather(1, target)[:, 0]
    return (a * total).flatten(1).sum(1) - (model(x).gather(1, target)[:, 0] - left)


def pathway_map(
    model: nn.Sequential, x: Tensor, pathway: Pathway, *, whole: bool = False, anew: bool = False
) -> Tensor:
    x = x.clone().requires_grad_()
    target = model(x).argmax(1, keepdim=True)
    if whole:
        return torch.autograd.grad(model(x).gather(1, target).sum(), x)[0]
    with masked(pathway):
        logits = model(x)
    return torch.autograd.grad(logits.gather(1, logits.argmax(1, keepdim=True) if anew else target).sum(), x)[0]


def on_the_way_back(model: nn.Sequential, x: Tensor, pathway: Pathway) -> Tensor:
    x = x.clone().requires_grad_()
    hidden, remaining = x, iter(pathway.masks)
    for layer in model:
        hidden = layer(hidden)
        if isinstance(layer, nn.ReLU):
            kept = hidden * next(remaining)
            hidden = hidden.detach() + kept - kept.detach()
    return torch.autograd.grad(hidden.gather(1, model(x).argmax(1, keepdim=True)).sum(), x)[0]


def radius(model: nn.Sequential, x: Tensor, pathway: Pathway) -> Tensor:
    return linear_region(model, x, pathway).radius


def radius_by_hand(model: nn.Sequential, x: Tensor, pathway: Pathway, *, inside: bool, kept: bool) -> Tensor:
    """The least distance of a kept (or of any) neuron, in the pathway network (or in the whole one)."""
    rows = []
    for index in range(len(x)):
        leaf = x[index : index + 1].clone().requires_grad_()
        if inside:
            with masked(pathway[index : index + 1]):
                seen = observe(model, leaf)
        else:
            seen = observe(model, leaf)
        distances = [torch.tensor(torch.inf).to(x)]
        for z, mask in zip(seen.pre, pathway.masks, strict=True):
            for j in range(z.shape[1]):
                (slope,) = torch.autograd.grad(z[0, j], leaf, retain_graph=True, materialize_grads=True)
                if (mask[index, j] or not kept) and slope.any():
                    distances.append(z[0, j].detach().abs() / slope.norm())
        rows.append(torch.stack(distances).min())
    return torch.stack(rows)


SELECTED = Compared(
    selected,
    {
        "the scores are signed: rank their absolute values": (partial(selected, signed=True), 0.25),
        "k neurons of each site: the sites compete in one ranking": (partial(selected, per_site=True), 0.25),
        "neurons of score 0 are kept to make up the number": (partial(selected, zeros=True), 0.25),
    },
)
RADIUS = Compared(
    radius,
    {
        "all neurons of the pathway network count here: removed ones impose nothing": (
            partial(radius_by_hand, inside=True, kept=False),
            0.4,
        ),
        "pre-activations and gradients are those of the whole network: take them in the pathway network": (
            partial(radius_by_hand, inside=False, kept=True),
            0.4,
        ),
    },
)

QUESTIONS = [
    Question(
        "loss_of_neuron",
        "What one neuron contributes",
        (
            Part(
                "right loss",
                4,
                neurons,
                Compared(
                    loss_of_neuron,
                    {
                        "this is the first-order estimate, not the loss": (first_order, 0.25),
                        "the class was predicted anew without the neuron": (class_anew, 0.5),
                        "the sign is turned round: what the response loses is positive": (
                            lambda *arguments: -loss_of_neuron(*arguments),
                            0.75,
                        ),
                    },
                ),
            ),
        ),
    ),
    Question(
        "selected",
        "NeuronMCT by hand",
        (
            Part("fully connected", 2, connected, SELECTED),
            Part("convolutional", 2, convolutional, SELECTED),
            Part("k is larger than the number of scores", 2, too_many, SELECTED),
        ),
    ),
    Question(
        "gap",
        "How complete?",
        (
            Part(
                "right gap",
                5,
                integrals,
                Compared(
                    gap,
                    {
                        "absolute scores do not add up: sum the signed ones": (partial(gap, absolute=True), 0.4),
                        "the response that is left without the site is not subtracted": (
                            partial(gap, baseline=False),
                            0.4,
                        ),
                        "each step is represented by its right end, not by its midpoint": (right_ends, 0.6),
                        "the sign is turned round: sum of the scores minus the loss": (
                            lambda *arguments: -gap(*arguments),
                            0.8,
                        ),
                    },
                ),
            ),
        ),
    ),
    Question(
        "pathway_map",
        "The pathway gradient",
        (
            Part(
                "right map",
                5,
                pathways,
                Compared(
                    pathway_map,
                    {
                        "this is the whole network's gradient": (partial(pathway_map, whole=True), 0.2),
                        "the class was predicted anew inside the pathway": (partial(pathway_map, anew=True), 0.6),
                        "only the way back is masked: the pathway network runs with the mask": (on_the_way_back, 0.4),
                    },
                ),
            ),
        ),
    ),
    Question(
        "radius",
        "How far the map holds",
        (
            Part("one hidden layer, also with nothing kept", 2, one_hidden_layer, RADIUS, finite=False),
            Part("two hidden layers", 3, two_hidden_layers, RADIUS, finite=False),
        ),
    ),
]
