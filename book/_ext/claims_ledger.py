"""The ``claims`` directive: every ``pathwaylib.claim(...)`` of the book in one table; and the claims in their chapters.

It reads the records that the claims left in the chapters' outputs, so the table cannot say anything that a chapter
did not compute. A cell that makes many claims shows them as one folded list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from pathwaylib.claims import CLAIM_METADATA

HEADER = ("Claim", "Value", "95 % interval", "Condition", "Verdict", "Chapter")

FOLDED_FROM = 4  # as many claims of one cell are shown as one list

logger = logging.getLogger(__name__)


def records(notebook: Path) -> Iterator[dict[str, Any]]:
    """Yield the claims in a notebook's stored outputs, in order."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            if (record := _record(output)) is not None:
                yield record


def _record(output: dict[str, Any]) -> Any:
    """Return the record of an output that is a claim, otherwise None."""
    return output.get("metadata", {}).get(CLAIM_METADATA)


class Claims(SphinxDirective):
    """Render the ledger, or with ``:keys:`` some of its rows."""

    option_spec: ClassVar[dict[str, Any]] = {"keys": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return the table; of the whole ledger, also a line that counts its rows."""
        rows: dict[str, tuple[str, ...]] = {}
        chapters: set[str] = set()
        # The chapters' file names start with their numbers: sorted is the book's order.
        for name in sorted(self.env.found_docs):
            path = Path(self.env.doc2path(name))
            if path.suffix != ".ipynb":
                continue
            self.env.note_dependency(str(path))
            for record in records(path):
                if record["key"] in rows:
                    logger.warning("claim %r is made twice, the second time in %s", record["key"], name)
                chapters.add(name)
                cells = (record[field] for field in ("statement", "value", "interval", "condition", "verdict"))
                rows[record["key"]] = (*cells, f"[](/{name})")
        keys = self.options.get("keys", "").split()
        for key in set(keys) - set(rows):
            logger.warning("no chapter makes the claim %r", key)
        shown = [rows[key] for key in keys if key in rows] if keys else list(rows.values())
        lines = [] if keys else [f"{len(rows)} claims from {len(chapters)} chapters.", ""]
        lines += [":::{list-table}", ":header-rows: 1", ""]
        for row in (HEADER, *shown):
            bullets = ["* - ", *["  - "] * (len(row) - 1)]
            lines += [bullet + (cell or "–") for bullet, cell in zip(bullets, row, strict=True)]
        container = nodes.container(classes=["claims-excerpt" if keys else "claims-ledger"])
        self.state.nested_parse(StringList([*lines, ":::"], self.env.docname), self.content_offset, container)
        return [container]


def fold_claims(app: Sphinx, name: str, content: list[str]) -> None:
    """Put the many claims of a cell into one folded list, where the first of them stood."""
    if Path(app.env.doc2path(name)).suffix != ".ipynb":
        return
    notebook = json.loads(content[0])
    for cell in notebook["cells"]:
        made = [output for output in cell.get("outputs", ()) if _record(output) is not None]
        if len(made) < FOLDED_FROM:
            continue
        first = cell["outputs"].index(made[0])
        rest = [output for output in cell["outputs"] if _record(output) is None]
        folded = {"output_type": "display_data", "metadata": {}, "data": {"text/html": _list(made)}}
        cell["outputs"] = [*rest[:first], folded, *rest[first:]]
    content[0] = json.dumps(notebook)


def _list(claims: list[dict[str, Any]]) -> str:
    """Return claims as a folded list; its summary counts their verdicts."""
    verdicts = Counter(_record(claim)["verdict"] for claim in claims)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    if len(verdicts) == 1:
        summary = f"verdict of each: {next(iter(verdicts))}"
    items = "".join(f"<li>{escape(''.join(claim['data']['text/plain']))}</li>" for claim in claims)
    return f'<details class="claims-made"><summary>{len(claims)} claims ({summary})</summary><ul>{items}</ul></details>'


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("claims", Claims)
    app.connect("source-read", fold_claims)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
