"""Rows and arrays of a report to figures. What there is no row for has no figure; nothing is drawn before it is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from butler_jax.evaluation.plotting import Draw, Look, looks
from butler_jax.evaluation.tables import (
    Metric,
    Row,
    budget_label,
    budgets_of,
    is_butler,
    metric_of,
    order,
    part_key,
    policies_of,
    show_part,
    title_of,
    usable,
)

SIZE = (5.2, 4.0)  # inches: narrow, so that its text is still read on a phone
CURVES = {
    "perplexity": "Lower is better. The dashed line with its band is the dense model; where a curve leaves it, reading less costs.",
    "over_dense": "How much a budget costs, from paired predictions: errors are smaller than those of perplexity itself.",
    "js_divergence": "How far next-token distributions move from the dense model's; 0 is the same model.",
    "top1_agreement": "How often the most likely next token is the dense model's.",
    "bytes_read": "What a policy moves for one token, its own scores included; the dashed line reads the whole cache.",
    "recalled_mass": "The true attention weight that lies on the chosen keys. The oracle is the most that any choice can hold.",
    "accuracy": "Higher is better. The dashed line with its band is the dense model.",
    "miss_rate": "Lower is better: a miss is a name with any wrong token. The dashed line is the dense model.",
}  # fmt: skip
LOGARITHMIC = ("perplexity", "bytes_read")


@dataclass(frozen=True)
class Figure:
    """A picture yet to be drawn: draw(colour of its text) gives a matplotlib figure.

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
    whole = [r for r in rows if not r.get("where")]
    found = []
    for task, metric in dict.fromkeys((r["task"], r["metric"]) for r in whole):
        chosen = [r for r in whole if (r["task"], r["metric"]) == (task, metric) and usable(r["value"])]
        if metric in CURVES and any(r["policy"] != "dense" for r in chosen):
            found.append(_curves(task, metric, chosen, styles))
    detail = [r for r in rows if r.get("where") and r["metric"] in CURVES and usable(r["value"])]
    for task, metric in dict.fromkeys((r["task"], r["metric"]) for r in detail):
        chosen = [r for r in detail if (r["task"], r["metric"]) == (task, metric)]
        keys = dict.fromkeys(k for r in chosen for k in r["where"])
        found.append((_parts if len(keys) == 1 else _grid)(task, metric, chosen, styles))
    rates = {p: r for p, r in (arrays or {}).get("hit_rate", {}).items() if r and r[0]}
    if rates:
        found.append(_heads(rates))
    return found


