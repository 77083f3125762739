"""Streaming, SnapKV and H2O beside NVIDIA's kvpress: the same weights, text and budgets in one process.

    python -m benchmarks.kvpress --base DIR --text FILE --run RUN --json benchmarks/kvpress.json

It needs kvpress, torch and transformers. kvpress cuts the cache once, at the end of a dense prompt. Later tokens attend
to the kept tokens and to all new ones. The lines turn our definitions into kvpress's step by step. A line gives the
share of kvpress's set that ours keeps too (mean over prompts, KV heads and layers 1 ...; for two random sets it is the
budget), and the perplexity of the text after the prompt, with standard errors over the windows of text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.about import about
from benchmarks.kvpress_forms import (
    H2OLike,
    Prompt,
    SnapKVLike,
    decoded,
    dense_prompt,
    follow,
    kept_once,
    kept_row_by_row,
)
from butler_jax import decode_step, load_base, load_predictor, prefill
from butler_jax.data import cut_text, read_text
from butler_jax.model import BaseModel
from butler_jax.policies import Policy, make_policy
from butler_jax.selection import SelectionConfig, limits_of
from butler_jax.simulation import Estimate, estimate_ratio

SINKS, RECENT = 4, 8


class Step(NamedTuple):
    """A line of the comparison.

    form: "rows" evicts at every row, "dense rows" does so on a dense prompt, "once" evicts at its end, and "decode" is
    what the row after it reads. always: sinks and recent. first: layer 0 is cut too. evaluated: the text after the
    prompt is predicted.
    """

    aligned: str
    form: str
    policy: Policy
    always: tuple[int, int] = (SINKS, RECENT)
    first: bool = False
    evaluated: bool = False


def steps() -> dict[str, list[Step]]:
    """The steps from our definition to kvpress's; each keeps the changes of those before it."""
    streaming = make_policy("streaming")
    as_decoded = Step("as decoded; then frozen", "decode", streaming, evaluated=True)
    lines = {"streaming": [as_decoded, as_decoded._replace(aligned="layer 0 is cut too", first=True)]}
    for name, like, switches in (
        (
            "snapkv",
            SnapKVLike,
            [
                ("64 rows observed, 5 wide", dict(observed=64, pool=5)),
                ("all observed rows stay, no sinks", dict(whole=True)),
                ("observed rows left out of the pooling", dict(outside=True)),
                ("mean for maximum", dict(mean=True)),
            ],
        ),
        (
            "h2o",
            H2OLike,
            [
                ("nothing recent stays, no sinks", dict(free=True)),
                ("divided by the rows that could see it", dict(mean=True)),
            ],
        ),
    ):
        ours, fields, always = make_policy(name), {}, (SINKS, RECENT)
        lines[name] = [
            Step("as simulated, row after row", "rows", ours),
            Step("on a dense prompt", "dense rows", ours),
            Step("chosen once, at its end", "once", like(), evaluated=True),
            Step("layer 0 is cut too", "once", like(), first=True, evaluated=True),
        ]
        for label, switch in switches:
            fields |= switch
            always = (0, 0) if "no sinks" in label else always
            lines[name].append(Step(label, "once", like(**fields), always, True, switch is switches[-1][1]))
    return lines


def ours(model: BaseModel, tokens: np.ndarray, prompt: Prompt, budget: float, step: Step) -> Any:
    """The tokens of the prompt that are kept, [L, B, K, S]."""
    length = prompt.k.shape[2]
    selection = SelectionConfig(budget=budget, sinks=SINKS, recent=RECENT)
    if step.form == "once":
        sinks, recent = step.always
        kept = kept_once(prompt, int(budget * length), policy=step.policy, sinks=sinks, recent=recent)
    elif step.form == "decode":
        lengths = np.full(tokens.shape[0], length, np.int32)
        _, state = prefill(model, tokens[:, :length], lengths, capacity=length + 1)
        found = decode_step(model, tokens[:, length], state, selection=selection, policy=step.policy, details=True)[2]
        kept = found.chosen[..., :length]
        kept = kept.at[0].set(kept[1]) if step.first else kept  # the same in every layer
    else:
        limits, dense = limits_of(selection, model.config, length + 1, model.config.kv_heads), step.form == "dense rows"
        row = tokens[:, : length + 1]
        kept = kept_row_by_row(model, row, limits, policy=step.policy, rule=selection.rule, dense=dense)
    return kept if step.first else kept.at[0].set(True)


class Theirs:
    """A Hugging Face model under presses of kvpress."""

    def __init__(self, directory: str):
        import kvpress
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.torch, self.cache = torch, transformers.DynamicCache
        # Only eager attention returns the weights that observed attention sums.
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
        ).eval()
        self.presses = {
            "streaming": lambda budget: kvpress.StreamingLLMPress(1 - budget, n_sink=SINKS),
            "snapkv": lambda budget: kvpress.SnapKVPress(1 - budget),
            "h2o": lambda budget: kvpress.ObservedAttentionPress(1 - budget),
        }

    def __call__(self, name: str, tokens: np.ndarray, budget: float, length: int) -> tuple[np.ndarray, np.ndarray]:
        """nll [B, T - length - 1] of what follows a prompt of `length` tokens, as `follow`; the kept [L, B, K, length].

        Budget 1 is without kvpress.
        """
        torch, layers, kept = self.torch, [], np.zeros((0, length), bool)
        press = None if budget == 1 else self.presses[name](budget)
        if press is not None:
            compress = press.compress

            def recording(module, hidden, keys, values, attentions, kwargs):
                # No score depends on values, so positions in their place show which tokens are kept.
                places = torch.arange(keys.shape[2], dtype=keys.dtype)[None, None, :, None].expand_as(values)
                keys, places = compress(module, hidden, keys, places, attentions, kwargs)
                layers.append(places[..., 0].long().numpy())
                return keys, values.gather(2, places.long())

            press.compress = recording
        ids, cache = torch.asarray(tokens.astype(np.int64)), self.cache(config=self.model.config)
        with torch.inference_mode():
            with contextlib.nullcontext() if press is None else press(self.model):
                self.model.model(ids[:, :length], past_key_values=cache)
            positions = torch.arange(length, ids.shape[1])[None]
            logits = self.model(ids[:, length:], past_key_values=cache, position_ids=positions).logits
            nll = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, length + 1 :], reduction="none")
        if layers:
            kept = np.zeros((len(layers), *layers[0].shape[:2], length), bool)
            np.put_along_axis(kept, np.stack(layers), True, axis=-1)
        return nll.numpy(), kept


