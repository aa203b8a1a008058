"""Does an attribution tell which pixels the response depends on? Remove pixels, and see what the network says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args, overload

import torch
from torch import Tensor, nn

from ..errors import PathwayError, require_at_least_one, require_choice
from ..neurons import Target, check_model, checked_logits, resolve_target, response
from .fills import NOISE, Fill, baseline, check_images, draw_noise, imputed
from .pathways import at_least_single

Order = Literal["morf", "lerf"]
Ranking = Literal["signed", "absolute", "strongest"]

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, eq=False)
class Degradation:
    """What a network says while pixels are removed: one curve per image.

    Attributes:
        fractions: share of the pixels removed, ``(F,)``.
        probability: softmax probability of the target, ``(B, F)``; of a network in half precision in single.
        kept: whether the target is what the network predicts, bool ``(B, F)``. With the predicted class as target:
            whether the prediction is kept; with the label: whether it is right.
        order: ``"morf"`` or ``"lerf"``.
        targets: class of each image, ``(B,)``.
    """

    fractions: Tensor
    probability: Tensor
    kept: Tensor
    order: Order
    targets: Tensor

    @property
    def area(self) -> Tensor:
        """Area under each probability curve divided by its width: the mean probability, ``(B,)``."""
        return _mean_height(self.fractions, self.probability)

    @property
    def kept_area(self) -> Tensor:
        """Area under each curve of :attr:`kept`, divided by its width, ``(B,)``."""
        return _mean_height(self.fractions, self.kept.to(self.probability))


def _mean_height(positions: Tensor, heights: Tensor) -> Tensor:
    if len(positions) == 1:
        return heights[:, 0]
    return torch.trapezoid(heights, positions) / (positions[-1] - positions[0])


def lerf_minus_morf(lerf: Degradation, morf: Degradation) -> Tensor:
    """Return how much better a map's least relevant pixels can be missed than its most relevant ones, ``(B,)``.

    The difference of the two areas, in [-1, 1]. A map that knows nothing has 0 on average, whatever the fill does.

    Raises:
        PathwayError: if the two are not a LeRF and a MoRF run of the same images, targets and fractions.

    Equation: A(LeRF) − A(MoRF), with A the mean target probability over the fractions removed.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
        >>> x = torch.rand(5, 3, 2, 2)
        >>> contribution = (x - x.mean((0, 2, 3), keepdim=True)) * (net[1].weight[0] - net[1].weight[1]).view(3, 2, 2)
        >>> runs = [degradation(net, x, contribution, 0, order=order) for order in ("lerf", "morf")]
        >>> bool((lerf_minus_morf(*runs) > 0).all())
        True
    """
    if (lerf.order, morf.order) != ("lerf", "morf"):
        raise PathwayError(
            f"the runs are {lerf.order!r} and {morf.order!r}; give the LeRF run first, then the MoRF run"
        )
    if not (torch.equal(lerf.fractions, morf.fractions) and torch.equal(lerf.targets, morf.targets)):
        raise PathwayError("the two runs are of different images, targets or fractions")
    return lerf.area - morf.area


def degradation(
    model: nn.Module,
    x: Tensor,
    attribution: Tensor,
    target: Target = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    order: Order = "morf",
    ranking: Ranking = "signed",
    fill: Fill = "mean",
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> Degradation:
    """Remove a growing share of the pixels in the order of an attribution, and follow the target's probability.

    Each fraction removes exactly ``round(fraction * pixels)`` pixels (halves round to even), all channels of each. At
    fraction 0 the network gets the image as it is, bit by bit.

    Args:
        model: a network in eval mode.
        x: images ``(B, C, H, W)``.
        attribution: one number per value of the images, ``(B, C, H, W)``, or per pixel, ``(B, 1, H, W)``.
        target: class or classes to follow; None: what the network predicts on the whole image.
        fractions: shares of the pixels to remove, in [0, 1], increasing.
        order: ``"morf"`` removes the most relevant pixels first, ``"lerf"`` the least relevant, in reverse order.
        ranking: how a pixel's channels become its relevance, see :func:`pixel_order`.
        fill: what takes the place of removed pixels, see :func:`pathwaylib.evaluation.fills.baseline`, or
            ``"noisy linear"``, see :func:`pathwaylib.evaluation.fills.noisy_linear`. ``"mean"`` takes the mean of the
            images given: give a data set's channel means as a tensor.
        generator: breaks ties and draws the fill's noise, image after image; None: the same way at every call (seed
            0), so that methods and orders are compared under the same draws.
        batch_size: degraded images in one run: bounds the memory.

    Returns:
        :class:`Degradation`.

    Raises:
        PathwayError: if the network, the images or a parameter cannot be used, the attribution does not fit or is not
            finite, or a target is out of range.

    Source: Samek et al., *Evaluating the Visualization of What a Deep Neural Network Has Learned* (2017); LeRF and the
    network-independent view: Ancona et al., ICLR 2018; noisy linear imputation: Rong et al., ICML 2022.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
        >>> x = torch.rand(5, 3, 2, 2)
        >>> curves = degradation(net, x, torch.randn(5, 3, 2, 2), fractions=(0, 0.5, 1))
        >>> curves.probability.shape, bool(curves.kept[:, 0].all())
        (torch.Size([5, 3]), True)
    """
    targets, _ = _prepared(model, x, target, batch_size)
    counts = _pixel_counts(fractions, x[0, 0].numel())
    require_choice("order", order, get_args(Order))
    removal = _Removal(x, attribution, order, ranking, fill, generator)
    runs = [(image, count) for image in range(len(x)) for count in counts]
    found = []
    for start in range(0, len(runs), batch_size):
        images, removed = zip(*runs[start : start + batch_size], strict=True)
        found.append(_logits(model, removal.images(torch.tensor(images), torch.tensor(removed))))
    logits = at_least_single(torch.cat(found)).view(len(x), len(counts), -1)
    probability = logits.softmax(-1).gather(2, targets[:, None, None].expand(-1, len(counts), 1))[..., 0]
    places = torch.tensor([float(fraction) for fraction in fractions]).to(probability)
    return Degradation(places, probability, logits.argmax(-1) == targets[:, None], order, targets)


def degraded(
    x: Tensor,
    attribution: Tensor,
    fraction: float,
    *,
    order: Order = "morf",
    ranking: Ranking = "signed",
    fill: Fill = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the images themselves as :func:`degradation` shows them to the network at one fraction.

    Args:
        x: images ``(B, C, H, W)``.
        attribution: ``(B, C, H, W)`` or ``(B, 1, H, W)``.
        fraction: share of the pixels to remove, in [0, 1].
        order: see :func:`degradation`, as are the others.
        ranking: how a pixel's channels become its relevance.
        fill: what takes the place of removed pixels.
        generator: breaks ties and draws the fill's noise.

    Raises:
        PathwayError: as :func:`degradation`.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> half = degraded(x, x, 0.5, fill=torch.zeros(3))
        >>> int((half == 0).sum())  # 8 pixels of 3 channels in 2 images
        48
    """
    check_images(x)
    require_choice("order", order, get_args(Order))
    (count,) = _pixel_counts([fraction], x[0, 0].numel())
    removal = _Removal(x, attribution, order, ranking, fill, generator)
    return removal.images(torch.arange(len(x)), torch.full((len(x),), count))


