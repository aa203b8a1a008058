"""Checks for the exercises of the book: each tells a wrong answer why it is wrong.

A check never raises. It runs the reader's function on small networks with seeded random weights, compares the result
with the library's, and returns a :class:`Verdict`. Typical mistakes are recognised by what they compute.
"""

from .contributions import (
    check_blind_spot,
    check_channel_contribution,
    check_complete_but_wrong,
    check_dead_share,
    check_midpoint_scores,
    check_top_k,
)
from .decoding import check_ascent_step, check_class_means, check_iou, check_label_selector
from .faithfulness import check_correlation, check_impostor, check_matching_attribution, check_most_relevant
from .forcing import check_class_relevant, check_deciding_pattern, check_forcing_rate, check_others_loss
from .generator import check_class_term, check_code, check_embedding, check_quantizer
from .judging import Verdict
from .large import check_central_box, check_pyramid, check_states, check_two_kinks
from .linearity import check_distance_along, check_layer_radius, check_pool_distance, check_sign_radius_fails
from .pathway_gradient import check_backward_masked, check_hand_gradient, check_mass_inside, check_sign_flip
from .planted import check_cam_misses, check_integral_misses, check_pointing, check_slope_misses, two_glyphs
from .pruning import check_gate_step, check_prune_round, check_sleeper, check_woken_response
from .responses import check_count_dead, check_dead_pathway, check_masked_run, check_woken
from .retraining import check_free_removal, check_gaps, check_leak, check_seed_difference
from .sanity import check_cascade, check_hollow, check_rank_similarity, check_same_class
from .scale import check_bits, check_bytes, check_typicality, check_union

__all__ = [
    "Verdict",
    "check_ascent_step",
    "check_backward_masked",
    "check_bits",
    "check_blind_spot",
    "check_bytes",
    "check_cam_misses",
    "check_cascade",
    "check_central_box",
    "check_channel_contribution",
    "check_class_means",
    "check_class_relevant",
    "check_class_term",
    "check_code",
    "check_complete_but_wrong",
    "check_correlation",
    "check_count_dead",
    "check_dead_pathway",
    "check_dead_share",
    "check_deciding_pattern",
    "check_distance_along",
    "check_embedding",
    "check_forcing_rate",
    "check_free_removal",
    "check_gaps",
    "check_gate_step",
    "check_hand_gradient",
    "check_hollow",
    "check_impostor",
    "check_integral_misses",
    "check_iou",
    "check_label_selector",
    "check_layer_radius",
    "check_leak",
    "check_masked_run",
    "check_mass_inside",
    "check_matching_attribution",
    "check_midpoint_scores",
    "check_most_relevant",
    "check_others_loss",
    "check_pointing",
    "check_pool_distance",
    "check_prune_round",
    "check_pyramid",
    "check_quantizer",
    "check_rank_similarity",
    "check_same_class",
    "check_seed_difference",
    "check_sign_flip",
    "check_sign_radius_fails",
    "check_sleeper",
    "check_slope_misses",
    "check_states",
    "check_top_k",
    "check_two_kinks",
    "check_typicality",
    "check_union",
    "check_woken",
    "check_woken_response",
    "two_glyphs",
]