def _curves(task: str, metric: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> Figure:
    """A metric against the share of the cache that was read, or against the budget where that is not known."""
    shown = metric_of(metric, rows)
    sparse = [r for r in rows if r["policy"] != "dense"]
    title = title_of(task, shown)
    budgets = ", ".join(budget_label(b) for b in budgets_of(rows))
    return Figure(
        name=f"{task}_{metric}" if metric != task else task,
        task=task,
        title=title,
        caption=CURVES[metric],
        alt=f"{title} against the share of the cache that is read; budgets {budgets}; "
        f"one line each for {', '.join(policies_of(sparse))}. The numbers are in the table.",
        draw=lambda ink: _draw_curves(metric, shown, rows, styles, ink, title),
    )


def _draw_curves(
    metric: str, shown: Metric, rows: Sequence[Row], styles: Mapping[str, Look], ink: str, title: str
) -> Any:
    from matplotlib.figure import Figure as Canvas

    sparse = [r for r in rows if r["policy"] != "dense"]
    budgets = budgets_of(rows)
    shares = all(usable(r.get("attended")) and r["attended"] > 0 for r in sparse)
    canvas = Canvas(figsize=SIZE)
    axes = canvas.subplots()
    _dense(axes, rows, shown, styles, ink)
    for policy in policies_of(sparse):
        own = [r for r in sparse if r["policy"] == policy]
        points = [(100 * r["attended"] if shares else -budgets.index(r["budget"]), r) for r in own]
        _line(axes, sorted(points, key=lambda p: p[0]), shown, styles[policy], policy, ink)
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


def _line(axes: Any, points: Sequence[tuple[float, Row]], shown: Metric, look: Look, label: str, ink: str) -> None:
    color = ink if look.color == "ink" else look.color
    x = [p for p, _ in points]
    y = [shown.scale * r["value"] for _, r in points]
    errors = [shown.scale * r["error"] if usable(r.get("error")) else 0.0 for _, r in points]
    axes.plot(
        x, y, color=color, marker=look.marker, linestyle=look.dashes, linewidth=look.width, zorder=look.above,
        markersize=6.5 if look.width > 2 else 5, label=label,
    )  # fmt: skip
    if any(errors):
        axes.errorbar(x, y, errors, fmt="none", ecolor=color, elinewidth=1, capsize=2, alpha=0.7, zorder=look.above)


def _dense(axes: Any, rows: Sequence[Row], shown: Metric, styles: Mapping[str, Look], ink: str) -> None:
    """The dense model as a line across, with a band of one standard error."""
    for row in [r for r in rows if r["policy"] == "dense"][:1]:
        value, look = shown.scale * row["value"], styles["dense"]
        axes.axhline(value, color=ink, linestyle=look.dashes, linewidth=look.width, label="dense", zorder=look.above)
        if usable(row.get("error")) and row["error"] > 0:
            error = shown.scale * row["error"]
            axes.axhspan(value - error, value + error, color=ink, alpha=0.1, linewidth=0, zorder=0)


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
        fine = MaxNLocator(7).tick_values(low, high) if high / low < 4 else ()
        ticks = list(fine) or [s * 10.0**p for p in powers for s in ((1, 1.5, 2, 3, 5) if high / low < 50 else (1, 3))]
    else:
        axes.set_ylim(*((max(low, -2), min(high, 102)) if shown.unit == "%" else (low, high)))
        return
    low, high = axes.get_ylim()
    inside = sorted({t for t in ticks if low <= t <= high}) or [low, high]
    axes.set_yticks(inside, [f"{t:g}".replace("-", "−") for t in inside])
    axes.minorticks_off()


def _parts(task: str, metric: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> Figure:
    """A metric by one coordinate, a panel a budget."""
    shown, key = metric_of(metric, rows), part_key(rows)
    title = f"{title_of(task, shown)} by {key}"
    return Figure(
        name=f"{task}_{metric}_by_{key}",
        task=task,
        title=title,
        caption=f"A panel is a budget. A curve that bends says that the {key} matters.",
        alt=f"{title}, one panel for each of the budgets {', '.join(budget_label(b) for b in budgets_of(rows))}. "
        "The numbers are in the tables of parts.",
        draw=lambda ink: _draw_parts(shown, key, rows, styles, ink, title),
    )


def _draw_parts(shown: Metric, key: str, rows: Sequence[Row], styles: Mapping[str, Look], ink: str, title: str) -> Any:
    from matplotlib.figure import Figure as Canvas

    budgets = budgets_of(rows) or [1]
    values = sorted({r["where"][key] for r in rows}, key=order)
    across = min(2, len(budgets))
    down = -(-len(budgets) // across)
    canvas = Canvas(figsize=(SIZE[0], 1.1 + 1.75 * down + (0.8 if down == 1 else 0)))
    panels = list(canvas.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for panel, budget in zip(panels, budgets, strict=False):
        inside = [r for r in rows if r["policy"] == "dense" or r["budget"] == budget]
        for policy in policies_of(inside):
            own = [(float(values.index(r["where"][key])), r) for r in inside if r["policy"] == policy]
            _line(panel, sorted(own, key=lambda p: p[0]), shown, styles[policy], policy, ink)
        panel.set_title(budget_label(budget) if budgets_of(rows) else "dense", fontsize=8.5)
        panel.set_xticks(range(len(values)), [show_part(v) for v in values])
        panel.grid(axis="y")
    canvas.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    _lowest(panels, len(budgets), across, key)
    _legend(canvas, panels)
    return canvas


def _lowest(panels: Sequence[Any], count: int, across: int, label: str) -> None:
    """Hide the panels after the first `count`; the last one of a column names the axis."""
    for panel in panels[count:]:
        panel.set_axis_off()
    for panel in panels[max(0, count - across) : count]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(label, fontsize=8.5)


def _grid(task: str, metric: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> Figure:
    """Two coordinates as heat maps: policies down, budgets across."""
    shown = metric_of(metric, rows)
    down, across = (
        part_key(rows),
        next(k for k in dict.fromkeys(k for r in rows for k in r["where"]) if k != part_key(rows)),
    )
    title = f"{title_of(task, shown)} by {down} and {across}"
    return Figure(
        name=f"{task}_{metric}_grid",
        task=task,
        title=title,
        caption=f"Every square is one policy at one budget, {down} down, {across} across. "
        "Dark patches are places that are not found. Dense has no budget: its square is repeated.",
        alt=f"{title}: heat maps, policies down and budgets across. The numbers are in the tables of parts.",
        draw=lambda ink: _draw_grid(shown, down, across, rows, ink, title),
    )


def _draw_grid(shown: Metric, down: str, across: str, rows: Sequence[Row], ink: str, title: str) -> Any:
    import numpy as np
    from matplotlib.figure import Figure as Canvas

    policies = sorted(policies_of(rows), key=lambda p: (p != "dense", not is_butler(p)))
    budgets = budgets_of(rows) or [1]
    ys, xs = (sorted({r["where"][k] for r in rows}, key=order) for k in (down, across))
    canvas = Canvas(figsize=(SIZE[0], 0.9 + 0.62 * len(policies)))
    panels = canvas.subplots(len(policies), len(budgets), squeeze=False)
    for i, policy in enumerate(policies):
        for j, budget in enumerate(budgets):
            panel = panels[i][j]
            panel.set_xticks([])
            panel.set_yticks([])
            for side in panel.spines.values():
                side.set_visible(False)
            own = [r for r in rows if r["policy"] == policy and (policy == "dense" or r["budget"] == budget)]
            values = np.full((len(ys), len(xs)), np.nan)
            for row in own:
                values[ys.index(row["where"][down]), xs.index(row["where"][across])] = row["value"]
            image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="none")
            if j == 0:
                bold = "bold" if is_butler(policy) else "normal"
                panel.set_ylabel(policy, rotation=0, ha="right", va="center", fontweight=bold)
            if i == 0 and budgets_of(rows):
                panel.set_title(budget_label(budget), fontsize=8.5, loc="center")
    corner = panels[-1][0]
    corner.set_xticks([0, len(xs) - 1] if len(xs) > 1 else [0], [show_part(xs[0]), show_part(xs[-1])][: len(xs)])
    corner.tick_params(labelsize=7, length=2)
    corner.set_xlabel(across, fontsize=8)
    last = panels[-1][-1]
    last.yaxis.tick_right()
    last.set_yticks([0, len(ys) - 1] if len(ys) > 1 else [0], [show_part(ys[0]), show_part(ys[-1])][: len(ys)])
    last.tick_params(labelsize=7, length=2)
    last.yaxis.set_label_position("right")
    last.set_ylabel(down, fontsize=8)
    bar = canvas.colorbar(image, ax=panels, location="bottom", shrink=0.5, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.5, 1], labels=[f"{shown.scale * v:g}" for v in (0, 0.5, 1)])
    canvas.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    return canvas


def _heads(rates: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Hit rate by layer and head, a heat map a policy, tokenbutler first."""
    policies = sorted(rates, key=lambda p: not is_butler(p))
    return Figure(
        name="hit_rate_heads",
        task="attention",
        title="hit rate by layer and head (%)",
        caption="Layers down from layer 1, heads across, one scale for all. Chance is 50 %; dark heads are hard to predict.",
        alt=f"Heat maps of the hit rate of every layer and head for {', '.join(policies)}.",
        draw=lambda ink: _draw_heads({p: rates[p] for p in policies}, ink),
    )


def _draw_heads(rates: Mapping[str, Sequence[Sequence[float]]], ink: str) -> Any:
    import numpy as np
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    values = {p: 100 * np.array([[np.nan if v is None else v for v in layer] for layer in r]) for p, r in rates.items()}
    low = min(50.0, min(float(np.nanmin(v)) for v in values.values()))
    across = min(3, len(values))
    down = -(-len(values) // across)
    canvas = Canvas(figsize=(SIZE[0], 0.9 + 1.75 * down + (1.0 if down == 1 else 0)))
    panels = list(canvas.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat)
    for i, (policy, rate) in enumerate(values.items()):
        layers, heads = rate.shape
        extent = (-0.5, heads - 0.5, layers + 0.5, 0.5)
        image = panels[i].imshow(
            rate, vmin=low, vmax=100, cmap="viridis", aspect="auto", interpolation="none", extent=extent
        )
        panels[i].set_title(
            policy.replace(":", ":\n"), fontsize=8.5, fontweight="bold" if is_butler(policy) else "normal"
        )
        panels[i].xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panels[i].yaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels[i].tick_params(labelsize=7.5, length=2)
        for side in panels[i].spines.values():
            side.set_visible(False)
    _lowest(panels, len(values), across, "head")
    canvas.supylabel("layer", fontsize=8.5)
    bar = canvas.colorbar(image, ax=panels, location="right", shrink=0.6, aspect=25, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    canvas.suptitle("hit rate by layer and head (%)", fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    return canvas
