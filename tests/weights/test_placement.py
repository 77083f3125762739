"""Placing stored tensors: which are accepted, how they are split, and the memory that this takes."""

import gc
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.fuzz_targets import weights
from butler_jax.model import forward
from butler_jax.weights import load_base
from butler_jax.weights.huggingface import SINGLE
from butler_jax.weights.placement import check_memory
from tests import reference_models
from tests.host_devices import host_devices
from tests.weights.hostile import EMBEDDING, REPOSITORY, change_config, container, entry, refused
from tests.weights.llama_files import LLAMA, equal, rewrite

NAMES = [EMBEDDING, "model.layers.0.mlp.down_proj.weight", "model.norm.weight"]
BAD = [np.nan, np.inf, -np.inf]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize(
    ("name", "bad", "dtype"),  # every two of them come together once
    [(name, bad, DTYPES[(i + j) % 3]) for i, name in enumerate(NAMES) for j, bad in enumerate(BAD)],
)
def test_a_weight_that_is_not_finite_is_named_and_nothing_stays(small_model, name, bad, dtype):
    tensors = weights(dtype)
    tensors[name].flat[-1] = bad
    save_file(tensors, small_model / SINGLE)
    gc.collect()
    alive = len(jax.live_arrays())
    refused(small_model, rf"tensor {re.escape(name)} has values that are not finite")
    gc.collect()  # the error's traceback held what was being filled
    assert len(jax.live_arrays()) == alive


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_beyond_the_type_it_is_cast_to_is_named(small_model, name, sign):
    """3.4e38 is a float32 and rounds to no finite bfloat16; the largest bfloat16 stays what it is."""
    tensors = weights()
    tensors[name].flat[-1] = sign * float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    save_file(tensors, small_model / SINGLE)
    model = load_base(small_model, dtype=ml_dtypes.bfloat16).model
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(model))
    tensors[name].flat[-1] = sign * 3.4e38
    save_file(tensors, small_model / SINGLE)
    load_base(small_model, dtype=np.float32)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} has values beyond 3\.39e\+38, the largest of bfloat16"):
        load_base(small_model, dtype=ml_dtypes.bfloat16)


class Device:
    """A device whose platform reports its memory, or does not."""

    def __init__(self, platform, stats=None):
        self.platform, self.memory_stats = platform, lambda: stats

    def __str__(self):
        return "TPU_3"


def test_a_model_larger_than_memory_is_refused_by_arithmetic(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    check_memory({Device("cpu"): 4_096_000}, "m")
    with pytest.raises(ValueError, match=r"m needs 0\.1 GB for its weights, and this machine has 0\.0 GB"):
        check_memory({Device("cpu"): 100_000_000}, "m")
    with pytest.raises(ValueError, match=r"0\.6 GB for its weights \(0\.3 GB on each of 2 devices\), and this machine"):
        check_memory({Device("cpu"): 300_000_000, Device("cpu"): 300_000_000}, "m")
    small, large = (Device("tpu", {"bytes_limit": size}) for size in (16 * 10**9, 95 * 10**9))
    check_memory({small: 16 * 10**9, large: 95 * 10**9, Device("tpu"): 10**15, Device("gpu", {}): 10**15}, "m")
    with pytest.raises(ValueError, match=r"m needs 35\.0 GB .* on TPU_3, which has 16\.0 GB: split .* more devices"):
        check_memory({large: 35 * 10**9, small: 35 * 10**9}, "m")


@pytest.mark.slow
def test_a_model_larger_than_memory_is_refused_on_simulated_devices_before_it_is_placed(small_model):
    """2e9 embeddings of 8 float32: 64 GB that the file only claims, on two devices of a machine of 25 GB."""
    change_config(small_model, vocab_size=2 * 10**9)
    header, at = {}, 0
    for name, values in weights().items():
        shape = (2 * 10**9, 8) if values.shape == weights()[EMBEDDING].shape else values.shape
        header[name], at = entry(at, at + 4 * int(np.prod(shape)), shape), at + 4 * int(np.prod(shape))
    raw = container(header)
    (small_model / SINGLE).write_bytes(raw)
    os.truncate(small_model / SINGLE, len(raw) + at)
    code = f"""
        import os, jax
        from butler_jax.parallel.mesh import make_mesh, shardings_for
        from butler_jax.weights import load_base, placement
        os.sysconf = {{"SC_PHYS_PAGES": 25 * 10**9 // 4096, "SC_PAGE_SIZE": 4096}}.get
        placement.Slot = None
        try:
            load_base({str(small_model)!r}, shardings=shardings_for(make_mesh("data=2")))
        except ValueError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": host_devices(2)},
    )
    said = f"{small_model} needs 64.0 GB for its weights (32.0 GB on each of 2 devices), and this machine has 25.0 GB: "
    assert done.stdout.startswith(said), done.stderr


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


def test_tables_larger_than_a_block_load_whole(directory, monkeypatch):
    whole = load_base(directory)
    monkeypatch.setattr("butler_jax.weights.placement.BLOCK_BYTES", 5000)  # 19 rows of 64, and a last block of 1
    assert equal(whole, load_base(directory))


def test_unused_tensors_that_do_no_harm_are_passed_over(directory):
    plain = load_base(directory)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(directory, change)
    assert equal(plain, load_base(directory))


def test_a_head_that_differs_from_the_embedding_counts_whatever_the_configuration_says(directory):
    """transformers keeps it too."""
    import torch
    import transformers

    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"][::-1].copy()}))
    base = load_base(directory)
    assert not base.config.tied
    tokens = np.arange(12)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(forward(base.model, tokens.astype(np.int32)), theirs, atol=1e-4)


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


@pytest.mark.slow  # a process
def test_sharded_parameters_equal_unsharded_ones_on_8_devices_in_the_bytes_reckoned_before(directory):
    out = in_subprocess(
        f"""
        import jax, numpy as np
        from butler_jax.parallel.mesh import make_mesh, shardings_for
        from butler_jax.weights import load_base
        from butler_jax.weights.placement import bytes_needed, parameter_name
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
        XLA_FLAGS=host_devices(8),
    )
    assert "equal" in out


@pytest.mark.slow  # a process
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
        from butler_jax.model.hugging_face_config import base_config
        from butler_jax.weights import load_base
        from butler_jax.weights.placement import LAYERS, TABLES, locate, stored_shape

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
