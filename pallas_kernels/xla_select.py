"""Exact selection without sorting, for any platform that XLA compiles for; fast on CPU.

The n-th best score is found on an int32 image that sorts as float32 does, by counting what reaches a trial value: a
sample brackets it, interpolation and bisection close the bracket. What was chosen becomes a bit a unit, and slot j of
the result finds the j-th bit by its rank: nothing is scattered either.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.reference import seen, wanted

BARRED = np.int32(-(2**31))  # below the image of -inf
TOP = np.int32(2**31 - 2)  # forced tokens take the images from here down, all above that of +inf
BEYOND = np.int32(2**31 - 1)  # reached by nothing
WORD = 32  # units a word of bits
COLUMNS = 256  # counts are first summed in int16 down this many columns
SAMPLE = 32  # one score in so many brackets the threshold
LARGE = 4096  # units from which a sample pays


def ordered_image(scores):
    """int32 that sorts as float32 does; -0 is 0, and NaN is -inf."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ np.int32(2**31 - 1), bits)


def token_image(scores, lengths, *, sinks, recent, first, threshold):
    """int32 [B, K, S] that sorts as the choice does: BARRED, then by score, then the sinks, then the recent."""
    batch, heads, size = scores.shape
    image = ordered_image(scores)
    if threshold is not None:
        limit = jnp.broadcast_to(threshold, (batch, heads)).astype(jnp.float32)[..., None]
        image = jnp.where(image >= ordered_image(limit), image, BARRED)
    positions = jnp.arange(size, dtype=jnp.int32)[None]
    age = lengths.astype(jnp.int32)[:, None] - 1 - positions
    forced = (age < recent) | (positions < sinks)
    rank = jnp.where(age < recent, age, recent + positions)
    image = jnp.where(forced[:, None], (TOP - rank)[:, None], image)
    return jnp.where(seen(size, lengths, first)[:, None], image, BARRED)


def unit_image(image, unit):
    """The image of units [B, K, units]: of their best tokens."""
    if unit == 1:
        return image
    return jnp.max(pad_units(image, unit).reshape(*image.shape[:2], -1, unit), axis=-1)


def pad_units(image, multiple):
    """The image with barred units appended, to a multiple of so many."""
    padding = -image.shape[-1] % multiple
    return jnp.pad(image, ((0, 0), (0, 0), (0, padding)), constant_values=BARRED) if padding else image


def select_top_k(scores, lengths, n, *, counts, sinks, recent, unit, first, threshold):
    """(indices, valid) [B, K, n]; arguments as in `api.py`."""
    batch, heads, size = scores.shape
    if n == 0 or size == 0:
        return jnp.zeros((batch, heads, n), jnp.int32), jnp.zeros((batch, heads, n), bool)

    def make_image():
        image = token_image(scores, lengths, sinks=sinks, recent=recent, first=first, threshold=threshold)
        image = unit_image(image, unit)
        return pad_units(image, COLUMNS if image.shape[-1] >= LARGE else WORD)

    # Under a condition, or XLA fuses what made the scores into every pass over the image, computing them anew in each.
    shape = jax.eval_shape(make_image)
    image = jax.lax.cond(always(scores), make_image, lambda: jnp.full(shape.shape, BARRED, shape.dtype))
    taken = jnp.minimum(candidates(image, size, lengths, unit, first, threshold), wanted(counts, n, (batch, heads)))
    limit, end = kth_largest(image, taken)
    positions = jnp.arange(image.shape[-1], dtype=jnp.int32)[None, None]
    chosen = (image > limit[..., None]) | ((image == limit[..., None]) & (positions < end[..., None]))
    valid = jnp.arange(n, dtype=jnp.int32)[None, None] < taken[..., None]
    return jnp.where(valid, ranked_bits(chosen, n), 0), valid


def always(scores):
    """True, but only when the program runs: the compiler does not see that a shifted sign is 0 or -1."""
    return jax.lax.bitcast_convert_type(scores[0, 0, 0].astype(jnp.float32), jnp.int32) >> 31 <= 0


