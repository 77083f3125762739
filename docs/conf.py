"""Sphinx settings of the documentation: `python -m sphinx -W -b html docs docs/_build`."""

import importlib.metadata
import re
import sys
from pathlib import Path

from sphinx.ext.napoleon import Config, GoogleDocstring

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "butler-jax"
author = "the authors of butler-jax"
release = importlib.metadata.version("butler-jax")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"butler-jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False

myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests execute the notebooks

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "code"


def google_docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text in Google's form with code in backticks: other markup is escaped."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`+[^`]*`+)", line)
        parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        lines[number] = "".join(parts)
    if what not in ("attribute", "data", "property"):  # there the first colon would end a type
        config = Config(napoleon_use_rtype=False, napoleon_custom_sections=[("Attributes", "params_style")])
        lines[:] = GoogleDocstring(lines, config, app, what, name, obj, options).lines()


def skip_fields(app, what, name, obj, skip, options):
    """The class's own docstring describes the fields of a named tuple."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """Connect the reader of docstrings."""
    app.connect("autodoc-process-docstring", google_docstring)
    app.connect("autodoc-skip-member", skip_fields)
