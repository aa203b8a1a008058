"""What the first cell of a chapter sets up: the same numbers on every run, figures legible on light and dark pages."""

from __future__ import annotations

import os
import random
import warnings
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from cycler import cycler
from IPython import get_ipython

from .errors import PathwayError

INK = "#757c85"
"""Colour of text and axes. A transparent figure stands on white and on the dark theme's #121212 alike. No colour has a
contrast of 4.5 with both (their own contrast is 18.7, less than 4.5 × 4.5). This one has at least 4.2 with each."""

COLOURS = ("#2f80d8", "#d9600f", "#1a9373", "#c2559d")
"""Line colours: contrast above 3 with both backgrounds, told apart without red, green or blue cones. More such colours
there are not; further lines repeat them with other dashes."""

_DASHES = ["-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)), (0, (8, 3))]

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": False,
    "axes.labelcolor": INK,
    # A line is told by its dashes too, not by its colour alone.
    "axes.prop_cycle": cycler(color=2 * COLOURS) + cycler(linestyle=_DASHES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "figure.edgecolor": "none",
    "figure.facecolor": "none",
    "figure.figsize": (6.4, 3.6),
    "font.size": 11,
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
    algorithms (where a GPU is used, it warns of operations that have none), sets matplotlib's style, and silences
    Captum's notices of what it does to the gradient flags and hooks of its inputs. Call it in the first cell.

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
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    mpl.rcParams.update(_STYLE)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\.")
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

    set_matplotlib_formats("png", bbox_inches="tight", metadata={"Software": None})  # type: ignore[no-untyped-call]
