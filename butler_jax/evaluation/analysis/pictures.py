"""Figures of the analyses: each function draws what a function of agreement.py, errors.py or reading.py returns.

They change no global state of matplotlib, neither style nor current figure. Notebooks show the figures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from butler_jax.evaluation.analysis.agreement import PUBLISHED, Access, Drift, Overlap, bin_means
from butler_jax.evaluation.analysis.errors import Errors
from butler_jax.evaluation.analysis.reading import Reading, Scored
from butler_jax.evaluation.plots import draw_matrix, make_canvas

BLUE, ORANGE, GREY = "#2a6fbb", "#d9730d", "#777777"
FAINTEST = 1e-4  # attention weights below this look alike


def draw_head_agreement(divergence: Float[np.ndarray, "L H H"], shown: int = 4) -> Any:
    """Draw the mean divergence of pairs of heads by layer, and the matrices of a few layers."""
    layers, heads, _ = divergence.shape
    picked = np.unique(np.linspace(0, layers - 1, min(shown, layers)).round().astype(int))
    figure, axes = make_canvas(1, 1 + len(picked), (4 + 2.4 * len(picked), 3.2))
    pairs = divergence[:, ~np.eye(heads, dtype=bool)]
    line, *matrices = axes[0]
    limits = (0, float(divergence.max()) or 1.0)
    if heads > 1:
        _draw_line(line, np.arange(layers), pairs.mean(axis=1), "layer", "divergence of two heads (nats)")
        line.fill_between(np.arange(layers), pairs.min(axis=1), pairs.max(axis=1), color=BLUE, alpha=0.15, lw=0)
    line.set_title("mean and range over pairs")
    for ax, layer in zip(matrices, picked, strict=True):
        image = draw_matrix(ax, divergence[layer], limits, "magma_r", aspect="equal")
        ax.set_title(f"layer {layer}")
        ax.set(xlabel="query head", xticks=range(0, heads, -(-heads // 8)), yticks=range(0, heads, -(-heads // 8)))
    figure.colorbar(image, ax=matrices, label="divergence (nats)")
    return figure


def draw_step_agreement(divergence: Float[np.ndarray, "L C C"]) -> Any:
    """Draw the divergence of every two decode steps, mean over served layers, and its growth with their distance."""
    mean, steps = np.nanmean(divergence[1:], axis=0), divergence.shape[1]
    figure, ((left, right),) = make_canvas(1, 2, (9, 3.6))
    image = draw_matrix(left, mean, (0, float(mean.max()) or 1.0), "magma_r", aspect="equal")
    left.set(xlabel="decode step", ylabel="decode step")
    left.set_title("mean over layers 1 ...")
    figure.colorbar(image, ax=left, label="divergence (nats)")
    apart = np.arange(1, steps)
    by_layer = np.array([[np.diagonal(d, n).mean() for n in apart] for d in divergence[1:]])
    for layer in by_layer:
        right.plot(apart, layer, color=GREY, lw=0.6, alpha=0.4)
    _draw_line(right, apart, np.nanmean(by_layer, axis=0), "steps apart", "divergence (nats)")
    right.set_title("each layer, and their mean")
    return figure


def draw_overlap(found: Overlap, published: bool = True) -> Any:
    """Draw the overlap of the best tokens with those of step 0 by decode step, with the paper's figures."""
    figure, ((ax,),) = make_canvas(1, 1, (6.4, 4))
    parts = [(False, "by true attention", BLUE)]
    parts += [] if found.predicted is None else [(True, "by the predictor's scores", ORANGE)]
    for predicted, label, colour in parts:
        mean, error = found.curve(predicted)
        _draw_line(ax, np.arange(mean.size), mean, "decode step", "overlap with step 0", colour, label)
        if error is not None:
            ax.fill_between(np.arange(mean.size), mean - error, mean + error, color=colour, alpha=0.2, lw=0)
    if published:
        within = {step: value for step, value in PUBLISHED.items() if step < found.true.shape[-1]}
        label = "published for Llama-3.1-8B"
        ax.plot(list(within), list(within.values()), "D", color="black", ms=5, label=label)
    ax.set_ylim(0, 1.03)
    ax.legend(frameon=False)
    return figure


def draw_drift(found: Drift, bins: int = 10) -> Any:
    """Draw the hit rate against the change of attention: means of bins with standard errors, over layers 1 ...."""
    figure, axes = make_canvas(1, 2, (9, 3.4), sharey=True)
    names = {"moved": "share of the best tokens that changed", "divergence": "divergence from the earlier row (nats)"}
    for ax, (name, label) in zip(axes[0], names.items(), strict=True):
        bars = bin_means(getattr(found, name)[:, 1:], found.hit_rate[:, 1:], bins)
        ax.errorbar(bars.x, bars.y, bars.error, color=BLUE, marker="o", ms=4, lw=1.5, capsize=3)
        ax.axhline(np.nanmean(found.hit_rate[:, 1:]), color=GREY, lw=1, ls=":")
        ax.set_xlabel(label)
        ax.grid()
    axes[0, 0].set_ylabel("hit rate")
    return figure


