"""The tokenizer inside a GGUF file: byte-level BPE ("gpt2") or SentencePiece BPE with scores ("llama")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from butler_jax.storage import fits, shown, whole

if TYPE_CHECKING:
    from butler_jax.text import Tokenizer

LONGEST_TOKEN = 2048  # characters; every way to cut a token in two is tried
CONTROL, USER_DEFINED = 3, 4  # token types; the others are plain vocabulary
WORDS = (  # how Llama 3 and Qwen 2 cut a text into words; they differ in the digits of a number
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2 = WORDS.format(digits=r"\p{N}{1,3}"), WORDS.format(digits=r"\p{N}")


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


# tokenizer.ggml.pre -> how texts are cut into words before merging
WORD_SPLITTERS = {
    "default": _byte_level,
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": lambda: _words(LLAMA3),
    "qwen2": lambda: _words(QWEN2),
}


def read_tokenizer(fields: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that GGUF metadata describes; None where there is none.

    Raises ValueError for a kind of tokenizer or word splitting that is not supported, naming it.
    """
    from butler_jax.text import Tokenizer, named_errors

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{key}", default)

    kind = get("model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"unknown tokenizer {shown(kind)} (tokenizer.ggml.model); supported: gpt2 (byte-level BPE) and llama "
            "(SentencePiece BPE)"
        )
    tokens = get("tokens")
    if not tokens:
        raise ValueError("the metadata lacks tokenizer.ggml.tokens")
    types, merges = get("token_type") or [1] * len(tokens), get("merges") or []
    pre, scores, unknown = get("pre", "default"), get("scores"), get("unknown_token_id", 0)
    for name, value, wanted in (
        ("tokens", tokens, list[str]), ("merges", merges, list[str]), ("token_type", types, list[int]),
        ("pre", pre, str), ("scores", scores, list[float] | None),
    ):  # fmt: skip
        if not fits(value, wanted):
            raise ValueError(f"tokenizer.ggml.{name} cannot be {shown(value)}")
    longest = max(map(len, tokens))
    if not longest <= LONGEST_TOKEN:
        raise ValueError(f"a token has {longest} characters; none has more than {LONGEST_TOKEN}")
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml has {len(tokens)} tokens, but {len(types)} types")
    with named_errors("the metadata describes no tokenizer that `tokenizers` can make"):
        if kind == "gpt2":
            backend = byte_level_bpe(tokens, merges, pre)
            add_bos = pre == "llama-bpe"
        else:
            if not scores:
                raise ValueError("the metadata lacks tokenizer.ggml.scores")
            if len(scores) != len(tokens):
                raise ValueError(f"tokenizer.ggml has {len(tokens)} tokens, but {len(scores)} scores")
            if not whole(unknown, "unknown_token_id", least=0) < len(tokens):
                raise ValueError(f"unknown_token_id {unknown} is no token")
            backend = sentencepiece_bpe(tokens, scores, types, unknown, prefix=bool(get("add_space_prefix", True)))
            add_bos = True
        for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
            added = [
                AddedToken(t, special=special, normalized=False)
                for t, n in zip(tokens, types, strict=True)
                if n == wanted
            ]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
    bos, eos = (
        None if get(key) is None else whole(get(key), f"tokenizer.ggml.{key}", least=0)
        for key in ("bos_token_id", "eos_token_id")
    )
    add_bos = bos is not None and get("add_bos_token", add_bos)
    return Tokenizer(backend=backend, bos=bos, eos=eos, add_bos=bool(add_bos))


def byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Backend:
    """BPE over bytes written as printable characters; `pre` names how texts are cut into words."""
    if pre not in WORD_SPLITTERS:
        raise ValueError(
            f"unknown word splitting {shown(pre)} (tokenizer.ggml.pre); supported: {', '.join(WORD_SPLITTERS)}"
        )
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
        ignore_merges=pre == "llama-bpe",  # a word that is in the vocabulary is taken whole
    )
    backend = Backend(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = WORD_SPLITTERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_bpe(
    tokens: list[str], scores: list[float], types: list[int], unknown: int, *, prefix: bool
) -> Backend:
    """SentencePiece's BPE: of all neighbouring pieces, the pair whose union scores highest merges first.

    prefix: a text begins with a space. What the pieces do not cover becomes bytes, <0x00> to <0xFF>.
    """
    vocab = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind in (1, USER_DEFINED):
            pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            ranked += [(-score, vocab[a], vocab[b], a, b) for a, b in pairs if a in vocab and b in vocab]
    ranked.sort(key=lambda entry: entry[:3])
    model = models.BPE(
        vocab=vocab,
        merges=[(a, b) for *_, a, b in ranked],
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(decoding + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend
