"""A trained generator as a selector, and its weights on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PathwayError
from ..neurons import Target, record, resolve_target
from ..pathway import Pathway
from ..zoo import WEIGHTS, read_card, store_model, verified_weights, with_weights
from .network import GeneratorNetwork, GeneratorShape


@dataclass(frozen=True, eq=False)
class PathwayGenerator:
    """Keep the neurons to which a trained generator gives a score above 0; the sparsity is the input's own.

    One run of the target and one of the generator. The generator was trained to keep the *predicted* class; a target
    given here is only noted.

    Attributes:
        network: a trained generator for the target, in eval mode.

    Raises:
        PathwayError: if the generator was built for another network, its scores are NaN, or as
            :func:`pathwaylib.observe`.

    Source: Lin, Bao, Yu, Kong, *On Model Explanations with Transferable Neural Pathways* (2023).

    Example:
        >>> from pathwaylib import load_model
        >>> target, x = load_model("planted-cnn"), torch.rand(2, 3, 32, 32)
        >>> PathwayGenerator(GeneratorNetwork.like(target, x))(target, x).sizes.shape
        torch.Size([2])
    """

    network: GeneratorNetwork

    def __call__(self, model: nn.Module, x: Tensor, target: Target = None) -> Pathway:
        """Return the pathway of each image of ``x``."""
        with torch.no_grad():
            sites, _, activations, logits = record(model, x, keep_pre=False)
            names = tuple(site.name for site in sites)
            if names != self.network.sites:
                raise PathwayError(
                    f"{type(model).__name__} has the sites {', '.join(names)}; this generator was built for "
                    f"{', '.join(self.network.sites)}: train one for this network"
                )
            generated = self.network(activations)
        masks = tuple(scores > 0 for scores in generated.scores)
        return Pathway(masks, names, resolve_target(logits, target))


def store_generator(name: str, network: GeneratorNetwork, card: dict[str, Any], folder: Path = WEIGHTS) -> None:
    """Write a generator's weights in float16 and its card, and what it was built for."""
    built = {"sites": network.sites, "shapes": network.shapes, "classes": network.classes}
    store_model(name, network, {**card, "built": {**built, "shape": asdict(network.shape)}}, folder)


def load_generator(name: str, *, device: torch.device | str = "cpu", folder: Path = WEIGHTS) -> PathwayGenerator:
    """Load a trained generator as a selector, its weights verified against the card.

    Raises:
        PathwayError: if there is no such generator, its card is damaged, or its weights are not those of the card.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        stored = sorted(card.stem for card in folder.glob("*.json") if "built" in read_card(card))
        raise PathwayError(f"there is no generator {name!r}; stored are {', '.join(stored) or 'none'}")
    card = read_card(path)
    built = card.get("built")
    if not isinstance(built, dict):
        raise PathwayError(f"{path} is not the card of a generator; stored by store_generator it says what it is for")

    def build() -> GeneratorNetwork:
        return GeneratorNetwork(built["sites"], built["shapes"], built["classes"], GeneratorShape(**built["shape"]))

    network = with_weights(build, verified_weights(name, card, folder), folder / f"{name}.safetensors")
    return PathwayGenerator(network.eval().requires_grad_(False).to(device))
