"""What the tests of weights share."""

import json

import pytest
from safetensors.numpy import save_file

from tests.weights.llama_files import LLAMA, llama_tensors


@pytest.fixture
def directory(tmp_path):
    """A random Llama of two layers with tied embeddings; tests damage it."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    save_file(llama_tensors(), tmp_path / "model.safetensors")
    return tmp_path
