"""Tables that experiments write once and chapters read: CSV files with their provenance."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .errors import PathwayError
from .files import atomic_writes, cache_dir, load_json

_MEND = "bring back an earlier version, or remove it with its .csv or .json, and its rows are computed again"


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
        """Return how a stored table came about: the JSON file beside it.

        Raises:
            FileNotFoundError: if there is none.
            PathwayError: if it is damaged.
        """
        return load_json(self.folder / f"{name}.json", _MEND)

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
            PathwayError: if the stored table is damaged or was computed with other settings, or there are no rows.
        """
        settings = json.loads(json.dumps(settings or {}))
        stored = self._stored(name, settings)
        if len(stored):
            return stored
        start = time.perf_counter()
        frame = pd.DataFrame([dict(row) for row in compute()])
        if frame.empty:
            raise PathwayError(f"no rows were computed for {name}")
        return self._write(name, frame, (time.perf_counter() - start) / 60, settings)

    def jobs(
        self,
        name: str,
        jobs: Sequence[Mapping[str, Any]],
        work: Callable[..., Mapping[str, object]],
        settings: Mapping[str, object] | None = None,
    ) -> pd.DataFrame:
        """Do the jobs that a table does not hold yet, one row each; return the table.

        The table is the ledger: it is written after every job, so a run that was killed goes on with the next. Several
        processes may share it: each takes jobs that no other is at.

        Args:
            name: of the table, without ``.csv``.
            jobs: what tells each job from the others, such as ``{"method": "random", "seed": 0}``, in the order to do
                them in; all with the same keys.
            work: takes a job's entries as keyword arguments, returns what was found: the rest of its row.
            settings: what all rows depend on; a table computed with others is not taken.

        Returns:
            The rows of all jobs done so far, by this process or others, each with ``minutes``, ``commit`` and
            ``finished``.

        Raises:
            PathwayError: if the stored table is damaged or was computed with other settings, or an entry of a job
                would not be found again in a CSV file, such as ``None`` or 1/3.

        Example:
            >>> import tempfile
            >>> store = ResultStore(tempfile.mkdtemp())
            >>> squares = store.jobs("squares", [{"n": 2}, {"n": 3}], lambda n: {"square": n * n})
            >>> squares[["n", "square"]].to_dict("records")
            [{'n': 2, 'square': 4}, {'n': 3, 'square': 9}]
        """
        path = self.folder / f"{name}.csv"
        settings = json.loads(json.dumps(settings or {}))
        _require_found_again(jobs)
        path.parent.mkdir(parents=True, exist_ok=True)
        locks = cache_dir() / "locks" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        locks.mkdir(parents=True, exist_ok=True)
        for job in tqdm(jobs, unit="job"):
            mark = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
            try:
                with FileLock(locks / mark, timeout=0):
                    if _holds(self._stored(name, settings), job, path):
                        continue
                    start = time.perf_counter()
                    found = work(**job)
                    minutes = (time.perf_counter() - start) / 60
                    row = {**job, **found, "minutes": round(minutes, 2), "commit": _commit()}
                    row["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
                    with FileLock(locks / "table"):
                        before = self._stored(name, settings)
                        frame = pd.concat([before, pd.DataFrame([row])], ignore_index=True)
                        minutes = pd.to_numeric(frame["minutes"], errors="coerce").sum()
                        self._write(name, frame, float(minutes), settings)
            except Timeout:
                continue  # another process is at it
        return self._stored(name, settings)

    def _stored(self, name: str, settings: object) -> pd.DataFrame:
        """Return a stored table, or an empty one."""
        path = self.folder / f"{name}.csv"
        if not path.exists():
            return pd.DataFrame()
        if not path.with_suffix(".json").exists():
            raise PathwayError(f"{path} has no {path.stem}.json beside it that says how it came about; {_MEND}")
        noted = self.provenance(name).get("settings")
        if noted != settings:
            raise PathwayError(
                f"{path} was computed with {noted}, not with {settings}; remove it, or give another folder"
            )
        return _read_table(path)

    def _write(self, name: str, frame: pd.DataFrame, minutes: float, settings: object) -> pd.DataFrame:
        """Store a table and its provenance; return it as every later reader gets it."""
        path = self.folder / f"{name}.csv"
        text = json.dumps(_provenance(minutes, len(frame), settings), indent=1) + "\n"
        # The provenance first: a table without one would be numbers of unknown origin.
        with atomic_writes(path.with_suffix(".json"), path) as (noted, table):
            noted.write_text(text, encoding="utf-8")
            table.write_text(_as_csv(frame), encoding="utf-8")
        return _read_table(path)


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
        return pd.concat([_read_table(part) for part in parts], ignore_index=True)
    if not path.is_file():
        stored = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.csv"))
        raise PathwayError(f"there is no table {name!r}; stored are {', '.join(stored) or 'none'}")
    return _read_table(path)


def _as_csv(frame: pd.DataFrame) -> str:
    text: str = frame.to_csv(index=False, float_format="%.6g")
    return text


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except ValueError as error:  # pandas' own errors, and text that is not UTF-8
        raise PathwayError(f"{path} is damaged ({error}); {_MEND}") from error


def _holds(table: pd.DataFrame, job: Mapping[str, Any], path: Path) -> bool:
    """Tell whether a table has the row of a job."""
    if table.empty:
        return False
    if absent := [key for key in job if key not in table]:
        raise PathwayError(f"{path} has no column {', '.join(absent)}: it is damaged or holds other jobs; {_MEND}")
    return bool(_rows_of(table, job).any())


def _rows_of(table: pd.DataFrame, job: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Mark the rows of a job."""
    marked: NDArray[np.bool_] = np.logical_and.reduce([table[key] == value for key, value in job.items()])
    return marked


def _require_found_again(jobs: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`PathwayError` for a job that a table would not hold as it is: it would be done at every call."""
    # Each as the only row, and among all: what a column is taken for depends on everything in it.
    for rows in [*([job] for job in jobs), list(jobs)]:
        back = pd.read_csv(io.StringIO(_as_csv(pd.DataFrame(rows)))) if rows else pd.DataFrame()
        for job in rows:
            if job.keys() != set(back) or not _rows_of(back, job).any():
                raise PathwayError(
                    f"the job {dict(job)} reads otherwise once it was written to a CSV file; give all jobs the same "
                    "keys, numbers of at most six digits, and text that is not 'None' or a number"
                )


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
