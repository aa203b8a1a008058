"""Sanity checks by randomisation: similarities against SciPy and SciKit-image, networks against what must change."""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import RandomNetwork, small_network, unchanged
from scipy.stats import spearmanr
from skimage.feature import hog
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from pathwaylib import ActiveNeurons, NeuronMCT, Pathway, PathwayError, RandomSelection, explain, explainers, load_model
from pathwaylib.architectures import resnet
from pathwaylib.evaluation import (
    SIMILARITIES,
    SanityCheck,
    Similarity,
    bootstrap_interval,
    normalised_maps,
    pathway_sanity_check,
    randomisable_layers,
    randomised,
    sanity_check,
    unrelated_similarity,
)
from pathwaylib.neurons import targets_of
from pathwaylib.plots import show_sanity_check

MEASURES = sorted(SIMILARITIES)
WITHOUT_SMALL_MAPS = {name: SIMILARITIES[name] for name in ("Spearman", "Spearman absolute")}


def noise(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


# --- Similarities ----------------------------------------------------------------------------------------------------


def test_maps_are_normalised_by_their_own_largest_value() -> None:
    maps = torch.tensor([[[[1.0, -3.0], [0.0, 2.0]], [[1.0, -1.0], [0.0, -4.0]]]])  # channels add to 2, -4, 0, -2
    assert normalised_maps(maps).tolist() == [[[0.5, -1.0], [0.0, -0.5]]]
    assert normalised_maps(maps, absolute=True).tolist() == [[[0.5, 1.0], [0.0, 0.5]]]
    # Of four absolute values 0, 2, 2, 4 the third is the 75th percentile; what lies beyond is clipped.
    assert normalised_maps(maps, percentile=75).tolist() == [[[1.0, -1.0], [0.0, -1.0]]]
    assert normalised_maps(maps, percentile=25).tolist() == [[[0.5, -1.0], [0.0, -0.5]]]  # the percentile is 0
    assert torch.equal(normalised_maps(1e-30 * maps), normalised_maps(maps.double()).clone())


def test_maps_without_a_pattern_become_zeros() -> None:
    flat = torch.full((3, 2, 4, 4), 0.1)
    flat[1] *= -1
    flat[2] = 0
    assert normalised_maps(flat).count_nonzero() == 0
    rounded = flat * (1 + torch.finfo(torch.float32).eps * torch.arange(16).view(4, 4) / 8)
    assert normalised_maps(rounded).count_nonzero() == 0
    signs = torch.ones(1, 4, 4).triu() * 2 - 1
    assert normalised_maps(signs).abs().min() == 1
    assert normalised_maps(signs, absolute=True).count_nonzero() == 0


def oracle(measure: str, one: Tensor, other: Tensor) -> float:
    """Compute one image's similarity with SciPy and SciKit-image, from maps ``(C, H, W)``."""
    a, b = (map_.double().sum(0).numpy() for map_ in (one, other))
    if measure.endswith("absolute"):
        a, b = abs(a), abs(b)
    if measure.startswith("Spearman"):
        return float(spearmanr(a.ravel(), b.ravel()).statistic)
    a, b = (values / abs(values).max() for values in (a, b))
    if measure == "HOG":
        return float(np.corrcoef(*(hog(values, pixels_per_cell=(8, 8)) for values in (a, b)))[0, 1])
    return float(structural_similarity(a, b, data_range=1 if measure.endswith("absolute") else 2))


@pytest.mark.parametrize("measure", MEASURES)
def test_similarities_are_those_of_scipy_and_scikit_image(measure: str) -> None:
    one, other = noise(4, 3, 32, 32), noise(4, 3, 32, 32, seed=1)
    other[:2] += one[:2]
    one[3] = one[3].round()  # ties
    found = SIMILARITIES[measure](one, other)
    assert found.shape == (4,)
    assert found.tolist() == pytest.approx([oracle(measure, a, b) for a, b in zip(one, other, strict=True)], abs=1e-9)


def test_ssim_of_one_window_is_the_formula() -> None:
    a, b = (normalised_maps(noise(1, 7, 7, seed=seed))[0] for seed in (0, 1))
    covariance = torch.cov(torch.stack([a.flatten(), b.flatten()]))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    expected = (2 * a.mean() * b.mean() + c1) * (2 * covariance[0, 1] + c2)
    expected = expected / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2))
    assert float(SIMILARITIES["SSIM"](a[None], b[None])) == pytest.approx(float(expected))


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=9, max_size=30))
def test_ranks_with_ties_are_scipys(pairs: list[tuple[int, int]]) -> None:
    maps = torch.tensor(pairs, dtype=torch.float64).T[:, None, None]
    found = float(SIMILARITIES["Spearman"](maps[:1], maps[1:]))
    one, other = (len({pair[side] for pair in pairs}) == 1 for side in (0, 1))
    expected = float(one and other) if one or other else float(spearmanr(*zip(*pairs, strict=True)).statistic)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_similarity_of_a_map_with_itself_is_one(measure: str) -> None:
    similarity, maps = SIMILARITIES[measure], noise(3, 1, 24, 24)
    assert similarity(maps, maps).tolist() == pytest.approx([1.0] * 3)
    assert similarity(maps, 7 * maps).tolist() == pytest.approx([1.0] * 3)
    other = noise(3, 1, 24, 24, seed=1)
    assert torch.allclose(similarity(maps, other), similarity(other, maps))
    assert similarity(maps, other).abs().max() < 1


