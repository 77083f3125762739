"""`butler-jax pretrain`: train the embedded base model."""

from __future__ import annotations

from typing import Any

from butler_jax.cli.training import run_training


def main(arguments: list[str]) -> int:
    """Train a base model; returns the exit status."""

    def read_config() -> Any:
        from butler_jax.cli.command_line import read
        from butler_jax.pretraining import PretrainConfig

        return read(PretrainConfig, arguments, "butler-jax pretrain")

    return run_training(read_config, _pretrain)


def _pretrain(config: Any) -> str:
    from butler_jax.pretraining import pretrain

    return f"the model is in {pretrain(config)}"
