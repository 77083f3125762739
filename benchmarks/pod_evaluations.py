"""The passes of an evaluation for pods.py: a simulated pass, recall and calibration, lowered from shapes.

They are those of `butler-jax eval` on a mesh, under the policy tokenbutler with the lookahead predictor.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from butler_jax.model import LOGICAL_AXES, BaseConfig, BaseModel
from butler_jax.parallel import EVALUATION_RULES, module_shardings, shardings_for
from butler_jax.policies import TokenButler
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig, limits_of
from butler_jax.simulation.calibration import GRID, _sum_above
from butler_jax.simulation.recall import RecallOptions, _sum_scoring
from butler_jax.simulation.simulator import _simulate

BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
PASSES = {"simulate": "simulation", "recall": "recall", "calibrate": "calibration"}
ROWS = {"recall": 256, "calibrate": 512}  # query rows of each sequence that are measured


class Sizes(NamedTuple):
    """Sequences of a batch, and their tokens."""

    rows: int
    length: int


def operations_of(step: str, base: BaseConfig, sizes: Sizes) -> float:
    """Floating-point operations of a pass on all chips, by formula.

    The matrix products of the layers, and of every measured row the scores of the keys of its band: by the queries, by
    q_imp, and by the weights for the values. The bands compute 5/8 of the square. Recall and calibration have dense
    attention besides, over half the square; their values' norms and their sorts are left out. A simulated pass ends in
    the logits of two streams.
    """
    E, L, H, D = base.width, base.layers, base.heads, base.head_dim
    rows, length = sizes
    tokens, rank = rows * length, PredictorConfig().rank
    layer = 2 * E * (H + base.kv_heads) * D + 3 * E * base.hidden + E * H * rank + D * rank
    square = rows * length**2
    scored = square * 5 / 8 if step == "simulate" else rows * min(ROWS[step], length) * length * 5 / 8
    dense = 0 if step == "simulate" else 4 * square / 2 * H * D
    ends = 2 * 2 * tokens * E * base.vocab_size if step == "simulate" else 0
    return L * (2 * tokens * layer + 2 * scored * H * (2 * D + rank) + dense) + ends


def markdown(report: dict[str, Any]) -> list[str]:
    """The lines of the table of evaluations in a written report, as docs/guides/scaling.md has them."""
    lines = [
        "| | pass | slice, mesh | tokens x rows | GiB: arguments + temporaries | GB sent by a chip | collectives "
        "| TFLOP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in report["steps"]:
        plan = found["plan"]
        if plan["step"] not in PASSES:
            continue
        cells = [plan["model"].rpartition("-")[2].upper(), PASSES[plan["step"]]]
        cells.append(f"{plan['topology'].replace(':', ' ')}, `{plan['mesh']}`")
        cells.append(f"{plan['length']:,} x {plan['batch_size']}")
        cells.append(" + ".join(f"{found[f'{part}_bytes'] / 2**30:.2f}" for part in ("argument", "temporary")))
        sent = {kind: one["bytes"] / 1e9 for kind, one in found["collectives"].items()}
        cells.append(", ".join(f"{kind} {size:,.3g}" for kind, size in sent.items() if size > 0.001))
        cells.append(f"{sum(one['count'] for one in found['collectives'].values()):,}")
        operations = found["flops"] / 1e12
        cells.append(f"{operations:,.0f}" if operations >= 100 else f"{operations:.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def lower_evaluation(mesh: Mesh, *, step: str, base: BaseConfig, sizes: Sizes, config: PredictorConfig) -> Any:
    """Lower a pass for the chips of a mesh. step: simulate, recall or calibrate. config: of the predictor."""
    batch, length = sizes
    everywhere = NamedSharding(mesh, PartitionSpec())

    def described(tree, places):
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, places)

    def whole(tree):
        return described(tree, jax.tree.map(lambda _: everywhere, tree))

    model = jax.eval_shape(lambda: BaseModel(base, jax.random.key(0), jnp.bfloat16))
    model = described(model, module_shardings(model, LOGICAL_AXES, mesh, EVALUATION_RULES))
    predictor = jax.eval_shape(lambda: make_predictor(base, config))
    places = module_shardings(predictor, predictor.logical_axes, mesh, EVALUATION_RULES)
    predictor = described(predictor, places)
    row = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    text = whole(dict.fromkeys(("tokens", "segments", "positions"), row))
    selection = SelectionConfig(budget=BUDGETS[2])
    limits = whole(jax.eval_shape(partial(limits_of, selection, base, length, base.kv_heads)))._replace(
        min_context=selection.min_context
    )
    plain = config.target == "attention"  # its scores have a common unit, which a tolerance needs, only with values
    policy = TokenButler(offset=config.offset, error="value" if plain and step == "calibrate" else None)
    with jax.set_mesh(mesh):
        if step == "simulate":
            stream = jax.ShapeDtypeStruct((batch, length, base.width), jnp.bfloat16)
            place = shardings_for(mesh)(("batch", "tokens", "whole"), stream.shape)
            reference = described(stream, place)  # of the dense pass
            how = dict(policy=policy, rule=selection.rule, score_dtype=None, implementation=None)
            both = jax.jit(partial(_simulate, **how))
            return both.lower(model, predictor, text, limits, None, reference, None)
        if step == "recall":
            options = RecallOptions(selection.rule, ROWS[step], True, None, None, 0)
            tables = whole(jax.ShapeDtypeStruct((1, len(BUDGETS), length + 1), jnp.int32))
            return _sum_scoring.lower(model, predictor, text, tables, policies=(policy,), options=options)
        how = dict(policy=policy, rule=selection.rule, first=0, rows=ROWS[step])
        counts = whole(jax.ShapeDtypeStruct((batch, length), jnp.bool_))
        grid = whole(jax.ShapeDtypeStruct(GRID.shape, jnp.float32))
        return _sum_above.lower(model, predictor, text, counts, limits, grid, **how)
