"""Text files as a source."""

from __future__ import annotations

import json

import pytest

from butler_jax.data.sources import passages, text
from butler_jax.data.sources.passed_over import PassedOver
from butler_jax.data.sources.text_files import TextFile


def read(builder, split):
    return [record["text"].decode() for record in builder.as_data_source(split)]


def test_text_files_are_prepared_once_and_anew_when_they_change(tmp_path, monkeypatch):
    file = tmp_path / "book.txt"
    body = "\n\n".join(f"Chapter {i}. " + "It was late. " * 40 for i in range(200))
    file.write_text(body)
    first = text.open_builder([file], str(tmp_path / "data"))
    assert "".join([*read(first, "train"), *read(first, "test")]) == body  # in order, the held-out ones last
    assert {record["source"] for record in first.as_data_source("train")} == {b"book.txt"}
    held_out = sum(map(len, read(first, "test")))
    # The border falls on a line, here some 530 characters long, or between pieces of 1,000 characters.
    assert held_out == pytest.approx(max(0.02 * len(body), 4000), abs=1000)

    def never(self, **kwargs):
        raise AssertionError("prepared a second time")

    with monkeypatch.context() as patched:
        patched.setattr(text.TextFiles, "download_and_prepare", never)
        again = text.open_builder([tmp_path / "." / "book.txt"], str(tmp_path / "data"))
    assert again.data_dir == first.data_dir
    file.write_text(body + "The end.")
    assert text.open_builder([file], str(tmp_path / "data")).data_dir != first.data_dir


def test_documents_end_at_the_end_of_text_mark_and_at_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one one\n<|endoftext|>two\n\nmore<|endoftext|>\n" + "three " * 500)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"record {i} é"}) for i in range(50)))
    plain = list(text.read_passages(TextFile(tmp_path / "a.txt", "text"), PassedOver()))
    assert [passage for _, passage in plain[:2]] == ["one one\n", "two\n\nmore"]
    assert [split for split, _ in plain] == sorted((split for split, _ in plain), reverse=True)
    records = list(text.read_passages(TextFile(tmp_path / "b.jsonl", "records"), PassedOver()))
    assert [passage for _, passage in records] == [f"record {i} é" for i in range(50)]
    assert 1 <= sum(split == "test" for split, _ in records) <= 6


def test_a_part_is_held_out_of_documents_that_all_stand_in_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"document {i}" + " of words" * 200 + "<|endoftext|>" for i in range(1500)))
    found = list(text.read_passages(TextFile(tmp_path / "a.txt", "text"), PassedOver()))
    assert [passage.split(" of")[0] for _, passage in found] == [f"document {i}" for i in range(1500)]
    assert [split for split, _ in found] == ["train"] * 1470 + ["test"] * 30  # 2 %


BAD = [
    (
        b"fine\nna\xefve\nfine",
        "a.txt",
        r"a.txt, line 2: byte 0xef at offset 7 is not UTF-8",
        "iconv -f latin1 -t utf-8",
    ),
    ("one\ntwo é".encode()[:-1], "a.txt", "a.txt, line 2: byte 0xc3 at offset 8", "ends inside a character"),
    ("one é".encode()[:-1] + b"\ntwo", "a.txt", "a.txt, line 1: byte 0xc3 at offset 4", "convert it"),
    (b'{"text": "x"}\n{"body": "x"}\n', "a.jsonl", r'a.jsonl, line 2: expected a string "text", .* found: body', ""),
    (b'{"text": "x"}\n\n{"text": 5}\n', "a.jsonl", r'a.jsonl, line 3: expected a string "text", and it is int', ""),
    (b'{"text": null, "url": "z"}\n{"text": "x"}\n', "a.jsonl", r"a.jsonl, line 1: .* and it is NoneType", ""),
    (b'{"text": "x"}\n{"text": ', "a.jsonl", r"a.jsonl, line 2 is not valid JSON", ""),
    (b'{"text": "x"}\n[1]', "a.jsonl", r"a.jsonl, line 2 must hold a JSON object", ""),
    (b'{"text": "x"}\n{"text": "\xff"}\n{"text": "y"}', "a.jsonl", r"a.jsonl, line 2 is not valid JSON.*utf-8", ""),
    (b'{"text": "\\ud800"}\n{"text": "y"}', "a.jsonl", r"a.jsonl, line 1 has half a character", ""),
]


