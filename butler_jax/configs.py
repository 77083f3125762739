"""Frozen configurations that check themselves; the command line is generated from them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

from butler_jax.typed import fits, number, shown, whole

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def require_local(config) -> None:
    """Raise ValueError for a setting of a configuration that names a place in a bucket; only data_dir may.

    A path has lost a slash by then: gs://bucket/runs is gs:/bucket/runs.
    """
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        for one in value if isinstance(value, tuple) else (value,):
            found = re.search(r"(?:^|[:,])((gs|s3):/+[^,]*)", str(one)) if isinstance(one, (str, Path)) else None
            if found is not None and entry.name not in ("data_dir", "prompt", "stop"):
                raise ValueError(
                    f"--{entry.name.replace('_', '-')} {one}: files are not read from or written to a bucket's "
                    "address; mount the bucket (gcsfuse BUCKET DIRECTORY) and give the path under that directory, see "
                    "docs/tpu.md"
                )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of a model.

    kind: one of ROPE_KINDS. theta: base of the wavelengths. fraction: share of the head dimension that is rotated.
    factor: context extension of linear, llama3, yarn and longrope. original_context: context in tokens before the
    extension. attention_factor: multiplies cosine and sine; None is the kind's own default.
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
            if not number(getattr(self, name), f"rope {name}") > 0:
                raise ValueError(f"rope {name} must be above 0")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None and not number(getattr(self, name), f"rope {name}") >= 0:
                raise ValueError(f"rope {name} is < 0")
        for name in ("short_factor", "long_factor"):
            if not all(number(f, f"rope {name}") > 0 for f in getattr(self, name)):
                raise ValueError(f"rope {name} must be above 0")
        if self.low_frequency_factor == self.high_frequency_factor:
            raise ValueError("rope: equal low and high frequency factors")
        if not self.theta > 1:
            raise ValueError(f"rope theta must be above 1, got {self.theta}")
        if not (0 < self.fraction <= 1):
            raise ValueError(f"the rotated fraction must be in (0, 1], got {self.fraction}")
        if self.kind in ("llama3", "yarn", "longrope"):
            if not self.original_context:
                raise ValueError(
                    f"rope type {self.kind!r} needs original_max_position_embeddings in the model's config"
                )
            whole(self.original_context, "original_max_position_embeddings", least=2)


SIZES = {
    "vocab_size": 1 << 31, "width": 1 << 20, "hidden": 1 << 24, "layers": 1 << 12, "heads": 1 << 14,
    "kv_heads": 1 << 14, "head_dim": 1 << 14, "context": 1 << 31,
}  # fmt: skip
"""Above every model's size, and low enough that no product of sizes overflows."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """A decoder of any supported family, fully described (sizes in elements, context in tokens).

    window: tokens a sliding-window layer sees, itself included; windowed: which layers slide (empty: all of them
    when window is set).
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
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self):
        for name, beyond in SIZES.items():
            value = getattr(self, name)
            if not (type(value) is int and value > 0):
                raise ValueError(f"{name} must be a positive integer, got {shown(value)}")
            if not value < beyond:
                raise ValueError(f"{name} must be below {beyond}, got {shown(value)}")
        if not number(self.norm_eps, "norm_eps") >= 0:
            raise ValueError(f"norm_eps must be 0 or more, got {self.norm_eps}")
        if self.heads % self.kv_heads != 0:
            raise ValueError(
                f"the number of query heads ({self.heads}) must be a multiple of the KV heads ({self.kv_heads})"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.window is not None and not whole(self.window, "window") > 0:
            raise ValueError(f"window must be positive, got {self.window}")
        if not self.rotary_dim >= 2:
            raise ValueError(
                f"the rotated fraction {self.rope.fraction} of a head of {self.head_dim} is less than two dimensions"
            )
        if len(self.windowed) not in (0, self.layers):
            raise ValueError(
                f"windowed must name every one of the {self.layers} layers, got {len(self.windowed)} entries"
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
        """For every layer, whether its attention is limited to the window."""
        if self.window is None:
            return (False,) * self.layers
        return self.windowed or (True,) * self.layers


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Which predictor, and its sizes.

    rank is R; stride is P, how many layers one producer serves (the contextual predictor has a single producer and
    ignores it); hidden is the inner width I of the contextual and producer predictors (None: 512).
    """

    kind: Literal["lookahead", "producer", "contextual"] = "lookahead"
    rank: int = 16
    stride: int = 4
    hidden: int | None = None

    def __post_init__(self):
        if not (self.rank > 0 and self.rank % 2 == 0):
            raise ValueError(f"rank must be positive and even, got {self.rank}")
        if not self.stride > 0:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.hidden is not None and not self.hidden > 0:
            raise ValueError(f"hidden must be positive, got {self.hidden}")


class Host(NamedTuple):
    """Where the first process of a run listens, how many processes there are, and which of them this one is."""

    address: str
    count: int
    index: int


def parse_hosts(text: str) -> Host | None:
    """'HOST:PORT,COUNT,INDEX' -> Host; None for 'auto'. Raises ValueError for anything else."""
    if text == "auto":
        return None
    match = re.fullmatch(r"([^,\s]+:([0-9]{1,5})),([0-9]{1,9}),([0-9]{1,9})", text)
    if not match:
        raise ValueError(f"--distributed {text!r} is neither auto nor HOST:PORT,COUNT,INDEX, as in 10.0.0.1:1234,4,0")
    host = Host(match[1], int(match[3]), int(match[4]))
    if not (0 < int(match[2]) < 65536):
        raise ValueError(f"--distributed {text!r}: {match[2]} is no port; ports are 1 ... 65535")
    if not host.count > 0:
        raise ValueError(f"--distributed {text!r}: the number of processes must be at least 1")
    if not host.index < host.count:
        raise ValueError(
            f"--distributed {text!r}: {host.index} is none of the {host.count} processes; they are 0 ... "
            f"{host.count - 1}"
        )
    return host


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """What a command needs to know to run on several hosts."""

    distributed: str = ""
    """Several hosts through jax.distributed, the same command on each: auto where the cluster says who is who (TPU
    pods, Slurm), else HOST:PORT,COUNT,INDEX."""
    start_timeout: int = 300
    """Seconds that a host waits for the others at the start."""
    host_timeout: int = 30
    """Seconds without a sign of life from a host until the others end."""

    def __post_init__(self):
        if self.distributed:
            parse_hosts(self.distributed)
        for name in ("start_timeout", "host_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1 s, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class FitConfig(HostsConfig):
    """What every training run has: its length, its optimiser, its devices and its directory."""

    data: str = "python_docs"
    """python_docs, coreference, coreference_short, text:PATH[,PATH...], tfds:NAME, or a mixture as A:0.5+B:0.5."""
    data_dir: str | None = None
    """Where prepared data sets lie; may be gs://. Default: the TFDS data directory."""
    steps: int = 300
    """Optimiser steps in all."""
    length: int = 512
    """Tokens in a row."""
    batch_size: int = 4
    """Rows a step, over all devices."""
    accumulate: int = 1
    """Split a batch into this many parts and add their gradients up; saves memory."""
    learning_rate: float | None = None
    """Peak learning rate. Default: what suits the model or predictor being trained."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; a cosine to a tenth of the peak follows."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay of matrices."""
    clip: float = 10.0
    """Largest global gradient norm."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the base model and the activations. Default: float32 on CPU, bfloat16 on accelerators."""
    mesh: str = ""
    """Devices as data=N,model=M. Default: as many devices on the data axis as divide the batch."""
    attention: Literal["xla", "cudnn", "splash"] | None = None
    """Attention implementation. Default: splash on TPU, cuDNN on GPU where it can, else xla."""
    seed: int = 0
    """Seed of the data order, of random parameters and of dropout."""
    run_dir: Path | None = None
    """Directory of checkpoints and metrics. Default: in runs/, named after base, predictor and data, or pretrain."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one more at the end and at Ctrl-C."""
    keep: int = 2
    """How many of the newest checkpoints to keep; the best is kept besides."""
    eval_every: int = 100
    """Steps between validations, besides those at every checkpoint and at the end; 0: no others."""
    log_every: int = 10
    """Steps between lines on a plain screen; metrics.jsonl has every step."""

    def __post_init__(self):
        super().__post_init__()
        require_local(self)
        object.__setattr__(self, "data_dir", None if self.data_dir is None else str(self.data_dir))
        positive = ("steps", "length", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not self.length > 1:
            raise ValueError(f"--length must be at least 2 tokens, got {self.length}")
        if not self.eval_every >= 0:
            raise ValueError(f"--eval-every must be 0 or more, got {self.eval_every}")
        if not (0 <= self.warmup < 1):
            raise ValueError(f"--warmup must be in [0, 1), got {self.warmup}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"--learning-rate must be above 0, got {self.learning_rate}")
        if self.learning_rate == math.inf:
            raise ValueError("--learning-rate must be finite, got inf")
        if not self.clip > 0:
            raise ValueError(f"--clip must be above 0, got {self.clip}")
        if not (0 <= self.weight_decay < math.inf):
            raise ValueError(f"--weight-decay must be 0 or more, got {self.weight_decay}")
        if self.batch_size % self.accumulate != 0:
            raise ValueError(f"--batch-size {self.batch_size} is not divisible by --accumulate {self.accumulate}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FitConfig):
    """Distil a token-importance predictor from a frozen base model."""

    base: str = "tiny"
    """A Hugging Face directory, a hub id, a .gguf file, or tiny (embedded)."""
    predictor: Literal["lookahead", "producer", "contextual"] = "lookahead"
    """lookahead (ours), producer (the paper's second version) or contextual (its first)."""
    rank: int = 16
    """Width R of the importance queries and keys."""
    stride: int = 4
    """Layers served by one producer, P."""
    hidden: int | None = None
    """Inner width I of the contextual and producer predictors. Default: 512."""
    objective: Literal["cross_entropy", "squared_error"] | None = None
    """Distillation loss. Default: squared_error for contextual, cross_entropy for the others."""
    sinks: int = 4
    """First tokens of a document that will always be read: the cross entropy is about the other tokens. 0, and a window
    of 0, for the loss as published."""
    window: int = 8
    """Newest tokens that will always be read, likewise."""
    calibration: int = 4
    """Batches on which the lookahead predictor chooses its rotary pairs."""

    def __post_init__(self):
        super().__post_init__()
        if not self.calibration > 0:
            raise ValueError(f"--calibration must be at least 1, got {self.calibration}")
        for name in ("sinks", "window"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if not self.sinks + self.window < self.length:
            raise ValueError(
                f"--sinks {self.sinks} and --window {self.window} leave nothing to choose in --length {self.length}; "
                "raise the length"
            )
        self.predictor_config()

    def predictor_config(self) -> PredictorConfig:
        """The predictor these settings describe."""
        return PredictorConfig(kind=self.predictor, rank=self.rank, stride=self.stride, hidden=self.hidden)


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How many tokens a query attends, and which of them are never left to the scores.

    budget: all attended tokens, sinks, window and neighbours included. A float is a fraction of the keys a dense query
    would attend, rounded up, and never less than `least`; an int is a number of tokens. sinks: first tokens of the
    document. window: newest tokens, the query's own included. unit: tokens are chosen in pages of so many, a power of
    two, each by its best token. threshold: per layer and KV head [L][K], what scores below it is not read even where
    the budget has room (`calibrate_thresholds` makes them; layer 0's are ignored); the budget is then the most a row
    takes. interval: decode steps from one choice to the next; between them the chosen stay and the window moves on.
    neighbours: of what scores choose, only half the room is filled, and each run of c consecutive units brings the c
    units to its right. min_context: rows of up to so many tokens attend everything.
    """

    budget: float | int = 0.25
    sinks: int = 4
    window: int = 8
    unit: int = 1
    threshold: tuple[tuple[float, ...], ...] | None = None
    interval: int = 1
    neighbours: bool = False
    min_context: int = 0

    def __post_init__(self):
        for name in ("budget", "sinks", "window", "unit", "interval", "min_context"):
            value = getattr(self, name)
            if hasattr(value, "item"):  # of numpy
                value = value.item()
                object.__setattr__(self, name, value)
            kinds = (int, float) if name == "budget" else int
            if not (isinstance(value, kinds) and not isinstance(value, bool)):
                raise ValueError(f"{name} must be a {'number' if name == 'budget' else 'whole number'}, got {value!r}")
        if not self.sinks >= 0:
            raise ValueError(f"sinks must be 0 or more, got {self.sinks}")
        if not self.window >= 1:
            raise ValueError(f"the window must be at least 1 (the token itself), got {self.window}")
        if not (self.unit >= 1 and self.unit & (self.unit - 1) == 0):
            raise ValueError(f"the unit must be a power of two (1, 2, 4, ...), got {self.unit!r}")
        if not self.interval >= 1:
            raise ValueError(f"the interval must be at least 1 step, got {self.interval}")
        if not self.min_context >= 0:
            raise ValueError(f"min_context must be 0 or more tokens, got {self.min_context}")
        if not self.budget > 0:
            raise ValueError(
                f"the budget must be above 0, got {self.budget}; give a fraction such as 0.25 or a number of tokens"
            )
        if isinstance(self.budget, float):
            if not self.budget <= 1:
                raise ValueError(
                    f"a fractional budget is at most 1.0, got {self.budget}; give an integer for a number of tokens"
                )
        else:
            pages = "" if self.unit == 1 else f" in pages of {self.unit}"
            if not self.budget >= self.least:
                raise ValueError(
                    f"a budget of {self.budget} tokens is below {self.sinks} sinks + {self.window} window{pages} = "
                    f"{self.least}; give at least {self.least}, or a fraction such as 0.25 (everything is 1.0)"
                )
        if self.threshold is not None:
            shape = "threshold must hold one number for every layer and KV head, [L][K]"
            try:
                rows = tuple(tuple(float(value) for value in row) for row in self.threshold)
            except TypeError:
                raise ValueError(f"{shape}; got {self.threshold!r}") from None
            if not (len(rows) > 0 and len({len(row) for row in rows}) == 1 and len(rows[0]) > 0):
                raise ValueError(f"{shape}; got rows of {sorted({len(row) for row in rows})} numbers")
            object.__setattr__(self, "threshold", rows)

    @property
    def rule(self) -> SelectionConfig:
        """The same without budget, thresholds and min_context, which jitted code takes as data."""
        return dataclasses.replace(self, budget=1.0, threshold=None, min_context=0)

    @property
    def least(self) -> int:
        """The most tokens that sinks and window take, whole pages counted: every row's budget is at least this."""
        return -(-self.sinks // self.unit) * self.unit + self.window + self.unit - 1


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(FitConfig):
    """Train the embedded base model `tiny` from nothing: its tokenizer, its weights, its card."""

    data: str = "python_docs:0.25+coreference:0.4+coreference_short:0.35"
    """Training text, as --data of train.py."""
    steps: int = 1000
    """Optimiser steps in all."""
    length: int = 512
    """Tokens in a row; the last `long_steps` steps use the whole context instead."""
    long_steps: int = 60
    """Final steps at rows of the full context, with as many tokens a step."""
    batch_size: int = 8
    """Rows a step, over all devices."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay of matrices."""
    clip: float = 1.0
    """Largest global gradient norm."""
    checkpoint_every: int = 250
    """Steps between checkpoints; one more at the end and at Ctrl-C."""
    vocab_size: int = 2048
    """Entries of the byte-level BPE."""
    width: int = 128
    """Model width E."""
    inner: int = 384
    """Width of the feed-forward block."""
    layers: int = 6
    """Layers L."""
    heads: int = 8
    """Query heads H."""
    kv_heads: int = 2
    """KV heads K."""
    head_dim: int = 32
    """Head dimension D."""
    context: int = 2048
    """Longest context in tokens."""
    out: Path | None = None
    """Directory for the finished model in Hugging Face layout. Default: RUN_DIR/model."""

    def __post_init__(self):
        super().__post_init__()
        if not self.length <= self.context:
            raise ValueError(f"--length {self.length} is beyond --context {self.context}")
        if not (0 <= self.long_steps <= self.steps):
            raise ValueError(f"--long-steps must be in 0..{self.steps}, got {self.long_steps}")
        if not self.vocab_size > 256:
            raise ValueError(f"--vocab-size must be above 256 (the bytes), got {self.vocab_size}")
        self.base_config()

    def base_config(self) -> BaseConfig:
        """The Llama-family model these settings describe."""
        return BaseConfig(
            family="llama",
            vocab_size=self.vocab_size,
            width=self.width,
            hidden=self.inner,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            context=self.context,
            norm_eps=1e-5,
            tied=True,
            rope=RopeConfig(theta=1e6),
        )


DOWNSTREAM = ("lambada", "piqa", "winogrande", "arc_easy")
TASKS = ("perplexity", "attention", "coreference", "needle", "key_value", "variables", *DOWNSTREAM)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(HostsConfig):
    """Judge a base model under policies and budgets, and the predictor of a training run among them.

    Lists are comma-separated on the command line. Budgets are fractions (0.25 or 1/4) or numbers of tokens (256).
    """

    run: Path | None = None
    """Directory of a training run; its predictor is the policy tokenbutler. Default: the base model alone."""
    base: str | None = None
    """A Hugging Face directory, a hub id, a .gguf file, or tiny (embedded). Default: the run's."""
    compare: tuple[str | Path, ...] = ()
    """Further runs on the same base: their predictors are judged too, as tokenbutler:KIND."""
    tasks: tuple[str, ...] = ("perplexity", "attention", "coreference")
    """perplexity; attention (recalled mass, hit rate, rank correlation); coreference; needle, key_value, variables;
    lambada, piqa, winogrande, arc_easy (need --downstream and the extra harness)."""
    text: Path | None = None
    """Text file for perplexity, attention, and the haystack of needles. Default: the held-out part of --data."""
    data: str | None = None
    """Text and data sets as train.py takes them (text:..., tfds:...). Default: the run's, else python_docs."""
    downstream: Path | None = None
    """Directory of lambada_openai.jsonl, piqa.jsonl, winogrande.jsonl and arc_easy.jsonl."""
    policies: tuple[str, ...] | None = None
    """dense, oracle, oracle_head, random, streaming, h2o, snapkv, citrus, quest, lowrank, tokenbutler; in Python also
    policies themselves. snapkv and citrus run row by row here. Default: dense, oracle, random, streaming and, where
    there is a predictor, tokenbutler."""
    budgets: tuple[str | float, ...] = (0.5, 0.25, 0.125, 0.0625)
    """Share of the causal keys a query attends, or an integer number of tokens; sinks and window included."""
    sinks: int = 4
    """First tokens that are always attended."""
    window: int = 8
    """Newest tokens that are always attended."""
    tokens: int = 8192
    """Tokens of text for perplexity; without --text, rounded up to whole batches of windows."""
    context: int = 1024
    """Tokens in a window of text; windows do not overlap."""
    stride: int | None = None
    """Perplexity in overlapping windows, each so many tokens after the one before; a token is predicted once, after at
    least context - stride others. Needs --text."""
    attention_rows: int = 256
    """About how many rows of each window the task attention measures, spread evenly."""
    samples: int = 64
    """Co-reference samples, key_value and variables samples of each length."""
    lengths: tuple[str | int, ...] = (256, 512, 1024)
    """Tokens of the samples of needle, key_value and variables."""
    depths: tuple[str | float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where needles lie: 0 is the beginning of the haystack, 1 its end."""
    needles: int = 4
    """Needle samples of each length and depth."""
    limit: int = 200
    """Items of each downstream task."""
    batch_size: int = 4
    """Windows or samples in a pass."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the base model. Default: float32 on CPU, bfloat16 on accelerators."""
    score_dtype: Literal["int8"] | None = None
    """int8 rounds the predictor's importance keys as decoding stores them after a prompt of the whole text.
    Default: that of the base model."""
    data_dir: str | None = None
    """Where prepared data sets lie; may be gs://. Default: the TFDS data directory."""
    seed: int = 0
    """Seed of the samples and of the policy random."""
    out: Path | None = None
    """Directory of the report. Default: RUN/eval, without a run ./eval."""

    def __post_init__(self):
        super().__post_init__()
        require_local(self)
        object.__setattr__(self, "data_dir", None if self.data_dir is None else str(self.data_dir))
        for name in ("tasks", "policies", "budgets", "lengths", "depths"):
            if getattr(self, name) is None:
                continue
            object.__setattr__(self, name, _split_list(getattr(self, name)))
            if not getattr(self, name):
                raise ValueError(f"--{name} names nothing; give at least one")
        object.__setattr__(self, "compare", tuple(Path(p) for p in _split_list(self.compare)))
        object.__setattr__(self, "budgets", tuple(parse_budget(b) for b in self.budgets))
        object.__setattr__(self, "lengths", _numbers("lengths", int, self.lengths))
        object.__setattr__(self, "depths", _numbers("depths", float, self.depths))
        unknown = [t for t in self.tasks if t not in TASKS]
        if unknown:
            raise ValueError(f"unknown task {', '.join(unknown)}; known: {', '.join(TASKS)}")
        if not all(n > 1 for n in self.lengths):
            raise ValueError(f"--lengths are numbers of tokens, got {min(self.lengths)}")
        if not all(0 <= d <= 1 for d in self.depths):
            raise ValueError(f"--depths are 0 ... 1, got {self.depths}")
        wanting = [t for t in self.tasks if t in DOWNSTREAM]
        if wanting and self.downstream is None:
            raise ValueError(f"the task {', '.join(wanting)} reads local files: give their directory with --downstream")
        if not (self.stride is None or (0 < self.stride < self.context and self.text is not None)):
            raise ValueError(
                f"--stride must be 1 ... {self.context - 1}, below the context, and needs --text; got {self.stride}"
            )
        for name in ("tokens", "context", "samples", "batch_size", "attention_rows", "needles", "limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not self.context > 1:
            raise ValueError(f"--context must be at least 2 tokens, got {self.context}")
        if not self.tokens > 1:
            raise ValueError(f"--tokens must be at least 2, got {self.tokens}")
        for budget in self.budgets:
            self.selection(budget)

    def selection(self, budget: float | int) -> SelectionConfig:
        """The selection of one of the budgets."""
        return SelectionConfig(budget=budget, sinks=self.sinks, window=self.window)


def _numbers(name: str, kind: type, values: tuple) -> tuple:
    try:
        return tuple(kind(v) for v in values)
    except ValueError:
        raise ValueError(f"--{name} must be numbers separated by commas, got {','.join(map(str, values))}") from None


def _split_list(values) -> tuple:
    """('a,b', 'c') or 'a,b,c' -> ('a', 'b', 'c'); what is not text stays; repeated entries once."""
    values = (values,) if isinstance(values, str) or not isinstance(values, Iterable) else values
    parts = [p for v in values for p in (v.split(",") if isinstance(v, str) else (v,))]
    parts = [p.strip() if isinstance(p, str) else p for p in parts]
    return tuple(dict.fromkeys(p for p in parts if p != ""))


def parse_budget(text: str | float | int) -> float | int:
    """'0.25' or '1/4' -> 0.25, '256' -> 256 tokens; numbers stay. Raises ValueError for anything else."""
    if not isinstance(text, str):
        return text
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(text) if not text.isdigit() else int(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"budget {text!r} is not a number; write a fraction (0.25 or 1/4) or a number of tokens (256)"
        ) from None


def to_dict(config) -> dict:
    """A configuration as JSON-ready nested dicts (paths become strings)."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls, values: dict):
    """Build configuration `cls` from to_dict's output.

    Raises ValueError naming keys that `cls` does not have, lacks, or that have a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} is made from a JSON object, got {shown(values)}")
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, get_type_hints(cls)
    unknown = sorted(shown(key) for key in set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(fields)}")
    absent = dataclasses.MISSING
    lacking = [n for n, f in fields.items() if n not in values and f.default is absent and f.default_factory is absent]
    if lacking:
        raise ValueError(f"{cls.__name__} needs {', '.join(lacking)}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name == "rope" and isinstance(value, dict):
            value = from_dict(RopeConfig, value)
        if not fits(value, hints[name]):
            raise ValueError(f"{cls.__name__}: {name} cannot be {shown(value)}; it is {fields[name].type}")
        built[name] = _tuples(value)
    return cls(**built)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
