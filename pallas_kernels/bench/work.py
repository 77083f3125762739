"""The work of each kernel of a sparse call on GPU: its grid, from the traced program, and what a program of it does.

Where layers choose together, XLA has an operation beside the kernels. It counts as a kernel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.assumptions import Assumptions
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.programs import choose_and_attend
from pallas_kernels.gpu.selection import part_sizes, sample_size
from pallas_kernels.gpu.tiles import Tiles, try_tiles
from pallas_kernels.gpu.triton import padded_size

THREADS = 32  # of a warp
KEPT = ("attend_to_tokens", "merge_splits")  # the kernels of a step that keeps its choice


@dataclass(frozen=True, kw_only=True)
class KernelLaunch:
    """One launch: its name, programs along each axis of the grid, and warps of a program."""

    name: str
    grid: tuple[int, ...]
    warps: int

    @property
    def programs(self) -> int:
        """Programs of the whole grid."""
        return math.prod(self.grid)


@dataclass(frozen=True, kw_only=True)
class KernelWork:
    """What a launch moves, and what one program of it does.

    Attributes:
        launch: The launch.
        streamed: Bytes read in order or written, once.
        gathered: Bytes of single rows of the caches.
        shared_reads: Bytes that several programs read again, from the cache.
        instructions: Of a warp, from begin to end.
        loads: Loads of which each waits for the one before.
        barriers: Barriers of a program.
        registers: Of a thread.
        shared: Bytes of shared memory of a program.
        again: Bytes of an array that an earlier kernel of the call has read or written; part of `streamed`.
    """

    launch: KernelLaunch
    streamed: float
    instructions: float
    loads: float
    gathered: float = 0.0
    shared_reads: float = 0.0
    barriers: float = 0.0
    registers: float = 64.0
    shared: float = 2048.0
    again: float = 0.0


@functools.cache
def trace_launches(case: Case, tiles: Tiles) -> list[KernelLaunch]:
    """The launches of a sparse call with these tiles, in order, from its traced program. Nothing is compiled."""
    shape, batch, group = case.shape, case.batch, case.shape.heads // case.shape.kv_heads
    array, several = jax.ShapeDtypeStruct, case.together
    cache = array((batch, shape.kv_heads, case.context, shape.dim), case.dtype)
    stack = () if several == 1 else (several,)
    k_imp = (*stack, batch, shape.kv_heads, shape.rank, case.context)
    scales = array((batch, shape.kv_heads), jnp.float32) if case.int8 else None
    layers = dict(k=[cache] * several, v=[cache] * several, scales=[scales] * several)
    layers |= dict(k_imp=array(k_imp, jnp.int8 if case.int8 else case.dtype))
    q = array((batch, shape.heads, shape.dim), case.dtype)
    q_imp = array((batch, shape.kv_heads, group, shape.rank), case.dtype)
    call = functools.partial(choose_and_attend, replace(case, implementation="gpu"), interpret=False)
    with try_tiles(tiles):
        return _launches_of(jax.make_jaxpr(call)(q, q_imp, layers, array((batch,), jnp.int32)).jaxpr)


def _launches_of(jaxpr: Any) -> list[KernelLaunch]:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            own = equation.params
            name = own["name"] if "name" in own else own["name_and_src_info"].name
            found.append(KernelLaunch(name=name, grid=own["grid_mapping"].grid, warps=own["compiler_params"].num_warps))
        else:
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                found += _launches_of(inner.jaxpr) if hasattr(inner, "jaxpr") else []
    return found


def work_of(case: Case, tiles: Tiles, assumed: Assumptions) -> list[KernelWork]:
    """The work of every launch of a sparse call."""
    launches = trace_launches(case, tiles)
    have, rows = assumed.values(), replace(case, batch=case.batch * case.together)
    splits = max(one.grid[1] for one in launches if one.name == "attend_to_tokens")
    makers = dict(
        importance_totals=_totals_work,
        importance_scores=_scores_work,
        bracket_threshold=_bracket_work,
        select_top_k=_select_work,
        attend_to_tokens=_attend_work,
        merge_splits=functools.partial(_merge_work, splits=splits),
    )
    works = [makers[one.name](one, case if one.name in KEPT else rows, tiles, have) for one in launches]
    return works + [_choices_work(rows, have)] * (case.together > 1)


def _sizes(case):
    """Rows, query heads of each, and bytes of k_imp and of the images of the units."""
    rows = case.batch * case.shape.kv_heads
    item = 1 if case.int8 else jnp.dtype(case.dtype).itemsize
    k_imp = rows * case.context * case.shape.rank * item
    return rows, case.shape.heads // case.shape.kv_heads, k_imp, 4 * rows * -(-case.context // case.unit)


def _totals_work(launch, case, tiles, have):
    _, group, k_imp, _ = _sizes(case)
    return KernelWork(
        launch=launch,
        streamed=k_imp + 8 * launch.programs * group,
        instructions=have["totals_code"],
        loads=2,
        barriers=15,
        registers=have["totals_registers"],
        shared=have["scores_shared"],
    )


def _scores_work(launch, case, tiles, have):
    _, group, k_imp, images = _sizes(case)
    blocks, joins = launch.grid[1], 0
    if case.pooling == "normalised":
        joins = -(-blocks // 128)
    return KernelWork(
        launch=launch,
        streamed=k_imp + images,
        again=k_imp if joins else 0,
        shared_reads=8 * launch.programs * blocks * group if joins else 0,
        instructions=have["scores_code"] + joins * have["scores_join"],
        loads=2 + joins,
        barriers=4 + 4 * joins,
        registers=have["scores_registers"],
        shared=have["scores_shared"],
    )


def _parts(launch, case, tiles):
    """Units of a row, and the blocks of them that a program writes."""
    units = -(-case.context // case.unit)
    chunk, part = part_sizes(units, launch.grid[0], tiles)
    return units, part // chunk


def _bracket_work(launch, case, tiles, have):
    rows, _, _, images = _sizes(case)
    units, blocks = _parts(launch, case, tiles)
    sampled = sample_size(units)
    held = max(1.0, sampled / (THREADS * launch.warps))
    trials = have["sample_trials"]
    code = have["bracket_code"] + blocks * have["bracket_write"]
    return KernelWork(
        launch=launch,
        streamed=images + 4 * rows * launch.grid[1],
        again=images,
        shared_reads=4 * launch.programs * sampled * 8,  # a sector of 32 bytes for each image
        instructions=code + trials * (have["sample_trial_code"] + have["trial_image"] * held),
        loads=2 + blocks,
        barriers=2 * trials + 16 * blocks,
        registers=have["select_registers"],
        shared=have["select_shared"],
    )


def _select_work(launch, case, tiles, have):
    rows, _, _, images = _sizes(case)
    units, blocks = _parts(launch, case, tiles)
    whole = units <= tiles.held
    images_held = padded_size(units) if whole else tiles.candidates
    held = max(1.0, images_held / (THREADS * launch.warps))
    kind = "" if whole else "candidate_"
    trials, trial_code = have[f"{kind}trials"], have[f"{kind}trial_code"]
    code = have["select_code"] + have["select_image"] * held + blocks * have["select_write"]
    code += 0 if whole else launch.grid[1] * have["select_gather"]
    return KernelWork(
        launch=launch,
        streamed=images + 4 * rows * case.units,
        again=images,
        shared_reads=4 * launch.programs * (units if whole else images_held),
        instructions=code + trials * (trial_code + have["trial_image"] * held),
        loads=2 + blocks + (0 if whole else 2),
        barriers=2 * trials + 8 * blocks + 8,
        registers=have["select_registers"],
        shared=have["select_shared"],
    )


def _choices_work(case, have):
    """XLA's operation that gives each layer its choice: indices, and which of them are valid."""
    rows, _, _, _ = _sizes(case)
    chosen = rows * case.units
    launch = KernelLaunch(name="choices", grid=(-(-chosen // (4 * 4 * THREADS)),), warps=4)
    return KernelWork(launch=launch, streamed=2 * 5 * chosen, instructions=have["xla_code"], loads=1, registers=32)


def _attend_work(launch, case, tiles, have):
    rows, group, _, _ = _sizes(case)
    item, dim = jnp.dtype(case.dtype).itemsize, case.shape.dim
    tokens = tiles.attend_tokens(padded_size(dim), item, padded_size(group))
    trips = math.ceil(math.ceil(case.tokens_read / tokens) / launch.grid[1])
    return KernelWork(
        launch=launch,
        streamed=4 * rows * case.units + 4 * launch.programs * group * (dim + 2),
        gathered=2.0 * rows * case.tokens_read * dim * item,
        instructions=have["attend_code"] + trips * have["attend_trip"],
        loads=3 + trips,  # the length, units, and their keys; then the next ones, which were asked for a trip before
        barriers=5 * trips,
        registers=have["attend_registers"],
        shared=have["attend_shared"],
    )


def _merge_work(launch, case, tiles, have, splits):
    rows, group, _, _ = _sizes(case)
    item, dim = jnp.dtype(case.dtype).itemsize, case.shape.dim
    parts = 4 * rows * group * splits * (dim + 2)
    return KernelWork(
        launch=launch,
        streamed=parts + rows * group * dim * item,
        again=parts,
        instructions=have["merge_code"],
        loads=2,
        barriers=4,
        registers=have["merge_registers"],
    )
