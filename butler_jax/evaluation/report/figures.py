"""Rows and arrays of a report to figures. What has no row has no figure; nothing is drawn before it is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from butler_jax.evaluation.report.heat_maps import draw_grid, draw_heads
from butler_jax.evaluation.report.plotting import WIDTH, Draw, Look, finish_panels, looks
from butler_jax.evaluation.report.tables import (
    MINUS,
    Metric,
    Row,
    budget_label,
    budgets_of,
    by_coordinates,
    by_metric,
    is_butler,
    metric_of,
    order,
    part_key,
    policies_of,
    show_part,
    title_of,
    usable,
)

CURVES = {
    "perplexity": "Lower is better. The dashed line with its band is the dense model; what is above it is the price.",
    "over_dense": "What a budget costs, from paired predictions: the errors are smaller than those of perplexity.",
    "js_divergence": "How far next-token distributions move from the dense model's; 0 is the same model.",
    "top1_agreement": "How often the most likely next token is the dense model's.",
    "bytes_read": "What a policy moves for one token, its own scores included; the dashed line reads the whole cache.",
    "recalled_mass": "The true attention weight on the chosen keys. The oracle is the most that any choice can hold.",
    "accuracy": "Higher is better. The dashed line with its band is the dense model.",
    "miss_rate": "Lower is better: a miss is a name with any wrong token. The dashed line is the dense model.",
}  # fmt: skip
LOGARITHMIC = ("perplexity", "bytes_read")


@dataclass(frozen=True)
class Figure:
    """A picture yet to be drawn: draw() gives a matplotlib figure.

    name: of its file, without ending. caption: what to look at. alt: what is seen, in words.
    """

    name: str
    task: str
    title: str
    caption: str
    alt: str
    draw: Draw


def figures(rows: Sequence[Row], arrays: Mapping[str, Any] | None = None) -> list[Figure]:
    """All figures that the rows and arrays of a report give, in the order of the rows' tasks."""
    styles = looks(policies_of(rows))
    usable_rows = [r for r in rows if r["metric"] in CURVES and usable(r["value"])]
    found = []
    for (task, metric), chosen in by_metric(r for r in usable_rows if not r.get("where")).items():
        if any(r["policy"] != "dense" for r in chosen):
            found.append(_curves(task, metric, chosen, styles))
    for (task, metric), group in by_metric(r for r in usable_rows if r.get("where")).items():
        for keys, chosen in by_coordinates(group).items():
            if len(keys) == 1:
                found.append(_parts(task, metric, chosen, styles))
            elif len(keys) == 2:
                found.append(_grid(task, metric, chosen, styles))
    rates = {p: r for p, r in (arrays or {}).get("hit_rate", {}).items() if r and r[0]}
    if rates:
        found.append(_heads(rates))
    return found


def _file(name: str) -> str:
    """Letters, digits and underscores alone."""
    return re.sub(r"\W+", "_", name)


def _curves(task: str, metric: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> Figure:
    """A metric against the share of the cache that was read, or against the budget where that is not known."""
    shown = metric_of(metric, rows)
    sparse = [r for r in rows if r["policy"] != "dense"]
    title = title_of(task, shown)
    budgets = ", ".join(budget_label(b) for b in budgets_of(rows))
    return Figure(
        name=_file(f"{task}_{metric}" if metric != task else task),
        task=task,
        title=title,
        caption=CURVES[metric],
        alt=f"{title} against the share of the cache that is read; budgets {budgets}; "
        f"one line each for {', '.join(policies_of(sparse))}. The numbers are in the table.",
        draw=lambda: _draw_curves(metric, shown, rows, styles, title),
    )


def _draw_curves(metric: str, shown: Metric, rows: Sequence[Row], styles: Mapping[str, Look], title: str) -> Any:
    from matplotlib.figure import Figure as Canvas

    sparse = [r for r in rows if r["policy"] != "dense"]
    budgets = budgets_of(rows)
    shares = all(usable(r.get("attended")) and r["attended"] > 0 for r in sparse)
    canvas = Canvas(figsize=(WIDTH, 3.7))
    axes = canvas.subplots()
    _dense(axes, rows, shown, styles)
    for policy in policies_of(sparse):
        own = [r for r in sparse if r["policy"] == policy]
        points = [(100 * r["attended"] if shares else -budgets.index(r["budget"]), r) for r in own]
        _line(axes, sorted(points, key=lambda p: p[0]), shown, styles[policy], policy)
    if shares:
        _share_axis(axes, [100 * r["attended"] for r in sparse])
    else:
        axes.set_xticks([-i for i in range(len(budgets))], [budget_label(b) for b in budgets])
        axes.set_xlabel("budget")
    _value_axis(axes, metric, shown, rows)
    axes.set_title(title)
    axes.grid(axis="y")
    _legend(canvas, [axes])
    return canvas


def _legend(canvas: Any, panels: Sequence[Any]) -> None:
    """One legend below the axes, where no data is."""
    lines = {label: line for p in panels for line, label in zip(*p.get_legend_handles_labels(), strict=True)}
    across = 4 if max(len(label) for label in lines) < 14 else 3
    canvas.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=across, handlelength=2.6, columnspacing=1.4
    )


def _line(axes: Any, points: Sequence[tuple[float, Row]], shown: Metric, look: Look, label: str) -> None:
    x = [p for p, _ in points]
    y = [shown.scale * r["value"] for _, r in points]
    errors = [shown.scale * r["error"] if usable(r.get("error")) else 0.0 for _, r in points]
    axes.plot(
        x, y, color=look.color, marker=look.marker, linestyle=look.dashes, linewidth=look.width, zorder=look.above,
        markersize=6.5 if look.width > 2 else 5, label=label,
    )  # fmt: skip
    if any(errors):
        axes.errorbar(
            x, y, errors, fmt="none", ecolor=look.color, elinewidth=1, capsize=2, alpha=0.7, zorder=look.above
        )


