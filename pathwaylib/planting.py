"""Planted pathways: networks built by hand, in which the neurons behind a response are known.

Image sets with planted truth are in :mod:`pathwaylib.data`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import PathwayError, require_at_least_one
from .neurons import masked, observe
from .pathway import Pathway, split_sites

_PIXELS = 6  # of a feature's patch, three of them lit
_COMBINATIONS_AT_ONCE = 16_384


@dataclass(frozen=True, eq=False)
class CriticalNeurons:
    """The neurons that make each input's response, where they are known.

    Attributes:
        groups: one int64 tensor ``(B, ...)`` per site: -1 where the neuron is not critical, else the number of its
            group. Neurons of one group can stand in for each other: the response needs one of them.
        sites: name of each site, in the order of execution.

    Example:
        >>> critical = CriticalNeurons((torch.tensor([[0, 0, -1]]), torch.tensor([[1, -1]])), ("relu_0", "relu_1"))
        >>> critical.sizes, critical.pathway().sizes
        (tensor([2]), tensor([3]))
    """

    groups: tuple[Tensor, ...]
    sites: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of inputs B."""
        return len(self.groups[0])

    def flatten(self) -> Tensor:
        """Return the groups of all neurons in site order, ``(B, N)``."""
        return torch.cat([group.flatten(1) for group in self.groups], 1)

    @property
    def sizes(self) -> Tensor:
        """Number of groups per input, ``(B,)``: the neurons that a smallest critical set has."""
        return self.within(self.pathway())

    def pathway(self) -> Pathway:
        """Return the pathway of all members of all groups."""
        return Pathway(tuple(group >= 0 for group in self.groups), self.sites)

    def within(self, pathway: Pathway) -> Tensor:
        """Return the number of groups that have a member in the pathway, ``(B,)``."""
        groups = torch.where(pathway.flatten(), self.flatten(), -1) + 1
        found = torch.zeros(len(self), int(self.flatten().max()) + 2, dtype=torch.bool, device=groups.device)
        return found.scatter_(1, groups, True)[:, 1:].sum(1)


@dataclass(frozen=True, eq=False)
class PlantedNetwork:
    """A network whose critical neurons are known, and inputs for it.

    Attributes:
        model: the network, in eval mode.
        x: inputs ``(B, D)``.
        labels: class of each input ``(B,)``, which the network predicts.
        critical: the neurons behind each response.
        kinds: a partition of all neurons for each input: ``"critical"``, ``"other classes"``, and the distractors
            that were planted: ``"dead"``, ``"idle"``, ``"cancelling"``, ``"sleepers"``.
    """

    model: nn.Sequential
    x: Tensor
    labels: Tensor
    critical: CriticalNeurons
    kinds: dict[str, Pathway]

    @property
    def sparsity(self) -> float:
        """The sparsity at which a selector keeps as many neurons as are critical, the same for every input."""
        return 1 - int(self.critical.sizes[0]) / self.critical.flatten().shape[1]


