"""Invalid input is refused; the messages say what is wrong and what to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk


def whole(**changed):
    """A good call of the whole with some arguments changed, traced and not run."""
    arguments = dict(
        q=jnp.zeros((1, 4, 8)),
        k=jnp.zeros((1, 2, 32, 8)),
        v=jnp.zeros((1, 2, 32, 8)),
        q_imp=jnp.zeros((1, 2, 2, 4)),
        k_imp=jnp.zeros((1, 2, 4, 32)),
        lengths=jnp.array([5]),
        n=4,
    )
    return jax.eval_shape(lambda: pk.sparse_decode_attention(**(arguments | changed)))


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(sinks=1.5), "sinks must be a whole number, 0 or more, got 1.5"),
        (dict(recent=True), "recent must be a whole number, 0 or more, got True"),
        (dict(n=33), "n = 33 is more than the cache's 32 tokens; lower the budget to 32"),
        (dict(n=3, unit=16), "more than the cache's 2 units of 16 tokens"),
        (dict(n=-1), "n must be 0 or more"),
        (dict(n=2.5), "must be a static integer"),
        (dict(unit=3), "unit must be a power of two"),
        (dict(sinks=-1), "sinks must be a whole number, 0 or more"),
        (dict(pooling="mean"), "unknown pooling 'mean'; use one of normalised, maximum"),
        (dict(implementation="cuda"), "unknown implementation 'cuda'; use None or one of reference, xla, tpu, gpu"),
        (dict(implementation="tpu", unit=16, n=1), 'needs a TPU, the platform is cpu; use "xla"'),
        (dict(implementation="gpu"), 'needs a GPU, the platform is cpu; use "xla"'),
        (
            dict.fromkeys(("k", "v"), jnp.zeros((1, 2, 32, 8), jnp.bfloat16))
            | dict(implementation="tpu", interpret=True),
            "units of 2 tokens or more of bfloat16, got unit=1",
        ),
        (
            dict.fromkeys(("k", "v"), jnp.zeros((1, 2, 32, 8), jnp.float16))
            | dict(implementation="tpu", interpret=True, unit=2, n=1),
            "have no float16: give bfloat16 or float32",
        ),
        (
            dict(k_imp=jnp.zeros((1, 2, 4, 32), jnp.float16), implementation="tpu", interpret=True),
            "have no float16: give bfloat16 or float32",
        ),
        (dict(interpret=True), 'interpret=True is for the kernels "tpu" and "gpu"; got None'),
        (dict(offset=jnp.zeros((1, 2))), r"offset must have shape \(1, 2, 2\)"),
        (dict(lengths=jnp.array([5, 5])), r"lengths must have shape \(1,\), got \(2,\)"),
        (dict(lengths=jnp.array([5.0])), "lengths must be integers"),
        (dict(k=jnp.zeros((1, 2, 31, 8))), "same number of tokens S"),
        (dict(v=jnp.zeros((1, 2, 32, 9))), "must have one shape"),
        (dict(v=jnp.zeros((1, 2, 32, 8), jnp.bfloat16)), "k in float32 and v in bfloat16 must have one dtype"),
        (
            dict(k=jnp.zeros((1, 2, 32, 8), jnp.float8_e4m3fn)),
            "k must be floating point of 16 bits",
        ),
        (
            dict(k_imp=jnp.zeros((1, 2, 4, 32), jnp.float8_e5m2)),
            "k_imp must be floating point of 16 bits",
        ),
        (dict(q=jnp.zeros((1, 5, 8))), "5 query heads cannot share 2 KV heads"),
        (dict(q=jnp.zeros((1, 4, 9))), "k has head dimension 8 and q 9"),
        (dict(layer=0), "pass layer=|drop layer="),
        (dict(k_imp=jnp.zeros((1, 2, 4, 32), jnp.int8)), "int8 k_imp needs its scales"),
        (dict(new_k=jnp.zeros((1, 2, 8))), "come together or not at all"),
        (dict(counts=jnp.zeros((3,), jnp.int32)), "counts must have shape"),
        (dict(lengths=None), r"lengths must have shape \(1,\), got None"),
        (dict(n=None, implementation="gpu", interpret=True), "n, the width of the list, must be a static integer"),
        (dict(recent=2**31), r"recent must be below 2\*\*30, got 2147483648"),
        (dict(unit="16"), "unit must be a power of two .* got '16'"),
        (dict(q_imp=jnp.zeros((1, 2, 2, 4), jnp.float8_e4m3fn)), "q_imp must be floating point of 16 bits"),
        (
            dict(q_imp=jnp.zeros((2, 2, 2, 4)), k_imp=jnp.zeros((2, 2, 4, 32)), lengths=jnp.array([5, 5])),
            "q_imp has 2 rows",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(changed, message):
    with pytest.raises(ValueError, match=message):
        whole(**changed)


def test_arguments_that_do_not_go_together_are_told():
    q_imp, k_imp, lengths = jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 4, 32)), jnp.array([5])
    with pytest.raises(ValueError, match='totals are for the pooling "normalised"; leave them out'):
        pk.importance_scores(q_imp, k_imp, lengths, pooling="maximum", totals=jnp.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match="scale must be a number that is known when the call is traced, got "):
        jax.jit(lambda scale: pk.importance_scores(q_imp, k_imp, lengths, scale=scale))(0.5)
    for scale in (np.array([0.1, 5.0]), "x", float("nan")):
        with pytest.raises(ValueError, match="scale must be one finite number, got"):
            pk.importance_scores(q_imp, k_imp, lengths, scale=scale)
    with jax.enable_x64(True), pytest.raises(ValueError, match="the kernels count in 32 bits: leave jax_enable_x64"):
        pk.importance_scores(q_imp, k_imp, lengths, implementation="gpu", interpret=True)
    k = jnp.zeros((1, 2, 32, 8))
    for spans in (pk.Spans(k, k, None), pk.Spans(k, k, jnp.array(3))):
        with pytest.raises(ValueError, match=r"spans\.counts must be an array, got (None|3)"):
            pk.masked_topk_decode_attention(jnp.zeros((1, 4, 8)), k, k, jnp.zeros((1, 2, 1), jnp.int32), spans=spans)


def test_a_page_needs_lengths_and_the_tpu_whole_pages():
    k = jnp.zeros((1, 2, 40, 8))
    indices = jnp.zeros((1, 2, 1), jnp.int32)
    with pytest.raises(ValueError, match="need lengths"):
        pk.masked_topk_decode_attention(jnp.zeros((1, 4, 8)), k, k, indices, unit=16)
    with pytest.raises(ValueError, match="not a multiple of unit=16; raise the capacity to 48"):
        pk.masked_topk_decode_attention(
            jnp.zeros((1, 4, 8)), k, k, indices, unit=16, lengths=jnp.array([40]), implementation="tpu", interpret=True
        )
