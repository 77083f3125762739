"""Text to token ids and back: a thin dataclass over the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer together with its document borders.

    `bos` and `eos` are token ids or None. `add_bos` tells whether a text starts with `bos` unless the caller
    says otherwise.
    """

    backend: tokenizers.Tokenizer
    bos: int | None = None
    eos: int | None = None
    add_bos: bool = False

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Reads a tokenizer from a Hugging Face directory (or from the path of its tokenizer.json).

        The ids of the first and last token of a text come from tokenizer_config.json, then
        generation_config.json, then config.json. Whether a text starts with the first of them is said by
        `add_bos_token`, or where that is absent by the post-processor of tokenizer.json.

        Raises:
          FileNotFoundError: the directory or its tokenizer.json does not exist.
          ValueError: a file cannot be read as what it should be, or names a token that the vocabulary lacks.
        """
        directory = Path(directory).expanduser()
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
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
            raw = json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises a bare Exception for malformed files
            raise ValueError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        named = _read_json(directory / "tokenizer_config.json")
        numbered = [_read_json(directory / name) for name in ("generation_config.json", "config.json")]

        bos = _border(backend, named, numbered, "bos", path)
        eos = _border(backend, named, numbered, "eos", path)
        add_bos = named.get("add_bos_token")
        if add_bos is None:
            probe = backend.encode("a", add_special_tokens=True).ids
            add_bos = _mentions_template(raw.get("post_processor")) and bos is not None and probe[:1] == [bos]
        if add_bos and bos is None:
            raise ValueError(f"{directory}: add_bos_token is set, but no bos_token or bos_token_id is given.")
        # Borders are added by `encode` alone, so they can never be doubled.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend=backend, bos=bos, eos=eos, add_bos=bool(add_bos))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Token ids of `text`. `bos` forces or forbids the first token; None does what the model's tokenizer
        does.

        Raises ValueError where `bos=True` is asked and the tokenizer has no such token.
        """
        return [*self._first(bos), *self.backend.encode(text, add_special_tokens=False).ids]

    def encode_with_offsets(self, text: str, bos: bool | None = None) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the half-open range of characters it stands for; (0, 0) for the first
        token."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        first = self._first(bos)
        return [*first, *encoding.ids], [*[(0, 0)] * len(first), *encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; border tokens and other special tokens are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json into the directory `path`, made if need be."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(path / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None if self.bos is None else self.backend.id_to_token(self.bos),
            "eos_token": None if self.eos is None else self.backend.id_to_token(self.eos),
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
        }
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _first(self, bos: bool | None) -> list[int]:
        if bos is None:
            bos = self.add_bos
        if not bos:
            return []
        if self.bos is None:
            raise ValueError("bos=True was asked, but this tokenizer has no token that begins a text.")
        return [self.bos]


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """Trains a byte-level BPE: any text can be encoded, digits stand alone, letter case is kept.

    Args:
      texts: the texts to count pairs in, read once.
      vocab_size: number of ids, special tokens and the 256 bytes included.
      special: special tokens, given the first ids; the first of them begins and ends documents.
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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _border(backend, named: dict, numbered: list[dict], which: str, path: Path) -> int | None:
    """The id of the `bos` or `eos` token: by name, then by number (the first, where several are given)."""
    token = named.get(f"{which}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        index = backend.token_to_id(token)
        if index is None:
            raise ValueError(f"{path.parent}/tokenizer_config.json: {which}_token {token!r} is not in {path}.")
        return index
    for config in numbered:
        index = config.get(f"{which}_token_id")
        if isinstance(index, list):
            index = index[0] if index else None
        if index is not None:
            return int(index)
    return None


def _mentions_template(post_processor: dict | None) -> bool:
    """Whether the post-processor adds special tokens (a template), on its own or within a sequence."""
    if not post_processor:
        return False
    parts = post_processor.get("processors", [post_processor])
    return any(part.get("type") in ("TemplateProcessing", "BertProcessing", "RobertaProcessing") for part in parts)
