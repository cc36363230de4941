"""The documentation site: ``bash scripts/docs.sh``."""

import inspect
from typing import Any

from sphinx.application import Sphinx

from ddpm_lightning import __version__

project = "ddpm_lightning"
author = "the authors of ddpm_lightning"
release = __version__
language = "en"
html_show_copyright = False

# MathJax and its fonts are copied into the site, so that it needs no network
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"ddpm_lightning {release}"

# GitHub reads the same formulas and the same anchors of headings
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_allow_labels = False
myst_heading_anchors = 4

# a page with a kernelspec in its head is a notebook, which is executed; no other page is
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True  # a table that is printed line by line stays in one piece

autodoc_inherit_docstrings = False  # torch's and Lightning's are in their own documentation
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def without_aliases(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out aliases of types, whose docstring is that of ``typing``."""
    return True if what == "module" and not inspect.isroutine(member) and not inspect.isclass(member) else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", without_aliases)
