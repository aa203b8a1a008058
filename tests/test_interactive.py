"""The self-contained figure: its data are the library's numbers, and it works in a real browser."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page
from torch import nn

import pathwaylib
from pathwaylib import (
    InteractiveFigure,
    NeuronMCT,
    PathwayError,
    PathwayGradient,
    ablation,
    class_pathways,
    first_kink,
    integrated_gradients,
    line_figure,
    linear_pieces,
    masked,
    neuron_figure,
    pathway_figure,
    taylor,
)
from pathwaylib.interactive import class_figure

SPARSITIES = [0.0, 0.5, 0.9]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12),
        nn.ReLU(), nn.Linear(12, 3),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def figure(model: nn.Module, images: torch.Tensor) -> InteractiveFigure:
    return pathway_figure(model, images, sparsities=SPARSITIES, class_names=["cat", "<b>dog</b>", "</script>"])


def unpack(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


def test_data_are_the_numbers_of_the_library(model: nn.Module, images: torch.Tensor, figure: InteractiveFigure) -> None:
    targets = model(images).argmax(1)
    for sparsity, frame in zip(SPARSITIES, figure.data["frames"], strict=True):
        pathway = NeuronMCT(sparsity)(model, images)
        with torch.no_grad(), masked(pathway):
            chances = model(images).softmax(1)
        gradient = PathwayGradient(model, NeuronMCT(sparsity)).attribute(images).sum(1).numpy()
        for b, shown in enumerate(frame):
            assert shown["kept"] == int(pathway.sizes[b])
            assert shown["answer"]["predicted"] == int(chances[b].argmax())
            assert shown["answer"]["target"] == pytest.approx(float(chances[b, targets[b]]), abs=6e-4)
            share = pathway.masks[0][b].float().mean(0).sqrt().numpy()
            assert np.abs(unpack(shown["sites"][0], 10, 10) / 255 - share).max() < 0.003
            drawn = unpack(shown["map"], 12, 12).astype(int) - 128
            visible = np.abs(drawn) > 0
            assert (np.sign(drawn)[visible] == np.sign(gradient[b])[visible]).all()
            assert drawn.max() == 127 or drawn.min() == -127


def test_images_are_in_the_figure(images: torch.Tensor, figure: InteractiveFigure) -> None:
    pixels = unpack(figure.data["images"][1]["pixels"], 12, 12, 3) / 255
    assert np.abs(pixels - images[1].permute(1, 2, 0).numpy()).max() < 0.003


def test_html_is_keyed_by_content_and_ends_no_element_early(
    model: nn.Module, images: torch.Tensor, figure: InteractiveFigure
) -> None:
    again = pathway_figure(model, images, sparsities=SPARSITIES, class_names=["cat", "<b>dog</b>", "</script>"])
    other = pathway_figure(model, images, sparsities=SPARSITIES, class_names=["cat", "dog", "bird"])
    assert figure.html() == again.html() == again._repr_html_()
    assert figure.html().split("data-key=")[1][:18] != other.html().split("data-key=")[1][:18]
    script = figure.html().split("<script>", 1)[1]
    assert script.count("</script>") == 1
    assert script.rstrip().endswith("</script>\n</div>")
    assert "://" not in figure.html()
    json.dumps(figure.data, allow_nan=False)


def test_repr_says_what_it_is(figure: InteractiveFigure) -> None:
    assert "2 images at 3 sparsities, 0 to 0.9" in repr(figure)


def test_large_maps_are_averaged_down() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    large = pathway_figure(net.eval(), torch.rand(1, 3, 100, 80), sparsities=[0.5])
    assert large.data["size"] == [32, 32]
    assert large.data["sites"][0]["shape"] == [4, 100, 80]
    assert len(large.html()) < 30_000


def test_cifar10_figure_is_small() -> None:
    small = pathway_figure(pathwaylib.load_model("cifar10-vgg"), torch.rand(1, 3, 32, 32), sparsities=[0.5, 0.9])
    # Two steps of one image; the chapter shows 4 images at 8 steps, with one script.
    data = len(json.dumps(small.data))
    assert len(small.html()) + 15 * data < 400_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.rand(3, 12, 12)}, "batch"),
        ({"sparsities": []}, "at least one"),
        ({"sparsities": [1.0]}, "sparsity is 1.0"),
        ({"class_names": ["one"]}, "1 class names for a network of 3"),
        ({"target": 3}, "out of range"),
    ],
)
def test_wrong_arguments_are_answered(
    model: nn.Module, images: torch.Tensor, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(PathwayError, match=message):
        pathway_figure(model, **{"images": images, **arguments})  # type: ignore[arg-type]


# --- walking along a line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines(model: nn.Module, images: torch.Tensor) -> InteractiveFigure:
    double, x = copy.deepcopy(model).double(), images[:1].double()
    directions = {
        "up": torch.ones(3, 12, 12),
        "random": torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(2)),
    }
    pathways = {"pathway": NeuronMCT(0.8)(double, x), "full network": None}
    return line_figure(double, x, directions, pathways, length=0.5, class_names=["cat", "<b>dog</b>", "</script>"])


def test_line_holds_the_kinks_and_the_response_between_them(
    model: nn.Module, images: torch.Tensor, lines: InteractiveFigure
) -> None:
    double, x = copy.deepcopy(model).double(), images[:1].double()
    up = torch.ones_like(x)
    assert lines.data["directions"] == ["up", "random"]
    assert [network["name"] for network in lines.data["networks"]] == ["pathway", "full network"]
    walk = lines.data["networks"][1]["walks"][0]
    expected = linear_pieces(double, x, up, 0.5)[0]
    assert len(expected) > 3
    assert walk["ends"] == pytest.approx([0, *expected.tolist(), 0.5], rel=1e-5)
    assert len(walk["slopes"]) == len(walk["ends"]) - 1
    target = int(double(x).argmax())
    for piece, slope in enumerate(walk["slopes"]):
        start, end = walk["ends"][piece : piece + 2]
        points = (x + ((start + end) / 2) * up).requires_grad_()
        response = double(points)[0, target]
        assert slope == pytest.approx(float(torch.autograd.grad(response, points)[0].sum()), rel=1e-3)
        change = float((response - double(x)[0, target]).detach())
        assert change == pytest.approx(sum(walk["values"][piece : piece + 2]) / 2, abs=1e-5)


def test_line_of_a_pathway_is_walked_inside_the_pathway_network(
    model: nn.Module, images: torch.Tensor, lines: InteractiveFigure
) -> None:
    double, x = copy.deepcopy(model).double(), images[:1].double()
    pathway = NeuronMCT(0.8)(double, x)
    walk = lines.data["networks"][0]["walks"][0]
    assert walk["ends"][1] == pytest.approx(float(first_kink(double, x, torch.ones_like(x), pathway)), rel=1e-5)
    target = int(double(x).argmax())
    with torch.no_grad(), masked(pathway):
        start, end = double(torch.cat([x, x + 0.5]))[:, target].tolist()
    assert walk["values"][-1] == pytest.approx(end - start, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.rand(2, 3, 12, 12)}, "2 inputs"),
        ({"directions": {}}, "at least one direction"),
        ({"pathways": {}}, "at least one direction and one network"),
        ({"length": 0.0}, "length is 0.0"),
    ],
)
def test_wrong_lines_are_answered(model: nn.Module, arguments: dict[str, object], message: str) -> None:
    given = {"x": torch.rand(1, 3, 12, 12), "directions": {"up": torch.ones(3, 12, 12)}, "pathways": {"full": None}}
    with pytest.raises(PathwayError, match=message):
        line_figure(model, **{**given, **arguments})  # type: ignore[arg-type]


@pytest.mark.browser
def test_walking_along_a_line(browser: Browser, lines: InteractiveFigure, tmp_path: Path) -> None:
    page = browser.new_page(viewport=DESKTOP)
    seen = Seen(page)
    page.goto(page_of(lines, tmp_path))
    root = page.locator(".pathwaylib-figure")
    walks = [network["walks"] for network in lines.data["networks"]]
    assert "full network: piece 1 of" in root.locator(".now").inner_text()
    for number in range(2):
        assert root.locator("svg").nth(number).locator(".kink").count() == len(walks[number][0]["ends"]) - 2
    slider = page.get_by_role("slider", name="Distance")
    slider.press("End")
    assert slider.get_attribute("aria-valuetext") == "distance 0.500"
    last = len(walks[1][0]["ends"]) - 1
    assert f"full network: piece {last} of {last}" in root.locator(".now").inner_text()
    page.get_by_role("combobox", name="Direction").select_option(index=1)
    assert root.locator("svg").nth(1).locator(".kink").count() == len(walks[1][1]["ends"]) - 2
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
    page.close()


# --- choosing a neuron -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(model: nn.Module, images: torch.Tensor) -> InteractiveFigure:
    double, x = copy.deepcopy(model).double(), images[:1].double()
    return neuron_figure(double, x, neurons=5, n_steps=16, class_names=["cat", "<b>dog</b>", "</script>"])


def place_of(name: str) -> tuple[int, ...]:
    return tuple(int(word) for word in name.replace(",", "").split() if word.isdigit())


def test_three_readings_are_the_scores_of_the_library(
    model: nn.Module, images: torch.Tensor, grown: InteractiveFigure
) -> None:
    double, x = copy.deepcopy(model).double(), images[:1].double()
    readings = {
        "taylor": taylor(double, x),
        "ablation": ablation(double, x),
        "area": integrated_gradients(double, x, n_steps=16),
    }
    assert [site["name"] for site in grown.data["sites"]] == list(readings["taylor"].sites)
    full = float(double(x).detach().max())
    for index, site in enumerate(grown.data["sites"]):
        scores = {name: found.scores[index][0] for name, found in readings.items()}
        assert len(site["neurons"]) == 6
        for way in site["neurons"][1:]:
            place = place_of(way["name"])
            assert len(place) == scores["taylor"].ndim
            assert way["taylor"] == pytest.approx(float(scores["taylor"][place]), rel=1e-5, abs=1e-9)
            assert way["alone"][-1] - way["alone"][0] == pytest.approx(float(scores["ablation"][place]), abs=3e-6)
            assert sum(way["along"]) / 16 == pytest.approx(float(scores["area"][place]), rel=1e-4, abs=1e-9)
            assert way["alone"][-1] == pytest.approx(full, rel=1e-5)
        whole = site["neurons"][0]
        assert whole["taylor"] == pytest.approx(float(scores["taylor"].sum()), rel=1e-4)
        assert sum(whole["along"]) / 16 == pytest.approx(float(scores["area"].sum()), rel=1e-4)


def test_a_whole_site_grows_from_nothing(model: nn.Module, images: torch.Tensor, grown: InteractiveFigure) -> None:
    double, x = copy.deepcopy(model).double(), images[:1].double()
    target = int(double(x).argmax())
    for cut, site in zip((2, 4, 7), grown.data["sites"], strict=True):  # the layers of the model behind each ReLU
        assert isinstance(double, nn.Sequential)
        with torch.no_grad():
            a = double[:cut](x)
            expected = [float(double[cut:](k / 16 * a)[0, target]) for k in range(17)]
        assert site["neurons"][0]["alone"] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_neurons_to_choose_from_are_active_and_telling(
    model: nn.Module, images: torch.Tensor, grown: InteractiveFigure
) -> None:
    activations = pathwaylib.observe(model, images[:1]).post
    for a, score, site in zip(activations, taylor(model, images[:1]).scores, grown.data["sites"], strict=True):
        places = [place_of(way["name"]) for way in site["neurons"][1:]]
        assert len(set(places)) == len(places)
        assert places[0] == tuple(np.unravel_index(int(score[0].abs().argmax()), score[0].shape))
        assert all(float(a[0][place].detach()) > 0 for place in places)


def test_sites_of_a_neuron_figure_are_chosen_by_name(model: nn.Module, images: torch.Tensor) -> None:
    some = neuron_figure(model, images[:1], sites=["relu_2", "relu_0"], neurons=2, n_steps=4, target=2)
    assert [site["name"] for site in some.data["sites"]] == ["relu_2", "relu_0"]
    assert some.data["target"] == "2"
    assert "at 2 sites" in repr(some)
    with torch.no_grad():
        assert some.data["sites"][0]["neurons"][0]["alone"][-1] == pytest.approx(
            float(model(images[:1])[0, 2]), rel=1e-4
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.rand(2, 3, 12, 12)}, "2 inputs"),
        ({"sites": []}, "choose among relu_0, relu_1, relu_2"),
        ({"sites": ["relu_9"]}, "relu_9"),
        ({"neurons": 0}, "neurons is 0"),
        ({"n_steps": 0}, "n_steps is 0"),
        ({"class_names": ["one"]}, "1 class names for a network of 3"),
        ({"target": 3}, "out of range"),
    ],
)
def test_wrong_neuron_figures_are_answered(model: nn.Module, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PathwayError, match=message):
        neuron_figure(model, **{"x": torch.rand(1, 3, 12, 12), **arguments})  # type: ignore[arg-type]


@pytest.mark.browser
def test_choosing_a_neuron_by_keyboard(browser: Browser, grown: InteractiveFigure, tmp_path: Path) -> None:
    page = browser.new_page(viewport=DESKTOP)
    seen = Seen(page)
    page.goto(page_of(grown, tmp_path))
    root = page.locator(".pathwaylib-figure")

    def shown(reading: str) -> float:
        return float(root.locator(f".{reading}-value").inner_text().replace("−", "-"))

    page.get_by_role("combobox", name="Site").select_option("relu_1")
    choice = page.get_by_role("combobox", name="Neuron")
    for index, way in enumerate(grown.data["sites"][1]["neurons"]):
        choice.select_option(index=index)
        assert shown("taylor") == pytest.approx(way["taylor"], abs=6e-4)
        assert shown("alone") == pytest.approx(way["alone"][-1] - way["alone"][0], abs=6e-4)
        assert shown("along") == pytest.approx(sum(way["along"]) / 16, abs=6e-4)
    slider = page.get_by_role("slider", name="α")
    drawn = "root => [...root.querySelectorAll('svg')].map(svg => svg.outerHTML)"
    slider.press("Home")
    assert slider.get_attribute("aria-valuetext") == "α 0.00"
    assert "so far: 0.000 alone, 0.000 while" in root.locator(".now").inner_text()
    before = root.evaluate(drawn)
    assert len(before) == 2
    slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "α 0.06"
    assert all(a != b for a, b in zip(before, root.evaluate(drawn), strict=True))
    slider.press("End")
    text = root.locator(".now").inner_text()
    assert f"so far: {root.locator('.alone-value').inner_text()} alone" in text  # the area is the loss
    assert f"{root.locator('.along-value').inner_text()} while" in text
    assert root.locator("b").count() == 0  # a class name is text
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
    page.close()


# --- class-relevant pathways ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(model: nn.Module, images: torch.Tensor) -> InteractiveFigure:
    frequencies, sites = frequencies_of(model, images)
    inputs = {"photographs <i>": images, "grey": torch.full((3, 3, 12, 12), 0.5)}
    names = ["cat", "<b>dog</b>", "</script>"]
    return class_figure(model, frequencies, sites, inputs, shares=[0.2, 0.5, 0.8], class_names=names)


def frequencies_of(model: nn.Module, images: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[str, ...]]:
    seen = pathwaylib.observe(model, images)
    draws = torch.Generator().manual_seed(3)
    return tuple(torch.rand(3, *a.shape[1:], generator=draws) for a in seen.post), seen.sites


def test_class_figure_holds_what_the_network_says_inside_each_pathway(
    model: nn.Module, images: torch.Tensor, classes: InteractiveFigure
) -> None:
    frequencies, sites = frequencies_of(model, images)
    kinds = {"photographs <i>": images, "grey": torch.full((3, 3, 12, 12), 0.5)}
    assert classes.data["inputs"] == list(kinds)
    for number, steps in enumerate(classes.data["pathways"]):
        for share, shown in zip((0.2, 0.5, 0.8), steps, strict=True):
            pathway = class_pathways(frequencies, sites, share=share)[number]
            assert shown["kept"] == int(pathway.sizes)
            assert shown["sites"] == pytest.approx([float(m.float().mean()) for m in pathway.masks], abs=6e-5)
            for found, part in zip(shown["inputs"], kinds.values(), strict=True):
                with torch.no_grad(), masked(pathway):
                    inside = model(part)
                with torch.no_grad():
                    whole = model(part)
                assert found["inside"] == pytest.approx(float(inside.softmax(1)[:, number].mean()), abs=6e-4)
                assert found["whole"] == pytest.approx(float(whole.softmax(1)[:, number].mean()), abs=6e-4)
                assert found["called"] == pytest.approx(float((inside.argmax(1) == number).float().mean()), abs=6e-5)
                assert found["count"] == len(part)
                assert found["own"] == bool((whole.argmax(1) == number).sum() * 2 > len(part))
    assert any(found["own"] for steps in classes.data["pathways"] for found in steps[0]["inputs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": {}}, "at least one kind of input"),
        ({"shares": []}, "and one share"),
        ({"shares": [0.0]}, "share is 0.0"),
        ({"frequencies": (torch.rand(2, 6, 10, 10),)}, "frequencies of 2 classes for a network of 3"),
        ({"class_names": ["one"]}, "1 class names for a network of 3"),
    ],
)
def test_wrong_class_figures_are_answered(
    model: nn.Module, images: torch.Tensor, arguments: dict[str, object], message: str
) -> None:
    frequencies, sites = frequencies_of(model, images)
    given = {"frequencies": frequencies, "sites": sites, "inputs": {"photographs": images}}
    with pytest.raises(PathwayError, match=message):
        class_figure(model, **{**given, **arguments})  # type: ignore[arg-type]


@pytest.mark.browser
def test_choosing_a_class_and_a_share_by_keyboard(browser: Browser, classes: InteractiveFigure, tmp_path: Path) -> None:
    page = browser.new_page(viewport=DESKTOP)
    seen = Seen(page)
    page.goto(page_of(classes, tmp_path))
    root = page.locator(".pathwaylib-figure")
    slider = page.get_by_role("slider", name="τ")
    assert slider.get_attribute("aria-valuetext") == "τ 0.8"  # the last of its three steps
    slider.press("Home")
    assert slider.get_attribute("aria-valuetext") == "τ 0.2"
    page.get_by_role("combobox", name="Class").select_option(index=1)
    shown = classes.data["pathways"][1][0]
    assert f"Class <b>dog</b>, τ = 0.2: {shown['kept']} of {classes.data['neurons']}" in root.inner_text()
    widths = root.locator(".bar span").evaluate_all("spans => spans.map(span => parseFloat(span.style.width))")
    expected = [*shown["sites"], *(found["inside"] for found in shown["inputs"])]
    assert widths == pytest.approx([100 * share for share in expected], abs=0.01)
    marks = root.locator(".bar i").evaluate_all("marks => marks.map(mark => parseFloat(mark.style.left))")
    assert marks == pytest.approx([100 * found["whole"] for found in shown["inputs"]], abs=0.01)
    before = root.locator(".now").inner_text()
    assert "Called <b>dog</b> inside the pathway" in before
    assert root.locator("b b").count() == 0  # a class name is text
    slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "τ 0.5"
    assert root.locator(".kept").inner_text().startswith("Class <b>dog</b>, τ = 0.5")
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
    page.close()


# --- in a browser ----------------------------------------------------------------------------------------------------


class Seen:
    """A page with what it asked for and complained about."""

    def __init__(self, page: Page) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )


def page_of(figure: InteractiveFigure, folder: Path, *, copies: int = 1, attributes: str = "") -> str:
    path = folder / "figure.html"
    head = f'<!doctype html><html lang="en" {attributes}><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width">'
    path.write_text(head + f"<title>figure</title><body>{figure.html() * copies}</body></html>", encoding="utf-8")
    return path.as_uri()


PIXELS = "root => [...root.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())"


@pytest.mark.browser
def test_keyboard_moves_the_slider_and_everything_follows(
    browser: Browser, figure: InteractiveFigure, tmp_path: Path
) -> None:
    page = browser.new_page(viewport=DESKTOP)
    seen = Seen(page)
    page.goto(page_of(figure, tmp_path))
    root = page.locator(".pathwaylib-figure")
    slider = page.get_by_role("slider", name="Sparsity")
    assert slider.get_attribute("aria-valuetext") == "sparsity 0.9"  # where it starts
    before, text = root.evaluate(PIXELS), root.locator(".answer").inner_text()
    slider.focus()
    page.keyboard.press("Home")
    after = root.evaluate(PIXELS)
    assert slider.get_attribute("aria-valuetext") == "sparsity 0"
    assert before[0] == after[0]  # the image stays
    assert all(a != b for a, b in zip(before[1:], after[1:], strict=True))
    assert root.locator(".answer").inner_text() != text
    kept = figure.data["frames"][0][0]["kept"]
    assert f"keeps {kept} of {figure.data['neurons']}" in root.locator(".kept").inner_text()
    page.keyboard.press("End")
    assert root.evaluate(PIXELS) == before
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "sparsity 0.5"
    page.get_by_role("combobox", name="Image").select_option(index=1)
    assert root.evaluate(PIXELS)[0] != before[0]
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
    page.close()


@pytest.mark.browser
def test_canvas_shows_the_data(browser: Browser, figure: InteractiveFigure, tmp_path: Path) -> None:
    page = browser.new_page(viewport=DESKTOP)
    page.goto(page_of(figure, tmp_path))
    drawn = page.evaluate(
        "() => { const c = document.querySelector('canvas.picture');"
        " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }"
    )
    expected = unpack(figure.data["images"][0]["pixels"], 12, 12, 3)
    assert (np.array(drawn).reshape(12, 12, 4)[..., :3] == expected).all()
    page.close()


@pytest.mark.browser
def test_copies_on_one_page_and_in_a_sandboxed_frame_work_alone(
    browser: Browser, figure: InteractiveFigure, tmp_path: Path
) -> None:
    page = browser.new_page(viewport=DESKTOP)
    seen = Seen(page)
    page.goto(page_of(figure, tmp_path, copies=2))
    first, second = page.locator(".pathwaylib-figure").all()
    assert first.locator("option").count() == second.locator("option").count() == 2
    before = second.evaluate(PIXELS)
    first.locator("input").press("Home")
    assert first.evaluate(PIXELS) != before == second.evaluate(PIXELS)
    # As Colab does: a frame that may run scripts, and nothing else.
    page.set_content('<iframe sandbox="allow-scripts" style="width:700px;height:700px"></iframe>')
    page.evaluate("html => { document.querySelector('iframe').srcdoc = html; }", figure.html())
    frame = page.frame_locator("iframe")
    frame.locator("input[type=range]").press("Home")
    assert frame.locator("output").inner_text() == "0"
    assert seen.complaints == []
    page.close()


@pytest.mark.browser
def test_inserted_as_jupyterlab_inserts_it(browser: Browser, figure: InteractiveFigure) -> None:
    page = browser.new_page(viewport=DESKTOP)
    seen = Seen(page)
    page.set_content("<body data-jp-theme-light='false'></body>")
    # JupyterLab fills a detached element, replaces its scripts by new ones so that they run, and attaches it.
    insert = """html => {
        const host = document.createElement("div");
        host.innerHTML = html;
        for (const old of host.querySelectorAll("script")) {
            const script = document.createElement("script");
            script.textContent = old.textContent;
            old.replaceWith(script);
        }
        document.body.append(host);
    }"""
    page.evaluate(insert, figure.html())
    page.evaluate("document.querySelector('.pathwaylib-figure').remove()")  # the cell is run again
    page.evaluate(insert, figure.html())
    page.get_by_role("slider", name="Sparsity").press("Home")
    assert page.locator("output").inner_text() == "0"
    paper = page.evaluate("getComputedStyle(document.querySelector('.pathwaylib-figure')).backgroundColor")
    assert paper == "rgb(20, 24, 30)"
    assert seen.complaints == []
    page.close()


# What has to be told from the paper, with the property that colours it: texts, then lines and areas.
LEGIBLE = {
    "figure": ({".pathwaylib-figure": "color", ".caption": "color", ".note": "color", "select": "color"}, {}),
    "grown": (
        {".note": "color", ".now": "color", "td": "color", "th": "color", "select": "color", "svg text": "fill"},
        {"svg .alone": "stroke", "svg .along": "stroke", "svg .tangent": "stroke"},
    ),
    "classes": (
        {".note": "color", ".now": "color", ".kept": "color", ".rows": "color", "select": "color"},
        {".bar span": "backgroundColor", ".bar i": "backgroundColor"},
    ),
}


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", LEGIBLE)
def test_every_figure_fits_and_is_legible(
    browser: Browser,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    theme: str,
    viewport: dict[str, int],
    name: str,
) -> None:
    # The page's own theme wins over the system's.
    page = browser.new_page(viewport=viewport, color_scheme="light" if theme == "dark" else "dark")
    page.goto(page_of(request.getfixturevalue(name), tmp_path, attributes=f'data-theme="{theme}"'))
    assert page.evaluate("document.scrollingElement.scrollWidth") <= viewport["width"]

    def style(query: str, key: str) -> str:
        found: str = page.evaluate(f"getComputedStyle(document.querySelector('{query}')).{key}")
        return found

    paper = style(".pathwaylib-figure", "backgroundColor")
    assert paper == ("rgb(20, 24, 30)" if theme == "dark" else "rgb(255, 255, 255)")
    for parts, least in zip(LEGIBLE[name], (4.5, 3), strict=True):
        for query, key in parts.items():
            assert contrast(style(query, key), paper) >= least, query
    page.close()


@pytest.mark.browser
def test_without_a_theme_the_system_decides(browser: Browser, figure: InteractiveFigure, tmp_path: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(page_of(figure, tmp_path))
    paper = page.evaluate("getComputedStyle(document.querySelector('.pathwaylib-figure')).backgroundColor")
    assert paper == "rgb(20, 24, 30)"
    page.close()


def contrast(one: str, other: str) -> float:
    """Contrast of two CSS colours ``rgb(r, g, b)``, by the Web Content Accessibility Guidelines."""

    def luminance(text: str) -> float:
        parts = [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
