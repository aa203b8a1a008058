"""Where a network, or a pathway network, is exactly linear: around an image, and along a line.

A piecewise-linear network is linear until one of its **conditions** changes: a neuron passes a kink of its activation,
or a max-pooling window gets another winner. Every condition is a function of the image that is itself linear until
the first change, so its distance is its value divided by the length of its gradient.
"""

from .conditions import Binding
from .kinks import KinkDistance, first_kink, linear_pieces, moving, walk
from .region import LinearRegion, linear_region

__all__ = ["Binding", "KinkDistance", "LinearRegion", "first_kink", "linear_pieces", "linear_region", "moving", "walk"]
