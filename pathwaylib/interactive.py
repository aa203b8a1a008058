"""Interactive figures that need no kernel, no server and no network: one piece of HTML with its data inside.

They work on the book's static pages, opened as files, in Jupyter, and in the sandboxed frame Colab shows outputs in.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .attribution import PathwayGradient
from .errors import PathwayError, require_at_least_one
from .evaluation.pathways import pathway_logits
from .generator.transfer import class_pathways
from .linearity import linear_pieces
from .neurons import Target, masked, observe, per_input, resolve_target, response, targets_of
from .pathway import Pathway
from .plots import colour_limit
from .rerun import Rerun
from .selectors import Chosen, NeuronMCT, Selector

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_MAX_SIDE = 32  # larger maps are averaged down to it, so that large networks give small figures


class InteractiveFigure:
    r"""A self-contained interactive figure, shown by Jupyter as HTML.

    Built by :func:`pathway_figure`, :func:`neuron_figure`, :func:`line_figure` and :func:`class_figure`. Its root
    element has the class ``pathwaylib-figure`` and, as key, a hash of its content, so that the same figure always gives
    the same HTML.

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

        def joined(*names: str) -> str:
            return "".join((web / name).read_text(encoding="utf-8") for name in names)

        style = joined("figure.css", f"{self.name}.css")
        body = joined(f"{self.name}.html")
        script = joined("plot.js", f"{self.name}.js", "figure.js")
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
    require_pictures(images)
    if not sparsities:
        raise PathwayError("there are no sparsities; give at least one, for example [0.5, 0.9]")
    with torch.no_grad():
        seen = observe(model, images)
    targets = resolve_target(seen.logits, target)
    names = class_names_of(class_names, seen.logits.shape[1])
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
        gradient = PathwayGradient(model, Chosen(pathway)).attribute(images, targets)
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


def neuron_figure(
    model: nn.Module,
    x: Tensor,
    *,
    sites: Sequence[str] | None = None,
    neurons: int = 6,
    n_steps: int = 64,
    target: Target = None,
    class_names: Sequence[str] | None = None,
) -> InteractiveFigure:
    """Build a figure in which a neuron is chosen, and its activation grows from 0 to full.

    Three contributions are readings of it: the tangent's rise (:func:`pathwaylib.taylor`), the response's rise
    (:func:`pathwaylib.ablation`), and the area under the neuron's slope while its whole site grows
    (:func:`pathwaylib.integrated_gradients`). A site as a whole can be chosen too.

    Args:
        model: a network in eval mode.
        x: one input ``(1, ...)``.
        sites: names of the sites to choose from, such as ``["relu_3"]``; all of them if left out.
        neurons: to choose from per site: those of largest Taylor score, and those whose scores differ most.
        n_steps: steps from 0 to full.
        target: class to explain; None means the predicted class.
        class_names: a name per class; numbers if left out.

    Raises:
        PathwayError: if an argument does not fit the network, or as :func:`pathwaylib.observe`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
        >>> neuron_figure(net, torch.rand(1, 4), n_steps=8)
        InteractiveFigure('neuron': Response as the activation of a neuron grows from 0 to full, at 2 sites.)
    """
    require_at_least_one(neurons=neurons, n_steps=n_steps)
    targets = _only_target(model, x, target)
    rerun = Rerun(model, x.expand(n_steps + 1, *x.shape[1:]))
    everyone = [site.name for site in rerun.sites]
    chosen = everyone if sites is None else list(sites)
    if not chosen or not set(chosen) <= set(everyone):
        raise PathwayError(f"sites is {chosen}; choose among {', '.join(everyone)}")
    data = {
        "target": class_names_of(class_names, rerun.logits.shape[1])[int(targets)],
        "steps": n_steps,
        "first": len(chosen) // 2,
        "sites": [{"name": name, "neurons": _ways(rerun, everyone.index(name), targets, neurons)} for name in chosen],
    }
    count = f"{len(chosen)} site{'s' if len(chosen) > 1 else ''}"
    return InteractiveFigure(
        "neuron", data, f"Response as the activation of a neuron grows from 0 to full, at {count}."
    )


