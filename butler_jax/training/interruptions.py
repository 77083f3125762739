"""Requests to stop: Ctrl-C and SIGTERM, which is the notice that a cloud machine is taken away.

A thread answers a signal at once, also while a step computes. Where what the main thread waits for outlasts the grace,
another thread saves the newest finished state and ends the process.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from butler_jax.parallel import answered, leave, told, try_to_tell

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 3.0  # seconds that a second request leaves to the main thread
PAUSE = 0.05  # seconds between two looks at what the main thread waits for
OTHERS = 0.5  # seconds between two looks for requests to other processes
NUMBERS = itertools.count()  # of the trainings of this process; all processes of a run count alike


class Wait(NamedTuple):
    """What the main thread waits for.

    Attributes:
        began: When it began; of `time.monotonic`.
        usual: Seconds that it is expected to take; None where that is unknown.
        leave: Saves the newest finished state meanwhile, and returns whether the process may end; None where there is
            no such state.
    """

    began: float
    usual: float | None
    leave: Callable[[], bool] | None

    def lasts_beyond(self, time: float) -> bool:
        """Whether it is expected to end after that time."""
        return self.usual is not None and self.began + self.usual > time


class StopRequests:
    """Whether this process was asked to stop, what the main thread waits for, and when it must be left.

    Attributes:
        asked: Whether there was a request.
        refused: Whether a second request did not wait for the step.
        grace: Seconds from a request within which the process is to end.
        saving: Seconds that the last save took.
        key: The name under which the processes of a run tell each other of requests.
        others_leave: Whether another process waits for this one to save with it.
        turn: Held by the main thread, but for while it waits.
        ended: Set where no more requests are answered.
    """

    def __init__(self, say: Callable[[str], None], grace: float):
        self.say, self.grace = say, grace
        self.asked = self.refused = self.others_leave = self._begun = False
        self.saving = 0.0
        self.key = f"stop{next(NUMBERS)}"
        self.ended = threading.Event()
        self._first = threading.Lock()
        self.turn = threading.Lock()
        self._wait: Wait | None = None
        self._handled = self._answered = 0

    @property
    def limit(self) -> float:
        """Seconds from a request to the save that does not wait any longer; the rest of the grace is the save's."""
        return self.grace - min(self.grace / 2, 1.0 + 2 * self.saving)

    @contextlib.contextmanager
    def waiting(self, began: float, usual: float | None, leave: Callable[[], bool] | None) -> Iterator[None]:
        """Inside, the main thread waits; arguments are those of `Wait`."""
        self._wait = Wait(began, usual, leave)
        self.turn.release()
        try:
            yield
        finally:
            self.turn.acquire()  # never, where the process is being left

    def handle(self, number: int, frame: Any) -> None:
        """The handler of both signals. A second one ends the command."""
        self._handled += 1
        if max(self._handled, self._answered) > 1:
            self.refused = True
            raise KeyboardInterrupt
        self.asked = True

    def answer(self, number: int) -> None:
        """Say what a signal leads to, and see to it. Runs in the thread that reads the signals."""
        self._answered += 1
        if self._answered == 1:
            # At a prompt, Ctrl-C ends the training and not the interpreter.
            self.begin(leaves=number != signal.SIGINT or not hasattr(sys, "ps1"))
            try_to_tell(f"{self.key}/asked", True)
        elif not self.ended.wait(PATIENCE):
            os._exit(128 + number)  # the main thread computes; what is saved stays

    def begin(self, *, leaves: bool = True) -> None:
        """Begin to stop, where that has not begun. leaves: whether the process may end before the step does."""
        with self._first:
            if self._begun:
                return
            self.asked = self._begun = True
        wait, until = self._wait, time.monotonic() + self.limit
        if leaves and wait is not None and wait.leave is not None and wait.lasts_beyond(until):
            self.say(
                f"stopping now: this step takes {_remaining(wait)} more, and the grace is {self.grace:g} s; the state "
                "before it is saved meanwhile; again to stop unsaved"
            )
        else:
            self.say(f"stopping after this step, {_remaining(wait)}; again to stop now")
        if leaves:
            threading.Thread(target=self._leave_in_time, args=(until,), name="leaving", daemon=True).start()

    def _leave_in_time(self, until: float) -> None:
        """Leave what the main thread waits for, where it lasts beyond `until` or other processes leave it."""
        while not self.ended.wait(PAUSE):
            wait = self._wait
            if wait is None or wait.leave is None:
                continue
            late = self.others_leave or time.monotonic() >= until or wait.lasts_beyond(until)
            if not late or not self.turn.acquire(timeout=PAUSE):
                continue
            if wait is self._wait and self._left(wait.leave):
                with contextlib.suppress(OSError, RuntimeError):  # no reader is left, or the main thread writes
                    sys.stdout.flush()
                os._exit(0)
            self.turn.release()

    def _left(self, leaving: Callable[[], bool]) -> bool:
        try:
            return leaving()
        except BaseException as error:  # the main thread cannot be told
            leave(error)


def _remaining(wait: Wait | None) -> str:
    if wait is None or wait.usual is None:
        return "the first, which is compiled before"
    return f"about {max(0.0, wait.began + wait.usual - time.monotonic()):.0f} s"


@contextlib.contextmanager
def stop_requests(say: Callable[[str], None], grace: float) -> Iterator[StopRequests]:
    """Take Ctrl-C and SIGTERM as requests to stop after the step, and answer them with a line at once.

    Where several processes train, a request to one of them is one to all.
    """
    requests = StopRequests(say, grace)
    with requests.turn:
        if threading.current_thread() is not threading.main_thread():  # a notebook's own handling stays
            yield requests
            return
        with _lost_interrupts_silenced(), answered(SIGNALS, requests.handle, requests.answer), _others_heard(requests):
            try:
                yield requests
            finally:
                requests.ended.set()
        if requests.refused:
            raise KeyboardInterrupt  # again: the handler's may be lost


@contextlib.contextmanager
def _lost_interrupts_silenced() -> Iterator[None]:
    """Inside, Python prints no traceback for a KeyboardInterrupt that it loses, as in a callback of the garbage
    collection."""
    report = sys.unraisablehook

    def report_others(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            report(lost)

    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report


@contextlib.contextmanager
def _others_heard(requests: StopRequests) -> Iterator[None]:
    """Inside, a request to another process is one to this one."""
    if jax.process_count() == 1:
        yield
        return

    def listen():
        while not requests.ended.wait(OTHERS):
            if told(f"{requests.key}/asked"):
                requests.begin()
            requests.others_leave = bool(told(f"{requests.key}/leaving"))

    thread = threading.Thread(target=listen, name="requests to others", daemon=True)
    thread.start()
    try:
        yield
    finally:
        requests.ended.set()
        thread.join()
