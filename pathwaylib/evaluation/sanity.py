"""Does a map depend on what the network has learnt? Sanity checks by parameter randomisation, and how maps compare.

The weights are drawn anew layer by layer, from the output to the input, and the same class is explained again. A map
that stays what it was owes nothing to the weights that are gone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from scipy.stats import rankdata
from skimage.feature import hog
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..errors import PathwayError, require_at_least_one
from ..explainers import Explainer, explain
from ..neurons import Target, check_model, copied, targets_of
from ..pathway import Pathway
from ..selectors import Selector
from ..training import initialise
from .statistics import Interval, bootstrap_interval

# --- How alike two maps are ------------------------------------------------------------------------------------------


def normalised_maps(maps: Tensor, *, absolute: bool = False, percentile: float = 100.0) -> Tensor:
    """Return attributions as maps of one channel between -1 and 1, as similarities take them.

    Channels are summed, then, where ``absolute``, signs are dropped. Each map is divided by its own largest absolute
    value, or by a percentile of them; what lies beyond is clipped. A map whose values differ by no more than rounding
    has no pattern: it becomes a map of zeros.

    Args:
        maps: attributions ``(B, C, H, W)`` or ``(B, H, W)``.
        absolute: take absolute values, after summing the channels.
        percentile: of the absolute values, in (0, 100]: the size that becomes 1. At 100 nothing is clipped.

    Returns:
        float64 ``(B, H, W)``, in [-1, 1], or in [0, 1] where ``absolute``.

    Raises:
        PathwayError: if these are no maps, they hold NaN or infinity, or ``percentile`` is out of range.

    Example:
        >>> normalised_maps(torch.tensor([[[1.0, -4.0], [0.0, 2.0]]]))
        tensor([[[ 0.2500, -1.0000],
                 [ 0.0000,  0.5000]]], dtype=torch.float64)
        >>> normalised_maps(torch.full((1, 3, 2, 2), 7.0)).count_nonzero()
        tensor(0)
    """
    if not 0 < percentile <= 100:
        raise PathwayError(f"percentile is {percentile}; give a number above 0 and at most 100")
    if maps.ndim not in (3, 4) or not maps.numel() or not maps.is_floating_point():
        raise PathwayError(
            f"the maps are {maps.dtype} of shape {tuple(maps.shape)}; give floats (batch, channels, height, width), "
            "or without channels"
        )
    if not bool(maps.isfinite().all()):
        raise PathwayError("the maps hold NaN or infinity; see which explainer made them")
    values = maps.detach().double()
    values = values.sum(1) if values.ndim == 4 else values
    flat = (values.abs() if absolute else values).flatten(1)
    sizes = flat.abs()
    largest = sizes.amax(1, keepdim=True)
    scale = sizes.kthvalue(math.ceil(percentile / 100 * sizes.shape[1]), 1, keepdim=True).values
    scale = torch.where(scale > 0, scale, largest)  # a sparse map has nothing but its largest value to go by
    low, high = flat.aminmax(dim=1, keepdim=True)
    patterned = high - low > 8 * torch.finfo(maps.dtype).eps * largest
    return torch.where(patterned, flat / scale, 0.0).clamp(-1, 1).view_as(values)


@dataclass(frozen=True)
class Similarity:
    """A measure of how alike two maps of one image are, in two steps, so that each map is described only once.

    A map without any pattern is compared by rule: two of them have the similarity 1, one of them and a map with a
    pattern have 0. (Ranks and correlations of a constant are undefined.)

    Attributes:
        describe: makes descriptions ``(B, ...)`` of maps ``(B, C, H, W)`` or ``(B, H, W)``, constant where a map has no
            pattern.
        compare: makes one number per image, ``(B,)``, of the descriptions of two maps each.

    Example:
        >>> gradient = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> SIMILARITIES["Spearman"](gradient, -gradient).mean()
        tensor(-1.0000, dtype=torch.float64)
        >>> SIMILARITIES["SSIM"](gradient, torch.zeros_like(gradient)).tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """

    describe: Callable[[Tensor], Tensor]
    compare: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the similarity of two maps of each image, ``(B,)``.

        Raises:
            PathwayError: if these are no maps, or not of the same images.
        """
        if one.shape[:1] + one.shape[-2:] != other.shape[:1] + other.shape[-2:]:
            raise PathwayError(
                f"maps of shapes {tuple(one.shape)} and {tuple(other.shape)} are compared; give two of each image"
            )
        return self.between(self.describe(one), self.describe(other))

    def between(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the similarity of what ``describe`` made of two maps of each image, ``(B,)``."""
        blank, blank_too = _is_constant(one), _is_constant(other)
        found = torch.where(blank | blank_too, 0.0, self.compare(one, other))
        return torch.where(blank & blank_too, 1.0, found)


def _is_constant(descriptions: Tensor) -> Tensor:
    low, high = descriptions.flatten(1).aminmax(dim=1)
    return low == high


def _ranks(maps: Tensor) -> Tensor:
    """Rank the pixels of each map, ties at their mean rank."""
    return _standardised(torch.from_numpy(rankdata(maps.flatten(1).cpu().numpy(), axis=1)).to(maps.device))


def _standardised(rows: Tensor) -> Tensor:
    """Centre each row and give it length 1, so that Pearson's correlation is a scalar product."""
    centred = rows - rows.mean(1, keepdim=True)
    centred[_is_constant(rows)] = 0
    return F.normalize(centred, dim=1)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(1).clamp(-1, 1)


def _hog(maps: Tensor) -> Tensor:
    """Return the histogram of oriented gradients of each map."""
    cell = max(1, min(8, min(maps.shape[1:]) // 3))
    try:
        found = [hog(values, pixels_per_cell=(cell, cell)) for values in maps.cpu().numpy()]
    except ValueError as error:
        raise PathwayError(f"maps of {tuple(maps.shape[1:])} pixels have no HOG ({error}); leave it out") from error
    return _standardised(torch.from_numpy(np.stack(found)).to(maps))


def _ssim(data_range: float) -> Callable[[Tensor, Tensor], Tensor]:
    def compare(one: Tensor, other: Tensor) -> Tensor:
        window = min(7, (min(one.shape[1:]) - 1) // 2 * 2 + 1)  # odd, and no larger than the map
        if window < 3:
            raise PathwayError(f"maps of {tuple(one.shape[1:])} pixels are too small for SSIM; leave it out")
        pairs = zip(one.cpu().numpy(), other.cpu().numpy(), strict=True)
        of_pair: Callable[..., float] = structural_similarity
        found = [of_pair(a, b, data_range=data_range, win_size=window) for a, b in pairs]
        return torch.tensor(found, dtype=one.dtype, device=one.device)

    return compare


SIMILARITIES: Mapping[str, Similarity] = MappingProxyType(
    {
        "SSIM": Similarity(normalised_maps, _ssim(2.0)),
        "SSIM absolute": Similarity(lambda maps: normalised_maps(maps, absolute=True), _ssim(1.0)),
        "Spearman": Similarity(lambda maps: _ranks(normalised_maps(maps)), _correlation),
        "Spearman absolute": Similarity(lambda maps: _ranks(normalised_maps(maps, absolute=True)), _correlation),
        "HOG": Similarity(lambda maps: _hog(normalised_maps(maps)), _correlation),
    }
)
"""Similarities of two maps by name, all on :func:`normalised_maps`; 1 for equal maps, NaN for none.

- ``SSIM``: structural similarity (Wang et al. 2004) of the signed maps, mean over windows of 7 × 7 pixels, with a data
  range of 2; ``SSIM absolute`` of the absolute maps, with a data range of 1. By SciKit-image. It was made for
  brightness, which has no sign: in a window whose mean and pattern both change sign, two factors of -1 make 1.
- ``Spearman``: correlation of the ranks of the signed pixels, ties at their mean rank; ``Spearman absolute`` of the
  absolute ones. By SciPy.
- ``HOG``: Pearson correlation of the histograms of oriented gradients (Dalal and Triggs 2005) of the signed maps, cells
  of 8 × 8 pixels (smaller for maps below 24), blind to a change of sign. By SciKit-image.
"""


def unrelated_similarity(
    maps: Tensor, *, similarities: Mapping[str, Similarity] = SIMILARITIES, partners: int = 3, seed: int = 0
) -> dict[str, Tensor]:
    """Return how alike the maps of *different* images are: the floor that a similarity is to be read against.

    Two maps that have nothing to do with each other do not score 0: they share the habits of their method, such as
    smoothness, a sign, or weight in the middle.

    Args:
        maps: of one method, ``(B, C, H, W)`` or ``(B, H, W)``, of at least two images.
        similarities: measures by name.
        partners: other images that each image is compared with, fewer than there are images.
        seed: draws the partners.

    Returns:
        By measure, the mean over an image's partners, ``(B,)``.

    Raises:
        PathwayError: if there are not more images than partners, or these are no maps.

    Example:
        >>> noise = torch.rand(8, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> bool(unrelated_similarity(noise)["Spearman"].max() < 0.1)
        True
        >>> bool(unrelated_similarity(noise.cumsum(1))["Spearman"].min() > 0.9)  # all of them grow downwards
        True
    """
    require_at_least_one(partners=partners)
    if len(maps) <= partners:
        raise PathwayError(f"{len(maps)} images cannot have {partners} partners each; give more images, or fewer")
    # A ring in random order: each distance along it gives every image another one.
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    found = {}
    for name, similarity in similarities.items():
        described = similarity.describe(maps)
        around = described[order.to(described.device)]
        each = [
            similarity.between(described, around.roll(step, 0)[place.to(described.device)])
            for step in range(1, partners + 1)
        ]
        found[name] = torch.stack(each).mean(0)
    return found


# --- Networks that have forgotten ------------------------------------------------------------------------------------

MODES = ("cascading", "independent")
_Description = TypeVar("_Description", Tensor, Pathway)


def randomisable_layers(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Return the names of a network's layers, from the output back to the input.

    A layer is a module with parameters of its own (with all that it holds), together with the normalisations that run
    right after it: a convolution and its batch normalisation are one map. The order is that of a run on one image,
    not of registration; a module that runs several times stands where it runs last; one that does not run is none.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``; the first is run.

    Raises:
        PathwayError: if ``model`` or ``x`` cannot be used, or no module with parameters ran.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> randomisable_layers(net.eval(), torch.rand(1, 3, 4, 4))
        ('4', '0')
    """
    return tuple(_layers(model, x))


def randomised(
    model: nn.Module,
    x: Tensor,
    *,
    mode: str = "cascading",
    seed: int = 0,
    layers: Sequence[str] | None = None,
    calibration: Tensor | None = None,
) -> Iterator[tuple[str, nn.Module]]:
    """Return copies of a network whose layers have forgotten what they learnt, from the output to the input.

    A layer forgets by its own ``reset_parameters``: it gets weights from the distribution that a fresh layer of its
    kind has. Batch normalisation becomes the identity: scale 1, shift 0, running mean 0, running variance 1. PyTorch's
    fresh convolutions shrink their input, so after a cascade through many layers the values are small (similarities
    do not mind) and, with no mean to centre them, many neurons are on or off whatever the image (which similarities
    may mind). With ``calibration`` the statistics of forgetful normalisations are measured anew, on those images.

    Args:
        model: a network in eval mode; it stays as it is.
        x: images ``(B, ...)``; the first is run to find the order of the layers.
        mode: ``"cascading"``: all layers from the output down to the one named have forgotten; ``"independent"``: the
            one named has, the others keep their weights.
        seed: of the weights. A layer draws the same ones in both modes.
        layers: names of layers to stop at, of :func:`randomisable_layers`; None: all. A cascade goes through the
            others too.
        calibration: images to measure the statistics of forgetful batch normalisations on; None: they keep those of
            a fresh one.

    Returns:
        An iterator over the name of a layer and a copy of the network, in eval mode; each copy is the caller's own.

    Raises:
        PathwayError: if ``model`` or ``x`` cannot be used, ``mode`` or a layer is unknown, or a layer cannot draw its
            weights again.

    Source: Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim, *Sanity Checks for Saliency Maps* (NeurIPS 2018).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
        >>> for name, changed in randomised(net, torch.rand(1, 4)):
        ...     print(name, [bool((changed[i].weight == net[i].weight).all()) for i in (0, 2)])
        2 [True, False]
        0 [False, False]
    """
    if mode not in MODES:
        raise PathwayError(f"mode is {mode!r}; give one of {', '.join(map(repr, MODES))}")
    found = _layers(model, x)
    stops = list(found) if layers is None else list(layers)
    if not stops or not set(stops) <= set(found):
        raise PathwayError(f"layers is {stops}; the network has {', '.join(map(repr, found))}")
    for name in itertools.chain.from_iterable(found.values()):
        module = model.get_submodule(name)
        if not callable(getattr(module, "reset_parameters", None)):
            raise PathwayError(
                f"layer {name!r} is a {type(module).__name__} without reset_parameters, so it cannot draw its weights "
                "again; give its class that method"
            )
    return _forgetful_copies(model, found, mode, seed, stops, calibration)


def _forgetful_copies(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    mode: str,
    seed: int,
    stops: Sequence[str],
    calibration: Tensor | None,
) -> Iterator[tuple[str, nn.Module]]:
    seeds = torch.randint(2**31, (len(layers),), generator=torch.Generator().manual_seed(seed)).tolist()
    changed = copied(model)
    forgetful: list[nn.Module] = []
    for (layer, names), own_seed in zip(layers.items(), seeds, strict=True):
        if mode == "independent":
            changed, forgetful = copied(model), []
        modules = nn.ModuleList(changed.get_submodule(name) for name in names)
        # On the CPU, so that every device gets the same weights; into the old tensors, so that shared ones stay shared.
        modules.load_state_dict(_fresh(modules, names, own_seed).state_dict())
        forgetful.extend(modules)
        if layer in stops:
            if calibration is not None:
                _measure_statistics(changed, forgetful, calibration)
            yield layer, copied(changed)


def _fresh(modules: nn.ModuleList, names: Sequence[str], seed: int) -> nn.Module:
    """Return copies of modules, on the CPU, that have drawn new weights."""
    fresh = copied(modules).cpu()
    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.ndim > 1:
                parameter.fill_(torch.nan)  # shows where a reset does not reach; it may draw equal weights by design
    initialise(fresh, seed)
    for name, module in zip(names, fresh, strict=True):
        if any(bool(parameter.isnan().any()) for parameter in module.parameters() if parameter.ndim > 1):
            raise PathwayError(
                f"layer {name!r} keeps its weights under reset_parameters (weight normalisation or another "
                "reparametrisation?); take that off first, with torch.nn.utils.parametrize.remove_parametrizations or "
                "torch.nn.utils.remove_weight_norm"
            )
    return fresh


_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def _layers(model: nn.Module, x: Tensor) -> dict[str, list[str]]:
    """Return the modules of each layer by its name, from the output back to the input."""
    check_model(model, x)
    model = copied(model)  # no hook ever hangs on the caller's
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(not owner or name.startswith(f"{owner}.") for owner in owners)
        if not inside and next(_own_state(module), None) is not None:
            owners[name] = module
    finished: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        def finish(*_: object) -> None:
            finished.pop(name, None)
            finished[name] = None

        return finish

    for name, module in owners.items():
        module.register_forward_hook(note(name))
    with torch.no_grad():
        model(x[:1].detach().clone())
    if not finished:
        raise PathwayError(f"no module with parameters ran in {type(model).__name__}; there is nothing to randomise")
    groups: dict[str, list[str]] = {}
    for name in finished:
        if groups and isinstance(owners[name], _NORMALISATIONS):
            groups[next(reversed(groups))].append(name)
        else:
            groups[name] = [name]
    return dict(reversed(groups.items()))


def _own_state(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a module itself, and the statistics of a normalisation."""
    yield from module.parameters(recurse=False)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        yield from module.buffers(recurse=False)


def _measure_statistics(model: nn.Module, modules: Sequence[nn.Module], images: Tensor) -> None:
    """Set the running statistics of batch normalisations among ``modules`` to those of ``images``."""
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches, of which there is one
        norm.train()
    with torch.no_grad():
        model(images.clone())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


# --- The check -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SanityCheck:
    """How alike what is said of a network and of its randomised copies is.

    Attributes:
        layers: the layer at which each copy stops, from the output back to the input.
        mode: ``"cascading"`` or ``"independent"``.
        targets: the class explained of each image, ``(B,)``: the same for every copy.
        similarity: by method and measure, ``(layers, draws, B)``.
    """

    layers: tuple[str, ...]
    mode: str
    targets: Tensor
    similarity: Mapping[tuple[str, str], Tensor]

    def intervals(self, method: str, measure: str) -> list[Interval]:
        """Return, per layer, the mean over images and draws with its 95 % interval over images.

        The interval takes the draws as they are; :meth:`draws` tells how much they differ.

        Raises:
            PathwayError: if the method or measure was not checked, or there is one image only.
        """
        return [bootstrap_interval(values.mean(0)) for values in self._of(method, measure)]

    def draws(self, method: str, measure: str) -> Tensor:
        """Return the mean over images by layer and draw, ``(layers, draws)``.

        Raises:
            PathwayError: if the method or measure was not checked.
        """
        return self._of(method, measure).mean(2)

    def rows(self) -> Iterator[dict[str, object]]:
        """Yield a table: by method, measure and layer the mean, its interval over images, the range of the draws."""
        for method, measure in self.similarity:
            each = self.draws(method, measure)
            for depth, interval in enumerate(self.intervals(method, measure)):
                yield {
                    "mode": self.mode,
                    "method": method,
                    "measure": measure,
                    "depth": depth,
                    "layer": self.layers[depth],
                    **interval._asdict(),
                    "lowest draw": float(each[depth].min()),
                    "highest draw": float(each[depth].max()),
                    "draws": each.shape[1],
                    "images": len(self.targets),
                }

    def _of(self, method: str, measure: str) -> Tensor:
        if (method, measure) not in self.similarity:
            checked = ", ".join(f"{measure!r} of {method!r}" for method, measure in self.similarity)
            raise PathwayError(f"{measure!r} of {method!r} was not checked; checked are {checked}")
        return self.similarity[method, measure]


def sanity_check(
    explainer: Explainer | Mapping[str, Explainer],
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    *,
    mode: str = "cascading",
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 64,
    similarities: Mapping[str, Similarity] = SIMILARITIES,
    layers: Sequence[str] | None = None,
    calibration: Tensor | None = None,
    progress: bool = False,
) -> SanityCheck:
    """Compare an explainer's maps of a network with its maps of the same network with randomised layers.

    The class explained stays that of the given network: a randomised one predicts something else, and maps of
    different classes differ even where nothing was randomised. A low similarity is necessary, not sufficient: noise
    has it too. Read it against :func:`unrelated_similarity`.

    Args:
        explainer: one, or several by name, such as :func:`pathwaylib.explainers`.
        model: a network in eval mode; it stays as it is.
        x: images ``(B, C, H, W)``.
        target: class or classes to explain; None: the class that ``model`` itself predicts.
        mode: ``"cascading"`` or ``"independent"``, see :func:`randomised`.
        draws: how many times weights are drawn; draw number d, from 0, has the seed ``seed + d``.
        seed: of the first draw.
        batch_size: images to explain at once.
        similarities: measures by name.
        layers: where to compare, names of :func:`randomisable_layers`; None: at every layer.
        calibration: images for the statistics of randomised batch normalisations, see :func:`randomised`.
        progress: show a progress bar over randomised networks.

    Returns:
        :class:`SanityCheck`; a single explainer is called ``"explainer"`` there.

    Raises:
        PathwayError: as :func:`pathwaylib.explain` and :func:`randomised`; if ``draws`` is below 1, or there is no
            explainer or measure.

    Source: Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim, *Sanity Checks for Saliency Maps* (NeurIPS 2018),
    section 4: the model parameter randomisation test.

    Example:
        >>> from pathwaylib import explainers
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
        >>> some = {name: explainers()[name] for name in ("gradient", "centre")}
        >>> found = sanity_check(some, net, torch.rand(4, 3, 8, 8), draws=2)
        >>> found.layers, found.draws("centre", "SSIM").tolist()  # the centre does not look at the network
        (('3', '0'), [[1.0, 1.0], [1.0, 1.0]])
        >>> bool((found.draws("gradient", "SSIM") < 1).all())
        True
    """
    methods = explainer if isinstance(explainer, Mapping) else {"explainer": explainer}
    require_at_least_one(draws=draws, batch_size=batch_size)
    if not methods or not similarities:
        raise PathwayError(f"{len(methods)} explainers and {len(similarities)} measures; give at least one of each")

    targets = targets_of(model, x, target, batch_size)

    def describe(network: nn.Module) -> dict[tuple[str, str], Tensor]:
        maps = {name: explain(method, network, x, targets, batch_size=batch_size) for name, method in methods.items()}
        return {
            (name, measure): similarity.describe(found)
            for name, found in maps.items()
            for measure, similarity in similarities.items()
        }

    def between(key: tuple[str, str], given: Tensor, changed: Tensor) -> Tensor:
        return similarities[key[1]].between(given, changed)

    copies = _copies(model, x, mode, draws, seed, layers, calibration, progress)
    return _compare(describe, between, model, copies, mode, targets)


def pathway_sanity_check(
    selector: Selector | Mapping[str, Selector],
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    *,
    mode: str = "cascading",
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 64,
    layers: Sequence[str] | None = None,
    calibration: Tensor | None = None,
    progress: bool = False,
) -> SanityCheck:
    """Compare the pathways of a network with those of the same network with randomised layers, by their overlap.

    Args:
        selector: one, or several by name.
        model: a network in eval mode; it stays as it is.
        x: images ``(B, ...)``.
        target: class or classes to select for; None: the class that ``model`` itself predicts.
        mode: ``"cascading"`` or ``"independent"``, see :func:`randomised`.
        draws: how many times weights are drawn; draw number d, from 0, has the seed ``seed + d``.
        seed: of the first draw.
        batch_size: images to select pathways of at once.
        layers: where to compare, names of :func:`randomisable_layers`; None: at every layer.
        calibration: images for the statistics of randomised batch normalisations, see :func:`randomised`.
        progress: show a progress bar over randomised networks.

    Returns:
        :class:`SanityCheck` with the measure ``"IoU"``; a single selector is called ``"selector"`` there.

    Raises:
        PathwayError: as the selector and :func:`randomised`; if ``draws`` is below 1, or there is no selector.

    Example:
        >>> from pathwaylib import NeuronMCT
        >>> net = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 3)).eval()
        >>> found = pathway_sanity_check(NeuronMCT(0.8), net, torch.rand(4, 4))
        >>> bool((found.draws("selector", "IoU") < 1).all())
        True
    """
    selectors = selector if isinstance(selector, Mapping) else {"selector": selector}
    require_at_least_one(draws=draws, batch_size=batch_size)
    if not selectors:
        raise PathwayError("there are no selectors; give at least one")

    targets = targets_of(model, x, target, batch_size)
    batches = list(zip(x.detach().split(batch_size), targets.split(batch_size), strict=True))

    def describe(network: nn.Module) -> dict[tuple[str, str], Pathway]:
        return {
            (name, "IoU"): Pathway.cat([select(network, images, chosen) for images, chosen in batches])
            for name, select in selectors.items()
        }

    def between(_: tuple[str, str], given: Pathway, changed: Pathway) -> Tensor:
        return given.iou(changed)

    copies = _copies(model, x, mode, draws, seed, layers, calibration, progress)
    return _compare(describe, between, model, copies, mode, targets)


def _copies(
    model: nn.Module,
    x: Tensor,
    mode: str,
    draws: int,
    seed: int,
    layers: Sequence[str] | None,
    calibration: Tensor | None,
    progress: bool,
) -> Iterator[tuple[str, nn.Module]]:
    """Return the randomised copies of one draw after the other."""
    parts = [
        randomised(model, x, mode=mode, seed=seed + draw, layers=layers, calibration=calibration)
        for draw in range(draws)
    ]
    count = draws * len(layers or randomisable_layers(model, x))
    return iter(tqdm(itertools.chain.from_iterable(parts), total=count, disable=not progress, leave=False))


def _compare(
    describe: Callable[[nn.Module], Mapping[tuple[str, str], _Description]],
    between: Callable[[tuple[str, str], _Description, _Description], Tensor],
    model: nn.Module,
    copies: Iterator[tuple[str, nn.Module]],
    mode: str,
    targets: Tensor,
) -> SanityCheck:
    """Describe a network and its copies, and compare each copy with the network."""
    given = describe(model)
    found: dict[tuple[str, str], dict[str, list[Tensor]]] = {key: {} for key in given}
    for layer, network in copies:
        for key, changed in describe(network).items():
            found[key].setdefault(layer, []).append(between(key, given[key], changed))
    similarity = {key: torch.stack([torch.stack(draws) for draws in each.values()]) for key, each in found.items()}
    return SanityCheck(tuple(next(iter(found.values()))), mode, targets, similarity)
