"""Key of assignment 1: what is asked, the oracles, and what typical mistakes are worth. Not for students."""
# ruff: noqa: D103, the names say what the oracles and mistakes compute

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count, product

import torch
from torch import Tensor, nn

from pathwaylib import Pathway, load_model, masked, observe, planted
from pathwaylib.exercises.judging import Arguments, network_and_pathway, observed, small_network
from pathwaylib.grading import Compared, Part, Question

TITLE = "Assignment 1: responses, dead neurons and pruning"


# --- Inputs ----------------------------------------------------------------------------------------------------------


def connected(seed: int) -> Sequence[Arguments]:
    return [partial(small_network, 2 * seed + 2 * i) for i in range(2)]


def convolutional(seed: int) -> Sequence[Arguments]:
    return [partial(small_network, 2 * seed + 2 * i + 1) for i in range(2)]


def pathways(seed: int) -> Sequence[Arguments]:
    # Every student meets a pathway that changes a prediction, or a mistake would cost some and not others.
    telling = next(at for at in count(seed) if changes_class(*network_and_pathway(at)))
    return [partial(network_and_pathway, at) for at in (seed, seed + 1, telling)]


def changes_class(model: nn.Module, x: Tensor, pathway: Pathway) -> bool:
    whole = model(x).argmax(1)
    with masked(pathway):
        return bool((model(x).argmax(1) != whole).any())


def to_wake(seed: int) -> Sequence[Arguments]:
    # Every student meets a neuron that wakes up, or "none" would be right for some.
    telling = next(at for at in count(seed) if any(mask.any() for mask in woken(*network_and_pathway(at))))
    return [partial(network_and_pathway, at) for at in (seed, seed + 1, telling)]


def scored(seed: int, kept: float, k: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]:
    """Scores and masks of three inputs and two sites; what is out scores 0 already, and so do some that are in."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2, 3, 3), (3, 7)]
    masks = tuple(torch.rand(shape, generator=generator) < kept for shape in shapes)
    alive = [torch.rand(shape, generator=generator) < 0.8 for shape in shapes]
    scores = tuple(
        torch.randn(shape, generator=generator) * mask * on
        for shape, mask, on in zip(shapes, masks, alive, strict=True)
    )
    return scores, masks, k


def usual_rounds(seed: int) -> Sequence[Arguments]:
    return [partial(scored, seed + i, 0.9, 5 + i) for i in range(3)]


def edges(seed: int) -> Sequence[Arguments]:
    return [partial(scored, seed, 0.3, 20), partial(scored, seed + 1, 0.9, 0)]


def sleeper(seed: int) -> tuple[nn.Sequential, Tensor]:
    """Chapter 2's five neurons, in another order and on another image."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 5, (1, 2), generator=generator).float()
    first, second = torch.randperm(3, generator=generator), torch.randperm(2, generator=generator)
    return whole_numbers(
        (torch.tensor([[1, 0], [0, 1], [1, 1]])[first], torch.zeros(3)),
        (torch.tensor([[1, 1, 1], [-2, -2, -2]])[second], (torch.tensor([1, 2 * int(x.sum()) + 1]))[second]),
        (torch.tensor([[1, 1], [0, 0]]), torch.tensor([0, 4])),
    ), x


