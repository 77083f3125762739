"""Configurations of all families, as transformers writes them and as older files spell them."""

import re

import pytest

from butler_jax.model.families import FAMILIES
from butler_jax.model.hugging_face_config import FULL, SLIDING, base_config

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config(family="llama", **values):
    return base_config({"model_type": family, **SIZES, **values})


def test_unknown_family_is_named_with_the_supported_ones():
    with pytest.raises(ValueError, match=f"unknown model family 'gpt2'.*{', '.join(FAMILIES)}"):
        config("gpt2")


def test_missing_sizes_are_named():
    with pytest.raises(ValueError, match="lacks hidden_size, num_hidden_layers"):
        config(hidden_size=None, num_hidden_layers=None)


def test_unknown_activation_and_rope_type_are_named():
    with pytest.raises(ValueError, match=r"activation 'relu2' \(hidden_act\)"):
        config(hidden_act="relu2")
    with pytest.raises(ValueError, match=r"activation 'relu2' \(hidden_activation\)"):
        config("gemma3_text", hidden_activation="relu2")
    for spelling in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match="unknown rope type 'dynamic'"):
            config(**{spelling: {"rope_type": "dynamic", "factor": 2.0}})


def test_rotary_settings_per_layer_kind_are_refused():
    with pytest.raises(ValueError, match="full_attention"):
        config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}})


