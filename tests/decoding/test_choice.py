"""Decoding step t reads row t of the simulation's mask, in every row of a ragged batch."""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kvpress_forms import dense_prompt
from butler_jax.decoding import eviction
from butler_jax.decoding.prefill_pass import prefill
from butler_jax.decoding.step import decode_step
from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, logits
from butler_jax.policies import make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.budget import budget_table, limits_of
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import eviction as simulated
from tests.marked import long, slow

simulation = importlib.import_module("butler_jax.simulation.simulator")
choosing = importlib.import_module("butler_jax.simulation.choice")

BASE = BaseConfig(
    family="llama", vocab_size=61, width=32, hidden=48, layers=4, heads=4, kv_heads=2, head_dim=16, context=64
)
pytestmark = pytest.mark.usefixtures("few_optimisations")

SLIDING = dict(sliding_window=20, sliding_layers=(True, False, True, False))  # half of the layers see everything
ALL_SLIDING = dict(sliding_window=20)
TOTAL = 60
PROMPTS = np.asarray([1, 5, 3])  # at most sinks + recent, so that the simulation reads all of them too


def make_model(**changes) -> BaseModel:
    model = BaseModel(dataclasses.replace(BASE, **changes), jax.random.key(0))
    model.layers.q[...] = model.layers.q[...] * 4  # sharper: it matters which keys are read
    if model.layers.sinks is not None:
        model.layers.sinks[...] = jax.random.normal(jax.random.key(1), model.layers.sinks.shape) * 2
    return model


def rows_of() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 61, (len(PROMPTS), TOTAL)).astype(np.int32)


def text_of(rows: int) -> dict[str, np.ndarray]:
    """Some rows as the simulation takes them."""
    tokens = rows_of()[:rows]
    positions = np.broadcast_to(np.arange(TOTAL, dtype=np.int32)[None], tokens.shape)
    return {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}


def decoded_sets(model, predictor, policy, selection, steps=None, prompts=PROMPTS, **options):
    """{(row, position): sets [L, heads, S]} and the counts the step reports, of teacher-forced decoding."""
    tokens = jnp.asarray(rows_of())

    @jax.jit
    def run(tokens):
        _, state = prefill(
            model,
            tokens[:, : prompts.max()],
            prompts,
            capacity=TOTAL,
            predictor=predictor,
            selection=selection,
            policy=policy,
        )

        def step(state, _):
            at = jnp.minimum(state.lengths, TOTAL - 1)
            own = jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0]
            logits, state, found = decode_step(
                model, own, state, predictor=predictor, selection=selection, policy=policy, details=True, **options
            )
            return state, (at, found.chosen, found.attended, logits)

        return jax.lax.scan(step, state, None, length=steps or TOTAL - prompts.max())[1]

    at, sets, counts, logits = map(np.asarray, run(tokens))
    found = {}
    for s, b in np.ndindex(at.shape):
        found[b, at[s, b]] = sets[s, :, b], counts[s, :, b], logits[s, b]
    return found


def simulated_masks(model, predictor, policy, selection, prompts=None):
    """Masks [L, B, heads, T, S] of the simulation's own pass."""
    batch = jax.tree.map(jnp.asarray, text_of(len(PROMPTS)))
    seen, original = {}, choosing.chosen_mask
    selection = policy.selection(selection)

    def watched(chunk, *rest):
        mask, count = original(chunk, *rest)
        jax.debug.callback(lambda layer, mask: seen.__setitem__(int(layer), np.asarray(mask)), chunk.layer, mask)
        return mask, count

    run = partial(simulation.hidden_states, policy=policy, rule=selection.rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "chosen_mask", watched)
        limits = limits_of(selection, model.config, TOTAL, policy.choosing_heads(model.config))
        limits = limits._replace(prompts=None if prompts is None else jnp.asarray(prompts))
        x, _ = jax.jit(run)(model, predictor, batch, limits)
        x.block_until_ready()
        jax.effects_barrier()
    shape = next(iter(seen.values())).shape
    assert set(seen) - {0} == set(model.config.served_layers)
    return np.stack([seen.get(n, dense_sets(model.config, n, shape)) for n in range(model.config.layers)])


