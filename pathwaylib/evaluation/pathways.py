"""Measures of pathways: one number per input, and how much the pathways of many inputs have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import PathwayError, require_at_least_one
from ..neurons import Activations, Target, check_batch, check_model, checked_logits, frozen, leaf, masked, response
from ..pathway import Pathway
from .statistics import Interval, bootstrap_interval

_COLUMNS_AT_ONCE = 8192  # neurons multiplied at a time: 33 MB for 1,000 pathways


def dead_share(pathway: Pathway, activations: Activations | Pathway) -> Tensor:
    """Return the share of a pathway's neurons that are dead on its input, in [0, 1].

    Dead is measured in the unmasked network: a neuron that wakes up inside the pathway network is still dead on
    the input. An empty pathway holds no dead neuron: its share is 0.

    Args:
        pathway: the neurons kept, for ``B`` inputs.
        activations: what the unmasked network showed on the same inputs (:func:`pathwaylib.observe`), or the
            pathway of its active neurons.

    Returns:
        Float tensor ``(B,)``.

    Raises:
        PathwayError: if the two are of different networks or numbers of inputs.

    Equation: ``|{j ∈ P : a_j(x) = 0}| / |P|``.

    Source: Khakzar et al., *Neural Response Interpretation through the Lens of Critical Pathways* (CVPR 2021),
    section 4.

    Example:
        >>> kept = Pathway((torch.tensor([[True, True, False, False]]),), ("relu_0",))
        >>> active = Pathway((torch.tensor([[True, False, True, False]]),), ("relu_0",))
        >>> dead_share(kept, active)
        tensor([0.5000])
    """
    active = activations if isinstance(activations, Pathway) else activations.active()
    return (pathway & ~active).sizes / pathway.sizes.clamp(min=1)


def pathway_logits(model: nn.Module, x: Tensor, pathway: Pathway | None, batch_size: int) -> Tensor:
    """Run the pathway network, or the whole network, batch by batch; return the logits ``(B, K)``."""
    _check_inputs(model, x, pathway, batch_size)
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(x), batch_size):
            chosen = slice(start, start + batch_size)
            with nullcontext() if pathway is None else _inside(pathway, chosen):
                logits = model(x[chosen].clone())  # a network may change its input in place
            parts.append(checked_logits(model, x[chosen], logits))
    return torch.cat(parts)


def at_least_single(logits: Tensor) -> Tensor:
    """Convert half precision to single: what a softmax makes of logits deserves more than three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _inside(pathway: Pathway, chosen: slice) -> AbstractContextManager[None]:
    """Return the context of one run inside the pathways of the chosen inputs."""
    return masked(pathway if len(pathway) == 1 else pathway[chosen], runs=1)


def _check_inputs(model: nn.Module, x: Tensor, pathway: Pathway | None, batch_size: int) -> None:
    check_model(model, x)
    require_at_least_one(batch_size=batch_size)
    check_batch(x, pathway)


def prediction_kept(model: nn.Module, x: Tensor, pathway: Pathway, *, batch_size: int = 256) -> Tensor:
    """Tell for each input whether the pathway network predicts what the network predicts.

    The true label plays no part: a wrong prediction that the pathway repeats is kept.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        pathway: one pathway per input, or one for all.
        batch_size: inputs to run at once.

    Returns:
        Bool tensor ``(B,)``.

    Raises:
        PathwayError: if ``model`` or ``x`` cannot be used, or the pathway is not of this network and batch.

    Equation: argmax Φ_P(x) = argmax Φ(x).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.rand(5, 2)
        >>> everything = Pathway((torch.ones(1, 3, dtype=torch.bool),), ("relu_0",))
        >>> prediction_kept(net, x, everything)
        tensor([True, True, True, True, True])
    """
    return pathway_logits(model, x, pathway, batch_size).argmax(1) == pathway_logits(model, x, None, batch_size).argmax(
        1
    )


