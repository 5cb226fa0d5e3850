"""The documentation site, from the pages of this folder and the docstrings of both packages.

python -m sphinx -W --keep-going -b html docs build/docs
python -m sphinx -W --keep-going -b doctest docs build/doctest
"""

import udi_kernels

project = "udi_kernels"
author = copyright = "The udi_kernels authors"
version = release = udi_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
doctest_global_setup = "import torch\n_ = torch.manual_seed(0)"
doctest_test_doctest_blocks = ""  # only blocks that say so

html_theme = "furo"
html_title = f"udi_kernels {release}"
html_copy_source = html_show_sourcelink = False