def test_longrope_factors_of_the_wrong_number_are_refused():
    with pytest.raises(ValueError, match=r"8 short and long factors, got \[3, 8\]"):
        config(rope_scaling={"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 8, "factor": 2.0})


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_rotary_settings_mean_the_same(family):
    """In families whose sliding layers have a rotary embedding of their own, both concern the other layers."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    old = config(family, rope_theta=5e5, rope_scaling=scaling)
    assert old == config(family, rope_parameters={**scaling, "rope_theta": 5e5})
    assert old.rope.theta == 5e5 and old.rope.kind == "llama3"


def test_a_share_of_a_head_is_rotated_where_the_family_has_it():
    for spelled in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        others = [family for family in FAMILIES if family != "gpt_oss"]  # yarn, which refuses a share below
        shares = {family: config(family, **spelled).rope.fraction for family in others}
        assert shares == dict.fromkeys(others, 1.0) | {"phi3": 0.5}
        scaled = {**spelled, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        assert config("phi3", **scaled).rope.fraction == 0.5
        with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5 with the rope type 'linear'"):
            config("qwen2", **scaled)


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"type": "linear", "factor": None}, "factor"),
        ({"rope_type": "yarn", "beta_fast": 8}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}, "low_freq_factor, high_freq_factor"),
    ],
)
def test_rotary_settings_that_transformers_refuses_as_incomplete_are_refused(settings, absent):
    import transformers

    if "factor" not in settings:
        with pytest.raises(KeyError, match=f"Missing required keys.*{absent}"):
            transformers.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **settings})
    kind = settings.get("rope_type", "linear")
    for spelling in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match=f"the rope type {kind} needs {absent}"):
            config(**{spelling: dict(settings)})


def test_olmo3_in_its_older_spelling_is_that_of_transformers():
    """The rotary settings of allenai/Olmo-3-1025-7B; yarn concerns the layers that see everything."""
    import transformers

    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
    scaling |= {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1}
    old = {"rope_theta": 500000, "max_position_embeddings": 65536, "sliding_window": 4096}
    theirs = transformers.Olmo3Config(**SIZES, **old, rope_scaling=dict(scaling)).to_dict()
    ours = config("olmo3", **old, rope_scaling=scaling)
    assert ours == config("olmo3", **{key: theirs[key] for key in ("rope_parameters", *old) if key != "rope_theta"})
    assert (ours.rope.kind, ours.rope.theta, ours.sliding_rope.kind, ours.sliding_rope.theta) == (
        *("yarn", 5e5),
        *("default", 5e5),
    )


def test_rope_theta_alone_is_the_default_kind():
    assert config(rope_theta=1e6, rope_scaling=None).rope.theta == 1e6
    assert config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}) == config(rope_theta=1e6)
    assert config().rope.theta == 10000.0


def test_served_layers_see_everything_where_any_does():
    assert config("llama").served == (False, True, True, True)
    assert config("mistral", sliding_window=8).served == (False, True, True, True)
    kinds = ["full_attention", "sliding_attention"]
    assert config("mistral", sliding_window=8, layer_types=kinds * 2).served == (False, False, True, False)
    assert config("mistral", sliding_window=8, layer_types=kinds[::-1] * 2).served == (False, True, False, True)
    first = [kinds[0], *[kinds[1]] * 3]  # layer 0 alone sees everything, and is dense anyway
    assert config("mistral", sliding_window=8, layer_types=first).served == (False, True, True, True)


def test_sliding_windows_follow_each_family():
    assert config("llama", sliding_window=8).sliding == (False,) * 4
    assert config("mistral", sliding_window=8).sliding == (True,) * 4
    assert config("mistral", sliding_window=None).sliding_window is None
    assert config("phi3", sliding_window=8).sliding_window == 8
    kinds = ["full_attention", "sliding_attention"] * 2
    assert config("mistral", sliding_window=8, layer_types=kinds).sliding == (False, True, False, True)
    assert config("mistral", sliding_window=8, layer_types=None).sliding == (True,) * 4
    assert config("mistral", sliding_window=None, layer_types=["full_attention"] * 4).sliding == (False,) * 4
    assert config("llama", layer_types=["full_attention"] * 4) == config("llama")
    for family, kind in (("llama", SLIDING), ("phi3", FULL), ("mistral", "chunked_attention"), ("qwen3", "linear")):
        with pytest.raises(ValueError, match=f"layer_types names '{kind}', which layers of the family {family}"):
            config(family, sliding_window=8, layer_types=[kind] * 4)
    for sliding_window in (-5, 0, 2.5, "8"):
        with pytest.raises(ValueError, match="sliding_window must be a whole number"):
            config("mistral", sliding_window=sliding_window)
    assert config("qwen2", sliding_window=8, max_window_layers=2).sliding_window is None
    switched = {"use_sliding_window": True, "sliding_window": 8}
    assert config("qwen2", **switched, max_window_layers=2).sliding == (False, False, True, True)
    assert config("qwen2", **switched).sliding_window is None  # from layer 28 on, where nothing else is said
    deep = config("qwen2", **switched, num_hidden_layers=30)
    assert deep.sliding == (False,) * 28 + (True,) * 2
    kinds = ["sliding_attention", "full_attention"] * 2
    assert config("qwen3", **switched, layer_types=kinds).sliding == (True, False, True, False)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("bailing_hybrid", "kv_lora_rank"),
        ("cohere", "logit_scale"),
        ("deepseek_v3", "n_routed_experts"),
        ("exaone4", "sliding_window_pattern"),
        ("falcon", "multi_query"),
        ("falcon_h1", "mamba_d_state"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma3_text", "query_pre_attn_scalar"),
        ("glm4_moe", "n_routed_experts"),
        ("gpt_oss", "num_local_experts"),
        ("gptj", "rotary_dim"),
        ("lfm2", "conv_L_cache"),
        ("llama4_text", "attention_chunk_size"),
        ("mixtral", "num_local_experts"),
        ("qwen3_moe", "num_local_experts"),
        ("smollm3", "no_rope_layers"),
    ],
)
def test_keys_of_another_architecture_are_refused_by_name(family, key):
    """The settings of transformers' other families under the name of a known one."""
    import transformers

    theirs = transformers.AutoConfig.for_model(family).to_dict()
    with pytest.raises(ValueError, match=f"{key}=.*it is another architecture"):
        config(**{name: value for name, value in theirs.items() if name not in ("model_type", *SIZES)})


def test_keys_of_another_architecture_that_change_nothing_pass():
    nothing = {
        "no_rope_layers": [1, 1, 1, 1],
        "num_local_experts": 0,
        "logit_scale": 1.0,
        "attn_logit_softcapping": None,
    }
    assert config(**nothing) == config()
    assert config("qwen3", use_qk_norm=True) == config("qwen3")
    with pytest.raises(ValueError, match="use_qk_norm=True"):
        config(use_qk_norm=True)


def test_a_pattern_of_layers_counts_in_gemma3_alone():
    assert config("gemma3_text", sliding_window_pattern=2).sliding == (True, False, True, False)
    assert config("gemma2", sliding_window_pattern=2) == config("gemma2")
    for family in ("gemma2", "gpt_oss", "olmo3"):
        with pytest.raises(ValueError, match="sliding_window_pattern=3, which a model of the family"):
            config(family, sliding_window_pattern=3)


def test_layer_types_that_do_not_fit_are_refused():
    kinds = ["sliding_attention"] * 4
    for family, key in (("gemma2", "sliding_window"), ("mistral", "sliding_window"), ("qwen3", "use_sliding_window")):
        with pytest.raises(ValueError, match=f"names sliding_attention, but {key} is not set"):
            config(family, layer_types=kinds, **({} if "use" in key else {"sliding_window": None}))
    with pytest.raises(ValueError, match="layer_types names 3 layers, and num_hidden_layers is 4"):
        config("qwen3", layer_types=["full_attention"] * 3)


def test_gemma3_caps_the_logits_of_its_head_alone():
    """transformers stores attn_logit_softcapping for it, and does not use it."""
    assert config("gemma3_text", final_logit_softcapping=3.0).logit_softcap == 3.0
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=2\.0"):
        config("gemma3_text", attn_logit_softcapping=2.0)


def test_biases_and_norms_follow_each_family():
    plain, biased = config("llama"), config("llama", attention_bias=True, mlp_bias=True)
    assert not (plain.qkv_bias or plain.output_bias or plain.mlp_bias)
    assert biased.qkv_bias and biased.output_bias and biased.mlp_bias
    qwen2, qwen3 = config("qwen2"), config("qwen3", attention_bias=True)
    assert qwen2.qkv_bias and not qwen2.output_bias and not qwen2.qk_norm
    assert qwen3.qkv_bias and qwen3.output_bias and qwen3.qk_norm


def test_silent_configurations_get_the_family_defaults():
    silent = {"num_key_value_heads": None}
    assert config("llama", **silent).kv_heads == 4
    assert (config("qwen3").head_dim, config("qwen2").head_dim) == (128, 16)
    assert (config("phi3").norm_eps, config("llama").norm_eps) == (1e-5, 1e-6)
    contexts = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768, "phi3": 4096}
    assert {family: config(family).context for family in contexts} == contexts


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_defaults_equal_those_of_transformers(family):
    import transformers

    theirs = transformers.AutoConfig.for_model(family)
    sizes = {key: getattr(theirs, key) for key in SIZES if key != "num_key_value_heads"}
    ours = base_config({"model_type": family, **sizes})
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.context == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    ropes = theirs.rope_parameters
    sliding = ropes.get(SLIDING, ropes)["rope_theta"]
    assert ours.rope.theta == ropes.get(FULL, ropes)["rope_theta"]
    assert (ours.sliding_rope or ours.rope).theta == sliding
    if getattr(theirs, "layer_types", None) and ours.sliding_window is not None:
        assert ours.sliding == tuple(kind == SLIDING for kind in theirs.layer_types)
    assert (
        ours.sliding_window == theirs.sliding_window
        if family in ("mistral", "phi3", "gpt_oss", "gemma2", "gemma3_text", "olmo3")
        else ours.sliding_window is None
    )
    if ropes.get("rope_type") == "yarn":
        assert (ours.rope.kind, ours.rope.factor, ours.rope.truncate) == ("yarn", ropes["factor"], ropes["truncate"])
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="must be a multiple of the KV heads"):
        config(num_key_value_heads=3)
    with pytest.raises(ValueError, match="head_dim must be even"):
        config(head_dim=7)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"is_causal": False}, "is_causal=False"),
        ({"use_rope": False}, "use_rope=False"),
        ({"embedding_multiplier": 0}, "embedding_multiplier=0"),
        ({"model_type": "qwen3", "qk_norm": False}, "qk_norm=False"),
        ({"model_type": "qwen3", "use_qk_norm": "l2"}, "use_qk_norm='l2'"),
        (
            {"model_type": "smollm3", "sliding_window": 4, "layer_types": [SLIDING, FULL] * 2},
            "use_sliding_window is not set",
        ),
        (
            {"model_type": "gemma3_text", "rope_scaling": {FULL: {"rope_type": "linear"}}},
            "give them in rope_parameters",
        ),
        ({"model_type": "olmo3", "rope_parameters": {FULL: {"rope_theta": 1.0}, SLIDING: 3}}, f"{SLIDING} must be an"),
        ({"rope_parameters": {FULL: 3}}, f"{FULL} must be an object"),
        ({"model_type": "mixtral", "num_local_experts": [[8]]}, "num_local_experts"),
    ],
)
def test_values_that_switch_off_what_a_family_has_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        base_config({"model_type": "llama", **SIZES, **values})


