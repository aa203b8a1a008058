"""Find a Chromium for the browser tests: ``python tests/chromium.py`` prints its path, or exits with status 1."""

from __future__ import annotations

import os
import shutil
import sys

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
"""Nothing but the page may use the network."""


def find() -> str | None:
    """Return the executable: the environment's CHROMIUM, else the first known name on the path."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


if __name__ == "__main__":
    print(find() or sys.exit(1))
