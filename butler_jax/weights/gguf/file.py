"""A GGUF file as a stored model: metadata becomes a Hugging Face configuration, tensors get Hugging Face names."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from butler_jax.model import FAMILIES, Family, base_config
from butler_jax.storage import number, shown, whole
from butler_jax.weights.gguf.header import check_header
from butler_jax.weights.gguf.sampling import generation_values
from butler_jax.weights.gguf.tokenizer import read_tokenizer
from butler_jax.weights.huggingface import Source
from butler_jax.weights.stored import StoredTensor

if TYPE_CHECKING:
    from butler_jax.text import Tokenizer

FAMILY = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "granite": "granite",
}
INTERLEAVED = (
    "llama",
    "mistral",
    "smollm3",
    "granite",
)  # architectures that store the rows of q and k as rotary pairs, not as two halves
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
TYPES = (*PLAIN, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
BLOCK_VALUES = 1 << 20  # values that are dequantised at a time
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}  # layers of the models whose attention is not scaled by head_dim
MOST_FACTORS = 1 << 14  # values of a rotary table, which has one for each pair of a head's dimensions

TABLES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sinks": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
EXPERT_PARTS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def import_library() -> ModuleType:
    """The package `gguf`. Raises ValueError with the command that installs it."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("reading .gguf files needs the package gguf: pip install 'butler-jax[gguf]'") from error
    return gguf


def open_file(path: Path) -> tuple[Source, Tokenizer | None, dict[str, Any]]:
    """Read the metadata of a GGUF file. Weights are read later, from the tensors of the source.

    Returns:
        The configuration with the tensors, the tokenizer (None where the file holds none), and how tokens are drawn, as
        in generation_config.json.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its architecture or a tensor type is not supported; the file is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    gguf = import_library()
    with path.open("rb") as file:
        begin = file.read(8)
    if begin[:4] != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it does not begin with GGUF")
    if begin[4:6] == bytes(2):
        raise ValueError(f"{path} is big-endian, which is not supported; convert it to little-endian")
    try:
        check_header(path, gguf)
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is truncated or damaged: {path.stat().st_size} bytes, and its header does not fit ({error}). "
            "Download or copy the file again"
        ) from error
    parts = fields.get("split.count", 1)
    if parts != 1:
        raise ValueError(
            f"{path} is one of {shown(parts)} parts of a model; join them with llama-gguf-split --merge, and give the "
            "whole file"
        )
    stored = {t.name: _stored(path, t, gguf) for t in reader.tensors}
    try:
        values = config_values(fields, stored)
        config = base_config(values, rotary_share=True)
        tokenizer = read_tokenizer(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if name in ROPE_TENSORS:
            continue
        part = name.split(".")[2] if name.startswith("blk.") and name.count(".") > 1 else ""
        if fields["general.architecture"] in INTERLEAVED and part in ("attn_q", "attn_k"):
            heads = config.heads if part == "attn_q" else config.kv_heads
            tensor = StoredTensor(tensor.shape, partial(_halves, tensor, heads))
        tensors[tensor_name(name, FAMILIES[config.family])] = tensor
    return Source(config, tensors), tokenizer, generation_values(fields)


def tensor_name(name: str, family: Family) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown tensor keeps its name."""
    pieces = name.split(".")
    if len(pieces) == 4 and pieces[0] == "blk" and pieces[2] in PARTS:
        part = PARTS[pieces[2]]
        if family.fused and pieces[2] == "ffn_up":  # gate and up are one tensor
            part = "mlp.gate_up_proj"
        if family.norms == "sandwich" and pieces[2] == "ffn_norm":
            part = "pre_feedforward_layernorm"
        stem = f"model.layers.{pieces[1]}.{part}"
        return stem if pieces[2] == "attn_sinks" else f"{stem}.{pieces[3]}"
    if len(pieces) == 5 and pieces[0] == "blk" and pieces[2] in EXPERT_PARTS:  # older files of Mixtral
        return f"model.layers.{pieces[1]}.mlp.experts.{pieces[3]}.{EXPERT_PARTS[pieces[2]]}.{pieces[4]}"
    return TABLES.get(name, name)


