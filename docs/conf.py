"""Settings of the documentation site (``make docs``): the pages as they lie in the repository, and the API.

The source folder is the repository itself, so that links between its files are the same on the site and elsewhere. The
order of the pages is that of docs/README.md, and the pages of the API are made from the docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

import moco_d2

ROOT = Path(__file__).parents[1]

project = "moco_d2"
author = copyright = "moco_d2 contributors"
release = moco_d2.__version__
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "docs/api/*.rst", "configs/*.md", "datasets/*.md", "examples/*.md"]
exclude_patterns = ["docs/api/modules.rst"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 3

apidoc_modules = [
    {
        "path": "../moco_d2",
        "destination": "docs/api",
        "exclude_patterns": [f"../moco_d2/{name}" for name in ("commands", "__main__.py", "install_detectron2.py")],
        "max_depth": 1,
        "automodule_options": {"members", "show-inheritance"},
    }
]
# What a package passes on is described where it is written.
autodoc_default_options = {"ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_use_type_comments = False  # there are none, and looking for them takes time
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True


def toctrees() -> str:
    """Return a table of contents for each section of docs/README.md, with the pages that it links to."""
    text = ""
    for section in re.split(r"^## ", (ROOT / "docs" / "README.md").read_text(), flags=re.MULTILINE)[1:]:
        links = re.findall(r"^\* \[[^]]*\]\(([^)]+)\.md\)", section, re.MULTILINE)
        pages = [link.removeprefix("../") if link.startswith("../") else f"docs/{link}" for link in links]
        text += toctree(pages, f":caption: {section.splitlines()[0]}")
    return text


def toctree(pages: list[str], *options: str) -> str:
    """Return a table of contents that is shown beside the page only."""
    return "\n".join(["\n```{toctree}", ":hidden:", *options, "", *pages, "```\n"])


def add_toctrees(app: Sphinx, page: str, content: list[str]) -> None:
    """Place the tables of contents, which would be noise in the files themselves."""
    if page == root_doc:
        content[0] += toctrees()
    elif page == "docs/api":
        content[0] += toctree(["api/moco_d2"])
    elif page == "docs/README":  # its links are the table of contents
        content[0] = "---\norphan: true\n---\n" + content[0]


def add_index(app: Sphinx, failure: Exception | None) -> None:
    """Write the page that a browser opens first."""
    if failure is None:
        page = f'<meta charset="utf-8"><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        (app.outdir / "index.html").write_text(page)


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", add_toctrees)
    app.connect("build-finished", add_index)
