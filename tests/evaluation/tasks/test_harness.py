"""The harness: likelihoods against transformers in float64, prompts and windows made by hand, and the model `hf`."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from tests.tiny_evaluations import LINES, write_samples
from tests.tiny_runs import make_base

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from benchmarks.harness_agreement import compare
from butler_jax.cli import main
from butler_jax.evaluation.tasks import harness, passes
from butler_jax.evaluation.tasks.downstream import run_harness
from butler_jax.evaluation.tasks.harness import ButlerLM
from butler_jax.evaluation.tasks.local_tasks import TASKS_DIRECTORY
from butler_jax.policies import make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.config import SelectionConfig
from butler_jax.weights import load_base
from tests.marked import long, slow

PAIRS = [("the river sings", " over old stone"), ("a", " bird"), ("quiet morning ", "light"), ("", "then the hill")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(directory):
    return load_base(directory)


@pytest.fixture(scope="module")
def predictor(base):
    return make_predictor(base.config, PredictorConfig(rank=4, stride=2), 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def exact(directory):
    """Log-probabilities [T, V] of the token after each, by transformers in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)

    def rows(tokens):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1).numpy()

    return rows


def dense(base, **settings) -> ButlerLM:
    return ButlerLM(base, make_policy("dense"), SelectionConfig(budget=1.0), progress=False, **settings)


def sparse(base, predictor, **settings) -> ButlerLM:
    chosen = SelectionConfig(budget=6, sinks=1, recent=2)
    return ButlerLM(base, make_policy("tokenbutler"), chosen, predictor, progress=False, **settings)


def ask(kind, arguments):
    return [Instance(kind, {}, one, 0) for one in arguments]


def likelihoods(model, pairs):
    return model.loglikelihood(ask("loglikelihood", pairs))


def test_a_likelihood_is_the_sum_of_the_continuations_log_probabilities(base, exact):
    encode, first = base.tokenizer.encode, base.tokenizer.bos
    split = [  # spaces that end a context belong to the continuation
        ("the river sings", " over old stone"),
        ("a", " bird"),
        ("quiet morning", " light"),
    ]
    tokens = [(encode(c), encode(c + x)[len(encode(c)) :]) for c, x in split] + [([first], encode("then the hill"))]
    for (value, greedy), (context, continuation) in zip(likelihoods(dense(base), PAIRS), tokens, strict=True):
        rows = exact(context + continuation)[len(context) - 1 : -1]
        assert len(rows) == len(continuation) > 0
        # float32 through 4 layers: some 1e-6 of a log-probability of about 5, a few tokens
        assert value == pytest.approx(sum(row[t] for row, t in zip(rows, continuation, strict=True)), abs=1e-4)
        assert greedy == all(row.argmax() == t for row, t in zip(rows, continuation, strict=True))


def test_the_greedy_continuation_is_told(base, exact):
    tokens = base.tokenizer.encode("the river")
    token = int(exact(tokens)[-1].argmax())
    model = dense(base)
    assert [greedy for _, greedy in model._loglikelihood_tokens([(None, tokens, [t]) for t in (token, token + 1)])] == [
        True,
        False,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [dense, sparse])
def test_neither_the_batch_nor_the_order_matters(base, predictor, kind):
    more = () if kind is dense else (predictor,)
    pairs = [*PAIRS, ("the old river " * 6, "and then")]
    alone = likelihoods(kind(base, *more, batch_size=1), pairs)
    turned = likelihoods(kind(base, *more, batch_size=3), pairs[::-1])[::-1]
    # other shapes order float32 sums differently
    np.testing.assert_allclose([a for a, _ in alone], [a for a, _ in turned], atol=2e-5)
    assert [g for _, g in alone] == [g for _, g in turned]


@pytest.mark.slow
def test_a_whole_budget_reads_everything_and_a_small_one_does_not(base, predictor):
    pairs = [("the river stone bird sings over under old green hill " * 2, "and then")]
    whole = ButlerLM(base, make_policy("oracle"), SelectionConfig(budget=1.0), progress=False)
    part = sparse(base, predictor)
    wanted, full, less = (likelihoods(model, pairs)[0][0] for model in (dense(base), whole, part))
    assert full == pytest.approx(wanted, abs=1e-4)
    assert abs(less - wanted) > 1e-3
    assert whole.attended == pytest.approx(1.0)
    # rows of up to 6 tokens read all, later ones 6 of them: layers 1 ... alone are counted
    n = len(base.tokenizer.encode(pairs[0][0].rstrip() + " and then")) - 1
    assert part.attended == pytest.approx(np.mean([min(6, t) / t for t in range(1, n + 1)]), abs=1e-6)


