"""Arithmetic of one decoder layer as pure functions: norms, gates and rotary embeddings."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.model.config import RopeConfig


def rms_norm(x: Float[Array, "*B E"], scale: Float[Array, " E"] | None, eps: float) -> Float[Array, "*B E"]:
    """Divide by the root mean square over the last axis (in float32), then multiply by scale.

    The product is computed in the wider dtype of x and scale and has the dtype of x. A scale of None is 1.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if scale is None:
        return y.astype(x.dtype)
    y = y.astype(jnp.promote_types(x.dtype, scale.dtype))
    return (y * jnp.expand_dims(scale, tuple(range(x.ndim - 1))).astype(y.dtype)).astype(x.dtype)


def head_norm(x: Float[Array, "*B H D"], scale: Float[Array, "N D"], eps: float) -> Float[Array, "*B H D"]:
    """RMS norm of every head by one scale [1, D], or of all heads together by a scale [H, D]."""
    if scale.shape[0] == 1:
        return rms_norm(x, scale[0], eps)
    return rms_norm(x.reshape(*x.shape[:-2], -1), scale.reshape(-1), eps).reshape(x.shape)


def layer_norm(
    x: Float[Array, "*B E"], scale: Float[Array, " E"], bias: Float[Array, " E"], eps: float = 1e-5
) -> Float[Array, "*B E"]:
    """Layer normalisation over the last axis; computed in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    scale, bias = (jnp.expand_dims(a, tuple(range(x.ndim - 1))) for a in (scale, bias))
    return (y * scale + bias).astype(x.dtype)


def gated(gate: Float[Array, "*B I"], up: Float[Array, "*B I"], activation: str = "silu") -> Float[Array, "*B I"]:
    """activation(gate) * up; `activation` as in BaseConfig."""
    if activation == "silu":
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate, approximate=activation == "gelu_tanh") * up


def soft_cap(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """cap * tanh(x / cap); x itself where cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(rope: RopeConfig, dim: int, *, context: int, length: int) -> tuple[Float[np.ndarray, " F"], float]:
    """Angular frequencies of the rotary embedding.

    Sources: Su et al. 2021 (default), linear position interpolation, Llama 3.1's smoothed scaling, YaRN (Peng et al.
    2023, sections 3.2 and 3.4), LongRoPE (Ding et al. 2024).

    Args:
        length: Tokens of the row. longrope has one set of frequencies up to the original context and another beyond.

    Returns:
        The frequencies in radians a token (F = dim/2), and the factor on cosine and sine.
    """
    frequencies = 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    factor = rope.factor
    if rope.kind == "linear":
        return frequencies / factor, 1.0
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        turns = rope.original_context / wavelengths
        span = rope.high_frequency_factor - rope.low_frequency_factor
        keep = np.clip((turns - rope.low_frequency_factor) / span, 0.0, 1.0)
        return ((1 - keep) * frequencies / factor + keep * frequencies).astype(np.float32), 1.0
    if rope.kind == "yarn":
        low, high = (
            dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (max(high - low, 0) or 0.001), 0.0, 1.0)
        attention_factor = rope.attention_factor
        if attention_factor is None:
            attention_factor = _yarn_mscale(factor, 1.0)
            if rope.mscale and rope.mscale_all_dim:
                attention_factor = _yarn_mscale(factor, rope.mscale) / _yarn_mscale(factor, rope.mscale_all_dim)
        return (frequencies / factor * ramp + frequencies * (1 - ramp)).astype(np.float32), attention_factor
    if rope.kind == "longrope":
        stretch = rope.long_factor if length > rope.original_context else rope.short_factor
        attention_factor = rope.attention_factor
        if attention_factor is None:
            grown = math.log(max(factor, 1.0)) / math.log(rope.original_context)
            attention_factor = math.sqrt(1 + grown)
        return frequencies / np.asarray(stretch, np.float32), attention_factor
    return frequencies, 1.0


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_angles(
    positions: Int[Array, "*B"], frequencies: Float[np.ndarray, " F"], factor: float = 1.0
) -> tuple[Float[Array, "*B F"], Float[Array, "*B F"]]:
    """Cosine and sine of position * frequency, each times the attention factor; float32."""
    angles = jnp.einsum("...,f->...f", positions.astype(jnp.float32), jnp.asarray(frequencies, jnp.float32))
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotary(
    x: Float[Array, "*B D"], cos: Float[Array, "*#B F"], sin: Float[Array, "*#B F"], factor: float = 1.0
) -> Float[Array, "*B D"]:
    """Rotate the first 2F of D dimensions in half layout: pair f is the dimensions f and F+f. The rest is unchanged.

    The result is multiplied by `factor`. It is computed in float32 and rounded once to the dtype of x. An axis of
    size 1 of cos and sin is broadcast.
    """
    half = cos.shape[-1]
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    a, b, rest = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    rest = rest if factor == 1 else (rest.astype(jnp.float32) * factor).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1)