def overlap(mine: np.ndarray, theirs: np.ndarray) -> Estimate:
    """The mean share of `theirs` that `mine` has too ([L, B, K, S], layers 1 ...); both keep equally many tokens."""
    mine, theirs = np.asarray(mine)[1:], theirs[1:]
    counts = mine.sum(-1), theirs.sum(-1)
    if not (counts[0] == counts[1]).all():
        raise ValueError(f"{counts[0].mean()} tokens are kept, and {counts[1].mean()} by kvpress")
    return estimate_ratio((mine & theirs).sum((0, 2, 3)), theirs.sum((0, 2, 3)))


def evaluate(nll: np.ndarray, theirs: np.ndarray | None = None) -> dict[str, Any]:
    """Perplexity, the mean of every window, and the largest difference of a token's nll [B, T] from kvpress's."""
    nll = np.asarray(nll, np.float64)
    found = with_error("perplexity", estimate_ratio(nll.sum(1), np.full(len(nll), nll.shape[1])).exp())
    found["window_nll"] = nll.mean(axis=1).tolist()
    return found if theirs is None else found | {"largest_difference": float(np.abs(nll - theirs).max())}


def with_error(name: str, found: Estimate) -> dict[str, Any]:
    return {name: found.value, f"{name}_error": found.error}


def compare(
    model: BaseModel, predictor: Any, peer: Theirs, tokens: np.ndarray, budgets: list[float], length: int
) -> list[dict[str, Any]]:
    """Compute and print every line at every budget. tokens: windows of text that begin with the prompts."""
    prompt, rows = dense_prompt(model, tokens[:, :length]), []
    seen = float(np.mean(np.arange(length + 1, tokens.shape[1])))  # tokens that a dense row attends, mean

    def add(policy: str, aligned: str, budget: float, read: float, **found: Any) -> None:
        rows.append(dict(policy=policy, aligned=aligned, budget=budget, read=read) | found)
        figures = [
            f"{found[n]:{form}}" if found.get(n) is not None else ""
            for n, form in (
                ("overlap", ".4f"),
                ("perplexity", ".2f"),
                ("perplexity_error", ".2f"),
                ("largest_difference", ".1e"),
            )
        ]
        line = f"{policy:12}{aligned:39}{budget:7.4g}{read:7.0f}" + "{:>9}{:>11}{:>7}{:>13}".format(*figures)
        print(line, flush=True)

    print(f"{'':51}{'budget':>7}{'read':>7}{'overlap':>9}{'perplexity':>11}{'error':>7}{'nll differs':>13}")
    theirs, _ = peer("dense", tokens, 1, length)
    everything = jnp.ones((prompt.k.shape[0], tokens.shape[0], prompt.k.shape[3], length), bool)
    add("dense", "transformers", 1, seen, **evaluate(theirs))
    add("dense", "ours", 1, seen, **evaluate(follow(model, prompt, everything, tokens[:, length:]), theirs))
    for name, lines in steps().items():
        for budget in budgets:
            read = int(budget * length) + seen - length
            theirs, kept = peer(name, tokens, budget, length)
            add(name, "kvpress", budget, read, **evaluate(theirs))
            for step in lines:
                mine = ours(model, tokens, prompt, budget, step)
                found = with_error("overlap", overlap(mine, kept))
                if step.evaluated:
                    found |= evaluate(follow(model, prompt, mine, tokens[:, length:]), theirs)
                add(name, step.aligned, budget, read, **found)
    for budget in budgets if predictor is not None else ():
        read = int(budget * length) + seen - length
        nll, attended = decoded(model, predictor, tokens, selection=SelectionConfig(budget=round(read)), length=length)
        add("tokenbutler", "decoded, as many read", budget, float(attended), **evaluate(nll))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="a Hugging Face directory")
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--run", type=pathlib.Path, help="a training run: its predictor decodes beside the others")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1 / 2, 1 / 4, 1 / 8])
    parser.add_argument("--prompt", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window, the prompt first")
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()

    began = time.perf_counter()
    base, peer = load_base(arguments.base), Theirs(arguments.base)
    predictor = load_predictor(arguments.run, base) if arguments.run else None
    text, tokens = read_text(arguments.text), arguments.windows * arguments.context
    found = cut_text(base.require_tokenizer(), text, context=arguments.context, tokens=tokens)
    windows = np.concatenate([batch["tokens"] for batch in found])
    rows = compare(base.model, predictor, peer, windows, arguments.budgets, arguments.prompt)
    report = {
        "rows": rows,
        "base": base.name,
        "fingerprint": base.fingerprint,
        "predictions": arguments.windows * (arguments.context - arguments.prompt - 1),
        "device": f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time(),
        **about("kvpress", "kvpress", "torch", "transformers"),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