def _dense(axes: Any, rows: Sequence[Row], shown: Metric, styles: Mapping[str, Look]) -> None:
    """The dense model as a line across, with a band of one standard error."""
    for row in [r for r in rows if r["policy"] == "dense"][:1]:
        value, look = shown.scale * row["value"], styles["dense"]
        axes.axhline(
            value, color=look.color, linestyle=look.dashes, linewidth=look.width, label="dense", zorder=look.above
        )
        if usable(row.get("error")) and row["error"] > 0:
            error = shown.scale * row["error"]
            axes.axhspan(value - error, value + error, color=look.color, alpha=0.1, linewidth=0, zorder=0)


def _share_axis(axes: Any, shares: Sequence[float]) -> None:
    low, high = min(shares), max(shares)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.15, high * 1.15)
    ticks = [t for t in (100 / 2**i for i in range(20)) if low / 1.15 <= t <= high * 1.15]
    ticks = ticks if len(ticks) > 1 else sorted({low, high})
    axes.set_xticks(ticks, [f"{t:.3g} %" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("share of the cache read, layer 0 aside")


def _value_axis(axes: Any, metric: str, shown: Metric, rows: Sequence[Row]) -> None:
    """Logarithmic where ratios count, linear elsewhere; a percentage ends at 0 and 100."""
    from matplotlib.ticker import MaxNLocator

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
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        fine = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high) if high / low < 4 else ()
        ticks = list(fine) or [s * 10.0**p for p in powers for s in ((1, 1.5, 2, 3, 5) if high / low < 50 else (1, 3))]
    else:
        axes.set_ylim(*((max(low, -2), min(high, 102)) if shown.unit == "%" else (low, high)))
        return
    low, high = axes.get_ylim()
    inside = sorted({t for t in ticks if low <= t <= high}) or [low, high]
    axes.set_yticks(inside, [f"{t:g}".replace("-", MINUS) for t in inside])
    axes.minorticks_off()


def _parts(task: str, metric: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> Figure:
    """A metric by one coordinate, a panel a budget."""
    shown, key = metric_of(metric, rows), part_key(rows)
    title = f"{title_of(task, shown)} by {key}"
    return Figure(
        name=_file(f"{task}_{metric}_by_{key}"),
        task=task,
        title=title,
        caption=f"A panel is a budget. A curve that bends says that the {key} matters.",
        alt=f"{title}, one panel for each of the budgets {', '.join(budget_label(b) for b in budgets_of(rows))}. "
        "The numbers are in the tables of parts.",
        draw=lambda: _draw_parts(shown, key, rows, styles, title),
    )


def _draw_parts(shown: Metric, key: str, rows: Sequence[Row], styles: Mapping[str, Look], title: str) -> Any:
    from matplotlib.figure import Figure as Canvas

    budgets = budgets_of(rows) or [1]
    values = sorted({r["where"][key] for r in rows}, key=order)
    across = min(2, len(budgets))
    down = -(-len(budgets) // across)
    canvas = Canvas(figsize=(WIDTH, 1.1 + 1.75 * down + (0.8 if down == 1 else 0)))
    panels = list(canvas.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    labels = [show_part(v) for v in values]
    for panel, budget in zip(panels, budgets, strict=False):
        inside = [r for r in rows if r["policy"] == "dense" or r["budget"] == budget]
        for policy in policies_of(inside):
            own = [(float(values.index(r["where"][key])), r) for r in inside if r["policy"] == policy]
            _line(panel, sorted(own, key=lambda p: p[0]), shown, styles[policy], policy)
        panel.set_title(budget_label(budget) if budgets_of(rows) else "dense", fontsize=8.5)
        panel.set_xticks(range(len(values)), labels, fontsize=7.5)
        panel.tick_params(axis="x", rotation=30 if sum(map(len, labels)) > 22 else 0)
        panel.grid(axis="y")
    canvas.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    if shown.unit == "%":
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(max(low, -2), min(high, 104))
    finish_panels(panels, len(budgets), across, key)
    _legend(canvas, panels)
    return canvas


def _grid(task: str, metric: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> Figure:
    """Two coordinates as heat maps: policies down, budgets across."""
    shown, down = metric_of(metric, rows), part_key(rows)
    across = next(key for key in rows[0]["where"] if key != down)
    title = f"{title_of(task, shown)} by {down} and {across}"
    return Figure(
        name=_file(f"{task}_{metric}_grid"),
        task=task,
        title=title,
        caption=f"Every square is one policy at one budget, {down} down, {across} across. "
        "Dark patches are places that are not found. Dense has no budget: its square is repeated.",
        alt=f"{title}: heat maps, policies down and budgets across. The numbers are in the tables of parts.",
        draw=lambda: draw_grid(shown, down, across, rows, title),
    )


def _heads(rates: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Hit rate by layer and head, a heat map a policy, tokenbutler first."""
    policies = sorted(rates, key=lambda p: not is_butler(p))
    return Figure(
        name="hit_rate_heads",
        task="attention",
        title="hit rate by layer and head (%)",
        caption="Layers down from layer 1, heads across, one scale for all. Chance is 50 %; dark heads are hard.",
        alt=f"Heat maps of the hit rate of every layer and head for {', '.join(policies)}.",
        draw=lambda: draw_heads({p: rates[p] for p in policies}),
    )
