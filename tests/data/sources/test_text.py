"""Text files as a source."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import pytest

from butler_jax.data.sources import text


def test_text_files_are_prepared_once_and_anew_when_they_change(tmp_path, monkeypatch):
    file = tmp_path / "book.txt"
    body = "\n\n".join(f"Chapter {i}. " + "It was late. " * 40 for i in range(200))
    file.write_text(body)
    first = text.open_builder([file], str(tmp_path / "data"))
    read = [record["text"].decode() for split in ("train", "test") for record in first.as_data_source(split)]
    assert "".join(read) == body  # passages in order, the held-out ones last
    assert {record["source"] for record in first.as_data_source("train")} == {b"book.txt"}
    held_out = sum(len(record["text"]) for record in first.as_data_source("test"))
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
    (tmp_path / "skipped.csv").write_text("1,2")
    with pytest.warns(UserWarning, match=r"skipped\.csv"):
        files = text.find_files([tmp_path])
    assert [file.name for file in files] == ["a.txt", "b.jsonl"]
    plain = list(text.read_passages(files[0]))
    assert [passage for _, passage in plain[:2]] == ["one one\n", "two\n\nmore"]
    assert [split for split, _ in plain] == sorted((split for split, _ in plain), reverse=True)
    records = list(text.read_passages(files[1]))
    assert [passage for _, passage in records] == [f"record {i} é" for i in range(50)]
    assert 1 <= sum(split == "test" for split, _ in records) <= 6


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.txt", r"a.txt is empty"),
        (b" \n\t\n", "a.txt", r"a.txt is empty"),
        (b"fine\nna\xefve", "a.txt", r"a.txt is not UTF-8: byte 0xef at offset 7 \(line 2\)"),
        (b'{"text": "x"}\n{"body": "x"}', "a.jsonl", r'a.jsonl, line 2: expected .* "text", found: body'),
        (b'{"text": ', "a.jsonl", r"a.jsonl, line 1 is not valid JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.open_builder([tmp_path / name], str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"some text"), "is compressed by gzip; unpack it first"),
        (lzma.compress(b"some text"), "is compressed by xz"),
        (bz2.compress(b"some text"), "is compressed by bzip2"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "is compressed by Zstandard"),
        (b"PAR1\x15\x04", "is a parquet file; write its texts as .jsonl"),
        ("some text".encode("utf-16"), "is UTF-16 text; convert it first, for example with iconv -f utf-16"),
        ("some text".encode("utf-16-be"), "is binary, or UTF-16 text without a mark"),
    ],
    ids=["gzip", "xz", "bzip2", "zstandard", "parquet", "utf-16", "utf-16 without a mark"],
)
def test_files_that_are_no_text_are_told_what_to_do(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.open_builder([tmp_path / "a"], str(tmp_path / "data"))


def test_files_that_a_directory_leaves_out_are_named(tmp_path):
    (tmp_path / "b.json.gz").touch()
    with pytest.raises(ValueError, match=r"holds no \.txt, \.md, \.jsonl file \(it holds b\.json\.gz\)"):
        text.find_files([tmp_path])
    (tmp_path / "README.md").write_text("text")
    with pytest.warns(UserWarning, match=r"leaves out 1 files that are no .*: b\.json\.gz"):
        assert [file.name for file in text.find_files([tmp_path])] == ["README.md"]


@pytest.mark.parametrize("path", ["-", os.devnull])
def test_what_cannot_be_read_twice_is_refused(path):
    with pytest.raises(ValueError, match=f"text:{path} is no regular file"):
        text.find_files([path])


def test_a_text_cut_inside_a_character_is_told_so(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes("one\ntwo é".encode()[:-1])
    with pytest.raises(ValueError, match=rf"{path} is not UTF-8: byte 0xc3 at offset 8 .*ends inside a character"):
        text.open_builder([path], tmp_path / "data")
    path.write_bytes("one é".encode()[:-1] + b"\ntwo")  # not at the end
    with pytest.raises(ValueError, match=r"at offset 4 .*Convert it first"):
        text.open_builder([path], tmp_path / "data")


def test_missing_files_and_empty_directories_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such text file or directory: .*nowhere"):
        text.find_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no text in directory"):
        text.find_files([tmp_path])
    with pytest.raises(ValueError, match="no text files given"):
        text.find_files([])
