"""Start the student's process, stop it in time, and read what it left as what it is: a stranger's bytes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import site
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor, float64

from ..errors import PathwayError
from .exchange import encode
from .questions import Given

RUNNER = Path(__file__).with_name("runner.py")
MOST_BYTES = 2**24
"""The student's process can write no larger file, and none is read."""
MOST_DIMENSIONS = 8
"""No question asks for as many; not every operation takes what a file can hold."""
MOST_OF_A_LIMIT = 10**6
"""Seconds or gigabytes; the system counts both in whole numbers of 64 bits."""
PASSED_ON = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
"""Variables of the environment that the student's process gets: no others, which may hold passwords."""


@dataclass(frozen=True)
class Limits:
    """What a student's process may use.

    Attributes:
        seconds: for the notebook, and again for each part of a question.
        memory: gigabytes of address space, where the system bounds it (Linux). PyTorch alone takes nearly four.
        within: a command that starts the process inside something tighter, such as a container; it gets Python's
            command line appended. The last argument is the only folder that must be writable.

    Raises:
        PathwayError: if a number is not above 0, or above a million.
    """

    seconds: float = 60.0
    memory: float = 8.0
    within: str = ""

    def __post_init__(self) -> None:
        for name, value in (("seconds", self.seconds), ("memory", self.memory)):
            if not 0 < value <= MOST_OF_A_LIMIT:
                raise PathwayError(f"{name} is {value:g}; give a number above 0 and at most {MOST_OF_A_LIMIT:,}")


@dataclass(frozen=True)
class Ran:
    """What came back.

    Attributes:
        answers: for each part the answers to its calls, or what went wrong.
        failures: cells of the notebook that failed.
        stopped: why the process had to be started anew or given up; empty where all went well.
    """

    answers: tuple[tuple[Given, ...] | str, ...]
    failures: tuple[str, ...]
    stopped: tuple[str, ...]


def run_submission(
    cells: Sequence[tuple[int, str]], parts: Sequence[tuple[str, Sequence[tuple[Any, ...]], bool]], limits: Limits
) -> Ran:
    """Run a notebook's cells in a process of its own and collect its answers.

    A part that ends or stops the process costs only itself: the rest is run again without it.

    Args:
        cells: numbers and sources of the code cells.
        parts: for each, the name to call, the arguments of its calls, and whether answers must be finite.
        limits: of time and memory.

    Returns:
        :class:`Ran`.
    """
    answers: list[tuple[Given, ...] | str] = [""] * len(parts)
    failures: tuple[str, ...] = ()
    stopped: list[str] = []
    remaining = list(range(len(parts)))
    while remaining:
        with _scratch() as folder:
            _prepare(folder, cells, {number: parts[number] for number in remaining}, limits)
            why = _run(folder, remaining, limits)
            failures = _failures(_read(folder / "ready")) or failures
            unanswered = []
            for number in remaining:
                found = _answer(folder, number, len(parts[number][1]), parts[number][2])
                if found is None:
                    unanswered.append(number)
                else:
                    answers[number] = found
            begun = [number for number in remaining if os.path.lexists(folder / f"{number}.begun")]
        if not unanswered:
            break
        # What ended the process is the part that it was at; without any it was the notebook, and nothing will help.
        given_up = begun[-1:] if begun else unanswered
        stopped.append(f"{parts[given_up[0]][0] if begun else 'the notebook'}: {why}")
        for number in set(given_up) & set(unanswered):
            answers[number] = why
        remaining = [number for number in unanswered if number not in given_up]
    return Ran(tuple(answers), failures, tuple(stopped))


