"""docs/guides/tpu.md: its blocks are valid shell, use the values it asks for, and give existing options."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from butler_jax.cli.command_line import read
from butler_jax.training.config import TrainConfig

PAGE = (Path(__file__).parent.parent.parent / "docs" / "guides" / "tpu.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FILES = dict(re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", PAGE, re.MULTILINE | re.DOTALL))


def shell(script: str, *arguments: str, **settings) -> str:
    done = subprocess.run(["bash", *arguments, "-c", script], capture_output=True, text=True, check=True, **settings)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("text", [*BLOCKS, *(FILES[name] for name in ("setup.sh", "train.sh"))])
def test_every_block_is_shell_text(text):
    shell(text, "-n")


def test_every_value_is_one_that_the_page_asks_for(tmp_path):
    """With the commands replaced, and unset values an error."""
    commands = (
        "gcloud() { :; }; python() { :; }; butler-jax() { :; }; source() { :; }; tail() { :; }; cd() { :; }; set -eu\n"
    )
    shell(commands + "".join(BLOCKS), cwd=tmp_path, env={"PATH": "/bin:/usr/bin"})
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


def test_hosts_are_set_up_with_the_bucket_and_the_repository(tmp_path):
    """Run setup.sh with commands that record how they were called."""
    calls = re.findall(r"bash setup\.sh [^\"]*", PAGE)
    assert len(calls) == 2 and set(calls) == {"bash setup.sh $BUCKET $REPOSITORY"}
    names = "curl sh git uv sudo lsb_release mountpoint gcsfuse".split()
    commands = "".join(
        f'{name}() {{ echo {name} "$@" >&3; {"false" if name == "mountpoint" else ":"}; }}\n' for name in names
    )
    script = FILES["setup.sh"].replace("~/.local/bin/uv", "uv").replace("| sh", "| cat")
    done = shell(f"exec 3>&1\n{commands}run() {{\n{script}\n}}\nrun the-bucket the-address > /dev/null", cwd=tmp_path)
    said = done.splitlines()
    assert "git clone the-address butler-jax" in said
    assert [line.split()[-2:] for line in said if line.startswith("gcsfuse")] == [["the-bucket", "/mnt/bucket"]]


def test_every_training_has_settings_that_there_are():
    texts = "\n".join([*BLOCKS, *FILES.values()]).replace("\\\n", " ").splitlines()
    found = [line.partition("train.py ")[2] for line in texts if "train.py --" in line]
    assert len(set(found)) == 3
    for options in found:
        assert read(TrainConfig, shlex.split(options), "train.py").run_dir.is_relative_to("/mnt/bucket/runs")
