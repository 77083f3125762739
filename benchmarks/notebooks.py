"""How long each notebook takes from top to bottom at its own settings, with an empty compilation cache.

Seconds of computing are those of all cores together.

python -m benchmarks.notebooks --json benchmarks/notebooks.json
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile

from benchmarks.about import about
from benchmarks.starts import measure

RUNNER, NOTEBOOKS = pathlib.Path("tests/notebook_runner.py").resolve(), pathlib.Path("notebooks").resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of notebooks, such as 07_tour")
    parser.add_argument("--settings", default="{}", help='instead of those of a notebook, such as \'{"BASE": "DIR"}\'')
    parser.add_argument("--out", type=pathlib.Path, help="what the notebooks write and show stays here")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here, beside those of other notebooks")
    arguments = parser.parse_args()
    kept = arguments.json and arguments.json.exists()
    rows = json.loads(arguments.json.read_text())["notebooks"] if kept else {}
    device = {"device": "cpu", "cores": os.cpu_count()}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if arguments.only and path.stem not in arguments.only:
            continue
        command = [sys.executable, str(RUNNER), str(path), arguments.settings]
        with tempfile.TemporaryDirectory() as new:
            place = pathlib.Path(new) if arguments.out is None else (arguments.out / path.stem).resolve()
            place.mkdir(parents=True, exist_ok=True)
            rows[path.stem] = found = measure(command, pathlib.Path(new) / "cache", place)
        print(f"{path.stem:<28} {found['seconds']:6.1f} s, of computing {found['computing']:6.1f} s", flush=True)
        if arguments.json:
            written = {"notebooks": dict(sorted(rows.items())), **device, **about("notebooks")}
            arguments.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
