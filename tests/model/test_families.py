"""Configurations of all families, as transformers writes them and as older files spell them."""

import pytest

from butler_jax.model.families import FAMILIES, FULL, SLIDING, base_config

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
    with pytest.raises(ValueError, match=r"unknown model family 'gpt2'.*llama, mistral, qwen2, qwen3, phi3"):
        config("gpt2")


def test_missing_sizes_are_named():
    with pytest.raises(ValueError, match="lacks hidden_size, num_hidden_layers"):
        config(hidden_size=None, num_hidden_layers=None)


def test_unknown_activation_and_rope_type_are_named():
    with pytest.raises(ValueError, match="activation 'gelu'"):
        config(hidden_act="gelu")
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
        shares = {family: config(family, **spelled).rope.fraction for family in FAMILIES}
        assert shares == dict.fromkeys(FAMILIES, 1.0) | {"phi3": 0.5}
        scaled = {**spelled, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        assert config("phi3", **scaled).rope.fraction == 0.5
        with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5 with the rope type 'linear'"):
            config("qwen2", **scaled)


def test_rope_theta_alone_is_the_default_kind():
    assert config(rope_theta=1e6, rope_scaling=None).rope.theta == 1e6
    assert config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}) == config(rope_theta=1e6)
    assert config().rope.theta == 10000.0


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
    contexts = {family: config(family).context for family in FAMILIES}
    assert contexts == {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768, "phi3": 4096}


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
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (
        ours.sliding_window == theirs.sliding_window if family in ("mistral", "phi3") else ours.sliding_window is None
    )
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="must be a multiple of the KV heads"):
        config(num_key_value_heads=3)
    with pytest.raises(ValueError, match="head_dim must be even"):
        config(head_dim=7)
