"""Chapter 9: sanity checks by randomisation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from ..evaluation import SIMILARITIES, sanity_check
from ..explainers import Explainer
from ..training import initialise
from .judging import Answer, Verdict, call_answer, judge, small_network


def _two_maps(seed: int) -> tuple[Tensor, Tensor]:
    """Return two attributions of the same images, in part alike, in part of opposite sign."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, 4, 3, 6, 6, generator=generator)
    other[:2] = one[:2] + 0.5 * other[:2]
    other[1] *= -1
    return one, other


def check_rank_similarity(answer: Answer) -> Verdict:
    """Check ``answer(one, other) -> (B,)``: Spearman's correlation of absolute maps of attributions ``(B, C, H, W)``.

    Example:
        >>> from scipy.stats import spearmanr
        >>> def similarity(one, other):
        ...     pairs = zip(one.sum(1).abs().flatten(1), other.sum(1).abs().flatten(1), strict=True)
        ...     return torch.tensor([spearmanr(a, b).statistic for a, b in pairs])
        >>> check_rank_similarity(similarity)
        ✓ right: ranks of the absolute maps, one number per image
    """

    def pearson(a: Tensor, b: Tensor) -> Tensor:
        a, b = (values - values.mean(1, keepdim=True) for values in (a, b))
        return torch.cosine_similarity(a, b)

    def ranks(values: Tensor) -> Tensor:
        return torch.from_numpy(rankdata(values.flatten(1).numpy(), axis=1))

    def after(one_channel: Callable[[Tensor], Tensor], numbers: Callable[[Tensor], Tensor] = ranks) -> Answer:
        return lambda one, other: pearson(*(numbers(one_channel(maps)).double() for maps in (one, other)))

    def absolute(maps: Tensor) -> Tensor:
        return maps.sum(1).abs()

    return judge(
        answer,
        [partial(_two_maps, seed) for seed in range(3)],
        after(absolute),
        {
            "the maps are signed: drop the signs, after summing the channels": after(lambda maps: maps.sum(1)),
            "the signs are dropped too early: sum the channels first, so that opposite signs cancel": (
                after(lambda maps: maps.abs().sum(1))
            ),
            "the channels are ranked apart: sum them first, a map has one value per pixel": after(torch.abs),
            "this is Pearson's correlation of the values: correlate their ranks": (
                after(absolute, lambda maps: maps.flatten(1))
            ),
            "the pixels of the whole batch are ranked together: rank those of each image by themselves": (
                after(absolute, lambda maps: ranks(maps.flatten()[None]).view(len(maps), -1))
            ),
            "this is one number for the whole batch: return one per image, shape (B,)": (
                lambda one, other: after(absolute)(one, other).mean()
            ),
            "positions are correlated: sorting pixels gives their order, sorting that order gives their ranks": (
                after(absolute, lambda maps: maps.flatten(1).argsort(1))
            ),
        },
        "right: ranks of the absolute maps, one number per image",
    )


def _trained(seed: int) -> nn.Sequential:
    """Return a network whose parameters and statistics are those of no fresh layer."""
    with torch.random.fork_rng(devices=[]):
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(2 + torch.rand(value.shape, generator=generator))
    return model


def _changed(before: nn.Module, after: nn.Module) -> set[int]:
    """Return the layers of a sequential network in which any parameter or statistic differs."""
    values = after.state_dict()
    return {int(name.split(".")[0]) for name, value in before.state_dict().items() if not value.equal(values[name])}


def check_cascade(answer: Answer) -> Verdict:
    """Check ``answer(model, depth) -> nn.Sequential``: a copy in which the last ``depth`` layers are fresh.

    A layer is a convolution with the batch normalisation after it, or a linear layer; ``model`` is sequential.

    Example:
        >>> def cascade(model, depth):
        ...     fresh = copy.deepcopy(model)
        ...     layers = [i for i, layer in enumerate(fresh) if isinstance(layer, (nn.Conv2d, nn.Linear))]
        ...     for layer in fresh[layers[-depth]:]:
        ...         if hasattr(layer, "reset_parameters"):
        ...             layer.reset_parameters()
        ...     return fresh
        >>> check_cascade(cascade)
        ✓ right: the last layers are fresh, with their normalisations, and the given network is as it was
    """
    cascade = [{8}, {6, 8}, {3, 6, 8}, {0, 1, 3, 6, 8}]
    found: list[set[int]] = []
    for depth in range(1, 5):
        model = _trained(depth)
        before = copy.deepcopy(model)
        value = call_answer(answer, (model, depth))
        if isinstance(value, Verdict):
            return value
        if not isinstance(value, nn.Module) or value.state_dict().keys() != before.state_dict().keys():
            return Verdict(False, f"return a network of the same layers, not a {type(value).__name__}")
        if _changed(before, model):
            return Verdict(False, "the given network has changed: work on copy.deepcopy(model)")
        if stale := [layer for layer in _changed(before, value) if not _is_fresh(value, layer)]:
            kind = type(value.get_submodule(str(stale[0]))).__name__
            return Verdict(False, f"layer {stale[0]} has changed, but not to a fresh {kind}: use reset_parameters()")
        found.append(_changed(before, value))
    if found == cascade:
        return Verdict(
            True, "right: the last layers are fresh, with their normalisations, and the given network is as it was"
        )
    mistakes = {
        "nothing has changed: reset the layers of the copy, and return the copy": [set(), set(), set(), set()],
        "this starts at the input: the cascade goes from the output back": [
            {0, 1},
            {0, 1, 3},
            {0, 1, 3, 6},
            cascade[3],
        ],
        "only one layer is fresh: that is independent randomisation; in a cascade those after it are fresh too": (
            [{8}, {6}, {3}, {0, 1}]
        ),
        "the batch normalisation keeps what it learnt: it belongs to the convolution before it": (
            [{8}, {6, 8}, {3, 6, 8}, {0, 3, 6, 8}]
        ),
        "the batch normalisation is counted as a layer of its own": [{8}, {6, 8}, {3, 6, 8}, {1, 3, 6, 8}],
        "depth counts layers with weights: activations and reshaping have none": [{8}, {8}, {6, 8}, {6, 8}],
        "everything is fresh, whatever the depth": [cascade[3]] * 4,
    }
    for message, changed in mistakes.items():
        if found == changed:
            return Verdict(False, message)
    at = next(depth for depth in range(4) if found[depth] != cascade[depth])
    return Verdict(
        False,
        f"at depth {at + 1} the modules {sorted(found[at])} have changed; for this network it must be "
        f"{sorted(cascade[at])}",
    )


