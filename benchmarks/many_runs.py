"""Time what takes many runs of the network against what a reader would write first: one image at a time, with hooks.

One table from one run; every figure is a ratio of times on the same images in the same minute, so that machines
compare. Memory is the most that a process of its own held beyond the network and the images (on Linux). The plain
versions give the same answers; that is checked here.

- *integrated gradients*: every site scaled in turn, ``n_steps`` runs of the whole network each.
- *greedy pruning*: monotone, ten rounds.
- *distillation-guided routing*: twenty steps from gates of 1.
- *linear region*: one vector-Jacobian product for each kept neuron of a pathway at sparsity 0.98, in float64.

Run: ``python benchmarks/many_runs.py`` (``--rounds N`` for more rounds).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from core import measure
from torch import Tensor, nn
from torch.nn import functional as F

from pathwaylib import (
    DistillationGuidedRouting,
    GreedyPruning,
    NeuronMCT,
    Pathway,
    cifar10,
    integrated_gradients,
    linear_region,
    load_model,
)

STEPS, ROUNDS, ITERATIONS = 8, 10, 20


def relus(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.ReLU)]


@contextmanager
def hooks(model: nn.Module, change: Callable[[int, Tensor], Tensor]):  # type: ignore[no-untyped-def]
    """Change what each activation returns, as ``change(site, activation)`` says."""
    with ExitStack() as stack:
        for site, layer in enumerate(relus(model)):
            handle = layer.register_forward_hook(lambda _, __, a, site=site: change(site, a))
            stack.callback(handle.remove)
        yield


def activations(model: nn.Module, image: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    with hooks(model, lambda _, a: kept.append(a) or a):
        model(image)
    return kept


def plain_integrated_gradients(model: nn.Module, x: Tensor) -> Tensor:
    rows = []
    for image in x.split(1):
        target = int(model(image).argmax())
        scores = []
        for site, a in enumerate(activations(model, image)):
            total = torch.zeros_like(a)
            for step in range(STEPS):
                scaled = (a * (step + 0.5) / STEPS).requires_grad_()
                with hooks(model, lambda at, z, site=site, scaled=scaled: scaled if at == site else z):
                    total += torch.autograd.grad(model(image)[0, target], scaled)[0] / STEPS
            scores.append((a * total).flatten())
        rows.append(torch.cat(scores))
    return torch.stack(rows)


def plain_greedy(model: nn.Module, x: Tensor) -> Tensor:
    rows = []
    for image in x.split(1):
        target = int(model(image).argmax())
        masks = [torch.ones_like(a) for a in activations(model, image)]
        neurons = sum(mask.numel() for mask in masks)
        for done in range(1, ROUNDS + 1):
            gates = [mask.clone().requires_grad_() for mask in masks]
            with hooks(model, lambda site, a, gates=gates: a * gates[site]):
                gradients = torch.autograd.grad(model(image)[0, target], gates)
            scores = torch.cat([(m * g).abs().flatten() for m, g in zip(masks, gradients, strict=True)])
            order = scores.argsort(descending=True)[: round(neurons * 0.1 ** (done / ROUNDS))]
            flat = torch.zeros(neurons).index_fill_(0, order[scores[order] > 0], 1)
            masks = [part.view_as(m) for part, m in zip(flat.split([m.numel() for m in masks]), masks, strict=True)]
        rows.append(flat)
    return torch.stack(rows)


def plain_routing(model: nn.Module, x: Tensor) -> Tensor:
    rows = []
    for image in x.split(1):
        with torch.no_grad():
            wanted = model(image).softmax(1)
            gates = [torch.ones_like(a).requires_grad_() for a in activations(model, image)]
        optimiser = torch.optim.SGD(gates, lr=0.03, momentum=0.9)
        best, best_loss = [gate.detach().clone() for gate in gates], float("inf")
        for _ in range(ITERATIONS + 1):
            with hooks(model, lambda site, a, gates=gates: a * gates[site]):
                logits = model(image)
            loss = F.cross_entropy(logits, wanted) + 0.05 * sum(gate.sum() for gate in gates)
            if logits.argmax() == wanted.argmax() and loss.item() < best_loss:
                best, best_loss = [gate.detach().clone() for gate in gates], loss.item()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for gate in gates:
                    gate.clamp_(min=0)
        scores = torch.cat([gate.flatten() for gate in best])
        rows.append(torch.zeros_like(scores).index_fill_(0, scores.topk(round(len(scores) * 0.1)).indices, 1))
    return torch.stack(rows)


def plain_region(model: nn.Module, x: Tensor, pathway: Pathway) -> Tensor:
    """Take one gradient of the whole network for each kept neuron; max-pooling winners likewise."""
    inputs = x.clone().requires_grad_()
    values: list[Tensor] = []
    hidden = inputs
    site = 0
    for layer in model:
        if isinstance(layer, nn.ReLU):
            values.append(hidden[0][pathway.masks[site][0]])
            hidden = layer(hidden) * pathway.masks[site].to(hidden.dtype)
            site += 1
        elif isinstance(layer, nn.MaxPool2d):
            windows = F.unfold(hidden[0][:, None], 2, stride=2).flatten(0, 0)  # (C, 4, windows)
            highest, winner = windows.max(1, keepdim=True)
            rivals = (windows > 0) & (torch.arange(4)[:, None] != winner)
            values.append((highest - windows)[rivals])
            hidden = layer(hidden)
        else:
            hidden = layer(hidden)
    radius = torch.tensor(float("inf"), dtype=x.dtype)
    for value in (value for of_site in values for value in of_site):
        gradient = torch.autograd.grad(value, inputs, retain_graph=True)[0]
        length = gradient.norm()
        if length > 0:
            radius = torch.minimum(radius, value.detach().abs() / length)
    return radius.view(1)


def prepare(task: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return (plain version, library's version) of a task, to be called for the same answer."""
    model, x = load_model("cifar10-vgg"), cifar10("test", progress=False)[:16][0]
    if task == "integrated gradients":

        def scores() -> Tensor:
            found = integrated_gradients(model, x, n_steps=STEPS)
            return torch.cat([score.flatten(1) for score in found.scores], 1)

        return partial(plain_integrated_gradients, model, x), scores
    if task == "greedy pruning":
        return partial(plain_greedy, model, x), lambda: GreedyPruning(0.9, steps=ROUNDS)(model, x).flatten().float()
    if task == "distillation-guided routing":
        routing = DistillationGuidedRouting(0.9, iterations=ITERATIONS, patience=ITERATIONS)
        return partial(plain_routing, model, x), lambda: routing(model, x).flatten().float()
    model, x = model.double(), x[:1].double()
    pathway = NeuronMCT(0.98)(model, x)
    return partial(plain_region, model, x, pathway), lambda: linear_region(model, x, pathway).radius