def _ways(rerun: Rerun, site: int, targets: Tensor, neurons: int) -> list[dict[str, object]]:
    """Follow a whole site, and its most telling neurons, while they grow from 0 to full."""
    a = rerun.post[site]
    steps = len(a) - 1
    scales = per_input(torch.arange(steps + 1).to(a), a) / steps
    targets = targets.expand(steps + 1)

    def responses(activation: Tensor) -> Tensor:
        return response(rerun(site, activation), targets)

    # The slopes at the middle of each step and, last, at full activation: Taylor's.
    middles = torch.cat([scales[:-1] + 0.5 / steps, scales[-1:]])
    slopes = (a * rerun.gradient(site, middles * a, targets)).flatten(1)
    along, taylor = slopes[:-1], slopes[-1]

    def way(name: str, alone: Tensor, along: Tensor, taylor: Tensor) -> dict[str, object]:
        return {"name": name, "alone": _rounded(alone), "along": _rounded(along), "taylor": _rounded(taylor[None])[0]}

    with torch.no_grad():
        ways = [way("the whole site", responses(scales * a), along.sum(1), taylor.sum())]
        differing = (along.mean(0) - taylor).abs().argsort(descending=True, stable=True)
        largest = taylor.abs().argsort(descending=True, stable=True)
        pairs = torch.stack([largest, differing], 1).flatten().tolist()
        active = a[0].flatten() != 0
        for neuron in [j for j in dict.fromkeys(pairs) if active[j]][:neurons]:
            alone = a.clone()
            alone.view(steps + 1, -1)[:, neuron] *= scales.flatten()
            place = np.unravel_index(neuron, a.shape[1:])
            name = "channel {}, row {}, column {}" if len(place) == 3 else "neuron " + ", ".join(["{}"] * len(place))
            ways.append(way(name.format(*place), responses(alone), along[:, neuron], taylor[neuron]))
    return ways


def _rounded(values: Tensor) -> list[float]:
    """Return numbers with the six digits that a drawing needs."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def line_figure(
    model: nn.Module,
    x: Tensor,
    directions: Mapping[str, Tensor],
    pathways: Mapping[str, Pathway | None],
    *,
    length: float = 1.0,
    target: Target = None,
    class_names: Sequence[str] | None = None,
) -> InteractiveFigure:
    """Build a figure with a slider along a line from an image: the response, its kinks and the current linear piece.

    Kinks are exact, see :func:`pathwaylib.linear_pieces`. Use float64: in single precision short pieces get no
    meaningful slope.

    Args:
        model: a piecewise-linear network in eval mode.
        x: one input ``(1, ...)``.
        directions: to choose from, by name, each shaped like the input.
        pathways: networks to compare, by name, the image's pathway or None for the full network.
        length: of the walk, in lengths of the directions.
        target: class of the response; None means the full network's prediction.
        class_names: a name per class; numbers if left out.

    Raises:
        PathwayError: if an argument does not fit the network, or as :func:`pathwaylib.linear_pieces`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval().double()
        >>> x = torch.rand(1, 4, dtype=torch.float64)
        >>> line_figure(net, x, {"up": torch.ones(4)}, {"full network": None})
        InteractiveFigure('line': Response along 1 line from an image with its linear pieces: full network.)
    """
    targets = _only_target(model, x, target)
    if not directions or not pathways:
        raise PathwayError("give at least one direction and one network, for example {'full network': None}")
    with torch.no_grad():
        classes = model(x).shape[1]
    steps = torch.stack([direction.to(x).view(x.shape[1:]) for direction in directions.values()])
    networks = []
    for name, pathway in pathways.items():
        kinks = linear_pieces(model, x.expand_as(steps), steps, length, pathway)
        walks = [
            _walk(model, x, step, found, length, pathway, targets) for step, found in zip(steps, kinks, strict=True)
        ]
        networks.append({"name": name, "walks": walks})
    data = {
        "target": class_names_of(class_names, classes)[int(targets)],
        "length": float(length),
        "directions": list(directions),
        "networks": networks,
    }
    count = f"{len(directions)} line{'s' if len(directions) > 1 else ''}"
    return InteractiveFigure(
        "line", data, f"Response along {count} from an image with its linear pieces: {', '.join(pathways)}."
    )


def _walk(
    model: nn.Module,
    x: Tensor,
    step: Tensor,
    kinks: Tensor,
    length: float,
    pathway: Pathway | None,
    targets: Tensor,
) -> dict[str, list[float]]:
    """Return where the pieces of a line end, how far the response has changed there, and the pieces' slopes."""
    ends = torch.cat([kinks.new_zeros(1), kinks, kinks.new_full((1,), length)])
    inside = nullcontext() if pathway is None else masked(pathway)
    with torch.no_grad(), inside:
        responses = [
            response(model(x + per_input(part, x) * step), targets.expand(len(part))) for part in ends.split(32)
        ]
    values = torch.cat(responses)
    slopes = values.diff() / ends.diff()
    return {"ends": _rounded(ends), "values": _rounded(values - values[0]), "slopes": _rounded(slopes)}


