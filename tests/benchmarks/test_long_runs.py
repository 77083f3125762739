"""After their first steps, training and decoding compile nothing new and hold no more memory."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import butler_jax
from benchmarks import long_runs
from benchmarks.watch import Compilations, Watch
from butler_jax.decoding import generation
from butler_jax.decoding.config import SamplingConfig
from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.config import SelectionConfig
from butler_jax.text.prompts import WAITING, Writer
from tests import tiny_runs

BASE = BaseConfig(
    family="llama", vocab_size=61, width=32, hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, context=192
)


@pytest.fixture(scope="module")
def base():
    return SimpleNamespace(
        name="random",
        model=BaseModel(BASE, jax.random.key(1)),
        tokenizer=None,
        config=BASE,
        fingerprint="f",
        generation={},
    )


@pytest.fixture(scope="module")
def settings():
    predictor = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    return dict(predictor=predictor, selection=SelectionConfig(budget=0.3, sinks=1, recent=3), stop=())


def test_compilations_are_counted_where_they_happen():
    double = jax.jit(lambda x: 2 * x)
    arguments = [jnp.ones(3), jnp.zeros(3), jnp.ones(4)]
    with Compilations() as counted:
        for argument, expected in zip(arguments, (1, 1, 2), strict=True):
            double(argument).block_until_ready()
            assert counted.count == expected
    jax.jit(lambda x: 3 * x)(arguments[0])
    assert counted.count == 2


@pytest.mark.slow
def test_decoding_compiles_nothing_as_the_cache_fills(base, settings):
    prompts = [[1, 2, 3], [4]]
    seen = []
    with Compilations() as counted:
        for _ in range(2):  # again in the same shapes
            for piece in butler_jax.generate_stream(base, prompts, max_new_tokens=150, **settings):
                seen.append((counted.count, len(jax.live_arrays())) if piece.row else None)
    seen = [s for s in seen if s]
    assert len(seen) == 300
    assert len(set(seen[2:149])) == 1  # two programs and a few small ones until the second token
    assert {count for count, _ in seen[2:]} == {seen[2][0]}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [dict(), dict(interval=3, min_context=40)], ids=["plain", "interval"])
def test_prompts_of_every_length_share_few_programs(base, settings, fields):
    """Widths 16, 24, 32, 48, 64, 96 and capacities 64, 96: what is new is bounded by the buckets, not by lengths."""
    settings = settings | dict(selection=SelectionConfig(budget=0.3, sinks=1, recent=3, **fields))
    before = generation.read_prompts._cache_size(), generation.advance._cache_size()
    for length in range(1, 91, 1 if not fields else 4):
        butler_jax.generate(
            base, [list(range(1, length % 50 + 1)) + [1] * (length - length % 50)], max_new_tokens=3, **settings
        )
    after = generation.read_prompts._cache_size(), generation.advance._cache_size()
    assert after[0] - before[0] <= 7  # a prompt of 62 tokens needs the second capacity already: one width twice
    assert after[1] - before[1] <= 2 * (3 if fields else 1)  # dense, mixed and sparse steps under min_context


@pytest.mark.slow
def test_generations_leave_nothing_behind(base, settings):
    drawn = SamplingConfig(temperature=1.0)
    with Watch() as watch:
        for turn in range(6):
            butler_jax.generate(base, [[1, 2, 3]], max_new_tokens=8, seed=turn, sampling=drawn, **settings)
            watch.note(turn)
    held = [(row["live_arrays"], row["live_mib"], row["compilations"]) for row in watch.rows]
    assert len(set(held[1:])) == 1


def test_a_stream_of_bytes_that_are_no_text_costs_the_same_to_the_end():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return bytes(ids).decode(errors="replace")

    writer = Writer(SimpleNamespace(decode=decode))
    written = "".join(writer.add(0xFF, last=False) for _ in range(500)) + writer.add(ord("a"), last=True)
    assert longest <= 2 * WAITING + 1
    assert written == "\ufffd" * 500 + "a"
    writer = Writer(SimpleNamespace(decode=decode))
    assert [writer.add(byte, last=False) for byte in "é€a".encode()] == ["", "é", "", "", "€", "a"]


@pytest.mark.long
@pytest.mark.slow
def test_training_and_decoding_stay_flat_and_compile_nothing_more(tmp_path):
    """The benchmark's own runs, shorter: 200 steps with eight checkpoints, then 3,200 tokens."""
    (tmp_path / "book.txt").write_text(tiny_runs.text())
    trained = long_runs.train(tmp_path, steps=200, every=25, data=f"text:{tmp_path}/book.txt")
    base = butler_jax.load_base("tiny")
    predictor = butler_jax.load_predictor(tmp_path / "run", base)
    decoded = long_runs.decode(base, predictor, rows=8, new=50, turns=8, every=400, capacity=64, budget=1 / 4)
    assert trained.rows[-1]["done"] == 200 and decoded.rows[-1]["done"] == 3200
    for watch in (trained, decoded):
        later = watch.rows[2:]  # by then there was a checkpoint, a validation, a generation
        for name in ("live_arrays", "live_mib", "compilations"):
            assert len({row[name] for row in later}) == 1, (name, watch.rows)
        grown = later[-1]["resident_mib"] - later[0]["resident_mib"]
        assert grown < 32, watch.rows  # the allocator's own; one checkpoint kept in memory would be 1 MiB a sample
    assert np.isfinite(trained.summary()["last_over_first"])
