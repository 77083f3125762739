"""Settings of sampling: how the next token is drawn from the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from butler_jax.storage import from_dict, settle_types, whole


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. The defaults decode greedily.

    Raises:
        ValueError: A setting is out of its range.
    """

    temperature: float = 0.0
    """Divisor of the logits before the draw. 0 takes the most likely token."""
    top_k: int | None = None
    """Draw from the k most likely tokens only. Default: all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities sum to at least p. Applies after top_k."""
    repetition_penalty: float = 1.0
    """Divide the positive logits of tokens that the row already holds by this number, and multiply the negative ones
    (Keskar et al. 2019, CTRL). 1 changes nothing."""

    def __post_init__(self):
        if self.top_k is not None:
            whole(self.top_k, "top_k")
        settle_types(self)
        if not self.temperature >= 0:
            raise ValueError(f"the temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"the repetition penalty must be above 0, got {self.repetition_penalty}")


def settle_sampling(sampling: SamplingConfig | None, generation: Mapping[str, Any]) -> SamplingConfig:
    """How tokens are drawn: as given, or as a generation_config.json says. Raises ValueError for another thing."""
    if not isinstance(sampling, SamplingConfig | None):
        raise ValueError(f"sampling must be a SamplingConfig, got {sampling!r}; write SamplingConfig(temperature=0.8)")
    return sampling or read_sampling(generation)[0]


NEUTRAL = {
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence": (),
    "penalty_last_n": (-1,),
    "xtc_probability": (0,),
    "mirostat": (0,),
}
"""Settings of generation_config.json and of GGUF's general.sampling that have no counterpart here, and the values with
which they change nothing."""


SAMPLING_FILES = "generation_config.json (in a .gguf file: general.sampling)"
TOP_K = 50  # of transformers, where a file asks for draws and names no top_k


def read_sampling(generation: Mapping[str, Any]) -> tuple[SamplingConfig, tuple[str, ...]]:
    """How a model's generation_config.json says that tokens are drawn.

    Without do_sample the most likely token is taken, as in transformers. With it, a temperature that is not given is 1,
    and a top_k that is not given is 50.

    Args:
        generation: The object in the file, or what GGUF's general.sampling says in its terms.

    Returns:
        The sampling, and the names of settings that would change it but are passed over.

    Raises:
        ValueError: A setting has another type or is out of its range.
    """
    names = ["repetition_penalty", *(("temperature", "top_k", "top_p") if generation.get("do_sample") else ())]
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    if generation.get("do_sample"):
        given = {"temperature": 1.0, "top_k": TOP_K, **given}
    if given.get("top_k") == 0:  # all tokens
        del given["top_k"]
    try:
        sampling = from_dict(SamplingConfig, given)
    except ValueError as error:
        raise ValueError(
            f"{SAMPLING_FILES} of the model: {error}; correct the file, or say how tokens are drawn"
        ) from error
    over = (n for n, values in NEUTRAL.items() if generation.get(n) is not None and generation[n] not in values)
    return sampling, tuple(over)