def pixel_order(
    attribution: Tensor, *, ranking: Ranking = "signed", generator: torch.Generator | None = None
) -> Tensor:
    """Return the place of each pixel in the order of relevance: 0 is the most relevant.

    A pixel is removed with all its channels, so it needs one number:

    - ``"signed"``: the sum over channels. What speaks against the target is the least relevant.
    - ``"absolute"``: the absolute value of that sum, the map that figures show. Right for attributions that add up.
    - ``"strongest"``: the largest absolute value of a channel, as is usual for gradients: there opposite signs in two
      channels are an edge between colours, which a sum would hide.

    Pixels that tie are ordered at random, each image on its own.

    Args:
        attribution: ``(B, C, H, W)``.
        ranking: see above.
        generator: breaks ties, image after image; None: the same way at every call (seed 0).

    Returns:
        int64 tensor ``(B, H, W)``, of each image a permutation of the numbers from 0.

    Raises:
        PathwayError: if the attribution is no batch of maps or not finite, or the ranking is unknown.

    Example:
        >>> pixel_order(torch.tensor([[[[1.0, -5.0], [3.0, 0.0]]]]))
        tensor([[[1, 3],
                 [0, 2]]])
        >>> pixel_order(torch.tensor([[[[1.0, -5.0], [3.0, 0.0]]]]), ranking="absolute")
        tensor([[[2, 0],
                 [1, 3]]])
    """
    if attribution.ndim != 4 or not attribution.numel():
        raise PathwayError(
            f"the attribution has shape {tuple(attribution.shape)}; give (batch, channels, height, width)"
        )
    require_choice("ranking", ranking, get_args(Ranking))
    return _places(attribution, ranking, generator or torch.Generator().manual_seed(0))


