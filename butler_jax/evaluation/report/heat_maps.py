"""Heat maps of a report: a metric over two coordinates, a hit rate over layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from butler_jax.evaluation.plots import WIDTH, draw_matrix, finish_panels, hide_spines, make_canvas
from butler_jax.evaluation.report.tables import (
    Metric,
    Row,
    at_budget,
    format_budget,
    format_part,
    is_butler,
    is_dense,
    list_policies,
    sort_budgets,
    sort_key,
)


def draw_grid(shown: Metric, down: str, across: str, rows: Sequence[Row], title: str) -> Any:
    """Draw small heat maps, policies down (dense and tokenbutler first) and budgets across; dense is repeated.

    A percentage has the scale 0 to 100, other metrics that of their values.

    Args:
        shown: The metric.
        down: The coordinate of `where` that runs down a heat map.
        across: The coordinate that runs across.
        rows: Rows with both coordinates.
        title: Of the figure.
    """
    import numpy as np

    policies = sorted(list_policies(rows), key=lambda p: (not is_dense(p), not is_butler(p)))
    budgets = sort_budgets(rows)
    ys, xs = (sorted({r["where"][k] for r in rows}, key=sort_key) for k in (down, across))
    scaled = [shown.scale * r["value"] for r in rows]
    limits = (0.0, 100.0) if shown.unit == "%" else (min(scaled), max(scaled))
    height = max(0.62, 0.14 * len(ys))  # room for a label at every square of one panel
    canvas, panels = make_canvas(len(policies), max(1, len(budgets)), (WIDTH, 1.1 + height * len(policies)))
    for policy, line in zip(policies, panels, strict=True):
        for panel, budget in zip(line, budgets or [1], strict=True):
            values = np.full((len(ys), len(xs)), np.nan)
            for row in at_budget(rows, budget):
                if row["policy"] == policy:
                    values[ys.index(row["where"][down]), xs.index(row["where"][across])] = shown.scale * row["value"]
            panel.set_xticks([])
            panel.set_yticks([])
            hide_spines(panel)
            image = draw_matrix(panel, values, limits)
        bold = "bold" if is_butler(policy) else "normal"
        line[0].set_ylabel(policy, rotation=0, ha="right", va="center", fontweight=bold)
    for panel, budget in zip(panels[0], budgets, strict=False):
        panel.set_title(format_budget(budget).replace(" ", "\n"), fontsize=8, loc="center")
    ends = sorted({0, len(xs) - 1})
    panels[-1][0].set_xticks(ends, [format_part(xs[i]) for i in ends], fontsize=7)
    panels[-1][0].set_xlabel(across, fontsize=8)
    _label_right(panels[-1][-1] if len(budgets) > 1 else panels[-1][-1].twinx(), ys, down)
    bar = canvas.colorbar(image, ax=panels, location="bottom", shrink=0.5, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    canvas.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    return canvas


def draw_heads(shares: Mapping[str, Sequence[Sequence[float]]], title: str, ends: tuple[float, float | None]) -> Any:
    """Draw shares in percent, a panel for each policy: layers from layer 1 down, heads across; None is blank.

    Args:
        shares: Of every layer and head, by policy.
        title: Of the figure.
        ends: Of the scale in percent. The lower one gives way to lower values; None is the largest value.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    values = {
        p: 100 * np.array([[np.nan if v is None else v for v in layer] for layer in s]) for p, s in shares.items()
    }
    low = min(ends[0], min(float(np.nanmin(v)) for v in values.values()))
    high = max(float(np.nanmax(v)) for v in values.values()) if ends[1] is None else ends[1]
    across = min(3, len(values))
    down = -(-len(values) // across)
    size = (WIDTH, 0.9 + 1.75 * down + (1.0 if down == 1 else 0))
    canvas, grid = make_canvas(down, across, size, sharex=True, sharey=True)
    panels = list(grid.flat)
    for panel, (policy, rate) in zip(panels, values.items(), strict=False):
        layers, heads = rate.shape
        image = draw_matrix(panel, rate, (low, high), extent=(-0.5, heads - 0.5, layers + 0.5, 0.5))
        weight = "bold" if is_butler(policy) else "normal"
        panel.set_title(policy.replace(":", ":\n"), fontsize=8, fontweight=weight)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.tick_params(labelsize=7.5, length=2)
        hide_spines(panel)
    finish_panels(panels, len(values), across, "head")
    canvas.supylabel("layer", fontsize=8.5)
    bar = canvas.colorbar(image, ax=panels, location="right", shrink=0.6, aspect=25, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    canvas.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    return canvas


def _label_right(axes: Any, values: Sequence[Any], name: str) -> None:
    """Name every row of a heat map at its right."""
    hide_spines(axes)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.yaxis.tick_right()
    axes.set_yticks(range(len(values)), [format_part(value) for value in values], fontsize=6.5)
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(name, fontsize=8)
