"""Stored tensors become parameters on their devices, one tensor at a time; a device receives only its own part."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.model import FAMILIES, LOGICAL_AXES, BaseConfig, BaseModel
from butler_jax.parallel import memory_of
from butler_jax.weights.experts import join_experts
from butler_jax.weights.stored import StoredTensor

BLOCK_BYTES = 8 << 20  # tables are read this many bytes at a time

Shardings = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding | None]
"""(logical axes, shape) -> the sharding of a parameter; None for the default device."""

# Parameter -> its tensor's Hugging Face name. Matrices are stored [outputs, inputs].
TABLES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembedding": "lm_head.weight",
}
LAYERS = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "sinks": "self_attn.sinks",
    "attention_output_norm": "post_attention_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp_output_norm": "post_feedforward_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
    "expert_gate": "mlp.experts.gate_proj.weight",
    "expert_up": "mlp.experts.up_proj.weight",
    "expert_down": "mlp.experts.down_proj.weight",
    "expert_gate_bias": "mlp.experts.gate_proj.bias",
    "expert_up_bias": "mlp.experts.up_proj.bias",
    "expert_down_bias": "mlp.experts.down_proj.bias",
}
SANDWICHED = {"mlp_norm": "pre_feedforward_layernorm.weight"}  # the names that norms around a block change
FUSED = {  # stored one below the other
    "self_attn.qkv_proj.weight": ("q", "k", "v"),
    "mlp.gate_up_proj.weight": ("gate", "up"),
}
INPUT_AXES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "router": 1}  # leading axes: inputs
HARMLESS = ("rotary_emb.inv_freq",)  # ignored: it follows from the configuration


@dataclass(frozen=True)
class StoredRows:
    """The rows first ... first+rows-1 of the stored tensor `name`, which has `total` rows."""

    name: str
    first: int
    rows: int
    total: int


def stored_shape(parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of a parameter of one layer: [outputs, inputs] for a matrix, flat for a vector."""
    if parameter.startswith("expert_"):  # as join_experts has them
        return (shape[0], *reversed(shape[1:]))
    inputs = INPUT_AXES.get(parameter)
    if inputs:
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return shape if parameter in TABLES else (math.prod(shape),)


def locate(config: BaseConfig, parameter: str, shapes: Mapping[str, tuple[int, ...]]) -> StoredRows:
    """The rows that hold a layer's parameter; the name has no layer prefix. In fused families parameters share one."""
    rows = {name: stored_shape(name, shape[1:])[0] for name, shape in shapes.items()}
    if FAMILIES[config.family].fused:
        for name, members in FUSED.items():
            if parameter in members:
                first = sum(rows[m] for m in members[: members.index(parameter)])
                return StoredRows(name, first, rows[parameter], sum(rows[m] for m in members))
    names = {**LAYERS, **SANDWICHED} if config.norms == "sandwich" else LAYERS
    return StoredRows(names[parameter], 0, rows[parameter], rows[parameter])


