"""The site's configuration. `make site` calls Sphinx on a folder that tools/build_site.py fills."""

import re

project = "LLM systems from first principles"
author = "The maintainers"
copyright = "the maintainers; Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_context = {"default_mode": "auto"}
html_show_search_summary = False  # it would fetch pages, which a browser refuses without a server
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
}
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
# Links from notebooks to files that are not pages; tables of outputs in no language.
suppress_warnings = ["myst.xref_missing", "myst.header", "mystnb.unknown_mime_type",
                     "misc.highlighting_failure", "ref.python"]  # fmt: skip


def literally(app, what, name, obj, options, lines):
    """Docstrings hold aligned tables and formulas: show them as they are in the source."""
    if any(line.strip() for line in lines):
        lines[:] = [".. code-block:: text", "", *("    " + line for line in lines), ""]


def tidy(app, what, name, obj, options, signature, returns):
    """Types by their own names, without modules: Callable, Float[Tensor, 'B T D']."""
    module = re.compile(r"~?\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_]\w*\b)")
    return tuple(module.sub("", text) if text else text for text in (signature, returns))


def setup(app):
    app.connect("autodoc-process-signature", tidy)
    app.connect("autodoc-process-docstring", literally)
