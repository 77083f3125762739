"""Simulation, recall, calibration and whole evaluations on the eight devices of a mesh against one."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import jax
import pytest

from butler_jax.evaluation.evaluator import evaluate
from butler_jax.policies import POLICIES
from tests import tiny_evaluations, tiny_runs
from tests.host_devices import run_on_devices
from tests.marked import long
from tests.tiny_models import make_model

PASSES = """
import dataclasses, json, sys
import jax
import numpy as np
jax.config.update("jax_numpy_rank_promotion", "raise")
sys.path.insert(0, sys.argv[1])
from butler_jax import PredictorConfig, SelectionConfig, load_base
from butler_jax.model import place_model
from butler_jax.parallel import EVALUATION_RULES, make_mesh, on_host, place
from butler_jax.policies import Evicting, make_policy
from butler_jax.predictors import make_predictor
from butler_jax.simulation import calibrate_tolerance, measure_recall, simulate

length, names, meshes, whats = json.loads(sys.argv[3])
base = load_base(sys.argv[2])
predictor = make_predictor(base.config, PredictorConfig(rank=4, stride=2, hidden=16, target="attention"))
rng, shape = np.random.default_rng(0), (8, length)
segments, columns = np.ones(shape, np.int32), np.arange(length, dtype=np.int32)
segments[1, length // 2 :], segments[2, -10:] = 2, 0
positions = np.where(segments == 2, columns - length // 2, columns).astype(np.int32)
batch = {"tokens": rng.integers(5, 250, shape).astype(np.int32), "segments": segments, "positions": positions}
selection = SelectionConfig(budget=max(length // 8, 8), sinks=2, recent=3)
found = {}
for text in ("data=1", *meshes):
    mesh = make_mesh(text)
    with jax.set_mesh(mesh):
        model = place_model(base.model, mesh, EVALUATION_RULES)
        own = place(predictor, predictor.logical_axes, mesh, EVALUATION_RULES)
        policies = [make_policy(name).row_by_row() for name in names]
        policies = [p.prepare(model, [batch]) for p in policies]
        here = found.setdefault(text, {})
        for policy in policies if "simulate" in whats else ():
            tail = 0 if isinstance(policy, Evicting) else 8
            made = simulate(model, batch, policy, dataclasses.replace(selection, tail=tail), own)
            arrays = (made.nll, made.attended, made.read, made.shares, made.stream)
            here[policy.name] = [on_host(a).astype(float).ravel()[:: max(a.size // 999, 1)].tolist() for a in arrays]
            if mesh.size > 1:
                parts = made.stream.sharding.shard_shape(made.stream.shape)
                assert parts == (8 // mesh.shape["data"], length // mesh.shape["sequence"], 64), parts
        if "recall" in whats:
            made = measure_recall(model, own, [batch], policies, (0.25, 9), selection=selection)
            here["mass"] = [e.value for table in made.mass.values() for e in table.values()]
            here["hit rate"] = [e.value for e in made.hit_rate.values()]
            here["rank"] = [e.value for e in made.spearman.values()]
        if "calibrate" in whats:
            made = calibrate_tolerance(model, own, [batch], SelectionConfig(budget=1.0), [0.5], corrections=0)
            here["tolerance"] = [one.tolerance for one in made]
print(json.dumps(found))
"""


def on_eight_devices(script: str, *arguments: str) -> dict:
    """What a script prints as its last line, in a process of eight devices."""
    return json.loads(run_on_devices(8, script, *arguments, optimised=False).splitlines()[-1])


def assert_as_on_one(found: dict) -> None:
    """Sums over devices come in another order. A choice would differ only where two scores are that close."""
    alone = found.pop("data=1")
    for mesh, passes in found.items():
        assert passes.keys() == alone.keys()
        for name, numbers in passes.items():
            for own, other in zip(jax.tree.leaves(numbers), jax.tree.leaves(alone[name]), strict=True):
                assert own == pytest.approx(other, abs=2e-5, rel=1e-5), (mesh, name)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_runs.make_base(tmp_path_factory.mktemp("base"), context=256)


def test_meshes_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    base, predictor, config = tiny_evaluations.make_perplexity_evaluation(make_model(), tmp_path)
    with pytest.raises(ValueError, match=r"mesh 'data=99' needs 99 devices, .* choose sizes whose product is at most"):
        evaluate(base, predictor, dataclasses.replace(config, mesh="data=99"))
    mesh = types.SimpleNamespace(shape={"data": 2, "model": 1})
    monkeypatch.setattr("butler_jax.evaluation.evaluator.make_mesh", lambda text: mesh)
    with pytest.raises(
        ValueError, match=r"--batch-size 3 is not divisible by the mesh's data axis \(2\); use a multiple"
    ):
        evaluate(base, predictor, dataclasses.replace(config, mesh="data=2"))


@pytest.mark.slow
def test_a_pass_on_a_mesh_reads_and_predicts_as_on_one_device(base):
    """Two chunks of rows, whose keys lie in two bands."""
    case = [256, ["tokenbutler"], ["data=2,model=2,sequence=2"], ["simulate"]]
    assert_as_on_one(on_eight_devices(PASSES, str(base), json.dumps(case)))


SEVERAL = {
    "data=8": ["dense", "oracle_head", "h2o", "random"],
    "data=2,model=4": ["oracle", "quest:page=2", "snapkv", "streaming"],
    "data=2,model=2,sequence=2": ["oracle_residual", "lowrank", "citrus"],
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [mesh if "sequence" in mesh else long(mesh) for mesh in SEVERAL])
def test_every_policy_on_a_mesh_reads_and_predicts_as_on_one_device(base, mesh):
    assert {name.split(":")[0] for names in SEVERAL.values() for name in names} == {*POLICIES} - {"tokenbutler"}
    assert_as_on_one(on_eight_devices(PASSES, str(base), json.dumps([32, SEVERAL[mesh], [mesh], ["simulate"]])))


@pytest.mark.slow
def test_recall_and_calibration_on_a_mesh_are_those_of_one_device(base):
    case = [64, ["oracle", "tokenbutler", "h2o"], ["data=2,model=2,sequence=2"], ["recall", "calibrate"]]
    assert_as_on_one(on_eight_devices(PASSES, str(base), json.dumps(case)))


EVALUATE = """
import dataclasses, json, sys
from pathlib import Path
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
sys.path.insert(0, sys.argv[1])
from butler_jax import PredictorConfig, load_base
from butler_jax.evaluation import evaluate
from butler_jax.predictors import make_predictor
from tests import tiny_evaluations

base = load_base("tiny")
predictor = make_predictor(base.config, PredictorConfig(rank=8, stride=2))
config = tiny_evaluations.make_perplexity_evaluation(None, Path(sys.argv[2]))[2]
tasks = ("perplexity", "attention", "coreference", "needle", "key_value", "variables")
changes = dict(batch_size=2, tokens=200, policies=("tokenbutler",), budgets=(0.5,), tasks=tasks)
changes |= dict(samples=2, lengths=(256,), depths=(0.5,), needles=2)
found = {}
for mesh in ("", "data=2,model=2,sequence=2"):
    report = evaluate(base, predictor, dataclasses.replace(config, **changes, mesh=mesh))
    rows = [[row["value"], row["error"] or 0.0, row["attended"] or 0.0] for row in report.rows]
    assert {row["task"] for row in report.rows} == {*tasks}
    found[mesh or "data=1"] = {"rows": rows}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_an_evaluation_on_a_mesh_measures_what_one_device_measures(tmp_path):
    assert_as_on_one(on_eight_devices(EVALUATE, str(tmp_path)))
