"""Trained networks by name: those whose weights ship in the package, and ImageNet networks of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .architectures import ARCHITECTURES
from .errors import PathwayError
from .files import atomic_writes, load_json
from .pretrained import PRETRAINED, load_pretrained, pretrained_card

_Module = TypeVar("_Module", bound=nn.Module)

_AGAIN = "reinstall pathwaylib, or train it again: see the card's command"

WEIGHTS = Path(__file__).parent / "weights"
"""Where the weights that ship with the package are."""


def model_card(name: str, *, folder: Path = WEIGHTS) -> dict[str, Any]:
    """Return what is known of a trained network: recipe, accuracy, SHA-256 of its weights, versions.

    Of an ImageNet network: source, licence, image size, and file and SHA-256 of its weights, whether they are here or
    not.

    Raises:
        PathwayError: if there is no such network, in general or in ``folder``, or its card is damaged.

    Example:
        >>> model_card("planted-cnn")["data"]
        'planted(n=8000, seed=1)'
    """
    if name in PRETRAINED:
        return pretrained_card(name)
    if name not in ARCHITECTURES:
        raise PathwayError(f"there is no model {name!r}; choose one of {', '.join([*ARCHITECTURES, *PRETRAINED])}")
    path = folder / f"{name}.json"
    if not path.exists():
        raise PathwayError(f"{path} does not exist: {name!r} is not trained; see experiments/train_subjects.ipynb")
    return read_card(path)


def read_card(path: Path) -> dict[str, Any]:
    """Read a model card.

    Raises:
        PathwayError: if it is damaged.

    Example:
        >>> read_card(WEIGHTS / "planted-cnn.json")["dtype"]
        'float16'
    """
    return load_json(path, _AGAIN)


def load_model(name: str, *, device: torch.device | str = "cpu", folder: Path = WEIGHTS) -> nn.Module:
    """Load a trained network: verified, in eval mode, its parameters frozen.

    Args:
        name: ``"cifar10-vgg"``, ``"cifar10-resnet20"``, ``"cifar10-resnet8"``, ``"planted-cnn"`` or
            ``"planted-shortcut"``, trained by us; ``"imagenet-efficientnet-lite0"``, whose weights come with the extra
            ``imagenet``; ``"imagenet-vgg16"`` or ``"imagenet-resnet50"``, whose weights torchvision's hub serves.
        device: where to put it.
        folder: where weights and card of our own networks are; the package's own if left out.

    Returns:
        A network that takes float images ``(B, 3, 32, 32)`` in ``[0, 1]``, for ImageNet ``(B, 3, 224, 224)``, and
        returns logits.

    Raises:
        PathwayError: if there is no such network, its weights are not those of the model card, or (ImageNet) are
            nowhere to be had; the message then says what was tried, and how to place the file by hand.

    Example:
        >>> net = load_model("planted-cnn")
        >>> net.training, any(p.requires_grad for p in net.parameters())
        (False, False)
    """
    if name in PRETRAINED:
        model = load_pretrained(name)
    else:
        state = verified_weights(name, model_card(name, folder=folder), folder)
        model = with_weights(ARCHITECTURES[name], state, folder / f"{name}.safetensors")
    return model.eval().requires_grad_(False).to(device)


def verified_weights(name: str, card: dict[str, Any], folder: Path = WEIGHTS) -> dict[str, Tensor]:
    """Read stored weights, if they are those that the card describes.

    Raises:
        PathwayError: if they are not there, their SHA-256 is another, or they are no safetensors file.

    Example:
        >>> len(verified_weights("planted-cnn", model_card("planted-cnn")))
        10
    """
    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise PathwayError(f"{path} does not exist, only its card does; {_AGAIN}")
    stored = path.read_bytes()
    digest = hashlib.sha256(stored).hexdigest()
    if digest != card.get("sha256"):
        raise PathwayError(
            f"the weights of {name!r} have SHA-256 {digest}, the model card says {card.get('sha256')}; {_AGAIN}"
        )
    try:
        return safetensors.torch.load(stored)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PathwayError(f"{path} is no safetensors file ({error}); {_AGAIN}") from error


def with_weights(build: Callable[[], _Module], state: Mapping[str, Tensor], path: Path) -> _Module:
    """Build a network and give it stored weights.

    Args:
        build: makes the network.
        state: of all its weights, in any precision.
        path: where they come from.

    Raises:
        PathwayError: if the weights are of another network; then none is built, however large it would be.

    Example:
        >>> with_weights(lambda: nn.Linear(2, 1), nn.Linear(2, 1).half().state_dict(), Path("some")).weight.dtype
        torch.float32
    """
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, only to be replaced
        try:
            with torch.device("meta"):  # sizes only
                wanted = {key: value.shape for key, value in build().state_dict().items()}
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise PathwayError(f"the card of {path} describes no network ({error}); {_AGAIN}") from error
        found = {key: value.shape for key, value in state.items()}
        if found != wanted:
            odd = [key for key in sorted(wanted.keys() | found) if wanted.get(key) != found.get(key)]
            raise PathwayError(f"{path} holds the weights of another network: {', '.join(odd[:3])} differ; {_AGAIN}")
        model = build()
    model.load_state_dict(state)
    return model


def store_model(name: str, model: nn.Module, card: dict[str, Any], folder: Path = WEIGHTS) -> None:
    """Write a trained network's weights in float16 and its model card, atomically.

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
    stored = safetensors.torch.save(state)
    digest = hashlib.sha256(stored).hexdigest()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = json.dumps({"name": name, **card, "parameters": parameters, "dtype": "float16", "sha256": digest}, indent=2)
    with atomic_writes(folder / f"{name}.safetensors", folder / f"{name}.json") as (weights, noted):
        weights.write_bytes(stored)
        noted.write_text(text + "\n", encoding="utf-8")
