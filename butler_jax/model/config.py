"""Configuration of a base model: its family, its sizes and its rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from butler_jax.storage import number, shown, whole

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
NORMS = ("pre", "post", "sandwich")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of a model.

    Attributes:
        kind: One of ROPE_KINDS.
        theta: Base of the wavelengths.
        fraction: Share of the head dimension that is rotated.
        factor: Context extension of linear, llama3, yarn and longrope.
        original_context: Context in tokens before the extension.
        attention_factor: Multiplies cosine and sine; None is the kind's own default.
        low_frequency_factor, high_frequency_factor: llama3's range of smoothing, in turns of the original context.
        beta_fast, beta_slow: YaRN's range of interpolation, in turns of the original context.
        mscale, mscale_all_dim: YaRN's two scales, whose ratio gives its attention factor.
        truncate: Whether YaRN rounds its range to whole dimensions.
        short_factor, long_factor: longrope's divisors of the frequencies, up to and beyond the original context.
    """

    kind: str = "default"
    theta: float = 10000.0
    fraction: float = 1.0
    factor: float = 1.0
    original_context: int | None = None
    attention_factor: float | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"unknown rope type {shown(self.kind)} (rope_type); supported: {', '.join(ROPE_KINDS)}")
        for name in (
            "theta",
            "fraction",
            "factor",
            "low_frequency_factor",
            "high_frequency_factor",
            "beta_fast",
            "beta_slow",
        ):
            if number(getattr(self, name), f"rope {name}") <= 0:
                raise ValueError(f"rope {name} must be above 0")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None and number(getattr(self, name), f"rope {name}") < 0:
                raise ValueError(f"rope {name} must be 0 or more, got {getattr(self, name)}")
        for name in ("short_factor", "long_factor"):
            if any(number(f, f"rope {name}") <= 0 for f in getattr(self, name)):
                raise ValueError(f"rope {name} must be above 0")
        if self.low_frequency_factor == self.high_frequency_factor:
            raise ValueError(
                f"rope low_frequency_factor and high_frequency_factor must differ, both are {self.low_frequency_factor}"
            )
        if self.theta <= 1:
            raise ValueError(f"rope theta must be above 1, got {self.theta}")
        if self.fraction > 1:
            raise ValueError(f"the rotated fraction (partial_rotary_factor) must be in (0, 1], got {self.fraction}")
        if self.kind in ("llama3", "yarn", "longrope"):
            if not self.original_context:
                raise ValueError(
                    f"rope type {self.kind!r} needs original_max_position_embeddings in the model's config"
                )
            whole(self.original_context, "original_max_position_embeddings", least=2)

    @property
    def border(self) -> int | None:
        """The most tokens of a row that longrope takes its short factors for; None of other kinds."""
        return self.original_context if self.kind == "longrope" else None


