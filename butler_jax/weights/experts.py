"""The forms that files have for the weights of experts, as one tensor [experts, outputs, inputs] a layer and matrix.

The forms are one tensor an expert (mixtral, qwen3_moe), one tensor of all experts with gate and up fused (as
transformers holds them), gpt-oss' transposed tensors with gate and up interleaved, and gpt-oss' MXFP4 blocks. Values
are read one expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from butler_jax.model import BaseConfig
from butler_jax.weights.stored import StoredTensor

ROUTERS = ("block_sparse_moe.gate", "mlp.gate", "mlp.router")
PREFIXES = ("block_sparse_moe.experts", "mlp.experts")
NAMES = {"gate": ("w1", "gate_proj"), "up": ("w3", "up_proj"), "down": ("w2", "down_proj")}
E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP4 = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)  # the two numbers of every byte


def join_experts(tensors: Mapping[str, StoredTensor], config: BaseConfig) -> Mapping[str, StoredTensor]:
    """Give the tensors of experts and routers the names and the form that build_model places.

    Raises:
        ValueError: Some experts of a matrix are there and others are not, or their shapes differ; the tensor is named.
    """
    if not config.experts:
        return tensors
    tensors = dict(tensors)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        for router in ROUTERS:
            for suffix in ("weight", "bias"):
                if found := tensors.pop(f"{prefix}{router}.{suffix}", None):
                    tensors[f"{prefix}mlp.router.{suffix}"] = found
        for stem in (prefix + name for name in PREFIXES):
            _join_single(tensors, stem, f"{prefix}mlp.experts", config.experts)
        _split_fused(tensors, f"{prefix}mlp.experts", interleaved=config.swiglu_limit is not None)
    return tensors


def _join_single(tensors: dict[str, StoredTensor], stem: str, target: str, experts: int) -> None:
    """Join tensors of one expert each."""
    for part, names in NAMES.items():
        for name in names:
            each = [f"{stem}.{expert}.{name}.weight" for expert in range(experts)]
            if not any(one in tensors for one in each):
                continue
            missing = [one for one in each if one not in tensors]
            if missing:
                raise ValueError(f"missing tensor {missing[0]}, while other experts of the layer are there")
            parts = [tensors.pop(one) for one in each]
            odd = [one for one, tensor in zip(each, parts, strict=True) if tensor.shape != parts[0].shape]
            if odd:
                raise ValueError(f"tensor {odd[0]} differs in shape from {each[0]}")
            tensors[f"{target}.{part}_proj.weight"] = StoredTensor((experts, *parts[0].shape), partial(_stack, parts))


def _stack(parts: list[StoredTensor], start: int, stop: int) -> np.ndarray:
    return np.stack([part.read(0, part.shape[0]) for part in parts[start:stop]])


def _split_fused(tensors: dict[str, StoredTensor], stem: str, *, interleaved: bool) -> None:
    """Take gate and up apart, and transpose where inputs come first. interleaved: the form of gpt-oss."""
    for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        packed = [tensors.get(f"{stem}.{name}_{suffix}") for suffix in ("blocks", "scales")]
        stored = {"weight": [tensors.get(f"{stem}.{name}")], "bias": [tensors.get(f"{stem}.{name}_bias")]}
        if None not in packed:
            check_blocks(f"{stem}.{name}_blocks", *(tensor.shape for tensor in packed))
            stored["weight"] = packed
        for suffix, found in stored.items():
            if None in found or len(found[0].shape) < 2:
                continue
            experts, rows, *inputs = found[0].shape
            whole = _Fused(found, len(parts))
            if found is packed:
                inputs = [32 * inputs[0]]
            elif interleaved and suffix == "weight":
                rows, inputs = inputs[-1], [rows]
            for at, part in enumerate(parts):
                size = rows // len(parts)
                mine = slice(at, None, len(parts)) if interleaved else slice(at * size, (at + 1) * size)
                read = partial(_read_part, whole.read, mine, interleaved and suffix == "weight" and found is not packed)
                tensors[f"{stem}.{part}_proj.{suffix}"] = StoredTensor((experts, size, *inputs), read)
        for suffix in ("", "_bias", *(("_blocks", "_scales") if None not in packed else ())):
            tensors.pop(f"{stem}.{name}{suffix}", None)


class _Fused:
    """Tensors that hold one or several matrices. What one matrix reads is kept until all have read it."""

    def __init__(self, tensors: list[StoredTensor], parts: int):
        self.tensors, self.parts = tensors, parts
        self.place, self.left, self.kept = (0, 0), 0, []

    def read(self, start: int, stop: int) -> list[np.ndarray]:
        """These experts of every tensor."""
        if self.left == 0 or self.place != (start, stop):
            self.kept = [tensor.read(start, stop) for tensor in self.tensors]
            self.place, self.left = (start, stop), self.parts
        found, self.left = self.kept, self.left - 1
        if self.left == 0:
            self.kept = []
        return found


def _read_part(read: Callable, rows: slice, transposed: bool, start: int, stop: int) -> np.ndarray:
    """These rows of experts start ... stop-1; of a tensor, or of MXFP4 blocks and their scales."""
    found = read(start, stop)
    if len(found) == 2:
        return unpack(*(array[:, rows] for array in found))
    return (found[0].swapaxes(1, 2) if transposed else found[0])[:, rows]


def check_blocks(name: str, blocks: tuple[int, ...], scales: tuple[int, ...]) -> None:
    """Raise ValueError unless MXFP4 blocks and their scales fit each other."""
    if len(blocks) != 4 or blocks[3] != 16 or blocks[:3] != scales:
        raise ValueError(
            f"tensor {name} of shape {list(blocks)} with scales of shape {list(scales)} is not MXFP4: blocks have the "
            "shape [experts, outputs, inputs / 32, 16], and scales lack the last axis"
        )


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 to float32: a byte holds two numbers, the low half first, and 32 numbers share a power of two.

    Source: OCP Microscaling Formats (MX) 1.0, sections 5.3 and 6.3.

    Args:
        blocks: [experts, outputs, inputs / 32, 16].
        scales: [experts, outputs, inputs / 32], exponents with a bias of 127.
    """
    numbers = FP4[blocks].reshape(*scales.shape, 32)
    numbers *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    return numbers.reshape(*scales.shape[:2], -1)
