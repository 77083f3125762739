"""The choice of several layers and the decode attention of one on GPU, without an operation between their kernels."""

from __future__ import annotations

from pallas_kernels.choice import image_of
from pallas_kernels.gpu.attention import attend_to_units
from pallas_kernels.gpu.scores import can_image, importance_images, importance_scores
from pallas_kernels.gpu.selection import as_selection, choose_units


def sparse_decode_attention(
    q, k, v, q_imp, k_imp, lengths, n, *, counts, rules, normalised, scales, score_scale, interpret, **options
):
    """Attention [B, H, D], its log-sum-exp [B, H], and the `Selection`. Arguments as in `composed.py`."""
    first, layer = rules.first, options["layer"]
    scored = dict(scales=scales, scale=score_scale, first=first, layer=layer, normalised=normalised)
    if can_image(q_imp, k_imp, rules.unit):
        scored |= dict(rules=rules, seen=None, totals=None, offset=None)
        image = importance_images(q_imp, k_imp, lengths, interpret=interpret, **scored)
    else:  # a unit is longer than what a program scores
        scored |= dict(unit=rules.unit, totals=None, offset=None)
        scores = importance_scores(q_imp, k_imp, lengths, interpret=interpret, **scored)
        image = image_of(scores, lengths, rules)
    chosen = dict(counts=counts, first=first, unit=rules.unit, interpret=interpret)
    units, taken = choose_units(image, lengths, n, k.shape[-2], **chosen)
    shared = dict(unit=rules.unit, lengths=lengths, first=first, interpret=interpret)
    out, residual = attend_to_units(q, k, v, units, taken, **shared, **options)
    return out, residual, as_selection(units, taken)


def choose_by_importance(q_imp, k_imp, lengths, n, *, counts, rules, contested, begin, interpret, **scored):
    """The `Selection` of n units by the scores of the tokens begin ... contested - 1. Arguments as in `composed.py`."""
    seen = lengths, rules.first
    images = dict(rules=rules, seen=seen, first=begin, interpret=interpret)
    image = importance_images(q_imp, k_imp, contested, **images, **scored)
    chosen = dict(counts=counts, first=rules.first, unit=rules.unit, interpret=interpret)
    return as_selection(*choose_units(image, lengths, n, k_imp.shape[-1], **chosen))
