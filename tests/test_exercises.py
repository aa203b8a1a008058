"""The exercises of every chapter: the stub fails, the solution passes, and a typical mistake is told by name."""

from __future__ import annotations

import ast
import copy
import math
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from scipy.stats import t, ttest_ind
from torch import Tensor, nn
from torch.nn import functional as F

import pathwaylib
from pathwaylib import (
    Contributions,
    NeuronMCT,
    Pathway,
    StraightThroughQuantizer,
    divergence,
    exercises,
    integrated_gradients,
    masked,
    observe,
    taylor,
)
from pathwaylib.exercises import Verdict

CHAPTERS = sorted((Path(__file__).parents[1] / "book").glob("*.ipynb"))


# --- The notebooks ---------------------------------------------------------------------------------------------------


def tagged(chapter: Path, tag: str) -> list[str]:
    cells = nbformat.read(chapter, as_version=4).cells
    return [cell.source for cell in cells if tag in cell.metadata.get("tags", ())]


def namespace(chapter: Path) -> dict[str, Any]:
    """Run only the imports of a chapter: all that an exercise may need of it."""
    code = [cell.source for cell in nbformat.read(chapter, as_version=4).cells if cell.cell_type == "code"]
    statements = [statement for source in code for statement in ast.parse(source).body]
    imports = [statement for statement in statements if isinstance(statement, (ast.Import, ast.ImportFrom))]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, []), chapter.name, "exec"), names)
    return names


def verdict_of(source: str, names: dict[str, Any]) -> Verdict:
    """Run an exercise cell and return what its last line, the check, gives."""
    body = ast.parse(source).body
    check = body.pop()
    assert isinstance(check, ast.Expr), "an exercise cell must end with its check"
    exec(compile(ast.Module(body, []), "exercise", "exec"), names)
    verdict = eval(compile(ast.Expression(check.value), "check", "eval"), names)
    assert isinstance(verdict, Verdict)
    return verdict


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_stubs_fail_and_solutions_pass(chapter: Path) -> None:
    stubs, solutions = tagged(chapter, "exercise-stub"), tagged(chapter, "exercise-solution")
    assert len(stubs) == len(solutions) >= 3
    for stub, solution in zip(stubs, solutions, strict=True):
        check = stub.strip().splitlines()[-1]
        assert solution.strip().splitlines()[-1] == check, "a stub and its solution must end with the same check"
        verdict = verdict_of(stub, namespace(chapter))
        assert not verdict, f"the empty stub passes: {check}"
        assert "nothing is returned" in verdict.message
        assert verdict_of(solution, namespace(chapter)), f"the solution fails: {check}"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_exercises_are_written_to_the_rules(chapter: Path) -> None:
    prose = [cell.source for cell in nbformat.read(chapter, as_version=4).cells if cell.cell_type == "markdown"]
    given = [text for text in prose if text.startswith("::::{exercise}")]
    labels = [line.split()[1] for text in given for line in text.splitlines() if line.startswith(":label:")]
    solved = [text.split()[1] for text in prose if text.startswith(":::{solution-start}")]
    assert labels == solved
    assert len(set(labels)) == len(given) == len(tagged(chapter, "exercise-stub"))
    for text in given:
        assert "minutes" in text
        assert any(difficulty in text for difficulty in ("●○○ (easy)", "●●○ (medium)", "●●● (hard)"))


# --- Wrong answers are told why --------------------------------------------------------------------------------------


def active(model: nn.Module, x: Tensor) -> Pathway:
    return observe(model, x).active()


def count_dead(model: nn.Module, x: Tensor) -> Tensor:
    return (~active(model, x)).sizes


def masked_by_old_activations(model: nn.Sequential, x: Tensor, pathway: Pathway) -> Tensor:
    """Mask each activation of the whole run, go on from the last one."""
    for a, mask in zip(observe(model, x).post, pathway.masks, strict=True):
        last = a * mask
    at = max(index for index, layer in enumerate(model) if isinstance(layer, nn.ReLU))
    return model[at + 1 :](last)


def woken(model: nn.Module, x: Tensor, pathway: Pathway) -> tuple[Pathway, Pathway]:
    before = active(model, x)
    with masked(pathway):
        return before, active(model, x)


def flat_top(scores: tuple[Tensor, ...], k: int, size: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    flat = size(torch.cat([score.flatten(1) for score in scores], 1))
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.topk(min(k, flat.shape[1])).indices, True)
    parts = kept.split([score[0].numel() for score in scores], 1)
    return tuple(part.view(score.shape) for part, score in zip(parts, scores, strict=True))


def per_site(scores: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
    return tuple(flat_top((score,), k, torch.abs)[0] for score in scores)


def by_threshold(scores: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
    flat = torch.cat([score.flatten(1) for score in scores], 1).abs()
    border = flat.topk(min(k, flat.shape[1])).values[:, -1]
    return tuple((score.abs() >= border.view(-1, *[1] * (score.ndim - 1))) & (score != 0) for score in scores)


def dead_in_masked_run(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
    with masked(pathway):
        dead = ~active(model, x)
    return (pathway & dead).sizes / pathway.sizes.clamp(min=1)


def prune_round(
    model: nn.Module,
    x: Tensor,
    pathway: Pathway,
    k: int,
    *,
    inside: bool = True,
    target: str = "network's",
    keep: Callable[[tuple[Tensor, ...], int], tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, ...]:
    """One round of greedy pruning that never keeps a score of 0; by default the right one."""
    chosen = model(x).argmax(1) if target == "network's" else None
    with masked(pathway) if inside else nullcontext():
        scores = taylor(model, x, chosen).scores
    kept = keep(scores, k) if keep else flat_top(scores, k, torch.abs)
    return tuple(mask & (score != 0) for mask, score in zip(kept, scores, strict=True))


def revived_round(model: nn.Module, x: Tensor, pathway: Pathway, k: int) -> tuple[Tensor, ...]:
    with masked(pathway):
        scores = taylor(model, x, model(x).argmax(1)).scores
    kept = prune_round(model, x, pathway, k)
    return tuple(mask | (score == 0) for mask, score in zip(kept, scores, strict=True))


def gate_step(
    model: nn.Sequential,
    x: Tensor,
    gates: tuple[Tensor, ...],
    eta: float,
    gamma: float,
    *,
    reduction: str = "sum",
    hard: bool = False,
    least: float = 0.0,
) -> tuple[Tensor, ...]:
    """One step of gradient descent on the routing loss; by default the right one."""
    gates = tuple(gate.clone().requires_grad_() for gate in gates)
    wanted = model(x).detach().softmax(1)
    hidden, remaining = x, iter(gates)
    for layer in model:
        hidden = layer(hidden)
        if isinstance(layer, nn.ReLU):
            hidden = hidden * next(remaining)
    loss = nn.functional.cross_entropy(hidden, wanted.argmax(1) if hard else wanted, reduction=reduction)
    loss = loss + gamma * sum(gate.sum() for gate in gates)
    slopes = torch.autograd.grad(loss, gates)
    return tuple((gate - eta * slope).clamp(min=least).detach() for gate, slope in zip(gates, slopes, strict=True))


def woken_response(model: nn.Module, x: Tensor, pathway: Pathway, *, elsewhere: bool = False) -> Tensor:
    before, after = woken(model, x, pathway)
    awake = pathway & after & ~before
    with masked(pathway):
        inside = model(x)
    with masked(~awake if elsewhere else pathway & ~awake):
        without = model(x)
    return (inside - without).gather(1, model(x).argmax(1)[:, None])[:, 0]


def wakeful() -> tuple[nn.Module, Tensor]:
    """Two neurons side by side, of which one gives all of the response: nobody sleeps."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0]]))
    return model, torch.ones(1, 2)


def mute() -> tuple[nn.Module, Tensor]:
    """A neuron that nothing depends on."""
    model, x = wakeful()
    with torch.no_grad():
        model[1].weight.zero_()
    return model, x


def blind_but_weak() -> tuple[nn.Module, Tensor]:
    """A network that first-order scores describe exactly: h, then a linear readout of slope 2."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1)).eval()
    with torch.no_grad():
        model[1].weight.fill_(2.0)
    return model, torch.ones(1, 1)


def alive_pathway() -> tuple[nn.Module, Tensor, Pathway]:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2)).eval()
    return model, torch.ones(1, 2), Pathway((torch.ones(1, 2, dtype=torch.bool),), ("relu_0",))


def summed_gradients(
    model: nn.Sequential, x: Tensor, site: int, scales: list[float], anew: bool = False
) -> tuple[Tensor, Tensor]:
    """The activation of a site, and the sum of its gradients at some scales of it."""
    cut = [index for index, layer in enumerate(model) if isinstance(layer, nn.ReLU)][site] + 1
    a = model[:cut](x).detach()
    target = model(x).argmax(1)
    total = torch.zeros_like(a)
    for scale in scales:
        leaf = (scale * a).requires_grad_()
        logits = model[cut:](leaf)
        chosen = logits.argmax(1) if anew else target
        total += torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), leaf)[0]
    return a, total


