"""Code of the pages: Python blocks run from top to bottom, and commands have existing options."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest

from butler_jax.cli.bench_config import BenchConfig
from butler_jax.cli.command_line import read
from butler_jax.cli.generate import GenerateConfig
from butler_jax.cli.info import InfoConfig
from butler_jax.evaluation.config import EvalConfig
from butler_jax.pretraining.config import PretrainConfig
from butler_jax.training.config import TrainConfig
from tests.documentation.pages import PAGES, REPOSITORY, blocks, cases, name
from tests.host_devices import host_devices

KINDS = {
    "train": TrainConfig,
    "pretrain": PretrainConfig,
    "eval": EvalConfig,
    "generate": GenerateConfig,
    "bench": BenchConfig,
    "info": InfoConfig,
}
COMMAND = re.compile(r"(?:^|[ (])(butler-jax|python (?:train|eval)\.py)(?: ((?:(?! #)[^\n])*))?")
# The figures of the README are for a reader. These are sizes of the guides: what they compile is not compiled again.
SMALL = {
    "steps=300": "steps=2, length=128, batch_size=2, calibration=1",
    "tokens=4096": "tokens=512, context=128, tasks='perplexity'",
}
DEVICES = {"docs/guides/decode.md": 8}  # its last part uses several
OFTEN = {"README.md", "docs/install.md"} | {f"docs/guides/{guide}.md" for guide in ("evaluate", "kernels")}


def commands(page) -> list[list[str]]:
    """The words of every command of this package, in blocks and in lines of text."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    lines += re.findall(
        r"`((?:butler-jax|python (?:train|eval)\.py) [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    found = []
    for line in lines:
        for part in re.split(r"&&|\|\|?|;", line):
            if match := COMMAND.search(part):
                program, options = match[1], shlex.split((match[2] or "").strip().strip("`\"'"))
                found.append([{"python train.py": "train", "python eval.py": "eval"}.get(program, ""), *options])
    return [[word for word in words if word] for words in found]


def python_pages() -> list:
    return [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name)
def test_every_command_is_understood_by_its_own_parser(page):
    for words in commands(page):
        if words and words[0] in KINDS and "--help" not in words:
            read(KINDS[words[0]], words[1:], words[0])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_module_that_is_run_exists(page):
    for module in re.findall(r"python -m ([a-z_.]+)", page.read_text(encoding="utf-8")):
        if module.split(".")[0] in ("benchmarks", "pallas_kernels", "butler_jax"):
            assert importlib.util.find_spec(module) is not None, module
            assert not module.startswith("butler_jax"), f"{module}: butler-jax has a subcommand for it"


@pytest.mark.slow
@pytest.mark.parametrize("page", cases(python_pages(), name, OFTEN))
def test_python_blocks_run_from_top_to_bottom(page, tmp_path):
    program = "\n\n".join(blocks(page, "python"))
    for said, small in SMALL.items():
        program = program.replace(said, small)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if name(page) in DEVICES:
        environment["XLA_FLAGS"] = host_devices(DEVICES[name(page)])
    (tmp_path / "page.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "page.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


def test_guides_have_code():
    """The guides that must suffice by themselves are among the pages whose code runs."""
    guides = {
        f"docs/guides/{guide}.md"
        for guide in ("train", "evaluate", "decode", "kernels", "policy", "predictor", "family")
    }
    assert guides | {"README.md"} <= {name(page) for page in python_pages()}
