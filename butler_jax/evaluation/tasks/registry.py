"""What a contender is judged on. A task is built once, and judges contenders under one selection at a time."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from butler_jax.evaluation.cells import Cell, Finding, Say, key_of
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.contenders import Contender, digest
from butler_jax.evaluation.tasks.coreference import coreference_batches, coreference_distances
from butler_jax.evaluation.tasks.downstream import check_harness, downstream
from butler_jax.evaluation.tasks.local_tasks import read_samples
from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.evaluation.tasks.perplexity import TextResult, measure_perplexity, read_text, text_windows
from butler_jax.evaluation.tasks.retrieval import key_value_batches, needle_batches, variables_batches
from butler_jax.evaluation.tasks.teacher_forcing import Part, answers, by_distance, by_label
from butler_jax.model import check_length
from butler_jax.policies import Dense
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import measure_recall, ratio

Batches = list[dict[str, np.ndarray]]


class Task:
    """Base class. `facts` is what results depend on beside base, contender and selection, JSON-ready.

    unit: what errors are taken over.
    """

    name: ClassVar[str]
    unit: str = "samples"
    at_once: ClassVar[bool] = False  # one cell holds all budgets of a contender
    facts: dict[str, Any]

    def takes(self, contender: Contender) -> bool:
        """Whether the contender is judged at all; default: yes."""
        return True

    def judge(self, contender: Contender, selections: dict[float | int, SelectionConfig]) -> Cell:
        """Measure a contender under selections by budget: one of them, or all where `at_once`."""
        raise TypeError(f"{type(self).__name__} must define judge")


class Perplexity(Task):
    """Perplexity, and how next-token distributions differ from the dense ones."""

    name = "perplexity"

    def __init__(self, base: Any, config: EvalConfig, batches: Batches):
        check_length(base.config, batches[0]["tokens"].shape[1])
        self.base, self.config, self.batches, self.unit = base, config, batches, _windows(config)
        self.facts = {"batches": digest(batches), "score_dtype": config.score_dtype}

    @cached_property
    def dense(self) -> tuple[TextResult, list]:
        """The dense pass, and its last residual streams."""
        hidden: list = []
        selection = self.config.selection_at(1.0)
        return measure_perplexity(self.base.model, self.batches, Dense(), selection, keep=hidden), hidden

    def judge(self, contender, selections):
        """One budget."""
        ((budget, selection),) = selections.items()
        reference, hidden = self.dense
        if contender.policy.name == "dense":
            result = reference
        else:
            result = measure_perplexity(
                self.base.model, self.batches, contender.policy, selection, contender.predictor, references=hidden,
                score_dtype=self.config.score_dtype,
            )  # fmt: skip
        found = {"perplexity": result.perplexity}
        if result.divergence is not None:
            found["over_dense"] = result.over(reference)
            found["js_divergence"], found["top1_agreement"] = result.mean("divergence"), result.mean("agrees")
        attended, layers = result.mean("attended"), self.base.config.layers
        found["effective_sparsity"] = attended.through(
            lambda share: 1 - (1 + (layers - 1) * share) / layers, (layers - 1) / layers
        )
        read = self._bytes(contender, result)
        found["bytes_read"] = ratio(read, result.rows)
        if result is not reference:
            whole = self._bytes(Contender("dense", Dense(), None), reference)
            found["bytes_of_dense"] = ratio(read, whole)._replace(n=found["bytes_read"].n)
        return Cell([Finding(name, estimate, budget, attended.value) for name, estimate in found.items()])

    def _bytes(self, contender: Contender, result: TextResult):
        """Bytes of caches read in all rows of each sequence: keys and values, and what is looked at to choose."""
        base = self.base.config
        size = self.base.model.embedding[...].dtype.itemsize
        looked = contender.policy.numbers_read_per_key(base, contender.predictor)
        whole = 1 if contender.policy.needs_predictor and self.config.score_dtype == "int8" else size
        return result.read * 2 * base.head_dim * size + result.held * (base.layers - 1) / base.layers * looked * whole


class Attention(Task):
    """Recalled attention mass, hit rate and rank correlation on the windows of perplexity."""

    name = "attention"
    at_once = True

    def __init__(self, base: Any, config: EvalConfig, batches: Batches):
        self.base, self.config, self.batches, self.unit = base, config, batches, _windows(config)
        self.facts = {"batches": digest(batches), "score_dtype": config.score_dtype, "rows": config.attention_rows}

    def takes(self, contender):
        """All but dense, which reads everything."""
        return contender.policy.name != "dense"

    def judge(self, contender, selections):
        """All budgets."""
        name = contender.policy.name
        found = measure_recall(
            self.base.model, contender.predictor, self.batches, [contender.policy], tuple(selections),
            sinks=self.config.selection.sinks, recent=self.config.selection.recent, rows=self.config.attention_rows,
            score_dtype=self.config.score_dtype,
        )  # fmt: skip
        findings = [Finding("recalled_mass", found.mass[name][b], b, found.attended[name][b].value) for b in selections]
        if name not in found.hit_rate:
            return Cell(findings)
        findings += [Finding("hit_rate", found.hit_rate[name], None, None)]
        findings += [Finding("spearman", found.spearman[name], None, None)]
        return Cell(findings, {"hit_rate": np.round(found.by_head[name], 5).tolist()})


class Answering(Task):
    """Base class of tasks whose samples ask for an answer: metrics, and the parts of the samples for details."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(self, base: Any, config: EvalConfig, batches: Batches, parts: list[Part]):
        self.batches, self.parts = batches, parts
        self.passes = Passes(base.model, score_dtype=config.score_dtype)
        self.facts = {"batches": digest(batches), "score_dtype": config.score_dtype}

    def judge(self, contender, selections):
        """One budget."""
        ((budget, selection),) = selections.items()
        found = answers(self.passes, self.batches, contender.policy, selection, contender.predictor)
        parts = [({}, found), *((label, found.of(members)) for label, members in self.parts)]
        return Cell(
            [
                Finding(name, getattr(part, name), budget, part.share_read, label)
                for name in self.metrics
                for label, part in parts
            ]
        )