def confidence(
    model: nn.Module, x: Tensor, pathway: Pathway | None = None, target: Target = None, *, batch_size: int = 256
) -> Tensor:
    """Return the softmax probability of each input's target, in the pathway network where a pathway is given.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        pathway: one pathway per input, or one for all; None runs the whole network.
        target: class or classes; None means the class that the *whole* network predicts.
        batch_size: inputs to run at once.

    Returns:
        Float tensor ``(B,)``, in [0, 1]; of a network in half precision in single.

    Raises:
        PathwayError: as :func:`pathwaylib.prediction_kept`, and if a target is out of range.

    Equation: softmax(Φ_P(x))_t.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> bool((confidence(net, torch.rand(5, 2)) >= 0.5).all())  # the larger of two probabilities
        True
    """
    if target is None and pathway is not None:
        target = pathway_logits(model, x, None, batch_size).argmax(1)
    return response(at_least_single(pathway_logits(model, x, pathway, batch_size)).softmax(1), target)


def blind(model: nn.Module, x: Tensor, pathway: Pathway, *, batch_size: int = 64) -> Tensor:
    """Tell for each input whether the pathway network gives its answer without seeing it.

    A pathway that keeps no neuron at some site of a plain chain of layers is cut: behind the gap the network computes
    with its biases alone, and says the same whatever it is shown. It may keep the prediction all the same, as the
    choice of neurons behind the gap can spell a class. Here an input counts as unseen if no small change of it changes
    any logit.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.
        pathway: one pathway per input, or one for all.
        batch_size: inputs to run at once.

    Returns:
        Bool tensor ``(B,)``.

    Raises:
        PathwayError: as :func:`pathwaylib.prediction_kept`, in float16, where small gradients are rounded to 0, and
            inside ``torch.inference_mode()``.

    Equation: ∇ₓ ⟨w, Φ_P(x)⟩ = 0 for random weights w of the classes (seed 0).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> cut = Pathway((torch.zeros(1, 3, dtype=torch.bool),), ("relu_0",))
        >>> blind(net, torch.rand(2, 2), cut)
        tensor([True, True])
    """
    _check_inputs(model, x, pathway, batch_size)
    if x.dtype == torch.float16:
        raise PathwayError(
            "the network is torch.float16, which rounds small gradients to 0: what sees would count as blind; use "
            "model.float() and x.float()"
        )
    parts = []
    for start in range(0, len(x), batch_size):
        chosen = slice(start, start + batch_size)
        images = leaf(x[chosen])
        with frozen(model), _inside(pathway, chosen), torch.enable_grad():
            logits = checked_logits(model, images, model(images.clone()))  # a leaf cannot be changed in place
        weights = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0)).to(logits)
        (slope,) = torch.autograd.grad((logits * weights).sum(), images)
        parts.append(~slope.flatten(1).any(1))
    return torch.cat(parts)


class ClassOverlap(NamedTuple):
    """How much pathways of one class have in common, and how much those of different classes.

    Attributes:
        within: mean IoU over all pairs of two inputs of the same class.
        between: mean IoU over all pairs of two inputs of different classes.
        difference: ``within - between``, with the interval of the difference itself.
    """

    within: Interval
    between: Interval
    difference: Interval


def pairwise_iou(pathway: Pathway, other: Pathway | None = None, *, per_site: bool = False) -> Tensor:
    """Return intersection over union of every pathway of one batch with every pathway of another.

    Two empty pathways count as equal (1). For pathways compared input by input see :meth:`Pathway.iou`.

    Args:
        pathway: ``B`` pathways.
        other: ``C`` pathways over the same sites; the same ones if left out.
        per_site: keep the ``S`` sites apart.

    Returns:
        Float tensor ``(B, C)``, or ``(S, B, C)`` per site.

    Raises:
        PathwayError: if the pathways are of different networks.

    Equation: ``|P ∩ Q| / |P ∪ Q|``.

    Example:
        >>> pathway = Pathway((torch.tensor([[True, True, False], [False, True, True]]),), ("relu_0",))
        >>> pairwise_iou(pathway)
        tensor([[1.0000, 0.3333],
                [0.3333, 1.0000]])
    """
    found = _ious(pathway, pathway if other is None else other)
    return found[:-1] if per_site else found[-1]


