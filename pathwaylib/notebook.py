"""What the first cell of a chapter sets up: the same numbers on every run, figures legible on light and dark pages."""

from __future__ import annotations

import os
import random

import matplotlib as mpl
import numpy as np
import torch
from cycler import cycler
from IPython import get_ipython  # type: ignore[attr-defined]

from .errors import PathwayError

INK = "#757c85"
"""Colour of text and axes. A transparent figure stands on white and on the dark theme's #14181e alike; no colour
reaches a contrast of 4.5 with both, and this one has the best possible, 4.2 with each."""

COLOURS = ("#2f80d8", "#d9600f", "#1a9373", "#c2559d", "#8f76d6", "#a98600")
"""Line colours: told apart with the common kinds of colour blindness, contrast above 3 with both backgrounds."""

_STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": False,
    "axes.labelcolor": INK,
    # A line is told by its dashes too, not by its colour alone.
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "figure.edgecolor": "none",
    "figure.facecolor": "none",
    "figure.figsize": (6.4, 3.6),
    "font.size": 10.5,
    "grid.color": INK,
    "grid.alpha": 0.3,
    "hatch.color": INK,
    "image.cmap": "viridis",
    "image.interpolation": "nearest",
    "legend.edgecolor": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 2.0,
    "savefig.facecolor": "none",
    "svg.hashsalt": "pathwaylib",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def setup(seed: int = 0) -> None:
    """Make a notebook repeatable and its figures legible on light and dark pages; nothing is printed.

    Seeds Python, NumPy and PyTorch, uses every processor this process may use, asks PyTorch for deterministic
    algorithms (where a GPU is used, it warns of operations that have none), and sets matplotlib's style. Call it in
    the first cell.

    Args:
        seed: seed of all generators, at least 0.

    Raises:
        PathwayError: if ``seed`` is not an integer from 0 to 2³² − 1.

    Example:
        >>> setup(seed=3)
        >>> first = torch.rand(2)
        >>> setup(seed=3)
        >>> bool((torch.rand(2) == first).all())
        True
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise PathwayError(f"seed is {seed!r}; give an integer from 0 to 4294967295")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what a reader's own code draws from)
    torch.manual_seed(seed)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_processors())
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    # Zeroing memory that is about to be overwritten costs time and changes no result of ours.
    torch.utils.deterministic.fill_uninitialized_memory = False
    mpl.rcParams.update(_STYLE)
    if get_ipython() is not None:
        _repeatable_png()


def _processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _repeatable_png() -> None:
    """Show figures inline as PNG without the version of matplotlib in them."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("png", bbox_inches="tight", metadata={"Software": None})
