"""Exact selection on GPU: the threshold of each row, and the units that reach it in the order of their positions.

Several programs share a row. Each finds the row's threshold by itself, so that none waits for another, and writes the
chosen units of its own part behind those of the parts before. It holds the row's images in registers meanwhile. For a
row that is too long for that, an earlier kernel leaves the few candidates around the threshold of a sample.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.choice import BARRED, TOP, Selection, image_of
from pallas_kernels.gpu.tiles import current_tiles
from pallas_kernels.gpu.triton import launch, padded_size, place_operands, seen_range, whole_numbers
from pallas_kernels.threshold import SHIFT, close_bracket, open_bracket, span_bracket, tied_units

THINNED = 32  # units for each image of the sample whose order tells where the threshold lies
SAMPLED = 32768  # images of a sample at most
SPREAD = 4.0  # standard deviations of the sample's rank that candidates lie within
CLEARED = 1024  # places of the list that are set to 0 at a time
ABOVE, AROUND, HELD = 0, 1, 2  # what a part counts: units above the candidates, candidates, units that may be chosen
CARRY = 1 << SHIFT


class SelectPlan(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        n, units: Of a row: the width of its list, and U.
        held: Images that a program holds to search the threshold.
        chunk: Units that it writes at a time.
        part: Units that it writes.
        parts: Programs of a row.
        unit, size, heads: Tokens of a unit, S, K.
    """

    n: int
    units: int
    held: int
    chunk: int
    part: int
    parts: int
    unit: int
    size: int
    heads: int

    @property
    def sampled(self):
        """Images of the sample of a row."""
        return sample_size(self.units)

    @property
    def room(self):
        """Candidates that a part leaves."""
        return min(self.part, self.held)


def sample_size(units):
    """Images of the sample of a row of so many units."""
    return min(SAMPLED, padded_size(pl.cdiv(units, THINNED)))