class Coreference(Answering):
    """The paper's co-reference task, by distance between the first and the last mention."""

    name = "coreference"
    metrics = ("miss_rate", "token_inaccuracy")

    def __init__(self, base: Any, config: EvalConfig):
        batches = coreference_batches(
            base.tokenizer, samples=config.samples, batch_size=config.batch_size, seed=config.seed,
            context=base.config.context,
        )  # fmt: skip
        distances = coreference_distances(base.tokenizer, samples=config.samples, seed=config.seed)
        super().__init__(base, config, batches, by_distance(distances))


class Retrieval(Answering):
    """Base class of needle, key_value and variables: samples at several lengths."""

    def __init__(self, base: Any, config: EvalConfig, **given: Any):
        made = type(self).make(
            base.tokenizer, lengths=config.lengths, batch_size=config.batch_size, seed=config.seed,
            context=base.config.context, **given,
        )  # fmt: skip
        super().__init__(base, config, made.batches, by_label(made.labels))


class Needle(Retrieval):
    """Needles in a haystack, over lengths and depths."""

    name, make = "needle", staticmethod(needle_batches)

    def __init__(self, base: Any, config: EvalConfig, haystack: str):
        super().__init__(base, config, haystack=haystack, depths=config.depths, samples=config.needles)


class KeyValue(Retrieval):
    """Lists of keys and values, one of which is asked for."""

    name, make = "key_value", staticmethod(key_value_batches)

    def __init__(self, base: Any, config: EvalConfig):
        super().__init__(base, config, samples=config.samples)


class Variables(Retrieval):
    """Chains of assignments, whose end is asked for."""

    name, make = "variables", staticmethod(variables_batches)

    def __init__(self, base: Any, config: EvalConfig):
        super().__init__(base, config, samples=config.samples)


