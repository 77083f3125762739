"""Exact selection without sorting or scattering, for any platform that XLA compiles for.

The k-th largest entry of an image is found by counting the entries that reach a trial value. Where there are many
entries, a sample brackets it, and interpolation and bisection close the bracket. For a list, the mask of the choice is
packed into words, and slot j of the list finds the j-th bit.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.choice import BARRED, TOP, Selection, count_of, image_of, listed, pad_barred

BEYOND = np.int32(TOP + 1)  # no entry reaches it
WORD = 32  # units in a word of bits
COLUMNS = 256  # counts are first summed down this many columns, in int16 where that holds them
SAMPLE = 32  # the sample takes one entry in so many
LARGE = 4096  # number of entries from which a sample pays
GUIDED = 8  # the last trial that may interpolate; a search that goes on after it is likely held up by ties


def select_top_k(scores, lengths, n, *, counts, rules):
    """The choice of n units; arguments as in `api.py`."""
    # Without the condition XLA fuses the scores into every pass over the image and computes them again in each.
    make = partial(image_of, scores, lengths, rules)
    shape = jax.eval_shape(make)
    image = jax.lax.cond(_always(scores), make, lambda: jnp.full(shape.shape, BARRED, shape.dtype))
    count = count_of(image, scores.shape[-1], lengths, n, counts, rules)
    return listed(_set_positions(top_mask(image, count), n), count)


def _always(scores):
    """True at run time. The compiler does not know that a shifted sign is 0 or -1."""
    return jax.lax.bitcast_convert_type(scores[0, 0, 0].astype(jnp.float32), jnp.int32) >> 31 <= 0


def top_mask(image: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` largest entries of every row of an int32 image [..., U], bool [..., U]; of equal ones the earlier.

    count: int32 [...], from 0 to the number of the row's entries that are not BARRED.
    """
    units = image.shape[-1]
    image = _pad_large(image)
    limit, end = _kth_largest(image, count)
    chosen = (image > limit[..., None]) | ((image == limit[..., None]) & (_positions(image) < end[..., None]))
    return chosen[..., :units]


def compact(mask: jax.Array, n: int) -> Selection:
    """The positions of the first n entries that are set in a mask, bool [B, K, U], as a choice."""
    return listed(_set_positions(mask, n), jnp.sum(mask, axis=-1, dtype=jnp.int32))


def _pad_large(image):
    """The image [..., U], padded to whole columns where its entries are counted by columns."""
    return image if image.shape[-1] < LARGE else pad_barred(image, COLUMNS)


def _positions(array):
    """0, 1, ... along the last axis, int32 [1, ..., U]."""
    return jnp.arange(array.shape[-1], dtype=jnp.int32).reshape((1,) * (array.ndim - 1) + (-1,))


def _count_reaching(image, trial):
    """How many entries of image [..., U] are at least trial [...], in float32, which is exact up to 2**24."""
    if image.shape[-1] < LARGE:
        return jnp.sum((image >= trial[..., None]).astype(jnp.float32), axis=-1)
    rows = image.reshape(*image.shape[:-1], -1, COLUMNS) >= trial[..., None, None]
    narrow = jnp.int16 if rows.shape[-2] < 2**15 else jnp.int32
    return jnp.sum(jnp.sum(rows, axis=-2, dtype=narrow).astype(jnp.float32), axis=-1)


def _kth_largest(image, target):
    """(limit, end) [...]. The `target` largest entries are those above limit and those equal to it before end."""
    guesses = None
    if image.shape[-1] >= LARGE:
        sample = _pad_large(image[..., ::SAMPLE])
        expected = target.astype(jnp.float32) / SAMPLE
        slack = 2.5 * jnp.sqrt(expected) + 1  # standard deviations of the sampled count
        ranks = jnp.stack([jnp.maximum(expected - slack, 1), jnp.minimum(expected + slack, sample.shape[-1])])
        twice = jnp.broadcast_to(sample[None], (2, *sample.shape))
        guesses = _search(twice, ranks.astype(jnp.int32), None)[0]
    limit, reached, above = _search(image, target, guesses)
    tied = (reached > target.astype(jnp.float32)) & (target > 0)
    missing = target - above.astype(jnp.int32)
    everything = jnp.full(target.shape, image.shape[-1], jnp.int32)

    def cut():
        return jnp.where(tied, _end_of_ties(image == limit[..., None], missing), everything)

    end = jax.lax.cond(jnp.any(tied), cut, lambda: everything)
    return jnp.where(target > 0, limit, BEYOND), end


