"""How fast texts of several forms are prepared, from the file to the first batch, and how much memory that takes."""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import zstandard
from pyarrow import parquet

from benchmarks.about import about
from benchmarks.watch import memory_mib
from butler_jax.data.sources.python_docs import read_documents
from butler_jax.text import Tokenizer

RECORD = 2_000  # characters of a record, as of a short web page
OPENERS = {".gz": gzip.open, ".zst": zstandard.open, ".xz": partial(lzma.open, preset=1), ".bz2": bz2.open}
FORMS = ("a.txt", "a.txt.gz", "a.txt.zst", "a.txt.xz", "a.txt.bz2", "a.jsonl", "a.jsonl.zst", "a.parquet")


def write_text(path: pathlib.Path, text: str, megabytes: float) -> int:
    """Write a text again and again until it has so many MB, in the form that the suffix says; returns its bytes."""
    size = len(text.encode())
    count = max(1, round(megabytes * 1e6 / size))
    records = [text[at : at + RECORD] for at in range(0, len(text), RECORD)]
    if path.suffix == ".parquet":
        table = pa.table({"text": records})
        with parquet.ParquetWriter(path, table.schema) as writer:
            for _ in range(count):
                writer.write_table(table)
        return count * size
    lines = text if ".txt" in path.name else "".join(json.dumps({"text": record}) + "\n" for record in records)
    with OPENERS.get(path.suffix, open)(path, "wb") as file:
        for _ in range(count):
            file.write(lines.encode())
    return count * size


def prepare(path: pathlib.Path, data_dir: str) -> dict[str, float]:
    """Seconds until the set is prepared and until the first batch, and MiB: before, and the most that were held."""
    import butler_jax
    from butler_jax.data.batches import open_documents, read_batches

    tokenizer = Tokenizer.load(pathlib.Path(butler_jax.__file__).parent / "tiny")
    before, began, worked = memory_mib()[1], time.perf_counter(), time.process_time()
    open_documents(f"text:{path}", data_dir=data_dir)
    prepared, used = time.perf_counter() - began, time.process_time() - worked
    next(read_batches(f"text:{path}", tokenizer, length=1024, batch_size=8, data_dir=data_dir))
    first = time.perf_counter() - began
    return {
        "seconds": prepared,
        "processor_seconds": used,
        "first_batch": first,
        "before": before,
        "peak": memory_mib()[1],
    }


def measure(text: str, sizes: list[float], repeats: int) -> Iterator[dict]:
    """One row a form and size: the fastest of some processes of their own, and the most memory of one of them."""
    for megabytes in sizes:
        for name in FORMS:
            with tempfile.TemporaryDirectory() as place:
                path = pathlib.Path(place, name)
                size = write_text(path, text, megabytes)
                found = []
                for number in range(repeats):
                    command = [sys.executable, "-m", "benchmarks.text_preparation", "--one", path, f"{place}/{number}"]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    found.append(json.loads(done.stdout.splitlines()[-1]))
                best = min(found, key=lambda row: row["seconds"])
                yield {
                    "form": name.removeprefix("a"),
                    "text_mb": size / 1e6,
                    "file_mb": path.stat().st_size / 1e6,
                    "mb_per_second": size / 1e6 / best["seconds"],
                    "mb_per_processor_second": size / 1e6 / best["processor_seconds"],
                    "mb_per_second_to_first_batch": size / 1e6 / best["first_batch"],
                    "mib_before": best["before"],
                    "mib_more": max(row["peak"] - row["before"] for row in found),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    parser.add_argument("--text", type=pathlib.Path, help="a text that is repeated (default: python_docs)")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[50, 200])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(prepare(pathlib.Path(arguments.one[0]), arguments.one[1])))
        return
    text = arguments.text.read_text() if arguments.text else "\n\n".join(text for _, text in read_documents())
    print("| form | text MB | file MB | MB/s | of a processor | to the first batch | MiB more |")
    print("|---" * 7 + "|")
    rows = []
    for row in measure(text, arguments.megabytes, arguments.repeats):
        rows.append(row)
        print(
            f"| {row['form']} | {row['text_mb']:.0f} | {row['file_mb']:.0f} | {row['mb_per_second']:.1f} "
            f"| {row['mb_per_processor_second']:.1f} "
            f"| {row['mb_per_second_to_first_batch']:.1f} | {row['mib_more']:.0f} |",
            flush=True,
        )
    if arguments.json:
        report = about("text_preparation", "tensorflow-datasets", "array_record", "pyarrow", "zstandard")
        report |= {"cores": os.cpu_count(), "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
