"""`butler-jax bench`: tokens per second, dense and sparse, beside transformers on torch.

All variants have the same weights, prompt and process. They take turns, so that other load on the machine slows all of
them alike. The median round counts.
"""

from __future__ import annotations

import json
import os

from butler_jax.cli.bench_config import BenchConfig
from butler_jax.cli.command_line import read, run


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit status."""
    return run(lambda: _bench(read(BenchConfig, arguments, "butler-jax bench")))


def _bench(config: BenchConfig) -> int:
    """Measure, print and write the figures."""
    import jax

    from butler_jax.cli.decoding_rounds import load_peer, measure
    from butler_jax.predictors import PredictorConfig, make_predictor
    from butler_jax.runs import load_predictor, versions
    from butler_jax.weights import load_base

    base = load_base(config.base, dtype=config.dtype)
    if config.run is None:
        predictor = make_predictor(base.config, PredictorConfig(rank=min(16, base.config.head_dim)))
    else:
        predictor = load_predictor(config.run, base)
    peer = load_peer(config, base) if config.peer else None
    rows = []
    for context in config.lengths():
        if context > base.config.context:
            print(f"{context} tokens are beyond the model's context of {base.config.context}: left out", flush=True)
            continue
        rows += measure(config, base, predictor, peer, context)
    if not rows:
        raise ValueError("no context is left to measure; give shorter --contexts")
    about = {
        "base": base.name,
        "device": f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "dtype": str(base.dtype),
        "versions": versions(),
    }
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps({"rows": rows, **about}, indent=2) + "\n", encoding="utf-8")
    print(f"load {about['load'][0]:.1f} on {about['cores']} cores; {about['dtype']}", flush=True)
    return 0
