"""From neurons back to pictures: the image a pathway, or one neuron, answers most strongly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contributions import Contributions
from .errors import PathwayError
from .neurons import (
    Target,
    check_gradient,
    check_model,
    checked_logits,
    frozen,
    masked,
    record,
    refuse_inference_mode,
    response,
)
from .pathway import Pathway, holds_integers
from .ranking import largest

# Square root of the covariance of colours in natural photographs, as Olah et al. published it: brightness varies most.
_COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


@dataclass(frozen=True)
class Augment:
    """Small random movements of an image; what answers through all of them is a shape, not a pattern of pixels.

    One movement is drawn for a whole batch. The border is mirrored. ``Augment(0, 0, 0)`` leaves images as they are.

    A neuron of a convolution finds its pattern wherever it moves, and large movements show it best. A pathway knows
    the positions of its neurons: what moves far leaves them, and the picture blurs.

    Attributes:
        jitter: largest shift in pixels, along each axis.
        rotation: largest angle in degrees, either way.
        scale: largest relative change of size, in [0, 1).

    Raises:
        PathwayError: if a size is negative, or ``scale`` is not below 1.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> Augment(jitter=2)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """

    jitter: float = 4.0
    rotation: float = 10.0
    scale: float = 0.1

    def __post_init__(self) -> None:
        if not (self.jitter >= 0 and self.rotation >= 0 and 0 <= self.scale < 1):
            raise PathwayError(f"{self}; give sizes of at least 0, and a scale below 1")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``images`` ``(B, C, H, W)``, all moved alike."""
        if not (self.jitter or self.rotation or self.scale):
            return images
        draws = 2 * torch.rand(4, generator=generator, device=generator.device, dtype=torch.float64) - 1
        turn, growth, right, down = draws.tolist()
        height, width = images.shape[-2:]
        angle, factor = math.radians(self.rotation * turn), 1 + self.scale * growth
        cosine, sine = factor * math.cos(angle), factor * math.sin(angle)
        # Positions run from -1 to 1 along both axes, so a turn has to know the sides of the image.
        movement = images.new_tensor(
            [
                [cosine, -sine * height / width, 2 * self.jitter * right / width],
                [sine * width / height, cosine, 2 * self.jitter * down / height],
            ]
        )
        grid = F.affine_grid(movement.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


_LARGE, _SMALL = Augment(), Augment(jitter=0.5, rotation=2.0, scale=0.02)


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images found by :func:`decode_pathway` or :func:`visualise_neuron`.

    Attributes:
        images: ``(B, C, H, W)``, in [0, 1].
        responses: what each image achieves, without any random movement, ``(B,)``.
        history: what it achieved at each step, moved as it was then, ``(steps, B)``.
    """

    images: Tensor
    responses: Tensor
    history: Tensor


def decode_pathway(
    model: nn.Module,
    shape: Sequence[int],
    pathway: Pathway,
    target: Target = None,
    *,
    steps: int = 100,
    learning_rate: float = 0.05,
    fourier: bool = True,
    augment: Augment = _SMALL,
    total_variation: float = 3.0,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Find the image that maximises the response inside the pathway network, one for each pathway.

    The search climbs by Adam from a nearly grey image. All images of a batch share that beginning and the random
    movements: they differ by their pathways alone, and each is what it would be without the others (up to rounding).

    Args:
        model: a network in eval mode.
        shape: of one image: ``(channels, height, width)``.
        pathway: ``B`` pathways; each stays the same at every step.
        target: class or classes to maximise; None means those the pathway was selected for.
        steps: of the search.
        learning_rate: of Adam.
        fourier: search over the frequencies of the image, low ones first, and with three channels over colours that
            are uncorrelated in photographs; else over its pixels.
        augment: random movement at every step: small, see :class:`Augment`.
        total_variation: weight of the mean absolute difference between neighbouring pixels, in units of the
            response: more gives smoother images.
        generator: draws beginning and movements; None draws the same ones at every call (seed 0).

    Returns:
        :class:`Decoded`: images, and their responses in the pathway network.

    Raises:
        PathwayError: if the network cannot be used or passes no gradient, the pathway or a target is not of this
            network, no target is known, or a setting is out of range.

    Equation: argmax over x in [0, 1]^D of E_τ Φ_P,t(τ(x)) − w · TV(x), with random movements τ.

    Source: Khakzar et al., *Neural Response Interpretation through the Lens of Critical Pathways* (CVPR 2021),
    section 3; what makes such images legible: Olah, Mordvintsev and Schubert, *Feature Visualization* (Distill 2017).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> kept = Pathway((torch.ones(2, 10, dtype=torch.bool),), ("relu_0",))
        >>> found = decode_pathway(net, (3, 4, 4), kept, target=[0, 1], steps=5)
        >>> found.images.shape, bool((found.responses > found.history[0]).all())
        (torch.Size([2, 3, 4, 4]), True)
    """
    chosen = pathway.targets if target is None else target
    if chosen is None:
        raise PathwayError("the pathway does not say which class it was selected for; give target=")

    def objective(images: Tensor) -> Tensor:
        with frozen(model), masked(pathway, runs=1):
            logits = model(images.clone())  # a network may change its input in place
        return response(checked_logits(model, images, logits), chosen)

    return _climb(
        model, objective, len(pathway), shape, steps, learning_rate, fourier, augment, total_variation, generator
    )


def visualise_neuron(
    model: nn.Module,
    shape: Sequence[int],
    site: str,
    neuron: int | Sequence[int] | Tensor,
    *,
    channel: bool = False,
    steps: int = 100,
    learning_rate: float = 0.05,
    fourier: bool = True,
    augment: Augment = _LARGE,
    total_variation: float = 0.0,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Find the image that maximises one neuron's pre-activation, one image for each neuron given.

    The pre-activation is what the activation lets through where it is positive; unlike the activation it tells a
    neuron that sleeps on the first image where to go.

    Args:
        model: a network in eval mode.
        shape: of one image: ``(channels, height, width)``.
        site: name of the neuron's site, such as ``"relu_7"``.
        neuron: position in the flattened site, or one position per image (see :func:`top_neuron`).
        channel: maximise the mean of the neuron's channel over all positions instead.
        steps: as in :func:`decode_pathway`, like all that follow.
        learning_rate: of Adam.
        fourier: search over frequencies and uncorrelated colours, else over pixels.
        augment: random movement at every step.
        total_variation: weight of the mean absolute difference between neighbouring pixels.
        generator: draws beginning and movements; None draws the same ones at every call (seed 0).

    Returns:
        :class:`Decoded`: images, and the pre-activations they reach.

    Raises:
        PathwayError: if the network cannot be used or passes no gradient, there is no such site or neuron, or a setting
            is out of range.

    Equation: argmax over x in [0, 1]^D of E_τ z_j(τ(x)) − w · TV(x), with random movements τ.

    Source: Olah, Mordvintsev and Schubert, *Feature Visualization* (Distill 2017).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> visualise_neuron(net, (3, 4, 4), "relu_0", [0, 5], steps=5).images.shape
        torch.Size([2, 3, 4, 4])
    """
    neurons = torch.as_tensor(neuron).reshape(-1)
    if not holds_integers(neurons) or not len(neurons):
        raise PathwayError(f"neuron is {neuron!r}; give positions in the flattened site as integers, at least one")

    def objective(images: Tensor) -> Tensor:
        sites, pre, _, _ = record(model, images, keep_pre=True)
        z = pre[_position(site, [seen.name for seen in sites])]
        size = z[0].numel()
        if not 0 <= int(neurons.min()) <= int(neurons.max()) < size:
            raise PathwayError(f"neuron is {neurons.tolist()}; site {site!r} has neurons 0 to {size - 1}")
        positions = neurons.to(z.device)
        if channel:
            positions = positions // z[0, 0].numel()
            z = z.flatten(2).mean(2) if z.ndim > 2 else z
        return z.flatten(1).gather(1, positions[:, None])[:, 0]

    return _climb(
        model, objective, len(neurons), shape, steps, learning_rate, fourier, augment, total_variation, generator
    )


def top_neuron(contributions: Contributions, site: str) -> Tensor:
    """Return the position of each input's neuron of largest absolute score in one site.

    A neuron that speaks *against* the response has a negative score and can be on top too. Ties break as in
    :meth:`Contributions.top`.

    Args:
        contributions: scores of a method.
        site: name of the site, such as that of the last convolution.

    Returns:
        Positions in the flattened site, int64 ``(B,)``.

    Raises:
        PathwayError: if there is no such site, or all of its scores are 0 on some input.

    Example:
        >>> scores = Contributions((torch.tensor([[[0.1, -3.0], [0.0, 2.0]]]),), ("relu_0",))
        >>> top_neuron(scores, "relu_0")
        tensor([1])
    """
    scores = contributions.scores[_position(site, contributions.sites)]
    marks = largest([scores], 1)[0].flatten(1)
    if not bool(marks.any(1).all()):
        without = int(marks.any(1).int().argmin())
        raise PathwayError(f"every score of site {site!r} is 0 on input {without}; choose another site or input")
    return marks.int().argmax(1)


def _position(site: str, sites: Sequence[str]) -> int:
    if site not in sites:
        raise PathwayError(f"there is no site {site!r}; the network has {', '.join(sites)}")
    return list(sites).index(site)


def _climb(
    model: nn.Module,
    objective: Callable[[Tensor], Tensor],
    count: int,
    shape: Sequence[int],
    steps: int,
    learning_rate: float,
    fourier: bool,
    augment: Augment,
    total_variation: float,
    generator: torch.Generator | None,
) -> Decoded:
    """Maximise ``objective``, which maps images ``(B, C, H, W)`` to one number each, over ``count`` images."""
    if len(shape) != 3 or min(shape) < 1:
        raise PathwayError(f"shape is {tuple(shape)}; give that of one image: (channels, height, width)")
    if steps < 1 or not 0 < learning_rate < math.inf or not 0 <= total_variation < math.inf:
        raise PathwayError(
            f"steps={steps}, learning_rate={learning_rate}, total_variation={total_variation}: give at least one step, "
            "a positive learning rate and a weight of at least 0, both finite"
        )
    refuse_inference_mode()
    generator = generator or torch.Generator().manual_seed(0)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    channels, height, width = shape
    size = (channels, height, width // 2 + 1, 2) if fourier else (channels, height, width)
    # Drawn in float64 for one image: the same beginning for every image, of any type.
    start = 0.01 * torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64)
    # Neither the Fourier transform nor Adam is for half precision.
    precision = torch.promote_types(parameter.dtype, torch.float32)
    canvas = start.to(parameter.device, precision).expand(count, *size).clone().requires_grad_()
    paint = _frequencies(shape, canvas) if fourier else torch.sigmoid

    def picture() -> Tensor:
        return paint(canvas).to(parameter.dtype)

    check_model(model, picture())
    optimiser = torch.optim.Adam([canvas], lr=learning_rate)
    history = []
    with torch.enable_grad():
        for _ in range(steps):
            images = picture()
            responses = objective(augment(images, generator))
            check_gradient(model, responses)
            loss = -responses.sum()
            if total_variation:
                loss = loss + total_variation * _variation(images).sum()
            # Gradients reach our own canvas alone: nothing is added up anywhere else.
            (canvas.grad,) = torch.autograd.grad(loss, canvas)
            optimiser.step()
            history.append(responses.detach())
    with torch.no_grad():
        images = picture()
        return Decoded(images, objective(images), torch.stack(history))


def _frequencies(shape: Sequence[int], like: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that turns spectra ``(B, C, H, W // 2 + 1, 2)`` into images in [0, 1]."""
    channels, height, width = shape
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    # In photographs amplitude falls with frequency; a step that does so too changes coarse shapes before fine ones.
    falling = (1 / torch.hypot(rows, columns).clamp(min=1 / max(height, width)))[..., None].to(like)
    colours = torch.tensor(_COLOURS).to(like)
    mixing = colours / colours.norm(dim=0).max() if channels == 3 else torch.eye(channels).to(like)

    def paint(spectrum: Tensor) -> Tensor:
        waves = torch.view_as_complex(spectrum * falling)
        plane = torch.fft.irfft2(waves, s=(height, width), norm="ortho") / 4
        return torch.einsum("dc,bchw->bdhw", mixing, plane).sigmoid()

    return paint


def _variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference between neighbouring pixels of each image ``(B,)``."""
    rows, columns = images.diff(dim=-2).abs().flatten(1), images.diff(dim=-1).abs().flatten(1)
    return torch.cat([rows, columns], 1).mean(1)
