"""Checks of arguments. They raise ValueError, which says what was given, what is wrong and what to do.

The implementations do not check again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")
POOLINGS = ("normalised", "maximum")
WORD = 4  # bytes in which a TPU packs rows of narrow numbers: a copy has whole words


def current_device() -> Any:
    """The device that a call traced now will run on, or its platform: of the mesh, or of jax_default_device, or None.

    A mesh may describe devices that are absent (jax.experimental.topologies). Kernels are then compiled for those.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.config.jax_default_device if device is None else device


def current_platform() -> str:
    """The platform of `current_device`, or the default one."""
    device = current_device()
    device = jax.default_backend() if device is None else device
    platform = device if isinstance(device, str) else device.platform
    return "gpu" if platform in ("gpu", "cuda", "rocm") else platform


def check_implementation(implementation: str | None) -> None:
    """Raise ValueError for a name that is neither None nor one of IMPLEMENTATIONS."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"unknown implementation {implementation!r}; use None or one of {', '.join(IMPLEMENTATIONS)}")


def choose_implementation(implementation: str | None, interpret: Any, *, tpu_can: bool = True) -> str:
    """The implementation to run; None takes the platform's kernel where the arguments suit it, and "xla" otherwise.

    Raises:
        ValueError: The name is unknown, the kernel is another platform's, or jax_enable_x64 is set for a kernel.
    """
    check_implementation(implementation)
    platform = current_platform()
    if interpret and implementation not in ("tpu", "gpu"):
        raise ValueError(f'interpret={interpret!r} is for the kernels "tpu" and "gpu"; got {implementation!r}')
    if implementation is None:
        suits = platform == "gpu" or (platform == "tpu" and tpu_can)
        implementation = platform if suits else "xla"
    elif implementation in ("tpu", "gpu") and interpret is None and platform != implementation:
        raise ValueError(
            f'implementation "{implementation}" needs a {implementation.upper()}, the platform is {platform}; '
            'use "xla", or interpret=True to try the kernel slowly here'
        )
    if implementation in ("tpu", "gpu") and jax.config.jax_enable_x64:
        raise ValueError(
            "the kernels count in 32 bits: leave jax_enable_x64 off, call them under jax.enable_x64(False), or use "
            'implementation="xla"'
        )
    return implementation


def choose_for_scores(implementation: str | None, interpret: Any, q_imp: Any, k_imp: Any) -> str:
    """The implementation that scores arrays like these.

    Raises ValueError as `choose_implementation` and `check_tpu_loads` do.
    """
    name = choose_implementation(implementation, interpret, tpu_can=tpu_loads(q_imp, k_imp))
    if name == "tpu":
        check_tpu_loads(q_imp, k_imp)
    return name


def choose_capped(implementation: str | None, softcap: float) -> str:
    """The implementation of attention with a soft cap: that given, or "xla".

    Raises:
        ValueError: The cap is not above 0, or the implementation is a kernel, which has none.
    """
    check_number("softcap", softcap)
    if not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}; None leaves the logits as they are")
    if implementation in ("tpu", "gpu"):
        raise ValueError(
            f'implementation "{implementation}" has no soft cap of logits, and softcap is {softcap}; use "xla" or None'
        )
    return implementation or "xla"


def check_number(name: str, value: Any) -> None:
    """Raise ValueError unless a value is one finite number that is known when the call is traced."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a number that is known when the call is traced, got {value}")
    one = np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.number)
    if not one or not np.isfinite(float(value)):
        raise ValueError(f"{name} must be one finite number, got {value!r}")


def check_unit(unit: int) -> None:
    """Raise ValueError unless the unit is a power of two."""
    whole = isinstance(unit, (int, np.integer)) and not isinstance(unit, bool)
    if not whole or unit < 1 or unit & (unit - 1):
        raise ValueError(f"unit must be a power of two (1, 2, 4, 8, 16, ...), got {unit!r}")


def tpu_loads(*arrays: Any) -> bool:
    """Whether the TPU kernels can load arrays like these. Mosaic has no float16."""
    return all(array.dtype != jnp.float16 for array in arrays)


def tpu_can(unit: int, k: Any) -> bool:
    """Whether the TPU kernels support this unit in caches like k: whole units, each of whole words."""
    return tpu_loads(k) and unit * k.dtype.itemsize >= WORD and k.shape[-2] % unit == 0


def check_tpu_loads(*arrays: Any) -> None:
    """Raise ValueError unless `tpu_loads`."""
    if not tpu_loads(*arrays):
        raise ValueError('the "tpu" kernels have no float16: give bfloat16 or float32, or use implementation="xla"')


def check_tpu_unit(unit: int, k: Any) -> None:
    """Raise ValueError unless `tpu_can`."""
    check_tpu_loads(k)
    size, least = k.shape[-2], WORD // k.dtype.itemsize
    if unit < least:
        raise ValueError(
            f'the "tpu" kernels read units of {least} tokens or more of {k.dtype.name}, got unit={unit}; choose units '
            f'with unit={least}, or use implementation="xla"'
        )
    if size % unit != 0:
        raise ValueError(
            f'the "tpu" kernels need a cache of whole units: {size} tokens are not a multiple of unit={unit}; raise '
            f'the capacity to {-(-size // unit) * unit}, or use implementation="xla"'
        )


