"""Configurations from command lines."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from butler_jax.cli.command_line import read
from butler_jax.evaluation.config import EvalConfig
from butler_jax.training.config import TrainConfig


@pytest.mark.parametrize(
    ("arguments", "target", "offset"),
    [
        ([], "centred", "share"),
        (["--predictor", "producer"], "attention", "none"),
        (["--target", "attention"], "attention", "none"),
        (["--offset", "self_normalised"], "centred", "self_normalised"),
    ],
)
def test_what_a_nested_configuration_chooses_itself_follows_the_given_options(arguments, target, offset):
    predictor = read(TrainConfig, arguments, "butler-jax train").predictor
    assert (predictor.target, predictor.offset) == (target, offset)


def test_lists_of_numbers_are_words_with_commas():
    config = read(EvalConfig, ["--tails", "0,64", "--lengths", "256,512", "--budgets", "1/4,64"], "butler-jax eval")
    assert (config.tails, config.lengths, config.budgets) == ((0, 64), (256, 512), (0.25, 64))


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