def dense_sets(config, layer, shape):
    """What the rows of a layer read that is not served: everything, or their window."""
    columns = np.arange(shape[-1])
    low = columns[:, None] - config.sliding_window if config.sliding[layer] else -1
    return np.broadcast_to((columns <= columns[:, None])[: shape[-2]] & (columns > low)[: shape[-2]], shape)


QUICK = [
    ("tokenbutler", {}, dict(budget=0.4, unit=4)),
    ("oracle_residual", {}, dict(budget=0.3, allocation="per_layer", floor=0.2)),
    ("tokenbutler", {}, dict(budget=0.8, allocation="tolerance", tolerance=0.05, offset="self_normalised")),
    ("oracle", {}, dict(budget=0.8, allocation="top_p", tolerance=0.3)),
    long("tokenbutler", {"pooling": "maximum"}, dict(budget=12)),
    long("oracle", {}, dict(budget=0.3, neighbours=True)),
    slow("quest", {"page": 4}, dict(budget=0.4)),
]
# Scores meet budgets in the number of heads alone: every policy, every budget, and both numbers of heads under what
# counts heads or units.
COVERING = [
    ("tokenbutler", {}, dict(budget=0.5, threshold=-3.0)),
    ("tokenbutler", {"pooling": "maximum"}, dict(budget=0.2, min_context=30)),
    ("oracle", {}, dict(budget=45, unit=16)),
    ("oracle_head", {}, dict(budget=0.5, neighbours=True)),
    ("random", {"seed": 3}, dict(budget=1.0)),
    ("streaming", {}, dict(budget=12)),
    ("lowrank", {"rank": 4}, dict(budget=0.4, unit=4)),
    long("tokenbutler", {}, dict(budget=1.0)),
    long("tokenbutler", {}, dict(budget=0.5, neighbours=True)),
    long("tokenbutler", {"pooling": "maximum"}, dict(budget=45, unit=16)),
    long("oracle", {}, dict(budget=0.2, min_context=30)),
    long("oracle_head", {}, dict(budget=0.25)),
    long("oracle_head", {}, dict(budget=0.4, unit=4)),
    long("oracle_head", {}, dict(budget=0.5, threshold=-3.0)),
    long("random", {"seed": 3}, dict(budget=12)),
    long("streaming", {}, dict(budget=0.5, neighbours=True)),
    long("lowrank", {"rank": 4}, dict(budget=0.25)),
    long("lowrank", {"rank": 4}, dict(budget=0.2, min_context=30)),
]
PER_LAYER = dict(budget=0.5, allocation="per_layer", unit=4, floor=0.3)
PER_LAYER_AND_NEIGHBOURS = dict(budget=12, allocation="per_layer", neighbours=True)
TOLERANCE = dict(budget=0.7, allocation="tolerance", tolerance=0.1, min_context=30)
TOP_P = dict(budget=0.9, allocation="top_p", tolerance=0.3)
ALLOCATED = [
    ("oracle_residual", {"error": "weight"}, TOLERANCE),
    ("oracle_residual", {"error": "weight"}, {**TOLERANCE, "unit": 4}),
    ("oracle_residual", {"pooling": "root_sum_square"}, PER_LAYER_AND_NEIGHBOURS),
    ("tokenbutler", {"error": "value"}, {**TOLERANCE, "offset": "share", "target": "weight"}),
    ("tokenbutler", {}, {**PER_LAYER, "offset": "share"}),
    ("oracle_head", {}, {**TOP_P, "unit": 4}),
    ("quest", {"page": 4}, TOP_P),
    ("lowrank", {"rank": 4}, {**TOP_P, "min_context": 30}),
    long("tokenbutler", {}, {**TOP_P, "unit": 4}),
    long("tokenbutler", {"error": "value"}, {**TOLERANCE, "offset": "share", "target": "weight", "unit": 4}),
    long("oracle_residual", {"error": "weight"}, PER_LAYER),
    long("oracle_residual", {"pooling": "root_sum_square"}, TOLERANCE),
    long("tokenbutler", {"error": "value"}, PER_LAYER_AND_NEIGHBOURS),
    long("tokenbutler", {}, {**PER_LAYER, "offset": "self_normalised"}),
]


