"""The pathway gradient against the gradient of the masked network written out, and inside Captum's tools."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from captum.attr import NoiseTunnel, Saliency
from captum.metrics import infidelity, sensitivity_max
from hypothesis import given
from hypothesis import strategies as st
from networks import Block, RandomNetwork, networks, small_network, unchanged
from torch import Tensor, nn
from torch.nn import functional as F

from pathwaylib import ActiveNeurons, NeuronMCT, Pathway, PathwayError, PathwayGradient, RandomSelection, taylor
from pathwaylib.selectors import Chosen


def gradient_written_out(network: RandomNetwork, x: Tensor, pathway: Pathway | None, targets: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    logits = network.reference(x, None if pathway is None else pathway.masks)
    return torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), x)[0]


@given(networks(), st.sampled_from([0.0, 0.5, 0.9]), st.integers(1, 3))
def test_gradient_of_the_masked_network(network: RandomNetwork, sparsity: float, count: int) -> None:
    x = network.inputs(count)
    targets = torch.arange(count) % 3
    selector = NeuronMCT(sparsity)
    pathway = selector(network, x, targets)
    found = PathwayGradient(network, selector).attribute(x, targets)
    torch.testing.assert_close(found, gradient_written_out(network, x, pathway, targets), rtol=1e-10, atol=1e-12)


@given(networks())
def test_active_neurons_give_the_plain_gradient(network: RandomNetwork) -> None:
    # All other neurons are constant 0 and let no gradient through in the full network either.
    x = network.inputs(2)
    targets = torch.tensor([2, 0])
    found = PathwayGradient(network, ActiveNeurons()).attribute(x, targets)
    torch.testing.assert_close(found, gradient_written_out(network, x, None, targets), rtol=1e-12, atol=1e-12)


def test_active_neurons_against_captums_saliency() -> None:
    network = small_network()
    x = network.inputs(3)
    found = PathwayGradient(network, ActiveNeurons()).attribute(x, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum says that it sets requires_grad
        expected = Saliency(network).attribute(x.clone(), target=1, abs=False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(networks())
def test_batch_is_the_loop(network: RandomNetwork) -> None:
    x = network.inputs(3)
    explainer = PathwayGradient(network, ActiveNeurons())
    together = explainer.attribute(x, [0, 1, 2])
    for index in range(3):
        alone = explainer.attribute(x[index : index + 1], index)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-9, atol=1e-10)


def test_no_target_means_what_the_full_network_predicts() -> None:
    # The pathway network may predict another class; it is the full network's answer that is explained.
    network = small_network(seed=1)
    x = network.inputs(16)
    selector = RandomSelection(0.6)
    predicted = network(x).argmax(1)
    pathway = selector(network, x)
    assert (network.reference(x, pathway.masks).argmax(1) != predicted).any()
    expected = gradient_written_out(network, x, pathway, predicted)
    torch.testing.assert_close(PathwayGradient(network, selector).attribute(x), expected, rtol=1e-10, atol=1e-12)

    def anonymous(model: nn.Module, images: Tensor, target: object = None) -> Pathway:
        """A reader's own selector, which does not tell its targets."""
        return Pathway(selector(model, images, target).masks, pathway.sites)

    torch.testing.assert_close(PathwayGradient(network, anonymous).attribute(x), expected, rtol=1e-10, atol=1e-12)


