"""A few figures that the chapters share: images, attribution maps, pathways, curves with their uncertainty.

Each function takes tensors on any device, leaves them as they are, and returns the figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .decoding import Decoded
from .errors import PathwayError
from .evaluation import ClassOverlap, Interval
from .pathway import Pathway

_Grid = np.ndarray[Any, Any]  # of axes, which numpy can only call objects

DIVERGING = "RdBu_r"
"""Colour map of signed values: blue below 0, white at 0, red above; told apart with red-green blindness too."""


def _figure_of(axis: Axes) -> Figure:
    """Return the whole figure: a part's own ``figure`` is the one it is a part of."""
    figure = axis.figure.figure
    assert isinstance(figure, Figure)
    return figure


def show_images(
    images: Tensor, *, titles: Sequence[str] | None = None, columns: int | None = None, size: float = 1.25
) -> Figure:
    """Show images in a grid.

    Args:
        images: ``(B, C, H, W)`` in [0, 1], with one or three channels.
        titles: one line per image.
        columns: images per row; at most eight if left out.
        size: width of an image in inches.

    Raises:
        PathwayError: if the images are not a batch of pictures, or there is not one title for each.

    Example:
        >>> import torch
        >>> figure = show_images(torch.rand(3, 3, 8, 8), titles=["a", "b", "c"])
        >>> len(figure.axes)
        3
        >>> plt.close(figure)
    """
    pictures = _pictures(images)
    _check_titles(titles, len(pictures))
    columns = min(len(pictures), 8) if columns is None else columns
    if columns < 1:
        raise PathwayError(f"columns is {columns}; give at least 1")
    rows = -(-len(pictures) // columns)
    figure, axes = _grid(rows, columns, size, title_lines=titles is not None)
    for number, axis in enumerate(axes.flat):
        if number >= len(pictures):
            axis.remove()
            continue
        _show_picture(axis, pictures[number])
        if titles is not None:
            axis.set_title(titles[number])
    return figure


def show_attributions(
    images: Tensor,
    maps: Mapping[str, Tensor],
    *,
    titles: Sequence[str] | None = None,
    percentile: float = 99.0,
    size: float = 1.25,
) -> Figure:
    """Show attribution maps beside their images: one row per image, one column per method.

    Channels are summed, signs kept: red raises the response, blue lowers it. The colours of each map end
    symmetrically around 0 at its own ``percentile`` of absolute values, so colours compare places inside one map,
    never values between maps.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        maps: attributions by name, each ``(B, C, h, w)`` or ``(B, h, w)``; h and w may be smaller than the image's.
        titles: one line per image, shown left of it.
        percentile: where the colours end, in (0, 100].
        size: width of an image in inches.

    Raises:
        PathwayError: if there is no map, a map does not fit the images or holds NaN, or ``percentile`` is out of
            range.

    Example:
        >>> import torch
        >>> figure = show_attributions(torch.rand(2, 3, 8, 8), {"noise": torch.randn(2, 3, 8, 8)})
        >>> [axis.get_title() for axis in figure.axes[:2]]
        ['image', 'noise']
        >>> plt.close(figure)
    """
    pictures = _pictures(images)
    _check_titles(titles, len(pictures))
    if not maps:
        raise PathwayError("there are no maps; give a dictionary such as {'gradient': gradients}")
    if not 0 < percentile <= 100:
        raise PathwayError(f"percentile is {percentile}; give a number above 0 and at most 100")
    grids = {name: signed_map(values, len(pictures), name) for name, values in maps.items()}
    beside = 0.1 * max(map(len, titles)) if titles is not None else 0.0
    figure, axes = _grid(len(pictures), 1 + len(grids), size, title_lines=False, extra=beside)
    for row, picture in enumerate(pictures):
        _show_picture(axes[row, 0], picture)
        if titles is not None:
            axes[row, 0].set_ylabel(titles[row], rotation=0, ha="right", va="center")
        for axis, values in zip(axes[row, 1:], grids.values(), strict=True):
            limit = colour_limit(values[row], percentile)
            axis.imshow(values[row], cmap=DIVERGING, vmin=-limit, vmax=limit)
            _bare(axis)
    _name_columns(axes[0], ["image", *grids], size)
    return figure


def show_pathway(pathway: Pathway, *, index: int = 0, columns: int = 4, size: float = 1.6) -> Figure:
    """Show where one input's pathway runs: per site, the share of channels it keeps at each position.

    Sites share one colour scale. A site without positions (a fully connected layer) is drawn as one row of neurons.

    Args:
        pathway: the pathways of a batch.
        index: which input.
        columns: sites per row.
        size: width of a site in inches.

    Raises:
        PathwayError: if there is no such input, or ``columns`` is less than 1.

    Example:
        >>> import torch
        >>> pathway = Pathway((torch.rand(1, 4, 6, 6) > 0.5, torch.rand(1, 10) > 0.5), ("relu_0", "relu_1"))
        >>> figure = show_pathway(pathway)
        >>> len(figure.axes)  # two sites and the colour bar
        3
        >>> plt.close(figure)
    """
    if not -len(pathway) <= index < len(pathway):
        raise PathwayError(f"index is {index}; the pathway holds {len(pathway)} inputs")
    if columns < 1:
        raise PathwayError(f"columns is {columns}; give at least 1")
    shares = [kept_share(mask[index]) for mask in pathway.masks]
    top = max(float(share.max()) for share in shares) or 1.0
    columns = min(columns, len(shares))
    rows = -(-len(shares) // columns)
    figure, axes = _grid(rows, columns, size, title_lines=True, extra=0.9)
    drawn = None
    for number, axis in enumerate(axes.flat):
        if number >= len(shares):
            axis.remove()
            continue
        aspect = "auto" if len(shares[number]) == 1 else "equal"
        drawn = axis.imshow(shares[number], vmin=0, vmax=top, aspect=aspect)
        _bare(axis)
        axis.set_title(f"{pathway.sites[number]}\n{float(pathway.masks[number][index].float().mean()):.1%} kept")
    if drawn is not None:
        figure.colorbar(drawn, ax=axes, label="share of channels kept", shrink=0.8)
    return figure


def show_curves(
    x: ArrayLike,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    xlabel: str,
    ylabel: str,
    axis: Axes | None = None,
) -> Figure:
    """Draw curves with their uncertainty: a line at the estimate, a band from the interval's low to its high end.

    Args:
        x: ``n`` positions.
        curves: by name, ``(estimate, low, high)`` of ``n`` values each, for example with a 95 % interval.
        xlabel: label of the horizontal axis, with its unit.
        ylabel: label of the vertical axis, with its unit.
        axis: where to draw; a new figure if left out.

    Raises:
        PathwayError: if a curve has not one value per position, or its band does not hold it.

    Example:
        >>> figure = show_curves([0, 1], {"kept": ([1, 0.8], [1, 0.7], [1, 0.9])}, xlabel="sparsity", ylabel="share")
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['kept']
        >>> plt.close(figure)
    """
    positions = np.asarray(x, dtype=float)
    markers = "osD^vP"
    checked: dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]] = {}
    for name, values in curves.items():
        mean, low, high = (np.asarray(value, dtype=float) for value in values)
        if not mean.shape == low.shape == high.shape == positions.shape or positions.ndim != 1:
            raise PathwayError(f"curve {name!r} has values of shape {mean.shape} at {positions.shape} positions")
        if (low > mean).any() or (mean > high).any():
            raise PathwayError(f"curve {name!r} leaves its band; give (estimate, low, high)")
        checked[name] = (mean, low, high)
    if axis is None:
        axis = plt.subplots()[1]
    for number, (name, (mean, low, high)) in enumerate(checked.items()):
        line = axis.plot(positions, mean, label=name, marker=markers[number % len(markers)], markersize=5)[0]
        axis.fill_between(positions, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(True)
    if len(checked) > 1:
        axis.legend()
    return _figure_of(axis)


def show_protocols(
    panels: Mapping[str, tuple[ArrayLike, Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]]]],
    *,
    xlabel: str,
    ylabel: str,
    columns: int = 3,
    size: float = 2.4,
) -> Figure:
    """Draw the same methods under several protocols: a panel for each, on the same scales, with one legend for all.

    Args:
        panels: by title, positions and curves as :func:`show_curves` takes them; the first panel's curves are named in
            the legend, and a method has the same line in every panel.
        xlabel: label of the horizontal axes, with the unit.
        ylabel: label of the vertical axes, with the unit.
        columns: panels per row.
        size: width of a panel in inches.

    Raises:
        PathwayError: if there is no panel, a panel has a method that the first has not, or as :func:`show_curves`.

    Example:
        >>> curves = {"gradient": ([0.9, 0.5], [0.8, 0.4], [1.0, 0.6])}
        >>> figure = show_protocols({"blur": ([0, 1], curves), "mean": ([0, 1], curves)}, xlabel="x", ylabel="y")
        >>> [axis.get_title() for axis in figure.axes]
        ['blur', 'mean']
        >>> plt.close(figure)
    """
    names = list(next(iter(panels.values()))[1]) if panels else []
    if not names or columns < 1 or any(set(curves) - set(names) for _, curves in panels.values()):
        raise PathwayError("give at least one panel and one column, and no panel a method that the first has not")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    legend_rows = -(-len(names) // 3)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(size * columns + 0.3, 0.95 * size * rows + 0.25 * legend_rows + 0.3),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    styles = list(mpl.rcParams["axes.prop_cycle"])
    for axis, (title, (x, curves)) in zip(axes.flat, panels.items(), strict=False):
        for number, name in enumerate(names):
            if name in curves:
                axis.set_prop_cycle(**{key: [value] for key, value in styles[number % len(styles)].items()})
                show_curves(x, {name: curves[name]}, xlabel="", ylabel="", axis=axis)
        for line in axis.lines:
            line.set_marker("")
        axis.set_title(title)
    for number, axis in enumerate(axes.flat):
        if number >= len(panels):
            axis.remove()
        elif number + columns >= len(panels):  # nothing below it
            axis.set_xlabel(xlabel)
            axis.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    figure.legend(handles=axes[0, 0].lines, loc="outside lower center", ncols=min(3, len(names)))
    return figure


def show_intervals(
    groups: Mapping[str, Mapping[str, Interval]],
    *,
    xlabel: str,
    reference: float | None = 0.0,
    axis: Axes | None = None,
) -> Figure:
    """Draw one row per method with a point and its interval for each group, for example of each protocol.

    Args:
        groups: by group, by method; the first group's order of methods is the order of the rows, from the top.
        xlabel: label of the horizontal axis, with its unit.
        reference: where a vertical line is drawn; None: nowhere.
        axis: where to draw; a new figure if left out.

    Raises:
        PathwayError: if there is no group, or a group has a method that the first has not.

    Example:
        >>> figure = show_intervals({"mean": {"gradient": Interval(0.1, 0.0, 0.2)}}, xlabel="LeRF - MoRF")
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['gradient']
        >>> plt.close(figure)
    """
    names = list(next(iter(groups.values()))) if groups else []
    if not names or any(set(found) - set(names) for found in groups.values()):
        raise PathwayError("give at least one group, and no group a method that the first has not")
    if axis is None:
        axis = plt.subplots(figsize=(6.4, 0.26 * len(names) + 1.1), layout="constrained")[1]
    styles, markers = list(mpl.rcParams["axes.prop_cycle"]), "osD^vP"
    for number, (group, found) in enumerate(groups.items()):
        # Side by side within the row, so that intervals do not cover each other.
        shift = 0.6 * ((number + 0.5) / len(groups) - 0.5)
        places = [names.index(name) + shift for name in found]
        middle, low, high = (np.asarray(ends) for ends in _ends(list(found.values())))
        axis.errorbar(
            middle,
            places,
            xerr=(middle - low, high - middle),
            fmt=markers[number % len(markers)],
            markersize=4,
            linewidth=1.2,
            color=styles[number % len(styles)]["color"],
            label=group,
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(xlabel)
    axis.grid(True, axis="x")
    if reference is not None:
        axis.axvline(reference, color=mpl.rcParams["axes.edgecolor"], linewidth=1)
    if len(groups) > 1:
        axis.legend()
    return _figure_of(axis)


def show_repetitions(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    by: str,
    xlabel: str | None = None,
    ylabel: str | None = None,
    axis: Axes | None = None,
) -> Figure:
    """Draw repeated measurements: each as a point, and one line per group through the means at each position.

    A group is drawn where it has rows, so a table that is still being computed can be shown. One repetition is one
    point on the line; the spread of several is seen, not summarised.

    Args:
        table: one row per measurement, for example of a method, a fraction and a seed.
        x: column of the positions.
        y: column of the measurements.
        by: column that tells the groups apart, drawn in the order in which they first appear.
        xlabel: label of the horizontal axis; the column's name if left out.
        ylabel: label of the vertical axis; the column's name if left out.
        axis: where to draw; a new figure if left out.

    Raises:
        PathwayError: if a column is missing, there is no row, or a number is not finite.

    Example:
        >>> rows = [("random", 0.5, 0.80), ("random", 0.5, 0.78), ("random", 0.9, 0.6), ("gradient", 0.5, 0.7)]
        >>> table = pd.DataFrame(rows, columns=["method", "fraction", "accuracy"])
        >>> figure = show_repetitions(table, x="fraction", y="accuracy", by="method")
        >>> [line.get_ydata().tolist() for line in figure.axes[0].lines if line.get_label() in set(table["method"])]
        [[0.79, 0.6], [0.7]]
        >>> plt.close(figure)
    """
    missing = {x, y, by} - set(table.columns)
    if missing or table.empty:
        raise PathwayError(f"{len(table)} rows, columns {list(table.columns)}; give rows with {sorted({x, y, by})}")
    if not np.isfinite(table[[x, y]].to_numpy(dtype=float)).all():
        raise PathwayError(f"NaN or infinity is among {x!r} and {y!r}; leave those rows out")
    if axis is None:
        axis = plt.subplots()[1]
    markers = "osD^vPXp"
    for number, (name, rows) in enumerate(table.groupby(by, sort=False)):
        means = rows.groupby(x)[y].mean()
        marker = markers[number % len(markers)]
        line = axis.plot(means.index, means, label=name, marker=marker, markersize=5)[0]
        if len(rows) > len(means):
            axis.plot(rows[x], rows[y], marker, color=line.get_color(), markersize=3, alpha=0.5)
    axis.set_xlabel(x if xlabel is None else xlabel)
    axis.set_ylabel(y if ylabel is None else ylabel)
    axis.grid(True)
    # Many names would cover the lines.
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return _figure_of(axis)


def show_decoded(decoded: Mapping[str, Decoded], *, titles: Sequence[str] | None = None, size: float = 1.25) -> Figure:
    """Show decoded images: one row per method, one column per pathway or neuron, each above the response it reaches.

    Args:
        decoded: by method, what :func:`pathwaylib.decode_pathway` or :func:`pathwaylib.visualise_neuron` found.
        titles: one line per column.
        size: width of an image in inches.

    Raises:
        PathwayError: if there is nothing to show, methods differ in their number of images, or there is not one title
            for each.

    Example:
        >>> import torch
        >>> found = Decoded(torch.rand(2, 3, 8, 8), torch.tensor([3.0, 4.0]), torch.zeros(1, 2))
        >>> figure = show_decoded({"NeuronMCT": found}, titles=["cat", "dog"])
        >>> [axis.get_xlabel() for axis in figure.axes]
        ['3.0', '4.0']
        >>> plt.close(figure)
    """
    counts = {name: len(found.images) for name, found in decoded.items()}
    if len(set(counts.values())) != 1:
        raise PathwayError(f"the numbers of images are {counts}; give at least one method, and as many for each")
    columns = next(iter(counts.values()))
    _check_titles(titles, columns)
    # The response needs a line as a title does.
    figure, axes = _grid(len(decoded), columns, size, title_lines=True, extra=0.1 * max(map(len, decoded)))
    for row, (name, found) in zip(axes, decoded.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, picture, reached in zip(row, _pictures(found.images), found.responses.tolist(), strict=True):
            _show_picture(axis, picture)
            axis.set_xlabel(f"{reached:.1f}")
    if titles is not None:
        _name_columns(axes[0], titles, size)
    return figure


def show_similarity(
    similarity: Tensor, names: Sequence[str], *, label: str = "mean IoU", axis: Axes | None = None
) -> Figure:
    """Show a square matrix of similarities as colours and numbers, for example of classes or of methods.

    The colours span the matrix's own range, so they compare places inside one matrix only; the numbers compare all.

    Args:
        similarity: ``(K, K)``.
        names: one per row and column.
        label: of the colour bar.
        axis: where to draw; a new figure if left out.

    Raises:
        PathwayError: if the matrix is not square, holds NaN, or there is not one name for each row.

    Example:
        >>> import torch
        >>> figure = show_similarity(torch.eye(2), ["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['1.00', '0.00', '0.00', '1.00']
        >>> plt.close(figure)
    """
    values = similarity.detach().float().cpu().numpy()
    if values.shape != (len(names), len(names)) or not len(names) or not np.isfinite(values).all():
        raise PathwayError(
            f"the matrix has shape {tuple(similarity.shape)} for {len(names)} names; give a finite number for each two"
        )
    if axis is None:
        axis = plt.subplots(figsize=(0.5 * len(names) + 2, 0.45 * len(names) + 1), layout="constrained")[1]
    drawn = axis.imshow(values)
    figure = _figure_of(axis)
    figure.colorbar(drawn, ax=axis, label=label, shrink=0.8)
    axis.spines[:].set_visible(False)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=_ink_on(drawn, value), size=8)
    return figure


def show_scores(
    scores: Mapping[str, Mapping[str, Interval]], *, label: str = "score", axis: Axes | None = None
) -> Figure:
    """Show a table of scores from 0 to 1 as colours, numbers and intervals, for example of methods under conditions.

    The colours span 0 to 1 in every table, so that tables can be compared.

    Args:
        scores: by row, by column; the same columns in every row.
        label: of the colour bar.
        axis: where to draw; a new figure if left out.

    Raises:
        PathwayError: if there is no score, rows have different columns, or a score is outside [0, 1].

    Example:
        >>> row = {"dead": Interval(0.5, 0.4, 0.6), "idle": Interval(1.0, 1.0, 1.0)}
        >>> figure = show_scores({"NeuronMCT": row}, label="recall")
        >>> [text.get_text().split() for text in figure.axes[0].texts]  # an interval of no width is not written
        [['0.50', '.40–.60'], ['1.00']]
        >>> plt.close(figure)
    """
    columns = {tuple(row) for row in scores.values()}
    if len(columns) != 1 or not (names := next(iter(columns))):
        raise PathwayError(f"the rows have the columns {sorted(columns)}; give the same in every row, at least one")
    values = np.array([[interval.value for interval in row.values()] for row in scores.values()])
    if not ((values >= 0) & (values <= 1)).all():
        raise PathwayError(f"the scores reach from {values.min():g} to {values.max():g}; give scores in [0, 1]")
    if axis is None:
        size = (0.72 * len(names) + 3, 0.46 * len(scores) + 1)
        axis = plt.subplots(figsize=size, layout="constrained")[1]
    drawn = axis.imshow(values, vmin=0, vmax=1, aspect="auto")
    figure = _figure_of(axis)
    figure.colorbar(drawn, ax=axis, label=label, shrink=0.8)
    axis.spines[:].set_visible(False)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(scores)), scores)
    axis.tick_params(length=0)
    for row, intervals in enumerate(scores.values()):
        for column, interval in enumerate(intervals.values()):
            text, ends = f"{interval.value:.2f}", [f"{end:.2f}".removeprefix("0") for end in interval.bounds]
            text += f"\n{'–'.join(ends)}" if ends[0] != ends[1] else ""
            ink = _ink_on(drawn, interval.value)
            axis.text(column, row, text, ha="center", va="center", color=ink, size=7)
    return figure


