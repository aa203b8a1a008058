"""Interactive figures that need no kernel, no server and no network: one piece of HTML with its data inside.

They work on the book's static pages, opened as files, in Jupyter, and in the sandboxed frame Colab shows outputs in.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .attribution import PathwayGradient
from .errors import PathwayError
from .neurons import Target, masked, observe, resolve_target
from .pathway import Pathway
from .plots import colour_limit
from .selectors import NeuronMCT, Selector

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_MAX_SIDE = 32  # larger maps are averaged down to it, so that large networks give small figures


class InteractiveFigure:
    r"""A self-contained interactive figure, shown by Jupyter as HTML.

    Built by functions such as :func:`pathway_figure`. Its root element has the class ``pathwaylib-figure`` and, as
    key, a hash of its content, so that the same figure always gives the same HTML.

    Args:
        name: which script draws it, a file in ``pathwaylib/web``.
        data: what the script reads; anything JSON can hold.
        description: what the figure shows, for those who do not see it.

    Example:
        >>> figure = InteractiveFigure("pathway", {"note": "</script>"}, "An empty figure.")
        >>> "</script>" in figure.html().split("<script>")[1].split("const data = ")[1].split("\n")[0]
        False
    """

    def __init__(self, name: str, data: dict[str, Any], description: str) -> None:
        self.name = name
        self.data = data
        self.description = description

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.description})"

    def html(self) -> str:
        """Return the figure as one HTML fragment that loads nothing."""
        web = files("pathwaylib") / "web"
        style = (web / f"{self.name}.css").read_text(encoding="utf-8")
        body = (web / f"{self.name}.html").read_text(encoding="utf-8")
        script = (web / f"{self.name}.js").read_text(encoding="utf-8")
        # No "<" in the data: nothing in it can end the script element.
        data = json.dumps(self.data, sort_keys=True, separators=(",", ":")).replace("<", "\\u003c")
        key = hashlib.sha256("\0".join((style, body, script, data, self.description)).encode()).hexdigest()[:16]
        label = html.escape(self.description, quote=True)
        return (
            f'<div class="pathwaylib-figure" data-key="{key}" role="group" aria-label="{label}">\n'
            f"<style>\n{style}</style>\n{body}"
            f'<script>\n(() => {{\nconst key = "{key}";\nconst data = {data};\n{script}}})();\n</script>\n</div>\n'
        )

    def _repr_html_(self) -> str:
        return self.html()


def pathway_figure(
    model: nn.Module,
    images: Tensor,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    selector: Callable[[float], Selector] = NeuronMCT,
    target: Target = None,
    class_names: Sequence[str] | None = None,
) -> InteractiveFigure:
    """Build a figure with a slider for the sparsity: pathway, pathway gradient and confidence follow it.

    Args:
        model: a network in eval mode.
        images: a few images ``(B, C, H, W)`` in [0, 1]; the data grows with their number.
        sparsities: the slider's steps, each in [0, 1).
        selector: makes a selector of a sparsity.
        target: class or classes to explain; None means the predicted class.
        class_names: a name per class; numbers if left out.

    Raises:
        PathwayError: if an argument does not fit the network, or as the selector.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> pathway_figure(net, torch.rand(1, 3, 8, 8), sparsities=[0.5, 0.9])
        InteractiveFigure('pathway': Pathway, pathway gradient and confidence of 1 image at 2 sparsities, 0.5 to 0.9.)
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise PathwayError(f"the images are {shape}; give a tensor (batch, 1 or 3, height, width)")
    if not sparsities:
        raise PathwayError("there are no sparsities; give at least one, for example [0.5, 0.9]")
    with torch.no_grad():
        seen = observe(model, images)
    targets = resolve_target(seen.logits, target)
    names = [str(k) for k in range(seen.logits.shape[1])] if class_names is None else list(class_names)
    if len(names) != seen.logits.shape[1]:
        raise PathwayError(f"{len(names)} class names for a network of {seen.logits.shape[1]} classes; give one each")
    full = _answers(seen.logits, targets)
    pictures = [
        {"pixels": _bytes(picture), "target": int(t), "full": answer}
        for picture, t, answer in zip(_pictures(images), targets, full, strict=True)
    ]
    frames = []
    for sparsity in sparsities:
        pathway = selector(sparsity)(model, images, targets)
        with torch.no_grad(), masked(pathway):
            answers = _answers(model(images), targets)
        gradient = PathwayGradient(model, _Chosen(pathway)).attribute(images, targets)
        assert isinstance(gradient, Tensor)
        maps = _signed_bytes(gradient)
        frames.append(
            [
                {
                    "kept": int(pathway.sizes[b]),
                    "shares": [round(float(mask[b].float().mean()), 4) for mask in pathway.masks],
                    "sites": [_bytes(_share(mask[b])) for mask in pathway.masks],
                    "map": _bytes(maps[b]),
                    "answer": answers[b],
                }
                for b in range(len(images))
            ]
        )
    sites = [
        {"name": name, "shape": list(mask.shape[1:]), "drawn": list(_share(mask[0]).shape)}
        for name, mask in zip(seen.sites, pathway.masks, strict=True)
    ]
    data = {
        "classes": names,
        "sparsities": [float(sparsity) for sparsity in sparsities],
        "neurons": pathway.neurons,
        "size": list(_pictures(images).shape[1:3]),
        "sites": sites,
        "images": pictures,
        "frames": frames,
    }
    count = f"{len(images)} image{'s' if len(images) > 1 else ''}"
    steps = f"{len(sparsities)} sparsities, {min(sparsities):g} to {max(sparsities):g}"
    return InteractiveFigure("pathway", data, f"Pathway, pathway gradient and confidence of {count} at {steps}.")


