"""Interception: every activation call is seen, masked as told, and nothing stays behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import SPELLINGS, Block, RandomNetwork, Record, networks, small_network, unchanged
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pathwaylib import (
    ActiveNeurons,
    DistillationGuidedRouting,
    Pathway,
    PathwayError,
    PathwayGradient,
    ablation,
    decode_pathway,
    first_kink,
    masked,
    observe,
    taylor,
)
from pathwaylib.neurons import copied


def random_masks(shapes: list[torch.Size], seed: int, keep: float = 0.7) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(shape, generator=generator) < keep for shape in shapes)


# --- seeing ---


@given(networks(), st.integers(1, 4))
def test_observe_sees_every_call_in_order(network: RandomNetwork, count: int) -> None:
    x, record = network.inputs(count), Record()
    with torch.no_grad():
        expected = network.reference(x, record=record)
        plain = network(x)
        seen = observe(network, x)
    assert seen.kinds == tuple(record.kinds)
    assert seen.sites == tuple(f"{kind}_{index}" for index, kind in enumerate(record.kinds))
    assert torch.equal(seen.logits, plain)
    assert torch.equal(plain, expected)  # the reference is the network
    for z, a, z_expected, a_expected in zip(seen.pre, seen.post, record.pre, record.post, strict=True):
        assert torch.equal(z, z_expected)
        assert torch.equal(a, a_expected)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_site(name: str) -> None:
    network = RandomNetwork([Block("plain", name)], images=False, pooled_head=False)
    seen = observe(network, network.inputs(3))
    assert seen.sites == (f"{SPELLINGS[name].kind}_0",)
    assert (seen.pre[0] < 0).any()  # and what was recorded is before the activation, not after


def test_other_hardtanh_is_no_site() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.Hardtanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    assert observe(network, torch.rand(2, 3)).sites == ("relu_0",)


class ChangesBothLater(nn.Module):
    """Adds to the activation and to the pre-activation after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        h = F.relu(z)
        h += 1
        z += 2
        return self.head(torch.cat([h, z], 1))


def test_recorded_tensors_are_the_observers_own() -> None:
    network = ChangesBothLater().eval()
    x = torch.rand(4, 3)
    with torch.no_grad():
        seen = observe(network, x)
        z = network.layer(x)
    assert torch.equal(seen.pre[0], z)
    assert torch.equal(seen.post[0], z.clamp(min=0))


def test_observed_tensors_carry_a_graph_where_asked() -> None:
    network = small_network()
    x = network.inputs(2).requires_grad_()
    seen = observe(network, x)
    (gradient,) = torch.autograd.grad(seen.pre[1].sum(), x)
    record = Record()
    network.reference(x, record=record)
    (expected,) = torch.autograd.grad(record.pre[1].sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not observe(network, x).logits.requires_grad


def test_network_that_changes_its_input_in_place() -> None:
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    x = torch.rand(4, 3) - 0.5
    with unchanged(network, x):
        scores = taylor(network, x, 0)
    assert scores.sites == ("relu_0", "relu_1")


def test_a_view_overwritten_in_place() -> None:
    class ThroughAView(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x)
            F.relu_(h[:, :5])
            return self[2](h)

    plain, x = two_layers(), torch.rand(4, 3)
    nn.init.constant_(plain[0].bias, 2)  # all neurons speak
    expected = taylor(plain, x, 0).scores[0]
    assert expected.any()
    assert torch.equal(taylor(ThroughAView(*plain).eval(), x, 0).scores[0], expected)


# --- masking ---


@given(networks(), st.integers(1, 3), st.integers(0, 100))
def test_masked_run_is_the_network_with_masks_written_out(network: RandomNetwork, count: int, seed: int) -> None:
    x, record = network.inputs(count, seed), Record()
    with torch.no_grad():
        network.reference(x, record=record)
        masks = random_masks([a.shape for a in record.post], seed)
        sites = tuple(f"{kind}_{index}" for index, kind in enumerate(record.kinds))
        with masked(Pathway(masks, sites)):
            found = network(x)
        assert torch.equal(found, network.reference(x, masks))


@given(networks(), st.integers(1, 3))
def test_all_ones_and_active_neurons_reproduce_the_logits_bit_for_bit(network: RandomNetwork, count: int) -> None:
    x = network.inputs(count)
    with torch.no_grad():
        plain = network(x)
        seen = observe(network, x)
        ones = Pathway(tuple(torch.ones_like(a, dtype=torch.bool) for a in seen.post), seen.sites)
        for pathway in (ones, seen.active()):
            with masked(pathway):
                assert torch.equal(network(x), plain)


@given(networks())
def test_batch_is_the_loop(network: RandomNetwork) -> None:
    x = network.inputs(3)
    with torch.no_grad():
        seen = observe(network, x)
        masks = random_masks([a.shape for a in seen.post], 1)
        pathway = Pathway(masks, seen.sites)
        with masked(pathway):
            together = network(x)
        for index in range(3):
            one = observe(network, x[index : index + 1])
            for a, single in zip(seen.post, one.post, strict=True):
                torch.testing.assert_close(a[index : index + 1], single, rtol=1e-10, atol=1e-10)
            with masked(pathway[index]):
                alone = network(x[index : index + 1])
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-10, atol=1e-10)


