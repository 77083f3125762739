"""Meshes and sharding rules: the only file that names mesh axes.

Three axes: `data` splits the batch and, FSDP-like, the width of every weight and norm and what a predictor's
projections sum over (inputs); `model` splits heads, hidden units and the vocabulary (tensor parallel); `sequence`
splits the tokens of decoding's caches, and weights as `model` does. A dimension that an axis does not divide stays
whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = DATA, MODEL, SEQUENCE = ("data", "model", "sequence")

RULES: dict[str, tuple[str, ...]] = {
    "batch": (DATA,),
    "width": (DATA,),
    "norm": (DATA,),
    "inputs": (DATA,),
    "heads": (MODEL, SEQUENCE),
    "kv_heads": (MODEL, SEQUENCE),
    "kv_inputs": (MODEL, SEQUENCE, DATA),
    "hidden": (MODEL, SEQUENCE),
    "vocab": (MODEL, SEQUENCE),
    "cached_heads": (MODEL,),
    "tokens": (SEQUENCE,),
}
"""The axes that split a dimension, as many of them as divide it one after the other."""


def parse_mesh(text: str) -> dict[str, int]:
    """'data=4,model=2' -> {'data': 4, 'model': 2}; axes left out are 1. Raises ValueError naming what is wrong."""
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(\w+)=(\d{1,9})", part)
        if not match:
            raise ValueError(f"mesh {text!r}: {part!r} is not of the form axis=size, as in data=4,model=2")
        axis, size = match.group(1), int(match.group(2))
        if axis not in AXES:
            raise ValueError(f"mesh {text!r}: unknown axis {axis!r}; axes are {', '.join(AXES)}")
        if not size > 0:
            raise ValueError(f"mesh {text!r}: {axis} must be at least 1")
        sizes[axis] = size
    return sizes


def make_mesh(text: str = "", *, batch_size: int | None = None) -> Mesh:
    """The mesh that `text` describes, over the first devices.

    '' puts on the data axis as many devices as divide the batch (all of them where several hosts work together).
    batch_size: of training, None for decoding. Raises ValueError where the mesh needs more devices than there are, does
    not divide the batch, has a sequence axis to train on, or leaves devices of several hosts idle.
    """
    devices = jax.devices()
    count = len(devices)
    if not text and batch_size and jax.process_count() == 1:
        count = next(n for n in range(count, 0, -1) if batch_size % n == 0)
    sizes = parse_mesh(text or f"data={count}")
    needed = math.prod(sizes.values())
    if not needed <= len(devices):
        raise ValueError(
            f"mesh {text!r} needs {needed} devices, but this machine has {len(devices)} "
            f"({devices[0].platform}); choose sizes whose product is at most {len(devices)}"
        )
    if batch_size and sizes[SEQUENCE] != 1:
        raise ValueError(
            f"mesh {text!r}: the sequence axis splits the caches of decoding; training takes data and model"
        )
    if needed != len(devices) and jax.process_count() != 1:
        raise ValueError(
            f"mesh {text!r} takes {needed} of the {len(devices)} devices of {jax.process_count()} processes, and each "
            f"process has to hold a part; choose sizes whose product is {len(devices)}"
        )
    mesh = arrange(sizes, devices[:needed])
    if batch_size:
        check_batch(batch_size, mesh)
    return mesh


def arrange(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """The mesh of these axis sizes over devices, neighbours on the chips' torus near each other on an axis.

    An axis may take a part of a side of the torus, so that every factorisation of a slice is a mesh.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(logical: tuple[str, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    An axis splits the first dimension that asks for it and that it divides; everything else is left whole.
    """
    free, chosen = set(mesh.shape), []
    for name, size in zip(logical, shape, strict=True):
        axes = _splitting([axis for axis in RULES.get(name, ()) if axis in free], size, mesh)
        free -= set(axes)
        chosen.append(_entry(axes))
    return PartitionSpec(*chosen)


def _splitting(axes: Sequence[str], size: int, mesh: Any) -> tuple[str, ...]:
    """Those of the axes that split a dimension together: each divides what the ones before it have left."""
    found: list[str] = []
    for axis in axes:
        parts = mesh.shape.get(axis, 1)
        if parts > 1 and size % parts == 0:
            found, size = [*found, axis], size // parts
    return tuple(found)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Axes as a PartitionSpec has them."""
    return axes if len(axes) > 1 else (axes or (None,))[0]


def shardings_for(mesh: Mesh):
    """(logical axes, shape) -> NamedSharding on this mesh; what load_base's `shardings` takes."""
    return lambda logical, shape: NamedSharding(mesh, partition(logical, shape, mesh))


def module_shardings(module: Any, logical_axes: dict[str, tuple[str, ...]], mesh: Mesh) -> Any:
    """A pytree of NamedShardings in the shape of `module`; see module_partition."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), module_partition(module, logical_axes, mesh))


def module_partition(module: Any, logical_axes: dict[str, tuple[str, ...]], mesh: Any) -> Any:
    """A pytree of PartitionSpecs in the shape of `module`.

    An axes table is keyed by parameter name, or by its dotted path where two of one name differ. What holds copies of
    the parameters under their names (an optimiser's state) is split as they are; numbers without axes are whole.
    """

    def one(path, leaf):
        names = [str(getattr(p, "key", getattr(p, "name", p))) for p in path]
        names = [n for n in names if n != "value"]
        logical = logical_axes.get(".".join(names[-2:])) or logical_axes[names[-1]] if leaf.ndim else ()
        return partition(logical, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(one, module)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches [B, T] split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_batch(batch_size: int, mesh: Mesh, *, what: str = "batch size") -> None:
    """Raise ValueError where the mesh does not divide the batch; what: how the error calls the batch's size."""
    size = mesh.shape[DATA]
    if batch_size % size != 0:
        raise ValueError(
            f"{what} {batch_size} is not divisible by the mesh's data axis ({size}); "
            f"use a multiple of {size} or another --mesh"
        )


def rows_here(batch_size: int, mesh: Mesh, process: int | None = None) -> list[int]:
    """Which rows of a batch the devices of a process hold, in order; default: this one. Several may hold the same."""
    process = jax.process_index() if process is None else process
    parts = {at[AXES.index(DATA)] for at, device in np.ndenumerate(mesh.devices) if device.process_index == process}
    here = batch_size // mesh.shape[DATA]
    return [row for part in sorted(parts) for row in range(part * here, part * here + here)]


def own_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """Of a batch that every process has whole, the rows that place_batch takes from this one."""
    return {name: rows[rows_here(len(rows), mesh)] for name, rows in batch.items()}


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch (see rows_here) as global arrays over the mesh."""
    sharding, parts = batch_sharding(mesh), mesh.shape[DATA]

    def placed(rows):
        shape = (len(rows) // len(rows_here(parts, mesh)) * parts, *rows.shape[1:])
        place = {row: at for at, row in enumerate(rows_here(shape[0], mesh))}

        def shard(index):
            first, end, _ = index[0].indices(shape[0])
            return rows[place[first] : place[first] + end - first]

        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: placed(rows) for name, rows in batch.items()}


def place(module: nnx.Module, logical_axes: dict[str, tuple[str, ...]], mesh: Mesh) -> nnx.Module:
    """Move a module's parameters to their shardings."""
    return jax.device_put(module, module_shardings(module, logical_axes, mesh))


def any_process(flag: bool, mesh: Mesh, after: jax.Array) -> jax.Array:
    """Whether any process says so: the same in all of them, and known some time after `after` is, without waiting.

    One byte a device is reduced; after `after`, so that no two reductions over devices are under way at once.
    """
    flags = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, PartitionSpec(AXES)), lambda _: np.full(1, flag)
    )
    return _any(flags, after)


@partial(jax.jit, keep_unused=True)
def _any(flags: jax.Array, after: jax.Array) -> jax.Array:
    return flags.any()


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by jax.set_mesh, None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def token_axis(tokens: int) -> str | None:
    """The axis of the current mesh that splits a cache of so many tokens a row; None where none does."""
    mesh = current_mesh()
    return _entry(_splitting(RULES["tokens"], tokens, mesh)) if mesh is not None else None


def platform() -> str:
    """Where a call traced now will run: on the devices of the mesh that is set, else on the default ones.

    Devices that are only described (jax.experimental.topologies) count, so that a program compiles for chips that are
    not here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def by_rows_and_heads(
    function: Callable[..., Any], operands: Sequence[str], result: Any, *, rows: int, heads: int, tokens: int = 1
) -> Callable[..., Any]:
    """`function`, run by every device of the current mesh on its own rows and KV heads, without communication.

    operands: for each, a letter a dimension: "b" for rows or a multiple of them, "h" for KV heads or a multiple, "s"
    for cached tokens, whose parts the function merges itself (sequence.py), "w" for KV heads split over the devices of
    the tokens' axis too, "-" for all others. result: the same, or a tuple of it. rows, heads, tokens: how many there
    are; an axis of the mesh that does not divide them does not split them. Outside of a mesh this is the function
    itself.
    """
    mesh = current_mesh()
    if mesh is None:
        return function
    wanted = {"b": ("batch", rows), "h": ("cached_heads", heads), "w": ("kv_heads", heads), "s": ("tokens", tokens)}
    axes = {letter: _entry(_splitting(RULES[name], size, mesh)) for letter, (name, size) in wanted.items()}

    def spec(letters):
        return PartitionSpec(*(axes.get(letter) for letter in letters))

    results = jax.tree.map(spec, result)
    return jax.shard_map(function, in_specs=tuple(map(spec, operands)), out_specs=results, check_vma=False)


def constrain(array: jax.Array, logical: tuple[str, ...]) -> jax.Array:
    """An array split over the current mesh as these logical axes say, under jit; outside of a mesh the array itself."""
    mesh = current_mesh()
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, partition(logical, array.shape, mesh))


def constrain_module(module: Any, logical_axes: dict[str, tuple[str, ...]]) -> Any:
    """The same of a tree of parameters, by the table of its axes."""
    mesh = current_mesh()
    if mesh is None:
        return module
    return jax.tree.map(jax.lax.with_sharding_constraint, module, module_partition(module, logical_axes, mesh))


def on_host(array: jax.Array) -> np.ndarray:
    """All of an array, also where other processes hold parts of it; then every process has to ask."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
