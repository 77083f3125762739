"""The head of every notebook: `python docs/heads.py` writes its link to Colab and the cell that installs the package.

The address of the project stands in one place, pyproject.toml: `Repository` below `[project.urls]`. Where it is on
GitHub, the links open the notebooks there, and the cells install from there. Without an address the links ask for the
file, and the cells install a wheel that was uploaded, or by name. CITATION.cff gets the address too.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLAB, GITHUB = "https://colab.research.google.com/", "https://github.com/"
EXTRAS = "[notebooks,gguf,hub]"
INSTALL = """\
# Where butler-jax or its extra is missing, it is installed: from a wheel beside this notebook, or by its name.
import importlib.util
import subprocess
import sys
from pathlib import Path

if any(importlib.util.find_spec(name) is None for name in ("butler_jax", "matplotlib")):
    package = "PACKAGE"
    for wheel in Path().glob("butler_jax-*.whl"):
        package = f"{wheel}EXTRAS"
    if subprocess.run([sys.executable, "-m", "pip", "install", "-q", package]).returncode != 0:
        raise ModuleNotFoundError(
            "pip did not install butler-jax. Upload its wheel, which python -m build makes, to the folder of this "
            "notebook and run this cell again, or install it from a checkout: pip install -e '.EXTRAS'"
        )
"""


def address(project: dict) -> str | None:
    """The address of the project in the content of pyproject.toml, without a slash at its end; None without one."""
    found = project["project"].get("urls", {}).get("Repository")
    return None if found is None else found.rstrip("/").removesuffix(".git")


def link(name: str, at: str | None) -> str:
    """The line with the link of a notebook to Colab, which opens files of GitHub."""
    if at is None or not at.startswith(GITHUB):
        return f"[Open in Colab]({COLAB}#upload=true), which asks for this file."
    return f"[Open in Colab]({COLAB}github/{at.removeprefix(GITHUB)}/blob/main/notebooks/{name})"


def install(at: str | None) -> str:
    """The source of the cell that installs the package."""
    package = f"butler-jax{EXTRAS}" + (f" @ git+{at}" if at else "")
    return INSTALL.replace("PACKAGE", package).replace("EXTRAS", EXTRAS).rstrip("\n")


def with_head(text: str, name: str, at: str | None) -> str:
    """The text of a notebook with its link and its cell of installation for a project at this address."""
    notebook = json.loads(text)
    first, second = notebook["cells"][:2]
    first["source"] = [link(name, at) + "\n" if COLAB in line else line for line in first["source"]]
    second["source"] = install(at).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def citation(text: str, at: str | None) -> str:
    """The text of CITATION.cff with this address."""
    rest = re.sub(r"^repository-code:.*\n", "", text, flags=re.MULTILINE)
    return rest if at is None else rest.replace("\nlicense:", f'\nrepository-code: "{at}"\nlicense:', 1)


def pages(at: str | None) -> dict[Path, str]:
    """Every file that has the address, and its text for a project at this address."""
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    found = {path: with_head(path.read_text(encoding="utf-8"), path.name, at) for path in notebooks}
    cited = ROOT / "CITATION.cff"
    return {**found, cited: citation(cited.read_text(encoding="utf-8"), at)}


if __name__ == "__main__":
    for path, text in pages(address(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))).items():
        path.write_text(text, encoding="utf-8")
