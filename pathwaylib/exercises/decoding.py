"""Chapter 4: what pathways encode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..neurons import masked, response
from ..pathway import Pathway
from ..ranking import kept_neurons
from .judging import (
    Answer,
    Verdict,
    call_answer,
    judge,
    network_and_pathway,
    observed,
    small_network,
)


def _two_masks(seed: int) -> tuple[Tensor, Tensor]:
    """Return two bool tensors ``(4, 20)``; for odd seeds both are empty in the first row, one is in the second."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.rand(2, 4, 20, generator=generator) < torch.tensor([0.3, 0.6]).view(2, 1, 1)
    if seed % 2:
        one[:2] = False
        other[0] = False
    return one, other


def check_iou(answer: Answer) -> Verdict:
    """Check ``answer(one, other) -> (B,)``: intersection over union, row by row, of two bool tensors ``(B, N)``.

    Two empty rows are equal: 1.

    Example:
        >>> check_iou(lambda one, other: (one & other).sum(1) / (one | other).sum(1).clamp(min=1))
        ✗ two empty rows are equal, so their IoU is 1, not 0
    """

    def iou(one: Tensor, other: Tensor, empty: float) -> Tensor:
        both, either = (one & other).sum(1), (one | other).sum(1)
        return torch.where(either > 0, both / either.clamp(min=1), empty)

    return judge(
        answer,
        [partial(_two_masks, seed) for seed in range(4)],
        lambda one, other: iou(one, other, 1.0),
        {
            "two empty rows give 0 / 0 = nan: they are equal, so let their IoU be 1": partial(iou, empty=torch.nan),
            "two empty rows are equal, so their IoU is 1, not 0": partial(iou, empty=0.0),
            "this is the share of equal bits: neurons that both leave out count too, and most are left out": (
                lambda one, other: (one == other).float().mean(1)
            ),
            "this divides by the sum of both sizes, which counts the common neurons twice: divide by the union": (
                lambda one, other: (one & other).sum(1) / (one.sum(1) + other.sum(1))
            ),
            "this is the Dice coefficient: divide the intersection by the union": (
                lambda one, other: 2 * (one & other).sum(1) / (one.sum(1) + other.sum(1))
            ),
            "this divides by the size of the first: divide by the union": (
                lambda one, other: (one & other).sum(1) / one.sum(1)
            ),
            "this divides by the smaller size: divide by the union": (
                lambda one, other: (one & other).sum(1) / torch.minimum(one.sum(1), other.sum(1))
            ),
            "this divides by all N neurons: divide by the union": lambda one, other: (one & other).float().mean(1),
            "this is averaged over the batch: return one number per row, shape (B,)": (
                lambda one, other: iou(one, other, 1.0).mean()
            ),
            "the batch is pooled: return one number per row, shape (B,)": (
                lambda one, other: (one & other).sum() / (one | other).sum()
            ),
        },
        "right: 1 where both are empty, 0 where nothing is common",
    )


