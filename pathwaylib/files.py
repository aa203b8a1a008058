"""Where files are kept, and how they are written: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir


def cache_dir() -> Path:
    """Return pathwaylib's folder in the user cache directory (``PATHWAYLIB_CACHE`` overrides it).

    Example:
        >>> cache_dir().name
        'pathwaylib'
    """
    override = os.environ.get("PATHWAYLIB_CACHE")
    return Path(override or user_cache_dir("pathwaylib", appauthor=False))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` when the block succeeds, else it is removed.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_write(folder / "note.txt") as temporary:
        ...     _ = temporary.write_text("whole or not at all")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp lets only its owner read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
