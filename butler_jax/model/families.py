"""The table of model families, and how a Hugging Face configuration becomes a BaseConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from butler_jax.model.config import SIZES, BaseConfig, RopeConfig
from butler_jax.model.other_architectures import refuse_other_architectures
from butler_jax.storage import number, shown, whole


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family differs from plain Llama.

    Attributes:
        qkv_bias, output_bias, mlp_bias: True, False, or the configuration key that holds the answer.
        qk_norm: Queries and keys have an RMS norm per head.
        fused: The projections are stored as qkv_proj and gate_up_proj.
        sliding: Which layers slide: "never", "always" (all, where sliding_window is set), "typed" (all, or those that
            layer_types names) or "switched" (as use_sliding_window, layer_types and max_window_layers say).
        rotary_share: partial_rotary_factor of a head is rotated. Other families pass it over, as transformers does.
        defaults: Values of keys that a configuration of the family leaves out.
    """

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    fused: bool = False
    sliding: str = "never"
    rotary_share: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(
        sliding="typed",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "qwen2": Family(
        qkv_bias=True,
        sliding="switched",
        defaults={
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "max_position_embeddings": 32768,
        },
    ),
    "qwen3": Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        sliding="switched",
        defaults={
            "head_dim": 128,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "max_position_embeddings": 32768,
        },
    ),
    "phi3": Family(
        fused=True,
        sliding="always",
        rotary_share=True,
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
}


FULL, SLIDING = "full_attention", "sliding_attention"


def base_config(values: dict, *, rotary_share: bool = False) -> BaseConfig:
    """Read a Hugging Face configuration.

    Args:
        values: The content of config.json. Rotary settings may be given as rope_theta with rope_scaling, or as
            rope_parameters.
        rotary_share: Whether partial_rotary_factor counts in every family.

    Raises:
        ValueError: The family, rope type or activation is unknown, or a value is missing or invalid; the key is named.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"unknown model family {shown(name)} (config key model_type); supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    refuse_other_architectures(values, qk_norm=family.qk_norm)
    values = {**family.defaults, **values}
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise ValueError(f"the model's config lacks {', '.join(missing)}")
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"activation {shown(activation)} is not supported; it must be 'silu'")

    def flag(setting: bool | str) -> bool:
        return bool(values.get(setting, False)) if isinstance(setting, str) else setting

    heads = whole(values["num_attention_heads"], "num_attention_heads")
    layers = whole(values["num_hidden_layers"], "num_hidden_layers")
    if layers >= SIZES["layers"]:
        raise ValueError(f"num_hidden_layers must be below {SIZES['layers']}, got {shown(layers)}")
    sliding_window, sliding_layers = _sliding(family, values, layers)
    context = whole(values.get("max_position_embeddings") or 2048, "max_position_embeddings")
    return BaseConfig(
        family=name,
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        hidden=values["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or whole(values["hidden_size"], "hidden_size") // heads,
        context=context,
        norm_eps=values.get("rms_norm_eps", 1e-6),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        rope=_rope(values, context, rotary_share or family.rotary_share),
    )


def _sliding(family: Family, values: dict, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """BaseConfig's sliding_window and sliding_layers."""
    sliding_window, kinds = values.get("sliding_window"), _layer_types(family, values)
    if family.sliding == "never" or sliding_window is None:
        return None, ()
    if family.sliding == "switched" and not values.get("use_sliding_window", False):
        return None, ()
    sliding_window = whole(sliding_window, "sliding_window")
    if kinds and family.sliding != "always":
        slides = tuple(kind == SLIDING for kind in kinds)
    elif family.sliding != "switched":
        return sliding_window, ()
    else:
        first = whole(values["max_window_layers"], "max_window_layers", least=0)
        slides = tuple(layer >= first for layer in range(layers))
    return (sliding_window, slides) if any(slides) else (None, ())


def _layer_types(family: Family, values: dict) -> list[str]:
    """The kinds of attention that layer_types names, [] where it names none; a family need not know all of them."""
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ValueError(f"layer_types must be a list of names, got {shown(kinds)}")
    known = {"never": (FULL,), "always": (SLIDING if values.get("sliding_window") else FULL,)}
    for kind in kinds:
        if kind not in known.get(family.sliding, (FULL, SLIDING)):
            raise ValueError(
                f"layer_types names {shown(kind)}, which layers of the family {values['model_type']} are not: it is "
                "another architecture, which is not supported"
            )
    return kinds


def _rope(values: dict, context: int, rotary_share: bool) -> RopeConfig:
    new = values.get("rope_parameters") or {}
    old = values.get("rope_scaling") or {}
    if not (isinstance(new, dict) and isinstance(old, dict)):
        raise ValueError(f"rope_parameters and rope_scaling must be objects, got {shown(new)} and {shown(old)}")
    settings = {**old, **new}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    nested = [key for key, value in settings.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"rotary settings that differ between layers are not supported: {', '.join(nested)}")
    if kind == "su" or (values["model_type"] == "phi3" and kind == "yarn"):
        kind = "longrope"  # early Phi-3 configurations call it by these names
    theta = settings.get("rope_theta") or values.get("rope_theta") or 10000.0
    fraction = settings.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if not rotary_share:
        if kind != "default" and fraction != 1:
            raise ValueError(
                f"partial_rotary_factor={shown(fraction)} with the rope type {shown(kind)} is not supported in the "
                f"family {values['model_type']}"
            )
        fraction = 1.0
    original = None
    if kind in ("llama3", "yarn", "longrope"):
        key = "original_max_position_embeddings"
        original = whole(values.get(key) or settings.get(key) or context, key)
    factor = settings.get("factor")
    if factor is None:
        factor = context / original if original else 1.0
    optional = {
        "attention_factor": settings.get("attention_factor"),
        "low_frequency_factor": settings.get("low_freq_factor"),
        "high_frequency_factor": settings.get("high_freq_factor"),
        "beta_fast": settings.get("beta_fast"),
        "beta_slow": settings.get("beta_slow"),
        "mscale": settings.get("mscale"),
        "mscale_all_dim": settings.get("mscale_all_dim"),
        "truncate": settings.get("truncate"),
        "short_factor": _factors(settings, "short_factor"),
        "long_factor": _factors(settings, "long_factor"),
    }
    return RopeConfig(
        kind=kind,
        theta=number(theta, "rope_theta"),
        fraction=number(fraction, "partial_rotary_factor"),
        factor=number(factor, "the rope factor"),
        original_context=original,
        **{name: value for name, value in optional.items() if value is not None},
    )


def _factors(settings: dict, name: str) -> tuple[float, ...] | None:
    factors = settings.get(name)
    if factors is not None and not isinstance(factors, list):
        raise ValueError(f"{name} must be a list of numbers, got {shown(factors)}")
    return None if factors is None else tuple(factors)
