"""A claim that is wrong cannot pass, and one that is right reaches the prose and the ledger."""

from __future__ import annotations

from pathlib import Path

import nbformat.v4 as v4
import notebooks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathwaylib.claims import CLAIM_METADATA, claim
from pathwaylib.errors import PathwayError

finite = st.floats(-1e6, 1e6)


@given(value=finite, bound=finite)
def test_holds_exactly_where_the_unrounded_value_meets_the_condition(value: float, bound: float) -> None:
    for keyword, met in (("at_least", value >= bound), ("at_most", value <= bound)):
        if met:
            claim("key", "Statement", value, digits=0, **{keyword: bound})  # type: ignore[arg-type]
        else:
            with pytest.raises(AssertionError, match="claim 'key' fails"):
                claim("key", "Statement", value, digits=0, **{keyword: bound})  # type: ignore[arg-type]


def test_line(capsys: pytest.CaptureFixture[str]) -> None:
    claim("a", "Kept", torch.tensor(93.44), interval=(91, 95), at_least=90, at_most=100, digits=1, unit="%")
    claim("b", "Error", -0.0001, at_most=0.1)
    claim("c", "Kept", 0.95, interval=(0.85, 0.99), at_least=0.9)
    assert capsys.readouterr().out.splitlines() == [
        "Kept: 93.4 % (95 % interval 91.0 % to 95.0 %; at least 90.0 %, at most 100.0 %): holds",
        "Error: 0.00 (at most 0.10): holds",
        "Kept: 0.95 (95 % interval 0.85 to 0.99; at least 0.90): holds, within uncertainty",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key": "not a name", "value": 1, "at_least": 0}, "Python identifier"),
        ({"key": "k", "value": 1}, "no condition"),
        ({"key": "k", "value": float("nan"), "at_least": 0}, "finite"),
        ({"key": "k", "value": float("inf"), "at_least": 0}, "finite"),
        ({"key": "k", "value": 1, "interval": (2, 3), "at_least": 0}, "does not hold its value"),
        ({"key": "k", "value": 1, "interval": (1, float("nan")), "at_least": 0}, "does not hold its value"),
    ],
)
def test_what_is_no_claim_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PathwayError, match=message):
        claim(statement="Statement", **arguments)  # type: ignore[arg-type]


def test_notebook_output_holds_line_record_and_glue(tmp_path: Path) -> None:
    from myst_nb.ext.glue import extract_glue_data_cell

    source = 'from pathwaylib.claims import claim\nclaim("kept", "Kept", 0.934, interval=(0.91, 0.955), at_least=0.9)'
    path = tmp_path / "chapter.ipynb"
    notebooks.write(v4.new_notebook(cells=[v4.new_code_cell(source)]), path)
    notebooks.execute(path)
    (cell,) = notebooks.read(path).cells
    line = cell.outputs[0]
    assert line.data["text/plain"].startswith("Kept: 0.93 (95 % interval")
    assert line.metadata[CLAIM_METADATA] == {
        "key": "kept",
        "statement": "Kept",
        "value": "0.93",
        "interval": "0.91 to 0.95",
        "condition": "at least 0.90",
        "verdict": "holds",
    }
    # As the book's own reader of glued values understands it.
    glued = {key: output.data["text/plain"] for key, output in extract_glue_data_cell(cell)}
    assert glued == {"kept": "'0.93'", "kept_interval": "'0.91 to 0.95'"}


def test_wrong_claim_stops_a_notebook(tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "chapter.ipynb"
    source = 'from pathwaylib.claims import claim\nclaim("kept", "Kept", 0.1, at_least=0.9)'
    notebooks.write(v4.new_notebook(cells=[v4.new_code_cell(source)]), path)
    with pytest.raises(CellExecutionError, match="claim 'kept' fails"):
        notebooks.execute(path)