def build_model(
    config: BaseConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    dtype: Any,
    shardings: Shardings | None = None,
    source: str = "the model",
) -> BaseModel:
    """Build a BaseModel from stored tensors, converted to dtype on their devices.

    The host needs memory for one layer besides the parameters that it places on its own devices.

    Args:
        tensors: By their Hugging Face names.
        shardings: (logical axes, shape) -> Sharding; None puts all parameters on the default device.

    Raises:
        ValueError: Before anything is read: a tensor is missing, unexpected or misshapen, or the model exceeds the
            memory of the devices or the machine. While reading: a value is not finite, or is not finite in dtype.
    """
    if config.tied and not _shares_table(tensors):
        config = dataclasses.replace(config, tied=False)  # as transformers does
    abstract = jax.eval_shape(partial(BaseModel, config, dtype=dtype), jax.random.key(0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    names = [parameter_name(path) for path, _ in leaves]
    shapes = {name: leaf.shape for name, (_, leaf) in zip(names, leaves, strict=True)}
    dtypes = {name: leaf.dtype for name, (_, leaf) in zip(names, leaves, strict=True)}
    stacked = {name: shape for name, shape in shapes.items() if name in LAYERS}
    places = {name: locate(config, name, stacked) for name in stacked}
    try:
        tensors = join_experts(tensors, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    check_tensors(config, tensors, shapes, places, source)
    check_memory(bytes_needed(shapes, dtype, shardings), source)
    largest = float(jnp.finfo(dtype).max)

    def read(name: str, start: int, stop: int) -> np.ndarray:
        rows = tensors[name].read(start, stop)
        if not np.isfinite(rows).all():
            raise ValueError(
                f"{source}: tensor {name} has values that are not finite, in rows {start} ... {stop - 1}: the file is "
                "damaged or its training failed; get the model again"
            )
        narrower = float(jnp.finfo(rows.dtype).max) > largest
        if narrower and (float(rows.min()) < -largest or float(rows.max()) > largest):
            raise ValueError(
                f"{source}: tensor {name} has values beyond {largest:.3g}, the largest of {jnp.dtype(dtype).name}, in "
                f"rows {start} ... {stop - 1}: load it with dtype float32"
            )
        return rows

    slots = {
        name: Slot(shape, dtypes[name], shardings(LOGICAL_AXES[name], shape) if shardings else None)
        for name, shape in shapes.items()
    }
    experts = [name for name in places if name.startswith("expert_")]
    for layer, expert in np.ndindex(config.layers, config.experts):
        for name in experts:  # one after another, since a stored tensor may hold several of them
            rows = read(layer_tensor(layer, places[name].name), expert, expert + 1)
            slots[name].write((layer, expert) + (0,) * (len(shapes[name]) - 2), np.swapaxes(rows, 1, -1)[None])
    for name, shape in shapes.items():
        if name in experts:
            continue
        if name in places:
            part = places[name]
            for layer in range(config.layers):
                rows = read(layer_tensor(layer, part.name), part.first, part.first + part.rows)
                rows = rows.T if name in INPUT_AXES else rows
                slots[name].write((layer,) + (0,) * (len(shape) - 1), rows.reshape((1, *shape[1:])))
            continue
        step = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:])))
        for first in range(0, shape[0], step):
            rows = read(TABLES[name], first, min(first + step, shape[0]))
            slots[name].write((first,) + (0,) * (len(shape) - 1), rows)
    return jax.tree_util.tree_unflatten(tree, [slot.array() for slot in slots.values()])


