"""A small model of 61 tokens that are single characters, for the tests of decoding."""

from __future__ import annotations

from types import SimpleNamespace

from butler_jax.model import BaseConfig

BASE = BaseConfig(
    family="llama", vocab_size=61, width=32, hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, context=96
)
PROMPTS = [[5, 9, 2, 40, 17, 3, 8, 8, 21, 30, 11], [7], [1, 2, 3, 4, 5]]


class Letters:
    """A tokenizer of single characters."""

    bos, eos, ends = None, 60, frozenset({60})
    backend = SimpleNamespace(token_to_id=lambda text: ord(text) - 65 if len(text) == 1 else None)

    def encode(self, text):
        return [ord(c) - 65 for c in text]

    def decode(self, ids):
        return "".join(chr(65 + i) for i in ids)
