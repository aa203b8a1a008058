"""Degradation and sensitivity-n against closed forms, loops in plain Python and dense linear algebra."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import small_network, unchanged
from scipy.ndimage import gaussian_filter
from scipy.stats import pearsonr
from torch import Tensor, nn

from pathwaylib import PathwayError
from pathwaylib.evaluation.faithfulness import (
    FRACTIONS,
    Degradation,
    degradation,
    degraded,
    lerf_minus_morf,
    pixel_order,
    sensitivity_n,
)
from pathwaylib.evaluation.fills import baseline, blurred, noisy_linear

CHANNELS, HEIGHT, WIDTH = 3, 4, 5
PIXELS = HEIGHT * WIDTH


def linear(seed: int = 0, classes: int = 2) -> nn.Sequential:
    """A linear network, in float64; with two classes the second logit is 0."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * PIXELS, classes)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        if classes == 2:
            net[1].weight[1], net[1].bias[1] = 0, 0
    return net


def weights(net: nn.Sequential, target: int = 0) -> Tensor:
    return net[1].weight[target].detach().view(CHANNELS, HEIGHT, WIDTH)


def images(count: int, seed: int = 0, shape: tuple[int, ...] = (CHANNELS, HEIGHT, WIDTH)) -> Tensor:
    return torch.rand(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Watched(nn.Module):
    """A network that keeps what it was given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()
        self.eval()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return self.network(x)


# --- The order of removal --------------------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.sampled_from(["signed", "absolute", "strongest"]), st.integers(1, 3))
def test_order_sorts_by_relevance(seed: int, ranking: Any, count: int) -> None:
    attribution = torch.randn(count, CHANNELS, HEIGHT, WIDTH, generator=drawn(seed))
    relevance = {
        "signed": lambda pixel: sum(pixel),
        "absolute": lambda pixel: abs(sum(pixel)),
        "strongest": lambda pixel: max(map(abs, pixel)),
    }[ranking]
    order = pixel_order(attribution, ranking=ranking)
    for places, image in zip(order.flatten(1), attribution.double().flatten(2), strict=True):
        assert sorted(places.tolist()) == list(range(PIXELS))
        values = [relevance(pixel.tolist()) for pixel in image.T]
        by_place = [values[index] for index in places.argsort().tolist()]
        assert all(one >= two - 1e-6 for one, two in itertools.pairwise(by_place))


def test_ties_are_broken_at_random_without_favour_for_a_place() -> None:
    # Two levels: ten pixels of relevance 1 come first, and each of them comes first as often as any other.
    attribution = torch.zeros(4000, 1, HEIGHT, WIDTH)
    attribution[:, :, :2] = 1
    order = pixel_order(attribution, generator=drawn(1)).flatten(1)
    assert order[:, :10].max() == 9
    assert order[:, 10:].min() == 10
    # The place of a pixel is uniform on 0..9: mean 4.5 with standard deviation 2.87; 5 standard errors.
    assert ((order[:, :10].double().mean(0) - 4.5).abs() < 5 * 2.87 / 4000**0.5).all()
    first = torch.stack([(order == place).double().mean(0) for place in (0, 9)])[:, :10]
    assert ((first - 0.1).abs() < 5 * (0.09 / 4000) ** 0.5).all()
    # Every image its own order; the same seed the same orders.
    assert len({tuple(row) for row in order[:50].tolist()}) > 45
    assert torch.equal(order, pixel_order(attribution, generator=drawn(1)).flatten(1))
    assert not torch.equal(order, pixel_order(attribution, generator=drawn(2)).flatten(1))


def test_zero_has_no_sign() -> None:
    # -0.0 sorts below 0.0 in some libraries; here they tie.
    attribution = torch.zeros(300, 1, 1, 2)
    attribution[..., 1] = -0.0
    first = (pixel_order(attribution, generator=drawn())[:, 0, 0] == 0).double().mean()
    assert 0.4 < float(first) < 0.6


def test_half_precision_maps_are_ranked_by_their_own_values() -> None:
    attribution = torch.randn(2, CHANNELS, HEIGHT, WIDTH).half()
    assert torch.equal(pixel_order(attribution), pixel_order(attribution.double()))
    # Summed in half precision, 2048 + 1 is 2048: the second pixel would tie.
    large = torch.tensor([[[[2048.0, 2048.0]], [[0.0, 1.0]]]]).half().repeat(50, 1, 1, 1)
    assert (pixel_order(large) == torch.tensor([1, 0])).all()


# --- What is removed -------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.sampled_from(["morf", "lerf"]), st.sampled_from(["mean", "blur", "noisy linear"]))
def test_exactly_as_many_pixels_as_asked_for(seed: int, order: Any, fill: Any) -> None:
    x, attribution = images(2, seed), torch.randn(2, CHANNELS, HEIGHT, WIDTH, generator=drawn(seed))
    for fraction in (0.0, 0.025, 0.1, 0.3, 0.55, 0.9):
        changed = (degraded(x, attribution, fraction, order=order, fill=fill) != x).any(1)
        assert changed.flatten(1).sum(1).tolist() == [round(fraction * PIXELS)] * 2  # 0.5 of a pixel rounds to none


def test_fraction_0_leaves_every_bit() -> None:
    """The public slip: ``argsort()[-0:]`` is everything, so that fraction 0 removed the whole image."""
    x = images(3)
    x[0, 0, 0, 0] = -0.0
    attribution = torch.randn(3, CHANNELS, HEIGHT, WIDTH)
    for order, fill in itertools.product(["morf", "lerf"], ["mean", "blur", "noisy linear", torch.zeros(3)]):
        net = Watched(linear())
        found = degradation(net, x, attribution, order=order, fill=fill, fractions=(0,))
        given_to_network = net.seen[-1]
        assert torch.equal(given_to_network.view(torch.int64), x.view(torch.int64))
        assert torch.equal(found.probability[:, 0], linear()(x).softmax(1).amax(1))
        assert found.kept.all()


@given(st.integers(0, 2**16), st.sampled_from([0.1, 0.25, 0.5, 0.8]), st.sampled_from(["signed", "absolute"]))
def test_lerf_is_morf_in_reverse(seed: int, fraction: float, ranking: Any) -> None:
    # What MoRF has removed at a fraction is what LeRF leaves at the other; ties included.
    x = images(2, seed)
    attribution = torch.randint(-2, 3, (2, 1, HEIGHT, WIDTH), generator=drawn(seed)).double()
    nothing = torch.full((3,), -1.0)
    morf = degraded(x, attribution, fraction, order="morf", ranking=ranking, fill=nothing)
    lerf = degraded(x, attribution, 1 - fraction, order="lerf", ranking=ranking, fill=nothing)
    assert torch.equal((morf == -1).all(1), (lerf != -1).all(1))


def test_all_channels_of_a_pixel_go_together() -> None:
    x = images(2) + 0.1
    attribution = torch.zeros_like(x)
    attribution[:, 1, 2, 3] = 5.0  # one channel of one pixel
    gone = degraded(x, attribution, 1 / PIXELS, fill=torch.zeros(3)) == 0
    assert gone[:, :, 2, 3].all()
    assert int(gone.sum()) == 2 * CHANNELS


def test_signed_and_absolute_disagree_on_what_speaks_against() -> None:
    attribution = torch.zeros(1, 2, 1, 3)
    attribution[0, :, 0, 0] = torch.tensor([1.0, 0.0])  # for
    attribution[0, :, 0, 1] = torch.tensor([-2.0, 0.0])  # against
    attribution[0, :, 0, 2] = torch.tensor([3.0, -3.0])  # channels cancel
    assert pixel_order(attribution).flatten().tolist() == [0, 2, 1]
    assert pixel_order(attribution, ranking="absolute").flatten().tolist() == [1, 0, 2]
    assert pixel_order(attribution, ranking="strongest").flatten().tolist() == [2, 1, 0]


# --- Curves ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.sampled_from(["morf", "lerf"]), st.booleans())
def test_curves_of_a_linear_network_in_closed_form(seed: int, order: str, with_target: bool) -> None:
    """For Φ = w·x + b removing a set S changes the logit by the sum of w (fill − x) over S."""
    net, x = linear(seed, classes=3), images(3, seed)
    attribution = torch.randn(3, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64, generator=drawn(seed))
    fill = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    target = [2, 0, 1] if with_target else net(x).argmax(1).tolist()
    found = degradation(net, x, attribution, target if with_target else None, order=order, fill=fill)
    for image in range(3):
        relevance = attribution[image].sum(0).flatten()
        ranked = sorted(range(PIXELS), key=lambda pixel: float(relevance[pixel]), reverse=order == "morf")
        for position, fraction in enumerate(FRACTIONS):
            logits = net(x[image : image + 1])[0].tolist()
            for pixel in ranked[: round(fraction * PIXELS)]:
                for channel in range(CHANNELS):
                    change = float(fill[channel] - x[image, channel].flatten()[pixel])
                    for kind in range(3):
                        logits[kind] += float(weights(net, kind)[channel].flatten()[pixel]) * change
            expected = math.exp(logits[target[image]]) / sum(map(math.exp, logits))
            assert float(found.probability[image, position]) == pytest.approx(expected, abs=1e-10)
            assert bool(found.kept[image, position]) == (logits.index(max(logits)) == target[image])
    assert found.fractions.tolist() == pytest.approx(FRACTIONS)
    assert found.targets.tolist() == target


@given(st.integers(0, 2**16))
def test_no_order_beats_the_contributions_of_a_linear_network(seed: int) -> None:
    """By brute force over every set of pixels: MoRF by w (x − fill) is the lowest curve there is, LeRF the highest."""
    net, fill = linear(seed), torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)
    x = images(1, seed)
    contribution = weights(net) * (x - fill.view(3, 1, 1))
    runs = {
        order: degradation(net, x, contribution, 0, fractions=(0, 0.1, 0.2), order=order, fill=fill).probability[0]
        for order in ("morf", "lerf")
    }
    logit = float((net(x)[0, 0]).detach())
    per_pixel = contribution[0].sum(0).flatten().tolist()
    for position, count in enumerate((0, 2, 4)):
        sums = [sum(chosen) for chosen in itertools.combinations(per_pixel, count)]
        lowest, highest = (1 / (1 + math.exp(-(logit - total))) for total in (max(sums), min(sums)))
        assert float(runs["morf"][position]) == pytest.approx(lowest, abs=1e-10)
        assert float(runs["lerf"][position]) == pytest.approx(highest, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_curves_of_a_half_precision_network_are_in_single(dtype: torch.dtype) -> None:
    net, x, attribution = linear().to(dtype), images(3).to(dtype), torch.randn(3, 3, HEIGHT, WIDTH)
    found = degradation(net, x, attribution, 0)
    assert torch.equal(found.fractions, torch.tensor(FRACTIONS))
    with torch.no_grad():
        logits = torch.stack([net(degraded(x, attribution, fraction)) for fraction in FRACTIONS], 1)
    assert torch.equal(found.probability, logits.float().softmax(2)[..., 0])
    torch.testing.assert_close(found.area, torch.trapezoid(found.probability, torch.tensor(FRACTIONS)) / 0.9)


def test_areas_by_hand() -> None:
    curve = Degradation(
        torch.tensor([0.0, 0.1, 0.5]),
        torch.tensor([[1.0, 0.5, 0.1], [0.4, 0.4, 0.4]]),
        torch.tensor([[True, True, False], [False, False, False]]),
        "lerf",
        torch.tensor([0, 1]),
    )
    # (0.1 · 0.75 + 0.4 · 0.3) / 0.5, and a constant.
    torch.testing.assert_close(curve.area, torch.tensor([0.39, 0.4]))
    torch.testing.assert_close(curve.kept_area, torch.tensor([0.6, 0.0]))
    single = Degradation(torch.tensor([0.3]), torch.tensor([[0.7]]), torch.tensor([[True]]), "morf", torch.tensor([0]))
    assert single.area.tolist() == pytest.approx([0.7])


def test_score_of_a_constant_map_is_0_on_average_and_of_a_reversed_map_the_negative() -> None:
    net, x = linear(), images(400)
    constant = torch.ones(400, 1, HEIGHT, WIDTH)
    both = [degradation(net, x, constant, 0, order=order) for order in ("lerf", "morf")]
    score = lerf_minus_morf(*both)
    assert float(score.mean().abs()) < 4 * float(score.std()) / 400**0.5
    assert float(score.abs().max()) > 0  # the order of ties is no order of places
    attribution = torch.randn(400, CHANNELS, HEIGHT, WIDTH)
    one = [degradation(net, x, attribution, 0, order=order) for order in ("lerf", "morf")]
    other = [degradation(net, x, -attribution, 0, order=order) for order in ("lerf", "morf")]
    torch.testing.assert_close(lerf_minus_morf(*one), -lerf_minus_morf(*other))


def test_a_score_takes_two_runs_that_belong_together() -> None:
    net, x, attribution = linear(), images(2), torch.randn(2, 3, HEIGHT, WIDTH)
    morf, lerf = (degradation(net, x, attribution, 0, order=order) for order in ("morf", "lerf"))
    with pytest.raises(PathwayError, match=r"'morf' and 'lerf'"):
        lerf_minus_morf(morf, lerf)
    fewer = degradation(net, x, attribution, 0, order="lerf", fractions=(0, 0.5))
    other = degradation(net, x, attribution, 1, order="lerf")
    for wrong in (fewer, other):
        with pytest.raises(PathwayError, match="different images"):
            lerf_minus_morf(wrong, morf)


# --- Fills -----------------------------------------------------------------------------------------------------------


def test_baselines() -> None:
    x = images(4)
    torch.testing.assert_close(baseline(x, "mean"), x.mean((0, 2, 3)).view(1, 3, 1, 1).expand_as(x))
    for given_fill in (torch.rand(1), torch.rand(3), torch.rand(3, HEIGHT, WIDTH), torch.rand(4, 3, HEIGHT, WIDTH)):
        shaped = given_fill.view(-1, 1, 1) if given_fill.ndim == 1 else given_fill
        assert torch.equal(baseline(x, given_fill), (torch.zeros_like(x) + shaped.double()))


@pytest.mark.parametrize("sigma", [0.5, 1.5, 4.0])
def test_blur_is_a_normalised_gaussian(sigma: float) -> None:
    x = images(2, shape=(3, 12, 9))
    spread = [gaussian_filter(image.numpy(), (0, sigma, sigma), mode="constant", truncate=30) for image in x]
    inside = gaussian_filter(np.ones((3, 12, 9)), (0, sigma, sigma), mode="constant", truncate=30)
    torch.testing.assert_close(blurred(x, sigma), torch.from_numpy(np.stack(spread) / inside), rtol=1e-6, atol=1e-6)
    assert torch.equal(blurred(x), blurred(x, 9 / 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blur_in_half_precision_knows_every_pixel_of_a_large_image(dtype: torch.dtype) -> None:
    x = images(1, shape=(1, 1, 600)).to(dtype)  # in bfloat16 whole numbers end at 256
    torch.testing.assert_close(blurred(x, 1.5).float(), blurred(x.float(), 1.5), rtol=0.02, atol=0.02)


def interpolated_densely(image: Tensor, gone: Tensor) -> Tensor:
    """The equations of noisy linear imputation, pixel by pixel, solved as one dense system."""
    height, width = gone.shape
    matrix, right = torch.eye(height * width, dtype=torch.float64), image.flatten(1).T.clone()
    for row, column in gone.nonzero().tolist():
        equation = torch.zeros(height * width, dtype=torch.float64)
        for down, across in itertools.product((-1, 0, 1), repeat=2):
            r, c = row + down, column + across
            if (down or across) and 0 <= r < height and 0 <= c < width:
                weight = 1 / 12 if down and across else 1 / 6
                equation[r * width + c] -= weight
                equation[row * width + column] += weight
        matrix[row * width + column], right[row * width + column] = equation, 0.0
    return torch.linalg.solve(matrix, right).T.view_as(image)


@given(st.integers(0, 2**16), st.integers(1, 7), st.integers(1, 7), st.floats(0, 1))
def test_noisy_linear_solves_its_equations(seed: int, height: int, width: int, share: float) -> None:
    x = images(3, seed, (2, height, width))
    gone = torch.rand(3, height, width, generator=drawn(seed)) < share
    gone[:, seed % height, seed % width] = False  # something is left
    found = noisy_linear(x, gone, noise=0)
    for image in range(3):
        expected = interpolated_densely(x[image], gone[image])
        torch.testing.assert_close(found[image], expected, rtol=1e-9, atol=1e-9)
    kept = ~gone[:, None].expand_as(x)
    assert torch.equal(found[kept], x[kept])
    low, high = x.flatten(2).amin(2), x.flatten(2).amax(2)
    assert (found.flatten(2) >= low[..., None] - 1e-9).all()  # means stay inside what they are means of
    assert (found.flatten(2) <= high[..., None] + 1e-9).all()


def test_noise_is_as_wide_as_said_and_only_where_pixels_went() -> None:
    x = torch.full((40, 3, 16, 16), 0.5)
    gone = torch.rand(40, 16, 16, generator=drawn()) < 0.5
    found = noisy_linear(x, gone, noise=0.1, generator=drawn(3)) - x
    kept = ~gone[:, None].expand_as(x)
    assert (found[kept] == 0).all()
    assert float(found[~kept].std()) == pytest.approx(0.1, rel=0.03)
    assert torch.equal(found, noisy_linear(x, gone, noise=0.1, generator=drawn(3)) - x)
    assert torch.equal(noisy_linear(x, gone), noisy_linear(x, gone))


def test_noise_is_the_same_at_every_fraction() -> None:
    x, attribution = images(2), torch.randn(2, 1, HEIGHT, WIDTH)
    flat = torch.full_like(x, 0.5)  # interpolation gives 0.5 again: what is added is the noise
    few, many = (degraded(flat, attribution, fraction, fill="noisy linear") - flat for fraction in (0.3, 0.8))
    gone = few.abs().sum(1, keepdim=True).expand_as(x) > 1e-6
    torch.testing.assert_close(few[gone], many[gone], rtol=0, atol=1e-9)
    # Each image has its own, from the generator.
    same = torch.zeros(2, 1, HEIGHT, WIDTH)
    same[:, :, 0] = 1
    one, two = degraded(flat, same, WIDTH / PIXELS, fill="noisy linear") - flat
    assert not torch.isclose(one[:, 0], two[:, 0], rtol=0, atol=1e-6).any()
    other = degraded(flat, same, WIDTH / PIXELS, fill="noisy linear", generator=drawn(5)) - flat
    assert not torch.isclose(one[:, 0], other[0, :, 0], rtol=0, atol=1e-6).any()


# --- Batches, memory, the caller's things ----------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["blur", "noisy linear", torch.tensor([0.1, 0.2, 0.3])])
@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_batch_is_the_loop_and_batch_size_only_bounds_the_memory(fill: Any, order: Any) -> None:
    network = small_network()
    x = network.inputs(5)
    attribution = torch.randint(-2, 3, (5, 1, 7, 7), generator=drawn()).double()  # many ties
    together = degradation(network, x, attribution, fill=fill, order=order, generator=drawn(7))
    one_generator = drawn(7)
    for image in range(5):
        part = slice(image, image + 1)
        alone = degradation(network, x[part], attribution[part], fill=fill, order=order, generator=one_generator)
        torch.testing.assert_close(alone.probability, together.probability[part], rtol=1e-10, atol=1e-12)
    net = Watched(network)
    small = degradation(net, x, attribution, fill=fill, order=order, generator=drawn(7), batch_size=3)
    assert max(len(seen) for seen in net.seen) == 3
    torch.testing.assert_close(small.probability, together.probability, rtol=1e-10, atol=1e-12)
    assert torch.equal(small.kept, together.kept)


def test_sensitivity_batch_is_the_loop() -> None:
    network = small_network()
    x = network.inputs(3)
    attribution = torch.randn(3, 3, 7, 7, dtype=torch.float64, generator=drawn())
    fill = torch.zeros(3)
    together = sensitivity_n(network, x, attribution, n=(1, 5, 30), subsets=20, fill=fill, generator=drawn(7))
    one_generator = drawn(7)
    for image in range(3):
        part = slice(image, image + 1)
        alone = sensitivity_n(
            network, x[part], attribution[part], n=(1, 5, 30), subsets=20, fill=fill, generator=one_generator
        )
        torch.testing.assert_close(alone.correlation, together.correlation[part], rtol=1e-8, atol=1e-9)
    net = Watched(network)
    small = sensitivity_n(net, x, attribution, n=(1, 5, 30), subsets=20, fill=fill, generator=drawn(7), batch_size=8)
    assert max(len(seen) for seen in net.seen) == 8
    torch.testing.assert_close(small.correlation, together.correlation, rtol=1e-8, atol=1e-9)


def test_nothing_of_the_callers_changes() -> None:
    network = small_network(spelling="nn.ReLU(inplace=True)")
    x = network.inputs(2)
    attribution = torch.randn(2, 3, 7, 7).double()
    for given_images in (x, x.clone().requires_grad_(), x[:1].expand_as(x)):
        with unchanged(network, given_images, attribution):
            for fill in ("mean", "blur", "noisy linear"):
                found = degradation(network, given_images, attribution.requires_grad_(False), fill=fill)
                assert not found.probability.requires_grad
            sensitivity_n(network, given_images, attribution, n=(2,), subsets=3)
            degraded(given_images, attribution, 0.3)
    with unchanged(network, x, attribution), pytest.raises(PathwayError):
        degradation(network, x, attribution, 99)
    eats = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(147, 2)).double().eval()
    shifted = x - 0.5
    with unchanged(eats, shifted):
        degradation(eats, shifted, attribution)
        sensitivity_n(eats, shifted, attribution, n=(2,), subsets=3)


def test_single_precision_and_attributions_that_ask_for_gradients() -> None:
    network = small_network().float()
    x = torch.rand(2, 3, 7, 7, generator=drawn())
    attribution = torch.randn(2, 3, 7, 7, generator=drawn()).requires_grad_()
    found = degradation(network, x, attribution)
    assert found.probability.dtype == torch.float32
    assert not found.probability.requires_grad
    assert sensitivity_n(network, x, attribution, n=(2,), subsets=5).correlation.dtype == torch.float32


# --- Sensitivity-n ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.sampled_from(["black", "mean colour", "blur", "own images"]))
def test_sensitivity_of_a_linear_network_is_exactly_1(seed: int, kind: str) -> None:
    net, x = linear(seed, classes=4), images(2, seed)
    fill: Any = {
        "black": torch.zeros(1),
        "mean colour": torch.tensor([0.5, 0.4, 0.3]),
        "blur": "blur",
        "own images": images(2, seed + 1),
    }[kind]
    contribution = weights(net, 2) * (x - baseline(x, fill))
    found = sensitivity_n(net, x, {"right": contribution, "opposite": -contribution}, 2, fill=fill, subsets=30)
    ones = torch.ones(2, len(found["right"].n), dtype=torch.float64)
    torch.testing.assert_close(found["right"].correlation, ones, rtol=0, atol=1e-9)
    torch.testing.assert_close(found["opposite"].correlation, -ones, rtol=0, atol=1e-9)
    # A map that is shifted and scaled predicts as well: correlation does not ask for units.
    shifted = sensitivity_n(net, x, 3 * contribution.sum(1, keepdim=True) - 7, 2, fill=fill, subsets=30)
    torch.testing.assert_close(shifted.correlation, ones, rtol=0, atol=1e-9)


def test_sensitivity_against_scipy() -> None:
    """The subsets are seen through the network: which pixels are black in what it was given."""
    network = small_network()
    x = network.inputs(1) + 0.1
    attribution = torch.randn(1, 3, 7, 7, dtype=torch.float64, generator=drawn())
    net = Watched(network)
    found = sensitivity_n(net, x, attribution, 1, n=(1, 4, 40), subsets=25, fill=torch.zeros(3), batch_size=25)
    whole, *runs = net.seen
    assert torch.equal(whole, x)
    for position, (n, shown) in enumerate(zip((1, 4, 40), runs, strict=True)):
        gone = (shown == 0).all(1)
        assert gone.flatten(1).sum(1).tolist() == [n] * 25
        assert torch.equal(shown[~gone[:, None].expand_as(shown)], x.expand_as(shown)[~gone[:, None].expand_as(shown)])
        sums = (attribution.sum(1) * gone).sum((1, 2))
        drops = (network(x) - network(shown))[:, 1].detach()
        expected = pearsonr(sums.numpy(), drops.numpy()).statistic
        assert float(found.correlation[0, position]) == pytest.approx(expected, abs=1e-9)


def test_subsets_are_uniform_and_shared() -> None:
    x = images(1) + 0.1
    net = Watched(linear())
    maps = {name: torch.randn(1, 1, HEIGHT, WIDTH, generator=drawn(seed)) for seed, name in enumerate("abc")}
    found = sensitivity_n(net, x, maps, 0, n=(5,), subsets=3000, fill=torch.zeros(3), batch_size=5000)
    assert len(net.seen) == 2  # the whole image, and one run for all three maps
    share = (net.seen[1] == 0).all(1).double().mean(0)
    assert ((share - 0.25).abs() < 5 * (0.25 * 0.75 / 3000) ** 0.5).all()
    for name, values in maps.items():
        alone = sensitivity_n(linear(), x, values, 0, n=(5,), subsets=3000, fill=torch.zeros(3))
        torch.testing.assert_close(found[name].correlation, alone.correlation, rtol=1e-9, atol=1e-12)


def test_default_sizes_are_spaced_in_their_logarithm() -> None:
    x = torch.rand(1, 3, 32, 32)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)).eval()
    found = sensitivity_n(net, x, torch.randn(1, 1, 32, 32), subsets=2).n
    assert (found[0], found[-1], len(found)) == (1, 819, 10)
    steps = [math.log(two / one) for one, two in itertools.pairwise(found)]
    assert max(abs(step - math.log(819) / 9) for step in steps) < 0.07
    tiny = sensitivity_n(nn.Flatten().eval(), torch.rand(1, 2, 1, 1), torch.rand(1, 1, 1, 1), 0, subsets=2)
    assert tiny.n == (1,)


def test_sizes_may_be_whole_floats() -> None:
    by_float, by_int = (sensitivity_n(NET, X, A, n=[size], subsets=5) for size in (2.0, 2))
    assert by_float.n == by_int.n
    assert torch.equal(by_float.correlation, by_int.correlation)


def test_what_does_not_vary_has_correlation_0() -> None:
    x = images(2)
    net = linear()
    constant = {f"{value}": torch.full((2, 1, HEIGHT, WIDTH), value) for value in (0.0, 0.1, 1e6, -1e-6)}
    for found in sensitivity_n(net, x, constant, 0, subsets=40).values():
        assert (found.correlation == 0).all()
    # A network that does not look, one that looks beyond the last digit, and a fill that changes nothing.
    blind = linear()
    with torch.no_grad():
        blind[1].weight.zero_()
    attribution = torch.randn(2, 3, HEIGHT, WIDTH)
    assert (sensitivity_n(blind, x, attribution, 0, subsets=40).correlation == 0).all()
    with torch.no_grad():
        blind[1].weight.fill_(1e-17)
    assert (sensitivity_n(blind, x, attribution, 0, subsets=40).correlation == 0).all()
    assert (sensitivity_n(net, x, attribution, 0, subsets=40, fill=x).correlation == 0).all()
    # All pixels: there is one set only.
    assert (sensitivity_n(net, x, attribution, 0, n=(PIXELS,), subsets=5).correlation == 0).all()


def test_a_small_but_real_variation_counts() -> None:
    net, x = linear(), images(1)
    contribution = weights(net) * x
    for scale in (1e-6, 1e6):
        found = sensitivity_n(net, x, contribution * scale, 0, fill=torch.zeros(1), subsets=20)
        torch.testing.assert_close(found.correlation, torch.ones_like(found.correlation), rtol=0, atol=1e-9)


# --- Errors ----------------------------------------------------------------------------------------------------------

NET, X, A = linear(), images(2), torch.randn(2, 3, HEIGHT, WIDTH)


class NaN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] * torch.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: degradation(NET, X, A[:1]), r"\(1, 3, 4, 5\) for images \(2, 3, 4, 5\)"),
        (lambda: degradation(NET, X, A[:, :2]), r"\(2, 2, 4, 5\)"),
        (lambda: degradation(NET, X, A.sum(1)), r"\(2, 1, 4, 5\)"),
        (lambda: degradation(NET, X, A * torch.nan), "NaN"),
        (lambda: degradation(NET, X, A, 2), "classes 0 to 1"),
        (lambda: degradation(NET, X, A, order="best"), "'morf', 'lerf'|'morf' or 'lerf'"),
        (lambda: degradation(NET, X, A, ranking="squared"), "squared"),
        (lambda: degradation(NET, X, A, fill="white"), "mean, blur, noisy linear"),
        (lambda: degradation(NET, X, A, fill=torch.zeros(4)), r"fill has shape \(4,\)"),
        (lambda: degradation(NET, X, A, fill=torch.zeros(3, 3, HEIGHT, WIDTH)), r"fill has shape"),
        (lambda: degradation(NET, X, A, fill=torch.zeros(1, 2, 3, HEIGHT, WIDTH)), r"fill has shape"),
        (lambda: degradation(NET, X, A, fill=torch.full((3,), torch.inf)), "fill holds"),
        (lambda: degradation(NET, X, A, fill=torch.tensor([9, 99, 199]).byte()), r"mean_colour\(data\) / 255"),
        (lambda: degraded(X, A, 0.5, fill=torch.zeros(3).byte()), r"mean_colour\(data\) / 255"),
        (lambda: sensitivity_n(NET, X, A, fill=torch.zeros(3).long()), r"mean_colour\(data\) / 255"),
        (lambda: degradation(NET, X, A, fill="noisy linear", fractions=(0, 1)), "leave at least one"),
        (lambda: degradation(NET, X, A, fractions=()), "increasing"),
        (lambda: degradation(NET, X, A, fractions=0.5), r"fractions are 0\.5; give increasing"),
        (lambda: degradation(NET, X, A, fractions=("half",)), "increasing"),
        (lambda: degraded(X, A, "half"), "increasing"),
        (lambda: degraded((255 * X).byte(), A, 0.5), r"float\(\) / 255"),
        (lambda: degradation(NET, X, A, fractions=(0.5, 0.2)), "increasing"),
        (lambda: degradation(NET, X, A, fractions=(0.2, 0.2)), "increasing"),
        (lambda: degradation(NET, X, A, fractions=(0, 50)), r"in \[0, 1\]"),
        (lambda: degradation(NET, X, A, batch_size=0), "batch_size is 0"),
        (lambda: degradation(NET, X[0], A[0]), r"\(3, 4, 5\)"),
        (lambda: degradation(NET, X.float(), A), "float32"),
        (lambda: degradation(linear().train(), X, A), "training mode"),
        (lambda: degradation(nn.Identity().eval(), X, A), r"returned \(2, 3, 4, 5\)"),
        (lambda: degradation(NaN().eval(), X, A), "not finite"),
        (lambda: degraded(X, A, 1.5), r"in \[0, 1\]"),
        (lambda: pixel_order(A[0]), r"\(3, 4, 5\)"),
        (lambda: sensitivity_n(NET, X, {}), "no attribution"),
        (lambda: sensitivity_n(NET, X, {"a": A, "b": A[:1]}), r"\(1, 3, 4, 5\)"),
        (lambda: sensitivity_n(NET, X, A, n=(0,)), "1 to 20"),
        (lambda: sensitivity_n(NET, X, A, n=(21,)), "1 to 20"),
        (lambda: sensitivity_n(NET, X, A, n=(1.5,)), "whole numbers"),
        (lambda: sensitivity_n(NET, X, A, n=()), "whole numbers"),
        (lambda: sensitivity_n(NET, X, A, n=5), "n is 5; give whole numbers"),
        (lambda: sensitivity_n(NET, X, A, n=("a",)), "whole numbers"),
        (lambda: sensitivity_n(NET, X, A, n=(math.nan,)), "whole numbers"),
        (lambda: sensitivity_n(NET, X, A, n=(math.inf,)), "whole numbers"),
        (lambda: sensitivity_n(NET, X, A, n=(True,)), "whole numbers"),
        (lambda: sensitivity_n(NET, X, A, subsets=1), "at least 2"),
        (lambda: sensitivity_n(NET, X, A, subsets=0), "subsets is 0"),
        (lambda: sensitivity_n(NET, X, A, fill="noisy linear"), "not one image"),
        (lambda: blurred(X, 0), "sigma is 0"),
        (lambda: blurred((255 * X).byte()), r"float\(\) / 255"),
        (lambda: noisy_linear(X, torch.zeros(2, HEIGHT, WIDTH)), "float32"),
        (lambda: noisy_linear(X, torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)), r"\(4, 5\)"),
        (lambda: noisy_linear(X, torch.ones(2, HEIGHT, WIDTH, dtype=torch.bool)), "every pixel"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(PathwayError, match=message):
        call()


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    network, attribution = small_network(), torch.randn(2, 3, 7, 7).double()
    x = network.inputs(2)
    here = [degradation(network, x, attribution, fill=fill).probability for fill in ("blur", "noisy linear")]
    correlation = sensitivity_n(network, x, attribution, n=(3,), subsets=9).correlation
    network.cuda()
    for fill, expected in zip(("blur", "noisy linear"), here, strict=True):
        found = degradation(network, x.cuda(), attribution.cuda(), fill=fill).probability
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-8)
    again = sensitivity_n(network, x.cuda(), attribution.cuda(), n=(3,), subsets=9).correlation
    torch.testing.assert_close(again.cpu(), correlation, rtol=1e-6, atol=1e-6)