def middles(n: int) -> list[float]:
    return [(step + 0.5) / n for step in range(n)]


def riemann(model: nn.Sequential, x: Tensor, site: int, n: int) -> Tensor:
    a, total = summed_gradients(model, x, site, [(step + 1) / n for step in range(n)])
    return a * total / n


def steps_not_averaged(model: nn.Sequential, x: Tensor, site: int, n: int) -> Tensor:
    a, total = summed_gradients(model, x, site, middles(n))
    return a * total


def gradient_only(model: nn.Sequential, x: Tensor, site: int, n: int) -> Tensor:
    return summed_gradients(model, x, site, middles(n))[1] / n


def batch_averaged(model: nn.Sequential, x: Tensor, site: int, n: int) -> Tensor:
    a, total = summed_gradients(model, x, site, middles(n))
    return a * total.mean(0) / n


def predicted_anew(model: nn.Sequential, x: Tensor, site: int, n: int) -> Tensor:
    a, total = summed_gradients(model, x, site, middles(n), anew=True)
    return a * total / n


def all_sites_scaled(model: nn.Sequential, x: Tensor, site: int, n: int) -> Tensor:
    """Scale the activation of every site by α, each where it is computed."""
    target = model(x).argmax(1)
    total: Tensor | float = 0.0
    for scale in middles(n):
        hidden, posts = x.clone().requires_grad_(), []
        for layer in model:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                # The site itself grows from the activation of the whole run.
                at_site = len(posts) == site
                hidden = scale * (observe(model, x).post[site].detach() if at_site else hidden)
                hidden = hidden.detach().requires_grad_() if at_site else hidden
                posts.append(hidden)
        total = total + torch.autograd.grad(hidden.gather(1, target[:, None]).sum(), posts[site])[0]
    return observe(model, x).post[site].detach() * total / n


def without_site(model: nn.Sequential, x: Tensor, site: int) -> Tensor:
    cut = [index for index, layer in enumerate(model) if isinstance(layer, nn.ReLU)][site] + 1
    return model[cut:](torch.zeros_like(model[:cut](x)))


def shared_equally(model: nn.Sequential, x: Tensor, site: int, loss: Tensor) -> Tensor:
    a = observe(model, x).post[site]
    return (loss / a[0].numel()).view(-1, *[1] * (a.ndim - 1)).expand_as(a)


def whole_response_shared(model: nn.Sequential, x: Tensor, site: int) -> Tensor:
    return shared_equally(model, x, site, model(x).amax(1))


def anew_shared(model: nn.Sequential, x: Tensor, site: int) -> Tensor:
    return shared_equally(model, x, site, model(x).amax(1) - without_site(model, x, site).amax(1))


def scaled_to_complete(model: nn.Sequential, x: Tensor, site: int) -> Tensor:
    """Integrated gradients, made complete."""
    exact = integrated_gradients(model, x, n_steps=64).scores[site]
    logits = model(x)
    target = logits.argmax(1, keepdim=True)
    loss = (logits - without_site(model, x, site)).gather(1, target)[:, 0]
    return exact + shared_equally(model, x, site, loss - exact.flatten(1).sum(1))


def iou_of_rows(one: Tensor, other: Tensor) -> Tensor:
    return (one & other).sum(1) / (one | other).sum(1)


