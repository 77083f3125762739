"""What the model of the time assumes: one table, each figure with its unit and its source."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Assumption:
    """A figure, its unit, and where it is from."""

    value: float
    unit: str
    source: str


FITTED = "fitted to benchmarks/h200/sparse_decode.json"
GUESS = "a guess, not measured"
COUNTED = "counted on normal scores, 1/16 chosen"
SASS = "SASS"
LEGEND = (
    "SASS: machine code for an H200, of Llama-3.1-8B's layer at batch 1 with 32,768 and 131,072 tokens, by ptxas 13.5 "
    "and jax 0.10.2 (python -m benchmarks.sass). Other chips and shapes take the same figures."
)


def _sass(value: float, unit: str = "instructions of a warp") -> Assumption:
    return Assumption(value, unit, SASS)


class Assumptions(NamedTuple):
    """The assumptions of `prediction.py`. A measurement takes the place of one: `--assume launch=1.5`."""

    launch: Assumption = Assumption(2.0, "us", f"{GUESS}: from one kernel's end to the next one's work in one program")
    dense_launches: Assumption = Assumption(
        2, "kernels", f"{GUESS}: dense attention in splits, and one that joins them"
    )
    stream: Assumption = Assumption(0.94, "of the bandwidth", f"{FITTED}: dense at 131,072 tokens and batch 16")
    gather: Assumption = Assumption(
        0.47, "of the bandwidth", f"{FITTED}: a kept choice, batch 16, 131,072 beside 32,768 tokens"
    )
    cache_rate: Assumption = Assumption(
        32, "bytes a cycle and multiprocessor", f"{GUESS}: half of what a load can take"
    )
    cache_share: Assumption = Assumption(0.5, "of the L2 cache", f"{GUESS}: an array up to this is read from the cache")
    latency: Assumption = Assumption(800, "cycles", f"{GUESS}: a load from memory that another one waits for")
    barrier: Assumption = Assumption(60, "cycles", f"{GUESS}: a barrier of a program, its exchange included")
    dependent: Assumption = Assumption(3, "cycles", f"{GUESS}: from one instruction of a warp to the next")
    schedulers: Assumption = Assumption(4, "a multiprocessor", "NVIDIA's description of A100, H100 and B200")
    trials: Assumption = Assumption(8, "trials", f"{COUNTED}: of a row's threshold, up to 32,768 units")
    sample_trials: Assumption = Assumption(10, "trials", f"{COUNTED}: both bounds of the sample, beyond 32,768 units")
    candidate_trials: Assumption = Assumption(5, "trials", f"{COUNTED}: among the candidates")
    totals_code: Assumption = _sass(992)
    totals_registers: Assumption = _sass(40, "a thread")
    scores_code: Assumption = _sass(736)
    scores_join: Assumption = _sass(224, "instructions of a warp, every 128 blocks of tokens")
    scores_registers: Assumption = _sass(40, "a thread")
    scores_shared: Assumption = _sass(64, "bytes")
    select_code: Assumption = _sass(110)
    select_image: Assumption = _sass(23, "instructions for an image that a thread holds")
    select_gather: Assumption = _sass(45, "instructions of a warp, every part of a row's candidates")
    select_write: Assumption = _sass(271, "instructions of a warp, every block of units written")
    trial_code: Assumption = _sass(68)
    trial_image: Assumption = _sass(3, "instructions for an image that a thread holds")
    sample_trial_code: Assumption = _sass(87)
    candidate_trial_code: Assumption = _sass(134)
    bracket_code: Assumption = _sass(577)
    bracket_write: Assumption = _sass(484, "instructions of a warp, every block of units")
    select_registers: Assumption = _sass(64, "a thread")
    select_shared: Assumption = _sass(32768, "bytes, at most")
    xla_code: Assumption = Assumption(
        40, "instructions of a warp, every 4 elements of a thread", f"{GUESS}: an operation of XLA between the kernels"
    )
    attend_code: Assumption = _sass(409)
    attend_trip: Assumption = _sass(471, "instructions of a warp, every 64 tokens of 128 channels")
    attend_registers: Assumption = _sass(120, "a thread")
    attend_shared: Assumption = _sass(39424, "bytes, with two stages")
    merge_code: Assumption = _sass(592, "instructions of a warp, at most")
    merge_registers: Assumption = _sass(123, "a thread, at most")

    def table(self) -> dict[str, Assumption]:
        """The assumptions by name."""
        return self._asdict()

    def values(self) -> dict[str, float]:
        """The figures by name."""
        return {name: one.value for name, one in self.table().items()}

    def replaced(self, measured: dict[str, float]) -> Assumptions:
        """The same with other figures in place of some. Raises ValueError for names that are no assumption."""
        table = self.table()
        if unknown := sorted(measured.keys() - table.keys()):
            raise ValueError(f"no assumption is called {', '.join(unknown)}; they are {', '.join(table)}")
        return self._replace(**{n: replace(table[n], value=v, source="given") for n, v in measured.items()})

    def records(self) -> dict[str, dict[str, Any]]:
        """The assumptions by name, as JSON takes them."""
        return {name: asdict(one) for name, one in self.table().items()}

    def lines(self) -> list[str]:
        """The table, a line for each assumption."""
        return [f"{name:21} {one.value:>7g} {one.unit}: {one.source}" for name, one in self.table().items()] + [LEGEND]