def _ious_and_labels(seed: int) -> tuple[Tensor, Tensor]:
    """Return a symmetric matrix with ones on its diagonal, and labels of classes of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    ious = torch.rand(12, 12, generator=generator) / 2
    ious = ious + ious.T
    ious.fill_diagonal_(1)
    return ious, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])[torch.randperm(12, generator=generator)]


def check_class_means(answer: Answer) -> Verdict:
    """Check ``answer(ious, labels) -> (within, between)``: mean IoU of same-class and of different-class pairs.

    ``ious`` is ``(B, B)``. All pairs count alike, and no input is paired with itself.

    Example:
        >>> def means(ious, labels):
        ...     same = labels[:, None] == labels
        ...     return ious[same].mean(), ious[~same].mean()
        >>> check_class_means(means)
        ✗ each input is compared with itself: leave the diagonal, whose IoU is always 1, out of `within`
    """

    def means(ious: Tensor, labels: Tensor, diagonal: bool = False) -> tuple[Tensor, Tensor]:
        same = labels[:, None] == labels
        within = same if diagonal else same & ~torch.eye(len(labels), dtype=torch.bool)
        return ious[within].mean(), ious[~same].mean()

    def by_input(ious: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        same = labels[:, None] == labels
        pairs = same & ~torch.eye(len(labels), dtype=torch.bool)
        rows = (ious * pairs).sum(1) / pairs.sum(1)
        return rows[pairs.any(1)].mean(), ((ious * ~same).sum(1) / (~same).sum(1)).mean()

    def by_class(ious: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        pairs = ~torch.eye(len(labels), dtype=torch.bool)
        inside = [pairs & torch.outer(labels == k, labels == k) for k in labels.unique()]
        within = torch.stack([ious[chosen].mean() for chosen in inside if bool(chosen.any())]).mean()
        return within, means(ious, labels)[1]

    def zeroed(ious: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Set the diagonal to 0, and count it all the same."""
        return means(ious - torch.eye(len(labels)), labels, diagonal=True)

    return judge(
        answer,
        [partial(_ious_and_labels, seed) for seed in range(3)],
        means,
        {
            "each input is compared with itself: leave the diagonal, whose IoU is always 1, out of `within`": (
                partial(means, diagonal=True)
            ),
            "the diagonal is set to 0 but still counted: leave it out of the number of pairs too": zeroed,
            "the two are swapped: return within, then between": lambda ious, labels: means(ious, labels)[::-1],
            "`between` must hold pairs of different classes only, this is the mean over all pairs": (
                lambda ious, labels: (
                    means(ious, labels)[0],
                    ious[~torch.eye(len(labels), dtype=torch.bool)].mean(),
                )
            ),
            "this is a mean of the inputs' means, where an input of a small class weighs as much: average all pairs": (
                by_input
            ),
            "this is a mean of the classes' means, where a small class weighs as much: average all pairs": by_class,
            "this is the difference: return both numbers": lambda ious, labels: torch.stack(
                [means(ious, labels)[0] - means(ious, labels)[1]]
            )[0],
        },
        "right: all pairs but those of an input with itself",
    )


def check_label_selector(answer: Answer) -> Verdict:
    """Check ``answer(model, x, sparsity) -> Pathway``: perfect class overlap from a mask that explains nothing.

    Inputs of one predicted class must get the same round((1 - sparsity) N) neurons, inputs of different classes
    different ones, and the mask must not depend on anything else: neither on the image nor on the weights.

    Example:
        >>> check_label_selector(lambda model, x, sparsity: observed(model, x).active())
        ✗ 6 of 15 neurons are kept at sparsity 0.75: keep 4
    """
    sparsity = 0.75
    seen: dict[tuple[int, int], Tensor] = {}  # by the network's kind and the predicted class
    for kind, seed in ((0, 0), (0, 2), (0, 4), (0, 6), (1, 1), (1, 3)):
        model, given = small_network(seed)
        # More inputs than the network comes with, so that several of them share a class.
        x = torch.randn(24, *given.shape[1:], generator=torch.Generator().manual_seed(seed))
        wrong = _label_selector_fails(answer, model, x, sparsity, kind, seen)
        if wrong is not None:
            return wrong
    for (kind, k), mask in seen.items():
        for (other, later), another in seen.items():
            if kind != other or k >= later:
                continue
            common = float((mask & another).sum() / (mask | another).sum())
            if common > 0.6:
                return Verdict(
                    False,
                    f"the pathways of classes {k} and {later} have an IoU of {common:.2f}: a mask that is the same for "
                    "every class is found out by the overlap between classes",
                )
    return Verdict(
        True, "right: perfect overlap within classes, little between them, from a mask that knows the label alone"
    )


