"""Train an image classifier on an :class:`~pathwaylib.ImageSet`, resumable after every epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .checkpoints import Parts, resume_checkpoint, store_checkpoint
from .data import ImageSet
from .errors import PathwayError, require_at_least_one
from .files import digest_of
from .neurons import check_model, checked_logits, input_like
from .seeds import seeded


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides the network and the images.

    SGD with Nesterov momentum; the learning rate rises linearly to ``peak_lr`` over the first ``warmup`` share of
    the steps and falls linearly to zero. Weight decay leaves out one-dimensional parameters (biases, batch-norm).

    Attributes:
        epochs: passes over the images.
        batch_size: images per step.
        peak_lr: largest learning rate.
        warmup: share of steps on which the learning rate rises.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty.
        label_smoothing: probability mass given to the other classes.
        crop_padding: pixels of reflection padding before a random crop; 0 turns off crops and mirroring.
        cutout: side in pixels of a grey square laid over each image at a random place; 0 turns it off.
        seed: seeds the initial weights, the order of the images, the augmentation and what the network draws (dropout).

    Raises:
        PathwayError: if a number is out of range.

    Example:
        >>> Recipe(epochs=2).batch_size
        256
    """

    epochs: int
    batch_size: int = 256
    peak_lr: float = 0.2
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    crop_padding: int = 4
    cutout: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least_one(epochs=self.epochs, batch_size=self.batch_size)
        for name, fits, wanted in (
            ("peak_lr", 0 < self.peak_lr < math.inf, "a number above 0"),
            ("warmup", 0 <= self.warmup <= 1, "a share of the steps in [0, 1]"),
            ("momentum", 0 < self.momentum < 1, "a number between 0 and 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a share in [0, 1)"),
            ("crop_padding", isinstance(self.crop_padding, int) and self.crop_padding >= 0, "whole pixels, or 0"),
            ("cutout", isinstance(self.cutout, int) and self.cutout >= 0, "whole pixels, or 0"),
        ):
            if not fits:
                raise PathwayError(f"{name} is {getattr(self, name)}; give {wanted}")


