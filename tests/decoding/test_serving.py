"""A queue in slots: each request gets the tokens of `generate` alone, whoever comes, leaves, is cancelled or fails."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import butler_jax
from benchmarks.watch import Watch
from butler_jax import Request, SelectionConfig
from butler_jax.decoding import SamplingConfig, prompt_parts, slots
from tests.decoding.letters import Letters
from tests.host_devices import run_on_devices
from tests.marked import long, slow

SIZES = [(11, 20), (1, 30), (5, 3), (40, 25), (70, 10), (2, 1), (33, 12), (17, 9)]  # tokens of a prompt, and new ones
FEW = SelectionConfig(budget=0.3, sinks=1, recent=3)
DRAWN = SamplingConfig(temperature=1.0, top_p=0.9, repetition_penalty=1.1)


def queue(sizes=SIZES, **fields):
    rng = np.random.default_rng(0)
    return [Request(rng.integers(1, 60, n).tolist(), new, stop=(), **fields) for n, new in sizes]


def served(base, requests, **settings):
    found = butler_jax.serve(base, requests, **{"slots": 3, "chunk": 32, "capacity": 96, **settings})
    return sorted(found, key=lambda one: one.number)


def alone(base, request, number, **settings):
    options = dict(max_new_tokens=request.max_new_tokens, stop=request.stop, seed=number, capacity=96)
    return butler_jax.generate(base, request.prompt, **options, **settings)


@pytest.fixture(scope="module")
def dense(base):
    before = slots.advance_slots._cache_size(), prompt_parts.read_part._cache_size()
    found = served(base, queue())
    after = slots.advance_slots._cache_size(), prompt_parts.read_part._cache_size()
    return found, (after[0] - before[0], after[1] - before[1])


def test_a_queue_gives_the_tokens_of_single_rows_with_one_compiled_step(base, dense):
    found, compiled = dense
    assert [one.number for one in found] == list(range(len(SIZES)))
    assert all(one.reason == "length" and one.error is None and one.attended == 1.0 for one in found)
    assert [(one.prompt_tokens, len(one.tokens)) for one in found] == SIZES
    for number, one in enumerate(found):
        assert one.tokens == alone(base, one.request, number).tokens[0]
        assert one.text == Letters().decode(one.tokens)
    assert compiled == (1, 3)  # parts of 32, 8 and 2 tokens


WHERE_CHOSEN = SelectionConfig(budget=0.3, sinks=1, recent=3, interval=3, min_context=24)
CASES = {
    "few": dict(selection=FEW),
    "interval": dict(selection=WHERE_CHOSEN, score_dtype="int8"),
    "offload": dict(selection=FEW, offload=True),
    "quest": dict(selection=FEW, policy="quest"),
    "tail": dict(selection=SelectionConfig(budget=0.3, sinks=1, recent=3, tail=8), offload=True),
    "snapkv": dict(selection=FEW, policy="snapkv"),  # its memory has rows in another axis than the caches
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        long(case, id=name) if name in ("few", "quest", "offload") else slow(case, id=name)
        for name, case in CASES.items()
    ],
)
def test_a_queue_under_a_selection_gives_the_tokens_of_single_rows(base, predictor, few_optimisations, case):
    settings = dict(sampling=DRAWN, predictor=None if "policy" in case else predictor, **case)
    sizes = [SIZES[n] for n in (0, 1, 3, 6, 2)]
    for number, one in enumerate(served(base, queue(sizes), slots=2, **settings)):
        wanted = alone(base, one.request, number, **settings)
        assert one.tokens == wanted.tokens[0]
        assert one.attended == pytest.approx(wanted.attended[0])
        assert one.attended_of_dense == pytest.approx(wanted.attended_of_dense[0])


def test_rows_join_where_others_leave(base):
    """Two slots: at most two requests are between their first and their last piece, and the third joins the first."""
    pieces, ended = [], []
    requests = queue([(3, 4), (4, 30), (5, 4), (6, 4)])
    for request in requests:
        request.stream = pieces.append
    for one in butler_jax.serve(base, requests, slots=2, chunk=32, capacity=96):
        ended.append(one.number)
        assert [p.token for p in pieces if p.row == one.number] == one.tokens
        assert "".join(p.text for p in pieces if p.row == one.number) == one.text
    assert ended == [0, 2, 3, 1]
    places = {n: [at for at, piece in enumerate(pieces) if piece.row == n] for n in range(4)}
    running = [sum(p[0] <= at <= p[-1] for p in places.values()) for at in range(len(pieces))]
    assert max(running) == 2


def test_cancelled_and_failing_requests_harm_no_other(base, dense):
    def fail(piece):
        if len(seen.append(piece) or seen) == 3:
            raise RuntimeError("nobody listens")

    def cancel(piece):
        if len(taken.append(piece) or taken) == 5:
            stopped.cancel()

    seen, taken = [], []
    waiting, stopped = Request([1, 2], stop=()), Request([3, 4, 5], 30, stop=(), stream=cancel)
    waiting.cancel()
    wrong = {
        "is empty": Request([]),
        "a prompt of 95 tokens": Request([1] * 95),
        "token 61; the vocabulary": Request([61]),
        "must be a text or a list of token ids": Request(3.5),
        "max_new_tokens must be": Request([1], 0),
        "the seed must be": Request([1], seed="a"),
        "is no token": Request([1], stop=[99]),
        "nobody listens": Request([1, 2, 3], 20, stop=(), stream=fail),
    }
    good = queue()
    mixed = [one for pair in zip(good, [*wrong.values()], strict=True) for one in pair] + [waiting, stopped]
    found = served(base, mixed)
    by_request = {id(one.request): one for one in found}
    for request, wanted in zip(good, dense[0], strict=True):
        assert by_request[id(request)].tokens == wanted.tokens
    for message, request in wrong.items():
        one = by_request[id(request)]
        assert one.reason == "error" and message in str(one.error)
    assert len(by_request[id(wrong["nobody listens"])].tokens) == 3
    assert [by_request[id(r)].reason for r in (waiting, stopped)] == ["cancelled"] * 2
    assert len(by_request[id(waiting)].tokens) == 0 and len(by_request[id(stopped)].tokens) == 5
    assert {one.reason for one in found} == {"length", "error", "cancelled"}


def test_a_request_ends_at_its_own_stops(base, dense):
    whole = dense[0][0]
    text, token = whole.text[4:6], whole.tokens[7]
    by_text, by_token, by_length = served(base, [Request(whole.request.prompt, 20, stop=s) for s in (text, token, ())])
    assert by_text.text == whole.text[: whole.text.index(text)] and by_text.reason == "stop"
    assert by_token.tokens == whole.tokens[: whole.tokens.index(token) + 1] and by_token.reason == "stop"
    assert by_length.tokens == whole.tokens and by_length.reason == "length"


def test_a_row_that_ends_early_has_its_text_and_its_figures(base):
    few = dict(selection=SelectionConfig(budget=6, sinks=1, recent=2), policy="oracle")
    (whole,) = served(base, queue([(30, 12)]), **few)
    heard, stop = [], [whole.text[5] + "never"]  # the sixth letter may begin it, so it is held back

    def cancel(piece):
        if len(heard.append(piece) or heard) == 6:
            asked.cancel()

    def fail(piece):
        if not piece.text:
            raise RuntimeError("nothing came")

    asked, failing = (Request(whole.request.prompt, 12, stop=stop, stream=stream) for stream in (cancel, fail))
    cancelled, failed = served(base, [asked, failing], **few)
    assert (cancelled.reason, failed.reason) == ("cancelled", "error")
    for one in (cancelled, failed):
        assert one.text == Letters().decode(one.tokens) and whole.text.startswith(one.text)
        assert one.attended < 1 and one.seconds >= one.seconds_to_first > 0


def test_the_queue_may_wait_and_may_break(base, dense):
    def come():
        yield None
        yield "ABC"
        yield None
        yield dense[0][2].request
        raise OSError("the queue is gone")

    found = []
    with pytest.raises(OSError, match="the queue is gone"):
        for one in butler_jax.serve(base, come(), slots=3, chunk=32, capacity=96):
            found.append(one)
    assert {one.number: len(one.tokens) for one in found}[1] == 3 and len(found) == 2
    assert next(one for one in found if one.number == 1).tokens == dense[0][2].tokens


def test_memory_and_programs_stay_the_same(base, dense):
    held = []
    with Watch() as watch:
        for one in butler_jax.serve(base, (r for _ in range(6) for r in queue()), slots=3, chunk=32, capacity=96):
            held.append((len(jax.live_arrays()), watch.compilations.count) if one.number % 8 == 4 else None)
    first, *later = [one for one in held if one]
    assert len(later) == 5
    assert max(arrays for arrays, _ in later) <= first[0]  # fewer where garbage was collected
    assert len({compilations for _, compilations in later}) == 1


@pytest.mark.parametrize(
    ("requests", "settings", "message"),
    [
        ("ABC", {}, "requests must be a list or another iterable of them, got one str"),
        (None, {}, "got one NoneType"),
        ([], dict(slots=0), "slots must be a whole number of at least 1, got 0"),
        ([], dict(chunk=0), "chunk must be a whole number of at least 1, got 0"),
        ([], dict(capacity=2.5), "capacity must be a whole number of at least 1, got 2.5"),
        ([], dict(capacity=97), "the capacity must be 1 ... 96, the model's context, got 97"),
        ([], dict(score_dtype="int4"), "score_dtype must be 'int8' or None"),
        ([], dict(selection=FEW), "needs a trained predictor"),
        ([], dict(selection=FEW, policy="h2o", offload=True), "leave out offload"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(base, requests, settings, message):
    with pytest.raises(ValueError, match=message):
        butler_jax.serve(base, requests, **settings)


def test_a_number_of_tokens_that_is_none_harms_no_other(base):
    requests = [butler_jax.Request([1, 2], max_new_tokens=2), butler_jax.Request([1], max_new_tokens=float("inf"))]
    found = {one.number: one for one in butler_jax.serve(base, requests)}
    assert found[0].error is None and isinstance(found[1].error, ValueError)


def test_an_empty_queue_ends_and_room_is_what_fits(base):
    assert list(butler_jax.serve(base, [])) == []
    found = list(butler_jax.serve(base, [[1] * 200, [1, 2]], chunk=32, slots=3))  # the first does not fit the context
    assert [one.reason for one in found] == ["error", "stop"] or [one.reason for one in found] == ["error", "length"]


MESH = """
import json, sys
import jax
import numpy as np
sys.path.insert(0, sys.argv[1])
import butler_jax
from types import SimpleNamespace
from butler_jax.model.decoder import LOGICAL_AXES, BaseModel
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.parallel import make_mesh, place
from tests.decoding.letters import BASE
from tests.decoding.test_serving import FEW, queue

found = {}
for text in ("data=1", "data=2,model=2,sequence=2"):
    mesh = make_mesh(text)
    model = place(BaseModel(BASE, jax.random.key(1)), LOGICAL_AXES, mesh)
    predictor = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    predictor = place(predictor, predictor.logical_axes, mesh)
    base = SimpleNamespace(model=model, tokenizer=None, config=BASE, generation={})
    requests = queue([(11, 12), (1, 14), (40, 9)])
    with jax.set_mesh(mesh):
        served = butler_jax.serve(base, requests, slots=2, chunk=32, capacity=96, predictor=predictor, selection=FEW)
        found[text] = {one.number: one.tokens for one in served}
print(json.dumps(found["data=1"] == found["data=2,model=2,sequence=2"]))
"""


@pytest.mark.slow
def test_slots_on_a_mesh():
    assert json.loads(run_on_devices(8, MESH).splitlines()[-1])
