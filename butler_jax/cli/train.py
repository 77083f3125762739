"""Train a predictor (`python train.py`), or the embedded base model itself (`python train.py pretrain`)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

STOPPED = "stopped; run the same command again to go on"


def main(arguments: list[str]) -> int:
    """Run one training; returns the exit status. Errors of the user's making are one line, without a traceback."""

    def stop_at_once(number, frame):
        """On SIGTERM before and after the training; while it trains, fitting.py saves first."""
        with contextlib.suppress(RuntimeError):  # the signal came while it was being written to
            sys.stdout.flush()
        os.write(sys.stderr.fileno(), f"{STOPPED}\n".encode())
        os._exit(0)  # an exception would be lost where the signal meets a callback of the garbage collection

    before = signal.signal(signal.SIGTERM, stop_at_once)
    try:
        from butler_jax.cli.command_line import interrupts_end, read, run
        from butler_jax.parallel import join_hosts
        from butler_jax.pretraining import PretrainConfig
        from butler_jax.training import TrainConfig

        def command() -> int:
            if arguments[:1] == ["pretrain"]:
                config, train = read(PretrainConfig, arguments[1:], "train.py pretrain"), _pretrain
            else:
                config, train = read(TrainConfig, arguments, "train.py"), _distil
            join_hosts(config)
            return train(config)

        with interrupts_end(STOPPED):
            return run(command)
    except KeyboardInterrupt:  # the second one while it trains
        sys.stdout.flush()
        print(STOPPED, file=sys.stderr, flush=True)
        os._exit(130)  # JAX 0.10 crashes where the interpreter ends by itself after one
    finally:
        signal.signal(signal.SIGTERM, before)


def _pretrain(config) -> int:
    import jax

    from butler_jax.pretraining import pretrain

    made = pretrain(config)
    if jax.process_index() == 0:
        print(f"the model is in {made}")
    return 0


def _distil(config) -> int:
    import jax

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
    if jax.process_index() == 0:
        print(f"the best predictor so far is in {run_dir}; judge it with: python eval.py --run {run_dir}")
    return 0