def test_a_change_of_sign_is_seen_by_signed_measures_only() -> None:
    maps = noise(3, 1, 24, 24)
    found = {name: float(similarity(maps, -maps).mean()) for name, similarity in SIMILARITIES.items()}
    assert found["Spearman"] == pytest.approx(-1)
    assert 0 < found["SSIM"] < 0.5  # where a window's mean and pattern both change sign, two factors of -1 make 1
    for blind in ("Spearman absolute", "SSIM absolute", "HOG"):
        assert found[blind] == pytest.approx(1)


@pytest.mark.parametrize("measure", MEASURES)
def test_maps_without_a_pattern_are_compared_by_rule(measure: str) -> None:
    similarity, maps = SIMILARITIES[measure], noise(2, 3, 24, 24)
    zero, flat = torch.zeros_like(maps), torch.full_like(maps, -0.3)
    assert similarity(zero, zero).tolist() == similarity(zero, flat).tolist() == [1.0, 1.0]
    assert similarity(maps, zero).tolist() == similarity(flat, maps).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("measure", MEASURES)
def test_a_batch_is_a_loop_and_stays_as_it_is(measure: str) -> None:
    similarity = SIMILARITIES[measure]
    one, other = noise(5, 3, 24, 24).requires_grad_(), noise(5, 3, 24, 24, seed=1)
    with unchanged(nn.Identity(), one, other):
        found = similarity(one, other)
    assert not found.requires_grad
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.cat([similarity(one[[i]], other[[i]]) for i in range(5)]))


def test_small_maps_have_smaller_cells_and_windows() -> None:
    for side in (3, 4, 5, 6, 8, 23):
        for similarity in SIMILARITIES.values():
            assert torch.isfinite(similarity(noise(2, 1, side, side), noise(2, 1, side, side, seed=1))).all()
    for name in ("SSIM", "HOG"):
        with pytest.raises(PathwayError, match="leave it out"):
            SIMILARITIES[name](noise(2, 1, 2, 2), noise(2, 1, 2, 2, seed=1))


def test_maps_that_do_not_fit_are_answered() -> None:
    with pytest.raises(PathwayError, match="give two of each image"):
        SIMILARITIES["SSIM"](noise(2, 3, 8, 8), noise(1, 3, 8, 8))
    with pytest.raises(PathwayError, match="give two of each image"):
        SIMILARITIES["SSIM"](noise(2, 3, 8, 8), noise(2, 3, 8, 9))
    for wrong in (noise(2, 8), torch.zeros(0, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.int64)):
        with pytest.raises(PathwayError, match="the maps are"):
            normalised_maps(wrong)
    for value in (math.nan, math.inf):
        with pytest.raises(PathwayError, match="NaN or infinity"):
            normalised_maps(torch.full((1, 2, 2), value))
    for percentile in (0, 101, math.nan):
        with pytest.raises(PathwayError, match="percentile is"):
            normalised_maps(noise(1, 2, 2), percentile=percentile)