def test_one_pathway_for_all_brings_its_target() -> None:
    network = small_network()
    x = network.inputs(3)
    one = NeuronMCT(0.5)(network, x[:1], 2)
    expected = gradient_written_out(network, x, one, torch.tensor([2, 2, 2]))
    found = PathwayGradient(network, Chosen(one)).attribute(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", [1, [1, 1], torch.tensor([1, 1]), torch.tensor(1)])
def test_targets_and_containers(target: object) -> None:
    network = small_network()
    x = network.inputs(2)
    explainer = PathwayGradient(network, NeuronMCT(0.5))
    expected = gradient_written_out(network, x, NeuronMCT(0.5)(network, x, 1), torch.tensor([1, 1]))
    plain = explainer.attribute(x, target)
    assert isinstance(plain, Tensor)
    torch.testing.assert_close(plain, expected, rtol=1e-10, atol=1e-12)
    wrapped = explainer.attribute((x,), target=target)
    assert isinstance(wrapped, tuple)
    assert len(wrapped) == 1
    assert torch.equal(wrapped[0], plain)
    assert not plain.requires_grad
    assert plain.dtype == torch.float64


def test_default_selector_and_contract() -> None:
    explainer = PathwayGradient(small_network())
    assert explainer.selector == NeuronMCT(sparsity=0.9)
    assert not explainer.has_convergence_delta()
    assert explainer.attribute.__wrapped__  # Captum's NoiseTunnel calls it


@given(networks())
def test_nothing_changes(network: RandomNetwork) -> None:
    x = network.inputs(2)
    for images in (x, x.clone().requires_grad_(), x[:1].expand_as(x)):
        with unchanged(network, images):
            PathwayGradient(network, NeuronMCT(0.5)).attribute(images, 0)
    with unchanged(network, x), torch.no_grad():
        found = PathwayGradient(network, NeuronMCT(0.5)).attribute(x, 0)
    assert torch.equal(found, PathwayGradient(network, NeuronMCT(0.5)).attribute(x, 0))


def test_frozen_network_and_network_of_a_graph() -> None:
    network = small_network()
    x = network.inputs(2)
    expected = PathwayGradient(network).attribute(x, 0)
    loss = network(x).sum()
    assert torch.equal(PathwayGradient(network).attribute(x, 0), expected)
    loss.backward()  # a graph made before still works
    assert network.stem.weight.grad is not None
    network.requires_grad_(False)
    assert torch.equal(PathwayGradient(network).attribute(x, 0), expected)


def test_network_that_changes_its_input_in_place() -> None:
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    x = torch.rand(4, 3) - 0.5
    with unchanged(network, x):
        found = PathwayGradient(network, ActiveNeurons()).attribute(x, 0)
    assert (found[x < 0] == 0).all()
    assert (found != 0).any()


def test_failure_in_the_middle_leaks_nothing() -> None:
    class FailsLater(nn.Module):
        runs = 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.layer(x))
            self.runs += 1
            if self.runs > 1:  # while masked
                raise RuntimeError("out of memory")
            return F.relu(h)

    network = FailsLater().eval()
    x = torch.rand(2, 3)
    with unchanged(network, x), pytest.raises(RuntimeError, match=r"out of memory"):
        PathwayGradient(network, NeuronMCT(0.9)).attribute(x, 0)
    network.runs = -5
    assert torch.equal(network(x), network.layer(x).clamp(min=0))


@pytest.mark.parametrize(
    ("inputs", "target", "message"),
    [
        (torch.rand(2, 3, 7, 7).double(), 3, r"target.*classes 0 to 2"),
        (torch.rand(2, 3, 7, 7).double(), [0, 1, 2], r"\(3,\) for 2 inputs"),
        ((torch.rand(2, 3).double(), torch.rand(2, 3).double()), 0, "2 input tensors"),
        ((), 0, "0 input tensors"),
        (torch.rand(0, 3, 7, 7).double(), 0, "at least one"),
        (torch.full((1, 3, 7, 7), torch.nan).double(), 0, "NaN"),
        (torch.ones(1, 3, 7, 7, dtype=torch.uint8), 0, "uint8"),
        (torch.rand(2, 3, 7, 7), 0, "float32"),
        ("photo.png", 0, "str"),
    ],
)
def test_bad_input(inputs: object, target: object, message: str) -> None:
    network = small_network()
    with unchanged(network), pytest.raises(PathwayError, match=message):
        PathwayGradient(network).attribute(inputs, target)


def test_training_mode_and_foreign_pathways() -> None:
    network, other = small_network(), RandomNetwork([Block("plain", "nn.ReLU")], images=True, pooled_head=True)
    x = network.inputs(2)
    foreign = ActiveNeurons()(other, x)
    with unchanged(network, x), pytest.raises(PathwayError, match=r"site"):
        PathwayGradient(network, lambda model, images, target=None: foreign).attribute(x, 0)
    with pytest.raises(PathwayError, match=r"training mode"):
        PathwayGradient(network.train()).attribute(x, 0)


