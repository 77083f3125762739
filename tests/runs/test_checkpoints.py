"""Checkpoints are exact and tied to their base, and errors say what does not fit."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel
from butler_jax.predictors import PREDICTORS, make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.runs.checkpoints import Checkpoints, joined
from butler_jax.runs.saved_predictor import load_predictor, save_predictor
from butler_jax.storage.settings import to_dict
from butler_jax.weights import Base

CONFIG = BaseConfig(
    family="qwen2",
    vocab_size=61,
    width=64,
    hidden=96,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    context=64,
    qkv_bias=True,
)


def base_of(name: str, fingerprint: str, config: BaseConfig = CONFIG) -> Base:
    """A base without weights: checkpoints read its name, sizes and fingerprint only."""
    return Base(name, jax.eval_shape(lambda: BaseModel(config, jax.random.key(0))), None, fingerprint)


BASE = base_of("mine", "aaaa")


def random_predictor(kind: str, rank: int = 8, seed: int = 0):
    """Every number of it random, the rotary pairs too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: make_predictor(CONFIG, PredictorConfig(kind=kind, rank=rank, stride=2, hidden=32)))

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 8, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_a_predictor_comes_back_exactly(tmp_path, kind):
    predictor = random_predictor(kind)
    save_predictor(tmp_path / "predictor", predictor, BASE)
    loaded = load_predictor(tmp_path / "predictor", BASE)
    assert type(loaded) is type(predictor) and loaded.config == predictor.config and loaded.base == CONFIG
    assert jax.tree.structure(loaded) == jax.tree.structure(predictor)
    for mine, theirs in zip(jax.tree.leaves(predictor), jax.tree.leaves(loaded), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_many_saves_leave_no_thread_and_no_open_file_behind(tmp_path):
    held = []
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, {"module": {"w": jnp.ones(3)}}, None, 1 / step)
            checkpoints.wait()
            files = Path("/proc/self/fd")
            held.append((threading.active_count(), len(list(files.iterdir())) if files.is_dir() else 0))
    assert held[-1] == held[1]


def test_a_checkpoint_that_promises_more_than_a_training_leaves_is_not_read(tmp_path):
    predictor = random_predictor("producer")
    about = {"base": "mine", "fingerprint": "aaaa", "predictor": to_dict(predictor.config)}
    count = sum(leaf.size for leaf in jax.tree.leaves(predictor))
    with Checkpoints(tmp_path / "checkpoints", keep=1, about=about) as checkpoints:
        checkpoints.save(1, {"module": predictor, "more": jnp.zeros(4 * count)}, None, 0.0)
    with pytest.raises(ValueError, match=rf"holds {5 * count} values with a predictor of {count}, more than any"):
        load_predictor(tmp_path, BASE)


def test_a_checkpoint_that_names_no_base_or_predictor_is_told(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=1, about={"fingerprint": "aaaa"}) as checkpoints:
        checkpoints.save(1, {"module": random_predictor("producer")}, None, 0.0)
    with pytest.raises(ValueError, match="do not say which base and predictor they are of"):
        load_predictor(tmp_path, BASE)


def test_a_run_does_not_go_on_with_another_base(tmp_path):
    state = {"module": random_predictor("producer")}
    with Checkpoints(tmp_path / "run", keep=1, about={"base": "mine", "fingerprint": "aaaa"}) as checkpoints:
        checkpoints.save(1, state, None, 0.0)
    with (
        Checkpoints(tmp_path / "run", keep=1, about={"base": "other", "fingerprint": "bbbb"}) as checkpoints,
        pytest.raises(ValueError, match=r"belongs to base 'mine' .fingerprint aaaa., not to 'other' .bbbb."),
    ):
        checkpoints.restore(1, state)


def test_another_base_is_refused_with_both_names(tmp_path):
    save_predictor(tmp_path / "predictor", random_predictor("producer"), BASE)
    with pytest.raises(ValueError, match="was trained for base 'mine'") as error:
        load_predictor(tmp_path / "predictor", base_of("other", "bbbb"))
    for words in ("(fingerprint aaaa)", "not for 'other' (bbbb)", "load that base, or train a predictor for this one"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="load it with the weights and the context= of then, or train a predictor"):
        load_predictor(tmp_path / "predictor", base_of("mine", "bbbb"))
    renamed = load_predictor(tmp_path / "predictor", base_of("moved elsewhere", "aaaa"))  # the same weights
    assert renamed.kind == "producer"


def test_other_sizes_are_named(tmp_path):
    save_predictor(tmp_path / "predictor", random_predictor("producer"), BASE)
    wide = base_of("mine", "aaaa", dataclasses.replace(CONFIG, width=128))
    with pytest.raises(
        ValueError, match=r"does not fit: .*trunk\.inner is \(2, 64, 32\) there and \(2, 128, 32\) here"
    ):
        load_predictor(tmp_path / "predictor", wide)
    plain = base_of("mine", "aaaa", dataclasses.replace(CONFIG, qkv_bias=False))
    save_predictor(tmp_path / "lookahead", random_predictor("lookahead"), BASE)
    with pytest.raises(ValueError, match=r"query_bias is .* there and unknown here"):
        load_predictor(tmp_path / "lookahead", plain)


