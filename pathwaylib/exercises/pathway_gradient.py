"""Chapter 6: the pathway gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .judging import Answer, Verdict, call_answer, judge, network_and_pathway


def _one_layer(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W, v, x and keep of Φ(x) = Σ_j v_j keep_j relu((W x)_j)."""
    generator = torch.Generator().manual_seed(seed)
    weights, inputs = torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator)
    return weights, torch.randn(6, generator=generator), inputs, torch.rand(3, 6, generator=generator) < 0.6


def check_hand_gradient(answer: Answer) -> Verdict:
    """Check ``answer(W, v, x, keep) -> (B, D)``: the pathway gradient of Φ(x) = Σ_j v_j relu((W x)_j), by hand.

    Example:
        >>> check_hand_gradient(lambda W, v, x, keep: (v * keep * (x @ W.T > 0)) @ W)
        ✓ right: the sum over the neurons that are kept and active
        >>> check_hand_gradient(lambda W, v, x, keep: (v * (x @ W.T > 0)) @ W)
        ✗ this is the gradient of the whole network: leave the removed neurons out
    """
    return judge(
        answer,
        [partial(_one_layer, seed) for seed in range(3)],
        lambda W, v, x, keep: (v * keep * (x @ W.T > 0)) @ W,
        {
            "this is the gradient of the whole network: leave the removed neurons out": (
                lambda W, v, x, keep: (v * (x @ W.T > 0)) @ W
            ),
            "dead neurons take part: a neuron has slope 1 only where its pre-activation is above 0": (
                lambda W, v, x, keep: (v * keep) @ W
            ),
            "the activations are in it: the slope of a ReLU is 0 or 1, not its value": (
                lambda W, v, x, keep: (v * keep * (x @ W.T).relu()) @ W
            ),
            "the output weights v are missing": lambda W, v, x, keep: (keep * (x @ W.T > 0)).float() @ W,
            "this is multiplied by the input; the gradient alone is asked for": (
                lambda W, v, x, keep: (v * keep * (x @ W.T > 0)) @ W * x
            ),
            "this is one number per input: return one slope per entry of x, shape (B, D)": (
                lambda W, v, x, keep: ((v * keep * (x @ W.T > 0)) @ W).sum(1)
            ),
        },
        "right: the sum over the neurons that are kept and active",
    )