def test_one_pathway_serves_a_batch_and_several_runs() -> None:
    network = small_network()
    x = network.inputs(4)
    with torch.no_grad():
        seen = observe(network, x)
        pathway = Pathway(random_masks([a[:1].shape for a in seen.post], 3), seen.sites)
        with masked(pathway):
            first, second = network(x), network(x.flip(0))
        repeated = [mask.expand(4, *mask.shape[1:]) for mask in pathway.masks]
        assert torch.equal(first, network.reference(x, repeated))
        assert torch.equal(second, network.reference(x.flip(0), repeated))


@pytest.mark.parametrize("spelling", ["F.relu", "Tensor.relu_, discarded", "nn.ReLU6", "nn.LeakyReLU(inplace=True)"])
def test_blocks_nest_and_can_be_observed(spelling: str) -> None:
    network = small_network(spelling=spelling)
    x = network.inputs(2)
    with torch.no_grad():
        seen = observe(network, x)
        outer, inner = (Pathway(random_masks([a.shape for a in seen.post], seed), seen.sites) for seed in (1, 2))
        with masked(outer):
            first = network(x)
            with masked(inner):
                both = network(x)
            watched = observe(network, x)
        record = Record()
        expected = network.reference(x, outer.masks, record=record)
        assert torch.equal(first, expected)
        assert torch.equal(both, network.reference(x, (outer & inner).masks))
        # What is observed inside a masked block is the pathway network.
        assert torch.equal(watched.logits, expected)
    for z, a, z_expected, a_expected in zip(watched.pre, watched.post, record.pre, record.post, strict=True):
        assert torch.equal(z, z_expected)
        assert torch.equal(a, a_expected)


# --- leaving everything as it was ---


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()], ids=repr)
def test_infinity_outside_the_pathway_is_no_nan(activation: nn.Module) -> None:
    network = nn.Sequential(nn.Linear(1, 3, bias=False), activation, nn.Linear(3, 2)).half().eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [60_000.0], [-60_000.0]]))  # z = 2, inf, -inf
        with masked(Pathway((torch.tensor([[True, False, True]]),), (f"{type(activation).__name__.lower()}_0",))):
            logits = network(torch.tensor([[2.0]]).half())
        assert torch.equal(logits, network[2](torch.tensor([[2.0, 0.0, 0.0]]).half()))