def test_each_image_is_compared_with_others() -> None:
    # Each map holds its own number, and a measure returns the other's.
    numbers = torch.arange(7.0)
    maps = numbers[:, None, None] + torch.tensor([[0.0, 0.1]])
    asked: list[list[float]] = []

    def note(one: Tensor, other: Tensor) -> Tensor:
        assert one[:, 0].tolist() == numbers.tolist()
        asked.append(other[:, 0].tolist())
        return other[:, 0]

    measure = {"number": Similarity(lambda maps: maps.flatten(1), note)}
    found = unrelated_similarity(maps, similarities=measure, partners=6)["number"]
    assert len(asked) == 6
    for image, partners in enumerate(zip(*asked, strict=True)):
        assert sorted(partners) == [other for other in range(7) if other != image]
    assert found.tolist() == pytest.approx([(21 - number) / 6 for number in range(7)])
    some = unrelated_similarity(maps, similarities=measure, partners=2)["number"]
    assert not torch.equal(some, unrelated_similarity(maps, similarities=measure, partners=2, seed=1)["number"])
    with pytest.raises(PathwayError, match="7 images cannot have 7 partners"):
        unrelated_similarity(maps, partners=7)
    with pytest.raises(PathwayError, match="partners is 0"):
        unrelated_similarity(maps, partners=0)


# --- Networks that have forgotten ------------------------------------------------------------------------------------


