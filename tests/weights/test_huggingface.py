"""Hugging Face directories: what is read, what is refused, where it lies and what it costs in memory."""

import json
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from butler_jax.model.decoder import BaseModel, forward
from butler_jax.model.families import base_config
from butler_jax.weights import fingerprint, huggingface, load_base, loading
from tests import reference_models

LLAMA = {
    **reference_models.SIZES,
    "model_type": "llama",
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}


def llama_tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        own = {
            "input_layernorm": (64,),
            "post_attention_layernorm": (64,),
            "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (32, 64),
            "self_attn.v_proj": (32, 64),
            "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (48, 64),
            "mlp.up_proj": (48, 64),
            "mlp.down_proj": (64, 48),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return {name: rng.normal(size=shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}


@pytest.fixture
def directory(tmp_path):
    """A random Llama of two layers with tied embeddings; tests damage it."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    save_file(llama_tensors(), tmp_path / "model.safetensors")
    return tmp_path


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def equal(a, b):
    pairs = zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_matrices_are_stored_transposed(directory):
    base, stored = load_base(directory), load_file(directory / "model.safetensors")
    q = base.model.layers.q[...][1]
    expected = stored["model.layers.1.self_attn.q_proj.weight"].reshape(4, 16, 64)  # [H, D, E]
    np.testing.assert_array_equal(q, np.einsum("hde->ehd", expected))
    o = stored["model.layers.0.self_attn.o_proj.weight"].reshape(64, 4, 16)  # [E, H, D]
    np.testing.assert_array_equal(base.model.layers.o[...][0], np.einsum("ehd->hde", o))
    assert (base.name, base.tokenizer, base.config.layers) == (directory.name, None, 2)


def test_fused_projections_are_split(tmp_path):
    theirs = reference_models.save_model("phi3", tmp_path)
    rows = theirs.model.layers[1].self_attn.qkv_proj.weight.detach().numpy()
    layers = load_base(tmp_path).model.layers
    for values, own in zip((layers.q, layers.k, layers.v), np.split(rows, 3), strict=True):  # K = H here
        np.testing.assert_array_equal(values[...][1].reshape(64, 64), own.T)
    gate, up = np.split(theirs.model.layers[1].mlp.gate_up_proj.weight.detach().numpy(), 2)
    np.testing.assert_array_equal(layers.gate[...][1], gate.T)
    np.testing.assert_array_equal(layers.up[...][1], up.T)


def test_shards_with_an_index_load_like_one_file(directory, tmp_path_factory):
    split, tensors = tmp_path_factory.mktemp("split"), llama_tensors()
    shutil.copy(directory / "config.json", split)
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, mine in files.items():
        save_file({name: tensors[name] for name in mine}, split / file)
    placed = {name: file for file, mine in files.items() for name in mine}
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    whole, sharded = load_base(directory), load_base(split)
    assert equal(whole, sharded) and whole.fingerprint == sharded.fingerprint

    (split / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing"):
        load_base(split)
    placed[names[0]] = "../elsewhere.safetensors"
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(ValueError, match=r"not a \.safetensors file beside it"):
        load_base(split)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_files_load_exactly(directory, dtype):
    tensors = {name: values.astype(dtype) for name, values in llama_tensors().items()}
    save_file(tensors, directory / "model.safetensors")
    base = load_base(directory)
    assert base.model.embedding[...].dtype == jnp.float32
    expected = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(base.model.embedding[...], expected)


def test_tables_larger_than_a_block_load_whole(directory, monkeypatch):
    whole = load_base(directory)
    monkeypatch.setattr("butler_jax.weights.placing.BLOCK_BYTES", 5000)  # 19 rows of 64, and a last block of 1
    assert equal(whole, load_base(directory))


def test_unused_tensors_that_do_no_harm_are_passed_over(directory):
    plain = load_base(directory)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(directory, change)
    assert equal(plain, load_base(directory))


# --- what is refused ------------------------------------------------------------------------------


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such directory: .*nowhere"):
        load_base(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such directory: nowhere"):
        load_base("nowhere")


def test_directory_without_config_is_named(directory):
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_base(directory)


def test_config_that_is_no_json_is_named(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_base(directory)


def test_file_that_is_no_model_is_named(directory):
    with pytest.raises(ValueError, match="is a file, but neither"):
        load_base(directory / "config.json")


def test_pickle_is_never_opened(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, which is a pickle; only safetensors is read"):
        load_base(directory)


def test_directory_without_weights_is_named(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_base(directory)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors_is_named(directory, keep):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        load_base(directory)


@pytest.mark.parametrize("header", [b"x" * 40, b"[1, 2]", b'{"a": {}}'])
def test_damaged_safetensors_header_is_named(directory, header):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        load_base(directory)


def test_unknown_family_and_quantised_weights_are_named(directory):
    (directory / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"config\.json: unknown model family 'mamba'"):
        load_base(directory)
    (directory / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError, match="quantised"):
        load_base(directory)


def test_missing_extra_and_misshapen_tensors_are_named(directory):
    path = directory / "model.safetensors"
    good, name = path.read_bytes(), "model.layers.1.mlp.up_proj.weight"
    rewrite(directory, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"missing tensor {name}"):
        load_base(directory)
    path.write_bytes(good)
    rewrite(directory, lambda t: t.update({"model.layers.2.odd.weight": np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match=r"unexpected tensor model\.layers\.2\.odd\.weight"):
        load_base(directory)
    path.write_bytes(good)
    rewrite(directory, lambda t: t.update({name: np.ones((48, 63), np.float32)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \[48, 63\].*\[48, 64\]"):
        load_base(directory)


def test_untied_model_without_unembedding_is_refused(directory):
    (directory / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"missing tensor lm_head\.weight"):
        load_base(directory)


def test_unsupported_tensor_type_is_named(directory):
    rewrite(directory, lambda t: t.update({"model.norm.weight": np.ones(64, np.int32)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has type I32; supported are F32, F16, BF16"):
        load_base(directory)


def test_absent_embedded_model_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "TINY", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python train\.py pretrain"):
        load_base("tiny")


# --- the hub --------------------------------------------------------------------------------------


def test_hub_asks_for_config_tokenizer_and_safetensors_only(directory, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        return str(directory)

    fake = type(sys)("huggingface_hub")
    fake.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    base = load_base("some-org/some.model")
    assert base.name == asked["name"] == "some-org/some.model"
    assert asked["allow_patterns"] == list(huggingface.PATTERNS)
    assert not any(p.endswith((".bin", ".py", ".pt", "*")) for p in huggingface.PATTERNS)


def test_hub_without_its_package_or_connection_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'butler-jax\[hub\]'"):
        load_base("some-org/some-model")

    def fail(*_, **__):
        raise OSError("no route")

    fake = type(sys)("huggingface_hub")
    fake.snapshot_download = fail
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    with pytest.raises(FileNotFoundError, match=r"did not deliver it .*no route"):
        load_base("some-org/some-model")


# --- fingerprints, shardings, memory --------------------------------------------------------------


def test_fingerprint_ignores_dtype_and_tells_models_apart(directory):
    first = load_base(directory)
    assert first.fingerprint == load_base(directory, dtype=jnp.bfloat16).fingerprint == fingerprint(first.model)
    assert len(first.fingerprint) == 16 and int(first.fingerprint, 16) >= 0

    save_file(llama_tensors(seed=1), directory / "model.safetensors")
    assert load_base(directory).fingerprint != first.fingerprint
    save_file(llama_tensors(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**LLAMA, "rope_theta": 5e5}))
    assert load_base(directory).fingerprint != first.fingerprint


@pytest.mark.slow
def test_every_parameter_counts_in_the_fingerprint():
    model = BaseModel(base_config(LLAMA), jax.random.key(0))
    leaves, tree = jax.tree.flatten(model)
    seen = {fingerprint(model)}
    for index, leaf in enumerate(leaves):
        changed = [*leaves[:index], leaf.at[(0,) * leaf.ndim].add(1.0), *leaves[index + 1 :]]
        seen.add(fingerprint(jax.tree.unflatten(tree, changed)))
    assert len(seen) == len(leaves) + 1


def in_subprocess(code, **environment):
    import os

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_sharded_parameters_equal_unsharded_ones_on_8_devices_in_the_bytes_reckoned_before(directory):
    out = in_subprocess(
        f"""
        import jax, numpy as np
        from butler_jax.parallel.mesh import make_mesh, shardings_for
        from butler_jax.weights import load_base
        from butler_jax.weights.placing import bytes_needed, parameter_name
        plain = load_base({str(directory)!r})
        shapes = {{parameter_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(plain.model)}}
        for text in ("data=8,model=1", "data=2,model=4", "data=1,model=2"):
            mesh = make_mesh(text)
            sharded = load_base({str(directory)!r}, shardings=shardings_for(mesh))
            assert sharded.fingerprint == plain.fingerprint, text
            for a, b in zip(jax.tree.leaves(plain.model), jax.tree.leaves(sharded.model), strict=True):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            down = sharded.model.layers.down[...]
            held = down.addressable_shards[0].data.size
            assert held * mesh.size == down.size, (text, held)
            needed = bytes_needed(shapes, "float32", shardings_for(mesh))
            for shard in [s for leaf in jax.tree.leaves(sharded.model) for s in leaf.addressable_shards]:
                needed[shard.device] -= shard.data.nbytes
            assert len(needed) == mesh.size and set(needed.values()) == {{0}}, (text, needed)
        print("equal")
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert "equal" in out


def test_host_memory_stays_under_one_layer_above_what_is_placed(tmp_path):
    """Peak resident memory while loading 24 layers, against what is resident once they are placed."""
    width, hidden, layers = 512, 2048, 24
    config = {
        **LLAMA,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 16384,  # the table is twice a layer
    }
    layer = 4 * (4 * width * width + 3 * width * hidden)
    out = in_subprocess(
        f"""
        import gc, json, resource
        from pathlib import Path
        import jax, numpy as np, ml_dtypes
        from safetensors.numpy import save_file
        from butler_jax.model.decoder import BaseModel
        from butler_jax.model.families import base_config
        from butler_jax.weights import load_base
        from butler_jax.weights.placing import LAYERS, TABLES, locate, stored_shape

        def write(directory, config):
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(config))
            c = base_config(config)
            shapes = jax.eval_shape(lambda: BaseModel(c, jax.random.key(0)))
            tensors = {{TABLES[n]: np.zeros(getattr(shapes, n).shape, ml_dtypes.bfloat16)
                       for n in ("embedding", "final_norm")}}
            for n, name in LAYERS.items():
                parameter = getattr(shapes.layers, n)
                for i in range(c.layers if parameter is not None else 0):
                    shape = stored_shape(n, parameter.shape[1:])
                    tensors[f"model.layers.{{i}}.{{name}}"] = np.zeros(shape, ml_dtypes.bfloat16)
            save_file(tensors, directory / "model.safetensors")

        def status(key):
            line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
            return int(line.split()[1]) * 1024

        config = json.loads({json.dumps(config)!r})
        root = Path({str(tmp_path)!r})
        write(root / "large", config)
        write(root / "small", config | {{"num_hidden_layers": 2}})
        load_base(root / "small")  # what importing and compiling cost comes before
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        base = load_base(root / "large")
        peak = status("VmHWM")
        placed = sum(x.nbytes for x in jax.tree.leaves(base.model))
        print(json.dumps({{"above": peak - before - placed, "placed": placed}}))
        """
    )
    measured = json.loads(out)
    assert measured["placed"] > 20 * layer
    assert measured["above"] < layer, measured


def test_loaded_models_run(directory):
    logits = forward(load_base(directory).model, np.ones((1, 4), np.int32))
    assert logits.shape == (1, 4, 96) and np.isfinite(logits).all()