def test_a_directory_without_checkpoints_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such directory: .*absent; give the directory of a run"):
        load_predictor(tmp_path / "absent", BASE)
    with pytest.raises(FileNotFoundError, match=r"has no checkpoints; give the directory of a run of butler-jax train"):
        load_predictor(tmp_path, BASE)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint yet"):
        load_predictor(tmp_path / "run", BASE)


def test_a_save_that_cannot_begin_leaves_no_thread_to_wait_for(tmp_path):
    (tmp_path / "file").write_text("")
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="could not be written"):
        save_predictor(tmp_path / "file", random_predictor("producer"), BASE)
    assert not [one for one in threading.enumerate() if one not in before and not one.daemon]


def test_nothing_is_overwritten(tmp_path):
    save_predictor(tmp_path / "predictor", random_predictor("producer"), BASE)
    with pytest.raises(FileExistsError, match="already holds a predictor; choose another directory"):
        save_predictor(tmp_path / "predictor", random_predictor("producer", seed=1), BASE)


def about(predictor) -> dict:
    return {"base": "mine", "fingerprint": "aaaa", "predictor": dataclasses.asdict(predictor.config)}


def test_the_best_is_loaded_unless_a_step_is_named(tmp_path):
    predictors = [random_predictor("producer", seed=seed) for seed in range(3)]
    with Checkpoints(tmp_path / "checkpoints", keep=5, about=about(predictors[0])) as checkpoints:
        for step, (predictor, loss) in enumerate(zip(predictors, (3.0, 1.0, 2.0), strict=True), 1):
            checkpoints.save(step, {"module": predictor, "step": jnp.asarray(step)}, {"place": step}, loss)
        assert (checkpoints.best(), checkpoints.latest()) == (2, 3)

    def query(predictor):
        return np.asarray(predictor.heads.query[...])

    np.testing.assert_array_equal(query(load_predictor(tmp_path, BASE)), query(predictors[1]))
    np.testing.assert_array_equal(query(load_predictor(tmp_path, BASE, step=3)), query(predictors[2]))


@pytest.mark.parametrize("moment", ["loss", "check", "facts", "restore_module"])
def test_a_training_may_remove_what_is_being_read(tmp_path, monkeypatch, moment):
    predictors = [random_predictor("producer", seed=seed) for seed in range(2)]
    with Checkpoints(tmp_path / "checkpoints", keep=5, about=about(predictors[0])) as checkpoints:
        for step, predictor in enumerate(predictors):
            checkpoints.save(step, {"module": predictor}, None, step)

    real = getattr(Checkpoints, moment)

    def remove_first(self, step, *more):
        shutil.rmtree(tmp_path / "checkpoints" / "0", ignore_errors=True)
        return real(self, step, *more)

    monkeypatch.setattr(Checkpoints, moment, remove_first)
    np.testing.assert_array_equal(load_predictor(tmp_path, BASE).heads.query[...], predictors[1].heads.query[...])


def test_a_step_that_is_not_there_is_named(tmp_path):
    save_predictor(tmp_path / "predictor", random_predictor("producer"), BASE)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7.*steps: 0"):
        load_predictor(tmp_path / "predictor", BASE, step=7)
    with pytest.raises(ValueError, match=r"step must be a whole number of at least 0, got 0\.0"):
        load_predictor(tmp_path / "predictor", BASE, step=0.0)


def test_places_of_processes_are_joined_and_have_to_agree():
    one = {"length": 8, "rows": {"0": {"next": 3, "left": [[1, 2]]}}, "streams": [{"rows": {"0": 1}}]}
    two = {"length": 8, "rows": {"1": {"next": 5, "left": []}}, "streams": [{"rows": {"1": 2}}]}
    both = {"length": 8, "rows": {**one["rows"], **two["rows"]}, "streams": [{"rows": {"0": 1, "1": 2}}]}
    assert joined([one, two]) == both and joined([both, both]) == both and joined([None, None]) is None
    with pytest.raises(ValueError, match="the processes read different data: length is 8 and 9; give all hosts"):
        joined([one, {**two, "length": 9}])


def test_state_and_place_in_the_data_come_back_exactly(tmp_path):
    predictor = random_predictor("lookahead")
    state = {"module": predictor, "moments": (jnp.asarray([1.5, -2.0]), jnp.asarray([3], jnp.int32))}
    with Checkpoints(tmp_path / "checkpoints", keep=2, about=about(predictor)) as checkpoints:
        checkpoints.save(4, state, {"place": [1, {"deep": "text"}]}, 1.0)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        empty = jax.tree.map(jnp.zeros_like, state)
        found, place = checkpoints.restore(4, empty)
        assert place == {**place, "place": [1, {"deep": "text"}]}
        jax.tree.map(np.testing.assert_array_equal, found, state)
        other = {"module": random_predictor("lookahead", rank=4), "moments": empty["moments"]}
        with pytest.raises(ValueError, match=r"does not fit: module\.heads\.key is \(3, 32, 8\) there and"):
            checkpoints.restore(4, other)


def test_the_paths_of_orbax_know_no_object_store_in_memory():
    """So a run cannot be written through fsspec's memory file system."""
    with pytest.raises(KeyError, match="memory://"):
        epath.Path("memory://runs/one")
