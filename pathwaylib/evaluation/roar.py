"""Remove and retrain: does a network that never saw the marked pixels get worse without them?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import ImageSet
from ..errors import PathwayError
from ..explainers import Explainer, explain
from ..files import digest_of, load_tensors, save_tensors
from ..training import Recipe, predictions, train_classifier
from .faithfulness import pixel_order

_SHARD = 5_000  # images per file: what a killed run has to do again at most


def score_images(
    explainer: Explainer,
    model: nn.Module,
    data: ImageSet,
    *,
    folder: Path | None = None,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Tensor:
    """Return how relevant each pixel of a whole data set is to the class the network predicts.

    The labels play no part: maps that explain the label would carry it into the images they are used on.

    Args:
        explainer: such as one of :func:`pathwaylib.explainers`.
        model: the network to explain, in eval mode, on ``device``.
        data: ``N`` images.
        folder: keeps the scores, 5,000 images a file; a run that was stopped goes on after the last file. Give one
            folder per explainer, network and data set: only scores of other images can be told from the right ones.
        batch_size: images to explain at once.
        device: where the network is.
        progress: show a progress bar.

    Returns:
        Float16 tensor ``(N, H, W)``: the largest absolute attribution among a pixel's channels, as a share of the
        largest in its image. (Half precision keeps the order of all but near-equal pixels; 8 bits do not.)

    Raises:
        PathwayError: as :func:`pathwaylib.explain`, or if ``folder`` holds a damaged file, or scores of other images.

    Example:
        >>> from pathwaylib import explainers, load_model, planted
        >>> data = planted(n=4)
        >>> scores = score_images(explainers()["gradient"], load_model("planted-cnn"), data, progress=False)
        >>> scores.shape, scores.dtype, float(scores.amax())
        (torch.Size([4, 32, 32]), torch.float16, 1.0)
    """
    parts = []
    starts = range(0, len(data), _SHARD)
    for start in tqdm(starts, unit="shard", disable=not progress, leave=False):
        shard = slice(start, start + _SHARD)
        path = None if folder is None else folder / f"scores-{start:06d}.safetensors"
        scored = {} if path is None else {"images": digest_of({"images": data.images[shard]})}
        if path is not None and path.exists():
            stored, noted = load_tensors(path)
            if noted != scored:
                raise PathwayError(f"{path} holds scores of other images; remove it, or give another folder")
            parts.append(stored["scores"])
            continue
        images, _ = data[shard]
        maps = explain(explainer, model, images.to(device), batch_size=batch_size, progress=progress)
        parts.append(_shares(maps).cpu())
        if path is not None:
            save_tensors(path, {"scores": parts[-1]}, scored)
    return torch.cat(parts)


def _shares(maps: Tensor) -> Tensor:
    pixels = maps.abs().amax(1)
    return (pixels / pixels.amax((1, 2), keepdim=True).clamp(min=torch.finfo(pixels.dtype).tiny)).half()


def remove_pixels(
    data: ImageSet, scores: Tensor, fraction: float, *, fill: Tensor | None = None, seed: int = 0
) -> ImageSet:
    """Return a data set without the most relevant pixels of every image.

    Args:
        data: ``N`` images of ``H`` times ``W`` pixels.
        scores: relevance of each pixel, ``(N, H, W)``; among equal ones chance decides.
        fraction: share of the pixels to remove, in [0, 1]; exactly ``round(fraction · H · W)`` leave.
        fill: what replaces a pixel, uint8 ``(C,)``; the mean of ``data`` per channel if left out. For a test set give
            that of the training set.
        seed: decides among equal scores.

    Raises:
        PathwayError: if scores and images do not fit together, a score is not finite, ``fraction`` is out of range, or
            ``fill`` is no uint8 colour of as many channels as the images have.

    Example:
        >>> from pathwaylib import planted
        >>> data = planted(n=2)
        >>> grey = remove_pixels(data, torch.rand(2, 32, 32), 0.5, fill=torch.zeros(3, dtype=torch.uint8))
        >>> (grey.images.amax(1) == 0).float().mean((1, 2))
        tensor([0.5000, 0.5000])
    """
    count, channels, height, width = data.images.shape
    if scores.shape != (count, height, width):
        raise PathwayError(
            f"scores of shape {tuple(scores.shape)} for images of shape {tuple(data.images.shape)}; give one number "
            "for every pixel"
        )
    if not 0 <= fraction <= 1:
        raise PathwayError(f"fraction is {fraction}; give a share of the pixels in [0, 1]")
    fill = mean_colour(data) if fill is None else fill
    if not isinstance(fill, Tensor) or fill.dtype != torch.uint8 or fill.shape != (channels,):
        got = f"{fill.dtype} {tuple(fill.shape)}" if isinstance(fill, Tensor) else repr(fill)
        raise PathwayError(f"fill is {got}; give uint8 ({channels},) in 0 to 255, such as mean_colour(data)")
    removed = round(fraction * height * width)
    generator = torch.Generator().manual_seed(seed)
    images = data.images.clone()
    for start in range(0, count, _SHARD):
        part = slice(start, start + _SHARD)
        gone = pixel_order(scores[part, None], generator=generator) < removed
        images[part] = torch.where(gone[:, None], fill.view(1, -1, 1, 1), images[part])
    return replace(data, images=images)


def mean_colour(data: ImageSet) -> Tensor:
    """Return the mean of a data set's images per channel, uint8 ``(C,)``.

    Example:
        >>> mean_colour(ImageSet(torch.full((2, 3, 4, 4), 7).byte(), torch.zeros(2).long(), ("a",)))
        tensor([7, 7, 7], dtype=torch.uint8)
    """
    # In parts: float64 copies of a whole data set would take gigabytes.
    sums = torch.stack([part.double().sum((0, 2, 3)) for part in data.images.split(_SHARD)]).sum(0)
    return (sums * data.images.shape[1] / data.images.numel()).round().to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Retrained:
    """A network trained from scratch on images with pixels removed.

    Attributes:
        correct: whether it is right on each test image, bool ``(N,)``.
        log: one row per epoch, as of :func:`pathwaylib.training.train_classifier`.
    """

    correct: Tensor
    log: list[dict[str, float]]

    @property
    def accuracy(self) -> float:
        """Share of the test images it is right on."""
        return float(self.correct.double().mean())


def remove_and_retrain(
    architecture: Callable[[], nn.Module],
    train: ImageSet,
    test: ImageSet,
    scores: tuple[Tensor, Tensor],
    fraction: float,
    recipe: Recipe,
    *,
    checkpoint: Path | str | None = None,
    device: torch.device | str = "cpu",
    bfloat16: bool = True,
    progress: bool = True,
) -> Retrained:
    """Remove the most relevant pixels of training and test images, train a new network, test it.

    A network that sees gaps only when it is tested fails for the strangeness of the image as much as for what is
    missing. One that is trained on such images fails for what is missing. What it can do is bounded by what the
    removed pixels told, and also by what the *shape* of the gaps tells: a map that draws the object leaves its outline.

    Args:
        architecture: makes the network, such as ``pathwaylib.architectures.ARCHITECTURES["cifar10-resnet8"]``.
        train: training images.
        test: test images.
        scores: relevance of the pixels of both, ``(N, H, W)`` each; see :func:`score_images`.
        fraction: share of the pixels to remove, in [0, 1].
        recipe: of the training; its ``seed`` also decides among equal scores.
        checkpoint: keeps the training's state between epochs.
        device: where to train.
        bfloat16: train under bfloat16 autocast.
        progress: show a progress bar over epochs.

    Returns:
        :class:`Retrained`.

    Raises:
        PathwayError: as :func:`remove_pixels` and :func:`pathwaylib.training.train_classifier`.

    Source: Hooker, Erhan, Kindermans, Kim, *A Benchmark for Interpretability Methods in Deep Neural Networks*
    (NeurIPS 2019).

    Example:
        >>> from pathwaylib import planted
        >>> from pathwaylib.architectures import planted_cnn
        >>> data, recipe = planted(n=64), Recipe(epochs=1, batch_size=32, crop_padding=0)
        >>> scores = torch.rand(64, 32, 32)
        >>> found = remove_and_retrain(planted_cnn, data, data, (scores, scores), 0.5, recipe, progress=False)
        >>> found.correct.shape
        torch.Size([64])
    """
    fill = mean_colour(train)
    left = [
        remove_pixels(data, part, fraction, fill=fill, seed=recipe.seed)
        for data, part in zip((train, test), scores, strict=True)
    ]
    model = architecture()
    log = train_classifier(
        model, left[0], recipe, checkpoint=checkpoint, device=device, bfloat16=bfloat16, progress=progress
    )
    return Retrained(predictions(model, left[1]) == test.labels, log)