def compare(name, fields, budget, **changes):
    policy, model = make_policy(name, **fields), make_model(**changes)
    budget = dict(budget)
    offset = budget.pop("offset", "none")
    target = budget.pop("target", "attention" if offset == "none" else "centred")
    if "threshold" in budget:
        heads = BASE.heads if name == "oracle_head" else BASE.kv_heads
        budget["threshold"] = ((budget["threshold"],) * heads,) * BASE.layers
    selection = SelectionConfig(sinks=2, recent=3, **budget)
    predictor = None
    if policy.needs_predictor:
        config = PredictorConfig(rank=8, stride=2, target=target, offset=offset)
        predictor = make_predictor(model.config, config)
        if offset != "none":
            values = jax.random.normal(jax.random.key(5), predictor.heads.offset.shape)
            predictor.heads.offset[...] = values
    policy = policy.prepare(model, [text_of(len(PROMPTS))]).for_predictor(predictor)
    masks = simulated_masks(model, predictor, policy, selection)
    found = decoded_sets(model, predictor, policy, selection)
    assert len(found) == len(PROMPTS) * (TOTAL - PROMPTS.max())
    smaller = 0
    for (b, t), (sets, counts, _) in found.items():
        np.testing.assert_array_equal(sets, masks[:, b, :, t, :TOTAL], err_msg=f"row {b}, position {t}")
        np.testing.assert_array_equal(counts, sets.sum(-1))
        smaller += int((counts[list(model.config.served_layers)] < t + 1).sum())
        seen = min(t + 1, model.config.sliding_window or TOTAL)
        for layer in set(range(BASE.layers)) - set(model.config.served_layers):
            assert sets[layer].sum(-1).tolist() == [seen] * len(sets[layer])  # layer 0 is dense
    assert smaller or budget["budget"] == 1.0


@pytest.mark.parametrize(("name", "fields", "budget"), QUICK)
def test_decoding_chooses_the_simulations_rows(name, fields, budget):
    compare(name, fields, budget)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "budget"), COVERING + ALLOCATED)
def test_decoding_chooses_the_simulations_rows_under_every_policy(name, fields, budget):
    compare(name, fields, budget)


MIXED = [
    ("tokenbutler", {}, dict(budget=0.8, allocation="tolerance", tolerance=0.05, offset="self_normalised")),
    ("oracle_residual", {}, dict(budget=0.3, allocation="per_layer", floor=0.2)),
    ("quest", {"page": 4}, TOP_P),
    long("tokenbutler", {}, dict(budget=0.4)),
    long("oracle_head", {}, dict(budget=0.4, unit=4)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "budget"), MIXED)
def test_decoding_chooses_the_simulations_rows_beside_layers_that_slide(name, fields, budget):
    compare(name, fields, budget, **SLIDING)


SINKS = dict(attention_sinks=True, attention_softcap=1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "budget"),
    [
        ("oracle_residual", {}, dict(budget=0.3, allocation="per_layer", floor=0.2)),
        ("oracle", {}, TOP_P),
        long("oracle_head", {}, dict(budget=0.4)),
    ],
)
def test_decoding_chooses_the_simulations_rows_under_sinks_and_a_soft_cap(name, fields, budget):
    compare(name, fields, budget, **SLIDING, **SINKS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "budget"),
    [
        long(None, ALL_SLIDING, dict(budget=0.4)),
        ("lookahead", ALL_SLIDING, dict(budget=0.4)),
        ("producer", SLIDING, dict(budget=0.6, unit=4)),
        long("contextual", SLIDING, dict(budget=0.4)),
    ],
)
def test_decoding_chooses_the_simulations_rows_in_sliding_layers(kind, changes, budget):
    policy = make_policy("tokenbutler" if kind else "oracle")
    model = make_model(**changes)
    predictor = make_predictor(model.config, PredictorConfig(kind=kind, rank=8, stride=2, hidden=16)) if kind else None
    selection = SelectionConfig(sinks=2, recent=3, **budget)
    masks = simulated_masks(model, predictor, policy, selection)
    for (b, t), (sets, counts, _) in decoded_sets(model, predictor, policy, selection).items():
        np.testing.assert_array_equal(sets, masks[:, b, :, t, :TOTAL], err_msg=f"row {b}, position {t}")
        np.testing.assert_array_equal(counts, sets.sum(-1))


