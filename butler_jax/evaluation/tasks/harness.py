"""The model `butler` of lm-evaluation-harness: its tasks under a policy and a budget.

Tokens are split, moved and truncated as the harness's own model `hf` does it. Likelihoods come from one pass in which
every position attends its own choice, those of the context too (`butler_jax.simulation`). Texts are generated after a
dense prefill, and every new token attends its own choice (`butler_jax.decoding`). A policy that evicts drops tokens of
the prompt too: while it is read or, if it cuts once, at its end. `get_model_info` puts both modes into the results.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from butler_jax.data import Batch, pad_rows
from butler_jax.decoding import SamplingConfig, bucket, check_score_dtype, generate
from butler_jax.evaluation.tasks.harness_arguments import read_model_arguments
from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.model import parameter_count
from butler_jax.policies import Policy, describe
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.storage import to_dict
from butler_jax.text import ChatTemplateError
from butler_jax.weights import Base

LEAST = 32  # rows are padded to the next of 1, 1.5, 2, 3, 4 ... times as many tokens
NO_CONTINUATION = "a continuation has no tokens; the task asks for the likelihood of nothing"
NEW_TOKENS = 256  # of a generated text whose task names no limit
SAMPLING = tuple(field.name for field in fields(SamplingConfig))
Row = tuple[tuple[int, ...], int]  # tokens, and how many of the last are asked for


@register_model("butler")
class ButlerLM(TemplateLM):
    """A base under a policy and a budget, with the interface of lm-evaluation-harness.

    Attributes:
        read: The fractions of the causal keys that were read, summed over the input tokens of all passes.
        rows: How many these tokens are.
    """

    def __init__(
        self,
        base: Base,
        policy: Policy,
        selection: SelectionConfig,
        predictor: Predictor | None = None,
        *,
        max_length: int | None = None,
        batch_size: int | str = 1,
        score_dtype: str | None = None,
        add_bos_token: bool | None = None,
        progress: bool = True,
        prompted: bool = False,
        enable_thinking: bool | None = None,
        passes: Passes | None = None,
    ):
        """Make the model.

        Args:
            predictor: Needed by the policy tokenbutler.
            max_length: Tokens that a prediction may look back on; at most and by default the model's context less one,
                for the token that is predicted.
            score_dtype: As `simulate` takes it.
            add_bos_token: Whether a text begins with the tokenizer's first token; None: as the tokenizer says.
            prompted: Whether a context is read densely. Only the rows that predict its continuation are limited then.
            enable_thinking: Handed to the chat template, where it is not None.
            passes: Passes that other models of the base share.

        Raises:
            ValueError: An argument is invalid.
        """
        super().__init__()
        check_score_dtype(score_dtype)
        most = base.config.context - 1
        if not (max_length is None or (isinstance(max_length, int) and 2 <= max_length <= most)):
            raise ValueError(
                f"max_length must be 2 to {most} tokens (the context of {base.name} less the token that is "
                f"predicted), got {max_length!r}"
            )
        number = int(batch_size) if str(batch_size).isdigit() else 0
        if number <= 0:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        self.base, self.policy, self.selection = base, policy, selection
        self.predictor = policy.require_predictor(predictor)
        self.text = base.require_tokenizer()
        self.max_length, self.batch_size = max_length or most, number
        self.score_dtype, self.add_bos_token, self.progress = score_dtype, add_bos_token, progress
        self.passes = passes or Passes(base.model, prompted=prompted, score_dtype=score_dtype)
        self.template_name: str | None = None
        self.template_variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.read, self.rows = np.zeros(2), 0

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> ButlerLM:
        """The model of `--model_args`; see `read_model_arguments`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict | None = None) -> ButlerLM:
        """The model of named arguments; see `read_model_arguments`. They come before the command line's own options."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        given.pop("device", None)  # the command line says cuda:0 unasked; JAX has its own choice
        return cls(**read_model_arguments(**{**given, **arg_dict}))

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context. Raises ValueError where the tokenizer has none."""
        token = self.text.eos if self.text.bos is None else self.text.bos
        if token is None:
            raise ValueError(f"the tokenizer of {self.base.name} has no token that begins or ends a text")
        return token

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task names no limit."""
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches tokens."""
        return f"{self.base.name}-{self.base.fingerprint}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses from now on: the named one, or with True the default; else None.

        Raises:
            ValueError: There is no such template.
        """
        if not chat_template:
            return None
        self.template_name = chat_template if isinstance(chat_template, str) else None
        return self.text.require_chat_template().source(self.template_name)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Without add_generation_prompt, its last message is to be continued.

        A template that refuses messages of the role system gets the conversation without them, as with the model hf.

        Raises:
            ValueError: The model has no chat template, or it refuses the messages.
        """
        template = self.text.require_chat_template()
        how = dict(
            name=self.template_name,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            variables=self.template_variables,
        )
        try:
            return template.render(chat_history, **how)
        except ChatTemplateError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return template.render(without, **how)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids; a text that begins with the name of the first token does not get that token twice."""
        bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self._name(self.prefix_token_id)):
            bos = False
        return self.text.encode(string, bos=bool(bos) and self.text.bos is not None if bos is not None else None)

    def _name(self, token: int) -> str:
        return self.text.backend.decode([token], skip_special_tokens=False)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy one) of every request's continuation after its context.

        Raises ValueError where a request asks for the likelihood of nothing.
        """
        if any(not continuation for _, continuation in (request.args for request in requests)):
            raise ValueError(NO_CONTINUATION)
        return super().loglikelihood(requests, disable_tqdm or not self.progress)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy one) of every (texts, context ids, continuation ids)."""
        rows: dict[Row, list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            rows.setdefault(self._row(context, continuation), []).append(number)
        answers: list[Any] = [None] * len(requests)
        order = sorted(rows, key=lambda row: (-len(row[0]), row))
        with self._bar(len(requests), "Running loglikelihood requests", disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                for row, answer in zip(part, self._score(part, min(self.batch_size, len(order))), strict=True):
                    for number in rows[row]:
                        answers[number] = answer
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    bar.update(len(rows[row]))
        return answers

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> Row:
        """Context and continuation, truncated from the left where too long."""
        if not continuation:
            raise ValueError(NO_CONTINUATION)
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than max_length, {self.max_length}; raise "
                "it, or leave the task out"
            )
        return tuple([*context, *continuation][-(self.max_length + 1) :]), len(continuation)

    def _score(self, rows: Sequence[Row], count: int) -> list[tuple[float, bool]]:
        batch = batch_rows(rows, count, self.base.config.context)
        asked = batch.pop("asked")
        found = self.passes(batch, self.policy, self.selection, self.predictor, wanted=asked)
        following = np.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
        nll = np.where(asked, found.nll.astype(np.float64), 0).sum(axis=1)
        greedy = ((found.greedy == following) | ~asked).all(axis=1)
        inputs = asked if self.passes.prompted else np.pad(batch["segments"][:, 1:], ((0, 0), (0, 1))) > 0
        self.read += [a.astype(np.float64)[inputs].sum() for a in (found.attended, found.of_dense)]
        self.rows += int(inputs.sum())
        return [(-float(nll[b]), bool(greedy[b])) for b in range(len(rows))]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in windows of max_length; every token is predicted once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens, prefix = self.tok_encode(request.args[0]), self.prefix_token_id
            pairs = get_rolling_token_windows(tokens, prefix, max_seq_len=self.max_length, context_len=1)
            found = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += found
            owners += [number] * len(found)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text after every context, up to the first of its stop strings. Equal greedy requests are made once."""
        groups: dict[str, tuple[dict, dict]] = {}
        for number, (context, settings) in enumerate(request.args for request in requests):
            drawn = settings.get("do_sample", False) or settings.get("temperature", 0) > 0
            _, members = groups.setdefault(repr(sorted(settings.items())), (settings, {}))
            members.setdefault((context, number if drawn else 0), []).append(number)
        texts = [""] * len(requests)
        with self._bar(len(requests), "Running generate_until requests", disable_tqdm) as bar:
            for settings, members in groups.values():
                tokens = {member: self.tok_encode(member[0]) for member in members}
                order = sorted(members, key=lambda member: (-len(tokens[member]), member))
                for start in range(0, len(order), self.batch_size):
                    part = order[start : start + self.batch_size]
                    spare = min(self.batch_size, len(order)) - len(part)
                    seeds = [number for _, number in part]
                    made = self._generate([tokens[member] for member in part], seeds, spare, settings)
                    for member, text in zip(part, made, strict=True):
                        for number in members[member]:
                            texts[number] = text
                            self.cache_hook.add_partial("generate_until", requests[number].args, text)
                        bar.update(len(members[member]))
        return texts

    def _generate(self, prompts: list[list[int]], seeds: list[int], spare: int, settings: dict) -> list[str]:
        """Texts after prompts; `spare` more rows give the batch the shape of earlier ones."""
        given = normalize_gen_kwargs(copy.deepcopy(settings), self.max_gen_toks)
        new = given.pop("max_gen_toks")
        eos = None if self.text.eos is None else self._name(self.text.eos)
        until = [one for one in handle_stop_sequences(given.pop("until", None), eos) if one]
        given.pop("do_sample")
        unknown = sorted(set(given) - set(SAMPLING))
        if unknown:
            raise ValueError(f"the model butler does not know {', '.join(unknown)}; it knows {', '.join(SAMPLING)}")
        room = self.max_length - new
        if room <= 0:
            raise ValueError(
                f"{new} new tokens leave no room for a prompt in max_length, {self.max_length}; lower max_gen_toks"
            )
        prompts = [(prompt or [self.prefix_token_id])[-room:] for prompt in prompts]
        dense = self.policy.reads_everything
        found = generate(
            self.base,
            prompts + prompts[-1:] * spare,
            predictor=self.predictor,
            selection=None if dense else self.selection,
            policy=None if dense else self.policy,
            max_new_tokens=new,
            stop=until or None,
            seed=seeds + seeds[-1:] * spare,
            score_dtype=self.score_dtype,
            sampling=SamplingConfig(**given),
        )
        return [postprocess_generated_text(text, until, None) for text in found.texts[: len(prompts)]]

    def _bar(self, total: int, title: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=title, disable=disable or not self.progress)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: base, policy, budget, and what attends to what."""
        return {
            "model_num_parameters": parameter_count(self.base.model),
            "model_dtype": str(self.base.dtype),
            "base": self.base.name,
            "fingerprint": self.base.fingerprint,
            "policy": describe(self.policy),
            "selection": None if self.policy.reads_everything else to_dict(self.selection),
            "score_dtype": self.score_dtype,
            "max_length": self.max_length,
            "attended": self.attended,
            **describe_modes(self.policy, self.passes.prompted),
        }

    @property
    def attended(self) -> float | None:
        """Mean fraction of the causal keys read in the served layers for likelihoods; None before there are any."""
        return float(self.read[0] / self.rows) if self.rows else None

    @property
    def of_dense(self) -> float | None:
        """Mean share of the keys that a dense pass reads in all layers; None likewise."""
        return float(self.read[1] / self.rows) if self.rows else None


def describe_modes(policy: Policy, prompted: bool = False) -> dict[str, str]:
    """What attends to what under a policy, in words: for likelihoods, and for generated texts."""
    choice = "every position attends its own choice, those of the context too (decoding simulated)"
    if prompted:
        choice = "the context is read densely, every position that predicts the continuation attends its own choice"
    likelihoods = "dense" if policy.reads_everything else choice
    return {"loglikelihood_mode": likelihoods, "generation_mode": policy.generation_mode}


def batch_rows(rows: Sequence[Row], count: int, context: int) -> Batch:
    """Rows as a batch of `count`: tokens, segments, positions, and `asked`: where the next token is asked for.

    The width is the next of a few sizes, so that few shapes compile; at most `context`.
    """
    width = min(bucket(max(len(tokens) for tokens, _ in rows), LEAST), context)
    rows = [*rows, *[((), 0)] * (count - len(rows))]
    asked = [[len(row) - 1 - last <= place < len(row) - 1 for place in range(len(row))] for row, last in rows]
    (batch,) = pad_rows([row for row, _ in rows], width, batch_size=count, asked=asked)
    return batch