def tiny(seed: int) -> tuple[nn.Sequential, Tensor]:
    """Six neurons with small whole numbers for weights: sums are exact, and there are many coincidences."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator)

    layers = [(draw(3, 2), draw(3)), (draw(3, 3), draw(3)), (draw(2, 3), draw(2))]
    return whole_numbers(*layers), torch.randint(1, 4, (1, 2), generator=generator).float()


def whole_numbers(*layers: tuple[Tensor, Tensor]) -> nn.Sequential:
    network = nn.Sequential()
    for weight, bias in layers:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        network.extend([linear, nn.ReLU()])
    return network[:-1].eval().requires_grad_(False)


def sleepers(seed: int) -> Sequence[Arguments]:
    # The sleeper alone is always the answer: every student meets a network with another one, too.
    telling = next(at for at in count(seed) if smallest(*tiny(at)) != (1, 1))
    return [partial(sleeper, seed), partial(sleeper, seed + 1), partial(tiny, telling)]


def tiny_networks(seed: int) -> Sequence[Arguments]:
    return [partial(tiny, seed + i) for i in range(5)]


def own_images(seed: int) -> Sequence[Arguments]:
    return [lambda: (seed,)]


# --- Oracles and mistakes --------------------------------------------------------------------------------------------


def dead_shares(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([(a == 0).flatten(1).double().mean(1) for a in observed(model, x).post], 1)


def response_inside(model: nn.Module, x: Tensor, pathway: Pathway, *, anew: bool = False) -> Tensor:
    whole = model(x).argmax(1)
    with masked(pathway):
        logits = model(x)
    return logits.gather(1, (logits.argmax(1) if anew else whole)[:, None])[:, 0]


def masked_afterwards(model: nn.Sequential, x: Tensor, pathway: Pathway) -> Tensor:
    """Mask the activations of the whole run: only the last mask has an effect."""
    last = max(index for index, layer in enumerate(model) if isinstance(layer, nn.ReLU))
    logits = model[last + 1 :](observed(model, x).post[-1] * pathway.masks[-1])
    return logits.gather(1, model(x).argmax(1)[:, None])[:, 0]


def both_runs(model: nn.Module, x: Tensor, pathway: Pathway) -> tuple[Pathway, Pathway]:
    before = observed(model, x).active()
    with masked(pathway):
        return before, observed(model, x).active()


def woken(model: nn.Module, x: Tensor, pathway: Pathway) -> tuple[Tensor, ...]:
    before, after = both_runs(model, x, pathway)
    return (after & ~before & pathway).masks


def fallen_asleep(model: nn.Module, x: Tensor, pathway: Pathway) -> tuple[Tensor, ...]:
    before, after = both_runs(model, x, pathway)
    return (pathway & before & ~after).masks


def kept_and_dead(model: nn.Module, x: Tensor, pathway: Pathway) -> tuple[Tensor, ...]:
    before, _ = both_runs(model, x, pathway)
    return (pathway & ~before).masks


def one_round(
    scores: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
    k: int,
    *,
    signed: bool = False,
    revive: bool = False,
    per_site: bool = False,
) -> tuple[Tensor, ...]:
    if per_site:
        return tuple(one_round((s,), (m,), k)[0] for s, m in zip(scores, kept, strict=True))
    flat = torch.cat([score.flatten(1) for score in scores], 1)
    flat = flat if signed else flat.abs()
    stays = torch.cat([mask.flatten(1) for mask in kept], 1) & (flat != 0)
    rows = []
    for row, may_stay in zip(flat, stays, strict=True):
        order = sorted(may_stay.nonzero()[:, 0].tolist(), key=lambda index: -float(row[index]))
        chosen = torch.zeros(len(row), dtype=torch.bool)
        chosen[order[:k]] = True
        rows.append(chosen | ~may_stay if revive else chosen)
    parts = torch.stack(rows).split([score[0].numel() for score in scores], 1)
    return tuple(part.view(score.shape) for part, score in zip(parts, scores, strict=True))


def smallest(model: nn.Sequential, x: Tensor, *, active_only: bool = False) -> tuple[int, int]:
    seen = observed(model, x)
    sizes = [a.shape[1] for a in seen.post]
    bits = torch.tensor(list(product([False, True], repeat=sum(sizes))))
    if active_only:
        bits = bits[(bits & ~torch.cat(seen.active().masks, 1)).sum(1) == 0]
    with masked(Pathway(bits.split(sizes, 1), seen.sites)):
        same = (model(x.expand(len(bits), -1)) - seen.logits).abs().amax(1) < 1e-4
    counts = bits[same].sum(1)
    return int(counts.min()), int((counts == counts.min()).sum())


def never_active(seed: int) -> int:
    x = planted(64, seed=seed)[:][0]
    return sum(int((a == 0).all(0).sum()) for a in observe(load_model("planted-cnn"), x).post)


def counted(seed: int) -> float:
    x = planted(64, seed=seed)[:][0]
    return sum(float((a == 0).double().sum()) for a in observe(load_model("planted-cnn"), x).post) / 64


SHARES = Compared(
    dead_shares,
    {
        "these are shares of active neurons: 1 minus what was asked": (lambda m, x: 1 - dead_shares(m, x), 0.5),
        "these are counts: divide by the number of the site's neurons": (
            lambda m, x: torch.stack([(a == 0).flatten(1).double().sum(1) for a in observed(m, x).post], 1),
            0.5,
        ),
        "the inputs are averaged: one row for each input was asked": (
            lambda m, x: dead_shares(m, x).mean(0),
            0.25,
        ),
    },
)
ROUND = Compared(
    one_round,
    {
        "the scores are signed: rank their absolute values": (partial(one_round, signed=True), 0.25),
        "neurons of score 0 came back: that is the revive rule": (partial(one_round, revive=True), 0.25),
        "k neurons of each site: the sites compete in one ranking": (partial(one_round, per_site=True), 0.25),
    },
)
SMALLEST = Compared(
    smallest,
    {"only active neurons were tried: a dead one may wake up and do it": (partial(smallest, active_only=True), 0.4)},
)

QUESTIONS = [
    Question(
        "dead_shares",
        "Dead neurons by site",
        (
            Part("fully connected", 2, connected, SHARES),
            Part("convolutional", 2, convolutional, SHARES),
        ),
    ),
    Question(
        "response_inside",
        "The response inside a pathway",
        (
            Part(
                "right response",
                4,
                pathways,
                Compared(
                    response_inside,
                    {
                        "the class was predicted anew inside the pathway; the response is that of the whole network's "
                        "class": (partial(response_inside, anew=True), 0.5),
                        "activations of the whole run were masked: later sites must see masked values": (
                            masked_afterwards,
                            0.25,
                        ),
                    },
                ),
            ),
        ),
    ),
    Question(
        "woken",
        "Who woke up?",
        (
            Part(
                "right neurons",
                4,
                to_wake,
                Compared(
                    woken,
                    {
                        "these are the neurons that fell asleep": (fallen_asleep, 0.25),
                        "these are kept and dead in the whole network, awake inside or not": (kept_and_dead, 0.5),
                    },
                ),
            ),
        ),
    ),
    Question(
        "one_round",
        "One round of monotone pruning",
        (
            Part("usual rounds", 3, usual_rounds, ROUND),
            Part("k is 0, or more than can be kept", 2, edges, ROUND),
        ),
    ),
    Question(
        "smallest",
        "The smallest equivalent pathway",
        (
            Part("networks with a sleeper", 2, sleepers, SMALLEST),
            Part("other small networks", 3, tiny_networks, SMALLEST),
        ),
    ),
    Question(
        "never_active",
        "Your own images",
        (
            Part(
                "right number",
                3,
                own_images,
                Compared(
                    never_active,
                    {"this is the mean number of dead neurons of an image, not of all images": (counted, 0.34)},
                ),
                own=True,
            ),
        ),
    ),
]
