"""A chapter as Colab runs it: alone in a folder, with pathwaylib installed by its own first cell."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGED = ("pyproject.toml", "README.md", "LICENSE")
# What Colab has before the first cell runs. The versions are ours: Colab's differ from week to week.
PRESENT = ("torch", "torchvision", "numpy", "matplotlib", "pillow", "tqdm", "ipykernel", "ipywidgets", "nbclient")

pytestmark = pytest.mark.slow


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return str(done.stdout)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Not pytest's tmp_path: the environment has gigabytes, and must go with the test.
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    """Build the package from a copy, links followed, so that no build folder is left in the repository."""
    source = folder / "source"
    source.mkdir()
    for name in PACKAGED:
        (source / name).write_bytes((ROOT / name).read_bytes())
    run("cp", "-RL", ROOT / "pathwaylib", source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
    (built,) = folder.glob("pathwaylib-*.whl")
    return built


@pytest.fixture(scope="module")
def python(folder: Path) -> Path:
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *PRESENT)
    return python


def test_a_chapter_runs_alone(folder: Path, wheel: Path, python: Path) -> None:
    chapter = ROOT / "book" / "03_contributions.ipynb"
    alone = folder / "alone"
    alone.mkdir()
    (alone / chapter.name).write_bytes(chapter.read_bytes())
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))},
        "PATHWAYLIB_SOURCE": str(wheel),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
    }
    missing = "import importlib.util, sys; sys.exit(importlib.util.find_spec('pathwaylib') is not None)"
    run(python, "-c", missing, cwd=alone, env=environment)
    code = (
        "import nbformat, nbclient; "
        f"notebook = nbformat.read({chapter.name!r}, as_version=4); "
        "nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute(); "
        "print(sum(cell.cell_type == 'code' and cell.execution_count is not None for cell in notebook.cells))"
    )
    executed = run(python, "-c", code, cwd=alone, env=environment)
    assert int(executed) > 3
    assert [path.name for path in alone.iterdir()] == [chapter.name], "the chapter left files behind"
