"""Ctrl-C and SIGTERM end a command at once, without a traceback and with the right status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.marked import long

REPOSITORY = Path(__file__).parent.parent.parent

COMPUTES = """
import hashlib, signal
from butler_jax.cli.command_line import interrupts_end
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
with interrupts_end("stopped here", {signal.SIGTERM: 0, signal.SIGINT: 130}):
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)  # Python runs no handler meanwhile
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_that_computes(number, status):
    process = subprocess.Popen(
        [sys.executable, "-c", COMPUTES], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (status, "stopped here\n")


ENDS = """
import atexit, signal, time
from butler_jax.cli.command_line import interrupts_end
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
with interrupts_end("stopped here"):
    atexit.register(time.sleep, 1)
    atexit.register(print, "ends", flush=True)
"""


def test_a_signal_does_not_disturb_the_end_of_the_interpreter():
    process = subprocess.Popen([sys.executable, "-c", ENDS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ends\n"
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (0, "")


@pytest.mark.slow  # three starts
@pytest.mark.parametrize(
    ("arguments", "begun", "said"),
    [
        long(["eval.py", "--base", "tiny", "--tasks", "perplexity", "--out", "out"], "s left\n", "stopped; the same"),
        (["-m", "butler_jax", "generate", "--base=tiny", "--prompt=A", "--max-new-tokens=1900"], "A", "stopped"),
        (["train.py", "--run-dir", "out", "--batch-size=32", "--log-every=1"], "step 2/", "stopped; run the same"),
    ],
    ids=["eval", "generate", "train"],
)
def test_an_interrupt_ends_with_status_130(tmp_path, arguments, begun, said):
    """JAX 0.10 crashes where an interrupted interpreter ends by itself, and the status is then that of the crash.

    Training saves first, and a second Ctrl-C ends it at once, with status 130, unless it has saved by then.
    """
    script = [str(REPOSITORY / a) if a.endswith(".py") else a for a in arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"  # an evaluation of tiny computes for minutes without
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, and children
    try:
        process = subprocess.Popen(
            [sys.executable, "-u", *script],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    shown = ""
    while begun not in shown:
        shown += (letter := process.stdout.read(1))
        assert letter, process.stderr.read()
    time.sleep(1)  # into the next pass
    process.send_signal(signal.SIGINT)
    if arguments[0] == "train.py":
        while not (line := process.stdout.readline()).startswith("stopping"):
            assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=120)
    if process.returncode == 0:
        assert "stopped and saved" in rest and not error, error
    else:
        assert process.returncode == 130 and said in error and "Traceback" not in error, error
    if arguments[0] == "eval.py":
        assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) >= 1
