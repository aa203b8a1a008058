"""How answers to exercises are judged, and the small networks they are judged on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..contributions import Contributions
from ..neurons import Activations, observe
from ..pathway import Pathway, split_sites
from ..seeds import seeded

Answer = Callable[..., Any]
Arguments = Callable[[], tuple[Any, ...]]
"""Makes the arguments of one test anew, so that an answer that changes them harms only itself."""


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a check found.

    Attributes:
        passed: whether the answer is right; the verdict's truth value.
        message: what is right, or why it is wrong and where to look.

    Example:
        >>> Verdict(False, "the scores are signed; take their absolute value")
        ✗ the scores are signed; take their absolute value
        >>> bool(Verdict(True, "right"))
        True
    """

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{'✓' if self.passed else '✗'} {self.message}"


# --- How answers are judged ------------------------------------------------------------------------------------------


def call_answer(answer: Any, arguments: tuple[Any, ...]) -> Any:
    """Return the answer's value, or the verdict that it has none."""
    if not callable(answer):
        return Verdict(False, f"give the check your function itself, not a {type(answer).__name__}")
    try:
        value = answer(*arguments)
    except Exception as error:  # a reader's code may fail in any way
        lines = str(error).splitlines()
        return Verdict(False, f"your function raised {type(error).__name__}{': ' + lines[0] if lines else ''}")
    if value is None or value is ...:
        return Verdict(False, "nothing is returned yet: replace the dots by your answer, and end it with `return`")
    return value


def judge_network(
    answer: Answer, check: Callable[[nn.Module, Tensor], Verdict], *, most: int, inputs: int = 1
) -> Verdict:
    """Judge a network and inputs ``(inputs, ...)`` that an answer builds, if it has at most so many neurons."""
    value = call_answer(answer, ())
    if isinstance(value, Verdict):
        return value
    shape = f"of shape ({inputs}, ...)"
    if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], nn.Module)):
        return Verdict(False, f"return two things: the network, and x {shape}")
    model, x = value
    try:
        seen = observed(model, x)
        if len(x) != inputs:
            return Verdict(False, f"x holds {len(x)} inputs; give x {shape}")
        if seen.active().neurons > most:
            return Verdict(False, f"the network has {seen.active().neurons:,} neurons; build one of at most {most:,}")
        return check(model, x)
    except Exception as error:  # a reader's network may fail in any way
        return Verdict(False, f"your network could not be judged: {str(error).splitlines()[0]}")


def as_tensors(value: Any) -> tuple[Tensor, ...] | None:
    """Return a result as tensors of float64, or None where it is none."""
    if isinstance(value, Pathway):
        value = value.masks
    elif isinstance(value, Contributions):
        value = value.scores
    try:
        if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) and part.ndim for part in value):
            return tuple(torch.as_tensor(part).detach().double() for part in value)
        if isinstance(value, (list, tuple)):
            value = [float(part) for part in value]
        return (torch.as_tensor(value).detach().double(),)
    except (TypeError, ValueError, RuntimeError):
        return None


def equal(one: tuple[Tensor, ...] | None, other: tuple[Tensor, ...] | None) -> bool:
    """Tell whether two results have the same shapes and, up to rounding, values."""
    if one is None or other is None or [part.shape for part in one] != [part.shape for part in other]:
        return False
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in zip(one, other, strict=True))


def shape_of(value: tuple[Tensor, ...]) -> str:
    """Say the shape of a result in words."""
    shapes = [str(tuple(part.shape)) for part in value]
    return shapes[0] if len(shapes) == 1 else f"{len(shapes)} tensors of shapes {', '.join(shapes)}"


def judge(
    answer: Answer, tests: Sequence[Arguments], oracle: Answer, mistakes: Mapping[str, Answer], praise: str
) -> Verdict:
    """Compare an answer with an oracle on every test, and a wrong one with what typical mistakes compute."""
    given: list[tuple[Tensor, ...]] = []
    for arguments in tests:
        value = call_answer(answer, arguments())
        if isinstance(value, Verdict):
            return value
        tensors = as_tensors(value)
        if tensors is None:
            return Verdict(False, f"you returned a {type(value).__name__} that is no tensor or tuple of tensors")
        given.append(tensors)
    expected = [as_tensors(oracle(*arguments())) or () for arguments in tests]
    if all(map(equal, given, expected)):
        return Verdict(True, praise)
    for message, mistake in mistakes.items():
        if all(equal(value, as_tensors(mistake(*arguments()))) for value, arguments in zip(given, tests, strict=True)):
            return Verdict(False, message)
    for value, right in zip(given, expected, strict=True):
        if [part.shape for part in value] != [part.shape for part in right]:
            return Verdict(False, f"you returned shape {shape_of(value)}; for this test it must be {shape_of(right)}")
        for a, b in zip(value, right, strict=True):
            wrong = ~torch.isclose(a, b, rtol=1e-4, atol=1e-6)
            if bool(wrong.any()):
                share = float(wrong.double().mean())
                example = f"for example {float(a[wrong][0]):.4g} where {float(b[wrong][0]):.4g} is right"
                return Verdict(False, f"the shape is right, but {share:.0%} of the values are wrong, {example}")
    return Verdict(False, "the result is wrong")  # only tests that disagree on NaN get here


# --- Small networks to judge on --------------------------------------------------------------------------------------


def small_network(seed: int) -> tuple[nn.Sequential, Tensor]:
    """Return a small network and inputs: fully connected for even seeds, convolutional for odd ones."""
    with seeded(seed):
        if seed % 2:
            layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)]
            return nn.Sequential(*layers).eval(), torch.rand(3, 2, 6, 6)
        layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4)]
        return nn.Sequential(*layers).eval(), torch.randn(5, 6)


def network_and_pathway(seed: int, kept: float = 0.5) -> tuple[nn.Sequential, Tensor, Pathway]:
    """Return a network, inputs and a random pathway for them."""
    model, x = small_network(seed)
    seen = observed(model, x)
    generator = torch.Generator().manual_seed(seed)
    masks = tuple(torch.rand(a.shape, generator=generator) < kept for a in seen.post)
    return model, x, Pathway(masks, seen.sites)


def observed(model: nn.Module, x: Tensor) -> Activations:
    """Observe without a gradient graph."""
    with torch.no_grad():
        return observe(model, x)


NETWORKS: tuple[Arguments, ...] = tuple(partial(small_network, seed) for seed in range(4))
PATHWAYS: tuple[Arguments, ...] = tuple(partial(network_and_pathway, seed) for seed in range(4))


def mark(scores: Sequence[Tensor], count: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Join the sites, mark neurons, take the sites apart again."""
    flat = torch.cat([score.flatten(1) for score in scores], 1)
    return split_sites(count(flat), [score.shape[1:] for score in scores])


def top(values: Tensor, k: int) -> Tensor:
    """Mark the k largest entries of each row."""
    chosen = values.topk(min(k, values.shape[1]), 1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, chosen, True)
