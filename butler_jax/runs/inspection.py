"""What a run directory holds, as data: settings, starts, checkpoints and what is damaged.

Files are only read. This needs no base, no accelerator and no Orbax, and does not disturb a training in the directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

from butler_jax.runs.directory import LEVELS, RECORDS, holder, read_records
from butler_jax.runs.finished_checkpoints import UNFINISHED, pick_best, read_facts, steps
from butler_jax.runs.finished_checkpoints import damage as find_damage
from butler_jax.runs.settings import CONFIG, read_settings
from butler_jax.storage import deeper, fits, number, open_regular, parse_object, shown, whole

PARTS = (CONFIG, RECORDS, "metrics.jsonl", "checkpoints")

MOST_BYTES = 1 << 20
"""How much of the end of metrics.jsonl is read."""

LONGEST_ROW = 1 << 16
"""The longest row of metrics.jsonl in bytes. A longer line without an end is damage, not a row that a kill cut off."""

ROWS = 1000
"""How many lines of metrics.jsonl are tried, from the last."""


def inspect_run(run_dir: Path, kind_of: Callable[[dict[str, Any]], type | None]) -> dict[str, Any]:
    """What a run directory holds, ready for JSON.

    Args:
        run_dir: Directory of a training run, of `save_predictor`, or a copy of one.
        kind_of: Gives the configuration class of the settings in config.json, or None if no training has such settings.

    Returns:
        A dictionary:

        - run: the directory.
        - state: in words. It begins with "finished" only where the last step is saved and whole.
        - config: the settings; {} where config.json is absent or damaged.
        - starts: the records of run.json.
        - checkpoints: a dictionary each, with step, loss (None: not validated), bytes, state ("whole" or "damaged"),
          damage, best, base and fingerprint.
        - set_aside: directories of damaged checkpoints.
        - unfinished: directories of saves that a kill cut off or that are being written.
        - metrics: the last row of metrics.jsonl; its numbers may be NaN or infinite.
        - bytes: of all files.
        - held: the process that trains now, as "PID on HOST"; None where there is none.
        - done: the newest step that is saved and whole.
        - problems: what else is damaged.

    Raises:
        FileNotFoundError: The directory holds no run.
    """
    there = [part for part in PARTS if (run_dir / part).exists()]
    if not there or (there == [CONFIG] and _is_foreign(run_dir)):
        why = f"its {CONFIG} is not that of a training" if there else f"it has none of {', '.join(PARTS)}"
        raise FileNotFoundError(
            f"{run_dir} is no run directory: {why}; give the directory of a run of butler-jax train"
        )
    problems: list[str] = []
    config, starts, held = _config(run_dir, kind_of, problems), _starts(run_dir, problems), holder(run_dir)
    metrics = _last_row(run_dir / "metrics.jsonl", problems)
    place = run_dir / "checkpoints"
    if os.path.lexists(place) and not place.is_dir():
        problems.append("checkpoints is no directory; move it away to go on")
    found = list(_checkpoints(place))
    usable = [one for one in found if one["state"] != "damaged"]
    best = pick_best({one["step"]: one["loss"] for one in usable})
    for one in found:
        one["best"] = one["step"] == best
    if found and not usable:
        problems.append(f"no checkpoint is whole; to start again, remove {run_dir}, or choose another --run-dir")
    done = max((one["step"] for one in usable), default=0)
    return {
        "run": str(run_dir),
        "state": _state(config, starts, held, done),
        "config": config,
        "starts": starts,
        "checkpoints": found,
        "set_aside": sorted(str(path) for path in (run_dir / "damaged").glob("*")),
        "unfinished": sorted(str(path) for path in place.glob(f"*{UNFINISHED}*")),
        "metrics": metrics,
        "bytes": _size(run_dir),
        "held": held,
        "done": done,
        "problems": problems,
    }


def _is_foreign(run_dir: Path) -> bool:
    """Whether config.json is a whole one of something else, such as a base model."""
    try:
        return read_settings(run_dir).keys().isdisjoint(("steps", "predictor", "fingerprint"))
    except (OSError, ValueError):
        return False


def _config(run_dir: Path, kind_of: Callable[[dict], type | None], problems: list[str]) -> dict[str, Any]:
    path = run_dir / CONFIG
    try:
        config = read_settings(run_dir)
        if "fingerprint" in config and not deeper(config, LEVELS):  # of save_pretrained, which has no steps
            return config
        kind = kind_of(config)
        if kind is None:
            raise ValueError(f"{path} names neither a predictor nor a vocab_size")
        whole(config.get("steps"), f"{path}: steps")
        hints = get_type_hints(kind)
        for name, value in config.items():
            right = fits(value, hints[name]) if name in hints else not deeper(value, LEVELS)
            if not right:
                raise ValueError(f"{path}: {shown(name)} cannot be {shown(value)}")
        return config
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"config.json is damaged ({error}); remove it, and give the settings again to go on")
        return {}


def _starts(run_dir: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        return read_records(run_dir)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        problems.append(f"{RECORDS} is damaged ({error}); the next start begins a new one")
        return []


def _last_row(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The last row of metrics.jsonl; a line after it that a kill cut off, or that is being written, is no problem."""
    try:
        with open_regular(path) as file:
            there = file.seek(0, os.SEEK_END)
            file.seek(max(0, there - MOST_BYTES))
            lines = (file.read(MOST_BYTES) or b"").splitlines(keepends=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"metrics.jsonl is damaged ({error})")
        return None
    found: list[str] = []
    row = next(filter(None, (_row(line, found) for line in reversed(lines[-ROWS:]))), None)
    if row is None and there > MOST_BYTES:
        found.append(f"no row in its last {MOST_BYTES} bytes")
    if found:
        problems.append(f"metrics.jsonl is damaged ({found[0]}); the next start drops such lines")
    return row


