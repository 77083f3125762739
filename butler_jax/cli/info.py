"""What a run directory holds, how its checkpoints are, and how to go on: `python -m butler_jax.info RUN`.

It reads files only: no base, no accelerator, and a training in that directory is not disturbed. Whatever the files
hold, it says what is wrong with them and shows the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from butler_jax.cli.command_line import read, run
from butler_jax.parallel import parse_hosts
from butler_jax.pretraining import PretrainConfig
from butler_jax.runs import LEVELS, RECORDS, checkpoints, holder, read_records
from butler_jax.storage import deeper, fits, number, open_regular, parse_object, read_object, shown, whole
from butler_jax.training import FitConfig, TrainConfig

PARTS = ("config.json", RECORDS, "metrics.jsonl", "checkpoints")
MOST_BYTES = 1 << 20
"""The largest config.json that is read, and how much of the end of metrics.jsonl."""

LONGEST_ROW = 1 << 16
"""More bytes than a row of metrics.jsonl has: what is longer was not cut off by a kill."""

ROWS = 1000
"""How many lines of metrics.jsonl are tried, from the last."""

STARTS = 50
"""How many starts are printed, the last ones."""

LONGEST_CELL, LONGEST_TEXT = 500, 10_000
"""Characters printed of one value, in a table and on a line."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show what a run directory holds: settings, starts, checkpoints (whole or damaged), and the commands to go on."""

    run: tyro.conf.Positional[Path]
    """Directory of a training run, of save_predictor, or a copy of one."""
    json: bool = False
    """Print it as JSON, NaN and infinities as text."""


def inspect(run_dir: Path) -> dict[str, Any]:
    """All that a run directory says of itself, JSON-ready.

    state: in words, "finished, ..." only where the last step is saved and whole. config: config.json, {} where it is
    absent. starts: the records of run.json. checkpoints: for each {step, loss, bytes, state, damage, best, base,
    fingerprint}, where state is "whole" or "damaged". set_aside, unfinished: directories of damaged checkpoints, of
    saves that a kill cut off or that are being written. metrics: the last row, whose numbers may be NaN or infinite.
    bytes: of all files. go_on, evaluate: commands, None where there is nothing to go on with. problems: what is damaged
    otherwise.

    Raises FileNotFoundError for a directory that holds no run.
    """
    if not any((run_dir / part).exists() for part in PARTS):
        raise FileNotFoundError(
            f"{run_dir} is no run directory: it has none of {', '.join(PARTS)}; give the directory of a run of train.py"
        )
    problems: list[str] = []
    config, starts, held = _config(run_dir, problems), _starts(run_dir, problems), holder(run_dir)
    metrics = _last_row(run_dir / "metrics.jsonl", problems)
    place = run_dir / "checkpoints"
    if os.path.lexists(place) and not place.is_dir():
        problems.append("checkpoints is no directory; move it away to go on")
    found = list(_checkpoints(place))
    usable = [one for one in found if one["state"] != "damaged"]
    for one in found:
        one["best"] = one is min(usable, key=lambda o: o["loss"], default=None)
    done = max((one["step"] for one in usable), default=0)
    return {
        "run": str(run_dir),
        "state": _state(config, starts, held, done),
        "config": config,
        "starts": starts,
        "checkpoints": found,
        "set_aside": sorted(str(path) for path in (run_dir / "damaged").glob("*")),
        "unfinished": sorted(str(path) for path in (run_dir / "checkpoints").glob(f"*{checkpoints.UNFINISHED}*")),
        "metrics": metrics,
        "bytes": _size(run_dir),
        "go_on": None if held else _go_on(run_dir, config, starts, done),
        "evaluate": _evaluate(run_dir, config, starts, bool(usable)),
        "problems": problems,
    }


def _kind(config: dict[str, Any]) -> type[FitConfig] | None:
    return TrainConfig if "predictor" in config else PretrainConfig if "vocab_size" in config else None


