"""How a report was made, as pairs of a name and a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from butler_jax.policies import POLICIES


def name_subject(about: Mapping[str, Any]) -> str:
    """What was evaluated: 'tiny with a lookahead predictor of rank 16'."""
    base = str(about.get("base") or "a base model")
    kinds = []
    for _, config in _list_predictors(about):
        known = config if isinstance(config, Mapping) else {}
        rank = f" of rank {known['rank']}" if known.get("rank") else ""
        kinds.append(f"a {known['kind']} predictor{rank}" if known.get("kind") else "a predictor")
    return f"{base} with {' and '.join(dict.fromkeys(kinds))}" if kinds else base


def _list_predictors(about: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The labels and the configuration of each predictor; labels of one predictor stand together."""
    found = about.get("predictors") or about.get("predictor") or {}
    if isinstance(found, Mapping) and found and not any(isinstance(v, Mapping) for v in found.values()):
        found = {"tokenbutler": found}
    named = found.items() if isinstance(found, Mapping) else (("tokenbutler", p) for p in found)
    labels: dict[str, list[str]] = {}
    configs = {}
    for label, config in named:
        key = json.dumps(config, sort_keys=True, default=str)
        labels.setdefault(key, []).append(label)
        configs[key] = config
    return [(", ".join(labels[key]), config) for key, config in configs.items()]


def describe_predictors(about: Mapping[str, Any]) -> str:
    """Describe the predictors in one line: 'tokenbutler (lookahead, rank 16, stride 4)'."""
    found = _list_predictors(about)
    if not found:
        return "No trained predictor."
    return "; ".join(f"{labels} ({_describe_predictor(config)})" for labels, config in found)


def _describe_predictor(config: Any) -> str:
    if not isinstance(config, Mapping):
        return str(config)
    words = [str(config["kind"])] if "kind" in config else []
    return ", ".join(
        words
        + [
            f"{k} {_format_value(v)}"
            for k, v in config.items()
            if k not in ("kind", "arrays", "training") and v is not None
        ]
    )


def describe_trainings(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Describe how each predictor was trained: its label, and 'step 300 of 300, 2,048 tokens a step (...)'."""
    return [
        (f"training of {labels}", _describe_training(config.get("training")))
        for labels, config in _list_predictors(about)
        if isinstance(config, Mapping)
    ]


def _describe_training(known: Mapping[str, Any] | None) -> str:
    if not known:
        return "not known: the predictor was given without its run"
    of = f" of {_format_count(known['steps'])}" if "steps" in known else ""
    words = [f"step {_format_count(known['step'])}{of}"] if "step" in known else []
    if "tokens_a_step" in known:
        rows = f"{_format_value(known.get('batch_size'))} x {_format_value(known.get('length'))}"
        words.append(f"{_format_count(known['tokens_a_step'])} tokens a step ({rows})")
    words += [f"on {known['data']}"] if "data" in known else []
    told = ("reach", "learning_rate", "objective", "seed", "dtype", "run", "command")
    return ", ".join(
        [*words, *(f"{name.replace('_', ' ')} {_format_value(known[name])}" for name in told if name in known)]
    )


def _format_count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else _format_value(number)


def list_facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List base, device, date, time, versions, trainings, notes, and settings and forms of policies, where known."""
    found = [
        (name, _format_value(about[name])) for name in ("base", "fingerprint", "device", "date") if about.get(name)
    ]
    if about.get("seconds") is not None:
        found.append(("time", f"{about['seconds']:,.0f} s{_describe_cells(about.get('cells'))}"))
    if about.get("versions"):
        found.append(("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())))
    found += describe_trainings(about)
    found += [("note", str(line)) for line in about.get("notes") or () if str(line).strip()]
    tuned = [p for p in about.get("policies") or () if isinstance(p, Mapping) and len(p) > 1]
    if tuned:
        found.append(("settings of policies", "; ".join(_describe_policy(p) for p in tuned)))
    names = [p["name"] for p in about.get("policies") or () if isinstance(p, Mapping) and p.get("name") in POLICIES]
    forms = [f"{name}: {POLICIES[name].form}" for name in dict.fromkeys(names) if POLICIES[name].form]
    if forms:
        found.append(("form of policies", "; ".join(forms)))
    return found


def _describe_cells(counts: Mapping[str, int] | None) -> str:
    """' for 12 cells, 10 of them kept from earlier evaluations'."""
    if not counts:
        return ""
    kept = f", {counts['kept']:,} of them kept from earlier evaluations" if counts["kept"] else ""
    return f" for {sum(counts.values()):,} cells{kept}"


def _describe_policy(described: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{k.replace('_', ' ')} {_format_value(v)}" for k, v in described.items() if k != "name")
    return f"{described.get('name', '')} ({inside})"


def list_settings(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the configuration, a pair for each setting that has a value: not None, and not an empty list."""
    shown = ((name, _format_value(value)) for name, value in (about.get("config") or {}).items())
    return [(name, text) for name, text in shown if text]


def _format_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_format_value(v) for v in value)
    if isinstance(value, Mapping):
        shown = ((str(name).replace("_", " "), _format_value(inner)) for name, inner in value.items())
        return ", ".join(f"{name} {text}" for name, text in shown if text)
    return "" if value is None else str(value).strip()
