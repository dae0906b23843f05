"""Configuration of the documentation: sphinx, furo and myst; built with warnings as errors (`make docs`)."""

from __future__ import annotations

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

