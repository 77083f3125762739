"""Settings of an evaluation."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from butler_jax.parallel import HostsConfig
from butler_jax.selection import Allocation, SelectionConfig, parse_budget
from butler_jax.storage import expand_home, require_local, require_positive, settle_types, split_list

DOWNSTREAM = ("lambada", "piqa", "winogrande", "arc_easy")

OF_LENGTHS = ("needle", "key_value", "variables")  # tasks whose samples have the --lengths
READ_BY = {
    "downstream": DOWNSTREAM,
    "limit": DOWNSTREAM,
    "lengths": OF_LENGTHS,
    "depths": ("needle",),
    "needles": ("needle",),
    "samples": ("coreference", "key_value", "variables"),
    "stride": ("perplexity",),
    "attention_rows": ("attention",),
}
"""The options that some tasks alone read."""

TASKS = ("perplexity", "attention", "coreference", *OF_LENGTHS, *DOWNSTREAM)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(HostsConfig):
    """Evaluate a base model under policies and budgets, and the predictor of a training run among them.

    Lists are comma-separated on the command line. Budgets are fractions (0.25 or 1/4) or numbers of tokens (256).
    """

    run: Path | None = None
    """A training run, a directory of save_predictor or save_pretrained, or a hub id; its predictor is the policy
    tokenbutler. Default: the base model alone."""
    base: str | None = None
    """A Hugging Face directory, a hub id, a .gguf file, or tiny (embedded). Default: the run's."""
    compare: tuple[str | Path, ...] = ()
    """Further runs on the same base: their predictors are evaluated too, as tokenbutler:KIND."""
    tasks: tuple[str, ...] = ("perplexity", "attention", "coreference")
    """perplexity; attention (recalled mass, hit rate, rank correlation); coreference; needle, key_value, variables;
    lambada, piqa, winogrande, arc_easy (need --downstream and the extra harness)."""
    text: Path | None = None
    """Text file for perplexity, attention, and the haystack of needles, as a path of --data text: (compressed, .jsonl,
    .parquet, #FEATURE, -). Default: the held-out part of --data."""
    data: str | None = None
    """Text and data sets, as --data of train (text:..., tfds:...). Default: the run's, else python_docs."""
    downstream: Path | None = None
    """Directory of lambada_openai.jsonl, piqa.jsonl, winogrande.jsonl and arc_easy.jsonl."""
    policies: tuple[str, ...] | None = None
    """dense, oracle, oracle_head, oracle_residual, random, streaming, h2o, snapkv, citrus, quest, lowrank, tokenbutler,
    each with settings after it if need be (quest:page=8); in Python also Policy objects. snapkv and citrus run row by
    row here. Default: dense, oracle, streaming and, where there is a predictor, tokenbutler."""
    budgets: tuple[str | float, ...] = (0.5, 0.25, 0.125, 0.0625)
    """Tokens that a query reads, with sinks and recent tokens: fractions of the tokens it may see, or numbers of
    tokens."""
    selection: SelectionConfig = field(
        default=SelectionConfig(), metadata={"flags": ("sinks", "recent", "unit", "interval", "neighbours", "floor")}
    )
    """How tokens are chosen. Each of --budgets replaces its budget."""
    allocations: tuple[str, ...] = ("per_head", "tolerance")
    """How heads share reads: per_head, per_layer, tolerance, top_p (as the allocation of a selection). A policy runs
    under those that its scores allow, and per_head where they allow none. The tolerance of a budget, and the p of
    top_p, are calibrated on the text, so that layers, heads and rows together read the budget."""
    tails: tuple[str | int, ...] = (0,)
    """Tokens of the spans by which keys that are not read are estimated, as the tail of a selection; 0: they are not.
    Every policy that does not evict runs with each."""
    prompt_tokens: int | None = None
    """First tokens of every document of a window that are read densely, as a prompt, and not counted: what follows is
    evaluated, as if it were decoded. Above 0, everything before the answer of a sample is a prompt too. 0 limits every
    row. Default: a quarter of a window, and 0 with --stride."""
    tokens: int = 8192
    """Tokens of text for perplexity; without --text, rounded up to whole batches of windows."""
    context: int = 1024
    """Tokens in a window of text. Windows overlap only with --stride."""
    stride: int | None = None
    """Tokens from the start of one window to the start of the next, for perplexity in overlapping windows. A token is
    predicted once, after at least context - stride others. Needs --text."""
    attention_rows: int = 256
    """About how many rows of each window the task attention measures, spread evenly."""
    samples: int = 64
    """Samples of coreference, and of key_value and variables at each length."""
    lengths: tuple[str | int, ...] = (256, 512, 1024)
    """Tokens of the samples of needle, key_value and variables."""
    depths: tuple[str | float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where needles lie: 0 is the beginning of the haystack, 1 its end."""
    needles: int = 4
    """Samples of needle at each length and depth."""
    limit: int = 200
    """Items of each downstream task."""
    batch_size: int = 4
    """Windows or samples in a pass."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the base model. Default: float32 on CPU, bfloat16 on accelerators."""
    score_dtype: Literal["int8"] | None = None
    """int8 rounds the predictor's k_imp as decoding stores it after a prompt of the whole text. Default: the precision
    of the base model."""
    mesh: str = ""
    """Devices that measure each cell together, as in data=4,model=2. data splits the batch, model and expert the base,
    sequence the tokens of a row. Default: the first device; with --distributed, every host measures cells of its
    own."""
    data_dir: str | None = None
    """Where prepared data sets lie; may be gs://. Default: the TFDS data directory."""
    seed: int = 0
    """Seed of the samples and of the policy random."""
    out: Path | None = None
    """Directory of the report. Default: RUN/eval, without a run ./eval."""

    def __post_init__(self):
        super().__post_init__()
        settle_types(self)
        require_local(self)
        expand_home(self, "run", "out")
        self._settle_lists()
        if not isinstance(self.selection, SelectionConfig):
            raise ValueError(f"selection must be a SelectionConfig, got {self.selection!r}")
        require_positive(self, "tokens", "context", "samples", "batch_size", "attention_rows", "needles", "limit")
        if self.context == 1:
            raise ValueError(f"--context must be at least 2 tokens, got {self.context}")
        self._settle_prompts()
        if min(self.lengths) <= 1:
            raise ValueError(f"--lengths must be at least 2 tokens, got {min(self.lengths)}")
        if not all(0 <= d <= 1 for d in self.depths):
            raise ValueError(f"--depths are 0 ... 1, got {self.depths}")
        wanting = [t for t in self.tasks if t in DOWNSTREAM]
        if wanting and self.downstream is None:
            raise ValueError(f"the task {', '.join(wanting)} reads local files: give their directory with --downstream")
        if not (self.stride is None or (0 < self.stride < self.context and self.text is not None)):
            raise ValueError(
                f"--stride must be 1 ... {self.context - 1}, below the context, and needs --text; got {self.stride}"
            )
        if self.tokens == 1:
            raise ValueError(f"--tokens must be at least 2, got {self.tokens}")
        self._check_selection()

    def _settle_lists(self) -> None:
        """Lists as tuples of numbers or names. Raises ValueError where one is empty or has an unknown name."""
        for name in ("tasks", "policies", "budgets", "allocations", "tails", "lengths", "depths"):
            if getattr(self, name) is None:
                continue
            object.__setattr__(self, name, split_list(getattr(self, name)))
            if not getattr(self, name):
                raise ValueError(f"--{name} names nothing; give at least one")
        object.__setattr__(self, "compare", tuple(Path(p).expanduser() for p in split_list(self.compare)))
        object.__setattr__(self, "budgets", tuple(parse_budget(b) for b in self.budgets))
        if {type(b) for b in self.budgets if b == 1} == {int, float}:
            raise ValueError("--budgets 1 and 1.0 are one token and everything; give them to two evaluations")
        object.__setattr__(self, "tails", _numbers("tails", int, self.tails))
        object.__setattr__(self, "lengths", _numbers("lengths", int, self.lengths))
        object.__setattr__(self, "depths", _numbers("depths", float, self.depths))
        unknown = [t for t in self.tasks if t not in TASKS]
        if unknown:
            raise ValueError(f"unknown task {', '.join(unknown)}; known: {', '.join(TASKS)}")
        unknown = [a for a in self.allocations if a not in get_args(Allocation)]
        if unknown:
            raise ValueError(f"unknown allocation {', '.join(unknown)}; known: {', '.join(get_args(Allocation))}")

    def _settle_prompts(self) -> None:
        """Fill in prompt_tokens. Raises ValueError where it does not fit the context, the interval or the stride."""
        interval = self.selection.interval
        if self.prompt_tokens is None:
            prompt = 0 if self.stride is not None else self.context // 4 // interval * interval
            object.__setattr__(self, "prompt_tokens", prompt)
        if not 0 <= self.prompt_tokens < self.context:
            raise ValueError(
                f"--prompt-tokens must be 0 ... {self.context - 1}, below the context; got {self.prompt_tokens}"
            )
        if interval.bit_count() != 1 or interval > 128:
            raise ValueError(f"the simulation chooses every 1, 2, 4, ... 128 rows; --interval is {interval}")
        if self.prompt_tokens % interval:
            raise ValueError(
                f"decoding chooses at the first row after a prompt: --prompt-tokens must be a multiple of --interval "
                f"{interval}, got {self.prompt_tokens}"
            )
        if self.prompt_tokens and self.stride is not None:
            raise ValueError("--prompt-tokens and --stride both say which tokens are predicted; give one of them")

    def _check_selection(self) -> None:
        """Raise ValueError for settings of the selection that the lists replace, or that a budget does not allow."""
        if self.selection.tail:
            raise ValueError(
                f"the tails of an evaluation are given as tails={(self.selection.tail,)}; leave 0 in the selection"
            )
        if self.selection.allocation != "per_head":
            raise ValueError(
                f"the allocations of an evaluation are given as allocations={(self.selection.allocation,)}, and their "
                "tolerances are found for the budgets; leave both out of the selection"
            )
        self.selection.check_floor(*self.allocations)
        if self.selection.threshold is not None and self.allocations != ("per_head",):
            raise ValueError('thresholds go with the allocation per_head alone; give allocations=("per_head",)')
        for budget, tail in itertools.product(self.budgets, self.tails):
            self.selection_at(budget, tail)

    def check_given(self, given: set[str]) -> None:
        """Raise ValueError for an option that was given and that none of the tasks reads; given: names of fields."""
        for name, readers in READ_BY.items():
            if name in given and not set(readers) & set(self.tasks):
                raise ValueError(
                    f"--{name.replace('_', '-')} is for the tasks {', '.join(readers)}, and --tasks names "
                    f"{', '.join(self.tasks)}; leave it out, or add a task"
                )

    def selection_at(self, budget: float | int, tail: int = 0) -> SelectionConfig:
        """The selection with one of the budgets and tails."""
        return dataclasses.replace(self.selection, budget=budget, tail=tail)


def _numbers(name: str, kind: type, values: tuple) -> tuple:
    try:
        if kind is int and any(isinstance(v, float) and v != int(v) for v in values):
            raise ValueError
        return tuple(dict.fromkeys(kind(v) for v in values))
    except (TypeError, ValueError):
        raise ValueError(f"--{name} must be numbers separated by commas, got {','.join(map(str, values))}") from None
