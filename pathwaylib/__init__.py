"""Read a neural network through the sparse paths its signal takes.

Image → ``observe`` → ``contributions`` → selector → ``Pathway`` → ``masked`` run → ``PathwayGradient``.
"""

from .attribution import PathwayGradient
from .contributions import Contributions, ablation, integrated_gradients, shapley, taylor
from .data import ImageSet, cifar10, planted
from .decoding import Augment, Decoded, decode_pathway, top_neuron, visualise_neuron
from .errors import PathwayError
from .evaluation import (
    ClassOverlap,
    Interval,
    PairedDifference,
    RankStability,
    bootstrap_interval,
    class_overlap,
    class_similarity,
    confidence,
    dead_share,
    method_similarity,
    paired_difference,
    pairwise_iou,
    prediction_kept,
    rank_stability,
)
from .explainers import explain, explainers, pathway_gradient, times_input
from .files import cache_dir
from .interactive import InteractiveFigure, line_figure, neuron_figure, pathway_figure
from .linearity import Binding, KinkDistance, LinearRegion, first_kink, linear_pieces, linear_region
from .neurons import Activations, masked, observe
from .notebook import setup
from .pathway import Pathway
from .plots import (
    show_attributions,
    show_class_overlap,
    show_curves,
    show_decoded,
    show_images,
    show_pathway,
    show_similarity,
)
from .pruning import DistillationGuidedRouting, GreedyPruning, sleeper_network
from .rerun import Rerun
from .results import load_results
from .selectors import ActiveNeurons, NeuronIntGrad, NeuronMCT, RandomSelection, Selector
from .zoo import load_model, model_card

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "ActiveNeurons",
    "Augment",
    "Binding",
    "ClassOverlap",
    "Contributions",
    "Decoded",
    "DistillationGuidedRouting",
    "GreedyPruning",
    "ImageSet",
    "InteractiveFigure",
    "Interval",
    "KinkDistance",
    "LinearRegion",
    "NeuronIntGrad",
    "NeuronMCT",
    "PairedDifference",
    "Pathway",
    "PathwayError",
    "PathwayGradient",
    "RandomSelection",
    "RankStability",
    "Rerun",
    "Selector",
    "ablation",
    "bootstrap_interval",
    "cache_dir",
    "cifar10",
    "class_overlap",
    "class_similarity",
    "confidence",
    "dead_share",
    "decode_pathway",
    "explain",
    "explainers",
    "first_kink",
    "integrated_gradients",
    "line_figure",
    "linear_pieces",
    "linear_region",
    "load_model",
    "load_results",
    "masked",
    "method_similarity",
    "model_card",
    "neuron_figure",
    "observe",
    "paired_difference",
    "pairwise_iou",
    "pathway_figure",
    "pathway_gradient",
    "planted",
    "prediction_kept",
    "rank_stability",
    "setup",
    "shapley",
    "show_attributions",
    "show_class_overlap",
    "show_curves",
    "show_decoded",
    "show_images",
    "show_pathway",
    "show_similarity",
    "sleeper_network",
    "taylor",
    "times_input",
    "top_neuron",
    "visualise_neuron",
]
