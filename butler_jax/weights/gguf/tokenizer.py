"""The tokenizer inside a GGUF file: byte-level BPE ("gpt2") or SentencePiece BPE with scores ("llama")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from butler_jax.storage import fits, shown, whole

if TYPE_CHECKING:
    from butler_jax.text import ChatTemplate, Tokenizer

LONGEST_TOKEN = 2048  # characters; the time to derive merges grows with the square of a token's length
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types
WORDS = (  # how Llama 3 and Qwen 2 split a text into words; they differ in the digits of a number
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2 = WORDS.format(digits=r"\p{N}{1,3}"), WORDS.format(digits=r"\p{N}")
CASED = (  # how GPT-4o and Mistral's Tekken do: a word ends where small letters are followed by a capital
    r"[^\r\n\p{{L}}\p{{N}}]?{big}*{small}+{tail}|[^\r\n\p{{L}}\p{{N}}]?{big}+{small}*{tail}|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BIG, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O = CASED.format(big=BIG, small=SMALL, tail=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", digits=r"\p{N}{1,3}")
TEKKEN = CASED.format(big=BIG, small=SMALL, tail="", digits=r"\p{N}")
WHOLE = ("llama-bpe", "tekken")  # under these, a word of the vocabulary becomes one token


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


# tokenizer.ggml.pre -> how a text is split into words before merging
WORD_SPLITTERS = {
    "default": _byte_level,
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": lambda: _words(LLAMA3),
    "dbrx": lambda: _words(LLAMA3),
    "smaug-bpe": lambda: _words(LLAMA3),
    "qwen2": lambda: _words(QWEN2),
    "gpt-4o": lambda: _words(GPT4O),
    "tekken": lambda: _words(TEKKEN),
}
WORD_SPLITTERS["refact"] = WORD_SPLITTERS["smollm"]


def read_tokenizer(fields: dict[str, Any]) -> Tokenizer | None:
    """Make the tokenizer that the metadata of a GGUF file describes; None where it has none.

    Raises:
        ValueError: The kind of tokenizer or word splitting is not supported, or a field is missing or invalid.
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
    types, merges = get("token_type") or [NORMAL] * len(tokens), get("merges") or []
    pre, scores, unknown = get("pre", "default"), get("scores"), get("unknown_token_id", 0)
    wanted = {
        "tokens": (tokens, list[str]),
        "merges": (merges, list[str]),
        "token_type": (types, list[int]),
        "pre": (pre, str),
        "scores": (scores, list[float] | None),
    }
    for name, (value, kind_of_value) in wanted.items():
        if not fits(value, kind_of_value):
            raise ValueError(f"tokenizer.ggml.{name} cannot be {shown(value)}")
    longest = max(map(len, tokens))
    if longest > LONGEST_TOKEN:
        raise ValueError(f"a token has {longest} characters; at most {LONGEST_TOKEN} are supported")
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
            if whole(unknown, "unknown_token_id", least=0) >= len(tokens):
                raise ValueError(f"unknown_token_id {unknown} is no token; ids are 0 ... {len(tokens) - 1}")
            backend = sentencepiece_bpe(tokens, scores, types, unknown, prefix=bool(get("add_space_prefix", True)))
            add_bos = True

        def added(kind: int, special: bool) -> list[AddedToken]:
            chosen = (token for token, one in zip(tokens, types, strict=True) if one == kind)
            return [AddedToken(token, special=special, normalized=False) for token in chosen]

        backend.add_special_tokens(added(CONTROL, True))
        backend.add_tokens(added(USER_DEFINED, False))
    bos, eos = (
        None if get(key) is None else whole(get(key), f"tokenizer.ggml.{key}", least=0)
        for key in ("bos_token_id", "eos_token_id")
    )
    add_bos = bos is not None and get("add_bos_token", add_bos)
    turns = (get(key) for key in ("eot_token_id", "eom_token_id"))
    ends = frozenset(whole(token, "the token that ends a turn", least=0) for token in turns if token is not None)
    template = _chat_template(fields, {"bos_token": bos, "eos_token": eos}, tokens)
    return Tokenizer(backend=backend, bos=bos, eos=eos, add_bos=bool(add_bos), ends=ends, chat_template=template)


def _chat_template(fields: dict[str, Any], special: dict[str, int | None], tokens: list[str]) -> ChatTemplate | None:
    """The chat templates of the metadata: tokenizer.chat_template, and tokenizer.chat_template.NAME."""
    from butler_jax.text import ChatTemplate

    key = "tokenizer.chat_template"
    sources = {"default": fields[key]} if key in fields else {}
    sources |= {name.removeprefix(f"{key}."): value for name, value in fields.items() if name.startswith(f"{key}.")}
    if not fits(list(sources.values()), list[str]):
        raise ValueError(f"{key} must be a text")
    names = {name: tokens[index] for name, index in special.items() if index is not None and index < len(tokens)}
    return ChatTemplate(sources, names) if sources else None


def byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Backend:
    """BPE over bytes that are written as printable characters; `pre` is a name in WORD_SPLITTERS."""
    if pre not in WORD_SPLITTERS:
        raise ValueError(
            f"unknown word splitting {shown(pre)} (tokenizer.ggml.pre); supported: {', '.join(WORD_SPLITTERS)}; "
            "give the model's Hugging Face directory"
        )
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
        ignore_merges=pre in WHOLE,
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
    """SentencePiece's BPE: of all neighbouring pairs, the one whose union has the highest score merges first.

    Characters without a piece become the byte tokens <0x00> to <0xFF>. prefix: a space is put before the text.
    """
    vocab = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind in (NORMAL, USER_DEFINED):
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