class _Chosen:
    """A selector that returns a pathway chosen before."""

    def __init__(self, pathway: Pathway) -> None:
        self.pathway = pathway

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        return self.pathway


def _answers(logits: Tensor, targets: Tensor) -> list[dict[str, float]]:
    """Return, per input, the predicted class and the probabilities of it and of the target."""
    chances = logits.detach().softmax(1)
    return [
        {"predicted": int(row.argmax()), "top": round(float(row.max()), 3), "target": round(float(row[t]), 3)}
        for row, t in zip(chances, targets, strict=True)
    ]


def _shrunk(maps: Tensor) -> Tensor:
    """Average maps ``(B, C, h, w)`` down to at most the size that is drawn."""
    height, width = maps.shape[-2:]
    if max(height, width) <= _MAX_SIDE:
        return maps
    return F.adaptive_avg_pool2d(maps, (min(height, _MAX_SIDE), min(width, _MAX_SIDE)))


def _pictures(images: Tensor) -> NDArray[np.uint8]:
    """Return images as bytes ``(B, h, w, 3)``."""
    small = _shrunk(images.detach().float().cpu()).clamp(0, 1)
    array: NDArray[np.uint8] = (small.expand(-1, 3, -1, -1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return array


def _share(mask: Tensor) -> NDArray[np.uint8]:
    """Return, per position of one input's mask, the share of channels kept as a byte on a square-root scale."""
    share = mask.float().cpu()
    if share.ndim < 3:  # a layer without positions: its neurons side by side
        flat = share.flatten()
        width = max(1, int(len(flat) ** 0.5))
        share = F.pad(flat, (0, -len(flat) % width)).view(1, -1, width)
    small = _shrunk(share.mean(0).reshape(1, 1, -1, share.shape[-1]))[0, 0]
    array: NDArray[np.uint8] = (small.sqrt() * 255).round().byte().numpy()
    return array


def _signed_bytes(maps: Tensor) -> NDArray[np.uint8]:
    """Return maps ``(B, C, h, w)``, channels summed, as bytes: 128 is 0, 1 and 255 are the ends of the colours."""
    summed = _shrunk(maps.detach().float().cpu().sum(1, keepdim=True))[:, 0].numpy()
    limits = np.array([colour_limit(values, 99.0) for values in summed])[:, None, None]
    array: NDArray[np.uint8] = (128 + np.round(127 * np.clip(summed / limits, -1, 1))).astype(np.uint8)
    return array


def _bytes(array: NDArray[np.uint8]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