def draw_access(found: Access, sequence: int = 0) -> Any:
    """Draw how often tokens are read by layer, how rows agree, and how much of a set the next row reads."""
    figure, axes = make_canvas(1, 3, (13, 3.6), width_ratios=(2.2, 1.2, 1.2))
    often, agree, kept = axes[0]
    layers = found.frequency.shape[1]
    frequency = found.frequency[sequence].mean(axis=1)
    image = draw_matrix(often, frequency, (0, 1))
    often.set(xlabel="token", ylabel="layer")
    often.set_title("share of the rows that read a token")
    figure.colorbar(image, ax=often)
    image = draw_matrix(agree, np.nanmean(found.agreement[1:], axis=0), (0, 1), aspect="equal")
    agree.set(xlabel="row", ylabel="row")
    agree.set_title("tokens read by both rows, over those read by either")
    figure.colorbar(image, ax=agree)
    _draw_line(
        kept,
        np.arange(1, layers),
        found.consistency[:, 1:].mean(axis=(0, 2, 3)),
        "layer",
        "share that the next row reads too",
    )
    kept.set_ylim(0, 1.03)
    return figure


def draw_scores(found: Scored) -> Any:
    """Draw true attention beside the softmax of the predictor's scores, in one logarithmic colour scale.

    A predictor is not trained on sinks and recent tokens. Its colours there have no meaning.
    """
    from matplotlib.colors import LogNorm

    figure, axes = make_canvas(1, 2, (10, 4.6), sharex=True, sharey=True)
    norm = LogNorm(FAINTEST, 1.0)
    parts = {"true attention": found.attention, "the predictor's scores, softmax": found.predicted}
    for ax, (title, weights) in zip(axes[0], parts.items(), strict=True):
        seen = np.ma.masked_where(np.isnan(found.logits), weights)
        image = ax.imshow(np.ma.clip(seen, FAINTEST, 1), cmap="viridis", norm=norm, interpolation="antialiased")
        ax.set_xlabel("key token")
        ax.set_title(title)
    axes[0, 0].set_ylabel("query token")
    figure.colorbar(image, ax=axes, label="weight")
    return figure


def draw_errors(found: Errors, share: float) -> Any:
    """Draw the errors of the last row's tokens against their attention weights, and the error that is left unread.

    Args:
        share: Of the keys that a row reads; what is left unread is drawn by layer and head, and by layer for each way
            to choose.
    """
    figure, ((points, matrix, line),) = make_canvas(1, 3, (14, 3.8))
    weights, errors = found.weights[0, 1:, :, -1], found.errors[0, 1:, :, -1]
    layers = np.arange(1, 1 + len(weights))
    drawn = (weights > FAINTEST) & (errors > 0)
    of_layer = np.broadcast_to(layers[:, None, None], weights.shape)[drawn]
    shown = points.scatter(weights[drawn], errors[drawn], s=3, c=of_layer, alpha=0.5, lw=0, rasterized=True)
    figure.colorbar(shown, ax=points, label="layer", ticks=layers[:: -(-len(layers) // 8)])
    points.set(xscale="log", yscale="log", xlabel="attention weight", ylabel="error, relative to the stream")
    points.set_title("tokens of the last row, in all layers and heads")
    names = {"weight": "by weight, each head alike", "error": "by error, each head alike", "tolerance": "one tolerance"}
    left = {by: found.left(share, by) for by in names}
    image = draw_matrix(matrix, left["weight"], (0, float(np.nanmax(left["weight"])) or 1.0), "magma_r")
    matrix.set(xlabel="query head", ylabel="layer", yticks=range(len(layers)), yticklabels=layers)
    matrix.set_title(f"error left, {share:.3g} read by weight")
    figure.colorbar(image, ax=matrix)
    for (by, label), colour in zip(names.items(), (GREY, BLUE, ORANGE), strict=True):
        _draw_line(line, layers, left[by].sum(axis=1), "layer", "error left, sum over heads", colour, label)
    line.set_ylim(0)
    line.set_xticks(layers)
    line.legend(frameon=False)
    return figure


def draw_reading(found: Reading) -> Any:
    """Draw what one row reads: the share of the sets that hold each token, above the KV heads of each layer that do."""
    figure, ((top,), (below,)) = make_canvas(2, 1, (11, 5), sharex=True, height_ratios=(1, 2.4))
    tokens = np.arange(found.position + 1)
    top.bar(tokens, found.counts[: tokens.size] / found.most, width=1.0, color=ORANGE)
    top.set(ylabel="share of the sets", ylim=(0, 1.03))
    top.set_title(
        f"tokens that token {found.position} reads ({found.policy}, budget {found.selection.budget:.4g})", fontsize=10
    )
    image = draw_matrix(below, found.by_layer[:, : tokens.size], (0, found.sets.shape[1]))
    below.set(xlabel="token", ylabel="layer")
    figure.colorbar(image, ax=below, label="KV heads that read it", ticks=range(found.sets.shape[1] + 1))
    return figure


def _draw_line(ax: Any, x, y, across: str, up: str, colour: str = BLUE, label: str | None = None) -> None:
    ax.plot(x, y, color=colour, lw=1.8, label=label)
    ax.set(xlabel=across, ylabel=up)
    ax.grid()
