"""What a run directory holds, how its checkpoints are, and how to go on: `python -m butler_jax.info RUN`.

It reads files only: no base, no accelerator, and a training in that directory is not disturbed.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from butler_jax import checkpoints
from butler_jax.command_line import read, run
from butler_jax.configs import FitConfig, PretrainConfig, TrainConfig
from butler_jax.run_directory import RECORDS, holder, records

PARTS = ("config.json", RECORDS, "metrics.jsonl", "checkpoints")


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show what a run directory holds: settings, starts, checkpoints (whole or damaged), and the commands to go on."""

    run: tyro.conf.Positional[Path]
    """Directory of a training run, of save_predictor, or a copy of one."""
    json: bool = False
    """Print it as JSON."""


def inspect(run_dir: Path) -> dict[str, Any]:
    """All that a run directory says of itself, JSON-ready.

    state: in words. config: config.json, {} where it is absent. starts: the records of run.json. checkpoints: for each
    {step, loss, bytes, state, damage, best, base, fingerprint}, where state is "whole", "damaged" or "unchecked" (no
    digests: saved by an older version). set_aside, unfinished: directories of damaged checkpoints, of saves that a kill
    cut off or that are being written. metrics: the last row. bytes: of all files. go_on, evaluate: commands, None where
    there is nothing to go on with. problems: what is damaged otherwise.

    Raises FileNotFoundError for a directory that holds no run.
    """
    if not any((run_dir / part).exists() for part in PARTS):
        raise FileNotFoundError(
            f"{run_dir} is no run directory: it has none of {', '.join(PARTS)}; give the directory of a run of train.py"
        )
    problems: list[str] = []
    config, starts, held = _config(run_dir, problems), records(run_dir), holder(run_dir)
    if (run_dir / RECORDS).exists() and not starts:
        problems.append(f"{RECORDS} is damaged; the next start begins a new one")
    metrics = _last_row(run_dir / "metrics.jsonl")
    found = list(_checkpoints(run_dir / "checkpoints"))
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


def _config(run_dir: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / "config.json").read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        problems.append(f"config.json is damaged ({error}); remove it, and give the settings again to go on")
        return {}


def _last_row(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    for line in reversed(path.read_text(errors="replace").splitlines()):
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):  # cut off by a kill, or being written
            continue
    return None


def _checkpoints(directory: Path) -> Iterator[dict[str, Any]]:
    for step in checkpoints.steps(directory):
        path = directory / str(step)
        damage, size = checkpoints.damage(path), _size(path)
        try:
            facts = checkpoints.facts(path)
            loss = facts["metrics"]["loss"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            loss, facts = None, {}
            damage = damage or [f"what it says of itself is unreadable ({error})"]
        if path.exists():  # or the training has removed it meanwhile
            state = "damaged" if damage else "unchecked" if damage is None else "whole"
            base = facts.get("base") if isinstance(facts.get("base"), str) else None  # a pretraining has none
            yield {"step": step, "loss": loss, "bytes": size, "state": state, "damage": damage or [],
                   "base": base, "fingerprint": facts.get("fingerprint")}  # fmt: skip


def _size(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.lstat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _state(config: dict, starts: list[dict], held: str | None, done: int) -> str:
    saved = f"saved up to step {done} of {config['steps']}" if "steps" in config else f"saved at step {done}"
    if held:
        return f"training now (process {held}), {saved}"
    if not starts:
        return saved
    ended = starts[-1].get("ended")
    return f"{ended or 'killed, or still running on another machine'}, {saved}"


def _go_on(run_dir: Path, config: dict, starts: list[dict], done: int) -> str | None:
    kind = TrainConfig if "predictor" in config else PretrainConfig if "vocab_size" in config else None
    if kind is None:
        return None
    where, run_dir = _from(run_dir, starts)
    settings = {**config, "run_dir": str(run_dir)}
    if done >= config["steps"]:
        settings["steps"] = 2 * config["steps"]
    words = ["python", "train.py"] + ["pretrain"] * (kind is PretrainConfig) + _options(kind, settings)
    return where + shlex.join(words)


def _options(kind: type[FitConfig], settings: dict[str, Any]) -> list[str]:
    """The command-line options of all settings that are not at their defaults."""
    words = []
    for field in dataclasses.fields(kind):
        value = settings.get(field.name, field.default)
        if value is not None and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return words


def _evaluate(run_dir: Path, config: dict, starts: list[dict], usable: bool) -> str | None:
    where, run_dir = _from(run_dir, starts)
    if "vocab_size" in config:
        model = run_dir / "model"
        ready = (model / "model.safetensors").is_file()
        return where + shlex.join(["python", "eval.py", "--base", str(model)]) if ready else None
    if not usable:
        return None
    base = [] if config else ["--base", "BASE"]  # of save_predictor
    return where + shlex.join(["python", "eval.py", "--run", str(run_dir), *base])


def _from(run_dir: Path, starts: list[dict]) -> tuple[str, Path]:
    """Where the run was started from, a `cd` where that is elsewhere on this machine; the run directory from there."""
    place = Path(starts[-1].get("directory", ".")) if starts else Path()
    if not (place / "train.py").is_file() or place.resolve() == Path.cwd():
        return "", run_dir
    return f"cd {shlex.quote(str(place))} && ", run_dir.resolve()


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `inspect` found."""

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for column in columns:
            made.add_column(column, justify="right" if column in ("step", "loss", "MB") else "left", overflow="fold")
        return made

    def line(name: str, value: Any) -> None:
        if value not in (None, "", {}, []):
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            console.print(f"{name:<12} {text}", highlight=False, markup=False, soft_wrap=True)

    line("run", found["run"])
    line("state", found["state"])
    bases = {(one["base"], one["fingerprint"]) for one in found["checkpoints"] if one["base"]}
    line("base", "; ".join(f"{name} (fingerprint {fingerprint})" for name, fingerprint in sorted(bases)))
    line("on disk", f"{found['bytes'] / 1e6:,.1f} MB")
    line("last step", {k: f"{v:.6g}" for k, v in (found["metrics"] or {}).items() if isinstance(v, (int, float))})
    settings = {k: v for k, v in found["config"].items() if v is not None and v != ""}
    line("settings", settings)
    if found["starts"]:
        starts = table("starts", "date", "host", "steps", "ended", "revision", "devices")
        for one in found["starts"]:
            git, devices = one.get("git") or {}, one.get("devices") or {}
            revision = git.get("revision", "")[:10] + (" and changes" if git.get("dirty") else "")
            kinds = ", ".join(f"{n} x {kind}" for kind, n in devices.get("kinds", {}).items())
            steps = f"{one.get('from')} - {'?' if one.get('to') is None else one['to']}"
            starts.add_row(
                one.get("date", ""), one.get("host", ""), steps, one.get("ended") or "not recorded", revision, kinds
            )
        console.print(starts)
        last = found["starts"][-1]
        for name in ("command", "directory", "versions", "environment"):
            line(name, last.get(name))
    if found["checkpoints"]:
        listed = table("checkpoints", "step", "loss", "MB", "state", "")
        for one in found["checkpoints"]:
            words = one["damage"][:1] + ["best"] * one["best"]
            loss = "" if one["loss"] is None else f"{one['loss']:.4f}"
            listed.add_row(str(one["step"]), loss, f"{one['bytes'] / 1e6:,.1f}", one["state"], ", ".join(words))
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
            print(json.dumps(found, indent=1))
        else:
            show(found, Console(width=None if Console().is_terminal else 120))
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
