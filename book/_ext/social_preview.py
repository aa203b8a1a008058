"""What a link to a page shows elsewhere: its title, its first paragraph, and one picture for the whole book.

A picture is named by its full address, which the deploy workflow gives (``PATHWAYS_SITE_URL=<address> make html``);
without it a link shows words alone.
"""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

PICTURE = "social-preview.png"
ALT = "Three columns of neurons between an image and a response; one path through them is drawn bold."
_LONGEST = 200  # characters of the description; more are cut off anyway


def add_picture(app: Sphinx, config: Config) -> None:
    """Lay the picture beside the site's other static files."""
    config.html_static_path = [*config.html_static_path, str(Path(__file__).with_name(PICTURE))]


def add_tags(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Write the tags of the Open Graph protocol into the page's head."""
    if doctree is None:
        return
    paragraph = next((p.astext() for p in doctree.findall(nodes.paragraph)), "").replace("\n", " ")
    if len(paragraph) > _LONGEST:
        paragraph = paragraph[:_LONGEST].rsplit(" ", 1)[0] + " …"
    tags = {
        "og:type": "article",
        "og:site_name": app.config.project,
        "og:title": next((t.astext() for t in doctree.findall(nodes.title)), app.config.project),
        "og:description": paragraph,
    }
    site = os.environ.get("PATHWAYS_SITE_URL", "").rstrip("/")
    if site:
        tags |= {
            "og:url": f"{site}/{app.builder.get_target_uri(page)}",
            "og:image": f"{site}/_static/{PICTURE}",
            "og:image:alt": ALT,
            "twitter:card": "summary_large_image",
        }
    lines = (f'<meta property="{name}" content="{html.escape(text)}" />' for name, text in tags.items())
    description = f'<meta name="description" content="{html.escape(paragraph)}" />'
    context["metatags"] = "\n".join([context.get("metatags", ""), description, *lines])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("config-inited", add_picture)
    app.connect("html-page-context", add_tags)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
