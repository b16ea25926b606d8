"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build`."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

# The pages document the checkout that they are in, even if another version is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

import flaxnets

project = "flaxnets"
author = "The flaxnets authors"
release = flaxnets.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "furo"
html_title = "flaxnets"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# A test executes the tutorial: building the pages trains nothing.
nb_execution_mode = "off"

# Docstrings are in Google style, with Markdown's single backticks for code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Lists a class's attributes in its description, not each as an entry of its own.
napoleon_custom_sections = [("Attributes", "params_style")]
# Names such as `InputError` are documented where they are and where users import them from.
suppress_warnings = ["ref.python"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"exclude-members": "dtype, param_dtype"}
python_maximum_signature_line_length = 80


def tidy_signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, *texts: Any) -> Any:
    """Leave out what Linen adds to every module, and addresses in memory."""
    signature, returns = texts
    if signature is not None:
        signature = re.sub(r", parent: .*?(?=\)$)", "", signature)
        signature = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", signature)
        signature = re.sub(r"<function (\w+)( at 0x[0-9a-f]+)?>", r"\1", signature)
    return signature, returns


def skip_tuple_fields(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out the fields of named tuples, which the signature has already."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("autodoc-process-signature", tidy_signature)