def test_equal_requests_are_computed_once(base, monkeypatch):
    passed = []
    simulate = passes.simulate
    monkeypatch.setattr(passes, "simulate", lambda *a, **k: passed.append(a[1]["tokens"]) or simulate(*a, **k))
    found = likelihoods(dense(base, batch_size=2), PAIRS[:1] * 5 + PAIRS[1:2])
    assert sum(len(tokens) for tokens in passed) == 2
    assert len(set(found[:5])) == 1 and found[5] != found[0]


def test_what_is_too_long_is_cut_off_at_its_left(base, exact):
    encode = base.tokenizer.encode
    context, continuation = "the river stone bird sings over " * 4, "and then"
    whole = encode(context + continuation)
    last = len(whole) - len(encode(context.rstrip()))
    kept = whole[-13:]  # 12 to look back on, and the one that is predicted
    value, _ = likelihoods(dense(base, max_length=12), [(context, continuation)])[0]
    rows = exact(kept)[:-1][-last:]
    assert value == pytest.approx(sum(row[t] for row, t in zip(rows, kept[-last:], strict=True)), abs=1e-4)
    with pytest.raises(ValueError, match="longer than max_length, 2"):
        likelihoods(dense(base, max_length=2), [("a", "the quiet morning light falls")])


def test_a_rolling_likelihood_is_the_sum_over_its_windows(base, exact):
    tokens = base.tokenizer.encode("the river stone bird sings over under old green hill and then")
    room = 5
    assert len(tokens) > 2 * room and len(tokens) % room
    total, done, first = 0.0, 0, [base.tokenizer.bos, *tokens]
    while done < len(tokens):  # each token once; a window looks back on `room` tokens, the last one too
        end = min(done + room, len(tokens))
        window = first[max(0, end - room) : end + 1]
        rows = exact(window)[:-1][-(end - done) :]
        total += sum(row[t] for row, t in zip(rows, tokens[done:end], strict=True))
        done = end
    text = base.tokenizer.decode(tokens)
    found = dense(base, max_length=room, batch_size=2).loglikelihood_rolling(
        ask("loglikelihood_rolling", [(text,), (" bird",)])
    )
    assert found[0] == pytest.approx(total, abs=1e-4)
    short = [base.tokenizer.bos, *base.tokenizer.encode(" bird")]
    assert found[1] == pytest.approx(sum(exact(short)[i][t] for i, t in enumerate(short[1:])), abs=1e-4)


@pytest.mark.parametrize("kind", [dense, slow(sparse)])
def test_a_generated_text_ends_before_the_first_stop_string_and_so_does_the_work(base, predictor, kind, monkeypatch):
    more, pieces = () if kind is dense else (predictor,), []
    counted = partial(harness.generate, stream=pieces.append)
    monkeypatch.setattr(harness, "generate", counted)
    model = kind(base, *more)
    request = lambda until: ask("generate_until", [("the river", {"until": until, "max_gen_toks": 24})])  # noqa: E731
    (whole,) = model.generate_until(request([]))
    everything = len(pieces)
    assert len(whole) > 4
    stop = whole[3:5]
    pieces.clear()
    (text,) = model.generate_until(request(["never said", stop]))
    assert text == whole[: whole.index(stop)]
    assert len(pieces) < everything == 24


