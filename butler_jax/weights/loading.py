"""A frozen base model from a directory, the Hugging Face hub, a .gguf file, or the package itself (tiny)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.model import BaseConfig, BaseModel, ModelAdapter, RopeConfig, embed
from butler_jax.storage import file_in, read_object
from butler_jax.weights import huggingface
from butler_jax.weights.placement import Shardings, build_model, parameter_name

if TYPE_CHECKING:
    from butler_jax.text import Tokenizer

TINY = Path(__file__).parent.parent / "tiny"
FORMER_NAMES = {"sliding_window": "window", "sliding_layers": "windowed"}  # the names that fingerprints are made of
PRECISIONS = ("float32", "bfloat16", "float16")
SAMPLES = 256  # values of each parameter in a fingerprint


@dataclass(frozen=True)
class Base:
    """A frozen language model.

    Attributes:
        name: Of its directory or file, its hub id, or "tiny".
        model: The parameters.
        tokenizer: None where the model comes without one.
        fingerprint: The digest that checkpoints of predictors refer to.
        generation: How the model's makers generate: the object in generation_config.json, or what a .gguf file says, in
            the same terms. {} where there is neither.
        revision: The commit of the hub that the files came from; None for others.
        source: What `load_base` takes to load it again, with a local path made absolute; None for a model that was not
            loaded.
    """

    name: str
    model: BaseModel | ModelAdapter
    tokenizer: Tokenizer | None
    fingerprint: str
    generation: Mapping[str, Any] = field(default_factory=dict, compare=False)
    revision: str | None = None
    source: str | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        sizes = f"{self.config.layers} layers of width {self.config.width}, context {self.config.context}"
        return f"Base({self.name!r}: {sizes}, {self.dtype}, fingerprint {self.fingerprint})"

    @property
    def config(self) -> BaseConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def dtype(self) -> jnp.dtype:
        """The precision of the residual stream."""
        return jax.eval_shape(embed, self.model, jax.ShapeDtypeStruct((1, 1), jnp.int32)).dtype

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError(f"the base {self.name} has no tokenizer: its directory lacks tokenizer.json; add it")
        return self.tokenizer


def load_base(
    spec: str | Path = "tiny", *, dtype: Any = None, shardings: Shardings | None = None, context: int | None = None
) -> Base:
    """Load a base model.

    Weights go tensor by tensor from the file to their devices, so the host needs memory for one layer besides the
    parameters that it places on its own devices. Pickle files and code that come with a model are never opened.

    Args:
        spec: A Hugging Face directory (safetensors, sharded or not), a hub id "organisation/name" or
            "organisation/name@revision", a .gguf file, or "tiny", the model in this package.
        dtype: Of the parameters, float32, bfloat16 or float16; None is float32 on CPU and bfloat16 on accelerators.
        shardings: (logical axes, shape) -> Sharding of a parameter, as from parallel.shardings_for(mesh); None puts all
            parameters on the default device.
        context: Tokens that the base is to take. A shorter context is extended by YaRN, without training
            (`BaseConfig.extended`). That is another base: a predictor is trained for one of the two. None keeps the
            model's own.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is damaged, not supported, or does not match the configuration. Headers, shapes and sizes are
            checked before memory is taken for weights.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if dtype not in map(jnp.dtype, PRECISIONS):
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {dtype}")
    text = str(spec)
    if text.lower().endswith(".gguf"):
        from butler_jax.weights import gguf

        path, revision = Path(os.path.expanduser(spec)), None
        name, (source, tokenizer, generation) = path.name, gguf.open_file(path)
    else:
        directory, (name, revision) = _directory(text)
        source, tokenizer = huggingface.open_directory(directory), _tokenizer(directory)
        found = file_in(directory, "generation_config.json")
        generation = {} if found is None else read_object(found)
    if tokenizer is not None:
        check_tokenizer(tokenizer, source.config, text)
    config = source.config if context is None else source.config.extended(context)
    model = build_model(config, source.tensors, dtype=dtype, shardings=shardings, source=text)
    return Base(name, model, tokenizer, fingerprint(model), generation, revision, _absolute(text))


def _absolute(spec: str) -> str:
    """The spec of a model with a local path made absolute."""
    path = Path(os.path.expanduser(spec))
    return spec if spec == "tiny" or not path.exists() else str(path.absolute())


def is_spec_of(spec: str, base: Base) -> bool:
    """Whether a spec of `load_base` names a base that is loaded: by its name, or by where it was loaded from."""
    return spec.partition("@")[0] == base.name or _absolute(spec) == base.source


def _directory(spec: str) -> tuple[Path, tuple[str, str | None]]:
    """The local directory, and the name and revision, of a model that is no .gguf file."""
    if spec == "tiny":
        if not (TINY / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"the embedded model is not in {TINY}; make it with `butler-jax pretrain`, or give --base a "
                "Hugging Face directory or a .gguf file"
            )
        return TINY, ("tiny", None)
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return path, huggingface.cached_id(path)
    if path.exists():
        remedy = f"; give its directory, {path.parent}" if (path.parent / "config.json").exists() else ""
        raise ValueError(f"{spec} is a file, but neither a .gguf file nor a Hugging Face directory{remedy}")
    if asked := huggingface.parse_hub_id(spec):
        path = huggingface.download(*asked)
        return path, (asked[0], path.name)
    raise FileNotFoundError(
        f"no such directory: {spec}. A base is a Hugging Face directory, a hub id organisation/name or "
        "organisation/name@revision, a .gguf file, or tiny"
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


def fingerprint(model: BaseModel | ModelAdapter) -> str:
    """A digest of 16 hexadecimal digits that identifies a model.

    It covers the configuration and up to 256 evenly spaced values of every parameter, rounded to bfloat16. A model has
    the same fingerprint in float32 and bfloat16, on every device and under every sharding.
    """
    digest = hashlib.sha256(json.dumps(_described(model.config), sort_keys=True).encode())
    name_of = jax.tree_util.keystr if isinstance(model, ModelAdapter) else parameter_name
    arrays = {name_of(path): array for path, array in jax.tree_util.tree_leaves_with_path(model)}
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
    return np.asarray(_sampler(_everywhere(array))(array, at)).view("<u2")


@functools.cache
def _sampler(sharding: jax.sharding.Sharding | None) -> Callable[..., jax.Array]:
    """A function that takes values of an array as bfloat16. It compiles once for each shape."""
    return jax.jit(lambda x, at: x[at].astype(jnp.bfloat16), out_shardings=sharding)


def _everywhere(array: jax.Array) -> jax.sharding.Sharding | None:
    sharding = array.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return None
