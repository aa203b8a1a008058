"""Time NeuronMCT with the pathway gradient against its floor and against a plain hook implementation.

One table from one run; every figure is a ratio to the floor on the same images, so that machines compare.

- *floor*: two forward runs and two backward passes to the input, parameters frozen. Nothing that selects neurons by
  gradient and then takes a gradient inside the pathway can do less.
- *pathwaylib*: ``PathwayGradient(model, NeuronMCT(0.9))``.
- *one image at a time*: module hooks, a full sort for the percentile, mask by hooks: what a reader would write first.

Run: ``python benchmarks/core.py`` (``--rounds N`` for more rounds).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from pathwaylib import NeuronMCT, PathwayGradient, cifar10, load_model


def floor(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Run forward and backward to the input twice."""
    for _ in range(2):
        inputs = x.detach().requires_grad_()
        gradient = torch.autograd.grad(model(inputs).gather(1, target[:, None]).sum(), inputs)[0]
    return gradient


def one_at_a_time(model: nn.Module, x: Tensor, target: Tensor, sparsity: float) -> Tensor:
    """Take each image alone through module hooks; needs a network whose activations are modules, each used once."""
    layers = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    maps = []
    for image, label in zip(x.split(1), target.tolist(), strict=True):
        kept: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out)) for layer in layers]
        inputs = image.detach().requires_grad_()
        logit = model(inputs)[0, label]
        gradients = torch.autograd.grad(logit, kept)
        for hook in hooks:
            hook.remove()
        scores = [(a.detach() * g).abs() for a, g in zip(kept, gradients, strict=True)]
        everything = torch.cat([score.flatten() for score in scores]).sort().values
        border = everything[int(sparsity * len(everything))]
        hooks = [
            layer.register_forward_hook(lambda _, __, out, mask=score >= border: out * mask)
            for layer, score in zip(layers, scores, strict=True)
        ]
        maps.append(torch.autograd.grad(model(inputs)[0, label], inputs)[0])
        for hook in hooks:
            hook.remove()
    return torch.cat(maps)


def measure(candidates: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Time the candidates in turn, ``rounds`` times after a warm-up, so that a disturbance meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    vgg16 = torchvision.models.vgg16(weights=None).eval().requires_grad_(False)
    for module in vgg16.modules():  # the plain implementation needs outputs nobody overwrites
        if isinstance(module, nn.ReLU):
            module.inplace = False
    subjects = {
        "cifar10-vgg, 64 x 32 px": (load_model("cifar10-vgg"), cifar10("test")[:64][0]),
        "torchvision vgg16, 4 x 224 px": (vgg16, torch.rand(4, 3, 224, 224)),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median (least to most) of {rounds} rounds")
    print(f"{'network':32}{'method':24}{'ratio to the floor':>24}")
    for subject, (model, x) in subjects.items():
        with torch.no_grad():
            target = model(x).argmax(1)
        explainer = PathwayGradient(model, NeuronMCT(sparsity=0.9))
        candidates: dict[str, Callable[[], Tensor]] = {
            "floor": lambda: floor(model, x, target),  # noqa: B023 - called in this iteration
            "pathwaylib": lambda: explainer.attribute(x, target=target),  # noqa: B023
            "one image at a time": lambda: one_at_a_time(model, x, target, 0.9),  # noqa: B023
        }
        seconds = measure(candidates, rounds)
        for name, times in seconds.items():
            ratios = sorted(a / b for a, b in zip(times, seconds["floor"], strict=True))
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"{subject:32}{name:24}{spread:>24}")


if __name__ == "__main__":
    main()
