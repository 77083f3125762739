"""Damaged and hostile tokenizer.json files."""

import base64
import json

import pytest

from benchmarks.fuzz_targets import tokenizer_file
from butler_jax.text.tokenizer import Tokenizer
from butler_jax.weights import load_base
from tests.weights.hostile import (
    change_tokenizer,
    refused,
)


def test_a_panic_of_the_tokenizers_library_is_an_error(small_model):
    """Rust's panics derive from BaseException: `except Exception` would let them through."""
    change_tokenizer(small_model, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    refused(small_model, r"tokenizer\.json is not a tokenizer\.json")


@pytest.mark.parametrize(
    "content", [b"{}", b'{"model": 5}', b"\x80", b'{"a":' * 100_000, b'{"version": "9.0", "model": {}}']
)
def test_a_broken_tokenizer_is_named(small_model, content):
    (small_model / "tokenizer.json").write_bytes(content)
    refused(small_model, r"tokenizer\.json")


@pytest.mark.parametrize("token", [5, ["<s>"], {"content": 5}, "<nowhere>", {"content": {}}])
def test_borders_that_are_no_tokens_are_named(small_model, token):
    (small_model / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
    with pytest.raises(ValueError, match="bos_token"):
        Tokenizer.load(small_model)


def test_whether_a_text_starts_with_the_first_token_is_true_or_false(small_model):
    (small_model / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": "no"}))
    refused(small_model, "add_bos_token must be true or false, got 'no'")


PADDING = {
    "strategy": {"Fixed": 10**12},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<s>",
}


def test_padding_that_a_tokenizer_asks_for_is_never_done(small_model):
    change_tokenizer(small_model, padding=PADDING)
    (small_model / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))  # add_bos is found by a probe
    assert len(Tokenizer.load(small_model).encode("ab")) == 1


def test_replacements_that_blow_a_text_up_are_refused(small_model):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    change_tokenizer(small_model, normalizer={"type": "Sequence", "normalizers": [step] * 40})
    refused(small_model, "its replacements make a text over 4096 times longer")
    change_tokenizer(small_model, normalizer={"type": "Sequence", "normalizers": [step] * 3})
    assert load_base(small_model).tokenizer.encode("a", bos=False) == [1] * 8


def test_a_table_of_characters_that_claims_gigabytes_is_refused(small_model):
    table = base64.b64encode((2**33 - 8 & 0xFFFFFFFF).to_bytes(4, "little") + b"12345678").decode()
    change_tokenizer(small_model, normalizer={"type": "Precompiled", "precompiled_charsmap": table})
    refused(small_model, "its precompiled_charsmap of 12 bytes claims 4294967288")


def test_patterns_that_match_nothing_count_as_growth(small_model):
    step = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}
    change_tokenizer(small_model, normalizer={"type": "Sequence", "normalizers": [step] * 40})
    refused(small_model, "its replacements make a text over 4096 times longer")


def test_a_pattern_that_never_ends_is_ended_by_its_library(small_model):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change_tokenizer(small_model, pre_tokenizer=split)
    tokenizer = Tokenizer.load(small_model)
    with pytest.raises(ValueError, match=r"the tokenizer failed on this text: .*retry-limit"):
        tokenizer.encode("a" * 200 + "b")


def test_a_prompt_outside_the_vocabulary_of_the_tokenizer_is_an_error(small_model):
    model = tokenizer_file()["model"]
    change_tokenizer(small_model, model={**model, "unk_token": "<nowhere>"})
    with pytest.raises(ValueError, match="the tokenizer failed on this text"):
        load_base(small_model).tokenizer.encode("xyz")
