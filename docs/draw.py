"""The two pictures of the README: `python docs/draw.py` writes pipeline.svg and quality.svg beside this file.

They are plain SVG with a background of their own, which follows the reader's colour scheme.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
MEASURED = HERE.parent / "benchmarks" / "quality" / "prompted_smollm2.json"
STYLE = """
svg { --ground: #ffffff; --ink: #1c1e21; --soft: #5c6370; --frozen: #e6eefb; --blue: #2a62b5; --trained: #fdeadb;
  --orange: #b3540a; --line: #d5d9e0; }
@media (prefers-color-scheme: dark) { svg { --ground: #15171b; --ink: #eceef1; --soft: #a2a9b5; --frozen: #1d2c45;
  --blue: #86b4f5; --trained: #43290f; --orange: #f5a25d; --line: #3a3f48; } }
text { font: 15px system-ui, sans-serif; fill: var(--ink); } .soft { font-size: 13px; fill: var(--soft); }
.ground { fill: var(--ground); } .frozen { fill: var(--frozen); stroke: var(--blue); }
.trained { fill: var(--trained); stroke: var(--orange); } .plain { fill: var(--ground); stroke: var(--soft); }
.arrow { stroke: var(--ink); fill: none; stroke-width: 1.5; marker-end: url(#tip); } .grid { stroke: var(--line); }
"""
TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z" style="fill: var(--ink)"/></marker>'
)
SHOWN = {  # policy, allocation: label, colour
    ("oracle", "per_head"): ("oracle", "var(--ink)"),
    ("tokenbutler", "per_head"): ("tokenbutler, per head", "#d9884a"),
    ("tokenbutler", "tolerance"): ("tokenbutler, one tolerance", "var(--orange)"),
    ("lowrank", "per_head"): ("lowrank", "var(--blue)"),
    ("quest", "per_head"): ("quest", "#3a9464"),
    ("h2o", "per_head"): ("h2o", "#a05cb5"),
    ("streaming", "per_head"): ("streaming", "#c23b5a"),
}


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole picture."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    ground = f'<rect class="ground" width="{width}" height="{height}" rx="8"/>'
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", TIP, ground, *parts, "</svg>\n"]
    )


def words(x: float, y: float, said: str, kind: str = "", anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(said)}</text>'


def box(kind: str, x: float, y: float, width: float, lines: list[str]) -> list[str]:
    """A box of 60 pixels' height; the lines after the first are small."""
    parts = [f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="60" rx="6"/>']
    middle, first = x + width / 2, y + 35 - 9 * (len(lines) - 1)
    return [*parts, *(words(middle, first + 18 * n, said, "soft" if n else "") for n, said in enumerate(lines))]


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points with a tip at its end."""
    return f'<path class="arrow" d="M{"L".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def pipeline() -> str:
    """One decode step: how the predictor says which cached tokens the attention reads."""
    parts = [
        *box("plain", 20, 30, 80, ["text"]),
        *box("plain", 130, 30, 80, ["tokens"]),
        *box("frozen", 240, 30, 130, ["layer 0", "dense attention"]),
        *box("frozen", 410, 30, 300, ["layers 1 to L-1", "sparse attention: reads the chosen tokens"]),
        *box("plain", 745, 30, 100, ["next token"]),
        *box("trained", 240, 150, 130, ["predictor", "queries q_imp"]),
        *box("trained", 240, 260, 130, ["score cache", "keys k_imp"]),
        *box("plain", 410, 150, 80, ["scores"]),
        *box("plain", 525, 150, 100, ["selection", "budget"]),
        *box("frozen", 650, 150, 130, ["KV cache", "keeps every token"]),
        *(arrow((x, 60), (x + 29, 60)) for x in (100, 210)),
        arrow((370, 60), (409, 60)),
        arrow((710, 60), (744, 60)),
        arrow((305, 90), (305, 149)),
        words(313, 124, "residual stream", "soft", "start"),
        arrow((370, 180), (409, 180)),
        arrow((370, 290), (450, 290), (450, 211)),
        arrow((490, 180), (524, 180)),
        arrow((575, 150), (575, 91)),
        words(567, 124, "chosen tokens", "soft", "end"),
        arrow((680, 150), (680, 91)),
        words(688, 124, "their keys and values", "soft", "start"),
        words(490, 270, "Blue: the frozen language model. Orange: the predictor.", "soft", "start"),
        words(490, 290, "It is trained to predict what the frozen layers need.", "soft", "start"),
    ]
    return svg(865, 340, "One decode step of TokenButler", parts)


def quality() -> str:
    """Perplexity over dense against the budget after a prompt, from benchmarks/quality/prompted_smollm2.json."""
    rows = [
        r
        for r in json.loads(MEASURED.read_text())["rows"]
        if (r["metric"], r["text"], r["sequences"]) == ("over_dense", "wikitext2_test", 4) and r["budget"] < 1
    ]
    budgets = sorted({r["budget"] for r in rows}, reverse=True)
    left, right, top, bottom, least = 90, 540, 50, 360, 0.001
    low, high = math.log10(100 * least), math.log10(1000)

    def place(budget: float, share: float) -> tuple[float, float]:
        x = left + (right - left) * budgets.index(budget) / (len(budgets) - 1)
        return x, bottom - (bottom - top) * (math.log10(100 * max(share, least)) - low) / (high - low)

    parts = [
        words(left, 28, "SmolLM2-135M on WikiText-2, after a prompt: perplexity over dense, per cent", anchor="start")
    ]
    for share, said in ((least, "0.1 or less"), (0.01, "1"), (0.1, "10"), (1, "100"), (10, "1000")):
        y = place(budgets[0], share)[1]
        parts += [
            f'<path class="grid" d="M{left} {y:.1f}H{right}"/>',
            words(left - 10, y + 5, said, "soft", "end"),
        ]
    parts += [words(place(b, 1)[0], bottom + 24, f"1/{round(1 / b)}", "soft") for b in budgets]
    parts.append(words((left + right) / 2, bottom + 48, "budget: share of the cached tokens that are read", "soft"))
    ends = []
    for (policy, allocation), (name, colour) in SHOWN.items():
        own = [r for r in rows if (r["policy"], r["allocation"]) == (policy, allocation)]
        own.sort(key=lambda r: -r["budget"])
        points = [place(r["budget"], r["value"]) for r in own]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        wide = 3 if policy == "tokenbutler" else 1.6
        parts.append(f'<path style="stroke: {colour}; stroke-width: {wide}; fill: none" d="M{line}"/>')
        for r, (x, y) in zip(own, points, strict=True):
            below, above = (place(r["budget"], r["value"] + sign * r["error"])[1] for sign in (-1, 1))
            parts.append(f'<path style="stroke: {colour}" d="M{x:.1f} {below:.1f}V{above:.1f}"/>')
            parts.append(f'<circle style="fill: {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        ends.append((points[-1][1], name, colour))
    floor = 0.0
    for y, name, colour in sorted(ends):  # labels from the top, a line's height apart
        floor = max(y + 5, floor + 17)
        parts.append(f'<text x="{right + 12}" y="{floor:.1f}" style="fill: {colour}">{name}</text>')
    return svg(780, 420, "Perplexity over dense against the budget", parts)


if __name__ == "__main__":
    for drawn in (pipeline, quality):
        (HERE / f"{drawn.__name__}.svg").write_text(drawn(), encoding="utf-8")
