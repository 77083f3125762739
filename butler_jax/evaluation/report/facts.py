"""What a report says about how it was made, as pairs of words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from butler_jax.policies import POLICIES


def predictor_words(about: Mapping[str, Any]) -> str:
    """One line about the predictors: 'tokenbutler (lookahead, rank 16, stride 4)'."""
    found = about.get("predictors") or about.get("predictor")
    if not found:
        return "No trained predictor."
    if isinstance(found, Mapping) and not any(isinstance(v, Mapping) for v in found.values()):
        found = {"tokenbutler": found}
    named = found.items() if isinstance(found, Mapping) else (("tokenbutler", p) for p in found)
    return "; ".join(f"{label} ({_predictor(config)})" for label, config in named)


def _predictor(config: Any) -> str:
    if not isinstance(config, Mapping):
        return str(config)
    words = [str(config["kind"])] if "kind" in config else []
    return ", ".join(
        words + [f"{k} {_words(v)}" for k, v in config.items() if k not in ("kind", "training") and v is not None]
    )


def training_words(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How each predictor was trained: its label, and 'step 300 of 300, 2,048 tokens a step (...)'."""
    found = about.get("predictors")
    configs = found.items() if isinstance(found, Mapping) else ()
    return [(f"training of {label}", _training(c.get("training"))) for label, c in configs if isinstance(c, Mapping)]


def _training(known: Mapping[str, Any] | None) -> str:
    if not known:
        return "not known: the predictor was given without its run"
    of = f" of {_count(known['steps'])}" if "steps" in known else ""
    words = [f"step {_count(known['step'])}{of}"] if "step" in known else []
    if "tokens_a_step" in known:
        rows = f"{_words(known.get('batch_size'))} x {_words(known.get('length'))}"
        words.append(f"{_count(known['tokens_a_step'])} tokens a step ({rows})")
    words += [f"on {known['data']}"] if "data" in known else []
    told = ("learning_rate", "objective", "seed", "dtype", "run", "command")
    return ", ".join([*words, *(f"{name.replace('_', ' ')} {_words(known[name])}" for name in told if name in known)])


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else _words(number)


def facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of date, time, device, versions, base, trainings, and of settings and forms of policies."""
    found = [(name, _words(about[name])) for name in ("base", "fingerprint", "device", "date") if about.get(name)]
    if about.get("seconds") is not None:
        found.append(("time", f"{about['seconds']:,.0f} s{_cells(about.get('cells'))}"))
    if about.get("versions"):
        found.append(("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())))
    found += training_words(about)
    found += [("note", str(line)) for line in about.get("notes") or ()]
    tuned = [p for p in about.get("policies") or () if isinstance(p, Mapping) and len(p) > 1]
    if tuned:
        found.append(("settings of policies", "; ".join(_policy(p) for p in tuned)))
    names = [p["name"] for p in about.get("policies") or () if isinstance(p, Mapping) and p.get("name") in POLICIES]
    forms = [f"{name}: {POLICIES[name].form}" for name in dict.fromkeys(names) if POLICIES[name].form]
    if forms:
        found.append(("form of policies", "; ".join(forms)))
    return found


def _cells(counts: Mapping[str, int] | None) -> str:
    """' for 12 cells, 10 of them kept from earlier evaluations'."""
    if not counts:
        return ""
    kept = f", {counts['kept']:,} of them kept from earlier evaluations" if counts["kept"] else ""
    return f" for {sum(counts.values()):,} cells{kept}"


def _policy(described: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{k.replace('_', ' ')} {_words(v)}" for k, v in described.items() if k != "name")
    return f"{described.get('name', '')} ({inside})"


def settings(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The configuration, a pair a setting; what is unset is left out."""
    return [(k, _words(v)) for k, v in (about.get("config") or {}).items() if v is not None]


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(v) for v in value)
    return json.dumps(value, default=str) if isinstance(value, Mapping) else str(value)