def check_vector(
    name: str, value: Any, shapes: tuple[tuple[int, ...], ...], kinds: str = "iu", *, required: bool = False
) -> None:
    """Raise ValueError unless an array has one of the shapes and holds integers ("iu") or numbers ("f").

    None is allowed, unless the array is required.
    """
    if value is None and not required:
        return
    given = None if value is None else jnp.shape(value)
    wanted = " or ".join(map(str, shapes))
    if given not in shapes:
        raise ValueError(f"{name} must have shape {wanted}, got {given}")
    dtype = jnp.result_type(value)
    integer = jnp.issubdtype(dtype, jnp.integer)
    fits = integer if kinds == "iu" else (integer or jnp.issubdtype(dtype, jnp.floating))
    if not fits:
        raise ValueError(f"{name} must be {'integers' if kinds == 'iu' else 'numbers'}, got {dtype}")


def check_spans(spans, k, layer) -> None:
    """Raise ValueError unless the spans are of a cache k, or None."""
    if spans is None:
        return
    for name, array in zip(("k", "v", "counts"), spans, strict=True):
        if array is None or array.ndim == 0:
            raise ValueError(f"spans.{name} must be an array, got {array}")
    lead, dim, count = k.shape[:-2], k.shape[-1], spans.counts.shape[-1]
    for name, array in (("k", spans.k), ("v", spans.v)):
        wanted = (*lead, count, dim)
        if array.shape != wanted or array.dtype != k.dtype:
            raise ValueError(
                f"spans.{name} must be {k.dtype} {wanted}, as k and the counts, got {array.dtype} {array.shape}"
            )
    check_vector("spans.counts", spans.counts, ((*lead[layer is not None :], count),))


def check_layer(name: str, array: Any, layer: Any, dims: str, several: bool = False) -> tuple[int, ...]:
    """The shape of one layer of a cache [dims], or [L, dims] where a layer is given; dims: letters separated by spaces.

    Raises:
        ValueError: The number of axes of the argument `name` is wrong, or a layer is outside the cache, or there are
            several where one is wanted.
    """
    rank = len(dims.split()) + (layer is not None)
    letters = dims if layer is None else f"L {dims}"
    remedy = "drop layer=" if layer is not None else "pass layer= for a cache stacked over layers"
    if array.ndim != rank:
        raise ValueError(f"{name} must be [{letters.replace(' ', ', ')}], got shape {array.shape}; {remedy}")
    if layer is not None:
        if np.ndim(layer) > several or np.size(layer) == 0:
            wanted = "one index, or a vector of them" if several else "one index"
            raise ValueError(f"layer must be {wanted}, got shape {np.shape(layer)}")
        known = None if isinstance(layer, jax.Array) else np.asarray(layer)  # else it may be on the device, or traced
        if (layer if known is None else known).dtype.kind not in "iu":
            raise ValueError(f"layer must be a whole number, got {layer!r}")
        for number in () if known is None else np.ravel(known):
            if number < 0 or number >= array.shape[0]:
                raise ValueError(f"layer {number} is outside the cache's {array.shape[0]} layers")
    return tuple(array.shape[layer is not None :])


def check_some(batch: int, heads: int) -> None:
    """Raise ValueError unless there is at least one row and one head."""
    if batch < 1 or heads < 1:
        raise ValueError(f"there must be at least one row and one KV head, got B = {batch}, K = {heads}")


def check_importance(q_imp, k_imp, lengths, first, pooling, scales, layer) -> None:
    """Raise ValueError unless these fit `importance_scores`."""
    if q_imp.ndim != 4:
        raise ValueError(f"q_imp must be [B, K, G, R], got shape {q_imp.shape}")
    batch, heads, group, rank = q_imp.shape
    check_some(batch, heads)
    shape = check_layer("k_imp", k_imp, layer, "B K R S", several=True)
    layers = np.size(layer)
    if layers > 1 and batch != shape[0] * layers:
        raise ValueError(f"q_imp has {batch} rows; {layers} layers of {shape[0]} rows need {shape[0] * layers}")
    shape = shape[0] * layers, *shape[1:]
    if not (shape[0] == batch and shape[2] == rank and shape[1] in (heads, heads * group)):
        raise ValueError(f"k_imp {shape} must be [B, K, R, S] or [B, K*G, R, S] for q_imp [B, K, G, R] = {q_imp.shape}")
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}; use one of {', '.join(POOLINGS)}")
    if not is_floating(q_imp):
        raise ValueError(f"q_imp must be floating point of 16 bits or more, got {q_imp.dtype}")
    check_vector("lengths", lengths, ((batch,),), required=True)
    check_vector("first", first, ((batch,),))
    quantised = k_imp.dtype == jnp.int8
    if quantised != (scales is not None):
        raise ValueError(
            "int8 k_imp needs its scales, and other dtypes take none; quantise_k_imp gives both "
            f"(k_imp is {k_imp.dtype}, scales are {'given' if scales is not None else 'missing'})"
        )
    if not quantised and not is_floating(k_imp):
        raise ValueError(f"k_imp must be floating point of 16 bits or more, or int8, got {k_imp.dtype}")
    check_vector("scales", scales, ((shape[1],), shape[:2]), "f")


