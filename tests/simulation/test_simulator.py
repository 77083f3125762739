"""Masked simulation, recall, perplexity, co-reference and report, against naive numpy forms on tiny models."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.evaluation import Report, answers, evaluate, measure_perplexity, text_windows
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.evaluation.tasks.perplexity import read_text, windows
from butler_jax.model.attention import document_starts
from butler_jax.model.decoder import forward
from butler_jax.policies import Scoring, make_policy
from butler_jax.predictors import PREDICTORS, make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.runs.settings import run_config
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import measure_recall, simulate
from butler_jax.simulation.chunks import spread
from butler_jax.training.config import TrainConfig
from butler_jax.weights import Base
from tests.tiny_models import BASE, SCORES, Letters, NaivePredictor, make_batch, make_model, naive, next_nll

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("policy", sorted(SCORES))
@pytest.mark.parametrize("sliding", [None, 20])
def test_simulation_equals_position_by_position_form(policy, sliding):
    model = make_model(dataclasses.replace(BASE, sliding_window=sliding))
    batch = make_batch([[37], [30]], 37)
    for budget in (0.5, 0.25):
        result = simulate(model, batch, make_policy(policy), SelectionConfig(budget=budget))
        for row, size in enumerate((37, 30)):
            tokens = batch["tokens"][row, :size]
            logits, _, _ = naive(model, tokens, SCORES[policy], budget, sliding=sliding)
            # float32 against float64 through three layers; a wrongly chosen key changes the first digits
            np.testing.assert_allclose(result.nll[row, : size - 1], next_nll(logits, tokens), atol=2e-4)
            np.testing.assert_array_equal(result.greedy[row, :size], logits.argmax(-1))


@pytest.mark.parametrize("kind", sorted(PREDICTORS))
def test_simulated_predictor_equals_position_by_position_form(kind):
    base = dataclasses.replace(BASE, layers=4)  # two producers, at layers 0 and 2
    model = make_model(base)
    predictor = make_predictor(base, PredictorConfig(kind=kind, rank=8, stride=2, hidden=24))
    if kind == "lookahead":  # any pairs, others for each head
        random = np.random.default_rng(2)
        pairs = [[np.sort(random.permutation(8)[:4]) for _ in range(2)] for _ in range(3)]
        predictor.heads.pairs[...] = jnp.asarray(pairs, jnp.int32)
    batch = make_batch([[37]], 37)
    result = simulate(model, batch, make_policy("tokenbutler"), SelectionConfig(budget=0.375), predictor)
    score = NaivePredictor(predictor, 37)
    score.scale = np.asarray(model.layers.attention_norm[...], np.float64)
    wanted, chosen, _ = naive(model, batch["tokens"][0], score, 0.375)
    # float32 against float64 through four layers; a wrongly chosen key changes the first digits
    np.testing.assert_allclose(result.nll[0, :36], next_nll(wanted, batch["tokens"][0]), atol=2e-4)
    recent = [{*range(min(4, t + 1)), *range(max(0, t - 7), t + 1)} for t in range(37)]
    assert any(set(own) != recent[t] for sets in chosen[1:] for (_, t), own in sets.items() if t > 32)


@pytest.mark.parametrize("kind", sorted(PREDICTORS))
def test_full_budget_equals_dense_pass(model, kind):
    predictor = make_predictor(BASE, PredictorConfig(kind=kind, rank=8, stride=2))
    batch = make_batch([[20, 80], [100], [128]], 128)
    result = simulate(model, batch, make_policy("tokenbutler"), SelectionConfig(budget=1.0), predictor)
    logits = jax.jit(forward)(model, **{k: jnp.asarray(v) for k, v in batch.items()})
    following = np.roll(batch["tokens"], -1, axis=1)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), following[..., None], axis=-1)[..., 0]
    same = (batch["segments"] > 0) & (np.roll(batch["segments"], -1, axis=1) == batch["segments"])
    same[:, -1] = False
    # the same float32 sums in another order
    np.testing.assert_allclose(result.nll, np.where(same, nll, 0), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(result.attended), 1.0)


@pytest.mark.parametrize("policy", ["oracle", "oracle_head", "random", "tokenbutler"])
def test_documents_and_padding_change_nothing(model, policy):
    predictor = make_predictor(BASE, PredictorConfig(kind="contextual", rank=8, stride=2))
    batch = make_batch([[50, 75], [50], [75]], 128)
    for row, first, size in ((1, 0, 50), (2, 50, 75)):
        batch["tokens"][row, :size] = batch["tokens"][0, first : first + size]
    result = simulate(model, batch, make_policy(policy), SelectionConfig(budget=0.25), predictor)
    for row, first, size in ((1, 0, 50), (2, 50, 75)):
        packed = result.nll[0, first : first + size - 1]
        # rows stand in other chunks: other order of float32 sums
        np.testing.assert_allclose(packed, result.nll[row, : size - 1], atol=2e-4)


@pytest.mark.parametrize("budget", [0.5, 0.125, 16])
def test_attended_fraction_is_the_budget(model, budget):
    batch = make_batch([[128], [1], [1]], 128)
    result = simulate(model, batch, make_policy("random"), SelectionConfig(budget=budget))
    counts = np.arange(1, 129)
    wanted = budget if isinstance(budget, int) else np.maximum(np.ceil(budget * counts), 12)
    wanted = np.minimum(wanted, counts)
    # float32 means of small fractions
    np.testing.assert_allclose(result.attended[0], wanted / counts, rtol=1e-5)


def test_recall_and_hit_rate_equal_sorted_form(model):
    batch = make_batch([[60]], 64)
    found = measure_recall(model, None, [batch], [make_policy("oracle"), make_policy("streaming")], [0.5, 0.25])
    for name, score in SCORES.items():
        for budget in (0.5, 0.25):
            # sets of the naive form at this budget, weights of the dense pass
            mass, hits = [], []
            _, _, dense = naive(model, batch["tokens"][0, :60], score, 1.0)
            for layer in (1, 2):
                for (head, t), true in dense[layer].items():
                    group = [dense[layer][h, t] for h in range(head // 2 * 2, head // 2 * 2 + 2)]
                    pooled = np.max([score(layer, 0, t, w) for w in group], axis=0)
                    n = min(max(ceil(budget * (t + 1)), 12), t + 1)
                    forced = {*range(max(0, t - 7), t + 1), *range(min(4, t + 1))}
                    rest = sorted(set(range(t + 1)) - forced, key=lambda j: (-pooled[j], j))
                    mass.append(true[[*forced, *rest[: n - len(forced)]]].sum())
                    if t >= 31:
                        half = (t + 1) // 2
                        own = score(layer, head, t, true)
                        tops = (set(np.argsort(-a, kind="stable")[:half]) for a in (true, own))
                        hits.append(len(set.intersection(*tops)) / half)
            # means of float32 weights
            assert found.mass[name][budget].value == pytest.approx(np.mean(mass), abs=2e-5)
        assert found.hit_rate[name].value == pytest.approx(np.mean(hits), abs=1e-5)
        assert found.by_head[name].mean() == pytest.approx(np.mean(hits), abs=1e-5)
        assert (found.mass[name][0.5].n, found.hit_rate[name].n) == (60, 29)


def test_oracle_recalls_most_and_random_hits_half(model):
    predictor = make_predictor(BASE, PredictorConfig(kind="lookahead", rank=8, stride=2))
    names = ["oracle_head", "oracle", "random", "tokenbutler"]
    budgets = [0.5, 0.125, 0.0625]
    batch = make_batch([[128], [128], [100]], 128)
    found = measure_recall(model, predictor, [batch], [make_policy(n) for n in names], budgets)
    for budget in budgets:
        mass = {n: found.mass[n][budget].value for n in names}
        assert mass["oracle_head"] >= mass["oracle"] - 1e-6
        assert mass["oracle_head"] >= max(mass.values()) - 1e-6
        assert mass["oracle"] >= max(mass["random"], mass["tokenbutler"])
        assert all(0 < found.attended[n][budget].value < 1 for n in names)
    assert found.hit_rate["oracle"].value == pytest.approx(1, abs=1e-6)
    assert found.spearman["oracle"].value == pytest.approx(1, abs=1e-6)
    # about 260 rows x 2 layers x 2 KV heads of 16 to 64 draws each: standard error below 0.002
    assert found.hit_rate["random"].value == pytest.approx(0.5, abs=0.01)
    assert found.spearman["random"].value == pytest.approx(0, abs=0.02)


def test_recall_of_some_rows_measures_only_those(model):
    batch = make_batch([[256]], 256)
    found = measure_recall(model, None, [batch], [make_policy("streaming")], [0.5], rows=128)
    assert found.mass["streaming"][0.5].n == 128
    assert spread(1000, None) == list(range(8)) and spread(1000, 300) == [2, 6] and spread(512, 1) == [2]


@pytest.mark.parametrize("rows", [None, 128])
def test_policies_that_evict_and_policies_that_score_are_measured_on_the_same_rows(model, rows):
    batch = make_batch([[300], [100, 120]], 300)
    found = measure_recall(model, None, [batch], [make_policy("streaming"), make_policy("h2o")], [0.5, 20], rows=rows)
    column = np.arange(300)
    own = np.stack([column + 1, np.where(column < 100, column + 1, column - 99)])  # keys a row may see
    taken = (batch["segments"] > 0) & ((column // 128 == 1) if rows else True)
    for budget in (0.5, 20):
        tokens = np.minimum(budget if budget == 20 else np.maximum(np.ceil(own / 2), 12), own)
        for policy in ("streaming", "h2o"):
            assert found.mass[policy][budget].n == taken.sum()
            # both fill their budget in every row; float32 means
            assert found.attended[policy][budget].value == pytest.approx((tokens / own)[taken].mean(), rel=1e-5)


def test_document_starts_are_first_columns():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    starts = document_starts(segments)
    np.testing.assert_array_equal(starts, [[0, 0, 2, 2, 2, 5, 5], [0, 1, 1, 1, 1, 1, 1]])


def test_windows_do_not_overlap_and_last_is_padded():
    batches = windows(range(25), context=10, batch_size=2)
    assert [b["tokens"].shape for b in batches] == [(2, 10), (2, 10)]
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in batches])[:3].ravel()[:25], range(25))
    assert batches[1]["segments"].sum() == 5


def test_text_is_tokenised_as_far_as_needed():
    text = "line of text\n" * 40_000
    batches = text_windows(Letters(), text, context=64, tokens=200, batch_size=4)
    assert sum(int(b["segments"].sum()) for b in batches) == 200
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        text_windows(Letters(), "", context=64, tokens=200, source="a.txt")


def test_perplexity_is_exp_of_mean_over_predicted_tokens(model):
    batches = windows(np.random.default_rng(1).integers(0, 61, 90), context=40)
    found = measure_perplexity(model, batches, make_policy("dense"), SelectionConfig(budget=1.0))
    nll = []
    for batch in batches:
        size = int(batch["segments"].sum())
        logits, _, _ = naive(model, batch["tokens"][0, :size], SCORES["oracle"], 1.0)
        nll.append(next_nll(logits, batch["tokens"][0, :size]))
    # float32 likelihoods against float64
    assert found.perplexity.value == pytest.approx(np.exp(np.concatenate(nll).mean()), rel=1e-4)
    assert found.perplexity.n == sum(map(len, nll)) and found.mean("attended").value == 1


def test_answers_count_tokens_and_whole_samples(model):
    batch = make_batch([[40], [33], []], 48)
    greedy = np.asarray(simulate(model, batch, make_policy("dense"), SelectionConfig(budget=1.0)).greedy)
    asked = np.zeros((3, 48), bool)
    asked[0, 37:40] = asked[1, 30:33] = True
    batch["asked"] = asked
    batch["tokens"][0, 39] = greedy[0, 38]  # the last token of a row changes no prediction before it
    found = answers(Passes(model), [batch], make_policy("dense"), SelectionConfig(budget=1.0))
    right = [int(greedy[r, i - 1] == batch["tokens"][r, i]) for r in (0, 1) for i in np.flatnonzero(asked[r])]
    assert found.token_inaccuracy.value == pytest.approx(1 - sum(right) / 6) and right[2] == 1
    assert found.miss_rate.value == 1 - found.accuracy.value == 1 - (all(right[:3]) + all(right[3:])) / 2
    assert (found.token_inaccuracy.n, found.miss_rate.n) == (6, 2) and found.share_read == 1
    np.testing.assert_array_equal(found.of(np.asarray([1])).right, [sum(right[3:])])


def test_evaluation_yields_every_row_and_writes_report(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    base = Base("letters", model, Letters(), "f")
    predictor = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    config = EvalConfig(
        tasks="perplexity,attention", text=text, tokens=1000, context=128, budgets="1/2,32", batch_size=3,
        policies="dense,random,tokenbutler",
    )  # fmt: skip
    lines = []
    report = evaluate(base, predictor, config, say=lines.append)
    assert any("360 tokens, fewer than the 1,000" in line for line in lines)
    alone = ("perplexity", "effective_sparsity", "bytes_read")
    compared = ("bytes_of_dense", "over_dense", "js_divergence", "top1_agreement", "recalled_mass")
    wanted = {(metric, "dense", 1) for metric in alone}
    for policy in ("random", "tokenbutler"):
        wanted |= {(metric, policy, b) for metric in (*alone, *compared) for b in (0.5, 32)}
        wanted |= {(metric, policy, None) for metric in ("hit_rate", "spearman")}
    assert {(r["metric"], r["policy"], r["budget"]) for r in report.rows} == wanted
    assert all(r["n"] > 0 and r["error"] > 0 for r in report.rows if r["policy"] == "random")
    nothing_chosen = {r["metric"] for r in report.rows if r["attended"] is None}
    assert nothing_chosen == {"hit_rate", "spearman"}
    saved = json.loads(report.save(tmp_path / "out").read_text())
    assert saved["rows"] == report.rows and saved["predictors"]["tokenbutler"]["kind"] == "lookahead"
    assert np.shape(saved["arrays"]["hit_rate"]["tokenbutler"]) == (BASE.layers - 1, BASE.heads)
    assert report.value("perplexity", "dense") == saved["rows"][0]["value"]
    report.print()
    assert "tokenbutler" in capsys.readouterr().out


def test_bad_input_is_a_clear_error(model, tmp_path):
    base = Base("letters", model, Letters(), "f")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match="is empty"):
        evaluate(base, config=EvalConfig(tasks="perplexity", policies="dense", text=empty, context=64))
    with pytest.raises(FileNotFoundError, match="no such text file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="beyond the model's context of 512"):
        evaluate(base, config=EvalConfig(tasks="perplexity", context=1024))
    with pytest.raises(ValueError, match="unknown policy 'best'"):
        evaluate(base, config=EvalConfig(policies="best"))
    with pytest.raises(ValueError, match="unknown task chess"):
        EvalConfig(tasks="chess")
    with pytest.raises(ValueError, match="budget 'half' is not a number"):
        EvalConfig(budgets="half")
    with pytest.raises(ValueError, match="at most 1"):
        EvalConfig(budgets="3/2")
    with pytest.raises(ValueError, match="the policy tokenbutler needs a trained predictor; give --run RUN"):
        evaluate(base, config=EvalConfig(policies="dense,tokenbutler", context=64))
    with pytest.raises(ValueError, match="--policies names nothing"):
        EvalConfig(policies="")
    with pytest.raises(ValueError, match="needs a trained predictor"):
        simulate(model, make_batch([[8]], 8), make_policy("tokenbutler"), SelectionConfig(budget=0.5))
    with pytest.raises(KeyError, match="no row"):
        Report().value("perplexity", "dense")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run directory: it has no config.json; give the directory of a run of butler-jax train"),
        ('{"steps": ', r"config\.json is not valid JSON"),
        ('{"steps": 5}', r"config\.json names no base: .* is no run that trained a predictor"),
    ],
)
def test_a_directory_that_is_no_run_is_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_config(tmp_path)


@dataclass(frozen=True, kw_only=True)
class Norm(Scoring):
    """Keys of small (sign = -1) or large (sign = 1) norm are read first."""

    name = "norm"
    sign: int = 1

    def scores(self, chunk):
        norms = self.sign * jnp.linalg.norm(chunk.k.astype(jnp.float32), axis=-1)[:, :, None, None]
        return jnp.broadcast_to(norms, (*norms.shape[:3], chunk.q.shape[3], norms.shape[-1]))


def test_policies_of_ones_own_are_judged_beside_those_with_names(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    base, settings = Base("letters", model, Letters(), "f"), dict(text=text, tokens=128, context=128, budgets="1/2")
    own = [Norm(), Norm(sign=-1)]
    found = EvalConfig(tasks="perplexity", policies=("dense,oracle", *own), **settings)
    report = evaluate(base, config=found, keep=tmp_path / "out")
    labels = ["dense", "oracle", "norm:sign=1", "norm:sign=-1"]
    assert [*dict.fromkeys(r["policy"] for r in report.rows)] == labels
    (batch,) = text_windows(base.tokenizer, text.read_text(), context=128, tokens=128, batch_size=1)
    for policy, label in zip(own, labels[2:], strict=True):
        wanted = measure_perplexity(model, [batch], policy, SelectionConfig(budget=0.5)).perplexity.value
        assert report.value("perplexity", label, 0.5) == pytest.approx(wanted, rel=1e-5)
    about = json.loads(json.dumps(report.about))
    assert about["config"]["policies"] == ["dense", "oracle", "norm", "norm"]
    assert about["policies"][2:] == [{"name": "norm", "sign": 1}, {"name": "norm", "sign": -1}]
    alone = evaluate(base, config=EvalConfig(tasks="attention", policies=Norm(), **settings))
    assert {r["policy"] for r in alone.rows} == {"norm"}
    for policies, message in (
        (("oracle", make_policy("oracle")), "two policies are called oracle; give them names of their own"),
        ((Norm,), "is neither a policy nor a name of one; make it one"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(base, config=EvalConfig(tasks="perplexity", policies=policies, **settings))


def test_without_a_predictor_the_default_policies_do_without_tokenbutler(model, tmp_path):
    text, said = tmp_path / "text.txt", []
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2)
    config = EvalConfig(tasks="perplexity", text=text, tokens=64, context=64, budgets="1/2")
    report = evaluate(Base("letters", model, Letters(), "f"), config=config, say=said.append)
    assert said[0] == "tokenbutler is left out: there is no trained predictor (give a run)"
    names = ["dense", "oracle", "random", "streaming"]
    assert [*dict.fromkeys(r["policy"] for r in report.rows)] == report.about["config"]["policies"] == names


def test_a_base_without_tokenizer_is_told(model):
    base = Base("mute", model, None, "f")
    with pytest.raises(ValueError, match="the base mute has no tokenizer: its directory lacks"):
        evaluate(base, None, EvalConfig(policies=("streaming",), tasks=("perplexity",)))


def test_a_bucket_stays_a_bucket():
    assert EvalConfig(data_dir="gs://bucket/data").data_dir == TrainConfig(data_dir="gs://bucket/data").data_dir
    assert EvalConfig(data_dir=Path("/data")).data_dir == "/data"
