"""The kernels of the cross entropy with errors as its target, interpreted, beside the form in XLA.

The naive form in float64 stands in test_target.py, for both.
"""

from __future__ import annotations

import functools
import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked what chip this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to share: another process may hold its lock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from butler_jax.training.losses import ErrorRule, ErrorTarget, attend_with_cross_entropy, flash_pass
from tests.host_devices import run_on_devices
from tests.marked import long, slow
from tests.tiny_models import random_documents
from tests.training.losses.naive import assert_close
from tests.training.losses.test_target import make_far_keys, make_inputs


def cast_inputs(length, heads, kv_heads, key_heads, dtype=np.float32):
    """q, k, v, q_imp, k_imp and the target, of two rows."""
    arrays, target = make_inputs(length, heads, kv_heads)
    arrays[4] = np.repeat(arrays[4], key_heads // kv_heads, axis=2)
    arrays[4] += np.linspace(0, 0.1, arrays[4].size).reshape(arrays[4].shape)  # heads of k_imp differ
    return [jnp.asarray(a, dtype) for a in arrays], ErrorTarget(*map(np.float32, target[:3]))


def run(arrays, target, *, form, rule, **options):
    """(loss, output, count, and the gradients of q_imp, k_imp and the offset) in a form."""

    def loss(q_imp, k_imp, offset, given, target):
        terms = dict(target=target._replace(offset=offset), rule=rule, form=form, **options)
        output, loss, count = attend_with_cross_entropy(*given, q_imp, k_imp, **terms)
        return loss, (output, count)

    function = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (loss, aux), gradients = function(*arrays[3:], target.offset, arrays[:3], target)
    return loss, *aux, *gradients


@pytest.mark.parametrize(
    ("error", "heads", "options"),
    [
        # three blocks of keys and of rows
        ("centred", (4, 2, 2), {"softcap": 3.0, "sink_logits": np.float32([0.5, 3.0, -1.0, 2.0])}),
        slow("value", (3, 1, 3), {"sliding_window": 100, "sinks": 4, "recent": 8}),
        long("weight", (2, 2, 2), {"sinks": 70, "recent": 0, "sliding_window": 200}),
    ],
)
def test_flash_and_fused_give_the_same(error, heads, options):
    arrays, target = cast_inputs(300, *heads)
    options = {"segments": random_documents(7, 2, 300), "sinks": 2, "recent": 3, "implementation": "xla"} | options
    rule = ErrorRule(error, normalised=error == "centred")
    target = target._replace(far=None if error == "value" else make_far_keys(300))
    found, expected = (run(arrays, target, form=form, rule=rule, **options) for form in ("flash", "fused"))
    for flash, fused in zip(found, expected, strict=True):
        assert flash.dtype == fused.dtype
        assert_close(flash, np.asarray(fused, np.float64))


@pytest.mark.slow
def test_bfloat16_gives_what_float32_gives_on_rounded_inputs():
    """The fused form multiplies the same rounded inputs in float32.

    The kernels round the weights and the changes of scores to bfloat16 before they multiply: 2**-9 of a term. The
    output o is rounded alike, and |v - o| with it.
    """
    arrays, target = cast_inputs(300, 4, 2, 2, jnp.bfloat16)
    options = {"rule": ErrorRule("centred"), "sinks": 2, "recent": 3, "implementation": "xla"}
    flash = run(arrays, target, form="flash", **options)
    exact = run([a.astype(jnp.float32) for a in arrays], target, form="fused", **options)
    assert [x.dtype for x in flash] == ["float32", "bfloat16", "float32", "bfloat16", "bfloat16", "float32"]
    np.testing.assert_allclose(flash[0], exact[0], rtol=1e-3)
    for gradient, own in zip(flash[3:], exact[3:], strict=True):
        error = jnp.linalg.norm(gradient.astype(jnp.float32) - own) / jnp.linalg.norm(own)
        assert error < 2**-7, error


@pytest.mark.slow
def test_flash_after_splash_gives_what_xla_gives():
    arrays, target = cast_inputs(140, 4, 2, 2)
    options = {"rule": ErrorRule("centred", normalised=True), "segments": random_documents(3, 2, 140)}
    options |= {"sinks": 2, "recent": 3, "sliding_window": 90}
    found = run(arrays, target, form=None, implementation="splash", **options)
    expected = run(arrays, target, form="fused", implementation="xla", **options)
    own = options["segments"] != 0
    for number, (flash, fused) in enumerate(zip(found, expected, strict=True)):
        if number == 1:  # rows of padding are arbitrary
            flash, fused = flash[own], fused[own]
        assert_close(flash, np.asarray(fused, np.float64))


@pytest.mark.slow
def test_simulated_memories_leak_no_nan_and_see_no_race(monkeypatch):
    """Memory that nothing wrote is NaN in this simulation of a TPU."""
    simulated = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    for name in ("sum_rows", "key_gradients"):
        kernel = getattr(flash_pass, name)
        monkeypatch.setattr(
            flash_pass, name, lambda *given, interpret, kernel=kernel: kernel(*given, interpret=simulated)
        )
    arrays, target = cast_inputs(300, 2, 1, 1)
    options = {"segments": random_documents(5, 2, 300), "sinks": 2, "recent": 3, "implementation": "xla"}
    options["rule"] = ErrorRule("centred")
    found = run(arrays, target, form="flash", **options)
    assert not simulator.races.races_found
    for flash, fused in zip(found, run(arrays, target, form="fused", **options), strict=True):
        assert_close(flash, np.asarray(fused, np.float64))


DEVICES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
import numpy as np
from butler_jax.parallel import make_mesh
from butler_jax.training.losses import ErrorRule
from tests.tiny_models import random_documents
from tests.training.losses.test_flash_pass import cast_inputs, run
arrays, target = cast_inputs(140, 4, 2, 2)
options = {"rule": ErrorRule("centred"), "segments": random_documents(3, 2, 140), "implementation": "xla"}
options |= {"sinks": 2, "recent": 3}
expected = run(arrays, target, form="flash", **options)
with jax.set_mesh(make_mesh("data=2,model=2")):
    found = run(arrays, target, form="flash", **options)
for a, b in zip(found, expected, strict=True):  # float32 sums over devices come in another order
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
"""


@pytest.mark.slow
def test_flash_on_several_devices_gives_what_one_does():
    run_on_devices(4, DEVICES, optimised=False, timeout=600)


def lower_for_v5e(length, sizes=(32, 8, 128, 16), dtype=jnp.bfloat16, **options):
    """Value and gradients for one row on a v5e; sizes: H, K, D and R, by default those of Llama-3.1-8B's layer."""
    heads, kv_heads, dim, rank = sizes
    mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:1]), ("data",))
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    keys = array((1, length, kv_heads, dim), dtype)
    given = (array((1, length, heads, dim), dtype), keys, keys)
    q_imp, k_imp = (array((1, length, count, rank), jnp.float32) for count in (heads, kv_heads))
    gram = array((kv_heads, heads // kv_heads, dim, dim), jnp.float32)
    target = ErrorTarget(gram, array((1, length), jnp.float32), array((1, length, heads), jnp.float32))
    segments = array((1, length), jnp.int32)
    options = {"rule": ErrorRule("centred", normalised=True), "sinks": 4, "recent": 8} | options

    def loss(q_imp, k_imp, offset, given, target, segments):
        terms = dict(target=target._replace(offset=offset), segments=segments, **options)
        output, loss, count = attend_with_cross_entropy(*given, q_imp, k_imp, **terms)
        return loss, (output, count)

    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        return run.lower(q_imp, k_imp, target.offset, given, target, segments)


def megabytes(compiled):
    memory = compiled.memory_analysis()
    return [size / 2**20 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]


@pytest.mark.slow
def test_the_loss_of_a_layer_compiles_for_tpus(capsys):
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    compiled = lower_for_v5e(4096).compile()
    for kernel in ("splash_mha_fwd", "sum_error_rows", "error_key_gradients"):
        assert kernel in compiled.as_text(), f"{kernel} is not in the program"
    lower_for_v5e(256, sizes=(4, 2, 80, 2), dtype=jnp.float32, softcap=30.0).compile()
    with capsys.disabled():
        print("\nv5e, T = 4,096: arguments {:.0f}, temporaries {:.0f} MiB".format(*megabytes(compiled)))


@pytest.mark.long  # benchmarks/test_pods.py compiles them in a step
@pytest.mark.slow
def test_the_kernels_keep_a_few_times_what_the_queries_take(monkeypatch, capsys):
    """At 131,072 tokens, without Splash attention, which prepares its mask for a minute at this length."""
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    monkeypatch.setattr(flash_pass, "causal_attention", lambda q, k, v, **_: (q, q[..., 0].astype(jnp.float32)))
    kept = megabytes(lower_for_v5e(131072).compile())
    assert kept[1] < 5 * (queries := 131072 * 32 * 128 * 2 / 2**20), queries  # one byte a pair of tokens: 512 times
    with capsys.disabled():
        print("\nv5e, T = 131,072, the kernels alone: arguments {:.0f}, temporaries {:.0f} MiB".format(*kept))
