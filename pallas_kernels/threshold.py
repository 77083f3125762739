"""The search for the threshold of a choice, by counting how many images of a row reach a trial.

A bracket closes around the threshold. An end that `count` images reach lies (count - n) / (count + n) from the wanted
number n. Counts of large scores fall about exponentially, so a trial interpolates between the values of the two ends by
these distances. An end that stays has its distance halved (the Illinois form of the false position method, M. Dowell
and P. Jarratt, BIT 11, 1971). Later trials halve the bracket, so that ties end too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.choice import BARRED, TOP, flip_negative, from_image

INFINITE = np.int32(0x7F800000)  # the image of +inf; those of sinks and recent tokens are larger
INTERPOLATED = 12  # trials that interpolate
SHIFT = 16  # bits of the smaller of two numbers that one sum counts


class Bracket(NamedTuple):
    """Where the thresholds of rows lie: arrays of one shape.

    Attributes:
        low, reached: An image that at least as many units as wanted reach, and how many do.
        high, beyond: A larger one that fewer reach, and how many do.
        above, below: The distances of the two counts from the wanted one, halved for an end that stays.
        trials: How many trials there were, and below 0 where the last of them is the upper end.
    """

    low: jax.Array
    reached: jax.Array
    high: jax.Array
    beyond: jax.Array
    above: jax.Array
    below: jax.Array
    trials: jax.Array


def open_bracket(low, reached, high, beyond, target) -> Bracket:
    """The bracket with these ends, for so many units; closed at TOP, which nothing exceeds, where no unit is wanted."""
    low, reached = jnp.where(target > 0, low, TOP), jnp.where(target > 0, reached, 0)
    distances = (_distance(count, target) for count in (reached, beyond))
    return Bracket(low, reached, high, beyond, *distances, jnp.zeros_like(low))


def span_bracket(image: jax.Array, target: jax.Array) -> Bracket:
    """The bracket of a row of images [U], U at most 32,768, for `target` of those that are not BARRED, or for all.

    It spans the images of the scores, or those of sinks and recent tokens where these alone are wanted.
    """
    both = jnp.sum((image > BARRED).astype(jnp.int32) + ((image > INFINITE).astype(jnp.int32) << SHIFT))
    every, first = both & ((1 << SHIFT) - 1), jax.lax.shift_right_logical(both, jnp.int32(SHIFT))
    target = jnp.minimum(target, every)
    least, most = spanned_images(first, target)
    low, high = _extreme(image, jnp.min, least), _extreme(image, jnp.max, most + 1) + 1
    return span_counts(low, high, first, every, target)


def _extreme(image, least_or_most, start):
    """The smallest or largest image in the order that begins at `start` and, after the last int32, at the first."""
    shift = start - BARRED
    return least_or_most(image - shift) + shift


def spanned_images(first: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest image that may be the threshold, where `first` images are of sinks or recent."""
    among_first = target <= first
    return jnp.where(among_first, INFINITE + 1, BARRED + 1), jnp.where(among_first, TOP, INFINITE)


def span_counts(low, high, first, every, target) -> Bracket:
    """The bracket from the smallest of the `spanned_images` in a row to behind the largest; every: of all in it."""
    among_first = target <= first
    reached, beyond = jnp.where(among_first, first, every), jnp.where(among_first, 0, first)
    return open_bracket(low, reached, high, beyond, target)


def close_bracket(
    count: Callable[[jax.Array], jax.Array],
    bracket: Bracket,
    target: jax.Array,
    *,
    slack: jax.Array | int = 0,
    any_row: Callable[[jax.Array], jax.Array] = jnp.any,
) -> Bracket:
    """The bracket whose lower end is the threshold: at least `target` units reach it.

    It is the first image found that at most `slack` more reach, or the largest that as many as `target` reach.

    Args:
        count: How many units of each row reach an image of each row.
        bracket: Where to begin.
        target: int [...], how many units are wanted.
        slack: How many more may reach the threshold.
        any_row: Whether any entry is true, where rows are more than one.
    """

    def is_open(bracket):
        gap = bracket.high - bracket.low  # modulo 2**32
        return (bracket.reached > target + slack) & (gap != 0) & (gap != 1)

    def narrow(bracket):
        trial = jnp.where(is_open(bracket), _trial(bracket), bracket.low) if target.ndim else _trial(bracket)
        return _narrowed(bracket, trial, count(trial), target)

    def unfinished(bracket):
        rows = is_open(bracket)
        return any_row(rows) if rows.ndim else rows

    return jax.lax.while_loop(unfinished, narrow, bracket)


def _narrowed(bracket: Bracket, trial: jax.Array, count: jax.Array, target: jax.Array) -> Bracket:
    """The bracket with a trial, which `count` units reach, in the place of one of its ends."""
    enough, distance, trials = count >= target, _distance(count, target), jnp.abs(bracket.trials) + 1
    return Bracket(
        low=jnp.where(enough, trial, bracket.low),
        reached=jnp.where(enough, count, bracket.reached),
        high=jnp.where(enough, bracket.high, trial),
        beyond=jnp.where(enough, bracket.beyond, count),
        above=jnp.where(enough, distance, bracket.above * jnp.where(bracket.trials < 0, np.float32(0.5), 1)),
        below=jnp.where(enough, bracket.below * jnp.where(bracket.trials > 0, np.float32(0.5), 1), distance),
        trials=jnp.where(enough, trials, -trials),
    )


def tied_units(bracket: Bracket, target: jax.Array) -> jax.Array:
    """How many of the units that equal the threshold are chosen, at most, after `close_bracket` without slack."""
    return jnp.where(bracket.reached > target, target - bracket.beyond, target)


def _trial(bracket):
    """An image between the two ends."""
    low, high = from_image(bracket.low), from_image(bracket.high)
    width = high - low
    guess = low + width * (bracket.above / (bracket.above - bracket.below))
    guess = flip_negative(jax.lax.bitcast_convert_type(guess, jnp.int32))
    guess = jnp.minimum(jnp.maximum(guess, bracket.low + 1), bracket.high - 1)
    middle = (bracket.low & bracket.high) + ((bracket.low ^ bracket.high) >> 1)  # their mean without overflow
    return jnp.where((jnp.abs(bracket.trials) < INTERPOLATED) & (width < np.inf), guess, middle)  # NaN is not below


def _distance(count, target):
    count, target = count.astype(jnp.float32), target.astype(jnp.float32)
    return (count - target) / (count + target)
