"""Figures of the analyses. Each function takes what analysis.py or reading.py returned and gives a matplotlib Figure.

Nothing global is touched: no style, no current figure. A Figure shows itself in a notebook; `save` writes a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from butler_jax.evaluation.analysis.agreement import PUBLISHED, Access, Drift, Overlap, binned
from butler_jax.evaluation.analysis.reading import Reading, Scored

BLUE, ORANGE, GREY = "#2a6fbb", "#d9730d", "#777777"
FAINTEST = 1e-4  # attention weights below this look alike


def blank(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4), **options: Any) -> tuple[Any, Any]:
    """An empty figure, which notebooks show without pyplot, and its axes [rows, columns]; size in inches.

    options: of matplotlib's Figure.subplots. Raises ImportError without matplotlib, saying what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "butler-jax[plots]"') from error

    class Picture(Figure):
        """A figure that notebooks show without pyplot."""

        def _repr_png_(self) -> bytes:
            import io

            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()

    figure = Picture(figsize=size, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure to a file (png, pdf or svg by its name); directories are made where missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def head_agreement_figure(divergence: Float[np.ndarray, "L H H"], shown: int = 4) -> Any:
    """Mean divergence of a layer's pairs of heads by layer, and the matrices of a few layers."""
    layers, heads, _ = divergence.shape
    picked = np.unique(np.linspace(0, layers - 1, min(shown, layers)).round().astype(int))
    figure, axes = blank(1, 1 + len(picked), (4 + 2.4 * len(picked), 3.2))
    pairs = divergence[:, ~np.eye(heads, dtype=bool)]
    line, *matrices = axes[0]
    if heads > 1:
        _line(line, np.arange(layers), pairs.mean(axis=1), "layer", "divergence of two heads (nats)")
        line.fill_between(np.arange(layers), pairs.min(axis=1), pairs.max(axis=1), color=BLUE, alpha=0.15, lw=0)
    line.set_title("mean and range over pairs", fontsize=10)
    for ax, layer in zip(matrices, picked, strict=True):
        image = _matrix(ax, divergence[layer], "magma_r", float(divergence.max()) or 1.0)
        ax.set_title(f"layer {layer}", fontsize=10)
        ax.set(xlabel="query head", xticks=range(0, heads, -(-heads // 8)), yticks=range(0, heads, -(-heads // 8)))
    figure.colorbar(image, ax=matrices, label="divergence (nats)")
    return figure


def step_agreement_figure(divergence: Float[np.ndarray, "L N N"]) -> Any:
    """Divergence of every two decode steps, mean over layers 1 ..., and its growth with their distance."""
    mean, steps = divergence[1:].mean(axis=0), divergence.shape[1]
    figure, ((left, right),) = blank(1, 2, (9, 3.6))
    image = _matrix(left, mean, "magma_r", float(mean.max()) or 1.0)
    left.set(xlabel="decode step", ylabel="decode step")
    left.set_title("mean over layers 1 ...", fontsize=10)
    figure.colorbar(image, ax=left, label="divergence (nats)")
    apart = np.arange(1, steps)
    by_layer = np.array([[np.diagonal(d, n).mean() for n in apart] for d in divergence[1:]])
    for layer in by_layer:
        right.plot(apart, layer, color=GREY, lw=0.6, alpha=0.4)
    _line(right, apart, by_layer.mean(axis=0), "steps apart", "divergence (nats)")
    right.set_title("each layer, and their mean", fontsize=10)
    return figure


def overlap_figure(found: Overlap, published: bool = True) -> Any:
    """Overlap of the best tokens with those of step 0 by decode step; the paper's figures beside ours."""
    figure, ((ax,),) = blank(1, 1, (6.4, 4))
    parts = [(False, "by true attention", BLUE)]
    parts += [] if found.predicted is None else [(True, "by the predictor's scores", ORANGE)]
    for predicted, label, colour in parts:
        mean, error = found.curve(predicted)
        _line(ax, np.arange(mean.size), mean, "decode step", "overlap with step 0", colour, label)
        if error is not None:
            ax.fill_between(np.arange(mean.size), mean - error, mean + error, color=colour, alpha=0.2, lw=0)
    if published:
        within = {step: value for step, value in PUBLISHED.items() if step < found.true.shape[-1]}
        label = "published for Llama-3.1-8B"
        ax.plot(list(within), list(within.values()), "D", color="black", ms=5, label=label)
    ax.set_ylim(0, 1.03)
    ax.legend(frameon=False)
    return figure


def drift_figure(found: Drift, bins: int = 10) -> Any:
    """Hit rate by how far attention moved: means of bins with standard errors, layers 1 ..., every row and head."""
    figure, axes = blank(1, 2, (9, 3.4), sharey=True)
    names = {"moved": "best tokens that changed (share)", "divergence": "divergence from the earlier row (nats)"}
    for ax, (name, label) in zip(axes[0], names.items(), strict=True):
        bars = binned(getattr(found, name)[:, 1:], found.hit_rate[:, 1:], bins)
        ax.errorbar(bars.x, bars.y, bars.error, color=BLUE, marker="o", ms=4, lw=1.5, capsize=3)
        ax.axhline(found.hit_rate[:, 1:].mean(), color=GREY, lw=1, ls=":")
        ax.set_xlabel(label)
        ax.grid(alpha=0.25, lw=0.5)
    axes[0, 0].set_ylabel("hit rate")
    return figure


def access_figure(found: Access, sequence: int = 0) -> Any:
    """Which tokens are read how often by layer, how rows agree, and how much of a set the next row reads."""
    figure, axes = blank(1, 3, (13, 3.6), width_ratios=(2.2, 1.2, 1.2))
    often, agree, kept = axes[0]
    layers = found.frequency.shape[1]
    frequency = found.frequency[sequence].mean(axis=1)
    image = _matrix(often, frequency, "viridis", 1.0, aspect="auto")
    often.set(xlabel="token", ylabel="layer")
    often.set_title("share of the rows that read a token", fontsize=10)
    figure.colorbar(image, ax=often)
    image = _matrix(agree, found.agreement[1:].mean(axis=0), "viridis", 1.0)
    agree.set(xlabel="row", ylabel="row")
    agree.set_title("read by both, over read by either", fontsize=10)
    figure.colorbar(image, ax=agree)
    _line(
        kept, np.arange(1, layers), found.consistency[:, 1:].mean(axis=(0, 2, 3)), "layer", "read by the next row too"
    )
    kept.set_ylim(0, 1.03)
    return figure


def scores_figure(found: Scored) -> Any:
    """True attention and the predictor's, side by side in one logarithmic colour scale.

    A predictor is trained on what is neither sink nor recent window: on those, its colours mean nothing.
    """
    from matplotlib.colors import LogNorm

    figure, axes = blank(1, 2, (10, 4.6), sharex=True, sharey=True)
    norm = LogNorm(FAINTEST, 1.0)
    parts = {"true attention": found.attention, "the predictor's scores, softmax": found.predicted}
    for ax, (title, weights) in zip(axes[0], parts.items(), strict=True):
        seen = np.ma.masked_where(np.isnan(found.logits), weights)
        image = ax.imshow(np.ma.clip(seen, FAINTEST, 1), cmap="viridis", norm=norm, interpolation="antialiased")
        ax.set_xlabel("token read")
        ax.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("token that reads")
    figure.colorbar(image, ax=axes, label="weight")
    return figure


def reading_figure(found: Reading) -> Any:
    """What one row reads: sets that hold each token, above the KV heads of each layer that do."""
    figure, ((top,), (below,)) = blank(2, 1, (11, 5), sharex=True, height_ratios=(1, 2.4))
    tokens = np.arange(found.position + 1)
    top.bar(tokens, found.counts[: tokens.size] / found.most, width=1.0, color=ORANGE)
    top.set(ylabel="share of the sets", ylim=(0, 1.03))
    top.set_title(
        f"what token {found.position} reads ({found.policy}, budget {found.selection.budget:.4g})", fontsize=10
    )
    image = _matrix(below, found.by_layer[:, : tokens.size], "viridis", found.sets.shape[1], aspect="auto")
    below.set(xlabel="token", ylabel="layer")
    figure.colorbar(image, ax=below, label="KV heads that read it", ticks=range(found.sets.shape[1] + 1))
    return figure


def _line(ax: Any, x, y, across: str, up: str, colour: str = BLUE, label: str | None = None) -> None:
    ax.plot(x, y, color=colour, lw=1.8, label=label)
    ax.set(xlabel=across, ylabel=up)
    ax.grid(alpha=0.25, lw=0.5)


def _matrix(ax: Any, values: np.ndarray, colours: str, most: float, aspect: str = "equal") -> Any:
    options = dict(cmap=colours, vmin=0, vmax=most, aspect=aspect)
    rows, columns = values.shape
    if columns <= 400:
        return ax.imshow(values, interpolation="nearest", **options)
    # With more columns than pixels, nearest would leave columns out. Few rows are drawn as many: only columns mix.
    copies = max(columns // rows, 1)
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    return ax.imshow(np.repeat(values, copies, axis=0), interpolation="antialiased", extent=extent, **options)
