"""What takes the place of removed pixels: a mean colour, a blurred image, an interpolation of what is left."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solveh_banded
from torch import Tensor

from ..errors import PathwayError

FillName = Literal["mean", "blur", "noisy linear"]
Fill = FillName | Tensor
"""A named fill, or the values themselves: one per channel ``(C,)``, one image ``(C, H, W)`` or one per image."""

NOISE = 0.01
"""Standard deviation of the noise that noisy linear imputation adds, as in the code of Rong et al."""

# Each neighbour later in reading order, its step in rows and columns, and its weight; the earlier ones mirror them.
_NEIGHBOURS = ((0, 1, 1 / 6), (1, -1, 1 / 12), (1, 0, 1 / 6), (1, 1, 1 / 12))


def check_images(x: Tensor) -> None:
    """Raise :class:`PathwayError` where ``x`` is no floating-point batch of images."""
    if x.ndim != 4 or not x.numel():
        raise PathwayError(f"the images have shape {tuple(x.shape)}; give (batch, channels, height, width)")
    if not x.is_floating_point():
        raise PathwayError(f"the images are {x.dtype}; give floating-point images, for example images.float() / 255")


def baseline(x: Tensor, fill: Fill) -> Tensor:
    """Return, for each image, the image whose pixels take the place of removed ones.

    Args:
        x: images ``(B, C, H, W)``.
        fill: ``"mean"``, the mean colour of ``x`` itself; ``"blur"``, see :func:`blurred`; or values that broadcast to
            ``x``: for the mean colour of a data set, its ``(C,)`` channel means.

    Returns:
        Tensor like ``x``.

    Raises:
        PathwayError: if the fill is unknown, is no one image (noisy linear imputation depends on what was removed), is
            not floating point, or does not fit the images.

    Example:
        >>> baseline(torch.rand(2, 3, 4, 4), torch.tensor([0.5, 0.4, 0.3]))[1, :, 0, 0]
        tensor([0.5000, 0.4000, 0.3000])
    """
    if isinstance(fill, Tensor):
        if not fill.is_floating_point():
            raise PathwayError(
                f"the fill is {fill.dtype}; give it in the range of the images, which are floating point: for example "
                "mean_colour(data) / 255"
            )
        values = fill.detach().to(x)
        values = values.view(-1, 1, 1) if values.ndim == 1 else values
        if values.ndim > x.ndim or any(
            size not in (1, own) for size, own in zip(reversed(values.shape), reversed(x.shape), strict=False)
        ):
            raise PathwayError(
                f"the fill has shape {tuple(fill.shape)} for images {tuple(x.shape)}; give one value per channel, one "
                "image, or one image each"
            )
        if not bool(values.isfinite().all()):
            raise PathwayError("the fill holds NaN or infinity")
        return values.expand_as(x)
    if fill == "mean":
        return x.detach().mean((0, 2, 3))[:, None, None].expand_as(x)
    if fill == "blur":
        return blurred(x)
    if fill == "noisy linear":
        raise PathwayError("noisy linear imputation is not one image per input; give 'mean', 'blur' or a tensor here")
    raise PathwayError(f"fill is {fill!r}; choose one of {', '.join(get_args(FillName))}, or give a tensor")


def blurred(x: Tensor, sigma: float | None = None) -> Tensor:
    """Blur images by a Gaussian; at the border, weights outside the image are left out.

    Args:
        x: images ``(B, C, H, W)``.
        sigma: standard deviation in pixels; an eighth of the shorter side if left out (4 of 32).

    Raises:
        PathwayError: if the images are no floating-point batch, or ``sigma`` is not positive.

    Example:
        >>> flat = torch.full((1, 3, 8, 8), 0.5)
        >>> torch.allclose(blurred(flat), flat)
        True
    """
    check_images(x)
    sigma = min(x.shape[-2:]) / 8 if sigma is None else sigma
    if not sigma > 0:
        raise PathwayError(f"sigma is {sigma}; give a positive number of pixels")

    def weights(size: int) -> Tensor:
        # Half precision has no room for the larger whole numbers.
        place = torch.arange(size, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return (-((place[:, None] - place) ** 2) / (2 * sigma**2)).softmax(1).to(x.dtype)

    return weights(x.shape[-2]) @ x.detach() @ weights(x.shape[-1]).T


def noisy_linear(
    x: Tensor, removed: Tensor, *, noise: float = NOISE, generator: torch.Generator | None = None
) -> Tensor:
    """Replace removed pixels by a weighted mean of their eight neighbours, plus a little noise.

    Neighbours may be removed themselves, so the means of all removed pixels are found together, from a sparse system
    of linear equations. Unlike a constant, the result gives away little of *where* pixels were removed.

    Args:
        x: images ``(B, C, H, W)``.
        removed: bool ``(B, H, W)``; at least one pixel of each image must be left.
        noise: standard deviation of the noise, in pixel units.
        generator: draws the noise, image after image; None draws the same noise at every call (seed 0).

    Returns:
        Images like ``x``; pixels that were not removed are exactly as they were.

    Raises:
        PathwayError: if ``removed`` does not fit the images, or nothing is left of one.

    Equation: Σ_q w_pq (u_p − u_q) = 0 for every removed pixel p, over its neighbours q inside the image, with u_q = x_q
    where q is left; w is 1/6 for the four nearest and 1/12 for the diagonal ones.

    Source: Rong et al., *A Consistent and Efficient Evaluation Strategy for Attribution Methods* (ICML 2022).

    Example:
        >>> ramp = torch.arange(5.0).expand(1, 1, 5, 5).clone()
        >>> removed = torch.zeros(1, 5, 5, dtype=torch.bool)
        >>> removed[0, 2, 2] = True
        >>> torch.allclose(noisy_linear(ramp, removed, noise=0), ramp)
        True
    """
    generator = generator or torch.Generator().manual_seed(0)
    return imputed(x, removed, noise * draw_noise(x, generator))


def draw_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers like ``x``, image after image, so that a batch draws what a loop does."""
    drawn = [torch.randn(x.shape[1:], generator=generator, device=generator.device) for _ in x]
    return torch.stack(drawn).to(x)