def show_class_overlap(overlap: Mapping[str, ClassOverlap], *, axis: Axes | None = None) -> Figure:
    """Show site by site how much pathways of one class overlap, and those of different classes, with intervals.

    Args:
        overlap: by site, as :func:`pathwaylib.class_overlap` returns it; its entry ``"all"`` is left out.
        axis: where to draw; a new figure if left out.

    Raises:
        PathwayError: if there is no site.

    Example:
        >>> overlap = ClassOverlap(Interval(0.4, 0.3, 0.5), Interval(0.1, 0.1, 0.2), Interval(0.3, 0.2, 0.3))
        >>> figure = show_class_overlap({"relu_0": overlap, "relu_1": overlap})
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['same class', 'different classes']
        >>> plt.close(figure)
    """
    sites = {site: found for site, found in overlap.items() if site != "all"}
    if not sites:
        raise PathwayError("there is no site to show; give what class_overlap returned")
    curves = {
        "same class": _ends([found.within for found in sites.values()]),
        "different classes": _ends([found.between for found in sites.values()]),
    }
    figure = show_curves(range(len(sites)), curves, xlabel="site", ylabel="mean IoU of two pathways", axis=axis)
    axis = figure.axes[0] if axis is None else axis
    axis.set_xticks(range(len(sites)), sites, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_ylim(bottom=0)
    return figure


def show_sanity_check(
    layers: Sequence[str],
    similarity: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    ylabel: str = "similarity",
    axis: Axes | None = None,
) -> Figure:
    """Show how alike explanations remain while a network forgets, layer by layer from the output to the input.

    Each curve starts at 1, where nothing is randomised yet.

    Args:
        layers: names, from the output back to the input, as in :class:`pathwaylib.evaluation.SanityCheck`.
        similarity: by method, one interval per layer, as :meth:`pathwaylib.evaluation.SanityCheck.intervals` gives.
        ylabel: label of the vertical axis.
        axis: where to draw; a new figure if left out.

    Raises:
        PathwayError: if a method has not one interval per layer.

    Example:
        >>> figure = show_sanity_check(["fc", "conv"], {"gradient": [(0.4, 0.3, 0.5), (0.1, 0.0, 0.2)]})
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [1.0, 0.4, 0.1]
        >>> plt.close(figure)
    """
    whole = Interval(1.0, 1.0, 1.0)
    curves = {name: _ends([whole, *(Interval(*each) for each in found)]) for name, found in similarity.items()}
    names = ["none", *layers]
    figure = show_curves(
        range(len(names)), curves, xlabel="layers randomised, from the output down to", ylabel=ylabel, axis=axis
    )
    axis = figure.axes[0] if axis is None else axis
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    return figure


def signed_map(values: Tensor, count: int, name: str) -> NDArray[np.float32]:
    """Return attributions as maps ``(B, h, w)``, channels summed; raise :class:`PathwayError` where they are none."""
    if values.ndim not in (3, 4) or len(values) != count or not values.numel():
        raise PathwayError(
            f"the map {name!r} has shape {tuple(values.shape)}; give ({count}, channels, height, width), one per image"
        )
    if not bool(values.isfinite().all()):
        raise PathwayError(f"the map {name!r} holds NaN or infinity")
    array: NDArray[np.float32] = (values.sum(1) if values.ndim == 4 else values).detach().float().cpu().numpy()
    return array


def colour_limit(values: NDArray[np.float32], percentile: float) -> float:
    """Return where the colours of a map end: never 0, so that a map of zeros is white."""
    magnitude = np.abs(values)
    return float(np.percentile(magnitude, percentile)) or float(magnitude.max()) or 1.0


def kept_share(mask: Tensor) -> NDArray[np.float32]:
    """Return the share of channels that one input's mask ``(C, ...)`` keeps, as a map ``(h, w)``."""
    # Without positions every neuron is one.
    share = mask.float().reshape(1, -1) if mask.ndim < 3 else mask.float().mean(0).reshape(-1, mask.shape[-1])
    array: NDArray[np.float32] = share.cpu().numpy()
    return array


def _ink_on(drawn: AxesImage, value: float) -> str:
    """Return the ink for a number in a coloured cell: the cells hide the page, so their own brightness decides."""
    return "white" if np.dot(drawn.to_rgba(np.asarray(value))[:3], (0.2126, 0.7152, 0.0722)) < 0.43 else "black"


def _ends(intervals: Sequence[Interval]) -> tuple[list[float], list[float], list[float]]:
    """Return intervals as a curve: estimates, low ends, high ends."""
    return [i.value for i in intervals], [i.low for i in intervals], [i.high for i in intervals]


def _pictures(images: Tensor) -> NDArray[np.float32]:
    """Return images as ``(B, H, W, C)`` for matplotlib."""
    if images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise PathwayError(f"the images have shape {tuple(images.shape)}; give (batch, 1 or 3, height, width)")
    low, high = images.detach().aminmax()
    if not (images.is_floating_point() and float(low) >= 0 and float(high) <= 1):
        raise PathwayError(
            f"the images are {images.dtype} from {float(low):g} to {float(high):g}; give floats in [0, 1]"
        )
    array: NDArray[np.float32] = images.detach().float().permute(0, 2, 3, 1).cpu().numpy()
    return array


def _check_titles(titles: Sequence[str] | None, count: int) -> None:
    if titles is not None and len(titles) != count:
        raise PathwayError(f"{len(titles)} titles for {count} images; give one each")


def _name_columns(axes: _Grid, names: Sequence[str], size: float) -> None:
    """Write a name above each column of ``size`` inches, in letters small enough for the longest."""
    longest = max(len(line) for name in names for line in name.split("\n"))
    # A name wider than its column would run into the next; a letter is about 0.62 of the font's size wide.
    points = min(FontProperties(size=mpl.rcParams["axes.titlesize"]).get_size_in_points(), 72 * size / (0.62 * longest))
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=points)


def _grid(rows: int, columns: int, size: float, *, title_lines: bool, extra: float = 0.0) -> tuple[Figure, _Grid]:
    height = size * (1.3 if title_lines else 1.06)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns + extra, height * rows + 0.2), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    return figure, axes


def _show_picture(axis: Axes, picture: NDArray[np.float32]) -> None:
    axis.imshow(picture[..., 0] if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
    _bare(axis)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
