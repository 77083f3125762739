"""Checkpoints through Orbax: the only file that imports it.

A run directory holds `config.json`, `metrics.jsonl` and `checkpoints/`; a checkpoint holds the trained module, the
optimiser, the step, the data iterators' state, and the fingerprint and name of the base it belongs to, never the base.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from butler_jax.configs import PredictorConfig, from_dict, require, to_dict
from butler_jax.hosts import gather
from butler_jax.predictors import Predictor, make_predictor

if TYPE_CHECKING:
    from butler_jax.weights import Base

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save at INFO and WARNING


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best by the metric `loss`.

    keep None only reads, and leaves a save that another process has in flight alone. about: JSON facts stored with
    every checkpoint (configuration, base). Use as a context manager, or call close().
    """

    def __init__(self, directory: Path, *, keep: int | None = None, about: dict | None = None):
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1)
        self.about = about or {}
        self._orbax = ocp.training.Checkpointer(
            Path(directory).absolute(),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=keep is not None,
        )
        # Orbax sweeps up in the background and waits for that at its first save only: a run that ends before it would
        # sweep away what the next one is saving.
        self._orbax._manager._maybe_await_cleanup_tmp_directory()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, in order."""
        return sorted(c.step for c in self._orbax.checkpoints)

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._orbax.latest.step if self._orbax.latest else None

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest loss, None where there is none."""
        return min(self._orbax.checkpoints, key=lambda c: c.metrics["loss"]).step if self._orbax.checkpoints else None

    def save(self, step: int, state: Any, data_state: Any, metrics: dict[str, float]) -> None:
        """Save in the background; a step already saved is left alone. data_state: this process's, JSON."""
        if step == self.latest():
            return
        about = {**self.about, "data": joined(gather(data_state))}
        copied = jax.tree.map(jnp.copy, _named(state))  # the next step is given the originals' memory
        self._orbax.save_async(step, copied, metrics=metrics, custom_metadata=about, force=True)

    def restore(self, step: int, state: Any) -> tuple[Any, Any]:
        """(state, the data state of all processes) at `step`, in the structure, dtypes and shardings of `state`.

        However many processes saved it. Raises ValueError where the base is another, or names or shapes differ.
        """
        metadata = self._orbax.metadata(step)
        saved, mine = metadata.custom_metadata, self.about
        require(
            "fingerprint" not in mine or saved.get("fingerprint") == mine["fingerprint"],
            f"{self._orbax.directory} belongs to base {saved.get('base')!r} (fingerprint {saved.get('fingerprint')}), "
            f"not to {mine.get('base')!r} ({mine.get('fingerprint')}); load that base, or choose another run directory",
        )
        require(
            not isinstance(saved["data"], list),
            f"{self._orbax.directory} was saved by an older version, whose place in the data cannot be read; finish "
            "the run with that version, or choose another run directory",
        )
        wanted = _named(state)
        _compare(metadata.metadata, wanted, self._orbax.directory / str(step))
        loaded = self._orbax.load(step, jax.tree.map(_abstract, wanted))
        return _unnamed(state, loaded), saved["data"]

    def restore_module(self, step: int, shapes: Any) -> Any:
        """The trained module alone, on the first device; shapes: its eval_shape.

        Raises ValueError where they differ.
        """
        saved = self._orbax.metadata(step).metadata
        wanted = {f"module.{name}": leaf for name, leaf in _named(shapes).items()}
        mine = {name: leaf for name, leaf in saved.items() if name.startswith("module.")}
        _compare(mine, wanted, self._orbax.directory / str(step))
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {n: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device) for n, m in saved.items()}
        loaded = self._orbax.load(step, abstract)
        return _unnamed(shapes, {name.removeprefix("module."): loaded[name] for name in mine})

    def facts(self, step: int) -> dict:
        """What `about` held when the step was saved."""
        return self._orbax.metadata(step).custom_metadata

    def wait(self) -> None:
        """Block until the save in flight is on disk."""
        self._orbax.wait()

    def close(self) -> None:
        """Finish what is being written."""
        self._orbax.close()


def _named(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple) -> str:
    parts = (str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
    return ".".join(part for part in parts if part != "value")


def _unnamed(like: Any, named: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: named[_name(path)], like)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _compare(saved: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    for name in sorted(set(saved) | set(wanted)):
        shapes = [tuple(tree[name].shape) if name in tree else None for tree in (saved, wanted)]
        require(
            shapes[0] == shapes[1],
            f"{where} does not fit: {name} is {shapes[0] or 'missing'} there and {shapes[1] or 'unknown'} here",
        )


def joined(states: list[Any], name: str = "state") -> Any:
    """One state of the data from those of all processes: dictionaries are united, lists go item by item.

    Raises ValueError where anything else is not the same in all, for then they read different data.
    """
    first = states[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for state in states for key in state)
        return {key: joined([state[key] for state in states if key in state], key) for key in keys}
    if isinstance(first, list):
        return [joined(list(items), name) for items in zip(*states, strict=True)]
    different = sorted({str(state) for state in states})
    require(
        len(different) == 1,
        f"the processes read different data: {name} is {' and '.join(different)}; give all hosts the same files and "
        "settings",
    )
    return first


def save_predictor(path: str | Path, predictor: Predictor, base: Base) -> None:
    """Write a predictor alone to directory `path`, with the name and fingerprint of its base.

    Raises FileExistsError where the directory holds one already.
    """
    path = Path(path)
    if (path / "checkpoints").exists():
        raise FileExistsError(f"{path} already holds checkpoints; choose another directory")
    with Checkpoints(path / "checkpoints", keep=1, about=about(base, predictor.config)) as checkpoints:
        checkpoints.save(0, {"module": predictor}, None, {"loss": 0.0})


def about(base: Base, config: PredictorConfig) -> dict:
    """What a checkpoint says of its predictor and the base it belongs to."""
    return {"base": base.name, "fingerprint": base.fingerprint, "predictor": to_dict(config)}


def load_predictor(path: str | Path, base: Base, *, step: int | None = None) -> Predictor:
    """The predictor of a run directory (its best checkpoint, or `step`), or of save_predictor.

    Raises FileNotFoundError where there is no checkpoint, ValueError where it was trained for another base.
    """
    directory = Path(path) / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(f"{path} has no checkpoints; give the directory of a run of train.py")
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.best() if step is None else step
        if step is None:
            raise FileNotFoundError(f"{directory} holds no finished checkpoint yet")
        if step not in checkpoints.steps():
            there = ", ".join(map(str, checkpoints.steps()))
            raise FileNotFoundError(f"{directory} has no checkpoint of step {step}; steps: {there}")
        facts = checkpoints.facts(step)
        check_base(facts, base, path)
        config = from_dict(PredictorConfig, facts["predictor"])
        return checkpoints.restore_module(step, jax.eval_shape(lambda: make_predictor(base.config, config)))


def check_base(facts: dict, base: Base, path: str | Path) -> None:
    """Raise ValueError where a checkpoint's predictor belongs to another base; names both."""
    require(
        facts["fingerprint"] == base.fingerprint,
        f"the predictor in {path} was trained for base {facts['base']!r} (fingerprint {facts['fingerprint']}), "
        f"not for {base.name!r} ({base.fingerprint}); load that base, or train a predictor for this one",
    )
