"""Compiled programs are dropped before the process has too many memory maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from butler_jax.evaluation.programs import MAPS, drop_programs


@pytest.mark.slow
@pytest.mark.skipif(not MAPS.exists(), reason="only Linux counts memory maps")
def test_programs_are_dropped_beyond_half_of_the_maps_and_compiled_again(tmp_path):
    most = tmp_path / "max_map_count"
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(3))
    most.write_text("1000000000\n")
    assert not drop_programs(most=most) and double._cache_size() == 1
    most.write_text("10\n")
    assert drop_programs(most=most) and double._cache_size() == 0
    assert double(jnp.ones(3)).tolist() == [2, 2, 2]


def test_where_maps_are_not_counted_nothing_is_dropped(tmp_path):
    assert not drop_programs(maps=tmp_path / "absent")
