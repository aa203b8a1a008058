"""The Colab, repository, edit and issue buttons, for a book that does not know its own address.

The deploy workflow gives the address of the repository it runs in, so a fork's site points at the fork:

    PATHWAYS_REPOSITORY_URL=<address> PATHWAYS_REPOSITORY_BRANCH=main make html

Without the variable the book has no such buttons.
"""

from __future__ import annotations

import os
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config


def add_buttons(app: Sphinx, config: Config) -> None:
    """Switch the buttons on where the address is given."""
    url = os.environ.get("PATHWAYS_REPOSITORY_URL", "").rstrip("/")
    if not url:
        return
    config.html_theme_options = {
        **config.html_theme_options,
        "repository_url": url,
        "repository_branch": os.environ.get("PATHWAYS_REPOSITORY_BRANCH", "main"),
        "use_repository_button": True,
        "use_edit_page_button": True,
        "use_issues_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    # Before the theme reads its options.
    app.connect("config-inited", add_buttons, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
