"""Mixtures of experts against loops in float64, and against transformers' blocks."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from butler_jax.model import experts
from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel
from butler_jax.model.hugging_face_config import base_config
from butler_jax.weights.experts import join_experts
from butler_jax.weights.huggingface import open_safetensors
from butler_jax.weights.stored import StoredTensor
from tests import reference_models, tiny_runs
from tests.host_devices import run_on_devices
from tests.marked import long

BASE = BaseConfig(
    family="mixtral",
    vocab_size=61,
    width=16,
    hidden=24,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    context=64,
    experts=6,
    experts_per_token=2,
    normalised_experts=True,
)
OSS = dataclasses.replace(BASE, mlp_bias=True, router_bias=True, swiglu_limit=0.8, swiglu_alpha=1.702)


def make_layer(config, dtype):
    layers = BaseModel(config, jax.random.key(0), dtype).layers
    rng = np.random.default_rng(0)
    names = ("router", "expert_gate", "expert_up", "expert_down")
    found = {name: None for name in (*names, *(f"{n}_bias" for n in names))}
    for name in found:
        array = getattr(layers, name)
        if array is not None:
            found[name] = jnp.asarray(rng.normal(size=array.shape[1:]) * 0.5, dtype)
    return SimpleNamespace(**found)


def naive(config, layer, h):
    """Token by token and expert by expert, in float64."""
    w = {name: None if a is None else np.asarray(a, np.float64) for name, a in vars(layer).items()}
    out = np.zeros_like(h)
    for t, x in enumerate(h):
        logits = x @ w["router"] + (0 if w["router_bias"] is None else w["router_bias"])
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = np.argsort(-probabilities, kind="stable")[: config.experts_per_token]
        total = probabilities[chosen].sum() if config.normalised_experts else 1.0
        for e in chosen:
            gate, up = x @ w["expert_gate"][e], x @ w["expert_up"][e]
            if config.mlp_bias:
                gate, up = gate + w["expert_gate_bias"][e], up + w["expert_up_bias"][e]
            if config.swiglu_limit is None:
                inner = gate / (1 + np.exp(-gate)) * up
            else:
                limit = config.swiglu_limit
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                inner = gate / (1 + np.exp(-config.swiglu_alpha * gate)) * (up + 1)
            y = inner @ w["expert_down"][e] + (w["expert_down_bias"][e] if config.mlp_bias else 0)
            out[t] += probabilities[e] / total * y
    return out


@pytest.mark.parametrize("config", [BASE, dataclasses.replace(BASE, normalised_experts=False), OSS])
@pytest.mark.parametrize(("tokens", "block"), [(1, 128), (37, 4), long(3, 128), long(37, 128)])
def test_mixtures_equal_a_loop_over_tokens_and_experts(config, tokens, block, monkeypatch):
    monkeypatch.setattr(experts, "BLOCK", block)
    h = np.random.default_rng(1).normal(size=(tokens, config.width))
    h[: tokens // 2] = h[0]  # these tokens all choose the same experts
    with jax.enable_x64(True):
        layer = make_layer(config, jnp.float64)
        found = jax.jit(lambda h: experts.mix_experts(config, layer, h))(h)
    np.testing.assert_allclose(found, naive(config, layer, h), atol=1e-12)


def test_gradients_of_the_stream_are_those_of_differences(monkeypatch):
    monkeypatch.setattr(experts, "BLOCK", 4)
    rng = np.random.default_rng(2)
    h, direction, cotangent = rng.normal(size=(3, 9, OSS.width))
    with jax.enable_x64(True):
        layer = make_layer(OSS, jnp.float64)
        gradient = jax.jit(jax.grad(lambda h: jnp.sum(experts.mix_experts(OSS, layer, h) * cotangent)))(h)
    step = 1e-6 * direction
    slope = np.sum((naive(OSS, layer, h + step) - naive(OSS, layer, h - step)) * cotangent) / 2e-6
    np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-6)


def test_padding_of_blocks_is_counted():
    chosen = jnp.asarray([[0, 5], [0, 1], [7, 0], [-2, 5]])  # 7 and -2 are experts of other devices
    blocks = experts.make_blocks(chosen, 6)
    assert blocks.expert[blocks.filled].tolist() == [0, 1, 5]
    for token, row in enumerate(chosen.tolist()):
        for choice, expert in enumerate(row):
            if 0 <= expert < 6:
                block, place = divmod(int(blocks.place[token, choice]), blocks.tokens.shape[1])
                assert blocks.expert[block] == expert and blocks.tokens[block, place] == token


def stored(arrays):
    return {f"model.layers.0.mlp.{name}": StoredTensor(a.shape, lambda i, j, a=a: a[i:j]) for name, a in arrays.items()}


def joined(arrays, config):
    """The parameters of a layer from stored arrays, as build_model turns them."""
    return joined_tensors(stored(arrays), config)


def joined_tensors(tensors, config):
    tensors = join_experts(tensors, config)
    read = {name.removeprefix("model.layers.0.mlp."): t.read(0, t.shape[0]) for name, t in tensors.items()}
    found = {"router": read.pop("router.weight").T, "router_bias": read.pop("router.bias", None)}
    for part in ("gate", "up", "down"):
        found[f"expert_{part}"] = read.pop(f"experts.{part}_proj.weight").swapaxes(1, 2)
        found[f"expert_{part}_bias"] = read.pop(f"experts.{part}_proj.bias", None)
    assert not read
    return SimpleNamespace(**{k: None if v is None else jnp.asarray(v) for k, v in found.items()})


def test_the_block_of_gpt_oss_equals_that_of_transformers():
    import torch
    from transformers.models.gpt_oss import modeling_gpt_oss

    config = modeling_gpt_oss.GptOssConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, swiglu_limit=0.8
    )
    block = modeling_gpt_oss.GptOssMLP(config)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 2
    h = np.random.default_rng(3).normal(size=(1, 11, 16)).astype(np.float32)
    with torch.no_grad():
        expected = block(torch.from_numpy(h))[0][0].numpy()
    layer = joined({name: p.detach().numpy() for name, p in block.named_parameters()}, OSS)
    np.testing.assert_allclose(experts.mix_experts(OSS, layer, jnp.asarray(h[0])), expected, atol=2e-5)


def test_mxfp4_weights_are_unpacked_as_transformers_does(tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(4)
    arrays = {"router.weight": np.zeros((3, 64), np.float32)}
    for name, rows, columns in (("gate_up_proj", 10, 64), ("down_proj", 64, 32)):
        arrays[f"experts.{name}_blocks"] = rng.integers(0, 256, (3, rows, columns // 32, 16), np.uint8)
        arrays[f"experts.{name}_scales"] = rng.integers(110, 140, (3, rows, columns // 32), np.uint8)
    save_file({f"model.layers.0.mlp.{name}": a for name, a in arrays.items()}, tmp_path / "model.safetensors")
    layer = joined_tensors(open_safetensors(tmp_path / "model.safetensors"), dataclasses.replace(OSS, experts=3))
    expected = {
        name: convert_moe_packed_tensors(
            *(torch.from_numpy(arrays[f"experts.{name}_{suffix}"]) for suffix in ("blocks", "scales")),
            dtype=torch.float32,
        ).numpy()
        for name in ("gate_up_proj", "down_proj")
    }
    np.testing.assert_array_equal(layer.expert_gate, expected["gate_up_proj"][..., ::2])
    np.testing.assert_array_equal(layer.expert_up, expected["gate_up_proj"][..., 1::2])
    np.testing.assert_array_equal(layer.expert_down, expected["down_proj"])


def test_fused_weights_are_those_of_single_experts():
    rng = np.random.default_rng(5)
    gate_up, down = rng.normal(size=(2, 8, 6)).astype(np.float32), rng.normal(size=(2, 6, 4)).astype(np.float32)
    router = {"gate.weight": np.zeros((2, 6), np.float32)}
    config = dataclasses.replace(BASE, experts=2)
    fused = joined({**router, "experts.gate_up_proj": gate_up, "experts.down_proj": down}, config)
    single = {}
    for e in range(2):
        parts = {"gate": gate_up[e, :4], "up": gate_up[e, 4:], "down": down[e]}
        single |= {f"experts.{e}.{part}_proj.weight": a for part, a in parts.items()}
    for a, b in zip(
        jax.tree.leaves(vars(fused)), jax.tree.leaves(vars(joined({**router, **single}, config))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    del single["experts.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"missing tensor model\.layers\.0\.mlp\.experts\.1\.up_proj\.weight"):
        joined({**router, **single}, config)


QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2: some of its layers have no experts"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]: some of its layers"),
        ({"n_shared_experts": 1}, "n_shared_experts=1"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
        ({"num_experts_per_tok": 200}, "experts_per_token must be from 1 to the number of experts"),
        ({"num_experts": 8, "num_local_experts": 4}, "must be the same number"),
        ({"swiglu_limit": 7.0}, r"swiglu_limit=7\.0"),
        ({"model_type": "llama", "num_experts": 8}, "num_experts=8"),
    ],
)
def test_keys_that_ask_for_other_mixtures_are_refused_by_name(values, message):
    base_config(QWEN)
    with pytest.raises(ValueError, match=message):
        base_config({**QWEN, **values})


DEVICES = """
import sys
sys.path.insert(0, sys.argv[1])
import dataclasses
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_numpy_rank_promotion", "raise")
from butler_jax.model.decoder import LOGICAL_AXES, BaseModel, forward
from butler_jax.parallel.mesh import make_mesh, module_shardings
from butler_jax.model.decoder import embed, run_layers, logits
from tests.model.test_experts import BASE, OSS
tokens = np.random.default_rng(0).integers(0, 61, (4, 12))
configs = dataclasses.replace(BASE, experts=8, experts_per_token=3, layers=2), dataclasses.replace(OSS, experts=8)
for config, text in zip(configs, sys.argv[2:], strict=True):
    model = BaseModel(config, jax.random.key(0))
    for name in ("router_bias", "expert_gate_bias", "expert_up_bias", "expert_down_bias"):
        if (bias := getattr(model.layers, name)) is not None:
            bias[...] = jax.random.normal(jax.random.key(len(name)), bias.shape)
    def outputs(model, tokens):
        def loss(x):
            def mixer(carry, view):
                return view.q, carry, None
            x, _, _ = run_layers(model, x, jnp.zeros(x.shape[:2], jnp.int32), mixer, None)
            return jnp.mean(logits(model, x) ** 2)
        x = embed(model, tokens)
        return forward(model, tokens), forward(model, tokens[:, :1]), jax.grad(loss)(x)
    expected = jax.jit(outputs)(model, tokens)
    mesh = make_mesh(text)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, module_shardings(model, LOGICAL_AXES, mesh))
        parts = placed.layers.expert_gate[...].sharding.shard_shape(placed.layers.expert_gate.shape)
        assert parts[1] == 8 // mesh.shape["expert"], parts
        found = jax.jit(outputs)(placed, tokens)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=text)