@pytest.mark.parametrize(("content", "name", "where", "remedy"), BAD)
def test_a_bad_line_is_passed_over_and_named_or_refused(tmp_path, capfd, content, name, where, remedy):
    (tmp_path / name).write_bytes(content)
    good = text.open_builder([tmp_path / name], str(tmp_path / "data"))
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("passed over 1 line or record that cannot be read (") and "--strict-data" in said
    assert where.split(",")[0] in said and remedy in said
    kept = "".join(passage for split in good.info.splits for passage in read(good, split))
    assert kept.replace("\n", "") in {"finefine", "one", "two", "x", "xy", "y"}
    for data_dir in ("data", "other"):  # the set that is there already is refused as well
        with pytest.raises(ValueError, match=f"{where}.*{remedy}"):
            text.open_builder([tmp_path / name], str(tmp_path / data_dir), strict=True)


def test_bad_lines_are_counted_and_the_first_ones_named(tmp_path, capfd):
    lines = [json.dumps({"text": f"line {i}"}) if i % 3 else "{" for i in range(1, 31)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    builder = text.open_builder([tmp_path / "a.jsonl"], str(tmp_path / "data"))
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("passed over 10 lines or records")
    assert [f"line {n} " in said for n in (3, 6, 9, 12)] == [True, True, True, False]
    assert len(read(builder, "train")) + len(read(builder, "test")) == 20


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.txt", "a.txt is empty"),
        (b" \n\t\n", "a.txt", "a.txt is empty"),
        (b"\xe9\n\xe9\n", "a.txt", r"a.txt: no text could be read. 2 lines .*line 1: .*iconv -f latin1"),
        (b'{"body": 1}\n', "a.jsonl", r"a.jsonl: no text could be read. 1 line .*line 1: expected a string \"text\""),
        (
            b'{"a": "x", "b": "y"}\n',
            "a.jsonl",
            r"a.jsonl has several text features \(a, b\).*Name one: text:.*#a, .*#a\+b",
        ),
    ],
)
def test_files_without_any_text_are_refused(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.open_builder([tmp_path / name], str(tmp_path / "data"))


def test_features_of_records_are_named_or_the_only_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "one", "a": "two", "n": 3}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "text", "n": 3}\n')

    def passages_of(*paths):
        return read(text.open_builder([str(tmp_path / path) for path in paths], str(tmp_path / "data")), "train")

    assert passages_of("a.jsonl#a") == ["two"]
    assert passages_of("a.jsonl#q+a") == ["one\n\ntwo"]
    assert passages_of("b.jsonl") == ["text"]
    assert passages_of("b.jsonl#body", "a.jsonl#q") == ["text", "one"]
    (tmp_path / "c.jsonl").write_text('{"q": "three"}\n')
    assert passages_of("c.jsonl", "a.jsonl#q") == ["three", "one"]  # the last one's stand for those without


def test_a_set_larger_than_a_file_of_it_is_written_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(passages, "SHARD", 100_000)
    body = "\n\n".join(f"Chapter {i}. " + "It was late. " * 90 for i in range(400))
    (tmp_path / "book.txt").write_text(body)
    builder = text.open_builder([tmp_path / "book.txt"], str(tmp_path / "data"))
    assert len(builder.info.splits["train"].shard_lengths) == 5
    assert "".join([*read(builder, "train"), *read(builder, "test")]) == body
    assert not list((tmp_path / "data").rglob("*unfinished*"))


def test_how_far_a_preparation_is_are_plain_lines(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(passages, "INTERVAL", 0.0)
    (tmp_path / "a.txt").write_text("It was late.\n" * 200_000)
    text.open_builder([tmp_path / "a.txt"], str(tmp_path / "data"))
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("preparing text_files/") and lines[-1].startswith("prepared in ")
    assert lines[1].startswith("preparing: 1 of 3 MB, ") and " MB/s, " in lines[1] and lines[1].endswith(" s left")
