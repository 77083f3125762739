"""A process of a run that is frozen ends the other ones."""

from __future__ import annotations

import re
import signal
import time

import pytest

from butler_jax.parallel.heartbeats import Silence
from tests.host_processes import Place, Signal
from tests.marked import long


def test_only_others_that_stay_silent_while_this_one_looks_are_suspected(monkeypatch):
    """Process 1 counts, 2 is frozen, 3 has left; this one was itself frozen for a minute."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    silence = Silence()
    for count, now in enumerate([0.5, 1.0, 1.5, 61.5, 62.0]):  # noqa: B007
        silence.look({1: count, 2: 7, 3: "left"})
    assert silence.seconds == {1: 0.0, 2: 0.5 + 0.5 + 1.0 + 0.5, 3: 0.0}
    silence.look({1: 4, 2: 8, 3: "left"})
    assert silence.seconds[2] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, long(1)])
def test_a_process_that_freezes_ends_the_other_in_a_line(tmp_path, index):
    place = Place(tmp_path)
    stopped = Signal(signal.SIGSTOP, 2, place.directory)
    command = place.train(f"frozen{index}", "--steps", "100000")
    (ended,) = place.run(2, command, signals={index: stopped}, frozen=index)
    assert ended.status == 1, ended.said[-3000:]
    words = "given no sign of life for" if index else "process 0 has given no answer for"
    assert re.search(rf"{words} 2[0-9] s", ended.said.splitlines()[-1]), ended.said
