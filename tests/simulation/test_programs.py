"""Programs of the simulation: one compilation for equal shapes, also inside another program."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks.watch import Compilations
from butler_jax.simulation import programs


class Told:
    """A compiled function that returns its compiler options."""

    lower = None

    def __init__(self, options):
        self.options = options

    def __call__(self, *operands):
        return self.options


@partial(programs.compiled, static_argnames=("factor",))
def scale(x, *, factor):
    return factor * x


def test_a_program_is_compiled_once_for_a_shape_and_a_static_argument():
    x = jnp.arange(3.0)
    scale(x, factor=2)
    with Compilations() as compiling:
        assert scale(x + 1, factor=2).tolist() == [2.0, 4.0, 6.0]
    assert compiling.count <= 1  # the sum
    with Compilations() as compiling:
        scale(x, factor=3)
    assert compiling.count == 1


@pytest.mark.parametrize("transform", [jax.jit, jax.grad], ids=["compiled", "differentiated"])
def test_it_works_inside_another_program(transform):
    found = transform(lambda x: jnp.sum(scale(x, factor=2)))(jnp.ones(3))
    assert found.tolist() == (6.0 if transform is jax.jit else [2.0, 2.0, 2.0])


@pytest.mark.parametrize("platform, options", [("cpu", programs.LESS_OPTIMISED), ("gpu", None), ("tpu", None)])
def test_only_a_cpu_compiles_with_less_optimisation(monkeypatch, platform, options):
    def jit(function, *, static_argnames, compiler_options=None):
        return Told(compiler_options)

    monkeypatch.setattr(programs.jax, "jit", jit)
    monkeypatch.setattr(programs, "platform", lambda: platform)
    count = programs.compiled(len, static_argnames=())
    for least, expected in ((True, None), (False, options)):
        monkeypatch.setattr(programs.jax.config, "read", lambda name, least=least: least)
        assert count([1]) == expected
