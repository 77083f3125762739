"""JSON files are read completely or refused."""

import pytest

from butler_jax.storage.json_objects import parse_object, read_lines, read_object


def test_a_giant_line_is_refused_without_being_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b"a" * 1000)
    with pytest.raises(ValueError, match="line 2: more than 100 bytes"):
        list(read_lines(path, longest=100))


def test_objects_are_read_whole_or_not(tmp_path):
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
    with pytest.raises(ValueError, match="has 8 bytes; nothing of its kind"):
        read_object(path, most=7)