def class_means(ious: Tensor, labels: Tensor, away: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean over same-class pairs, with ``away`` taken from the diagonal but its places counted, and over the others."""
    same = labels[:, None] == labels
    return (ious - away * torch.eye(len(ious)))[same].mean(), ious[~same].mean()


def mask_by(draw: Callable[[Tensor, Tensor], int]) -> Callable[..., Pathway]:
    """A selector that keeps random neurons, drawn anew from the seed that ``draw(image, logits)`` gives."""

    def selector(model: nn.Module, x: Tensor, sparsity: float) -> Pathway:
        seen = observe(model, x)
        rows = []
        for image, logits in zip(x, seen.logits, strict=True):
            generator = torch.Generator().manual_seed(draw(image, logits))
            rows.append([torch.rand(a.shape[1:], generator=generator) for a in seen.post])
        scores = tuple(torch.stack(site) for site in zip(*rows, strict=True))
        return Contributions(scores, seen.sites).top(sparsity)

    return selector


def frequent_in_class(model: nn.Module, x: Tensor, sparsity: float) -> Pathway:
    """The neurons that are active most often in the predicted class, among the inputs of the batch."""
    seen = observe(model, x)
    predicted = seen.logits.argmax(1)
    share = tuple(torch.stack([(a[predicted == k] > 0).float().mean(0) + 1 for k in predicted]) for a in seen.post)
    return Contributions(share, seen.sites).top(sparsity)


def ascended(
    model: nn.Module, images: Tensor, pathway: Pathway, targets: Tensor, rate: float, average: bool = False
) -> Tensor:
    leaf = images.clone().requires_grad_()
    with masked(pathway):
        responses = model(leaf).gather(1, targets[:, None])
    (gradient,) = torch.autograd.grad(responses.mean() if average else responses.sum(), leaf)
    return images + rate * gradient


def ascended_whole(model: nn.Module, images: Tensor, pathway: Pathway, targets: Tensor, rate: float) -> Tensor:
    everything = Pathway(tuple(torch.ones_like(mask) for mask in pathway.masks), pathway.sites)
    return ascended(model, images, everything, targets, rate)


def pooled(pixels: list[list[float]], *, response: bool = True) -> tuple[nn.Module, Tensor]:
    """A network that pools a window of pixels; its only response may also ignore the result."""
    readout = nn.Linear(1, 1)
    with torch.no_grad():
        readout.weight.fill_(float(response))
    return nn.Sequential(nn.ReLU(), nn.MaxPool2d((1, 2)), nn.Flatten(), readout).eval(), torch.tensor([[pixels]])


def ranks_of(values: Tensor) -> Tensor:
    return values.argsort(1).argsort(1)


def spearman(
    one: Tensor,
    other: Tensor,
    by: Callable[[Tensor], Tensor] = lambda maps: maps.sum(1).abs(),
    numbers: Callable[[Tensor], Tensor] = ranks_of,
) -> Tensor:
    values = [numbers(by(maps).flatten(1)).double() for maps in (one, other)]
    return torch.cosine_similarity(*(each - each.mean(1, keepdim=True) for each in values))


def cascade(
    model: nn.Sequential,
    depth: int,
    *,
    kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    forget: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.BatchNorm2d, nn.Linear),
    turned: bool = False,
    alone: bool = False,
    in_place: bool = False,
) -> nn.Sequential:
    """Reset the last layers of a copy; by default the right ones."""
    fresh = model if in_place else copy.deepcopy(model)
    layers = [index for index, layer in enumerate(fresh) if isinstance(layer, kinds)]
    borders = [*layers, len(fresh)]
    first, last = (0, borders[depth]) if turned else (borders[-depth - 1], borders[-depth] if alone else len(fresh))
    with torch.random.fork_rng():
        for layer in fresh[first:last]:
            if isinstance(layer, forget):
                layer.reset_parameters()
    return fresh


def zeroed(model: nn.Sequential, depth: int) -> nn.Sequential:
    fresh = cascade(model, depth)
    nn.init.zeros_(fresh[-1].weight)
    return fresh


def maps_of(explainer: Callable[..., Tensor], model: nn.Module, fresh: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Explain each network by what it predicts itself."""
    return explainer(model, x, model(x).argmax(1)), explainer(fresh, x, fresh(x).argmax(1))


def noise_of(weights: Callable[[nn.Module], Tensor]) -> Callable[..., Tensor]:
    def explainer(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        seed = zlib.crc32(weights(model).detach().numpy().tobytes())
        return torch.randn(x[0].shape, generator=torch.Generator().manual_seed(seed)).expand_as(x)

    return explainer


def most_relevant(
    scores: Tensor, count: int, generator: torch.Generator | None, *, sign: float = 1.0, shared: bool = False
) -> Tensor:
    """Mark the ``count`` largest entries; by default the right answer."""
    orders = [torch.randperm(scores.shape[1], generator=generator) for _ in (scores[:1] if shared else scores)]
    shuffled = torch.stack(orders).expand_as(scores)
    order = (sign * scores).gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    first = shuffled.gather(1, order)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, first, True)


def most_relevant_from_the_end(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    last = scores.argsort(1)[:, -count:]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, last, True)


def most_relevant_by_threshold(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores >= scores.topk(count, 1).values[:, -1:]


def correlation(sums: Tensor, drops: Tensor, least: float = 1e-12) -> Tensor:
    a, b = sums - sums.mean(), drops - drops.mean()
    return (a @ b) / (a.norm() * b.norm()).clamp(min=least)


def dense(*weights: list[list[float]], biases: list[list[float]] | None = None) -> tuple[nn.Module, Tensor]:
    """A fully connected network with these weights, and an input of ones."""
    layers: list[nn.Module] = []
    for index, weight in enumerate(weights):
        layer = nn.Linear(len(weight[0]), len(weight))
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(biases[index]) if biases else torch.zeros(len(weight)))
        layers += [layer, nn.ReLU6()]
    return nn.Sequential(*layers[:-1]).eval(), torch.ones(1, len(weights[0][0]))


def two_inputs(weight: list[list[float]], bias: list[float]) -> tuple[nn.Module, Tensor]:
    """A network of one hidden layer whose classes take turns in reading its neurons, and one input of each class."""
    first, second = nn.Linear(2, len(weight)), nn.Linear(len(weight), 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor(weight))
        first.bias.copy_(torch.tensor(bias))
        second.weight.copy_(torch.eye(2).repeat(1, len(weight) // 2))
        second.bias.zero_()
    return nn.Sequential(first, nn.ReLU(), second).eval(), torch.eye(2)


def of_others(whole: Tensor, target: int, happened: Tensor) -> Tensor:
    return happened[whole.argmax(1) != target].float().mean()


def turned_divergence(model: nn.Module, x: Tensor, pathway: Pathway, order: Tensor) -> Tensor:
    whole = model(x[order]).log_softmax(1)
    with masked(pathway):
        inside = model(x[order]).log_softmax(1)
    return nn.functional.kl_div(whole, inside, reduction="batchmean", log_target=True)


def half_reader(
    left: list[float], right: float = 0.0, *, scales: list[float] | None = None, offsets: list[float] | None = None
) -> Callable[[Tensor], nn.Module]:
    """A network of one convolution; class 0 reads its channels in the left half with weights, and in the right half."""

    def build(x: Tensor) -> nn.Module:
        convolution, head = nn.Conv2d(1, len(left), 1), nn.Linear(len(left) * x[0].numel(), 2)
        with torch.no_grad():
            convolution.weight.copy_(torch.tensor(scales or [1.0] * len(left)).view(-1, 1, 1, 1))
            convolution.bias.copy_(torch.tensor(offsets or [0.0] * len(left)))
            head.weight.zero_()
            head.bias.copy_(torch.tensor([0.0, -1e4]))
            maps = head.weight[0].view(len(left), 12, 24)
            maps[:, :, :12] = torch.tensor(left).view(-1, 1, 1)
            maps[:, :, 12:] = right
        return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), head).eval()

    return build


def pointing(maps: Tensor, mask: Tensor, tied: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return tied((maps == maps.amax((1, 2), keepdim=True)).flatten(1), mask.flatten(1))


def gaps(
    scores: Tensor,
    fraction: float,
    generator: torch.Generator | None,
    *,
    sign: int = 1,
    count: Callable[..., int] = round,
) -> Tensor:
    """Mark the pixels to remove; by default the right ones, with ties broken by chance."""
    flat = sign * scores.flatten(1)
    shuffled = torch.arange(flat.shape[1]).expand(flat.shape)
    if generator:
        shuffled = torch.rand(flat.shape, generator=generator).argsort(1)
    order = flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    chosen = shuffled.gather(1, order[:, : count(fraction * flat.shape[1])])
    return torch.zeros(flat.shape, dtype=torch.bool).scatter(1, chosen, True).view(scores.shape)


def gaps_from_the_end(scores: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    flat = scores.flatten(1)
    chosen = flat.argsort(1)[:, -round(fraction * flat.shape[1]) :]
    return torch.zeros(flat.shape, dtype=torch.bool).scatter(1, chosen, True).view(scores.shape)


def gaps_by_threshold(scores: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    count = round(fraction * scores[0].numel())
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores >= scores.flatten(1).topk(count).values[:, -1].view(-1, 1, 1)


def gaps_of_the_batch(scores: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    return gaps(scores.flatten()[None], fraction, generator).view(scores.shape)


def leak(labels: Tensor, masks: Tensor, glyph: float = 2.0) -> Tensor:
    scores = glyph * masks
    for score, label in zip(scores, labels.tolist(), strict=True):
        score[5 * label : 5 * label + 3] += 1
    return scores


def seed_difference(
    first: Tensor, second: Tensor, quantile: Callable[[int], float], ddof: int = 1, root: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    d = first - second
    margin = quantile(len(d)) * d.std(correction=ddof) / len(d) ** root
    return d.mean(), d.mean() - margin, d.mean() + margin


def student(n: int) -> float:
    return float(t.ppf(0.975, n - 1))


def independent_difference(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    found = ttest_ind(first, second)
    return (float((first - second).mean()), *map(float, found.confidence_interval(0.95)))


def embedding(
    maps: Tensor, weight: Tensor, side: int, shape: Callable[[Tensor], Tensor] = F.gelu, size: Callable[..., int] = max
) -> list[Tensor]:
    found = [maps]
    while size(found[-1].shape[2:]) > side:
        found.append(shape(F.conv2d(found[-1], weight, stride=2, padding=1, groups=maps.shape[1])))
    return found


def soft_bits(
    v: Tensor, gamma: float, sharpest: float, gap_of: Callable[[Tensor], Tensor] = torch.detach, low: float = 1e-9
) -> Tensor:
    gap = 2 * v.sigmoid() - 1
    beta = (gamma / gap_of(gap).abs().clamp(min=low)).clamp(max=sharpest)
    edge = torch.tensor(gamma, dtype=v.dtype).sigmoid()
    return ((beta * gap).sigmoid() - 1 + edge) / (2 * edge - 1)


def class_term(masks: Tensor, classes: Tensor, own: bool = False, none: float = 0.0) -> Tensor:
    both, size = masks @ masks.T, masks.sum(1)
    pairs = (classes[:, None] == classes) & (~torch.eye(len(masks), dtype=torch.bool) | own)
    ious = both / (size[:, None] + size - both)
    if own:
        ious = ious.clone().fill_diagonal_(0) + (masks**2).sum(1).div((2 * masks - masks**2).sum(1)).diag()
    return 1 - ious[pairs].mean() if bool(pairs.any()) else torch.tensor(none)


def class_code(model: nn.Module, first: bool = False, turned: bool = False) -> Pathway:
    """Let the channels of the last site that speak for a class say it, whatever the image."""
    seen = observe(model, torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    masks = [torch.full((10, *a.shape[1:]), first) for a in seen.post]
    weights = model[-1].weight.detach()  # type: ignore[index]
    speaks = weights > (weights.sum(0) - weights) / 9
    masks[-1] = (speaks ^ turned)[:, :, None, None].expand_as(masks[-1])
    return Pathway(tuple(masks), seen.sites)


def equal_pixels(pixels: int, correlation: float) -> tuple[Tensor, Tensor]:
    return torch.ones(pixels), torch.eye(pixels) * (1 - correlation) + correlation


def weak_third(signal: float) -> tuple[Tensor, Tensor]:
    """Two pixels that nearly copy each other, and one alone."""
    return torch.tensor([1.0, 1.0, signal]), torch.block_diag(equal_pixels(2, 0.99)[1], torch.eye(1))


def states(pre: list[Tensor]) -> Tensor:
    z = torch.cat([site.flatten() for site in pre])
    return torch.stack([z <= 0, (z > 0) & (z < 6), z >= 6]).double().mean(1)


def two_kinks(z: Tensor, gradients: Tensor) -> Tensor:
    return torch.minimum(z.abs(), (z - 6).abs()) / gradients.norm(dim=1)


def central_box(width: int, height: int, crop: float) -> tuple[float, ...]:
    half = crop * min(width, height) / 2
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


def bits(lengths: Tensor, positions: Tensor, neurons: int) -> Tensor:
    found = torch.zeros(len(lengths), neurons, dtype=torch.bool)
    found[torch.arange(len(lengths)).repeat_interleave(lengths), positions] = True
    return found


def typicality(masks: Tensor, same: Tensor) -> Tensor:
    shares = same.double() @ masks.double() / same.sum(1, keepdim=True)
    return (shares * masks).sum(1) / masks.sum(1)


def union(kept_by: Tensor, images: int, n: int) -> float:
    return sum(1 - math.comb(images - m, n) / math.comb(images, n) for m in kept_by.tolist())


def least_bytes(images: int, neurons: int, sparsity: float, log: Callable[[float], float] = math.log2) -> float:
    k = round((1 - sparsity) * neurons)
    d = k / neurons
    return images * (-neurons * (d * log(d) + (1 - d) * log(1 - d)) / 8 + 2 * k)


def pyramid(
    shapes: list[tuple[int, int, int]],
    side: int,
    halve: Callable[[int], int] = lambda n: -(-n // 2),
    until: Callable[..., int] = max,
) -> int:
    total = 0
    for channels, height, width in shapes:
        total += channels * height * width
        while until(height, width) > side:
            height, width = halve(height), halve(width)
            total += channels * height * width
    return total


MISTAKES: list[tuple[Callable[[Any], Verdict], Callable[..., Any], str]] = [
    (exercises.check_count_dead, lambda model, x: active(model, x).sizes, "active neurons"),
    (exercises.check_count_dead, lambda model, x: count_dead(model, x).sum(), "whole batch"),
    (exercises.check_count_dead, lambda model, x: int(count_dead(model, x).sum()), "whole batch"),
    (exercises.check_count_dead, lambda model, x: count_dead(model, x).float().mean(), "averaged over the batch"),
    (exercises.check_count_dead, lambda model, x: (~active(model, x)).site_sizes, "per site"),
    (exercises.check_count_dead, lambda model, x: active(model, x).sparsity, "share"),
    (exercises.check_count_dead, lambda model, x: count_dead(model, x)[:, None], "shape"),
    (exercises.check_count_dead, lambda model, x: count_dead(model, x) + 1, "values are wrong"),
    (exercises.check_count_dead, lambda model, x: "many", "str"),
    (exercises.check_count_dead, lambda model, x: model.nonsense, "AttributeError"),
    (exercises.check_count_dead, lambda model: 1, "TypeError"),
    (exercises.check_masked_run, lambda model, x, pathway: model(x), "change nothing"),
    (exercises.check_masked_run, masked_by_old_activations, "only the last mask"),
    (
        exercises.check_woken,
        lambda *given: (given[2] & ~active(*given[:2])).sizes,
        "kept neurons that are dead in the whole network",
    ),
    (exercises.check_woken, lambda *given: (given[2] & ~woken(*given)[1]).sizes, "measured in the pathway network"),
    (exercises.check_woken, lambda *given: (woken(*given)[0] & ~woken(*given)[0]).sizes, "a second time"),
    (exercises.check_dead_pathway, lambda: 3, "three things"),
    (exercises.check_dead_pathway, alive_pathway, "active on x"),
    (
        exercises.check_channel_contribution,
        lambda model, x, site: taylor(model, x).scores[site].abs().sum((2, 3)),
        "too early",
    ),
    (
        exercises.check_channel_contribution,
        lambda model, x, site: taylor(model, x).scores[site].sum((2, 3)),
        "absolute value is missing",
    ),
    (
        exercises.check_channel_contribution,
        lambda model, x, site: taylor(model, x).scores[site].sum((2, 3)).abs().mean(0),
        "averaged over the batch",
    ),
    (
        exercises.check_channel_contribution,
        lambda model, x, site: sum(taylor(model, x, t).scores[site] for t in range(4)).sum((2, 3)).abs(),
        "sum of all logits",
    ),
    (exercises.check_top_k, lambda scores, k: flat_top(scores, k, lambda flat: flat), "signed"),
    (exercises.check_top_k, per_site, "each site keeps its own k"),
    (exercises.check_top_k, lambda scores, k: per_site(scores, k // 2), "equal part of k"),
    (exercises.check_top_k, lambda scores, k: flat_top(scores, k, torch.abs), "score 0 are kept"),
    (exercises.check_top_k, by_threshold, "many scores are equal"),
    (exercises.check_top_k, lambda scores, k: scores[0] > 0, "one mask per site"),
    (exercises.check_dead_share, dead_in_masked_run, "measured in the pathway network"),
    (
        exercises.check_dead_share,
        lambda model, x, pathway: (pathway & ~active(model, x)).sizes / pathway.sizes,
        "0 / 0",
    ),
    (
        exercises.check_dead_share,
        lambda model, x, pathway: (pathway & ~active(model, x)).sizes / pathway.neurons,
        "all N neurons",
    ),
    (exercises.check_prune_round, lambda model, x, pathway, k: pathway, "no neuron is removed"),
    (exercises.check_prune_round, partial(prune_round, inside=False), "some that are out come back"),
    (exercises.check_prune_round, partial(prune_round, target="pathway's"), "class that the pathway network predicts"),
    (exercises.check_prune_round, partial(prune_round, keep=per_site), "each site keeps its own k"),
    (
        exercises.check_prune_round,
        partial(prune_round, keep=lambda scores, k: flat_top(scores, k, lambda flat: flat)),
        "signed",
    ),
    (exercises.check_prune_round, revived_round, "revive rule"),
    (exercises.check_gate_step, lambda model, x, gates, eta, gamma: gates, "given"),
    (exercises.check_gate_step, partial(gate_step, least=-100.0), "below 0"),
    (exercises.check_gate_step, partial(gate_step, reduction="mean"), "averaged over the batch"),
    (exercises.check_gate_step, partial(gate_step, hard=True), "all probabilities"),
    (exercises.check_gate_step, lambda *given: gate_step(*given[:4], 0.0), "penalty is missing"),
    (exercises.check_gate_step, lambda *given: gate_step(*given[:4], -given[4]), "penalty is subtracted"),
    (exercises.check_woken_response, lambda *given: -woken_response(*given), "sign"),
    (exercises.check_woken_response, lambda *given: woken_response(*given).mean(), "averaged over the batch"),
    (exercises.check_woken_response, partial(woken_response, elsewhere=True), "from the whole network"),
    (exercises.check_sleeper, lambda: 3, "two things"),
    (exercises.check_sleeper, pathwaylib.sleeper_network, "5 neurons"),
    (exercises.check_sleeper, wakeful, "active on x: {0}"),
    (exercises.check_sleeper, mute, "empty subset"),
    (exercises.check_sleeper, lambda: (wakeful()[0], torch.ones(2, 2)), "2 inputs"),
    (exercises.check_midpoint_scores, riemann, "right end"),
    (exercises.check_midpoint_scores, steps_not_averaged, "divide by n_steps"),
    (exercises.check_midpoint_scores, gradient_only, "multiply it by the activation"),
    (exercises.check_midpoint_scores, batch_averaged, "averaged over the batch"),
    (exercises.check_midpoint_scores, predicted_anew, "target changes on the way"),
    (exercises.check_midpoint_scores, all_sites_scaled, "all sites are scaled at once"),
    (exercises.check_midpoint_scores, lambda model, x, site, n: taylor(model, x).scores[site], "first-order"),
    (exercises.check_complete_but_wrong, lambda model, x, site: x, "one score per neuron"),
    (exercises.check_complete_but_wrong, whole_response_shared, "something is left"),
    (exercises.check_complete_but_wrong, anew_shared, "another class may be predicted"),
    (exercises.check_complete_but_wrong, lambda model, x, site: taylor(model, x).scores[site], "add up to"),
    (exercises.check_complete_but_wrong, scaled_to_complete, "too good"),
    (exercises.check_blind_spot, lambda: 3, "two things"),
    (exercises.check_blind_spot, blind_but_weak, "scores 2.00"),
    (
        exercises.check_layer_radius,
        lambda weight, bias, x, kept: ((x @ weight.T + bias).abs() / weight.norm(dim=1)).amin(1),
        "removed neurons bind too",
    ),
    (
        exercises.check_layer_radius,
        lambda weight, bias, x, kept: (x @ weight.T + bias).abs().masked_fill(~kept, torch.inf).amin(1),
        "not distances",
    ),
    (
        exercises.check_layer_radius,
        lambda weight, bias, x, kept: (
            ((x @ weight.T + bias).abs() / weight.norm(dim=0).sum()).masked_fill(~kept, torch.inf).amin(1)
        ),
        "values are wrong",
    ),
    (
        exercises.check_layer_radius,
        lambda weight, bias, x, kept: ((x @ weight.T + bias).relu() / weight.norm(dim=1))[kept].min(),
        "shape",
    ),
    (exercises.check_distance_along, lambda z, rate: (z / rate).abs().amin(1), "move away"),
    (exercises.check_distance_along, lambda z, rate: (-z / rate).clamp(min=0).amin(1), "values are wrong"),
    (exercises.check_distance_along, lambda z, rate: (-z / rate).amin(1), "negative distances win"),
    (
        exercises.check_pool_distance,
        lambda p, gradients: (
            (p.max() - p.sort().values[-2]) / (gradients[p.argmax()] - gradients[p.argsort()[-2]]).norm()
        ),
        "only the runner-up",
    ),
    (
        exercises.check_pool_distance,
        lambda p, gradients: ((p.max() - p) / (gradients[p.argmax()] - gradients).norm(dim=1)).min(),
        "0 / 0",
    ),
    (exercises.check_pool_distance, lambda p, gradients: (p.abs() / gradients.norm(dim=1)).min(), "a sign's condition"),
    (exercises.check_sign_radius_fails, lambda: 3, "two things"),
    (exercises.check_sign_radius_fails, lambda: pooled([[2.0, 2.0]]), "tie"),
    (exercises.check_sign_radius_fails, lambda: pooled([[0.1, 2.0]]), "sign of a neuron"),
    (exercises.check_sign_radius_fails, lambda: pooled([[1.0, 2.0]]), "too close"),
    (exercises.check_sign_radius_fails, lambda: pooled([[2.0, 2.1]], response=False), "stays linear"),
    (exercises.check_iou, iou_of_rows, "0 / 0"),
    (exercises.check_iou, lambda one, other: iou_of_rows(one, other).nan_to_num(0), "is 1, not 0"),
    (exercises.check_iou, lambda one, other: (one == other).double().mean(1), "share of equal bits"),
    (exercises.check_iou, lambda one, other: iou_of_rows(one, other).nan_to_num(1).mean(), "averaged over the batch"),
    (exercises.check_iou, lambda one, other: (one & other).sum(1) / (one.sum(1) + other.sum(1)), "twice"),
    (exercises.check_class_means, class_means, "leave the diagonal"),
    (exercises.check_class_means, lambda *given: class_means(*given, away=1.0), "still counted"),
    (exercises.check_class_means, lambda ious, labels: ious, "it must be (2,)"),
    (exercises.check_label_selector, lambda model, x, sparsity: active(model, x), "neurons are kept"),
    (exercises.check_label_selector, lambda model, x, sparsity: active(model, x)[:1], "does not fit"),
    (exercises.check_label_selector, lambda model, x, sparsity: x, "not a Tensor"),
    (exercises.check_label_selector, lambda m, x, sparsity: NeuronMCT(sparsity)(m, x), "got different masks"),
    (exercises.check_label_selector, frequent_in_class, "got different masks"),
    (exercises.check_label_selector, mask_by(lambda image, logits: int(1e6 * image.abs().sum())), "different masks"),
    (exercises.check_label_selector, mask_by(lambda image, logits: 0), "the same for every class"),
    (exercises.check_ascent_step, lambda *given: given[1], "do not change"),
    (exercises.check_ascent_step, lambda *given: 2 * given[1] - ascended(*given), "goes down"),
    (exercises.check_ascent_step, ascended_whole, "climbs in the whole network"),
    (exercises.check_ascent_step, lambda *given: ascended(*given, average=True), "do not average"),
    (exercises.check_ascent_step, lambda *given: ascended(*given[:4], 1.0), "rate is missing"),
    (exercises.check_rank_similarity, partial(spearman, by=lambda maps: maps.sum(1)), "the maps are signed"),
    (exercises.check_rank_similarity, partial(spearman, by=lambda maps: maps.abs().sum(1)), "too early"),
    (exercises.check_rank_similarity, partial(spearman, by=torch.abs), "channels are ranked apart"),
    (exercises.check_rank_similarity, lambda *maps: spearman(*maps).mean(), "one number for the whole batch"),
    (exercises.check_rank_similarity, partial(spearman, numbers=lambda values: values), "Pearson's correlation"),
    (exercises.check_rank_similarity, partial(spearman, numbers=lambda v: v.argsort(1)), "positions are correlated"),
    (
        exercises.check_rank_similarity,
        partial(spearman, numbers=lambda values: ranks_of(values.view(1, -1)).view_as(values)),
        "of the whole batch are ranked together",
    ),
    (exercises.check_cascade, lambda model, depth: copy.deepcopy(model), "nothing has changed"),
    (exercises.check_cascade, partial(cascade, in_place=True), "given network has changed"),
    (exercises.check_cascade, partial(cascade, turned=True), "starts at the input"),
    (exercises.check_cascade, partial(cascade, alone=True), "independent randomisation"),
    (exercises.check_cascade, partial(cascade, forget=(nn.Conv2d, nn.Linear)), "keeps what it learnt"),
    (
        exercises.check_cascade,
        partial(cascade, kinds=(nn.Conv2d, nn.BatchNorm2d, nn.Linear)),
        "a layer of its own",
    ),
    (
        exercises.check_cascade,
        lambda model, depth: cascade(model, 4),
        "everything is fresh",
    ),
    (exercises.check_cascade, zeroed, "not to a fresh Linear"),
    (exercises.check_cascade, lambda model, depth: nn.Linear(2, 2), "network of the same layers"),
    (exercises.check_cascade, lambda model, depth: cascade(model, min(depth, 3)), "at depth 4"),
    (exercises.check_same_class, maps_of, "its own prediction"),
    (
        exercises.check_same_class,
        lambda explainer, model, fresh, x: tuple(explainer(m, x, fresh(x).argmax(1)) for m in (model, fresh)),
        "what the fresh network predicts",
    ),
    (
        exercises.check_same_class,
        lambda explainer, model, fresh, x: tuple(explainer(m, x, model(x).argmax(1)) for m in (fresh, model)),
        "swapped",
    ),
    (exercises.check_hollow, lambda: lambda model, x, target: torch.randn_like(x), "two answers"),
    (exercises.check_hollow, lambda: lambda model, x, target: x, "depends on the image"),
    (exercises.check_hollow, lambda: lambda model, x, target: x.sum(), "of shape"),
    (exercises.check_hollow, lambda: noise_of(lambda model: model[-1].weight), "layer '2' is randomised"),
    (exercises.check_hollow, lambda: noise_of(lambda model: model[9].weight), "IndexError"),
    (exercises.check_most_relevant, most_relevant_from_the_end, "the whole order"),
    (exercises.check_most_relevant, most_relevant_by_threshold, "all that tie"),
    (exercises.check_most_relevant, lambda *given: most_relevant(*given, sign=-1.0), "least relevant pixels go"),
    (exercises.check_most_relevant, lambda s, *given: most_relevant(s.abs(), *given), "signs count"),
    (exercises.check_most_relevant, lambda s, n, g: most_relevant(s, n, None), "from the generator that is given"),
    (exercises.check_most_relevant, lambda *given: most_relevant(*given, shared=True), "loses the same pixels"),
    (exercises.check_most_relevant, lambda s, n, g: s.argsort(dim=1, descending=True)[:, :n], "truth values"),
    (exercises.check_matching_attribution, lambda w, x, fill: w * x, "input × gradient"),
    (exercises.check_matching_attribution, lambda w, x, fill: w.expand_as(x), "this is the gradient"),
    (exercises.check_matching_attribution, lambda w, x, fill: w * (fill - x), "gains"),
    (exercises.check_matching_attribution, lambda w, x, fill: (w * (x - fill)).abs(), "without the sign"),
    (exercises.check_matching_attribution, lambda w, x, fill: (w * (x - fill)).sum(1), "one number per image"),
    (exercises.check_correlation, lambda a, b: correlation(a, b, 0.0), "0 / 0"),
    (exercises.check_correlation, lambda a, b: (a @ b) / (a.norm() * b.norm()), "cosine"),
    (exercises.check_correlation, lambda a, b: correlation(a, b) * a.std() * b.std() * 19 / 20, "covariance"),
    (exercises.check_correlation, lambda a, b: correlation(a, b) ** 2, "square"),
    (exercises.check_correlation, lambda a, b: correlation(a, b).abs(), "absolute value"),
    (exercises.check_impostor, lambda x: torch.zeros(len(x), 32, 32), "LeRF − MoRF is"),
    (exercises.check_impostor, lambda x: -x.sum(1), "LeRF − MoRF is"),
    (exercises.check_impostor, lambda x: x, "one number per pixel"),
    (exercises.check_impostor, lambda x: x.sum(1) / 0, "NaN or infinity"),
    (
        exercises.check_pointing,
        lambda maps, mask: mask.flatten(1)[range(4), maps.flatten(1).argmax(1)],
        "takes the first",
    ),
    (exercises.check_pointing, lambda *given: pointing(*given, lambda top, m: (top & m).any(1)), "is not enough"),
    (exercises.check_pointing, lambda *given: pointing(*given, lambda top, m: ~(top & ~m).any(1)), "all lie inside"),
    (
        exercises.check_pointing,
        lambda *given: pointing(*given, lambda top, m: (top & m).sum(1) / m.sum(1)),
        "divide by the number of largest",
    ),
    (
        exercises.check_pointing,
        lambda *given: pointing(*given, lambda top, m: ((top & m).sum(1) / top.sum(1)).mean()),
        "one number for the batch",
    ),
    (
        exercises.check_pointing,
        lambda maps, mask: ((maps == maps.max()) & mask).sum((1, 2)) / (maps == maps.max()).sum((1, 2)),
        "its own maximum",
    ),
    (
        exercises.check_pointing,
        lambda maps, mask: pointing(maps, mask, lambda top, m: (top & m).sum(1) / top.sum(1)) * (maps.amax((1, 2)) > 0),
        "do not leave it out",
    ),
    (exercises.check_slope_misses, lambda: dense([[1.0]], [[1.0]], [[1.0], [0.0]]), "the smallest score is 1"),
    (exercises.check_slope_misses, lambda: dense([[1.0]], [[0.0]]), "none is needed"),
    (exercises.check_slope_misses, lambda: dense([[1.0]] * 2, [[9.0, 9.0]], [[0.0], [0.0]]), "none is needed"),
    (exercises.check_slope_misses, lambda: dense([[1.0]] * 41, [[1.0] * 41]), "41 neurons; build one of at most 40"),
    (exercises.check_slope_misses, lambda: (dense([[1.0]], [[1.0]])[0], torch.ones(2, 1)), "x holds 2 inputs"),
    (exercises.check_slope_misses, lambda: dense([[1.0]], [[1.0]])[0], "two things"),
    (exercises.check_slope_misses, lambda: (dense([[1.0]], [[1.0]])[0], torch.ones(1, 3)), "could not be judged"),
    (exercises.check_integral_misses, lambda: dense([[1.0]], [[1.0]], [[1.0], [0.0]]), "the smallest is 1"),
    (exercises.check_integral_misses, lambda: dense([[1.0]], [[9.0]], [[0.01], [0.0]]), "NeuronMCT has to find it"),
    (exercises.check_cam_misses, lambda x: x, "you returned a Tensor"),
    (exercises.check_cam_misses, half_reader([1.0], 1.0), "change with the right half"),
    (exercises.check_cam_misses, half_reader([0.0]), "looks at nothing"),
    (exercises.check_cam_misses, half_reader([-1.0]), "0 everywhere"),
    (exercises.check_cam_misses, half_reader([1.0], scales=[-1.0], offsets=[1.5]), "in both halves"),
    (exercises.check_cam_misses, half_reader([1.0, -3.0], offsets=[0.0, -0.5]), "in the left half"),
    (
        exercises.check_cam_misses,
        lambda x: nn.Sequential(nn.Flatten(), half_reader([1.0])(x)[3], nn.ReLU()).eval(),
        "could not be explained",
    ),
    (exercises.check_gaps, gaps_from_the_end, "at fraction 0.0, 20 of 20"),
    (exercises.check_gaps, gaps_by_threshold, "where scores tie"),
    (exercises.check_gaps, gaps_of_the_batch, "must be"),
    (exercises.check_gaps, lambda *given: gaps(*given, count=int), "at fraction 0.33, 6 of 20"),
    (exercises.check_gaps, lambda *given: gaps(*given, sign=-1), "least relevant"),
    (exercises.check_gaps, lambda scores, f, draw: gaps(scores.abs(), f, draw), "has a higher score"),
    (exercises.check_gaps, lambda scores, f, draw: gaps(scores, f, None), "broken by place"),
    (
        exercises.check_gaps,
        lambda scores, f, draw: gaps(scores, f, torch.Generator().manual_seed(draw.seed())),
        "differ",
    ),
    (exercises.check_gaps, lambda scores, f, draw: gaps(scores, f, draw)[0], "give one tensor of shape"),
    (exercises.check_leak, lambda labels, masks: leak(labels, masks, -2.0), "a part of the glyph is left"),
    (exercises.check_leak, lambda labels, masks: leak(0 * labels, masks), "chance is 25%"),
    (exercises.check_leak, lambda labels, masks: 2.0 * masks, "chance is 25%"),
    (exercises.check_leak, lambda labels, masks: leak(labels, masks)[:9], "give one tensor of shape"),
    (exercises.check_leak, lambda labels, masks: leak(labels, masks) / 0, "NaN or infinity"),
    (exercises.check_seed_difference, lambda *given: seed_difference(*given, lambda n: 1.959964), "1.96 is for many"),
    (
        exercises.check_seed_difference,
        lambda *given: seed_difference(*given, lambda n: student(n + 1)),
        "one less than",
    ),
    (
        exercises.check_seed_difference,
        lambda *given: seed_difference(*given, lambda n: float(t.ppf(0.95, n - 1))),
        "5 % on each side",
    ),
    (exercises.check_seed_difference, lambda *given: seed_difference(*given, student, ddof=0), "minus one"),
    (exercises.check_seed_difference, lambda *given: seed_difference(*given, student, root=0), "single differences"),
    (exercises.check_seed_difference, independent_difference, "treated as independent"),
    (
        exercises.check_seed_difference,
        lambda one, other: ((one - other).mean(), (one - other).min(), (one - other).max()),
        "only 3 times in 4",
    ),
    (exercises.check_free_removal, lambda: equal_pixels(3, 0.0), "of the largest contribution"),
    (exercises.check_free_removal, lambda: equal_pixels(3, 0.99), "no pixel has at most half"),
    (exercises.check_free_removal, lambda: weak_third(0.3), "is free, but so is"),
    (exercises.check_free_removal, lambda: (torch.ones(2), torch.ones(2, 2)), "must be positive"),
    (exercises.check_free_removal, lambda: (torch.ones(2), torch.ones(2, 2).triu()), "symmetric"),
    (exercises.check_free_removal, lambda: (torch.ones(2), torch.ones(3, 3)), "give (n,) and (n, n)"),
    (exercises.check_free_removal, lambda: torch.ones(3), "two things"),
    (exercises.check_free_removal, lambda: (["a"], [["b"]]), "lists of numbers"),
    (exercises.check_embedding, lambda maps, weight, side: [maps], "only the given maps"),
    (exercises.check_embedding, lambda *given: embedding(*given)[-1:], "only the last maps"),
    (exercises.check_embedding, lambda *given: embedding(*given)[::-1], "turned round"),
    (exercises.check_embedding, lambda *given: embedding(*given, shape=torch.relu), "use F.gelu"),
    (exercises.check_embedding, lambda *given: embedding(*given, shape=torch.clone), "a GELU is missing"),
    (exercises.check_embedding, lambda *given: embedding(*given, size=min), "both must be"),
    (exercises.check_embedding, lambda maps, weight, side: embedding(maps, weight, side - 1), "once too often"),
    (exercises.check_embedding, lambda maps, weight, side: embedding(maps, weight[:1], side), "raised"),
    (exercises.check_quantizer, lambda v, gamma, sharpest: (v > 0).double(), "no gradient comes back"),
    (exercises.check_quantizer, lambda *given: soft_bits(*given, gap_of=torch.clone), "through the sharpness"),
    (
        exercises.check_quantizer,
        lambda v, gamma, sharpest: ((gamma / v.tanh().detach().abs()).clamp(max=sharpest) * v).sigmoid(),
        "of the values are wrong",
    ),
    (
        exercises.check_quantizer,
        lambda v, gamma, sharpest: (
            (gamma / (2 * v.sigmoid() - 1).detach().abs()).clamp(max=sharpest) * (2 * v.sigmoid() - 1)
        ).sigmoid(),
        "do not reach 0 and 1",
    ),
    (exercises.check_quantizer, lambda v, gamma, sharpest: soft_bits(v, gamma, float("inf")), "no upper end"),
    (exercises.check_quantizer, lambda v, *_: StraightThroughQuantizer()(v), "this is straight-through"),
    (exercises.check_quantizer, lambda v, *_: v.sigmoid(), "plain sigmoid"),
    (exercises.check_quantizer, lambda v, *_: soft_bits(v, 2.0, 40.0).sum(), "must be"),
    (exercises.check_class_term, lambda *given: 1 - class_term(*given), "the term is 1 minus it"),
    (exercises.check_class_term, lambda *given: class_term(*given, own=True), "leave those pairs out"),
    (exercises.check_class_term, lambda *given: class_term(*given, none=1.0), "the term is 0"),
    (exercises.check_class_term, lambda *given: class_term(*given, none=float("nan")), "NaN"),
    (exercises.check_class_term, lambda masks, classes: class_term(masks, 0 * classes), "only those of one class"),
    (exercises.check_code, lambda model: class_code(model, first=True), "no image gets through"),
    (exercises.check_code, lambda model: class_code(model, turned=True), "Keep the channels that speak"),
    (exercises.check_code, lambda model: class_code(model)[:3], "of ten entries"),
    (exercises.check_code, lambda model: torch.ones(10), "of ten entries"),
    (exercises.check_forcing_rate, lambda inside, whole, t: (inside.argmax(1) == t).float().mean(), "Leave them out"),
    (
        exercises.check_forcing_rate,
        lambda inside, whole, t: ((inside.argmax(1) == t) & (whole.argmax(1) != t)).float().mean(),
        "divide by those",
    ),
    (
        exercises.check_forcing_rate,
        lambda inside, whole, t: of_others(whole, t, inside.argmax(1) != whole.argmax(1)),
        "a third class",
    ),
    (
        exercises.check_forcing_rate,
        lambda inside, whole, t: of_others(whole, t, inside.argmax(1) == whole.argmax(1)),
        "the opposite",
    ),
    (
        exercises.check_class_relevant,
        lambda masks, predicted, number, share: masks.float().mean(0) >= share,
        "those of the class first",
    ),
    (
        exercises.check_class_relevant,
        lambda masks, predicted, number, share: masks[predicted == number].float().mean(0) > share,
        "not more than",
    ),
    (
        exercises.check_class_relevant,
        lambda masks, predicted, number, share: masks[predicted == number].sum(0) >= share * len(masks),
        "by the members",
    ),
    (exercises.check_class_relevant, lambda masks, predicted, c, share: masks[predicted == c].any(0), "any pathway"),
    (exercises.check_class_relevant, lambda masks, predicted, c, share: masks[predicted == c].all(0), "pathways of"),
    (exercises.check_others_loss, lambda model, x, p, order: divergence(model, x, p).mean(), "its own input: run"),
    (exercises.check_others_loss, lambda model, x, p, order: divergence(model, x, p[order]).mean(), "moved the masks"),
    (
        exercises.check_others_loss,
        lambda model, x, p, order: divergence(model, x[order], p[order]).mean(),  # the same mean as without order
        "meets its own input",
    ),
    (exercises.check_others_loss, lambda model, x, p, order: divergence(model, x[order], p).sum(), "the sum"),
    (
        exercises.check_others_loss,
        lambda model, x, p, order: divergence(model, x[order], p).mean() / 4,
        "sum over the classes",
    ),
    (exercises.check_others_loss, turned_divergence, "the other way round"),
    (
        exercises.check_deciding_pattern,
        lambda: two_inputs([[1.0, -1.0], [-1.0, 1.0]], [0.5, 0.5]),
        "does no kept neuron",
    ),
    (exercises.check_deciding_pattern, lambda: two_inputs([[1.0, -1.0], [-1.0, 1.0]], [1.8, 0.0]), "there is nothing"),
    (
        exercises.check_deciding_pattern,
        lambda: two_inputs([[-1.0, 1.0], [1.0, -1.0]], [1.0, 1.0]),
        "class 0 and class 1",
    ),
    (exercises.check_deciding_pattern, lambda: two_inputs([[1.0, 0.0], [0.0, 1.0]] * 60, [0.0] * 120), "120 neurons"),
    (exercises.check_deciding_pattern, lambda: (dense([[1.0]], [[1.0]])[0], torch.full((2, 1), 2.0)), "from 0 to 1"),
    (exercises.check_deciding_pattern, lambda: dense([[1.0]], [[1.0]])[0], "two things"),
    (exercises.check_deciding_pattern, lambda: (dense([[1.0]], [[1.0]])[0], torch.ones(2, 3)), "could not be judged"),
    (exercises.check_states, lambda pre: torch.stack([states([site]) for site in pre]).mean(0), "mean over sites"),
    (exercises.check_states, lambda pre: states(pre).flip(0), "dead, linear, saturated"),
    (exercises.check_states, lambda pre: states(pre) * sum(site.numel() for site in pre), "not shares"),
    (exercises.check_states, lambda pre: states([site.clamp(0, 5.9) for site in pre]), "values are wrong"),
    (exercises.check_two_kinks, lambda z, g: z.abs() / g.norm(dim=1), "only the kink at 0"),
    (exercises.check_two_kinks, lambda z, g: (z - 6).abs() / g.norm(dim=1), "only the kink at 6"),
    (exercises.check_two_kinks, lambda z, g: torch.minimum(z.abs(), (z - 6).abs()), "not distances in the image"),
    (exercises.check_two_kinks, lambda z, g: two_kinks(z.clamp(0, 6), g), "the activation is used"),
    (exercises.check_two_kinks, lambda z, g: two_kinks(z, g).min(), "one per neuron"),
    (exercises.check_central_box, lambda width, height, crop: (0, 0, width, height), "squeezed"),
    (exercises.check_central_box, lambda width, height, crop: central_box(height, width, crop), "exchanged"),
    (exercises.check_central_box, lambda width, height, crop: central_box(width, height, crop**0.5), "of the area"),
    (exercises.check_central_box, lambda w, h, crop: central_box(w, h, crop * max(w, h) / min(w, h)), "longer side"),
    (exercises.check_pyramid, lambda shapes, side: sum(c * h * w for c, h, w in shapes), "the activations alone"),
    (exercises.check_pyramid, lambda shapes, side: pyramid(shapes, side, lambda n: n // 2), "rounded up"),
    (exercises.check_pyramid, lambda shapes, side: pyramid(shapes, side, until=min), "longer side decides"),
    (exercises.check_pyramid, lambda shapes, side: 4 / 3 * sum(c * h * w for c, h, w in shapes), "endless sum"),
    (exercises.check_bits, lambda lengths, p, n: (p[:, None] == torch.arange(n)).any(0), "joined into one"),
    (
        exercises.check_bits,
        lambda lengths, p, n: (p[:, None] == torch.arange(n)).any(0).expand(5, -1),
        "neurons of all",
    ),
    (exercises.check_bits, lambda lengths, p, n: F.one_hot(p, n), "share a row"),
    (exercises.check_bits, lambda lengths, p, n: ~bits(lengths, p, n), "left out"),
    (exercises.check_typicality, lambda masks, c: typicality(masks, c[:, None] == c), "with itself too"),
    (
        exercises.check_typicality,
        lambda masks, c: typicality(masks, ~torch.eye(len(masks), dtype=torch.bool)),
        "pathways of all classes",
    ),
    (
        exercises.check_typicality,
        lambda masks, c: typicality(masks, (c[:, None] == c).fill_diagonal_(False)) * masks.sum(1),
        "this is the sum",
    ),
    (exercises.check_union, lambda kept_by, images, n: n * kept_by.sum() / images, "do not add up"),
    (exercises.check_union, lambda kept_by, images, n: (1 - (1 - kept_by / images) ** n).sum(), "different ones"),
    (exercises.check_union, lambda kept_by, images, n: 30 - union(kept_by, images, n), "that are missed"),
    (exercises.check_union, lambda kept_by, images, n: union(kept_by, images, n) / 30, "this is a share"),
    (exercises.check_bytes, lambda images, n, s: images * n / 8, "a bit for every neuron"),
    (exercises.check_bytes, lambda images, n, s: least_bytes(images, n, s, math.log), "to base 2"),
    (exercises.check_bytes, lambda images, n, s: images * 6 * round((1 - s) * n), "four bytes each"),
    (exercises.check_bytes, lambda images, n, s: least_bytes(images, n, 1 - s), "the share removed"),
    (exercises.check_bytes, lambda images, n, s: least_bytes(1, n, s), "number of images"),
]


@pytest.mark.parametrize(
    ("check", "answer", "why"), MISTAKES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_wrong_answer_is_told_why(check: Callable[[Any], Verdict], answer: Callable[..., Any], why: str) -> None:
    verdict = check(answer)
    assert not verdict
    assert why in verdict.message
    assert repr(verdict).startswith("✗ ")


CHECKS = [getattr(exercises, name) for name in dir(exercises) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "answer", [None, ..., 3, lambda *_: None, lambda *_: [], lambda *_: 1 / 0, lambda *_: object()]
)
def test_no_answer_makes_a_check_raise(check: Callable[[Any], Verdict], answer: Any) -> None:
    verdict = check(answer)
    assert isinstance(verdict, Verdict)
    assert not verdict
    assert verdict.message


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_leaves_the_random_state_alone(check: Callable[[Any], Verdict]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check(lambda *_: 1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_checks_do_not_say_that_mistakes_are_right() -> None:
    """An answer that is right everywhere but for one input is not accepted."""

    def nearly(model: nn.Module, x: Tensor) -> Tensor:
        right = count_dead(model, x)
        right[-1] += 1
        return right

    assert not exercises.check_count_dead(nearly)
    assert exercises.check_count_dead(count_dead)
    assert "exercises" not in pathwaylib.__all__  # reached as pathwaylib.exercises
