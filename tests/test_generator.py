"""GEN-CNP piece by piece: quantisers against equations, shapes for any target, training that resumes bit for bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pathwaylib import (
    ActiveNeurons,
    NeuronMCT,
    PathwayError,
    RandomSelection,
    divergence,
    load_model,
    masked,
    observe,
    planted,
    prediction_kept,
)
from pathwaylib.generator import (
    DistanceAwareQuantizer,
    GeneratorNetwork,
    GeneratorRecipe,
    GeneratorShape,
    PathwayGenerator,
    StraightThroughQuantizer,
    class_pathways,
    generator_losses,
    load_generator,
    store_generator,
    train_generator,
    transfer,
)
from pathwaylib.generator.network import PathwayDistillation, RecursiveEmbedder, RecursivePathwayDecoder
from pathwaylib.generator.transfer import class_frequencies
from pathwaylib.selectors import Chosen

SMALL = GeneratorShape(width=16, heads=2)


# --- Quantisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [DistanceAwareQuantizer(), StraightThroughQuantizer()])
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=20))
def test_masks_lie_in_the_unit_interval_and_on_the_side_of_the_bit(
    quantizer: DistanceAwareQuantizer | StraightThroughQuantizer, values: list[float]
) -> None:
    scores = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    mask = quantizer(scores)
    assert bool(((mask > -1e-9) & (mask < 1 + 1e-9)).all())
    # The rounded mask is the bit, except next to the border, where rounding errors decide.
    clear = scores.detach().abs() > 1e-6
    assert torch.equal(mask.round()[clear].bool(), (scores > 0)[clear])
    mask.sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert bool((scores.grad >= 0).all())


def test_distance_aware_masks_are_bits_away_from_the_border() -> None:
    quantizer = DistanceAwareQuantizer(gamma=2, sharpest=40)
    # The gap |2σ(s) − 1| is 2/40 at s = log(1.05 / 0.95).
    border = torch.log(torch.tensor(1.05 / 0.95, dtype=torch.float64))
    scores = torch.stack([-3 * border, -1.001 * border, 1.001 * border, 3 * border])
    assert torch.allclose(quantizer(scores), torch.tensor([0.0, 0, 1, 1], dtype=torch.float64), atol=1e-9)
    inside = quantizer(0.5 * border)
    assert 0.6 < float(inside) < 0.95
    # From the equation, with the temperature held fixed.
    gap = 2 * torch.sigmoid(0.5 * border) - 1
    beta = min(2 / float(gap), 40.0)
    low, high = torch.sigmoid(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    assert float(inside) == pytest.approx(float((torch.sigmoid(beta * gap) - low) / (high - low)))


def test_distance_aware_slope_is_that_of_a_fixed_temperature() -> None:
    quantizer = DistanceAwareQuantizer(gamma=2, sharpest=40)
    scores = torch.tensor([-2.0, -0.3, 0.01, 0.7], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(quantizer(scores).sum(), scores)
    fixed = scores.detach()
    gap = 2 * fixed.sigmoid() - 1
    beta = (2 / gap.abs()).clamp(max=40)

    def soft(s: Tensor) -> Tensor:
        edge = torch.tensor(2.0, dtype=torch.float64).sigmoid()
        return ((beta * (2 * s.sigmoid() - 1)).sigmoid() - (1 - edge)) / (2 * edge - 1)

    step = 1e-6
    numeric = (soft(fixed + step) - soft(fixed - step)) / (2 * step)
    assert torch.allclose(slope, numeric, rtol=1e-6)
    assert bool((slope > 0).all())
    assert slope[2] == slope.max()  # steepest next to the border


@pytest.mark.parametrize("parameters", [{"gamma": 0.0}, {"gamma": 50.0}, {"gamma": -1.0}])
def test_quantizer_refuses(parameters: dict[str, float]) -> None:
    with pytest.raises(PathwayError, match="gamma"):
        DistanceAwareQuantizer(**parameters)


# --- Blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (7, 7), (5, 9), (1, 1), (4, 4)])
def test_the_decoder_mirrors_the_embedder(size: tuple[int, int]) -> None:
    embed, decode = RecursiveEmbedder(6, 16, 4), RecursivePathwayDecoder(6, 16, 4)
    tokens, pyramid = embed(torch.rand(2, 6, *size))
    assert tokens.shape == (2, 6, 16)
    assert max(pyramid[-1].shape[2:]) <= 4
    scores = decode(tokens, pyramid)
    assert scores.shape == (2, 6, *size)
    scores.sum().backward()
    used = [*embed.parameters(), *decode.parameters()]
    # Maps that are small already need no recursion.
    idle = {id(p) for p in (*embed.halve.parameters(), *decode.refine.parameters())} if max(size) <= 4 else set()
    assert all((p.grad is not None) == (id(p) not in idle) for p in used)


def test_recursion_costs_no_parameters() -> None:
    counts = {side: sum(p.numel() for p in RecursiveEmbedder(6, 16, 4).parameters()) for side in (8, 64)}
    assert len(set(counts.values())) == 1
    shallow, deep = (RecursiveEmbedder(6, 16, 4)(torch.rand(1, 6, side, side))[1] for side in (8, 64))
    assert (len(shallow), len(deep)) == (2, 5)


def test_channels_do_not_mix_before_the_distillation() -> None:
    embed = RecursiveEmbedder(3, 8, 4)
    maps = torch.rand(1, 3, 16, 16)
    changed = maps.clone()
    changed[:, 1] += 1
    one, two = embed(maps)[0], embed(changed)[0]
    assert torch.equal(one[:, [0, 2]], two[:, [0, 2]])
    assert not torch.equal(one[:, 1], two[:, 1])


@pytest.mark.parametrize("context", [True, False])
def test_context_lets_shallow_sites_see_the_deepest(context: bool) -> None:
    torch.manual_seed(0)
    block = PathwayDistillation(GeneratorShape(width=8, heads=2, deep_sites=1, context=context), 3)
    shallow, deep = torch.rand(1, 4, 8), torch.rand(1, 5, 8)
    before = block([shallow, deep])
    after = block([shallow, deep + torch.rand(1, 5, 8)])
    assert torch.equal(before[0][0], after[0][0]) != context
    assert not torch.equal(before[1], after[1])  # the auxiliary head sees the deep site either way


# --- The network -----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Maps, a reused in-place activation, and a vector site."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3, stride=2)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.hidden = nn.Linear(6, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.convolution(x))
        x = self.relu(self.again(x) + x)
        return self.out(self.relu(self.hidden(x.mean((2, 3)))))


TARGETS = {
    "cifar10-vgg": (lambda: load_model("cifar10-vgg"), 32),
    "cifar10-resnet20": (lambda: load_model("cifar10-resnet20"), 32),
    "mixed": (lambda: Mixed().eval(), 19),
}


@pytest.mark.parametrize("name", TARGETS)
def test_scores_for_any_target(name: str) -> None:
    build, side = TARGETS[name]
    target, x = build(), torch.rand(2, 3, side, side)
    network = GeneratorNetwork.like(target, x)
    seen = observe(target, x)
    found = network(seen.post)
    assert [s.shape for s in found.scores] == [a.shape for a in seen.post]
    assert found.logits.shape == seen.logits.shape
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters <= max(500_000, sum(p.numel() for p in target.parameters()) // 10)
    # A batch is a loop, as no norm runs over the batch.
    alone = torch.cat([network([a[i : i + 1] for a in seen.post]).scores[0] for i in range(2)])
    assert torch.allclose(found.scores[0], alone, atol=1e-5)
    # The same seed gives the same network, whatever was drawn in between.
    state = torch.get_rng_state()
    again = GeneratorNetwork.like(target, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_a_generator_refuses_another_target() -> None:
    x = torch.rand(1, 3, 32, 32)
    network = GeneratorNetwork.like(load_model("planted-cnn"), x)
    with pytest.raises(PathwayError, match="built for"):
        PathwayGenerator(network)(load_model("cifar10-resnet8"), x)
    with pytest.raises(PathwayError, match="maps"):
        GeneratorNetwork(["relu_0"], [(3, 4)], 2)
    with pytest.raises(PathwayError, match="multiple"):
        GeneratorShape(width=10, heads=4)


def test_a_generator_refuses_other_activations_of_the_same_shapes() -> None:
    x = torch.rand(2, 3)
    rectified, leaky = (
        nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)).eval() for activation in (nn.ReLU(), nn.LeakyReLU())
    )
    generator = PathwayGenerator(GeneratorNetwork.like(rectified, x, SMALL))
    assert generator(rectified, x).sites == ("relu_0",)
    with pytest.raises(PathwayError, match=r"has the sites leaky_relu_0; this generator was built for relu_0"):
        generator(leaky, x)


@pytest.mark.cuda
def test_a_new_generator_leaves_the_draws_of_all_devices_alone() -> None:
    model, x, state = load_model("planted-cnn"), torch.rand(1, 3, 32, 32), torch.cuda.get_rng_state()
    GeneratorNetwork.like(model, x, SMALL)
    assert torch.equal(torch.cuda.get_rng_state(), state)


# --- Losses ----------------------------------------------------------------------------------------------------------


def test_losses_of_all_and_of_hard_masks() -> None:
    model, x = load_model("planted-cnn"), planted(12, seed=3)[:12][0]
    network = GeneratorNetwork.like(model, x, SMALL)
    for decoder in network.decoders:
        nn.init.constant_(decoder.bias, 100.0)  # type: ignore[arg-type]
    everything = generator_losses(model, network, x, DistanceAwareQuantizer())
    assert everything.faithfulness.item() == pytest.approx(0, abs=1e-5)
    assert everything.density.item() == pytest.approx(1)
    assert everything.class_relevance.item() == pytest.approx(0, abs=1e-6)
    assert everything.kept.item() == 1
    # With hard masks every term has its counterpart among the library's measures.
    network = GeneratorNetwork.like(model, x, SMALL, seed=1)
    for decoder in network.decoders:
        nn.init.constant_(decoder.bias, -0.1)  # type: ignore[arg-type]
    losses = generator_losses(model, network, x, StraightThroughQuantizer())
    pathway = PathwayGenerator(network)(model, x)
    assert losses.density.item() == pytest.approx(1 - pathway.sparsity.mean().item(), abs=1e-6)
    assert losses.kept.item() == pytest.approx(prediction_kept(model, x, pathway).float().mean().item())
    with torch.no_grad():
        whole = model(x).double().log_softmax(1)
        with masked(pathway):
            routed = model(x).double().log_softmax(1)
    assert losses.faithfulness.item() == pytest.approx(
        (whole.exp() * (whole - routed)).sum(1).mean().item(), rel=1e-3, abs=1e-6
    )
    predicted = whole.argmax(1)
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j and predicted[i] == predicted[j]]
    ious = [pathway[i].iou(pathway[j]).item() for i, j in pairs]
    assert losses.class_relevance.item() == pytest.approx(1 - sum(ious) / len(ious), abs=1e-5)


def test_every_weight_is_trained_and_no_weight_of_the_target() -> None:
    model, x = load_model("planted-cnn"), planted(8)[:8][0]
    network = GeneratorNetwork.like(model, x, SMALL)
    losses = generator_losses(model, network, x, DistanceAwareQuantizer())
    total = losses.faithfulness + losses.density + losses.class_relevance + losses.auxiliary
    total.backward()  # type: ignore[no-untyped-call]
    without = [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []
    assert all(p.grad is None for p in model.parameters())


def test_the_mask_of_one_input_is_tried_on_an_input_of_another_class() -> None:
    model, x = load_model("planted-cnn"), planted(12, seed=3)[:12][0]
    network = GeneratorNetwork.like(model, x, SMALL, seed=1)
    for decoder in network.decoders:
        nn.init.constant_(decoder.bias, -0.1)  # type: ignore[arg-type]
    quantizer = StraightThroughQuantizer()
    assert generator_losses(model, network, x, quantizer).others.item() == 0
    found = generator_losses(model, network, x, quantizer, others=True).others
    pathway = PathwayGenerator(network)(model, x)
    with torch.no_grad():
        predicted = model(x).argmax(1).tolist()
    total = 0.0
    for i, label in enumerate(predicted):
        other = next(j % 12 for j in range(i + 1, i + 12) if predicted[j % 12] != label)
        total += divergence(model, x[[other]], pathway[i]).item()
    assert found.item() == pytest.approx(total / 12, rel=1e-4)
    alike = x[:1].expand(3, -1, -1, -1)  # no other class: a neighbour, of the same class
    same = generator_losses(model, network, alike, quantizer, others=True)
    assert same.others.item() == pytest.approx(same.faithfulness.item(), rel=1e-5)


def test_a_generator_may_choose_at_the_first_sites_only() -> None:
    model, x = load_model("planted-cnn"), planted(8, seed=3)[:8][0]
    network = GeneratorNetwork.like(model, x, replace(SMALL, chosen_sites=2))
    for decoder in network.decoders:
        nn.init.constant_(decoder.bias, -0.1)  # type: ignore[arg-type]
    pathway = PathwayGenerator(network)(model, x)
    assert [bool(mask.all()) for mask in pathway.masks] == [False, False, True, True]
    losses = generator_losses(model, network, x, StraightThroughQuantizer())
    kept = torch.cat([mask.flatten(1) for mask in pathway.masks[:2]], 1)
    assert losses.density.item() == pytest.approx(kept.float().mean().item(), abs=1e-6)


# --- Training --------------------------------------------------------------------------------------------------------


def test_one_batch_can_be_overfitted() -> None:
    model, data = load_model("planted-cnn"), planted(16, seed=5)
    recipe = GeneratorRecipe(steps=60, batch_size=16, shape=SMALL, sparsity_weight=2.0, learning_rate=1e-2)
    network, log = train_generator(model, data, recipe, progress=False)
    pathway = PathwayGenerator(network)(model, data[:16][0])
    assert pathway.sparsity.min() > 0.9
    assert log[-1]["kept"] >= 0.9
    # As many neurons drawn at random among the active ones do not do it.
    sparsity = float(pathway.sparsity.mean())
    control = RandomSelection(sparsity, active_only=True)(model, data[:16][0])
    kept = prediction_kept(model, data[:16][0], pathway).float().mean()
    assert kept > prediction_kept(model, data[:16][0], control).float().mean() + 0.2


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    model, data = load_model("planted-cnn"), planted(48)
    recipe = GeneratorRecipe(steps=6, batch_size=16, shape=SMALL)
    whole, log = train_generator(model, data, recipe, progress=False)
    path = tmp_path / "generator.pt"

    class Stop(Exception):
        pass

    calls = []

    class Stopping(DistanceAwareQuantizer):
        def __call__(self, scores: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 4 * len(observe(model, data[:1][0]).sites):
                raise Stop
            return super().__call__(scores)

        def __repr__(self) -> str:
            return repr(DistanceAwareQuantizer())

    with pytest.raises(Stop):
        train_generator(
            model, data, replace(recipe, quantizer=Stopping()), checkpoint=path, store_every=2, progress=False
        )
    again, resumed = train_generator(model, data, recipe, checkpoint=path, store_every=2, progress=False)
    assert log == resumed
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert path.with_suffix(".csv").read_text().count("\n") == 7
    with pytest.raises(PathwayError, match="another recipe"):
        train_generator(model, data, replace(recipe, seed=1), checkpoint=path, progress=False)


TWO_PROCESSES = """
import json, sys
import torch
from lightning_fabric import Fabric
from pathwaylib import load_model, planted
from pathwaylib.generator import GeneratorRecipe, GeneratorShape, train_generator
torch.set_num_threads(1)
devices = int(sys.argv[1])
fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
fabric.launch()
recipe = GeneratorRecipe(steps=3, batch_size=16, shape=GeneratorShape(width=16, heads=2), class_weight=1.0)
_, log = train_generator(load_model("planted-cnn"), planted(32), recipe, fabric=fabric, progress=False)
if fabric.global_rank == 0:
    print("LOG" + json.dumps(log))
