"""A Hugging Face configuration becomes a BaseConfig."""

from __future__ import annotations

from butler_jax.model.config import SIZES, BaseConfig, RopeConfig
from butler_jax.model.expert_keys import expert_settings
from butler_jax.model.families import FAMILIES, Family
from butler_jax.model.other_architectures import refuse_other_architectures
from butler_jax.storage import number, shown, whole

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATION = {  # the name in a configuration -> the name in BaseConfig
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


NEEDED = {  # the settings without which transformers refuses a rope type
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


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
    refuse_other_architectures(values, family)
    values = {**family.defaults, **values}
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise ValueError(f"the model's config lacks {', '.join(missing)}")
    activation = values.get(family.activation) or family.activation_default
    if not isinstance(activation, str) or activation not in ACTIVATION:
        raise ValueError(
            f"activation {shown(activation)} ({family.activation}) is not supported; it must be one of "
            f"{', '.join(ACTIVATION)}"
        )

    def flag(setting: bool | str) -> bool:
        value = values.get(setting) if isinstance(setting, str) else setting
        if not isinstance(value, bool | None):
            raise ValueError(f"{setting} must be true or false, got {shown(value)}")
        return bool(value)

    heads = whole(values["num_attention_heads"], "num_attention_heads")
    layers = whole(values["num_hidden_layers"], "num_hidden_layers")
    if layers >= SIZES["layers"]:
        raise ValueError(f"num_hidden_layers must be below {SIZES['layers']}, got {shown(layers)}")
    rotated = _rotated_layers(family, values, layers)
    sliding_window, sliding_layers = _sliding(family, values, layers, rotated)
    context = whole(values.get("max_position_embeddings") or 2048, "max_position_embeddings")
    width = whole(values["hidden_size"], "hidden_size")
    head_dim = values.get("head_dim") or width // heads
    rope, sliding_rope = _ropes(family, values, context, rotary_share or family.rotary_share)
    return BaseConfig(
        family=name,
        vocab_size=values["vocab_size"],
        width=width,
        **({"hidden": values["intermediate_size"]} | expert_settings(values)),
        layers=layers,
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        context=context,
        norm_eps=values.get("rms_norm_eps", 1e-6),
        tied=flag("tie_word_embeddings"),
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=bool(family.qk_norm),
        joint_qk_norm=family.qk_norm == "joint",
        activation=ACTIVATION[activation],
        norms=family.norms,
        wide_norms=family.wide_norms,
        attention_sinks=family.sinks,
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        rope=rope,
        sliding_rope=sliding_rope if sliding_window is not None and sliding_rope != rope else None,
        rotated_layers=() if all(rotated) else rotated,
        **_scales(family, values, width, head_dim),
    )


def _scales(family: Family, values: dict, width: int, head_dim: int) -> dict[str, float | None]:
    """The scales and caps of a BaseConfig that differ from their defaults."""
    found: dict[str, float | None] = {}
    if family.scaled_embeddings:
        found["embedding_scale"] = width**0.5
    if family.query_scalar and values.get("query_pre_attn_scalar") not in (None, head_dim):
        scalar = number(values["query_pre_attn_scalar"], "query_pre_attn_scalar")
        if scalar <= 0:
            raise ValueError(f"query_pre_attn_scalar must be above 0, got {scalar}")
        found["attention_scale"] = scalar**-0.5
    for name, key in (("attention_softcap", "attn_logit_softcapping"), ("logit_softcap", "final_logit_softcapping")):
        if key in family.soft_caps and values.get(key) is not None:
            found[name] = number(values[key], key)
    if family.multipliers:

        def multiplier(key: str) -> float:
            value = number(values.get(key, 1.0), key)
            if value <= 0:
                raise ValueError(f"{key} must be above 0, got {value}")
            return value

        found["embedding_scale"] = multiplier("embedding_multiplier")
        found["residual_scale"] = multiplier("residual_multiplier")
        found["attention_scale"] = multiplier("attention_multiplier")
        found["logit_scale"] = 1 / multiplier("logits_scaling")
    return found


def _rotated_layers(family: Family, values: dict, layers: int) -> tuple[bool, ...]:
    """Which layers have a rotary embedding."""
    if family.unrotated_every is None:
        return (True,) * layers
    marks = values.get("no_rope_layers")  # 1 for a layer that has one
    if marks is None:
        every = whole(values.get("no_rope_layer_interval") or family.unrotated_every, "no_rope_layer_interval")
        return tuple((layer + 1) % every != 0 for layer in range(layers))
    if not isinstance(marks, list) or len(marks) < layers or any(mark not in (0, 1) for mark in marks):
        raise ValueError(
            f"no_rope_layers must be a list of 0 and 1 for the {layers} layers of num_hidden_layers, got {shown(marks)}"
        )
    return tuple(bool(mark) for mark in marks[:layers])


def _sliding(
    family: Family, values: dict, layers: int, rotated: tuple[bool, ...]
) -> tuple[int | None, tuple[bool, ...]]:
    """BaseConfig's sliding_window and sliding_layers."""
    sliding_window, kinds = values.get("sliding_window"), _layer_types(family, values)
    if kinds and len(kinds) != layers:
        raise ValueError(f"layer_types names {len(kinds)} layers, and num_hidden_layers is {layers}: correct one")
    switch = family.sliding in ("switched", "enabled")
    if family.sliding == "never" or sliding_window is None or (switch and not values.get("use_sliding_window", False)):
        if SLIDING in kinds:
            key = "sliding_window" if sliding_window is None else "use_sliding_window"
            raise ValueError(f"layer_types names {SLIDING}, but {key} is not set: set it, or name {FULL} alone")
        return None, ()
    sliding_window = whole(sliding_window, "sliding_window")
    if kinds and family.sliding not in ("always", "enabled"):
        slides = tuple(kind == SLIDING for kind in kinds)
    elif family.full_every is not None:
        every = whole(values.get("sliding_window_pattern") or family.full_every, "sliding_window_pattern")
        slides = tuple((layer + 1) % every != 0 for layer in range(layers))
    elif family.sliding != "switched":
        return sliding_window, ()
    elif family.unrotated_every is not None:
        slides = tuple(not turned for turned in rotated)
    else:
        first = whole(values.get("max_window_layers") or 0, "max_window_layers", least=0)
        slides = tuple(layer >= first for layer in range(layers))
    return (sliding_window, slides) if any(slides) else (None, ())


def _layer_types(family: Family, values: dict) -> list[str]:
    """The kinds of attention that layer_types names, [] where it names none; a family need not know all of them."""
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ValueError(f"layer_types must be a list of names, got {shown(kinds)}")
    every = (SLIDING if values.get("sliding_window") else FULL,)
    switched = every if values.get("use_sliding_window") else (FULL,)
    known = {"never": (FULL,), "always": every, "enabled": switched}
    for kind in kinds:
        if kind not in known.get(family.sliding, (FULL, SLIDING)):
            raise ValueError(
                f"layer_types names {shown(kind)}, which layers of the family {values['model_type']} are not: it is "
                "another architecture, which is not supported"
            )
    return kinds


def _ropes(family: Family, values: dict, context: int, rotary_share: bool) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding, and that of sliding layers where the family has one for them."""
    if values.get("rope_parameters") is None and values.get("rope_scaling") is None:
        values = {**values, "rope_parameters": dict(family.rope)}
    new = values.get("rope_parameters") or {}
    old = values.get("rope_scaling") or {}
    if not (isinstance(new, dict) and isinstance(old, dict)):
        raise ValueError(f"rope_parameters and rope_scaling must be objects, got {shown(new)} and {shown(old)}")
    nested = [key for key, value in new.items() if isinstance(value, dict)]
    inside = [key for key, value in old.items() if isinstance(value, dict)]
    if inside:
        raise ValueError(f"rope_scaling has settings for {', '.join(inside)}; give them in rope_parameters")
    if nested and (family.sliding_theta is None or not {*nested} <= {FULL, SLIDING}):
        raise ValueError(f"rotary settings that differ between layers are not supported: {', '.join(nested)}")
    mixed = [key for key in (FULL, SLIDING) if new.get(key) is not None and key not in nested]
    if mixed:
        raise ValueError(f"rope_parameters: {mixed[0]} must be an object, got {shown(new[mixed[0]])}")
    full = {**old, **(new.get(FULL) or {})} if nested else {**old, **new}
    rope = _rope(values, full, context, rotary_share)
    if family.sliding_theta is None:
        return rope, None
    # In the older spelling rope_scaling concerns the layers that see everything. There, transformers gives olmo3's
    # sliding layers a base of 500,000 whatever rope_theta says. Its published configurations say 500,000. The code that
    # they came with has one base for all layers, as here.
    own = rope.theta if family.sliding_theta == "rope_theta" else family.sliding_theta
    theta = values.get("rope_local_base_freq") or own
    sliding = {"rope_theta": theta, **(new.get(SLIDING) or {})} if nested else {"rope_theta": theta}
    return rope, _rope(values, sliding, context, rotary_share)


def _rope(values: dict, settings: dict, context: int, rotary_share: bool) -> RopeConfig:
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if not isinstance(kind, str):
        raise ValueError(f"the rope type must be a text, got {shown(kind)}")
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
    absent = [key for key in NEEDED.get(kind, ()) if settings.get(key) is None]
    if absent:
        raise ValueError(f"the rope type {kind} needs {', '.join(absent)}: add it to the rotary settings")
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