SIZES = {
    "vocab_size": 1 << 31,
    "width": 1 << 20,
    "hidden": 1 << 24,
    "layers": 1 << 12,
    "heads": 1 << 14,
    "kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "context": 1 << 31,
}
"""Upper bounds: above the size of any model, and low enough that no product of sizes overflows."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """A decoder of any supported family.

    Attributes:
        family: A name in FAMILIES.
        vocab_size, width, hidden: V, E and I, the hidden width of the feed-forward block or of one expert.
        layers, heads, kv_heads, head_dim: L, H, K and D.
        context: The longest sequence in tokens.
        norm_eps: Added to the mean square in every RMS norm.
        tied: The unembedding is the embedding.
        qkv_bias, output_bias, mlp_bias: Which projections have biases.
        qk_norm: Queries and keys have an RMS norm per head.
        experts: Experts of a layer's feed-forward block; 0 where it has one dense block.
        experts_per_token: How many of them compute a token.
        normalised_experts: The weights of a token's experts are divided by their sum.
        router_bias: The router, which chooses the experts, has a bias.
        swiglu_limit, swiglu_alpha: The limit and the slope of gpt-oss' gate (experts.limited_swiglu); a limit of None
            is the plain gate.
        joint_qk_norm: That norm goes over all heads together.
        activation: Of the gate, one of ACTIVATIONS; "gelu_tanh" is the approximation by tanh.
        norms: Where a block has its RMS norm: "pre" before it, "post" on its output, "sandwich" both.
        wide_norms: Norms multiply by their scale in float32, before rounding to the dtype of the stream.
        embedding_scale: Factor on the embeddings that enter layer 0, rounded to their dtype.
        residual_scale: Factor on the output of every block before it is added to the stream.
        attention_scale: Factor on the attention logits; None is D**-0.5.
        attention_softcap: Attention logits x become c tanh(x / c) for this c; None leaves them.
        attention_sinks: Every query head has one more logit, without a value, in its softmax.
        logit_scale: Factor on the logits of the vocabulary.
        logit_softcap: As attention_softcap, for the logits of the vocabulary.
        sliding_window: Tokens that a query of a sliding layer sees, itself included; None where no layer slides.
        sliding_layers: Which layers slide; empty for all of them.
        rope: The rotary embedding, of the layers that see everything where sliding_rope is given.
        sliding_rope: The rotary embedding of sliding layers; None is rope.
        rotated_layers: Which layers have a rotary embedding; empty for all of them.
    """

    family: str
    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float = 1e-6
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    normalised_experts: bool = False
    router_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    joint_qk_norm: bool = False
    activation: str = "silu"
    norms: str = "pre"
    wide_norms: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    rope: RopeConfig = field(default_factory=RopeConfig)
    sliding_rope: RopeConfig | None = None
    rotated_layers: tuple[bool, ...] = ()

    def __post_init__(self):
        for name, beyond in SIZES.items():
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {shown(value)}")
            if value >= beyond:
                raise ValueError(f"{name} must be below {beyond}, got {shown(value)}")
        if number(self.norm_eps, "norm_eps") < 0:
            raise ValueError(f"norm_eps must be 0 or more, got {self.norm_eps}")
        if self.heads % self.kv_heads != 0:
            raise ValueError(
                f"the number of query heads (num_attention_heads, {self.heads}) must be a multiple of the KV heads "
                f"(num_key_value_heads, {self.kv_heads})"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        self._check_experts()
        for name, known in (("activation", ACTIVATIONS), ("norms", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {shown(getattr(self, name))}; supported: {', '.join(known)}")
        for name in (
            "embedding_scale",
            "residual_scale",
            "attention_scale",
            "attention_softcap",
            "logit_scale",
            "logit_softcap",
        ):
            value = getattr(self, name)
            if value is not None and number(value, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.sliding_window is not None:
            whole(self.sliding_window, "sliding_window")
        if self.rotary_dim < 2:
            raise ValueError(
                f"the rotated fraction {self.rope.fraction} of a head of {self.head_dim} is less than two dimensions"
            )
        for name in ("sliding_layers", "rotated_layers"):
            entries = len(getattr(self, name))
            if entries not in (0, self.layers):
                raise ValueError(f"{name} must name every one of the {self.layers} layers, got {entries} entries")
        if self.sliding_rope is not None and self.sliding_rope.fraction != self.rope.fraction:
            raise ValueError("sliding layers and the others must rotate the same share of a head")
        factors = self.rope.short_factor, self.rope.long_factor
        if self.rope.kind == "longrope" and not all(len(f) == self.rotary_dim // 2 for f in factors):
            raise ValueError(
                f"longrope needs {self.rotary_dim // 2} short and long factors, got {[len(f) for f in factors]}"
            )

    def _check_experts(self) -> None:
        for name in ("experts", "experts_per_token"):
            if whole(getattr(self, name), name, least=0) >= 1 << 14:
                raise ValueError(f"{name} must be below {1 << 14}, got {getattr(self, name)}")
        if self.experts and not 0 < self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token must be from 1 to the number of experts ({self.experts}), got "
                f"{self.experts_per_token}"
            )
        for name in ("swiglu_limit", "swiglu_alpha"):
            if getattr(self, name) is not None and number(getattr(self, name), name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def extended(self, tokens: int) -> BaseConfig:
        """The configuration with a context of at least so many tokens, extended by YaRN (arXiv 2309.00071).

        The context becomes the least multiple of itself that is long enough. One that is long enough stays as it is.
        Layers with a rotary embedding of their own, which slide, keep it.

        Raises:
            ValueError: tokens is no whole number of at least 1, or the rotary embedding is scaled already.
        """
        factor = -(-whole(tokens, "context") // self.context)
        if factor == 1:
            return self
        if self.rope.kind != "default":
            raise ValueError(
                f"a context of {tokens} tokens is asked for, and the model has {self.context}: its rotary embedding is "
                f"scaled already ({self.rope.kind}) and cannot be extended; give at most {self.context}"
            )
        rope = replace(self.rope, kind="yarn", factor=float(factor), original_context=self.context)
        return replace(self, context=factor * self.context, rope=rope)

    @property
    def group(self) -> int:
        """Query heads per KV head, G."""
        return self.heads // self.kv_heads

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head are rotated."""
        return int(self.head_dim * self.rope.fraction)

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by, so that their logits have the factor D**-0.5 in every family."""
        return 1.0 if self.attention_scale is None else self.attention_scale * self.head_dim**0.5

    @property
    def layer_ropes(self) -> tuple[RopeConfig | None, ...]:
        """The rotary embedding of every layer; None for a layer without one."""
        rotated = self.rotated_layers or (True,) * self.layers
        ropes = (self.sliding_rope or self.rope if slides else self.rope for slides in self.sliding)
        return tuple(rope if turned else None for rope, turned in zip(ropes, rotated, strict=True))

    @property
    def sliding(self) -> tuple[bool, ...]:
        """For every layer, whether its attention is limited to the sliding window."""
        if self.sliding_window is None:
            return (False,) * self.layers
        return self.sliding_layers or (True,) * self.layers

    @property
    def served(self) -> tuple[bool, ...]:
        """For every layer, whether a predictor serves it: a policy chooses what it reads. The others are dense.

        Layer 0 is never served. Where another layer sees everything, those that slide are not served either: what they
        read does not grow with the text. Where all others slide, each is served within its window.
        """
        seeing = tuple(not slides and layer > 0 for layer, slides in enumerate(self.sliding))
        return seeing if any(seeing) else tuple(layer > 0 for layer in range(self.layers))

    @property
    def served_layers(self) -> tuple[int, ...]:
        """The indices of the served layers."""
        return tuple(layer for layer, serves in enumerate(self.served) if serves)

    @property
    def serves_windows(self) -> bool:
        """Whether the served layers see a sliding window: no layer but layer 0 sees everything."""
        return any(self.sliding[layer] for layer in self.served_layers)

    @property
    def near_layers(self) -> tuple[bool, ...]:
        """For every layer, whether it slides beside others that see everything."""
        return tuple(slides and not self.serves_windows for slides in self.sliding)

    @property
    def mixed(self) -> bool:
        """Whether a layer other than layer 0 is not served."""
        return len(self.served_layers) < self.layers - 1
