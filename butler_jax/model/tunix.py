"""Qwen3 of google-tunix as a base. Needs the extra tunix.

Source: `tunix.models.qwen3.model`, whose modules are called as its own forward pass calls them.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from butler_jax.model.adapter import AttentionInputs, LayerWeights, ModelAdapter
from butler_jax.model.config import BaseConfig, RopeConfig

THETA = 1_000_000.0  # Tunix rotates by it whatever its configuration's rope_theta is


class TunixQwen3(ModelAdapter):
    """The adapter of `tunix.models.qwen3.model.Qwen3` without experts.

    Args:
        model: The NNX module.
        context: The longest sequence in tokens; Tunix's configuration does not say it.

    Raises:
        ValueError: The model has experts, or a rotary base that Tunix passes over.
    """

    def __init__(self, model: Any, *, context: int = 32768):
        sizes = model.config
        if sizes.num_experts is not None:
            raise ValueError(f"TunixQwen3 takes dense models, and this one has {sizes.num_experts} experts a layer")
        if sizes.rope_theta != THETA:
            raise ValueError(
                f"rope_theta={sizes.rope_theta}, but Tunix's Qwen3 rotates by {THETA:g} whatever it says; correct the "
                "configuration, so that the predictor rotates as the model does"
            )
        self.model = model
        self.config = BaseConfig(
            family="qwen3",
            vocab_size=sizes.vocab_size,
            width=sizes.embed_dim,
            hidden=sizes.hidden_dim,
            layers=sizes.num_layers,
            heads=sizes.num_heads,
            kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            context=context,
            norm_eps=sizes.norm_eps,
            tied=sizes.use_tied_embedding,
            qk_norm=True,
            rope=RopeConfig(theta=THETA),
        )

    @property
    def layers(self):
        """Tunix's DecoderLayers."""
        return self.model.layers

    def embed(self, tokens):
        """Rows of the embedding in the precision of the activations."""
        return self.model.embedder.encode(tokens)

    def project(self, layer, x, positions):
        """Norm, projections, norms per head and rotary."""
        from tunix.models.qwen3.model import apply_rope

        h, attention = layer.input_layernorm(x), layer.attn
        q, k = attention.q_norm(attention.q_proj(h)), attention.k_norm(attention.k_proj(h))
        turned = (apply_rope(a, positions, head_dim=self.config.head_dim) for a in (q, k))
        return AttentionInputs(*turned, k, attention.v_proj(h))

    def finish(self, layer, x, mixed):
        """Output projection, feed-forward block, and the residual connections of both."""
        x = x + layer.attn.o_proj(mixed)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def logits(self, x):
        """Final norm and unembedding."""
        y = self.model.final_norm(x)
        return jnp.astype(self.model.embedder.decode(y) if self.config.tied else self.model.lm_head(y), jnp.float32)

    def weights(self, layer):
        """The parameters as Tunix has them; the layouts are the same."""
        attention = layer.attn
        q, o, q_norm = (module.w[...] for module in (attention.q_proj, attention.o_proj, attention.q_norm))
        return LayerWeights(layer.input_layernorm.w[...], q, o, q_norm=q_norm)