def class_figure(
    model: nn.Module,
    frequencies: tuple[Tensor, ...],
    sites: tuple[str, ...],
    inputs: Mapping[str, Tensor],
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    class_names: Sequence[str] | None = None,
) -> InteractiveFigure:
    """Build a figure with a choice of class and a slider for τ: the class-relevant pathway, and what it does to inputs.

    A kind of input is the class's own where the whole network calls most of its members so.

    Args:
        model: a network in eval mode.
        frequencies: per site, ``(K, ...)``, from :func:`pathwaylib.class_frequencies`.
        sites: names of the sites.
        inputs: images ``(B, C, H, W)`` by kind, such as those of one class, or noise.
        shares: the slider's steps, each τ in (0, 1].
        class_names: a name per class; numbers if left out.

    Raises:
        PathwayError: if there are no inputs or shares, or an argument does not fit the network.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
        >>> class_figure(net, (torch.rand(2, 5),), ("relu_0",), {"noise": torch.rand(8, 4)})
        InteractiveFigure('classes': Class-relevant pathways of 2 classes, and what they make of 8 images.)
    """
    if not inputs or not shares:
        raise PathwayError("give at least one kind of input and one share, for example {'noise': images} and [0.3]")
    images = torch.cat(list(inputs.values()))
    counts = [len(part) for part in inputs.values()]
    whole = pathway_logits(model, images, None, 256)
    names = class_names_of(class_names, whole.shape[1])
    if len(frequencies[0]) != len(names):
        raise PathwayError(f"frequencies of {len(frequencies[0])} classes for a network of {len(names)} classes")
    steps = [class_pathways(frequencies, sites, share=share) for share in shares]

    def of_class(pathways: Pathway, number: int) -> dict[str, object]:
        pathway = pathways[number]
        logits = pathway_logits(model, images, pathway, 256)
        kinds = zip(whole.split(counts), logits.split(counts), strict=True)
        return {
            "kept": int(pathway.sizes),
            "sites": [round(float(mask.float().mean()), 4) for mask in pathway.masks],
            "inputs": [_called(before, inside, number) for before, inside in kinds],
        }

    data = {
        "classes": names,
        "shares": [float(share) for share in shares],
        "first": min(2, len(shares) - 1),
        "neurons": steps[0].neurons,
        "sites": list(sites),
        "inputs": list(inputs),
        "pathways": [[of_class(pathways, number) for pathways in steps] for number in range(len(names))],
    }
    about = f"Class-relevant pathways of {len(names)} classes, and what they make of {len(images)} images."
    return InteractiveFigure("classes", data, about)


def _called(whole: Tensor, inside: Tensor, number: int) -> dict[str, object]:
    """Return what a network makes of one kind of input, without a pathway and inside that of a class."""
    return {
        "inside": round(float(inside.softmax(1)[:, number].mean()), 3),
        "whole": round(float(whole.softmax(1)[:, number].mean()), 3),
        "called": round(float((inside.argmax(1) == number).float().mean()), 4),
        "own": bool((whole.argmax(1) == number).float().mean() > 0.5),
        "count": len(whole),
    }


def _only_target(model: nn.Module, x: Tensor, target: Target) -> Tensor:
    """Return the target of a figure's one input, ``(1,)``."""
    targets = targets_of(model, x, target)
    if len(targets) != 1:
        raise PathwayError(f"x holds {len(targets)} inputs; give one, of shape (1, ...)")
    return targets


def require_pictures(images: object) -> None:
    """Raise :class:`PathwayError` where the images are not a batch of at least one grey or colour picture.

    Example:
        >>> require_pictures(torch.rand(3, 8, 8))
        Traceback (most recent call last):
        ...
        pathwaylib.errors.PathwayError: the images are (3, 8, 8); give a tensor (batch, 1 or 3, height, width)
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise PathwayError(f"the images are {shape}; give a tensor (batch, 1 or 3, height, width)")


def class_names_of(given: Sequence[str] | None, classes: int) -> list[str]:
    """Return a name for each class: those given, else numbers.

    Example:
        >>> class_names_of(None, 2)
        ['0', '1']
    """
    names = [str(k) for k in range(classes)] if given is None else list(given)
    if len(names) != classes:
        raise PathwayError(f"{len(names)} class names for a network of {classes} classes; give one each")
    return names


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
