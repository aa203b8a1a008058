"""The explorer: it shows the library's own numbers, says what went wrong, and works in a browser with a live kernel."""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
import torch
from playwright.sync_api import Browser, expect
from torch import nn

from pathwaylib import NeuronIntGrad, NeuronMCT, PathwayError, linear_region, masked
from pathwaylib.widgets import explore


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


NAMES = ["cat", "<b>dog</b>", "ship"]


class Handled:
    """An explorer with its controls and what it shows by name."""

    def __init__(self, explorer: Any) -> None:
        box, self.numbers, self.pictures = explorer.children
        self.control = {control.description: control for control in box.children}

    def row(self, name: str) -> str:
        found = re.search(rf"{name}</th><td>(.*?)</td>", self.numbers.value)
        assert found, self.numbers.value
        return found[1]


def test_numbers_are_the_librarys(model: nn.Module, images: torch.Tensor) -> None:
    explorer = Handled(explore(model, images, class_names=NAMES))
    for name, value in {
        "Image": 2, "Class": 1, "Selector": "NeuronIntGrad", "Sparsity": 0.6, "Site": 1,
    }.items():  # fmt: skip
        explorer.control[name].value = value
    x = images[2:]
    pathway = NeuronIntGrad(0.6)(model, x, 1).restrict([1])
    with torch.no_grad(), masked(pathway):
        inside = model(x).softmax(1)[0]
    assert f"&lt;b&gt;dog&lt;/b&gt; {float(inside[1]):.1%}" in explorer.row("inside the pathway")
    assert explorer.row("neurons kept").startswith(f"{int(pathway.sizes):,} of {pathway.neurons:,} ")
    radius = linear_region(model.double(), x.double(), pathway, 1).radius
    assert float(explorer.row("linear radius")) == pytest.approx(float(radius), rel=0.01)


def test_every_control_changes_what_is_shown(model: nn.Module, images: torch.Tensor) -> None:
    explorer = Handled(explore(model, images))
    for name, value in (("Image", 1), ("Class", 2), ("Selector", "random"), ("Sparsity", 0.5), ("Site", 0)):
        before = explorer.numbers.value, explorer.pictures.value
        explorer.control[name].value = value
        assert explorer.numbers.value != before[0] or explorer.pictures.value != before[1], name
    assert "linear radius" in explorer.numbers.value
    explorer.control["Linear radius"].value = False
    assert "linear radius" not in explorer.numbers.value


def test_pictures_say_what_they_show(model: nn.Module, images: torch.Tensor) -> None:
    explorer = Handled(explore(model, images, class_names=NAMES))
    texts = re.findall(r'alt="([^"]*)"', explorer.pictures.value)
    assert len(texts) == explorer.pictures.value.count("<img") == 2
    assert all(texts)
    assert "<b>" not in explorer.pictures.value


def test_what_fails_is_said_in_the_widget(model: nn.Module, images: torch.Tensor) -> None:
    def refuses(sparsity: float) -> NeuronMCT:
        raise PathwayError(f"nothing <fits> at {sparsity}")

    explorer = Handled(explore(model, images, selectors={"NeuronMCT": NeuronMCT, "refuses": refuses}))
    explorer.control["Selector"].value = "refuses"
    assert explorer.numbers.value == '<p role="alert">nothing &lt;fits&gt; at 0.9</p>'
    assert explorer.pictures.value == ""
    explorer.control["Selector"].value = "NeuronMCT"
    assert "neurons kept" in explorer.numbers.value


def test_a_curved_network_has_no_radius_but_a_pathway(images: torch.Tensor) -> None:
    curved = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 4), nn.Tanh(), nn.Linear(4, 2))
    explorer = Handled(explore(curved.eval(), images))
    assert "piecewise linear" in explorer.row("linear radius")
    assert "neurons kept" in explorer.numbers.value


def test_model_and_images_stay_as_they_were(model: nn.Module, images: torch.Tensor) -> None:
    weights, before = [p.clone() for p in model.parameters()], images.clone()
    explore(model, images)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(3, 12, 12)}, r"\(3, 12, 12\); give a tensor \(batch"),
        ({"images": torch.rand(0, 3, 12, 12)}, r"\(0, 3, 12, 12\)"),
        ({"images": "cat.png"}, "are str; give a tensor"),
        ({"selectors": {}}, "no selectors; give at least one"),
        ({"class_names": ["cat"]}, "1 class names for a network of 3 classes"),
    ],
)
def test_bad_arguments_are_named(model: nn.Module, images: torch.Tensor, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PathwayError, match=message):
        explore(model, **{"images": images, **change})


CELL = """
import torch
from torch import nn
from pathwaylib.widgets import explore
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(600, 3)).eval()
explore(model, torch.rand(3, 3, 12, 12), class_names=["cat", "dog", "ship"])
"""


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[str]:
    """The address of a notebook with the explorer, served by a Jupyter server of this machine."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=kernel)
    nbformat.write(page, tmp_path / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex()
    options = [
        f"--port={port}", "--no-browser", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}",
        "--ServerApp.allow_root=True", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urlopen(f"{address}/api?token={token}", timeout=5).close()
                break
            except URLError:
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
        yield f"{address}/doc/tree/explorer.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.mark.browser
def test_a_live_kernel_answers_the_keyboard(browser: Browser, notebook: str) -> None:
    page = browser.new_page(viewport={"width": 1000, "height": 1400})
    page.set_default_timeout(90_000)
    page.goto(notebook)
    # The whole of it by keyboard: run the cell, then walk from control to control.
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
    page.wait_for_function("document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'")
    page.keyboard.press("Control+Enter")
    table = page.locator("table[role=status]")
    expect(table).to_contain_text(re.compile(r"linear radius\s*\d"), timeout=90_000)
    expect(page.locator(".widget-html img")).to_have_count(2)
    first = table.inner_text()
    page.locator(".widget-dropdown select").first.focus()  # the class
    page.keyboard.press("ArrowDown")
    expect(table).not_to_have_text(re.compile("^" + re.escape(first) + "$"), timeout=60_000)
    kept = table.locator("tr", has_text="neurons kept")
    before = kept.inner_text()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")  # less sparsity
    expect(kept).not_to_have_text(before, timeout=60_000)
    page.context.close()
