"""Judge a base model and its predictor: every task under every policy and budget."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from butler_jax.base_model import check_length
from butler_jax.configs import EvalConfig, require, to_dict
from butler_jax.evaluation.coreference import coreference, coreference_batches
from butler_jax.evaluation.perplexity import perplexity, predicted_tokens, read_text, text_windows
from butler_jax.evaluation.recall import recall
from butler_jax.evaluation.report import Report, versions
from butler_jax.policies import Policy, make_policy
from butler_jax.policies.interface import describe
from butler_jax.predictors import Predictor

PREPARED_TOKENS = 8192  # of text that a policy is prepared on
Say = Callable[[str], None]


def evaluate(
    base: Any,
    predictor: Predictor | None = None,
    config: EvalConfig | None = None,
    *,
    data: str | None = None,
    say: Say | None = None,
) -> Report:
    """Run the tasks of a configuration on a base from load_base; nothing is written.

    predictor: needed by the policy tokenbutler; None reads it from config.run, and without a run that
    policy is left out. data: whose held-out part is read where config.text is None; default: the run's,
    else python_docs. say: receives a line of progress after each pass. Raises ValueError for an unknown
    policy, a context beyond the base's, or an empty text.
    """
    config = config or EvalConfig()
    base.require_tokenizer()
    say = say or (lambda line: None)
    settings = {"seed": config.seed}
    policies = [make_policy(name, **(settings if name == "random" else {})) for name in config.policies]
    if "perplexity" in config.tasks:
        check_length(base.config, config.context)
    if predictor is None and config.run is not None and any(p.needs_predictor for p in policies):
        from butler_jax.checkpoints import load_predictor

        predictor = load_predictor(config.run, base)
    if predictor is None:
        for policy in [p for p in policies if p.needs_predictor]:
            say(f"{policy.name} is left out: there is no trained predictor (give a run)")
        policies = [p for p in policies if not p.needs_predictor]
        require(bool(policies), "no policy is left to judge: tokenbutler needs a trained predictor, give a run")
    started = time.perf_counter()
    data = data or _run_data(config.run)
    policies = _prepared(policies, base, config, data)
    report = Report()
    if "perplexity" in config.tasks:
        batches = _text_batches(base, config, data, say)
        _judge_text(report, base, predictor, config, policies, batches, say)
    if "coreference" in config.tasks:
        _judge_coreference(report, base, predictor, config, policies, say)
    report.about.update(
        base=base.name,
        fingerprint=base.fingerprint,
        predictor=None if predictor is None else to_dict(predictor.config),
        policies=[describe(p) for p in policies],
        versions=versions(),
        device=f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        config=to_dict(config),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 1),
    )
    return report


def run_config(run: Path) -> dict[str, Any]:
    """The configuration of a training run. Raises FileNotFoundError or ValueError where unusable."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} is no run directory: it has no config.json; give the directory of a run of train.py"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    require(
        isinstance(config, dict) and "base" in config,
        f"{path} names no base: {run} is no run that trained a predictor; give the directory of a run of train.py",
    )
    return config


def _run_data(run: Path | None) -> str:
    return "python_docs" if run is None else run_config(run).get("data", "python_docs")


def _prepared(policies: Sequence[Policy], base: Any, config: EvalConfig, data: str) -> list[Policy]:
    """Policies with what they find out on text: a few rows of the training part of `data`."""
    if all(type(p).prepare is Policy.prepare for p in policies):
        return list(policies)
    from butler_jax.data import batches

    length = min(config.context, base.config.context)
    rows = batches(data, base.require_tokenizer(), length=length, batch_size=1, seed=1, data_dir=config.data_dir)
    rows = [next(rows) for _ in range(-(-PREPARED_TOKENS // length))]
    return [policy.prepare(base.model, rows) for policy in policies]


def _text_batches(base: Any, config: EvalConfig, data: str, say: Say) -> list[dict[str, np.ndarray]]:
    if config.text is not None:
        text = read_text(config.text)
        batches = text_windows(
            base.tokenizer, text, context=config.context, tokens=config.tokens, batch_size=config.batch_size,
            source=str(config.text),
        )  # fmt: skip
        source = str(config.text)
    else:
        from butler_jax.data import held_out

        count = -(-config.tokens // config.context)
        batch_size = min(config.batch_size, count)
        batches = held_out(
            data, base.tokenizer, length=config.context, count=-(-count // batch_size), batch_size=batch_size,
            data_dir=None if config.data_dir is None else str(config.data_dir),
        )  # fmt: skip
        source = f"the held-out part of {data}"
    found = sum(int((b["segments"] > 0).sum()) for b in batches)
    if found < config.tokens:
        say(f"{source} has {found:,} tokens, fewer than the {config.tokens:,} asked for: all of them are used")
    return batches


def _passes(policies: Sequence[Policy], config: EvalConfig):
    """(policy, budget as reported, selection): dense once, the others at every budget."""
    for policy in policies:
        for budget in (1,) if policy.name == "dense" else config.budgets:
            yield policy, budget, config.selection(1.0 if policy.name == "dense" else budget)


def _judge_text(report, base, predictor, config, policies, batches, say) -> None:
    count = predicted_tokens(batches)
    for policy, budget, selection in _passes(policies, config):
        began = time.perf_counter()
        value, attended = perplexity(base.model, batches, policy, selection, predictor, score_dtype=config.score_dtype)
        report.add("perplexity", policy.name, budget, value, "perplexity", count, attended)
        say(f"perplexity   {policy.name:12} {budget:<8g} {value:10.3f}   {time.perf_counter() - began:6.1f} s")
    sparse = [p for p in policies if p.name != "dense"]
    if not sparse:
        return
    began = time.perf_counter()
    found = recall(
        base.model, predictor, batches, sparse, config.budgets, sinks=config.sinks, window=config.window,
        score_dtype=config.score_dtype,
    )  # fmt: skip
    for policy in sparse:
        for budget in config.budgets:
            mass = found.mass[policy.name][budget]
            report.add(
                "recalled_mass", policy.name, budget, mass, "fraction", found.rows, found.attended[policy.name][budget]
            )
    for policy in [p for p in sparse if p.name in found.hit_rate] if found.hit_rows else ():
        report.add("hit_rate", policy.name, 0.5, found.hit_rate[policy.name], "fraction", found.hit_rows, 0.5)
    say(f"recalled mass and hit rate of {len(sparse)} policies   {time.perf_counter() - began:6.1f} s")


def _judge_coreference(report, base, predictor, config, policies, say) -> None:
    batches = coreference_batches(
        base.tokenizer, samples=config.samples, batch_size=config.batch_size, seed=config.seed,
        context=base.config.context,
    )  # fmt: skip
    for policy, budget, selection in _passes(policies, config):
        began = time.perf_counter()
        found = coreference(base.model, batches, policy, selection, predictor, score_dtype=config.score_dtype)
        for unit, n in (("token_accuracy", found.tokens), ("sample_accuracy", found.samples)):
            report.add("coreference", policy.name, budget, getattr(found, unit), unit, n, found.attended)
        say(
            f"coreference  {policy.name:12} {budget:<8g} {found.token_accuracy:10.3f}   "
            f"{time.perf_counter() - began:6.1f} s"
        )