# Keys that change no logit: bookkeeping, training, and what other parts of the library read.
NEUTRAL = {
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "label2id", "model_type"),
    *(
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "problem_type",
        "return_dict",
        "torch_dtype",
    ),
    *("transformers_version", "use_cache", "initializer_range", "pretraining_tp", "router_aux_loss_coef"),
    *("attention_dropout", "embd_pdrop", "resid_pdrop", "router_jitter_noise"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "_sliding_window_pattern"),
}
# (family, key) -> why the key of this family changes nothing in the configurations of the test below.
MOOT = {
    ("phi3", "original_max_position_embeddings"): "it concerns longrope alone",
    ("qwen3_moe", "intermediate_size"): "no layer is without experts",
    ("smollm3", "no_rope_layer_interval"): "no_rope_layers decides",
}


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        return "another"
    if isinstance(value, list):
        return [changed(entry) for entry in value]
    return value * 2


def changes(values, path=()):
    """Every key, also of objects inside, as (path, another value)."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from changes(value, (*path, key))
        elif value != []:
            yield (*path, key), changed(value)


def replaced(values, path, value):
    """A copy with another value at a path."""
    first, *rest = path
    return {**values, first: replaced(values[first], rest, value) if rest else value}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_knows_changes_the_model_or_is_refused_or_changes_no_logit(family):
    import transformers

    theirs = transformers.AutoConfig.for_model(family, num_hidden_layers=4)
    values = {key: value for key, value in theirs.to_dict().items() if key not in NEUTRAL}
    ours = base_config({"model_type": family, **values})
    if "sliding_window" in values and ours.sliding_window is None:  # what it switches on reads the keys beside it
        switched = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2, "layer_types": None}
        values |= {key: value for key, value in switched.items() if key in values}
        ours = base_config({"model_type": family, **values})
    passed_over, unnamed = [], []
    for path, other in changes(values):
        key = path[-1]
        if (family, key) in MOOT:
            continue
        try:
            if base_config({"model_type": family, **replaced(values, path, other)}) == ours:
                passed_over.append(key)
        except ValueError as error:
            if not re.search(rf"\b{key}\b", str(error)):
                unnamed.append(f"{key}={other}: {error}")
    assert (passed_over, unnamed) == ([], [])
