"""The lines of a training on a plain screen."""

from __future__ import annotations

import pytest

from butler_jax.training import TrainConfig, metrics


@pytest.mark.parametrize(("silent", "said"), [(30.0, [10, 20, 25]), (0.0, list(range(1, 26)))])
def test_a_step_has_a_line_after_some_steps_or_some_time(tmp_path, monkeypatch, capsys, silent, said):
    monkeypatch.setattr(metrics, "SILENT", silent)
    shown = metrics.Metrics(tmp_path, TrainConfig(run_dir=tmp_path, steps=25), 0)
    for step in range(1, 26):
        shown.write({"step": step, "loss": 1.0, "tokens_per_second": 5.0})
    shown.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == said
    assert lines[-1].endswith("s left") and "loss 1.0000  5 tokens/s" in lines[-1]