"""


@pytest.mark.long  # the training and decoding below are on such meshes too
@pytest.mark.slow
def test_experts_on_several_devices_compute_what_one_does():
    run_on_devices(8, DEVICES, "data=2,expert=4", "data=2,model=2,expert=2", optimised=False, timeout=600)


RUNS = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
from butler_jax import distil, generate, load_base
from butler_jax.parallel.mesh import make_mesh, shardings_for
from tests import tiny_runs
place = {"base": sys.argv[2], "text": Path(sys.argv[3]) / "book.txt", "data_dir": Path(sys.argv[3]) / "data"}
base, losses, tokens = load_base(sys.argv[2]), [], []
for text in ("data=1", "data=2,expert=4"):
    run_dir = Path(sys.argv[3]) / text
    distil(base, tiny_runs.settings(place, run_dir, steps=4, batch_size=4, length=32, mesh=text))
    losses.append([row["loss"] for row in tiny_runs.rows(run_dir)])
    mesh = make_mesh(text)
    placed = load_base(sys.argv[2], shardings=shardings_for(mesh))
    with jax.set_mesh(mesh):
        tokens.append(generate(placed, [[5, 6, 7, 8, 9], [8, 9]], max_new_tokens=8, stop=()).tokens)
print(json.dumps([losses, tokens]))
"""


@pytest.mark.slow
def test_training_and_decoding_with_an_expert_axis_are_those_of_one_device(tmp_path):
    directory = tiny_runs.make_base(tmp_path / "llama")  # for its tokenizer
    settings = {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "vocab_size": 280}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference_models.MODELS, "mixtral", ("mixtral", settings))
        theirs = reference_models.save_model("mixtral", tmp_path / "mixtral")
    shutil.copy(directory / "tokenizer.json", tmp_path / "mixtral")
    (tmp_path / "book.txt").write_text(tiny_runs.text())
    arguments = str(tmp_path / "mixtral"), str(tmp_path)
    printed = run_on_devices(8, RUNS, *arguments, optimised=False, timeout=600)
    (one, several), (tokens, same) = json.loads(printed.splitlines()[-1])
    assert several == pytest.approx(one, abs=1e-5) and len(one) == 4
    assert tokens == same
    for row, prompt in zip(tokens, ([5, 6, 7, 8, 9], [8, 9]), strict=True):
        for token in row:  # greedy, as by transformers
            assert token == reference_models.logits(theirs, np.asarray([prompt]))[0, -1].argmax()
            prompt = [*prompt, token]
