"""A frozen base model from a directory, the Hugging Face hub, a .gguf file, or the package itself (tiny)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.model import BaseConfig, BaseModel, RopeConfig
from butler_jax.storage import file_in
from butler_jax.weights import huggingface
from butler_jax.weights.placement import Shardings, build_model, parameter_name

if TYPE_CHECKING:
    from butler_jax.text import Tokenizer

TINY = Path(__file__).parent.parent / "tiny"
FORMER_NAMES = {"sliding_window": "window", "sliding_layers": "windowed"}  # the names that fingerprints are made of
SAMPLES = 256  # values of each parameter in a fingerprint


@dataclass(frozen=True)
class Base:
    """A frozen language model.

    Attributes:
        name: Of its directory or file, its hub id, or "tiny".
        model: The parameters.
        tokenizer: None where the model comes without one.
        fingerprint: The digest that checkpoints of predictors refer to.
    """

    name: str
    model: BaseModel
    tokenizer: Tokenizer | None
    fingerprint: str

    @property
    def config(self) -> BaseConfig:
        """The model's configuration."""
        return self.model.config

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError(f"the base {self.name} has no tokenizer: its directory lacks tokenizer.json; add it")
        return self.tokenizer


def load_base(spec: str | Path = "tiny", *, dtype: Any = None, shardings: Shardings | None = None) -> Base:
    """Load a base model.

    Weights go tensor by tensor from the file to their devices, so the host needs memory for one layer besides the
    parameters that it places on its own devices. Pickle files and code that come with a model are never opened.

    Args:
        spec: A Hugging Face directory (safetensors, sharded or not), a hub id "organisation/name", a .gguf file, or
            "tiny", the model in this package.
        dtype: Of the parameters; None is float32 on CPU and bfloat16 on accelerators.
        shardings: (logical axes, shape) -> Sharding of a parameter, as from parallel.shardings_for(mesh); None puts all
            parameters on the default device.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is damaged, not supported, or does not match the configuration. Headers, shapes and sizes are
            checked before memory is taken for weights.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    text = str(spec)
    if text.endswith(".gguf"):
        from butler_jax.weights import gguf

        path = Path(os.path.expanduser(spec))
        name, (source, tokenizer) = path.name, gguf.open_file(path)
    else:
        directory, name = _directory(text)
        source, tokenizer = huggingface.open_directory(directory), _tokenizer(directory)
    if tokenizer is not None:
        check_tokenizer(tokenizer, source.config, text)
    model = build_model(source.config, source.tensors, dtype=dtype, shardings=shardings, source=text)
    return Base(name, model, tokenizer, fingerprint(model))


def _directory(spec: str) -> tuple[Path, str]:
    """The local directory and the name of a model that is no .gguf file."""
    if spec == "tiny":
        if not (TINY / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"the embedded model is not in {TINY}; make it with `butler-jax pretrain`, or give --base a "
                "Hugging Face directory or a .gguf file"
            )
        return TINY, "tiny"
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return path, path.resolve().name
    if path.exists():
        raise ValueError(f"{spec} is a file, but neither a .gguf file nor a Hugging Face directory")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", spec):
        return huggingface.download(spec), spec
    raise FileNotFoundError(
        f"no such directory: {spec}. A base is a Hugging Face directory, a hub id organisation/name, a .gguf file, "
        "or tiny"
    )


def _tokenizer(directory: Path) -> Tokenizer | None:
    if file_in(directory, "tokenizer.json") is None:
        return None
    from butler_jax.text import Tokenizer

    return Tokenizer.load(directory)


def check_tokenizer(tokenizer: Tokenizer, config: BaseConfig, name: str) -> None:
    """Raise ValueError where a tokenizer has ids that the model has no embedding for."""
    most = max(tokenizer.highest, tokenizer.bos or 0, tokenizer.eos or 0)
    if most >= config.vocab_size:
        raise ValueError(
            f"{name}: its tokenizer has the id {most}, but the model has {config.vocab_size} embeddings: they do not "
            "belong together; get both again, or remove added tokens from tokenizer.json"
        )


def fingerprint(model: BaseModel) -> str:
    """A digest of 16 hexadecimal digits that identifies a model.

    It covers the configuration and up to 256 evenly spaced values of every parameter, rounded to bfloat16. A model has
    the same fingerprint in float32 and bfloat16, on every device and under every sharding.
    """
    digest = hashlib.sha256(json.dumps(_described(model.config), sort_keys=True).encode())
    arrays = {parameter_name(path): array for path, array in jax.tree_util.tree_leaves_with_path(model)}
    for name, array in sorted(arrays.items()):
        digest.update(name.encode())
        digest.update(_samples(array).tobytes())
    return digest.hexdigest()[:16]


def _described(config: BaseConfig | RopeConfig) -> dict:
    """The settings that differ from their defaults, so that a setting added later changes no fingerprint."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return {
        FORMER_NAMES.get(name, name): _described(value) if isinstance(value, RopeConfig) else value
        for name, value in values.items()
        if value != defaults[name]
    }


def _samples(array: jax.Array) -> np.ndarray:
    """Evenly spaced values of an array as the bits of bfloat16."""
    count = min(SAMPLES, array.size)
    flat = np.arange(count, dtype=np.int64) * array.size // count
    at = tuple(i.astype(np.int32) for i in np.unravel_index(flat, array.shape))
    take = jax.jit(lambda x, at: x[at].astype(jnp.bfloat16), out_shardings=_everywhere(array))
    return np.asarray(take(array, at)).view("<u2")


def _everywhere(array: jax.Array) -> jax.sharding.Sharding | None:
    sharding = array.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return None
