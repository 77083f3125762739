"""The choice of one row at a time in Python, and the settings under which all forms of the choice are tested."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np

from butler_jax.selection import beyond, budget_table, choose, select_mask
from pallas_kernels import select_top_k


def select(scores, allowed, rows, config, threshold=None):
    """`select_mask` under the budget of each row, where all heads may see the same keys."""
    count = jnp.sum(allowed[:, 0], axis=-1, dtype=jnp.int32)
    tokens = jnp.asarray(budget_table(config, scores.shape[-1]))[count]
    threshold = beyond(config.min_context, count[:, None], threshold)
    return select_mask(scores, allowed, rows, tokens, config, threshold=threshold)


def choose_by_scores(scores, lengths, tokens, room, config, **options):
    """`choose` of the units with the best scores [B, K, S]."""
    return choose(partial(select_top_k, scores, lengths), scores.shape[-1], lengths, tokens, room, config, **options)


def sorted_choice(scores, allowed, own, start, tokens, sinks, recent):
    """The set of one row, by sorting: recent and sinks, then by score and position."""
    columns = [int(j) for j in np.flatnonzero(allowed)]
    forced = [j for j in columns if j > own - recent or start <= j < start + sinks]
    value = {j: -np.inf if np.isnan(scores[j]) else scores[j] for j in columns}
    rest = sorted(set(columns) - set(forced), key=lambda j: (-value[j], j))
    return {*forced, *rest[: max(min(tokens, len(columns)) - len(forced), 0)]}


def paged_choice(scores, held, tokens, config, threshold=None, first=0):
    """The tokens of one row of `held` tokens, page by page in Python; those before `first` do not exist for it."""
    unit, seen = config.unit, range(first, held)
    value = {j: -np.inf if np.isnan(scores[j]) else scores[j] for j in seen}
    pages = {}
    for j in seen:
        pages.setdefault(j // unit, []).append(j)
    forced = {p for p, js in pages.items() if any(j < config.sinks or j >= held - config.recent for j in js)}
    everything = tokens >= len(seen)
    room = 0
    total = min(len(pages[(held - 1) // unit]), (held - 1) % unit + 1)
    while total <= tokens:  # whole pages beside the newest
        room, total = room + 1, total + unit
    room = len(pages) if everything else max(room, len(forced))
    order = sorted(set(pages) - forced, key=lambda p: (-max(value[j] for j in pages[p]), p))
    own = room - len(forced)
    if config.neighbours and not everything:
        own //= 2
    picked = order[: max(own, 0)]
    if threshold is not None:
        picked = [p for p in picked if max(value[j] for j in pages[p]) >= threshold]
    chosen = set(picked)
    if config.neighbours:
        for p in picked:  # the run that p belongs to, and its length
            low, high = p, p
            while low - 1 in picked:
                low -= 1
            while high + 1 in picked:
                high += 1
            if p + (high - low + 1) in pages:
                chosen.add(p + (high - low + 1))
    return {j for p in chosen | forced for j in pages[p]}


CASES = [
    dict(budget=0.4, sinks=2, recent=3),
    dict(budget=0.4, sinks=2, recent=3, unit=4),
    dict(budget=22, sinks=1, recent=6, unit=8),
    dict(budget=0.5, sinks=2, recent=3, neighbours=True),
    dict(budget=0.6, sinks=2, recent=3, unit=2, neighbours=True),
    dict(budget=0.7, sinks=2, recent=3, threshold=((0.0, 0.0), (0.3, -0.5))),
    dict(budget=0.7, sinks=2, recent=3, unit=2, neighbours=True, threshold=((0.0, 0.0), (0.3, -0.5))),
    dict(budget=1.0, unit=4, sinks=2, recent=3),
    dict(budget=0.3, sinks=2, recent=3, min_context=20),
]

IDS = ["-".join(f"{name[:3]}{value}" for name, value in fields.items())[:40] for fields in CASES]
