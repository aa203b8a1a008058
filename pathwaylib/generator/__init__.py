"""GEN-CNP: a network that reads a frozen target's activations and writes the pathway, in one forward run."""

from .network import GeneratorNetwork, GeneratorShape
from .quantizer import DistanceAwareQuantizer, Quantizer, StraightThroughQuantizer
from .selector import PathwayGenerator, load_generator, store_generator
from .training import GeneratorRecipe, generator_losses, train_generator
from .transfer import class_frequencies, class_pathways, transfer

__all__ = [
    "DistanceAwareQuantizer",
    "GeneratorNetwork",
    "GeneratorRecipe",
    "GeneratorShape",
    "PathwayGenerator",
    "Quantizer",
    "StraightThroughQuantizer",
    "class_frequencies",
    "class_pathways",
    "generator_losses",
    "load_generator",
    "store_generator",
    "train_generator",
    "transfer",
]