class Backwards(nn.Module):
    """Registers its layers in another order than it runs them; one runs twice, one never, one is left by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.never = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.first_norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first_norm(x)).relu()
        return self.head(self.twice(self.norm(self.middle(x)).relu()))


def test_layers_are_in_the_order_of_the_run() -> None:
    assert randomisable_layers(Backwards().eval(), torch.rand(1, 4)) == ("head", "twice", "middle", "first_norm")


def test_a_convolution_and_its_normalisation_are_one_layer() -> None:
    x = torch.rand(1, 3, 32, 32)
    assert randomisable_layers(load_model("cifar10-vgg"), x) == ("30", "25", "22", "18", "15", "11", "8", "4", "1")
    layers = randomisable_layers(resnet(8).eval(), x)
    assert layers == ("9", "6.shortcut.0", "6.conv2", "6.conv1", "5.shortcut.0", "5.conv2", "5.conv1", "4.conv2",
                      "4.conv1", "1")  # fmt: skip


def changed_layers(before: nn.Module, after: nn.Module) -> set[str]:
    """Return the modules of which any parameter or buffer differs."""
    values = after.state_dict()
    return {name.rpartition(".")[0] for name, value in before.state_dict().items() if not value.equal(values[name])}


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value that no fresh layer has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(2 + torch.rand(value.shape, generator=generator, dtype=value.dtype))
    return model.eval()


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_exactly_the_named_layers_have_forgotten(mode: str) -> None:
    model, x = trained(Backwards()), torch.rand(2, 4)
    modules = {"head": {"head"}, "twice": {"twice"}, "middle": {"middle", "norm"}, "first_norm": {"first_norm"}}
    expected: set[str] = set()
    with unchanged(model, x):
        copies = list(randomised(model, x, mode=mode))
    assert [name for name, _ in copies] == list(modules)
    for name, network in copies:
        expected = expected | modules[name] if mode == "cascading" else modules[name]
        assert changed_layers(model, network) == expected
        assert not network.training


def test_layers_forget_to_what_a_fresh_layer_is() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(256, 99)))
    *_, (_, network) = randomised(model, torch.rand(1, 3, 4, 4))
    norm, head = network[1], network[4]
    assert norm.weight.unique().tolist() == norm.running_var.unique().tolist() == [1]
    assert norm.bias.unique().tolist() == norm.running_mean.unique().tolist() == [0]
    # PyTorch's linear layers draw uniformly within 1 / sqrt(fan-in).
    bound = 1 / math.sqrt(256)
    assert 0.99 * bound < head.weight.abs().max() <= bound
    assert float(head.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert network[0].weight.abs().max() <= 1 / math.sqrt(27)


def test_a_layer_draws_the_same_weights_in_both_modes() -> None:
    model, x = trained(Backwards()), torch.rand(1, 4)
    *_, (_, cascade) = randomised(model, x, seed=3)
    for name, network in randomised(model, x, mode="independent", seed=3):
        assert not changed_layers(network.get_submodule(name), cascade.get_submodule(name))


def test_seeds_repeat_and_differ() -> None:
    model, x = Backwards().eval(), torch.rand(1, 4)

    def weights(seed: int) -> Tensor:
        *_, (_, network) = randomised(model, x, seed=seed)
        return torch.cat([parameter.flatten() for parameter in network.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    *_, (_, network) = randomised(model, x)
    assert not torch.equal(network.twice.weight, network.middle.weight)  # alike layers draw different weights


def test_the_callers_copy_is_the_callers() -> None:
    model, x = Backwards().eval(), torch.rand(1, 4)
    whole = [network for _, network in randomised(model, x)]
    for (_, network), untouched in zip(randomised(model, x), whole, strict=True):
        assert not changed_layers(network, untouched)
        trained(network)


def test_a_cascade_goes_through_layers_it_does_not_stop_at() -> None:
    model, x = Backwards().eval(), torch.rand(1, 4)
    whole = dict(randomised(model, x))
    some = list(randomised(model, x, layers=["first_norm", "twice"]))
    assert [name for name, _ in some] == ["twice", "first_norm"]
    for name, network in some:
        assert not changed_layers(network, whole[name])


def test_shared_weights_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    model[0].weight = model[2].weight
    _, network = next(randomised(model, torch.rand(1, 4)))
    assert network[0].weight is network[2].weight
    assert network[0].weight is not model[0].weight


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_statistics_can_be_measured_anew(mode: str) -> None:
    model = trained(
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
    )
    x = noise(50, 4)
    with unchanged(model, x):
        (_, top), (_, bottom) = randomised(model, x, mode=mode, calibration=x)
    for network in (top, bottom):
        assert not any(module.training for module in network.modules())
        assert network[1].momentum == network[4].momentum == 0.1
    h = top[:3](x)
    assert torch.allclose(top[4].running_mean, top[3](h).mean(0), atol=1e-5)
    assert torch.allclose(top[4].running_var, top[3](h).var(0), rtol=1e-4)
    assert top[1].running_mean.equal(model[1].running_mean)
    assert torch.allclose(bottom[1].running_mean, bottom[0](x).mean(0), atol=1e-5)
    # What the second normalisation is given comes from the first one, as in training by the batch's own statistics.
    h = torch.batch_norm(bottom[0](x), None, None, None, None, True, 0, 1e-5, False).relu()
    if mode == "cascading":
        assert torch.allclose(bottom[4].running_mean, bottom[3](h).mean(0), atol=1e-5)
        assert not bottom[4].running_mean.equal(top[4].running_mean)
    else:
        assert bottom[4].running_mean.equal(model[4].running_mean)


def test_networks_that_cannot_forget_are_answered() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    x = torch.rand(2, 4)
    with pytest.raises(PathwayError, match="layer '1' is a Scale without reset_parameters"):
        randomised(nn.Sequential(nn.Linear(4, 3), Scale()).eval(), x)
    with pytest.raises(PathwayError, match="nothing to randomise"):
        randomised(nn.Sequential(nn.ReLU()).eval(), x)
    with pytest.raises(PathwayError, match="mode is 'random'; give one of 'cascading', 'independent'"):
        randomised(Backwards().eval(), x, mode="random")
    for wrong in (["never"], []):
        with pytest.raises(PathwayError, match=r"layers is \[.*the network has 'head', 'twice'"):
            randomised(Backwards().eval(), x, layers=wrong)
    with pytest.raises(PathwayError, match="training mode"):
        randomised(Backwards(), x)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_whose_reset_misses_their_weights_are_answered() -> None:
    # What their weight is computed from stays, as reset_parameters writes into the result.
    normalised = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3))
    copies = randomised(normalised.eval(), torch.rand(1, 4))
    assert next(copies)[0] == "2"
    with pytest.raises(PathwayError, match=r"layer '0' keeps its weights .*remove_parametrizations"):
        next(copies)
    # Of old a hook computed it in each run, with a graph that no copy can take along.
    normalised = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(48, 5)), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.rand(2, 3, 4, 4)
    normalised(x)
    for mode in ("cascading", "independent"):
        with unchanged(normalised, x):
            copies = randomised(normalised, x, mode=mode)
            assert next(copies)[0] == "3"
            with pytest.raises(PathwayError, match=r"layer '1' keeps its weights .*remove_weight_norm"):
                next(copies)
    with pytest.raises(PathwayError, match="layer '1' keeps its weights"):
        sanity_check(explainers()["gradient"], normalised, x, similarities=WITHOUT_SMALL_MAPS)
    nn.utils.remove_weight_norm(normalised[1])
    found = sanity_check(explainers()["gradient"], normalised, x, similarities=WITHOUT_SMALL_MAPS)
    assert found.layers == ("3", "1")
    # A reset that says what the layer is already is a reset.
    assert len(list(randomised(nn.Sequential(nn.LayerNorm((2, 4)), nn.ReLU()).eval(), torch.rand(1, 2, 4)))) == 1


# --- The check -------------------------------------------------------------------------------------------------------


def edges(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Detect edges, whatever the network."""
    return x - x.roll(1, -1)


