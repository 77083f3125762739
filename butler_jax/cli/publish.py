"""`butler-jax publish`: the files with which a predictor is handed on, in a directory or on the hub."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from butler_jax.cli.command_line import read, run
from butler_jax.storage import expand_home, require_local


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Hand a run's best predictor on: model.safetensors, config.json, and a model card made from the run's report.

    `load_predictor` and the option --run of the other commands take the directory, or the repository's name.
    """

    run: Path
    """A training run, a directory of save_predictor or save_pretrained, or a hub id."""
    out: Path | None = None
    """The directory to write. Default: only the repository."""
    hub: str | None = None
    """The repository "organisation/name" on the Hugging Face hub. It is made where it is missing."""
    private: bool = False
    """A new repository is private."""
    base: str | None = None
    """A Hugging Face directory, a hub id, a .gguf file, or tiny (embedded). Default: the run's."""
    base_id: str | None = None
    """The base's id on the hub, where it is loaded from files of another name."""
    report: Path | None = None
    """A report.json, or its directory. Default: eval in the run's directory."""

    def __post_init__(self):
        require_local(self)
        expand_home(self, "run", "out", "report")
        if self.out is None and self.hub is None:
            raise ValueError("nowhere to publish: give --out DIR, or --hub ORGANISATION/NAME")


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    return run(lambda: _publish(read(PublishConfig, arguments, "butler-jax publish")))


def _publish(config: PublishConfig) -> int:
    """Load the base, the predictor and the report, write the files, and send them."""
    from butler_jax.evaluation import Report
    from butler_jax.runs import load_predictor, load_run_base

    if config.private and config.hub is None:
        raise ValueError("--private is for a new repository on the hub: give --hub, or leave it out")
    place = config.report or config.run / "eval"
    report = Report.load(place) if config.report is not None or place.is_dir() else None
    base = load_run_base(config.run, config.base)
    predictor = load_predictor(config.run, base)
    if report is None:
        print(
            f"there is no report in {place}, so the card says nothing of quality; butler-jax eval makes one",
            file=sys.stderr,
        )
    card = dict(base_id=config.base_id, report=report)
    if config.out is not None:
        print(f"the files are in {predictor.save_pretrained(config.out, base, **card)}")
    if config.hub is not None:
        print(f"sent to {predictor.push_to_hub(config.hub, base, private=config.private, **card)}")
    return 0
