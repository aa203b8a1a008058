"""How the package's command lines end: an error that the user can mend is a line of text, not a traceback."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from .errors import PathwayError


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None) -> None:
    """Run a command line; an error that the user can mend ends it with exit code 2 and no traceback.

    Args:
        app: the commands.
        name: how the user calls it, for the help.
        arguments: what the user gave; the process's own if None.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal can show every file's name
    try:
        app(arguments, prog_name=name)
    except (PathwayError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"Error: {error}", markup=False, highlight=False, style="red")
        sys.exit(2)