def _places(attribution: Tensor, ranking: Ranking, generator: torch.Generator) -> Tensor:
    values = _per_pixel(attribution)
    if ranking == "strongest":
        values = attribution.detach().to(values).abs().amax(1)
    elif ranking == "absolute":
        values = values.abs()
    flat = values.flatten(1)
    pixels = flat.shape[1]
    # A random order first, which a stable sort keeps among equals.
    shuffled = torch.stack([torch.randperm(pixels, generator=generator, device=generator.device) for _ in flat]).to(
        flat.device
    )
    sorted_ = flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    ordered = shuffled.gather(1, sorted_)
    places = torch.arange(pixels, device=flat.device).expand_as(ordered)
    return torch.empty_like(ordered).scatter_(1, ordered, places).view(values.shape)


def _per_pixel(attribution: Tensor) -> Tensor:
    """Sum attributions over channels, in single precision at least."""
    if not bool(attribution.isfinite().all()):
        raise PathwayError("the attribution holds NaN or infinity")
    return attribution.detach().to(torch.promote_types(attribution.dtype, torch.float32)).sum(1)


class _Removal:
    """Images, the order in which they lose their pixels, and what takes their place."""

    def __init__(
        self,
        x: Tensor,
        attribution: Tensor,
        order: Order,
        ranking: Ranking,
        fill: Fill,
        generator: torch.Generator | None,
    ) -> None:
        generator = generator or torch.Generator().manual_seed(0)
        _check_attribution(x, attribution)
        require_choice("ranking", ranking, get_args(Ranking))
        self.x = x.detach()
        noisy = isinstance(fill, str) and fill == "noisy linear"
        self.baseline = None if noisy else baseline(x, fill)
        places, noise = [], []
        for image, values in zip(self.x.split(1), attribution.split(1), strict=True):
            places.append(_places(values.to(x.device), ranking, generator))
            if noisy:  # the same noise at every fraction
                noise.append(NOISE * draw_noise(image, generator))
        self.places = torch.cat(places)
        self.noise = torch.cat(noise) if noisy else None
        if order == "lerf":
            self.places = x[0, 0].numel() - 1 - self.places

    def images(self, index: Tensor, counts: Tensor) -> Tensor:
        """Return the images of that index, each without its first ``counts`` pixels."""
        index = index.to(self.x.device)
        chosen, removed = self.x[index], self.places[index] < counts.to(self.x.device)[:, None, None]
        if self.noise is not None:
            return imputed(chosen, removed, self.noise[index])
        assert self.baseline is not None
        return torch.where(removed[:, None], self.baseline[index], chosen)


@dataclass(frozen=True, eq=False)
class SensitivityN:
    """How well the sums of an attribution predict the drops of the response, for subsets of n pixels.

    Attributes:
        n: numbers of pixels removed.
        correlation: Pearson correlation over the subsets, ``(B, len(n))``.
    """

    n: tuple[int, ...]
    correlation: Tensor