"""


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"  # Fabric starts the second process from the script
    script.write_text(TWO_PROCESSES)
    logs = []
    for devices in ("1", "2"):
        done = subprocess.run(
            [sys.executable, str(script), devices],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("LOG"))
        logs.append(eval(line[3:]))
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


def test_training_refuses() -> None:
    model = load_model("planted-cnn")
    with pytest.raises(PathwayError, match="at least one"):
        train_generator(model, planted(4), GeneratorRecipe(steps=1, batch_size=8), progress=False)
    for wrong in ({"steps": 0}, {"sparsity_weight": -1.0}, {"learning_rate": 0.0}, {"warmup": 2.0}):
        with pytest.raises(PathwayError):
            GeneratorRecipe(**wrong)  # type: ignore[arg-type]


# --- Storing and transfer --------------------------------------------------------------------------------------------


def test_a_stored_generator_loads_and_is_checked(tmp_path: Path) -> None:
    model, x = load_model("planted-cnn"), planted(4)[:4][0]
    network = GeneratorNetwork.like(model, x, SMALL).half().float()
    store_generator("some", network, {"seed": 0}, tmp_path)
    loaded = load_generator("some", folder=tmp_path)
    assert torch.equal(loaded(model, x).flatten(), PathwayGenerator(network.eval())(model, x).flatten())
    assert not loaded.network.training
    with pytest.raises(PathwayError, match="stored are some"):
        load_generator("other", folder=tmp_path)
    weights = tmp_path / "some.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(PathwayError, match="SHA-256"):
        load_generator("some", folder=tmp_path)


def test_class_pathways_are_the_frequent_neurons_of_a_class() -> None:
    model, data = load_model("planted-cnn"), planted(40, seed=7)
    selector = NeuronMCT(0.95)
    frequencies, counts, sites = class_frequencies(model, selector, data, batch_size=16, progress=False)
    pathway = selector(model, data[:40][0])
    assert pathway.targets is not None
    found = class_pathways(frequencies, sites, share=0.5)
    for label in range(4):
        members = pathway.targets == label
        assert counts[label] == members.sum()
        expected = [mask[members].float().mean(0) >= 0.5 for mask in pathway.masks]
        assert all(torch.equal(mask[label], want) for mask, want in zip(found.masks, expected, strict=True))
    given_ = transfer(found, pathway.targets)
    assert torch.equal(given_.masks[0], found.masks[0][pathway.targets])
    with pytest.raises(PathwayError, match="there are 4"):
        transfer(found, torch.tensor([4]))
    with pytest.raises(PathwayError, match="share"):
        class_pathways(frequencies, sites, share=0.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_transfer_takes_any_integers_for_classes(dtype: torch.dtype) -> None:
    own = class_pathways((torch.eye(3),), ("relu_0",))
    chosen = transfer(own, torch.tensor([1, 0, 1], dtype=dtype))
    assert torch.equal(chosen.masks[0], torch.eye(3, dtype=torch.bool)[[1, 0, 1]])
    for classes in (torch.tensor([True, False]), torch.tensor([1.0])):
        with pytest.raises(PathwayError, match="give class indices as integers"):
            transfer(own, classes)


def test_class_frequencies_refuse_what_they_cannot_count() -> None:
    model, data = load_model("planted-cnn"), planted(6, seed=7)
    pathway = ActiveNeurons()(model, data[:6][0])
    for selector, images, classes, message in (
        (ActiveNeurons(), replace(data, images=data.images[:0], labels=data.labels[:0]), None, "holds no image"),
        (ActiveNeurons(), data, 1, "classes is 1, too few"),
        (Chosen(replace(pathway, targets=None)), data, None, "pathways of Chosen have no targets"),
    ):
        with pytest.raises(PathwayError, match=message):
            class_frequencies(model, selector, images, classes=classes, progress=False)


def test_a_generator_whose_scores_are_nan_is_refused() -> None:
    model, x = load_model("planted-cnn"), planted(2)[:2][0]
    network = GeneratorNetwork.like(model, x, SMALL)
    for parameter in network.decoders[0].parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(PathwayError, match="scores are NaN"):
        PathwayGenerator(network)(model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_generator_reads_a_target_of_another_precision(dtype: torch.dtype) -> None:
    model, x = load_model("planted-cnn"), planted(2)[:2][0]
    network = GeneratorNetwork.like(model, x, replace(SMALL, chosen_sites=3))
    for decoder in network.decoders:
        nn.init.constant_(decoder.bias, 0.0)  # type: ignore[arg-type]
    single = PathwayGenerator(network)
    expected, found = single(model, x), single(copy.deepcopy(model).to(dtype), x.to(dtype))
    assert 0.1 < float(expected.sparsity.min()) < 0.9
    assert float(found.iou(expected).min()) > 0.95


def test_a_generator_reads_activations_under_autocast() -> None:
    model, x = load_model("planted-cnn"), planted(4)[:4][0]
    network = GeneratorNetwork.like(model, x, SMALL)
    expected = generator_losses(model, network, x, DistanceAwareQuantizer())
    with torch.autocast("cpu", torch.bfloat16):
        found = generator_losses(model, network, x, DistanceAwareQuantizer())
    assert found.density.item() == pytest.approx(expected.density.item(), abs=0.02)
    assert found.auxiliary.item() == pytest.approx(expected.auxiliary.item(), abs=0.05)


# --- What a training refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["target", "images"])
def test_a_checkpoint_of_another_target_or_other_images_is_refused(change: str, tmp_path: Path) -> None:
    model, data, recipe = load_model("planted-cnn"), planted(32), GeneratorRecipe(steps=2, batch_size=16, shape=SMALL)
    path = tmp_path / "generator.pt"
    _, log = train_generator(model, data, recipe, checkpoint=str(path), progress=False)
    assert train_generator(model, data, recipe, checkpoint=path, progress=False)[1] == log
    content = path.read_bytes()
    if change == "images":
        data = replace(data, images=255 - data.images)
    else:
        model = load_model("planted-shortcut")
    with pytest.raises(PathwayError, match=rf"generator\.pt holds a run of another recipe \({change}: .* there"):
        train_generator(model, data, recipe, checkpoint=path, progress=False)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "sparsity_weight", "others_weight", "warmup"])
def test_a_recipe_that_is_not_finite_is_refused(name: str) -> None:
    for number in (float("nan"), float("inf")):
        with pytest.raises(PathwayError, match=f"{number}"):
            GeneratorRecipe(**{name: number})  # type: ignore[arg-type]


def test_training_refuses_to_store_never_and_to_go_on_without_a_loss(tmp_path: Path) -> None:
    model, data, path = load_model("planted-cnn"), planted(32), tmp_path / "generator.pt"
    recipe = GeneratorRecipe(steps=4, batch_size=16, shape=SMALL)
    with pytest.raises(PathwayError, match="store_every is 0"):
        train_generator(model, data, recipe, checkpoint=path, store_every=0, progress=False)
    with pytest.raises(PathwayError, match=r"the generator's scores are NaN; train it anew with a lower learning_rate"):
        train_generator(model, data, replace(recipe, learning_rate=1e30), progress=False)
    with pytest.raises(PathwayError, match=r"the loss is inf at step 2; lower the learning_rate \(0\.01\)"):
        train_generator(model, data, replace(recipe, sparsity_weight=1e39, warmup=0.5), checkpoint=path, progress=False)
    assert not path.exists()
