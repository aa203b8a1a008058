"""Result tables: computed once, stored whole, never taken for another computation."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from pathwaylib import PathwayError, load_results
from pathwaylib.results import ResultStore

ROWS = [{"selector": "a", "value": 1 / 3}, {"selector": "b", "value": 2.0}]


def test_a_table_is_computed_once_and_reads_the_same(tmp_path: Path) -> None:
    calls = []

    def compute() -> list[dict[str, object]]:
        calls.append(1)
        return ROWS

    first = ResultStore(tmp_path).table("some/table", compute, {"images": 3})
    again = ResultStore(tmp_path).table("some/table", compute, {"images": 3})
    assert calls == [1]
    pd.testing.assert_frame_equal(first, again)
    assert first["value"].tolist() == pytest.approx([1 / 3, 2], rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["table.csv", "table.json"]


def test_provenance_says_how_a_table_came_about(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.table("table", lambda: ROWS, {"images": 3})
    noted = store.provenance("table")
    assert noted["settings"] == {"images": 3}
    assert noted["rows"] == 2
    assert noted["minutes"] >= 0
    assert noted["versions"]["torch"]


def test_a_table_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.table("table", lambda: ROWS, {"images": 3})
    with pytest.raises(PathwayError, match=r"images.*3.*not with.*4"):
        store.table("table", lambda: ROWS, {"images": 4})


def test_a_computation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> list[dict[str, object]]:
        raise RuntimeError("stopped")

    store = ResultStore(tmp_path / "folder")
    with pytest.raises(RuntimeError, match="stopped"):
        store.table("table", fail)
    with pytest.raises(PathwayError, match="no rows"):
        store.table("table", list)
    assert not (tmp_path / "folder").exists()


def test_stored_tables_ship_and_others_are_told() -> None:
    assert load_results("critical_pathways/cifar10-vgg/faithfulness")["images"].min() >= 500
    with pytest.raises(PathwayError, match="there is no table 'nothing'; stored are critical_pathways/"):
        load_results("nothing")


STORED = sorted((Path(__file__).parents[1] / "experiments" / "results").rglob("*.csv"))


@pytest.mark.parametrize("path", STORED, ids=lambda path: "-".join(path.parts[-3:]))
def test_every_stored_table_has_its_provenance(path: Path) -> None:
    noted = ResultStore(path.parent).provenance(path.stem)
    assert noted["rows"] == len(pd.read_csv(path))
    assert noted["commit"]
    assert noted["settings"]["profile"] == "full"
