"""Meshes and sharding rules: the only file that names mesh axes.

Two axes: `data` splits the batch and, FSDP-like, the width of every weight; `model` splits heads, hidden units and the
vocabulary (tensor parallel). A dimension that an axis does not divide stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from butler_jax.configs import require

AXES = ("data", "model")

RULES: dict[str, str | None] = {
    "batch": "data",
    "width": "data",
    "heads": "model",
    "kv_heads": "model",
    "hidden": "model",
    "vocab": "model",
}


def parse_mesh(text: str) -> dict[str, int]:
    """'data=4,model=2' -> {'data': 4, 'model': 2}; axes left out are 1. Raises ValueError naming what is wrong."""
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(\w+)=(\d+)", part)
        require(bool(match), f"mesh {text!r}: {part!r} is not of the form axis=size, as in data=4,model=2")
        axis, size = match.group(1), int(match.group(2))
        require(axis in AXES, f"mesh {text!r}: unknown axis {axis!r}; axes are {', '.join(AXES)}")
        require(size > 0, f"mesh {text!r}: {axis} must be at least 1")
        sizes[axis] = size
    return sizes


def make_mesh(text: str = "", *, batch_size: int | None = None) -> Mesh:
    """The mesh that `text` describes, over the first devices.

    '' puts on the data axis as many devices as divide the batch (all of them where several hosts work together).
    Raises ValueError where the mesh needs more devices than there are, does not divide the batch, or leaves devices of
    several hosts idle.
    """
    devices = jax.devices()
    count = len(devices)
    if not text and batch_size and jax.process_count() == 1:
        count = next(n for n in range(count, 0, -1) if batch_size % n == 0)
    sizes = parse_mesh(text) if text else {"data": count, "model": 1}
    needed = sizes["data"] * sizes["model"]
    require(
        needed <= len(devices),
        f"mesh {text!r} needs {needed} devices, but this machine has {len(devices)} "
        f"({devices[0].platform}); choose sizes whose product is at most {len(devices)}",
    )
    require(
        needed == len(devices) or jax.process_count() == 1,
        f"mesh {text!r} takes {needed} of the {len(devices)} devices of {jax.process_count()} processes, and each "
        f"process has to hold a part; choose sizes whose product is {len(devices)}",
    )
    mesh = jax.make_mesh(tuple(sizes[a] for a in AXES), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:needed])
    if batch_size:
        check_batch(batch_size, mesh)
    return mesh


def partition(logical: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    An axis splits the first dimension that asks for it and that it divides; everything else is left whole.
    """
    chosen: list[str | None] = []
    for name, size in zip(logical, shape, strict=True):
        axis = RULES.get(name)
        fits = axis is not None and axis not in chosen and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
        chosen.append(axis if fits else None)
    return PartitionSpec(*chosen)


def shardings_for(mesh: Mesh):
    """(logical axes, shape) -> NamedSharding on this mesh; what load_base's `shardings` takes."""
    return lambda logical, shape: NamedSharding(mesh, partition(logical, shape, mesh))


def module_shardings(module: Any, logical_axes: dict[str, tuple[str, ...]], mesh: Mesh) -> Any:
    """A pytree of NamedShardings in the shape of `module`.

    An axes table is keyed by parameter name, or by its dotted path where two of one name differ.
    """

    def one(path, leaf):
        names = [str(getattr(p, "key", getattr(p, "name", p))) for p in path]
        names = [n for n in names if n != "value"]
        logical = logical_axes.get(".".join(names[-2:])) or logical_axes[names[-1]]
        return NamedSharding(mesh, partition(logical, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, module)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches [B, T] split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def check_batch(batch_size: int, mesh: Mesh, *, what: str = "batch size") -> None:
    """Raise ValueError where the mesh does not divide the batch; what: how the error calls the batch's size."""
    size = mesh.shape[RULES["batch"]]
    require(
        batch_size % size == 0,
        f"{what} {batch_size} is not divisible by the mesh's data axis ({size}); "
        f"use a multiple of {size} or another --mesh",
    )


def rows_here(batch_size: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch the devices of this process hold, in order; other processes may hold the same."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in parts for row in range(*rows.indices(batch_size))})


def own_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """Of a batch that every process has whole, the rows that place_batch takes from this one."""
    return {name: rows[rows_here(len(rows), mesh)] for name, rows in batch.items()}


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch (see rows_here) as global arrays over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


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


def by_rows_and_heads(
    function: Callable[..., Any], operands: Sequence[str], result: Any, *, rows: int, heads: int
) -> Callable[..., Any]:
    """`function`, run by every device of the current mesh on its own rows and KV heads, without communication.

    operands: for each, a letter a dimension: "b" for rows or a multiple of them, "h" for KV heads or a multiple, "-"
    for all others. result: the same, or a tuple of it. rows, heads: how many there are; an axis of the mesh that does
    not divide them does not split them. Outside of a mesh this is the function itself.
    """
    mesh = current_mesh()
    if mesh is None:
        return function
    wanted = {"b": (RULES["batch"], rows), "h": (RULES["kv_heads"], heads)}
    axes = {letter: axis for letter, (axis, size) in wanted.items() if size % mesh.shape[axis] == 0}

    def spec(letters):
        return PartitionSpec(*(axes.get(letter) for letter in letters))

    results = jax.tree.map(spec, result)
    return jax.shard_map(function, in_specs=tuple(map(spec, operands)), out_specs=results, check_vma=False)


def on_host(array: jax.Array) -> np.ndarray:
    """All of an array, also where other processes hold parts of it; then every process has to ask."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
