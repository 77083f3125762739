"""`butler-jax train`: distil a predictor."""

from __future__ import annotations

from typing import Any

from butler_jax.cli.training import run_training


def main(arguments: list[str]) -> int:
    """Train a predictor; returns the exit status."""

    def read_config() -> Any:
        from butler_jax.cli.command_line import read
        from butler_jax.training import TrainConfig

        return read(TrainConfig, arguments, "butler-jax train")

    return run_training(read_config, _train)


def _train(config: Any) -> str:
    from butler_jax.parallel import make_mesh, shardings_for
    from butler_jax.runs import claim
    from butler_jax.training import check_run, default_run_dir, distil
    from butler_jax.weights import load_base

    mesh = make_mesh(config.mesh, batch_size=config.batch_size // config.accumulate)
    run_dir = config.run_dir or default_run_dir(config)
    with claim(run_dir):  # what would be refused is refused before anything takes long
        check_run(run_dir, config)
    shardings = shardings_for(mesh) if mesh.size > 1 else None  # every device holds its own part from the start
    distil(load_base(config.base, dtype=config.dtype, shardings=shardings), config)
    return f"the best predictor so far is in {run_dir}; evaluate it with: butler-jax eval --run {run_dir}"
