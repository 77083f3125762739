"""Compressed and UTF-16 files as UTF-8 bytes, against the writers of each format."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
import zipfile

import pytest
import zstandard

from butler_jax.data.sources import streams
from butler_jax.data.sources.passed_over import PassedOver
from butler_jax.data.sources.streams import read_blocks, text_size
from butler_jax.data.sources.text import read_passages
from butler_jax.data.sources.text_files import TextFile

WRITERS = {
    "a.txt": lambda data: data,
    "a.txt.gz": gzip.compress,
    "parts.txt.gz": lambda data: gzip.compress(data[:70_001]) + gzip.compress(data[70_001:]),
    "a.txt.bz2": bz2.compress,
    "a.txt.xz": lzma.compress,
    "a.txt.zst": zstandard.ZstdCompressor().compress,
    "parts.txt.zst": lambda data: zstandard.compress(data[:70_001]) + zstandard.compress(data[70_001:]),
    "long.txt.zst": zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    ).compress,
    "no_suffix": gzip.compress,
    "utf-16.txt": lambda data: data.decode().encode("utf-16"),
    "utf-16-be.txt": lambda data: b"\xfe\xff" + data.decode().encode("utf-16-be"),
    "utf-32.txt": lambda data: data.decode().encode("utf-32"),
    "utf-16.txt.gz": lambda data: gzip.compress(data.decode().encode("utf-16")),
}


@pytest.fixture(scope="module")
def plain() -> bytes:
    """A text of 400 KB with characters of one to four bytes."""
    dice = random.Random(0)
    lines = ("".join(dice.choices("abcdefgh é€😀\u2028", k=dice.randrange(300))) for _ in range(1500))
    return "\n".join(lines).encode()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("block", [1 << 20, 999])
def test_every_form_of_a_text_gives_the_same_bytes_and_passages(tmp_path, monkeypatch, plain, name, block):
    monkeypatch.setattr(streams, "BLOCK", block)
    path = tmp_path / name
    path.write_bytes(WRITERS[name](plain))
    blocks = list(read_blocks(path))
    assert b"".join(each.data for each in blocks) == plain
    assert text_size(path) == len(plain)
    assert all(each.data.endswith(b"\n") for each in blocks[:-1])
    for each in blocks[:: len(blocks) // 3 or 1]:
        assert plain[each.start : each.end] == each.data and each.number == plain[: each.start].count(b"\n") + 1
    (tmp_path / "plain").write_bytes(plain)
    expected = list(read_passages(TextFile(tmp_path / "plain", "text"), PassedOver()))
    assert {split for split, _ in expected} == {"train", "test"}
    assert list(read_passages(TextFile(path, "text"), PassedOver())) == expected


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("a.txt", "utf-32.txt", "utf-16-be.txt")])
def test_a_file_that_was_cut_short_is_named(tmp_path, plain, name):
    (tmp_path / name).write_bytes(WRITERS[name](plain)[:-1])
    with pytest.raises(ValueError, match=rf"{name} ends too early .*copy it here again"):
        list(read_blocks(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.txt.zst"])
def test_a_damaged_file_is_named(tmp_path, plain, name):
    data = bytearray(WRITERS[name](plain))
    for at in range(len(data) // 2, len(data) // 2 + 40):
        data[at] ^= 0x55
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} (is damaged|ends too early).*copy it here again"):
        list(read_blocks(tmp_path / name))


def test_half_a_character_of_utf_16_spoils_its_line_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\n".encode("utf-16") + b"\x00\xd8" + "\ntwo\n".encode("utf-16-le"))
    passed = PassedOver()
    text = "".join(passage for _, passage in read_passages(TextFile(tmp_path / "a.txt", "text"), passed))
    assert text == "one\ntwo\n" and passed.count == 1 and "a.txt, line 2: byte 0xed" in passed.examples[0]


def packed(kind: str) -> bytes:
    held = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(held, "w") as archive:
            archive.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=held, mode="w:gz") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
    return held.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", packed("zip"), "a.zip is a zip archive; unpack it first"),
        ("a.tar.gz", packed("tar"), "a.tar.gz is a tar archive; unpack it first"),
        ("a.pdf", b"%PDF-1.7 ...", "a.pdf is a PDF document"),
        ("a.parquet.gz", gzip.compress(b"PAR1..."), "a.parquet.gz is a compressed parquet file"),
        ("a.gz", b"some text", "a.gz is named .gz, and its bytes are not those of gzip: .* not compressed"),
        ("a.gz", lzma.compress(b"some text"), "a.gz is named .gz, and .* compressed by xz and needs another name"),
        ("a.txt", "some text".encode("utf-16-be"), "UTF-16 text without a mark; convert .* iconv -f utf-16le"),
        ("a.bin", bytes(100), "a.bin is binary"),
    ],
    ids=str.split("zip tar pdf parquet uncompressed xz utf-16 binary"),  # of the contents, gzip's hold the time
)
def test_what_is_no_text_is_told_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        streams.open_text(tmp_path / name)


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, plain):
    (tmp_path / "a.zst").write_bytes(WRITERS["a.txt.zst"](plain))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    monkeypatch.setitem(__import__("sys").modules, "compression", None)
    with pytest.raises(ImportError, match=r"a\.zst cannot be read: .*pip install 'butler-jax\[data\]'"):
        streams.open_text(tmp_path / "a.zst")


def test_reading_holds_a_block_at_a_time(tmp_path):
    """64 MiB of lines: a few MiB of blocks and buffers exist together."""
    import tracemalloc

    with gzip.open(tmp_path / "a.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(os.urandom(1 << 10).hex().encode() * 511 + b"\n" * 2048)
    tracemalloc.start()
    try:
        assert text_size(tmp_path / "a.gz") >= 64 << 20
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
