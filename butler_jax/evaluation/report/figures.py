"""Rows and arrays of a report as figures. Nothing is drawn before it is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from butler_jax.evaluation.plots import Draw, Look, assign_looks
from butler_jax.evaluation.report.curves import (
    BYTES_READ,
    draw_curves,
    draw_distances,
    draw_parts,
    draw_positions,
    draw_reliability,
)
from butler_jax.evaluation.report.heat_maps import draw_grid, draw_heads
from butler_jax.evaluation.report.modes import label_allocations, split_prompts
from butler_jax.evaluation.report.shares import is_mixed
from butler_jax.evaluation.report.tables import (
    Row,
    find_axis,
    find_metric,
    format_budget,
    group_by_coordinates,
    group_by_metric,
    is_butler,
    is_finite,
    list_bytes,
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
    "served_bytes_read": "The same in the served layers alone. The dashed line is dense.",
    "recalled_mass": "The true attention weight on the chosen keys. The oracle chooses by these weights.",
    "accuracy": "Higher is better. The dashed line with its band is the dense model.",
    "miss_rate": "Lower is better. A miss is a name with a wrong token. The dashed line is the dense model.",
}

EQUAL = 1e-3  # shares that lie nearer together are shown as the same


@dataclass(frozen=True)
class PlannedFigure:
    """A figure that is not drawn yet.

    Attributes:
        name: Of its file, without ending.
        task: The task that it is about.
        prompt: Tokens of the prompts of its rows.
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
    prompt: int = 0


def plan_figures(rows: Sequence[Row], arrays: Mapping[str, Any] | None = None) -> list[PlannedFigure]:
    """Plan all figures that the rows and arrays of a report give, in the order of the rows' tasks.

    Rows after different prompts are in different figures.
    """
    rows = label_allocations(rows)
    styles, groups, found = assign_looks(list_policies(rows)), split_prompts(rows), []
    for prompt, own in groups.items():
        end = f"_after_{prompt}" if prompt and len(groups) > 1 else ""
        found += [replace(f, name=f.name + end, prompt=prompt) for f in _plan_rows(own, styles)]
    first = next(iter(groups), 0)  # the arrays of a report come from one evaluation
    rates = {p: r for p, r in (arrays or {}).get("hit_rate", {}).items() if r and r[0]}
    found += [replace(_plan_heads(rates), prompt=first)] if rates else []
    plans = {"reliability": _plan_reliability, "distances": _plan_distances, "reads": _plan_reads}
    for name, plan in plans.items():
        found += [replace(f, prompt=first) for f in plan((arrays or {}).get(name, {}), styles)]
    return found


def _plan_rows(rows: Sequence[Row], styles: Mapping[str, Look]) -> list[PlannedFigure]:
    """The figures of rows after one prompt."""
    usable_rows = [r for r in rows if r["metric"] in CURVES and is_finite(r["value"])]
    found = []
    for (task, metric), chosen in group_by_metric(r for r in usable_rows if not r.get("where")).items():
        if split_dense(chosen)[1]:
            found.append(_plan_curves(task, metric, chosen, styles))
        if task == metric == "perplexity":
            found += _plan_bytes(chosen, rows, styles)
    for (task, metric), group in group_by_metric(r for r in usable_rows if r.get("where")).items():
        for keys, chosen in group_by_coordinates(group).items():
            if len(keys) == 1:
                found.append(_plan_parts(task, metric, chosen, styles))
            elif len(keys) == 2:
                found.append(_plan_grid(task, metric, chosen, styles))
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


def _plan_bytes(chosen: Sequence[Row], rows: Sequence[Row], styles: Mapping[str, Look]) -> list[PlannedFigure]:
    """Perplexity against the bytes that were read, where they are known."""
    shares = list_bytes(rows)
    dense, sparse = split_dense(chosen)
    known = [
        {**r, "attended": shares[r["policy"], r["budget"]]} for r in sparse if (r["policy"], r["budget"]) in shares
    ]
    if not known:
        return []
    shown, title = find_metric("perplexity"), "perplexity by bytes read"
    figure = PlannedFigure(
        name="perplexity_by_bytes",
        task="perplexity",
        title=title,
        caption="The same values against the bytes of caches that a token reads, those for the choice included, and "
        + ("those of the layers that are not served" if is_mixed(rows) else "layer 0, which is dense")
        + ". At equal bytes the lower policy is the better one.",
        alt=f"{title}; one line each for {', '.join(list_policies(known))}. The numbers are in the tables.",
        draw=lambda: draw_curves("perplexity", shown, [*dense, *known], styles, title, BYTES_READ),
    )
    return [figure]


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
        caption=f"Layers down from layer 1, heads across, one scale for all policies.{_name_blank(rates)} "
        "Chance is 50 %.",
        alt=f"Heat maps of the hit rate of every layer and head for {', '.join(policies)}.",
        draw=lambda: draw_heads({p: rates[p] for p in policies}, "hit rate by layer and head (%)", (50.0, 100.0)),
    )


