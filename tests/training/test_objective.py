"""The distillation pass: its loss and gradient, what it keeps in memory, and the training step around it."""

from __future__ import annotations

import dataclasses
import operator
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from butler_jax.model.angles import rope_angles
from butler_jax.model.attention import causal_attention
from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, LayerView, embed, mlp, parameter_count, project
from butler_jax.model.layers import rotary
from butler_jax.predictors import PREDICTORS, make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.training.config import TrainConfig
from butler_jax.training.losses.target import PENALTY, log_total
from butler_jax.training.objective import DistillationObjective
from butler_jax.training.step import accumulate, make_optimiser, make_train_step, start_state
from tests.marked import long, slow

SIZES = dict(vocab_size=61, width=64, hidden=96, layers=6, heads=4, kv_heads=2, head_dim=16, context=4096)
BASE = BaseConfig(family="qwen2", qkv_bias=True, **SIZES)
CONFIG = TrainConfig(steps=30, batch_size=4, predictor=PredictorConfig(rank=8, stride=2, hidden=32))


def random_batch(rows: int = 2, length: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two documents, of padding at the end, of both, and of one document, in turn."""
    tokens = np.random.default_rng(seed).integers(1, 61, (rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    for row in range(rows):
        if row % 4 in (0, 2):
            segments[row, length // 3 :] = 2
            positions[row, length // 3 :] -= length // 3
        if row % 4 in (1, 2):
            segments[row, -length // 4 :] = 0
    return {"tokens": tokens, "segments": segments, "positions": positions}


@pytest.fixture(scope="module")
def model() -> BaseModel:
    return jax.jit(lambda: BaseModel(BASE, jax.random.key(0)))()


@pytest.fixture(scope="module")
def predictors(model) -> dict:
    """A predictor of each kind, and "errors" with that target; each is made when a test asks for it."""

    class Made(dict):
        def __missing__(self, kind):
            config = PredictorConfig(kind=kind, rank=8, stride=2, hidden=32, target="attention")
            if kind == "errors":
                config = PredictorConfig(rank=8, stride=2)
            self[kind] = make_predictor(BASE, config).initialise(model, [random_batch()])
            return self[kind]

    return Made()


def errors(weights, values, o, x):
    """|(v - o) W| / |x|, with the output o of each row, for every head and pair; [B, H, T, S]."""
    output = jnp.einsum("bhts,bshd->bthd", weights, values)
    change = values[:, None] - output[:, :, None]
    return (
        jnp.linalg.norm(jnp.einsum("btshd,hde->bhtse", change, o), axis=-1)
        / jnp.linalg.norm(x, axis=-1)[:, None, :, None]
    )


def naive_loss(parameters, rest, model, batch, objective, sinks, recent):
    """The same sum by a plain loop over layers and T x T matrices, for autodiff over everything at once.

    rest: (graph, other variables) of the predictor.
    """
    predictor = nnx.merge(rest[0], parameters, rest[1])
    segments, positions = batch["segments"], batch["positions"]
    context = predictor.context(positions, positions.shape[1])
    base, served = model.config, model.config.served_layers
    producers = {layer: n for n, block in enumerate(predictor.blocks) for layer in block.layers}
    cos, sin = (a[:, :, None] for a in rope_angles(base, positions, positions.shape[1]).of(0))
    mask = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    mask = (mask & jnp.tril(jnp.ones(mask.shape[1:], bool))[None])[:, None]
    contested = mask & (positions >= sinks)[:, None, None]
    contested &= jnp.tril(jnp.ones(mask.shape[2:], bool), -recent)[None, None]

    def logits(q, k):
        return jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)) * q.shape[-1] ** -0.5

    x, captured, features, total = embed(model, batch["tokens"]), None, None, 0.0
    for number in range(base.layers):
        layer = jax.tree.map(lambda a, i=number: a[i], model.layers)
        q, k_pre, v = project(BASE, layer, x)
        view = LayerView(jnp.asarray(number), layer, x, rotary(q, cos, sin), rotary(k_pre, cos, sin), k_pre, v)
        true = logits(view.q, view.k)
        if number in served:
            block = producers[number]
            if number == predictor.blocks[block].layers[0]:
                trunk = None if predictor.trunk is None else jax.tree.map(lambda a, i=block: a[i], predictor.trunk)

                def attend(q, k, v):
                    return causal_attention(q, k, v, segments=segments), None

                features, _ = predictor.features(trunk, captured, context, attend, None)
            head = jax.tree.map(operator.itemgetter(served.index(number)), predictor.heads)
            found = logits(
                predictor.q_imp(head, features, view, context), predictor.k_imp(head, features, view, context)
            )
            if objective == "squared_error":
                loss = jnp.sum(jnp.where(mask, true - found, 0) ** 2)
            else:
                target = jax.nn.softmax(jnp.where(mask, true, -1e30), axis=-1)
                log_found = jax.nn.log_softmax(jnp.where(contested, found, -1e30), axis=-1)
                penalty = 0.0
                if predictor.config.target != "attention":
                    target = target * errors(target, jnp.repeat(v, BASE.group, axis=2), layer.o[...], x)
                    mass = jnp.sum(jnp.where(contested, target, 0), axis=-1)
                    miss = predictor.offset(head, features, view, context) - log_total(mass.transpose(0, 2, 1))
                    penalty = PENALTY * jnp.sum(jnp.where(contested.any(-1).transpose(0, 2, 1), miss, 0) ** 2)
                loss = penalty - jnp.sum(jnp.where(contested, target * log_found, 0))
            total = total + loss / len(served)
        if any(block.producer == number for block in predictor.blocks):
            captured = predictor.capture(view)
        near = jnp.triu(jnp.ones(mask.shape[2:], bool), 1 - (base.sliding_window if base.sliding[number] else 4096))
        weights = jax.nn.softmax(jnp.where(mask & near[None, None], true, -1e30), axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, BASE.group, axis=2))
        x = x + jnp.einsum("bthd,hde->bte", mixed, layer.o[...])
        x = x + mlp(BASE, layer, x)
    return total


# The errors of a row of one token are 0 but for rounding, of which the penalty takes the logarithm: not without sinks.
@pytest.mark.parametrize(
    ("kind", "objective", "sinks", "recent"),
    [
        ("lookahead", "squared_error", 0, 0),
        ("errors", "cross_entropy", 2, 3),
        slow("producer", "squared_error", 0, 0),
        slow("contextual", "cross_entropy", 2, 3),
        *(long("lookahead", "cross_entropy", *always) for always in ((0, 0), (2, 3))),
        *(long("producer", "cross_entropy", *always) for always in ((0, 0), (2, 3))),
        long("contextual", "squared_error", 0, 0),
        long("contextual", "cross_entropy", 0, 0),
    ],
)
def test_loss_and_gradient_equal_unrolled_autodiff(model, predictors, kind, objective, sinks, recent):
    predictor, batch = predictors[kind], random_batch(3)
    run = jax.jit(DistillationObjective(objective, sinks=sinks, recent=recent).differentiate)
    loss, count, gradients = run(predictor, model, batch)
    graph, parameters, others = nnx.split(predictor, nnx.Param, ...)
    naive = jax.jit(jax.value_and_grad(lambda p, o, m, b: naive_loss(p, (graph, o), m, b, objective, sinks, recent)))
    expected_loss, expected = naive(parameters, others, model, batch)
    # float32 sums over some thousand terms in another order
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(parameters)
    for path, found in jax.tree_util.tree_leaves_with_path(gradients):
        wanted = np.asarray(dict(jax.tree_util.tree_leaves_with_path(expected))[path])
        scale = np.abs(wanted).max()
        assert scale > 0, path
        # relative to the largest entry: entries are sums of terms that cancel
        np.testing.assert_allclose(np.asarray(found) / scale, wanted / scale, atol=1e-5, err_msg=str(path))
    lengths = [n for row in batch["segments"] for s, n in zip(*np.unique(row, return_counts=True), strict=True) if s]
    lengths = [n - sinks - recent for n in lengths]
    terms = sum(lengths) if objective == "cross_entropy" else sum(n * (n + 1) // 2 for n in lengths)
    np.testing.assert_allclose(count, BASE.heads * terms, rtol=1e-6)  # a mean over layers: rounding only


@pytest.mark.parametrize("kind", [slow(k) if k == "producer" else long(k) for k in PREDICTORS])
def test_layers_that_slide_beside_others_have_no_loss(kind):
    """Blocks of layer 1, and of the layers 3 and 4: layer 2 lies between them, and layer 5 has no head."""
    base = dataclasses.replace(BASE, sliding_window=9, sliding_layers=(True, False, True, False, False, True))
    model, batch = jax.jit(lambda: BaseModel(base, jax.random.key(0)))(), random_batch()
    predictor = make_predictor(base, PredictorConfig(kind=kind, rank=8, stride=2, hidden=32))
    assert kind == "contextual" or [tuple(b) for b in predictor.blocks] == [(0, (1,)), (2, (3, 4))]
    rows = {len(a) for a in jax.tree.leaves(nnx.state(predictor.heads, nnx.Param))}
    assert rows == {4 if kind == "producer" else 3}  # a producer has 2 slots
    loss, _, gradients = jax.jit(DistillationObjective("cross_entropy", sinks=2, recent=3).differentiate)(
        predictor, model, batch
    )
    graph, parameters, others = nnx.split(predictor, nnx.Param, ...)
    naive = jax.value_and_grad(lambda p: naive_loss(p, (graph, others), model, batch, "cross_entropy", 2, 3))
    expected_loss, expected = jax.jit(naive)(parameters)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)  # float32 sums in another order
    for found, wanted in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(np.asarray(found) / scale, np.asarray(wanted) / scale, atol=1e-5)
    for array in map(np.asarray, jax.tree.leaves(gradients["heads"])):
        assert (array[3:] == 0).all() and all(np.abs(one).max() > 0 for one in array[:3])


def test_unknown_objective_is_named():
    with pytest.raises(ValueError, match="unknown objective 'hinge'; known: cross_entropy, squared_error"):
        DistillationObjective("hinge")


@pytest.mark.slow
def test_bfloat16_base_gives_nearly_the_same_loss(model, predictors):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    run, batch = jax.jit(DistillationObjective("cross_entropy").differentiate), random_batch()
    exact, found = (run(predictors["lookahead"], base, batch)[0] for base in (model, half))
    np.testing.assert_allclose(found, exact, rtol=0.02)  # 8 bits of mantissa through 6 layers


def compiled(kind: str, objective: str, *, length: int, layers: int):
    """The compiled pass on abstract values, and the bytes of the predictor's parameters."""
    base = BaseConfig(**{**{f: getattr(BASE, f) for f in BASE.__dataclass_fields__}, "layers": layers})
    config = PredictorConfig(kind=kind, rank=8, stride=2, hidden=32)
    shapes = jax.eval_shape(lambda: (make_predictor(base, config), BaseModel(base, jax.random.key(0))))
    batch = {n: jax.ShapeDtypeStruct((1, length), jnp.int32) for n in ("tokens", "segments", "positions")}
    run = jax.jit(DistillationObjective(objective, sinks=4, recent=8).differentiate).lower(*shapes, batch).compile()
    return run, 4 * parameter_count(shapes[0])


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        slow("lookahead", "cross_entropy"),
        long("producer", "cross_entropy"),
        long("contextual", "squared_error"),
    ],
)
def test_memory_grows_with_length_alone_and_holds_no_square(kind, objective):
    length = 1280  # not the size of anything else
    short, parameters = compiled(kind, objective, length=length, layers=6)
    double, _ = compiled(kind, objective, length=2 * length, layers=6)
    deep, deep_parameters = compiled(kind, objective, length=length, layers=12)
    used = [run.memory_analysis().temp_size_in_bytes for run in (short, double, deep)]
    assert used[1] <= 2.1 * used[0], used
    # Six layers more: gradients may grow (scanned and padded copies), but not by one residual stream [T, E].
    assert used[2] - used[0] < 4 * length * BASE.width, used
    assert used[2] - used[0] < 2 * (deep_parameters - parameters), used
    for shape in re.findall(r"\w\[([\d,]+)\]", double.as_text()):
        assert shape.split(",").count(str(2 * length)) < 2, f"a T x T array: [{shape}]"


