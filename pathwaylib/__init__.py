"""Read a neural network through the sparse paths its signal takes.

Image → ``observe`` → ``contributions`` → selector → ``Pathway`` → ``masked`` run → ``PathwayGradient``.
"""

from .attribution import PathwayGradient
from .contributions import Contributions, taylor
from .data import ImageSet, cifar10, planted
from .errors import PathwayError
from .evaluation import Interval, bootstrap_interval, confidence, dead_share, prediction_kept
from .files import cache_dir
from .interactive import InteractiveFigure, pathway_figure
from .neurons import Activations, masked, observe
from .notebook import setup
from .pathway import Pathway
from .plots import show_attributions, show_curves, show_images, show_pathway
from .selectors import ActiveNeurons, NeuronMCT, RandomSelection, Selector
from .zoo import load_model, model_card

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "ActiveNeurons",
    "Contributions",
    "ImageSet",
    "InteractiveFigure",
    "Interval",
    "NeuronMCT",
    "Pathway",
    "PathwayError",
    "PathwayGradient",
    "RandomSelection",
    "Selector",
    "bootstrap_interval",
    "cache_dir",
    "cifar10",
    "confidence",
    "dead_share",
    "load_model",
    "masked",
    "model_card",
    "observe",
    "pathway_figure",
    "planted",
    "prediction_kept",
    "setup",
    "show_attributions",
    "show_curves",
    "show_images",
    "show_pathway",
    "taylor",
]
