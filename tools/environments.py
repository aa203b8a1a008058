"""Run every chapter as Colab does, and write at its head what it was verified with.

    python tools/environments.py run book/*.ipynb     in both environments; updates book/environments.csv
    python tools/environments.py write book/*.ipynb   the "Verified" line of each chapter, from that table
    python tools/environments.py badge book/*.ipynb   a link that opens the chapter in Colab, for the address that
                                                      PATHWAYS_REPOSITORY_URL gives; nothing without one

A chapter starts in an empty folder, with an empty cache, in an environment that has only what Colab brings. Its own
first cell installs the library (a wheel built here) and what that needs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import notebooks
import psutil

from pathwaylib.files import atomic_write

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints.txt"
TABLE = ROOT / "book" / "environments.csv"
PACKAGED = ("pyproject.toml", "README.md", "LICENSE")
# What Colab has before the first cell runs. The versions are ours: Colab's differ from week to week.
PRESENT = ("torch", "torchvision", "numpy", "matplotlib", "pillow", "tqdm", "ipykernel", "ipywidgets", "nbclient")
NAMED = ("torch", "torchvision", "ipywidgets", "ipython", "numpy")
# "current" has the versions that `make` installs, "lowest" the lower bounds that pyproject.toml states; for torch, the
# oldest that Colab still gives.
LOWEST_TORCH = {"torch": "2.9.1", "torchvision": "0.24.1"}
ENVIRONMENTS = ("current", "lowest")
VERIFIED_MARK = "**Verified** "
COLAB_MARK = "[Open in Colab]"
OURS = ("PYTHON", "PYTEST", "VIRTUAL_ENV", "PATHWAYLIB")  # variables that a reader does not have
_RUN = """
import json, sys, time, nbclient, nbformat
from importlib.metadata import version
notebook = nbformat.read(sys.argv[2], as_version=4)
started = time.perf_counter()
nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", extra_arguments=["--log-level=40"]).execute()
cells = sum(cell.cell_type == "code" and cell.execution_count is not None for cell in notebook.cells)
seconds = time.perf_counter() - started
versions = {"python": sys.version.split()[0], **{name: version(name) for name in sys.argv[3:]}}
with open(sys.argv[1], "w") as report:
    json.dump({"cells": cells, **versions, "seconds": seconds}, report)
"""


def pins(environment: str) -> str:
    """Return pip's constraints of an environment, a line a package."""
    chosen = dict(line.split("==") for line in PINS.read_text().splitlines() if "==" in line)
    if environment == "lowest":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        stated = [*project["dependencies"], *extras["book"], *extras["imagenet"], *extras["cluster"]]
        bounds = dict(re.findall(r"^([\w-]+).*?>=([\d.]+)", "\n".join(stated), re.MULTILINE))
        chosen = {name: f"{bound}.*" for name, bound in bounds.items()} | LOWEST_TORCH
    return "".join(f"{name}=={version}\n" for name, version in sorted(chosen.items()))


def run(*command: str | Path, **options: object) -> str:
    """Run a command; return what it printed, or raise with what it said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return str(done.stdout)


def build_wheel(folder: Path) -> Path:
    """Build the package from a copy, links followed, so that no build folder is left in the repository."""
    source = folder / "source"
    source.mkdir()
    for name in PACKAGED:
        (source / name).write_bytes((ROOT / name).read_bytes())
    run("cp", "-RL", ROOT / "pathwaylib", source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
    (built,) = folder.glob("pathwaylib-*.whl")
    return built


def create(folder: Path, *options: str) -> Path:
    """Make an empty environment; return its interpreter."""
    run(sys.executable, "-m", "venv", *options, folder)
    return folder / "bin" / "python"


def packages_of(folder: Path) -> Path:
    """Return where an environment keeps its packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))


def build_environment(environment: str, folder: Path) -> Path:
    """Make an environment with what Colab brings, in a new folder; return the folder."""
    python = create(folder)
    (folder / "constraints.txt").write_text(pins(environment))
    run(python, "-m", "pip", "install", "--quiet", "--constraint", folder / "constraints.txt", *PRESENT)
    return folder


def run_chapter(chapter: Path, environment: Path, wheel: Path) -> dict[str, object]:
    """Run a chapter over an environment, which stays as it is; return its minutes, its memory and the versions.

    The chapter gets a layer of its own above the environment: what it installs lies there, and goes with it. Memory is
    the largest sum over its processes that was seen, looking four times a second.
    """
    with tempfile.TemporaryDirectory() as name:
        layer, alone, cache = (Path(name) / part for part in ("layer", "alone", "cache"))
        python = create(layer, "--without-pip")
        (packages_of(layer) / "environment.pth").write_text(f"{packages_of(environment)}\n")
        alone.mkdir()
        (alone / chapter.name).write_bytes(chapter.read_bytes())
        variables = {
            **{key: value for key, value in os.environ.items() if not key.startswith(OURS)},
            "PATHWAYLIB_SOURCE": str(wheel),
            "PATHWAYLIB_CACHE": str(cache),
            "PIP_CONSTRAINT": str(environment / "constraints.txt"),
        }
        missing = "import importlib.util, sys; sys.exit(importlib.util.find_spec('pathwaylib') is not None)"
        run(python, "-c", missing, cwd=alone, env=variables)
        said = Path(name) / "said"
        with said.open("w") as output:
            process = psutil.Popen(
                [str(python), "-c", _RUN, "found.json", chapter.name, *NAMED],
                cwd=alone,
                env=variables,
                stdout=output,
                stderr=output,
            )
            peak = 0
            while process.poll() is None:
                peak = max(peak, _memory(process))
                time.sleep(0.25)
        if process.returncode:
            raise RuntimeError(f"{chapter.name} fails:\n{said.read_text()[-4000:]}")
        report = alone / "found.json"
        found = json.loads(report.read_text())
        report.unlink()
        left = sorted(path.name for path in alone.iterdir() if path.name != chapter.name)
        if left:
            raise RuntimeError(f"{chapter.name} left files behind: {', '.join(left)}")
    seconds = found.pop("seconds")
    return {**found, "minutes": round(seconds / 60, 1), "peak GB": round(peak / 1e9, 1)}


