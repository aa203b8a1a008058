"""The shipped networks are the trained ones, and as good as their cards say."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from networks import unchanged

from pathwaylib import NeuronMCT, PathwayError, cifar10, load_model, model_card, observe, planted, taylor, zoo
from pathwaylib.architectures import ARCHITECTURES, Normalise, resnet
from pathwaylib.data import ImageSet
from pathwaylib.training import accuracy

SITES = {"cifar10-vgg": 8, "cifar10-resnet20": 19, "cifar10-resnet8": 7, "planted-cnn": 4, "planted-shortcut": 4}
LEAST_ACCURACY = {
    "cifar10-vgg": 0.925,
    "cifar10-resnet20": 0.91,
    "cifar10-resnet8": 0.85,
    "planted-cnn": 0.98,
    "planted-shortcut": 0.95,
}
# Images never drawn before, of the kind that each network for planted images was tested on.
PLANTED = {"planted-cnn": {}, "planted-shortcut": {"shortcut": 0.98}}


def test_every_architecture_is_expected() -> None:
    assert SITES.keys() == ARCHITECTURES.keys() == LEAST_ACCURACY.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loaded_network(name: str) -> None:
    state = torch.get_rng_state()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model, again = load_model(name), load_model(name)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    card = model_card(name)
    assert card["name"] == name
    assert card["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    x, _ = planted(2)[:]
    assert torch.equal(model(x), again(x))
    seen = observe(model, x)
    assert len(seen.sites) == SITES[name]
    with unchanged(model, x):
        pathway = NeuronMCT(0.9)(model, x)
    scoring = sum((score != 0).flatten(1).sum(1) for score in taylor(model, x).scores)
    assert torch.equal(pathway.sizes, torch.as_tensor(scoring).clamp(max=round(0.1 * pathway.neurons)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_accuracy_is_that_of_the_card(name: str) -> None:
    card = model_card(name)
    stated = card["test_accuracy"]
    assert stated >= LEAST_ACCURACY[name]
    if name in PLANTED:
        subset = planted(1000, seed=987, **PLANTED[name])
    else:
        test = cifar10("test")
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(5))[:1000]
        subset = ImageSet(test.images[chosen], test.labels[chosen], test.classes)
    found = accuracy(load_model(name), subset)
    # Four standard errors of 1,000 images, and what the last of them is worth.
    assert abs(found - stated) <= 4 * (stated * (1 - stated) / 1000) ** 0.5 + 0.001


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_card_names_what_it_takes_to_train_again(name: str) -> None:
    card = model_card(name)
    assert not card.get("provisional")
    assert {"data", "recipes", "command", "test_accuracy", "log", "versions", "sha256", "dtype"} <= card.keys()
    weights = zoo.WEIGHTS / f"{name}.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card["sha256"]
    assert weights.stat().st_size < 5_000_000


def test_readme_states_the_accuracy_of_the_card() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name in ARCHITECTURES:
        card = model_card(name)
        row = f"| `{name}` | {card['parameters']:,} | {SITES[name]} | {card['test_accuracy']:.2%} |"
        assert row in readme, f"README.md lacks: {row}"


@pytest.fixture
def weights_copy(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    for suffix in ("json", "safetensors"):
        shutil.copy(zoo.WEIGHTS / f"planted-cnn.{suffix}", folder)
    return folder


@pytest.mark.parametrize("damage", ["one bit", "truncated", "longer", "empty"])
def test_tampered_weights_are_refused(weights_copy: Path, damage: str) -> None:
    load_model("planted-cnn", folder=weights_copy)
    path = weights_copy / "planted-cnn.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-1] ^= 1
    elif damage == "longer":
        content += b"0"
    else:
        content = content[: len(content) // 2 if damage == "truncated" else 0]
    path.write_bytes(content)
    with pytest.raises(PathwayError, match=r"SHA-256.*reinstall pathwaylib"):
        load_model("planted-cnn", folder=weights_copy)


def test_unknown_name() -> None:
    for call in (load_model, model_card):
        with pytest.raises(PathwayError, match=r"no model 'resnet50'; choose one of cifar10-vgg"):
            call("resnet50")


def test_network_that_is_not_there(tmp_path: Path) -> None:
    for call in (load_model, model_card):
        with pytest.raises(PathwayError, match=r"planted-cnn\.json does not exist.*train_subjects"):
            call("planted-cnn", folder=tmp_path)


def test_stored_network_comes_back(weights_copy: Path) -> None:
    model = ARCHITECTURES["planted-cnn"]()
    zoo.store_model("planted-cnn", model, {"data": "none", "seed": 0}, weights_copy)
    loaded = load_model("planted-cnn", folder=weights_copy)
    for (name, value), stored in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(stored, value.half().float()), name
    assert model_card("planted-cnn", folder=weights_copy)["seed"] == 0
    assert model_card("planted-cnn") != model_card("planted-cnn", folder=weights_copy)
    assert model.training  # and the network stored is left as it was


def test_images_are_normalised_inside() -> None:
    layer = Normalise([0.1, 0.2, 0.3], [0.5, 2.0, 1.0])
    x = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(x[:, 0] - 0.1) / 0.5, (x[:, 1] - 0.2) / 2, x[:, 2] - 0.3], 1)
    torch.testing.assert_close(layer(x), expected)
    assert not list(layer.parameters())
    for name in SITES:
        assert isinstance(ARCHITECTURES[name]()[0], Normalise) == name.startswith("cifar10")


def test_residual_networks() -> None:
    for depth, sites in ((8, 7), (14, 13), (20, 19)):
        network = resnet(depth).eval()
        assert len(observe(network, torch.rand(1, 3, 32, 32)).sites) == sites
        # "layers" counts convolutions on the main path and the last linear layer
        convolutions = [m for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d) and "shortcut" not in n]
        assert len(convolutions) + 1 == depth
    for depth in (2, 9, 0, -4):
        with pytest.raises(ValueError, match=rf"depth is {depth}"):
            resnet(depth)


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    x, _ = planted(4)[:]
    here, there = load_model("planted-cnn")(x), load_model("planted-cnn", device="cuda")(x.cuda())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-2, atol=1e-2)
