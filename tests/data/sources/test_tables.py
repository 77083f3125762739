"""Parquet and Arrow files, against pyarrow's writer."""

from __future__ import annotations

import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from butler_jax.data.sources import text
from butler_jax.data.sources.passed_over import PassedOver
from butler_jax.data.sources.tables import open_table
from butler_jax.data.sources.text import read_passages
from butler_jax.data.sources.text_files import find_files

TEXTS = [f"document {i} é€😀 " + "word " * (i % 50) for i in range(700)]


def write_stream(table, path):
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


def write_file(table, path):
    with ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


WRITERS = {
    "a.parquet": parquet.write_table,
    "groups.parquet": lambda table, path: parquet.write_table(table, path, row_group_size=97, compression="zstd"),
    "stream.arrow": write_stream,
    "file.arrow": write_file,
    "a.feather": lambda table, path: feather.write_feather(table, str(path), compression="lz4"),
    "no_suffix": parquet.write_table,
}
KINDS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]


def read(path, passed=None):
    (file,) = find_files([path], print)
    return list(read_passages(file, passed or PassedOver(strict=True)))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_are_documents_in_order_and_the_last_ones_held_out(tmp_path, name, kind):
    if kind == pa.string_view() and name == "a.feather":
        pytest.skip("pyarrow does not write it")
    column = pa.array(TEXTS, pa.string()).cast(kind) if kind != KINDS[2] else pa.array(TEXTS).dictionary_encode()
    WRITERS[name](pa.table({"n": range(700), "text": column, "other": TEXTS[::-1]}), tmp_path / name)
    found = read(tmp_path / name)
    assert [passage for _, passage in found] == TEXTS
    assert [split for split, _ in found] == ["train"] * 686 + ["test"] * 14  # 2 %
    assert [passage for _, passage in read(f"{tmp_path / name}#other")] == TEXTS[::-1]
    assert read(f"{tmp_path / name}#other+text")[0] == ("train", f"{TEXTS[-1]}\n\n{TEXTS[0]}")


def test_rows_that_are_no_text_are_passed_over(tmp_path):
    spoiled = pa.array([b"one", None, b"\xff", b"two"], pa.binary())
    spoiled = pa.Array.from_buffers(pa.string(), 4, spoiled.buffers())
    parquet.write_table(pa.table({"text": spoiled}), tmp_path / "a.parquet")
    passed = PassedOver()
    assert [passage for _, passage in read(tmp_path / "a.parquet", passed)] == ["one", "two"]
    assert passed.count == 2
    assert passed.examples[0].endswith("a.parquet, row 2: text is null")
    assert "a.parquet, row 3: 'utf-8' codec can't decode byte 0xff" in passed.examples[1]
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: text is null"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ({"a": ["x"], "b": ["y"]}, "", r"several text features \(a, b\).*Name one: text:.*a\.parquet#a"),
        ({"n": [1]}, "", r"no text feature \(features: n\)"),
        ({"a": ["x"], "n": [1]}, "#n", "no text feature n; it has: a"),
        ({"a": ["x"]}, "#b", "no text feature b; it has: a"),
        ({"text": pa.array([], pa.string())}, "", "a.parquet is empty"),
    ],
)
def test_the_feature_to_read_has_to_be_clear(tmp_path, columns, asked, message):
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        text.open_builder([f"{tmp_path}/a.parquet{asked}"], str(tmp_path / "data"))


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_damaged_files_are_named(tmp_path, name):
    WRITERS[name](pa.table({"text": TEXTS}), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for damaged in (content[: len(content) // 2], content[:9], b"PAR1" + bytes(100)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} is damaged or of another format .*copy it here again"):
            read(tmp_path / name)


def test_columns_of_one_name_are_refused_by_it(tmp_path):
    parquet.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has several columns of the name text; rename them"):
        read(tmp_path / "a.parquet")


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.parquet cannot be read: .*pip install 'butler-jax\[data\]'"):
        open_table(tmp_path / "a.parquet", "parquet")
