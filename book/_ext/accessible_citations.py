"""Bibliography entries without the roles that Sphinx gives them: a list without list items, and a role given up."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def drop_roles(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Leave plain blocks, which read in order."""
    if "citation-list" in context.get("body", ""):
        context["body"] = (
            context["body"]
            .replace('<div role="list" class="citation-list">', '<div class="citation-list">')
            .replace(' role="doc-biblioentry"', "")
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("html-page-context", drop_roles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
