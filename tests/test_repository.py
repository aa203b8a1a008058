"""The repository's parts agree with each other, and what is stored in it is fit to be published."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import notebooks
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))

# Where conda-forge calls a package otherwise than Python's index does.
CONDA_NAMES = {"matplotlib-base": "matplotlib", "python-duckdb": "duckdb", "pytorch": "torch"}
# What conda-forge does not have; the environment's pip step brings it.
NOT_IN_CONDA = {"lightning-fabric"}


def tracked() -> list[Path]:
    """Every file that is, or would be, committed."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def declared(*extras: str) -> dict[str, Requirement]:
    optional = PROJECT["optional-dependencies"]
    return requirements([*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])])


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "a constraint that is no exact pin"
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_conda_environment_agrees_with_the_package() -> None:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = requirements([line for line in dependencies if isinstance(line, str)])
    conda = {canonicalize_name(CONDA_NAMES.get(name, name)): requirement for name, requirement in conda.items()}
    assert conda.pop("python").specifier == PROJECT["requires-python"]
    wanted = {**declared("book"), "nbval": declared("test")["nbval"]}
    wanted = {name: requirement for name, requirement in wanted.items() if name not in NOT_IN_CONDA}
    tools = {"pip", "nodejs", "make"}
    assert set(conda) - tools == set(wanted)
    assert {name: conda[name].specifier for name in wanted} == {name: r.specifier for name, r in wanted.items()}
    assert {"pip": ["--editable .[test,imagenet]"]} in dependencies


def test_constraints_pin_what_the_package_declares() -> None:
    pinned = pins()
    for name, requirement in declared("book", "test", "imagenet", "cluster", "dev").items():
        assert name in pinned, f"{name} is installed by make but not pinned"
        assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} is outside {requirement.specifier}"


def test_no_file_names_a_registry() -> None:
    # Put together here, so that this file names none either.
    words = [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("yarnpkg", "com"), ("debian", "org")]
    hosts = re.compile("|".join(rf"{name}\.{end}" for name, end in words).encode())
    naming = [path.relative_to(ROOT) for path in tracked() if hosts.search(path.read_bytes())]
    assert not naming


def test_lock_file_has_checksums_and_no_addresses() -> None:
    lock = (ROOT / "package-lock.json").read_text()
    assert "://" not in lock
    assert lock.count('"integrity": "sha512-') > 3


def test_every_entry_of_the_contents_exists_and_every_chapter_is_listed() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    entries = [contents["root"], *(entry["file"] for part in contents["parts"] for entry in part["chapters"])]
    assert len(set(entries)) == len(entries)
    for entry in entries:
        assert any((ROOT / f"{entry}{suffix}").is_file() for suffix in (".ipynb", ".md")), f"{entry} does not exist"
    assert {f"book/{path.stem}" for path in CHAPTERS} <= set(entries)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_stored_chapter_is_fit_to_be_published(chapter: Path) -> None:
    assert list(notebooks.problems(chapter)) == []


def test_there_are_chapters() -> None:
    assert len(CHAPTERS) >= 3


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    code = (ROOT / "pathwaylib" / "__init__.py").read_text()
    assert citation["version"] == PROJECT["version"]
    assert f'__version__ = "{PROJECT["version"]}"' in code
    assert json.loads((ROOT / "package.json").read_text())["version"] == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"note   = {{Version {PROJECT['version']}}}" in (ROOT / "book" / "intro.md").read_text()


def test_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert [author["name"] for author in PROJECT["authors"]] == [author["name"] for author in citation["authors"]]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_continuous_integration_ends_with_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert "set -euo pipefail" in commands
    assert commands.index("make book") < commands.index("make test") == len(commands) - 1


def test_workflows_are_yaml_with_least_rights() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in workflows] == ["pages", "release", "tests", "weekly"]
    for path in workflows:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, path.name
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 60


def test_notebook_check_reports_each_fault(tmp_path: Path) -> None:
    import nbformat.v4 as v4

    figure = v4.new_output("display_data", {"image/png": "AAAA"})
    broken = v4.new_notebook(
        cells=[
            v4.new_code_cell("import torch"),
            v4.new_markdown_cell("```{prf:proof}\n$1 = 1$\n```"),
            v4.new_code_cell("1 / 0", execution_count=2, outputs=[v4.new_output("error", ename="ZeroDivisionError")]),
            v4.new_code_cell("show()", execution_count=3, outputs=[figure]),
            v4.new_code_cell(
                "wait()",
                execution_count=4,
                metadata={"execution": {"iopub.status.idle": "now"}},
                outputs=[v4.new_output("stream", name="stderr", text="50 %")],
            ),
        ]
    )
    path = tmp_path / "broken.ipynb"
    notebooks.write(broken, path)
    found = "\n".join(notebooks.problems(path))
    for fault in (
        "install cell",
        "parameters",
        "cell 0: not executed",
        "ZeroDivisionError",
        "alt text",
        "run to run",
        "in backticks",
    ):
        assert fault in found


def test_execution_stores_stable_outputs_and_stops_at_an_error(tmp_path: Path) -> None:
    import nbformat.v4 as v4
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "chapter.ipynb"
    source = "import sys, pathlib\nprint(pathlib.Path.cwd().name)\nprint('50 %', file=sys.stderr)"
    notebooks.write(v4.new_notebook(cells=[v4.new_code_cell(source)]), path)
    notebooks.execute(path)
    first = path.read_bytes()
    (cell,) = notebooks.read(path).cells
    assert [output.text for output in cell.outputs] == [f"{tmp_path.name}\n"]
    notebooks.execute(path)
    assert path.read_bytes() == first
    notebooks.write(v4.new_notebook(cells=[v4.new_code_cell("1 / 0")]), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(path)


def test_package_needs_nothing_from_the_book() -> None:
    # A reader installs the core alone: no import of it may reach for Sphinx or myst-nb.
    code = "import sys, pathwaylib, pathwaylib.claims; print({'sphinx', 'myst_nb', 'papermill'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "set()"
