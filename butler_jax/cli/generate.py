"""Continue a prompt with a predictor or another policy: `python -m butler_jax.generate --run DIR --prompt TEXT`.

The function is `butler_jax.generate` (generation.py); nothing imports this file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from butler_jax.cli.command_line import interrupts_end, read, run
from butler_jax.decoding import SamplingConfig
from butler_jax.policies import Policy, make_policy
from butler_jax.selection import SelectionConfig, parse_budget
from butler_jax.storage import require_local


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt, reading only the cached tokens that a trained predictor, or another policy, chooses.

    The text goes to standard output as it comes, a line of figures to standard error.
    """

    run: Path | None = None
    """Directory of a training run, or of save_predictor. Default: decode the base model densely."""
    base: str | None = None
    """A Hugging Face directory, a hub id, a .gguf file, or tiny (embedded). Default: the run's."""
    prompt: str | None = None
    """The text to continue. Default: what comes from standard input."""
    prompt_file: Path | None = None
    """A file with the text to continue."""
    max_new_tokens: int = 128
    """Tokens to generate at most."""
    dense: bool = False
    """Read everything, whatever the run."""
    policy: str | None = None
    """Who chooses: as --policies of eval.py. All but tokenbutler do without a run. Default: tokenbutler with a run,
    dense without."""
    budget: str = "1/4"
    """Share of the cached tokens that a step attends, or an integer number of tokens; sinks and recent tokens
    included."""
    sinks: int = 4
    """First tokens that are always attended."""
    recent: int = 8
    """Newest tokens that are always attended."""
    unit: int = 1
    """Tokens chosen together, a power of two: pages by their best token."""
    interval: int = 1
    """Steps from one choice to the next."""
    neighbours: bool = False
    """Fill half of the room by score and bring the right neighbours of every run."""
    min_context: int = 0
    """Attend everything up to so many tokens."""
    pooling: Literal["normalised", "maximum"] = "normalised"
    """How the heads of a group agree: maximum of weights, or the plain maximum of scores, which is cheaper."""
    offload: bool = False
    """Keep keys and values in host memory; only what is read goes to the device."""
    score_dtype: Literal["int8"] | None = None
    """int8 keeps the predictor's importance keys in int8. Default: the precision of the base model."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach p."""
    repetition_penalty: float = 1.0
    """Above 1: tokens already there become less likely."""
    seed: int = 0
    """Seed of the draws."""
    stop: tuple[str, ...] = ()
    """Texts of single tokens at which to stop, besides the end of the text."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the base model. Default: float32 on CPU, bfloat16 on accelerators."""
    mesh: str = ""
    """Devices, as in model=4,sequence=2: model splits weights and KV heads, sequence the tokens of the caches. Default:
    one device."""

    def __post_init__(self):
        require_local(self)
        if self.run is None and self.base is None:
            raise ValueError(
                "nothing to generate with: give --run DIR (a run of train.py), or --base SPEC for dense decoding"
            )
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt-file exclude each other; give one of them")
        policy = self.made_policy()
        if not self.dense and self.run is None and policy.needs_predictor:
            raise ValueError(
                f"the policy {policy.name} needs a trained predictor; give --run RUN (of train.py), or another --policy"
            )
        self.selection()
        self.sampling()

    def sampling(self) -> SamplingConfig:
        """How tokens are drawn. Raises ValueError for what cannot be."""
        return SamplingConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )

    def made_policy(self) -> Policy:
        """The policy. Raises ValueError for an unknown one."""
        name = self.policy or ("dense" if self.run is None else "tokenbutler")
        return make_policy(name, **({"pooling": self.pooling} if name == "tokenbutler" else {}))

    def selection(self) -> SelectionConfig | None:
        """The selection these settings describe; None where decoding is dense."""
        chosen = SelectionConfig(
            budget=parse_budget(self.budget), sinks=self.sinks, recent=self.recent, unit=self.unit,
            interval=self.interval, neighbours=self.neighbours, min_context=self.min_context,
        )  # fmt: skip
        return None if self.dense or self.made_policy().name == "dense" else chosen

    def text(self) -> str:
        """The prompt. Raises ValueError for a file that is missing or no text."""
        if self.prompt_file is None:
            return sys.stdin.read() if self.prompt is None else self.prompt
        try:
            return self.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.prompt_file} is not UTF-8 text") from None


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status. Errors of the user's making are one line, no traceback."""
    with interrupts_end("\nstopped"):
        return run(lambda: continue_prompt(read(GenerateConfig, arguments, "python -m butler_jax.generate")))


def continue_prompt(config: GenerateConfig) -> int:
    """Load, generate, show."""
    from butler_jax.decoding import generate
    from butler_jax.evaluation import prepared
    from butler_jax.parallel import make_mesh, place, shardings_for
    from butler_jax.runs import load_predictor, run_config, run_data
    from butler_jax.text import stop_tokens
    from butler_jax.weights import load_base

    prompt, selection = config.text(), config.selection()
    mesh = make_mesh(config.mesh or "data=1")
    shardings = shardings_for(mesh) if config.mesh else None
    base = load_base(config.base or run_config(config.run)["base"], dtype=config.dtype, shardings=shardings)
    policy, predictor = config.made_policy(), None
    if selection is not None:
        (policy,) = prepared([policy], base, run_data(config.run))
        predictor = load_predictor(config.run, base) if policy.needs_predictor else None
        predictor = place(predictor, predictor.logical_axes, mesh) if predictor is not None else None
    stop = None if not config.stop else [*config.stop, *stop_tokens(base, None)]
    show = lambda text: print(text, end="", flush=True)  # noqa: E731
    show(prompt)
    with jax.set_mesh(mesh):
        result = generate(
            base, prompt, stream=lambda piece: show(piece.text), predictor=predictor, selection=selection,
            policy=policy, max_new_tokens=config.max_new_tokens,
            seed=config.seed, offload=config.offload, score_dtype=config.score_dtype, stop=stop,
            sampling=config.sampling(),
        )  # fmt: skip
    print(flush=True)
    print(
        f"{result.prompt_tokens[0]} + {len(result.tokens[0])} tokens; {result.prefill_seconds:.1f} s to the first, "
        f"then {result.tokens_per_second:.1f} tokens/s; {100 * result.attended[0]:.1f} % of the cache read",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
