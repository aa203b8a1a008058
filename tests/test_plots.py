"""Figures and the set-up of a chapter."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from pathwaylib import (
    ClassOverlap,
    Decoded,
    Interval,
    Pathway,
    PathwayError,
    setup,
    show_attributions,
    show_class_overlap,
    show_curves,
    show_decoded,
    show_images,
    show_pathway,
    show_similarity,
)
from pathwaylib.notebook import COLOURS, INK
from pathwaylib.plots import show_intervals, show_protocols, show_repetitions, show_scores

PAGES = {"light": "#ffffff", "dark": "#121212"}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leave matplotlib's style, PyTorch's switches and no open figure behind."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    with mpl.rc_context({"backend": "agg"}):
        yield
        plt.close("all")
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def luminance(colour: str) -> float:
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_setup_makes_every_generator_repeat() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002

    setup(seed=5)
    first = draw()
    setup(seed=5)
    assert draw() == first
    setup(seed=6)
    assert draw() != first


def test_setup_asks_for_deterministic_algorithms_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup() is None  # type: ignore[func-returns-value]
    assert torch.are_deterministic_algorithms_enabled()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "0", True])
def test_setup_refuses_what_is_no_seed(seed: object) -> None:
    with pytest.raises(PathwayError, match="seed is"):
        setup(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES)
def test_colours_are_legible_on_both_pages(page: str) -> None:
    # 4.5 with both is out of reach: the product of the two contrasts is that of the pages, 18.7 < 4.5 × 4.5.
    assert contrast(INK, PAGES[page]) > 4.2
    assert min(contrast(colour, PAGES[page]) for colour in COLOURS) > 3


# Linear RGB as seen without the red, green or blue cones (Machado, Oliveira and Fernandes 2009, severity 1).
CONES = {
    "all": np.eye(3),
    "red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("missing", CONES)
def test_line_colours_are_told_apart_by_everyone(missing: str) -> None:
    def lab(colour: str) -> np.ndarray:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        x, y, z = np.cbrt(to_xyz @ np.clip(np.array(CONES[missing]) @ linear, 0, 1) / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    # A difference of 1 is just noticeable.
    differences = [np.linalg.norm(lab(a) - lab(b)) for a, b in itertools.combinations(COLOURS, 2)]
    assert min(differences) > 12


def test_style_lets_the_page_through() -> None:
    setup()
    figure = show_curves([0, 1], {"a": ([0, 1], [0, 1], [0, 1])}, xlabel="x", ylabel="y")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    assert pixels[0, 0, 3] == 0
    assert pixels[..., 3].max() > 0


def test_images_are_shown_in_order_and_colour() -> None:
    images = torch.rand(5, 3, 4, 4)
    figure = show_images(images, titles=list("abcde"), columns=3)
    assert [axis.get_title() for axis in figure.axes] == list("abcde")
    for axis, image in zip(figure.axes, images, strict=True):
        assert np.allclose(axis.images[0].get_array(), image.permute(1, 2, 0))


def test_one_channel_is_grey() -> None:
    figure = show_images(torch.rand(1, 1, 4, 4))
    assert figure.axes[0].images[0].get_cmap().name == "gray"


def test_maps_are_summed_over_channels_with_colours_symmetric_around_zero() -> None:
    images, maps = torch.rand(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    coarse = torch.randn(2, 3, 3)
    figure = show_attributions(images, {"fine": maps, "coarse": coarse}, titles=["one", "two"], percentile=90)
    grid = np.array(figure.axes).reshape(2, 3)
    assert [axis.get_title() for axis in grid[0]] == ["image", "fine", "coarse"]
    assert [axis.get_ylabel() for axis in grid[:, 0]] == ["one", "two"]
    for row in range(2):
        shown = grid[row, 1].images[0]
        assert np.allclose(shown.get_array(), maps[row].sum(0), atol=1e-6)
        low, high = shown.get_clim()
        assert low == -high
        assert high == pytest.approx(np.percentile(maps[row].sum(0).abs(), 90), rel=1e-5)
        assert shown.get_cmap()(0.5)[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.02)


def test_long_names_do_not_run_into_each_other() -> None:
    maps = {"integrated\ngradients of the class": torch.randn(1, 4, 4), "pathway gradient at 0.9": torch.randn(1, 4, 4)}
    figure = show_attributions(torch.rand(1, 3, 4, 4), maps, titles=["an automobile"], size=1)
    figure.canvas.draw()
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))
    assert figure.axes[0].yaxis.label.get_window_extent().x0 >= 0


def test_a_map_of_zeros_and_a_single_spike_are_drawn() -> None:
    spike = torch.zeros(1, 20, 20)
    spike[0, 3, 3] = 1e-30
    figure = show_attributions(torch.rand(1, 3, 20, 20), {"zero": torch.zeros(1, 20, 20), "spike": spike})
    assert figure.axes[1].images[0].get_clim() == (-1, 1)
    assert figure.axes[2].images[0].get_clim()[1] == pytest.approx(1e-30)


def test_inputs_stay_as_they_are() -> None:
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    maps = torch.randn(1, 3, 4, 4, requires_grad=True)
    copies = images.detach().clone(), maps.detach().clone()
    show_attributions(images, {"map": maps})
    assert torch.equal(images, copies[0])
    assert torch.equal(maps, copies[1])
    assert images.requires_grad
    assert images.grad is None


def test_pathway_shows_the_share_of_channels_at_each_position() -> None:
    mask = torch.zeros(2, 4, 3, 3, dtype=torch.bool)
    mask[1, :2, 0, 0] = True
    flat = torch.ones(2, 5, dtype=torch.bool)
    figure = show_pathway(Pathway((mask, flat), ("relu_0", "relu_1")), index=1)
    expected = np.zeros((3, 3))
    expected[0, 0] = 0.5
    assert np.array_equal(figure.axes[0].images[0].get_array(), expected)
    assert figure.axes[1].images[0].get_array().shape == (1, 5)
    assert figure.axes[0].get_title() == "relu_0\n5.6% kept"
    assert figure.axes[0].images[0].get_clim() == figure.axes[1].images[0].get_clim() == (0, 1)


def test_an_empty_pathway_is_drawn() -> None:
    empty = Pathway((torch.zeros(1, 2, 3, 3, dtype=torch.bool),), ("relu_0",))
    assert show_pathway(empty).axes[0].images[0].get_clim() == (0, 1)


def test_curves_carry_their_bands() -> None:
    figure = show_curves([1, 2], {"a": ([1, 2], [0, 1], [2, 3]), "b": ([0, 0], [0, 0], [0, 0])}, xlabel="x", ylabel="y")
    axis = figure.axes[0]
    assert axis.get_legend() is not None
    assert axis.lines[0].get_color() != axis.lines[1].get_color()
    band = axis.collections[0].get_paths()[0].vertices
    assert {(1.0, 0.0), (1.0, 2.0), (2.0, 1.0), (2.0, 3.0)} <= set(map(tuple, band))
    again = show_curves([1, 2], {"c": ([1, 1], [1, 1], [1, 1])}, xlabel="x", ylabel="y", axis=axis)
    assert again is figure


def decoded(count: int) -> Decoded:
    return Decoded(torch.rand(count, 3, 4, 4), torch.arange(count) + 0.25, torch.zeros(2, count))


def test_decoded_images_stand_by_method_and_above_their_response() -> None:
    found = {"NeuronMCT": decoded(3), "greedy": decoded(3)}
    figure = show_decoded(found, titles=["airplane", "a ship with a very long name", "cat"])
    grid = np.array(figure.axes).reshape(2, 3)
    assert [axis.get_title() for axis in grid[0]] == ["airplane", "a ship with a very long name", "cat"]
    assert [axis.get_ylabel() for axis in grid[:, 0]] == ["NeuronMCT", "greedy"]
    for row, shown in zip(grid, found.values(), strict=True):
        assert [axis.get_xlabel() for axis in row] == ["0.2", "1.2", "2.2"]
        for axis, image in zip(row, shown.images, strict=True):
            assert np.allclose(axis.images[0].get_array(), image.permute(1, 2, 0))
    figure.canvas.draw()
    titles = [axis.title.get_window_extent() for axis in grid[0]]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(titles))
    assert grid[0, 0].yaxis.label.get_window_extent().x0 >= 0
    assert grid[0, 0].xaxis.label.get_window_extent().y0 >= grid[1, 0].get_window_extent().y1


def test_similarity_is_legible_in_every_cell_and_on_both_pages() -> None:
    setup()
    matrix = torch.linspace(0.1, 0.2, 100).view(10, 10)
    names = [f"class {k}" for k in range(10)]
    figure = show_similarity(matrix, names)
    axis, bar = figure.axes
    assert np.allclose(axis.images[0].get_array(), matrix)
    assert axis.images[0].get_clim() == pytest.approx((0.1, 0.2))
    assert [text.get_text() for text in axis.texts] == [f"{value:.2f}" for value in matrix.flatten()]
    assert [text.get_position() for text in axis.texts[:11]] == [*((column, 0) for column in range(10)), (0, 1)]
    assert [label.get_text() for label in axis.get_xticklabels()] == names
    assert [label.get_text() for label in axis.get_yticklabels()] == names
    assert bar.get_ylabel() == "mean IoU"
    for text, value in zip(axis.texts, matrix.flatten().tolist(), strict=True):
        assert contrast(text.get_color(), axis.images[0].to_rgba(value)[:3]) > 4.5
    for label in (*axis.get_xticklabels(), *axis.get_yticklabels(), *bar.get_yticklabels(), bar.yaxis.label):
        assert label.get_color() == INK


def test_a_matrix_of_equal_values_is_drawn() -> None:
    figure = show_similarity(torch.ones(2, 2), ["a", "b"], label="agreement", axis=plt.subplots()[1])
    figure.canvas.draw()
    assert figure.axes[1].get_ylabel() == "agreement"


def test_repetitions_are_points_and_their_means_a_line() -> None:
    rows = [("b", 0.9, 0, 0.5), ("b", 0.5, 0, 0.7), ("b", 0.9, 1, 0.3), ("a", 0.5, 0, 0.8)]
    table = pd.DataFrame(rows, columns=["method", "fraction", "seed", "accuracy"])
    axis = show_repetitions(table, x="fraction", y="accuracy", by="method", ylabel="share right").axes[0]
    drawn = [(str(line.get_label()), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axis.lines]
    assert drawn[0] == ("b", [0.5, 0.9], [0.7, 0.4])  # positions in order, repetitions averaged
    assert drawn[1][1:] == ([0.9, 0.5, 0.9], [0.5, 0.7, 0.3])
    assert drawn[2] == ("a", [0.5], [0.8])
    assert len(drawn) == 3
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["b", "a"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("fraction", "share right")
    other = plt.subplots(1, 2)[1][1]
    assert show_repetitions(table, x="fraction", y="accuracy", by="method", axis=other).axes[1] is other


def test_class_overlap_shows_sites_in_order_with_their_intervals() -> None:
    def overlap(within: float, between: float) -> ClassOverlap:
        return ClassOverlap(*(Interval(v, v - 0.05, v + 0.1) for v in (within, between, within - between)))

    found = {"relu_0": overlap(0.2, 0.1), "relu_1": overlap(0.6, 0.3), "all": overlap(0.9, 0.8)}
    figure = show_class_overlap(found)
    axis = figure.axes[0]
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
    assert lines == {"same class": [0.2, 0.6], "different classes": [0.1, 0.3]}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["relu_0", "relu_1"]
    corners = axis.collections[0].get_paths()[0].vertices
    assert min(corners[:, 1]) == pytest.approx(0.15)
    assert max(corners[:, 1]) == pytest.approx(0.7)
    assert axis.get_ylim()[0] == 0
    other = plt.subplots(1, 2)[1][1]
    show_class_overlap(found, axis=other)
    assert [label.get_text() for label in other.get_xticklabels()] == ["relu_0", "relu_1"]


def test_protocols_share_their_scales_and_their_lines() -> None:
    setup()
    curve = ([0.5, 0.3], [0.4, 0.2], [0.6, 0.4])
    full = dict.fromkeys("abcde", curve)
    panels = {"one": ([0, 1], full), "two": ([2, 3], dict.fromkeys("db", curve)), "three": ([0, 1], full)}
    figure = show_protocols(panels, xlabel="fraction", ylabel="probability", columns=2)
    assert [axis.get_title() for axis in figure.axes] == ["one", "two", "three"]
    assert figure.axes[0].get_shared_y_axes().joined(figure.axes[0], figure.axes[1])
    lines = [{line.get_label(): line for line in axis.lines} for axis in figure.axes]
    assert set(lines[1]) == {"d", "b"}
    for name in "db":
        assert lines[1][name].get_color() == lines[0][name].get_color()
        assert lines[1][name].get_linestyle() == lines[0][name].get_linestyle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list("abcde")
    assert len({(line.get_color(), line.get_linestyle()) for line in lines[0].values()}) == 5
    figure.canvas.draw()


def test_intervals_stand_in_rows() -> None:
    setup()
    groups = {
        "mean": {"gradient": Interval(0.1, 0.0, 0.3), "random": Interval(0.0, -0.1, 0.1)},
        "blur": {"random": Interval(0.02, 0.0, 0.05)},
    }
    figure = show_intervals(groups, xlabel="score", reference=None)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["gradient", "random"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first method on top
    drawn = {container.get_label(): container for container in axis.containers}
    assert drawn["mean"].lines[0].get_xdata().tolist() == [0.1, 0.0]
    assert [round(float(place)) for place in drawn["blur"].lines[0].get_ydata()] == [1]
    (bars,) = drawn["mean"].lines[2]
    assert np.allclose(bars.get_segments()[0][:, 0], [0.0, 0.3])
    assert show_intervals(groups, xlabel="again", axis=axis) is figure


def test_scores_are_written_in_ink_that_can_be_read_and_in_colours_that_can_be_compared() -> None:
    scores = {
        "a": {"x": Interval(0.0, 0.0, 0.0), "y": Interval(1.0, 0.9, 1.0)},
        "b": dict.fromkeys("xy", Interval(0.5, 0.25, 0.75)),
    }
    figure = show_scores(scores, label="recall")
    axis = figure.axes[0]
    (drawn,) = axis.images
    assert drawn.get_clim() == (0, 1)
    assert drawn.get_array().tolist() == [[0, 1], [0.5, 0.5]]
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["0.00", "1.00\n.90–1.00", "0.50\n.25–.75", "0.50\n.25–.75"]
    assert [text.get_color() for text in axis.texts[:2]] == ["white", "black"]  # dark violet, light yellow
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y"]
    other = plt.subplots(1, 2)[1][1]
    show_scores(scores, axis=other)
    assert other.images


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: show_scores({}), "at least one"),
        (lambda: show_scores({"a": {}}), "at least one"),
        (lambda: show_scores({"a": {"x": Interval(1, 1, 1)}, "b": {"y": Interval(1, 1, 1)}}), "same in every row"),
        (lambda: show_scores({"a": {"x": Interval(1.5, 1, 2)}}), "to 1.5"),
        (lambda: show_scores({"a": {"x": Interval(float("nan"), 1, 2)}}), "nan"),
        (lambda: show_images(torch.rand(3, 4, 4)), "batch"),
        (lambda: show_images(torch.rand(0, 3, 4, 4)), "batch"),
        (lambda: show_images(2 * torch.ones(1, 3, 4, 4)), "floats in"),
        (lambda: show_images(torch.ones(1, 3, 4, 4, dtype=torch.uint8)), "floats in"),
        (lambda: show_images(torch.full((1, 3, 4, 4), float("nan"))), "floats in"),
        (lambda: show_images(torch.rand(2, 3, 4, 4), titles=["one"]), "1 titles for 2 images"),
        (lambda: show_images(torch.rand(2, 3, 4, 4), columns=0), "columns is 0"),
        (lambda: show_attributions(torch.rand(1, 3, 4, 4), {}), "no maps"),
        (lambda: show_attributions(torch.rand(1, 3, 4, 4), {"m": torch.rand(2, 4, 4)}), "one per image"),
        (lambda: show_attributions(torch.rand(1, 3, 4, 4), {"m": torch.full((1, 4, 4), float("nan"))}), "NaN"),
        (lambda: show_attributions(torch.rand(1, 3, 4, 4), {"m": torch.rand(1, 4, 4)}, percentile=0), "percentile"),
        (lambda: show_decoded({}), "at least one method"),
        (lambda: show_decoded({"a": decoded(1), "b": decoded(2)}), "{'a': 1, 'b': 2}"),
        (lambda: show_decoded({"a": decoded(2)}, titles=["one"]), "1 titles for 2 images"),
        (lambda: show_similarity(torch.ones(2, 3), ["a", "b"]), "for 2 names"),
        (lambda: show_similarity(torch.ones(0, 0), []), "for 0 names"),
        (lambda: show_similarity(torch.full((1, 1), float("nan")), ["a"]), "finite"),
        (lambda: show_class_overlap({"all": ClassOverlap(*3 * [Interval(1, 1, 1)])}), "no site"),
        (lambda: show_repetitions(pd.DataFrame({"a": [1]}), x="a", y="b", by="c"), "give rows with"),
        (lambda: show_repetitions(pd.DataFrame({"a": []}), x="a", y="a", by="a"), "0 rows"),
        (lambda: show_repetitions(pd.DataFrame({"a": [np.nan]}), x="a", y="a", by="a"), "NaN"),
        (lambda: show_curves([0, 1], {"a": ([1], [1], [1])}, xlabel="", ylabel=""), "positions"),
        (lambda: show_curves([0], {"a": ([1], [2], [3])}, xlabel="", ylabel=""), "leaves its band"),
        (lambda: show_protocols({}, xlabel="", ylabel=""), "at least one panel"),
        (lambda: show_protocols({"a": ([0], {})}, xlabel="", ylabel=""), "at least one panel"),
        (lambda: show_intervals({}, xlabel=""), "at least one group"),
        (lambda: show_intervals({"a": {"m": Interval(1, 1, 1)}, "b": {"n": Interval(1, 1, 1)}}, xlabel=""), "first"),
    ],
)
def test_wrong_arguments_are_answered(call: object, message: str) -> None:
    with pytest.raises(PathwayError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(("index", "columns", "message"), [(1, 4, "holds 1 inputs"), (0, 0, "columns is 0")])
def test_wrong_pathway_arguments_are_answered(index: int, columns: int, message: str) -> None:
    pathway = Pathway((torch.ones(1, 2, 3, 3, dtype=torch.bool),), ("relu_0",))
    with pytest.raises(PathwayError, match=message):
        show_pathway(pathway, index=index, columns=columns)
