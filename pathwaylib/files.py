"""Where files are kept, and how they are written and read: whole or not at all, and without executing anything."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from platformdirs import user_cache_dir
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import PathwayError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_dir() -> Path:
    """Return pathwaylib's folder in the user cache directory (``PATHWAYLIB_CACHE`` overrides it).

    Example:
        >>> cache_dir().name
        'pathwaylib'
    """
    override = os.environ.get("PATHWAYLIB_CACHE")
    return Path(override or user_cache_dir("pathwaylib", appauthor=False)).expanduser()


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package, without importing it; None where it is not installed.

    Example:
        >>> package_folder("pathwaylib").name, package_folder("no_such_package")
        ('pathwaylib', None)
    """
    spec = find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` when the block succeeds, else it is removed.

    Raises:
        OSError: of a full disk, with what to do; ``path`` is as it was.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_write(folder / "note.txt") as temporary:
        ...     _ = temporary.write_text("whole or not at all")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    with atomic_writes(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_writes(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Do what :func:`atomic_write` does for several files that belong together: none is replaced before all are whole.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_writes(folder / "a", folder / "b") as (a, b):
        ...     _ = a.write_text("first"), b.write_text("second")
        >>> sorted(file.name for file in folder.iterdir())
        ['a', 'b']
    """
    paths = tuple(path.resolve() for path in paths)  # a link stays one, and what it leads to is replaced
    if strange := [path for path in paths if path.exists() and not path.is_file()]:
        raise PathwayError(f"{strange[0]} is there and is no regular file; give another path to write to")
    temporaries: list[Path] = []
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
            temporary.open("xb").close()
            temporaries.append(temporary)
        yield tuple(temporaries)
        for temporary in temporaries:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # a power cut could leave the new name with nothing behind it
        for temporary, path in zip(temporaries, paths, strict=True):
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        as_before = " and ".join(map(str, paths))
        advice = f"{os.strerror(error.errno)}; {as_before} left as before: free some space, or write elsewhere"
        raise OSError(error.errno, advice) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def clear_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote ``path`` left beside it; nobody else may be writing it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / ".note-ab12_xyz.txt").touch()
        >>> clear_leftovers(folder / "note.txt")
        >>> list(folder.iterdir())
        []
    """
    path = path.resolve()  # as it was written
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}-{'?' * 8}{glob.escape(path.suffix)}"):
        leftover.unlink(missing_ok=True)


def load_json(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        OSError: if there is no such file, or it may not be read.
        PathwayError: if it is damaged or holds something else, with the ``advice`` what to do then.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "card.json"
        >>> _ = path.write_text('{"seed": 0}')
        >>> load_json(path, "train it again")
        {'seed': 0}
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = f"it holds a {type(found).__name__}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise PathwayError(f"{path} is damaged ({reason}); {advice}")


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: their names, kinds, shapes and values, in the order given.

    Example:
        >>> digest_of({"a": torch.zeros(2)}) == digest_of({"a": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Store tensors and some text as safetensors, with a checksum, atomically.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "some.safetensors"
        >>> save_tensors(path, {"a": torch.arange(3)}, {"of": "numbers"})
        >>> load_tensors(path)
        ({'a': tensor([0, 1, 2])}, {'of': 'numbers'})
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    noted = dict(metadata or {})
    noted["sha256"] = _checksum(plain, noted)
    with atomic_write(path) as temporary:
        # Not save_file: a full disk is no OSError there.
        temporary.write_bytes(safetensors.torch.save(plain, noted))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its text; nothing in it is executed.

    Files of others have no checksum; their contents are taken as they are.

    Raises:
        OSError: if there is no such file, or it may not be read.
        PathwayError: if it is damaged or no safetensors file.
    """
    path.open("rb").close()  # an error that names the file, where there is none
    try:
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            noted = dict(stored.metadata() or {})
    except (SafetensorError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise PathwayError(f"{path} is damaged or no safetensors file ({error}); write it again") from error
    checksum = noted.pop("sha256", None)
    if checksum not in (None, _checksum(tensors, noted)):
        raise PathwayError(f"{path} is damaged (its contents are not those of its checksum); write it again")
    return tensors, noted


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    text = json.dumps(metadata, sort_keys=True)
    return hashlib.sha256((text + digest_of(dict(sorted(tensors.items())))).encode()).hexdigest()
