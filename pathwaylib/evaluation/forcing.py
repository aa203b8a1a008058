"""Does a pathway explain a response, or decide it? What the network says inside it about inputs it was not made for."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import PathwayError, require_at_least_one, require_choice
from ..pathway import Pathway, class_indices
from .fills import check_images
from .pathways import at_least_single, confidence, pathway_logits
from .statistics import Interval

Strange = Literal["other class", "noise", "grey", "shuffled"]


def increased(model: nn.Module, x: Tensor, pathway: Pathway, *, batch_size: int = 256) -> Tensor:
    """Tell for each input whether the pathway raises the probability of the predicted class; the mean is the mIC.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        pathway: one pathway per input, or one for all.
        batch_size: inputs to run at once.

    Returns:
        Bool tensor ``(B,)``.

    Raises:
        PathwayError: as :func:`pathwaylib.prediction_kept`.

    Equation: p_P > p, with p and p_P the softmax probabilities of argmax Φ(x) in Φ and in Φ_P.

    Source: Lin, Bao, Yu, Kong, *On Model Explanations with Transferable Neural Pathways* (2023).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> everything = Pathway((torch.ones(1, 3, dtype=torch.bool),), ("relu_0",))
        >>> increased(net, torch.rand(2, 2), everything)
        tensor([False, False])
    """
    whole = confidence(model, x, batch_size=batch_size)
    return confidence(model, x, pathway, batch_size=batch_size) > whole


def confidence_drop(model: nn.Module, x: Tensor, pathway: Pathway, *, batch_size: int = 256) -> Tensor:
    """Return the share of the predicted class's probability that the pathway loses; the mean is the mDC.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        pathway: one pathway per input, or one for all.
        batch_size: inputs to run at once.

    Returns:
        Float tensor ``(B,)`` in [0, 1]; 0 where the probability rises.

    Raises:
        PathwayError: as :func:`pathwaylib.prediction_kept`.

    Equation: max(0, p − p_P) / p.

    Source: Lin, Bao, Yu, Kong, *On Model Explanations with Transferable Neural Pathways* (2023).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> everything = Pathway((torch.ones(1, 3, dtype=torch.bool),), ("relu_0",))
        >>> confidence_drop(net, torch.rand(2, 2), everything)
        tensor([0., 0.])
    """
    whole = confidence(model, x, batch_size=batch_size)
    return (whole - confidence(model, x, pathway, batch_size=batch_size)).clamp(min=0) / whole


def divergence(model: nn.Module, x: Tensor, pathway: Pathway, *, batch_size: int = 256) -> Tensor:
    """Return how far the pathway network's answer is from the network's: KL divergence over all classes, in nats.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        pathway: one pathway per input, or one for all.
        batch_size: inputs to run at once.

    Returns:
        Float tensor ``(B,)``, at least 0 up to rounding.

    Raises:
        PathwayError: as :func:`pathwaylib.prediction_kept`.

    Equation: KL(softmax Φ(x) ‖ softmax Φ_P(x)).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> everything = Pathway((torch.ones(1, 3, dtype=torch.bool),), ("relu_0",))
        >>> divergence(net, torch.rand(2, 2), everything)
        tensor([0., 0.])
    """
    whole = at_least_single(pathway_logits(model, x, None, batch_size)).log_softmax(1)
    routed = at_least_single(pathway_logits(model, x, pathway, batch_size)).log_softmax(1)
    return F.kl_div(routed, whole, reduction="none", log_target=True).sum(1)


def forced(model: nn.Module, x: Tensor, pathway: Pathway, *, batch_size: int = 256) -> Tensor:
    """Tell for each input whether the pathway makes the network call *the pathway's* class.

    Give inputs that the pathways were not made for: images of other classes, noise, grey (:func:`strange_inputs`). A
    pathway that explains a response lets the network say something else about another input. One that forces its class
    is a classifier in disguise: its bits decide, and the input hardly matters. The mean is the forcing rate.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``, other than those the pathways were selected on.
        pathway: one pathway per input, or one for all, with its targets.
        batch_size: inputs to run at once.

    Returns:
        Bool tensor ``(B,)``.

    Raises:
        PathwayError: if the pathway names no targets, or as :func:`pathwaylib.prediction_kept`.

    Equation: argmax Φ_P(x') = t(P).

    Source: the question is this book's; that the pattern of active neurons is a code of the class: Lakshminarayanan and
    Singh, *Neural Path Features and Neural Path Kernel* (NeurIPS 2020).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> nothing = Pathway((torch.zeros(1, 3, dtype=torch.bool),), ("relu_0",), net[2].bias.argmax()[None])
        >>> forced(net, torch.rand(4, 2), nothing)  # no neuron is left: the bias decides
        tensor([True, True, True, True])
    """
    if pathway.targets is None:
        raise PathwayError("the pathway names no targets; select it with a selector, or set Pathway(..., targets=...)")
    called = pathway_logits(model, x, pathway, batch_size).argmax(1)
    return called == pathway.targets.to(called.device)


class Decided(NamedTuple):
    """Who decides what a network says inside pathways: shares of the variance of its logits, which sum to 1.

    Attributes:
        pathway: what the choice of the pathway decides, whatever the input.
        input: what the choice of the input decides, whatever the pathway.
        both: what takes both to know.
    """

    pathway: Interval
    input: Interval
    both: Interval


def decided_by(
    model: nn.Module, x: Tensor, pathway: Pathway, *, resamples: int = 200, seed: int = 0, batch_size: int = 256
) -> Decided:
    """Run every input inside every pathway, and split the variance of the logits: pathway, input, or both together.

    The forcing rate counts which class wins. This looks at all that the network says: with a share of 1 for the
    pathway it is the same for every input. A constant is taken off each run's logits, which the softmax does not see.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``, best other ones than those the pathways were selected on.
        pathway: A pathways; A times B inputs are run.
        resamples: draws of pathways and of inputs, with replacement, for the 95 % intervals.
        seed: of the draws.
        batch_size: inputs to run at once.

    Raises:
        PathwayError: if there are fewer than two pathways or inputs, if the network says the same in all runs, or as
            :func:`pathwaylib.prediction_kept`.

    Equation: with y(P, x) the logits less their mean over classes, y = ȳ + α(P) + β(x) + γ(P, x); the shares of
    Σ‖α‖², Σ‖β‖² and Σ‖γ‖² in Σ‖y − ȳ‖².

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 50), nn.ReLU(), nn.Linear(50, 2)).eval()
        >>> everything = Pathway((torch.ones(2, 50, dtype=torch.bool),), ("relu_0",))
        >>> found = decided_by(net, torch.rand(4, 2), everything)  # the pathways are equal: the input decides
        >>> round(found.pathway.value, 6), round(found.input.value, 6), round(found.both.value, 6)
        (0.0, 1.0, 0.0)
    """
    require_at_least_one(resamples=resamples)
    if min(len(pathway), len(x)) < 2:
        raise PathwayError(f"{len(pathway)} pathways and {len(x)} inputs; give at least two of each")
    runs = [pathway_logits(model, x, pathway[row], batch_size) for row in range(len(pathway))]
    logits = torch.stack(runs).double().cpu().numpy()
    rounding = torch.finfo(runs[0].dtype).eps * float(np.abs(logits).max())
    logits -= logits.mean(2, keepdims=True)
    value = _variance_shares(logits, rounding)
    if value is None:
        raise PathwayError("the network says the same in all runs; give other pathways or inputs")
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        rows, columns = (generator.integers(size, size=size) for size in logits.shape[:2])
        shares = _variance_shares(logits[rows][:, columns], rounding)
        if shares is not None:
            draws.append(shares)
    low, high = np.quantile(draws or [value], (0.025, 0.975), 0)
    # A draw with replacement repeats rows and columns; that shifts small shares a little.
    return Decided(
        *(Interval(float(v), float(min(v, a)), float(max(v, b))) for v, a, b in zip(value, low, high, strict=True))
    )


def _variance_shares(logits: NDArray[np.float64], rounding: float) -> NDArray[np.float64] | None:
    """Return the shares of rows, columns and both in the variance of ``(rows, columns, classes)``.

    None where nothing varies, or no more than by ``rounding``: the shares would be those of the rounding.
    """
    varied = logits - logits.mean((0, 1))
    total = (varied**2).sum()
    # The mean of equal numbers may differ from them, also by more than ``rounding`` of a float64 network.
    if not np.ptp(logits, (0, 1)).any() or total <= logits.size * rounding**2:
        return None
    row = (varied.mean(1) ** 2).sum() * logits.shape[1] / total
    column = (varied.mean(0) ** 2).sum() * logits.shape[0] / total
    return np.array([row, column, max(0.0, 1 - row - column)])


def strange_inputs(x: Tensor, classes: Tensor, kind: Strange, *, generator: torch.Generator | None = None) -> Tensor:
    """Return for each image an input that its pathway was not made for.

    Args:
        x: images ``(B, C, H, W)`` in [0, 1].
        classes: predicted class of each, int64 ``(B,)``.
        kind: ``"other class"``, an image of the batch with another class; ``"noise"``, Gaussian noise with the mean
            and standard deviation of each channel of the batch, cut to [0, 1]; ``"grey"``, one half everywhere;
            ``"shuffled"``, its own pixels in random order.
        generator: draws images, noise and orders; None: the same at every call (seed 0).

    Returns:
        Images shaped like ``x``.

    Raises:
        PathwayError: if the images are no floating-point batch, the kind is unknown, there is not one class per image,
            there is no image of another class, or the batch has one value per channel, which has no standard deviation.

    Example:
        >>> strange_inputs(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), "grey").unique()
        tensor([0.5000])
    """
    check_images(x)
    require_choice("kind", kind, get_args(Strange))
    generator = generator or torch.Generator().manual_seed(0)
    if kind == "grey":
        return torch.full_like(x, 0.5)
    if kind == "noise":
        if x[:, 0].numel() < 2:
            raise PathwayError(
                f"the images have shape {tuple(x.shape)}; one value per channel has no standard deviation: give more "
                "images, or larger ones"
            )
        drawn = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
        mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        return (mean + deviation * drawn).clamp(0, 1)
    if kind == "shuffled":
        draws = torch.rand(len(x), x[0, 0].numel(), generator=generator, device=generator.device)
        order = draws.argsort(1).to(x.device)[:, None].expand(-1, x.shape[1], -1)
        return x.flatten(2).gather(2, order).view_as(x)
    classes = class_indices(classes, len(x))
    different = (classes[:, None] != classes).float()
    if not bool(different.any(1).all()):
        raise PathwayError(f"all images are of class {int(classes[0])}; give images of at least two classes")
    draws = torch.rand(len(x), len(x), generator=generator, device=generator.device).to(x.device)
    return x[(draws * different.to(x.device)).argmax(1)]