def _row(line: bytes, problems: list[str]) -> dict[str, Any] | None:
    try:
        row = parse_object(line, "a line")
        for name, value in row.items():
            if isinstance(value, (dict, list)):
                raise ValueError(f"{shown(name)} of a row cannot be {shown(value)}")
        return row
    except ValueError as error:
        if line.endswith(b"\n") or len(line) > LONGEST_ROW:
            problems.append(str(error))
        return None


def _checkpoints(directory: Path) -> Iterator[dict[str, Any]]:
    for step in steps(directory):
        path = directory / str(step)
        size, loss, facts = _size(path), None, {}
        try:
            damage = find_damage(path)
        except (OSError, ValueError, RecursionError) as error:
            damage = [f"it cannot be checked ({error})"]
        try:
            facts = read_facts(path)
            told = facts["metrics"]["loss"]  # None where it was saved without a validation
            loss = None if told is None else number(told, "its loss")
        except (OSError, ValueError, KeyError, TypeError) as error:
            damage = damage or [f"what it says of itself is unreadable ({type(error).__name__}: {error})"]
        if path.exists():  # otherwise the training has removed it meanwhile
            base, fingerprint = base_of(facts)
            yield {
                "step": step,
                "loss": loss,
                "bytes": size,
                "state": "damaged" if damage else "whole",
                "damage": damage,
                "base": base,
                "fingerprint": fingerprint,
            }


def base_of(facts: Any) -> tuple[str | None, ...]:
    """The name and fingerprint of the base in the facts of a checkpoint or a start; None for each that is not text."""
    found = (facts.get(name) if isinstance(facts, dict) else None for name in ("base", "fingerprint"))
    return tuple(value if isinstance(value, str) else None for value in found)


def _size(directory: Path) -> int:
    """Bytes of the files below a directory."""
    total, left = 0, [directory]
    while left:  # rglob fails on directories that are nested very deeply
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    elif entry.is_file():
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def _state(config: dict, starts: list[dict], held: str | None, done: int) -> str:
    if "fingerprint" in config:
        return "a predictor to hand on, without a training"
    saved = f"saved up to step {done} of {config['steps']}" if "steps" in config else f"saved at step {done}"
    if held:
        return f"training now (process {held}), {saved}"
    if not starts:
        return saved
    ended, to, steps = starts[-1].get("ended"), starts[-1].get("to") or 0, config.get("steps", 0)
    if ended == "finished" and done < max(steps, to):
        ended = f"{'damaged' if done < (to or steps) else 'given more steps'} since it finished"
    return f"{ended or 'killed, or still running on another machine'}, {saved}"
