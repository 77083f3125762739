"""What a file of figures says of where they come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import pathlib
import sys
from typing import Any

from butler_jax.runs import versions


def about(name: str, *peers: str) -> dict[str, Any]:
    """Command of the benchmark `name`, paths by their last part; date; versions, those of the packages `peers` too."""
    return {
        "command": f"python -m benchmarks.{name} " + " ".join(pathlib.Path(a).name for a in sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "versions": versions() | {peer: importlib.metadata.version(peer) for peer in peers},
    }
