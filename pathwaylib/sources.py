"""Where images come from: a set in memory, or the files below a folder; each has an id, and they come in its order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from .data import ImageSet
from .errors import PathwayError
from .pictures import Picture, UnreadableImage, files_below, printable, read_picture


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def noted(names: Iterator[str], digest: _Digest) -> Iterator[str]:
    """Yield names as they are, and note each in a digest."""
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
        yield name


@dataclass(frozen=True, eq=False)
class InMemory:
    """The images of an image set; an id is a position."""

    data: ImageSet

    @classmethod
    def of(cls, data: ImageSet, size: int | None, limit: int | None) -> InMemory:
        """Take the first images of a set, of a size if it is given."""
        images, labels = data.images, data.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or not 0 < len(images) == len(labels):
            raise PathwayError(
                f"the image set holds {images.dtype} {tuple(images.shape)} and {len(labels)} labels; give images as "
                "uint8 (N, C, H, W), at least one, and a label for each"
            )
        if size is not None and tuple(images.shape[2:]) != (size, size):
            raise PathwayError(
                f"the image set holds images of {images.shape[2]} x {images.shape[3]} pixels, size is {size}; give "
                "images of that size, or files, which are brought to it"
            )
        if int(labels.max()) >= len(data.classes):
            raise PathwayError(
                f"the image set holds the label {int(labels.max())} and names {len(data.classes)} classes; give a name "
                "for each, counted from 0"
            )
        return cls(ImageSet(images[:limit], labels[:limit], data.classes))

    def ids(self) -> Iterator[str]:
        """Yield the ids in order."""
        return (f"{index:08d}" for index in range(len(self.data)))

    def shape(self) -> tuple[int, ...]:
        """Return the shape of every image."""
        return tuple(self.data.images.shape[1:])

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of images, and what tells these images from others."""
        ids, digest = hashlib.sha256(), hashlib.sha256(self.data.images.contiguous().numpy().data)
        digest.update(self.data.labels.contiguous().numpy().data)
        count = sum(1 for _ in noted(self.ids(), ids))
        return {"count": count, "ids": ids.hexdigest(), "sha256": digest.hexdigest()}

    def read(self, name: str) -> Picture:
        """Return an image by its id."""
        return Picture(self.data.images[int(name)], "")

    def label(self, name: str) -> str | None:
        """Return the class of an image by its id; None for a label below 0, which data sets give to unlabelled ones."""
        label = int(self.data.labels[int(name)])
        return self.data.classes[label] if label >= 0 else None


@dataclass(frozen=True)
class Files:
    """The image files below a folder; an id is a path inside it, whose first folder is the label."""

    root: Path
    size: int
    limit: int | None

    @classmethod
    def below(cls, root: Path, out: Path, size: int, limit: int | None) -> Files:
        """Take the first files below ``root``, unless ``out`` is among them."""
        if not root.is_dir():
            raise PathwayError(f"images is {str(root)!r}, which is no folder; give a folder of image files")
        if out.resolve().is_relative_to(root.resolve()):
            raise PathwayError(f"{out} lies inside {root}, whose files would then be taken for images; write elsewhere")
        return cls(root, size, limit)

    def ids(self) -> Iterator[str]:
        """Yield the ids in order."""
        return islice(files_below(self.root), self.limit)

    def shape(self) -> tuple[int, ...]:
        """Return the shape to which every image is brought."""
        return (3, self.size, self.size)

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of files, and what tells these files from others without reading them."""
        ids, digest, count = hashlib.sha256(), hashlib.sha256(), 0
        for name in noted(self.ids(), ids):
            path = self.root / name
            if path.is_file():
                about = path.stat()
                digest.update(b"%d %d\n" % (about.st_size, about.st_mtime_ns))
            else:
                digest.update(b"\n")
            count += 1
        if not count:
            raise PathwayError(f"there is no file in {self.root}; give a folder of image files")
        return {"count": count, "ids": ids.hexdigest(), "sha256": digest.hexdigest(), "size": self.size}

    def read(self, name: str) -> Picture:
        """Return an image by its id."""
        path = self.root / name
        if printable(name) != name:
            raise UnreadableImage(path, "name that is not valid text; rename the file")
        try:
            return read_picture(path, self.size)
        except UnreadableImage:
            if not self.root.is_dir():  # every other file would seem unreadable too
                raise PathwayError(f"{self.root} disappeared while it was read; run again when it is back") from None
            raise

    def label(self, name: str) -> str | None:
        """Return the class of an image by its id; None for a file that lies in no folder."""
        first, inside, _ = name.partition("/")
        return first if inside else None