def planted_network(
    n: int = 32,
    *,
    seed: int = 0,
    classes: int = 4,
    parts: int = 3,
    copies: int = 1,
    saturated: bool = False,
    dead: int = 0,
    idle: int = 0,
    cancelling: int = 0,
    sleepers: bool = False,
) -> PlantedNetwork:
    """Build a network with a known computation, distractors beside it, and inputs for it.

    An input has a patch of six pixels for each part of each class, and one pixel of context. Its class is the one
    whose ``parts`` all show their pattern; of every other class some parts do too, but never all. Three sites compute
    it: a *detector* for each part (ReLU) is active where the pattern is there; a *relay* for each part (ReLU6) passes
    that on; one *conjunction* for each class (ReLU) is active where all relays of its class are. The critical neurons
    of an input are its class's detectors, relays and conjunction, ``2 parts + 1`` of them: the smallest set of active
    neurons that alone gives the logits of the whole network. Nothing else is needed, but other neurons stand beside
    them, each kind to be switched on:

    - ``copies``: detectors per part, any one of which is enough. More than one implies ``saturated``.
    - ``saturated``: relays are driven far above 6, where a small change of a detector changes nothing.
    - ``dead``: chains of three neurons, one per site, that are never active, with large weights to the logits.
    - ``idle``: chains that are always active, with weight 0 to the logits.
    - ``cancelling``: *pairs* of active chains with large weights to the logits, equal and opposite.
    - ``sleepers``: one neuron per class at the last site, dead on every input because all relays inhibit it. Where
      everything else is pruned it wakes up, and alone gives the logits of its class.

    Weights, patterns and the order of the neurons are random. All numbers are small multiples of powers of two, so
    that sums are exact and cancelling is complete.

    Args:
        n: number of inputs.
        seed: of everything random; the same arguments give the same network and inputs.
        classes: number of classes, at least 2.
        parts: parts per class, at least 1.
        copies: detectors per part.
        saturated: whether relays saturate.
        dead: dead chains.
        idle: idle chains.
        cancelling: pairs of cancelling chains.
        sleepers: whether there are sleepers.

    Returns:
        :class:`PlantedNetwork`.

    Raises:
        PathwayError: if a number is out of range.

    Equation: the critical set is the smallest P ⊆ {j : a_j(x) > 0} with Φ_P(x) = Φ(x). It is unique up to the choice
    among copies: the conjunction carries an odd multiple of 1/256 to the logits, every chain an even one, so without
    it no set of active neurons gives these logits; and it needs all its relays, each of which needs a detector.

    Example:
        >>> planted = planted_network(n=2, classes=2, parts=2, idle=1)
        >>> planted.critical.sizes, planted.model(planted.x).argmax(1) == planted.labels
        (tensor([5, 5]), tensor([True, True]))
    """
    require_at_least_one(n=n, parts=parts, copies=copies)
    if classes < 2 or min(dead, idle, cancelling) < 0:
        raise PathwayError(
            f"planted_network(classes={classes}, dead={dead}, idle={idle}, cancelling={cancelling}): give at least two "
            "classes and no negative number of distractors"
        )
    generator = torch.Generator().manual_seed(seed)
    features = classes * parts
    patterns = torch.stack([torch.randperm(_PIXELS, generator=generator) < _PIXELS // 2 for _ in range(features)])
    circuits = _circuits(patterns, classes, copies, saturated or copies > 1, sleepers, generator)
    chains = _chains(classes, dead, idle, cancelling, generator)
    orders = [torch.randperm(len(bias), generator=generator) for bias in _joined(circuits.biases, chains.biases)]
    sites = ("relu_0", "relu6_1", "relu_2")

    labels = torch.randint(classes, (n,), generator=generator)
    present = torch.rand(n, classes, parts, generator=generator) < 0.5
    present.scatter_(2, torch.randint(parts, (n, classes, 1), generator=generator), False)
    present[torch.arange(n), labels] = True
    # Where a part is missing, its patch shows the pattern shifted by a pixel.
    patches = torch.where(present.flatten(1)[:, :, None], patterns, patterns.roll(1, 1)).float()
    x = torch.cat([patches.flatten(1), _draw(8, 16, (n, 1), generator) / 16], 1)

    owners, groups, kinds = (
        [part[order] for part, order in zip(_joined(one, other), orders, strict=True)]
        for one, other in (
            (circuits.owners, chains.owners),
            (circuits.groups, chains.groups),
            (circuits.kinds, chains.kinds),
        )
    )
    own = [owner == labels[:, None] for owner in owners]
    critical = tuple(torch.where(mine, group, -1) for mine, group in zip(own, groups, strict=True))
    found = [torch.where(mine, 0, kind) for mine, kind in zip(own, kinds, strict=True)]
    partition = {
        name: Pathway(tuple(kind == index for kind in found), sites)
        for index, name in enumerate(_KINDS)
        if any(bool((kind == index).any()) for kind in found)
    }
    model = _network(circuits, chains, orders)
    return PlantedNetwork(model, x, labels, CriticalNeurons(critical, sites), partition)


_KINDS = ("critical", "other classes", "dead", "idle", "cancelling", "sleepers")
_NOBODY = -1


@dataclass(frozen=True)
class _Block:
    """Neurons at three sites that are wired among themselves, and to the logits.

    Attributes:
        weights: of the layer before each site, and of the logits.
        biases: of the layer before each site.
        owners: per site, the class that each neuron serves.
        groups: per site, the number of each neuron's group among those of its class.
        kinds: per site, what each neuron is for inputs of other classes than its owner: an index of ``_KINDS``.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    owners: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]
    kinds: tuple[Tensor, ...]


def _circuits(
    patterns: Tensor, classes: int, copies: int, saturated: bool, sleepers: bool, generator: torch.Generator
) -> _Block:
    """Build the circuits of all classes: detectors, relays, conjunctions and sleepers."""
    features = len(patterns)
    parts = features // classes
    owner, part = torch.arange(features) // parts, torch.arange(features) % parts
    seen_by = torch.arange(features).repeat_interleave(copies)  # the feature of each detector
    strength = _draw(12, 20, (len(seen_by),), generator) / 16
    detect = torch.zeros(len(seen_by), features, _PIXELS)
    detect[torch.arange(len(seen_by)), seen_by] = strength[:, None] * (2.0 * patterns[seen_by] - 1)
    relay = (16.0 if saturated else 2.0) * torch.eye(features)[:, seen_by]
    shown = torch.full((features,), 6.0) if saturated else 2 * strength  # by a relay, where the part is there
    conjoin = torch.eye(classes)[:, owner]
    sleeping = classes * sleepers
    weight = ((2 * _draw(512, 767, (classes,), generator) + 1) / 256).diag()  # odd numerators, from 4 to 6
    nobody = torch.full((sleeping,), _NOBODY)
    return _Block(
        weights=(
            detect.flatten(1),
            relay,
            torch.cat([conjoin, torch.full((sleeping, features), -2.0)]),
            torch.cat([weight, weight[:, :sleeping] / 2], 1),
        ),
        # A pattern lights three pixels: two of them, or three and a wrong one, are not enough.
        biases=(
            -2 * strength,
            torch.zeros(features),
            torch.cat([1 - conjoin @ shown, torch.full((sleeping,), 2.0)]),
        ),
        owners=(owner[seen_by], owner, torch.cat([torch.arange(classes), nobody])),
        groups=(part[seen_by], parts + part, torch.cat([torch.full((classes,), 2 * parts), nobody])),
        kinds=(
            torch.ones(len(seen_by), dtype=torch.long),
            torch.ones(features, dtype=torch.long),
            torch.tensor([1] * classes + [_KINDS.index("sleepers")] * sleeping),
        ),
    )


def _chains(classes: int, dead: int, idle: int, cancelling: int, generator: torch.Generator) -> _Block:
    """Build chains of three neurons that read the context pixel; the two of a pair differ in sign at the logits."""
    begin = _draw(16, 32, (idle + cancelling,), generator) / 16
    begin = torch.cat([-torch.ones(dead), begin, begin[idle:]])
    floor = torch.cat([torch.full((dead,), -0.5), torch.zeros(idle + 2 * cancelling)])
    # Twice a whole number: even, which the conjunctions' weights are not.
    size = 2 * _draw(6, 10, (dead + cancelling, 1), generator)
    end = size * (2 * _draw(0, 1, (dead + cancelling, classes), generator) - 1)
    end = torch.cat([end[:dead], torch.zeros(idle, classes), end[dead:], -end[dead:]])
    nobody = (torch.full((len(begin),), _NOBODY),) * 3
    kinds = [_KINDS.index("dead")] * dead + [_KINDS.index("idle")] * idle
    kinds += [_KINDS.index("cancelling")] * (2 * cancelling)
    return _Block(
        weights=(begin[:, None], torch.eye(len(begin)), torch.eye(len(begin)), end.T),
        biases=(floor,) * 3,
        owners=nobody,
        groups=nobody,
        kinds=(torch.tensor(kinds, dtype=torch.long),) * 3,
    )


def _draw(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw whole numbers from ``low`` to ``high``, as floats."""
    return torch.randint(low, high + 1, shape, generator=generator).float()


def _joined(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(one, other, strict=True)]


def _network(circuits: _Block, chains: _Block, orders: list[Tensor]) -> nn.Sequential:
    """Put two blocks side by side, with the neurons of each site in the order given."""
    weights = [torch.block_diag(*pair) for pair in zip(circuits.weights[:-1], chains.weights[:-1], strict=True)]
    weights.append(torch.cat([circuits.weights[-1], chains.weights[-1]], 1))
    biases = [*_joined(circuits.biases, chains.biases), torch.zeros(len(weights[-1]))]
    for site, order in enumerate(orders):
        weights[site], biases[site] = weights[site][order], biases[site][order]
        weights[site + 1] = weights[site + 1][:, order]
    layers: list[nn.Module] = []
    for weight, bias, activation in zip(weights, biases, (nn.ReLU(), nn.ReLU6(), nn.ReLU(), None), strict=True):
        layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer] if activation is None else [layer, activation]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def critical_sets(model: nn.Module, x: Tensor, *, at_most: int = 1_000_000) -> Pathway:
    """Find, by trying them all, the smallest sets of active neurons that alone give an input's logits.

    Sets are tried by their size, so that the smallest are found without looking at larger ones. The first question
    to ask of a planted truth, and the last word on it where the network is small.

    Args:
        model: a network in eval mode.
        x: one input ``(1, ...)``.
        at_most: sets to try.

    Returns:
        One :class:`Pathway` entry for each smallest set.

    Raises:
        PathwayError: as :func:`pathwaylib.observe`; if ``x`` holds more than one input; if ``at_most`` sets were
            tried without success.

    Equation: the smallest P ⊆ {j : a_j(x) > 0} with Φ_P(x) = Φ(x), to within rounding.

    Example:
        >>> from pathwaylib import sleeper_network
        >>> critical_sets(*sleeper_network()).masks  # all but d, the sleeper, which is not active
        (tensor([[True, True, True]]), tensor([[ True, False]]))
    """
    if len(x) != 1:
        raise PathwayError(f"x holds {len(x)} inputs; give one, of shape (1, ...)")
    require_at_least_one(at_most=at_most)
    with torch.no_grad():
        seen = observe(model, x)
        active = seen.active().flatten()[0]
        shapes = [a.shape[1:] for a in seen.post]
        size = tried = 0
        while True:  # all active neurons together give the logits, at the latest
            combinations = itertools.combinations(active.nonzero()[:, 0].tolist(), size)
            found = []
            while chosen := list(itertools.islice(combinations, _COMBINATIONS_AT_ONCE)):
                tried += len(chosen)
                if tried > at_most:
                    raise PathwayError(
                        f"{at_most:,} sets of at most {size} of the {int(active.sum())} active neurons were tried; "
                        "give a smaller network, or a larger at_most"
                    )
                bits = torch.zeros(len(chosen), len(active), dtype=torch.bool, device=x.device)
                bits.scatter_(1, torch.tensor(chosen, dtype=torch.long, device=x.device).view(len(chosen), size), True)
                with masked(Pathway(split_sites(bits, shapes), seen.sites), runs=1):
                    logits = model(x.expand(len(chosen), *x.shape[1:]).clone())  # a network may change its input
                found.append(bits[logits.isclose(seen.logits, rtol=1e-5, atol=1e-6).all(1)])
            if any(map(len, found)):
                return Pathway(split_sites(torch.cat(found), shapes), seen.sites)
            size += 1
