"""pathwaylib.evaluation against closed forms."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import unchanged
from scipy.stats import binom
from torch import Tensor, nn

from pathwaylib import (
    ActiveNeurons,
    Interval,
    NeuronMCT,
    Pathway,
    PathwayError,
    blind,
    bootstrap_interval,
    class_overlap,
    class_similarity,
    confidence,
    dead_share,
    load_model,
    masked,
    method_similarity,
    observe,
    pairwise_iou,
    planted,
    prediction_kept,
)
from pathwaylib.evaluation import pathways as pathways_module


def pathway(*rows: str) -> Pathway:
    return Pathway((torch.tensor([[bit == "1" for bit in row] for row in rows]),), ("relu_0",))


@pytest.fixture
def net() -> nn.Sequential:
    """a = relu(x); logits are (a0, a1), so that a mask decides the prediction by itself."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[2].weight.copy_(torch.eye(2))
    return net


def test_dead_share_counts_the_dead_among_the_kept() -> None:
    active = pathway("1100", "1100", "1100", "0000")
    kept = pathway("1010", "1100", "0000", "1111")
    # One of two; none of two; nothing kept, so 0; all of four.
    assert dead_share(kept, active).tolist() == [0.5, 0.0, 0.0, 1.0]


def test_dead_share_takes_activations_and_pools_sites() -> None:
    x = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    two_sites = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(2, 2)).eval()
    seen = observe(two_sites, x)
    everything = Pathway(tuple(torch.ones_like(a, dtype=torch.bool) for a in seen.post), seen.sites)
    assert dead_share(everything, seen).tolist() == [0.5, 1.0]
    assert dead_share(everything, seen.active()).tolist() == [0.5, 1.0]


