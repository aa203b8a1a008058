"""The student's process: run the notebook, call its functions on the grader's inputs, write what they return.

Started by :mod:`pathwaylib.grading.process` as a file of its own, in an empty folder. Nothing that happens here is
believed: the grader reads the files that are left, as data.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any


def main(folder: Path) -> None:
    """Run the submission that lies in the folder."""
    told = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    limit(told["limits"])
    # The standard streams may be closed or full: the student's output goes nowhere.
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda *_, **__: None}
    stopped = [problem for number, source in told["cells"] if (problem := run_cell(number, source, names))]
    put(folder / "ready", json.dumps(stopped[:20]).encode())
    from safetensors.torch import load_file  # after the notebook: importing torch takes seconds, and may fail

    inputs = load_file(folder / "inputs.safetensors")
    for number, name, calls in told["parts"]:
        put(folder / f"{number}.begun", b"")
        try:
            put(folder / f"{number}.safetensors", answers(names, name, calls, inputs))
        except BaseException as error:  # a student's code may end in any way
            put(folder / f"{number}.json", json.dumps(describe(error)).encode())


def limit(limits: dict[str, int]) -> None:
    """Bound what this process may use, where the system can."""
    try:
        import resource
    except ImportError:
        return
    for name, value in limits.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            with suppress(ValueError, OSError):  # macOS knows limits that it does not let one set
                resource.setrlimit(kind, (value, value))


def run_cell(number: int, source: str, names: dict[str, Any]) -> str | None:
    """Run one cell; say how it failed."""
    try:
        exec(compiled(source, f"cell {number}"), names)
    except BaseException as error:
        return f"cell {number}: {describe(error)}"
    return None


def compiled(source: str, name: str) -> CodeType:
    """Compile a cell without its commands to Jupyter: magics, lines of the shell and calls for help.

    Only a line that Python stumbles over is one: within brackets or a string, others may begin with ``%`` or ``!``.
    """
    lines = dict(enumerate(source.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1))
    while True:
        try:
            return compile("\n".join(lines.values()), name, "exec", dont_inherit=True)
        except SyntaxError as error:
            line = lines.get(error.lineno or 0, "")
            command = line.strip()
            if not (command.startswith(("%", "!", "?")) or command.endswith("?")):
                raise
            lines[error.lineno or 0] = line[: len(line) - len(line.lstrip())] + "pass"


def answers(names: dict[str, Any], name: str, calls: list[Any], inputs: dict[str, Any]) -> bytes:
    """Call the named function, or take the named value; return the answers as safetensors."""
    import torch
    from safetensors.torch import save

    from pathwaylib.exercises.judging import as_tensors
    from pathwaylib.grading.exchange import decode

    if name not in names:
        raise NameError(f"{name} is not defined")
    found: dict[str, torch.Tensor] = {}
    for call, arguments in enumerate(calls):
        value = names[name]
        if callable(value):
            value = value(*(decode(argument, inputs) for argument in arguments))
        if value is None or value is ...:
            raise ValueError("nothing is returned yet: replace the dots by your answer")
        tensors = as_tensors(value)
        if tensors is None:
            raise TypeError(f"a {type(value).__name__} is no tensor, number, pathway or tuple of them")
        for index, tensor in enumerate(tensors):
            found[f"{call}/{index}"] = tensor.cpu().clone().contiguous()
    return save(found)


def describe(error: BaseException) -> str:
    """Say in one line what went wrong."""
    return f"{type(error).__name__}: {error!s}"[:300]


def put(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
