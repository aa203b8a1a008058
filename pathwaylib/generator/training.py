"""Train a generator: the pathway keeps the target's answer, holds few neurons, and resembles those of its class."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..checkpoints import Parts, resume_checkpoint, store_checkpoint
from ..data import ImageSet
from ..errors import PathwayError, require_at_least_one
from ..files import digest_of
from ..neurons import frozen, gated, record
from .network import GeneratorNetwork, GeneratorShape
from .quantizer import DistanceAwareQuantizer, Quantizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_LOGGED = ("step", "loss", "faithfulness", "density", "class_relevance", "auxiliary", "others", "kept")


@dataclass(frozen=True)
class GeneratorRecipe:
    """Everything that decides the training of a generator besides target and images.

    Attributes:
        steps: batches.
        batch_size: images per step, over all processes together.
        learning_rate: of AdamW; it rises over the first tenth and falls to 0 along a cosine.
        weight_decay: of AdamW.
        sparsity_weight: λ_s, weight of the kept share.
        class_weight: λ_c, weight of the class relevance.
        auxiliary_weight: weight of the auxiliary head's cross-entropy.
        others_weight: λ_o, weight of the faithfulness to *another* input of the batch under the same mask. With 0, as
            in the paper, a mask may decide the class by itself; see :func:`pathwaylib.forced`.
        warmup: share of the steps on which λ_s rises from 0: first faithful, then small.
        shape: sizes of the generator.
        quantizer: from scores to masks.
        seed: seeds weights, order of the images and mirroring.

    Raises:
        PathwayError: if a number is out of range.

    Example:
        >>> GeneratorRecipe(steps=10).sparsity_weight
        20.0
    """

    steps: int = 200
    batch_size: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    sparsity_weight: float = 20.0
    class_weight: float = 0.05
    auxiliary_weight: float = 0.1
    others_weight: float = 0.0
    warmup: float = 0.3
    shape: GeneratorShape = field(default_factory=GeneratorShape)
    quantizer: Quantizer = field(default_factory=DistanceAwareQuantizer)
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least_one(steps=self.steps, batch_size=self.batch_size)
        weights = (
            self.sparsity_weight,
            self.class_weight,
            self.auxiliary_weight,
            self.others_weight,
            self.weight_decay,
        )
        usable = all(0 <= weight < math.inf for weight in weights) and 0 < self.learning_rate < math.inf
        if not usable or not 0 <= self.warmup <= 1:
            raise PathwayError(
                f"weights {weights}, learning_rate {self.learning_rate}, warmup {self.warmup}: give weights of at "
                "least 0, a learning rate above 0 and a warmup in [0, 1]"
            )


class GeneratorLosses(NamedTuple):
    """The terms of the loss on one batch, without their weights; each a number with a gradient.

    Attributes:
        faithfulness: KL(softmax Φ(x) ‖ softmax Φ_P(x)), in nats.
        density: kept share of the neurons, of the sites at which the pathway is chosen.
        class_relevance: 1 − mean soft IoU of the masks of inputs of one predicted class; 0 where no two share one.
        auxiliary: cross-entropy of the auxiliary head against the predicted class, in nats.
        others: KL(softmax Φ(x') ‖ softmax Φ_P(x')) with P of x and x' of another predicted class; 0 unless asked for.
        kept: share of the batch whose prediction the masked network keeps (no gradient).
    """

    faithfulness: Tensor
    density: Tensor
    class_relevance: Tensor
    auxiliary: Tensor
    others: Tensor
    kept: Tensor


def generator_losses(
    model: nn.Module,
    network: nn.Module,
    x: Tensor,
    quantizer: Quantizer,
    fabric: Fabric | None = None,
    *,
    others: bool = False,
) -> GeneratorLosses:
    """Return the loss terms of one batch: one run of the target, one of the generator, one of the masked target.

    Args:
        model: the frozen target, in eval mode.
        network: a :class:`GeneratorNetwork`, or one that Fabric wrapped.
        x: images ``(B, C, H, W)``.
        quantizer: from scores to masks.
        fabric: gathers the masks of all processes, so that pairs are formed over the global batch.
        others: also run the target on other inputs under the masks; one more run.

    Raises:
        PathwayError: as :func:`pathwaylib.observe`, or if the generator's scores are NaN.

    Source: Lin et al., *On Model Explanations with Transferable Neural Pathways* (2023); the class term's form, the
    auxiliary term and that of the others are ours.

    Example:
        >>> from pathwaylib import load_model, planted
        >>> model, x = load_model("planted-cnn"), planted(4)[:4][0]
        >>> losses = generator_losses(model, GeneratorNetwork.like(model, x), x, DistanceAwareQuantizer())
        >>> 0 <= losses.density.item() <= 1, losses.faithfulness.item() >= 0
        (True, True)
    """
    with torch.no_grad():
        _, _, activations, logits = record(model, x, keep_pre=False)
    generated = network(activations)
    masks = [quantizer(scores.float()) for scores in generated.scores]
    gates = [mask.to(logits.dtype) for mask in masks]
    routed = gated(model, x, gates).float()
    logits = logits.float()
    predicted = logits.argmax(1)
    strangers = routed.new_zeros(())
    if others:
        other = _of_another_class(predicted)
        strangers = _divergence(logits[other], gated(model, x[other], gates).float())
    flat = torch.cat([mask.flatten(1) for mask in masks[: generated.chosen]], 1)
    everyone, classes = flat, predicted
    if fabric is not None and fabric.world_size > 1:
        everyone = cast(Tensor, fabric.all_gather(flat, sync_grads=True)).flatten(0, 1)
        classes = cast(Tensor, fabric.all_gather(predicted)).flatten()
    return GeneratorLosses(
        _divergence(logits, routed),
        flat.mean(),
        1 - _same_class_iou(everyone, classes),
        F.cross_entropy(generated.logits.float(), predicted),
        strangers,
        (routed.detach().argmax(1) == predicted).float().mean(),
    )


def _divergence(whole: Tensor, routed: Tensor) -> Tensor:
    return F.kl_div(routed.log_softmax(1), whole.log_softmax(1), reduction="batchmean", log_target=True)


def _of_another_class(classes: Tensor) -> Tensor:
    """Return for each input the next one, in a circle, of another class; the next one if there is none."""
    positions = torch.arange(len(classes), device=classes.device)
    steps = (positions - positions[:, None] - 1) % len(classes)
    return (steps + len(classes) * (classes == classes[:, None])).argmin(1)


def _same_class_iou(masks: Tensor, classes: Tensor) -> Tensor:
    """Return the mean soft IoU over pairs of one class: Σ ab / Σ (a + b − ab); 1 where there is no pair."""
    # Sorted by class, so that only the products of pairs that count are formed.
    by_class = masks[classes.argsort()].split(classes.bincount().tolist())
    total, pairs = masks.new_zeros(()), 0
    for members in by_class:
        common, sizes = members @ members.T, members.sum(1)
        ratios = common / (sizes[:, None] + sizes - common).clamp(min=1e-6)
        total = total + ratios.sum() - ratios.diagonal().sum()
        pairs += len(members) * (len(members) - 1)
    return total / pairs if pairs else masks.new_ones(())


def train_generator(
    model: nn.Module,
    data: ImageSet,
    recipe: GeneratorRecipe,
    *,
    fabric: Fabric | None = None,
    checkpoint: Path | str | None = None,
    store_every: int = 100,
    progress: bool = True,
) -> tuple[GeneratorNetwork, list[dict[str, float]]]:
    """Train a generator for ``model`` on ``data``; return it, in eval mode, with its log.

    What a step draws depends on the seed and the step alone, so a run that goes on from a checkpoint continues bit for
    bit. Several processes share each batch and form the same-class pairs over all of it.

    Args:
        model: the frozen target, in eval mode; takes images in [0, 1].
        data: training images; their labels play no part.
        recipe: see :class:`GeneratorRecipe`.
        fabric: devices, processes and precision; one CPU process in float32 if left out. It has to be launched.
        checkpoint: keeps the state; the log is kept beside it as CSV.
        store_every: steps between two checkpoints.
        progress: show a progress bar.

    Returns:
        The generator, and one row per step with the loss and its terms.

    Raises:
        PathwayError: if there are fewer images than a batch, the processes cannot share a batch evenly, the loss is not
            finite at a step, or the checkpoint is damaged or belongs to another recipe, target or set of images.

    Example:
        >>> from pathwaylib import load_model, planted
        >>> recipe = GeneratorRecipe(steps=2, batch_size=8)
        >>> network, log = train_generator(load_model("planted-cnn"), planted(16), recipe, progress=False)
        >>> [row["step"] for row in log]
        [1, 2]
    """
    if fabric is None:
        from lightning_fabric import Fabric  # here, as it doubles the time that importing this library takes

        fabric = Fabric(accelerator="cpu", devices=1)
    require_at_least_one(store_every=store_every)
    if len(data) < recipe.batch_size or recipe.batch_size % fabric.world_size:
        raise PathwayError(
            f"{len(data)} images, batches of {recipe.batch_size} over {fabric.world_size} processes; give at least one "
            "batch of images, and a batch size that the processes share evenly"
        )
    model = model.to(fabric.device)
    network = GeneratorNetwork.like(model, data[:1][0].to(fabric.device), recipe.shape, seed=recipe.seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    parts: Parts = {"network": network, "optimiser": optimiser}
    checkpoint = None if checkpoint is None else Path(checkpoint)
    noted = {} if checkpoint is None else _noted(model, data, recipe)
    log = resume_checkpoint(checkpoint, parts, noted, fabric.device) if checkpoint is not None else []
    wrapped, optimiser = fabric.setup(network, optimiser)
    share = recipe.batch_size // fabric.world_size
    mine = slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)
    steps = range(len(log), recipe.steps)
    quiet = not progress or fabric.global_rank > 0
    bar = tqdm(steps, initial=len(log), total=recipe.steps, unit="step", disable=quiet)
    with frozen(model):
        for step in bar:
            x = _images(data, recipe, step)[mine].to(fabric.device)
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * _rate(step / recipe.steps)
            with fabric.autocast():
                losses = generator_losses(model, wrapped, x, recipe.quantizer, fabric, others=recipe.others_weight > 0)
            rising = min(1.0, step / max(1.0, recipe.warmup * recipe.steps))
            loss = (
                losses.faithfulness
                + rising * recipe.sparsity_weight * losses.density
                + recipe.class_weight * losses.class_relevance
                + recipe.auxiliary_weight * losses.auxiliary
                + recipe.others_weight * losses.others
            )
            terms = torch.stack([loss.detach(), *(term.detach() for term in losses)])
            terms = cast(Tensor, fabric.all_reduce(terms, reduce_op="mean"))
            log.append(dict(zip(_LOGGED, [step + 1, *(float(term) for term in terms)], strict=True)))
            bar.set_postfix(kept=f"{log[-1]['kept']:.3f}", density=f"{log[-1]['density']:.4f}")
            if not math.isfinite(log[-1]["loss"]):
                raise PathwayError(
                    f"the loss is {log[-1]['loss']} at step {step + 1}; lower the learning_rate "
                    f"({recipe.learning_rate}) or the weights of the terms"
                )
            optimiser.zero_grad()
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, optimiser, max_norm=1.0)
            optimiser.step()
            last = step + 1 == recipe.steps
            if checkpoint is not None and fabric.global_rank == 0 and (last or (step + 1) % store_every == 0):
                store_checkpoint(checkpoint, parts, noted, log)
    return network.eval().requires_grad_(False), log


def _noted(model: nn.Module, data: ImageSet, recipe: GeneratorRecipe) -> dict[str, Any]:
    """Return what decides a training, as plain values; 16 digits of a digest tell tensors apart."""
    target, images = digest_of(model.state_dict()), digest_of({"images": data.images})
    return describe(recipe) | {"target": target[:16], "images": images[:16]}


def _rate(progress: float) -> float:
    """Return the learning rate at a share of the training, relative to its peak."""
    if progress < 0.1:
        return (progress + 0.01) / 0.11
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (progress - 0.1) / 0.9))))


def _images(data: ImageSet, recipe: GeneratorRecipe, step: int) -> Tensor:
    """Return the images of a step, half of them mirrored: drawn from seed and step alone."""
    per_epoch = len(data) // recipe.batch_size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(data), generator=_generator(recipe.seed, epoch))
    images, _ = data[order[position * recipe.batch_size : (position + 1) * recipe.batch_size]]
    mirrored = torch.rand(len(images), generator=_generator(recipe.seed, epoch, position)) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def _generator(*seeds: int) -> torch.Generator:
    """Return a generator seeded by several numbers."""
    seed = 0
    for number in seeds:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def describe(recipe: GeneratorRecipe) -> dict[str, Any]:
    """Return a recipe as plain values, the quantiser by its name.

    Example:
        >>> describe(GeneratorRecipe())["quantizer"]
        'DistanceAwareQuantizer(gamma=2.0, sharpest=40.0)'
    """
    plain = {name: value for name, value in vars(recipe).items() if name not in ("shape", "quantizer")}
    return plain | {"shape": asdict(recipe.shape), "quantizer": repr(recipe.quantizer)}
