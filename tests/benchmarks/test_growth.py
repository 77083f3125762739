"""The benchmark of growing lengths, on a small model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import growth
from tests.tiny_models import make_model


def test_exponents_are_those_of_powers():
    rows = [
        {"pass": name, "tokens": t, "processor_seconds": 3 * t**e, "peak_mib": 5 * t}
        for name, e in (("linear", 1.0), ("square", 2.0))
        for t in (4096, 1024, 2048)
    ]
    found = growth.exponents(rows)
    assert found["linear"]["processor_seconds"] == pytest.approx(1)
    assert found["square"]["processor_seconds_of_the_last_two"] == pytest.approx(2)
    assert found["square"]["peak_mib"] == pytest.approx(1)
    assert growth.exponents(rows[:1]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", growth.PASSES)
def test_every_pass_is_measured(name, monkeypatch):
    monkeypatch.setattr(growth, "REPEATS", 1)
    model = make_model()
    rows = list(growth.run(name, SimpleNamespace(model=model, config=model.config), 64, 2))
    assert [row["pass"] for row in rows] == ([name] if name != "prefill" else [name, "decode dense", "decode sparse"])
    assert all(row["processor_seconds"] >= 0 and row["seconds"] > 0 for row in rows)
