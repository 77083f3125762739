"""The keys of a Hugging Face configuration that concern a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from butler_jax.storage import number, shown, whole

COUNTS = ("num_local_experts", "num_experts")  # transformers takes either name in every family


@dataclass(frozen=True, kw_only=True)
class ExpertFamily:
    """The mixture of experts of a family.

    Attributes:
        count: Experts of a layer where the configuration leaves them out.
        per_token: Experts of a token where the configuration leaves them out.
        hidden: The key of the hidden width of one expert, and its default.
        normalised: Whether the weights of a token's experts sum to 1: True, or the key that holds the answer.
        router_bias: The router has a bias.
        limit: swiglu_limit where the configuration leaves it out; None: the gate is plain silu.
    """

    count: int
    per_token: int
    hidden: tuple[str, int | None] = ("intermediate_size", None)
    normalised: bool | str = True
    router_bias: bool = False
    limit: float | None = None


EXPERT_FAMILIES = {
    "mixtral": ExpertFamily(count=8, per_token=2),
    "qwen3_moe": ExpertFamily(
        count=128, per_token=8, hidden=("moe_intermediate_size", 768), normalised="norm_topk_prob"
    ),
    "gpt_oss": ExpertFamily(count=128, per_token=4, router_bias=True, limit=7.0),
}


def expert_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a BaseConfig that concern experts; {} for a family without them.

    Raises:
        ValueError: A value is invalid, or asks for layers without experts; the key is named.
    """
    family = EXPERT_FAMILIES.get(values["model_type"])
    if family is None:
        return {}
    counts = {whole(values[key], key) for key in COUNTS if values.get(key) is not None} or {family.count}
    if len(counts) > 1:
        raise ValueError(
            f"num_local_experts={values[COUNTS[0]]} and num_experts={values[COUNTS[1]]} must be the same number"
        )
    if values.get("decoder_sparse_step") not in (None, 1) or values.get("mlp_only_layers"):
        asked = {key: values.get(key) for key in ("decoder_sparse_step", "mlp_only_layers")}
        raise ValueError(
            f"the model's config says {', '.join(f'{key}={shown(value)}' for key, value in asked.items() if value)}: "
            "some of its layers have no experts, which is not supported; every layer must have them"
        )
    normalised = family.normalised
    key, default = family.hidden
    hidden = values.get(key) or default
    found = {
        "experts": counts.pop(),
        "experts_per_token": whole(values.get("num_experts_per_tok") or family.per_token, "num_experts_per_tok"),
        "hidden": whole(hidden, key),
        "normalised_experts": bool(values.get(normalised, False)) if isinstance(normalised, str) else normalised,
        "router_bias": family.router_bias,
    }
    if family.limit is not None:
        for name, default in (("swiglu_limit", family.limit), ("swiglu_alpha", 1.702)):
            found[name] = number(default if values.get(name) is None else values[name], name)
    return found


def honoured_by_experts(family: str | None) -> tuple[str, ...]:
    """The keys of other architectures that this family's experts give a meaning to."""
    if family not in EXPERT_FAMILIES:
        return ()
    return (*COUNTS, *(("swiglu_limit", "swiglu_alpha") if EXPERT_FAMILIES[family].limit is not None else ()))
