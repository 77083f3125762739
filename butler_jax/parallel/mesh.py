"""Meshes and sharding rules: the only file that names mesh axes.

There are four axes:

- `data` splits the batch. It also splits the width of weights and norms and the inputs of a predictor's projections
  (as in FSDP).
- `model` splits heads, hidden units and the vocabulary (tensor parallel).
- `sequence` splits the tokens of decoding's caches and of evaluated rows. In decoding it splits weights as `model`
  does, in an evaluation as `data` does (EVALUATION_RULES).
- `expert` splits the experts of a mixture of experts, and nothing else.

A dimension stays whole where the axis size does not divide it.
"""

from __future__ import annotations

import hashlib
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

AXES = DATA, MODEL, SEQUENCE, EXPERT = ("data", "model", "sequence", "expert")

Rules = dict[str, tuple[str, ...]]

RULES: Rules = {
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
    "experts": (EXPERT,),
}
"""Logical axis -> the mesh axes that may split it, tried in this order."""

EVALUATION_RULES = RULES | {
    "width": (DATA, SEQUENCE),
    "norm": (DATA, SEQUENCE),
    "inputs": (DATA, SEQUENCE),
    "heads": (MODEL,),
    "kv_heads": (MODEL,),
    "kv_inputs": (MODEL, DATA, SEQUENCE),
    "hidden": (MODEL,),
    "vocab": (MODEL,),
}
"""The rules for weights that evaluate long rows: to communicate the weights of a layer is cheaper than its tokens."""


def parse_mesh(text: str) -> dict[str, int]:
    """Read a mesh such as "data=4,model=2" as the size of every axis; 1 for an axis that the text leaves out.

    Raises:
        ValueError: A part has another form, an unknown axis or a size below 1, or an axis is named twice.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(\w+)=(\d{1,9})", part)
        if not match:
            raise ValueError(f"mesh {text!r}: {part!r} is not of the form axis=size, as in data=4,model=2")
        axis, size = match.group(1), int(match.group(2))
        if axis not in AXES:
            raise ValueError(f"mesh {text!r}: unknown axis {axis!r}; axes are {', '.join(AXES)}")
        if size == 0:
            raise ValueError(f"mesh {text!r}: {axis} must be at least 1")
        if axis in sizes:
            raise ValueError(f"mesh {text!r} names the axis {axis} twice; give it once")
        sizes[axis] = size
    return dict.fromkeys(AXES, 1) | sizes


def make_mesh(text: str = "", *, batch_size: int | None = None, what: str = "batch size") -> Mesh:
    """Make the mesh that `text` describes over the first devices.

    Args:
        text: As `parse_mesh` reads it. "" gives the data axis as many devices as divide the batch, and all devices
            where several hosts run together.
        batch_size: Rows of a training batch, or of a part of one; None for decoding.
        what: What errors call these rows.

    Raises:
        ValueError: The mesh needs more devices than there are, does not divide the batch, has a sequence axis in
            training, or leaves devices of a multi-host run idle.
    """
    devices = jax.devices()
    count = len(devices)
    if not text and batch_size and jax.process_count() == 1:
        count = next(n for n in range(count, 0, -1) if batch_size % n == 0)
    sizes = parse_mesh(text or f"data={count}")
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ValueError(
            f"mesh {text!r} needs {needed} devices, but this machine has {len(devices)} "
            f"({devices[0].platform}); choose sizes whose product is at most {len(devices)}"
        )
    if batch_size and sizes[SEQUENCE] != 1:
        raise ValueError(
            f"mesh {text!r}: the sequence axis splits the caches of decoding; training takes data, model and expert"
        )
    if needed != len(devices) and jax.process_count() != 1:
        raise ValueError(
            f"mesh {text!r} takes {needed} of the {len(devices)} devices of {jax.process_count()} processes, and each "
            f"process has to hold a part; choose sizes whose product is {len(devices)}"
        )
    mesh = arrange(sizes, devices[:needed])
    if batch_size:
        check_batch(batch_size, mesh, what=what)
    return mesh


def arrange(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """Arrange devices in a mesh of these axis sizes, so that neighbours on an axis are close on the chips' torus.

    An axis may cover part of one side of the torus. Every factorisation of a TPU slice is therefore a valid mesh.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(logical: tuple[str, ...], shape: tuple[int, ...], mesh: Any, rules: Rules = RULES) -> PartitionSpec:
    """Choose the mesh axes of an array, given a logical axis for each dimension and its shape.

    A mesh axis splits the first dimension that the rules give it and whose size it divides. Other dimensions stay
    whole.
    """
    free, chosen = set(mesh.shape), []
    for name, size in zip(logical, shape, strict=True):
        axes = _splitting([axis for axis in rules.get(name, ()) if axis in free], size, mesh)
        free -= set(axes)
        chosen.append(_entry(axes))
    return PartitionSpec(*chosen)


