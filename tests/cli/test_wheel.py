"""The wheel is complete: an environment with the wheel alone trains, evaluates and generates with `butler-jax`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent


def tracked(*below: str) -> list[str]:
    """The files of this checkout that git knows or would add, below some directories or all."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *below]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A directory with the sdist of this checkout, and the wheel that is made from it, without a network."""
    return build(tmp_path_factory.mktemp("built"))


def build(place: Path) -> Path:
    """Build both in a directory, from a copy of this checkout there; returns it."""
    source = place / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", place, source]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (found,) = built.glob("*.whl")
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
    names = zipfile.ZipFile(wheel).namelist()
    ours = tracked("butler_jax", "pallas_kernels")
    assert len(ours) > 100 and {*ours} <= {*names}
    for name in (
        "butler_jax/py.typed",
        "butler_jax/tiny/model.safetensors",
        "butler_jax/predictors/templates/README.md.j2",
        "butler_jax/evaluation/report/templates/report.html.j2",
        "butler_jax/evaluation/tasks/harness_tasks/piqa.yaml",
        "pallas_kernels/gpu/tiles.json",
    ):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"butler_jax", "pallas_kernels"}
    entry_points = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "butler-jax = butler_jax.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


@pytest.mark.slow
def test_the_source_distribution_has_every_file_of_the_repository(built):
    """Tests, documentation, benchmarks and notebooks too; not what serves the repository alone."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    ours = {name for name in tracked() if not name.startswith(".")}
    assert {"CITATION.cff", "LICENSE", "train.py", "docs/conf.py", "tests/conftest.py"} <= ours <= names


@pytest.mark.slow
def test_both_have_the_same_bytes_whenever_and_wherever_they_are_built(built, tmp_path):
    """Where SOURCE_DATE_EPOCH is the same: from another directory, at another time."""
    again = build(tmp_path)
    names = {path.name for path in built.iterdir() if path.is_file()}
    assert len(names) == 2
    for name in names:
        assert (again / name).read_bytes() == (built / name).read_bytes(), name


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
    assert "packages " in run(installed, tmp_path, "butler-jax", "info")
    shown = run(installed, tmp_path, "butler-jax", "info", "run")
    assert "finished, saved up to step 2 of 2" in shown and "butler-jax train --" in shown
