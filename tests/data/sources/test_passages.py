"""Passages: how a text is cut, and damaged prepared files."""

from __future__ import annotations

import numpy as np
import pytest

from butler_jax.data.sources import passages, text


def test_cut_loses_nothing_and_keeps_to_its_limit():
    story = "\n\n".join(f"Paragraph {i} " + "word " * (i % 90) for i in range(300)) + "x" * 3000
    pieces = list(passages.cut(story, 1000))
    assert "".join(pieces) == story
    assert max(map(len, pieces)) <= 1000
    assert sum(piece.endswith("\n\n") for piece in pieces) > len(pieces) / 2
    assert list(passages.cut(" \n ")) == []


@pytest.mark.parametrize("left", [0, 10, 0.5, -100, -1, 1 << 16, 3 << 16, None])
def test_a_prepared_file_cut_short_is_named(tmp_path, left):
    """left: bytes, a share of the file, or bytes less; None removes it. Cut at a block of 64 KiB, array_record takes
    it for a file without records."""
    words = np.random.default_rng(0).integers(0, 10**9, (1500, 40))
    (tmp_path / "book.txt").write_text("<|endoftext|>".join(" ".join(map(str, row)) for row in words))
    passages.TextField(text.open_builder([tmp_path / "book.txt"], tmp_path / "data"), "train")[0]
    (path,) = (tmp_path / "data").rglob("*train.array_record*")
    content = path.read_bytes()
    if left is None:
        path.unlink()
    else:
        assert len(content) > 3 << 16
        path.write_bytes(content[: int(len(content) * left) if isinstance(left, float) else left])
    documents = passages.TextField(text.open_builder([tmp_path / "book.txt"], tmp_path / "data"), "train")
    words = rf"the prepared data in {path.parent} are damaged .*{path.name}[^:]*: .*\w.*\); remove that directory"
    with pytest.raises(ValueError, match=words):
        documents[len(documents) // 2]


@pytest.mark.parametrize("content", ["", "{", "{}", "null", "\xff", None])
def test_a_damaged_list_of_prepared_files_is_named(tmp_path, content):
    (tmp_path / "book.txt").write_text("One.<|endoftext|>Two.<|endoftext|>Three.")

    def documents():
        return passages.TextField(text.open_builder([tmp_path / "book.txt"], tmp_path / "data"), "train")

    assert len(documents()) == 2
    (path,) = (tmp_path / "data").rglob("dataset_info.json")
    path.unlink()
    if content is not None:
        path.write_text(content)
    words = rf"the prepared data in {path.parent} are damaged \(dataset_info.json.*remove that directory"
    with pytest.raises(ValueError, match=words):
        documents()


def test_preparing_a_set_logs_one_plain_line(tmp_path, capfd):
    (tmp_path / "book.txt").write_text("a book. " * 500)
    text.open_builder([tmp_path / "book.txt"], tmp_path / "data")
    out, error = capfd.readouterr()
    (line,) = error.splitlines()
    assert out == "" and line.startswith("preparing ") and line.endswith("/1.0.0") and str(tmp_path / "data") in line
    assert not {"\r", "\x1b"} & {*error}
    text.open_builder([tmp_path / "book.txt"], tmp_path / "data")
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_ends_a_preparation_in_one_line(small_disk, tmp_path):
    digits = np.random.default_rng(0).integers(0, 10**9, (1500, 40))
    (tmp_path / "book.txt").write_text("\n".join(" ".join(map(str, row)) for row in digits))
    with pytest.raises(
        OSError, match=rf"{small_disk}/.* cannot be written \(.*No space left.*\); free some space there"
    ):
        text.open_builder([tmp_path / "book.txt"], small_disk / "data")
    assert not list(small_disk.rglob("*unfinished*"))
    assert passages.TextField(text.open_builder([tmp_path / "book.txt"], tmp_path / "data"), "train")[0]
