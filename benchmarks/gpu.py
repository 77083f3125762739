"""Everything that a machine with a GPU can show in 25 minutes, each part in a process of its own with its time limit.

    python -m benchmarks.gpu --out benchmarks/h100 --base ~/models/SmolLM2-135M-Instruct ~/models/Qwen2.5-0.5B
    python -m benchmarks.gpu --out DIR --dry     # prints the commands and their limits
    python -m benchmarks.gpu --out DIR --tiny    # the same parts, seconds of each, on CPU

The parts, in this order:

- device: the chip, its driver, and the versions of what is installed
- kernels: the tests of the GPU kernels, which run uninterpreted there
- attention: cuDNN's attention beside the form in XLA, output and log-sum-exp
- flashinfer: one call of FlashInfer, which compiles its kernels then; why not, where it is not installed
- bench: sparse decode attention beside jax.nn.dot_product_attention (cuDNN), torch's SDPA, and FlashInfer if installed
- tune: the tiles that are fastest; they are written beside the others, and the table of the package stays as it is
- decode: tokens a second of every base, dense and sparse (`butler-jax bench`)
- train: a predictor for every base

OUT/PART.json says what came out of a part as soon as it ends, and PART.log has all that it printed. So a machine that
is taken away loses the running part alone. OUT/summary.json is written after every part: the kernels' measured times
and those of the model side by side. A part whose PART.json says "ok" is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.about import about
from pallas_kernels.bench.cases import SHAPES, Case
from pallas_kernels.bench.chips import CHIPS
from pallas_kernels.bench.prediction import predict_rows

REPOSITORY = Path(__file__).parent.parent
TOTAL = 25.0  # minutes
GRACE = 30.0  # seconds from SIGTERM to SIGKILL: a training saves its state within 25
KERNEL_TESTS = "test_attention test_edge_cases test_gpu_kernels test_interpreted test_scores test_selection test_tune"
DEVICE = """
import json, shutil, subprocess, sys, jax
from importlib.metadata import distributions
smi = shutil.which("nvidia-smi")
said = subprocess.run([smi], capture_output=True, text=True).stdout if smi else ""
names = ("jax", "jaxlib", "torch", "flashinfer-python", "nvidia-cudnn-cu13", "jax-cuda13-plugin")
found = {d.name: d.version for d in distributions() if d.name in names}
device = jax.devices()[0]
report = dict(kind=device.device_kind, platform=device.platform, versions=found, nvidia_smi=said)
open(sys.argv[1], "w").write(json.dumps(report))
assert device.platform == sys.argv[2], f"jax sees no {sys.argv[2]}: {device}"
"""
FLASHINFER = """
import json, sys, jax.numpy as jnp
from pallas_kernels.bench.cases import SHAPES, Case
from pallas_kernels.bench.peers import flashinfer_seconds
case = Case(shape=SHAPES["llama8b"], context=4096, batch=1, tokens=256, dtype=jnp.dtype(jnp.bfloat16))
open(sys.argv[1], "w").write(json.dumps({"seconds_or_reason": flashinfer_seconds(case, 1, 3)}))
"""


@dataclass(frozen=True, kw_only=True)
class GpuPart:
    """A part: its name, the most minutes it may take, its command, and how the result is read from what it wrote."""

    name: str
    minutes: float
    command: list[str]
    result: Callable[[], Any]


def read_json(path: Path) -> Any:
    """What a JSON file says; None without one."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads(path.read_text())
    return None


def read_tests(path: Path) -> dict[str, Any] | None:
    """How many tests passed, were skipped and failed, and the names of the last, from pytest's XML."""
    try:
        cases = xml.etree.ElementTree.parse(path).getroot().iter("testcase")
    except (FileNotFoundError, xml.etree.ElementTree.ParseError):
        return None
    found: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
    for case in cases:
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[kind].append(f"{case.get('classname')}::{case.get('name')}")
    return {"passed": len(found["passed"]), "skipped": len(found["skipped"]), "failed": found["failed"]}


def read_training(run_dir: Path) -> dict[str, Any] | None:
    """How many rows of metrics a training wrote, the first one and the last."""
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # the last line may be cut off
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            rows.append(json.loads(line))
    return {"rows": len(rows), "first": rows[0], "last": rows[-1]} if rows else None