def candidates(image, size, lengths, unit, first, threshold):
    """int32 [B, K]: the units of image [B, K, units] that may be chosen."""
    rows = image.shape[:2]
    if threshold is not None:
        return count_reaching(image, jnp.full(rows, BARRED + 1)).astype(jnp.int32)
    end = jnp.clip(lengths.astype(jnp.int32), 0, size)
    start = jnp.zeros_like(end) if first is None else jnp.clip(first.astype(jnp.int32), 0, size)
    held = jnp.where(end > start, (end - 1) // unit - start // unit + 1, 0)
    return jnp.broadcast_to(held[:, None], rows)


def count_reaching(image, trial):
    """float32 (exact to 2**24): how many entries of image [..., units] are at least trial [...]."""
    if image.shape[-1] < LARGE:
        return jnp.sum((image >= trial[..., None]).astype(jnp.float32), axis=-1)
    rows = image.reshape(*image.shape[:-1], -1, COLUMNS) >= trial[..., None, None]
    return jnp.sum(jnp.sum(rows, axis=-2, dtype=jnp.int16).astype(jnp.float32), axis=-1)


def kth_largest(image, target):
    """(limit, end) [B, K]: the `target` largest are those above limit, and those equal to it before position end."""
    guesses = None
    if image.shape[-1] >= LARGE:
        sample = image[..., ::SAMPLE]
        expected = target.astype(jnp.float32) / SAMPLE
        slack = 2.5 * jnp.sqrt(expected) + 1  # standard deviations of the sampled count
        ranks = jnp.stack([jnp.maximum(expected - slack, 1), jnp.minimum(expected + slack, sample.shape[-1])])
        twice = jnp.broadcast_to(sample[None], (2, *sample.shape))
        guesses = search(twice, ranks.astype(jnp.int32), None)[0]
    limit, reached, beyond = search(image, target, guesses)
    tied = (reached > target.astype(jnp.float32)) & (target > 0)
    missing = target - beyond.astype(jnp.int32)
    everything = jnp.full(target.shape, image.shape[-1], jnp.int32)
    end = jax.lax.cond(
        jnp.any(tied), lambda: jnp.where(tied, end_of_ties(image == limit[..., None], missing), everything),
        lambda: everything,
    )  # fmt: skip
    return limit, end


def search(image, target, guesses):
    """(limit, reached, beyond): count(image >= limit) = reached >= target; fewer, beyond, reach the next value.

    Stops where reached = target, or at the exact k-th value where entries equal to it are too many. guesses [2, ...]
    are tried first, the upper one before the lower; without them plain bisection.
    """
    wanted_count = target.astype(jnp.float32)

    def unfinished(low, high, reached):
        return (reached != wanted_count) & (low != high - 1) & (target > 0)

    def narrow(state):
        step, low, high, reached, beyond = state
        trial = (low & high) + ((low ^ high) >> 1)  # the middle, without overflow
        if guesses is not None:
            width = high.astype(jnp.float32) - low.astype(jnp.float32)
            share = (reached - wanted_count) / jnp.maximum(reached - beyond, 1.0)
            near = low + jnp.maximum(jnp.where(width < 2.0**30, width, 0.0) * share, 1.0).astype(jnp.int32)
            trial = jnp.where((step % 3 == 1) | (width >= 2.0**30), trial, near)
            trial = jnp.where(step == 0, guesses[0], jnp.where(step == 1, guesses[1], trial))
            trial = jnp.clip(trial, jnp.minimum(low, BEYOND - 2) + 1, high - 1)
        trial = jnp.where(unfinished(low, high, reached), trial, low)
        count = count_reaching(image, trial)
        enough = count >= wanted_count
        return (
            step + 1,
            jnp.where(enough, trial, low),
            jnp.where(enough, high, trial),
            jnp.where(enough, count, reached),
            jnp.where(enough, beyond, count),
        )

    shape = target.shape
    everything = jnp.full(shape, image.shape[-1], jnp.float32)
    start = (jnp.int32(0), jnp.full(shape, BARRED), jnp.full(shape, BEYOND), everything, jnp.zeros(shape, jnp.float32))
    end = jax.lax.while_loop(lambda state: jnp.any(unfinished(state[1], state[2], state[3])), narrow, start)
    return end[1], end[3], end[4]


def end_of_ties(equal, missing):
    """int32 [B, K]: the position before which the first `missing` entries of equal [B, K, units] lie."""
    units = equal.shape[-1]
    positions = jnp.arange(units, dtype=jnp.int32)[None, None]
    steps = units.bit_length()

    def narrow(step, end):
        trial = end | jnp.int32(1) << (steps - 1 - step)
        before = jnp.sum((equal & (positions < trial[..., None])).astype(jnp.float32), axis=-1)
        return jnp.where(before <= missing.astype(jnp.float32), trial, end)

    return jax.lax.fori_loop(0, steps, narrow, jnp.zeros(missing.shape, jnp.int32))


def ranked_bits(chosen, n):
    """int32 [B, K, n]: entry j is the position of the j-th set bit of chosen [B, K, units], units a multiple of 32.

    A binary search over the running count of the words finds the word, five halvings the bit in it.
    """
    batch, heads, units = chosen.shape
    length = units // WORD
    shifts = jnp.arange(WORD, dtype=jnp.uint32).reshape(1, 1, 1, WORD)
    words = jnp.sum(chosen.reshape(batch, heads, length, WORD).astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)
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
