"""The notebooks run from top to bottom, on small settings, and define nothing of their own."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.notebook_runner import code_cells

REPOSITORY = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
SMALL = {"STEPS": 4, "LENGTH": 128, "TOKENS": 512, "SAMPLES": 2, "DECODE_STEPS": 8, "BUDGETS": [0.5, 0.25]}
SHOWN = {  # what a notebook prints, how many pictures and coloured texts it shows
    "01_quickstart": ("perplexity", 1, 0),
    "02_what_the_predictor_sees": ("{1: (", 7, 2),
    "03_bring_your_own_model": ("perplexity", 1, 1),
    "04_write_your_own_policy": ("sketch", 2, 2),
    "05_training_on_a_tpu_pod": ("v5e:", 1, 0),
}
CLASSES = {"04_write_your_own_policy": {"Norm", "Sketch"}}  # a policy is a class


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_defines_nothing_and_keeps_no_output(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    for source in code_cells(path)[0]:
        tree = ast.parse(source)
        own = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in CLASSES.get(path.stem, ())]
        inside = {id(node) for one in own for node in ast.walk(one)}
        kinds = {type(node) for node in ast.walk(tree) if id(node) not in inside}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_imports_no_private_name(path):
    for source in code_cells(path)[0]:
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            assert not [name for name in names if any(part.startswith("_") for part in name.split("."))]


def test_every_picture_is_explained_before_it_is_shown():
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for before, cell in pairwise(cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.search(r"^(pictures\.\w+_figure|figure$)", source, re.MULTILINE):
                assert before["cell_type"] == "markdown" and "ook " in "".join(before["source"]), source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_from_top_to_bottom(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, REPOSITORY / "tests" / "notebook_runner.py", path, json.dumps(SMALL)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    printed, figures, texts = SHOWN[path.stem]
    assert printed in done.stdout
    assert (len(list(tmp_path.glob("*.png"))), len(list(tmp_path.glob("*.html")))) == (figures, texts)
