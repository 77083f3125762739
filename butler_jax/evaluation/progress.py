"""Lines of progress while cells are measured, with the time that the rest will take."""

from __future__ import annotations

from collections.abc import Callable

from butler_jax.evaluation.cells import Cell

Say = Callable[[str], None]


class CellProgress:
    """Reports a line after each cell. The time left assumes that all cells of a task take equally long."""

    def __init__(self, missing: dict[str, int], total: int, say: Say, *, hosts: int = 1):
        """Start before the first cell.

        Args:
            missing: How many cells of each task are to be measured.
            total: How many cells there are, kept ones included.
            say: Receives the lines.
            hosts: How many hosts measure at the same time.
        """
        self.left, self.total, self.say, self.hosts = dict(missing), total, say, hosts
        self.spent: dict[str, list[float]] = {task: [] for task in missing}
        self.done = 0
        self.compiled: set[tuple[str, str]] = set()

    def begin(self, task: str, label: str) -> None:
        """Report that a cell begins, where it is the first of its task and policy: their programs are compiled then."""
        if (task, label) not in self.compiled:
            self.compiled.add((task, label))
            self.say(f"compiling {task} under {label}")

    def add(self, task: str, label: str, cell: Cell, *, kept: bool) -> None:
        """Report a finished cell; kept: an earlier evaluation has measured it."""
        self.left[task] -= not kept
        self.done += 1
        self.spent[task].append(cell.seconds)
        first = cell.rows[0]
        budget = "" if first.budget is None else f"{first.budget:g}"
        place = f"{self.done:{len(str(self.total))}}/{self.total}"
        cost = "kept" if kept else f"{cell.seconds:.0f} s"
        left = f", about {format_duration(self.seconds_left())} left" if any(self.left.values()) else ""
        self.say(f"[{place}] {task:12} {label:14} {budget:8} {first.metric} {first.value:.4f}   {cost}{left}")

    def seconds_left(self) -> float:
        """For each missing cell the mean of its task so far; for a task without cells so far, the mean of all cells."""
        seen = [s for spent in self.spent.values() for s in spent]
        overall = sum(seen) / max(len(seen), 1)
        means = {task: sum(spent) / len(spent) if spent else overall for task, spent in self.spent.items()}
        return sum(means[task] * count for task, count in self.left.items()) / self.hosts


def format_duration(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
