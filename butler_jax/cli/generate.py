"""`butler-jax generate`: continue a prompt, or answer messages, with a predictor or another policy."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from butler_jax.cli.command_line import interrupts_end, options_of, read, run
from butler_jax.decoding import SAMPLING_FILES, SamplingConfig, read_sampling
from butler_jax.selection import SelectionConfig
from butler_jax.storage import require_local

if TYPE_CHECKING:
    from butler_jax.decoding import Generated
    from butler_jax.policies import Policy
    from butler_jax.weights import Base

TIMED = 16  # new tokens from which a rate is said: of fewer, most of the time is the start
NOTHING = "the model ended the text at once, so nothing was generated. "
CHAT = "It is made for chat: give --chat, which puts the prompt into the model's chat template"
SPELLED = (
    "A model made for chat answers a prompt in the form that it was trained on, and this one has no chat_template that "
    "says it. Spell it out, special tokens too, as in "
    r"--prompt $'<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n'"
)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt, or answer a message. A step reads only the cached tokens that a trained predictor, or another
    policy, chooses.

    The text goes to standard output as it comes, a line of figures to standard error.
    """

    run: Path | None = None
    """A training run, a directory of save_predictor or save_pretrained, or a hub id. Default: decode the base model
    densely."""
    base: str | None = None
    """A Hugging Face directory, a hub id, a .gguf file, or tiny (embedded). Default: the run's."""
    prompt: str | None = None
    """The text to continue, or the message to answer. Default: standard input; with --chat at a terminal, a
    conversation."""
    prompt_file: Path | None = None
    """A file with the text to continue, or the message to answer."""
    chat: bool = False
    """Answer the prompt as a message: the model's chat template puts it into the form that the model was trained on."""
    template: str | None = None
    """The name of the chat template, where the model has several. Default: the model's default."""
    system: str | None = None
    """What the model is told before a chat. Default: nothing."""
    max_new_tokens: int = 64
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
    data_dir: str | None = None
    """Where prepared data sets lie, for a policy that is prepared on the run's text (lowrank). Default: TFDS's."""
    offload: bool = False
    """Keep keys and values in host memory. Only what is read goes to the device."""
    score_dtype: Literal["int8"] | None = None
    """int8 stores the predictor's k_imp in int8. Default: the precision of the base model."""
    sampling: SamplingConfig = field(default=SamplingConfig())
    """How tokens are drawn. Settings that are not given are those of the model's generation_config.json, or of
    general.sampling in a .gguf file."""
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
        if self.template is not None and not self.chat:
            raise ValueError("--template names a chat template; give --chat too, or leave it out")
        if self.system is not None and not self.chat:
            raise ValueError("--system is for a conversation; give --chat too, or write it into the prompt")
        if self.dense and self.policy not in (None, "dense"):
            raise ValueError(f"--dense reads everything, and --policy {self.policy} chooses; give one of them")
        self.make_policy().require_predictor(self.run)

    def make_policy(self) -> Policy:
        """The policy. Raises ValueError for an unknown one."""
        from butler_jax.policies import make_policy

        name = self.policy or ("dense" if self.dense or self.run is None else "tokenbutler")
        return make_policy(name, defaults={"pooling": self.pooling} if name.split(":")[0] == "tokenbutler" else {})

    def check_given(self, given: set[str]) -> None:
        """Raise ValueError for options on the command line that do nothing under the policy; given: their names."""
        policy = self.make_policy()
        named = {"score_dtype", "pooling"} & given if not policy.needs_predictor else set()
        needed = "a predictor, which --run gives"
        if policy.reads_everything:
            named |= {field.name for field in fields(SelectionConfig)} & given
            needed = "a policy that chooses; give --run or --policy"
        if named:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(named))
            raise ValueError(f"the policy is {policy.name}, and {flags} needs {needed}; or leave it out")

    @property
    def is_typed(self) -> bool:
        """Whether messages are typed at a terminal, one after the other."""
        return self.chat and self.prompt is None and self.prompt_file is None and sys.stdin.isatty()

    def read_prompts(self) -> Iterable[str]:
        """The prompt, or the messages of a terminal as they are typed.

        Raises:
            ValueError: The file is not UTF-8 text.
        """
        if self.prompt is not None:
            return [self.prompt]
        if self.prompt_file is None:
            return _read_messages() if self.is_typed else [sys.stdin.read()]
        try:
            return [self.prompt_file.read_text(encoding="utf-8-sig")]
        except UnicodeDecodeError:
            raise ValueError(f"{self.prompt_file} is not UTF-8 text; save it as such") from None


