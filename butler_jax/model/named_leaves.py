"""The arrays of a module by name, as files store them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


def name_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their names, such as "heads.query"."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def place_leaves(like: Any, named: dict[str, Any]) -> Any:
    """A tree as `like` with the named leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: named[_name(path)], like)


def _name(path: tuple) -> str:
    parts = (str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
    return ".".join(part for part in parts if part != "value")


def compare_leaves(saved: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raise ValueError where names or shapes in a file differ from what is wanted."""
    for name in sorted(set(saved) | set(wanted)):
        shapes = [tuple(tree[name].shape) if name in tree else None for tree in (saved, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{where} does not fit: {name} is {shapes[0] or 'missing'} there and {shapes[1] or 'unknown'} here"
            )