INTERVALS = [
    ("tokenbutler", {}, dict(budget=0.3, interval=4)),
    ("oracle", {}, dict(budget=0.4, interval=4, unit=4)),
    ("oracle", {}, dict(budget=14, interval=2, neighbours=True)),
    ("streaming", {}, dict(budget=0.3, interval=4, min_context=30)),
    ("oracle_residual", {}, dict(budget=0.8, interval=4, allocation="tolerance", tolerance=0.1)),
    ("quest", {"page": 4}, dict(budget=0.9, interval=4, allocation="top_p", tolerance=0.3)),
]


@pytest.mark.parametrize(
    ("name", "fields", "budget", "changes"),
    [
        slow(*INTERVALS[0], {}),
        *(long(*one, {}) for one in (INTERVALS[1], INTERVALS[3])),
        slow(*INTERVALS[4], {}),
        slow(*INTERVALS[2], SLIDING),
        long(*INTERVALS[0], SLIDING),
    ],
)
def test_decoding_keeps_its_choice_between_the_choices_of_an_interval_as_the_simulation_does(
    name, fields, budget, changes
):
    policy, model, prompts = make_policy(name, **fields), make_model(**changes), np.asarray([4, 4, 4])
    selection = SelectionConfig(sinks=2, recent=3, **budget)
    predictor = make_predictor(model.config, PredictorConfig(rank=8, stride=2)) if policy.needs_predictor else None
    masks = simulated_masks(model, predictor, policy, selection, prompts=prompts)
    for (b, t), (sets, counts, _) in decoded_sets(model, predictor, policy, selection, prompts=prompts).items():
        np.testing.assert_array_equal(sets, masks[:, b, :, t, :TOTAL], err_msg=f"row {b}, position {t}")
        np.testing.assert_array_equal(counts, sets.sum(-1))


LONGER = np.asarray([1, 41, 17])  # the prefill evicts too
EVICTING = [("h2o", {}), ("snapkv", {"observed": 6, "pool": 3, "once": False}), ("citrus", {"chunk": 4, "observed": 2})]


def simulated_kept(model, policy, selection):
    """What the simulation keeps [L, B, K, T, S], in chunks of 16 rows; of layer 0, which is dense, everything."""
    batch = jax.tree.map(jnp.asarray, text_of(len(LONGER)))
    shape = (model.config.layers, len(LONGER), model.config.kv_heads, TOTAL, TOTAL)
    seen, layer, rows, row = np.zeros(shape, bool), [], simulated.rows_of, eviction.evict_row

    def note(layer, own, kept):
        if own[0] >= 0:
            seen[layer, :, :, own[0], : kept.shape[-1]] = kept

    def watched_rows(view, *rest, **wanted):
        layer.append(view.index)
        return rows(view, *rest, **wanted)

    def watched_row(policy, state, place, *rest):
        kept = row(policy, state, place, *rest)
        jax.debug.callback(note, layer[-1], place.own, kept)
        return kept

    run = partial(simulation.hidden_states, policy=policy, rule=selection.rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated, "rows_of", watched_rows)
        patch.setattr(eviction, "evict_row", watched_row)
        patch.setattr(eviction, "CHUNK", 16)
        x, _ = jax.jit(run)(model, None, batch, limits_of(selection, model.config, TOTAL, model.config.kv_heads))
        x.block_until_ready()
        jax.effects_barrier()
    for n in set(range(model.config.layers)) - set(model.config.served_layers):
        seen[n] = dense_sets(model.config, n, seen.shape[1:])
    return seen, np.asarray(jax.jit(logits)(model, x))