def _read_messages() -> Iterator[str]:
    """Messages typed at a terminal, up to Ctrl-D."""
    import readline  # noqa: F401  input() edits lines with it

    print("Type a message. Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            print()
            return
        if message:
            yield message


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    with interrupts_end("\nstopped"):
        return run(lambda: _generate(read(GenerateConfig, arguments, "butler-jax generate"), options_of(arguments)))


def _generate(config: GenerateConfig, given: set[str]) -> int:
    """Load, generate and print. given: the names of the options on the command line."""
    import jax

    from butler_jax.evaluation import prepare_policies
    from butler_jax.parallel import make_mesh, place, shardings_for
    from butler_jax.runs import load_predictor, load_run_base, run_data

    config.check_given(given)
    prompts, policy = config.read_prompts(), config.make_policy()
    selection = None if policy.reads_everything else config.selection
    mesh = make_mesh(config.mesh or "data=1")
    shardings = shardings_for(mesh) if config.mesh else None
    base = load_run_base(config.run, config.base, dtype=config.dtype, shardings=shardings)
    tokenizer = base.require_tokenizer()
    if config.chat:
        tokenizer.require_chat_template().source(config.template)
    predictor = None
    if selection is not None:
        (policy,) = prepare_policies([policy], base, run_data(config.run), data_dir=config.data_dir)
        predictor = load_predictor(config.run, base) if policy.needs_predictor else None
        predictor = place(predictor, predictor.logical_axes, mesh) if predictor is not None else None
    settings = dict(
        predictor=predictor,
        selection=selection,
        policy=policy,
        max_new_tokens=config.max_new_tokens,
        sampling=choose_sampling(config, given, base.generation),
        stop=config.stop or None,
        seed=config.seed,
        offload=config.offload,
        score_dtype=config.score_dtype,
    )
    with jax.set_mesh(mesh):
        (_talk if config.chat else _continue_prompt)(config, base, prompts, settings)
    return 0


def choose_sampling(config: GenerateConfig, given: set[str], generation: Mapping[str, Any]) -> SamplingConfig:
    """How tokens are drawn: as the command line says, and else as the model's files say, which is printed.

    Raises ValueError for options of draws where nothing is drawn.
    """
    names = [field.name for field in fields(SamplingConfig)]
    sampling, passed_over = read_sampling(generation)
    plain = SamplingConfig()
    taken = [n for n in names if n not in given and getattr(sampling, n) != getattr(plain, n)]
    sampling = replace(sampling, **{name: getattr(config.sampling, name) for name in names if name in given})
    idle = sorted({"top_k", "top_p", "seed"} & given) if sampling.temperature == 0 else []
    if idle:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{flags} needs draws, and the most likely token is taken; give --temperature above 0")
    if sampling.temperature == 0:
        taken = [name for name in taken if name == "repetition_penalty"]
    told = ", ".join(f"{name} {getattr(sampling, name):g}" for name in taken)
    passed = f"{', '.join(passed_over)} of it passed over: not supported" if passed_over else ""
    if told or passed:
        said = "; ".join(filter(None, (told, passed)))
        print(f"sampling as in the model's {SAMPLING_FILES}: {said}", file=sys.stderr)
    return sampling


def _continue_prompt(config: GenerateConfig, base: Base, prompts: Iterable[str], settings: dict[str, Any]) -> None:
    """Print a prompt and what follows it."""
    from butler_jax.decoding import Generated, generate_stream

    for prompt in prompts:
        result = Generated()
        pieces = generate_stream(base, prompt, result=result, **settings)  # refuses settings before it is read from
        _show(prompt)
        for piece in pieces:
            _show(piece.text)
        show_figures(base, result)
        tokenizer = base.require_tokenizer()
        if len(result.tokens[0]) == 1 and result.tokens[0][0] in tokenizer.ends:
            print(NOTHING + (SPELLED if tokenizer.chat_template is None else CHAT), file=sys.stderr)


def _talk(config: GenerateConfig, base: Base, prompts: Iterable[str], settings: dict[str, Any]) -> None:
    """Print the answer to every message. Each is answered as a part of the conversation so far.

    At a terminal, a message that is refused, such as one too long for the context, leaves the conversation as it was.
    """
    from butler_jax.decoding import PromptCache, chat

    settings |= {"template": config.template, "cache": PromptCache(), "stream": lambda piece: _show(piece.text)}
    messages = [] if config.system is None else [{"role": "system", "content": config.system}]
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        try:
            result = chat(base, messages, **settings)
        except ValueError as error:
            if not config.is_typed:
                raise
            messages.pop()
            print(f"error: {error}; the message was left out", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": result.text})
        show_figures(base, result)
        if result.tokens[0][-1] not in base.require_tokenizer().ends and not config.stop:
            print(
                f"the answer was cut after {len(result.tokens[0])} tokens; --max-new-tokens allows more",
                file=sys.stderr,
            )


def _show(text: str) -> None:
    print(text, end="", flush=True)


def show_figures(base: Base, result: Generated) -> None:
    """End the line of the text, and print a line of figures to standard error."""
    print(flush=True)
    new = len(result.tokens[0])
    rate = f", then {result.tokens_per_second:.1f} tokens/s" if new >= TIMED else ""
    read = f"{100 * result.attended[0]:.1f} % of the cache read"
    of_all = f"{100 * result.attended_of_dense[0]:.1f} % of what dense decoding reads"
    if base.config.mixed:
        read += f" in the {len(base.config.served_layers)} served layers, {of_all} in all {base.config.layers}"
    elif any(base.config.sliding):
        read += f", {of_all}"
    kept = f" ({result.kept_tokens} of them kept)" if result.kept_tokens else ""
    print(
        f"{result.prompt_tokens[0]}{kept} + {new} tokens; {result.prefill_seconds:.1f} s to the first{rate}; {read}",
        file=sys.stderr,
    )