@contextmanager
def _scratch() -> Iterator[Path]:
    """Yield a new folder. What the student's process made of it, such as a deep nest, may defy removal, and stays."""
    folder = tempfile.TemporaryDirectory(prefix="submission-", ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        with suppress(OSError, RecursionError):
            folder.cleanup()


def _prepare(
    folder: Path,
    cells: Sequence[tuple[int, str]],
    parts: Mapping[int, tuple[str, Sequence[tuple[Any, ...]], bool]],
    limits: Limits,
) -> None:
    tensors: dict[str, Tensor] = {}
    told = {
        "cells": list(cells),
        "parts": [
            [number, name, [[encode(argument, tensors) for argument in call] for call in calls]]
            for number, (name, calls, _) in parts.items()
        ],
        "limits": {
            "RLIMIT_AS": int(limits.memory * 2**30),
            "RLIMIT_FSIZE": MOST_BYTES,
            "RLIMIT_CORE": 0,
            # A second bound on time, should this process be killed before it can stop that one.
            "RLIMIT_CPU": int(limits.seconds * (len(parts) + 2) * (os.cpu_count() or 1)) + 1,
        },
    }
    save_file(tensors, folder / "inputs.safetensors")
    (folder / "submission.json").write_text(json.dumps(told), encoding="utf-8")


def _run(folder: Path, parts: Sequence[int], limits: Limits) -> str:
    """Run until all is answered, the process ends, or it makes no progress in time; return why it ended."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "MPLBACKEND": "agg",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Packages that were installed for the user are found from HOME, which is another now.
        "PYTHONUSERBASE": site.getuserbase(),
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        process = subprocess.Popen(
            # -P: no module is found in the folder that the student's code can write to.
            [*shlex.split(limits.within), sys.executable, "-P", str(RUNNER), str(folder)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # ValueError: a quotation that does not end
        raise PathwayError(f"within is {limits.within!r}, which cannot be started: {error}") from error
    done, deadline = 0, time.monotonic() + limits.seconds
    try:
        while process.poll() is None:
            time.sleep(0.02)
            now_done = sum(_is_done(folder, name) for name in ("ready", *map(str, parts)))
            if now_done > done:
                done, deadline = now_done, time.monotonic() + limits.seconds
            if time.monotonic() > deadline:
                return f"took more than {limits.seconds:g} s"
    finally:
        _end(process)
    return "ended its process" if process.returncode >= 0 else f"its process was ended by signal {-process.returncode}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started, so far as that has not left its group."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _is_done(folder: Path, name: str) -> bool:
    return any(os.path.lexists(folder / f"{name}{ending}") for ending in ("", ".json", ".safetensors"))


def _read(path: Path) -> bytes | None:
    """Return a file's bytes; None where it is none, too large, a link, a pipe or a device."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except (OSError, ValueError):
        return None
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_BYTES:
            return None
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(MOST_BYTES + 1)
    finally:
        os.close(handle)
    return content if len(content) <= MOST_BYTES else None


def one_line(value: object) -> str:
    """Return a stranger's text as one short line, without control characters and what no encoding has."""
    text = re.sub(r"[^\S ]|[\x00-\x1f\x7f-\x9f]", " ", str(value))
    return text.encode(errors="backslashreplace").decode()[:300]


def _failures(ready: bytes | None) -> tuple[str, ...]:
    try:
        told = json.loads(ready or b"[]")
    except (ValueError, RecursionError):
        return ()
    return tuple(map(one_line, told[:20])) if isinstance(told, list) else ()


def _answer(folder: Path, number: int, calls: int, finite: bool) -> tuple[Given, ...] | str | None:
    """Return the answers to a part, or what is wrong with them; None where there are none."""
    content = _read(folder / f"{number}.safetensors")
    if content is None:
        error = _read(folder / f"{number}.json")
        if error is not None:
            try:
                return one_line(json.loads(error))
            except (ValueError, RecursionError):
                return "an error that cannot be read"
        if _is_done(folder, str(number)):
            return "left a file that is no answer"
        return None
    try:
        tensors = load(content)
    except Exception as error:  # whatever a stranger's bytes make of the parser
        return f"left an answer that cannot be read ({type(error).__name__})"
    if any(tensor.dtype != float64 for tensor in tensors.values()):
        return "left an answer that is not of float64"
    answers = []
    for call in range(calls):
        given: list[Tensor] = []
        while (key := f"{call}/{len(given)}") in tensors:
            given.append(tensors.pop(key))
        answers.append(tuple(given))
    if tensors or not all(answers) or any(tensor.ndim > MOST_DIMENSIONS for given in answers for tensor in given):
        return "left an answer of another form"
    if finite and not all(bool(tensor.isfinite().all()) for given in answers for tensor in given):
        return "the answer holds NaN or infinity"
    return tuple(answers)
