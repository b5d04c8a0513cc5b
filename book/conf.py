"""The book: the pages and the notebooks of the repository as they are committed; nothing is executed. `make book`."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from faithkd import watch

sys.path.insert(0, str(Path(__file__).parent))  # for `conf.read` below
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg.js"
LAB = "http://localhost:8888/doc/tree"  # where `make lab` opens the notebooks

project = "Faithful Knowledge Distillation, executable"
author = "the faithkd authors"
copyright = "the faithkd authors, MIT licence"
extensions = ["myst_nb", "sphinxcontrib.bibtex"]

# The source folder is the repository, so that links between pages are the same here and there.
root_doc = "book/index"
include_patterns = ["*.md", "benchmarks/README.md", "notebooks/*.ipynb", "book/*.md", "book/sheets/*.md"]
bibtex_bibfiles = ["references.bib"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables in the Markdown that a cell shows
nb_custom_formats = {".ipynb": ["conf.read", {}, False]}
nb_mime_priority_overrides = [("html", "text/html", 0)]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = "Faithful Knowledge Distillation"
html_last_updated_fmt = None
html_static_path = ["static", str(MATHJAX)]
html_css_files = ["book.css"]
html_extra_path = ["extra"]
mathjax_path = MATHJAX.name  # comes along, with its letters as paths: no fonts, no network
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
# Binder and Colab need to know where the repository is published: FAITHKD_REPOSITORY=https://github.com/owner/name
if repository := os.environ.get("FAITHKD_REPOSITORY"):
    html_theme_options |= {
        "repository_url": repository,
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }


def read(text: str) -> nbformat.NotebookNode:
    """A notebook in which what JupyterLab folds, and every solution, is folded here too."""
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        tags = cell.metadata.setdefault("tags", [])
        if cell.cell_type == "code" and "solution" in tags:
            tags.append("hide-cell")
        elif cell.metadata.get("jupyter", {}).get("source_hidden"):
            tags.append("hide-input")
    return notebook


class Watch(SphinxDirective):
    """`{watch} figure1`: something to drag, which needs no kernel."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(watch.DATA))
        return [nodes.raw("", watch.html(self.arguments[0]), format="html")]


def launch(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """A button on every notebook's page that opens it in the JupyterLab of `make lab`."""
    if pagename.startswith("notebooks/"):
        context["header_buttons"].append(
            {
                "type": "link",
                "url": f"{LAB}/{Path(pagename).name}.ipynb",
                "tooltip": "Open in JupyterLab on this machine (start it with: make lab)",
                "icon": "fas fa-rocket",
                "label": "launch-lab-button",
            }
        )


def setup(app) -> None:
    app.add_directive("watch", Watch)
    app.connect("html-page-context", launch, priority=502)  # after the theme's own buttons