def differentiate(predictor, model, batch, key):
    return DistillationObjective(type(predictor).objective).differentiate(predictor, model, batch, key)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("kind", [long("producer"), "lookahead"])
def test_accumulation_changes_rounding_only(model, predictors, kind):
    batch, results = random_batch(4), []
    optimiser = optax.sgd(0.1)  # linear in the gradient: Adam would magnify the rounding of tiny ones
    for parts in (1, 2):
        config = TrainConfig(steps=4, batch_size=4, accumulate=parts)
        step = make_train_step(differentiate, config, optimiser, optax.constant_schedule(0.1), {})
        state, metrics = step(start_state(copy(predictors[kind]), optimiser), model, batch)
        results.append((nnx.state(state.module, nnx.Param), metrics))
    (whole, first), (parts, second) = results
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(first[name], second[name], rtol=2e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), whole, parts)


@pytest.mark.slow
def test_dropout_is_for_training_the_contextual_predictor(model, predictors):
    batch, key = random_batch(), jax.random.key(1)
    run = jax.jit(differentiate)
    for kind in ("producer", "contextual"):
        plain, dropped = (run(predictors[kind], model, batch, given)[0] for given in (None, key))
        assert (float(plain) == float(dropped)) == (kind == "producer")


@pytest.mark.slow
def test_dropout_follows_seed_and_step(model, predictors):
    batch, losses = random_batch(), {}
    optimiser = optax.sgd(0.0)
    for seed in (0, 1):
        config = TrainConfig(steps=4, batch_size=2, seed=seed)
        step = make_train_step(differentiate, config, optimiser, optax.constant_schedule(0.0), {})
        for name in ("first", "again"):
            state, found = start_state(copy(predictors["contextual"]), optimiser), []
            for _ in range(2):
                state, metrics = step(state, model, batch)
                found.append(float(metrics["loss"]))
            losses[seed, name] = found
    assert losses[0, "first"] == losses[0, "again"]
    assert len({*losses[0, "first"], *losses[1, "first"]}) == 4


