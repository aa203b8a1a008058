"""Chapters as Colab runs them: alone in a folder, with pathwaylib installed by their own first cell."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import environments
import notebooks
import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))


@pytest.mark.slow
def test_a_chapter_runs_alone() -> None:
    # Not pytest's tmp_path: the environment has gigabytes, and must go with the test.
    with tempfile.TemporaryDirectory() as name:
        built = environments.build_environment("current", Path(name) / "environment")
        found = environments.run_chapter(CHAPTERS[2], built, environments.build_wheel(Path(name)))
    assert found["torch"] == dict(line.split("==") for line in environments.pins("current").split())["torch"]
    assert found["cells"] > 3
    assert 0 < found["minutes"] < 15
    assert 0.2 < found["peak GB"] < 8


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_say_what_they_were_verified_with(chapter: Path) -> None:
    """As the table has it, in both environments, within the memory that Colab gives."""
    rows = [row for row in environments.load_table() if row["chapter"] == chapter.stem]
    assert [row["environment"] for row in rows] == ["current", "lowest"]
    assert rows[1]["torch"] == environments.LOWEST_TORCH["torch"]
    assert rows[1]["ipywidgets"].startswith("7.7.")
    code = [cell for cell in notebooks.read(chapter).cells if cell.cell_type == "code"]
    for row in rows:
        assert int(row["cells"]) == len(code), "the chapter has other cells now: make test-environments"
        assert float(row["peak GB"]) <= 4
    assert notebooks.read(chapter).cells[0].source.endswith(environments.verified_line(chapter.stem))


def test_lowest_pins_are_the_bounds_that_the_project_states() -> None:
    pins = dict(line.split("==") for line in environments.pins("lowest").split())
    assert {"scipy", "captum", "ipykernel", "nbclient", "scikit-learn", "ray"} <= set(pins)
    assert all(bound.endswith(".*") for name, bound in pins.items() if name not in environments.LOWEST_TORCH)


def test_writing_at_the_head_is_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chapter = tmp_path / CHAPTERS[0].name
    shutil.copy(CHAPTERS[0], chapter)
    before = notebooks.read(chapter)
    for repository, branch in (("https://github.com/one/book", "main"), ("https://github.com/two/fork/", "next")):
        monkeypatch.setenv("PATHWAYS_REPOSITORY_URL", repository)
        monkeypatch.setenv("PATHWAYS_REPOSITORY_BRANCH", branch)
        environments.rewrite([chapter], environments.COLAB_MARK, environments.colab_link, 1)
    after = notebooks.read(chapter)
    title, link, *rest = after.cells[0].source.split("\n\n")
    address = f"https://colab.research.google.com/github/two/fork/blob/next/book/{chapter.name}"
    assert link == f"[Open in Colab]({address})"
    assert [title, *rest] == before.cells[0].source.split("\n\n")
    assert after.cells[1:] == before.cells[1:]


def test_no_line_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "TABLE", tmp_path / "environments.csv")
    row = dict.fromkeys(
        ("date", "python", "torch", "torchvision", "ipywidgets", "minutes", "peak GB", "processors"), "1"
    )
    environments.store_row({"chapter": "one", "environment": "current", **row})
    with pytest.raises(RuntimeError, match=r"one was not run in every environment: make test-environments"):
        environments.verified_line("one")
    for minutes in ("2", "3"):  # the later run replaces the earlier
        environments.store_row({"chapter": "one", "environment": "lowest", **row, "minutes": minutes})
    assert len(environments.load_table()) == 2
    assert "; 3 minutes and 1 GB with torch 1" in environments.verified_line("one")
