"""Checks for the exercises of the book: each tells a wrong answer why it is wrong.

A check never raises. It runs the reader's function on small networks with seeded random weights, compares the result
with the library's, and returns a :class:`Verdict`. Typical mistakes are recognised by what they compute.
"""

from .contributions import check_blind_spot, check_channel_contribution, check_dead_share, check_top_k
from .judging import Verdict
from .pathway_gradient import check_backward_masked, check_hand_gradient, check_mass_inside, check_sign_flip
from .pruning import check_gate_step, check_prune_round, check_sleeper, check_woken_response
from .responses import check_count_dead, check_dead_pathway, check_masked_run, check_woken

__all__ = [
    "Verdict",
    "check_backward_masked",
    "check_blind_spot",
    "check_channel_contribution",
    "check_count_dead",
    "check_dead_pathway",
    "check_dead_share",
    "check_gate_step",
    "check_hand_gradient",
    "check_masked_run",
    "check_mass_inside",
    "check_prune_round",
    "check_sign_flip",
    "check_sleeper",
    "check_top_k",
    "check_woken",
    "check_woken_response",
]