def make_parts(out: Path, bases: list[str], tiny: bool) -> list[GpuPart]:
    """The parts of a run that writes to `out`."""
    python, tests = [sys.executable, "-m"], REPOSITORY / "tests"
    parts: list[GpuPart] = []

    def add(name, minutes, command, result, file):
        path = out / file
        parts.append(GpuPart(name=name, minutes=minutes, command=[*map(str, command)], result=lambda: result(path)))

    platform, device = "cpu" if tiny else "gpu", out / "device_found.json"
    add("device", 1, [sys.executable, "-c", DEVICE, device, platform], read_json, device.name)
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "--rootdir", REPOSITORY]
    files = [tests / "pallas_kernels" / f"{name}.py" for name in KERNEL_TESTS.split()]
    few = [*files[1:2], "-k", "gpu and length_0"] if tiny else [*files, "-k", "gpu or small_tiles"]
    add("kernels", 5.5, [*pytest, *few, f"--junitxml={out / 'kernels.xml'}"], read_tests, "kernels.xml")
    parity = tests / "model" / "test_attention_cudnn.py"
    add("attention", 2, [*pytest, parity, f"--junitxml={out / 'attention.xml'}"], read_tests, "attention.xml")
    call = out / "flashinfer_call.json"
    add("flashinfer", 1.5, [sys.executable, "-c", FLASHINFER, call], read_json, call.name)
    sizes = [
        "--shape=llama8b",
        "--context=32768,131072,8192,4096",
        "--batch=16,1",
        "--interval=1,8",
        "--together=2,1",
        "--minutes=5",
    ]
    if tiny:
        sizes = ["--shape=smollm2", "--context=256", "--batch=1", "--interval=1,8", "--repeats=1"]
    rows = out / "sparse_decode.json"
    add("bench", 6, [*python, "pallas_kernels.bench", *sizes, "--memory=45", f"--json={rows}"], read_json, rows.name)
    how = ["--model=b200"] if tiny else ["--minutes=3", "--pooling=normalised"]
    tiles = out / "tiles.json"
    add("tune", 3.5, [*python, "pallas_kernels.tune", "--dry", *how, f"--json={tiles}"], read_json, tiles.name)
    share = 1 / max(1, len(bases))
    names = {f"{number}_{Path(base).name}": base for number, base in enumerate(bases)}
    for name, base in names.items():
        file = out / f"decode_{name}_rows.json"
        lengths = ["--contexts=32", "--tokens=2", "--rounds=1"] if tiny else ["--contexts=1024,8192,32768"]
        command = [*python, "butler_jax", "bench", "--no-peer", f"--base={base}", *lengths, f"--json={file}"]
        add(f"decode_{name}", 2 * share, command, read_json, file.name)
    for name, base in names.items():
        run_dir = out / f"run_{name}"
        steps = ["--steps=2", "--length=32"] if tiny else ["--steps=400", "--length=2048", "--rank=32"]
        command = [sys.executable, REPOSITORY / "train.py", f"--base={base}", f"--run-dir={run_dir}", *steps]
        add(f"train_{name}", 3.5 * share, command, read_training, run_dir.name)
    return parts


