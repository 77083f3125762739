"""Signals that are answered while the main thread computes.

Python runs a signal's handler between two instructions of the main thread, so not while that compiles or waits for a
device. A thread therefore reads the signals that Python notes at once.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any


@contextlib.contextmanager
def answered(
    numbers: Collection[int], handle: Callable[[int, Any], None], answer: Callable[[int], None]
) -> Iterator[None]:
    """Inside, each of these signals calls `answer` in a thread at once, and `handle` in the main thread.

    The handlers of before come back at the end. Only the main thread may enter.

    Args:
        numbers: The signals.
        handle: Takes the signal and the frame, as a handler of `signal.signal`; called as soon as the main thread can.
        answer: Takes the signal.
    """
    noted, notes = socket.socketpair()
    notes.setblocking(False)

    def answer_all():
        while note := noted.recv(1):
            if note[0] in numbers:
                answer(note[0])

    thread = threading.Thread(target=answer_all, name="signals", daemon=True)
    thread.start()
    handlers = {number: signal.signal(number, handle) for number in numbers}
    descriptor = signal.set_wakeup_fd(notes.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        notes.close()
        thread.join()
        noted.close()
