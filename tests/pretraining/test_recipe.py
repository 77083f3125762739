"""Pretraining end to end: what it writes loads again, and a stopped run continues as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from butler_jax import load_base
from butler_jax.pretraining import recipe
from butler_jax.pretraining.config import PretrainConfig
from butler_jax.pretraining.curriculum import Curriculum
from butler_jax.pretraining.recipe import pretrain
from tests import tiny_runs


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(tiny_runs.text())
    return path


def config(text: Path, **changes) -> PretrainConfig:
    sizes = dict(vocab_size=280, width=32, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, context=64)
    rows = dict(steps=4, long_steps=2, batch_size=4, length=32, mesh="data=1", eval_every=0)
    place = dict(data=f"text:{text}", data_dir=str(text.parent / "data"))
    return PretrainConfig(**{**sizes, **rows, **place, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(accumulate=4), "batches of 2 rows of 64 tokens, which --accumulate 4 does not divide"),
        (dict(context=0), "context must be"),
        (dict(layers=1), "--layers must be at least 2"),
        (dict(head_dim=32), "--width at least twice --head-dim, got 2, 32 and 32"),
    ],
)
def test_sizes_that_cannot_be_trained_are_told(text, changes, message):
    with pytest.raises(ValueError, match=message):
        config(text, **changes)


def test_a_run_that_was_refused_is_not_begun(text, tmp_path):
    absent = config(text, run_dir=tmp_path, out="~/model", data=f"text:{tmp_path / 'absent.txt'}")
    assert absent.out == Path("~/model").expanduser()
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        pretrain(absent)
    assert not (tmp_path / "config.json").exists()


def test_a_run_that_was_stopped_writes_no_model(text, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "fit", lambda run, state: state)
    assert pretrain(config(text, run_dir=tmp_path / "run")) is None
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_the_model_loads_and_a_stopped_run_goes_on_bit_for_bit(text, tmp_path, monkeypatch):
    out = pretrain(config(text, run_dir=tmp_path / "straight"))
    base = load_base(str(out))
    assert base.config.width == 32 and base.tokenizer.vocab_size == base.config.vocab_size
    card = json.loads((out / "card.json").read_text())
    last = tiny_runs.rows(tmp_path / "straight")[-1]
    assert card["losses"]["validation_loss"] == pytest.approx(last["validation_loss"])
    assert "run_dir" not in card["recipe"] and card["recipe"]["layers"] == 2

    taken = Curriculum.__next__

    def dies(self):
        if self._taken == 3:
            raise RuntimeError("the machine is gone")
        return taken(self)

    monkeypatch.setattr(Curriculum, "__next__", dies)
    stopped = config(text, run_dir=tmp_path / "stopped", checkpoint_every=3)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        pretrain(stopped)
    monkeypatch.undo()
    again = pretrain(stopped)
    losses = [[row["loss"] for row in tiny_runs.rows(tmp_path / name)] for name in ("straight", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