class Failing(nn.Module):
    """Fails after its first activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(3, 4).double(), True
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.layer(x))
        if self.fails:
            raise RuntimeError("no second half")
        return F.relu(h - 0.1)


@given(networks())
def test_observing_and_masking_change_nothing(network: RandomNetwork) -> None:
    x = network.inputs(2).requires_grad_()
    network.head.bias.requires_grad_(False)  # a mixture of trainable and frozen parameters must survive
    network.stem.weight.grad = torch.ones_like(network.stem.weight)
    plain = network.reference(x)
    with unchanged(network, x):
        pathway = observe(network, x).active()
        with masked(pathway), torch.no_grad():
            network(x)
    assert torch.equal(network(x), plain)


def test_nothing_leaks_from_a_run_that_fails() -> None:
    network = Failing()
    nn.init.constant_(network.layer.bias, 2)  # all neurons speak
    x = torch.rand(2, 3, dtype=torch.float64)
    mask = torch.zeros(1, 4, dtype=torch.bool)
    pathway = Pathway((mask, mask), ("relu_0", "relu_1"))
    for call in (lambda: observe(network, x), lambda: taylor(network, x), lambda: network(x)):
        with unchanged(network, x), pytest.raises(RuntimeError, match=r"no second half"), masked(pathway):
            call()
    network.fails = False
    expected = (network.layer(x).clamp(min=0) - 0.1).clamp(min=0)
    assert torch.equal(network(x), expected)  # not masked, not observed
    assert expected.any()
    assert all(p.requires_grad for p in network.parameters())
    network(x).sum().backward()
    assert network.layer.weight.grad is not None


def test_nothing_leaks_from_a_bad_target() -> None:
    network = small_network()
    x = network.inputs(2)
    with unchanged(network, x), pytest.raises(PathwayError, match=r"target"):
        taylor(network, x, 99)
    network(x).sum().backward()
    assert network.stem.weight.grad is not None


def test_observing_inside_no_grad_and_while_others_train() -> None:
    # Parameters get no gradients through a masked run of ours, but a plain run next to it still trains.
    network, other = small_network(), small_network(1)
    x = network.inputs(2)
    loss = other(x).sum()
    observe(network, x)
    loss.backward()
    assert other.stem.weight.grad is not None


# --- answering bad input ---


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()


def test_no_site() -> None:
    with pytest.raises(PathwayError, match=r"no ReLU, .* Sequential"):
        observe(nn.Sequential(nn.Linear(3, 5), nn.Tanh()).eval(), torch.rand(2, 3))


def test_traced_network() -> None:
    x = torch.rand(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript announces its end
        traced = torch.jit.trace(two_layers(), x)
    with pytest.raises(PathwayError, match=r"traced.*pass the original module"):
        observe(traced, x)
    pathway = observe(two_layers(), x).active()
    with pytest.raises(PathwayError, match=r"0 activation calls"), masked(pathway):
        traced(x)


def test_masked_block_without_a_run() -> None:
    pathway = observe(two_layers(), torch.rand(2, 3)).active()
    with pytest.raises(PathwayError, match=r"0 activation calls"), masked(pathway):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: Pathway(p.masks[:2], p.sites[:2]), "pathway has"),  # fewer sites than calls
        (lambda p: Pathway((*p.masks, p.masks[-1]), (*p.sites, "relu_3")), "sites"),
        (lambda p: Pathway(p.masks[::-1], p.sites), r"site 0 .*shape"),  # another order
        (lambda p: Pathway(p.masks, ("relu6_0", *p.sites[1:])), "'relu6_0'"),  # another activation
        (lambda p: p[[0, 1]], r"shape \(3, .*shape \(2, "),  # another batch size
        (lambda p: Pathway(tuple(m[:, :2] for m in p.masks), p.sites), "shape"),
    ],
)
def test_sites_differ(change: object, message: str) -> None:
    network = RandomNetwork(
        [Block("plain", "nn.ReLU", pool="max"), Block("plain", "nn.ReLU", pool="max"), Block("plain", "F.relu")],
        images=True,
        pooled_head=True,
    )
    x = network.inputs(3)
    pathway = change(observe(network, x).active())
    with unchanged(network, x), pytest.raises(PathwayError, match=message), masked(pathway):
        network(x)
    assert torch.equal(network(x), network.reference(x))


def test_number_of_runs() -> None:
    # A pathway of one site fits every call of a network whose sites are all alike; only the count tells them apart.
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()).eval()
    x = torch.rand(2, 3)
    pathway = observe(network, x).active()
    short = Pathway(pathway.masks[:1], pathway.sites[:1])
    with pytest.raises(PathwayError, match=r"1 sites, but 2 activation calls"), masked(short, runs=1):
        network(x)
    with pytest.raises(PathwayError, match=r"2 sites, but 4 activation calls"), masked(pathway, runs=1):
        network(x), network(x)
    with masked(pathway, runs=2):
        network(x), network(x)


def test_training_mode() -> None:
    network = two_layers().train()
    with pytest.raises(PathwayError, match=r"training mode.*model\.eval\(\)"):
        observe(network, torch.rand(2, 3))
    network.eval()
    network[1].train()
    with pytest.raises(PathwayError, match=r"'1'"):
        observe(network, torch.rand(2, 3))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randint(255, (2, 3), dtype=torch.uint8), r"torch.uint8.*/ 255"),
        (torch.ones(2, 3, dtype=torch.int64), "torch.int64"),
        (torch.ones(2, 3, dtype=torch.bool), "torch.bool"),
        (torch.empty(0, 3), r"\(0, 3\).*at least one"),
        (torch.rand(3), r"\(3,\)"),
        (torch.tensor([[0.0, float("nan"), 1.0]]), "NaN"),
        (torch.tensor([[0.0, float("inf"), 1.0]]), "infinity"),
        (torch.rand(2, 3, dtype=torch.float64), r"float32.*float64.*x\.to"),
        (torch.rand(2, 3, dtype=torch.float16), "float16"),
        (torch.rand(2, 3, device="meta"), r"meta.*x\.to"),
        ([[0.0, 0.0, 0.0]], "list"),
        (None, "NoneType"),
    ],
)
def test_bad_images(x: object, message: str) -> None:
    network = two_layers()
    with unchanged(network):
        for call in (observe, taylor):
            with pytest.raises(PathwayError, match=message):
                call(network, x)


def test_network_on_another_device() -> None:
    with pytest.raises(PathwayError, match=r"meta.*cpu"):
        observe(two_layers().to("meta"), torch.rand(2, 3))
    network, x = two_layers(), torch.rand(2, 3)
    pathway = observe(network, x).active().to("meta")
    with pytest.raises(PathwayError, match=r"meta.*cpu.*pathway\.to"), masked(pathway):
        network(x)


def test_network_spread_over_two_devices() -> None:
    network = two_layers()
    network[2].to("meta")
    with pytest.raises(PathwayError, match=r"meta"):
        observe(network, torch.rand(2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(value: float) -> None:
    network = two_layers()
    with torch.no_grad():
        network[2].weight[0, 0] = value
        network[0].bias.fill_(1)  # so that the broken weight is multiplied by something
    with pytest.raises(PathwayError, match=r"'2\.weight'"):
        observe(network, torch.rand(2, 3) + 10 * torch.eye(3)[:2])
    with pytest.raises(PathwayError, match=r"'2\.weight'"):
        taylor(network, torch.rand(2, 3) + 10 * torch.eye(3)[:2])


def test_broken_weights_beside_a_state_that_is_no_tensor() -> None:
    class Noting(nn.Linear):
        def get_extra_state(self) -> str:
            return "a note"

    network = nn.Sequential(Noting(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    with torch.no_grad():
        network[2].bias.fill_(torch.nan)
    with pytest.raises(PathwayError, match=r"'2\.bias'"):
        observe(network, torch.rand(2, 3))


def test_inference_mode() -> None:
    network = small_network()
    with torch.inference_mode():
        x = network.inputs(2)
        pathway = ActiveNeurons()(network, x)  # needs no gradients
        for call in (
            lambda: taylor(network, x),
            lambda: PathwayGradient(network, ActiveNeurons()).attribute(x),
            lambda: ablation(network, x),
            lambda: DistillationGuidedRouting()(network, x),
            lambda: first_kink(network, x, x),
            lambda: decode_pathway(network, x.shape[1:], pathway),
        ):
            with pytest.raises(PathwayError, match=r"use torch\.no_grad"):
                call()
    # Images that were made there are as good as any.
    assert torch.equal(taylor(network, x).scores[0], taylor(network, x.clone()).scores[0])
    assert torch.equal(PathwayGradient(network).attribute(x), PathwayGradient(network).attribute(x.clone()))


def test_overflow_without_broken_weights() -> None:
    network = two_layers()
    with torch.no_grad():
        network[0].weight.fill_(1e30)
        network[2].weight.fill_(1e30)
    with pytest.raises(PathwayError, match=r"overflow"):
        observe(network, torch.ones(2, 3))


@pytest.mark.parametrize("answer", ["tuple", "map", "scalar per input", "one row"])
def test_network_that_does_not_return_logits(answer: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> object:
            h = F.relu(x)
            return {"tuple": (h, h), "map": h[:, :, None], "scalar per input": h[:, 0], "one row": h[:1]}[answer]

    with pytest.raises(PathwayError, match=r"logits of shape \(2, classes\)"):
        observe(Odd().eval(), torch.rand(2, 3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(3, 5), two_layers(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, F.relu(self.stem(x))[:, :3], use_reentrant=reentrant))

    network = Checkpointed().eval()
    x = torch.rand(2, 3, requires_grad=True)
    plain = network(x)
    for call in (observe, taylor):
        with unchanged(network, x), pytest.raises(PathwayError, match=r"checkpointing.*turn checkpointing off"):
            call(network, x)
    assert torch.equal(network(x), plain)


def test_data_parallel() -> None:
    network = two_layers()
    wrapped = nn.DataParallel(network)
    wrapped.eval()
    with pytest.raises(PathwayError, match=r"DataParallel.*model\.module"):
        observe(wrapped, torch.rand(2, 3))
    assert observe(wrapped.module, torch.rand(2, 3)).sites == ("relu_0",)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (2, r"target.*classes 0 to 1"),
        (-1, r"target.*classes 0 to 1"),
        ([0, 2, 1], r"\[0, 2, 1\].*classes 0 to 1"),
        (torch.tensor([0, 1]), r"\(2,\) for 3 inputs"),
        ([0, 1, 0, 1], r"\(4,\) for 3 inputs"),
        (torch.zeros(3, 1, dtype=torch.long), r"\(3, 1\)"),
        (0.0, "float32.*integers"),
        (torch.tensor([0.0, 1.0, 1.0]), "float32"),
        (True, "bool"),
    ],
)
def test_bad_targets(target: object, message: str) -> None:
    network, x = two_layers(), torch.rand(3, 3)
    with unchanged(network, x), pytest.raises(PathwayError, match=message):
        taylor(network, x, target)


def test_the_library_survives_copies_of_what_it_saw() -> None:
    network = two_layers()
    observe(network, torch.rand(2, 3))
    copy.deepcopy(network)  # would fail on a hook or graph tensor left in a module


def test_a_copy_keeps_what_the_network_keeps_without_its_graph() -> None:
    network, x = two_layers(), torch.rand(2, 3)
    network.seen = {"logits": [network(x)]}
    network[0].seen = network.seen["logits"][0]
    with unchanged(network, x):
        made = copied(network)
    assert made.seen["logits"][0] is made[0].seen
    assert torch.equal(made[0].seen, network[0].seen)
    assert network[0].seen.requires_grad
    assert not made[0].seen.requires_grad
    with torch.no_grad():
        for tensor in (*made.parameters(), made[0].seen):
            tensor.fill_(9)
    assert not any((tensor == 9).any() for tensor in (*network.parameters(), network[0].seen))


@pytest.mark.cuda
def test_on_a_gpu_as_on_the_processor() -> None:
    network = small_network()
    x = network.inputs(3)
    scores = taylor(network, x)
    on_gpu = copy.deepcopy(network).cuda()
    found = taylor(on_gpu, x.cuda())
    for a, b in zip(scores.scores, found.scores, strict=True):
        assert b.is_cuda
        torch.testing.assert_close(a, b.cpu(), rtol=1e-9, atol=1e-9)
    assert torch.equal(scores.top(0.5).flatten(), found.top(0.5).to("cpu").flatten())
    with pytest.raises(PathwayError, match=r"cuda.*cpu"):
        observe(on_gpu, x)
    with pytest.raises(PathwayError, match=r"pathway\.to"), masked(scores.top(0.5)):
        on_gpu(x.cuda())