def config_values(fields: dict[str, Any], stored: dict[str, StoredTensor]) -> dict[str, Any]:
    """The metadata as the content of a Hugging Face config.json. Raises ValueError for a missing or invalid key."""
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILY:
        raise ValueError(
            f"unknown architecture {shown(architecture)} (general.architecture); supported: {', '.join(FAMILY)}"
        )

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{key}", default)

    def need(key: str) -> Any:
        if get(key) is None:
            raise ValueError(f"the metadata lacks {architecture}.{key}")
        return get(key)

    def size(key: str) -> int:
        return whole(need(key), f"{architecture}.{key}")

    heads, width, context = size("attention.head_count"), size("embedding_length"), size("context_length")
    if "token_embd.weight" not in stored:
        raise ValueError("missing tensor token_embd.weight")
    sliding_window = get("attention.sliding_window") or None
    family = FAMILY[architecture]
    if family == "llama":  # GGUF gives three families the architecture llama
        family = "mixtral" if get("expert_count") else "mistral" if sliding_window else "llama"
    if family == "olmo2" and sliding_window:
        family = "olmo3"
    head_dim = whole(get("attention.key_length") or width // heads, f"{architecture}.attention.key_length")
    rope = rope_values(get, stored, context)
    check_arithmetic(get, f"{architecture}.", head_dim, scales=FAMILIES[family].multipliers)
    rotated = whole(get("rope.dimension_count", head_dim), f"{architecture}.rope.dimension_count")
    epsilon = number(need("attention.layer_norm_rms_epsilon"), f"{architecture}.attention.layer_norm_rms_epsilon")
    return {
        "model_type": family,
        "vocab_size": stored["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        **expert_values(get, f"{architecture}."),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": float(str(np.float32(epsilon))),  # 1e-5, not 9.99..e-6
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_gate.bias" in stored,
        "sliding_window": sliding_window,
        **family_values(family, get, width, heads),
        "rope_theta": get("rope.freq_base", 10000.0),
        "partial_rotary_factor": rotated / head_dim,
        "rope_scaling": {**FAMILIES[family].rope, **rope} if rope["rope_type"] == "yarn" else rope,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings"),
    }


def check_arithmetic(get: Any, prefix: str, head_dim: int, *, scales: bool) -> None:
    """Raise ValueError for a key of the metadata that asks for other arithmetic than that of the architecture.

    scales: whether the family has scales of attention and of logits.
    """
    neutral = {"attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.value_length": (head_dim,)}
    if not scales:
        neutral |= {"attention.scale": (0, head_dim**-0.5), "logit_scale": (0, 1)}
    for key, values in neutral.items():
        value = get(key)
        same = isinstance(value, int | float) and any(math.isclose(value, one, rel_tol=1e-5) for one in values)
        if value is not None and not same:
            raise ValueError(
                f"{prefix}{key}={shown(value)} is not supported; it must be {' or '.join(map(str, values))}"
            )


def family_values(family: str, get: Any, width: int, heads: int) -> dict[str, Any]:
    """Settings that some families alone have, as Hugging Face spells them; `get` reads a key of the metadata."""
    found: dict[str, Any] = {
        "final_logit_softcapping": get("final_logit_softcapping"),
        "attn_logit_softcapping": get("attn_logit_softcapping"),
    }
    if FAMILIES[family].full_every is not None:
        pattern = get("attention.sliding_window_pattern")
        if pattern is not None and not isinstance(pattern, list):  # one number: every so many layers one is full
            every = whole(pattern, "attention.sliding_window_pattern")
            pattern = [(layer + 1) % every != 0 for layer in range(get("block_count"))]
        if pattern is not None:
            found["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    if FAMILIES[family].sliding_theta is not None:
        found["rope_local_base_freq"] = get("rope.freq_base_swa")
    if family in GEMMA_27B and get("block_count") == GEMMA_27B[family]:
        found["query_pre_attn_scalar"] = width // heads  # the file does not say it
    elif FAMILIES[family].query_scalar:
        found["query_pre_attn_scalar"] = get("attention.key_length")
    if FAMILIES[family].multipliers:
        found["embedding_multiplier"] = get("embedding_scale") or 1.0
        head_dim = get("attention.key_length") or width // heads
        found["attention_multiplier"] = get("attention.scale") or head_dim**-0.5
        found["residual_multiplier"] = get("residual_scale") or 1.0
        found["logits_scaling"] = get("logit_scale") or 1.0
    return {key: value for key, value in found.items() if value is not None}


def expert_values(get: Any, prefix: str) -> dict[str, Any]:
    """The settings of experts as Hugging Face spells them; `get` reads a key of the metadata."""
    if not get("expert_count"):
        return {}
    if get("expert_shared_count"):
        raise ValueError(
            f"{prefix}expert_shared_count={shown(get('expert_shared_count'))}: experts that every token "
            "takes are not supported"
        )
    found = {
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "norm_topk_prob": bool(get("expert_weights_norm", True)),
    }
    return {key: value for key, value in found.items() if value is not None}


def rope_values(get: Any, stored: dict[str, StoredTensor], context: int) -> dict[str, Any]:
    """The rotary settings as Hugging Face spells them; `get` reads a key of the metadata.

    GGUF stores Llama 3's smoothed scaling as one divisor per frequency. The result has them as both sets of longrope
    factors with an attention factor of 1, which is the same rotation.
    """

    def factors(name: str) -> list[float]:
        if name not in stored:
            raise ValueError(f"missing tensor {name}")
        tensor = stored[name]
        if math.prod(tensor.shape) > MOST_FACTORS:
            raise ValueError(f"tensor {name} of shape {list(tensor.shape)} is no list of factors")
        return tensor.read(0, tensor.shape[0]).astype(np.float32).tolist()

    original = whole(get("rope.scaling.original_context_length") or context, "rope.scaling.original_context_length")
    kind = get("rope.scaling.type") or ("linear" if get("rope.scale_linear", 1.0) != 1.0 else "none")
    factor = number(get("rope.scaling.factor") or get("rope.scale_linear") or 1.0, "rope.scaling.factor")
    if factor <= 0:
        raise ValueError(f"rope.scaling.factor must be above 0, got {factor}")
    if "rope_freqs.weight" in stored:
        if kind not in ("none", "linear"):
            raise ValueError(f"rope.scaling.type is {shown(kind)} beside the tensor rope_freqs.weight: not supported")
        divisors = [value * (factor if kind == "linear" else 1.0) for value in factors("rope_freqs.weight")]
        return {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "factor": 1.0,
            "original_max_position_embeddings": context,
        }
    attention_factor = get("rope.scaling.attn_factor") or get("rope.scaling.yarn_attn_factor")
    attention_factor = None if attention_factor is None else number(attention_factor, "rope.scaling.attn_factor")
    if "rope_factors_long.weight" in stored:
        values = {
            "rope_type": "longrope",
            "short_factor": factors("rope_factors_short.weight"),
            "long_factor": factors("rope_factors_long.weight"),
            "factor": context / original,
            "original_max_position_embeddings": original,
        }
        return values | ({"attention_factor": attention_factor} if attention_factor else {})
    if kind == "longrope":
        raise ValueError("rope.scaling.type is longrope, and the tensor rope_factors_long.weight is missing")
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ValueError(f"unknown rope scaling type {shown(kind)}; supported: none, linear, yarn, longrope")
    values = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
    }
    if attention_factor and attention_factor != 1.0:  # GGUF stores it without YaRN's growth with the factor
        values["attention_factor"] = attention_factor * (0.1 * math.log(factor) + 1.0)
    return values


def _stored(path: Path, tensor: Any, gguf: ModuleType) -> StoredTensor:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type
    if kind.name not in TYPES:
        raise ValueError(f"{path}: tensor {tensor.name} has type {kind.name}; supported are {', '.join(TYPES)}")
    if len(shape) < 2 and kind.name not in PLAIN:
        raise ValueError(f"{path}: tensor {tensor.name} is one row of type {kind.name}; it must be {', '.join(PLAIN)}")
    return StoredTensor(shape, partial(_read_rows, path, int(tensor.data_offset), shape, kind, gguf))


def _read_rows(
    path: Path, offset: int, shape: tuple[int, ...], kind: Any, gguf: ModuleType, start: int, stop: int
) -> np.ndarray:
    """Rows start ... stop-1 in float32, float16 or bfloat16, dequantised a block of rows at a time."""
    columns = math.prod(shape[1:])
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row = columns * size // block

    def raw(first: int, last: int) -> np.ndarray:
        return np.fromfile(path, np.uint8, (last - first) * row, offset=offset + first * row)

    plain = PLAIN.get(kind.name)
    if plain is not None:
        return raw(start, stop).view(plain).reshape(stop - start, *shape[1:])
    rows = np.empty((stop - start, columns), np.float32)
    step = max(1, BLOCK_VALUES // columns)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        rows[first - start : last - start] = gguf.dequantize(raw(first, last).reshape(-1, row), kind)
    return rows.reshape(stop - start, *shape[1:])


def _halves(tensor: StoredTensor, heads: int, start: int, stop: int) -> np.ndarray:
    """Rows start ... stop-1 of q or k [heads*D, E], reordered from interleaved rotary pairs to two halves a head."""
    rows = tensor.shape[0]
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return tensor.read(0, rows)[order[start:stop]]
