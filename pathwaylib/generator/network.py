"""The generator network: embed each site's maps, let shallow sites see class evidence, decode one score per neuron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import PathwayError, require_at_least_one
from ..neurons import observe
from ..seeds import seeded

_GAIN = 5.0  # scores have to cross from "all kept" to "few kept" in a few hundred small steps


@dataclass(frozen=True)
class GeneratorShape:
    """The sizes of a generator network.

    Attributes:
        width: entries d of a token.
        side: pixels s of the smallest maps, per side.
        heads: attention heads; they divide ``width``.
        deep_sites: how many of the last sites give class evidence to all.
        context: whether sites see that evidence at all; without it (an ablation) each site is decoded from its own
            tokens.
        chosen_sites: how many of the first sites the pathway is chosen at; at later ones every neuron is kept. None:
            all sites.

    Raises:
        PathwayError: if a size is out of range.

    Example:
        >>> GeneratorShape(width=32).side
        4
    """

    width: int = 64
    side: int = 4
    heads: int = 1
    deep_sites: int = 2
    context: bool = True
    chosen_sites: int | None = None

    def __post_init__(self) -> None:
        require_at_least_one(width=self.width, side=self.side, heads=self.heads, deep_sites=self.deep_sites)
        if self.chosen_sites is not None:
            require_at_least_one(chosen_sites=self.chosen_sites)
        if self.width % self.heads:
            raise PathwayError(f"width {self.width} is not a multiple of heads {self.heads}")


class RecursiveEmbedder(nn.Module):
    """Shrink a site's maps to ``side`` × ``side`` with one convolution used again and again; a token per channel.

    The convolution is grouped by channel and halves the maps; its weights are shared by all steps, so the number of
    parameters depends on the channels and not on the size of the maps.

    Args:
        channels: C, the channels of the site.
        width: entries d of a token.
        side: s, pixels per side of the smallest maps.

    Example:
        >>> tokens, pyramid = RecursiveEmbedder(8, 16, 4)(torch.rand(2, 8, 32, 32))
        >>> tokens.shape, [maps.shape[2] for maps in pyramid]
        (torch.Size([2, 8, 16]), [32, 16, 8, 4])
    """

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.halve = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels)
        self.project = nn.Linear(side * side, width)

    def forward(self, maps: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return tokens ``(B, C, d)``, and the maps of every step, the largest first."""
        pyramid = [maps]
        while max(pyramid[-1].shape[2:]) > self.side:
            pyramid.append(F.gelu(self.halve(pyramid[-1])))
        smallest = F.adaptive_avg_pool2d(pyramid[-1], self.side)
        return self.project(smallest.flatten(2)), pyramid


