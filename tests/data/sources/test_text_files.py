"""Which files a text: source names."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from butler_jax.data.batches import read_batches
from butler_jax.data.sources import text, text_files
from butler_jax.data.sources.text_files import find_files
from butler_jax.data.windows import read_text
from butler_jax.text.tokenizer import train_bpe


def never(line):
    raise AssertionError(line)


def write(directory, **files):
    for name, content in files.items():
        path = directory / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_directory_gives_every_file_that_can_be_read_and_names_the_others(tmp_path):
    record = '{"text": "one"}\n'
    write(tmp_path, b_jsonl=record, c_json=record, d_ndjson_gz=gzip.compress(record.encode()), e_txt="text")
    write(tmp_path, f_csv="1,2", g_json='{\n"text": 5}', h_txt="", i_txt=bytes(50), j_png="x", in__k_md="text")
    write(tmp_path, README_md="about", _hidden="x")
    said = []
    files = find_files([tmp_path], said.append)
    assert [(file.name, file.kind) for file in files] == [
        ("b.jsonl", "records"),
        ("c.json", "records"),
        ("d.ndjson.gz", "records"),
        ("e.txt", "text"),
        ("k.md", "text"),
    ]
    (line,) = said
    assert line.startswith(f"text:{tmp_path} passes over 6 of 11 files: ") and line.count("\n") == 0
    assert "f.csv, g.json, h.txt, i.txt, j.png, ..." in line
    named = find_files([f"{tmp_path}#text"], said.append)
    assert [file.name for file in named] == ["b.jsonl", "c.json", "d.ndjson.gz"]
    assert all(file.features == ("text",) for file in named)


def test_a_directory_of_text_alone_keeps_its_readme(tmp_path):
    write(tmp_path, README_md="about", b_txt="text")
    assert [file.name for file in find_files([tmp_path], never)] == ["README.md", "b.txt"]


def test_patterns_name_files_whatever_their_suffix(tmp_path):
    write(tmp_path, a_py="x = 1", b_py="y = 2", in__c_py="z = 3", d_txt="text")
    assert [file.name for file in find_files([f"{tmp_path}/*.py"], never)] == ["a.py", "b.py"]
    assert [file.name for file in find_files([f"{tmp_path}/**/*.py"], never)] == ["a.py", "b.py", "c.py"]
    (tmp_path / "__init__.py").touch()
    said = []
    assert [file.name for file in find_files([f"{tmp_path}/**/*.py"], said.append)] == ["a.py", "b.py", "c.py"]
    assert len(said) == 1 and "passes over 1 of 4 files, which hold no text: " in said[0]
    with pytest.raises(ValueError, match=r"__init__\.py is empty"):
        find_files([f"{tmp_path}/__init_*.py"], never)
    with pytest.raises(FileNotFoundError, match=r"no text file matches .*\*\.rs"):
        find_files([f"{tmp_path}/*.rs"], never)


def test_a_path_may_contain_the_mark_of_a_feature(tmp_path):
    (tmp_path / "c#.jsonl").write_text('{"text": "one", "other": "two"}\n')
    (found,) = find_files([f"{tmp_path}/c#.jsonl"], never)
    assert found.features == () and found.name == "c#.jsonl"
    (found,) = find_files([f"{tmp_path}/c#.jsonl#other"], never)
    assert found.features == ("other",) and found.name == "c#.jsonl"


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({"a_txt": "text"}, "a.txt#body", "a.txt is plain text, which has no features: leave out #body"),
        ({"a_json": "[\n{}]"}, "a.json", "a.json does not hold a JSON object a line; .* jq -c"),
        ({"a_json_gz": gzip.compress(b"")}, "a.json.gz", "a.json.gz does not hold a JSON object a line"),
        ({"b_csv": "1"}, "", r"no text in directory .*; it holds b\.csv\. Files are read by their suffix: \.txt"),
        ({"a_txt": "text"}, "#body", "no text with the feature body in directory"),
        ({}, "nowhere", "no such text file or directory: .*nowhere"),
        ({}, "", "no text in directory"),
    ],
)
def test_what_cannot_be_read_is_told_what_to_do(tmp_path, files, path, message):
    write(tmp_path, **files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_files([f"{tmp_path}/{path}"], never)
    with pytest.raises(ValueError, match="no text files given"):
        find_files([], never)
    with pytest.raises(ValueError, match=f"text:{os.devnull} is no regular file"):
        find_files([os.devnull], never)


def test_a_saved_data_set_is_read_with_its_own_splits(tmp_path):
    """As `datasets` writes and reads it, also in several files and with cached files beside them."""
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i} é" for i in range(count)], "n": list(range(count))})
        for name, count in (("train", 70), ("validation", 30), ("other", 5))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set", num_shards={"train": 3, "validation": 1, "other": 1})
    loaded = datasets.load_from_disk(tmp_path / "set")
    loaded["train"].map(lambda row: {"more": row["n"] + 1})  # leaves a cache-*.arrow
    said = []
    assert len(find_files([tmp_path / "set"], said.append)) == 4
    assert said == [f"text:{tmp_path}/set passes over the splits other"]
    builder = text.open_builder([tmp_path / "set"], str(tmp_path / "data"))
    for split, own in (("train", "train"), ("test", "validation")):
        found = [record["text"].decode() for record in builder.as_data_source(split)]
        assert found == loaded[own]["text"][:]
    one = text.open_builder([tmp_path / "set" / "train"], str(tmp_path / "data"))
    assert len(one.as_data_source("train")) + len(one.as_data_source("test")) == 70
    (tmp_path / "set" / "train" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"state\.json names data-00001-of-00003\.arrow, which is not there"):
        find_files([tmp_path / "set"], print)
    with pytest.raises(ValueError, match=r"no split train \(splits: x\)"):
        datasets.DatasetDict(x=parts["other"]).save_to_disk(tmp_path / "x")
        find_files([tmp_path / "x"], never)


@pytest.fixture
def pipe(monkeypatch):
    """Gives bytes to standard input, as at the start of a process."""

    def give(data):
        text_files._standard_input.cache_clear()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False))

    yield give
    text_files._standard_input.cache_clear()


def test_standard_input_is_read_once_and_as_what_it_holds(tmp_path, pipe):
    def read(path, data):
        pipe(data)
        for _ in range(2):
            builder = text.open_builder([path], str(tmp_path / "data"))
        return [record["text"].decode() for record in builder.as_data_source("train")]

    assert read("-", b"some text\n") == ["some text\n"]
    assert read("-", gzip.compress(b"packed text\n")) == ["packed text\n"]
    assert read("-#body", b'{"body": "record"}\n') == ["record"]
    with pytest.raises(ValueError, match="standard input, and it is empty"):
        read("-", b"")
    sys.stdin.isatty = lambda: True
    with pytest.raises(ValueError, match="nothing is piped into it"):
        read_text("-")


SOURCES = {
    "a.txt.xz": ("", lambda rows: lzma.compress("<|endoftext|>".join(rows).encode())),
    "a.jsonl.gz": (
        "#body",
        lambda rows: gzip.compress("".join(json.dumps({"body": row}) + "\n" for row in rows).encode(), mtime=0),
    ),
    "-": ("#body", lambda rows: "".join(json.dumps({"body": row}) + "\n" for row in rows).encode()),
    "a.parquet": ("#body", None),
    "set": ("#body", None),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_resumes_to_the_batch_on_the_same_text_alone(tmp_path, pipe, name):
    """Prepared anew in another place, as on another machine; standard input is piped again."""
    tokenizer, (feature, write_bytes) = train_bpe(["some words"], 300), SOURCES[name]
    spec = f"text:{name if name == '-' else tmp_path / name}{feature}"

    def opened(word, data_dir):
        rows = [f"{word} {i} " * 9 for i in range(60)]
        if name == "-":
            pipe(write_bytes(rows))
        elif name == "set":
            datasets.Dataset.from_dict({"body": rows, "n": range(60)}).save_to_disk(tmp_path / name)
        elif write_bytes is None:
            parquet.write_table(pa.table({"body": rows}), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(write_bytes(rows))
        return read_batches(spec, tokenizer, length=32, batch_size=2, data_dir=str(tmp_path / data_dir))

    first = opened("stone", "data")
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first)["tokens"] for _ in range(4)]
    again = opened("stone", "other")
    again.set_state(state)
    np.testing.assert_array_equal([next(again)["tokens"] for _ in range(4)], expected)
    with pytest.raises(ValueError, match="the data are not what the run was trained on"):
        opened("river", "data").set_state(state)


def test_a_text_as_a_whole_is_read_from_every_form(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo<|endoftext|>three")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("one\ntwo".encode("utf-16")))
    (tmp_path / "b.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert read_text(tmp_path / "a.txt") == "one\ntwo<|endoftext|>three"
    assert read_text(tmp_path / "a.txt.gz") == "one\ntwo"
    assert read_text(f"{tmp_path}/b.jsonl#body") == "one\n\ntwo"
    (tmp_path / "b.jsonl").write_text('{"body": "one"}\n{"body": 2}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2"):
        read_text(tmp_path / "b.jsonl")


def test_a_feature_of_the_last_path_does_not_concern_plain_text(tmp_path):
    write(tmp_path, plain_txt="text", records_jsonl='{"body": "one"}\n')
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", a_txt="text", b_jsonl='{"body": "two"}\n')
    paths = [f"{tmp_path}/{name}" for name in ("plain.txt", "more", "records.jsonl#body")]
    found = [(file.name, file.kind, file.features) for file in find_files(paths, never)]
    assert found == [
        ("plain.txt", "text", ()),
        ("a.txt", "text", ()),
        ("b.jsonl", "records", ("body",)),
        ("records.jsonl", "records", ("body",)),
    ]


def test_a_file_named_with_different_features_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "a title", "body": "a body"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="named twice, with the features title and body; name it once"):
        find_files([f"{path}#title", f"{path}#body"], print)
    assert [file.features for file in find_files([f"{path}#title", f"{path}#title"], print)] == [("title",)]
