"""cuDNN's attention gives what the form in XLA gives, on a GPU; skipped without one.

Both read the same bfloat16 inputs. Their outputs are averages of values of size 1: weights and results are rounded to 8
bits, 2**-9 of their size each, so that they differ by 2e-2 at most. cuDNN's log-sum-exp is rounded to the dtype of q
too: 2**-8 of its size and as much.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model import attention

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")


@pytest.mark.parametrize("dim", [96, 128])
@pytest.mark.parametrize("window", [None, 1, 50, 128, 4096])
@pytest.mark.parametrize("length", [64, 192, 8192])
def test_output_and_log_sum_exp_equal_those_of_xla(length, window, dim):
    rng = np.random.default_rng(length + dim)
    shapes = (1, length, 8, dim), (1, length, 2, dim), (1, length, 2, dim)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    scale = dim**-0.5
    found = jax.jit(lambda q, k, v: attention._cudnn(q, k, v, window, scale))(q, k, v)
    terms = dict(softcap=None, sink_logits=None)
    expected = jax.jit(lambda q, k, v: attention._xla(q, k, v, None, None, window, scale, **terms))(q, k, v)
    out, lse = (np.asarray(each, np.float32) for each in found)
    np.testing.assert_allclose(out, np.asarray(expected[0], np.float32), atol=2e-2)
    np.testing.assert_allclose(lse, np.asarray(expected[1]), rtol=2**-7, atol=2**-6)


def test_gpus_choose_cudnn_for_a_plain_half():
    q = jnp.zeros((1, 64, 8, 128), jnp.bfloat16)
    assert attention.choose_implementation(None, q, 128, None) == "cudnn"
