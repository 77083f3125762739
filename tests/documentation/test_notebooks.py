"""The notebooks run from top to bottom, on small settings, and define nothing of their own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.documentation.pages import REPOSITORY, cases
from tests.notebook_runner import code_cells

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
SMALL = {"STEPS": 4, "LENGTH": 128, "TOKENS": 512, "SAMPLES": 2, "DECODE_STEPS": 8, "BUDGETS": [0.5, 0.25]}
SHOWN = {  # what a notebook prints, how many pictures and coloured texts it shows
    "01_quickstart": ("perplexity", 1, 2),
    "02_what_the_predictor_sees": ("{1: (", 7, 2),
    "03_bring_your_own_model": ("perplexity", 1, 2),
    "04_write_your_own_policy": ("sketch", 2, 2),
    "05_training_on_a_tpu_pod": ("v5e:", 2, 0),
    "06_a_model_of_your_own": ("perplexity", 2, 1),
    "07_tour": ("A lookahead predictor for tiny", 3, 2),
    "08_the_error_in_the_residual_stream": ("error left:", 2, 0),
}
CLASSES = {  # policies, modules and adapters are classes
    "04_write_your_own_policy": {"Norm", "Sketch"},
    "06_a_model_of_your_own": {"Block", "Decoder", "Adapter"},
}


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_in_colab_and_installs_what_is_missing(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert "https://colab.research.google.com/" in "".join(cells[0]["source"])
    assert '("butler_jax", "matplotlib")' in code_cells(path)[0][0]
    assert any("use_compilation_cache" in source for source in code_cells(path)[0])


@pytest.fixture(scope="module")
def heads():
    """docs/heads.py, which writes the link and the first cell of every notebook."""
    spec = importlib.util.spec_from_file_location("heads", REPOSITORY / "docs" / "heads.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_and_installation_follow_the_address_in_pyproject(heads):
    at = heads.address(tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")))
    for path, text in heads.pages(at).items():
        assert text == path.read_text(encoding="utf-8"), f"{path.name}: run python docs/heads.py"


def test_an_address_that_is_stated_reaches_every_link(heads):
    at = heads.address({"project": {"urls": {"Repository": "https://github.com/some/one.git/"}}})
    assert at == "https://github.com/some/one" and heads.address({"project": {}}) is None
    for path in NOTEBOOKS:
        before = path.read_text(encoding="utf-8")
        stated = heads.with_head(before, path.name, at)
        assert f"https://colab.research.google.com/github/some/one/blob/main/notebooks/{path.name})" in stated
        assert "butler-jax[notebooks,gguf,hub] @ git+https://github.com/some/one" in stated
        elsewhere = heads.with_head(stated, path.name, "https://code.example/one")  # Colab opens files of GitHub alone
        assert "#upload=true" in elsewhere and "git+https://code.example/one" in elsewhere
        assert heads.with_head(elsewhere, path.name, None) == heads.with_head(before, path.name, None)
    text = "version: 1\nlicense: A\n"
    assert heads.citation(text, at) == f'version: 1\nrepository-code: "{at}"\nlicense: A\n'
    assert heads.citation(heads.citation(text, at), None) == text


def test_the_first_cell_installs_a_wheel_or_says_what_to_do(heads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command: asked.append(command[-1]) or SimpleNamespace(returncode=1))
    with pytest.raises(ModuleNotFoundError, match=r"Upload its wheel.*or install it from a checkout: pip install -e"):
        exec(heads.install(None), {})
    Path("butler_jax-0.1.0-py3-none-any.whl").touch()
    monkeypatch.setattr(subprocess, "run", lambda command: asked.append(command[-1]) or SimpleNamespace(returncode=0))
    exec(heads.install(None), {})
    assert asked == ["butler-jax[notebooks,gguf,hub]", "butler_jax-0.1.0-py3-none-any.whl[notebooks,gguf,hub]"]


def test_every_picture_is_explained_before_it_is_shown():
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for before, cell in pairwise(cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.search(r"^(pictures\.draw_|figure$)", source, re.MULTILINE):
                assert before["cell_type"] == "markdown" and "ook " in "".join(before["source"]), source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_picture_is_near_the_top(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shows = [bool(re.search(r"^(pictures\.draw_|colour_tokens\(|figure$)", "".join(c["source"]), re.M)) for c in cells]
    assert shows.index(True) < (14 if path.stem in CLASSES and "Decoder" in CLASSES[path.stem] else 9)


OFTEN = {"01_quickstart"}


@pytest.mark.slow
@pytest.mark.parametrize("path", cases(NOTEBOOKS, lambda p: p.stem, OFTEN))
def test_notebook_runs_from_top_to_bottom(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, REPOSITORY / "tests" / "notebook_runner.py", path, json.dumps(SMALL)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    printed, figures, texts = SHOWN[path.stem]
    assert printed in done.stdout
    assert (len(list(tmp_path.glob("*.png"))), len(list(tmp_path.glob("*.html")))) == (figures, texts)
