"""What a pathway is worth: measures per input, and intervals over inputs."""

from .pathways import confidence, dead_share, prediction_kept
from .statistics import Interval, bootstrap_interval

__all__ = ["Interval", "bootstrap_interval", "confidence", "dead_share", "prediction_kept"]
