"""Collectives of a compiled program, from its text: of one written by hand, and of one that XLA compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import hlo
from tests.host_devices import host_devices

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (x: f32[8,16]) -> f32[2,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %all-reduce.2 = f32[8,16]{1,0} all-reduce(%x), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %slice = f32[2,16]{1,0} slice(%all-reduce.2), slice={[0:2], [0:16]}
}

%first_part (y: bf16[4,8]) -> bf16[32,8] {
  %y = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%y), channel_id=3, replica_groups=[1,8]<=[8]
}

%last_part (y.1: bf16[4,8]) -> bf16[32,8] {
  %y.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.4 = bf16[32,8]{1,0} all-gather(%y.1), channel_id=3, replica_groups=[1,8]<=[8]
}

%body (s: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %s = (s32[], f32[8,16]{1,0}) parameter(0)
  %fusion.1 = f32[2,16]{1,0} fusion(%s), kind=kCustom, calls=%all-reduce-scatter.1
  %start = bf16[32,8]{1,0} fusion(%s), kind=kCustom, calls=%first_part
  %done = bf16[32,8]{1,0} fusion(%start), kind=kCustom, calls=%last_part
  %inner = (s32[], f32[4]) while(%s), condition=%until_3, body=%inner_body
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%s)
}

%inner_body (r: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = (s32[], f32[4]{0}) parameter(0)
  %permute = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%r), channel_id=5
  ROOT %u = (s32[], f32[4]{0}) tuple(%r)
}

%until_3 (r.1: (s32[], f32[4])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %r.1 = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%r.1), index=0
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

%small (z: f32[4]) -> f32[4] {
  %z = f32[4]{0} parameter(0)
  ROOT %all-reduce.6 = f32[4]{0} all-reduce(%z), channel_id=6, replica_groups=mesh['x'=4,'y'=2] {'y'}, to_apply=%add
}

%large (z.1: f32[4]) -> f32[4] {
  %z.1 = f32[4]{0} parameter(0)
  ROOT %all-reduce.7 = (f32[4], bf16[16]) all-reduce(%z.1), channel_id=6, replica_groups=mesh['x'=4,'y'=2] {'x','y'}
}

ENTRY %main (p: f32[8,16], layers: bf16[6,32,32]) -> f32[4] {
  %p = f32[8,16]{1,0} parameter(0)
  %loop = (s32[], f32[8]{0}) while(%p), condition=%until_3, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %branch = f32[4]{0} conditional(%p, %p, %p), branch_computations={%small, %large}
  ROOT %all-to-all.8 = f32[8,4]{1,0} all-to-all(%p), channel_id=8, replica_groups={{0,1},{2,3},{4,5},{6,7}}
}
"""


def test_every_collective_is_counted_as_often_as_it_runs():
    found = hlo.collectives(PROGRAM, 8)
    assert sorted((one.kind, one.size, one.group, one.times) for one in found) == [
        ("all-gather", 512, 8, 10),  # two parts of one
        ("all-reduce", 48, 8, 1),  # of two branches the one that sends more
        ("all-to-all", 128, 2, 1),
        ("collective-permute", 16, 8, 30),  # a loop of 3 in a loop of 10
        ("reduce-scatter", 512, 4, 10),  # a sum of which every chip keeps its part
    ]


def test_bytes_are_those_of_a_ring():
    totals = hlo.by_kind(hlo.collectives(PROGRAM, 8))
    assert totals == {
        "all-gather": {"count": 10, "bytes": 10 * 512 * 7 / 8},
        "reduce-scatter": {"count": 10, "bytes": 10 * 512 * 3 / 4},
        "collective-permute": {"count": 30, "bytes": 30 * 16},
        "all-reduce": {"count": 1, "bytes": 2 * 48 * 7 / 8},
        "all-to-all": {"count": 1, "bytes": 128 / 2},
    }


def test_a_loop_of_unknown_length_is_not_counted_once():
    text = PROGRAM.replace("constant(3)", "parameter(1)")
    with pytest.raises(ValueError, match="how often the loop inner runs"):
        hlo.collectives(text, 8)


def test_the_largest_array_of_all_layers_is_found():
    assert hlo.largest_stack(PROGRAM, 6) == 6 * 32 * 32 * 2
    assert hlo.largest_stack(PROGRAM, 7) == 6 * 32 * 32 * 2  # a predictor has nothing for the first layer
    assert hlo.largest_stack(PROGRAM, 5) == 0


COMPILED = """
import json
from functools import partial
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from benchmarks import hlo
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
@jax.jit
@partial(jax.shard_map, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False)
def program(x):  # [16, 4] of float32 on every device
    def body(x, _):
        total = jax.lax.psum(x * 2, "a")
        both = jax.lax.all_gather(jnp.sin(total), "b")
        return x + both.sum(0) / 8, None
    return jax.lax.scan(body, x, None, length=5)[0]
text = program.lower(jax.ShapeDtypeStruct((64, 8), jnp.float32)).compile().as_text()
print(json.dumps(hlo.by_kind(hlo.collectives(text, 8))))
"""


def test_a_program_that_xla_compiled_sends_what_can_be_worked_out_by_hand():
    environment = {**os.environ, "XLA_FLAGS": host_devices(8), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    share = 16 * 4 * 4  # bytes on a device
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "all-reduce": {"count": 5, "bytes": 5 * 2 * share * 3 / 4},  # among 4
        "all-gather": {"count": 5, "bytes": 5 * 2 * share / 2},  # two shares, one of them its own
    }
