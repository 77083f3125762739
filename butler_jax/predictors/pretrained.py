"""A predictor as files to hand on: model.safetensors, config.json, and README.md, the model card.

config.json names the base with its revision and fingerprint, so that the predictor is loaded for no other base.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors.numpy import save

from butler_jax.model import name_leaves, require_loaded
from butler_jax.parallel import hash_arrays
from butler_jax.storage import read_object, to_dict, write_whole, writing
from butler_jax.weights import Base, parse_hub_id, upload

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
LIBRARY, FORMAT = "butler-jax", 1
NOT_EVALUATED = "## Quality\n\nNo report came with this predictor. `butler-jax eval` makes one."


def write_pretrained(
    directory: str | Path,
    predictor: Any,
    base: Base,
    *,
    base_id: str | None = None,
    report: Any = None,
    name: str | None = None,
) -> Path:
    """Write the files of a predictor; arguments as of `Predictor.save_pretrained`. name: of its repository."""
    require_loaded(base, predictor)
    if base_id is not None and parse_hub_id(base_id) is None:
        raise ValueError(f"base_id={base_id!r} is no id on the hub; give ORGANISATION/NAME[@REVISION]")
    directory = Path(directory).expanduser()
    _check_place(directory)
    if report is not None:
        report = _report_of(report, predictor, base)
    arrays = {name: np.asarray(leaf) for name, leaf in name_leaves(predictor).items()}
    config = {
        "library_name": LIBRARY,
        "format": FORMAT,
        "version": _version(),
        "base": base_id or base.name,
        "revision": base.revision,
        "fingerprint": base.fingerprint,
        "predictor": to_dict(predictor.config),
        "parameters": sum(math.prod(array.shape) for array in arrays.values()),
    }
    card = _make_card(config, report, name)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / CONFIG, json.dumps(config, indent=2) + "\n")  # first: it says whose files these are
    write_whole(directory / WEIGHTS, save(arrays, metadata={"format": "np"}))  # save_file hides it from other users
    write_whole(directory / CARD, card)
    return directory


def _report_of(report: Any, predictor: Any, base: Base) -> Any:
    """The report without the other predictors that it compares.

    Raises ValueError for a report about another base, or about other predictors alone.
    """
    if report.about.get("fingerprint") not in (None, base.fingerprint):
        raise ValueError(
            f"the report is about base {report.about.get('base')!r} ({report.about['fingerprint']}), the predictor for "
            f"{base.name!r} ({base.fingerprint}); give the report of this predictor"
        )
    predictors = report.about.get("predictors") or {}
    evaluated = {label: one.get("arrays") for label, one in predictors.items()}
    if not evaluated or None in evaluated.values():
        return report
    own = hash_arrays(predictor)
    if own not in evaluated.values():
        raise ValueError(
            "the report is about another predictor, or about another step of its training; run butler-jax eval again, "
            "or give the report of this predictor"
        )
    others = {label for label, arrays in evaluated.items() if arrays != own}
    about = {**report.about, "predictors": {label: one for label, one in predictors.items() if label not in others}}
    return dataclasses.replace(report, rows=[row for row in report.rows if row["policy"] not in others], about=about)


def _check_place(directory: Path) -> None:
    """Refuse a directory where other files would be lost: a run, a base model, a project with a README.md."""
    if (directory / "checkpoints").exists():
        raise FileExistsError(f"{directory} is a run's directory; choose another one for the files to hand on")
    there = [name for name in (WEIGHTS, CONFIG, CARD) if (directory / name).exists()]
    if not there:
        return
    try:
        library = read_object(directory / CONFIG).get("library_name")
    except (OSError, ValueError):
        library = None
    if library != LIBRARY:
        raise FileExistsError(
            f"{directory} has {', '.join(there)}, but not of a predictor; choose another directory, so that nothing is "
            "overwritten"
        )


def push_pretrained(name: str, predictor: Any, base: Base, *, private: bool = False, **card: Any) -> str:
    """Write the files of a predictor and send them to the hub; arguments as of `Predictor.push_to_hub`."""
    with tempfile.TemporaryDirectory() as place:
        return upload(write_pretrained(place, predictor, base, name=name, **card), name, private=private)


def _version() -> str:
    try:
        return importlib.metadata.version(LIBRARY)
    except importlib.metadata.PackageNotFoundError:  # in a clone
        return "not installed"


def _make_card(config: dict[str, Any], report: Any, name: str | None) -> str:
    """The model card: base, predictor and use, and what a report says of training and quality."""
    environment = Environment(
        loader=PackageLoader("butler_jax.predictors"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    results = NOT_EVALUATED if report is None else report.card()
    base, revision = config["base"], config["revision"]
    return environment.get_template(f"{CARD}.j2").render(
        config,
        name=name,
        base_on_hub=parse_hub_id(base) is not None,
        base_is_local=parse_hub_id(base) is None and base != "tiny",
        pinned=f"{base}@{revision}" if revision else base,
        results=results.strip(),
    )
