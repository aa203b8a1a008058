"""Execute the book's notebooks, and keep what is stored of them stable.

    python tools/notebooks.py execute book/*.ipynb    each in a fresh kernel, in place
    python tools/notebooks.py check book/*.ipynb      say what is wrong with a stored notebook, and fail
    python tools/notebooks.py normalise book/*.ipynb  take out what changes from run to run, in place
    python tools/notebooks.py unsolve book/*.ipynb    take the solutions of the exercises out, in place
    python tools/notebooks.py release assignments/*.ipynb --to FOLDER
                                                      write the students' version and the teachers' of each

A stored notebook must not differ between two equal runs: no timings, no random ids, no progress bars.
"""

from __future__ import annotations

import argparse
import base64
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

INSTALL_CELL = """\
import importlib.util, os, subprocess, sys
if importlib.util.find_spec("pathwaylib") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", os.environ.get("PATHWAYLIB_SOURCE", "pathwaylib")], check=True)
import pathwaylib
pathwaylib.setup(seed=0)"""  # noqa: E501
"""First code cell of every chapter: installs pathwaylib only where it is missing, as in Colab."""

MAX_BYTES = 1_500_000
CELL_SECONDS = 600
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> float:
    """Run a notebook from its own folder, as a reader does, store the outputs in place; return the seconds it took."""
    notebook = read(path)
    started = time.perf_counter()
    # record_timing would write the clock into every cell's metadata.
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        # Errors only: a warning on the kernel's own transport says nothing about the chapter.
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    seconds = time.perf_counter() - started
    _raise_on_warnings(notebook, path)
    write(normalised(notebook), path)
    return seconds


def _raise_on_warnings(notebook: NotebookNode, path: Path) -> None:
    """Refuse a chapter that warns: its stderr is not stored, so nbval and the reader would be the first to see it."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr" and "Warning: " in output.text:
                raise RuntimeError(f"{path}: cell {number} warns: {output.text.strip()}")


def read(path: Path) -> NotebookNode:
    """Read a notebook in the current format."""
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook, whole or not at all."""
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    partial.replace(path)


def normalised(notebook: NotebookNode) -> NotebookNode:
    """Drop what differs between two equal runs, in place."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict({**_book_metadata(notebook.metadata), **METADATA})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"
        for volatile in ("execution", "ExecuteTime", "collapsed", "scrolled", "id", "outputId", "colab"):
            cell.metadata.pop(volatile, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _transient(output)]
    return notebook


def _book_metadata(metadata: NotebookNode) -> dict[str, object]:
    """Keep of a notebook's metadata what the book reads."""
    return {key: metadata[key] for key in ("mystnb", "myst", "jupytext", "pathways") if key in metadata}


def _transient(output: NotebookNode) -> bool:
    """Tell progress bars (stderr) and views of a kernel's widgets, whose model is gone with the kernel."""
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def problems(path: Path) -> Iterator[str]:
    """Yield what keeps a stored notebook from being published."""
    if path.stat().st_size > MAX_BYTES:
        yield f"{path.stat().st_size:,} bytes; at most {MAX_BYTES:,}: show smaller or fewer figures"
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not code or code[0].source.strip() != INSTALL_CELL:
        yield "the first code cell is not the install cell (INSTALL_CELL in tools/notebooks.py)"
    if not any("parameters" in cell.metadata.get("tags", ()) and "profile" in cell.source for cell in code):
        yield 'no cell tagged "parameters" sets profile = "quick"'
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            yield from (f"cell {number}: {problem}" for problem in _cell_problems(cell))
        elif "```{" in cell.source:
            # Where MyST is not rendered, as in Colab, such a fence makes code of its text and formulas.
            yield f"cell {number}: a directive in backticks; fence it with colons"
    before = nbformat.writes(notebook)
    if nbformat.writes(normalised(notebook)) != before:
        yield "metadata or outputs that change from run to run: python tools/notebooks.py normalise"


def _cell_problems(cell: NotebookNode) -> Iterator[str]:
    if not cell.source.strip():
        yield "empty"
    elif cell.execution_count is None:
        # nbval passes a cell without count and outputs in silence.
        yield "not executed"
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"stored error {output.ename}"
        for image in (kind for kind in output.get("data", {}) if kind.startswith("image/")):
            if not cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip():
                yield "figure without alt text (cell metadata mystnb.image.alt)"
            if image == "image/png" and not base64.b64decode(output.data[image]).startswith(b"\x89PNG"):
                yield "image/png that is no PNG"


def without_solutions(notebook: NotebookNode) -> NotebookNode:
    """Take the solutions of a chapter's exercises out, in place: all from ``solution-start`` to ``solution-end``."""
    kept, inside = [], False
    for cell in notebook.cells:
        inside = inside or "{solution-start}" in cell.source
        if not inside:
            kept.append(cell)
        inside = inside and "{solution-end}" not in cell.source
    if inside or any("exercise-solution" in cell.metadata.get("tags", ()) for cell in kept):
        raise ValueError("a solution without {solution-start} or {solution-end}")
    notebook.cells = kept
    return notebook


def release(path: Path, folder: Path) -> None:
    """Write two versions of an assignment: with stubs for students, with solutions and remarks for teachers."""
    for version, left_out in (("student", {"solution", "instructor"}), ("instructor", {"stub"})):
        notebook = read(path)
        notebook.cells = [cell for cell in notebook.cells if not left_out & set(cell.metadata.get("tags", ()))]
        (folder / version).mkdir(parents=True, exist_ok=True)
        write(normalised(notebook), folder / version / path.name)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["execute", "normalise", "check", "unsolve", "release"])
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, default=Path("_build/assignments"), help="where release writes")
    arguments = parser.parse_args()
    failed = False
    for path in arguments.notebooks:
        if arguments.command == "execute":
            print(f"{path.name}: ", end="", flush=True)
            print(f"{execute(path):.0f} s", flush=True)
        elif arguments.command == "normalise":
            write(normalised(read(path)), path)
        elif arguments.command == "unsolve":
            write(normalised(without_solutions(read(path))), path)
        elif arguments.command == "release":
            release(path, arguments.to)
        else:
            for problem in problems(path):
                failed = True
                print(f"{path}: {problem}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
