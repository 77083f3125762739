"""Other forms of decode attention that the kernels are compared with."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.programs import chain

PAGE = 16  # tokens of a page of FlashInfer
WORKSPACE = 128 * 2**20  # bytes that it asks for


def peer_programs(case: Case, given: dict[str, Any], chosen: list) -> tuple[dict[str, Any], dict[str, str]]:
    """Other forms of decode attention on the same inputs, and the reasons why some of them cannot run.

    Dense forms read the whole cache. "masked" attends to the chosen tokens by a mask over all.
    """
    shape, batch = case.shape, case.batch
    lengths = given["lengths"]

    def grouped(q, k, v, mask):
        rows = q.reshape(batch, shape.kv_heads, -1, shape.dim)
        logits = jnp.einsum("bkgd,bksd->bkgs", rows, k, preferred_element_type=jnp.float32) * shape.dim**-0.5
        weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("bkgs,bksd->bkgd", weights, v, preferred_element_type=jnp.float32)

    def einsum(q, q_imp, layer):
        seen = jnp.arange(case.context)[None] < lengths[:, None]
        return grouped(q, *layer[:2], seen[:, None, None]), None

    def masked(q, q_imp, layer):
        k, v, (indices, valid) = layer
        units = -(-case.context // case.unit)
        rows = jnp.arange(batch)[:, None, None], jnp.arange(shape.kv_heads)[None, :, None]
        mask = jnp.zeros((batch, shape.kv_heads, units), bool).at[*rows, indices].max(valid)
        mask = jnp.repeat(mask, case.unit, axis=-1)[..., : case.context]
        return grouped(q, k, v, mask[:, :, None]), None

    def library(q, q_imp, layer):
        k, v = (a.swapaxes(1, 2) for a in layer[:2])
        return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=lengths)[:, 0], None

    layers = list(zip(given["k"], given["v"], chosen, strict=True))
    runs = dict(einsum=(einsum, layers), masked=(masked, layers), dot_product_attention=(library, layers))
    if jax.default_backend() == "gpu":
        swapped = [(k.swapaxes(1, 2), v.swapaxes(1, 2)) for k, v, _ in layers]
        if jnp.dtype(case.dtype).itemsize == 2:
            runs["dot_product_attention"] = (_cudnn, swapped)
        runs["pallas_decode_attention"] = (_pallas_decode, swapped)
    programs, missing = {}, {}
    for name, (attend, own) in runs.items():
        program = chain(attend), (given["q"], given["q_imp"], own)
        try:
            jax.block_until_ready(program[0](*program[1]))
            programs[name] = program
        except Exception as error:  # the run goes on without this peer, and the row gives the reason
            missing[name] = _reason(error)
    return programs, missing


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _cudnn(q, q_imp, layer):
    out = jax.nn.dot_product_attention(q[:, None], *layer, implementation="cudnn")
    return out[:, 0], None


def _pallas_decode(q, q_imp, layer):
    from jax.experimental.pallas.ops.gpu import decode_attention

    return decode_attention.gqa(q, *layer), None


def torch_seconds(case: Case, layers: int, repeats: int) -> float | str:
    """Seconds of torch's scaled_dot_product_attention for a layer of these sizes, or the reason why it cannot run."""
    try:
        import torch

        size = (case.batch, case.shape.kv_heads, case.context, case.shape.dim)
        q, caches = _torch_inputs(case, layers, size)
        attend = torch.nn.functional.scaled_dot_product_attention
        return _torch_median(lambda k, v: attend(q[:, :, None], k, v, enable_gqa=True), caches, repeats)
    except Exception as error:
        return _reason(error)


def flashinfer_seconds(case: Case, layers: int, repeats: int) -> float | str:
    """Seconds of FlashInfer's decode attention over pages of PAGE tokens, or the reason why it cannot run."""
    try:
        import flashinfer
        import torch

        shape, pages = case.shape, -(-case.context // PAGE)
        q, caches = _torch_inputs(case, layers, (case.batch * pages, shape.kv_heads, PAGE, shape.dim))
        whole = dict(dtype=torch.int32, device="cuda")
        bounds = torch.arange(case.batch + 1, **whole) * pages
        last = torch.full((case.batch,), case.context - PAGE * (pages - 1), **whole)
        room = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "HND", use_tensor_cores=True)
        indices = torch.arange(case.batch * pages, **whole)
        sizes = (shape.heads, shape.kv_heads, shape.dim, PAGE)
        wrapper.plan(bounds, indices, last, *sizes, q_data_type=q.dtype, kv_data_type=q.dtype)
        return _torch_median(lambda k, v: wrapper.run(q, (k, v)), caches, repeats)
    except Exception as error:
        return _reason(error)


def _torch_inputs(case, layers, size):
    """Queries [B, H, D], and keys and values of a size for every layer, on torch's GPU. Raises RuntimeError without."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    how = dict(dtype=getattr(torch, jnp.dtype(case.dtype).name), device="cuda")
    q = torch.randn(case.batch, case.shape.heads, case.shape.dim, **how)
    return q, [[torch.randn(size, **how) for _ in range(2)] for _ in range(layers)]


def _torch_median(attend, caches, repeats):
    """Median seconds of a layer, after one run that warms up."""
    import torch

    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for k, v in caches:
            attend(k, v)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / len(caches)
