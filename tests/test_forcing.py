"""Confidence under a pathway and forcing: closed forms, and a network in which it is known what the bits decide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pathwaylib import ActiveNeurons, NeuronMCT, Pathway, PathwayError, confidence, load_model, masked, planted
from pathwaylib.evaluation.forcing import (
    confidence_drop,
    decided_by,
    divergence,
    forced,
    increased,
    strange_inputs,
)

MODEL = load_model("planted-cnn")
X = planted(24, seed=11)[:24][0]


def softmax_in_double(x: Tensor, pathway: Pathway | None = None) -> Tensor:
    with torch.no_grad():
        if pathway is None:
            return MODEL(x).double().softmax(1)
        with masked(pathway):
            return MODEL(x).double().softmax(1)


def test_confidence_measures_against_their_equations() -> None:
    pathway = NeuronMCT(0.995)(MODEL, X)
    whole, routed = softmax_in_double(X), softmax_in_double(X, pathway)
    predicted = whole.argmax(1, keepdim=True)
    p, q = whole.gather(1, predicted)[:, 0], routed.gather(1, predicted)[:, 0]
    assert torch.allclose(confidence_drop(MODEL, X, pathway).double(), ((p - q) / p).clamp(min=0), atol=1e-5)
    clear = (p - q).abs() > 1e-6
    assert torch.equal(increased(MODEL, X, pathway)[clear], (q > p)[clear])
    expected = (whole * (whole.log() - routed.log())).sum(1)
    assert torch.allclose(divergence(MODEL, X, pathway).double(), expected, rtol=1e-3, atol=1e-5)
    # A drop and a rise exclude each other.
    assert not bool((increased(MODEL, X, pathway) & (confidence_drop(MODEL, X, pathway) > 0)).any())


def test_the_whole_network_loses_and_gains_nothing() -> None:
    active = ActiveNeurons()(MODEL, X)
    assert not bool(increased(MODEL, X, active).any())
    assert float(confidence_drop(MODEL, X, active).max()) == 0
    assert float(divergence(MODEL, X, active).abs().max()) < 1e-5


class Switch(nn.Module):
    """Two neurons per class: one that sees the image, one that is always on. The larger sum decides."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Linear(2, 4)
        with torch.no_grad():
            self.see.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]]))
            self.see.bias.copy_(torch.tensor([0.0, 0, 5, 5]))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.see(x))
        return a[:, :2] + a[:, 2:]


def test_forcing_where_the_bits_are_known_to_decide() -> None:
    model, x = Switch().eval(), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    predicted = model(x).argmax(1)
    assert predicted.tolist() == [0, 1]
    other = strange_inputs(x.view(2, 1, 1, 2), predicted, "other class").view(2, 2)
    assert torch.equal(other, x.flip(0))
    # The neurons that see the image: the other image gets its own class.
    honest = Pathway((torch.tensor([[True, True, False, False]]).expand(2, 4),), ("relu_0",), predicted)
    assert forced(model, other, honest).tolist() == [False, False]
    assert forced(model, x, honest).tolist() == [True, True]
    # The constant neuron of the class alone: it decides, whatever the image.
    switch = torch.tensor([[True, True, True, False], [True, True, False, True]])
    forcing = Pathway((switch,), ("relu_0",), predicted)
    assert forced(model, other, forcing).tolist() == [True, True]
    with pytest.raises(PathwayError, match="targets"):
        forced(model, x, Pathway((switch,), ("relu_0",)))


def test_strange_inputs() -> None:
    classes = softmax_in_double(X).argmax(1)
    other = strange_inputs(X, classes, "other class")
    assert bool((softmax_in_double(other).argmax(1) != classes).all())
    assert all(any(torch.equal(image, own) for own in X) for image in other)
    shuffled = strange_inputs(X, classes, "shuffled")
    assert not torch.equal(shuffled, X)
    # Pixels move whole: the same colours, elsewhere.
    colours = [sorted(map(tuple, image.flatten(1).T.tolist())) for image in (shuffled[0], X[0])]
    assert colours[0] == colours[1]
    noise = strange_inputs(X, classes, "noise")
    assert torch.allclose(noise.mean((0, 2, 3)), X.mean((0, 2, 3)), atol=0.05)
    assert 0 <= float(noise.min()) <= float(noise.max()) <= 1
    assert torch.equal(noise, strange_inputs(X, classes, "noise"))
    assert not torch.equal(noise, strange_inputs(X, classes, "noise", generator=torch.Generator().manual_seed(1)))
    with pytest.raises(PathwayError, match="two classes"):
        strange_inputs(X[:3], torch.zeros(3).long(), "other class")
    with pytest.raises(PathwayError, match="kind"):
        strange_inputs(X, classes, "white")  # type: ignore[arg-type]
    with pytest.raises(PathwayError, match=r"shape \(3,\) for 24 inputs"):
        strange_inputs(X, classes[:3], "other class")
    with pytest.raises(PathwayError, match=r"float\(\) / 255"):
        strange_inputs((255 * X).byte(), classes, "grey")
    with pytest.raises(PathwayError, match=r"\(1, 3, 1, 1\).*standard deviation"):
        strange_inputs(torch.rand(1, 3, 1, 1), torch.tensor([0]), "noise")


