"""Where images come from: a set in memory, or the files below a folder; each has an id, and they come in its order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .data import ImageSet
from .errors import PathwayError
from .pictures import Picture, UnreadableImage, files_below, printable, read_picture


@dataclass(frozen=True, eq=False)
class InMemory:
    """The images of an image set; an id is a position."""

    data: ImageSet

    @classmethod
    def of(cls, data: ImageSet, limit: int | None) -> InMemory:
        """Take the first images of a set."""
        return cls(ImageSet(data.images[:limit], data.labels[:limit], data.classes))

    def ids(self) -> Iterator[str]:
        """Yield the ids in order."""
        return (f"{index:08d}" for index in range(len(self.data)))

    def shape(self) -> tuple[int, ...]:
        """Return the shape of every image."""
        return tuple(self.data.images.shape[1:])

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of images, and what tells these images from others."""
        digest = hashlib.sha256(self.data.images.contiguous().numpy().data)
        digest.update(self.data.labels.contiguous().numpy().data)
        return {"count": len(self.data), "sha256": digest.hexdigest()}

    def read(self, name: str) -> Picture:
        """Return an image by its id."""
        return Picture(self.data.images[int(name)], "")

    def label(self, name: str) -> str | None:
        """Return the class of an image by its id."""
        return self.data.classes[int(self.data.labels[int(name)])]


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
        digest, count = hashlib.sha256(), 0
        for name in self.ids():
            path = self.root / name
            digest.update(os.fsencode(name) + b"\0%d\0" % (path.stat().st_size if path.is_file() else -1))
            count += 1
        if not count:
            raise PathwayError(f"there is no file in {self.root}; give a folder of image files")
        return {"count": count, "sha256": digest.hexdigest(), "size": self.size}

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