def test_norms_and_biases_do_not_decay():
    optimiser = make_optimiser(TrainConfig(weight_decay=0.5), 1e-2)
    module = {name: jnp.ones(3) for name in ("query", "query_bias", "norm")}
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, module), optimiser.init(module), module)
    assert updates["query"].max() < 0 and not updates["query_bias"].any() and not updates["norm"].any()


def test_parts_of_a_batch_draw_their_own_numbers():
    key = jax.random.key(3)
    drawn = accumulate(lambda module, model, part, key: jax.random.uniform(key), 2, None, None, jnp.zeros(2), key)
    assert float(drawn) != pytest.approx(2 * float(jax.random.uniform(jax.random.fold_in(key, 0))))


@pytest.mark.parametrize("kind", [k if k == "lookahead" else long(k) for k in PREDICTORS])
def test_thirty_steps_on_one_batch_lower_the_loss_and_leave_the_base_alone(model, predictors, kind):
    batch, before = random_batch(4), jax.tree.map(np.array, model)
    optimiser = make_optimiser(CONFIG, 1e-2)
    step = make_train_step(differentiate, CONFIG, optimiser, optax.constant_schedule(1e-2), {})
    state, losses = start_state(copy(predictors[kind]), optimiser), []
    for _ in range(CONFIG.steps):
        state, metrics = step(state, model, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.02
    assert int(state.step) == CONFIG.steps
    jax.tree.map(np.testing.assert_array_equal, before, model)
    # The optimiser knows the predictor's parameters only: two moments each, besides its counters.
    moments = [leaf for leaf in jax.tree.leaves(state.optimiser) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * parameter_count(state.module)
    if kind == "lookahead":  # the pairs are chosen, not trained
        np.testing.assert_array_equal(state.module.heads.pairs[...], predictors[kind].heads.pairs[...])
