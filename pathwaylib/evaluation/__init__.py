"""What a pathway is worth: measures per input, overlap over inputs, and the intervals of both."""

from .pathways import (
    ClassOverlap,
    class_overlap,
    class_similarity,
    confidence,
    dead_share,
    method_similarity,
    pairwise_iou,
    prediction_kept,
)
from .statistics import (
    Interval,
    PairedDifference,
    RankStability,
    bootstrap_interval,
    paired_difference,
    rank_stability,
)

__all__ = [
    "ClassOverlap",
    "Interval",
    "PairedDifference",
    "RankStability",
    "bootstrap_interval",
    "class_overlap",
    "class_similarity",
    "confidence",
    "dead_share",
    "method_similarity",
    "paired_difference",
    "pairwise_iou",
    "prediction_kept",
    "rank_stability",
]
