"""Errors of float32, bfloat16 and an int8 k_imp against float64, on the activations of real models on a real text.

    python -m benchmarks.numerics --json benchmarks/numerics.json
    python -m benchmarks.numerics --base DIR --text FILE [--run RUN] --json ...    # further bases

The float64 form is benchmarks/float64.py, naive numpy that shares nothing with the package. Every error is divided by
the root mean square of the exact quantity. There are three kinds:

- arithmetic: the package's function on inputs rounded to the dtype, against float64 on the same rounded inputs
- inputs: the same result against float64 on the unrounded inputs of the float64 pass
- whole: the whole pass in the dtype, from the tokens on

A choice is compared for every set (row, layer from 1 on, KV head) in which scores decide. Reported are the share of
equal sets, the share of equal tokens outside sinks and recent, and the true attention that the differing sets lose: the
mean over all sets, and the worst (negative where the other set holds more).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import float64
from butler_jax import load_base, load_predictor
from butler_jax.decoding import rounded
from butler_jax.evaluation import batch_text
from butler_jax.evaluation.analysis.rows import row_chunk, see_rows
from butler_jax.model import LayerView, RopeConfig, causal_attention, forward, rope_frequencies, rotary_angles
from butler_jax.policies import Chunk, make_policy
from butler_jax.predictors import PredictorConfig
from butler_jax.runs import versions
from butler_jax.selection import SelectionConfig, budget_table, select_mask
from butler_jax.training import init_predictor
from butler_jax.training.losses.cross_entropy import attend_with_cross_entropy
from butler_jax.training.losses.squared_error import attend_with_squared_error
from butler_jax.training.objective import DistillationObjective

SINKS, RECENT = SelectionConfig().sinks, SelectionConfig().recent
BUDGETS = (1 / 4, 1 / 16)
POLICY = make_policy("tokenbutler")
LOSSES = {"cross entropy": "cross_entropy", "squared error": "squared_error"}
KINDS = ("arithmetic", "inputs", "whole")


class RelativeErrors:
    """Errors of one quantity over all layers, relative to the root mean square of the exact values."""

    def __init__(self):
        self.largest = self.squares = self.exact = 0.0
        self.count = 0

    def add(self, found: Any, exact: np.ndarray) -> None:
        """Add one layer."""
        error = float64.wide(found) - exact
        self.largest = max(self.largest, float(np.abs(error).max(initial=0.0)))
        self.squares += float(np.square(error).sum())
        self.exact += float(np.square(exact).sum())
        self.count += exact.size

    def row(self) -> dict[str, float]:
        """{"rms", "max"}."""
        size = max(self.exact / max(self.count, 1), 1e-300) ** 0.5
        return {"rms": (self.squares / max(self.count, 1)) ** 0.5 / size, "max": self.largest / size}


class Choices:
    """Differences of chosen sets of tokens from the exact ones, over all layers."""

    def __init__(self, budget: float, length: int):
        self.config = SelectionConfig(budget=budget)
        self.table = budget_table(self.config, length)
        rows = np.arange(length)
        self.decided = (self.config.least < self.table[rows + 1]) & (self.table[rows + 1] < rows + 1)
        if not self.decided.any():
            raise ValueError(f"{length} tokens are too few for scores to decide at a budget of {budget}; take more")
        self.forced = (rows[None] > rows[:, None] - RECENT) | (rows[None] < SINKS)
        self.equal, self.common, self.lost = [], [], []

    def exact(self, layer: float64.Layer) -> np.ndarray:
        """The sets [K, T, T] that float64 chooses."""
        return float64.choice(float64.pooled(layer.q_imp, layer.k_imp, SINKS, RECENT), self.table, SINKS, RECENT)

    def add(self, found: np.ndarray, exact: np.ndarray, weights: np.ndarray) -> None:
        """Add one layer. weights [K, T, T]: its true attention, mean over the group."""
        found, exact, weights = (a[:, self.decided] for a in (found, exact, weights))
        own = exact & ~self.forced[self.decided]
        self.equal.append((found == exact).all(axis=-1).ravel())
        self.common.append(((found & own).sum(axis=-1) / own.sum(axis=-1)).ravel())
        self.lost.append((weights * (exact.astype(np.float64) - found)).sum(axis=-1).ravel())

    def row(self) -> dict[str, float]:
        """{"equal_sets", "equal_tokens", "mass_lost", "mass_lost_where_different", "mass_lost_at_worst", "sets"}."""
        equal, common, lost = (np.concatenate(a) for a in (self.equal, self.common, self.lost))
        different = lost[~equal]
        return {
            "equal_sets": float(equal.mean()),
            "equal_tokens": float(common.mean()),
            "mass_lost": float(lost.mean()),
            "mass_lost_where_different": float(different.mean()) if different.size else 0.0,
            "mass_lost_at_worst": float(lost.max()),
            "sets": int(equal.size),
        }


def mean_weights(layer: float64.Layer) -> np.ndarray:
    """True attention [K, T, T], mean over the group."""
    weights = float64.softmax(float64.products(layer.q, layer.k), np.tri(len(layer.q), dtype=bool))
    return weights.reshape(layer.k.shape[1], -1, *weights.shape[1:]).mean(axis=1)


def numbers_read_per_key(chunk: Chunk, configs: tuple[SelectionConfig, ...]) -> dict[str, Any]:
    """The package's results on one chunk of all rows: scores, pooled scores, and the sets of each configuration."""
    chunk = chunk._replace(sinks=SINKS, recent=RECENT)
    scores = POLICY(chunk)
    count = jnp.sum(chunk.allowed, axis=-1, dtype=jnp.int32)
    tables = (jnp.asarray(budget_table(config, chunk.columns.size)) for config in configs)
    sets = [
        select_mask(scores, chunk.allowed[:, None], chunk.rows, table[count], config)[0]
        for table, config in zip(tables, configs, strict=True)
    ]
    return {"scores": chunk.predicted[0], "pooled": scores[0], "sets": sets}