def _splitting(axes: Sequence[str], size: int, mesh: Any) -> tuple[str, ...]:
    """The axes that split a dimension of this size together: each divides the part that the ones before it leave."""
    found: list[str] = []
    for axis in axes:
        parts = mesh.shape.get(axis, 1)
        if parts > 1 and size % parts == 0:
            found, size = [*found, axis], size // parts
    return tuple(found)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Axes as one entry of a PartitionSpec."""
    return axes if len(axes) > 1 else (axes or (None,))[0]


def shardings_for(mesh: Mesh, rules: Rules = RULES):
    """The function (logical axes, shape) -> NamedSharding on this mesh that `load_base` takes as `shardings`.

    Raises ValueError for a mesh with explicit axes.
    """
    _require_auto(mesh)
    return lambda logical, shape: NamedSharding(mesh, partition(logical, shape, mesh, rules))


def module_shardings(module: Any, logical_axes: dict[str, tuple[str, ...]], mesh: Mesh, rules: Rules = RULES) -> Any:
    """A pytree of NamedShardings with the structure of `module`; see module_partition."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), module_partition(module, logical_axes, mesh, rules))


def module_partition(module: Any, logical_axes: dict[str, tuple[str, ...]], mesh: Any, rules: Rules = RULES) -> Any:
    """A pytree of PartitionSpecs with the structure of `module`, or of any tree that names arrays as it does.

    logical_axes: by a parameter's name, or by its dotted path where two parameters share a name.
    """

    def one(path, leaf):
        names = [str(getattr(p, "key", getattr(p, "name", p))) for p in path]
        names = [n for n in names if n != "value"]
        logical = logical_axes.get(".".join(names[-2:])) or logical_axes[names[-1]] if leaf.ndim else ()
        return partition(logical, leaf.shape, mesh, rules)

    return jax.tree_util.tree_map_with_path(one, module)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches [B, T] split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_batch(batch_size: int, mesh: Mesh, *, what: str = "batch size") -> None:
    """Raise ValueError where the data axis does not divide the batch. The error calls the batch size `what`."""
    size = mesh.shape[DATA]
    if batch_size % size != 0:
        raise ValueError(
            f"{what} {batch_size} is not divisible by the mesh's data axis ({size}); "
            f"use a multiple of {size} or another --mesh"
        )


def rows_here(batch_size: int, mesh: Mesh, process: int | None = None) -> list[int]:
    """The rows of a batch that a process (None: this one) holds on its devices, in order.

    Several processes hold the same rows where the mesh replicates them.
    """
    process = jax.process_index() if process is None else process
    parts = {at[AXES.index(DATA)] for at, device in np.ndenumerate(mesh.devices) if device.process_index == process}
    here = batch_size // mesh.shape[DATA]
    return [row for part in sorted(parts) for row in range(part * here, part * here + here)]


def own_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """This process's rows of a batch [B, T] that every process holds whole; place_batch takes them."""
    return {name: rows[rows_here(len(rows), mesh)] for name, rows in batch.items()}


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Assemble a global batch [B, T] over the mesh from each process's rows (see rows_here)."""
    sharding, parts = batch_sharding(mesh), mesh.shape[DATA]

    def placed(rows):
        shape = (len(rows) // len(rows_here(parts, mesh)) * parts, *rows.shape[1:])
        place = {row: at for at, row in enumerate(rows_here(shape[0], mesh))}

        def shard(index):
            first, end, _ = index[0].indices(shape[0])
            return rows[place[first] : place[first] + end - first]

        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: placed(rows) for name, rows in batch.items()}


def place(module: nnx.Module, logical_axes: dict[str, tuple[str, ...]], mesh: Mesh, rules: Rules = RULES) -> nnx.Module:
    """Move a module's parameters to the shardings of their logical axes.

    On several processes, parameters that one process holds alone must be the same in all of them.
    """

    def move(leaf, sharding):
        if sharding.is_fully_addressable or not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])

    return jax.tree.map(move, module, module_shardings(module, logical_axes, mesh, rules))