def part_sizes(units, rows, tiles):
    """Units that a program writes at a time, and in all, where the programs share so many rows of units."""
    share = pl.cdiv(units, max(1, tiles.choosers // rows))
    chunk = min(tiles.written, padded_size(share))
    return chunk, chunk * pl.cdiv(share, chunk)


def select_top_k(scores, lengths, n, *, counts, rules, interpret):
    """The choice of n units; arguments as in `api.py`."""
    options = dict(first=rules.first, unit=rules.unit)
    image = image_of(scores, lengths, rules)
    indices, taken = choose_units(image, lengths, n, scores.shape[-1], counts=counts, interpret=interpret, **options)
    return as_selection(indices, taken)


def as_selection(indices, taken):
    """The `Selection` of the indices [B, K, N], of which the first `taken` [B, K] are valid and the others 0."""
    return Selection(indices, jnp.arange(indices.shape[-1], dtype=jnp.int32)[None, None] < taken[..., None])


def choose_units(image, lengths, n, size, *, counts, first, unit, interpret):
    """The units with the largest images, int32 [B, K, N], 0 behind them, and how many they are, int32 [B, K].

    image: int32 [B, K, U], where those of units that a row does not see have any value.
    """
    batch, heads, units = image.shape
    rows, tiles = batch * heads, current_tiles()
    whole = units <= tiles.held
    held = padded_size(units) if whole else tiles.candidates
    chunk, part = part_sizes(units, rows, tiles)
    plan = SelectPlan(n, units, held, chunk, part, pl.cdiv(units, part), unit, size, heads)
    if counts is not None:
        counts = jnp.broadcast_to(counts[:, None] if counts.ndim == 1 else counts, (batch, heads)).reshape(rows)
    operands = place_operands(None, lengths, first) | dict(
        image=image.reshape(rows, units), counts=whole_numbers(counts)
    )
    if not whole:
        operands |= _bracket(operands, plan, interpret)
    indices, taken = launch(
        functools.partial(_select_kernel, plan=plan),
        operands,
        grid=(rows, plan.parts),
        out_shape=[jax.ShapeDtypeStruct((rows, n), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)],
        warps=max(1, min(tiles.select_warps, held // 128)),
        interpret=interpret,
        name="select_top_k",
    )
    return indices.reshape(batch, heads, n), taken.reshape(batch, heads)


def _bracket(operands, plan, interpret):
    """Candidates of every row, and what each part counts."""
    rows = operands["image"].shape[0]
    shapes = dict(candidates=(rows, plan.parts * plan.room), counted=(rows, plan.parts, 3))
    found = launch(
        functools.partial(_bracket_kernel, plan=plan),
        operands,
        grid=(rows, plan.parts),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes.values()],
        warps=max(8, min(32, plan.sampled // 256)),
        interpret=interpret,
        name="bracket_threshold",
    )
    return dict(zip(shapes, found, strict=True))


def _row_of(refs, plan):
    """The row, the first unit that it sees, the end of its units, and how many it asks for."""
    row = pl.program_id(0)
    begin, end = seen_range(refs, row // plan.heads, plan.size)
    begin, end = begin // plan.unit, jnp.where(end > begin, (end + plan.unit - 1) // plan.unit, 0)
    wanted = jnp.clip(refs["counts"][row], 0, plan.n) if "counts" in refs else jnp.int32(plan.n)
    return row, begin, end, wanted


def _images(refs, row, begin, end, start, block):
    """The images of a block of units; BARRED for those that the row does not see."""
    position = start + jnp.arange(block, dtype=jnp.int32)
    seen = (position >= begin) & (position < end)
    return plgpu.load(refs["image"].at[row, position], mask=seen, other=BARRED)


def _bracket_kernel(refs, candidates_ref, counted_ref, *, plan):
    """Images of one part that may be the threshold, as the order of a sample of the row tells."""
    row, begin, end, wanted = _row_of(refs, plan)
    part, span, sampled = pl.program_id(1), jnp.maximum(end - begin, 1), plan.sampled
    slot = jnp.arange(sampled, dtype=jnp.int32)
    at = begin + slot * (span // sampled) + slot * (span % sampled) // sampled
    sample = plgpu.load(refs["image"].at[row, at], mask=at < end, other=BARRED)
    share = jnp.minimum(wanted, span).astype(jnp.float32) / span.astype(jnp.float32)
    rank = share * np.float32(sampled)
    margin = 4 + np.float32(SPREAD) * jnp.sqrt(rank * (1 - share))
    lower, upper = ((rank + sign * margin).astype(jnp.int32) for sign in (1, -1))
    slack = (margin / 8).astype(jnp.int32)
    targets = jnp.minimum(lower, sampled), jnp.maximum(upper - slack, 1)

    def search(i, found):
        """The image that about as many of the sample reach as a target and how many do, behind what was found last."""
        target = jnp.where(i == 0, *targets)
        bracket = close_bracket(
            lambda trial: _number(sample >= trial), span_bracket(sample, target), target, slack=slack
        )
        return *found[2:], bracket.low, bracket.reached

    low, reached, high, _ = jax.lax.fori_loop(0, 2, search, (jnp.int32(0),) * 4)
    low = jnp.where((lower >= sampled) | (reached < lower), BARRED, low)
    high = jnp.where(upper <= slack, TOP + 1, high)

    def collect(i, totals):
        above, around, held = totals
        image = _images(refs, row, begin, end, part * plan.part + i * plan.chunk, plan.chunk)
        own = (image > BARRED) & (image >= low) & (image < high)
        place = around + jnp.cumsum(own.astype(jnp.int32)) - 1
        kept = own & (place < plan.room)  # a part with more has too many candidates for the search to hold
        place = jnp.where(kept, part * plan.room + place, plan.parts * plan.room)
        plgpu.store(candidates_ref.at[row, place], image, mask=kept)
        return above + _number(image >= high), around + _number(own), held + _number(image > BARRED)

    totals = jax.lax.fori_loop(0, plan.part // plan.chunk, collect, (jnp.int32(0),) * 3)
    for kind, total in zip((ABOVE, AROUND, HELD), totals, strict=True):
        counted_ref[row, part, kind] = total


def _select_kernel(refs, indices_ref, taken_ref, *, plan):
    """Write the chosen units of one part of a row."""
    row, begin, end, wanted = _row_of(refs, plan)
    part = pl.program_id(1)
    start = part * plan.part
    target = jnp.minimum(wanted, jnp.maximum(end - begin, 0))
    find = _threshold_of_candidates if "candidates" in refs else _threshold_of_row
    target, limit, ties, above, equal = find(refs, row, begin, end, target, start, plan)

    def write(i, before):
        above, equal = before
        image = _images(refs, row, begin, end, start + i * plan.chunk, plan.chunk)
        greater, same = image > limit, image == limit
        both = greater.astype(jnp.int32) * CARRY + same.astype(jnp.int32)
        counted, total = jnp.cumsum(both), jnp.sum(both)
        after = above + (counted >> SHIFT), equal + (counted & (CARRY - 1))
        place = after[0] + jnp.minimum(after[1], ties) - 1
        chosen = greater | (same & (after[1] <= ties))
        position = start + i * plan.chunk + jnp.arange(plan.chunk, dtype=jnp.int32)
        plgpu.store(indices_ref.at[row, jnp.where(chosen, place, plan.n)], position, mask=chosen)
        return above + (total >> SHIFT), equal + (total & (CARRY - 1))

    jax.lax.fori_loop(0, plan.part // plan.chunk, write, (above, equal))
    share = pl.cdiv(plan.n, plan.parts)
    cleared = min(padded_size(share), CLEARED)

    def clear(i, _):
        own = i * cleared + jnp.arange(cleared, dtype=jnp.int32)
        slot = part * share + own
        mask = (own < share) & (slot < plan.n) & (slot >= target)
        plgpu.store(indices_ref.at[row, slot], jnp.zeros(slot.shape, jnp.int32), mask=mask)
        return 0

    jax.lax.fori_loop(0, pl.cdiv(share, cleared), clear, 0)

    @pl.when(part == 0)
    def _write_taken():
        taken_ref[row] = target


def _threshold_of_row(refs, row, begin, end, target, start, plan):
    """How many units are chosen, the threshold, how many of those that equal it, and the two numbers before a part."""
    whole = _images(refs, row, begin, end, 0, plan.held)
    bracket = span_bracket(whole, target)
    target = jnp.minimum(target, bracket.reached)
    found = close_bracket(lambda trial: _number(whole >= trial), bracket, target)
    limit = found.low
    before = jnp.arange(plan.held, dtype=jnp.int32) < start
    both = jnp.where(whole > limit, CARRY, (whole == limit).astype(jnp.int32))
    both = jnp.sum(jnp.where(before, both, 0))
    return target, limit, tied_units(found, target), both >> SHIFT, both & (CARRY - 1)


def _threshold_of_candidates(refs, row, begin, end, target, start, plan):
    """As `_threshold_of_row`. Where the candidates do not hold the threshold, the whole row is read again and again."""
    counted, own = refs["counted"], pl.program_id(1)
    slot = jnp.arange(plan.held, dtype=jnp.int32)

    def gather(i, state):
        shift, greater, around, held, greater_before, around_before = state
        greater_here, around_here, held_here = (counted[row, i, kind] for kind in (ABOVE, AROUND, HELD))
        greater_before = jnp.where(i == own, greater, greater_before)
        around_before = jnp.where(i == own, around, around_before)
        shift = jnp.where(slot >= around, i * plan.room - around, shift)
        return shift, greater + greater_here, around + around_here, held + held_here, greater_before, around_before

    zero = jnp.int32(0)
    state = jax.lax.fori_loop(0, plan.parts, gather, (jnp.zeros_like(slot), zero, zero, zero, zero, zero))
    shift, greater, around, held, greater_before, around_before = state
    candidates = plgpu.load(refs["candidates"].at[row, slot + shift], mask=slot < around, other=BARRED)
    target = jnp.minimum(target, held)
    inside = (greater < target) & (greater + around >= target) & (around <= plan.held)

    def total(of, of_candidate, known, stop):
        """The number of images before `stop` for which `of` holds; known: of those above the candidates."""

        last = jnp.where(inside, 0, jnp.minimum(end, stop))

        def add(state):
            found, at = state
            return found + _number(of(_images(refs, row, begin, last, at, plan.chunk))), at + plan.chunk

        known = jnp.where(inside, known + _number(of_candidate), 0)
        return jax.lax.while_loop(lambda state: state[1] < last, add, (known, jnp.int32(0)))[0]

    def reaching(trial):
        return total(lambda image: image >= trial, (slot < around) & (candidates >= trial), greater, plan.units)

    spanned, every = span_bracket(candidates, target - greater), target >= held
    low, high = jnp.where(every, BARRED + 1, BARRED), jnp.int32(TOP + 1)
    low, high = jnp.where(inside, spanned.low, low), jnp.where(inside, spanned.high, high)
    reached = jnp.where(inside, greater + spanned.reached, jnp.where(every, target, plan.units))
    beyond = jnp.where(inside, greater + spanned.beyond, 0)
    bracket = open_bracket(low, reached, high, beyond, target)
    found = close_bracket(reaching, bracket, target)
    limit = found.low
    before = slot < around_before
    above = total(lambda image: image > limit, before & (candidates > limit), greater_before, start)
    equal = total(lambda image: image == limit, before & (candidates == limit), 0, start)
    return target, limit, tied_units(found, target), above, equal


def _number(mask):
    return jnp.sum(mask.astype(jnp.int32))