@partial(jax.jit, static_argnames=("configs", "int8"))
def one_layer(q, k, v, q_imp, k_imp, *, configs, int8):
    """The package's functions on the activations of one layer, [T, heads, ...]."""
    q, k, v, q_imp, k_imp = (a[None] for a in (q, k, v, q_imp, k_imp))
    segments = jnp.ones(q.shape[:2], jnp.int32)
    kept = rounded(k_imp, segments > 0) if int8 else k_imp
    rows = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    view = LayerView(jnp.asarray(1), None, q[:, :, 0], q, k, k, k)  # no policy here looks at x, weights or values
    found = numbers_read_per_key(row_chunk(view, (q_imp, kept, None), segments, rows, None), configs)
    if int8:
        return found
    found["attention output"] = causal_attention(q, k, v)[0]
    for name, attend in zip(LOSSES, (attend_with_cross_entropy, attend_with_squared_error), strict=True):
        always = {"sinks": SINKS, "recent": RECENT} if name == "cross entropy" else {}

        def run(q_imp, k_imp, attend=attend, always=always):
            _, value, count = attend(q, k, v, q_imp, k_imp, **always)
            return value, count

        (value, count), (dq_imp, dk_imp) = jax.value_and_grad(run, (0, 1), has_aux=True)(q_imp, k_imp)
        found |= {name: value / count, f"{name}, d q_imp": dq_imp[0], f"{name}, d k_imp": dk_imp[0]}
    return found


def exact_layer(layer: float64.Layer, losses: bool = True) -> dict[str, Any]:
    """The same in float64, without the sets."""
    found = {"scores": float64.products(layer.q_imp, layer.k_imp)}
    found["scores"] = found["scores"].reshape(layer.k_imp.shape[1], -1, *found["scores"].shape[1:])
    found["pooled"] = float64.pooled(layer.q_imp, layer.k_imp, SINKS, RECENT)
    if not losses:
        return found
    found["attention output"] = float64.attention(layer.q, layer.k, layer.v)
    arrays = [a[None] for a in (layer.q, layer.k, layer.q_imp, layer.k_imp)]
    for name in LOSSES:
        always = {"sinks": SINKS, "recent": RECENT} if name == "cross entropy" else {}
        loss, count, dq_imp, dk_imp = float64.distillation_loss(name, *arrays, **always)
        found |= {name: np.asarray(loss / count), f"{name}, d q_imp": dq_imp[0], f"{name}, d k_imp": dk_imp[0]}
    return found


def counted(name: str, value: Any, length: int) -> np.ndarray:
    """Scores of the keys that a choice may take; other quantities unchanged."""
    value = float64.wide(value)
    if name not in ("scores", "pooled"):
        return value
    rows = np.arange(length)
    return value[..., (rows[None] >= SINKS) & (rows[None] <= rows[:, None] - RECENT)]


