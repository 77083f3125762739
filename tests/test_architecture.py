"""Who may import whom: every file stays on its side of the walk from text to judgement."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "butler_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file imports from its own stage and earlier ones only; the first match counts.
STAGES = {
    "configs.py": 0, "top_k.py": 0, "files.py": 0, "typed.py": 0, "json_objects.py": 0, "digests.py": 0,
    "provenance.py": 0,
    "layers.py": 1, "attention.py": 1, "cache.py": 1, "selection.py": 1, "distillation.py": 1, "families.py": 1,
    "chosen.py": 1, "score_keys.py": 1, "cached_attention.py": 1, "offload.py": 1, "sequence.py": 1,
    "hosts.py": 1, "sharding.py": 1, "tokenizer.py": 1, "datasets/": 1, "data.py": 1, "run_directory.py": 1,
    "sampling.py": 1, "base_model.py": 2, "weights/": 2, "predictors/": 2, "policies/": 2,
    "checkpoints.py": 3, "scoring.py": 3, "decode.py": 3, "filling.py": 3,
    "eviction.py": 3, "evicting_decode.py": 3,
    "prompts.py": 3, "generation.py": 4, "training.py": 4, "fitting.py": 4, "evaluation/": 4,
    "base_training.py": 5, "predictor_training.py": 5, "command_line.py": 5, "generate.py": 5, "bench.py": 5,
    "lm_eval.py": 5, "info.py": 5,
    "__init__.py": 6,
}  # fmt: skip
PARTS_OF_A_STAGE = {"policies/": {"base_model.py", "predictors/"}, "predictors/": {"base_model.py"},
                    "weights/": {"base_model.py"}, "base_model.py": set()}  # fmt: skip


def part(path: Path) -> str:
    """The entry of STAGES that a file of the package belongs to."""
    name = path.relative_to(PACKAGE).as_posix()
    return f"{name.split('/')[0]}/" if "/" in name else name


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a file imports to run; what only type checkers see is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def own_parts(path: Path) -> list[tuple[int, str]]:
    """(line, part) of what a file imports from this package."""
    found = []
    for line, name in imports(path):
        words = name.split(".")
        if words[0] != "butler_jax":
            continue
        target = PACKAGE / words[1] if len(words) > 1 else PACKAGE
        if target.is_dir() and target != PACKAGE:
            found.append((line, f"{words[1]}/"))
        else:
            found.append((line, f"{words[1]}.py" if target.with_suffix(".py").is_file() else "__init__.py"))
    return found


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(REPOSITORY)}:{line}"


def test_every_file_has_a_stage():
    assert not {part(path) for path in FILES} - set(STAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_backwards(path):
    mine = part(path)
    for line, theirs in own_parts(path):
        assert STAGES[theirs] <= STAGES[mine], f"{where(path, line)}: {mine} imports {theirs}, a later stage"
        if theirs != mine and STAGES[theirs] == STAGES[mine] and mine in PARTS_OF_A_STAGE:
            assert theirs in PARTS_OF_A_STAGE[mine], f"{where(path, line)}: {mine} imports {theirs}"


def importers(*names: str) -> set[str]:
    """The package's files that import a module of one of these names."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        for _, imported in imports(path)
        if any(imported == name or imported.startswith(f"{name}.") for name in names)
    }


def test_one_file_imports_orbax():
    assert importers("orbax") == {"checkpoints.py"}


def test_only_decoding_imports_kernels():
    assert importers("pallas_kernels") <= {"decode.py", "score_keys.py"}


def test_kernels_import_jax_alone():
    allowed = {"jax", "numpy", "jaxtyping", "pallas_kernels", "__future__", "functools", "math", "typing",
               "dataclasses", "collections", "types"}  # fmt: skip
    for path in sorted((REPOSITORY / "pallas_kernels").rglob("*.py")):
        if path.name in ("bench.py", "measuring.py"):  # they time peers too, and nothing imports them
            continue
        for line, name in imports(path):
            assert name.split(".")[0] in allowed, f"{where(path, line)}: {name}"


def test_nobody_imports_the_scripts():
    assert not importers("train", "eval")


def test_tests_and_their_oracles_stay_outside():
    assert not importers("tests", "pytest", "tensorflow")
    assert importers("torch", "transformers") <= {"bench.py"}  # a peer to be timed, where it is installed


def test_one_file_names_mesh_axes():
    for path in FILES:
        if path.name == "sharding.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rsplit(".", 1)[-1]
            inside = [n.value for a in [*node.args, *(k.value for k in node.keywords)] for n in ast.walk(a)
                      if isinstance(n, ast.Constant)]  # fmt: skip
            named = name in {"PartitionSpec", "P", "make_mesh", "psum", "pmean", "all_gather", "axis_index"}
            assert not (named and {"data", "model"} & {v for v in inside if isinstance(v, str)}), where(
                path, node.lineno
            )


def test_modules_are_plain_trees_under_plain_transformations():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx":
                assert node.attr not in {"jit", "grad", "value_and_grad", "scan", "vmap"}, where(path, node.lineno)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_everything_public_is_explained(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} does not say what it is for"
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        assert not public or ast.get_docstring(node), f"{where(path, node.lineno)}: {node.name} has no docstring"
        if isinstance(node, ast.ClassDef) and public:
            protocol = any("Protocol" in ast.unparse(b) for b in node.bases)
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and not protocol:
                    assert ast.get_docstring(method), f"{where(path, method.lineno)}: {node.name}.{method.name}"
