"""Prefill and decode steps under a policy that evicts: what a row has kept is carried from token to token.

The prompt runs under the policy too, row after row, so that decoding goes on where a simulation of the whole text would
stand; under a policy that cuts once it keeps everything, and the first step cuts. That is slower than a dense prefill:
these policies are here to be compared with. Keys and values that were dropped stay in the cache unread.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.decoding.cache import DecodeState, KVCache, empty_kv_cache, write_token
from butler_jax.decoding.cached_attention import cached_attention
from butler_jax.decoding.eviction import Eviction, evict_row, evict_rows, grown, nothing_kept
from butler_jax.model import (
    BaseModel,
    LayerView,
    by_window,
    dense_mixer,
    embed,
    layer_windows,
    logits,
    masked_softmax,
    run_layers,
)
from butler_jax.parallel import current_mesh
from butler_jax.policies import Evicting, Place
from butler_jax.predictors import at
from butler_jax.selection import Chosen, Rows, SelectionConfig, limits_of, room_for
from pallas_kernels import compact


def fill_evicting(
    model: BaseModel,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    capacity: int,
    selection: SelectionConfig,
    policy: Evicting,
    implementation: str | None = None,
) -> tuple[Float[Array, "B E"], KVCache, Eviction]:
    """Last residual stream of each row, the filled caches, and what every layer has kept.

    Rows end together: a shorter one begins later, among rows that mean nothing, and keeps nothing of them. Raises
    ValueError on a mesh of several devices.
    """
    check_devices(policy)
    config, (batch, length) = model.config, tokens.shape
    selection = policy.selection(selection)
    limits = limits_of(selection, config, capacity)
    table = jnp.arange(len(limits.table), dtype=jnp.int32) if policy.once else limits.table
    columns = jnp.arange(length, dtype=jnp.int32)[None]
    shift = (length - lengths)[:, None]
    rows = Rows(columns - shift, jnp.zeros((batch, length), jnp.int32))
    dense = dense_mixer(config, None, implementation)

    def move(x, place):
        return jnp.take_along_axis(x, jnp.clip(place, 0, length - 1)[:, :, None, None], axis=1)

    def mixer(carry, view: LayerView):
        def sparse(sliding_window):
            found = evict_rows(
                policy, move(view.q, rows.own), view.k, view.v, rows, table[None], sliding_window, selection.rule
            )
            return move(found.output, columns + shift), grown(policy, found.state, capacity)

        def everything():
            out = dense(None, view)[0].astype(view.v.dtype)
            return out, nothing_kept(policy, (batch, config.kv_heads, capacity))

        out, state = jax.lax.cond(view.index > 0, lambda: by_window(config, view.index, sparse), everything)
        return out, carry, (*(a.transpose(0, 2, 1, 3) for a in (view.k, view.v)), state)

    x = embed(model, tokens)
    positions = jnp.broadcast_to(columns, tokens.shape)
    x, _, (k, v, state) = run_layers(model, x, positions, mixer, None, length=capacity)
    kv = empty_kv_cache(config, batch, capacity, x.dtype)
    kv = KVCache(*(jax.lax.dynamic_update_slice(a, b, (0,) * 5) for a, b in ((kv.k, k), (kv.v, v))))
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0], kv, state


def evicting_step(
    model: BaseModel,
    tokens: Int[Array, " B"],
    state: DecodeState,
    selection: SelectionConfig,
    policy: Evicting,
    *,
    most: int | None = None,
    details: bool = False,
) -> tuple[Float[Array, "B V"], DecodeState, Int[Array, "L B K"], Bool[Array, "L B K S"] | None]:
    """One token a row: logits after it, the state with it, how many tokens each layer and head read, and the sets.

    Only what is kept is read of the caches, but in layer 0, which is dense. The sets are None without details. Raises
    ValueError for a state that `prefill` did not make under this policy, on a mesh, and for caches in host memory.
    """
    check_devices(policy)
    check_state(state, policy)
    config, capacity = model.config, state.kv.capacity
    cached, total = state.lengths, state.lengths + 1
    limits = limits_of(selection, config, capacity)
    room = room_for(selection, capacity, most)
    windows = layer_windows(config)
    columns = jnp.arange(capacity, dtype=jnp.int32)[None, None]
    place = Place(cached, jnp.zeros_like(cached))

    def mixer(carry, view: LayerView):
        sliding_window = None if windows is None else jnp.asarray(windows)[view.index]
        low = place.start if sliding_window is None else jnp.maximum(total - sliding_window, 0)
        mine = at(state.evicted, view.index)

        def sparse():
            def weigh(kept):
                return attention_weights(view, state.kv.k, compact(kept, room), cached, capacity)

            now, weights = evict_row(policy, mine, place, low, limits.table[total - low], selection.rule, weigh)
            chosen = compact(now.kept, room)
            values = chosen_rows(state.kv.v, view.v, view.index, chosen, cached)
            few = jnp.take_along_axis(weights, chosen.indices[:, :, None], axis=-1)
            few = jnp.where(chosen.valid[:, :, None], few, 0.0).astype(values.dtype)
            out = jnp.einsum("bkgn,bknd->bkgd", few, values, preferred_element_type=jnp.float32)
            return out.reshape(view.q.shape).astype(view.q.dtype), now, now.kept

        def dense():
            out = cached_attention(view.q, view.k, view.v, state.kv.k, state.kv.v, view.index, cached, sliding_window)
            seen = (columns >= low[:, None, None]) & (columns < total[:, None, None])
            return out, mine, jnp.broadcast_to(seen, mine.kept.shape)

        out, now, read = jax.lax.cond(view.index > 0, sparse, dense)
        count = jnp.sum(read, axis=-1, dtype=jnp.int32)
        return out, carry, (view.k[:, 0], view.v[:, 0], now, count, read if details else None)

    x = embed(model, tokens[:, None])
    x, _, (k, v, evicted, count, read) = run_layers(model, x, cached[:, None], mixer, None, length=capacity)
    kv = KVCache(*(write_token(a, b, cached) for a, b in ((state.kv.k, k), (state.kv.v, v))))
    return logits(model, x[:, 0]), DecodeState(kv, None, total, state.steps + 1, None, evicted), count, read


def attention_weights(
    view: LayerView, k: Float[Array, "L B K S D"], chosen: Chosen, cached: Int[Array, " B"], capacity: int
) -> Float[Array, "B K G S"]:
    """Attention of one token a row among the chosen tokens, at their places; 0 elsewhere."""
    batch, _, heads, dim = view.q.shape
    kv_heads = view.k.shape[2]
    keys = chosen_rows(k, view.k, view.index, chosen, cached)
    q = view.q.reshape(batch, kv_heads, heads // kv_heads, dim)
    found = jnp.einsum("bkgd,bknd->bkgn", q, keys, preferred_element_type=jnp.float32) * dim**-0.5
    weights = masked_softmax(found, chosen.valid[:, :, None])
    sequence, head = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    columns = jnp.where(chosen.valid, chosen.indices, capacity)
    spread = jnp.zeros((batch, kv_heads, capacity, heads // kv_heads), jnp.float32)
    spread = spread.at[sequence, head, columns].set(jnp.swapaxes(weights, 2, 3), mode="drop")
    return jnp.swapaxes(spread, 2, 3)


def chosen_rows(
    cache: Float[Array, "L B K S D"],
    new: Float[Array, "B 1 K D"],
    layer: Int[Array, ""],
    chosen: Chosen,
    cached: Int[Array, " B"],
) -> Float[Array, "B K N D"]:
    """Rows of the chosen tokens: of the cache, and of the new token, which it does not hold yet."""
    batch, kv_heads, _ = chosen.indices.shape
    sequence, head = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    rows = cache[layer, sequence, head, chosen.indices].astype(new.dtype)
    own = (chosen.indices == cached[:, None, None])[..., None]
    return jnp.where(own, new[:, 0, :, None], rows)


def check_devices(policy: Evicting) -> None:
    """Raise ValueError on a mesh of several devices."""
    if current_mesh() is not None:
        raise ValueError(
            f"the policy {policy.name} decodes on one device: leave the mesh, or take a policy that does not evict"
        )


def check_state(state: DecodeState, policy: Evicting) -> None:
    """Raise ValueError for a state in host memory, or of a prefill that was not under this policy."""
    if state.kv.near is not None:
        raise ValueError(f"the policy {policy.name} needs its caches on the device: leave out offload")
    fits = state.evicted is not None
    if fits:
        wanted = jax.eval_shape(lambda: policy.begin(state.evicted.kept.shape[1:]))
        found = state.evicted.memory
        fits = jax.tree.structure(wanted) == jax.tree.structure(found) and all(
            a.shape == b.shape[1:] for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
        )
    if not fits:
        raise ValueError(
            f"the state was not prefilled under the policy {policy.name}, which has to know what was kept; give "
            "prefill the same selection and policy"
        )
