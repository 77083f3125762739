"""Rows and arrays of a report as figures. Nothing is drawn before it is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from butler_jax.evaluation.plots import Draw, Look, assign_looks
from butler_jax.evaluation.report.curves import draw_curves, draw_parts
from butler_jax.evaluation.report.heat_maps import draw_grid, draw_heads
from butler_jax.evaluation.report.tables import (
    Row,
    find_axis,
    find_metric,
    format_budget,
    group_by_coordinates,
    group_by_metric,
    is_butler,
    is_finite,
    list_policies,
    make_title,
    sort_budgets,
    split_dense,
)

CURVES = {
    "perplexity": "Lower is better. The dashed line with its band is the dense model.",
    "over_dense": "Lower is better. Predictions are paired with the dense model's, so that errors are smaller than "
    "those of perplexity.",
    "js_divergence": "The divergence of next-token distributions from the dense model's; 0 means that they are equal.",
    "top1_agreement": "How often the most likely next token is the dense model's.",
    "bytes_read": "Bytes that a policy reads for a token, those for its choice included. The dashed line is dense.",
    "recalled_mass": "The true attention weight on the chosen keys. The oracle chooses by these weights.",
    "accuracy": "Higher is better. The dashed line with its band is the dense model.",
    "miss_rate": "Lower is better. A miss is a name with a wrong token. The dashed line is the dense model.",
}


@dataclass(frozen=True)
class PlannedFigure:
    """A figure that is not drawn yet.

    Attributes:
        name: Of its file, without ending.
        task: The task that it is about.
        title: Its title.
        caption: What to look at.
        alt: The alternative text.
        draw: Returns the matplotlib figure.
    """

    name: str
    task: str
    title: str
    caption: str
    alt: str
    draw: Draw


def plan_figures(rows: Sequence[Row], arrays: Mapping[str, Any] | None = None) -> list[PlannedFigure]:
    """Plan all figures that the rows and arrays of a report give, in the order of the rows' tasks."""
    styles = assign_looks(list_policies(rows))
    usable_rows = [r for r in rows if r["metric"] in CURVES and is_finite(r["value"])]
    found = []
    for (task, metric), chosen in group_by_metric(r for r in usable_rows if not r.get("where")).items():
        if split_dense(chosen)[1]:
            found.append(_plan_curves(task, metric, chosen, styles))
    for (task, metric), group in group_by_metric(r for r in usable_rows if r.get("where")).items():
        for keys, chosen in group_by_coordinates(group).items():
            if len(keys) == 1:
                found.append(_plan_parts(task, metric, chosen, styles))
            elif len(keys) == 2:
                found.append(_plan_grid(task, metric, chosen, styles))
    rates = {p: r for p, r in (arrays or {}).get("hit_rate", {}).items() if r and r[0]}
    if rates:
        found.append(_plan_heads(rates))
    return found


def _make_file_name(name: str) -> str:
    """A name of letters, digits and underscores."""
    return re.sub(r"\W+", "_", name)


def _plan_curves(task: str, metric: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> PlannedFigure:
    """A metric against the share of the cache that was read, or against the budget where that is not known."""
    shown = find_metric(metric, rows)
    _, sparse = split_dense(rows)
    title = make_title(task, shown)
    budgets = ", ".join(format_budget(b) for b in sort_budgets(rows))
    return PlannedFigure(
        name=_make_file_name(f"{task}_{metric}" if metric != task else task),
        task=task,
        title=title,
        caption=CURVES[metric],
        alt=f"{title} against the share of the cache that is read; budgets {budgets}; "
        f"one line each for {', '.join(list_policies(sparse))}. The numbers are in the table.",
        draw=lambda: draw_curves(metric, shown, rows, styles, title),
    )


def _plan_parts(task: str, metric: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> PlannedFigure:
    """A metric by one coordinate, a panel for each budget."""
    shown, key = find_metric(metric, rows), find_axis(rows)
    title = f"{make_title(task, shown)} by {key}"
    return PlannedFigure(
        name=_make_file_name(f"{task}_{metric}_by_{key}"),
        task=task,
        title=title,
        caption=f"One panel for each budget. Where a curve is not flat, the {key} matters.",
        alt=f"{title}, one panel for each of the budgets {', '.join(format_budget(b) for b in sort_budgets(rows))}. "
        "The numbers are in the tables of parts.",
        draw=lambda: draw_parts(shown, key, rows, styles, title),
    )


def _plan_grid(task: str, metric: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> PlannedFigure:
    """Two coordinates as heat maps: policies down, budgets across."""
    shown, down = find_metric(metric, rows), find_axis(rows)
    across = next(key for key in rows[0]["where"] if key != down)
    title = f"{make_title(task, shown)} by {down} and {across}"
    return PlannedFigure(
        name=_make_file_name(f"{task}_{metric}_grid"),
        task=task,
        title=title,
        caption=f"One square for each policy and budget, {down} down and {across} across. "
        "Dark cells are low values. Dense has no budget, so its square is repeated.",
        alt=f"{title}: heat maps, policies down and budgets across. The numbers are in the tables of parts.",
        draw=lambda: draw_grid(shown, down, across, rows, title),
    )


def _plan_heads(rates: Mapping[str, Sequence[Sequence[float]]]) -> PlannedFigure:
    """Hit rate by layer and head, a heat map for each policy, tokenbutler first."""
    policies = sorted(rates, key=lambda p: not is_butler(p))
    return PlannedFigure(
        name="hit_rate_heads",
        task="attention",
        title="hit rate by layer and head (%)",
        caption="Layers down from layer 1, heads across, one scale for all policies. Chance is 50 %.",
        alt=f"Heat maps of the hit rate of every layer and head for {', '.join(policies)}.",
        draw=lambda: draw_heads({p: rates[p] for p in policies}),
    )