def of_target(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Show the class that was asked for, whatever the network."""
    return (torch.arange(x[0].numel()) % 13 == target[:, None]).to(x).view_as(x)


def first_layer(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Show what the first layer, and nothing after it, makes of the image."""
    return model.stem(x).mean(1, keepdim=True).expand_as(x)


def layers_of(model: RandomNetwork, x: Tensor) -> tuple[str, ...]:
    layers = randomisable_layers(model, x)
    assert layers[0] == "head"
    assert layers[-1] == "stem"
    return layers


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_what_does_not_look_at_the_network_scores_one(mode: str) -> None:
    model = small_network()
    x = model.inputs(3)
    controls = {name: explainers()[name] for name in ("random", "centre")} | {"edges": edges, "target": of_target}
    with unchanged(model, x):
        found = sanity_check(controls, model, x, mode=mode, draws=2)
    assert found.layers == layers_of(model, x)
    assert found.similarity.keys() == {(name, measure) for name in controls for measure in SIMILARITIES}
    for values in found.similarity.values():
        assert values.shape == (len(found.layers), 2, 3)
        assert torch.allclose(values, torch.ones_like(values))


def test_what_depends_on_one_layer_tells_which() -> None:
    model = small_network()
    x = model.inputs(3)
    for mode in ("cascading", "independent"):
        found = sanity_check(first_layer, model, x, mode=mode, similarities=WITHOUT_SMALL_MAPS)
        for measure in WITHOUT_SMALL_MAPS:
            values = found.similarity["explainer", measure]
            assert torch.allclose(values[:-1], torch.ones_like(values[:-1]))
            assert values[-1].max() < 1


def test_weights_that_are_drawn_to_be_the_same_change_nothing() -> None:
    class Fixed(nn.Linear):
        def reset_parameters(self) -> None:
            with torch.no_grad():
                self.weight.copy_(torch.arange(self.weight.numel()).view_as(self.weight).sin())
                self.bias.zero_()

    model = nn.Sequential(nn.Flatten(), Fixed(48, 9), nn.ReLU(), Fixed(9, 4)).eval()
    found = sanity_check(explainers()["gradient"], model, torch.rand(3, 3, 4, 4), similarities=WITHOUT_SMALL_MAPS)
    assert min(float(values.min()) for values in found.similarity.values()) == pytest.approx(1)


def test_gradient_of_a_linear_model_is_compared_with_its_new_weights() -> None:
    # The first layer lets every pixel through: the map of class t is row t of the last layer.
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(48, 5)).eval()
    x, target = 0.1 + torch.rand(4, 3, 4, 4), torch.tensor([0, 3, 3, 1])
    found = sanity_check(explainers()["gradient"], model, x, target, draws=2, seed=5, similarities=WITHOUT_SMALL_MAPS)
    for draw in range(2):
        _, network = next(randomised(model, x, seed=5 + draw))
        rows = [m[2].weight[target].view(4, 3, 4, 4).sum(1).flatten(1).detach().numpy() for m in (model, network)]
        expected = [spearmanr(a, b).statistic for a, b in zip(*rows, strict=True)]
        assert found.similarity["explainer", "Spearman"][0, draw].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_class_stays_that_of_the_given_network() -> None:
    model = small_network(3)
    x = model.inputs(16)
    asked: list[Tensor] = []

    def note(network: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        asked.append(target)
        return images

    found = sanity_check(note, model, x, similarities=WITHOUT_SMALL_MAPS, draws=2)
    predicted = model(x).argmax(1)
    assert torch.equal(found.targets, predicted)
    assert len(asked) == 1 + 2 * len(found.layers)
    assert all(torch.equal(targets, predicted) for targets in asked)
    _, network = next(randomised(model, x))
    assert not torch.equal(network(x).argmax(1), predicted)  # or there was nothing to stay with


def check(model: nn.Module, x: Tensor, **settings: object) -> SanityCheck:
    methods = {name: explainers(n_steps=2)[name] for name in ("gradient", "pathway gradient MCT 0.9")}
    return sanity_check(methods, model, x, similarities=WITHOUT_SMALL_MAPS, **settings)  # type: ignore[arg-type]


def test_batches_draws_and_stops_do_not_change_results() -> None:
    model = small_network()
    x = model.inputs(5)
    with unchanged(model, x):
        found = check(model, x, draws=2)
    again, in_batches, alone = check(model, x, draws=2), check(model, x, draws=2, batch_size=2), check(model, x, seed=1)
    some = check(model, x, draws=2, layers=[found.layers[1], found.layers[-1]])
    single = check(model, x[3:4], draws=2)
    for key, values in found.similarity.items():
        assert torch.equal(again.similarity[key], values)
        assert torch.allclose(in_batches.similarity[key], values)
        assert torch.allclose(alone.similarity[key][:, 0], values[:, 1])
        assert torch.equal(some.similarity[key], values[[1, -1]])
        assert torch.allclose(single.similarity[key], values[..., 3:4])
        assert not torch.equal(values[:, 0], values[:, 1])


def test_noise_of_the_weights_passes_without_saying_anything() -> None:
    def of_weights(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        seed = hash(tuple(model.head.weight.flatten().tolist())) % 2**31
        return torch.randn(x[0].shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).expand_as(x)

    model = small_network()
    found = sanity_check(of_weights, model, model.inputs(2), similarities=WITHOUT_SMALL_MAPS, draws=20)
    assert abs(float(found.draws("explainer", "Spearman").mean())) < 0.1


def test_summaries_are_means_over_images_and_draws() -> None:
    values = torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(0))
    found = SanityCheck(("b", "a"), "cascading", torch.zeros(10), {("m", "IoU"): values})
    assert torch.equal(found.draws("m", "IoU"), values.mean(2))
    expected = [bootstrap_interval(values[layer].mean(0)) for layer in range(2)]
    assert found.intervals("m", "IoU") == expected
    rows = list(found.rows())
    assert [(row["layer"], row["depth"], row["method"], row["mode"]) for row in rows] == [
        ("b", 0, "m", "cascading"),
        ("a", 1, "m", "cascading"),
    ]
    assert rows[1]["value"] == pytest.approx(float(values[1].mean()))
    assert (rows[1]["low"], rows[1]["high"]) == expected[1].bounds
    assert rows[1]["lowest draw"] == pytest.approx(float(values[1].mean(1).min()))
    assert rows[1]["highest draw"] == pytest.approx(float(values[1].mean(1).max()))
    assert (rows[1]["draws"], rows[1]["images"]) == (3, 10)
    with pytest.raises(PathwayError, match="'SSIM' of 'm' was not checked; checked are 'IoU' of 'm'"):
        found.draws("m", "SSIM")


@pytest.mark.filterwarnings("ignore:Setting backward hooks")  # Captum's notice
@pytest.mark.parametrize("name", list(explainers(n_steps=2, samples=2)))
def test_every_explainer_of_a_network_with_shared_activations_in_place(name: str) -> None:
    model, x = load_model("cifar10-resnet8"), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with unchanged(model, x):
        found = sanity_check(explainers(n_steps=2, samples=2)[name], model, x, draws=1, layers=["9", "1"])
    for values in found.similarity.values():
        assert values.isfinite().all()
        assert float(values.abs().max()) <= 1 + 1e-9
        assert bool(values.isclose(torch.ones_like(values)).all()) == (name in ("random", "centre"))


def test_calibration_reaches_the_copies() -> None:
    model, x = load_model("cifar10-resnet8"), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"draws": 1, "layers": ["1"], "similarities": WITHOUT_SMALL_MAPS}
    gradient = explainers()["gradient"]
    found = sanity_check(gradient, model, x, calibration=x, **settings)  # type: ignore[arg-type]
    _, network = next(randomised(model, x, layers=["1"], calibration=x))
    targets = targets_of(model, x)
    expected = SIMILARITIES["Spearman"](explain(gradient, model, x, targets), explain(gradient, network, x, targets))
    assert torch.equal(found.similarity["explainer", "Spearman"][0, 0], expected)
    plain = sanity_check(gradient, model, x, **settings)  # type: ignore[arg-type]
    assert not torch.equal(plain.similarity["explainer", "Spearman"], found.similarity["explainer", "Spearman"])