def _label_selector_fails(
    answer: Answer, model: nn.Module, x: Tensor, sparsity: float, kind: int, seen: dict[tuple[int, int], Tensor]
) -> Verdict | None:
    """Return what is wrong with one call, or None; note the mask of each class in ``seen``."""
    value = call_answer(answer, (model, x.clone(), sparsity))
    if isinstance(value, Verdict):
        return value
    own = observed(model, x)
    if not isinstance(value, Pathway):
        return Verdict(False, f"return a Pathway, not a {type(value).__name__}")
    if value.sites != own.sites or [mask.shape for mask in value.masks] != [a.shape for a in own.post]:
        wanted = ", ".join(f"{site} {tuple(a.shape)}" for site, a in zip(own.sites, own.post, strict=True))
        return Verdict(False, f"the pathway does not fit the network and the batch; its masks must be {wanted}")
    k = kept_neurons(value.neurons, sparsity)
    if bool((value.sizes != k).any()):
        size = int(value.sizes[value.sizes != k][0])
        return Verdict(False, f"{size} of {value.neurons} neurons are kept at sparsity {sparsity}: keep {k}")
    for flat, predicted in zip(value.flatten(), own.logits.argmax(1).tolist(), strict=True):
        if not torch.equal(seen.setdefault((kind, predicted), flat), flat):
            return Verdict(
                False,
                "two inputs of one predicted class got different masks: let the predicted class alone decide, not the "
                "image, the batch, the weights or an earlier call",
            )
    return None


def _canvas(seed: int) -> tuple[nn.Sequential, Tensor, Pathway, Tensor, float]:
    """Return a network, images to start from, a pathway, targets and a step size."""
    model, x, pathway = network_and_pathway(seed, kept=0.8)
    return model, x, pathway, (torch.arange(len(x)) + seed) % 4, 0.3


def check_ascent_step(answer: Answer) -> Verdict:
    """Check ``answer(model, images, pathway, targets, rate)``: one step up the response inside the pathway network.

    Example:
        >>> check_ascent_step(lambda model, images, pathway, targets, rate: images)
        ✗ the images do not change: add the gradient of the response, times the rate
    """

    def step(
        objective: Callable[[Tensor, Tensor], Tensor], direction: Callable[[Tensor], Tensor], whole: bool = False
    ) -> Answer:
        def stepped(model: nn.Module, images: Tensor, pathway: Pathway, targets: Tensor, rate: float) -> Tensor:
            leaf = images.clone().requires_grad_()
            if whole:
                logits = model(leaf)
            else:
                with masked(pathway):
                    logits = model(leaf)
            (gradient,) = torch.autograd.grad(objective(logits, targets).sum(), leaf)
            return images + rate * direction(gradient)

        return stepped

    def same(gradient: Tensor) -> Tensor:
        return gradient

    return judge(
        answer,
        [partial(_canvas, seed) for seed in range(4)],
        step(response, same),
        {
            "the images do not change: add the gradient of the response, times the rate": lambda *given: given[1],
            "this is the gradient alone: add it, times the rate, to the images": (
                lambda *given: (step(response, same)(*given) - given[1]) / given[4]
            ),
            "this goes down: add the gradient, do not subtract it": step(response, torch.neg),
            "this climbs in the whole network: run it inside `with masked(pathway):`": step(response, same, whole=True),
            "this is divided by the number of images: sum the responses, do not average them": (
                lambda *given: given[1] + (step(response, same)(*given) - given[1]) / len(given[1])
            ),
            "this climbs the predicted class: take each image's target": step(lambda z, t: z.amax(1), same),
            "this climbs all logits at once: take each image's target": step(lambda z, t: z.sum(1), same),
            "this climbs the probability: climb the logit of the target": step(
                lambda z, t: response(z.softmax(1), t), same
            ),
            "the rate is missing": lambda *given: step(response, same)(*given[:4], 1.0),
            "only the sign of the gradient is used; take the gradient itself": step(response, torch.sign),
        },
        "right: each image climbs its own target, inside its own pathway",
    )
