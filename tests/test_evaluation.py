"""pathwaylib.evaluation against closed forms."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from pathwaylib import (
    ActiveNeurons,
    Interval,
    NeuronMCT,
    Pathway,
    PathwayError,
    bootstrap_interval,
    confidence,
    dead_share,
    masked,
    observe,
    prediction_kept,
)


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
