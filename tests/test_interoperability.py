"""Our explanations inside Captum's and Quantus' own metrics, against what these metrics must then say."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import quantus
import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import RandomNetwork, networks, small_network, unchanged
from torch import Tensor, nn

from pathwaylib import NeuronMCT, Pathway, PathwayError, PathwayGradient, linear_region, masked
from pathwaylib.evaluation import sensitivity_n
from pathwaylib.explainers import explain, explainers, pathway_gradient
from pathwaylib.interoperability import quantus_explain


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Leave the global generator alone, from which Captum and Quantus draw, and silence their notices."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_length(shape: tuple[int, ...], length: Tensor, seed: int) -> Tensor:
    """Random directions, each of its own length."""
    step = torch.randn(shape, dtype=torch.float64, generator=drawn(seed))
    return step * (length / step.flatten(1).norm(dim=1)).view(-1, *[1] * (len(shape) - 1))


# --- Captum ----------------------------------------------------------------------------------------------------------


def fixed(pathway: Pathway) -> Any:
    """A selector that always answers the same pathways, repeated where Captum repeats the images."""

    def select(model: nn.Module, x: Tensor, target: object = None) -> Pathway:
        copies = len(x) // len(pathway)
        return Pathway(tuple(mask.repeat_interleave(copies, 0) for mask in pathway.masks), pathway.sites)

    return select


@settings(max_examples=10)
@given(networks(forms=["plain", "residual"], kinds=["relu"]), st.integers(0, 99))
def test_the_pathway_gradient_explains_the_pathway_network_inside_its_radius(network: RandomNetwork, seed: int) -> None:
    """Infidelity is the mean square of <perturbation, map> minus the drop: 0 where the network is linear."""
    x = network.inputs(2, seed)
    pathway = NeuronMCT(0.6)(network, x, 1)
    radius = linear_region(network, x, pathway, 1).radius.clamp(max=1.0)
    attribution = PathwayGradient(network, fixed(pathway)).attribute(x, 1)

    def perturb(images: Tensor) -> tuple[Tensor, Tensor]:
        step = of_length(images.shape, 0.99 * radius.repeat_interleave(len(images) // 2), seed)
        return step, images - step

    def inside(images: Tensor) -> Tensor:
        with masked(fixed(pathway)(network, images)):
            return network(images)

    found = infidelity(inside, perturb, x, attribution, target=1, n_perturb_samples=4)
    # What the same steps say about a map of zeros is the square of the drop itself.
    drop = infidelity(inside, perturb, x, torch.zeros_like(attribution), target=1, n_perturb_samples=4)
    assert (found <= 1e-18 * (1 + drop / 1e-12)).all(), (found, drop)


@settings(max_examples=10)
@given(networks(forms=["plain", "residual"], kinds=["relu"]), st.integers(0, 99))
def test_a_fixed_pathways_map_does_not_move_inside_its_radius(network: RandomNetwork, seed: int) -> None:
    x = network.inputs(2, seed)
    pathway = NeuronMCT(0.6)(network, x, 1)
    radius = linear_region(network, x, pathway, 1).radius.clamp(max=1.0)

    def perturb(images: Tensor) -> Tensor:
        return images + of_length(images.shape, 0.99 * radius.repeat_interleave(len(images) // 2), seed)

    explainer = PathwayGradient(network, fixed(pathway))
    found = sensitivity_max(explainer.attribute, x, perturb, n_perturb_samples=3, target=1)
    empty = explainer.attribute(x, 1).flatten(1).norm(dim=1) == 0  # Captum divides by the norm
    assert (found[~empty] < 1e-9).all()


def test_it_moves_outside() -> None:
    network = small_network()
    x = network.inputs(4)
    explainer = PathwayGradient(network, fixed(NeuronMCT(0.6)(network, x, 1)))
    far = sensitivity_max(
        explainer.attribute, x, lambda images: images + of_length(images.shape, torch.tensor(3.0), 0), target=1
    )
    assert float(far.max()) > 0.01


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("name", ["gradient", "pathway gradient"])
def test_noise_tunnel_is_the_statistic_of_the_noisy_copies(kind: str, name: str) -> None:
    network = small_network()
    x = network.inputs(2)
    seen: list[Tensor] = []

    def selector(model: nn.Module, images: Tensor, target: object = None) -> Pathway:
        seen.append(images.detach().clone())
        return NeuronMCT(0.0 if name == "gradient" else 0.7)(model, images, target)

    found = NoiseTunnel(PathwayGradient(network, selector)).attribute(
        x, nt_type=kind, nt_samples=6, nt_samples_batch_size=2, stdevs=0.2, target=torch.tensor([1, 2])
    )
    # Captum runs two copies of each image at a time, those of one image after another.
    copies = torch.cat([part.view(2, 2, 3, 7, 7) for part in seen], 1)
    noise = copies - x[:, None]
    assert 0.15 < float(noise.std()) < 0.25
    one = pathway_gradient(NeuronMCT(0.0 if name == "gradient" else 0.7))
    maps = torch.stack([one(network, copies[:, copy_], torch.tensor([1, 2])) for copy_ in range(6)], 1)
    expected = {
        "smoothgrad": maps.mean(1),
        "smoothgrad_sq": maps.square().mean(1),
        "vargrad": maps.square().mean(1) - maps.mean(1).square(),
    }[kind]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


# --- Quantus ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> RandomNetwork:
    return small_network().float()


@pytest.fixture
def batch(network: RandomNetwork) -> tuple[np.ndarray, np.ndarray]:
    x = torch.rand(4, 3, 7, 7, generator=drawn())
    return x.numpy(), network(x).argmax(1).numpy()


def test_quantus_explain_is_explain(network: RandomNetwork, batch: tuple[np.ndarray, np.ndarray]) -> None:
    images, targets = batch
    before = images.copy()
    x = torch.from_numpy(images)
    with unchanged(network):
        found = quantus_explain(network, images, targets)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert np.array_equal(images, before)
    expected = PathwayGradient(network).attribute(x, torch.from_numpy(targets))
    assert np.array_equal(found, expected.numpy())
    for name, explainer in explainers(samples=2, n_steps=4).items():
        found = quantus_explain(network, images, targets, explainer=explainer, batch_size=4, device="cpu")
        wanted = explain(explainer, network, x, torch.from_numpy(targets), batch_size=4)
        assert np.array_equal(found, wanted.numpy()), name
    # Of another type than the network, as lists, as tensors.
    for variant in (images.astype(np.float64), x, images.tolist()):
        np.testing.assert_allclose(quantus_explain(network, variant, targets.tolist()), expected, rtol=1e-5, atol=1e-7)


def test_quantus_explain_of_reversed_arrays(network: RandomNetwork, batch: tuple[np.ndarray, np.ndarray]) -> None:
    images, targets = batch
    found = quantus_explain(network, images[::-1], targets[::-1])
    assert np.array_equal(found, quantus_explain(network, images[::-1].copy(), targets[::-1].copy()))


def test_quantus_explain_of_a_bfloat16_network_is_in_single(
    network: RandomNetwork, batch: tuple[np.ndarray, np.ndarray]
) -> None:
    images, targets = batch
    found = quantus_explain(network.bfloat16(), images, targets)
    expected = PathwayGradient(network).attribute(torch.from_numpy(images).bfloat16(), torch.from_numpy(targets))
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.float().numpy())


def test_quantus_explain_keeps_the_networks_mode_and_place(
    network: RandomNetwork, batch: tuple[np.ndarray, np.ndarray]
) -> None:
    with pytest.raises(PathwayError, match="training mode"):
        quantus_explain(network.train(), *batch)
    assert network.training  # it is refused, not switched
    with pytest.raises(TypeError, match="sparsity"):
        quantus_explain(network.eval(), *batch, sparsity=0.9)  # a misspelt option is not swallowed
    with pytest.raises(PathwayError, match="classes 0 to 2"):
        quantus_explain(network, batch[0], np.array([0, 1, 2, 3]))


def test_pixel_flipping_of_a_linear_network(batch: tuple[np.ndarray, np.ndarray]) -> None:
    """Quantus removes value after value; the logit falls by each value's contribution, in the map's own order."""
    images, _ = batch
    net = nn.Sequential(nn.Flatten(), nn.Linear(147, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.abs_()  # every neuron stays active: the network is linear on images
        net[3].weight.copy_(torch.eye(3))
    targets = np.array([0, 1, 2, 0])
    metric = quantus.PixelFlipping(
        features_in_step=7, perturb_baseline=0.0, normalise=False, disable_warnings=True, display_progressbar=False
    )
    found = metric(
        net,
        images,
        targets,
        explain_func=quantus_explain,
        explain_func_kwargs={"explainer": explainers()["input x gradient"]},
        softmax=False,
        device="cpu",
    )
    contribution = images.reshape(4, -1) * net[1].weight.detach().numpy()[targets]
    ordered = -np.sort(-contribution, 1)
    expected = contribution.sum(1, keepdims=True) - ordered.cumsum(1)[:, 6::7]
    np.testing.assert_allclose(np.array(found), expected, atol=1e-4)


def test_mprt_explains_each_randomised_network_anew(
    network: RandomNetwork, batch: tuple[np.ndarray, np.ndarray]
) -> None:
    images, targets = batch
    own = quantus_explain(network, images, targets)
    metric = quantus.MPRT(
        similarity_func=quantus.similarity_func.correlation_pearson,
        normalise=False,
        abs=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    with unchanged(network):
        state = torch.get_rng_state()
        found = metric(network, images, targets, a_batch=own, explain_func=quantus_explain, device="cpu")
        torch.set_rng_state(state)  # Quantus seeds the global generator
    assert found.pop("original") == pytest.approx([1.0] * 4, abs=1e-6)
    # The same cascade by hand: from the last layer down, each re-initialised from the same seed.
    changed = copy.deepcopy(network)
    layers = [(name, part) for name, part in changed.named_modules() if hasattr(part, "reset_parameters")]
    assert list(found) == [name for name, _ in reversed(layers)]
    for name, part in reversed(layers):
        torch.manual_seed(43)
        part.reset_parameters()
        maps = quantus_explain(changed, images, targets)
        expected = [np.corrcoef(one.ravel(), two.ravel())[0, 1] for one, two in zip(own, maps, strict=True)]
        assert found[name] == pytest.approx(expected, abs=1e-5)
    assert min(found[layers[0][0]]) < 0.9


def test_quantus_sensitivity_n_is_no_oracle_and_ours_is_1(batch: tuple[np.ndarray, np.ndarray]) -> None:
    """A linear network with exact contributions: Quantus correlates over growing n of one order, and does not get 1."""
    images, _ = batch
    net = nn.Sequential(nn.Flatten(), nn.Linear(147, 3)).eval()
    targets = np.array([0, 1, 2, 0])
    contribution = images * net[1].weight.detach().numpy()[targets].reshape(images.shape)
    theirs = quantus.SensitivityN(
        features_in_step=7,
        n_max_percentage=0.8,
        similarity_func=quantus.similarity_func.correlation_pearson,
        perturb_func_kwargs={},
        perturb_baseline=0.0,
        normalise=False,
        abs=False,
        disable_warnings=True,
        display_progressbar=False,
        return_aggregate=False,
    )(net, images, targets, a_batch=contribution, device="cpu", softmax=False)
    x, maps = torch.from_numpy(images), torch.from_numpy(contribution)
    ours = sensitivity_n(net, x, maps, torch.from_numpy(targets), fill=torch.zeros(1), subsets=30).correlation
    assert float(ours.min()) > 0.9999  # single precision
    assert float(np.mean(theirs)) < 0.99
