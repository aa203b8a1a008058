"""Photographs: a reader's own, and some that come with scikit-image and scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from .data import ImageSet
from .errors import PathwayError, require_at_least_one
from .files import package_folder
from .pictures import read_picture

# Where each package keeps the images it is installed with. Others of scikit-image would have to be downloaded.
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_PHOTOS = {
    "cat": ("skimage", "chelsea.png"),
    "coffee": ("skimage", "coffee.png"),
    "photographer": ("skimage", "camera.png"),
    "motorcycle": ("skimage", "motorcycle_left.png"),
    "rocket": ("skimage", "rocket.jpg"),
    "astronaut": ("skimage", "astronaut.png"),
    "temple": ("sklearn", "china.jpg"),
    "flower": ("sklearn", "flower.jpg"),
}


def load_image(path: str | PathLike[str], size: int = 224) -> Tensor:
    """Read an image file as a network takes it: a batch of one, upright, square, in ``[0, 1]``.

    The largest centred square is scaled; the orientation that a camera noted is applied. Pixels are those that
    :func:`pathwaylib.pictures.read_picture` gives, so that an image explained here and one of an extraction are the
    same.

    Args:
        path: a file; JPEG, PNG, WebP, TIFF, GIF, BMP and PPM are read.
        size: pixels per side of the result; ``model_card(name)["size"]`` says what an ImageNet network was made for.

    Returns:
        float32 tensor ``(1, 3, size, size)``.

    Raises:
        PathwayError: if there is no such file, it cannot be read as an image, or ``size`` is less than 1.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> path = Path(tempfile.mkdtemp()) / "red.png"
        >>> Image.new("RGB", (60, 40), "red").save(path)
        >>> x = load_image(path, size=32)
        >>> x.shape, x[0, :, 0, 0]
        (torch.Size([1, 3, 32, 32]), tensor([1., 0., 0.]))
    """
    require_at_least_one(size=size)
    return read_picture(path, size).pixels[None].contiguous().float() / 255


def photos(names: Sequence[str] | None = None, *, size: int = 224) -> ImageSet:
    """Return photographs that scikit-image and scikit-learn are installed with; nothing is downloaded.

    ``cat``, ``coffee``, ``photographer``, ``motorcycle``, ``rocket`` and ``astronaut`` are scikit-image's, and in the
    public domain. ``temple`` and ``flower`` are scikit-learn's, which the extra ``imagenet`` installs (by
    danielbuechele and vultilion, CC BY 2.0).

    Args:
        names: which photographs; all if left out.
        size: pixels per side; each shows the largest centred square.

    Returns:
        An :class:`ImageSet` whose labels number the photographs and whose classes are their names.

    Raises:
        PathwayError: if there is no photograph of a name, or its package is not installed.

    Example:
        >>> few = photos(["cat", "coffee"], size=64)
        >>> few[:][0].shape, few.classes
        (torch.Size([2, 3, 64, 64]), ('cat', 'coffee'))
    """
    chosen = tuple(_PHOTOS) if names is None else tuple(names)
    unknown = [name for name in chosen if name not in _PHOTOS]
    if unknown or not chosen:
        raise PathwayError(f"there are no photos of {unknown}; choose among {', '.join(_PHOTOS)}, at least one")
    require_at_least_one(size=size)
    images = torch.stack([read_picture(_photo(name), size).pixels for name in chosen])
    return ImageSet(images, torch.arange(len(chosen)), chosen)


def _photo(name: str) -> Path:
    """Return where a photograph is."""
    package, file = _PHOTOS[name]
    folder = package_folder(package)
    if folder is None:
        raise PathwayError(
            f"the photo {name!r} comes with {package}, which is not installed: pip install 'pathwaylib[imagenet]'"
        )
    return folder / _FOLDERS[package] / file
