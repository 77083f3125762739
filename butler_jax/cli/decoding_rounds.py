"""Rounds of decoding, timed: what `butler-jax bench` measures."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.cli.bench_config import BenchConfig
from butler_jax.decoding import GREEDY, empty_memory, generation, make_plan
from butler_jax.policies import Policy, make_policy
from butler_jax.selection import SelectionConfig
from butler_jax.weights import Base

Round = Callable[[int], float]
"""Decodes so many tokens a row; returns the seconds it took."""


def measure(config: BenchConfig, base: Base, predictor: Any, peer: Any, context: int) -> list[dict[str, Any]]:
    """Time all variants at one context in turns, and print a line about each."""
    length = context - config.tokens * (config.rounds + 1)
    if length < 1:
        raise ValueError(f"a context of {context} tokens has no room for the {context - length} that are measured")
    prompt = np.random.default_rng(0).integers(5, base.config.vocab_size, (config.batch, length)).astype(np.int32)
    began = time.perf_counter()
    held = _prefill(config, base, predictor, prompt, context)
    variants: dict[tuple, Round] = {("dense", 1.0, 1, 0): _decoder(config, base, predictor, held, None)}
    for selection in config.selections():
        key = ("sparse", selection.budget, selection.interval, selection.tail)
        variants[key] = _decoder(config, base, predictor, held, selection)
    del held
    print(f"{context} tokens: prompt of {length} read in {time.perf_counter() - began:.1f} s", end="", flush=True)
    if peer is not None:
        began = time.perf_counter()
        variants["transformers", 1.0, 1, 0] = peer(prompt)
        print(f", by transformers in {time.perf_counter() - began:.1f} s", end="")
    print(flush=True)
    seconds: dict[tuple, list[float]] = {key: [] for key in variants}
    for turn in range(config.rounds + 1):
        for key, decode in variants.items():
            took = decode(config.tokens)
            if turn:  # the first round warms up
                seconds[key].append(took / config.tokens)
    rows = []
    for (name, budget, interval, tail), times in seconds.items():
        median = statistics.median(times)
        dense = statistics.median(seconds["dense", 1.0, 1, 0])
        row = dict(context=context, variant=name, budget=budget, interval=interval, tail=tail, batch=config.batch)
        row |= dict(seconds=median, best=min(times), tokens_per_second=config.batch / median, speedup=dense / median)
        rows.append(row)
        share = f"budget {budget:<7.4g} interval {interval:<3d}" if name == "sparse" else ""
        share += f" tail {tail}" if tail else ""
        print(
            f"  {name:13}{share:36}{config.batch / median:9.1f} tokens/s   best round {config.batch / min(times):9.1f}"
            f"   {dense / median:6.2f} of dense",
            flush=True,
        )
    return rows


def _prefill(config: BenchConfig, base: Base, predictor: Any, prompt: np.ndarray, context: int) -> Any:
    """The first token and the caches after a prompt."""
    keys = jax.vmap(jax.random.key)(jnp.arange(config.batch, dtype=jnp.uint32))
    how = _decoding(base, context, None, make_policy("tokenbutler"), None)
    lengths = jnp.full(config.batch, prompt.shape[1], jnp.int32)
    found = generation.read_prompts(base.model, predictor, jnp.asarray(prompt), lengths, how=how)
    return generation.draw_first(*found, prompt, lengths, keys, GREEDY)


def _decoding(
    base: Base, capacity: int, selection: SelectionConfig | None, policy: Policy, predictor: Any
) -> generation.Decoding:
    """What prefill and decode steps are compiled for."""
    plan = make_plan(base.config, capacity, selection, policy, predictor=predictor)
    return generation.Decoding(plan, capacity, generation.CHUNK, None)


def _decoder(config: BenchConfig, base: Base, predictor: Any, start: Any, selection: SelectionConfig | None) -> Round:
    """Rounds of one variant, each continuing where the last one stopped. Dense decoding keeps no k_imp."""
    policy: Policy = make_policy("tokenbutler", pooling=config.pooling)
    made, held = jax.tree.map(jnp.copy, start)
    state = held.state
    if selection is None:
        predictor, state = None, dataclasses.replace(state, scores=None)
    how = _decoding(base, state.kv.capacity, selection, policy, predictor)
    memory = empty_memory(how.plan, base.config.layers, config.batch)
    spans = jax.jit(how.plan.span_means)(state.kv, state.lengths)
    state = dataclasses.replace(state, memory=memory, spans=spans)
    now = [made, held._replace(state=state)]
    keys = jax.vmap(jax.random.key)(jnp.arange(config.batch, dtype=jnp.uint32))

    def decode(tokens: int) -> float:
        began = time.perf_counter()
        for _ in range(tokens):
            now[0], now[1] = generation.advance(
                base.model, predictor, now[0].token, keys, now[1], GREEDY, plan=how.plan
            )
        jax.block_until_ready(now[0].token)
        return time.perf_counter() - began

    return decode


def load_peer(config: BenchConfig, base: Base) -> Callable[[np.ndarray], Round] | None:
    """prompt -> rounds of greedy decoding by transformers on torch; None, with a line, where it cannot run."""
    if not Path(os.path.expanduser(config.base)).is_dir():
        print("transformers is left out: it needs --base as a Hugging Face directory", flush=True)
        return None
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"transformers is left out: {error}", flush=True)
        return None
    warnings.simplefilter("ignore", FutureWarning)  # the argument of the cache is being renamed
    dtype = getattr(torch, str(base.dtype))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    directory = Path(os.path.expanduser(config.base))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, use_safetensors=True).eval()

    def start(prompt: np.ndarray) -> Round:
        cache = transformers.DynamicCache(config=model.config)

        def step(tokens):
            with torch.inference_mode():
                out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                return out.logits[:, -1:].argmax(-1)

        token = [step(torch.asarray(prompt.astype(np.int64)))]

        def decode(tokens: int) -> float:
            began = time.perf_counter()
            for _ in range(tokens):
                token[0] = step(token[0])
            return time.perf_counter() - began

        return decode

    return start
