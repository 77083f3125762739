"""Train a predictor (`python train.py`), or the embedded base model itself (`python train.py pretrain`)."""

from __future__ import annotations

import sys

import jax
import tyro

from butler_jax.configs import PretrainConfig, TrainConfig


def main(arguments: list[str]) -> int:
    """Run one training; returns the exit status. Errors of the user's making are one line, without a traceback."""
    pretraining = arguments[:1] == ["pretrain"]
    kind = PretrainConfig if pretraining else TrainConfig
    try:
        config = tyro.cli(
            kind,
            args=arguments[1:] if pretraining else arguments,
            prog="train.py pretrain" if pretraining else "train.py",
        )
        if config.distributed:
            jax.distributed.initialize()
        return _pretrain(config) if pretraining else _distil(config)
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _pretrain(config: PretrainConfig) -> int:
    from butler_jax.base_training import pretrain

    print(f"the model is in {pretrain(config)}")
    return 0


def _distil(config: TrainConfig) -> int:
    from butler_jax.predictor_training import default_run_dir, distil
    from butler_jax.weights import load_base

    run_dir = config.run_dir or default_run_dir(config)
    distil(load_base(config.base, dtype=config.dtype), config)
    if jax.process_index() == 0:
        print(f"the predictor is in {run_dir}; judge it with: python eval.py --run {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
