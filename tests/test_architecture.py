"""Rules that import-linter cannot check: names, imports through packages, docstrings. Its contracts: pyproject.toml."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ["butler_jax", "pallas_kernels"]
LIBRARY = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
EVERYTHING = sorted(path for place in [*PACKAGES, "benchmarks", "tests"] for path in (REPOSITORY / place).rglob("*.py"))
MODULES = {path.parent.name if path.name == "__init__.py" else path.stem for path in LIBRARY}

# What does not yet keep a rule: these lists become shorter, never longer.
EARLY_JAX = {"butler_jax/cli/decoding_rounds.py"}  # imported by bench where it measures
LONG = {
    "benchmarks/fuzz_targets.py",
    "tests/cli/test_info.py",
    "tests/training/test_faults.py",
}


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(nodes) -> list[tuple[int, str]]:
    """(line, dotted name) of what these nodes import."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def test_packages_are_entered_through_their_init():
    """Elsewhere `from butler_jax.model import BaseConfig`, not `from butler_jax.model.config import BaseConfig`."""
    doors = {".".join(path.relative_to(REPOSITORY).parent.parts) for path in LIBRARY if path.name == "__init__.py"}
    for path in LIBRARY:
        own = ".".join(path.relative_to(REPOSITORY).parts[:2])
        for node in ast.walk(parsed(path)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                foreign = name.startswith("butler_jax.") and not f"{name}.".startswith(f"{own}.")
                assert not foreign or name in doors, f"{name_of(path)}:{node.lineno} imports {name}"


def test_kernels_import_jax_alone():
    allowed = {"jax", "numpy", "jaxtyping", "pallas_kernels", "__future__", "collections", "dataclasses", "functools"}
    allowed |= {"contextlib", "json", "math", "pathlib", "types", "typing"}
    for path in sorted((REPOSITORY / "pallas_kernels").rglob("*.py")):
        # Commands, and the op for tokamax: nothing imports them.
        if path.parent.name == "bench" or path.name in ("tune.py", "tokamax_op.py"):
            continue
        for line, name in imported(ast.walk(parsed(path))):
            assert name.split(".")[0] in allowed, f"{name_of(path)}:{line}: {name}"


def test_settings_and_commands_are_read_without_jax():
    """A mistyped option is answered before jax is imported."""
    for path in LIBRARY:
        if not (path.name == "config.py" or path.parent.name == "cli") or name_of(path) in EARLY_JAX:
            continue
        for line, name in imported(parsed(path).body):
            assert name.split(".")[0] not in {"jax", "flax", "optax"}, f"{name_of(path)}:{line}: {name}"


def test_functions_and_modules_have_different_names():
    for path in LIBRARY:
        for node in parsed(path).body:
            named = isinstance(node, ast.FunctionDef) and node.name in MODULES - {"generate"}  # also a command
            assert not named, f"{name_of(path)}:{node.lineno}: a module is called {node.name} too"


def test_class_names_are_unique():
    nodes = (node for path in EVERYTHING if "tests" not in path.parts for node in ast.walk(parsed(path)))
    found = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert not {name for name, count in found.items() if count > 1}


def test_one_file_names_mesh_axes():
    making = {"PartitionSpec", "P", "make_mesh", "psum", "pmean", "all_gather", "axis_index"}
    for path in LIBRARY:
        if name_of(path) == "butler_jax/parallel/mesh.py":
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in making:
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                words = {n.value for a in given for n in ast.walk(a) if isinstance(n, ast.Constant) and n.value != 0}
                assert not words & {"data", "model"}, f"{name_of(path)}:{node.lineno}"


def test_modules_are_plain_trees_under_plain_transformations():
    for path in LIBRARY:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx":
                given = f"{name_of(path)}:{node.lineno}: nnx.{node.attr}"
                assert node.attr not in {"jit", "grad", "value_and_grad", "scan", "vmap"}, given


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_everything_public_is_explained(path):
    tree = parsed(path)
    assert ast.get_docstring(tree), f"{name_of(path)} does not say what it is for"
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        assert not public or ast.get_docstring(node), f"{name_of(path)}:{node.lineno}: {node.name} has no docstring"
        if isinstance(node, ast.ClassDef) and public and not any("Protocol" in ast.unparse(b) for b in node.bases):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    where = f"{name_of(path)}:{method.lineno}: {node.name}.{method.name}"
                    assert ast.get_docstring(method), f"{where} has no docstring"


def shapes_in(path: Path) -> list[tuple[int, str]]:
    """(line, shape) of the array annotations of a file, and of shapes such as [B, T] in its docstrings."""
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
            shape = node.slice.elts[1]
            if isinstance(shape, ast.Constant) and isinstance(shape.value, str):
                found.append((node.lineno, shape.value))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found += [
                (node.lineno, shape) for shape in re.findall(r"\[[\w*+ ./-]+(?:, [\w*+ ./-]+)+\]", node.value.value)
            ]
    return found


def test_the_glossary_has_every_letter_of_a_shape():
    """Axes are letters of the glossary, or whole words."""
    table = (REPOSITORY / "docs" / "glossary.md").read_text(encoding="utf-8").split("## Terms")[0]
    letters = re.findall(r"\| ([A-Z]) (?=\|)", table)
    assert len(letters) == len(set(letters)) > 15
    used = {}
    for path in EVERYTHING:
        if "tests" not in path.parts:
            for line, shape in shapes_in(path):
                used |= {axis: f"{name_of(path)}:{line}" for axis in re.findall(r"\b[A-Z]\b", shape)}
    assert not {axis: place for axis, place in used.items() if axis not in letters}
    assert set(letters) <= set(used)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_docstrings_have_one_style(path):
    """Sections are indented by four spaces, and functions are described in the imperative or by their result."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text, where = ast.get_docstring(node) or "", f"{name_of(path)}:{node.body[0].lineno if node.body else 1}"
            assert not re.search(r"^(Args|Attributes|Raises|Returns|Yields):\n(?!    \S)", text, re.M), where
            if isinstance(node, ast.FunctionDef):
                assert not re.match(r"(Returns|Raises|Writes|Reads|Makes|Runs|Takes|Gives) ", text), where


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_files_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (600 if name_of(path) in LONG else 400), f"{name_of(path)} has {lines} lines: one idea a file"


def test_the_formatter_formats_everything():
    mark = "fmt: " + "skip"
    notebooks = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    assert not [name_of(path) for path in [*EVERYTHING, *notebooks] if mark in path.read_text(encoding="utf-8")]


def test_every_name_is_defined():
    """ruff takes a shape such as "B T" for names, so that its rule is off: single letters alone are left out here."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "--output-format=json"]
    command += ["--target-version=py311", *PACKAGES, "benchmarks", "tests", "notebooks", "train.py", "eval.py"]
    found = json.loads(subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout)
    undefined = [each for each in found if not re.search("`[A-Za-z]`", each["message"])]
    assert not [(each["filename"], each["location"]["row"], each["message"]) for each in undefined]
