"""Decoding pathways and neurons against networks whose best image is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import small_network, unchanged
from torch import Tensor, nn

from pathwaylib import (
    Augment,
    Contributions,
    NeuronMCT,
    Pathway,
    PathwayError,
    decode_pathway,
    masked,
    observe,
    top_neuron,
    visualise_neuron,
)
from pathwaylib.neurons import response

SHAPE = (3, 7, 7)
STILL = Augment(0, 0, 0)


def linear_network(weights: Tensor) -> nn.Sequential:
    """Return a network of len(weights) hidden neurons w · x + 100 (never asleep on images); logit k is neuron k."""
    hidden, pixels = weights.shape
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, hidden, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(weights)
        net[1].bias.fill_(100)
        net[3].weight.copy_(torch.eye(hidden))
    return net.double().eval()


@pytest.fixture
def weights() -> Tensor:
    """Weights of two neurons, none near 0."""
    signs = torch.randint(2, (2, 2 * 4 * 5), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs * torch.linspace(0.5, 1, 40, dtype=torch.float64)


@pytest.mark.parametrize("fourier", [False, True])
def test_the_best_image_of_a_linear_network_is_the_sign_of_its_weights(weights: Tensor, fourier: bool) -> None:
    net = linear_network(weights)
    everything = Pathway((torch.ones(2, 2, dtype=torch.bool),), ("relu_0",))
    settings = {"steps": 300, "learning_rate": 0.5, "fourier": fourier, "augment": STILL}
    expected = (weights > 0).double().view(2, 2, 4, 5)
    found = decode_pathway(net, (2, 4, 5), everything, target=[0, 1], total_variation=0, **settings)
    assert torch.allclose(found.images, expected, atol=0.02)
    assert torch.allclose(found.responses, weights.clamp(min=0).sum(1) + 100, atol=0.5)
    neurons = visualise_neuron(net, (2, 4, 5), "relu_0", [0, 1], **settings)
    assert torch.allclose(neurons.images, expected, atol=0.02)


def test_each_image_is_decoded_inside_its_own_pathway(weights: Tensor) -> None:
    net = linear_network(weights)
    with torch.no_grad():
        net[3].weight.fill_(1)  # every logit is the sum of both neurons; only the mask tells which of them counts
    own = Pathway((torch.eye(2, dtype=torch.bool),), ("relu_0",))
    found = decode_pathway(
        net, (2, 4, 5), own, 0, steps=300, learning_rate=0.5, fourier=False, augment=STILL, total_variation=0
    )
    assert torch.allclose(found.images, (weights > 0).double().view(2, 2, 4, 5), atol=0.02)


def test_responses_are_those_of_the_images_in_the_pathway_network() -> None:
    net = small_network()
    pathway = NeuronMCT(0.5)(net, net.inputs(3))
    found = decode_pathway(net, SHAPE, pathway, steps=30)
    with masked(pathway):
        expected = response(net(found.images), pathway.targets)
    assert torch.allclose(found.responses, expected)
    assert found.images.shape == (3, *SHAPE)
    assert found.images.dtype == torch.float64
    assert 0 <= found.images.min() < 0.4 < 0.6 < found.images.max() <= 1
    assert found.history.shape == (30, 3)
    assert (found.responses > found.history[0] + 0.1).all()
    assert not any(value.requires_grad for value in (found.images, found.responses, found.history))


def test_neuron_and_channel_are_the_pre_activations_of_the_network() -> None:
    net = small_network()
    chosen = [0, 60, 195]  # of 4 × 7 × 7: channels 0, 1 and 3
    for channel in (False, True):
        found = visualise_neuron(net, SHAPE, "relu_1", chosen, channel=channel, steps=30, augment=STILL)
        z = observe(net, found.images).pre[1]
        expected = [
            z[image, index // 49].mean() if channel else z[image].flatten()[index] for image, index in enumerate(chosen)
        ]
        assert torch.allclose(found.responses, torch.stack(expected))
        assert (found.responses > found.history[0] + 0.1).all()


@settings(max_examples=15, deadline=None)
@given(fourier=st.booleans(), still=st.booleans(), seed=st.integers(0, 100))
def test_images_do_not_depend_on_their_batch(fourier: bool, still: bool, seed: int) -> None:
    net = small_network(seed)
    pathway = NeuronMCT(0.5)(net, net.inputs(3, seed))

    def decode(part: Pathway) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        augment = STILL if still else Augment(2, 20, 0.2)
        return decode_pathway(net, SHAPE, part, steps=4, fourier=fourier, augment=augment, generator=generator).images

    together, alone = decode(pathway), torch.cat([decode(pathway[index]) for index in range(3)])
    assert torch.allclose(together, alone, atol=1e-9)


def test_the_generator_decides_and_is_the_only_thing_drawn_from() -> None:
    net = small_network()
    pathway = NeuronMCT(0.5)(net, net.inputs(1))

    def decode(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return decode_pathway(net, SHAPE, pathway, steps=5, generator=generator).images

    assert torch.equal(decode(3), decode(3))
    assert torch.equal(decode(None), decode(0))
    assert not torch.equal(decode(3), decode(4))


@pytest.mark.parametrize("spelling", ["nn.ReLU", "nn.ReLU(inplace=True), discarded"])
@pytest.mark.parametrize("trainable", [True, False])
def test_nothing_is_left_behind(spelling: str, trainable: bool) -> None:
    net = small_network(spelling=spelling).requires_grad_(trainable)
    x = net.inputs(2)
    pathway = NeuronMCT(0.5)(net, x)
    next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
    with unchanged(net, x, *pathway.masks), torch.no_grad():
        decode_pathway(net, SHAPE, pathway, steps=2)
        visualise_neuron(net, SHAPE, "relu_2", [0, 1], steps=2)
        with pytest.raises(PathwayError):
            decode_pathway(net, SHAPE, pathway, target=99, steps=2)


def test_variation_smooths() -> None:
    net = small_network()
    pathway = NeuronMCT(0.5)(net, net.inputs(2))

    def roughness(weight: float) -> Tensor:
        images = decode_pathway(net, SHAPE, pathway, steps=60, augment=STILL, total_variation=weight).images
        return images.diff(dim=-1).abs().mean((1, 2, 3)) + images.diff(dim=-2).abs().mean((1, 2, 3))

    rough, smooth, flat = roughness(0), roughness(5), roughness(10_000)
    assert (rough > smooth).all()
    assert (smooth > 2 * flat).all()


def test_low_frequencies_come_first() -> None:
    # A step of one size at every frequency: where white noise is asked for, coarse shapes are found before fine ones.
    noise = torch.randn(1, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1

    def spectrum(fourier: bool) -> Tensor:
        found = visualise_neuron(
            linear_network(noise), (1, 16, 16), "relu_0", 0, steps=5, fourier=fourier, augment=STILL
        )
        return torch.fft.rfft2(found.images[0, 0]).abs()

    def fine_share(fourier: bool) -> float:
        waves = spectrum(fourier)
        return float(waves[6:11, 6:].mean() / waves[1:3, 1:3].mean())

    assert fine_share(True) < 0.5 * fine_share(False)


def test_brightness_comes_before_colour() -> None:
    noise = torch.randn(1, 3 * 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1

    def agreement(fourier: bool) -> float:
        found = visualise_neuron(linear_network(noise), (3, 8, 8), "relu_0", 0, steps=5, fourier=fourier, augment=STILL)
        return float(torch.corrcoef(found.images[0].flatten(1)).min())

    assert agreement(True) > 0.6 > 0.3 > agreement(False)


def test_an_image_that_was_moved_answers_when_it_moves() -> None:
    # Fine stripes inside a coarse square: only the square survives movement.
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(16, 16)
    square = torch.full((16, 16), -1.0)
    square[4:12, 4:12] = 1
    net = linear_network((stripes + 0.5 * square).double().view(1, 256) / 10)
    moves = Augment(2, 30, 0.2)

    def answer(augment: Augment) -> Tensor:
        found = visualise_neuron(net, (1, 16, 16), "relu_0", 0, steps=100, learning_rate=0.2, augment=augment)
        generator = torch.Generator().manual_seed(1)
        return torch.stack([observe(net, moves(found.images, generator)).pre[0] for _ in range(100)]).mean()

    still, moved = answer(STILL), answer(moves)
    assert moved > still + 1


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 5, 6), (3, 6, 4), (3, 1, 1), (2, 1, 5)])
def test_images_have_the_shape_asked_for(shape: tuple[int, int, int]) -> None:
    pixels = math.prod(shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    found = visualise_neuron(net, shape, "relu_0", [0, 1, 1], steps=2, total_variation=1)
    assert found.images.shape == (3, *shape)
    assert found.images.dtype == torch.float32
    assert found.images.isfinite().all()


@pytest.mark.parametrize("fourier", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_about_the_same_image(weights: Tensor, fourier: bool, dtype: torch.dtype) -> None:
    net = linear_network(weights)
    everything = Pathway((torch.ones(1, 2, dtype=torch.bool),), ("relu_0",), torch.tensor([1]))
    exact = decode_pathway(net, (2, 4, 5), everything, steps=5, fourier=fourier, augment=STILL).images
    found = decode_pathway(net.to(dtype), (2, 4, 5), everything, steps=5, fourier=fourier, augment=STILL).images
    assert found.dtype == dtype
    assert float((found - exact).abs().max()) < 0.02


def test_still_augment_gives_the_image_itself_and_draws_nothing() -> None:
    images, generator = torch.rand(2, 3, 5, 6), torch.Generator().manual_seed(0)
    assert STILL(images, generator) is images
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def draws(seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(4, generator=generator, dtype=torch.float64) - 1).tolist()


def test_augment_moves_turns_and_scales_by_what_was_drawn() -> None:
    # The coordinates themselves are the image: where the movement took each pixel from can be read off.
    height, width = 21, 31
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    for seed in range(5):
        turn, growth, right, down = draws(seed)
        moved = Augment(jitter=2, rotation=15, scale=0.1)(
            torch.stack([x, y])[None], torch.Generator().manual_seed(seed)
        )
        angle, factor = math.radians(15 * turn), 1 + 0.1 * growth
        dx, dy = x - (width - 1) / 2, y - (height - 1) / 2
        source_x = factor * (math.cos(angle) * dx - math.sin(angle) * dy) + (width - 1) / 2 + 2 * right
        source_y = factor * (math.sin(angle) * dx + math.cos(angle) * dy) + (height - 1) / 2 + 2 * down
        inside = (source_x > 0) & (source_x < width - 1) & (source_y > 0) & (source_y < height - 1)
        assert inside.double().mean() > 0.6
        assert torch.allclose(moved[0, 0][inside], source_x[inside])
        assert torch.allclose(moved[0, 1][inside], source_y[inside])


def test_augment_moves_all_images_alike_and_keeps_their_range() -> None:
    images = torch.rand(1, 3, 8, 8).expand(4, 3, 8, 8)
    moved = Augment(3, 30, 0.3)(images, torch.Generator().manual_seed(1))
    assert torch.equal(moved, moved[:1].expand_as(moved))
    assert not torch.equal(moved, images)
    assert 0 <= moved.min() <= moved.max() <= 1


def test_top_neuron_is_the_largest_absolute_score() -> None:
    scores = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    contributions = Contributions((torch.zeros(20, 2), scores), ("relu_0", "relu_1"))
    assert torch.equal(top_neuron(contributions, "relu_1"), scores.flatten(1).abs().argmax(1))
    tied = Contributions((torch.tensor([[0.0, -2.0, 2.0, 1.0]]),), ("relu_0",))
    assert top_neuron(tied, "relu_0").item() in (1, 2)


def test_targets_of_the_pathway_are_used_and_can_be_replaced(weights: Tensor) -> None:
    net = linear_network(weights)
    everything = Pathway((torch.ones(1, 2, dtype=torch.bool),), ("relu_0",), torch.tensor([1]))
    images = [
        decode_pathway(net, (2, 4, 5), pathway, target, steps=3).images
        for pathway, target in ((everything, None), (everything, 1), (everything, 0))
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("total_variation", [0.0, 3.0])
def test_networks_that_cannot_be_climbed_are_answered(weights: Tensor, total_variation: float) -> None:
    class Changed(nn.Sequential):
        def __init__(self, change: Callable[[Tensor], object]) -> None:
            super().__init__(*linear_network(weights))
            self.change = change

        def forward(self, x: Tensor) -> Any:
            return self.change(super().forward(x))

    everything = Pathway((torch.ones(1, 2, dtype=torch.bool),), ("relu_0",), torch.tensor([1]))
    answers: list[tuple[Callable[[Tensor], object], str]] = [
        (lambda logits: (logits, logits), "returned tuple"),
        (lambda logits: logits * torch.nan, "not finite"),
        (lambda logits: logits.detach(), "passes no gradient"),
    ]
    for change, message in answers:
        with pytest.raises(PathwayError, match=message):
            decode_pathway(Changed(change).eval(), (2, 4, 5), everything, total_variation=total_variation)


def test_a_network_under_no_grad_is_answered(weights: Tensor) -> None:
    class Gradless(nn.Sequential):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    net = Gradless(*linear_network(weights)).eval()
    everything = Pathway((torch.ones(1, 2, dtype=torch.bool),), ("relu_0",), torch.tensor([1]))
    with pytest.raises(PathwayError, match=r"passes no gradient.*torch\.no_grad"):
        decode_pathway(net, (2, 4, 5), everything)
    with pytest.raises(PathwayError, match=r"passes no gradient.*torch\.no_grad"):
        visualise_neuron(net, (2, 4, 5), "relu_0", 0, total_variation=1.0)


def test_wrong_arguments_are_answered() -> None:
    net = small_network()
    pathway = NeuronMCT(0.5)(net, net.inputs(2))
    for shape in ((3, 7), (3, 0, 7), (1, 3, 7, 7)):
        with pytest.raises(PathwayError, match="shape is"):
            decode_pathway(net, shape, pathway)
    for wrong in (
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"total_variation": -1.0},
        {"total_variation": math.inf},
    ):
        with pytest.raises(PathwayError, match=str(next(iter(wrong)))):
            decode_pathway(net, SHAPE, pathway, **wrong)
    with pytest.raises(PathwayError, match="give target="):
        decode_pathway(net, SHAPE, replace(pathway, targets=None))
    with pytest.raises(PathwayError, match="for 2 inputs"):
        decode_pathway(net, SHAPE, pathway, target=[0, 1, 2])
    with pytest.raises(PathwayError, match="of shape"):
        decode_pathway(net, SHAPE, Pathway(tuple(mask[:, :, :3] for mask in pathway.masks), pathway.sites), 0)
    with pytest.raises(PathwayError, match="training mode"):
        decode_pathway(small_network().train(), SHAPE, pathway)
    with pytest.raises(PathwayError, match="no site 'relu_9'; the network has relu_0, relu_1, relu_2"):
        visualise_neuron(net, SHAPE, "relu_9", 0)
    for neuron in (-1, 196, [0, 10_000]):
        with pytest.raises(PathwayError, match="neurons 0 to 195"):
            visualise_neuron(net, SHAPE, "relu_0", neuron)
    for neuron in (0.5, [], True):
        with pytest.raises(PathwayError, match="as integers"):
            visualise_neuron(net, SHAPE, "relu_0", neuron)
    for sizes in ((-1, 0, 0), (0, -1, 0), (0, 0, 1), (0, 0, -0.1), (math.nan, 0, 0)):
        with pytest.raises(PathwayError, match="Augment"):
            Augment(*sizes)
    silent = Contributions((torch.tensor([[1.0, 0.0], [0.0, 0.0]]),), ("relu_0",))
    with pytest.raises(PathwayError, match="is 0 on input 1"):
        top_neuron(silent, "relu_0")
    with pytest.raises(PathwayError, match="no site 'relu_1'"):
        top_neuron(silent, "relu_1")
