"""Recalled mass, hit rate and rank correlation against sorted forms in numpy."""

from __future__ import annotations

import dataclasses
from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.evaluation.tasks.perplexity import measure_perplexity
from butler_jax.model import dense_mixer, embed, run_layers
from butler_jax.policies import Scoring, make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection import SelectionConfig, limits_of
from butler_jax.simulation import measure_recall, simulate
from butler_jax.simulation.chunks import spread
from butler_jax.simulation.eviction import evicting_attention
from butler_jax.simulation.recall import correlate_ranks, mean_ranks
from butler_jax.weights import Base
from tests.marked import long, slow
from tests.tiny_models import BASE, SCORES, make_batch, make_model, naive


@pytest.fixture(scope="module")
def model():
    return make_model()


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
                    if t in (31, 47):  # every sixteenth row
                        half = (t + 1) // 2
                        own = score(layer, head, t, true)
                        tops = (set(np.argsort(-a, kind="stable")[:half]) for a in (true, own))
                        hits.append(len(set.intersection(*tops)) / half)
            # means of float32 weights
            assert found.mass[name][budget].value == pytest.approx(np.mean(mass), abs=2e-5)
        assert found.hit_rate[name].value == pytest.approx(np.mean(hits), abs=1e-5)
        assert found.by_head[name].mean() == pytest.approx(np.mean(hits), abs=1e-5)
        assert (found.mass[name][0.5].n, found.hit_rate[name].n) == (60, 2)


def test_a_policy_that_reads_everything_recalls_everything(model):
    found = measure_recall(model, None, [make_batch([[40]], 64)], [make_policy("dense")], [0.25])
    assert found.mass["dense"][0.25].value == pytest.approx(1.0, abs=1e-5)


def test_what_cannot_be_told_apart_or_kept_is_refused(model):
    pages = [make_policy("quest", page=8), make_policy("quest", page=16)]
    with pytest.raises(ValueError, match="two policies have the name quest, by which results are told apart"):
        measure_recall(model, None, [make_batch([[40]], 64)], pages, [0.5])
    batch, oracle = make_batch([[40]], 64), make_policy("oracle")
    for settings in (dict(threshold=((0.0,) * 2,) * 3), dict(allocation="top_p", tolerance=0.1)):
        with pytest.raises(ValueError, match="recall is measured under budgets: leave out thresholds, tol"):
            measure_recall(model, None, [batch], [oracle], [0.5], selection=SelectionConfig(**settings))
    with pytest.raises(ValueError, match="score_dtype must be 'int8' or None, got 'int4'"):
        simulate(model, make_batch([[40]], 64), make_policy("oracle"), SelectionConfig(), score_dtype="int4")


