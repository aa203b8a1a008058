"""Scores against exact ablation, autograd Jacobians and closed forms; exact k, with ties."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Block, RandomNetwork, Record, networks, small_network, unchanged
from torch import Tensor, nn
from torch.func import jacrev

from pathwaylib import ActiveNeurons, Contributions, NeuronMCT, PathwayError, PathwayGradient, observe, taylor
from pathwaylib.ranking import _scatter


def of_scores(*scores: Tensor) -> Contributions:
    return Contributions(scores, tuple(f"relu_{index}" for index in range(len(scores))))


# --- the scores ---


@given(networks(), st.integers(1, 3), st.integers(0, 2))
def test_taylor_is_activation_times_jacobian(network: RandomNetwork, count: int, target: int) -> None:
    x, record = network.inputs(count), Record()
    with torch.no_grad():
        network.reference(x, record=record)
    zeros = tuple(torch.zeros_like(a) for a in record.post)
    # d logits / d (what is added to the activations), at 0; summed over the batch, whose entries do not mix.
    jacobians = jacrev(lambda added: network.reference(x, added=added).sum(0))(zeros)
    found = taylor(network, x, target)
    assert len(found.scores) == len(record.post)
    for score, a, jacobian in zip(found.scores, record.post, jacobians, strict=True):
        expected = (a * jacobian[target]).detach()
        torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-12 * (1 + float(expected.abs().max())))
        assert (score[a == 0] == 0).all()  # dead neurons contribute nothing, exactly
        assert not score.requires_grad


@given(networks())
def test_taylor_at_the_last_site_is_exact_ablation(network: RandomNetwork) -> None:
    # Behind the last activation of these networks everything is linear, unless it is max-pooled or reused.
    last = network.blocks[-1]
    if last.form == "added" or last.pool == "max":
        return
    x, record = network.inputs(1), Record()
    with torch.no_grad():
        full = network.reference(x, record=record)
        score = taylor(network, x, 1).scores[-1].flatten()
        active = record.post[-1].flatten().nonzero()[:5, 0].tolist()
        for neuron in [*active, len(score) - 1]:
            masks = [torch.ones_like(a) for a in record.post]
            masks[-1].view(-1)[neuron] = 0
            lost = full[0, 1] - network.reference(x, masks)[0, 1]
            torch.testing.assert_close(score[neuron], lost, rtol=1e-9, atol=1e-9)


@given(networks(forms=("plain", "twice"), kinds=("relu", "leaky_relu"), homogeneous=True), st.integers(0, 2))
def test_scores_of_a_site_add_up_to_the_response_of_a_homogeneous_network(network: RandomNetwork, target: int) -> None:
    # Euler: Φ(λ a) = λ Φ(a) for λ > 0, so Σ a ∂Φ/∂a = Φ, at every site all paths go through.
    x = network.inputs(3)
    with torch.no_grad():
        logits = network.reference(x)[:, target]
    for score in taylor(network, x, target).scores:
        torch.testing.assert_close(
            score.flatten(1).sum(1), logits, rtol=1e-9, atol=1e-11 * (1 + float(logits.abs().max()))
        )


def test_by_hand() -> None:
    # z = (1, -1, 2), so a = (1, 0, 2); the logits read (3, 5, -1) and (0, 1, 4).
    network = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [-1.0], [2.0]]))
        network[0].bias.zero_()
        network[2].weight.copy_(torch.tensor([[3.0, 5.0, -1.0], [0.0, 1.0, 4.0]]))
        network[2].bias.fill_(7)
    x = torch.ones(2, 1)
    assert torch.equal(taylor(network, x, 0).scores[0], torch.tensor([[3.0, 0.0, -2.0]]).expand(2, 3))
    assert torch.equal(taylor(network, x, [0, 1]).scores[0], torch.tensor([[3.0, 0.0, -2.0], [0.0, 0.0, 8.0]]))
    predicted = taylor(network, x)  # logits (8, 15)
    assert predicted.targets is not None
    assert predicted.targets.tolist() == [1, 1]
    assert torch.equal(predicted.scores[0], torch.tensor([[0.0, 0.0, 8.0]]).expand(2, 3))


def test_site_without_influence_scores_zero() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            torch.relu(self.layer(x))  # computed and not used
            return self.head(torch.relu(self.layer(x + 1)))

    torch.manual_seed(0)  # some weights let no neuron speak
    unused, used = taylor(Detached().eval(), torch.rand(2, 3), 0).scores
    assert (unused == 0).all()
    assert (used != 0).any()


def test_a_network_that_stops_gradients_is_answered() -> None:
    class Stopping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = torch.relu(self[0](x))
            return self[1](torch.relu(h + 1))

    network, x = Stopping(nn.Linear(3, 4), nn.Linear(4, 2)).eval(), torch.rand(2, 3)
    with pytest.raises(PathwayError, match=r"activation of relu_0 carries no gradient"):
        NeuronMCT()(network, x)
    with pytest.raises(PathwayError, match=r"passes no gradient to the image"):
        PathwayGradient(network, ActiveNeurons()).attribute(x)


@given(networks())
def test_taylor_of_a_batch_is_the_loop(network: RandomNetwork) -> None:
    x = network.inputs(3)
    together = taylor(network, x, [0, 1, 2])
    for index in range(3):
        alone = taylor(network, x[index : index + 1], index)
        for a, b in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(a[index : index + 1], b, rtol=1e-9, atol=1e-9)


@given(networks())
def test_taylor_changes_nothing_and_needs_no_gradient_mode(network: RandomNetwork) -> None:
    x = network.inputs(2)
    with unchanged(network, x), torch.no_grad():
        without = taylor(network, x, 0)
    asked = x.clone().requires_grad_()
    with unchanged(network, asked):
        with_graph = taylor(network, asked, 0)
    assert all(torch.equal(a, b) for a, b in zip(without.scores, with_graph.scores, strict=True))
    network.requires_grad_(False)
    frozen = taylor(network, x, 0)
    assert all(torch.equal(a, b) for a, b in zip(without.scores, frozen.scores, strict=True))


@pytest.mark.parametrize(
    "target", [1, [1, 1, 1], torch.tensor([1, 1, 1]), torch.tensor(1), torch.tensor([1, 1, 1]).byte()]
)
def test_targets_may_be_given_in_every_way(target: object) -> None:
    network = small_network()
    x = network.inputs(3)
    found = taylor(network, x, target)
    assert found.targets is not None
    assert found.targets.dtype == torch.int64
    assert found.targets.tolist() == [1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(found.scores, taylor(network, x, 1).scores, strict=True))


def test_label_zero_is_a_label() -> None:
    # A falsy target must not be taken for "none given".
    network = small_network(seed=3)
    x = network.inputs(8)
    assert (network(x).argmax(1) != 0).any()
    assert taylor(network, x, 0).targets.tolist() == [0] * 8


def test_dtypes() -> None:
    network = small_network()
    x = network.inputs(2)
    exact = taylor(network, x, 0)
    assert exact.scores[0].dtype == torch.float64
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.4)):
        rough = taylor(network.to(dtype), x.to(dtype), 0)
        for a, b in zip(exact.scores, rough.scores, strict=True):
            assert b.dtype == dtype
            assert float((a - b.double()).norm() / a.norm()) < tolerance
        assert (rough.top(0.5).sizes > 0).all()


# --- the choice ---

SPARSITIES = [0, 0.0, 0.1, 0.25, 0.35, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999999]


@given(
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from(SPARSITIES),
    st.integers(0, 2**16),
    st.sampled_from([1, 3, 1000]),
)
def test_top_keeps_exactly_k_of_the_largest(batch: int, neurons: int, sparsity: float, seed: int, levels: int) -> None:
    # Few levels make many ties and many zeros.
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (batch, neurons), generator=generator).double() / 7
    before = scores.clone()
    split = neurons // 2
    parts = (scores[:, :split], scores[:, split:]) if split else (scores,)
    pathway = of_scores(*parts).top(sparsity)
    assert torch.equal(scores, before)
    k = round((1 - Fraction(str(sparsity))) * neurons)
    for row, kept in zip(scores.abs().tolist(), pathway.flatten().tolist(), strict=True):
        positive = sum(score > 0 for score in row)
        assert sum(kept) == min(k, positive)
        inside = [score for score, keep in zip(row, kept, strict=True) if keep]
        outside = [score for score, keep in zip(row, kept, strict=True) if not keep]
        assert all(score > 0 for score in inside)
        assert not inside or not outside or min(inside) >= max(outside) or sum(kept) == positive


@pytest.mark.parametrize(("sparsity", "k"), [(0.9, 100), (0.35, 650), (0.999, 1), (0.9995, 0), (0.0, 1000), (0.7, 300)])
def test_k_is_exact_where_floating_point_is_not(sparsity: float, k: int) -> None:
    assert of_scores(torch.rand(2, 1000) + 1).top(sparsity).sizes.tolist() == [k, k]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_tied_scores_keep_k_and_favour_no_position(fraction: float) -> None:
    # The published code kept 67 % whatever was asked; taking the first of the tied would favour early sites.
    kept = of_scores(torch.ones(1, 500), torch.ones(1, 500)).top(1 - fraction)
    assert kept.sizes.tolist() == [1000 * fraction]
    positions = kept.flatten()[0].nonzero()[:, 0].double()
    # The mean position of a random subset: 499.5 with a standard deviation of at most 289 sqrt((1 - f) / (1000 f)).
    assert abs(float(positions.mean()) - 499.5) < 4 * 289 * ((1 - fraction) / (1000 * fraction)) ** 0.5
    longest_gap = int(positions.diff().max())
    assert longest_gap < 12 / fraction
    assert (kept.site_sizes > 0.35 * 1000 * fraction).all()


def test_the_order_of_ties_is_one_to_one_and_scattered() -> None:
    places = _scatter(torch.arange(100_000))
    assert len(places.unique()) == 100_000
    first = places.argsort()[:1000].double()
    assert abs(float(first.mean()) - 50_000) < 4 * 28_868 / 1000**0.5


def test_ties_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (6, 400), generator=generator).float()
    scores[2] = 1
    together = of_scores(scores).top(0.6).flatten()
    assert torch.equal(of_scores(scores.flip(0)).top(0.6).flatten().flip(0), together)
    for index in range(6):
        assert torch.equal(of_scores(scores[index : index + 1]).top(0.6).flatten()[0], together[index])


def test_the_sign_does_not_matter_and_zeros_never_stay() -> None:
    scores = torch.tensor([[-5.0, 4.0, -0.0, 0.0, 3.0, -2.0]])
    assert of_scores(scores).top(0.5).flatten().tolist() == [[True, True, False, False, True, False]]
    assert of_scores(scores).top(0).flatten().tolist() == [[True, True, False, False, True, True]]
    assert of_scores(torch.zeros(2, 6)).top(0).sizes.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_smallest_numbers_count(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal
    scores = torch.tensor([[0.0, least, 2 * least, -3 * least, 0.0]], dtype=dtype)
    assert (scores != 0).sum() == 3
    assert of_scores(scores).top(0).sizes.tolist() == [3]
    assert of_scores(scores).top(0.6).flatten().tolist() == [[False, False, True, True, False]]


def test_large_rows_against_a_full_sort() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 60_000, generator=generator) ** 3
    scores[1, 20_000:] = 0  # most of them dead
    scores[2] = scores[2].round(decimals=1)  # thousands of ties
    for sparsity in (0.05, 0.5, 0.9, 0.999):
        kept = of_scores(scores.view(3, 60, 10, 100)).top(sparsity).flatten()
        k = round(60_000 * (1 - Fraction(str(sparsity))))
        for row, mask in zip(scores.abs(), kept, strict=True):
            assert int(mask.sum()) == min(k, int((row > 0).sum()))
            best = row.sort(descending=True).values[: int(mask.sum())]
            assert torch.equal(row[mask].sort(descending=True).values, best)


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 1.5, float("nan"), float("inf"), -1e-9])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(PathwayError, match=rf"sparsity is {sparsity}.*\[0, 1\)"):
        of_scores(torch.rand(1, 4)).top(sparsity)


def test_pathway_knows_sites_shapes_and_targets() -> None:
    network = RandomNetwork(
        [Block("twice", "F.relu", pool="max"), Block("plain", "nn.ReLU6")], images=True, pooled_head=True
    )
    x = network.inputs(2)
    scores = taylor(network, x, [2, 0])
    pathway = scores.top(0.5)
    seen = observe(network, x)
    assert pathway.sites == scores.sites == seen.sites
    assert [mask.shape for mask in pathway.masks] == [a.shape for a in seen.post]
    assert pathway.targets is not None
    assert pathway.targets.tolist() == [2, 0]


@given(networks(kinds=("relu", "relu6")), st.sampled_from([0.0, 0.5, 0.9]))
def test_no_dead_neuron_is_ever_kept(network: RandomNetwork, sparsity: float) -> None:
    x = network.inputs(3)
    pathway, active = NeuronMCT(sparsity)(network, x), observe(network, x).active()
    assert not (pathway & ~active).sizes.any()


def test_each_input_may_have_its_own_number() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(5, 40, generator=generator).mul(2).round()  # with ties, and zeros
    found = Contributions((scores[:, :10], scores[:, 10:]), ("relu_0", "relu_1"))
    sizes = torch.tensor([0, 1, 7, 20, 40])
    pathway = found.top_k(sizes)
    assert torch.equal(pathway.sizes, torch.minimum(sizes, (scores != 0).sum(1)))
    for image, size in enumerate(sizes.tolist()):
        if size > 0:
            one = Contributions((scores[[image], :10], scores[[image], 10:]), found.sites).top(1 - size / 40)
            assert torch.equal(pathway[image].flatten(), one.flatten())


@pytest.mark.parametrize("sizes", [[1, 2], [1, 2, 41], [-1, 2, 3], [1.0, 2.0, 3.0]])
def test_numbers_that_do_not_fit_are_refused(sizes: list[float]) -> None:
    scores = Contributions((torch.rand(3, 40),), ("relu_0",))
    with pytest.raises(PathwayError, match="one number of neurons for each input"):
        scores.top_k(torch.tensor(sizes))
