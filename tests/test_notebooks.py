"""The notebooks run from top to bottom, on small settings, and define nothing of their own."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
SMALL = {"STEPS": 4, "LENGTH": 64, "TOKENS": 256}


def code_cells(path):
    """Source of the code cells, and the number of the one tagged `parameters`."""
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    tagged = [i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", ())]
    return ["".join(c["source"]) for c in cells], tagged[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_defines_nothing_and_keeps_no_output(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    for source in code_cells(path)[0]:
        kinds = {type(node) for node in ast.walk(ast.parse(source))}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources, parameters = code_cells(path)
    names: dict[str, object] = {}
    for number, source in enumerate(sources):
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
        if number == parameters:
            names.update({name: value for name, value in SMALL.items() if name in names})
    assert "perplexity" in capsys.readouterr().out
    assert (tmp_path / "runs").is_dir()
