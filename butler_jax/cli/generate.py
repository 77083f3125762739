"""`butler-jax generate`: continue a prompt with a predictor or another policy."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from butler_jax.cli.command_line import interrupts_end, read, run
from butler_jax.decoding import SamplingConfig
from butler_jax.selection import SelectionConfig
from butler_jax.storage import require_local

if TYPE_CHECKING:
    from butler_jax.policies import Policy

TIMED = 16  # new tokens from which a rate is said: of fewer, most of the time is the start
NOTHING = (
    "the model ended the text at once, so nothing was generated. A model made for chat answers a prompt in the form of "
    "the chat_template in its tokenizer_config.json. Spell that out, special tokens too, as in "
    r"--prompt $'<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n'"
)


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
    """The text to continue. Default: standard input."""
    prompt_file: Path | None = None
    """A file with the text to continue."""
    max_new_tokens: int = 128
    """The most tokens to generate."""
    dense: bool = False
    """Read everything, whatever the run."""
    policy: str | None = None
    """What ranks the cached tokens, as --policies of eval. Only tokenbutler needs a run. Default: tokenbutler with a
    run, dense without."""
    selection: SelectionConfig = field(default=SelectionConfig())
    """How many cached tokens a step reads."""
    pooling: Literal["normalised", "maximum"] = "normalised"
    """How the scores of a group's heads are combined: by the maximum of their softmax weights, or by the maximum of the
    scores, which is cheaper."""
    offload: bool = False
    """Keep keys and values in host memory. Only what is read goes to the device."""
    score_dtype: Literal["int8"] | None = None
    """int8 stores the predictor's k_imp in int8. Default: the precision of the base model."""
    sampling: SamplingConfig = field(default=SamplingConfig())
    """How tokens are drawn."""
    seed: int = 0
    """Seed of the draws."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop, besides the end of the text."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the base model. Default: float32 on CPU, bfloat16 on accelerators."""
    mesh: str = ""
    """Devices, as in model=4,sequence=2: model splits weights and KV heads, sequence the tokens of the caches. Default:
    one device."""

    def __post_init__(self):
        require_local(self)
        if self.run is None and self.base is None:
            raise ValueError(
                "nothing to generate with: give --run DIR (a run of butler-jax train), or --base SPEC for dense "
                "decoding"
            )
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt-file exclude each other; give one of them")
        policy = self.make_policy()
        if not self.dense:
            policy.require_predictor(self.run)

    def make_policy(self) -> Policy:
        """The policy. Raises ValueError for an unknown one."""
        from butler_jax.policies import make_policy

        name = self.policy or ("dense" if self.run is None else "tokenbutler")
        return make_policy(name, defaults={"pooling": self.pooling})

    @property
    def is_dense(self) -> bool:
        """Whether a step reads everything."""
        return self.dense or self.make_policy().reads_everything

    def read_prompt(self) -> str:
        """The prompt. Raises ValueError for a file that is missing or not text."""
        if self.prompt_file is None:
            return sys.stdin.read() if self.prompt is None else self.prompt
        try:
            return self.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.prompt_file} is not UTF-8 text") from None


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    with interrupts_end("\nstopped"):
        return run(lambda: _continue_prompt(read(GenerateConfig, arguments, "butler-jax generate")))


def _continue_prompt(config: GenerateConfig) -> int:
    """Load, generate and print."""
    import jax

    from butler_jax.decoding import generate
    from butler_jax.evaluation import prepare_policies
    from butler_jax.parallel import make_mesh, place, shardings_for
    from butler_jax.runs import load_predictor, run_config, run_data
    from butler_jax.weights import load_base

    prompt, selection = config.read_prompt(), None if config.is_dense else config.selection
    mesh = make_mesh(config.mesh or "data=1")
    shardings = shardings_for(mesh) if config.mesh else None
    base = load_base(config.base or run_config(config.run)["base"], dtype=config.dtype, shardings=shardings)
    policy, predictor = config.make_policy(), None
    if selection is not None:
        (policy,) = prepare_policies([policy], base, run_data(config.run))
        predictor = load_predictor(config.run, base) if policy.needs_predictor else None
        predictor = place(predictor, predictor.logical_axes, mesh) if predictor is not None else None
    stop = None if not config.stop else [*config.stop, *base.require_tokenizer().ends]

    def show(text: str) -> None:
        print(text, end="", flush=True)

    show(prompt)
    with jax.set_mesh(mesh):
        result = generate(
            base,
            prompt,
            predictor=predictor,
            selection=selection,
            policy=policy,
            max_new_tokens=config.max_new_tokens,
            sampling=config.sampling,
            stop=stop,
            seed=config.seed,
            offload=config.offload,
            score_dtype=config.score_dtype,
            stream=lambda piece: show(piece.text),
        )
    print(flush=True)
    new = len(result.tokens[0])
    rate = f", then {result.tokens_per_second:.1f} tokens/s" if new >= TIMED else ""
    print(
        f"{result.prompt_tokens[0]} + {new} tokens; {result.prefill_seconds:.1f} s to the first{rate}; "
        f"{100 * result.attended[0]:.1f} % of the cache read",
        file=sys.stderr,
    )
    if new == 1 and result.tokens[0][0] in base.require_tokenizer().ends:
        print(NOTHING, file=sys.stderr)
    return 0
