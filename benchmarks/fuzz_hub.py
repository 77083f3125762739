"""Targets of what is handed on: chat templates, settings of generation, predictors, and what a hub answers."""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants

from benchmarks.fuzz_seeds import ALLOWED, Target, encoded, write_model
from butler_jax.decoding.config import read_sampling
from butler_jax.predictors import CONFIG, WEIGHTS, PredictorConfig, make_predictor
from butler_jax.runs import load_predictor
from butler_jax.storage import read_object
from butler_jax.text import Tokenizer
from butler_jax.weights import download, load_base
from butler_jax.weights.huggingface import open_directory
from tests.tiny_hub import serve

TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": ""}]
TEMPLATES = (
    "<s>{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}{{ '<b>' if add_generation_prompt }}",
    "<s>{%- set ns = namespace(last=0) %}{% for m in messages[1:] %}{% set ns.last = loop.index0 %}"
    "{{ loop.index ~ '/' ~ ns.last }}{% if not tools %}{% continue %}{% endif %}{% endfor %}{{ messages | tojson }}",
    "a {% macro say(x) %}{{ x.split('a')[-1] * 2 }}{% endmacro %}{{ say(messages[0].content) }}"
    "{% if 1 > 2 %}{{ raise_exception('no') }}{% endif %}{{ strftime_now('%Y') }}",
)


@contextlib.contextmanager
def named(directory: Path) -> Iterator[None]:
    """Turn a documented error that does not name the directory into another one."""
    try:
        yield
    except ALLOWED as error:
        if str(directory) not in str(error):
            raise AssertionError(f"the file is not named: {error}") from error
        raise


def _chat_template(root: Path) -> Target:
    """A model's chat_template.jinja, read and applied: errors of the template itself name no file."""
    directory = write_model(root / "chat")

    def run(data: bytes) -> None:
        (directory / "chat_template.jinja").write_bytes(data)
        with named(directory):
            tokenizer = Tokenizer.load(directory)
        tokenizer.require_chat_template().render(TALK)

    return Target("chat template", tuple(text.encode() for text in TEMPLATES), run, named=False)


def _generation(root: Path) -> Target:
    """A model's generation_config.json: its end tokens, and how tokens are drawn."""
    directory = write_model(root / "generation")

    def run(data: bytes) -> None:
        path = directory / "generation_config.json"
        path.write_bytes(data)
        with named(directory):
            Tokenizer.load(directory)
            generation = read_object(path)
        read_sampling(generation)

    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
    seeds = encoded({"eos_token_id": [0, 3], **drawn}, {"eos_token_id": 2, "bos_token_id": 0, "min_p": 0.1})
    return Target("generation_config", seeds, run, named=False)


def _predictor(root: Path) -> Target:
    """The files of `save_pretrained`; the first byte selects one."""
    directory, base = root / "predictor", load_base("tiny")
    config = PredictorConfig(kind="producer", rank=2, hidden=2)
    make_predictor(base.config, config).save_pretrained(directory, base)
    whole = {name: (directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def run(data: bytes) -> None:
        name = list(whole)[data[0] % len(whole) if data else 0]
        (directory / name).write_bytes(data[1:])
        try:
            load_predictor(directory, base)
        finally:
            (directory / name).write_bytes(whole[name])

    return Target("predictor", tuple(bytes([at]) + data for at, data in enumerate(whole.values())), run)


def _hub(root: Path) -> Target:
    """What a hub answers, up to the model's opened directory; the first byte selects the answer."""
    model, cache = write_model(root / "served"), root / "cache"
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    serving = serve()
    hub = serving.__enter__()
    atexit.register(serving.__exit__, None, None, None)
    revision = hub.commit("an-org/model", files)
    listed = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
    about = {"id": "an-org/model", "sha": revision, "siblings": [{"rfilename": name} for name in files]}
    seeds = encoded(about, listed, {"ETag": '"a"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"})
    kinds = ("model", "tree", "headers")

    def run(data: bytes) -> None:
        kind, body = kinds[data[0] % len(kinds) if data else 0], data[1:]
        hub.instead = {} if kind == "headers" else {kind: body}
        hub.headers = {"config.json": _headers(body)} if kind == "headers" else {}
        with _asked_at(hub.address, cache):
            place = download.__wrapped__("an-org/model")
            assert place.resolve().is_relative_to(cache.resolve()), f"{place} is outside of the cache"
            open_directory(place)

    return Target("hub", tuple(bytes([at]) + seed for at, seed in enumerate(seeds)), run, named=False)


def _headers(body: bytes) -> dict[str, str]:
    """Headers from a JSON object; one of characters that a header cannot have loses them."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = {"ETag": body.decode("latin1")}
    given = given if isinstance(given, dict) else {"ETag": given}
    return {_printable(name): _printable(value) for name, value in given.items() if _printable(name)}


def _printable(value: object) -> str:
    return "".join(one for one in str(value)[:2000] if one.isascii() and one.isprintable() and one != ":")


@contextlib.contextmanager
def _asked_at(address: str, cache: Path) -> Iterator[None]:
    """Let huggingface_hub ask this server and keep its files in this directory, which is removed afterwards."""
    mine = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    before = {name: getattr(constants, name) for name in mine}
    try:
        vars(constants).update(mine)
        yield
    finally:
        vars(constants).update(before)
        shutil.rmtree(cache, ignore_errors=True)


TARGETS = (_chat_template, _generation, _predictor, _hub)