def test_memory_format_does_not_matter() -> None:
    network = small_network().float()
    x = torch.rand(4, 3, 7, 7)
    rows = NeuronMCT(0.7)(network, x, 0).flatten()
    expected = PathwayGradient(network, NeuronMCT(0.7)).attribute(x, 0)
    shuffled = copy.deepcopy(network).to(memory_format=torch.channels_last)
    images = x.to(memory_format=torch.channels_last)
    # Rounding may swap neurons of nearly equal score.
    assert (NeuronMCT(0.7)(shuffled, images, 0).flatten() != rows).double().mean() < 0.01
    found = PathwayGradient(shuffled, NeuronMCT(0.7)).attribute(images, 0)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # Not contiguous in any format.
    strided = torch.rand(4, 3, 7, 14)[..., ::2].copy_(x)
    torch.testing.assert_close(
        PathwayGradient(network, NeuronMCT(0.7)).attribute(strided, 0), expected, rtol=1e-3, atol=1e-4
    )


# --- Captum ---


def test_noise_tunnel_explains_every_variant_by_its_own_pathway() -> None:
    network = small_network()
    x = network.inputs(2)
    explainer = PathwayGradient(network, NeuronMCT(0.7))
    seen: list[Tensor] = []

    def selector(model: nn.Module, images: Tensor, target: object = None) -> Pathway:
        seen.append(images.detach().clone())
        return NeuronMCT(0.7)(model, images, target)

    with torch.random.fork_rng(devices=[]):  # Captum draws from the global generator
        torch.manual_seed(0)
        found = NoiseTunnel(PathwayGradient(network, selector)).attribute(
            x, nt_type="smoothgrad", nt_samples=5, stdevs=0.1, target=torch.tensor([1, 2])
        )
    variants = torch.cat(seen)
    assert variants.shape == (10, 3, 7, 7)
    targets = torch.tensor([1, 2]).repeat_interleave(5)
    expected = explainer.attribute(variants, targets).view(2, 5, 3, 7, 7).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert found.shape == x.shape
    still = NoiseTunnel(explainer).attribute(x, nt_samples=2, stdevs=0.0, target=1)
    torch.testing.assert_close(still, explainer.attribute(x, 1), rtol=1e-9, atol=1e-10)


def test_infidelity_of_a_linear_region_is_zero() -> None:
    # Perturbations inside one linear region change the response by exactly <gradient, perturbation>.
    network = small_network()
    x = network.inputs(2)
    attribution = PathwayGradient(network, ActiveNeurons()).attribute(x, 1)

    def perturb(images: Tensor) -> tuple[Tensor, Tensor]:
        noise = 1e-9 * torch.randn(images.shape, dtype=images.dtype, generator=torch.Generator().manual_seed(0))
        return noise, images - noise

    found = infidelity(network, perturb, x, attribution, target=1, n_perturb_samples=4)
    wrong = infidelity(network, perturb, x, 2 * attribution, target=1, n_perturb_samples=4)
    assert found.shape == (2,)
    assert (wrong > 0).all()
    assert (found < 1e-9 * wrong).all()


def test_sensitivity_max() -> None:
    network = small_network()
    x = network.inputs(2)
    explainer = PathwayGradient(network, NeuronMCT(0.7))
    with torch.random.fork_rng(devices=[]):
        found = sensitivity_max(explainer.attribute, x, perturb_radius=0.05, n_perturb_samples=3, target=1)
        still = sensitivity_max(explainer.attribute, x, perturb_radius=0.0, n_perturb_samples=3, target=1)
    assert found.shape == (2,)
    assert found.isfinite().all()
    assert float(still.max()) < 1e-10


def test_works_on_after_a_bad_call() -> None:
    network = small_network()
    x = network.inputs(2)
    explainer = PathwayGradient(network)
    before = explainer.attribute(x, 0)
    scores = taylor(network, x, 0).scores
    with pytest.raises(PathwayError):
        explainer.attribute(x, 17)
    assert torch.equal(explainer.attribute(x, 0), before)
    assert all(torch.equal(a, b) for a, b in zip(taylor(network, x, 0).scores, scores, strict=True))


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    network = small_network()
    x = network.inputs(2)
    here = PathwayGradient(network).attribute(x, 0)
    there = PathwayGradient(network.cuda()).attribute(x.cuda(), 0)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-8, atol=1e-8)
