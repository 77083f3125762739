"""The settings of a training run, as its config.json records them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from butler_jax.storage import read_object, shown

CONFIG = "config.json"

MOST_BYTES = 1 << 20
"""The largest config.json that is read, in bytes."""

FORMER_NAMES = {
    "predictor": ("predictor", "kind"),
    "rank": ("predictor", "rank"),
    "stride": ("predictor", "stride"),
    "hidden": ("predictor", "hidden"),
    "sinks": ("selection", "sinks"),
    "window": ("selection", "recent"),
}
"""Names of settings before they were nested, and their places now."""


def read_settings(run: str | Path) -> dict[str, Any]:
    """The settings of a run directory, under their present names.

    Raises:
        FileNotFoundError: The directory has no config.json.
        ValueError: config.json holds no JSON object.
    """
    return with_present_names(read_object(Path(run) / CONFIG, most=MOST_BYTES))


def with_present_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a training with FORMER_NAMES moved to their places. Settings that are nested already stay."""
    settings = {"hidden" if name == "inner" else name: value for name, value in settings.items()}  # of a pretraining
    if not isinstance(settings.get("predictor"), str):
        return settings
    found = {name: value for name, value in settings.items() if name not in FORMER_NAMES}
    for name, (group, inner) in FORMER_NAMES.items():
        if name in settings:
            found.setdefault(group, {})[inner] = settings[name]
    return found


def run_config(run: str | Path) -> dict[str, Any]:
    """The settings of a run that trained a predictor.

    Raises:
        FileNotFoundError: It is no run directory.
        ValueError: config.json names no base, or its data are not text.
    """
    path = Path(run) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} is no run directory: it has no {CONFIG}; give the directory of a run of butler-jax train"
        )
    settings = read_settings(run)
    if not isinstance(settings.get("base"), str):
        raise ValueError(
            f"{path} names no base: {run} is no run that trained a predictor; give the directory of a run of "
            "butler-jax train"
        )
    if not isinstance(settings.get("data", ""), str):
        raise ValueError(f"{path}: data must be a text, got {shown(settings.get('data'))}")
    return settings


def run_data(run: str | Path | None) -> str:
    """The data that a training run read; python_docs without a run."""
    return "python_docs" if run is None else run_config(run).get("data", "python_docs")