def class_similarity(pathway: Pathway, labels: Tensor, classes: int | None = None, *, per_site: bool = False) -> Tensor:
    """Return the mean IoU between the pathways of every two classes; no pathway is compared with itself.

    The mean of the diagonal is the average class IoU (acIOU). It says something only beside the other entries:
    pathways that are the same for every input have 1 everywhere.

    Args:
        pathway: ``B`` pathways.
        labels: class of each input, or its predicted class, int64 ``(B,)``.
        classes: number of classes ``K``; one more than the largest label if left out.
        per_site: keep the ``S`` sites apart.

    Returns:
        Float tensor ``(K, K)``, or ``(S, K, K)`` per site; symmetric.

    Raises:
        PathwayError: if labels and pathways do not fit together, or a class has fewer than two inputs.

    Equation: entry (k, l) is the mean of IoU(P_i, P_j) over i ≠ j with labels k and l.

    Source: Khakzar et al., *Neural Response Interpretation through the Lens of Critical Pathways* (CVPR 2021),
    section 3; the diagonal: Lin et al., *On Model Explanations with Transferable Neural Pathways* (2023).

    Example:
        >>> kept = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
        >>> class_similarity(Pathway((kept,), ("relu_0",)), torch.tensor([0, 0, 1, 1]))
        tensor([[0.6667, 0.1250],
                [0.1250, 1.0000]])
    """
    labels = _check_labels(pathway, labels)
    classes = int(labels.max()) + 1 if classes is None else classes
    if int(labels.max()) >= classes:
        raise PathwayError(f"label {int(labels.max())} is out of range; there are {classes} classes")
    belongs = torch.nn.functional.one_hot(labels, classes).double()
    members = belongs.sum(0)
    if int(members.min()) < 2:
        raise PathwayError(
            f"class {int(members.argmin())} has {int(members.min())} inputs; a class needs at least two to compare"
        )
    ious = pairwise_iou(pathway, per_site=per_site).double()
    ious.diagonal(dim1=-2, dim2=-1).zero_()
    pairs = torch.outer(members, members) - members.diag()
    return (belongs.T @ ious @ belongs / pairs).float()


def class_overlap(
    pathway: Pathway, labels: Tensor, *, level: float = 0.95, resamples: int = 1_000, seed: int = 0
) -> dict[str, ClassOverlap]:
    """Return how much pathways overlap within classes and between them, by site and over all neurons together.

    The intervals answer for the choice of *inputs*: inputs are drawn again, and the pairs among them follow. (The
    pairs share inputs. An interval over the pairs as if they were independent would be many times too narrow, and one
    over each input's own mean about half as wide as it should be.) An input drawn twice is not compared with itself.

    Args:
        pathway: ``B`` pathways.
        labels: class of each input, or its predicted class, int64 ``(B,)``.
        level: share of the draws inside the intervals, in (0, 1).
        resamples: number of draws.
        seed: of the draws.

    Returns:
        A :class:`ClassOverlap` for each site by its name, and for ``"all"`` neurons together.

    Raises:
        PathwayError: if labels and pathways do not fit together, or a draw held no pair of one class or of two: give
            more inputs.

    Equation: mean of IoU(P_i, P_j) over i ≠ j with equal labels, and over those with different ones.

    Source: Khakzar et al., *Neural Response Interpretation through the Lens of Critical Pathways* (CVPR 2021),
    section 3.

    Example:
        >>> labels = torch.arange(40) % 2
        >>> kept = torch.stack([labels == 0, labels == 1, labels >= 0], 1)  # one neuron for each class, one for both
        >>> found = class_overlap(Pathway((kept,), ("relu_0",)), labels)
        >>> print(found["all"].within, found["relu_0"].between)
        1.000 [1.000, 1.000] 0.333 [0.333, 0.333]
    """
    labels = _check_labels(pathway, labels)
    same = (labels[:, None] == labels).cpu().numpy()
    within_pairs, between_pairs = same & ~np.eye(len(same), dtype=bool), ~same
    found = {}
    for name, ious in zip((*pathway.sites, "all"), _ious(pathway, pathway).cpu().numpy(), strict=True):
        within, between = _mean_over_pairs(ious, within_pairs), _mean_over_pairs(ious, between_pairs)
        statistics = (within, between, _difference(within, between))
        inputs = np.arange(len(labels))
        found[name] = ClassOverlap(
            *(bootstrap_interval(inputs, s, level=level, resamples=resamples, seed=seed) for s in statistics)
        )
    return found


