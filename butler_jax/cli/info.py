"""`butler-jax info`: show what a run directory holds, with the commands to go on, or what is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from butler_jax.cli.command_line import flag_of, read, run
from butler_jax.cli.installation import describe_installation, list_installation
from butler_jax.parallel import parse_hosts
from butler_jax.pretraining import PretrainConfig
from butler_jax.storage import fits
from butler_jax.training import FitConfig, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STARTS = 50
"""How many of the last starts are printed."""

LONGEST_CELL, LONGEST_TEXT = 500, 10_000
"""Characters printed of one value, in a table and on a line."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show what a run directory holds: settings, starts, checkpoints (whole or damaged), and the commands to go on.

    Files are only read. Whatever is damaged is named, and the rest is shown. Without a directory, show what is
    installed: versions of all packages, devices, and the cache of compiled programs.
    """

    run: tyro.conf.Positional[Path | None] = None
    """Directory of a training run, of save_predictor, of save_pretrained, or a copy of one. Default: what is
    installed."""
    json: bool = False
    """Print it as JSON, NaN and infinities as text."""


def main(arguments: list[str]) -> int:
    """Inspect one run, or this installation; returns the exit status."""

    def command() -> int:
        config = read(InfoConfig, arguments, "butler-jax info")
        found = describe_installation() if config.run is None else inspect(config.run)
        if config.json:
            print(json.dumps(_valid(found), indent=1, allow_nan=False))
        elif config.run is None:
            for name, text in list_installation(found):
                print(f"{name:<19} {text}")
        else:
            from rich.console import Console

            show(found, Console(width=None if Console().is_terminal else 120))
        return 0

    return run(command)


def kind_of(config: dict[str, Any]) -> type[FitConfig] | None:
    """The configuration class of a run's settings; None where the run is not a training."""
    if "fingerprint" in config:  # of save_pretrained
        return None
    return TrainConfig if "predictor" in config else PretrainConfig if "vocab_size" in config else None


def inspect(run_dir: Path) -> dict[str, Any]:
    """What `inspect_run` finds, with the commands to go on and to evaluate; None where there is none."""
    from butler_jax.runs import inspect_run

    found = inspect_run(run_dir, kind_of)
    return {**found, "go_on": _go_on(run_dir, found), "evaluate": _evaluate(run_dir, found)}


def _go_on(run_dir: Path, found: dict[str, Any]) -> str | None:
    config, kind = found["config"], kind_of(found["config"])
    if kind is None or found["held"] or (found["checkpoints"] and _none_whole(found)):  # it would be refused
        return None
    where, run_dir = _from(run_dir, found["starts"])
    settings, note = {**config, "run_dir": str(run_dir)}, ""
    if found["done"] >= config["steps"]:
        settings["steps"] = 2 * found["done"]
    with contextlib.suppress(ValueError):  # of one process
        if host := parse_hosts(config.get("distributed", "")):
            settings["distributed"] = f"{host.address},{host.count},INDEX"
            note = f"  # on every host, INDEX is its own number: 0 ... {host.count - 1}"
    name = "pretrain" if kind is PretrainConfig else "train"
    return where + shlex.join(["butler-jax", name, *_options(kind(), settings)]) + note


def _options(defaults: Any, settings: dict[str, Any]) -> Iterator[str]:
    """The command-line options of all settings that are not at their defaults.

    A setting that is chosen where it is left out is always named: another kind of predictor chooses otherwise.
    """
    for field in dataclasses.fields(defaults):
        default = getattr(defaults, field.name)
        value = settings.get(field.name)
        if dataclasses.is_dataclass(default):
            yield from _options(default, value or {})
        elif isinstance(value, bool) and value != default:
            yield f"--{'' if value else 'no-'}{flag_of(field).removeprefix('--')}"
        elif value is not None and (value != default or field.default is None):
            yield from (flag_of(field), str(value))


def _evaluate(run_dir: Path, found: dict[str, Any]) -> str | None:
    where, run_dir = _from(run_dir, found["starts"])
    if "vocab_size" in found["config"]:
        model = run_dir / "model"
        ready = (model / "model.safetensors").is_file()
        return where + shlex.join(["butler-jax", "eval", "--base", str(model)]) if ready else None
    if "fingerprint" not in found["config"] and _none_whole(found):
        return None
    base = [] if found["config"] else ["--base", "BASE"]  # of save_predictor
    return where + shlex.join(["butler-jax", "eval", "--run", str(run_dir), *base])


def _none_whole(found: dict[str, Any]) -> bool:
    """Whether no checkpoint is whole."""
    return all(one["state"] == "damaged" for one in found["checkpoints"])


def _from(run_dir: Path, starts: list[dict]) -> tuple[str, Path]:
    """A `cd` to the directory that the run was started from, and the run directory from there; "" for this one."""
    from butler_jax.runs import started_elsewhere

    place = started_elsewhere(starts)
    return ("", run_dir) if place is None else (f"cd {shlex.quote(str(place))} && ", run_dir.resolve())


def _flat(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings that are given, those of nested configurations beside the others."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from ((name if inner == "kind" else inner, one) for inner, one in _flat(value))
        elif value not in (None, ""):
            yield name, value


def _printable(value: Any, most: int = LONGEST_TEXT) -> str:
    """A value as text without control characters and others that a terminal cannot show, cut where it is long."""
    text = str(value)
    cut = "..." if len(text) > most else ""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text[:most]) + cut


def _valid(value: Any) -> Any:
    """A JSON value with NaN and infinities, which JSON does not have, as text."""
    if isinstance(value, dict):
        return {name: _valid(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_valid(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `inspect` found."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from butler_jax.runs import base_of

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
    bases = {base_of(one) for one in (*found["checkpoints"], *found["starts"][-1:]) if base_of(one)[0]}
    line("base", "; ".join(f"{name} (fingerprint {fingerprint})" for name, fingerprint in sorted(bases, key=str)))
    line("on disk", f"{found['bytes'] / 1e6:,.1f} MB")
    line("last step", {k: f"{v:.6g}" for k, v in (found["metrics"] or {}).items() if fits(v, float)})
    line("settings", dict(_flat(found["config"])))
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
