"""The folder of an extraction: what run it holds, its Parquet files, and who may write to it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from .errors import PathwayError
from .files import atomic_write, clear_leftovers, load_json

FORMAT = "pathwaylib-extraction-1"
_MANIFEST = "run.json"


class Remark(NamedTuple):
    """Image files with the same oddity.

    Attributes:
        what: the oddity.
        outcome: ``"skipped"`` or ``"converted"``.
        images: how many.
        example: the first one's id.
    """

    what: str
    outcome: str
    images: int
    example: str


@dataclass(frozen=True)
class Extraction:
    """What :func:`extract` has written.

    Attributes:
        files: the Parquet files, in the order of the ids.
        settings: what the run is: network, selector, images, sites, versions.
        images: rows written.
        missing: images not looked at yet, because the run was stopped; run it again.
        remarks: what was odd about the image files, the most frequent first.
    """

    files: tuple[Path, ...]
    settings: Mapping[str, Any]
    images: int
    missing: int
    remarks: tuple[Remark, ...]


def read_extraction(folder: str | os.PathLike[str]) -> Extraction:
    """Return what a folder written by :func:`extract` holds; only the ends of the files are read.

    Raises:
        PathwayError: if there is no extraction in the folder.

    Example:
        >>> read_extraction("nowhere")
        Traceback (most recent call last):
        ...
        pathwaylib.errors.PathwayError: nowhere holds no extraction (no run.json); give the folder of one
    """
    folder = Path(folder)
    settings = _manifest(folder)
    if settings is None:
        raise PathwayError(f"{folder} holds no extraction (no {_MANIFEST}); give the folder of one")
    files, rows, skipped = [], 0, 0
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for path in _shards(folder, -(-settings["images"]["count"] // settings["shard_size"])):
        shard = shard_in(path)
        if shard is None:
            continue
        files.append(path)
        rows += shard.rows
        for image, what, outcome in shard.remarks:
            skipped += outcome == "skipped"
            images, example = found.get((what, outcome), (0, image))
            found[what, outcome] = (images + 1, example)
    ordered = sorted((Remark(*kind, *images) for kind, images in found.items()), key=lambda remark: -remark.images)
    return Extraction(tuple(files), settings, rows, settings["images"]["count"] - rows - skipped, tuple(ordered))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the folder, and clear away what one that was killed left half written."""
    if folder.exists() and not folder.is_dir():
        raise PathwayError(f"{folder} is a file; give a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            for temporary in folder.glob(".part-*.parquet"):
                temporary.unlink(missing_ok=True)
            clear_leftovers(folder / _MANIFEST)
            yield
    except Timeout as error:
        raise PathwayError(f"another process is writing to {folder}; wait for it, or give another folder") from error


def agree(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what the run is, or refuse a folder that holds another one."""
    noted = _manifest(folder)
    if noted is None:
        if any(folder.glob("*.parquet")):
            raise PathwayError(f"{folder} holds Parquet files of unknown origin; give another folder")
        with atomic_write(folder / _MANIFEST) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    settings = json.loads(json.dumps(settings))
    differing = [key for key in settings if noted.get(key) != settings[key]]
    if differing:
        told = "; ".join(f"{key} was {_told(noted.get(key))}, now {_told(settings[key])}" for key in differing)
        raise PathwayError(f"{folder} holds another run: {told}. Give another folder, or remove this one")


def _told(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 240 else text[:240] + " …"


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    noted = load_json(path, "give another folder")
    if noted.get("format") == FORMAT and _is_run(noted):
        return noted
    raise PathwayError(f"{path} is damaged, or of another version of pathwaylib; give another folder")


def _is_run(noted: Mapping[str, Any]) -> bool:
    """Tell whether a run, which may be a stranger's, says what every reader relies on."""
    images, sites, classes = noted.get("images"), noted.get("sites"), noted.get("classes")
    return (
        isinstance(images, dict)
        and _is_count(images.get("count"))
        and _is_count(noted.get("shard_size"))
        and isinstance(sites, dict)
        and bool(sites)
        and all(isinstance(shape, list) and shape and all(map(_is_count, shape)) for shape in sites.values())
        and all(math.prod(shape) < 2**31 for shape in sites.values())  # positions have 32 bits
        and "classes" in noted
        and (classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes)))
        and all(isinstance(part, dict) and "name" in part for part in (noted.get("model"), noted.get("selector")))
    )


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _shards(folder: Path, most: int) -> list[Path]:
    """Return the shards there are of so many; to try each name would take for ever where their number is a lie."""
    found = (re.fullmatch(r"part-([0-9]{6,18})\.parquet", path.name) for path in folder.iterdir())
    numbers = sorted(int(match[1]) for match in found if match)
    return [shard_path(folder, number) for number in numbers if number < most]


def schema_of(settings: Mapping[str, Any]) -> pa.Schema:
    """Return the columns of a run's files, with the run as their metadata."""
    columns = [
        pa.field("id", pa.string()),
        pa.field("label", pa.string()),
        pa.field("prediction", pa.int32()),
        pa.field("confidence", pa.float32()),
        pa.field("dead", pa.int32()),
    ]
    for site in settings["sites"]:
        columns.append(pa.field(f"kept_{site}", pa.list_(pa.int32())))
        columns.append(pa.field(f"contribution_{site}", pa.list_(pa.float16())))
    return pa.schema(columns, {"pathwaylib": json.dumps(settings)})


def shard_path(folder: Path, number: int) -> Path:
    """Return where a shard's rows are."""
    return folder / f"part-{number:06d}.parquet"


class Shard(NamedTuple):
    """What the end of a shard's file says."""

    rows: int
    remarks: list[list[str]]


def shard_in(path: Path) -> Shard | None:
    """Read the end of a shard's file; None where there is no whole file."""
    try:
        end = pq.read_metadata(path)
        remarks = json.loads(end.metadata[b"remarks"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError):
        return None
    told = isinstance(remarks, list) and all(
        isinstance(remark, list) and len(remark) == 3 and all(isinstance(part, str) for part in remark)
        for remark in remarks
    )
    return Shard(end.num_rows, remarks) if told else None