def _is_fresh(model: nn.Module, layer: int) -> bool:
    """Tell whether a module's values are those that a fresh one may have."""
    module = model.get_submodule(str(layer))
    fresh = initialise(copy.deepcopy(module), 0)
    for value, new in zip(module.state_dict().values(), fresh.state_dict().values(), strict=True):
        if value.is_floating_point() and isinstance(module, nn.BatchNorm2d):
            if not value.equal(new):
                return False
        elif value.is_floating_point() and not 0 < float(value.abs().max()) < 3 * float(new.abs().max()):
            return False
    return True


def _gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf).gather(1, target[:, None]).sum(), leaf)[0]


def check_same_class(answer: Answer) -> Verdict:
    """Check ``answer(explainer, model, fresh, x)``: the maps of both networks, ``(before, after)``, to be compared.

    Example:
        >>> def maps(explainer, model, fresh, x):
        ...     target = model(x).argmax(1)
        ...     return explainer(model, x, target), explainer(fresh, x, target)
        >>> check_same_class(maps)
        ✓ right: one class, that of the given network, for both
    """

    def arguments(seed: int) -> tuple[Explainer, nn.Module, nn.Module, Tensor]:
        model, x = small_network(seed)
        fresh = copy.deepcopy(model)
        initialise(fresh[-1], seed)
        return _gradient, model, fresh, x

    Networks = Callable[[nn.Module, nn.Module], nn.Module]

    def maps(of_before: Networks, of_after: Networks) -> Answer:
        def found(explainer: Explainer, model: nn.Module, fresh: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
            before, after = (network(model, fresh)(x).argmax(1) for network in (of_before, of_after))
            return explainer(model, x, before), explainer(fresh, x, after)

        return found

    def given(model: nn.Module, fresh: nn.Module) -> nn.Module:
        return model

    def new(model: nn.Module, fresh: nn.Module) -> nn.Module:
        return fresh

    right = maps(given, given)
    return judge(
        answer,
        [partial(arguments, seed) for seed in range(4)],
        right,
        {
            "the fresh network is asked about its own prediction: ask it about the class of the given one": (
                maps(given, new)
            ),
            "both are asked about what the fresh network predicts: take the class of the given one": maps(new, new),
            "the networks are swapped: first the map of the given one, then that of the fresh one": (
                lambda explainer, model, fresh, x: right(explainer, model, fresh, x)[::-1]
            ),
            "both maps are of the given network: the second must be of the fresh one": (
                lambda explainer, model, fresh, x: (explainer(model, x, model(x).argmax(1)),) * 2
            ),
        },
        "right: one class, that of the given network, for both",
    )


def check_hollow(answer: Answer) -> Verdict:
    """Check ``answer() -> explainer``: a method that passes the sanity check and says nothing about any image.

    The explainer ``(model, x, target) -> like x`` must answer the same each time it is asked, give every image the
    same map, and lose its map when any layer of the network is randomised.

    Example:
        >>> check_hollow(lambda: lambda model, x, target: torch.ones_like(x).cumsum(-1))
        ✗ layer '5' is randomised and the map stays (similarity 1.00): let it depend on every weight
    """
    explainer = call_answer(answer, ())
    if isinstance(explainer, Verdict):
        return explainer
    model, x = small_network(1)
    target = model(x).argmax(1)
    maps = [call_answer(explainer, (model, images, target)) for images in (x, x, 1 - x)]
    for found in maps:
        if isinstance(found, Verdict):
            return found
        if not isinstance(found, Tensor) or found.shape != x.shape or not bool(found.isfinite().all()):
            return Verdict(False, f"the explainer must return finite attributions of shape {tuple(x.shape)}")
    first, again, other = maps
    if not torch.equal(first, again):
        return Verdict(False, "the same question gets two answers: draw with a generator seeded by the weights")
    if not torch.allclose(first, other) or not torch.allclose(first, first[:1].expand_as(first)):
        return Verdict(False, "the map depends on the image: it must say nothing about it")
    return _judge_hollow(explainer, model, x)


def _judge_hollow(explainer: Any, model: nn.Module, x: Tensor) -> Verdict:
    measures = {"Spearman": SIMILARITIES["Spearman"]}
    try:
        found = sanity_check(explainer, model, x, mode="independent", draws=10, similarities=measures)
    except Exception as error:  # a reader's code may fail in any way
        return Verdict(False, f"on a randomised network: {(str(error).splitlines() or [type(error).__name__])[0]}")
    for layer, similarity in zip(found.layers, found.draws("explainer", "Spearman").mean(1).tolist(), strict=True):
        if abs(similarity) > 0.4:
            return Verdict(
                False,
                f"layer {layer!r} is randomised and the map stays (similarity {similarity:.2f}): let it depend on "
                "every weight",
            )
    return Verdict(True, "right: it passes the check with every layer, and says nothing about any image")