def test_dead_is_measured_in_the_unmasked_network() -> None:
    # The second neuron is held down by the first, and wakes up when the first is removed.
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        for layer, weight, bias in ((net[0], 1.0, 0.0), (net[2], -2.0, 1.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    x = torch.ones(1, 1)
    kept = Pathway((torch.tensor([[False]]), torch.tensor([[True]])), ("relu_0", "relu_1"))
    with masked(kept):
        assert observe(net, x).post[1].item() == 1.0
    assert dead_share(kept, observe(net, x)).tolist() == [1.0]


def test_dead_share_of_other_network_is_refused() -> None:
    with pytest.raises(PathwayError, match="different networks"):
        dead_share(pathway("10"), pathway("100"))


def test_prediction_kept_follows_the_mask(net: nn.Sequential) -> None:
    x = torch.tensor([[2.0, 1.0]] * 3)
    assert prediction_kept(net, x, pathway("10", "01", "11")).tolist() == [True, False, True]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_do_not_change_results(net: nn.Sequential, batch_size: int) -> None:
    x = torch.tensor([[2.0, 1.0], [1.0, 3.0], [2.0, 1.0]])
    kept = pathway("10", "10", "01")
    assert prediction_kept(net, x, kept, batch_size=batch_size).tolist() == [True, False, False]
    assert torch.equal(confidence(net, x, kept, batch_size=batch_size), confidence(net, x, kept))
    assert prediction_kept(net, x, pathway("11"), batch_size=batch_size).all()


def test_confidence_is_the_softmax_of_the_whole_networks_class(net: nn.Sequential) -> None:
    x = torch.tensor([[2.0, 1.0]])
    assert confidence(net, x).item() == pytest.approx(1 / (1 + np.exp(-1)))
    # Without neuron 0 the logits are (0, 1), and the class is still 0.
    assert confidence(net, x, pathway("01")).item() == pytest.approx(1 / (1 + np.e))
    assert confidence(net, x, pathway("01"), target=1).item() == pytest.approx(1 / (1 + np.exp(-1)))


@pytest.mark.parametrize(("name", "cut"), [("planted-cnn", True), ("cifar10-resnet8", False)])
def test_an_empty_site_cuts_a_chain_and_not_a_residual_network(name: str, cut: bool) -> None:
    model, x = load_model(name), planted(6, seed=3)[:6][0]
    whole = NeuronMCT(0.5)(model, x)
    assert not blind(model, x, whole, batch_size=4).any()
    gap = Pathway(tuple(mask & (index != 1) for index, mask in enumerate(whole.masks)), whole.sites, whole.targets)
    assert blind(model, x, gap).tolist() == [cut] * 6
    with torch.no_grad(), masked(gap[0]):
        answers = model(x)
    assert bool((answers == answers[0]).all()) == cut  # one pathway: the same answer, whatever the input
    assert blind(model, x, gap[0]).tolist() == [cut] * 6


def test_blind_says_where_gradients_cannot_tell(net: nn.Sequential) -> None:
    x, everything = torch.ones(1, 2), pathway("11")
    with torch.inference_mode(), pytest.raises(PathwayError, match="inference_mode"):
        blind(net, x, everything)
    # Gradients this small are 0 in float16; bfloat16 has the range of float32.
    with torch.no_grad():
        net[0].weight.mul_(1e-5)
        net[2].weight.mul_(1e-5)
    assert blind(net.bfloat16(), x.bfloat16(), everything).tolist() == [False]
    with pytest.raises(PathwayError, match=r"float16.*model\.float\(\)"):
        blind(net.half(), x.half(), everything)


def test_wrong_sizes_are_answered(net: nn.Sequential) -> None:
    x = torch.ones(3, 2)
    with pytest.raises(PathwayError, match="2 inputs, the batch 3"):
        prediction_kept(net, x, pathway("10", "01"))
    with pytest.raises(PathwayError, match="batch_size is 0"):
        prediction_kept(net, x, pathway("10"), batch_size=0)
    with pytest.raises(PathwayError, match=r"of shape"):
        prediction_kept(net, x, pathway("100"))
    with pytest.raises(PathwayError, match="training mode"):
        prediction_kept(net.train(), x, pathway("10"))


def test_a_network_that_normalises_in_place_leaves_the_images() -> None:
    class Normalised(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5).div_(0.25))

    model, x = Normalised(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), torch.rand(3, 4)
    everything = Pathway((torch.ones(1, 6, dtype=torch.bool),), ("relu_0",))
    with unchanged(model, x):
        assert torch.equal(confidence(model, x, everything), confidence(model, x))
        assert not blind(model, x, everything).any()


@pytest.mark.parametrize("measure", [prediction_kept, blind])
def test_a_pathway_of_a_shallower_network_is_refused(measure: Callable[..., Tensor]) -> None:
    # Its one site fits both of this network's, as if it had run twice.
    deeper = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with pytest.raises(PathwayError, match="1 sites, but 2 activation calls"):
        measure(deeper, torch.rand(1, 2), pathway("11"))


@pytest.mark.parametrize("measure", [prediction_kept, blind])
def test_logits_that_are_not_finite_are_answered(net: nn.Sequential, measure: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        net[2].weight[0, 0] = torch.nan
    with pytest.raises(PathwayError, match=r"'2\.weight' holds NaN"):
        measure(net, torch.ones(1, 2), pathway("11"))


def test_contribution_pathways_hold_no_dead_neuron() -> None:
    net = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    active = ActiveNeurons()(net, x)
    for sparsity in (0.0, 0.5, 0.9):
        assert dead_share(NeuronMCT(sparsity)(net, x), active).tolist() == [0.0] * 8


def test_interval_is_the_binomials_quantiles() -> None:
    # The mean of a bootstrap draw of 0s and 1s is binomial, so the percentile interval has a closed form.
    found = bootstrap_interval([1] * 70 + [0] * 30, resamples=20_000)
    low, high = binom(100, 0.7).ppf([0.025, 0.975]) / 100
    assert found.value == pytest.approx(0.7)
    assert found.low == pytest.approx(low, abs=0.011)
    assert found.high == pytest.approx(high, abs=0.011)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [
        low <= 0 <= high
        for _, low, high in (bootstrap_interval(rng.normal(size=100), resamples=400) for _ in range(300))
    ]
    assert 0.90 <= np.mean(covered) <= 0.98


def test_interval_of_equal_values_has_no_width() -> None:
    assert bootstrap_interval(torch.ones(5, dtype=torch.bool)) == Interval(1.0, 1.0, 1.0)
    assert bootstrap_interval([0.25] * 3, np.median).bounds == (0.25, 0.25)


def test_interval_is_repeatable_and_takes_other_statistics() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values) == bootstrap_interval(values.numpy())
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=np.random.default_rng(0)) == bootstrap_interval(values)
    median, low, high = bootstrap_interval(values, np.median)
    assert median == pytest.approx(np.median(values.numpy()))
    assert low <= median <= high
    without_axis = bootstrap_interval(values, lambda sample: float(np.sort(sample)[-1]), resamples=50)
    assert without_axis.value == pytest.approx(float(values.max()))


