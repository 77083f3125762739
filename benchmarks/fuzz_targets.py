"""The fuzzed functions: every reader of files and texts from elsewhere, with valid inputs to start from.

A target is a function that gets the bytes of one input and reads them as a user's command does. It returns, or raises
one of ALLOWED. For a file, the message has to name its directory.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import zstandard
from pyarrow import ipc, parquet
from rich.console import Console
from safetensors.numpy import save, save_file

from benchmarks import fuzz_hub
from benchmarks.fuzz_seeds import (
    ALLOWED,
    CONFIG,
    LONGROPE,
    NEWER,
    QWEN,
    TENSORS,
    Target,
    encoded,
    tokenizer_file,
    weights,
    write_gguf,
    write_model,
)
from butler_jax.cli.info import inspect, show
from butler_jax.data import parse_spec
from butler_jax.data.sources.passed_over import PassedOver
from butler_jax.data.sources.text import read_passages
from butler_jax.data.sources.text_files import TextFile, find_files
from butler_jax.evaluation import EvalConfig
from butler_jax.evaluation.cells import FILE, Cell, KeptCells
from butler_jax.evaluation.report.report import ReportRow
from butler_jax.evaluation.tasks.local_tasks import FILES, read_samples
from butler_jax.model import base_config
from butler_jax.parallel import parse_hosts
from butler_jax.parallel.mesh import parse_mesh
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.runs import checkpoints, recorded, run_config, saved_predictor
from butler_jax.runs.digests import DIGESTS
from butler_jax.runs.directory import RECORDS
from butler_jax.runs.finished_checkpoints import METADATA
from butler_jax.selection import SelectionConfig, parse_budget
from butler_jax.storage import from_dict, parse_object, read_object, to_dict
from butler_jax.text import Tokenizer, encode
from butler_jax.training import TrainConfig, open_run
from butler_jax.weights import Base, load_base
from butler_jax.weights.gguf import open_file
from butler_jax.weights.huggingface import INDEX, SINGLE, open_safetensors, open_tensors


def targets(directory: Path) -> list[Target]:
    """All targets. Each reads in a directory of its own below `directory`."""
    return [
        make(directory)
        for make in (
            _safetensors,
            _index,
            _gguf,
            _config,
            _tokenizer,
            _tokenizer_config,
            _samples,
            _text,
            _text_files,
            _tables,
            _run,
            _settings,
            _cells,
            _strings,
            _prompts,
            _model,
            _run_directory,
            *fuzz_hub.TARGETS,
        )
    ]


def _read_all(tensors: dict) -> None:
    for tensor in tensors.values():
        tensor.read(0, tensor.shape[0] if tensor.shape else 0)


def _safetensors(root: Path) -> Target:
    path = root / "model.safetensors"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        _read_all(open_safetensors(path))

    small = {"a": np.ones((2, 3), np.float16), "b": np.ones((1, 1, 2), np.float32)}
    return Target("safetensors", (save(weights()), save(small), save({"x": np.ones(3, np.float32)})), run)


def _index(root: Path) -> Target:
    directory = root / "sharded"
    directory.mkdir(exist_ok=True)
    names = sorted(TENSORS)
    placed = {name: f"model-{1 + at % 2}.safetensors" for at, name in enumerate(names)}
    for shard in sorted(set(placed.values())):
        save_file({n: v for n, v in weights().items() if placed[n] == shard}, directory / shard)

    def run(data: bytes) -> None:
        (directory / INDEX).write_bytes(data)
        _read_all(open_tensors(directory))

    return Target("index", encoded({"metadata": {"total_size": 1}, "weight_map": placed}), run)


def _gguf(root: Path) -> Target:
    path = root / "model.gguf"
    seeds = tuple(
        write_gguf(path, **options).read_bytes()
        for options in (
            {},
            {"architecture": "qwen2"},
            {"architecture": "gemma3", "key_length": 4, "sliding_window": 8},
            {"architecture": "gpt-oss", "sliding_window": 8, "expert_count": 4, "expert_used_count": 2},
            {"pieces": True},
            {"quantised": True},
        )
    )

    def run(data: bytes) -> None:
        path.write_bytes(data)
        _read_all(open_file(path)[0].tensors)

    return Target("gguf", seeds, run)


def _config(root: Path) -> Target:
    path = root / "config.json"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        values = read_object(path)
        try:
            base_config(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    return Target("config.json", encoded(CONFIG, QWEN, LONGROPE, *NEWER), run)


def _tokenizer(root: Path) -> Target:
    directory = write_model(root / "tokenizer")

    def run(data: bytes) -> None:
        (directory / "tokenizer.json").write_bytes(data)
        _use(Tokenizer.load(directory))

    plain = tokenizer_file()
    steps = [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
        {"type": "Prepend", "prepend": "_"},
    ]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    rich = {**plain, "normalizer": {"type": "Sequence", "normalizers": steps}, "post_processor": template}
    return Target("tokenizer.json", encoded(plain, rich), run)


def _use(tokenizer: Tokenizer) -> None:
    with contextlib.suppress(ValueError):  # a vocabulary without these letters
        tokenizer.decode(tokenizer.encode("a b <s> c\x00é"))


def _tokenizer_config(root: Path) -> Target:
    directory = write_model(root / "borders")

    def run(data: bytes) -> None:
        (directory / "tokenizer_config.json").write_bytes(data)
        Tokenizer.load(directory)

    token = {"content": "<s>", "special": True}
    values = {
        "bos_token": "<s>",
        "eos_token": token,
        "add_bos_token": True,
        "auto_map": {"AutoTokenizer": ["x.X", None]},
    }
    return Target("tokenizer_config.json", encoded(values), run)


def _samples(root: Path) -> Target:
    lines = {
        "lambada": {"context": "a b", "continuation": " c"},
        "piqa": {"query": "a", "choices": ["b", "c"], "gold": 1},
        "winogrande": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    }
    directory = root / "samples"
    directory.mkdir(exist_ok=True)

    def run(data: bytes) -> None:
        task = list(lines)[data[0] % len(lines) if data else 0]
        (directory / FILES[task]).write_bytes(data[1:])
        read_samples(directory, task)

    seeds = tuple(bytes([at]) + b"\n".join(encoded(line, line)) for at, line in enumerate(lines.values()))
    return Target("samples.jsonl", seeds, run)


def _text(root: Path) -> Target:
    path = root / "text.jsonl"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for strict in (False, True):
            for _ in read_passages(TextFile(path, "records"), PassedOver(strict)):
                pass

    return Target("text.jsonl", (b"\n".join(encoded({"text": "a b"}, {"text": "\u00e9 c", "id": 1})),), run)


def _text_files(root: Path) -> Target:
    directory = root / "texts"
    directory.mkdir(exist_ok=True)
    text = "One two.\r\n\nThree \u00e9\U0001f600.<|endoftext|>Four\n".encode() * 3
    record = b'{"text": "a b"}\n'
    whole = {
        "a.txt": text,
        "a.txt.gz": gzip.compress(text),
        "a.txt.bz2": bz2.compress(text),
        "a.txt.xz": lzma.compress(text),
        "a.txt.zst": zstandard.compress(text) + zstandard.compress(text),
        "a.md": text.decode().encode("utf-16"),
        "a.rst": text.decode().encode("utf-32"),
        "a.jsonl.gz": gzip.compress(record * 9),
        "a.json": record,
    }
    return Target("text files", *_read_texts(directory, whole))


def _tables(root: Path) -> Target:
    directory = root / "tables"
    directory.mkdir(exist_ok=True)
    table, held = pa.table({"text": ["one", None, "two \u00e9"] * 4, "n": range(12)}), io.BytesIO()
    parquet.write_table(table, held, row_group_size=5)
    whole = {"a.parquet": held.getvalue()}
    for name, opening in (("a.arrow", ipc.new_stream), ("a.feather", ipc.new_file)):
        held = io.BytesIO()
        with opening(held, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
        whole[name] = held.getvalue()
    state, splits = b'{"_data_files": [{"filename": "kept.arrow"}]}', b'{"splits": ["train"]}'
    for place in (directory, directory / "train"):
        place.mkdir(exist_ok=True)
        (place / "dataset_info.json").write_text("{}")
        (place / "kept.arrow").write_bytes(whole["a.arrow"])
    (directory / "train" / "state.json").write_bytes(state)
    return Target("tables", *_read_texts(directory, {**whole, "state.json": state, "dataset_dict.json": splits}))


def _read_texts(directory: Path, whole: dict[str, bytes]) -> tuple[tuple[bytes, ...], Callable[[bytes], None]]:
    """Seeds and a reader of files; the first byte of an input says which of them it replaces."""
    names = list(whole)

    def run(data: bytes) -> None:
        name = names[data[0] % len(names) if data else 0]
        path = directory / name
        path.write_bytes(data[1:])
        try:
            saved = name in ("state.json", "dataset_dict.json")
            for file in find_files([directory if saved else path], lambda line: None):
                for _ in read_passages(file, PassedOver()):
                    pass
        finally:
            path.unlink()

    return tuple(bytes([at]) + whole[name] for at, name in enumerate(names)), run


def _run(root: Path) -> Target:
    directory = root / "run"
    directory.mkdir(exist_ok=True)

    def run(data: bytes) -> None:
        (directory / "config.json").write_bytes(data)
        run_config(directory)

    return Target("run config", encoded(to_dict(TrainConfig())), run)


def _settings(root: Path) -> Target:
    kinds = {"t": TrainConfig, "e": EvalConfig, "p": PredictorConfig, "s": SelectionConfig}

    def run(data: bytes) -> None:
        from_dict(kinds.get(data[:1].decode("latin1"), TrainConfig), parse_object(data[1:], "settings"))

    made = (TrainConfig(), EvalConfig(), PredictorConfig(), SelectionConfig(threshold=((0.5,),)))
    seeds = zip(kinds, encoded(*map(to_dict, made)), strict=True)
    return Target("settings", tuple(key.encode() + value for key, value in seeds), run, named=False)


def _cells(root: Path) -> Target:
    directory = root / "cells"
    directory.mkdir(exist_ok=True)

    def run(data: bytes) -> None:
        (directory / FILE).write_bytes(data)
        for cell in KeptCells(directory).cells.values():
            format(cell.rows[0].value, ".4f"), format(cell.seconds, ".0f")

    given = dict(task="needle", metric="accuracy", policy="oracle", budget=0.5, value=1.5, error=None, n=3, sequences=1)
    cell = Cell([ReportRow(**given, unit="samples", seed=0, attended=0.5, where={})], {"map": [[1.0]]}, 2.0)
    return Target("cells.jsonl", (json.dumps({"key": "k", **dataclasses.asdict(cell)}).encode() + b"\n",) * 2, run)


def _strings(root: Path) -> Target:
    readers = (
        parse_mesh,
        parse_hosts,
        parse_spec,
        lambda text: SelectionConfig(budget=parse_budget(text)),
        lambda text: EvalConfig(budgets=text, depths=text, policies=text),
    )

    def run(data: bytes) -> None:
        readers[data[0] % len(readers) if data else 0](data[1:].decode("utf-8", "surrogateescape"))

    seeds = (
        b"\0data=4,model=2,sequence=1",
        b"\1host:123,4,0",
        b"\2python_docs:0.7+text:a.txt,b.txt:0.3",
        b"\x031/4",
        b"\x040.5,0.25",
    )
    return Target("strings", seeds, run, named=False)


def _prompts(root: Path) -> Target:
    base = load_base("tiny")

    def run(data: bytes) -> None:
        encode(
            base.tokenizer,
            base.config.vocab_size,
            data.decode("utf-8", "surrogateescape" if len(data) % 2 else "surrogatepass"),
        )

    seeds = ("The file", "a <|endoftext|> b", "\0\0", "é 漢字 🎉")
    return Target("prompts", tuple(s.encode() for s in seeds), run, named=False)


def _model(root: Path) -> Target:
    """load_base on a directory with the input as one of its files; the first byte selects the file."""
    directory = write_model(root / "model")
    files = ("config.json", SINGLE, "tokenizer.json", "tokenizer_config.json")
    whole = {name: (directory / name).read_bytes() for name in files}

    def run(data: bytes) -> None:
        name = files[data[0] % len(files) if data else 0]
        (directory / name).write_bytes(data[1:])
        try:
            base = load_base(directory)
            assert isinstance(base, Base)
        finally:
            (directory / name).write_bytes(whole[name])

    return Target("load_base", tuple(bytes([at]) + whole[name] for at, name in enumerate(files)), run)


def _run_directory(root: Path) -> Target:
    """All that `butler-jax info` does with a run one of whose files is the input; the first byte says which.

    It has to report whatever it finds: any error is a finding.
    """
    directory = root / "mine"
    base = load_base("tiny")
    config = TrainConfig(steps=2, predictor=PredictorConfig(kind="producer", rank=2, hidden=2), run_dir=directory)
    open_run(directory, config)
    about = saved_predictor.about(base, config.predictor)
    predictor = make_predictor(base.config, config.predictor)
    with (
        recorded(directory, about, 0) as record,
        checkpoints.Checkpoints(directory / "checkpoints", keep=2, about=about) as made,
    ):
        for step in (1, 2):
            made.save(step, {"module": predictor}, {"taken": step}, 1.0 / step)
        record.update(to=2, ended="finished")
    rows = encoded({"step": 1, "loss": 1.5, "seconds": 0.1}, {"step": 2, "loss": 1.25, "validation_loss": 0.5})
    (directory / "metrics.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    files = ("config.json", RECORDS, "metrics.jsonl", f"checkpoints/2/{DIGESTS}", f"checkpoints/2/{METADATA}")
    whole = {name: (directory / name).read_bytes() for name in files}

    def run(data: bytes) -> None:
        name = files[data[0] % len(files) if data else 0]
        (directory / name).write_bytes(data[1:])
        try:
            found = inspect(directory)
            show(found, Console(file=io.StringIO(), width=120))
            json.dumps(found, indent=1).encode()
        except ALLOWED as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error
        finally:
            (directory / name).write_bytes(whole[name])

    lines = {name: text if name.endswith("l") else encoded(json.loads(text))[0] for name, text in whole.items()}
    return Target("run directory", tuple(bytes([at]) + lines[name] for at, name in enumerate(files)), run)
