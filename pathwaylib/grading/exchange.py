"""What the grader and the student's process tell each other: JSON and safetensors, nothing that can hold code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..pathway import Pathway

LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "Conv2d": (nn.Conv2d, ("in_channels", "out_channels", "kernel_size", "stride", "padding")),
    "ReLU": (nn.ReLU, ()),
    "ReLU6": (nn.ReLU6, ()),
    "Flatten": (nn.Flatten, ()),
    "MaxPool2d": (nn.MaxPool2d, ("kernel_size",)),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d, ("output_size",)),
}
"""Layers a network may be made of, and the arguments that make them anew."""


def encode(value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe an argument as JSON; its numbers go to ``tensors``.

    Example:
        >>> import torch
        >>> numbers = {}
        >>> encode((torch.ones(2), 3), numbers)
        {'items': [{'tensor': '0'}, {'value': 3}]}
        >>> decode({"tensor": "0"}, numbers)
        tensor([1., 1.])
    """
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[key] = value.detach().clone().contiguous()
        return {"tensor": key}
    if isinstance(value, Pathway):
        return {"pathway": [encode(mask, tensors) for mask in value.masks], "sites": list(value.sites)}
    if isinstance(value, nn.Sequential):
        layers = []
        for layer in value:
            kind = type(layer).__name__
            layers.append([kind, {name: getattr(layer, name) for name in LAYERS[kind][1]}])
        return {"layers": layers, "state": {key: encode(weight, tensors) for key, weight in value.state_dict().items()}}
    if isinstance(value, (tuple, list)):
        return {"items": [encode(part, tensors) for part in value]}
    return {"value": value}


def decode(told: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Make an argument anew; what a function does to it harms no other."""
    if "tensor" in told:
        return tensors[told["tensor"]].clone()
    if "pathway" in told:
        return Pathway(tuple(decode(mask, tensors) for mask in told["pathway"]), tuple(told["sites"]))
    if "layers" in told:
        network = nn.Sequential(*(LAYERS[kind][0](**arguments) for kind, arguments in told["layers"]))
        state = {name: decode(weight, tensors) for name, weight in told["state"].items()}
        network.load_state_dict(state, assign=True)  # with the weights' own precision
        return network.eval().requires_grad_(False)
    if "items" in told:
        return tuple(decode(part, tensors) for part in told["items"])
    return told["value"]
