"""Curves of a report: a metric against the share of the cache that is read, or along the parts of a task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from butler_jax.evaluation.plots import REFERENCE, STYLE, WIDTH, Look, finish_panels, make_canvas
from butler_jax.evaluation.report.shares import is_mixed
from butler_jax.evaluation.report.tables import (
    MINUS,
    Metric,
    Row,
    at_budget,
    format_budget,
    format_part,
    is_finite,
    list_policies,
    sort_budgets,
    sort_key,
    split_dense,
)

LOGARITHMIC = ("perplexity", "bytes_read", "served_bytes_read")
BYTES_READ = "bytes read, share of what dense reads in all layers"


def draw_curves(
    metric: str, shown: Metric, rows: Sequence[Row], styles: Mapping[str, Look], title: str, across: str = ""
) -> Any:
    """Draw a metric against `attended` of its rows, or against the budget where that is not known.

    Args:
        metric: Its name.
        shown: How it is shown.
        rows: Rows of the metric.
        styles: Looks by label.
        title: Of the figure.
        across: What `attended` of the rows is. Default: the share of the keys.
    """
    _, sparse = split_dense(rows)
    budgets = sort_budgets(rows)
    shares = all(is_finite(r.get("attended")) and r["attended"] > 0 for r in sparse)
    canvas, ((axes,),) = make_canvas(size=(WIDTH, 2.7))
    _draw_dense(axes, rows, shown, styles)
    for policy in list_policies(sparse):
        own = [r for r in sparse if r["policy"] == policy]
        points = [(100 * r["attended"] if shares else -budgets.index(r["budget"]), r) for r in own]
        _draw_line(axes, sorted(points, key=lambda p: p[0]), shown, styles[policy], policy)
    across = across or "share of the keys read" + (" in the served layers" if is_mixed(rows) else ", layer 0 aside")
    if shares:
        _set_share_axis(axes, [100 * r["attended"] for r in sparse], across)
    else:
        axes.set_xticks([-i for i in range(len(budgets))], [format_budget(b) for b in budgets])
        axes.set_xlabel("budget")
    _set_value_axis(axes, metric, shown, rows)
    axes.set_title(title)
    axes.grid(axis="y")
    _draw_legend(canvas, [axes])
    return canvas


def _draw_legend(canvas: Any, panels: Sequence[Any]) -> None:
    """One legend below the axes, in as many columns as its labels leave room for. The figure grows by its height."""
    lines = {label: line for p in panels for line, label in zip(*p.get_legend_handles_labels(), strict=True)}
    size = STYLE["legend.fontsize"]
    widest = size * (0.58 * max(len(label) for label in lines) + 4.5)  # points: the label, its line and the gaps
    columns = min(len(lines), max(1, int(72 * WIDTH / widest)))
    canvas.set_figheight(canvas.get_figheight() + 1.5 * size / 72 * -(-len(lines) // columns))
    canvas.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.2
    )


def _draw_line(axes: Any, points: Sequence[tuple[float, Row]], shown: Metric, look: Look, label: str) -> None:
    x = [p for p, _ in points]
    y = [shown.scale * r["value"] for _, r in points]
    errors = [shown.scale * r["error"] if is_finite(r.get("error")) else 0.0 for _, r in points]
    style = dict(color=look.color, linestyle=look.dashes, linewidth=look.width, zorder=look.above)
    axes.plot(x, y, marker=look.marker, markersize=6.5 if look.width > 2 else 5, label=label, **style)
    if any(errors):
        axes.errorbar(
            x, y, errors, fmt="none", ecolor=look.color, elinewidth=1, capsize=2, alpha=0.7, zorder=look.above
        )


def _draw_dense(axes: Any, rows: Sequence[Row], shown: Metric, styles: Mapping[str, Look]) -> None:
    """The dense model as a line across, with a band of one standard error."""
    for row in split_dense(rows)[0][:1]:
        value, look = shown.scale * row["value"], styles["dense"]
        axes.axhline(
            value, color=look.color, linestyle=look.dashes, linewidth=look.width, label="dense", zorder=look.above
        )
        if is_finite(row.get("error")) and row["error"] > 0:
            error = shown.scale * row["error"]
            axes.axhspan(value - error, value + error, color=look.color, alpha=0.1, linewidth=0, zorder=0)


def _set_share_axis(axes: Any, shares: Sequence[float], label: str) -> None:
    low, high = min(shares), max(shares)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.15, high * 1.15)
    ticks = [t for t in (100 / 2**i for i in range(20)) if low / 1.15 <= t <= high * 1.15]
    ticks = ticks if len(ticks) > 1 else sorted({low, high})
    axes.set_xticks(ticks, [f"{t:.3g} %" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _set_value_axis(axes: Any, metric: str, shown: Metric, rows: Sequence[Row]) -> None:
    """Logarithmic where ratios count, linear elsewhere; a percentage ends at 0 and 100."""
    low, high = axes.get_ylim()
    values = [shown.scale * r["value"] for r in rows]
    if metric == "over_dense":
        axes.set_yscale("symlog", linthresh=1.0, linscale=0.6)
        axes.set_ylim(min(-0.3, 1.3 * min(values)), max(1.3, 1.5 * max(values)))
        ticks = [s * t for t in (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e5) for s in (1, -1)]
    elif metric in LOGARITHMIC and min(values) > 0:
        low, high = min(values) / 1.04, max(values) * 1.06
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        ticks = _find_ticks(low, high)
    else:
        axes.set_ylim(*((max(low, -2), min(high, 102)) if shown.unit == "%" else (low, high)))
        return
    low, high = axes.get_ylim()
    inside = sorted({t for t in ticks if low <= t <= high}) or [low, high]
    axes.set_yticks(inside, [f"{t:g}".replace("-", MINUS) for t in inside])
    axes.minorticks_off()


def _find_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis."""
    from matplotlib.ticker import MaxNLocator

    if high / low < 4:
        return list(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [s * 10.0**p for p in powers for s in ((1, 1.5, 2, 3, 5) if high / low < 50 else (1, 3))]


def draw_parts(shown: Metric, key: str, rows: Sequence[Row], styles: Mapping[str, Look], title: str) -> Any:
    """Draw a metric along one coordinate, a panel for each budget."""
    budgets = sort_budgets(rows) or [1]
    values = sorted({r["where"][key] for r in rows}, key=sort_key)
    across = min(2, len(budgets))
    down = -(-len(budgets) // across)
    canvas, grid = make_canvas(down, across, (WIDTH, 0.6 + 1.6 * down), sharex=True, sharey=True)
    panels = list(grid.flat)
    labels = [format_part(v) for v in values]
    for panel, budget in zip(panels, budgets, strict=False):
        inside = at_budget(rows, budget)
        for policy in list_policies(inside):
            own = [(float(values.index(r["where"][key])), r) for r in inside if r["policy"] == policy]
            _draw_line(panel, sorted(own, key=lambda p: p[0]), shown, styles[policy], policy)
        panel.set_title(format_budget(budget) if sort_budgets(rows) else "dense", fontsize=8.5)
        panel.set_xticks(range(len(values)), labels, fontsize=7.5)
        panel.tick_params(axis="x", rotation=30 if sum(map(len, labels)) > 22 else 0)
        panel.grid(axis="y")
    canvas.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    if shown.unit == "%":
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(max(low, -2), min(high, 104))
    finish_panels(panels, len(budgets), across, key)
    _draw_legend(canvas, panels)
    return canvas


def draw_positions(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], styles: Mapping[str, Look], title: str
) -> Any:
    """Draw shares of the keys in percent by position in a window; the curves have positions and shares."""
    canvas, ((axes,),) = make_canvas(size=(WIDTH, 2.5))
    for label, (positions, shares) in curves.items():
        look = styles[label]
        style = dict(color=look.color, linestyle=look.dashes, linewidth=look.width, zorder=look.above)
        axes.plot(positions, [100 * share for share in shares], label=label, **style)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [tick for tick in _find_ticks(low, high) if low <= tick <= high] or [low, high]
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("position in the window, tokens")
    axes.set_title(title)
    axes.grid(axis="y")
    _draw_legend(canvas, [axes])
    return canvas


def draw_distances(curves: Mapping[str, Mapping[str, Sequence[float]]], styles: Mapping[str, Look], title: str) -> Any:
    """Draw the attention weight that keys read hold by distance, below that of all keys, and where those keys lie."""
    canvas, (panels,) = make_canvas(1, 2, (WIDTH, 2.6))
    for panel, name, label in zip(panels, ("recalled", "read"), ("attention weight", "keys read"), strict=True):
        for policy, found in curves.items():
            look, of_bins = styles[policy], [100 * share for share in found[name]]
            style = dict(color=look.color, linestyle=look.dashes, linewidth=look.width, zorder=look.above)
            panel.plot(range(len(of_bins)), of_bins, label=policy, **style)
        ticks = range(0, len(of_bins), max(2, len(of_bins) // 5))
        panel.set_xticks(ticks, [f"{2**b:,}" for b in ticks])
        panel.set(title=f"{label} (%)", xlabel="at least so many tokens back")
        panel.tick_params(labelsize=7.5)
        panel.grid(axis="y")
    true = [100 * share for share in next(iter(curves.values()))["true"]]
    panels[0].fill_between(range(len(true)), true, color=REFERENCE, alpha=0.25, linewidth=0, label="all keys")
    canvas.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    _draw_legend(canvas, panels)
    return canvas


def draw_reliability(
    curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], styles: Mapping[str, Look], title: str
) -> Any:
    """Draw what is true against what was predicted: a panel for single keys, and one for the sums of rows."""
    from matplotlib.ticker import LogLocator

    canvas, (panels,) = make_canvas(1, 2, (WIDTH, 2.6))
    for panel, kind, which in zip(panels, ("a key", "all keys of a row"), range(2), strict=True):
        ends = []
        for policy, found in curves.items():
            predicted, true = found[which]["predicted"], found[which]["true"]
            look = styles[policy]
            style = dict(color=look.color, linestyle=look.dashes, marker=look.marker, markersize=3)
            panel.plot(predicted, true, label=policy, **style)
            ends += [*predicted, *true]
        ends = [min(ends), max(ends)]
        panel.plot(ends, ends, color=REFERENCE, linewidth=0.8, linestyle=(0, (5, 2)), zorder=1)
        panel.set(xscale="log", yscale="log", title=kind, xlabel="predicted")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(numticks=5))
            axis.set_major_formatter(lambda value, _: f"{value:g}".replace("e-0", "e-"))
        panel.minorticks_off()
        panel.tick_params(labelsize=7.5)
        panel.grid()
    panels[0].set_ylabel("true")
    canvas.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    _draw_legend(canvas, panels)
    return canvas