@overload
def sensitivity_n(
    model: nn.Module,
    x: Tensor,
    attribution: Tensor,
    target: Target = None,
    *,
    n: Sequence[int] | None = None,
    subsets: int = 100,
    fill: Fill = "mean",
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> SensitivityN: ...


@overload
def sensitivity_n(
    model: nn.Module,
    x: Tensor,
    attribution: Mapping[str, Tensor],
    target: Target = None,
    *,
    n: Sequence[int] | None = None,
    subsets: int = 100,
    fill: Fill = "mean",
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> dict[str, SensitivityN]: ...


def sensitivity_n(
    model: nn.Module,
    x: Tensor,
    attribution: Tensor | Mapping[str, Tensor],
    target: Target = None,
    *,
    n: Sequence[int] | None = None,
    subsets: int = 100,
    fill: Fill = "mean",
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> SensitivityN | dict[str, SensitivityN]:
    """Correlate the sum of the attribution over random sets of n pixels with what the response loses without them.

    For a linear network and attributions ``weight × (image − fill)`` the correlation is 1 for every n. It asks for more
    than an order: the values must add up. The correlation is 0, by definition, where one side does not vary beyond
    its rounding: for a constant map, every sum of n values is the same.

    Args:
        model: a network in eval mode.
        x: images ``(B, C, H, W)``.
        attribution: ``(B, C, H, W)`` or ``(B, 1, H, W)``; or several by name, which are then judged on the same subsets
            and share the runs of the network.
        target: class or classes; None: what the network predicts on the whole image.
        n: numbers of pixels to remove; ten from 1 to 0.8 of all, evenly spaced in their logarithm, if left out.
        subsets: sets drawn for each image and n, at least 2.
        fill: what takes the place of removed pixels, see :func:`pathwaylib.evaluation.fills.baseline`. Attributions
            that have a baseline should be asked with it (input × gradient with black: ``torch.zeros(1)``).
        generator: draws the subsets, image after image; None draws the same ones at every call (seed 0).
        batch_size: degraded images in one run: bounds the memory.

    Returns:
        :class:`SensitivityN`, or one for each name.

    Raises:
        PathwayError: if the network, the images or a parameter cannot be used, an attribution does not fit or is not
            finite, or a target is out of range.

    Equation: corr of Σ_{p ∈ S} r_p with Φ_t(x) − Φ_t(x without S), over random sets S of n pixels.

    Source: Ancona et al., *Towards better understanding of gradient-based attribution methods* (ICLR 2018).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(27, 4)).double().eval()
        >>> x = torch.rand(2, 3, 3, 3, dtype=torch.float64)
        >>> contribution = net[1].weight[1].view(3, 3, 3) * x
        >>> found = sensitivity_n(net, x, contribution, 1, fill=torch.zeros(1))
        >>> torch.allclose(found.correlation, torch.ones(2, len(found.n), dtype=torch.float64))
        True
    """
    targets, whole = _prepared(model, x, target, batch_size)
    named = attribution if isinstance(attribution, Mapping) else {"": attribution}
    if not named:
        raise PathwayError("there is no attribution; give a tensor, or a dictionary such as {'gradient': gradients}")
    pixels = x[0, 0].numel()
    given = _subset_sizes(pixels) if n is None else n
    sizes = tuple(given) if isinstance(given, Iterable) else ()
    if not sizes or any(isinstance(size, bool) or size not in range(1, pixels + 1) for size in sizes):
        raise PathwayError(f"n is {n}; give whole numbers from 1 to {pixels}, the number of pixels")
    sizes = tuple(map(int, sizes))  # 2.0 is a whole number too
    require_at_least_one(subsets=subsets)
    if subsets < 2:
        raise PathwayError("one subset has no correlation; give subsets of at least 2, better 100")
    for values in named.values():
        _check_attribution(x, values)
    scores = torch.stack([_per_pixel(values).flatten(1).double().cpu() for values in named.values()], 2)
    instead = baseline(x, fill)
    generator = generator or torch.Generator().manual_seed(0)
    correlation = torch.zeros(len(x), len(sizes), len(named), dtype=torch.float64)
    for image in range(len(x)):
        for position, size in enumerate(sizes):
            removed = _subsets(subsets, size, pixels, generator)
            drop = torch.cat(
                [
                    whole[image] - response(_logits(model, images), targets[image].expand(len(images)))
                    for images in _without(x[image].detach(), instead[image], removed, batch_size)
                ]
            )
            noise = 4 * torch.finfo(drop.dtype).eps * float(whole[image].abs() + drop.abs().max())
            correlation[image, position] = _pearson(scores[image], removed.cpu(), drop.double().cpu(), noise)
    found = {name: SensitivityN(sizes, correlation[:, :, index].to(x)) for index, name in enumerate(named)}
    return found if isinstance(attribution, Mapping) else found[""]


def _subset_sizes(pixels: int) -> tuple[int, ...]:
    largest = max(1, int(0.8 * pixels))
    spaced = [round(math.exp(step / 9 * math.log(largest))) for step in range(10)]
    return tuple(sorted(set(spaced)))


def _subsets(count: int, size: int, pixels: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` sets of ``size`` pixels, as truth values ``(count, pixels)``."""
    keys = torch.rand(count, pixels, generator=generator, device=generator.device)
    chosen = keys.topk(size, 1, sorted=False).indices
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(1, chosen, True)


def _without(image: Tensor, instead: Tensor, removed: Tensor, batch_size: int) -> Iterator[Tensor]:
    for masks in removed.to(image.device).split(batch_size):
        yield torch.where(masks.view(-1, 1, *image.shape[1:]), instead, image)


def _pearson(scores: Tensor, removed: Tensor, drop: Tensor, noise: float) -> Tensor:
    """Correlate the sums of each map's ``scores`` ``(P, M)`` over the sets with ``drop`` ``(S,)``; 0 for a constant."""
    # Moving a map by a constant moves every sum of a set of n by the same amount; without it they are more exact.
    sums = removed.double() @ (scores - scores.mean(0))
    # Rounding alone makes the sums of a constant map differ a little.
    rounding = 1e-12 * int(removed[0].sum()) * scores.abs().amax(0)
    sums, drop = sums - sums.mean(0), drop - drop.mean()
    spread, spread_of_drop = sums.square().mean(0).sqrt(), drop.square().mean().sqrt()
    covariance = (sums * drop[:, None]).mean(0)
    varies = (spread > rounding) & (spread_of_drop > noise)
    return torch.where(varies, covariance / torch.where(varies, spread * spread_of_drop, 1.0), 0.0).clamp(-1, 1)


# --- Shared checks ---------------------------------------------------------------------------------------------------


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return checked_logits(model, images, model(images))


def _prepared(model: nn.Module, x: Tensor, target: Target, batch_size: int) -> tuple[Tensor, Tensor]:
    """Check what was given; return the targets and the responses on the whole images."""
    check_model(model, x)
    check_images(x)
    require_at_least_one(batch_size=batch_size)
    # A network may change its input in place; the caller's images stay as they are.
    logits = torch.cat([_logits(model, part.clone()) for part in x.detach().split(batch_size)])
    targets = resolve_target(logits, target)
    return targets, response(logits, targets)


def _check_attribution(x: Tensor, attribution: Tensor) -> None:
    fits = attribution.ndim == 4 and attribution.shape[1] in (1, x.shape[1])
    if not fits or (len(attribution), *attribution.shape[2:]) != (len(x), *x.shape[2:]):
        raise PathwayError(
            f"the attribution has shape {tuple(attribution.shape)} for images {tuple(x.shape)}; give one number per "
            f"value, or per pixel: ({len(x)}, 1, {x.shape[2]}, {x.shape[3]})"
        )


def _pixel_counts(fractions: Sequence[float], pixels: int) -> tuple[int, ...]:
    """Return how many pixels each fraction removes, exactly rounded."""
    try:
        given = [float(fraction) for fraction in fractions]
    except (TypeError, ValueError):
        given = []
    if not given or not all(0 <= fraction <= 1 for fraction in given) or sorted(set(given)) != given:
        raise PathwayError(f"fractions are {fractions}; give increasing numbers in [0, 1], such as (0, 0.1, 0.2)")
    return tuple(round(Fraction(str(fraction)) * pixels) for fraction in given)