def is_floating(array) -> bool:
    """Whether an array is floating point of 16 bits or more: weights are rounded to the precision of values."""
    return jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits >= 16


def check_caches(k, q_imp, k_imp, layer) -> None:
    """Raise ValueError unless k and k_imp are those of one cache."""
    if k.ndim < 3 or k.shape[-2] != k_imp.shape[-1]:
        raise ValueError(f"k {k.shape} and k_imp {k_imp.shape} must have room for the same number of tokens S")
    if layer is not None and k.shape[0] != k_imp.shape[0]:
        raise ValueError(f"k has {k.shape[0]} layers and k_imp {k_imp.shape[0]}; a cache has them for the same layers")
    if k.ndim > 3 and q_imp.shape[0] != k.shape[-4]:
        raise ValueError(f"q_imp has {q_imp.shape[0]} rows and k {k.shape[-4]}; both are [B, ...]")
    if q_imp.shape[1] != k.shape[-3]:
        raise ValueError(f"q_imp {q_imp.shape} and k {k.shape} differ in KV heads K")


def check_selection(scores, lengths, n, counts, sinks, recent, unit, first, threshold) -> None:
    """Raise ValueError unless these fit `select_top_k`."""
    if scores.ndim != 3:
        raise ValueError(f"scores must be [B, K, S], got shape {scores.shape}")
    batch, heads, size = scores.shape
    check_some(batch, heads)
    check_counts(n, size, unit, sinks, recent)
    check_vector("lengths", lengths, ((batch,),), required=True)
    check_vector("counts", counts, ((batch,), (batch, heads)))
    check_vector("first", first, ((batch,),))
    check_vector("threshold", threshold, ((heads,), (batch, heads)), "f")


def check_counts(n, size, unit, sinks, recent) -> None:
    """Raise ValueError unless n, sinks and recent fit a cache of `size` tokens."""
    check_unit(unit)
    units = -(-size // unit)
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise ValueError(f"n, the width of the list, must be a static integer, got {n!r}; what varies goes into counts")
    what = "tokens" if unit == 1 else f"units of {unit} tokens"
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    if n > units:
        raise ValueError(f"n = {n} is more than the cache's {units} {what}; lower the budget to {units} or less")
    for name, value in (("sinks", sinks), ("recent", recent)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < 0:
            raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}")
        if value >= 2**30:
            raise ValueError(f"{name} must be below 2**30, got {value!r}")


def check_attention(q, k, v, indices, valid, unit, new_k, new_v, lengths, first, layer) -> None:
    """Raise ValueError unless these fit `masked_topk_decode_attention`."""
    if q.ndim != 3:
        raise ValueError(f"q must be [B, H, D], got shape {q.shape}")
    batch, heads, dim = q.shape
    shape = check_layer("k", k, layer, "B K S D")
    check_some(*shape[:2])
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not is_floating(array):
            raise ValueError(f"{name} must be floating point of 16 bits or more, got {array.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k {k.shape} and v {v.shape} must have one shape")
    if k.dtype != v.dtype:
        raise ValueError(f"k in {k.dtype} and v in {v.dtype} must have one dtype")
    if shape[0] != batch:
        raise ValueError(f"k holds {shape[0]} rows and q {batch}; both are [B, ...]")
    if shape[3] != dim:
        raise ValueError(f"k has head dimension {shape[3]} and q {dim}; they must be equal")
    if heads % shape[1] != 0:
        raise ValueError(f"{heads} query heads cannot share {shape[1]} KV heads; use a multiple")
    check_unit(unit)
    if indices.ndim != 3 or indices.shape[:2] != shape[:2]:
        raise ValueError(f"indices must be [B, K, n] with B, K = {shape[:2]}, got shape {indices.shape}")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices must be integers, got {indices.dtype}")
    units = -(-shape[2] // unit)
    if indices.shape[2] > units:
        raise ValueError(
            f"n = {indices.shape[2]} indices are more than the cache's {units} units of {unit} tokens; lower the budget"
        )
    if valid is not None:
        if valid.shape != indices.shape:
            raise ValueError(f"valid {valid.shape} must have the shape of indices {indices.shape}")
        if valid.dtype != jnp.bool_:
            raise ValueError(f"valid must be booleans, got {valid.dtype}")
    if (new_k is None) != (new_v is None):
        raise ValueError("new_k and new_v, the current token, come together or not at all")
    for name, new in (("new_k", new_k), ("new_v", new_v)):
        if new is not None:
            wanted = (batch, shape[1], dim)
            if new.shape != wanted:
                raise ValueError(f"{name} must be [B, K, D] = {wanted}, got {new.shape}")
    if unit != 1 and lengths is None:
        raise ValueError(
            f"units of {unit} tokens need lengths, to leave out what lies beyond a row's end; pass lengths=[B]"
        )
    check_vector("lengths", lengths, ((batch,),))
    check_vector("first", first, ((batch,),))
