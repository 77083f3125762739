"""How a GGUF file says that tokens are drawn: the keys general.sampling.*, which converters take from the model."""

from __future__ import annotations

from typing import Any

import numpy as np

PREFIX = "general.sampling."
NAMES = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}  # others have one name in both


def generation_values(fields: dict[str, Any]) -> dict[str, Any]:
    """The metadata as the content of a generation_config.json; {} without such keys.

    No key says whether to draw. A file with a temperature, a top_k or a top_p draws, unless its temperature is 0. What
    belongs to a sampler that is off is left out.
    """
    found = {key.removeprefix(PREFIX): _plain(value) for key, value in fields.items() if key.startswith(PREFIX)}
    if not found:
        return {}
    draws = any(key in found for key in ("temp", "top_k", "top_p")) and found.get("temp") != 0
    if found.get("penalty_last_n") == 0:  # tokens that the penalty looks back to
        found["penalty_repeat"] = 1.0
    if found.get("penalty_repeat", 1.0) == 1:
        found.pop("penalty_last_n", None)
    if not found.get("xtc_probability"):
        found.pop("xtc_threshold", None)
    if not found.get("mirostat"):
        found = {key: value for key, value in found.items() if not key.startswith("mirostat")}
    return {"do_sample": draws, **{NAMES.get(key, key): value for key, value in found.items()}}


def _plain(value: Any) -> Any:
    """A number as it was before it became a float32: 0.6, not 0.60000002."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
