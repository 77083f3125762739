"""The model of the time beside what was measured."""

from __future__ import annotations

from benchmarks import gpu_model


def test_measured_times_are_beside_modelled_ones_and_an_offset():
    found = gpu_model.compare(["sparse_decode_normalised.json"])
    first, second = found["compared"]
    assert (first["batch"], first["context"], first["dense"][0]) == (1, 32768, 48.7)
    left = sorted(row["reuse"][0] - row["reuse"][1] for row in (first, second))
    assert abs(found["offsets"]["jax_program_us_a_layer"] - sum(left) / 2) < 0.1
    total = first["reuse"][1] + found["offsets"]["jax_program_us_a_layer"]
    assert first["reuse_model_over_measured"] == round(total / first["reuse"][0], 2)
