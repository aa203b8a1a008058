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
from .statistics import Interval, bootstrap_interval

__all__ = [
    "ClassOverlap",
    "Interval",
    "bootstrap_interval",
    "class_overlap",
    "class_similarity",
    "confidence",
    "dead_share",
    "method_similarity",
    "pairwise_iou",
    "prediction_kept",
]
