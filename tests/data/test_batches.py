"""The pipeline: every token of every document arrives once, in order, the same on any number of processes."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from butler_jax.data.batches import open_documents, parse_spec, read_batches, read_held_out
from butler_jax.data.sources import coreference
from butler_jax.runs.checkpoints import joined
from butler_jax.text.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe((coreference.sample(0, i).text for i in range(50)), 500)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A text of 40 documents and the directory of its prepared set."""
    directory = tmp_path_factory.mktemp("book")
    stories = [f"Story {i}. " + " ".join(f"w{i}x{j}" for j in range(20 + 7 * i % 60)) for i in range(40)]
    (directory / "book.txt").write_text("<|endoftext|>".join(stories))
    return f"text:{directory}/book.txt", str(directory / "data")


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(left, right):
    return all(np.array_equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in ("tokens", *SHAPES))


SHAPES = ("segments", "positions")


def test_same_seed_same_batches_and_another_seed_others(tokenizer, book):
    spec, data_dir = book
    runs = [
        take(read_batches(spec, tokenizer, length=64, batch_size=4, seed=seed, data_dir=data_dir), 6)
        for seed in (1, 1, 2)
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_rows_are_the_documents_end_to_end(tokenizer):
    rows, length = 3, 100
    found = take(read_batches("coreference", tokenizer, length=length, batch_size=rows, seed=5), 12)
    for row in range(rows):
        stream = np.concatenate([batch["tokens"][row] for batch in found])
        documents = []
        while sum(map(len, documents)) < len(stream):
            sample = coreference.sample(5, row + rows * len(documents))
            documents.append([*tokenizer.encode(sample.text), tokenizer.eos])
        assert stream.tolist() == list(itertools.chain(*documents))[: len(stream)]
        # Segments and positions, made the long way: a border is a document's start or a row's.
        starts = set(np.cumsum([0, *map(len, documents)]).tolist())
        at = 0
        for batch in found:
            segment = position = 0
            for column in range(length):
                border = column == 0 or at in starts
                segment, position = (segment + 1, 0) if border else (segment, position + 1)
                assert batch["segments"][row, column] == segment
                assert batch["positions"][row, column] == position
                at += 1
    assert all(batch[key].dtype == np.int32 and batch[key].shape == (rows, length) for batch in found for key in batch)


def test_an_epoch_holds_each_document_once(tokenizer, book):
    spec, data_dir = book
    documents = open_documents(spec, data_dir=data_dir)
    expected = sorted(tuple(tokenizer.encode(documents[i])) for i in range(len(documents)))
    total = sum(map(len, expected)) + len(expected)
    stream = read_batches(spec, tokenizer, length=50, batch_size=1, seed=3, data_dir=data_dir)
    tokens = np.concatenate([batch["tokens"][0] for batch in take(stream, 2 * total // 50 + 1)]).tolist()
    epochs = []
    for start in (0, total):
        epoch, cut = tokens[start : start + total], []
        while tokenizer.eos in epoch:
            border = epoch.index(tokenizer.eos)
            cut.append(tuple(epoch[:border]))
            epoch = epoch[border + 1 :]
        epochs.append(cut)
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]  # shuffled anew


SHARES = [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]], [[0, 1, 2, 3]]]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_processes_share_the_batch_of_one(tokenizer, book, shares):
    spec, data_dir = book
    options = {"length": 64, "batch_size": 4, "seed": 1, "data_dir": data_dir}
    alone = take(read_batches(spec, tokenizer, **options), 5)
    for rows in shares:
        for mine, whole in zip(take(read_batches(spec, tokenizer, **options, rows=rows), 5), alone, strict=True):
            for key in whole:
                np.testing.assert_array_equal(mine[key], whole[key][rows])


@pytest.mark.parametrize("spec", ["coreference", "book", "book:0.7+coreference:0.3"])
@pytest.mark.parametrize("whole", [False, True])
def test_other_shares_go_on_where_some_stopped(tokenizer, book, spec, whole):
    spec = spec.replace("book", book[0])
    options = {"length": 96, "batch_size": 4, "seed": 4, "data_dir": book[1], "whole": whole}
    alone = take(read_batches(spec, tokenizer, **options), 9)
    states = []
    for rows in SHARES[0]:
        share = read_batches(spec, tokenizer, **options, rows=rows)
        take(share, 5)
        states.append(share.get_state())
    state = json.loads(json.dumps(joined(states)))
    for rows in (row for shares in SHARES for row in shares):
        going_on = take(read_batches(spec, tokenizer, **options, rows=rows, start_state=state), 4)
        assert all(np.array_equal(a["tokens"], b["tokens"][rows]) for a, b in zip(going_on, alone[5:], strict=True))


def test_a_process_reads_the_documents_of_its_rows_alone(tokenizer, monkeypatch):
    read = []
    sample = coreference.sample
    monkeypatch.setattr(coreference, "sample", lambda seed, index, *a, **k: read.append(index) or sample(seed, index))
    take(read_batches("coreference", tokenizer, length=64, batch_size=4, rows=[1, 3]), 20)
    probes = 1000  # documents whose length is looked at for the weights of a mixture
    assert len(read) > probes + 4 and {index % 4 for index in read[probes:]} == {1, 3}


@pytest.mark.parametrize("spec", ["coreference", "book", "book:0.7+coreference:0.3"])
@pytest.mark.parametrize("done", [0, 1, 7])
def test_resuming_continues_with_the_very_next_batch(tokenizer, book, spec, done):
    spec = spec.replace("book", book[0])
    options = {"length": 96, "batch_size": 2, "seed": 4, "data_dir": book[1]}
    first = read_batches(spec, tokenizer, **options)
    take(first, done)
    state = json.loads(json.dumps(first.get_state()))
    expected = take(first, 4)
    assert same(take(read_batches(spec, tokenizer, **options, start_state=state), 4), expected)
    first.set_state(state)
    assert same(take(first, 4), expected)


def test_a_fresh_process_without_tensorflow_resumes_the_same_batches(tokenizer, book, tmp_path):
    spec, data_dir = book
    tokenizer.save(tmp_path)
    iterator = read_batches(spec, tokenizer, length=64, batch_size=2, seed=1, data_dir=data_dir)
    take(iterator, 3)
    (tmp_path / "state.json").write_text(json.dumps(iterator.get_state()))
    expected = hashlib.sha256(b"".join(batch["tokens"].tobytes() for batch in take(iterator, 3)))
    script = f"""
import hashlib, json, sys
from butler_jax.data.batches import read_batches
from butler_jax.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load({str(tmp_path)!r})
state = json.load(open({str(tmp_path / "state.json")!r}))
options = dict(length=64, batch_size=2, seed=1)
next(read_batches({spec!r}, tokenizer, data_dir={str(tmp_path / "anew")!r}, **options))  # prepares the files anew
iterator = read_batches({spec!r}, tokenizer, data_dir={data_dir!r}, start_state=state, **options)
tokens = b"".join(next(iterator)["tokens"].tobytes() for _ in range(3))
assert "tensorflow" not in sys.modules
print(hashlib.sha256(tokens).hexdigest())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == expected.hexdigest()
    assert "Traceback" not in done.stderr


def test_state_of_other_settings_is_refused(tokenizer):
    state = read_batches("coreference", tokenizer, length=64, batch_size=2, seed=1).get_state()
    with pytest.raises(ValueError, match="length was 64 when the state was saved and is 128 now"):
        read_batches("coreference", tokenizer, length=128, batch_size=2, seed=1, start_state=state)


def test_text_that_changed_since_the_state_was_saved_is_refused(tokenizer, tmp_path):
    """As many documents of as many letters, in a file of the same name: only the digest tells them apart."""

    def opened(word):
        (tmp_path / "book.txt").write_text("<|endoftext|>".join(f"{word} {i} " * 90 for i in range(80)))
        return read_batches(f"text:{tmp_path}/book.txt", tokenizer, length=32, batch_size=2, data_dir=tmp_path / "data")

    first = opened("stone")
    next(first)
    state, following = first.get_state(), next(first)
    changed = opened("river")
    with pytest.raises(ValueError, match=r"the data are not what the run was trained on: .*book\.txt .*--run-dir"):
        changed.set_state(state)
    again = opened("stone")
    again.set_state(state)
    assert same([next(again)], [following])
    older = {name: value for name, value in state.items() if name != "content"}
    again = opened("stone")
    again.set_state(older)  # saved before there were digests
    assert same([next(again)], [following])


def test_state_of_other_rows_is_refused(tokenizer):
    options = {"length": 64, "batch_size": 4}
    state = read_batches("coreference", tokenizer, **options, rows=[0, 1]).get_state()
    with pytest.raises(ValueError, match="cannot continue the data: the state is of other rows and lacks 2, 3"):
        read_batches("coreference", tokenizer, **options, start_state=state)


def test_weights_are_shares_of_the_text(tokenizer, book):
    spec = f"{book[0]}:0.75+coreference:0.25"
    stream = read_batches(spec, tokenizer, length=128, batch_size=2, seed=0, data_dir=book[1])
    counts = {True: 0, False: 0}
    tokens = np.concatenate([batch["tokens"][0] for batch in take(stream, 400)])
    for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos) + 1):
        text = tokenizer.decode(document)
        counts[text.startswith("Story")] += len(text)
    # Documents of 100 to 600 characters are drawn in whole, and their mean is estimated from all 40 of them.
    assert counts[True] / sum(counts.values()) == pytest.approx(0.75, abs=0.04)


def test_held_out_batches_are_fixed_and_of_the_test_split(tokenizer, book):
    spec, data_dir = book
    runs = [read_held_out(spec, tokenizer, length=32, count=3, batch_size=2, data_dir=data_dir) for _ in range(2)]
    assert same(*runs)
    seen = "".join(tokenizer.decode(row) for batch in runs[0] for row in batch["tokens"])
    train = open_documents(spec, data_dir=data_dir)
    assert "Story 39" in seen and not any("Story 39." in train[i] for i in range(len(train)))
    endless = read_held_out("coreference", tokenizer, length=512, count=4, batch_size=2)
    assert len(endless) == 4 and all((batch["segments"] > 0).all() for batch in endless)
    assert tokenizer.decode(endless[0]["tokens"][0]).startswith(coreference.sample(0, 0, "test").text[:100])


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("BOOK:0.25+coreference:0.75", (2, 6)),
        ("coreference:0.75+BOOK:0.25", (2, 6)),
        ("BOOK:0.01+coreference:0.99", (1, 7)),
    ],
)
def test_held_out_rows_of_a_mixture_are_shared_by_its_weights(tokenizer, book, spec, rows):
    found = read_held_out(spec.replace("BOOK", book[0]), tokenizer, length=32, count=4, batch_size=2, data_dir=book[1])
    texts = [tokenizer.decode(row) for batch in found for row in batch["tokens"]]
    (own,) = read_held_out(book[0], tokenizer, length=32, count=1, batch_size=rows[0], data_dir=book[1])
    of_book = sum(text in [tokenizer.decode(row) for row in own["tokens"]] for text in texts)
    assert (of_book, len(texts) - of_book) == rows


def test_what_ends_early_is_padded(tokenizer, book):
    (batch,) = read_held_out(book[0], tokenizer, length=4096, count=9, batch_size=3, data_dir=book[1])
    padding = batch["segments"] == 0
    assert padding[1:].all() and padding[0].any() and not padding[0, 0]
    assert not batch["tokens"][padding].any() and not batch["positions"][padding].any()


def test_rows_that_repeat_each_other_are_told(tokenizer, tmp_path, capfd):
    (tmp_path / "short.txt").write_text("The river was wide. " * 700)
    spec = f"text:{tmp_path / 'short.txt'}"
    for batch_size, told in ((4, True), (1, False)):
        next(read_batches(spec, tokenizer, length=64, batch_size=batch_size, seed=0, data_dir=str(tmp_path)))
        assert ("fewer passages (1) than a batch has rows (4)" in capfd.readouterr().err) == told


def test_held_out_text_shorter_than_a_row_ends_with_its_block(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("The river was wide. " * 700)
    spec, where = f"text:{tmp_path / 'short.txt'}", str(tmp_path)
    whole, cut = (read_held_out(spec, tokenizer, length=n, count=2, data_dir=where)[0] for n in (256, 8192))
    tokens = int((cut["segments"] > 0).sum())
    assert cut["tokens"].shape == (1, -(-tokens // 128) * 128) and 128 < tokens < 8192
    assert whole["tokens"].shape == (1, 256)
    np.testing.assert_array_equal(cut["tokens"][:, :256], whole["tokens"])


def test_specifications_are_read_as_written():
    assert [(p.source, p.weight) for p in parse_spec("python_docs:0.5+coreference:.5")] == [
        ("python_docs", 0.5),
        ("coreference", 0.5),
    ]
    assert [p.source for p in parse_spec("text:c++/a.txt,b.txt+coreference")] == [
        "text:c++/a.txt,b.txt",
        "coreference",
    ]
    assert [(p.source, p.weight) for p in parse_spec("tfds:c4/en:3.0.1")] == [("tfds:c4/en:3.0.1", None)]


@pytest.mark.parametrize("spec", ["wikipedia", "text:", "", "python_docs:0+coreference:1", "python_docs:2+coreference"])
def test_bad_specifications_are_refused(spec):
    with pytest.raises(ValueError, match=r"unknown data|weight"):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 1}, "length=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"rows": [0, 2]}, r"rows=\[0, 2\] must be one or more of 0 ... 1, the rows of a batch"),
        ({"rows": []}, r"rows=\[\] must be one or more"),
        ({"split": "dev"}, "split='dev' is unknown"),
    ],
)
def test_bad_sizes_are_refused(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        read_batches("coreference", tokenizer, **{"length": 64, "batch_size": 2, **change})


def test_held_out_text_is_asked_for_as_batches_are(tokenizer):
    for wrong, message in (
        (dict(length=64.0), "length=64.0 must be a whole number"),
        (dict(count=0), "count=0 must be at least 1"),
        (dict(tokenizer=None), "the tokenizer of a base is needed"),
        (dict(spec=["coreference"]), "the data must be a text"),
    ):
        given = {"spec": "coreference", "tokenizer": tokenizer, "length": 16, "count": 1, **wrong}
        with pytest.raises(ValueError, match=message):
            read_held_out(given.pop("spec"), given.pop("tokenizer"), **given)
    (batch,) = read_held_out("coreference", tokenizer, length=16, count=1, seed=-1)
    assert batch["tokens"].shape == (1, 16)


def test_sizes_may_be_numbers_of_numpy(tokenizer):
    sizes = {"length": np.int64(16), "batch_size": np.int32(2), "seed": np.int64(3), "rows": np.arange(2)}
    batches = read_batches("coreference + coreference_short", tokenizer, **sizes)
    next(batches)
    assert json.loads(json.dumps(batches.get_state()))["seed"] == 3


def test_a_text_too_small_to_hold_any_out_says_so(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("A single line.")
    spec, data_dir = f"text:{tmp_path}/a.txt", str(tmp_path / "data")
    batch = next(read_batches(spec, tokenizer, length=16, batch_size=2, data_dir=data_dir))
    assert (batch["segments"] > 0).all()
    with pytest.raises(ValueError, match="no documents for the split 'test'"):
        read_held_out(spec, tokenizer, length=16, count=1, data_dir=data_dir)


def test_a_long_data_specification_takes_no_time():
    """Digits that end in a letter had as many splits as pairs of digits."""
    began = time.process_time()
    parse_spec("text:" + ":9" * 3 + "9" * 50_000 + "x")
    assert time.process_time() - began < 1.0  # seconds; before, some 20
