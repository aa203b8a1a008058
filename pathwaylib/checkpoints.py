"""Checkpoints of a training: written whole or not at all, checked when they are read, nothing in them executed."""

from __future__ import annotations

import csv
import io
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .errors import PathwayError
from .files import atomic_writes, clear_leftovers

Log: TypeAlias = list[dict[str, float]]
Parts: TypeAlias = Mapping[str, nn.Module | Optimizer | LRScheduler | torch.Generator]


def store_checkpoint(
    path: Path, parts: Parts, recipe: Mapping[str, object], log: Sequence[Mapping[str, float]]
) -> None:
    r"""Write the state of a training, and its log beside it as CSV.

    Args:
        path: of the checkpoint; the log of ``run.pt`` is ``run.csv``.
        parts: whose states to store, by name.
        recipe: plain values that decide the training, among them digests of the tensors that do.
        log: one row per step or epoch done, at least one.

    Raises:
        PathwayError: if the path is that of a log.
        OSError: of a full disk; the checkpoint before is as it was.

    Example:
        >>> import tempfile
        >>> path, layer = Path(tempfile.mkdtemp()) / "run.pt", nn.Linear(2, 1)
        >>> store_checkpoint(path, {"model": layer}, {"seed": 0}, [{"epoch": 1, "loss": 0.5}])
        >>> resume_checkpoint(path, {"model": nn.Linear(2, 1)}, {"seed": 0})
        [{'epoch': 1, 'loss': 0.5}]
        >>> path.with_suffix(".csv").read_text()
        'epoch,loss\n1,0.5\n'
    """
    states = {
        name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
        for name, part in parts.items()
    }
    # In memory first: of a full disk torch's own writer says nothing but that a position is unexpected.
    content = io.BytesIO()
    torch.save({**states, "recipe": dict(recipe), "log": [dict(row) for row in log]}, content)
    # The log first: a run that is killed between the two writes the row again, not never.
    with atomic_writes(_log_beside(path), path) as (table, temporary):
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(log[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in log)
        temporary.write_bytes(content.getvalue())


def resume_checkpoint(
    path: Path, parts: Parts, recipe: Mapping[str, object], device: torch.device | str = "cpu"
) -> Log:
    """Give the parts the states of a checkpoint, if there is one; return its log, which is empty if there is none.

    Args:
        path: of the checkpoint; only one process may be at it.
        parts: as given to :func:`store_checkpoint`.
        recipe: as given to :func:`store_checkpoint`.
        device: where the states are to be.

    Raises:
        PathwayError: if the checkpoint is damaged, of other parts or of another recipe; the modules are as they were.
    """
    for file in (path, _log_beside(path)):
        clear_leftovers(file)
    if not path.exists():
        return []
    state = _checked(path, device)
    if (noted := state.get("recipe")) != recipe:
        raise PathwayError(
            f"{path} holds a run of another recipe ({_difference(noted, recipe)}); remove it or choose another"
        )
    try:
        log = [dict(row) for row in state["log"]]
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                _require_fit(part, state[name])
        # Modules last: their weights belong to the caller, and stay where another part is refused.
        for name, part in sorted(parts.items(), key=lambda item: isinstance(item[1], nn.Module)):
            if isinstance(part, torch.Generator):
                part.set_state(state[name].cpu())
            else:
                part.load_state_dict(state[name])
        return log
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PathwayError(
            f"{path} is of another network ({_first_line(error)}); remove it or choose another"
        ) from error


def _log_beside(path: Path) -> Path:
    if path.suffix == ".csv":
        raise PathwayError(f"{path} has the name of a log; give the checkpoint another, such as {path.stem}.pt")
    # Not with_suffix, which takes the decimals of gradient-0.3 for a suffix.
    return path.with_name(f"{path.name.removesuffix('.pt')}.csv")


def _difference(noted: object, recipe: Mapping[str, object]) -> str:
    """Say in what a stored recipe differs from the one given."""
    there = noted if isinstance(noted, dict) else {}
    names = [name for name in sorted(there.keys() | recipe) if there.get(name) != recipe.get(name)]
    return ", ".join(f"{name}: {there.get(name)} there, {recipe.get(name)} here" for name in names)


def _require_fit(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise where a state is not one of ``module``; ``load_state_dict`` says so only after it has loaded what fits."""
    wanted = {key: getattr(value, "shape", None) for key, value in module.state_dict().items()}
    found = {key: getattr(value, "shape", None) for key, value in state.items()}
    if odd := [key for key in sorted(wanted.keys() | found) if wanted.get(key) != found.get(key)]:
        raise ValueError(f"{', '.join(odd[:3])} differ")


def _checked(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Read a checkpoint whose checksums are right; PyTorch does not look at them."""
    try:
        with path.open("rb") as file:
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        return state
    except OSError:
        raise
    except Exception as error:  # of damaged files zipfile and torch raise a dozen types; all mean the same
        # PyTorch would advise to execute what is in the file.
        refused = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if refused else _first_line(error)
        raise PathwayError(
            f"{path} is damaged or no checkpoint ({reason}); remove it, and the run starts anew"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