@pytest.mark.slow
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
    # 16 rows x 2 layers x 2 KV heads of 16 to 64 draws each: standard error below 0.01
    assert found.hit_rate["random"].value == pytest.approx(0.5, abs=0.03)
    assert found.spearman["random"].value == pytest.approx(0, abs=0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equal(Scoring):
    """Every key is worth the same."""

    name = "equal"

    def scores(self, chunk):
        return jnp.zeros_like(chunk.logits)


def test_choices_that_ties_settle_are_counted(model):
    """Of n keys ceil(n / 2) are chosen; 4 sinks and 8 recent ones are among them whatever their score."""
    batch = make_batch([[60]], 64)
    found = measure_recall(model, None, [batch], [Equal(), make_policy("oracle")], [0.5], ranks=False)
    chosen = [ceil(n / 2) for n in range(1, 61)]
    wanted = np.mean([max(c - 12, 0) / c for c in chosen])
    assert found.tied["equal"][0.5].value == pytest.approx(wanted, abs=1e-5)
    assert found.tied["oracle"][0.5].value == 0


def test_recall_of_some_rows_measures_only_those(model):
    batch = make_batch([[256]], 256)
    found = measure_recall(model, None, [batch], [make_policy("streaming")], [0.5], rows=128)
    assert found.mass["streaming"][0.5].n == 128
    assert spread(1000, None) == list(range(8)) and spread(1000, 300) == [2, 6] and spread(512, 1) == [2]
    assert spread(1024, 256, 600) == [5, 7] and spread(1024, 512, 900) == [7] and spread(1024, 1, 2000) == [7]


@pytest.mark.slow
def test_rows_of_a_prompt_do_not_count(model):
    """The sums over all rows are those over the rows of a prompt and those after it."""
    name = "streaming"
    batch, policies = make_batch([[96]], 96), [make_policy(name)]
    short = {key: array[:, :40] for key, array in batch.items()}
    whole, prompt = (measure_recall(model, None, [b], policies, [0.5], ranks=False) for b in (batch, short))
    after = measure_recall(model, None, [batch], policies, [0.5], ranks=False, prompt_tokens=40)
    masses = [found.mass[name][0.5] for found in (whole, prompt, after)]
    assert [mass.n for mass in masses] == [96, 40, 56]
    assert 96 * masses[0].value == pytest.approx(40 * masses[1].value + 56 * masses[2].value, rel=1e-5)
    with pytest.raises(ValueError, match="no row is left after prompts of 96 tokens"):
        measure_recall(model, None, [batch], policies, [0.5], ranks=False, prompt_tokens=96)


def test_a_policy_that_evicts_keeps_the_prompt(model):
    batch, policy, selection = make_batch([[96]], 96), make_policy("h2o"), SelectionConfig(budget=0.5)
    found = measure_recall(model, None, [batch], [policy], [0.5], prompt_tokens=40).mass["h2o"][0.5]
    limits = limits_of(selection, model.config, 96, model.config.kv_heads)._replace(prompts=jnp.asarray([40]))
    dense = dense_mixer(model.config, batch["segments"])

    def mixer(state, view):
        evicted = evicting_attention(view, batch["segments"], None, policy, limits, selection.rule, mass=True)
        return dense(None, view)[0], state, evicted.mass

    *_, masses = run_layers(model, embed(model, batch["tokens"]), batch["positions"], mixer, None)
    assert found.value == pytest.approx(float(masses[1:, 0, 40:].mean()), rel=1e-5) and found.n == 56


@pytest.mark.slow
def test_after_the_prompt_of_each_document_rows_choose_anew_under_an_interval(model):
    batch, streaming = make_batch([[37, 53]], 96), make_policy("streaming")
    selection = SelectionConfig(budget=0.5, interval=16)
    found = measure_recall(model, None, [batch], [streaming], [0.5], selection=selection, prompt_tokens=16)
    found = found.attended["streaming"][0.5].value
    read = np.asarray(simulate(model, batch, streaming, selection, prompts=np.asarray([16], np.int32)).attended)
    assert found == pytest.approx(read[(batch["segments"] > 0) & (batch["positions"] >= 16)].mean(), rel=1e-6)


@pytest.mark.parametrize("rows", [long(None), slow(128)])
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


def naive_ranks(values):
    return np.asarray([(np.sum(values < v) + np.sum(values <= v) + 1) / 2 for v in values])


def test_rank_correlation_is_pearsons_of_mean_ranks():
    random = np.random.default_rng(2)
    true, scores = random.normal(size=(1, 1, 2, 3, 40)), random.integers(0, 6, (1, 1, 2, 3, 40)).astype(float)
    scores[0, 0, 1, 2] = 1.0  # all equal
    allowed = np.arange(40)[None, None] <= np.asarray([7, 20, 39])[None, :, None]
    mask = jnp.asarray(allowed)
    (found,) = correlate_ranks([jnp.asarray(scores)], jnp.asarray(true), mask)
    found = np.asarray(found)
    for g, c in np.ndindex(2, 3):
        a, b = (naive_ranks(x[0, 0, g, c][allowed[0, c]]) for x in (true, scores))
        wanted = 0.0 if b.std() == 0 else np.corrcoef(a, b)[0, 1]
        assert found[0, 0, g, c] == pytest.approx(wanted, abs=1e-5)
    ordered = np.sort(random.integers(0, 6, (3, 40)), axis=1).astype(np.int32)
    ranks = np.asarray(mean_ranks(jnp.asarray(ordered)))
    np.testing.assert_array_equal(ranks, [naive_ranks(row) for row in ordered])


@pytest.mark.slow
def test_a_policy_of_pages_reads_what_it_reads_in_the_simulation(model):
    """Sinks and recent tokens take whole pages, which a small budget of single tokens would not cover."""
    batch, policy = make_batch([[64], [50]], 64), make_policy("quest", page=16)
    found = measure_recall(model, None, [batch], [make_policy("streaming"), policy], [1 / 16, 0.5]).attended["quest"]
    for budget, attended in found.items():
        simulated = simulate(model, batch, policy, SelectionConfig(budget=budget)).attended
        np.testing.assert_allclose(attended.value, np.mean(np.asarray(simulated)[batch["segments"] > 0]), rtol=1e-6)


def test_what_stands_in_the_place_of_a_list_or_a_model_is_refused(model):
    batch, oracle = make_batch([[40]], 40), make_policy("oracle")
    base = Base("tiny", model, None, "f" * 16)
    for call, message in (
        (lambda: measure_recall(model, None, batch, [oracle], [0.5]), r"batches must be a list of batches such as"),
        (lambda: measure_recall(base, None, [batch], [oracle], [0.5]), "give base.model"),
        (lambda: simulate(base, batch, oracle, SelectionConfig()), "give base.model"),
        (lambda: simulate(model, batch, oracle, SelectionConfig(), prompts=8), "one number for each of the 1 rows"),
        (lambda: measure_perplexity(model, [], oracle, SelectionConfig()), "give at least one batch"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_interval_that_chunks_cannot_hold_is_refused(model):
    batch = make_batch([[40]], 40)
    for measure in (
        lambda chosen: measure_recall(model, None, [batch], [make_policy("oracle")], [0.5], selection=chosen),
        lambda chosen: simulate(model, batch, make_policy("oracle"), chosen),
    ):
        with pytest.raises(ValueError, match=r"chooses every 1, 2, 4, ... 128 rows; the interval is 3"):
            measure(SelectionConfig(interval=3))


@pytest.mark.slow
def test_layers_that_are_not_served_do_not_count():
    base = dataclasses.replace(BASE, layers=5, sliding_window=40, sliding_layers=(True, False, True, False, True))
    model, batch = make_model(base), make_batch([[100]], 128)
    policies = [make_policy("streaming"), make_policy("h2o")]
    found = measure_recall(model, None, [batch], policies, [0.25])
    count = np.arange(1, 101)
    read = np.minimum(np.maximum(-(-count // 4), 12), count) / count  # of everything: no window limits these layers
    for policy in policies:
        assert found.attended[policy.name][0.25].value == pytest.approx(read.mean())
        sums = simulate(model, batch, policy, SelectionConfig(budget=0.25))
        assert float(sums.attended[0, :100].mean()) == pytest.approx(read.mean())
    assert np.isnan(found.by_head["streaming"]).all(axis=1).tolist() == [False, True, False, True]
    assert found.hit_rate["streaming"].value == pytest.approx(np.nanmean(found.by_head["streaming"]))
