"""Prompts that several simulations of the rows after them share.

A prompt is read densely. So what its tokens leave to later rows, their keys, values and k_imp in every layer, depends
neither on a policy nor on a budget: one pass makes it, and a simulation runs the rows after it alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.data import as_batch
from butler_jax.model import (
    BaseConfig,
    BaseModel,
    LayerView,
    Mixer,
    by_sliding_window,
    causal_attention,
    chunk_mask,
    dense_mixer,
    masked_exponentials,
    merge_queries,
    run_layers,
    split_keys,
    split_queries,
    weighted_values,
)
from butler_jax.policies import Evicting, Policy
from butler_jax.predictors import Predictor, walk
from butler_jax.simulation.programs import compiled
from butler_jax.simulation.sharding import embed_split, split_heads, split_text, split_view


class ReadPrompts(NamedTuple):
    """What the first tokens of the sequences of a batch leave to the rows after them.

    Attributes:
        k: Keys after rotary, of all layers.
        v: Values.
        k_imp: The predictor's keys; None without a predictor.
        trunk: Keys and values of the predictor's own attention, stacked over the producers; None where it has none.
    """

    k: Float[Array, "L B T K D"]
    v: Float[Array, "L B T K D"]
    k_imp: Float[Array, "L B T Q R"] | None
    trunk: Any

    @property
    def tokens(self) -> int:
        """How many tokens of each sequence they are."""
        return self.k.shape[2]

    @property
    def bytes(self) -> int:
        """The memory that they take."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def extend(self, view: LayerView) -> LayerView:
        """A view of the rows after them, with the keys and values of all tokens."""
        k, v = (jnp.concatenate([a[view.index], b], axis=1) for a, b in ((self.k, view.k), (self.v, view.v)))
        return view._replace(k=split_heads(k), v=split_heads(v))

    def without_predictor(self) -> ReadPrompts:
        """What a policy without predictor needs of them."""
        return self._replace(k_imp=None, trunk=None)

    def check(self, policy: Policy, predictor: Predictor | None, interval: int = 1) -> None:
        """Raise ValueError where a policy that chooses at every row of an interval cannot start from them."""
        if isinstance(policy, Evicting):
            raise ValueError(f"the policy {policy.name} evicts tokens of a prompt: simulate it without `read`")
        if predictor is not None and self.k_imp is None:
            raise ValueError(f"the prompts were read without the predictor of {policy.name}; give it to read_prompts")
        if self.tokens % interval:
            raise ValueError(
                f"prompts of {self.tokens} tokens are no multiple of the interval {interval}; read a multiple, or "
                "simulate without `read`"
            )


def read_prompts(
    model: BaseModel,
    batch: dict[str, Int[Array, "B S"]],
    tokens: int,
    predictor: Predictor | None = None,
    *,
    implementation: str | None = None,
) -> ReadPrompts:
    """Read the first tokens of a batch densely. It compiles once for each shape.

    Args:
        batch: tokens, segments (0 is padding) and positions, int32 [B, S] each, of whole sequences.
        tokens: How many columns are read, static, 1 ... S - 1.
        predictor: Of the policies that will follow, where they need one.
        implementation: As in `model.causal_attention`.

    Raises:
        ValueError: `tokens` is out of range.
    """
    batch = as_batch(batch)
    if not 1 <= tokens < batch["tokens"].shape[1]:
        raise ValueError(f"prompts are 1 ... {batch['tokens'].shape[1] - 1} tokens of these sequences, got {tokens}")
    return _read(model, predictor, batch, tokens=tokens, implementation=implementation)


@partial(compiled, static_argnames=("tokens", "implementation"))
def _read(model, predictor, batch, *, tokens, implementation) -> ReadPrompts:
    lengths = jnp.max(batch["positions"], axis=1) + 1  # of whole sequences, as longrope counts them
    batch = split_text({name: array[:, :tokens] for name, array in batch.items()})
    segments, positions = batch["segments"], batch["positions"]
    x = embed_split(model, batch["tokens"])
    dense = dense_mixer(model.config, segments, implementation)
    context = walked = None
    if predictor is not None:
        context = predictor.context(positions, lengths)
        walked = walk.begin(predictor, x, context, walk.empty_cache(predictor, *positions.shape, x.dtype))

    def attend(cache, q, k, v):
        cache = jax.tree.map(lambda held, new: new.astype(held.dtype), cache, (k, v))
        return causal_attention(q, k, v, segments=segments, implementation=implementation), cache

    def mixer(walked, view):
        view, k_imp = split_view(view), None
        if predictor is not None:
            at = walk.advance(predictor, walked, view, context, attend)
            walked, k_imp = at.state, predictor.k_imp(at.head, at.features, view, context)
        return dense(None, view)[0], walked, (view.k, view.v, k_imp)

    _, walked, kept = run_layers(model, x, positions, mixer, walked, length=lengths)
    return ReadPrompts(*kept, None if walked is None else walked.cache)


def attend_last(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segments: Int[Array, "B S"],
    sliding_window: int | None = None,
    **terms: Any,
) -> Float[Array, "B T H D"]:
    """Dense attention of the last T of S tokens, all of them at once.

    terms: as in `LayerView.attention_terms`.
    """
    rows, keys = q.shape[1], k.shape[1]
    mask = chunk_mask(0, 0, keys, segments, sliding_window, rows, before=keys - rows)
    queries = split_queries(q, k.shape[2], rows)[0]
    weights, total, _ = masked_exponentials(queries, split_keys(k, 1), mask, q.shape[-1] ** -0.5, **terms)
    output = weighted_values(weights, split_keys(v, 1)) / total
    return merge_queries(output[None], rows, rows).astype(v.dtype)


def last_mixer(config: BaseConfig, segments: Int[Array, "B S"]) -> Mixer:
    """`model.dense_mixer` for views of the last T tokens, with keys and values of all."""

    def mixer(carry, view):
        def attend(sliding_window):
            return attend_last(view.q, view.k, view.v, segments, sliding_window, **view.attention_terms)

        return by_sliding_window(config, view.index, attend), carry, None

    return mixer
