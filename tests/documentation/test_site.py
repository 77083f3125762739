"""The documentation site builds without a warning, and every page opens in a browser."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documentation.pages import DOCS, REPOSITORY
from tests.marked import long


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    if importlib.util.find_spec("sphinx") is None:
        reason = 'the site is built by Sphinx: pip install -e ".[docs]"'
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    out = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", DOCS, out]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def pages(site: Path) -> list[Path]:
    return sorted(p for p in site.rglob("*.html") if not {"_modules", "_static"} & set(p.relative_to(site).parts))


@pytest.mark.slow
def test_every_page_and_notebook_is_in_the_site(site):
    sources = [p for p in DOCS.rglob("*.md") if not {"_build", "jupyter_execute"} & set(p.parts)]
    wanted = {p.relative_to(DOCS).with_suffix(".html") for p in sources}
    wanted |= {Path("notebooks", p.stem + ".html") for p in (REPOSITORY / "notebooks").glob("*.ipynb")}
    assert wanted <= {p.relative_to(site) for p in pages(site)}


@pytest.mark.slow
def test_the_reference_describes_what_the_package_exports(site):
    import butler_jax

    reference = (site / "api" / "butler_jax.html").read_text(encoding="utf-8")
    for name in butler_jax.__all__:
        module = getattr(butler_jax, name).__module__.split(".")[1]
        assert f'id="butler_jax.{module}.{name}"' in (site / "api" / f"{module}.html").read_text(encoding="utf-8"), name
        assert f"butler_jax.{module}.{name}" in reference, name


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, long(1280)])
def test_every_page_opens_in_a_browser(browser, site, width):
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
    opened, wrong = context.new_page(), []
    opened.on("console", lambda message: wrong.append((opened.url, message.text)) if message.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append((opened.url, str(error))))
    opened.on("requestfailed", lambda request: wrong.append((opened.url, request.url)))
    for page in pages(site):
        opened.goto(page.as_uri())
        wide = opened.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            wrong.append((opened.url, f"{wide} pixels wide"))
    assert wrong == []
