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
    return ", ".join(words + [f"{k} {_words(v)}" for k, v in config.items() if k != "kind" and v is not None])


def facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of date, seconds, device, versions, base and fingerprint, and of settings and forms of policies."""
    found = [(name, _words(about[name])) for name in ("base", "fingerprint", "device", "date") if about.get(name)]
    if about.get("seconds") is not None:
        found.append(("time", f"{about['seconds']:,.0f} s"))
    if about.get("versions"):
        found.append(("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())))
    tuned = [p for p in about.get("policies") or () if isinstance(p, Mapping) and len(p) > 1]
    if tuned:
        found.append(("settings of policies", "; ".join(_policy(p) for p in tuned)))
    names = [p["name"] for p in about.get("policies") or () if isinstance(p, Mapping) and p.get("name") in POLICIES]
    forms = [f"{name}: {POLICIES[name].form}" for name in dict.fromkeys(names) if POLICIES[name].form]
    if forms:
        found.append(("form of policies", "; ".join(forms)))
    return found


def _policy(described: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{k} {_words(v)}" for k, v in described.items() if k != "name")
    return f"{described.get('name', '')} ({inside})"


def settings(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The configuration, a pair a setting; what is unset is left out."""
    return [(k, _words(v)) for k, v in (about.get("config") or {}).items() if v is not None]


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(v) for v in value)
    return json.dumps(value, default=str) if isinstance(value, Mapping) else str(value)