def imputed(x: Tensor, removed: Tensor, noise: Tensor) -> Tensor:
    """Return :func:`noisy_linear` with noise that was drawn before."""
    if removed.shape != (len(x), *x.shape[2:]) or removed.dtype != torch.bool:
        raise PathwayError(
            f"removed is {removed.dtype} of shape {tuple(removed.shape)} for images {tuple(x.shape)}; give one truth "
            "value per pixel: (batch, height, width)"
        )
    gone = removed.cpu().numpy()
    if gone.all((1, 2)).any():
        raise PathwayError("every pixel of an image is removed: nothing is left to interpolate; leave at least one")
    known = x.detach().double().cpu().numpy().reshape(*x.shape[:2], -1)
    found = np.stack([_solve(image, mask) for image, mask in zip(known, gone, strict=True)])
    return torch.where(removed[:, None], torch.from_numpy(found).to(x).view_as(x) + noise, x.detach())


def _solve(image: NDArray[np.float64], gone: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Interpolate one image ``(C, H W)`` where ``gone`` ``(H, W)`` says so."""
    height, width = gone.shape
    rows, columns = np.divmod(np.flatnonzero(gone), width)
    place = np.full(gone.shape, -1)
    place[rows, columns] = np.arange(len(rows))
    diagonal, right = np.zeros(len(rows)), np.zeros((len(rows), len(image)))
    entries = []
    for down, across, weight in _NEIGHBOURS:
        for side in (1, -1):
            r, c = rows + side * down, columns + side * across
            inside = np.flatnonzero((r >= 0) & (r < height) & (c >= 0) & (c < width))
            r, c = r[inside], c[inside]
            diagonal[inside] += weight
            other = place[r, c]
            left = other < 0
            right[inside[left]] += weight * image[:, r[left] * width + c[left]].T
            if side == 1:
                entries.append((inside[~left], other[~left], weight))
    # In reading order unknowns that are neighbours are near each other: the system is a narrow band. It is symmetric
    # and positive definite, so that its lower half is enough.
    band = np.zeros((1 + max(((two - one).max(initial=0) for one, two, _ in entries), default=0), len(rows)))
    band[0] = diagonal
    for one, two, weight in entries:
        band[two - one, one] -= weight
    filled = image.copy()
    if len(rows):
        filled[:, gone.ravel()] = solveh_banded(band, right, lower=True, check_finite=False).T
    return filled
