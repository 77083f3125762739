"""Local files of downstream tasks: the harness's own prompts, and lines that are not samples."""

from __future__ import annotations

import json

import pytest

from butler_jax.data.sources.passed_over import PassedOver
from butler_jax.data.sources.text import read_passages
from butler_jax.data.sources.text_files import TextFile
from butler_jax.evaluation.tasks.local_tasks import make_local_tasks, read_samples
from tests.tiny_evaluations import FILES, LINES, write_samples

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data"))


def test_prompts_are_the_harness_own(data):
    tasks = make_local_tasks(data, list(LINES))["tasks"]
    made = {}
    for name, task in tasks.items():
        task.build_all_requests(limit=2)
        made[name] = [instance.args for instance in task.instances]
    assert made["lambada_local"][0] == ("the old the sings over a", " bird")
    assert made["piqa_local"] == [
        ("Question: a river?\nAnswer:", " stone and hill"),
        ("Question: a river?\nAnswer:", " quiet"),
        ("Question: light  \nAnswer:", " falls"),
        ("Question: light  \nAnswer:", " the bird sings"),
    ]
    assert made["winogrande_local"] == [(text, " sings.") for text in LINES["winogrande"][0]["context_options"]]
    assert made["arc_easy_local"] == [
        ("Question: what falls?\nAnswer:", f" {choice}") for choice in ("light", "a", "stone", "hill")
    ]


@pytest.mark.parametrize(
    ("task", "line", "said"),
    [
        ("lambada", '{"context": "a"', "line 2 is not valid JSON"),
        ("lambada", '{"context": "a"}', "line 2: continuation is missing; a line has context, continuation"),
        ("lambada", '{"context": "a", "continuation": ""}', "line 2: continuation must be a text"),
        ("lambada", "[1]", "line 2 must hold a JSON object"),
        ("piqa", '{"query": "a", "choices": ["b"], "gold": 0}', "line 2: choices must be a list of at least 2"),
        ("piqa", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2: gold must be 0 ... 1, got 2"),
        ("winogrande", '{"context_options": ["b", "c"], "continuation": "d", "gold": "0"}', "line 2: gold must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path, task, line, said):
    path = tmp_path / f"{FILES[task]}.jsonl"
    path.write_text(json.dumps(LINES[task][0]) + "\n" + line + "\n")
    with pytest.raises(ValueError) as error:
        read_samples(tmp_path, task)
    assert str(error.value).startswith(f"{path}, {said}")


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lambada reads lambada_openai\.jsonl"):
        make_local_tasks(tmp_path, ["lambada"])
    (tmp_path / "piqa.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"piqa\.jsonl is empty"):
        make_local_tasks(tmp_path, ["piqa"])
    with pytest.raises(ValueError, match="unknown task 'boolq'; known: lambada"):
        make_local_tasks(tmp_path, ["boolq"])


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"[" * 200_000,
        b"NaN",
        b"\0",
        b"\xef\xbb\xbf{}",
        b'{"context": NaN, "continuation": "b"}',
        b'{"context": ["a"], "continuation": "b"}',
        b'{"context": "\\ud800", "continuation": "b"}',
        b'{"context": "a", "continuation": 1e400}',
    ],
)
def test_a_line_that_is_no_sample_is_named_with_its_number(tmp_path, line):
    (tmp_path / "lambada_openai.jsonl").write_bytes(b'{"context": "a", "continuation": "b"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"lambada_openai\.jsonl, line 3") as caught:
        read_samples(tmp_path, "lambada")
    assert len(str(caught.value)) < 1000
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"text\.jsonl.*line 2"):
        list(read_passages(TextFile(path, "records"), PassedOver(strict=True)))