def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Draw new weights for every layer that knows how to (``reset_parameters``), from ``seed`` alone; return the model.

    Example:
        >>> a, b = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> bool((initialise(a, 1).weight == initialise(b, 1).weight).all())
        True
    """
    with seeded(seed):
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return model


def augment(images: Tensor, padding: int, generator: torch.Generator, *, cutout: int = 0) -> Tensor:
    """Mirror half of the images, shift each by up to ``padding`` pixels over its reflected border, cover a square.

    Args:
        images: ``(B, C, H, W)``.
        padding: largest shift in pixels; 0 turns off mirroring too.
        generator: draws mirrorings, shifts and squares.
        cutout: side of the grey square in pixels; 0 covers nothing.

    Returns:
        Images of the same shape; those given stay as they are.

    Source: DeVries and Taylor, *Improved Regularization of Convolutional Neural Networks with Cutout* (2017).

    Example:
        >>> augment(torch.rand(2, 3, 8, 8), 2, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """
    count, _, height, width = images.shape
    if padding:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        windows = F.pad(images, (padding,) * 4, mode="reflect").unfold(2, height, 1).unfold(3, width, 1)
        top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
        images = windows[torch.arange(count), :, top, left]
    if cutout:
        # The square may reach over the border, so that every pixel is covered equally often.
        top = torch.randint(1 - cutout, height, (count, 1), generator=generator)
        left = torch.randint(1 - cutout, width, (count, 1), generator=generator)
        rows, columns = torch.arange(height), torch.arange(width)
        in_rows = (rows >= top) & (rows < top + cutout)
        in_columns = (columns >= left) & (columns < left + cutout)
        images = images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.5)
    return images


def _batches(data: ImageSet, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of shuffled, augmented batches; the last incomplete batch is left out."""
    order = torch.randperm(len(data), generator=generator)
    for indices in order[: len(data) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size):
        images, labels = data[indices]
        yield augment(images, recipe.crop_padding, generator, cutout=recipe.cutout), labels


def train_classifier(
    model: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    *,
    fresh: bool = True,
    checkpoint: Path | str | None = None,
    device: torch.device | str = "cpu",
    bfloat16: bool = True,
    compiled: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``model`` in place and return one log row per epoch.

    With a ``checkpoint`` path the state is stored atomically after every epoch, and a run that finds a checkpoint
    continues from it with the numbers an uninterrupted run would have drawn. The log is kept beside it as CSV.

    Args:
        model: takes ``(B, C, H, W)`` in ``[0, 1]``, gives logits ``(B, K)``. Left in eval mode.
        data: training images.
        recipe: see :class:`Recipe`.
        fresh: draw new weights first; False goes on from those the model has (a warm restart).
        checkpoint: where to keep the state between epochs, such as ``run.pt``.
        device: where to train.
        bfloat16: run forward passes under bfloat16 autocast.
        compiled: compile the network (worth it from about ten epochs).
        progress: show a progress bar over epochs.

    Returns:
        Rows with ``epoch``, ``loss`` and training ``accuracy`` (on augmented images).

    Raises:
        PathwayError: if there are fewer images than a batch or they are too small for the crops, the loss is not finite
            after an epoch, or the checkpoint is damaged or belongs to another recipe, network or data set, another
            ``fresh`` or ``bfloat16``, or, without ``fresh``, to other weights at the start.
        OSError: if the disk is full; the checkpoint before is as it was.

    Example:
        >>> from pathwaylib import planted
        >>> from pathwaylib.architectures import planted_cnn
        >>> log = train_classifier(planted_cnn(), planted(64), Recipe(epochs=1, batch_size=32), progress=False)
        >>> sorted(log[0])
        ['accuracy', 'epoch', 'loss']
    """
    steps_per_epoch = len(data) // recipe.batch_size
    if not steps_per_epoch:
        raise PathwayError(f"{len(data)} images are fewer than a batch of {recipe.batch_size}; lower batch_size")
    height, width = data.images.shape[2:]
    if recipe.crop_padding >= min(height, width):
        raise PathwayError(
            f"crop_padding is {recipe.crop_padding}, the images have {height}x{width} pixels; give fewer than a side"
        )
    device = torch.device(device)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    noted = {} if checkpoint is None else _noted(model, data, recipe, fresh=fresh, bfloat16=bfloat16)
    # A checkpoint has weights of its own, and one that is refused is to leave these as they are.
    if fresh and (checkpoint is None or not checkpoint.exists()):
        initialise(model, recipe.seed)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others}]
    optimiser = torch.optim.SGD(
        groups,
        lr=recipe.peak_lr,
        momentum=recipe.momentum,
        nesterov=True,
    )
    total = recipe.epochs * steps_per_epoch
    rising = max(1, round(recipe.warmup * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / rising, (total - step) / max(1, total - rising))
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    parts: Parts = {"model": model, "optimiser": optimiser, "schedule": schedule, "generator": generator}
    log = resume_checkpoint(checkpoint, parts, noted, device) if checkpoint is not None else []
    model.train()
    forward = cast(nn.Module, torch.compile(model)) if compiled else model
    precision = torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()
    epochs = range(len(log), recipe.epochs)
    bar = tqdm(epochs, initial=len(log), total=recipe.epochs, unit="epoch", disable=not progress)
    for epoch in bar:
        losses, correct = [], 0
        # Dropout draws from the global generator: by recipe and epoch alone, so that a run can be resumed.
        with seeded((recipe.seed * 1_000_003 + epoch) % 2**63):
            for images, labels in _batches(data, recipe, generator):
                images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
                labels = labels.to(device, non_blocking=True)
                with precision:
                    logits = forward(images).float()
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(loss.detach())
                correct += int((logits.argmax(1) == labels).sum())
        accuracy = correct / (steps_per_epoch * recipe.batch_size)
        log.append({"epoch": epoch + 1, "loss": float(torch.stack(losses).mean()), "accuracy": accuracy})
        bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", accuracy=f"{accuracy:.3f}")
        if not math.isfinite(log[-1]["loss"]):
            raise PathwayError(
                f"the loss is {log[-1]['loss']} after epoch {epoch + 1}; lower peak_lr, which is {recipe.peak_lr}"
            )
        if checkpoint is not None:
            store_checkpoint(checkpoint, parts, noted, log)
    model.zero_grad(set_to_none=True)
    model.eval()
    return log


def _noted(model: nn.Module, data: ImageSet, recipe: Recipe, *, fresh: bool, bfloat16: bool) -> dict[str, object]:
    """Return what decides a training, as plain values; 16 digits of a digest tell tensors apart."""
    return asdict(recipe) | {
        "bfloat16": bfloat16,
        "fresh": fresh,
        "initial weights": None if fresh else digest_of(model.state_dict())[:16],
        "data": digest_of({"images": data.images, "labels": data.labels})[:16],
    }


@torch.inference_mode()
def predictions(model: nn.Module, data: ImageSet, *, batch_size: int = 500) -> Tensor:
    """Return the class that ``model`` predicts for each image of ``data``: int64 ``(N,)``, on the CPU.

    Raises:
        PathwayError: if ``model`` is in training mode or cannot be used with the images, or its logits are not finite.

    Example:
        >>> from pathwaylib import planted
        >>> from pathwaylib.architectures import planted_cnn
        >>> predictions(planted_cnn().eval(), planted(16)).shape
        torch.Size([16])
    """
    require_at_least_one(batch_size=batch_size)
    like = input_like(model)
    found = []
    for indices in torch.arange(len(data)).split(batch_size):
        images = data[indices][0].to(like)
        check_model(model, images)
        found.append(checked_logits(model, images, model(images)).argmax(1).cpu())
    return torch.cat(found)


def accuracy(model: nn.Module, data: ImageSet, *, batch_size: int = 500) -> float:
    """Return the share of ``data`` whose label ``model`` predicts.

    Raises:
        PathwayError: as :func:`predictions`.

    Example:
        >>> from pathwaylib import planted
        >>> from pathwaylib.architectures import planted_cnn
        >>> 0 <= accuracy(planted_cnn().eval(), planted(16)) <= 1
        True
    """
    return float((predictions(model, data, batch_size=batch_size) == data.labels).double().mean())