def _config(run_dir: Path, problems: list[str]) -> dict[str, Any]:
    path = run_dir / "config.json"
    try:
        config = read_object(path, most=MOST_BYTES)
        kind = _kind(config)
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
    for step in checkpoints.steps(directory):
        path = directory / str(step)
        size, loss, facts = _size(path), None, {}
        try:
            damage = checkpoints.damage(path)
        except (OSError, ValueError, RecursionError) as error:
            damage = [f"it cannot be checked ({error})"]
        try:
            facts = read_object(path / checkpoints.METADATA)["custom_metadata"]
            loss = number(facts["metrics"]["loss"], "its loss")
        except (OSError, ValueError, KeyError, TypeError) as error:
            damage = damage or [f"what it says of itself is unreadable ({type(error).__name__}: {error})"]
        if path.exists():  # or the training has removed it meanwhile
            base, fingerprint = _base(facts)
            yield {"step": step, "loss": loss, "bytes": size, "state": "damaged" if damage else "whole",
                   "damage": damage, "base": base, "fingerprint": fingerprint}  # fmt: skip


def _base(facts: Any) -> tuple[str | None, ...]:
    """The base's name and fingerprint, of what a checkpoint or a start says; None for what is no text."""
    found = (facts.get(name) if isinstance(facts, dict) else None for name in ("base", "fingerprint"))
    return tuple(value if isinstance(value, str) else None for value in found)


def _size(directory: Path) -> int:
    """Bytes of the files below a directory."""
    total, left = 0, [directory]
    while left:  # and not rglob, which does not go as deep as directories may lie in each other
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    elif entry.is_file():
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def _state(config: dict, starts: list[dict], held: str | None, done: int) -> str:
    saved = f"saved up to step {done} of {config['steps']}" if "steps" in config else f"saved at step {done}"
    if held:
        return f"training now (process {held}), {saved}"
    if not starts:
        return saved
    ended, to, steps = starts[-1].get("ended"), starts[-1].get("to") or 0, config.get("steps", 0)
    if ended == "finished" and done < max(steps, to):
        ended = f"{'damaged' if done < (to or steps) else 'given more steps'} since it finished"
    return f"{ended or 'killed, or still running on another machine'}, {saved}"


def _go_on(run_dir: Path, config: dict, starts: list[dict], done: int) -> str | None:
    kind = _kind(config)
    if kind is None:
        return None
    where, script, run_dir = _from(run_dir, starts)
    settings, note = {**config, "run_dir": str(run_dir)}, ""
    if done >= config["steps"]:
        settings["steps"] = 2 * config["steps"]
    with contextlib.suppress(ValueError):  # of one process
        if host := parse_hosts(config.get("distributed", "")):
            settings["distributed"] = f"{host.address},{host.count},INDEX"
            note = f"  # on every host, INDEX is its own number: 0 ... {host.count - 1}"
    words = ["python", script] + ["pretrain"] * (kind is PretrainConfig) + _options(kind, settings)
    return where + shlex.join(words) + note


def _options(kind: type[FitConfig], settings: dict[str, Any]) -> list[str]:
    """The command-line options of all settings that are not at their defaults."""
    words = []
    for field in dataclasses.fields(kind):
        value = settings.get(field.name, field.default)
        if value is not None and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return words


def _evaluate(run_dir: Path, config: dict, starts: list[dict], usable: bool) -> str | None:
    where, script, run_dir = _from(run_dir, starts)
    script = str(Path(script).with_name("eval.py"))
    if "vocab_size" in config:
        model = run_dir / "model"
        ready = (model / "model.safetensors").is_file()
        return where + shlex.join(["python", script, "--base", str(model)]) if ready else None
    if not usable:
        return None
    base = [] if config else ["--base", "BASE"]  # of save_predictor
    return where + shlex.join(["python", script, "--run", str(run_dir), *base])