TASKS = ("integrated gradients", "greedy pruning", "distillation-guided routing", "linear region")


def agreement(task: str, plain: Tensor, ours: Tensor) -> str:
    """Compare the answers, in words; raise where they should be equal and are not."""
    if task in ("integrated gradients", "linear region"):
        error = float((plain - ours).norm() / plain.norm())
        assert error < (1e-9 if task == "linear region" else 1e-4), error
        return f"relative difference {error:.0e}"
    shared = float((plain * ours).sum() / (plain + ours).clamp(max=1).sum())
    assert shared > (0.99 if task == "greedy pruning" else 0.5), shared
    return f"IoU {shared:.3f}"


def megabytes(field: str) -> int:
    """Return an entry of this process's status, such as ``VmRSS``, on Linux."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) // 1024


def peak_memory(task: str, version: int) -> None:
    """Print how many megabytes a task takes at most, in a process of its own."""
    call = prepare(task)[version]
    if not Path("/proc/self/clear_refs").exists():
        return
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = megabytes("VmRSS")
    call()
    print(f"{megabytes('VmHWM') - before:>8}", end="\n" if version == 0 else "", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, action="append")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median (least to most)")
    print(f"{'task':30}{'times faster than plain':>26}   {'answers':28}memory, MB (plain)")
    for task in arguments.task or TASKS:
        plain, ours = prepare(task)
        same = agreement(task, plain(), ours())
        seconds = measure({"plain": plain, "ours": ours}, arguments.rounds)
        ratios = sorted(a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True))
        spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        print(f"{task:30}{spread:>26}   {same:28}", end="", flush=True)
        for version in (1, 0):
            process = multiprocessing.get_context("spawn").Process(target=peak_memory, args=(task, version))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