def test_wider_level_gives_wider_interval() -> None:
    values = np.arange(30.0)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least two"),
        ([1.0], {}, "at least two"),
        ([[1.0, 2.0]], {}, "at least two"),
        ([1.0, float("nan")], {}, "NaN"),
        ([1.0, 2.0], {"level": 1.0}, "level"),
        ([1.0, 2.0], {"resamples": 0}, "resample"),
    ],
)
def test_what_has_no_interval_is_answered(values: list[float], options: dict[str, float], message: str) -> None:
    with pytest.raises(PathwayError, match=message):
        bootstrap_interval(values, **options)


Sets = list[list[set[int]]]  # by input, by site: the neurons kept


def random_pathways(count: int, seed: int, sizes: tuple[tuple[int, ...], ...] = ((3, 2, 2), (5,))) -> Pathway:
    """Return pathways of every density, empty ones among them."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(count, len(sizes), generator=generator) * (torch.rand(count, 1, generator=generator) > 0.2)
    masks = tuple(
        torch.rand(count, *size, generator=generator) < density[:, site].view(-1, *[1] * len(size))
        for site, size in enumerate(sizes)
    )
    return Pathway(masks, tuple(f"relu_{site}" for site in range(len(sizes))))


def as_sets(pathway: Pathway) -> Sets:
    """Return each input's neurons by site, and over all sites last."""
    found: Sets = []
    for index in range(len(pathway)):
        sites = [set(mask[index].flatten().nonzero()[:, 0].tolist()) for mask in pathway.masks]
        found.append([*sites, {(site, neuron) for site, kept in enumerate(sites) for neuron in kept}])  # type: ignore[list-item]
    return found


def set_iou(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_pairwise_iou_is_set_arithmetic(count: int, others: int, seed: int) -> None:
    one, other = random_pathways(count, seed), random_pathways(others, seed + 1)
    expected = torch.tensor(
        [[[set_iou(a[site], b[site]) for b in as_sets(other)] for a in as_sets(one)] for site in range(3)]
    )
    assert torch.allclose(pairwise_iou(one, other, per_site=True), expected[:2])
    assert torch.allclose(pairwise_iou(one, other), expected[2])
    assert torch.equal(pairwise_iou(one), pairwise_iou(one, one))
    assert torch.equal(pairwise_iou(one).diagonal(), torch.ones(count))
    assert torch.allclose(pairwise_iou(one, other)[:, 0], one.iou(other[0]))


def test_blocks_of_neurons_do_not_change_the_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    pathway = random_pathways(5, 0)
    whole = pairwise_iou(pathway, per_site=True)
    monkeypatch.setattr(pathways_module, "_COLUMNS_AT_ONCE", 3)
    assert torch.equal(pairwise_iou(pathway, per_site=True), whole)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=6), st.integers(0, 1000))
def test_class_similarity_is_the_mean_over_pairs(more: list[int], seed: int) -> None:
    labels = [0, 1, 2, 2, 1, 0, *more]
    pathway = random_pathways(len(labels), seed)
    sets = as_sets(pathway)
    expected = torch.empty(3, 3, 3)
    for site, k, m in itertools.product(range(3), repeat=3):
        pairs = [
            set_iou(sets[i][site], sets[j][site])
            for i, j in itertools.permutations(range(len(labels)), 2)
            if labels[i] == k and labels[j] == m
        ]
        expected[site, k, m] = float(np.mean(pairs))
    assert torch.allclose(class_similarity(pathway, torch.tensor(labels), 3, per_site=True), expected[:2], atol=1e-6)
    assert torch.allclose(class_similarity(pathway, torch.tensor(labels)), expected[2], atol=1e-6)


def test_class_overlap_is_the_mean_over_pairs() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1, 2, 0, 1])
    pathway = random_pathways(len(labels), 3)
    found = class_overlap(pathway, labels, resamples=50)
    assert list(found) == ["relu_0", "relu_1", "all"]
    sets = as_sets(pathway)
    for site, (within, between, difference) in enumerate(found.values()):
        pairs = {True: [], False: []}
        for i, j in itertools.combinations(range(len(labels)), 2):
            pairs[bool(labels[i] == labels[j])].append(set_iou(sets[i][site], sets[j][site]))
        assert within.value == pytest.approx(np.mean(pairs[True]), abs=1e-6)
        assert between.value == pytest.approx(np.mean(pairs[False]), abs=1e-6)
        assert difference.value == pytest.approx(within.value - between.value, abs=1e-6)
        assert all(low <= value <= high for value, low, high in (within, between, difference))


