"""Coloured text is the text, and its colours are the counts."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest

import butler_jax
from butler_jax.evaluation.analysis.coloured_text import colour_tokens


@pytest.fixture(scope="module")
def tiny():
    return butler_jax.load_base("tiny")


@pytest.mark.parametrize("text", ['if a < b && "c" > d:\n    return <b>é</b>', "naïve 🦋🦋 café — 東京", "plain words"])
def test_coloured_text_is_the_text_with_html_escaped(tiny, text):
    tokens = tiny.tokenizer.encode(text)
    counts = np.arange(len(tokens))
    page = colour_tokens(tiny, tokens, counts).html
    assert html.unescape(re.sub(r"<[^>]*>", "", page)) == text == tiny.tokenizer.decode(tokens)
    assert set(re.findall(r"<(/?\w+)", page)) == {"div", "/div", "span", "/span"}
    shown = colour_tokens(tiny, tokens, counts)
    assert "".join(shown.pieces) == text and sum(shown.tokens) == len(tokens)
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown.ansi()) == text
    assert "".join(p for p in shown.plain(least=2)) == text


def test_colours_and_tooltips_tell_the_counts(tiny):
    tokens = tiny.tokenizer.encode("one two three")
    counts = np.zeros(len(tokens))
    counts[-1] = 4
    shown = colour_tokens(tiny, tokens, counts, most=8, title="a <title>")
    spans = re.findall(r"<span title=\"([^\"]*)\"([^>]*)>", shown.html)
    assert len(spans) == len(tokens)
    assert spans[-1][0] == f"token {len(tokens) - 1}: 4 of 8" and "rgba(240, 120, 0, 0.325)" in spans[-1][1]
    assert spans[0] == ("token 0: 0 of 8", "")
    assert shown.ansi().count("\x1b[48;") == 1
    assert shown.plain().endswith(f"[{shown.pieces[-1]}]")
    assert "a &lt;title&gt;" in shown._repr_html_() and shown.html in shown._repr_html_()
    with pytest.raises(ValueError, match="2 tokens and 3 numbers"):
        colour_tokens(tiny, tokens[:2], np.ones(3))
    with pytest.raises(ValueError, match="0 or more"):
        colour_tokens(tiny, tokens[:2], np.array([1.0, -1.0]))
