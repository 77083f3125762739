"""The settings of a training run, as its config.json records them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from butler_jax.predictors import CONFIG, WEIGHTS
from butler_jax.runs.finished_checkpoints import read_facts, steps
from butler_jax.storage import read_object, shown
from butler_jax.weights import download, parse_hub_id

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


def with_former_defaults(predictor: Any) -> Any:
    """Settings of a predictor; those that versions before did not write, or left open, get what they meant then."""
    if not isinstance(predictor, dict):
        return predictor
    found = {"target": "attention", "offset": "none", "stride": 4, **predictor}
    if found.get("value_channels", 0) is None:
        found["value_channels"] = 0 if found["target"] in ("attention", "weight") else 2
    return found


def read_settings(run: str | Path) -> dict[str, Any]:
    """The settings of a run directory, under their present names.

    Raises:
        FileNotFoundError: The directory has no config.json.
        ValueError: config.json holds no JSON object.
    """
    return with_present_names(read_object(Path(run) / CONFIG, most=MOST_BYTES))


def with_present_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a training with FORMER_NAMES moved to their places. Settings that are nested already stay.

    Those that versions before did not write get what they meant then.
    """
    settings = {"hidden" if name == "inner" else name: value for name, value in settings.items()}  # of a pretraining
    if "predictor" in settings and "steps" in settings:  # rows of trainings before kept their positions
        settings = {"reach": 0, **settings}
    if isinstance(settings.get("predictor"), dict):
        return {**settings, "predictor": with_former_defaults(settings["predictor"])}
    if not isinstance(settings.get("predictor"), str):
        return settings
    found = {name: value for name, value in settings.items() if name not in FORMER_NAMES}
    for name, (group, inner) in FORMER_NAMES.items():
        if name in settings:
            found.setdefault(group, {})[inner] = settings[name]
    return {**found, "predictor": with_former_defaults(found["predictor"])}


def find_run(run: str | Path) -> Path:
    """The directory of a run, or of a predictor that was handed on. One of the hub is downloaded.

    A name below a directory that exists here, as in runs/my-run, is not looked for on the hub.

    Raises:
        FileNotFoundError: It is not there, or the hub does not deliver it.
    """
    path = Path(run).expanduser()
    if path.exists():
        return path
    asked = parse_hub_id(str(run))
    if asked is not None and not path.parent.is_dir():
        return download(*asked)
    raise FileNotFoundError(f"no such directory: {run}; give the directory of a run of butler-jax train")


def is_pretrained(directory: Path) -> bool:
    """Whether `save_pretrained` wrote this directory."""
    return (directory / WEIGHTS).is_file() and not (directory / "checkpoints").exists()


def pin(base: str, revision: str | None) -> str:
    """The spec of a base at a revision."""
    return base if revision is None else f"{base}@{revision}"


def run_base(run: str | Path) -> str:
    """The spec of the base that a run was trained for, at its recorded revision. Raises as `run_config`."""
    settings = run_config(run)
    revision = settings.get("revision")
    if not isinstance(revision, str | None):
        raise ValueError(f"{run}/{CONFIG}: the revision must be a text, got {shown(revision)}")
    return pin(settings["base"], revision)


def run_config(run: str | Path) -> dict[str, Any]:
    """The settings of a run that trained a predictor; of a directory of `save_predictor`, the base alone.

    Raises:
        FileNotFoundError: It is no run directory.
        ValueError: config.json names no base, or its data are not text.
    """
    path = find_run(run) / CONFIG
    checkpoints = path.parent / "checkpoints"
    if path.is_file():
        settings = read_settings(path.parent)
    elif there := steps(checkpoints):
        path = checkpoints / str(there[-1])
        facts = read_facts(path)
        settings = {name: facts[name] for name in ("base", "revision") if name in facts}
    else:
        raise FileNotFoundError(
            f"{run} is no run directory: it has no {CONFIG}; give the directory of a run of butler-jax train"
        )
    if not isinstance(settings.get("base"), str):
        raise ValueError(
            f"{path} names no base: {run} is no run that trained a predictor; give the directory of a run of "
            "butler-jax train"
        )
    if not isinstance(settings.get("data", ""), str):
        raise ValueError(f"{path}: data must be a text, got {shown(settings.get('data'))}")
    return settings


def run_data(run: str | Path | None) -> str:
    """The data that a training run read; python_docs without a run.

    Relative paths are those of the directory that the run was started from.
    """
    from butler_jax.data import anchor_spec
    from butler_jax.runs.directory import records, started_elsewhere

    if run is None:
        return "python_docs"
    data, place = run_config(run).get("data", "python_docs"), started_elsewhere(records(find_run(run)))
    return data if place is None else anchor_spec(data, place)
