"""Tasks of lm-evaluation-harness on local files (harness_tasks/*.yaml): LAMBADA, PIQA, WinoGrande and ARC-easy.

The prompts are the harness's own. By name they are lambada_local, piqa_local, winogrande_local and arc_easy_local.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from butler_jax.storage import parse_object, read_lines, shown

TASKS_DIRECTORY = Path(__file__).parent / "harness_tasks"
FILES = {
    "lambada": "lambada_openai.jsonl",
    "piqa": "piqa.jsonl",
    "winogrande": "winogrande.jsonl",
    "arc_easy": "arc_easy.jsonl",
}
FIELDS = {
    "lambada": ("context", "continuation"),
    "piqa": ("query", "choices", "gold"),
    "winogrande": ("context_options", "continuation", "gold"),
    "arc_easy": ("query", "choices", "gold"),
}
OPTIONS = ("choices", "context_options")


def make_local_tasks(directory: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """Make tasks as `lm_eval.evaluate` takes them, on the files in a directory.

    Raises:
        ValueError: A name is unknown, or a line is not a sample.
        FileNotFoundError: A file is missing.
    """
    from lm_eval.tasks import TaskManager

    for name in names:
        if name not in FILES:
            raise ValueError(f"unknown task {name!r}; known: {', '.join(FILES)}")
    manager = TaskManager(include_defaults=False, metadata={"directory": str(directory)})
    return manager.load([str(TASKS_DIRECTORY / f"{name}.yaml") for name in names])


def load_documents(*, task: str, directory: str | Path | None = None, **_: Any) -> dict[str, Any]:
    """Load the samples of a task as the harness's task files take them: {"test": datasets.Dataset}.

    On the command line, `--metadata directory=DIR` names the directory.
    """
    from datasets import Dataset

    if directory is None:
        raise ValueError(f"{task} is read from a local file: give its directory, --metadata directory=DIR")
    return {"test": Dataset.from_list(read_samples(directory, task))}


def read_samples(directory: str | Path, task: str) -> list[dict[str, Any]]:
    """Read the lines of a task's file: objects with the FIELDS of the task.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A line is not a sample; the message has its number.
    """
    path = Path(directory) / FILES[task]
    if not path.is_file():
        raise FileNotFoundError(
            f"no such file: {path}; the task {task} reads {FILES[task]}, one sample per line: {', '.join(FIELDS[task])}"
        )
    samples = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        sample = parse_object(line, f"{path}, line {number}")
        wrong = _find_fault(sample, FIELDS[task])
        if wrong is not None:
            raise ValueError(f"{path}, line {number}: {wrong}; a line has {', '.join(FIELDS[task])}")
        samples.append({field: sample[field] for field in FIELDS[task]})
    if not samples:
        raise ValueError(f"{path} is empty; it needs at least one line with {', '.join(FIELDS[task])}")
    return samples


def _find_fault(sample: dict, fields: Sequence[str]) -> str | None:
    """What is wrong with a sample, or None."""
    for field in fields:
        if field not in sample:
            return f"{field} is missing"
        value = sample[field]
        if field in OPTIONS:
            if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) and v for v in value):
                return f"{field} must be a list of at least 2 texts"
        elif field != "gold" and not (isinstance(value, str) and value):
            return f"{field} must be a text, got {shown(value)}"
    if "gold" in fields:
        count = len(next(sample[field] for field in OPTIONS if field in fields))
        if type(sample["gold"]) is not int or not 0 <= sample["gold"] < count:
            return f"gold must be 0 ... {count - 1}, got {shown(sample['gold'])}"
    return None
