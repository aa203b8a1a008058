"""The full-size experiments run by papermill; here each runs in its quick profile, from parameters to results."""

from __future__ import annotations

from pathlib import Path

import papermill
import pytest

from pathwaylib import load_model, model_card, planted
from pathwaylib.training import accuracy

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NOTEBOOKS = sorted(EXPERIMENTS.glob("*.ipynb"))  # stored without outputs, so that no check but these would run them


@pytest.mark.slow
def test_train_subjects_stores_a_network_and_resumes(tmp_path: Path) -> None:
    """A second run finds the first one's checkpoint, trains nothing, and stores the same weights."""
    digests = []
    for attempt in ("first", "second"):
        folder = tmp_path / attempt
        papermill.execute_notebook(
            EXPERIMENTS / "train_subjects.ipynb",
            None,
            parameters={"profile": "quick", "checkpoints": str(tmp_path / "checkpoints"), "destination": str(folder)},
            progress_bar=False,
        )
        card = model_card("planted-cnn", folder=folder)
        digests.append(card["sha256"])
        assert sum(recipe["epochs"] for recipe in card["recipes"]) == len(card["log"]) == 2
    model = load_model("planted-cnn", folder=folder)
    assert accuracy(model, planted(2000, seed=2)) == pytest.approx(card["test_accuracy"], abs=0.01)
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [path.stem for path in NOTEBOOKS if path.stem != "train_subjects"])
def test_an_experiment_runs_in_its_quick_profile(experiment: str, tmp_path: Path) -> None:
    papermill.execute_notebook(
        EXPERIMENTS / f"{experiment}.ipynb",
        None,
        parameters={"profile": "quick", "networks": "cifar10-resnet8", "destination": str(tmp_path)},
        progress_bar=False,
    )
    tables = list(tmp_path.rglob("*.csv"))
    assert tables
    assert all(table.with_suffix(".json").exists() for table in tables)
