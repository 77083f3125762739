"""Settings and data that all tests share."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one process of the session compiled, the others read
    PROGRAMS = tempfile.TemporaryDirectory(prefix="programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jaxtyping
import pytest

import tests.shapes  # before the hook, which finds the checker by its name
from benchmarks.watch import Compilations

CHECKED = (
    "data",
    "decoding",
    "evaluation",
    "model",
    "parallel",
    "policies",
    "predictors",
    "pretraining",
    "selection",
    "simulation",
    "text",
    "training",
    "weights",
)
jaxtyping.install_import_hook([f"butler_jax.{name}" for name in CHECKED], f"{tests.shapes.__name__}.check_shapes")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Tests, and the processes they start, compile more than they compute: without the slowest optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if jax.__version_info__ < (0, 11):  # later versions have one kind of emitter, and no such flag
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


LONGEST = """
    parallel/test_processes training/test_faults documentation/test_site evaluation/test_evaluator
    documentation/test_notebooks cli/test_commands training/test_interruptions pallas_kernels/test_compilation
    decoding/test_choice documentation/test_code_blocks decoding/test_generation cli/test_wheel decoding/test_parts
    evaluation/report/test_pages parallel/test_mesh_evaluation evaluation/tasks/test_harness parallel/test_mesh
    model/test_experts training/test_objective model/test_attention decoding/test_compilation parallel/test_heartbeats
    benchmarks/test_pods model/test_decoder simulation/test_simulator pallas_kernels/test_selection cli/test_info
    selection/test_choices pallas_kernels/test_interpreted benchmarks/test_long_runs simulation/test_recall
    cli/test_generate model/test_adapter decoding/test_serving decoding/test_longrope
""".split()
"""The files that take longest, fast or slow, come first: two workers then end at nearly the same time."""


def pytest_collection_modifyitems(items):
    places = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish():
    """What the modules hold stays: a collection of garbage, half a second else, passes it over."""
    gc.collect()
    gc.freeze()


KEPT = 200  # programs


@pytest.fixture(scope="session")
def compilations() -> Iterator[Compilations]:
    with Compilations() as counted:
        yield counted


@pytest.fixture(autouse=True)
def programs_let_go(compilations) -> Iterator[None]:
    """Programs that are kept make every further one slower to compile: a thousand of them double the time."""
    yield
    if compilations.count > KEPT:
        jax.clear_caches()
        gc.collect()
        compilations.count = 0


@pytest.fixture(autouse=True)
def optimised_with_a_real_model(request) -> Iterator[None]:
    """A model of millions of parameters computes more than it compiles: with all optimisations."""
    if "smollm2_dir" not in request.fixturenames:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real models and texts beside the project; BUTLER_SHARED names another place."""
    path = Path(os.environ.get("BUTLER_SHARED", REPOSITORY.parent / "shared"))
    if not (path / "data").is_dir():
        reason = f"{path}/data is absent: it holds the real models and texts these tests compare with"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return path


@pytest.fixture(scope="session")
def smollm2_dir(shared_data, tmp_path_factory) -> Path:
    """A Hugging Face directory of SmolLM2-135M-Instruct with its GGUF file; BUTLER_SMOLLM2 names one already made.

    Downloads 93 MB: only tests marked slow may ask for it.
    """
    if "BUTLER_SMOLLM2" in os.environ:
        return Path(os.environ["BUTLER_SMOLLM2"])
    path = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, shared_data / "tools" / "smollm2.py", path], check=True)
    return path


@pytest.fixture
def small_model(tmp_path) -> Path:
    """The directory of a valid model of one layer with its tokenizer, for tests to damage."""
    from benchmarks.fuzz_targets import write_model

    return write_model(tmp_path / "model")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 400 KB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system takes root; the test with a limit on file sizes does without")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; without one its tests are skipped, and fail where CI=true."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if program is None or sync_playwright is None:
        missing = "a Chromium on PATH" if program is None else 'playwright (pip install -e ".[test]")'
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            f"the page is looked at in a browser: needs {missing}"
        )
    switches = "no-sandbox disable-gpu disable-quic no-first-run disable-component-update disable-sync".split()
    switches = [f"--{switch}" for switch in (*switches, "disable-background-networking")]
    with sync_playwright() as player:
        opened = player.chromium.launch(executable_path=program, args=switches)
        yield opened
        opened.close()
