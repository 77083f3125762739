"""English text that every machine with Python has: the language reference and docstrings of installed libraries.

Module files and `pydoc_data` are parsed with `ast`. Nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import tensorflow_datasets as tfds

from butler_jax.data.sources.passages import Passage, PassageBuilder, cut, open_prepared

LIBRARIES = ("numpy", "jax")
LEAST_CHARACTERS = 200
"""Shorter docstrings are left out."""

TEST_SHARE = 50
"""One document in TEST_SHARE belongs to the split "test"."""

_SKIPPED = """
    test tests testing idlelib lib2to3 turtledemo ensurepip site-packages dist-packages pydoc_data
    _vendor vendored extern encodings
"""


class PythonDocs(PassageBuilder):
    """The Python language reference and the docstrings of the standard library, numpy and jax.

    A document is one topic of the reference or one module: its docstring, then those of its classes and functions in
    source order, each under its name. Long documents are cut into passages of about 16,000 characters.
    """

    def read_passages(self, note: Callable[[int, int], None]) -> Iterator[Passage]:
        """As `PassageBuilder` says."""
        for name, text in read_documents():
            yield from ((split_of(name), name, piece) for piece in cut(text))


def open_builder(data_dir: str | None = None) -> PythonDocs:
    """Open the set of the installed versions. It is prepared on first use, in a few seconds."""
    versions = [f"{library}-{importlib.metadata.version(library)}" for library in LIBRARIES]
    name = "-".join([f"python-{platform.python_version()}", *versions])
    config = tfds.core.BuilderConfig(name=name, version="1.0.0", description="Docstrings of " + name)
    return open_prepared(PythonDocs, config, data_dir)


def split_of(name: str) -> str:
    """The split of a document by a hash of its name, the same on every machine: one in fifty is "test"."""
    digest = hashlib.sha256(name.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % TEST_SHARE == 0 else "train"


def read_documents() -> Iterator[tuple[str, str]]:
    """Read all documents (name, text) in a fixed order. A docstring that occurs again is left out."""
    standard = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    skipped = set(_SKIPPED.split())
    yield from _topics(standard / "pydoc_data" / "topics.py")
    roots = [(standard, "")]
    for library in LIBRARIES:
        spec = find_spec(library)
        if spec is not None and spec.submodule_search_locations:
            roots.append((Path(next(iter(spec.submodule_search_locations))), library))
    for root, prefix in roots:
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
            parts = path.relative_to(root).with_suffix("").parts
            if skipped.intersection(parts) or any(part.startswith("test_") for part in parts):
                continue
            if parts[-1] == "__init__":
                parts = parts[:-1]
            name = ".".join((prefix, *parts) if prefix else parts)
            text = _module_text(path, name, seen)
            if text:
                yield name, text


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    """The topics of the language reference, which are a dictionary literal in the module `pydoc_data.topics`."""
    tree = _parse(path)
    if tree is None:
        return
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                if len(text) >= LEAST_CHARACTERS:
                    yield f"topic {topic}", text.strip() + "\n"


def _module_text(path: Path, name: str, seen: set[str]) -> str:
    tree = _parse(path)
    if tree is None:
        return ""
    parts = []
    for title, text in _docstrings(tree, name):
        text = inspect.cleandoc(text).strip()
        if len(text) >= LEAST_CHARACTERS and text not in seen:
            seen.add(text)
            parts.append(f"{title}\n\n{text}\n")
    return "\n\n".join(parts)


def _docstrings(tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    """The docstrings (title, text) of a module in source order. A function's title has its arguments."""
    if (text := ast.get_docstring(tree, clean=False)) is not None:
        yield name, text

    def walk(body: list[ast.stmt], prefix: str):
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                title = f"{prefix}.{node.name}"
                if (text := ast.get_docstring(node, clean=False)) is not None:
                    arguments = "" if isinstance(node, ast.ClassDef) else f"({_arguments(node)})"
                    yield title + arguments, text
                yield from walk(node.body, title)
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from walk(node.body, prefix)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                yield from _added(node.value)

    yield from walk(tree.body, name)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return ", ".join(names)


def _added(call: ast.Call) -> Iterator[tuple[str, str]]:
    """The docstring that numpy adds to a compiled function by `add_newdoc(module, name, text or (member, text))`."""
    if not (isinstance(call.func, ast.Name) and call.func.id == "add_newdoc") or len(call.args) < 3:
        return
    try:
        module, name, text = (ast.literal_eval(argument) for argument in call.args[:3])
    except ValueError:
        return
    if isinstance(text, tuple):
        name, text = f"{name}.{text[0]}", text[1]
    yield f"{module}.{name}", text


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file; None where this version of Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError):
        return None
