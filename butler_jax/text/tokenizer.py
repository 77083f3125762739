"""A thin dataclass over the `tokenizers` library: text becomes token ids, and token ids become text."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from butler_jax.storage import file_in, open_regular, read_object, shown, whole, write_whole
from butler_jax.text.chat_template import LONGEST_TEMPLATE, ChatTemplate, read_templates

END_OF_TEXT = "<|endoftext|>"
MOST_BYTES = 256 << 20
"""The largest tokenizer.json that is read."""

MORE_TEMPLATES = "additional_chat_templates"  # the folder of a model's further templates, NAME.jinja

LONGEST_GROWTH = 4096
"""The factor by which all replacements of a tokenizer together may lengthen a text."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer together with the tokens that begin and end a document.

    Attributes:
        backend: The tokenizer of the `tokenizers` library.
        bos: Id of the token that begins a document, or None.
        eos: Id of the token that ends a document, or None.
        add_bos: Whether `encode` puts `bos` first by default.
        ends: Ids at which generation ends: `eos`, and what the model's files name besides it.
        chat_template: Makes a text of messages; None where the model has no such template.
    """

    backend: tokenizers.Tokenizer
    bos: int | None = None
    eos: int | None = None
    add_bos: bool = False
    ends: frozenset[int] = frozenset()
    chat_template: ChatTemplate | None = None

    def __post_init__(self):
        if self.eos is not None:
            object.__setattr__(self, "ends", self.ends | {self.eos})

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a tokenizer from a Hugging Face directory.

        `bos` and `eos` come from tokenizer_config.json, then generation_config.json, then config.json. `add_bos` is
        `add_bos_token`, or follows from the post-processor of tokenizer.json. `ends` has `eos` and every
        eos_token_id of generation_config.json, or of config.json where the former names none. The chat templates are
        chat_template.jinja and, by their names, additional_chat_templates/*.jinja. Without such files, they are
        tokenizer_config.json's `chat_template`. The dropout of merges is turned off, so that a text has one encoding.

        Raises:
            FileNotFoundError: The directory or its tokenizer.json does not exist.
            ValueError: A file is invalid, is a link that leaves the directory, or names a token that the vocabulary
                lacks.
        """
        directory = Path(os.path.expanduser(directory))
        path = directory if directory.name == "tokenizer.json" else directory / "tokenizer.json"
        directory = path.parent
        if not directory.is_dir():
            raise FileNotFoundError(f"no such directory: {directory} (a tokenizer is read from its tokenizer.json)")
        if not path.is_file():
            found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(
                f"{directory} has no tokenizer.json (found: {found}). A tokenizer of that format is needed; "
                "models that only bring tokenizer.model or vocab.json have to be converted "
                "once with transformers: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)."
            )
        file_in(directory, path.name)
        raw = read_object(path, most=MOST_BYTES)
        _check_steps(raw, path)
        with named_errors(f"{path} is not a tokenizer.json that `tokenizers` can read"):
            backend = tokenizers.Tokenizer.from_file(str(path))
        # `encode` alone adds bos, so it is never doubled. A file must not ask for padding to any length.
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None
        named = _read_optional(directory, "tokenizer_config.json")
        numbered = [_read_optional(directory, name) for name in ("generation_config.json", "config.json")]

        bos = _border(backend, named, numbered, "bos", path)
        eos = _border(backend, named, numbered, "eos", path)
        add_bos = named.get("add_bos_token")
        if add_bos is None:
            with named_errors(f"{path} describes a tokenizer that fails"):
                probe = backend.encode("a", add_special_tokens=True).ids
            plain = backend.encode("a", add_special_tokens=False).ids
            add_bos = (
                _mentions_template(raw.get("post_processor")) and len(plain) < len(probe) and probe[:1] != plain[:1]
            )
            bos = probe[0] if add_bos else bos  # the token that the model's own tokenizer puts first
        if not isinstance(add_bos, bool):
            raise ValueError(f"{directory}: add_bos_token must be true or false, got {shown(add_bos)}")
        if add_bos and bos is None:
            raise ValueError(f"{directory}: add_bos_token is set, but no bos_token or bos_token_id is given.")
        ends = frozenset(_numbers(numbered, "eos", path))
        template = _chat_template(directory, named)
        return cls(backend=backend, bos=bos, eos=eos, add_bos=add_bos, ends=ends, chat_template=template)

    def require_chat_template(self) -> ChatTemplate:
        """The chat template. Raises ValueError where there is none."""
        if self.chat_template is None:
            raise ValueError(
                "the model has no chat template: neither chat_template.jinja, nor additional_chat_templates/*.jinja, "
                "nor chat_template in tokenizer_config.json, nor tokenizer.chat_template in a .gguf file. Take a model "
                "made for chat, or continue a text"
            )
        return self.chat_template

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def highest(self) -> int:
        """The highest id. It may be above vocab_size - 1, as ids may leave gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=0)

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Encode a text as token ids. bos: whether the token `bos` comes first; None is `add_bos`.

        A special token that is spelled out in the text becomes that token, as with the model's own tokenizer.

        Raises:
            ValueError: bos=True and the tokenizer has no such token, or the text contains a lone surrogate.
        """
        return [*self._first(bos), *self._encode(text).ids]

    def encode_with_offsets(self, text: str, bos: bool | None = None) -> tuple[list[int], list[tuple[int, int]]]:
        """The token ids and the half-open range of characters of each; (0, 0) for `bos`."""
        encoding = self._encode(text, offsets=True)
        first = self._first(bos)
        return [*first, *encoding.ids], [*[(0, 0)] * len(first), *encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into the directory `path`, which is created if need be.

        Ends beside eos are written into generation_config.json.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None if self.bos is None else self.backend.id_to_token(self.bos),
            "eos_token": None if self.eos is None else self.backend.id_to_token(self.eos),
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            named = [{"name": name, "template": one} for name, one in self.chat_template.sources.items()]
            config = {**self.chat_template.tokens, **config, "chat_template": named}
        write_whole(path / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        if self.ends - {self.eos}:
            generation = _read_optional(path, "generation_config.json") | {"eos_token_id": sorted(self.ends)}
            write_whole(path / "generation_config.json", json.dumps(generation, indent=2) + "\n")

    def _encode(self, text: str, *, offsets: bool = False) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has half a character at {error.start}; decode its bytes as UTF-8") from None
        with named_errors("the tokenizer failed on this text"):
            if offsets:
                return self.backend.encode(text, add_special_tokens=False)
            # The same ids. Unlike `encode`, it lets other threads of Python run meanwhile.
            return self.backend.encode_batch_fast([text], add_special_tokens=False)[0]

    def _first(self, bos: bool | None) -> list[int]:
        if bos is None:
            bos = self.add_bos
        if not bos:
            return []
        if self.bos is None:
            raise ValueError("bos=True needs a token that begins a text, and this tokenizer has none; leave bos out")
        return [self.bos]


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """Train a byte-level BPE. It encodes any text, keeps letter case, and gives each digit a token.

    Args:
        vocab_size: Number of ids, special tokens and the 256 bytes included.
        special: Special tokens, which get the first ids. The first of them begins and ends documents.

    Raises:
        ValueError: vocab_size is below the number of bytes and special tokens.
    """
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(special)} special tokens need {least}."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    border = backend.token_to_id(special[0]) if special else None
    return Tokenizer(backend=backend, bos=border, eos=border, add_bos=False)


@contextmanager
def named_errors(message: str) -> Iterator[None]:
    """Turn every error of the tokenizers library into a ValueError "message: reason"."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and Rust panics that are no Exceptions
        raise ValueError(f"{message}: {error}") from error


def _read_optional(directory: Path, name: str) -> dict[str, Any]:
    path = file_in(directory, name)
    return {} if path is None else read_object(path)


def _chat_template(directory: Path, named: dict[str, Any]) -> ChatTemplate | None:
    """The chat templates of a directory, with the names of its special tokens. Files go before tokenizer_config."""
    paths = {"default": file_in(directory, "chat_template.jinja")}
    for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja")):
        paths[path.stem] = file_in(directory, path.name, MORE_TEMPLATES)
    sources = {name: _read_template(path) for name, path in paths.items() if path is not None}
    if not sources and named.get("chat_template") is not None:
        sources = read_templates(named["chat_template"], f"{directory}/tokenizer_config.json")
    spelled = {n: t.get("content") if isinstance(t, dict) else t for n, t in named.items() if n.endswith("_token")}
    tokens = {name: token for name, token in spelled.items() if isinstance(token, str)}
    return ChatTemplate(sources, tokens) if sources else None


def _read_template(path: Path) -> str:
    with open_regular(path) as file:
        raw = file.read(4 * LONGEST_TEMPLATE + 1)  # a character has at most four bytes; a longer one is refused
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def _check_steps(raw: dict, path: Path) -> None:
    """Raise ValueError for steps of a tokenizer.json that would take unbounded memory.

    Replacements multiply: twenty steps a -> aa lengthen a text a million times. A precompiled table of characters
    states its size, and the library allocates that size unchecked.
    """
    growth, left = 1, [part for key, part in raw.items() if key not in ("model", "added_tokens")]
    while left:
        part = left.pop()
        left += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        if not isinstance(part, dict):
            continue
        if part.get("type") == "Replace" and isinstance(part.get("content"), str):
            literal = isinstance(part.get("pattern"), dict) and bool(part["pattern"].get("String"))
            growth *= max(1, len(part["content"]) + (not literal))  # a pattern may match between all letters
        if part.get("type") == "ByteLevel":
            growth *= 2
        if part.get("type") == "Precompiled":
            try:
                table = base64.b64decode(str(part.get("precompiled_charsmap") or ""))
            except ValueError:
                raise ValueError(f"{path}: its precompiled_charsmap is not base64") from None
            size = int.from_bytes(table[:4], "little")
            if size > max(len(table) - 4, 0):
                raise ValueError(f"{path}: its precompiled_charsmap of {len(table)} bytes claims {size}")
        if growth > LONGEST_GROWTH:
            raise ValueError(f"{path}: its replacements make a text over {LONGEST_GROWTH} times longer")


def _border(backend, named: dict, numbered: list[dict], which: str, path: Path) -> int | None:
    """The id of the `bos` or `eos` token, by its name or else by its number (the first of several)."""
    token = named.get(f"{which}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        where = f"{path.parent}/tokenizer_config.json: {which}_token {shown(token)}"
        if not isinstance(token, str):
            raise ValueError(f"{where} must be a text")
        with named_errors(where):
            index = backend.token_to_id(token)
        if index is None:
            raise ValueError(f"{where} is not in {path}.")
        return index
    return next(iter(_numbers(numbered, which, path)), None)


def _numbers(numbered: list[dict], which: str, path: Path) -> list[int]:
    """The ids of the `bos` or `eos` tokens that the first of the configurations with any names."""
    for config in numbered:
        found = config.get(f"{which}_token_id")
        found = found if isinstance(found, list) else [] if found is None else [found]
        if found:
            return [whole(index, f"{path.parent}: {which}_token_id", least=0) for index in found]
    return []


def _mentions_template(post_processor: dict | None) -> bool:
    """Whether the post-processor adds special tokens (a template), on its own or within a sequence."""
    if not post_processor:
        return False
    parts = post_processor.get("processors")
    parts = parts if isinstance(parts, list) else [post_processor]
    return any(
        isinstance(part, dict) and part.get("type") in ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
        for part in parts
    )