def test_what_cannot_be_checked_is_answered() -> None:
    model = small_network()
    x = model.inputs(2)
    never: Callable[..., Tensor] = lambda *_: pytest.fail("called before the settings were looked at")  # noqa: E731
    for wrong, message in (
        ({"draws": 0}, "draws is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"mode": "both"}, "mode is 'both'"),
        ({"layers": ["nowhere"]}, "layers is"),
        ({"similarities": {}}, "1 explainers and 0 measures"),
        ({"target": 99}, "out of range"),
    ):
        with pytest.raises(PathwayError, match=message):
            sanity_check(never, model, x, **wrong)  # type: ignore[arg-type]
    with pytest.raises(PathwayError, match="0 explainers"):
        sanity_check({}, model, x)
    with pytest.raises(PathwayError, match="no selectors"):
        pathway_sanity_check({}, model, x)
    with pytest.raises(PathwayError, match="batch_size is 0"):
        pathway_sanity_check(ActiveNeurons(), model, x, batch_size=0)
    with pytest.raises(PathwayError, match="NaN or infinity"):
        sanity_check(lambda model, x, target: x / 0, model, x)


# --- Pathways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_pathways_are_compared_by_their_overlap(mode: str) -> None:
    model = small_network()
    x = model.inputs(5)
    selectors = {"MCT": NeuronMCT(0.8), "active": ActiveNeurons(), "random": RandomSelection(0.8)}
    with unchanged(model, x):
        found = pathway_sanity_check(selectors, model, x, mode=mode, draws=2, batch_size=5)
    predicted = model(x).argmax(1)
    for name, selector in selectors.items():
        given = selector(model, x, predicted)
        for draw in range(2):
            for layer, (_, network) in enumerate(randomised(model, x, mode=mode, seed=draw)):
                expected = given.iou(selector(network, x, predicted))
                assert torch.equal(found.similarity[name, "IoU"][layer, draw], expected)
    # Random neurons do not look at the network, and those that are active do not look at its head.
    assert found.similarity["random", "IoU"].unique().tolist() == [1]
    assert found.similarity["active", "IoU"][0].unique().tolist() == [1]
    assert found.draws("active", "IoU")[1:].max() < 1
    assert found.draws("MCT", "IoU").max() < 1


def test_pathways_do_not_depend_on_batches() -> None:
    model = small_network()
    x = model.inputs(5)
    found, in_batches = (pathway_sanity_check(NeuronMCT(0.8), model, x, batch_size=size) for size in (64, 2))
    assert torch.equal(found.similarity["selector", "IoU"], in_batches.similarity["selector", "IoU"])


def test_a_selector_gets_the_class_of_the_given_network() -> None:
    model = small_network(3)
    x = model.inputs(16)
    asked: list[Tensor] = []

    def note(network: nn.Module, images: Tensor, target: Tensor) -> Pathway:
        asked.append(target)
        return ActiveNeurons()(network, images, target)

    found = pathway_sanity_check(note, model, x, draws=1)  # type: ignore[arg-type]
    assert all(torch.equal(targets, found.targets) for targets in asked)
    assert torch.equal(found.targets, model(x).argmax(1))


# --- The figure ------------------------------------------------------------------------------------------------------


def test_the_figure_starts_at_the_trained_network() -> None:
    found = SanityCheck(
        ("fc", "conv"), "cascading", torch.zeros(4), {("m", "IoU"): torch.tensor([[[0.1, 0.3, 0.5, 0.7]], [[0.0] * 4]])}
    )
    with plt.rc_context({"backend": "agg"}):
        figure = show_sanity_check(found.layers, {"m": found.intervals("m", "IoU")}, ylabel="IoU")
    axis = figure.axes[0]
    assert axis.lines[0].get_ydata().tolist() == pytest.approx([1.0, 0.4, 0.0])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["none", "fc", "conv"]
    assert axis.get_ylabel() == "IoU"
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert found.intervals("m", "IoU")[0].low == pytest.approx(sorted(band[band > 0.01])[0])
    plt.close(figure)
    with pytest.raises(PathwayError, match="'m' has values of shape"):
        show_sanity_check(["fc"], {"m": found.intervals("m", "IoU")})
    plt.close("all")