def any_process(flag: bool, mesh: Mesh, after: jax.Array) -> jax.Array:
    """Whether `flag` is set in any process, as a scalar bool that is the same in all processes.

    The call does not wait. It reduces one byte for each device, once `after` is computed: two reductions never run at
    the same time.
    """
    flags = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, PartitionSpec(AXES)), lambda _: np.full(1, flag)
    )
    return _any(flags, after)


@partial(jax.jit, keep_unused=True)
def _any(flags: jax.Array, after: jax.Array) -> jax.Array:
    return flags.any()


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by jax.set_mesh; None where there is none or it has one device.

    Raises ValueError for one with explicit axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    _require_auto(mesh)
    return mesh


def _require_auto(mesh: Any) -> None:
    """Raise ValueError for a mesh with explicit axes, on which the compiler chooses no shardings."""
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"the axes {', '.join(mesh.axis_names)} of the mesh are explicit, the default of jax.make_mesh; make it by "
            "butler_jax.parallel.make_mesh, or with axis_types of AxisType.Auto"
        )


def token_axis(tokens: int) -> str | None:
    """The axis of the current mesh that splits a cache of `tokens` tokens per row; None where none does."""
    mesh = current_mesh()
    return _entry(_splitting(RULES["tokens"], tokens, mesh)) if mesh is not None else None


def platform() -> str:
    """The platform that a call traced now runs on: that of the mesh set by jax.set_mesh, otherwise the default one.

    The mesh may consist of described devices (jax.experimental.topologies): a program then compiles for absent chips.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def by_rows_and_heads(
    function: Callable[..., Any], operands: Sequence[str], result: Any, *, rows: int, heads: int, tokens: int = 1
) -> Callable[..., Any]:
    """Wrap `function` so that each device of the current mesh runs it on its own rows and KV heads.

    Nothing is communicated. Outside of a mesh the function is returned as it is.

    Args:
        function: Takes the operands and returns an array or a tuple of arrays.
        operands: For each operand one letter per dimension: "b" for rows or a multiple of them, "h" for KV heads or a
            multiple of them, "w" for KV heads that the sequence axis splits too, "s" for cached tokens (the function
            has to merge the parts), "-" for a dimension that stays whole.
        result: The letters of the result, or a tuple of them.
        rows, heads, tokens: Their numbers. A mesh axis that does not divide a number does not split it.
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


def splitting_axes(logical: str, size: int) -> tuple[str, ...]:
    """The axes of the current mesh that split a dimension of this logical axis and size; () without a mesh."""
    mesh = current_mesh()
    return () if mesh is None else _splitting(RULES[logical], size, mesh)


def map_shards(function: Callable[..., jax.Array], operands: Sequence[tuple], logical: tuple[str, ...], result: Any):
    """Call `function` so that each device of the current mesh runs it on its own part of the operands.

    Args:
        operands: Pairs of an array and its logical axes. An axis that RULES does not name stays whole.
        logical, result: The logical axes of the result, and its shape.
    """
    mesh, arrays = current_mesh(), [array for array, _ in operands]
    if mesh is None:
        return function(*arrays)
    specs = tuple(partition(axes, array.shape, mesh) for array, axes in operands)
    parts = partition(logical, result.shape, mesh)
    return jax.shard_map(function, in_specs=specs, out_specs=parts, check_vma=False)(*arrays)


def shard_index(axes: tuple[str, ...]) -> jax.Array | int:
    """Which part of a dimension that these axes split a device has, inside of map_shards."""
    return jax.lax.axis_index(axes) if axes else 0


def sum_shards(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over the devices along these axes, inside of map_shards."""
    return jax.lax.psum(array, axes) if axes else array


def constrain(array: jax.Array, logical: tuple[str, ...]) -> jax.Array:
    """Split an array over the current mesh by its logical axes (under jit). Without a mesh, return it as it is."""
    mesh = current_mesh()
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, partition(logical, array.shape, mesh))


def constrain_module(module: Any, logical_axes: dict[str, tuple[str, ...]], rules: Rules = RULES) -> Any:
    """Split a tree of parameters over the current mesh; logical_axes as in module_partition."""
    mesh = current_mesh()
    if mesh is None:
        return module
    return jax.tree.map(jax.lax.with_sharding_constraint, module, module_partition(module, logical_axes, mesh, rules))


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Copy a whole array to the host. Where other processes hold parts of it, every process has to call this."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


def hash_arrays(tree: Any) -> str:
    """Hash all numbers of a pytree with their types and shapes, in 16 hexadecimal digits."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        values = on_host(leaf)
        found.update(f"{values.dtype}{values.shape}".encode())
        found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()[:16]