def given(layers: list[float64.Layer], dtype: str, choices: dict, errors: dict) -> None:
    """Errors of the package's functions on the activations of the float64 pass, rounded to a dtype."""
    int8 = dtype == "int8"
    rounding = jnp.float32 if int8 else dtype
    length = len(layers[0].q)
    configs = tuple(choice.config for choice in choices.values())
    for layer in layers[1:]:
        inputs = [
            jnp.asarray(a, jnp.float32).astype(rounding) for a in (layer.q, layer.k, layer.v, layer.q_imp, layer.k_imp)
        ]
        found = one_layer(*inputs, configs=configs, int8=int8)
        q, k, v, q_imp, k_imp = map(float64.wide, inputs)
        versions_of = {"arithmetic": exact_layer(layer._replace(q=q, k=k, v=v, q_imp=q_imp, k_imp=k_imp), not int8)}
        versions_of["inputs"] = exact_layer(layer, not int8)
        for kind, exact in versions_of.items():
            for name, value in exact.items():
                own = errors.setdefault(name, {}).setdefault(kind, RelativeErrors())
                own.add(counted(name, found[name], length), counted(name, value, length))
        weights = mean_weights(layer)
        for choice, mask in zip(choices.values(), found["sets"], strict=True):
            choice.add(np.asarray(mask), choice.exact(layer), weights)


def whole(base: Any, predictor: Any, batch: dict, exact: Any, dtype: str, choices: dict, errors: dict) -> dict:
    """Add the errors of the whole pass in a dtype. Returns the comparison of the next token."""
    layers, logits = exact
    batch = {name: jnp.asarray(a) for name, a in batch.items()}
    rows = jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)[None]
    configs = tuple(choice.config for choice in choices.values())
    seen = jax.jit(lambda m, p: see_rows(m, p, batch, rows, partial(numbers_read_per_key, configs=configs)))(
        base.model, predictor
    )
    length = rows.shape[1]
    for index, layer in enumerate(layers[1:], start=1):
        expected = exact_layer(layer, losses=False)
        for name, value in expected.items():
            own = errors.setdefault(name, {}).setdefault("whole", RelativeErrors())
            own.add(counted(name, seen[name][index], length), counted(name, value, length))
        for choice, mask in zip(choices.values(), seen["sets"], strict=True):
            choice.add(np.asarray(mask[index]), choice.exact(layer), mean_weights(layer))

    for name, objective in LOSSES.items():
        always = {"sinks": SINKS, "recent": RECENT} if name == "cross entropy" else {}
        run = jax.jit(DistillationObjective(objective, **always).differentiate)
        loss, count, gradients = run(predictor, base.model, batch)
        total = terms = 0.0
        queries, keys = (float64.wide(a) for a in (gradients["heads"]["query"], gradients["heads"]["key"]))
        for index, layer in enumerate(layers[1:], start=1):
            arrays = [a[None] for a in (layer.q, layer.k, layer.q_imp, layer.k_imp)]
            value, number, dq_imp, dk_imp = float64.distillation_loss(name, *arrays, **always)
            total, terms = total + value, terms + number
            found = queries[index - 1], keys[index - 1]
            for what, one, wanted in zip(
                ("query", "key"),
                found,
                float64.parameter_gradients(predictor, index, layer, dq_imp[0], dk_imp[0]),
                strict=True,
            ):
                own = errors.setdefault(f"{name}, d {what} parameters", {}).setdefault("whole", RelativeErrors())
                own.add(one * (len(layers) - 1), wanted)
        own = errors.setdefault(name, {}).setdefault("whole", RelativeErrors())
        own.add(np.asarray(float(loss) / float(count)), np.asarray(total / terms))

    values = float64.wide(jax.jit(forward)(base.model, batch["tokens"]))[0]
    errors.setdefault("logits", {}).setdefault("whole", RelativeErrors()).add(values, logits)
    return next_token(values, logits, np.asarray(batch["tokens"])[0])