def test_class_overlap_draws_inputs_and_not_pairs() -> None:
    labels = torch.arange(24) % 2
    pathway = random_pathways(24, 5)
    ious = pairwise_iou(pathway).numpy()
    within, between, differences = [], [], []
    rng = np.random.default_rng(1)
    for _ in range(4_000):
        drawn = rng.integers(24, size=24)
        values = ious[np.ix_(drawn, drawn)]
        same, itself = labels[drawn][:, None] == labels[drawn], drawn[:, None] == drawn
        within.append(values[same.numpy() & ~itself].mean())
        between.append(values[~same.numpy()].mean())
        differences.append(within[-1] - between[-1])
    found = class_overlap(pathway, labels, resamples=4_000)["all"]
    for interval, draws in zip(found, (within, between, differences), strict=True):
        assert interval.bounds == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.015)
    assert class_overlap(pathway, labels, resamples=50, seed=1) != class_overlap(pathway, labels, resamples=50)
    assert class_overlap(pathway, labels, resamples=50) == class_overlap(pathway, labels, resamples=50)


def test_class_overlap_covers_the_truth_as_often_as_it_says() -> None:
    # Each input keeps each of 30 neurons with its own probability: the truth is the mean over very many inputs.
    def draw(count: int, generator: torch.Generator) -> Pathway:
        density = 0.2 + 0.6 * torch.rand(count, 1, generator=generator)
        return Pathway((torch.rand(count, 30, generator=generator) < density,), ("relu_0",))

    generator = torch.Generator().manual_seed(0)
    truth = float(pairwise_iou(draw(2_000, generator), draw(2_000, generator)).mean())
    labels = torch.arange(40) % 2
    covered = []
    for _ in range(150):
        _, low, high = class_overlap(draw(40, generator), labels, resamples=300)["all"].between
        covered.append(low <= truth <= high)
    # Intervals over the pairs, or over each input's own mean, cover it in less than 75 %.
    assert 0.88 <= np.mean(covered) <= 0.99


def test_method_similarity_is_the_mean_over_inputs() -> None:
    pathways = {name: random_pathways(5, seed) for seed, name in enumerate("abc")}
    by_site, together = method_similarity(pathways, per_site=True), method_similarity(pathways)
    assert by_site.shape == (2, 3, 3)
    sets = [as_sets(pathway) for pathway in pathways.values()]
    for m, n in itertools.product(range(3), repeat=2):
        means = [
            np.mean([set_iou(a[site], b[site]) for a, b in zip(sets[m], sets[n], strict=True)]) for site in range(3)
        ]
        assert by_site[:, m, n].tolist() == pytest.approx(means[:2])
        assert together[m, n].item() == pytest.approx(means[2])


def test_overlap_of_what_does_not_fit_is_answered() -> None:
    kept = random_pathways(4, 0)
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(PathwayError, match="different networks"):
        pairwise_iou(kept, random_pathways(4, 0, ((3, 2, 2), (4,))))
    with pytest.raises(PathwayError, match=r"different numbers of inputs.*'b': 3"):
        method_similarity({"a": kept, "b": kept[:3]})
    with pytest.raises(PathwayError, match=r"different numbers of inputs.*'b': 1"):
        method_similarity({"a": kept, "b": kept[:1]})
    with pytest.raises(PathwayError, match="no pathways"):
        method_similarity({})
    for wrong in (labels[:3], labels.float(), labels.bool(), labels[:, None]):
        for measure in (class_similarity, class_overlap):
            with pytest.raises(PathwayError, match="labels are"):
                measure(kept, wrong)
    with pytest.raises(PathwayError, match="label -1"):
        class_similarity(kept, labels - 1)
    with pytest.raises(PathwayError, match="label 1 is out of range; there are 1 classes"):
        class_similarity(kept, labels, 1)
    with pytest.raises(PathwayError, match="class 2 has 0 inputs"):
        class_similarity(kept, labels, 3)
    with pytest.raises(PathwayError, match="class 1 has 1 inputs"):
        class_similarity(kept, torch.tensor([0, 0, 1, 0]))
    for alone in (torch.zeros(4, dtype=torch.long), torch.arange(4)):
        with pytest.raises(PathwayError, match="holds no two"):
            class_overlap(kept, alone)