def compare_evicting(name, fields, budget, **changes):
    """Rows of three lengths, prompts under the policy: the same tokens kept and the same logits at every position."""
    policy, model = make_policy(name, **fields), make_model(**changes)
    selection = policy.selection(SelectionConfig(sinks=2, recent=3, **budget))
    kept, wanted = simulated_kept(model, policy, selection)
    found = decoded_sets(model, None, policy, selection, prompts=LONGER)
    assert len(found) == len(LONGER) * (TOTAL - LONGER.max())
    table, layers = budget_table(selection, TOTAL), model.config.served_layers
    seen = model.config.sliding_window if model.config.sliding[layers[0]] else TOTAL
    for (b, t), (sets, counts, values) in found.items():
        np.testing.assert_array_equal(sets, kept[:, b, :, t], err_msg=f"row {b}, position {t}")
        assert (counts[list(layers)] == table[min(t + 1, seen)]).all()
        np.testing.assert_array_equal(counts, sets.sum(-1))
        np.testing.assert_allclose(values, wanted[b, t], atol=2e-4)  # float32 logits of size 10, other sums


@pytest.mark.parametrize(("name", "fields"), [slow(*one) for one in EVICTING])
def test_decoding_keeps_what_the_simulation_keeps(name, fields):
    compare_evicting(name, fields, dict(budget=0.3))


LATER = dict(budget=10, min_context=30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "budget", "changes"),
    [
        (*EVICTING[0], dict(budget=12), SLIDING),
        (*EVICTING[1], LATER, ALL_SLIDING),
        (*EVICTING[1], dict(budget=12), {**SINKS, **SLIDING}),
        (*EVICTING[2], LATER, SLIDING),
        long(*EVICTING[0], LATER, {}),
        long(*EVICTING[1], dict(budget=12), {}),
        long(*EVICTING[1], LATER, SLIDING),
        long(*EVICTING[0], dict(budget=12), SINKS),
        long(*EVICTING[2], dict(budget=1.0), {}),
    ],
)
def test_decoding_keeps_what_the_simulation_keeps_under_every_budget(name, fields, budget, changes):
    compare_evicting(name, fields, budget, **changes)


@pytest.mark.slow
def test_snapkv_cuts_once_at_the_end_of_a_dense_prompt():
    """Against the formula: the attention of the prompt's last 6 rows, the maximum over 3, the best of what is free."""
    model, tokens, length = make_model(), jnp.asarray(rows_of())[:2], 30
    under = dict(
        policy=make_policy("snapkv", observed=6, pool=3), selection=SelectionConfig(budget=12, sinks=2, recent=3)
    )
    state = prefill(model, tokens[:, :length], np.full(2, length), capacity=TOTAL, **under)[1]
    found = decode_step(model, tokens[:, length], state, details=True, **under)[2]
    weights = np.asarray(dense_prompt(model, tokens[:, :length]).weights, np.float64)  # [L, B, P, K, P]
    sums = np.pad(weights[:, :, -6:].sum(2), ((0, 0), (0, 0), (0, 0), (1, 2)), constant_values=-np.inf)
    worth = np.maximum(np.maximum(sums[..., :-2], sums[..., 1:-1]), sums[..., 2:])  # and a last place for the new token
    worth[..., :2] = worth[..., length + 1 - 6 :] = np.inf
    best = np.argsort(worth, axis=-1, kind="stable")[..., -12:]  # of equals the newer
    wanted = np.zeros(worth.shape, bool)
    np.put_along_axis(wanted, best, True, axis=-1)
    np.testing.assert_array_equal(np.asarray(found.chosen)[1:, ..., : length + 1], wanted[1:])
    assert not np.asarray(found.chosen)[..., length + 1 :].any()
