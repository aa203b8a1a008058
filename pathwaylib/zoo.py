"""Trained networks by name, with the weights that ship in the package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from .architectures import ARCHITECTURES
from .errors import PathwayError
from .files import atomic_write

WEIGHTS = Path(__file__).parent / "weights"
"""Where the weights that ship with the package are."""


def model_card(name: str, *, folder: Path = WEIGHTS) -> dict[str, Any]:
    """Return what is known of a trained network: recipe, accuracy, SHA-256 of its weights, versions.

    Raises:
        PathwayError: if there is no such network, in general or in ``folder``.

    Example:
        >>> model_card("planted-cnn")["data"]
        'planted(n=8000, seed=1)'
    """
    if name not in ARCHITECTURES:
        raise PathwayError(f"there is no model {name!r}; choose one of {', '.join(ARCHITECTURES)}")
    path = folder / f"{name}.json"
    if not path.exists():
        raise PathwayError(f"{path} does not exist: {name!r} is not trained; see experiments/train_subjects.ipynb")
    return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))


def load_model(name: str, *, device: torch.device | str = "cpu", folder: Path = WEIGHTS) -> nn.Module:
    """Load a trained network: verified, in eval mode, its parameters frozen.

    Args:
        name: ``"cifar10-vgg"``, ``"cifar10-resnet20"``, ``"cifar10-resnet8"``, ``"planted-cnn"`` or
            ``"planted-shortcut"``.
        device: where to put it.
        folder: where weights and card are; the package's own if left out.

    Returns:
        A network that takes float images ``(B, 3, 32, 32)`` in ``[0, 1]`` and returns logits.

    Raises:
        PathwayError: if there is no such network, or its weights are not those of the model card.

    Example:
        >>> net = load_model("planted-cnn")
        >>> net.training, any(p.requires_grad for p in net.parameters())
        (False, False)
    """
    state = verified_weights(name, model_card(name, folder=folder), folder)
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, only to be replaced
        model = ARCHITECTURES[name]()
    model.load_state_dict(state)  # float16 on disk; copied into the float32 parameters
    return model.eval().requires_grad_(False).to(device)


def verified_weights(name: str, card: dict[str, Any], folder: Path = WEIGHTS) -> dict[str, Tensor]:
    """Read stored weights, if they are those that the card describes.

    Raises:
        PathwayError: if their SHA-256 is another.

    Example:
        >>> len(verified_weights("planted-cnn", model_card("planted-cnn")))
        10
    """
    stored = (folder / f"{name}.safetensors").read_bytes()
    digest = hashlib.sha256(stored).hexdigest()
    if digest != card["sha256"]:
        raise PathwayError(
            f"the weights of {name!r} have SHA-256 {digest}, the model card says {card['sha256']}; "
            "reinstall pathwaylib, or train it again: see the card's command"
        )
    return load(stored)


def store_model(name: str, model: nn.Module, card: dict[str, Any], folder: Path = WEIGHTS) -> None:
    """Write a trained network's weights in float16 and its model card, each atomically.

    Args:
        name: of the network, a key of ``ARCHITECTURES``.
        model: the trained network.
        card: what to record besides the SHA-256 and the number of parameters, which are added here.
        folder: where to write.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> store_model("planted-cnn", ARCHITECTURES["planted-cnn"](), {"seed": 0}, folder)
        >>> sorted(path.name for path in folder.iterdir())
        ['planted-cnn.json', 'planted-cnn.safetensors']
    """
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for key, value in model.state_dict().items()
    }
    with atomic_write(folder / f"{name}.safetensors") as temporary:
        save_file(state, temporary)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = json.dumps({"name": name, **card, "parameters": parameters, "dtype": "float16", "sha256": digest}, indent=2)
    with atomic_write(folder / f"{name}.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