def _from(run_dir: Path, starts: list[dict]) -> tuple[str, str, Path]:
    """Where the run was started from, as a `cd` where that is elsewhere; its train.py and the run directory from there.

    On another machine, or where it was no train.py that started it: here, and train.py.
    """
    last = starts[-1] if starts else {}
    place = Path(last.get("directory") or ".")
    try:
        words = shlex.split(last.get("command") or "")[1:2]
        script = next((word for word in words if Path(word).name == "train.py"), "train.py")
        if not (place.is_dir() and (place / script).is_file()):
            return "", "train.py", run_dir
        if place.resolve() == Path.cwd():
            return "", script, run_dir
    except (OSError, ValueError):  # no path of this system
        return "", "train.py", run_dir
    return f"cd {shlex.quote(str(place))} && ", script, run_dir.resolve()


def _printable(value: Any, most: int = LONGEST_TEXT) -> str:
    """A value as text without what steers a terminal or cannot be written to it, cut where it is long."""
    text = str(value)
    cut = "..." if len(text) > most else ""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text[:most]) + cut


def _valid(value: Any) -> Any:
    """A JSON value with NaN and the infinities, which are no JSON, as text."""
    if isinstance(value, dict):
        return {name: _valid(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_valid(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `inspect` found."""

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for column in columns:
            made.add_column(column, justify="right" if column in ("step", "loss", "MB") else "left", overflow="fold")
        return made

    def add(made: Table, *cells: Any) -> None:
        made.add_row(*(Text(_printable(cell, LONGEST_CELL)) for cell in cells))

    def line(name: str, value: Any) -> None:
        if value not in (None, "", {}, []):
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            console.print(Text(f"{name:<12} {_printable(text)}"), soft_wrap=True)

    line("run", found["run"])
    line("state", found["state"])
    bases = {_base(one) for one in (*found["checkpoints"], *found["starts"][-1:]) if _base(one)[0]}
    line("base", "; ".join(f"{name} (fingerprint {fingerprint})" for name, fingerprint in sorted(bases, key=str)))
    line("on disk", f"{found['bytes'] / 1e6:,.1f} MB")
    line("last step", {k: f"{v:.6g}" for k, v in (found["metrics"] or {}).items() if fits(v, float)})
    settings = {k: v for k, v in found["config"].items() if v is not None and v != ""}
    line("settings", settings)
    if found["starts"]:
        several = f" (the last {STARTS} of {len(found['starts'])})" if len(found["starts"]) > STARTS else ""
        starts = table(f"starts{several}", "date", "host", "steps", "ended", "revision", "devices")
        for one in found["starts"][-STARTS:]:
            git, devices = one.get("git") or {}, one.get("devices") or {}
            revision = (git.get("revision") or "")[:10] + (" and changes" if git.get("dirty") else "")
            kinds = ", ".join(f"{n} x {kind}" for kind, n in (devices.get("kinds") or {}).items())
            steps = f"{one.get('from')} - {'?' if one.get('to') is None else one['to']}"
            date, host, ended = (one.get(name) or "" for name in ("date", "host", "ended"))
            add(starts, date, host, steps, ended or "not recorded", revision, kinds)
        console.print(starts)
        last = found["starts"][-1]
        for name in ("command", "directory", "versions", "environment"):
            line(name, last.get(name))
    if found["checkpoints"]:
        listed = table("checkpoints", "step", "loss", "MB", "state", "")
        for one in found["checkpoints"]:
            words = one["damage"][:1] + ["best"] * one["best"]
            loss = "" if one["loss"] is None else f"{one['loss']:.4f}"
            add(listed, one["step"], loss, f"{one['bytes'] / 1e6:,.1f}", one["state"], ", ".join(words))
        console.print(listed)
    for path in found["set_aside"]:
        line("set aside", path)
    for path in found["unfinished"]:
        line("unfinished", f"{path} (being written, or cut off: the next start removes it)")
    for problem in found["problems"]:
        line("problem", problem)
    line("to go on", found["go_on"])
    line("to evaluate", found["evaluate"])


def main(arguments: list[str]) -> int:
    """Inspect one run; returns the exit status."""

    def command() -> int:
        config = read(InfoConfig, arguments, "python -m butler_jax.info")
        found = inspect(config.run)
        if config.json:
            print(json.dumps(_valid(found), indent=1, allow_nan=False))
        else:
            show(found, Console(width=None if Console().is_terminal else 120))
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
