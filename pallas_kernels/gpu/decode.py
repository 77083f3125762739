"""The choice of several layers and the decode attention of one on GPU, without an operation between their kernels."""

from __future__ import annotations

from pallas_kernels.choice import contested_range, image_of
from pallas_kernels.gpu.attention import attend_to_units
from pallas_kernels.gpu.scores import can_image, importance_images, importance_scores
from pallas_kernels.gpu.selection import as_selection, choose_units


def choose_by_importance(q_imp, k_imp, lengths, n, *, counts, rules, interpret, **scored):
    """The `Selection` of n units. Arguments as in `composed.py`."""
    return as_selection(*_choose(q_imp, k_imp, lengths, n, counts, rules, interpret, **scored))


def sparse_decode_attention(q, k, v, q_imp, k_imp, lengths, n, *, counts, rules, scored, interpret, **options):
    """Attention [B, H, D], its log-sum-exp [B, H], and the `Selection`. Arguments as in `composed.py`."""
    units, taken = _choose(q_imp, k_imp, lengths, n, counts, rules, interpret, layer=options["layer"], **scored)
    shared = dict(unit=rules.unit, lengths=lengths, first=rules.first, interpret=interpret)
    out, residual = attend_to_units(q, k, v, units, taken, **shared, **options)
    return out, residual, as_selection(units, taken)


def _choose(q_imp, k_imp, lengths, n, counts, rules, interpret, **scored):
    """The chosen units and their number, as `choose_units` gives them. Sinks and recent tokens are not scored."""
    scored |= dict(interpret=interpret)
    if can_image(q_imp, k_imp, rules.unit):
        image = importance_images(q_imp, k_imp, lengths, rules=rules, first=rules.first, **scored)
    else:  # a unit is longer than what a program scores
        begin, contested = contested_range(lengths, rules.first, rules.sinks, rules.recent)
        scores = importance_scores(q_imp, k_imp, contested, first=begin, **scored)
        image = image_of(scores, lengths, rules)
    chosen = dict(counts=counts, first=rules.first, unit=rules.unit, interpret=interpret)
    return choose_units(image, lengths, n, k_imp.shape[-1], **chosen)
