"""The host's side of a queue: who is read, who decodes and who has ended.

The programs are those of slots.py: one for a step of all slots, and one for each of a few widths of a prompt's parts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from butler_jax.decoding.capacity import room_for_all
from butler_jax.decoding.generated import Piece
from butler_jax.decoding.generation import row_keys
from butler_jax.decoding.prompt_reader import PromptReader
from butler_jax.decoding.requests import Completion, Request, request_of
from butler_jax.decoding.sampling import Draws
from butler_jax.decoding.settings import Decoding
from butler_jax.decoding.slots import admit, advance_slots, make_slots, renew
from butler_jax.predictors import Predictor
from butler_jax.storage import whole
from butler_jax.text import Writer, encode_prompt, read_stops

if TYPE_CHECKING:
    from butler_jax.weights import Base

IDLE = 0.002  # seconds until an iterable that had nothing is asked again


@dataclass
class Row:
    """A request on its way.

    Attributes:
        completion: What has come of it.
        prompt: Its tokens.
        ends: Token ids that end it.
        writer: Makes text of its tokens.
        key: Of its draws.
        began: When it left the queue.
        slot: Where it decodes; None before and after.
        drawn: Tokens drawn on the device, of which the host may not know the last.
        read: Sums of the shares read.
    """

    completion: Completion
    prompt: list[int]
    ends: set[int]
    writer: Writer
    key: jax.Array
    began: float
    slot: int | None = None
    drawn: int = 0
    read: np.ndarray = field(default_factory=lambda: np.zeros(2))

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.completion.request

    @property
    def cached(self) -> int:
        """Tokens in its caches."""
        return len(self.prompt) + self.drawn - 1


class Server:
    """The host's side of `serve`: who is in which slot, what was dispatched, and who has ended.

    A step is dispatched before the tokens of the one before it are read.
    """

    def __init__(self, base: Base, predictor: Predictor | None, how: Decoding, draws: Draws, slots: int):
        self.base, self.predictor, self.how, self.draws = base, predictor, how, draws
        self.rows: list[Row | None] = [None] * slots
        self.slots = None
        self.clock = self.number = 0
        self.reading: tuple[Row, PromptReader] | None = None
        self.flying: deque[tuple[list[Row | None], Any, Any]] = deque()
        self.ended: list[Completion] = []
        self.source: Iterator[Any] | None = None
        self.broken: Exception | None = None
        self.idle = False

    def run(self, source: Iterator[Any]) -> Iterator[Completion]:
        """Serve until the source ends and all its requests have."""
        self.source = source
        room = len(self.rows)
        self.slots = make_slots(self.base.model, self.predictor, self.how, room, penalised=self.draws.penalised)
        while True:
            self._drop_cancelled()
            self._take_next()
            if self.reading is not None:
                self._read_on()
                self._take_next()
            decodes = self._decodes()
            if decodes:
                self._step()
            while len(self.flying) > decodes:
                self._hear()
            yield from self._leave()
            if not decodes and self.reading is None:
                if self.source is None:
                    break
                if self.idle:
                    time.sleep(IDLE)
        if self.broken is not None:
            raise self.broken

    def _leave(self) -> list[Completion]:
        """Those that have ended since the last time."""
        ended, self.ended = self.ended, []
        return ended

    def _drop_cancelled(self) -> None:
        """End the rows that were cancelled."""
        for row in self.rows:
            if row is not None and row.request.cancelled:
                self._end(row, "cancelled")
        if self.reading is not None and self.reading[0].request.cancelled:
            self._end(self.reading[0], "cancelled")
            self.reading = None

    def _take_next(self) -> None:
        """Begin to read the next request, where a slot is free for it."""
        while self.reading is None and self.source is not None and None in self.rows:
            try:
                one = next(self.source)
            except StopIteration:
                self.source = None
                return
            except Exception as error:  # those that run are not to blame
                self.source, self.broken = None, error
                return
            self.idle = one is None
            if self.idle:
                return
            completion = Completion(self.number, request_of(one))
            self.number += 1
            try:
                row = self._row(completion)
            except Exception as error:
                self._fail(completion, error)
                continue
            if row.request.cancelled:
                self._end(row, "cancelled")
                continue
            self.reading = row, self._reader(row.prompt)

    def _reader(self, tokens: list[int], following: int = 0) -> PromptReader:
        return PromptReader(self.base.model, self.predictor, self.how, tokens, following)

    def _row(self, completion: Completion) -> Row:
        """The row of a request. Raises ValueError for a request that cannot be served."""
        request, name = completion.request, f"request {completion.number}"
        known = self.base.tokenizer, self.base.config.vocab_size
        began = time.perf_counter()
        prompt, count = encode_prompt(*known, request.prompt, name), request.max_new_tokens
        completion.prompt_tokens = len(prompt)
        whole(count, f"{name}: max_new_tokens")
        room_for_all(np.asarray([len(prompt)]), count, self.how.capacity, self.base.config.context)
        ends, stops = read_stops(*known, request.stop)
        seed = completion.number if request.seed is None else request.seed
        return Row(completion, prompt, ends, Writer(known[0], prompt, stops), row_keys(seed, 1), began)

    def _read_on(self) -> None:
        """Read one part of the prompt being read, or admit its row at a step that chooses."""
        row, reader = self.reading
        if reader.found is None:
            reader.read()
        if not any(self.rows):
            self.clock = 0
        if reader.found is None or self.clock % self.how.plan.interval != 0:
            return
        self.reading, seen = None, None
        if self.draws.penalised:
            seen = np.zeros((1, self.base.config.vocab_size), bool)
            seen[0, row.prompt] = True
        row.slot, row.drawn = self.rows.index(None), 1
        self.rows[row.slot] = row
        slot = np.int32(row.slot)
        token, self.slots = admit(self.slots, reader.found, slot, row.key, seen, self.draws, how=self.how)
        self.flying.append(([row], token, None))

    def _active(self) -> list[bool]:
        """Which slots have a row that needs more tokens."""
        return [row is not None and row.drawn < row.request.max_new_tokens for row in self.rows]

    def _decodes(self) -> bool:
        """Whether there is a step to take. While less than half of the slots decode, prompts are read first."""
        active = sum(self._active())
        waits = self.reading is not None and self.reading[1].found is None and 2 * active < len(self.rows)
        return active > 0 and not waits

    def _step(self) -> None:
        """Dispatch a step of all slots."""
        active = self._active()
        border = self.base.config.rope.border
        for row in self.rows:
            if row is not None and active[row.slot] and row.cached == border:
                self._read_again(row)
        given = self.slots, np.asarray(active), np.int32(self.clock), self.draws
        token, share, self.slots = advance_slots(self.base.model, self.predictor, *given, how=self.how)
        self.clock += 1
        for slot, row in enumerate(self.rows):
            if active[slot]:
                row.drawn += 1
        self.flying.append(([row if on else None for row, on in zip(self.rows, active, strict=True)], token, share))

    def _read_again(self, row: Row) -> None:
        """Read all tokens of a row again, which the next one takes beyond the original context of longrope."""
        reader = self._reader([*row.prompt, *row.completion.tokens[: row.drawn - 1]], following=1)
        while reader.found is None:
            reader.read()
        self.slots = renew(self.slots, reader.found, np.int32(row.slot), how=self.how)

    def _hear(self) -> None:
        """Read the tokens of the oldest dispatch."""
        rows, token, share = self.flying.popleft()
        token = np.asarray(token)
        share = None if share is None else np.asarray(share)
        for slot, row in enumerate(rows):
            if row is not None and row.completion.reason is None:
                try:
                    self._add(row, int(token[slot]), None if share is None else share[:, slot])
                except Exception as error:
                    row.completion.error = error
                    self._end(row, "error")

    def _add(self, row: Row, token: int, share: np.ndarray | None) -> None:
        """A row's next token."""
        completion, request = row.completion, row.request
        completion.tokens.append(token)
        if share is None:
            completion.seconds_to_first = time.perf_counter() - row.began
        else:
            row.read += share
        full = len(completion.tokens) == request.max_new_tokens
        text = row.writer.add(token, last=token in row.ends or full)
        completion.text += text
        if request.stream is not None:
            request.stream(Piece(completion.number, token, text))
        if token in row.ends or row.writer.stopped:
            self._end(row, "stop")
        elif full:
            self._end(row, "length")
        elif request.cancelled:
            self._end(row, "cancelled")

    def _end(self, row: Row, reason: str) -> None:
        """A row's completion, and its slot free again."""
        completion = row.completion
        completion.reason, completion.seconds = reason, time.perf_counter() - row.began
        completion.text += row.writer.close()
        if len(completion.tokens) > 1:
            shares = row.read / (len(completion.tokens) - 1)
            completion.attended, completion.attended_of_dense = map(float, shares)
        self.ended.append(completion)
        self._free(row)

    def _fail(self, completion: Completion, error: Exception) -> None:
        """The completion of a request that could not begin."""
        completion.reason, completion.error = "error", error
        self.ended.append(completion)

    def _free(self, row: Row) -> None:
        if row.slot is not None:
            self.rows[row.slot], row.slot = None, None
