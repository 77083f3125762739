"""Matplotlib without global state: one style, the look of policies, and figures as PNG or as SVG for a page."""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

WIDTH = 4.0  # inches of a report's figure: narrow, so that its text is large enough on a phone
INK = "#1b1b1d"  # of text and axes; a page draws it in the colour of its text
NO_PICTURES = 'No pictures: they need matplotlib (pip install "butler-jax[plots]").'
REFERENCE, FURTHER = "#808080", ("#8C6D1F", "#8A6FDF", "#5F8F8F")


@dataclass(frozen=True)
class Look:
    """Colour, marker, dashes and width of a policy, the same in every figure."""

    color: str
    marker: str
    dashes: Any = "-"
    width: float = 1.3
    above: int = 2  # the higher one is drawn on top


# Okabe and Ito's colours. Bounds are grey: the oracles above, random below.
LOOKS = {
    "dense": Look(INK, "", (0, (5, 2)), 1.2, 1),
    "oracle": Look(REFERENCE, "^", above=3),
    "oracle_head": Look(REFERENCE, "v", (0, (3, 1.5)), above=2),
    "oracle_residual": Look(REFERENCE, "<", (0, (6, 1.5)), above=3),
    "random": Look(REFERENCE, "x", (0, (1, 1.5)), above=1),
    "streaming": Look("#56B4E9", "s"),
    "h2o": Look("#CC79A7", "D"),
    "snapkv": Look("#E69F00", "p"),
    "citrus": Look("#B8A500", "H"),
    "quest": Look("#009E73", "h"),
    "lowrank": Look("#0072B2", "P"),
    "tokenbutler": Look("#D55E00", "o", width=2.8, above=5),
}
VARIANTS = (("*", (0, (4, 1.2))), ("d", (0, (1.2, 1.2))), (">", (0, (4, 1, 1, 1))), ("X", (0, (2, 1, 2, 3))))

STYLE = {
    "font.family": ["sans-serif"],
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "butler-jax",
    "figure.constrained_layout.use": True,
}


Draw = Callable[[], Any]  # returns a matplotlib figure


def plots_available() -> bool:
    """Whether matplotlib is installed (`pip install "butler-jax[plots]"`)."""
    return importlib.util.find_spec("matplotlib") is not None


def assign_looks(policies: Sequence[str]) -> dict[str, Look]:
    """A look for each label: labels of one policy share its colour, and unknown policies take further colours."""
    others = [name for name in dict.fromkeys(p.split(":")[0] for p in policies) if name not in LOOKS]
    known = LOOKS | {name: Look(FURTHER[i % len(FURTHER)], "8", (0, (6, 1))) for i, name in enumerate(others)}
    found, times = {}, Counter()
    for label in dict.fromkeys(policies):
        name = label.split(":")[0]
        found[label] = look = known[name]
        if times[name]:
            marker, dashes = VARIANTS[(times[name] - 1) % len(VARIANTS)]
            found[label] = replace(look, marker=marker, dashes=dashes, width=0.9 * look.width)
        times[name] += 1
    return found


def make_canvas(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4), **options: Any) -> tuple[Any, Any]:
    """Make an empty figure, which notebooks show without pyplot.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        size: Width and height in inches.
        options: Of matplotlib's Figure.subplots.

    Returns:
        The figure and its axes [rows, columns].

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "butler-jax[plots]"') from error

    class Picture(Figure):
        """A figure that notebooks show without pyplot."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110, facecolor="white")
            return buffer.getvalue()

    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=size)
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def draw_matrix(
    axes: Any, values: Any, limits: tuple[float, float], colours: str = "viridis", *, aspect: str = "auto", **options
) -> Any:
    """Draw a matrix as a heat map whose colours span the limits; options: of imshow."""
    import numpy as np

    low, high = limits
    options = dict(cmap=colours, vmin=low, vmax=high, aspect=aspect, interpolation="none") | options
    rows, columns = values.shape
    if columns > 400:
        # With more columns than pixels some would be left out. Rows are repeated, so that only columns mix.
        extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
        values = np.repeat(values, max(columns // rows, 1), axis=0)
        options |= dict(interpolation="antialiased", extent=extent)
    return axes.imshow(values, **options)


def hide_spines(axes: Any) -> None:
    """Draw no frame."""
    for side in axes.spines.values():
        side.set_visible(False)


def render_figure(draw: Draw, name: str, label: str) -> tuple[bytes, str]:
    """Draw a figure as PNG on white (160 dots per inch) and as an <svg> element for a page.

    Args:
        draw: Returns the figure.
        name: What the ids of the element begin with.
        label: The alternative text.

    Returns:
        The PNG file, and the element, whose text has the font and colour of the page.
    """
    import matplotlib

    picture, drawing = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = draw()
        figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")  # the layout stays as it is
        figure.savefig(picture, format="png", dpi=160, facecolor="white")
    return picture.getvalue(), _make_element(drawing.getvalue(), name, label)


def _make_element(text: str, name: str, label: str) -> str:
    """Matplotlib's SVG file as an element of a page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"\bfont: ((?:\d+ )?)([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", text)  # before 3.11
    text = re.sub(r"font-family: [^;\"]*;|font-weight: ;", "", text)
    text = re.sub(INK, "currentColor", text, flags=re.IGNORECASE)
    return text.replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(label)}" style="stroke-linejoin: round" ', 1
    )


def finish_panels(panels: Sequence[Any], count: int, across: int, label: str) -> None:
    """Hide the panels after the first `count`, and name the axis below the last one of each column."""
    for panel in panels[count:]:
        panel.set_axis_off()
    for panel in panels[max(0, count - across) : count]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(label, fontsize=8.5)
