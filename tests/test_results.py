"""Result tables: computed once, stored whole, never taken for another computation."""

from __future__ import annotations

import os
import subprocess
import sys
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


JOBS = [{"method": method, "seed": seed} for method in ("a", "b") for seed in (0, 1)]


def test_jobs_go_on_where_a_run_was_stopped(tmp_path: Path) -> None:
    store, done = ResultStore(tmp_path), []

    def work(method: str, seed: int) -> dict[str, object]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((method, seed))
        return {"accuracy": 0.5 + seed}

    with pytest.raises(KeyboardInterrupt):
        store.jobs("ledger", JOBS, work, {"epochs": 2})
    assert pd.read_csv(tmp_path / "ledger.csv")["accuracy"].tolist() == [0.5, 1.5, 0.5]
    assert store.provenance("ledger")["rows"] == 3
    del done[0]  # one more may be done now
    table = store.jobs("ledger", JOBS, work, {"epochs": 2})
    assert done == [("a", 1), ("b", 0), ("b", 1)]  # the last one only, of those that were left
    assert table[["method", "seed"]].to_dict("records") == JOBS
    assert {"minutes", "commit", "finished"} <= set(table.columns)
    with pytest.raises(PathwayError, match="epochs"):
        store.jobs("ledger", JOBS, work, {"epochs": 3})


@pytest.mark.parametrize(
    "jobs",
    [
        [{"share": 1 / 3}],
        [{"method": None}],
        [{"method": "None"}, {"method": "a"}],
        [{"name": "007"}],
        [{"name": "7"}, {"name": "a"}],  # text among text, but a number while it is the only row
        [{"name": 7}, {"name": "a"}],  # and the other way round
        [{"seed": 0}, {"method": "a"}],
    ],
    ids=str,
)
def test_jobs_that_a_table_would_not_hold_are_refused(tmp_path: Path, jobs: list[dict[str, object]]) -> None:
    with pytest.raises(PathwayError, match="reads otherwise once it was written to a CSV file"):
        ResultStore(tmp_path).jobs("ledger", jobs, lambda **_: {"found": 1})
    assert not list(tmp_path.iterdir())


def test_a_job_is_done_once_whatever_tells_it_from_others(tmp_path: Path) -> None:
    jobs = [
        {"share": share, "name": name, "on": on}
        for share in (0, 0.1, 1e-7)
        for name in ("a b", 'c,"')
        for on in (True, False)
    ]
    store, done = ResultStore(tmp_path), []
    for _ in range(2):
        store.jobs("ledger", jobs, lambda **job: done.append(job) or {"found": 1})
    assert done == jobs


def test_a_job_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    # Each process notes what it did; together they must have done every job once.
    code = """
import sys, time
from pathwaylib.results import ResultStore
def work(method, seed):
    with open(sys.argv[2], "a") as file:
        file.write(f"{method}{seed}\\n")
    time.sleep(0.3)
    return {"accuracy": 1.0}
jobs = [{"method": m, "seed": s} for m in "abc" for s in (0, 1)]
ResultStore(sys.argv[1]).jobs("ledger", jobs, work)
"""
    log = tmp_path / "log"
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(log)]
    environment = os.environ | {"PATHWAYLIB_CACHE": str(tmp_path / "cache")}
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert sorted(log.read_text().split()) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert len(pd.read_csv(tmp_path / "store" / "ledger.csv")) == 6


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