@pytest.mark.slow
def test_generated_texts_do_not_depend_on_their_batch_and_drawn_ones_differ(base):
    draw = {"until": ["zzz"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    greedy = {"until": ["zzz"], "max_gen_toks": 8, "do_sample": False}
    arguments = [("the river", draw), ("a", greedy), ("the river", draw), ("quiet morning light", draw), ("a", greedy)]
    requests = ask("generate_until", arguments)
    one, three = (dense(base, batch_size=size).generate_until(requests) for size in (1, 3))
    assert one == three
    assert one[0] != one[2] and one[1] == one[4]


def test_an_unknown_generation_setting_is_named(base):
    with pytest.raises(ValueError, match="does not know num_beams"):
        dense(base).generate_until(ask("generate_until", [("a", {"num_beams": 2})]))


def test_results_say_what_reads_how(base, predictor):
    told, plain = sparse(base, predictor).get_model_info(), dense(base).get_model_info()
    assert "every position" in told["loglikelihood_mode"] and "prefilled densely" in told["generation_mode"]
    assert told["policy"]["name"] == "tokenbutler" and told["selection"]["budget"] == 6
    assert plain["loglikelihood_mode"] == plain["generation_mode"] == "dense"
    json.dumps([told, plain])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h2o", "the prompt is read under the policy"),
        ("citrus", "the prompt is read under the policy"),
        ("snapkv", "prefilled densely and cut once"),
    ],
)
def test_results_say_how_a_policy_that_evicts_reads_the_prompt(base, name, said):
    told = ButlerLM(base, make_policy(name), SelectionConfig(budget=16), progress=False).get_model_info()
    assert said in told["generation_mode"] and ("densely" in told["generation_mode"]) == (name == "snapkv")


