"""Requests to stop: Ctrl-C and SIGTERM, which is the notice that a cloud machine is taken away.

Python runs a signal's handler between two of its instructions, so not while a step computes. A thread therefore reads
the signals that Python notes at once, and answers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 3.0  # seconds that a second request leaves to the main thread


class StopRequests:
    """Whether this process was asked to stop, and how long the step takes that it stops after.

    Attributes:
        asked: Whether there was a request.
        began: When the running step began; of `time.monotonic`.
        usual: Seconds of the step before it; None while there is none.
        ended: Set where no more requests are answered.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.asked = False
        self.began = time.monotonic()
        self.usual: float | None = None
        self.ended = threading.Event()
        self._handled = self._answered = 0

    def handle(self, number: int, frame: Any) -> None:
        """The handler of both signals. A second one ends the command."""
        self._handled += 1
        if max(self._handled, self._answered) > 1:
            raise KeyboardInterrupt
        self.asked = True

    def answer(self, number: int) -> None:
        """Say what a signal leads to. Runs in the thread."""
        self._answered += 1
        if self._answered == 1:
            self.asked = True
            self.say(f"stopping after this step, {self._remaining()}; again to stop now")
        elif not self.ended.wait(PATIENCE):
            os._exit(128 + number)  # the main thread computes; what is saved stays

    def _remaining(self) -> str:
        if self.usual is None:
            return "the first, which is compiled before"
        return f"about {max(0.0, self.usual - (time.monotonic() - self.began)):.0f} s"


@contextlib.contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[StopRequests]:
    """Take Ctrl-C and SIGTERM as requests to stop after the step, and answer them with a line at once."""
    requests = StopRequests(say)
    if threading.current_thread() is not threading.main_thread():  # a notebook's own handling stays
        yield requests
        return
    noted, notes = socket.socketpair()
    notes.setblocking(False)

    def answer_all():
        while note := noted.recv(1):
            if note[0] in SIGNALS:
                requests.answer(note[0])

    thread = threading.Thread(target=answer_all, name="stop requests", daemon=True)
    thread.start()
    handlers = {number: signal.signal(number, requests.handle) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(notes.fileno(), warn_on_full_buffer=False)
    try:
        yield requests
    finally:
        requests.ended.set()
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        notes.close()
        thread.join()
        noted.close()
