"""Does it pay to estimate what is not read? The tail by the means of blocks of values, beside reading more keys.

    python -m benchmarks.tail --base tiny --run RUN --text FILE --windows 16 --json benchmarks/quality/tail_tiny.json

A row attends to its chosen keys. The tail adds the keys that are left out: the attention mass of each whole block of
them, as the policy's scores see it beside the mass that is read, times the mean of the block's values. The oracle knows
the mass exactly; for tokenbutler it follows from the predicted scores. For each KV head the means of blocks of N tokens
are D numbers for N tokens, of 2 D numbers a token in the cache: at every step 1 / (2 N) of the cache is read. So the
budget with a tail is smaller by that much in the rows "at equal bytes".

Windows after a prompt that is read densely; perplexity over dense in per cent, with the paired standard error over
windows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import butler_jax
from benchmarks.about import about
from butler_jax.data import cut_windows
from butler_jax.model import exponentials, weighted_values
from butler_jax.policies import TokenButler, make_policy
from butler_jax.policies.scoring import estimate_weights
from butler_jax.selection import SelectionConfig, limits_of
from butler_jax.simulation import calibrate_tolerance, simulator
from butler_jax.simulation.choice import chosen_mask
from butler_jax.simulation.predictions import predict_next


def attend_with_tail(chunk, *, policy, limits, rule, block):
    """As `sparse_chunk`, with the tail by means of blocks; 0 leaves it out."""
    mask, count = chosen_mask(chunk, lambda: policy(chunk.under(rule)), limits, rule)
    batch, kv_heads, _, size, keys = chunk.logits.shape
    shares = jnp.sum(mask, axis=3, dtype=jnp.int32) / jnp.maximum(count, 1).astype(jnp.float32)[:, None]
    mask = mask.reshape(batch, kv_heads, -1, size, keys)
    weights, total, _ = exponentials(chunk.logits, mask, chunk.sink_logits)
    output = weighted_values(weights, chunk.v)
    if block:
        contested = chunk.under(rule).contested
        logs = chunk.logits if not isinstance(policy, TokenButler) else estimate_weights(chunk.predicted, contested)
        contested = jnp.broadcast_to(contested[:, None, None], logs.shape)
        logs = jnp.where(contested, logs, -jnp.inf)
        mass = jnp.exp(logs - jnp.maximum(jnp.max(logs, axis=-1, keepdims=True), -1e30))
        ends = jnp.arange(keys, dtype=jnp.int32) // block * block + block  # the block of a key is whole from here on
        whole = (ends[None, None] <= chunk.rows.own[..., None] + 1)[:, None, None]
        read = jnp.sum(jnp.where(mask, mass, 0.0), axis=-1, keepdims=True)
        true = jnp.sum(jnp.where(mask & contested, weights, 0.0), axis=-1, keepdims=True)
        scale = jnp.where(read > 0, true / jnp.where(read > 0, read, 1.0), 0.0)
        left = jnp.where(mask | ~whole, 0.0, mass) * scale
        pad = -keys % block
        left = jnp.pad(left, ((0, 0),) * 4 + ((0, pad),)).reshape(*left.shape[:4], -1, block).sum(axis=-1)
        values = jnp.pad(chunk.v.astype(jnp.float32), ((0, 0), (0, 0), (0, pad), (0, 0)))
        means = values.reshape(*values.shape[:2], -1, block, values.shape[-1]).mean(axis=3)
        output, total = output + weighted_values(left, means), total + jnp.sum(left, axis=-1, keepdims=True)
    return (output / total).astype(chunk.v.dtype), jnp.mean(shares, axis=1), shares


def run(base: Any, predictor: Any, batches: list, policy: Any, config: SelectionConfig | None, block: int, prompt: int):
    """The losses of every window after the prompt, and the mean share of the keys read there."""
    length = batches[0]["tokens"].shape[1]
    rule = config and config.rule
    limits = config and limits_of(config, base.config, length)._replace(prompts=jnp.asarray([prompt], jnp.int32))

    @jax.jit
    def call(model, predictor, batch, limits):
        with mock.patch.object(simulator, "sparse_chunk", partial(attend_with_tail, block=block)):
            x, (fractions, _) = simulator.hidden_states(model, predictor, batch, limits, policy=policy, rule=rule)
        nll = predict_next(model, x, batch["tokens"], batch["segments"])[0]
        return nll[0, prompt:-1].mean(), fractions[np.asarray(base.config.served_layers), :, prompt:].mean()

    found = [call(base.model, predictor, jax.tree.map(jnp.asarray, dict(b)), limits) for b in batches]
    losses, shares = np.asarray(found, np.float64).T
    return losses, shares.mean()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--run", help="a run of butler-jax train, for tokenbutler")
    parser.add_argument("--text", required=True)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1 / 4, 1 / 8, 1 / 16])
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    base = butler_jax.load_base(given.base, dtype="float32")
    predictor = butler_jax.load_predictor(given.run, base) if given.run else None
    ids = base.require_tokenizer().encode(pathlib.Path(given.text).read_text())
    windows = [
        cut_windows(ids[i * given.context :][: given.context], context=given.context)[0] for i in range(given.windows)
    ]
    dense, _ = run(base, None, windows, make_policy("dense"), None, 0, given.prompt)
    rows = []
    contenders = [("oracle", "per_head"), ("oracle_residual", "per_head"), ("oracle_residual", "tolerance")]
    contenders += [("tokenbutler", "per_head"), ("tokenbutler", "tolerance")] if predictor else []
    for name, allocation in contenders:
        policy = make_policy(name)
        policy = policy.for_predictor(predictor) if name == "tokenbutler" else policy
        used = predictor if name == "tokenbutler" else None
        for budget in given.budgets:
            cells = [(0, budget)] + [(b, s) for b in given.blocks for s in (budget, budget - 1 / (2 * b)) if s > 1 / 64]
            for block, share in cells:
                config = SelectionConfig(budget=share)
                if allocation == "tolerance":
                    whole = SelectionConfig(budget=1.0, allocation="tolerance")
                    how = dict(policy=policy, prompt_tokens=given.prompt)
                    (config,) = calibrate_tolerance(base.model, used, windows[:4], whole, [share], **how)
                losses, read = run(base, used, windows, policy, config, block, given.prompt)
                over = 100 * np.expm1(losses - dense)
                row = dict(
                    policy=name, allocation=allocation, budget=budget, block=block, chosen=share, read=float(read)
                )
                row |= dict(over_dense=float(100 * np.expm1((losses - dense).mean())))
                row |= dict(error=float(over.std(ddof=1) / len(over) ** 0.5))
                rows.append(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    if given.json:
        facts = dataclasses.asdict(base.config)["context"], float(np.exp(dense.mean()))
        found = about("tail") | dict(base=base.name, context=facts[0], perplexity_dense=facts[1], rows=rows)
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
