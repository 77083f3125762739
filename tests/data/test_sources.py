"""Data sets: sentences are many and distinct, samples are as described, files become passages once."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from butler_jax.data.sources import coreference, passages, prepared, python_docs, text
from butler_jax.text.tokenizer import train_bpe


def test_every_kind_has_a_hundred_sentences_and_none_is_repeated():
    written = coreference.sentences()
    introductions = [introduction for introduction, _ in written.introductions]
    questions = [question for _, question in written.introductions] + list(written.questions)
    arithmetic = [template for _, template in written.arithmetic]
    for kind in (introductions, questions, written.philosophy, written.food, arithmetic):
        assert len(kind) >= 100
    everything = [*introductions, *questions, *written.philosophy, *written.food, *arithmetic]
    assert len(set(everything)) == len(everything)
    assert all(introduction.count("{name}") == 1 for introduction in introductions)
    assert all("?" in question or "name" in question or question.count(".") for question in questions)


def test_samples_hold_about_250_words_and_end_with_the_name():
    for index in range(400):
        sample = coreference.sample(7, index, "test")
        least, most = coreference.WORDS
        assert least <= len(sample.text.split()) <= most
        assert sample.text[sample.last_start :] == sample.name == sample.name.lower()
        assert sample.text[sample.name_start :].startswith(sample.name)
        assert sample.text.count(sample.name) == 2
        assert "{" not in sample.text and "  " not in sample.text


def test_samples_follow_from_seed_index_and_split_alone():
    assert coreference.sample(3, 5) == coreference.sample(3, 5)
    texts = {
        coreference.sample(seed, i, split).text for seed in (0, 1) for i in range(40) for split in ("train", "test")
    }
    assert len(texts) == 160


def test_names_of_train_and_test_are_disjoint_and_endless():
    train = {coreference.sample(0, i, "train").name for i in range(1500)}
    test = {coreference.sample(0, i, "test").name for i in range(1500)}
    assert not train & test
    assert len(train) == len(test) == 1500
    assert {coreference.name_split(name) for name in train} == {"train"}


def test_last_mention_tokens_decode_to_the_name():
    tokenizer = train_bpe((coreference.sample(0, i).text for i in range(60)), 600)
    for index in range(50):
        sample = coreference.sample(1, index, "test")
        tokens, mask = coreference.last_mention_mask(tokenizer, sample)
        assert tokens == tokenizer.encode(sample.text)
        marked = [token for token, last in zip(tokens, mask, strict=True) if last]
        assert tokenizer.decode(marked) == " " + sample.name
        assert mask == sorted(mask) and len(marked) >= 2


def test_arithmetic_is_true():
    from random import Random

    # The text is read back: its numbers, in the order of the template's fields, must satisfy the operation.
    holds = {
        "add": lambda n: n["a"] + n["b"] == n["c"],
        "sub": lambda n: n["a"] - n["b"] == n["c"],
        "mul": lambda n: n["a"] * n["b"] == n["c"],
        "div": lambda n: n["a"] == n["b"] * n["c"],
        "rest": lambda n: divmod(n["a"], n["b"]) == (n["c"], n["d"]) and n["d"] > 0,
        "three": lambda n: n["a"] + n["b"] + n["c"] == n["d"],
        "net": lambda n: n["a"] + n["b"] - n["c"] == n["d"],
        "double": lambda n: 2 * n["a"] == n["b"],
        "square": lambda n: n["a"] ** 2 == n["b"],
        "percent": lambda n: n["a"] * n["b"] == 100 * n["c"],
    }
    for number, (operation, template) in enumerate(coreference.sentences().arithmetic):
        sentence = coreference.arithmetic_sentence(Random(number), operation, template)
        fields = re.findall(r"{(\w)}", template)
        values = dict(zip(fields, map(int, re.findall(r"\d+", sentence)), strict=True))
        assert holds[operation](values), sentence
        assert min(values.values()) > 0


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='dev' is unknown"):
        coreference.sample(0, 0, "dev")


def test_cut_loses_nothing_and_keeps_to_its_limit():
    story = "\n\n".join(f"Paragraph {i} " + "word " * (i % 90) for i in range(300)) + "x" * 3000
    pieces = list(passages.cut(story, 1000))
    assert "".join(pieces) == story
    assert max(map(len, pieces)) <= 1000
    assert sum(piece.endswith("\n\n") for piece in pieces) > len(pieces) / 2
    assert list(passages.cut(" \n ")) == []


def test_python_docs_reads_sources_without_importing_them(tmp_path, monkeypatch):
    long = "Text about something. " * 12
    package = tmp_path / "package"
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {{'loops': {long!r}, 'tiny': 'x'}}\n")
    for skipped in ("test", "site-packages", "idlelib"):
        (package / skipped).mkdir(parents=True)
        (package / skipped / "module.py").write_text(f'"""{long} skipped"""')
    (package / "__init__.py").write_text(f'raise SystemExit\n\ndef f(a, /, b):\n    """{long}"""\n')
    (package / "later.py").write_text(
        f'"""short"""\nclass A:\n    """{long}"""\n    def g(self):\n        """{long}g"""\n'
        f"add_newdoc('package', 'h', '''{long}h''')\n"
    )
    (package / "broken.py").write_text("def (:")
    monkeypatch.setattr(python_docs, "LIBRARIES", ())
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = dict(python_docs.read_documents())
    # The second copy of `long`, as the docstring of A, is left out.
    assert documents == {
        "topic loops": long.strip() + "\n",
        "package": f"package.f(a, b)\n\n{long.strip()}\n",
        "package.later": f"package.later.A.g(self)\n\n{long}g\n\n\npackage.h\n\n{long}h\n",
    }


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    return python_docs.open_builder(str(tmp_path_factory.mktemp("docs")))


def test_python_docs_is_megabytes_of_text_with_disjoint_splits(docs):
    train, test = docs.as_data_source("train"), docs.as_data_source("test")
    assert sum(len(record["text"]) for record in train) > 3_000_000
    assert len(test) >= 5
    assert not {record["source"] for record in train} & {record["source"] for record in test}
    assert max(len(record["text"].decode()) for record in train) <= passages.PASSAGE_CHARACTERS


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


def test_a_text_cut_inside_a_character_is_told_so(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes("one\ntwo é".encode()[:-1])
    with pytest.raises(ValueError, match=rf"{path} is not UTF-8: byte 0xc3 at offset 8 .*ends inside a character"):
        text.open_builder([path], tmp_path / "data")
    path.write_bytes("one é".encode()[:-1] + b"\ntwo")  # not at the end
    with pytest.raises(ValueError, match=r"at offset 4 .*Convert it first"):
        text.open_builder([path], tmp_path / "data")


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


def test_missing_files_and_empty_directories_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such text file or directory: .*nowhere"):
        text.find_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no text in directory"):
        text.find_files([tmp_path])
    with pytest.raises(ValueError, match="no text files given"):
        text.find_files([])


class Letters(tfds.core.GeneratorBasedBuilder):
    """Twenty letters to open by name."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = passages.PassageBuilder.code_path
    KEYS = ("article", "label")

    def _info(self):
        kinds = {"article": tfds.features.Text(), "label": tfds.features.Scalar(dtype=np.int32)}
        features = tfds.features.FeaturesDict({key: kinds[key] for key in self.KEYS})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(100):
            values = {"article": f"Dear {i}", "label": i}
            yield i, {key: values[key] for key in self.KEYS}


class Numbers(Letters):
    """A set without text."""

    KEYS = ("label",)


def test_a_prepared_set_opens_by_name_with_its_last_part_held_out(tmp_path):
    Letters(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    train = prepared.open_prepared_set("letters", "train", str(tmp_path))
    test = prepared.open_prepared_set("letters:1.0.0", "test", str(tmp_path))
    read = [train[i] for i in range(len(train))] + [test[i] for i in range(len(test))]
    assert len(test) == 2 and sorted(read) == sorted(f"Dear {i}" for i in range(100))


def test_sets_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no_such_set.*tfds build no_such_set"):
        prepared.open_prepared_set("no_such_set", "train", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'letters' is not prepared"):
        prepared.open_prepared_set("letters", "train", str(tmp_path))
    Numbers(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(ValueError, match=r"numbers has no text feature \(features: label\)"):
        prepared.open_prepared_set("numbers", "train", str(tmp_path))
    builder = Letters(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    info = builder.data_path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="prepared as tfrecord, which has no random access"):
        prepared.open_prepared_set("letters", "train", str(tmp_path))
