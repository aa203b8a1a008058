"""Class-relevant pathways, and their use on inputs they never saw."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import ImageSet
from ..errors import PathwayError, require_at_least_one
from ..pathway import Pathway, class_indices
from ..selectors import Selector


def class_frequencies(
    model: nn.Module,
    selector: Selector,
    data: ImageSet,
    *,
    classes: int | None = None,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[tuple[Tensor, ...], Tensor, tuple[str, ...]]:
    """Return how often the pathways of each predicted class keep each neuron.

    The memory does not grow with the number of images.

    Args:
        model: a network in eval mode.
        selector: any selector.
        data: images, of the training split where the result is to be transferred.
        classes: number of classes K; as ``data.classes`` if left out.
        batch_size: images at once.
        device: where the network is.
        progress: show a progress bar.

    Returns:
        Per site the share of the inputs *predicted* as each class that keep a neuron, float ``(K, ...)``; how many
        those inputs are, ``(K,)``; the sites' names.

    Raises:
        PathwayError: as the selector; if there is no image, ``classes`` are too few, or the pathways have no targets.

    Example:
        >>> from pathwaylib import ActiveNeurons, load_model, planted
        >>> found, counts, sites = class_frequencies(load_model("planted-cnn"), ActiveNeurons(), planted(20))
        >>> len(found) == len(sites), int(counts.sum())
        (True, 20)
    """
    require_at_least_one(batch_size=batch_size)
    if not len(data):
        raise PathwayError("the data set holds no image; give at least one")
    classes = len(data.classes) if classes is None else classes
    counts = torch.zeros(classes, dtype=torch.long)
    sums: list[Tensor] = []
    sites: tuple[str, ...] = ()
    for start in tqdm(range(0, len(data), batch_size), unit="batch", disable=not progress, leave=False):
        pathway = selector(model, data[start : start + batch_size][0].to(device)).to("cpu")
        if pathway.targets is None:
            raise PathwayError(
                f"the pathways of {type(selector).__name__} have no targets; give a selector that notes them"
            )
        predicted = pathway.targets
        if int(predicted.max()) >= classes:
            raise PathwayError(
                f"classes is {classes}, too few: an image is predicted as class {int(predicted.max())}, from 0"
            )
        counts += predicted.bincount(minlength=classes)
        sums = sums or [torch.zeros(classes, *mask.shape[1:]) for mask in pathway.masks]
        sites = pathway.sites
        for total, mask in zip(sums, pathway.masks, strict=True):
            total.index_add_(0, predicted, mask.float())
    members = counts.clamp(min=1)
    return tuple(t / members.view(-1, *[1] * (t.ndim - 1)) for t in sums), counts, sites


def class_pathways(frequencies: tuple[Tensor, ...], sites: tuple[str, ...], *, share: float = 0.3) -> Pathway:
    """Return the class-relevant pathway of each class: the neurons that at least a share τ of its pathways keep.

    Args:
        frequencies: per site, ``(K, ...)``, from :func:`class_frequencies`.
        sites: names of the sites.
        share: τ, in (0, 1].

    Returns:
        A pathway of K entries, whose targets are the classes.

    Raises:
        PathwayError: if ``share`` is out of range.

    Source: Lin et al., *On Model Explanations with Transferable Neural Pathways* (2023).

    Example:
        >>> found = class_pathways((torch.tensor([[0.9, 0.2], [0.1, 0.5]]),), ("relu_0",), share=0.5)
        >>> found.masks[0].int().tolist()
        [[1, 0], [0, 1]]
    """
    if not 0 < share <= 1:
        raise PathwayError(f"share is {share}; give the share of a class's pathways that must keep a neuron, in (0, 1]")
    masks = tuple(frequency >= share for frequency in frequencies)
    return Pathway(masks, sites, torch.arange(len(masks[0])))


def transfer(pathways: Pathway, classes: Tensor) -> Pathway:
    """Give each of many inputs the pathway of a class.

    Args:
        pathways: one per class, from :func:`class_pathways`.
        classes: the class whose pathway each input gets, integers ``(B,)``, on any device.

    Raises:
        PathwayError: if they are no integers, or there is no pathway for a class.

    Example:
        >>> own = class_pathways((torch.eye(2),), ("relu_0",))
        >>> transfer(own, torch.tensor([1, 0, 1])).masks[0].int().tolist()
        [[0, 1], [1, 0], [0, 1]]
    """
    chosen = class_indices(classes, len(classes)).to(pathways.masks[0].device)  # as bytes they would be a mask
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(pathways):
        raise PathwayError(f"classes from {int(chosen.min())} to {int(chosen.max())}; there are {len(pathways)}")
    return pathways[chosen]
