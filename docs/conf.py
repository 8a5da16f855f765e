"""How the documentation is built: `scripts/docs`; every warning is an error.

Pages are Markdown (MyST), the API pages are made of docstrings. The pictures of schedules are drawn by the library
itself (pictures.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torchdistpackage

project = "torchdistpackage"
author = "the authors of torchdistpackage"
version = release = torchdistpackage.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = False  # types of torch and of transformers are not documented here
default_role = "code"  # docstrings write names as `name`

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes of named tuples are members already

html_theme = "furo"
html_title = f"torchdistpackage {release}"
html_copy_source = False
html_show_copyright = False