def next_token(found: np.ndarray, exact: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Greedy agreement, divergence of the distributions in nats, and the text's likelihood under both."""
    found, exact = (a - float64.log_sum_exp(a, np.ones(a.shape, bool)) for a in (found, exact))
    at = np.arange(len(tokens) - 1), tokens[1:]
    return {
        "greedy_agreement": float((found.argmax(-1) == exact.argmax(-1)).mean()),
        "divergence_nats": float((np.exp(exact) * (exact - found)).sum(axis=-1).mean()),
        "nats_a_token": float(-found[at].mean()),
        "nats_a_token_float64": float(-exact[at].mean()),
    }


def angle_error(theta: float, dim: int, positions: int) -> float:
    """The largest error of the package's float32 cosine up to this number of positions."""
    frequencies, _ = rope_frequencies(RopeConfig(theta=theta), dim, context=positions, length=positions)
    cos, _ = rotary_angles(jnp.arange(positions), frequencies)
    exact = np.cos(np.arange(positions)[:, None] * theta ** -(np.arange(0, dim, 2) / dim))
    return float(np.abs(float64.wide(cos) - exact).max())


def measure(spec: str, text: str, tokens: int, run: str | None, label: str) -> dict[str, Any]:
    """All errors of one base and predictor on the first tokens of a text."""
    bases = {dtype: load_base(spec, dtype=dtype) for dtype in ("float32", "bfloat16")}
    base = bases["float32"]
    batch = batch_text(base, text, tokens)
    if run is None:
        kind = PredictorConfig(rank=min(16, base.config.head_dim), target="attention")
        predictor = init_predictor(base, kind, batches=[batch])
    else:
        predictor = load_predictor(run, base)
    exact = float64.run(base.model, predictor, np.asarray(batch["tokens"])[0])
    length = batch["tokens"].shape[1]
    found: dict[str, Any] = {"base": label, "tokens": length, "predictor": "at step 0" if run is None else "trained"}
    found["rotary_float32_131072"] = angle_error(base.config.rope.theta, base.config.head_dim, 2**17)
    for dtype in ("float32", "bfloat16", "int8"):
        errors: dict[str, dict[str, RelativeErrors]] = {}
        choices = {kind: {b: Choices(b, length) for b in BUDGETS} for kind in ("inputs", "whole")}
        given(exact[0], dtype, choices["inputs"], errors)
        own: dict[str, Any] = {}
        if dtype != "int8":
            own["next_token"] = whole(bases[dtype], predictor, batch, exact, dtype, choices["whole"], errors)
        own["errors"] = {n: {kind: e.row() for kind, e in kinds.items()} for n, kinds in errors.items()}
        own["choice"] = {
            kind: {f"{b:g}": c.row() for b, c in budgets.items()}
            for kind, budgets in choices.items()
            if next(iter(budgets.values())).equal
        }
        found[dtype] = own
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The table of one base."""
    yield f"{found['base']}, {found['tokens']} tokens, predictor {found['predictor']}; rms (max), relative to the rms"
    for dtype in ("float32", "bfloat16", "int8"):
        yield f"  {dtype:32}" + "".join(f"{kind:>22}" for kind in KINDS)
        for name, kinds in found[dtype]["errors"].items():
            cells = (f"{kinds[k]['rms']:.1e} ({kinds[k]['max']:.1e})" if k in kinds else "" for k in KINDS)
            yield f"    {name:30}" + "".join(f"{cell:>22}" for cell in cells)
        for kind, budgets in found[dtype]["choice"].items():
            for budget, c in budgets.items():
                yield (
                    f"    choice of {float(budget):<7.4g} {kind:10} equal sets {100 * c['equal_sets']:6.2f} %, tokens "
                    f"{100 * c['equal_tokens']:6.2f} %, mass lost {c['mass_lost']:.1e}, at worst "
                    f"{c['mass_lost_at_worst']:.1e}"
                )
        if "next_token" in found[dtype]:
            n = found[dtype]["next_token"]
            yield (
                f"    next token: greedy {100 * n['greedy_agreement']:.2f} % the same, divergence "
                f"{n['divergence_nats']:.1e} nats; {n['nats_a_token']:.5f} nats a token for "
                f"{n['nats_a_token_float64']:.5f}"
            )
    yield f"  cosine of float32 angles, positions up to 131,072: {found['rotary_float32_131072']:.1e} at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="tiny", help="a base as for train.py")
    parser.add_argument("--text", type=pathlib.Path, help="a text (default: the package's own README)")
    parser.add_argument("--run", help="a run directory with a trained lookahead predictor (default: step 0)")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--name", help="what to call the base in the file (default: as given)")
    parser.add_argument("--json", type=pathlib.Path, help="add the figures to this file, in place of the same name's")
    arguments = parser.parse_args()

    path = arguments.text or pathlib.Path(__file__).parent.parent / "README.md"
    label = arguments.name or arguments.base
    found = measure(arguments.base, path.read_text(encoding="utf-8"), arguments.tokens, arguments.run, label)
    print("\n".join(lines(found)), flush=True)
    if arguments.json:
        report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"bases": []}
        kept = [b for b in report["bases"] if (b["base"], b["predictor"]) != (label, found["predictor"])]
        report = {"bases": [*kept, found | {"text": path.name}], "versions": versions()}
        report["device"] = f"{jax.default_backend()} {jax.devices()[0].device_kind}"
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