class PathwayDistillation(nn.Module):
    """Let the tokens of every site look at those of the deepest sites, and name the class they show.

    One cross-attention and one feed-forward layer, shared by all sites. The auxiliary head predicts the target's class
    from the pooled deep tokens; it makes sure that they carry it.

    Args:
        shape: sizes of the generator.
        classes: K, number of logits of the target.

    Example:
        >>> tokens = [torch.rand(2, 8, 64), torch.rand(2, 16, 64)]
        >>> mixed, logits = PathwayDistillation(GeneratorShape(deep_sites=1), 10)(tokens)
        >>> [part.shape for part in mixed], logits.shape
        ([torch.Size([2, 8, 64]), torch.Size([2, 16, 64])], torch.Size([2, 10]))
    """

    def __init__(self, shape: GeneratorShape, classes: int) -> None:
        super().__init__()
        self.shape = shape
        self.before = nn.LayerNorm(shape.width)
        self.attend = nn.MultiheadAttention(shape.width, shape.heads, batch_first=True)
        self.feed = nn.Sequential(
            nn.LayerNorm(shape.width),
            nn.Linear(shape.width, 2 * shape.width),
            nn.GELU(),
            nn.Linear(2 * shape.width, shape.width),
        )
        self.classify = nn.Linear(shape.width, classes)

    def forward(self, tokens: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the tokens with what they saw, and the class logits ``(B, K)``."""
        sizes = [part.shape[1] for part in tokens]
        every = torch.cat(list(tokens), 1)
        normed = self.before(every)
        deep = normed[:, -sum(sizes[-self.shape.deep_sites :]) :]
        if self.shape.context:
            every = every + self.attend(normed, deep, deep, need_weights=False)[0]
        mixed = every + self.feed(every)
        return list(mixed.split(sizes, 1)), self.classify(deep.mean(1))


class RecursivePathwayDecoder(nn.Module):
    """The embedder's mirror: from tokens back to one score per neuron.

    One convolution, grouped by channel and shared by all steps, after each doubling; each step adds the embedder's maps
    of that size, weighted by channel, so that the fine steps know where the activations are (ours).

    Args:
        channels: C, the channels of the site.
        width: entries d of a token.
        side: s, pixels per side of the smallest maps.

    Example:
        >>> tokens, pyramid = RecursiveEmbedder(8, 16, 4)(torch.rand(2, 8, 32, 32))
        >>> RecursivePathwayDecoder(8, 16, 4)(tokens, pyramid).shape
        torch.Size([2, 8, 32, 32])
    """

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.expand = nn.Linear(width, side * side)
        self.refine = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.skip = nn.Parameter(torch.full((channels, 1, 1), 0.1))
        self.bias = nn.Parameter(torch.full((channels, 1, 1), 1 / _GAIN))  # at first everything is kept

    def forward(self, tokens: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """Return scores shaped like the largest maps of ``pyramid``."""
        maps = self.expand(tokens).unflatten(2, (self.side, self.side))
        height, width = pyramid[-1].shape[2:]
        maps = F.adaptive_avg_pool2d(maps, (height, width)) + self.skip * pyramid[-1]
        for finer in reversed(pyramid[:-1]):
            maps = F.interpolate(F.gelu(maps), size=finer.shape[2:], mode="nearest")
            maps = self.refine(maps) + self.skip * finer
        return cast(Tensor, _GAIN * (maps + self.bias))


class Generated(NamedTuple):
    """What a generator network returns.

    Attributes:
        scores: one tensor per site, shaped like its activations; above 0 means keep.
        logits: the auxiliary head's class logits ``(B, K)``.
        chosen: at how many of the first sites the generator chooses.
    """

    scores: tuple[Tensor, ...]
    logits: Tensor
    chosen: int


class GeneratorNetwork(nn.Module):
    """Read the activations of a target network at all its sites; return a score for every neuron.

    Activations → :class:`RecursiveEmbedder` per site → tokens → :class:`PathwayDistillation` over all sites →
    :class:`RecursivePathwayDecoder` per site → scores. It is built from the shapes that a run of the target shows, so
    any target that :func:`pathwaylib.observe` understands will do; a vector counts as maps of one pixel.

    Args:
        sites: name of each site of the target.
        shapes: shape of each site's activations, without the batch: ``(C, H, W)`` or ``(C,)``.
        classes: K, number of logits of the target.
        shape: sizes of the generator.

    Raises:
        PathwayError: if a site's activations are neither maps nor vectors.

    Source: Lin, Bao, Yu, Kong, *On Model Explanations with Transferable Neural Pathways* (2023). Normalisation of the
    activations, channel embeddings, skip connections and the auxiliary head are ours.

    Example:
        >>> from pathwaylib import load_model, observe
        >>> target = load_model("planted-cnn")
        >>> network = GeneratorNetwork.like(target, torch.rand(1, 3, 32, 32))
        >>> [tuple(s.shape) for s in network(observe(target, torch.rand(2, 3, 32, 32)).post).scores][:2]
        [(2, 16, 32, 32), (2, 32, 32, 32)]
    """

    def __init__(
        self, sites: Sequence[str], shapes: Sequence[Sequence[int]], classes: int, shape: GeneratorShape | None = None
    ) -> None:
        super().__init__()
        unusable = [tuple(size) for size in shapes if len(size) not in (1, 3)]
        if unusable:
            raise PathwayError(f"sites of shape {unusable}; a generator reads maps (C, H, W) and vectors (C,)")
        self.sites, self.shape = tuple(sites), shape or GeneratorShape()
        self.shapes, self.classes = tuple(tuple(size) for size in shapes), classes
        width, side = self.shape.width, self.shape.side
        channels = [size[0] for size in self.shapes]
        self.embedders = nn.ModuleList(RecursiveEmbedder(count, width, side) for count in channels)
        # Tokens are a set to the attention: the embedding tells it which channel of which site each one is.
        self.names = nn.ParameterList(nn.Parameter(0.02 * torch.randn(count, width)) for count in channels)
        self.distillation = PathwayDistillation(self.shape, classes)
        chosen = channels[: self.shape.chosen_sites]
        self.decoders = nn.ModuleList(RecursivePathwayDecoder(count, width, side) for count in chosen)

    @classmethod
    def like(
        cls, model: nn.Module, x: Tensor, shape: GeneratorShape | None = None, *, seed: int = 0
    ) -> GeneratorNetwork:
        """Build a generator for ``model`` from one run on ``x``, with weights drawn from ``seed``.

        Raises:
            PathwayError: as :func:`pathwaylib.observe` and the constructor.
        """
        with torch.no_grad():
            seen = observe(model, x[:1])
        with seeded(seed):
            network = cls(seen.sites, [a.shape[1:] for a in seen.post], seen.logits.shape[1], shape)
        return network.to(x.device)

    def forward(self, activations: Sequence[Tensor]) -> Generated:
        """Return scores and class logits.

        Args:
            activations: of each site ``(B, C, H, W)`` or ``(B, C)``.

        Raises:
            PathwayError: if the activations are not those of the target the generator was built for, or the scores
                are NaN.
        """
        found = tuple(tuple(a.shape[1:]) for a in activations)
        if found != self.shapes:
            raise PathwayError(f"activations of shapes {found}; this generator was built for {self.shapes}")
        tokens, pyramids = [], []
        for a, embed, name in zip(activations, self.embedders, self.names, strict=True):
            maps = (a if a.ndim == 4 else a[:, :, None, None]).to(self.distillation.classify.weight.dtype)
            # Activations of different sites differ by orders of magnitude.
            maps = maps / maps.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
            token, pyramid = embed(maps)
            tokens.append(token + cast(Tensor, name))
            pyramids.append(pyramid)
        mixed, logits = self.distillation(tokens)
        scores = [
            decode(token, pyramid).view_as(a)
            for decode, token, pyramid, a in zip(self.decoders, mixed, pyramids, activations, strict=False)
        ]
        scores += [torch.ones_like(a) for a in activations[len(scores) :]]  # where nothing is chosen
        if any(bool(score.isnan().any()) for score in scores):  # would keep no neuron, in silence
            raise PathwayError("the generator's scores are NaN; train it anew with a lower learning_rate")
        return Generated(tuple(scores), logits, len(self.decoders))