def _shares_table(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a tied model's output head, where it is stored too, equals the embedding. A block of rows at a time."""
    head, table = (tensors.get(TABLES[name]) for name in ("unembedding", "embedding"))
    if head is None or table is None:
        return True
    step = max(1, BLOCK_BYTES // (4 * math.prod(table.shape[1:])))
    blocks = ((first, min(first + step, table.shape[0])) for first in range(0, table.shape[0], step))
    return head.shape == table.shape and all(np.array_equal(head.read(*b), table.read(*b)) for b in blocks)


def parameter_name(path: tuple) -> str:
    """A parameter's name in LOGICAL_AXES, from its path in the module tree."""
    names = [str(getattr(p, "key", getattr(p, "name", p))) for p in path]
    return next(name for name in reversed(names) if name in LOGICAL_AXES)


def layer_tensor(layer: int, name: str) -> str:
    """The full name of a layer's tensor."""
    return f"model.layers.{layer}.{name}"


def check_tensors(config, tensors, shapes, places, source) -> None:
    """Raise ValueError unless the stored tensors are exactly those of the configuration."""
    expected = {TABLES[name]: shape for name, shape in shapes.items() if name in TABLES}
    for name, part in places.items():
        shape = (part.total, *stored_shape(name, shapes[name][1:])[1:])
        expected |= {layer_tensor(layer, part.name): shape for layer in range(config.layers)}

    def listed(found: list[str]) -> str:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        return ", ".join(found[:5]) + more

    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(
            f"{source}: missing tensor{'s'[: len(missing) > 1]} {listed(missing)}; the configuration "
            f"(family {config.family}, {config.layers} layers) needs {'it' if len(missing) == 1 else 'them'}"
        )
    harmless = (*HARMLESS, TABLES["unembedding"]) if config.tied else HARMLESS
    extra = [name for name in tensors if name not in expected and not name.endswith(harmless)]
    if extra:
        raise ValueError(
            f"{source}: unexpected tensor{'s'[: len(extra) > 1]} {listed(extra)}; a model of family {config.family} "
            f"with {config.layers} layers has no place for {'it' if len(extra) == 1 else 'them'}"
        )
    for name, shape in expected.items():
        found = tensors[name].shape
        if found != shape:
            raise ValueError(
                f"{source}: tensor {name} has shape {list(found)}, but the configuration says {list(shape)}"
            )


def bytes_needed(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any, shardings: Shardings | None
) -> dict[jax.Device, int]:
    """The bytes of parameters of these shapes on each of this process's devices. Nothing is allocated for them."""
    needed: Counter[jax.Device] = Counter()
    default = jnp.zeros(()).devices()
    for name, shape in shapes.items():
        sharding = shardings(LOGICAL_AXES[name], shape) if shardings else None
        part = sharding.shard_shape(shape) if sharding else shape
        for device in sharding.addressable_devices if sharding else default:
            needed[device] += math.prod(part) * jnp.dtype(dtype).itemsize
    return needed


def check_memory(needed: Mapping[jax.Device, int], source: str) -> None:
    """Raise ValueError where a device, or the machine for all its CPU devices, has less memory than is needed.

    A device or machine that does not report its memory passes.
    """
    on_cpu = {device: size for device, size in needed.items() if device.platform == "cpu"}
    for device, size in needed.items():
        there = None if device in on_cpu else memory_of(device)
        if there is not None and size > there:
            raise ValueError(
                f"{source} needs {size / 1e9:.1f} GB for its weights on {device}, which has {there / 1e9:.1f} GB: "
                "split it over more devices (--mesh), or take a smaller model"
            )
    there = memory_of(next(iter(on_cpu))) if on_cpu else None
    if there is not None and sum(on_cpu.values()) > there:
        each = f" ({max(on_cpu.values()) / 1e9:.1f} GB on each of {len(on_cpu)} devices)" if len(on_cpu) > 1 else ""
        raise ValueError(
            f"{source} needs {sum(on_cpu.values()) / 1e9:.1f} GB for its weights{each}, and this machine has "
            f"{there / 1e9:.1f} GB: split it over more machines (--mesh), or take a smaller model"
        )


@partial(jax.jit, donate_argnums=0)
def _update(target: jax.Array, piece: jax.Array, start: tuple) -> jax.Array:
    return jax.lax.dynamic_update_slice(target, piece.astype(target.dtype), start)


class Slot:
    """A parameter that is filled piece by piece. Every local device holds its own part of it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None):
        self.shape, self.sharding = shape, sharding
        whole = (slice(None),) * len(shape)
        indices = sharding.addressable_devices_indices_map(shape) if sharding else {None: whole}
        self.boxes = {  # device -> [(start, stop)] along every axis
            device: [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)] for device, index in indices.items()
        }
        self.shards = {
            device: jnp.zeros([stop - start for start, stop in box], dtype, device=device)
            for device, box in self.boxes.items()
        }

    def write(self, start: tuple[int, ...], piece: np.ndarray) -> None:
        """Copy `piece` to position `start`. Returns when the devices have it."""
        for device, box in self.boxes.items():
            overlap = [
                (max(a, first), min(b, first + size))
                for (a, b), first, size in zip(box, start, piece.shape, strict=True)
            ]
            if any(a >= b for a, b in overlap):
                continue
            mine = piece[tuple(slice(a - first, b - first) for (a, b), first in zip(overlap, start, strict=True))]
            at = tuple(np.int32(a - origin) for (a, _), (origin, _) in zip(overlap, box, strict=True))
            self.shards[device] = _update(self.shards[device], jax.device_put(mine, device), at)
        jax.block_until_ready(list(self.shards.values()))

    def array(self) -> jax.Array:
        """The filled parameter."""
        if self.sharding is None:
            return self.shards[None]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, list(self.shards.values()))
