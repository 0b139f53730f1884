"""The site's configuration. `make site` calls Sphinx on a folder that tools/build_site.py fills."""

project = "LLM systems from first principles"
author = "The maintainers"
copyright = "the maintainers; Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
html_theme = "sphinx_book_theme"
html_title = project
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
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
# Links from notebooks to files that are not pages; tables of outputs in no language.
suppress_warnings = ["myst.xref_missing", "myst.header", "mystnb.unknown_mime_type",
                     "misc.highlighting_failure", "ref.python"]  # fmt: skip


def literally(app, what, name, obj, options, lines):
    """Docstrings hold aligned tables and formulas: show them as they are in the source."""
    if any(line.strip() for line in lines):
        lines[:] = ["::", "", *("    " + line for line in lines), ""]


def setup(app):
    app.connect("autodoc-process-docstring", literally)
