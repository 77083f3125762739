"""Run a notebook's code cells in one process: python notebook_runner.py NOTEBOOK '{"STEPS": 4}'.

The settings replace those of the cell tagged `parameters`. What ends a cell is shown as a notebook would show it: a
picture is written as number.png, HTML as number.html, anything else is printed.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any


def code_cells(path: Path) -> tuple[list[str], int]:
    """Source of the code cells, and the number of the one tagged `parameters`."""
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    tagged = [i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", ())]
    return ["".join(c["source"]) for c in cells], tagged[0]


def show(value: Any, number: int) -> None:
    """What a cell shows of its last expression."""
    if hasattr(value, "_repr_png_"):
        Path(f"{number}.png").write_bytes(value._repr_png_())
    elif hasattr(value, "_repr_html_"):
        Path(f"{number}.html").write_text(value._repr_html_(), encoding="utf-8")
    elif value is not None:
        print(value)


def main(path: Path, settings: dict[str, Any]) -> None:
    """Run all cells in order."""
    sources, parameters = code_cells(path)
    module = sys.modules["__main__"].__dict__  # dataclasses of a cell look their module up
    for number, source in enumerate(sources):
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}, code cell {number}", "exec"), module)
        if last is not None:
            show(eval(compile(ast.Expression(last.value), f"{path.name}, code cell {number}", "eval"), module), number)
        if number == parameters:
            module.update({name: value for name, value in settings.items() if name in module})


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
