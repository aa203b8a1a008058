"""Tables that experiments write once and chapters read: CSV files with their provenance."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .errors import PathwayError
from .files import atomic_write


class ResultStore:
    """A folder of result tables, each computed once: a run that was stopped goes on where it stopped.

    Args:
        folder: where the tables are; it is made with the first one.

    Example:
        >>> import tempfile
        >>> store = ResultStore(tempfile.mkdtemp())
        >>> store.table("squares", lambda: [{"n": n, "square": n * n} for n in range(3)])["square"].tolist()
        [0, 1, 4]
        >>> store.table("squares", lambda: 1 / 0)["square"].tolist()  # read, not computed
        [0, 1, 4]
        >>> sorted(store.provenance("squares"))
        ['commit', 'finished', 'minutes', 'rows', 'settings', 'threads', 'versions']
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def provenance(self, name: str) -> dict[str, Any]:
        """Return how a stored table came about: the JSON file beside it."""
        return dict(json.loads((self.folder / f"{name}.json").read_text()))

    def table(
        self,
        name: str,
        compute: Callable[[], Iterable[Mapping[str, object]]],
        settings: Mapping[str, object] | None = None,
    ) -> pd.DataFrame:
        """Return a table, computed and stored if it is not there yet.

        Args:
            name: of the table, without ``.csv``; may hold folders.
            compute: returns the rows.
            settings: what the table depends on, noted in the provenance; a table computed with others is not taken.

        Raises:
            PathwayError: if the stored table was computed with other settings, or there are no rows.
        """
        path = self.folder / f"{name}.csv"
        settings = json.loads(json.dumps(settings or {}))
        if path.exists():
            noted = self.provenance(name)["settings"]
            if noted != settings:
                raise PathwayError(
                    f"{path} was computed with {noted}, not with {settings}; remove it, or give another folder"
                )
            return pd.read_csv(path)
        start = time.perf_counter()
        frame = pd.DataFrame([dict(row) for row in compute()])
        if frame.empty:
            raise PathwayError(f"no rows were computed for {name}")
        minutes = (time.perf_counter() - start) / 60
        # The provenance first: a table without one would be numbers of unknown origin.
        with atomic_write(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(_provenance(minutes, len(frame), settings), indent=1) + "\n")
        with atomic_write(path) as temporary:
            frame.to_csv(temporary, index=False, float_format="%.6g")
        return pd.read_csv(path)  # as every later reader gets it


def load_results(name: str) -> pd.DataFrame:
    """Read a table of the full-size experiments, as it ships with the package.

    Args:
        name: such as ``"critical_pathways/cifar10-vgg/sweep"``; of a folder, all its tables are put together.

    Raises:
        PathwayError: if there is no such table; the message lists those there are.

    Example:
        >>> float(load_results("critical_pathways/cifar10-vgg/faithfulness")["images"].min()) >= 500
        True
    """
    folder = Path(__file__).parent / "stored_results"
    path = folder / f"{name}.csv"
    if (folder / name).is_dir() and (parts := sorted((folder / name).glob("*.csv"))):
        return pd.concat([pd.read_csv(part) for part in parts], ignore_index=True)
    if not path.is_file():
        stored = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.csv"))
        raise PathwayError(f"there is no table {name!r}; stored are {', '.join(stored) or 'none'}")
    return pd.read_csv(path)


def _provenance(minutes: float, rows: int, settings: object) -> dict[str, object]:
    return {
        "commit": _commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": round(minutes, 2),
        "rows": rows,
        "settings": settings,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("pathwaylib", "torch", "torchvision", "captum")},
    }


def _commit() -> str | None:
    """Name the commit the code is at, with a plus where it was changed since; None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no", "--", "."):
        return commit + "+"
    return commit