def method_similarity(pathways: Mapping[str, Pathway], *, per_site: bool = False) -> Tensor:
    """Return the mean IoU between the pathways that different methods select on the same inputs.

    For the interval of one entry see :meth:`Pathway.iou` and :func:`pathwaylib.bootstrap_interval`: its values are
    one per input.

    Args:
        pathways: by method, ``M`` pathways of the same ``B`` inputs.
        per_site: keep the ``S`` sites apart.

    Returns:
        Float tensor ``(M, M)``, or ``(S, M, M)`` per site, methods in the order given; symmetric, diagonal 1.

    Raises:
        PathwayError: if there is no pathway, or they are of different networks or numbers of inputs.

    Equation: entry (m, n) is the mean over inputs of IoU(P_m(x), P_n(x)).

    Example:
        >>> a = Pathway((torch.tensor([[True, True, False]]),), ("relu_0",))
        >>> b = Pathway((torch.tensor([[False, True, True]]),), ("relu_0",))
        >>> method_similarity({"a": a, "b": b})
        tensor([[1.0000, 0.3333],
                [0.3333, 1.0000]])
    """
    if not pathways:
        raise PathwayError("there are no pathways; give a dictionary such as {'NeuronMCT': pathway}")
    counts = {name: len(pathway) for name, pathway in pathways.items()}
    if len(set(counts.values())) > 1:
        raise PathwayError(f"the pathways are of different numbers of inputs: {counts}; give those of the same inputs")
    rows = [torch.stack([a.iou(b, per_site=per_site).mean(0) for b in pathways.values()]) for a in pathways.values()]
    return torch.stack(rows).movedim(-1, 0) if per_site else torch.stack(rows)


def _ious(pathway: Pathway, other: Pathway) -> Tensor:
    """Return IoU of every pair by site, and last over all sites: ``(S + 1, B, C)``."""
    _ = pathway[:1] & other[:1]  # refuses pathways of different networks
    both = []
    for one, two in zip(pathway.masks, other.masks, strict=True):
        # Float32 multiplies fastest, and holds counts exactly up to 2 ** 24.
        blocks = zip(one.flatten(1).split(_COLUMNS_AT_ONCE, 1), two.flatten(1).split(_COLUMNS_AT_ONCE, 1), strict=True)
        both.append(sum((a.float() @ b.float().T for a, b in blocks), torch.zeros((), device=one.device)))
    common = torch.stack([*both, torch.stack(both).sum(0)])
    sizes = [torch.cat([p.site_sizes, p.sizes[:, None]], 1).T for p in (pathway, other)]
    either = sizes[0][:, :, None] + sizes[1][:, None] - common
    return torch.where(either > 0, common / either.clamp(min=1), 1.0)


def _check_labels(pathway: Pathway, labels: Tensor) -> Tensor:
    if labels.shape != (len(pathway),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise PathwayError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} for {len(pathway)} pathways; give one class "
            "index each"
        )
    if int(labels.min()) < 0:
        raise PathwayError(f"label {int(labels.min())} is no class; classes are counted from 0")
    return labels.to(pathway.masks[0].device).long()


_Statistic = Callable[..., NDArray[np.float32]]


def _mean_over_pairs(values: NDArray[np.float32], pairs: NDArray[np.bool_]) -> _Statistic:
    """Return the statistic of drawn inputs that is the mean of ``values`` over those ``pairs`` that were drawn."""
    chosen, summed = pairs.astype(np.float32), values * pairs

    def mean(sample: NDArray[Any], axis: int = -1) -> NDArray[np.float32]:
        draws = sample.astype(int).reshape(-1, sample.shape[axis])
        drawn = np.stack([np.bincount(draw, minlength=len(values)) for draw in draws]).astype(np.float32)
        count = ((drawn @ chosen) * drawn).sum(1)
        if not count.all():
            raise PathwayError(
                f"a draw of the {len(values)} inputs holds no two of one class, or no two of different classes; give "
                "more inputs of every class, and at least two classes"
            )
        means: NDArray[np.float32] = ((drawn @ summed) * drawn).sum(1) / count
        return means.reshape(sample.shape[:-1])

    return mean


def _difference(one: _Statistic, other: _Statistic) -> _Statistic:
    return lambda sample, axis=-1: one(sample, axis) - other(sample, axis)
