"""Splash attention, the TPU kernel of `jax.experimental.pallas`, with its log-sum-exp and its derivative at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from butler_jax.parallel import mesh


def splash_attention(q, k, v, segments, key_segments, sink_logits, *, sliding_window, return_lse, softcap):
    """Splash attention of one device: q [B, H, T, D], k and v [B, K, T, D], T and D multiples of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, length = q.shape[1:3]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    shape = (length, length)
    mask = splash.CausalMask(shape) if sliding_window is None else splash.LocalMask(shape, (sliding_window - 1, 0), 0)
    make = functools.partial(
        splash.make_splash_mha_single_device,
        splash.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        interpret=mesh.platform() == "cpu",
    )

    def each(kernel, q, k, v, own, other, sinks):
        sinks = () if sinks is None else (sinks.astype(jnp.float32),)
        run = jax.vmap(lambda q, k, v, own, other: kernel(q, k, v, splash.SegmentIds(own, other), *sinks))
        return run(q, k, v, own, other)

    if not return_lse:
        return each(make(), q, k, v, segments, key_segments, sink_logits), jnp.zeros(q.shape[:3], jnp.float32)

    @jax.custom_vjp
    def attend_with_lse(q, k, v, own, other, sinks):
        out, (lse,) = each(make(save_residuals=True), q, k, v, own, other, sinks)
        return out, lse

    def forward(q, k, v, own, other, sinks):
        # The kernel that returns its log-sum-exp has no derivative. The one with a derivative keeps the log-sum-exp
        # among its residuals, as the only float32 [B, H, T]. Where a version keeps others too, both kernels run.
        out, pull = jax.vjp(lambda q, k, v, sinks: each(make(), q, k, v, own, other, sinks), q, k, v, sinks)
        kept = [x for x in jax.tree.leaves(pull) if x.shape == q.shape[:3] and x.dtype == jnp.float32]
        return (out, kept[0] if len(kept) == 1 else attend_with_lse(q, k, v, own, other, sinks)[1]), pull

    def backward(pull, cotangents):
        *of_arrays, of_sinks = pull(cotangents[0])
        return *of_arrays, None, None, of_sinks

    attend_with_lse.defvjp(forward, backward)
    return attend_with_lse(q, k, v, segments, key_segments, sink_logits)
