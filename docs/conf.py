"""Configuration of the documentation: sphinx, furo and myst; built with warnings as errors (`make docs`)."""

from __future__ import annotations

import re
from typing import Any

import odelayers

project = "odelayers"
author = "The odelayers authors"
copyright = "2026, The odelayers authors"
version = release = odelayers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

default_role = "code"  # `f(t, z)` in a docstring is code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"odelayers {version}"
html_static_path = ["_static"]


def _plain_bars(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep the bars of |f| in a docstring: reStructuredText would take them for a substitution."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(`+[^`]*`+)", line)  # code at the odd places
            lines[i] = "".join(part if k % 2 else part.replace("|", r"\|") for k, part in enumerate(parts))


def setup(app: Any) -> None:
    """Called by sphinx at its start."""
    app.connect("autodoc-process-docstring", _plain_bars)