def test_a_text_that_begins_with_the_first_token_is_not_given_it_twice(base):
    model = dense(base, add_bos_token=True)
    first = base.tokenizer.bos
    assert model.tok_encode("a bird") == [first, *base.tokenizer.encode("a bird")]
    assert model.tok_encode("<|endoftext|>a bird").count(first) == 1
    assert model.tok_encode("a bird", add_special_tokens=False) == base.tokenizer.encode("a bird")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(policy="dens"), "unknown policy 'dens'; known: dense, oracle"),
        (dict(policy="quest", pages=3), r"policy quest has no pages.*The model itself has the arguments base, run, .*"),
        (dict(policy="tokenbutler"), r"needs a trained predictor; give .*run=RUN in --model_args"),
        (dict(policy="tokenbutler", run="nowhere"), "no such directory: nowhere; give the directory of a run"),
        (dict(policy="oracle", budget="3/2"), "at most 1.0"),
        (dict(policy="oracle", budget="5"), "below 4 sinks"),
        (dict(policy="oracle", budget="half"), "not a number"),
        (dict(max_length=128), "max_length must be 2 to 127"),
        (dict(batch_size="auto"), "batch_size must be a whole number"),
        (dict(device="cuda:0"), "JAX_PLATFORMS"),
        (dict(dtype="float16"), "float32 or bfloat16"),
        (dict(score_dtype="int4"), "int4"),
    ],
)
def test_bad_arguments_are_told(directory, arguments, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        ButlerLM.create_from_arg_obj({"base": str(directory), **arguments})


def test_arguments_make_the_model(directory):
    model = ButlerLM.create_from_arg_string(
        f"base={directory},policy=quest,page=4,budget=1/4,sinks=2,recent=3,tail=16,max_length=64", {"batch_size": "2"}
    )
    assert model.policy == make_policy("quest", page=4)
    assert model.selection == SelectionConfig(budget=0.25, sinks=2, recent=3, tail=16)
    assert (model.batch_size, model.max_length) == (2, 64)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        ButlerLM.create_from_arg_string("policy=dense")


def test_downstream_gives_means_and_standard_errors_of_its_samples(base, data):
    policy, chosen = make_policy("dense"), SelectionConfig(budget=1.0)
    found = run_harness(base, policy, chosen, directory=data, task="lambada", limit=6).estimates
    pairs = [(line["context"], " " + line["continuation"]) for line in LINES["lambada"][:6]]
    values, greedy = zip(*likelihoods(dense(base), pairs), strict=True)
    assert found["accuracy"].value == np.mean(greedy) and found["accuracy"].n == 6
    assert found["perplexity"].value == pytest.approx(math.exp(-np.mean(values)), rel=1e-5)
    spread = np.std(values, ddof=1) / math.sqrt(6) * math.exp(-np.mean(values))
    assert found["perplexity"].error == pytest.approx(spread, rel=1e-4)
    both = run_harness(base, policy, chosen, directory=data, task="piqa")
    right, norm = [], []
    for line in LINES["piqa"]:
        pairs = [(line["query"] + "Answer:", " " + choice) for choice in line["choices"]]
        scores = np.asarray([value for value, _ in likelihoods(dense(base), pairs)])
        right.append(scores.argmax() == line["gold"])
        norm.append((scores / [len(choice) for choice in line["choices"]]).argmax() == line["gold"])
    assert {name: one.value for name, one in both.estimates.items()} == {
        "accuracy": np.mean(right),
        "accuracy_norm": np.mean(norm),
    }
    assert both.attended == 1


@pytest.mark.parametrize("words", [["--tasks", "piqa_local"], ["--tasks=piqa_local"], ["-t", "piqa_local"]])
def test_tasks_of_the_package_are_known_however_the_option_is_spelled(words, monkeypatch):
    given = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: given.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert main(["lm-eval", *words]) == 0
    assert given[1:] == [*words, "--include_path", str(TASKS_DIRECTORY)]


@pytest.mark.slow
def test_the_command_runs_the_harness_with_the_model_and_local_tasks(directory, data, tmp_path, monkeypatch, capsys):
    arguments = f"base={directory},policy=oracle,budget=1/2"
    monkeypatch.setattr(multiprocessing, "Pool", None)  # the standard errors are bootstrapped without a fork
    monkeypatch.setattr(sys, "argv", sys.argv)  # the harness reads them
    model = ["--model", "butler", "--model_args", arguments, "--batch_size", "2"]
    tasks = ["--tasks", "piqa_local,lambada_local", "--metadata", f"directory={data}", "--output_path", str(tmp_path)]
    assert main(["lm-eval", *model, *tasks]) == 0
    assert "piqa_local" in capsys.readouterr().out
    (path,) = tmp_path.rglob("results*.json")
    results = json.loads(path.read_text())
    assert results["config"]["policy"]["name"] == "oracle"
    assert results["results"]["lambada_local"]["perplexity_stderr,none"] > 0
    assert "every position" in results["config"]["loglikelihood_mode"]
    assert set(results["results"]) == {"piqa_local", "lambada_local"}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lambada", long("piqa")])
def test_dense_agrees_with_the_harness_own_model_on_stories(shared_data, task):
    pytest.importorskip("accelerate")
    where = shared_data / "data" / "stories260K"
    (ours, theirs), (right, wanted) = compare(where, shared_data / "data" / "evals", task, 200, 511)
    assert len(ours) == 200 and right == wanted
    # both are float32: 1e-6 of each of some hundred log-probabilities of about 5
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.long  # as on stories
@pytest.mark.slow
def test_dense_agrees_with_the_harness_own_model_on_smollm2(shared_data, smollm2_dir):
    """On 24 items; benchmarks/harness_agreement.py takes 200 of two tasks."""
    pytest.importorskip("accelerate")
    (ours, theirs), (right, wanted) = compare(smollm2_dir, shared_data / "data" / "evals", "lambada", 24, 1023)
    assert len(ours) == 24 and right == wanted
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # likewise, 30 layers


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def talking(directory, tmp_path):
    """The base with a chat template."""
    place = tmp_path / "talking"
    shutil.copytree(directory, place)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return place


def test_chats_are_put_into_the_models_template_as_transformers_does(base, talking):
    model, theirs = dense(load_base(talking)), transformers.AutoTokenizer.from_pretrained(talking)
    history = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "sings "}]
    for told, asks in ((history[:1], True), (history, True), (history, False)):
        how = dict(tokenize=False, add_generation_prompt=asks, continue_final_message=not asks)
        assert model.apply_chat_template(told, asks) == theirs.apply_chat_template(told, **how)
    refused = [{"role": "system", "content": "sing"}, *history]  # the model hf tries again without it
    assert model.apply_chat_template(refused) == model.apply_chat_template(history)
    assert model.chat_template(True) == TEMPLATE and model.chat_template(False) is None
    with pytest.raises(ValueError, match="no chat template 'rag'; there are: default"):
        model.chat_template("rag")
    with pytest.raises(ValueError, match="the model has no chat template"):
        dense(base).apply_chat_template(history)


@pytest.mark.slow
def test_dense_agrees_with_the_harness_own_model_in_a_chat(talking, data):
    pytest.importorskip("accelerate")
    (ours, theirs), (right, wanted) = compare(talking, data, "piqa", 8, 100, chat=True)
    assert len(ours) == 2 and right == wanted
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # float32


def test_the_likelihood_of_nothing_is_refused(base):
    for pair in (("", ""), ("the river", "")):
        with pytest.raises(ValueError, match="a continuation has no tokens"):
            dense(base).loglikelihood(ask("loglikelihood", [pair]))
