"""The rows of the benchmark as lines of a table and as a plot."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

HEADER = (
    f"{'together':>8} {'context':>8} {'budget':>8} {'batch':>5} {'interval':>8} {'ms':>9} {'dense ms':>9} "
    f"{'speed-up':>8} {'cap':>6} {'share':>6} {'MB':>9} {'GB/s':>7} {'copy':>7} {'model cap':>9}"
)


def write_json(path: Path | None, found: dict[str, Any]) -> None:
    """Write what was found to a file, if there is a path. Its directory is made."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{row['together']:>8} {row['context']:>8} {row['budget']:>8.4f} {row['batch']:>5} {row['interval']:>8} "
        f"{row['seconds'] * 1e3:>9.3f} {row['dense_seconds'] * 1e3:>9.3f} {row['speedup']:>8.2f} {row['cap']:>6.1f} "
        f"{row['share_of_cap']:>6.0%} {row['predicted_bytes'] / 1e6:>9.1f} {row['gb_s']:>7.1f} "
        f"{row['copy_gb_s']:>7.1f} {row['model_cap']:>9.2f}"
    )


def peers_line(row: dict[str, Any]) -> str:
    """The times of the peers on the inputs of a row, or the reasons why there are none."""
    peers = row["peers"].items()
    return "         " + ", ".join(
        f"{name} {t * 1e3:.3f} ms" if isinstance(t, float) else f"{name}: {t}" for name, t in peers
    )


def plot(report: dict[str, Any], path: Path) -> str:
    """Plot the speed-up and its cap against the context, with one panel for each interval. Returns a line about it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    from matplotlib.ticker import FuncFormatter, NullFormatter

    intervals = sorted({row["interval"] for row in report["rows"]})
    size = dict(figsize=(4.2 * len(intervals) + 0.8, 4.2), layout="constrained")
    figure, axes = pyplot.subplots(1, len(intervals), squeeze=False, sharey=True, **size)
    for axis, interval in zip(axes[0], intervals, strict=True):
        own = [row for row in report["rows"] if row["interval"] == interval]
        for number, key in enumerate(sorted({(row["batch"], row["budget"], row["together"]) for row in own})):
            same = [row for row in own if (row["batch"], row["budget"], row["together"]) == key]
            points = sorted((row["context"], row["speedup"], row["cap"]) for row in same)
            contexts, speedups, caps = zip(*points, strict=True)
            label = f"batch {key[0]}, {Fraction(key[1]).limit_denominator(1024)} read"
            label += f", {key[2]} layers together" if key[2] > 1 else ""
            axis.plot(contexts, speedups, "o-", color=f"C{number}", label=label)
            axis.plot(contexts, caps, "--", color=f"C{number}", alpha=0.5)
        axis.axhline(1, color="grey", linewidth=0.8)
        title = "every step predicts" if interval == 1 else f"one step in {interval} predicts"
        axis.set(xlabel="tokens cached", title=title)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0][0].plot([], [], "--", color="grey", label="if only bytes counted")
    axes[0][0].set_ylabel("speed-up over dense attention")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{report['shape']}, {report['dtype']}, {report['device']}", fontsize=9)
    figure.savefig(path, dpi=150)
    return f"plot: {path}"
