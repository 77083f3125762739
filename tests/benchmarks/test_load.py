"""The benchmark of a queue, without a model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import load


def test_queues_are_ragged_and_as_long_as_asked():
    tokenizer = SimpleNamespace(encode=lambda text: list(range(len(text))))
    queue = load.draw_queue(tokenizer, 400, 1000, (4, 64), seed=0)
    lengths, counts = (np.asarray(column) for column in zip(*((len(t), n) for t, n in queue), strict=True))
    assert lengths.min() == 1 and 900 < lengths.max() <= 1000 and counts.min() == 4 and 60 < counts.max() <= 64
    assert np.median(lengths) == pytest.approx(np.sqrt(1000), rel=0.5)  # log-uniform


def test_contenders_take_turns_and_the_first_is_what_answers_are_compared_with():
    calls = []

    def contender(name, wrong=0):
        def run(queue):
            calls.append((name, len(queue)))
            return [[n + wrong * (at == 1)] for at, (_, n) in enumerate(queue)]

        return run

    queue = [([1], 2), ([2], 3), ([3], 4)]
    contenders = {
        "serve": load.Contender(contender("serve"), queue[:1], queue),
        "other": load.Contender(contender("other", wrong=1), queue[:1], queue[:2]),
    }
    *_, rows = load.measure(contenders, 2)
    assert calls == [("serve", 1), ("other", 1), *[("serve", 3), ("other", 2)] * 2]
    assert [(r["requests"], r["tokens"], len(r["seconds"]), r["answers_as_serve"]) for r in rows] == [
        (3, 9, 2, 3),
        (2, 5, 2, 1),
    ]