def _plan_reliability(
    reliability: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, Look]
) -> list[PlannedFigure]:
    """What a predictor gives beside what is true."""
    known = {p: found for p, found in reliability.items() if p in styles and all(one["true"] for one in found)}
    if not known:
        return []
    title = "predicted and true, means over bins"
    figure = PlannedFigure(
        name="reliability",
        task="attention",
        title=title,
        caption="Left: single keys. Right: all keys of a row and KV head together. Sinks and recent keys are left out. "
        "Predicted is the error in the residual stream that follows from not reading a key, or the attention weight "
        "where the predictor was trained for that. On the dashed line, the truth is on the mean what was predicted. A "
        "tolerance compares these numbers between heads and layers.",
        alt=f"Two panels of true values against predicted ones, both axes logarithmic, for {', '.join(known)}.",
        draw=lambda: draw_reliability(known, styles, title),
    )
    return [figure]


def _plan_distances(
    distances: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, Look]
) -> list[PlannedFigure]:
    """Where attention weight and the keys that are read lie, at each policy's smallest budget."""
    least = {
        p: min(found, key=lambda one: sum(one["recalled"])) for p, found in distances.items() if p in styles and found
    }
    if not least:
        return []
    budgets = ", ".join(dict.fromkeys(format_budget(one["budget"]) for one in least.values()))
    title = f"by distance from the query, budget {budgets}"
    figure = PlannedFigure(
        name="distances",
        task="attention",
        title=title,
        caption="Left: the attention weight of the keys read, below that of all keys. Right: the share of the keys "
        "read that lie there. Sinks and recent keys are left out. A policy that reads far more at long distances than "
        "the oracle does scores far keys too high.",
        alt=f"Two panels of shares by distance in powers of two, for {', '.join(least)}.",
        draw=lambda: draw_distances(least, styles, title),
    )
    return [figure]


def _plan_reads(reads: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, Look]) -> list[PlannedFigure]:
    """Where reads went at the smallest budget, under the policies whose heads do not all read as much."""
    least = {p: min(found, key=lambda one: _find_mean(one["heads"])) for p, found in reads.items() if found}
    uneven = {p: one for p, one in least.items() if _find_spread(one["heads"]) > EQUAL}
    if not uneven:
        return []
    budgets = ", ".join(dict.fromkeys(format_budget(one["budget"]) for one in uneven.values()))
    curves = {}
    for policy, one in least.items():
        size = one["bin_size"]
        known = [(size * (i + 0.5), share) for i, share in enumerate(one["positions"]) if share is not None]
        if policy in uneven or not any(_are_close(known, other) for other in curves.values()):
            curves[policy] = known
    names, title = ", ".join(uneven), f"keys read by layer and head, budget {budgets} (%)"
    blank = _name_blank({p: one["heads"] for p, one in uneven.items()})
    layers = "all heads of the served layers" if blank else "all layers and heads but layer 0"
    along = f"keys read by position, budget {budgets} (%)"
    return [
        PlannedFigure(
            name="reads_by_head",
            task="perplexity",
            title=title,
            caption=f"Layers down from layer 1, heads across, one scale for all policies.{blank} Policies whose heads "
            "all read the same share are left out.",
            alt=f"Heat maps of the share of the keys that every layer and head reads for {names}.",
            draw=lambda: draw_heads({p: one["heads"] for p, one in uneven.items()}, title, (0.0, None)),
        ),
        PlannedFigure(
            name="reads_by_position",
            task="perplexity",
            title=along,
            caption=f"The mean over {layers}. Of policies that read the same share at every position, one is shown.",
            alt=f"The share of the keys that is read by position in the window, for {', '.join(curves)}.",
            draw=lambda: draw_positions({p: tuple(zip(*c, strict=True)) for p, c in curves.items()}, styles, along),
        ),
    ]


def _name_blank(shares: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """What blank rows of heat maps are; empty where none is blank."""
    blank = any(None in layer for layers in shares.values() for layer in layers)
    return " Layers that are not served are blank." if blank else ""


def _list_shares(heads: Sequence[Sequence[float | None]]) -> list[float]:
    """The shares of the heads of served layers."""
    return [share for layer in heads for share in layer if share is not None]


def _find_mean(heads: Sequence[Sequence[float | None]]) -> float:
    shares = _list_shares(heads)
    return sum(shares) / len(shares)


def _find_spread(heads: Sequence[Sequence[float | None]]) -> float:
    """How far the shares of heads lie apart."""
    shares = _list_shares(heads)
    return max(shares) - min(shares)


def _are_close(some: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> bool:
    """Whether two curves are the same."""
    return len(some) == len(others) and all(abs(a - b) < EQUAL for (_, a), (_, b) in zip(some, others, strict=True))
