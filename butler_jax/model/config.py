"""Configuration of a base model: its family, its sizes and its rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass, field

from butler_jax.storage import number, shown, whole

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


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
            raise ValueError(f"unknown rope type {shown(self.kind)}; supported: {', '.join(ROPE_KINDS)}")
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
            raise ValueError(f"the rotated fraction must be in (0, 1], got {self.fraction}")
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
        vocab_size, width, hidden: V, E and I, the hidden width of the feed-forward block.
        layers, heads, kv_heads, head_dim: L, H, K and D.
        context: The longest sequence in tokens.
        norm_eps: Added to the mean square in every RMS norm.
        tied: The unembedding is the embedding.
        qkv_bias, output_bias, mlp_bias: Which projections have biases.
        qk_norm: Queries and keys have an RMS norm per head.
        sliding_window: Tokens that a query of a sliding layer sees, itself included; None where no layer slides.
        sliding_layers: Which layers slide; empty for all of them.
        rope: The rotary embedding.
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
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    rope: RopeConfig = field(default_factory=RopeConfig)

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
                f"the number of query heads ({self.heads}) must be a multiple of the KV heads ({self.kv_heads})"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.sliding_window is not None:
            whole(self.sliding_window, "sliding_window")
        if self.rotary_dim < 2:
            raise ValueError(
                f"the rotated fraction {self.rope.fraction} of a head of {self.head_dim} is less than two dimensions"
            )
        if len(self.sliding_layers) not in (0, self.layers):
            raise ValueError(
                f"sliding_layers must name every one of the {self.layers} layers, got {len(self.sliding_layers)} "
                "entries"
            )
        factors = self.rope.short_factor, self.rope.long_factor
        if self.rope.kind == "longrope" and not all(len(f) == self.rotary_dim // 2 for f in factors):
            raise ValueError(
                f"longrope needs {self.rotary_dim // 2} short and long factors, got {[len(f) for f in factors]}"
            )

    @property
    def group(self) -> int:
        """Query heads per KV head, G."""
        return self.heads // self.kv_heads

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head are rotated."""
        return int(self.head_dim * self.rope.fraction)

    @property
    def sliding(self) -> tuple[bool, ...]:
        """For every layer, whether its attention is limited to the sliding window."""
        if self.sliding_window is None:
            return (False,) * self.layers
        return self.sliding_layers or (True,) * self.layers
