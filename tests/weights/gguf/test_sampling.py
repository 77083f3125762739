"""What a GGUF file says of sampling, as llama.cpp's converters write it."""

from __future__ import annotations

import json

import gguf
import pytest

from butler_jax.decoding import SamplingConfig, read_sampling
from butler_jax.weights.gguf.sampling import generation_values


def fields_of(path, metadata):
    writer = gguf.GGUFWriter(path, "llama")
    metadata.set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize(
    "generation",
    [
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_p": 0.9, "top_k": 0},
        {"do_sample": True, "temperature": 1.0, "min_p": 0.05},
        {"eos_token_id": 2},
    ],
)
def test_a_converted_file_draws_as_the_directory_it_was_made_from(tmp_path, generation):
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    metadata = gguf.Metadata.load(model_path=tmp_path)
    found = generation_values(fields_of(tmp_path / "model.gguf", metadata))
    assert read_sampling(found) == read_sampling(generation)


@pytest.mark.parametrize(
    ("keys", "sampling", "passed_over"),
    [
        ({"temp": 0.0, "top_k": 40}, {}, ()),
        ({"penalty_repeat": 1.1, "penalty_last_n": 64}, {"repetition_penalty": 1.1}, ("penalty_last_n",)),
        ({"penalty_repeat": 1.1, "penalty_last_n": -1}, {"repetition_penalty": 1.1}, ()),
        ({"penalty_repeat": 1.1, "penalty_last_n": 0}, {}, ()),
        ({"penalty_repeat": 1.0, "penalty_last_n": 64, "mirostat": 0, "mirostat_tau": 5.0}, {}, ()),
        (
            {"temp": 0.8, "top_k": 5, "sequence": "top_k;temp", "xtc_probability": 0.5, "mirostat": 2},
            {"temperature": 0.8, "top_k": 5},
            ("sequence", "xtc_probability", "mirostat"),
        ),
    ],
)
def test_keys_of_llama_cpp_are_taken_or_named(tmp_path, keys, sampling, passed_over):
    metadata = gguf.Metadata(name="x", **{f"sampling_{key}": value for key, value in keys.items()})
    found = generation_values(fields_of(tmp_path / "model.gguf", metadata))
    assert read_sampling(found) == (SamplingConfig(**sampling), passed_over)