def test_restricted_to_all_sites_is_the_pathway_and_to_none_the_network() -> None:
    pathway = NeuronMCT(0.95)(MODEL, X)
    sites = len(pathway.sites)
    assert torch.equal(pathway.restrict(range(sites)).flatten(), pathway.flatten())
    assert bool(pathway.restrict([]).flatten().all())
    first = pathway.restrict(range(2))
    assert torch.equal(first.site_sizes[:, :2], pathway.site_sizes[:, :2])
    assert first.targets is pathway.targets
    assert torch.equal(confidence(MODEL, X, pathway.restrict([])), confidence(MODEL, X))
    with pytest.raises(PathwayError, match="sites 0 to"):
        pathway.restrict([sites])


def of_switch(*rows: list[int]) -> Pathway:
    return Pathway((torch.tensor(rows).bool(),), ("relu_0",))


def test_who_decides_in_a_network_where_it_is_known() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.1]])
    # Seeing neurons out: the input cannot matter. Always-on neurons the same in all pathways: nothing else can.
    blind = decided_by(Switch().eval(), x, of_switch([0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 1]))
    assert blind.pathway.value == pytest.approx(1)
    assert blind.input.value == pytest.approx(0, abs=1e-12)
    fixed = decided_by(Switch().eval(), x, of_switch([1, 1, 1, 0], [1, 1, 1, 0]))
    assert fixed.input == pytest.approx((1, 1, 1))
    assert fixed.pathway == pytest.approx((0, 0, 0), abs=1e-12)
    # Each adds its part to the difference of the two logits: 5 or -5 by the pathway, 1, -2 or 0.4 by the input.
    sums = decided_by(Switch().eval(), x, of_switch([1, 1, 1, 0], [1, 1, 0, 1]))
    by_input = torch.tensor([1.0, -2.0, 0.4]).var(unbiased=False)
    assert sums.input.value == pytest.approx(float(by_input / (by_input + 25)), rel=1e-5)
    assert sums.both.value == pytest.approx(0, abs=1e-12)
    # One neuron sees x0, in one pathway only: half of what varies takes both to know.
    gate = decided_by(Switch().eval(), torch.tensor([[1.0, 0.0], [3.0, 0.0]]), of_switch([1, 0, 0, 0], [0, 0, 0, 0]))
    assert gate.pathway.value == pytest.approx(4 / 6)
    assert [gate.input.value, gate.both.value] == pytest.approx([1 / 6, 1 / 6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nobody_decides_what_only_rounding_varies(dtype: torch.dtype) -> None:
    # No neuron is left: ten logits of the bias alone, whose mean over equal runs is not exactly theirs.
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 10)).eval().to(dtype)
    with torch.no_grad():
        net[2].bias.copy_(torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    nothing = of_switch(*[[0, 0, 0, 0]] * 7)
    with pytest.raises(PathwayError, match="the same in all runs"):
        decided_by(net, torch.rand(7, 2, dtype=dtype), nothing)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_of_half_precision_logits_are_in_single(dtype: torch.dtype) -> None:
    model, x = Switch().eval().to(dtype), torch.tensor([[1.0, 0.0], [0.3, 2.0]], dtype=dtype)
    pathway = of_switch([1, 1, 1, 0])
    with torch.no_grad():
        whole = model(x).float()
        with masked(pathway):
            routed = model(x).float()
    p = whole.softmax(1).amax(1)
    q = routed.softmax(1).gather(1, whole.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(confidence(model, x), p)
    assert torch.equal(confidence(model, x, pathway), q)
    assert torch.equal(confidence_drop(model, x, pathway), (p - q).clamp(min=0) / p)
    expected = (whole.softmax(1) * (whole.log_softmax(1) - routed.log_softmax(1))).sum(1)
    torch.testing.assert_close(divergence(model, x, pathway), expected)


def test_who_decides_against_a_loop() -> None:
    pathway, inputs = NeuronMCT(0.9)(MODEL, X[:5]), X[5:12]
    logits = torch.zeros(5, 7, MODEL(X[:1]).shape[1], dtype=torch.float64)
    with torch.no_grad():
        for row in range(5):
            for column in range(7):
                with masked(pathway[row]):
                    found = MODEL(inputs[column : column + 1]).double()[0]
                logits[row, column] = found - found.mean()
    grand = logits.mean((0, 1))
    rows, columns = logits.mean(1) - grand, logits.mean(0) - grand
    rest = logits - grand - rows[:, None] - columns
    parts = torch.stack([7 * (rows**2).sum(), 5 * (columns**2).sum(), (rest**2).sum()])
    found = decided_by(MODEL, inputs, pathway)
    assert [part.value for part in found] == pytest.approx((parts / parts.sum()).tolist(), abs=1e-6)
    assert all(part.low <= part.value <= part.high for part in found)
    assert all(part.low < part.high for part in found)
    assert decided_by(MODEL, inputs, pathway) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pathway": of_switch([1, 1, 1, 1])}, "1 pathways and 3 inputs"),
        ({"x": torch.ones(1, 2)}, "2 pathways and 1 inputs"),
        ({"pathway": of_switch([0, 0, 1, 0], [0, 0, 1, 0])}, "the same in all runs"),
        ({"resamples": 0}, "resamples is 0"),
    ],
)
def test_who_decides_needs_something_to_vary(arguments: dict[str, object], message: str) -> None:
    given = {"x": torch.rand(3, 2), "pathway": of_switch([1, 1, 1, 0], [1, 1, 0, 1])}
    with pytest.raises(PathwayError, match=message):
        decided_by(Switch().eval(), **{**given, **arguments})  # type: ignore[arg-type]
