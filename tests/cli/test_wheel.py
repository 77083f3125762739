"""The wheel is complete: an environment with the wheel alone trains, evaluates and generates with `butler-jax`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without a network from what git tracks."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if (REPOSITORY / name).is_file() and not name.startswith(("tests/", "notebooks/", "docs/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel; of this one it sees the other packages alone, without the editable checkout."""
    place = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(place, with_pip=False)
    (packages,) = place.glob("lib/python*/site-packages")
    # A path that is added by sys.path, and not by site, does not run the .pth files in it.
    (packages / "dependencies.pth").write_text(f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True, capture_output=True, text=True, timeout=300, env=without_checkout())
    return place


def without_checkout() -> dict[str, str]:
    """The environment variables but for the one that could name the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(installed: Path, place: Path, *arguments: object) -> str:
    """What a command of the environment prints, away from the checkout."""
    program, *words = map(str, arguments)
    done = subprocess.run(
        [installed / "bin" / program, *words],
        cwd=place,
        env={**without_checkout(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    """Among them the embedded model, texts, templates, tasks of the harness and py.typed."""
    names = zipfile.ZipFile(wheel).namelist()
    command = ["git", "ls-files", "butler_jax", "pallas_kernels"]
    tracked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    assert len(tracked) > 100 and {*tracked} <= {*names}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_trains_evaluates_and_generates(installed, tmp_path):
    where = "import butler_jax, pallas_kernels; print(butler_jax.__file__, pallas_kernels.__file__, sep='\\n')"
    for path in run(installed, tmp_path, "python", "-c", where).splitlines():
        assert Path(path).is_relative_to(installed) and not Path(path).is_relative_to(REPOSITORY)
    (tmp_path / "book.txt").write_text("<|endoftext|>".join(["The file is read line by line. " * 40] * 40))
    data = ["--data", f"text:{tmp_path / 'book.txt'}", "--data-dir", tmp_path / "data"]
    sizes = ["--steps", 2, "--length", 64, "--batch-size", 1, "--calibration", 1, "--mesh", "data=1"]
    said = run(installed, tmp_path, "butler-jax", "train", *data, *sizes, "--run-dir", "run")
    advice = said.splitlines()[-1].partition("evaluate it with: ")[2].split()
    assert advice == ["butler-jax", "eval", "--run", "run"]
    less = ["--tasks", "perplexity", "--tokens", 256, "--context", 128, "--budgets", "1/4", "--policies", "tokenbutler"]
    assert "the report is in run/eval" in run(installed, tmp_path, *advice, "--data-dir", tmp_path / "data", *less)
    assert (tmp_path / "run" / "eval" / "report.html").is_file()
    text = run(
        installed, tmp_path, "butler-jax", "generate", "--run", "run", "--prompt", "The file", "--max-new-tokens", 4
    )
    assert text.startswith("The file")
    shown = run(installed, tmp_path, "butler-jax", "info", "run")
    assert "finished, saved up to step 2 of 2" in shown and "butler-jax train --" in shown