def run_part(part: GpuPart, out: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part for at most so many seconds, those of its ending included.

    OUT/PART.json says "running", and then what came out of it.
    """
    record = dict(part=part.name, command=" ".join(c if "\n" not in c else "..." for c in part.command))
    record |= dict(status="running", limit_seconds=round(seconds, 1))
    file, log, begun = out / f"{part.name}.json", out / f"{part.name}.log", time.monotonic()
    file.write_text(json.dumps(record, indent=1) + "\n")
    with log.open("w") as written:
        how = dict(stdout=written, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=REPOSITORY)
        process = subprocess.Popen(part.command, **how)
        try:
            code = process.wait(max(seconds - GRACE, seconds / 2))
            status = "ok" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            status = "cut off"
            end_group(process)
        except BaseException:
            end_group(process)
            raise
    tail = log.read_text(errors="replace").splitlines()[-12:]
    record |= dict(status=status, seconds=round(time.monotonic() - begun, 1), result=part.result(), tail=tail)
    file.write_text(json.dumps(record, indent=1) + "\n")
    return record


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started: they have a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def compare_bench(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of `pallas_kernels.bench` with the modelled times beside the measured ones; none for other chips."""
    chips = [chip for chip in CHIPS.values() if chip.name == report["device"]]
    found = []
    for row in report["rows"] if chips else ():
        same = dict(unit=report["unit"], pooling=report["pooling"], int8=report["int8"])
        sizes = {name: row[name] for name in ("context", "batch", "tokens")} | dict(together=row.get("together", 1))
        case = Case(shape=SHAPES[report["shape"]], dtype=jnp.dtype(report["dtype"]), **same, **sizes)
        (own,) = predict_rows(case, chips[0], [row["interval"]])
        both = {name: dict(measured=row[name], modelled=own[name]) for name in ("seconds", "dense_seconds", "speedup")}
        found.append(sizes | dict(interval=row["interval"], dense_form=row["dense_form"], peers=row["peers"]) | both)
    return found


def summarise(out: Path, parts: list[GpuPart]) -> dict[str, Any]:
    """Write OUT/summary.json from the files of the parts, and return it."""
    records = {part.name: read_json(out / f"{part.name}.json") or {"status": "not begun"} for part in parts}
    kept = ("status", "seconds", "result")
    report: dict[str, Any] = {**about("gpu"), "parts": {n: {k: r.get(k) for k in kept} for n, r in records.items()}}
    bench = records["bench"].get("result")
    report["model_and_measurement"] = compare_bench(bench) if bench else []
    (out / "summary.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def print_summary(report: dict[str, Any]) -> None:
    """Print a line for every part, and one for every row of the bench."""
    for name, part in report["parts"].items():
        print(f"{name:28} {part['status']:16} {part.get('seconds') or 0:7.1f} s")
    for row in report["model_and_measurement"]:
        times = [f"{1e6 * row[k][w]:9.1f}" for k in ("seconds", "dense_seconds") for w in ("measured", "modelled")]
        which = f"{row['context']:>8} tokens, batch {row['batch']:>2}, every {row['interval']} steps"
        print(f"{which}: us measured, modelled {times[0]} {times[1]}; dense {times[2]} {times[3]}")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; returns 1 where one of them is not ok."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    command.add_argument("--out", type=Path, required=True, help="directory of the results")
    command.add_argument(
        "--base", nargs="+", default=["tiny"], help="bases to decode with and to train a predictor for"
    )
    command.add_argument("--parts", nargs="+", help="these parts alone, by their names")
    command.add_argument("--minutes", type=float, default=TOTAL, help="of all parts; none begins later")
    command.add_argument("--dry", action="store_true", help="print the commands and their limits")
    command.add_argument("--tiny", action="store_true", help="small sizes, on CPU, to try the script")
    asked = command.parse_args(arguments)
    out, end = asked.out.resolve(), time.monotonic() + 60 * asked.minutes
    bases = [str(Path(base).resolve()) if Path(base).exists() else base for base in asked.base]
    parts = make_parts(out, bases, asked.tiny)
    if unknown := set(asked.parts or ()) - {part.name for part in parts}:
        command.error(f"no part is called {', '.join(sorted(unknown))}; they are {', '.join(p.name for p in parts)}")
    if asked.dry:
        for part in parts:
            told = (repr(c) if "\n" in c else c for c in part.command)
            print(f"{part.name}, at most {part.minutes:.1f} minutes:\n    {' '.join(told)}")
        print(f"{sum(part.minutes for part in parts):.1f} minutes in all, at most")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")  # this process models; the GPU is the parts'
    environment = os.environ | {"JAX_PLATFORMS": "cpu" if asked.tiny else "cuda,cpu", "PYTHONUNBUFFERED": "1"}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "CI": "false"}  # torch needs room beside JAX
    chosen = [part for part in parts if asked.parts is None or part.name in asked.parts]
    for part in chosen:
        left = end - time.monotonic()
        done = (read_json(out / f"{part.name}.json") or {}).get("status") == "ok"
        if left > 0 and not done:
            record = run_part(part, out, min(left, 60 * part.minutes), environment)
            print(f"{part.name}: {record['status']}, {record['seconds']} s", flush=True)
            if part.name == "device" and record["status"] != "ok":
                print(*record["tail"][-1:])
                return 1
        report = summarise(out, parts)
    print_summary(report)
    return int(any(report["parts"][part.name]["status"] != "ok" for part in chosen))


if __name__ == "__main__":
    sys.exit(main())
