"""The self-contained figure: its data are the library's numbers, and it works in a real browser."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page
from torch import nn

import pathwaylib
from pathwaylib import InteractiveFigure, NeuronMCT, PathwayError, PathwayGradient, masked, pathway_figure

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
    # Two steps of one image; the chapter shows 4 images at 8 steps.
    assert len(small.html()) * 16 < 400_000


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


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_figure_fits_and_is_legible(
    browser: Browser, figure: InteractiveFigure, tmp_path: Path, theme: str, viewport: dict[str, int]
) -> None:
    # The page's own theme wins over the system's.
    page = browser.new_page(viewport=viewport, color_scheme="light" if theme == "dark" else "dark")
    page.goto(page_of(figure, tmp_path, attributes=f'data-theme="{theme}"'))
    assert page.evaluate("document.scrollingElement.scrollWidth") <= viewport["width"]
    paper = page.evaluate("getComputedStyle(document.querySelector('.pathwaylib-figure')).backgroundColor")
    assert paper == ("rgb(20, 24, 30)" if theme == "dark" else "rgb(255, 255, 255)")
    for query in (".pathwaylib-figure", ".caption", ".note", "select"):
        ink = page.evaluate(f"getComputedStyle(document.querySelector('{query}')).color")
        assert contrast(ink, paper) >= 4.5, query
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
