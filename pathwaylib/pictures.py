"""Image files of any kind as a network takes them: what cannot be read says why, what was converted says so.

The files may be strangers'. Only common bitmap formats are tried, so that none is handed to an outside program.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import PathwayError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are read; a file's name plays no part."""

MOST_PIXELS = 89_000_000
"""Images of more pixels are not read: to decode one may take a gigabyte."""


class UnreadableImage(PathwayError):
    """A file that is not read as an image.

    Attributes:
        reason: why, in words that files with the same trouble share.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{printable(os.fspath(path))} cannot be read as an image: {reason}")
        self.reason = reason


class Picture(NamedTuple):
    """An image read from a file.

    Attributes:
        pixels: uint8 tensor ``(3, size, size)``.
        remark: what had to be converted, such as ``"greyscale"``; empty for a plain colour image.
    """

    pixels: Tensor
    remark: str


def read_picture(path: str | os.PathLike[str], size: int) -> Picture:
    """Read an image file as a square: turned upright, cropped around its middle, made smaller or larger.

    The largest centred square is scaled by antialiased bilinear interpolation; an image that has the size already is
    taken as it is. Greyscale becomes grey RGB, 16 bits become 8, transparent parts are laid on white, and of several
    frames the first is taken: ``remark`` tells.

    Args:
        path: the file.
        size: pixels per side of the result.

    Raises:
        UnreadableImage: a :class:`PathwayError`, if the file is no image of a known format, is damaged, or has 32 bits
            per channel or more than 89 million pixels.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "grey.png"
        >>> Image.new("L", (40, 60), 128).save(path)
        >>> pixels, remark = read_picture(path, 32)
        >>> pixels.shape, remark
        (torch.Size([3, 32, 32]), 'greyscale')
    """
    path = Path(path)
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise UnreadableImage(path, _what_else(path))
        if not path.stat().st_size:
            raise UnreadableImage(path, "empty file")
        with Image.open(path, formats=FORMATS) as image:
            remark = _oddities(path, image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            fitted = ImageOps.fit(_as_rgb(image), (size, size), Image.Resampling.BILINEAR)
        return Picture(torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous(), remark)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, "not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(path, _TOO_LARGE) from error
    except Exception as error:  # decoders raise a dozen types at damaged data; each means this file, not the run
        # The file system's errors have a number, those of damaged images have none.
        reason = error.strerror if isinstance(error, OSError) else None
        raise UnreadableImage(path, reason or f"damaged: {_brief(error)}") from error


def files_below(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it, in the order of these paths as text.

    One folder's names are in memory at a time. A link to a folder is not followed but yielded itself, as is a folder
    that may not be listed, so that nothing passes in silence.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("a/2.png", "a/1.png", "a.b/1.png"):
        ...     (folder / name).parent.mkdir(exist_ok=True)
        ...     (folder / name).touch()
        >>> list(files_below(folder))
        ['a.b/1.png', 'a/1.png', 'a/2.png']
    """

    def below(inside: str) -> Iterator[str]:
        with os.scandir(folder / inside) as entries:
            # With its slash a folder sorts among its neighbours as the paths inside it do.
            names = sorted(f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries)
        for name in names:
            if not name.endswith("/"):
                yield inside + name
            elif os.access(folder / inside / name, os.R_OK | os.X_OK):
                yield from below(inside + name)
            else:
                yield inside + name.rstrip("/")

    return below("")


def printable(name: str) -> str:
    r"""Return a path as text that can be printed and stored, whatever bytes the file's name holds.

    Example:
        >>> printable("gr\udcfcn.png")
        'gr\\udcfcn.png'
    """
    return name.encode("utf-8", "backslashreplace").decode()


_TOO_LARGE = f"more than {MOST_PIXELS // 1_000_000} million pixels"


def _oddities(path: Path, image: Image.Image) -> str:
    """Say what will be converted; the pixels are not decoded yet."""
    if image.width * image.height > MOST_PIXELS:
        raise UnreadableImage(path, _TOO_LARGE)
    animated = getattr(image, "n_frames", 1) > 1
    if animated and image.width * image.height > MOST_PIXELS // 4:  # its decoder holds the canvas several times
        raise UnreadableImage(path, f"animation of more than {MOST_PIXELS // 4_000_000} million pixels")
    if image.mode in ("I", "F"):
        raise UnreadableImage(path, "32 bits per channel; convert it to 8 bits")
    odd = []
    if image.mode in ("1", "L", "LA", "I;16", "I;16B", "I;16L"):
        odd.append("greyscale")
    elif image.mode not in ("RGB", "RGBA", "P", "PA"):
        odd.append(image.mode)
    if image.mode.startswith("I;16"):
        odd.append("16 bits per channel")
    elif image.has_transparency_data:
        odd.append("transparency")
    if animated:
        odd.append("several frames")
    return ", ".join(odd)


def _as_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))  # a plain conversion would cut at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _what_else(path: Path) -> str:
    """Say what a path that is no regular file is."""
    if path.is_symlink():
        return "link to a folder, which is not followed" if path.is_dir() else "link to nothing"
    if path.is_dir():
        return "folder" if os.access(path, os.R_OK | os.X_OK) else "folder that may not be read"
    return "not a regular file" if path.exists() else "there is no such file"


def _brief(error: BaseException) -> str:
    """Return the first line of an error without its numbers, which differ from file to file."""
    line = (str(error).splitlines() or [""])[0].partition("(")[0].strip()
    return line if line and not any(character.isdigit() for character in line) else type(error).__name__
