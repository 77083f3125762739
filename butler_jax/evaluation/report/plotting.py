"""Matplotlib without global state: how policies look, and figures as PNG or as SVG that takes the page's colour."""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 4.5  # inches: narrow, so that text is still read on a phone
INK = "#1b1b1d"  # of text and axes; in a page it becomes the colour of the page's text
NO_PICTURES = 'No pictures: they need matplotlib (pip install "butler-jax[plots]").'
REFERENCE, FURTHER = "#808080", ("#8C6D1F", "#8A6FDF", "#5F8F8F")


@dataclass(frozen=True)
class Look:
    """Colour, marker, dashes and width of a policy, the same in every figure."""

    color: str
    marker: str
    dashes: Any = "-"
    width: float = 1.3
    above: int = 2  # drawn over what has less


# Okabe and Ito's colours; what is no contender (oracles above, random below) is grey.
LOOKS = {
    "dense": Look(INK, "", (0, (5, 2)), 1.2, 1),
    "oracle": Look(REFERENCE, "^", above=3),
    "oracle_head": Look(REFERENCE, "v", (0, (3, 1.5)), above=2),
    "random": Look(REFERENCE, "x", (0, (1, 1.5)), above=1),
    "streaming": Look("#56B4E9", "s"),
    "h2o": Look("#CC79A7", "D"),
    "snapkv": Look("#E69F00", "p"),
    "quest": Look("#009E73", "h"),
    "lowrank": Look("#0072B2", "P"),
    "tokenbutler": Look("#D55E00", "o", width=2.8, above=5),
}
BUTLERS = (
    Look("#D55E00", "o", width=2.8, above=5),
    Look("#D55E00", "*", (0, (4, 1.2)), 2.4, 5),
    Look("#D55E00", "d", (0, (1.2, 1.2)), 2.4, 5),
    Look("#F28E5C", "o", (0, (4, 1, 1, 1)), 2.4, 5),
)


def plots_available() -> bool:
    """Whether matplotlib is installed (`pip install "butler-jax[plots]"`)."""
    return importlib.util.find_spec("matplotlib") is not None


def looks(policies: Sequence[str]) -> dict[str, Look]:
    """A look a label. Several predictors share tokenbutler's colour; unknown policies get further colours in turn."""
    butlers = [p for p in policies if p.split(":")[0] == "tokenbutler"]
    others = [p for p in policies if p not in LOOKS and p not in butlers]
    found = {p: LOOKS[p] for p in policies if p in LOOKS}
    found |= {p: BUTLERS[i % len(BUTLERS)] for i, p in enumerate(butlers)}
    return found | {p: Look(FURTHER[i % len(FURTHER)], "8", (0, (6, 1))) for i, p in enumerate(others)}


SETTINGS = {
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
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "butler-jax",
    "figure.constrained_layout.use": True,
}


Draw = Callable[[], Any]  # gives a matplotlib figure


def render(draw: Draw, name: str, label: str) -> tuple[bytes, str]:
    """A figure as PNG on white (160 dots an inch) and as an <svg> element for a page.

    The element's text has the page's font and colour; its ids begin with `name`. label: the alternative text.
    """
    import matplotlib

    picture, drawing = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure = draw()
        figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")  # the layout stays as it is
        figure.savefig(picture, format="png", dpi=160, facecolor="white")
    return picture.getvalue(), _element(drawing.getvalue(), name, label)


def _element(text: str, name: str, label: str) -> str:
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
    """Hide the panels after the first `count`; the last one of a column names the axis."""
    for panel in panels[count:]:
        panel.set_axis_off()
    for panel in panels[max(0, count - across) : count]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(label, fontsize=8.5)
