"""An explorer for a live kernel: choose image, class, selector, sparsity and site, and see what the pathway does.

It asks the kernel at every change. On a page without one, :func:`pathwaylib.pathway_figure`
shows what was computed before.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .attribution import PathwayGradient
from .errors import PathwayError
from .evaluation.pathways import pathway_logits
from .interactive import class_names_of, require_pictures
from .linearity import linear_region
from .neurons import copied, observe, resolve_target
from .pathway import Pathway
from .plots import show_attributions, show_pathway
from .selectors import Chosen, NeuronIntGrad, NeuronMCT, RandomSelection, Selector

try:
    import ipywidgets
except ImportError as missing:  # pragma: no cover
    raise PathwayError("the explorer needs ipywidgets; run: pip install ipywidgets") from missing

SELECTORS: Mapping[str, Callable[[float], Selector]] = {
    "NeuronMCT": NeuronMCT,
    "NeuronIntGrad": NeuronIntGrad,
    "random": RandomSelection,
    "random, active": partial(RandomSelection, active_only=True),
}
"""What the explorer offers: by name, what makes a selector of a sparsity."""


def explore(
    model: nn.Module,
    images: Tensor,
    *,
    selectors: Mapping[str, Callable[[float], Selector]] = SELECTORS,
    class_names: Sequence[str] | None = None,
) -> ipywidgets.VBox:
    """Return a widget that shows the pathway of an image, its gradient, its confidence and its linear radius.

    The controls choose the image, the class to explain, the selector, the sparsity, and a site: the pathway is then
    cut at that site alone, and every neuron of the others is kept.

    Args:
        model: a network in eval mode.
        images: ``(B, C, H, W)`` in [0, 1], on the network's device.
        selectors: by name, what makes a selector of a sparsity.
        class_names: a name per class; numbers if left out.

    Returns:
        A box of ipywidgets, of version 7.7 or later, for a notebook with a kernel.

    Raises:
        PathwayError: if there are no images or selectors, or an argument does not fit the network. What a control asks
            for and the network cannot give (such as the linear radius of a network that is not piecewise linear) is
            said in the widget.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> explorer = explore(net, torch.rand(2, 3, 8, 8), class_names=["cat", "dog"])
        >>> [control.description for control in explorer.children[0].children]
        ['Image', 'Class', 'Selector', 'Sparsity', 'Site', 'Linear radius']
    """
    require_pictures(images)
    if not selectors:
        raise PathwayError("there are no selectors; give at least one, for example {'NeuronMCT': NeuronMCT}")
    with torch.no_grad():
        seen = observe(model, images[:1])
    names = class_names_of(class_names, seen.logits.shape[1])
    # Rounding is not part of a linear radius' guarantee.
    exact = copied(model).double()

    wide = {"style": {"description_width": "6em"}, "layout": ipywidgets.Layout(width="min(28em, 100%)")}
    late = {"continuous_update": False, **wide}
    image = ipywidgets.IntSlider(value=0, min=0, max=len(images) - 1, description="Image", **late)
    wanted = ipywidgets.Dropdown(
        options=[("as predicted", None), *((name, number) for number, name in enumerate(names))],
        description="Class",
        **wide,
    )
    selector = ipywidgets.Dropdown(options=list(selectors), description="Selector", **wide)
    sparsity = ipywidgets.FloatSlider(
        value=0.9, min=0.0, max=0.99, step=0.01, description="Sparsity", readout_format=".2f", **late
    )
    site = ipywidgets.Dropdown(
        options=[("all", None), *((name, number) for number, name in enumerate(seen.sites))], description="Site", **wide
    )
    radius = ipywidgets.Checkbox(value=True, description="Linear radius", **wide)
    controls = ipywidgets.VBox([image, wanted, selector, sparsity, site, radius])
    numbers, pictures = ipywidgets.HTML(), ipywidgets.HTML()

    def show(_: object = None) -> None:
        x = images[image.value : image.value + 1]
        try:
            with torch.no_grad():
                logits = model(x)
            target = resolve_target(logits, wanted.value)
            pathway = selectors[selector.value](sparsity.value)(model, x, target)
            if site.value is not None:
                pathway = pathway.restrict([site.value])
            inside = pathway_logits(model, x, pathway, 1)
            rows = _answers(pathway, logits, inside, int(target), names)
            # The numbers first: the radius takes longest, and follows.
            numbers.value = _table({**rows, "linear radius": "…"} if radius.value else rows)
            pictures.value = _pictures(model, x, pathway, target, names[int(target)])
            if radius.value:
                numbers.value = _table({**rows, "linear radius": _radius(exact, x, pathway, target)})
        except PathwayError as error:
            numbers.value = f'<p role="alert">{html.escape(str(error))}</p>'
            pictures.value = ""  # those of the selection before would seem to belong to this one

    for control in controls.children:
        control.observe(show, names="value")
    show()
    return ipywidgets.VBox([controls, numbers, pictures])


def _answers(pathway: Pathway, whole: Tensor, inside: Tensor, target: int, names: Sequence[str]) -> dict[str, str]:
    """Return what both networks say about the image, as lines of a table."""

    def says(logits: Tensor) -> str:
        chances = logits[0].softmax(0)
        classes = dict.fromkeys((int(chances.argmax()), target))  # one where they are the same
        return ", ".join(f"{names[number]} {float(chances[number]):.1%}" for number in classes)

    kept = int(pathway.sizes)
    return {
        "whole network": says(whole),
        "inside the pathway": says(inside),
        "neurons kept": f"{kept:,} of {pathway.neurons:,} ({kept / pathway.neurons:.2%})",
    }


def _radius(model: nn.Module, x: Tensor, pathway: Pathway, target: Tensor) -> str:
    try:
        found = linear_region(model, x.double(), pathway, target, mode="fast")
    except PathwayError as error:
        return str(error)
    return f"{float(found.radius):.2e}"


def _table(rows: Mapping[str, str]) -> str:
    lines = (
        f'<tr><th scope="row" style="text-align: left; padding-right: 1em">{key}</th><td>{html.escape(value)}</td></tr>'
        for key, value in rows.items()
    )
    return f'<table role="status">{"".join(lines)}</table>'


def _pictures(model: nn.Module, x: Tensor, pathway: Pathway, target: Tensor, name: str) -> str:
    gradient = PathwayGradient(model, Chosen(pathway)).attribute(x, target)
    assert isinstance(gradient, Tensor)
    beside = show_attributions(x, {"pathway gradient": gradient}, size=2.2)
    along = show_pathway(pathway, size=1.4)
    return _png(beside, f"Image and pathway gradient for {name}: red raises the response, blue lowers it.") + _png(
        along, "Share of channels kept at each position of each site."
    )


def _png(figure: Figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img style="display: block; max-width: 100%" alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