def _search(image, target, guesses):
    """(limit, reached, above): `reached` >= target entries reach the limit, `above` < target the next higher trial.

    The search stops where reached = target, or at the exact k-th value where too many entries equal it. The guesses [2,
    ...] are tried first, the larger before the smaller. Without guesses it is plain bisection.
    """
    wanted_count = target.astype(jnp.float32)

    def unfinished(low, high, reached):
        return (reached != wanted_count) & (low != high - 1) & (target > 0)

    def narrow(state):
        step, low, high, reached, above = state
        trial = (low & high) + ((low ^ high) >> 1)  # the middle, without overflow
        if guesses is not None:
            width = high.astype(jnp.float32) - low.astype(jnp.float32)
            share = (reached - wanted_count) / jnp.maximum(reached - above, 1.0)
            near = low + jnp.maximum(jnp.where(width < 2.0**30, width, 0.0) * share, 1.0).astype(jnp.int32)
            trial = jnp.where((step % 2 == 1) | (step > GUIDED) | (width >= 2.0**30), trial, near)
            trial = jnp.where(step == 0, guesses[0], jnp.where(step == 1, guesses[1], trial))
            trial = jnp.clip(trial, jnp.minimum(low, BEYOND - 2) + 1, high - 1)
        trial = jnp.where(unfinished(low, high, reached), trial, low)
        count = _count_reaching(image, trial)
        enough = count >= wanted_count
        bracket = jnp.where(enough, trial, low), jnp.where(enough, high, trial)
        return step + 1, *bracket, jnp.where(enough, count, reached), jnp.where(enough, above, count)

    bracket = jnp.full(target.shape, BARRED), jnp.full(target.shape, BEYOND)
    counts = jnp.full(target.shape, image.shape[-1], jnp.float32), jnp.zeros(target.shape, jnp.float32)
    start = (jnp.int32(0), *bracket, *counts)
    _, limit, _, reached, above = jax.lax.while_loop(lambda state: jnp.any(unfinished(*state[1:4])), narrow, start)
    return limit, reached, above


def _end_of_ties(equal, missing):
    """The position before which the first `missing` entries of equal [..., U] lie, int32 [...]; missing: at least 1."""
    units = equal.shape[-1]
    width = COLUMNS if units % COLUMNS == 0 else units
    blocks = equal.reshape(*equal.shape[:-1], units // width, width)
    counts = jnp.sum(blocks, axis=-1, dtype=jnp.int32)
    ends = jnp.cumsum(counts, axis=-1)
    block = jnp.sum(ends < missing[..., None], axis=-1, keepdims=True, dtype=jnp.int32)
    before = jnp.take_along_axis(ends - counts, block, axis=-1)
    own = jnp.take_along_axis(blocks, block[..., None], axis=-2)[..., 0, :]
    earlier = before + jnp.cumsum(own, axis=-1, dtype=jnp.int32) < missing[..., None]
    return block[..., 0] * width + jnp.sum(earlier, axis=-1, dtype=jnp.int32) + 1


def _set_positions(mask, n):
    """The positions of the set entries of mask [B, K, U] in order, int32 [B, K, n].

    A binary search over the running count of the words finds the word, and five halvings find the bit in it.
    """
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -mask.shape[-1] % WORD)))
    batch, heads, units = mask.shape
    length = units // WORD
    shifts = jnp.arange(WORD, dtype=jnp.uint32).reshape(1, 1, 1, WORD)
    words = jnp.sum(mask.reshape(batch, heads, length, WORD).astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)
    held = jax.lax.population_count(words).astype(jnp.int32)
    running = jnp.cumsum(held, axis=-1)
    start = (jnp.arange(batch * heads, dtype=jnp.int32) * length).reshape(batch, heads, 1)
    slot = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None, None], (batch, heads, n))

    def look(array, index):
        return array.reshape(-1).at[start + index].get(mode="promise_in_bounds")

    steps = max(length - 1, 1).bit_length()

    def narrow(step, word):  # how many words end at or before this slot, at most length - 1
        trial = word + (jnp.int32(1) << (steps - 1 - step))
        ends = look(running, jnp.minimum(trial, length) - 1)
        return jnp.where((trial < length) & (ends <= slot), trial, word)

    word = jax.lax.fori_loop(0, steps, narrow, jnp.zeros_like(slot))
    rank = slot - (look(running, word) - look(held, word))
    bits, position = look(words, word), word * WORD
    for half in (16, 8, 4, 2, 1):
        low = jax.lax.population_count(bits & np.uint32((1 << half) - 1)).astype(jnp.int32)
        upper = rank >= low
        rank = jnp.where(upper, rank - low, rank)
        bits = jnp.where(upper, bits >> half, bits)
        position = jnp.where(upper, position + half, position)
    return position