def _memory(process: psutil.Process) -> int:
    """Return the resident bytes of a process and those it started."""
    total = 0
    try:
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.NoSuchProcess:  # it ended while we counted
        pass
    return total


def load_table() -> list[dict[str, str]]:
    """Return the rows of the table, one for each chapter and environment."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as lines:
        return list(csv.DictReader(lines))


def store_row(row: Mapping[str, object]) -> None:
    """Put a row in the place of that of the same chapter and environment."""
    rows = {(old["chapter"], old["environment"]): old for old in load_table()}
    rows[str(row["chapter"]), str(row["environment"])] = {key: str(value) for key, value in row.items()}
    with atomic_write(TABLE) as partial, partial.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def verify(chapters: Iterable[Path], environments: Iterable[str]) -> list[str]:
    """Run the chapters in each environment, store what was measured as soon as it is known; return what failed."""
    failures = []
    with tempfile.TemporaryDirectory() as name:
        wheel = build_wheel(Path(name))
        for environment in environments:
            built = build_environment(environment, Path(name) / environment)
            for chapter in chapters:
                try:
                    found = run_chapter(chapter, built, wheel)
                except RuntimeError as failure:
                    failures.append(f"{environment}: {failure}")
                    print(failures[-1], flush=True)
                    continue
                today = datetime.datetime.now(datetime.UTC).date().isoformat()
                row = {"chapter": chapter.stem, "environment": environment, "date": today, **found}
                store_row({**row, "processors": len(os.sched_getaffinity(0))})
                print(f"{chapter.stem}, {environment}: {found['minutes']} minutes, {found['peak GB']} GB", flush=True)
    return failures


def verified_line(chapter: str) -> str:
    """Return what a chapter says of the environments it was run in."""
    rows = [row for row in load_table() if row["chapter"] == chapter]
    if sorted(row["environment"] for row in rows) != sorted(ENVIRONMENTS):
        raise RuntimeError(f"{chapter} was not run in every environment: make test-environments")
    runs = "; ".join(
        f"{row['minutes']} minutes and {row['peak GB']} GB with torch {row['torch']}, "
        f"torchvision {row['torchvision']}, ipywidgets {row['ipywidgets']}"
        for row in rows
    )
    pythons = " and ".join(sorted({row["python"] for row in rows}))
    return (
        f"{VERIFIED_MARK}{max(row['date'] for row in rows)}, alone in an empty folder, on {rows[0]['processors']} "
        f"processor cores with Python {pythons}: {runs}. This includes installing the library and fetching the data."
    )


def with_paragraph(text: str, mark: str, paragraph: str, place: int) -> str:
    """Return a text with its paragraph that starts with ``mark`` replaced, or with a new one at ``place``."""
    paragraphs = [part for part in text.split("\n\n") if not part.startswith(mark)]
    place = place if place >= 0 else len(paragraphs)
    return "\n\n".join([*paragraphs[:place], paragraph, *paragraphs[place:]])


def rewrite(chapters: Iterable[Path], mark: str, paragraph: Callable[[Path], str], place: int) -> None:
    """Write a paragraph into the first cell of each chapter."""
    for chapter in chapters:
        notebook = notebooks.read(chapter)
        head = notebook.cells[0]
        head.source = with_paragraph(head.source, mark, paragraph(chapter), place)
        notebooks.write(notebook, chapter)


def colab_link(chapter: Path) -> str:
    """Return the link that opens a chapter in Colab, from the repository that the environment names."""
    repository = os.environ["PATHWAYS_REPOSITORY_URL"].removeprefix("https://github.com/").strip("/")
    branch = os.environ.get("PATHWAYS_REPOSITORY_BRANCH", "main")
    return f"{COLAB_MARK}(https://colab.research.google.com/github/{repository}/blob/{branch}/book/{chapter.name})"


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "write", "badge"])
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--environment", choices=ENVIRONMENTS, action="append", help="leave the other out")
    arguments = parser.parse_args()
    if arguments.command == "run":
        return int(bool(verify(arguments.notebooks, arguments.environment or ENVIRONMENTS)))
    if arguments.command == "write":
        rewrite(arguments.notebooks, VERIFIED_MARK, lambda chapter: verified_line(chapter.stem), -1)
    elif os.environ.get("PATHWAYS_REPOSITORY_URL", "").startswith("https://github.com/"):  # Colab opens no others
        rewrite(arguments.notebooks, COLAB_MARK, colab_link, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