def check_backward_masked(answer: Answer) -> Verdict:
    """Check ``answer(model, x, masks, target) -> like x``: run the whole network, send back only through kept neurons.

    Example:
        >>> check_backward_masked(lambda model, x, masks, target: None)
        ✗ nothing is returned yet: replace the dots by your answer, and end it with `return`
    """

    def gradient(site: Callable[[Tensor, Tensor], Tensor]) -> Answer:
        def computed(model: nn.Sequential, x: Tensor, masks: Sequence[Tensor], target: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            hidden, remaining = x, iter(masks)
            for layer in model:
                hidden = site(layer(hidden), next(remaining)) if isinstance(layer, nn.ReLU) else layer(hidden)
            return torch.autograd.grad(hidden.gather(1, target[:, None]).sum(), x)[0]

        return computed

    def arguments(seed: int) -> tuple[nn.Sequential, Tensor, tuple[Tensor, ...], Tensor]:
        model, x, pathway = network_and_pathway(seed, kept=0.7)
        return model, x, pathway.masks, torch.arange(len(x)) % 4

    right = gradient(lambda a, mask: a.detach() + a * mask - (a * mask).detach())
    return judge(
        answer,
        [partial(arguments, seed) for seed in range(4)],
        right,
        {
            "this is the pathway gradient: the forward run is masked as well; keep its values as they are": (
                gradient(lambda a, mask: a * mask)
            ),
            "this is the plain gradient: nothing is masked on the way back": gradient(lambda a, mask: a),
            "the masks are inverted: True keeps a neuron": (
                gradient(lambda a, mask: a.detach() + a * ~mask - (a * ~mask).detach())
            ),
            "every value is cut from the graph: keep the kept neurons' part in it": (
                gradient(lambda a, mask: a.detach() + 0 * a)
            ),
        },
        "right: the whole network's values, the pathway's slopes",
    )


def check_mass_inside(answer: Answer) -> Verdict:
    """Check ``answer(maps, mask) -> (B,)``: share of the absolute attribution, channels summed, inside the mask.

    Example:
        >>> def share(maps, mask):
        ...     size = maps.sum(1).abs()
        ...     return (size * mask).sum((1, 2)) / size.sum((1, 2)).clamp(min=1e-12)
        >>> check_mass_inside(share)
        ✓ right: from 0 (all outside) to 1 (all inside)
    """

    def arguments(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        maps = torch.randn(3, 2, 5, 5, generator=generator)
        maps[0] *= float(seed > 0)  # one map of zeros
        return maps, torch.rand(3, 5, 5, generator=generator) < 0.3

    def share(size: Tensor, mask: Tensor) -> Tensor:
        return (size * mask).sum((1, 2)) / size.sum((1, 2)).clamp(min=1e-12)

    return judge(
        answer,
        [partial(arguments, seed) for seed in (1, 2, 0)],
        lambda maps, mask: share(maps.sum(1).abs(), mask),
        {
            "a map of zeros gives 0 / 0 = nan: let its share be 0": (
                lambda maps, mask: (maps.sum(1).abs() * mask).sum((1, 2)) / maps.sum(1).abs().sum((1, 2))
            ),
            "the channels are added after the absolute value: sum them first, so that opposite signs cancel": (
                lambda maps, mask: share(maps.abs().sum(1), mask)
            ),
            "the values are signed: take their absolute value after summing the channels": (
                lambda maps, mask: (maps.sum(1) * mask).sum((1, 2)) / maps.sum((1, 2, 3))
            ),
            "only positive values count here: take the absolute value": (
                lambda maps, mask: share(maps.sum(1).relu(), mask)
            ),
            "this is the mass itself: divide it by the mass of the whole map": (
                lambda maps, mask: (maps.sum(1).abs() * mask).sum((1, 2))
            ),
            "this is the share outside the mask": lambda maps, mask: share(maps.sum(1).abs(), ~mask),
            "this is one number for the batch: return one share per input, shape (B,)": (
                lambda maps, mask: share(maps.sum(1).abs(), mask).mean()
            ),
            "the batch shares one denominator: divide each input's mass by its own total": (
                lambda maps, mask: (maps.sum(1).abs() * mask).sum((1, 2)) / maps.sum(1).abs().sum()
            ),
        },
        "right: from 0 (all outside) to 1 (all inside)",
    )


def check_sign_flip(answer: Answer) -> Verdict:
    """Check ``answer() -> (W, v, x)``: NeuronMCT's best neuron alone tells the wrong direction for x[0].

    The network is Φ(x) = Σ_j v_j relu((W x)_j) with at least two active neurons; the slope of Φ along x[0] and the
    slope of the pathway of the one neuron with the largest contribution must have opposite signs.

    Example:
        >>> check_sign_flip(lambda: ([[1.0, 3.0], [1.0, 0.0]], [1.0, -2.0], [1.0, 1.0]))
        ✓ right: the response's slope along x[0] is -1, the pathway says 1
        >>> check_sign_flip(lambda: ([[1.0, 3.0], [1.0, 0.0]], [1.0, 2.0], [1.0, 1.0]))
        ✗ the slope along x[0] is 3 for the network and 1 for the pathway: they must have opposite signs
    """
    value = call_answer(answer, ())
    if isinstance(value, Verdict):
        return value
    if not (isinstance(value, (tuple, list)) and len(value) == 3):
        return Verdict(False, "return three things: W (neurons × inputs), v (one per neuron), x (one per input)")
    try:
        W, v, x = (torch.as_tensor(part).detach().double() for part in value)
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, "W, v and x must be tensors or lists of numbers")
    if W.ndim != 2 or v.shape != W.shape[:1] or x.shape != W.shape[1:]:
        return Verdict(
            False,
            f"the shapes do not fit: W {tuple(W.shape)} is (neurons, inputs), so v must be ({len(W)},) and x "
            f"({W.shape[-1] if W.ndim else 0},); you gave {tuple(v.shape)} and {tuple(x.shape)}",
        )
    z = W @ x
    contribution = (z.relu() * v).abs()
    if int((contribution > 0).sum()) < 2:
        return Verdict(
            False, "fewer than two neurons are active and have an output weight: there is nothing to leave out"
        )
    best, second = contribution.topk(2).values.tolist()
    if best == second:
        return Verdict(False, f"two neurons tie for the largest contribution, {best:g}: make one the largest")
    kept = contribution.argmax()
    whole, path = float((v * (z > 0)) @ W[:, 0]), float(v[kept] * W[kept, 0])
    if whole * path >= 0:
        return Verdict(
            False,
            f"the slope along x[0] is {whole:g} for the network and {path:g} for the pathway: "
            "they must have opposite signs",
        )
    return Verdict(True, f"right: the response's slope along x[0] is {whole:g}, the pathway says {path:g}")
