"""The script that plans pods, on steps of a few layers that the TPU's own compiler compiles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import pods
from benchmarks.pods import PodPlan
from tests.marked import long

REPOSITORY = Path(__file__).parent.parent.parent
NO_COMPILER = 'libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler'


def test_a_plan_says_what_is_wrong_with_it():
    for wrong, message in (
        ({"model": "llama"}, "unknown model 'llama'; choose llama-3.1-8b, llama-3.1-70b"),
        ({"topology": "v9:2x2"}, "unknown chip 'v9'; choose v5e, v5p, v6e"),
        ({"step": "serve"}, "--step is train, decode, simulate, recall or calibrate, got 'serve'"),
        ({"mesh": "rows=4"}, "unknown axis 'rows'"),
    ):
        with pytest.raises(ValueError, match=message):
            PodPlan(**wrong)
    assert PodPlan(mesh="data=32,model=8").batch_size == 32  # a row for every chip of the data axis


@pytest.mark.parametrize(("target", "products"), [("attention", 14), ("centred", 13)])
def test_work_is_what_a_transformer_does(target, products):
    """Against the usual counts: 2 operations a parameter and token, 4 H D a pair of tokens."""
    plans = (PodPlan(mesh="data=64", length=length, target=target) for length in (1024, 2048))
    short, long = (pods.work_of(plan, 0).flops for plan in plans)
    layers = 6_979_584_000  # parameters of the matrices of Llama-3.1-8B's layers
    # attention is 14 or 13 products where a forward pass has 2; of the rest 2 % is the predictor's
    attention = 32 * products * 1024**2 * 32 * 128
    assert short - attention == pytest.approx(2 * 1024 * layers, rel=0.03)
    assert long - 4 * attention == pytest.approx(2 * (short - attention))
    decode = PodPlan(mesh="model=8", step="decode", length=32768, batch_size=8)
    read = pods.work_of(decode, 100e9)
    cache = 2 * 32 * 8 * 8 * 32768 * 128 * 2 / 8  # bytes of keys and values on a chip
    assert read.memory == pytest.approx(100e9 - cache * (1 - (1 + 31 / 16) / 32))
    assert read.flops * 8 == pytest.approx(2 * 8 * 7.5e9, rel=0.3)  # and as much again for scores and attention at 32K


def test_the_table_of_the_docs_is_what_was_compiled():
    written = json.loads((REPOSITORY / "benchmarks/pods.json").read_text())
    assert [PodPlan(**step["plan"]) for step in written["steps"]] == pods.TABLE
    assert not any(step.get("whole_arguments") for step in written["steps"])  # nothing that grows is on every chip
    page = (REPOSITORY / "docs/guides/scaling.md").read_text()
    for kind in ("train", "decode"):
        assert "\n".join(pods.markdown(written, kind)) in page
    assert "\n".join(pods.evaluation_markdown(written)) in page


# the layer's own attention; and the two that make the loss and one gradient of each of those, or the loss of errors
CALLS = {
    "attention": ["splash_mha_dkv", "splash_mha_dkv", "splash_mha_fwd", "splash_mha_fwd", "splash_mha_fwd"],
    "centred": ["error_key_gradients", "splash_mha_fwd", "sum_error_rows"],
}


@pytest.mark.slow
@pytest.mark.parametrize("target", [target if target == "centred" else long(target) for target in CALLS])
def test_a_training_step_keeps_nothing_whole_that_grows_with_the_model(target, capsys):
    pytest.importorskip("libtpu", reason=NO_COMPILER)
    plan = PodPlan(topology="v5e:2x4", mesh="data=4,model=2", length=256, layers=6, target=target)
    report, compiled = pods.compile_plan(plan)
    with capsys.disabled():
        print("\n" + pods.line_of(report))
    kernels = "splash_mha_dkv|splash_mha_fwd|sum_error_rows|error_key_gradients"
    calls = re.findall(rf"%\w*?({kernels})\w*?[\d.]* = \S.* custom-call\(", compiled.as_text())
    assert sorted(calls) == CALLS[target]  # each once
    assert not report["whole_arguments"]
    parameters = 2 * (6 * 218_112_000 + 2 * 128256 * 4096)  # bytes of six layers and two tables
    # a chip holds its eighth of the model, but for the unembedding, which is not read, and the predictor in float32
    assert report["argument_bytes"] < parameters / 8 + 12 * 5 * 2_113_536 / 8 * 1.1
    assert report["temporary_bytes"] < 1.5 * report["layer_bytes"]  # activations of 256 tokens are small
    assert report["largest_stack_bytes"] == 6 * 4096 * 14336 * 2 // 8  # no weight is gathered for all layers
    assert report["collectives"]["all-gather"]["bytes"] < 6 * report["layer_bytes"]


@pytest.mark.slow
def test_a_decode_step_moves_a_few_numbers_and_no_weights(capsys):
    pytest.importorskip("libtpu", reason=NO_COMPILER)
    plan = PodPlan(topology="v5e:2x4", mesh="data=4,model=2", step="decode", length=8192, batch_size=16, layers=6)
    report, compiled = pods.compile_plan(plan)
    with capsys.disabled():
        print("\n" + pods.line_of(report))
    for kernel in ("importance_scores", "select_top_k", "attend_to_pages"):
        assert f"%{kernel}" in compiled.as_text(), f"{kernel} is not in the program"
    assert not report["whole_arguments"]
    cache = 2 * 6 * 16 * 8 * 8192 * 128 * 2 / 8
    assert report["temporary_bytes"] < cache / 16  # four rows on a chip, and no cache is written anew
    assert sum(kind["bytes"] for kind in report["collectives"].values()) < report["layer_bytes"] / 4
    logits = 16 * 128256 * 4 / 8
    assert report["output_bytes_besides"] < 1.1 * logits  # they come split as rows and vocabulary are


@pytest.mark.slow
@pytest.mark.parametrize("step", ["simulate", long("recall"), long("calibrate")])
def test_a_pass_of_an_evaluation_gathers_one_layer_at_a_time(step, capsys):
    pytest.importorskip("libtpu", reason=NO_COMPILER)
    how = dict(topology="v5e:2x4", mesh="data=2,model=2,sequence=2", length=512, batch_size=2, layers=3)
    report, _ = pods.compile_plan(PodPlan(step=step, **how))
    with capsys.disabled():
        print("\n" + pods.line_of(report))
    assert not report["whole_arguments"]
    layer, table = 2 * 218_112_000, 2 * 128256 * 4096  # bytes; a chip gathers half of each, split over model
    gathered = (layer + table if step == "simulate" else layer) / 2
    assert report["temporary_bytes"] < 2 * gathered
    assert report["collectives"]["all-gather"]["bytes"] < 2 * (3 * layer + (table if step == "simulate" else 0))


@pytest.mark.slow
def test_every_factorisation_of_a_slice_is_a_mesh_and_hosts_know_their_rows():
    pytest.importorskip("libtpu", reason=NO_COMPILER)
    from butler_jax.parallel.mesh import rows_here

    # A host has 2 x 2 chips. model=2 stays inside hosts, 4 reaches over two of them, 8 over four in a row or, on a side
    # of four chips, over two: those feed the same rows.
    known = {"v5p:4x4x4": (64, {1: 16, 2: 16, 4: 8, 8: 8}), "v6e:16x16": (256, {1: 64, 2: 64, 4: 32, 8: 16})}
    for topology, (chips, shares) in known.items():
        for model, count in shares.items():
            mesh = pods.mesh_of(PodPlan(topology=topology, mesh=f"data={chips // model},model={model}"))
            shape = {"data": chips // model, "model": model, "sequence": 1, "expert": 1}
            assert dict(mesh.shape) == shape
            found = {tuple(rows_here(256, mesh, host)) for host in range(chips // 4)}
            assert len(found) == count and sorted(row for rows in found for row in rows) == list(range(256))
