"""Heat maps of a report: a metric over two coordinates, a hit rate over layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from butler_jax.evaluation.report.plotting import WIDTH, finish_panels
from butler_jax.evaluation.report.tables import (
    Metric,
    Row,
    budget_label,
    budgets_of,
    is_butler,
    order,
    policies_of,
    show_part,
)


def draw_grid(shown: Metric, down: str, across: str, rows: Sequence[Row], title: str) -> Any:
    """Small heat maps, policies down (dense and tokenbutler first), budgets across; dense is repeated.

    down and across name coordinates of `where`. A percentage has the scale 0 to 100, others that of their values.
    """
    from matplotlib.figure import Figure as Canvas

    policies = sorted(policies_of(rows), key=lambda p: (p != "dense", not is_butler(p)))
    budgets = budgets_of(rows)
    ys, xs = (sorted({r["where"][k] for r in rows}, key=order) for k in (down, across))
    scaled = [shown.scale * r["value"] for r in rows]
    limits = (0.0, 100.0) if shown.unit == "%" else (min(scaled), max(scaled))
    height = max(0.62, 0.14 * len(ys))  # room for a label at every square of one panel
    canvas = Canvas(figsize=(WIDTH, 1.1 + height * len(policies)))
    panels = canvas.subplots(len(policies), max(1, len(budgets)), squeeze=False)
    for policy, line in zip(policies, panels, strict=True):
        for panel, budget in zip(line, budgets or [1], strict=True):
            own = [r for r in rows if r["policy"] == policy and (policy == "dense" or r["budget"] == budget)]
            image = _square(panel, _values(own, down, across, ys, xs, shown.scale), limits)
        bold = "bold" if is_butler(policy) else "normal"
        line[0].set_ylabel(policy, rotation=0, ha="right", va="center", fontweight=bold)
    for panel, budget in zip(panels[0], budgets, strict=False):
        panel.set_title(budget_label(budget).replace(" ", "\n"), fontsize=8, loc="center")
    panels[-1][0].set_xticks(*_ends(xs), fontsize=7)
    panels[-1][0].set_xlabel(across, fontsize=8)
    last = panels[-1][-1] if len(budgets) > 1 else panels[-1][-1].twinx()
    _right_axis(last, ys, down)
    bar = canvas.colorbar(image, ax=panels, location="bottom", shrink=0.5, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    canvas.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    return canvas


def _values(rows: Sequence[Row], down: str, across: str, ys: Sequence, xs: Sequence, scale: float) -> Any:
    """Values on the grid, NaN where there is no row."""
    import numpy as np

    values = np.full((len(ys), len(xs)), np.nan)
    for row in rows:
        values[ys.index(row["where"][down]), xs.index(row["where"][across])] = scale * row["value"]
    return values


def _square(panel: Any, values: Any, limits: tuple[float, float]) -> Any:
    panel.set_xticks([])
    panel.set_yticks([])
    for side in panel.spines.values():
        side.set_visible(False)
    low, high = limits
    return panel.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto", interpolation="none")


def _ends(values: Sequence[Any]) -> tuple[list[int], list[str]]:
    """Places and words of the first and the last value."""
    places = sorted({0, len(values) - 1})
    return places, [show_part(values[i]) for i in places]


def _right_axis(axes: Any, values: Sequence[Any], name: str) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.yaxis.tick_right()
    axes.set_yticks(range(len(values)), [show_part(value) for value in values], fontsize=6.5)
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(name, fontsize=8)


def draw_heads(rates: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    """A panel a policy: layers (from layer 1) down, heads across, in percent; None is drawn as nothing."""
    import numpy as np
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    values = {p: 100 * np.array([[np.nan if v is None else v for v in layer] for layer in r]) for p, r in rates.items()}
    low = min(50.0, min(float(np.nanmin(v)) for v in values.values()))
    across = min(3, len(values))
    down = -(-len(values) // across)
    canvas = Canvas(figsize=(WIDTH, 0.9 + 1.75 * down + (1.0 if down == 1 else 0)))
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
    finish_panels(panels, len(values), across, "head")
    canvas.supylabel("layer", fontsize=8.5)
    bar = canvas.colorbar(image, ax=panels, location="right", shrink=0.6, aspect=25, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    canvas.suptitle("hit rate by layer and head (%)", fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    return canvas