class Downstream(Task):
    """A task of lm-evaluation-harness on a local file."""

    def __init__(self, base: Any, config: EvalConfig, name: str):
        self.name, self.base, self.config = name, base, config
        check_harness()
        samples = read_samples(config.downstream, name)[: config.limit]
        self.passes = Passes(base.model, score_dtype=config.score_dtype)
        self.facts = {"samples": key_of({"samples": samples}), "score_dtype": config.score_dtype}

    def judge(self, contender, selections):
        """One budget."""
        ((budget, selection),) = selections.items()
        found = downstream(
            self.base, contender.policy, selection, contender.predictor, directory=self.config.downstream,
            task=self.name, limit=self.config.limit, batch_size=self.config.batch_size, passes=self.passes,
        )  # fmt: skip
        return Cell([Finding(name, estimate, budget, found.attended) for name, estimate in found.estimates])


def make_tasks(base: Any, config: EvalConfig, data: str, say: Say) -> list[Task]:
    """The tasks of a configuration, in its order. Raises ValueError and FileNotFoundError for text that is none."""
    text = None
    if {"perplexity", "attention"} & set(config.tasks):
        check_length(base.config, config.context)
        text = text_batches(base, config, data, say)
    make = {
        "perplexity": lambda: Perplexity(base, config, text),
        "attention": lambda: Attention(base, config, text),
        "coreference": lambda: Coreference(base, config),
        "needle": lambda: Needle(base, config, haystack(base, config, data, say)),
        "key_value": lambda: KeyValue(base, config),
        "variables": lambda: Variables(base, config),
    }
    return [make[name]() if name in make else Downstream(base, config, name) for name in config.tasks]


def _windows(config: EvalConfig) -> str:
    """What errors over text are taken over."""
    return "windows" if config.stride is None else "overlapping windows"


def haystack(base: Any, config: EvalConfig, data: str, say: Say) -> str:
    """What needles are hidden in: config.text, or held-out documents of `data` one after the other.

    `say` is told where it has fewer tokens than a sample, which then holds it more than once.
    """
    longest = max(config.lengths)
    if config.text is not None:
        text, source = read_text(config.text), str(config.text)
    else:
        from butler_jax.data import read_held_out

        rows = read_held_out(data, base.tokenizer, length=longest, count=4, data_dir=config.data_dir)
        text = "\n\n".join(base.tokenizer.decode(b["tokens"][b["segments"] > 0].tolist()) for b in rows)
        source = f"the held-out part of {data}"
    found = len(base.tokenizer.encode(text[: 64 * longest], bos=False))  # no tokenizer has 64 characters a token
    if over := [length for length in config.lengths if length > found]:
        lengths = ", ".join(f"{length:,}" for length in over)
        say(f"{source} has {found:,} tokens: needles of {lengths} tokens lie in it repeated; give a longer text")
    return text


def text_batches(base: Any, config: EvalConfig, data: str, say: Say) -> Batches:
    """Windows of config.text, or of the held-out part of `data`; `say` is told where they are fewer than asked for."""
    if config.text is not None:
        text = read_text(config.text)
        batches = text_windows(
            base.tokenizer, text, context=config.context, tokens=config.tokens, batch_size=config.batch_size,
            stride=config.stride, source=str(config.text),
        )  # fmt: skip
        source = str(config.text)
    else:
        from butler_jax.data import read_held_out

        count = -(-config.tokens // config.context)
        batch_size = min(config.batch_size, count)
        batches = read_held_out(
            data, base.tokenizer, length=config.context, count=-(-count // batch_size), batch_size=batch_size,
            data_dir=config.data_dir,
        )  # fmt: skip
        source = f"the held-out part of {data}"
    found = sum(int((b["segments"] > 0).sum()) for b in batches)
    if found < config.tokens:
        say(f"{source} has {found:,} tokens, fewer than the {config.tokens:,} asked for: all of them are used")
    return batches
