"""Every family against transformers: logits of random tiny models, and perplexities of real `.gguf` models.

    python -m benchmarks.families --text wikitext2_test.txt --gguf gemma3-270m.gguf qwen2.5-0.5b.gguf \
        --json benchmarks/families.json

The tiny models are those of the tests. transformers reads the `.gguf` files by itself. Both sides compute in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.about import about
from butler_jax.model import forward
from butler_jax.weights import Base, load_base
from tests import reference_models

WINDOW, TINY_ROWS, TINY_TOKENS = 512, 2, 24
run = jax.jit(forward)


def tiny_deviation(name: str) -> dict:
    """The largest difference of the logits of a random tiny model, and the largest logit."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = reference_models.save_model(name, Path(folder))
        base = load_base(Path(folder))
    tokens = np.random.default_rng(0).integers(3, 96, (TINY_ROWS, TINY_TOKENS), dtype=np.int32)
    expected, found = reference_models.logits(theirs, tokens), np.asarray(run(base.model, tokens))
    return {
        "model": name,
        "family": base.config.family,
        "deviation": float(np.abs(found - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
    }


def nats(logits: np.ndarray, row: np.ndarray) -> float:
    """The sum of the negative log-likelihoods of the tokens after the first."""
    logits = logits[:-1].astype(np.float64)
    top = logits.max(-1)
    return float(np.sum(top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(len(row) - 1), row[1:]]))


def windows(base: Base, text: Path, count: int) -> np.ndarray:
    """The first windows of a text, each begun by the tokenizer's first token where it has one, [count, WINDOW]."""
    tokenizer = base.require_tokenizer()
    body = WINDOW - (tokenizer.bos is not None and tokenizer.add_bos)
    ids = tokenizer.encode(text.read_text(encoding="utf-8")[: 8 * WINDOW * count], bos=False)[: body * count]
    rows = np.asarray(ids, np.int32).reshape(count, body)
    return rows if body == WINDOW else np.pad(rows, ((0, 0), (1, 0)), constant_values=tokenizer.bos)


def perplexities(path: Path, text: Path, count: int) -> dict:
    """The perplexity of a `.gguf` model by both libraries."""
    import torch
    import transformers

    base = load_base(path, dtype=jnp.float32)
    rows = windows(base, text, count)
    ours = math.exp(sum(nats(np.asarray(run(base.model, row[None]))[0], row) for row in rows) / (count * (WINDOW - 1)))
    family = base.config.family
    del base
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    total = 0.0
    with torch.no_grad():
        for row in rows:
            total += nats(theirs(torch.from_numpy(row[None].astype(np.int64))).logits[0].float().numpy(), row)
    reference = math.exp(total / (count * (WINDOW - 1)))
    return {
        "model": path.name,
        "family": family,
        "tokens": count * (WINDOW - 1),
        "perplexity": ours,
        "transformers": reference,
        "relative": abs(ours / reference - 1),
    }


def main() -> None:
    """Measure what the command line asks, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="the text of the perplexities")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="models whose perplexities are compared")
    parser.add_argument("--windows", type=int, default=8, help=f"windows of {WINDOW} tokens")
    parser.add_argument("--json", type=Path, help="the file to write")
    options = parser.parse_args()
    if options.gguf and options.text is None:
        parser.error("--gguf needs --text")
    found = {"about": about("families", "torch", "transformers"), "tiny": [], "real": []}
    for name in reference_models.MODELS:
        found["tiny"].append(tiny_deviation(name))
        print("{model:40} {deviation:.1e} of {largest_logit:.1f}".format(**found["tiny"][-1]), flush=True)
    for path in options.gguf:
        found["real"].append(perplexities(path, options.text, options.windows))
        print("{model:40} {perplexity:.4f}, transformers {transformers:.4f}".format(**found["real"][-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
