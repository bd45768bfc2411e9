"""The site of `make docs`: README, pages and executed notebooks as they are, and the public names by their use."""

import re
import shutil
from pathlib import Path

import apexlib

ROOT = Path(__file__).parents[1]

project = author = html_title = "apexlib"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "matplotlib.sphinxext.plot_directive", "myst_nb"]
root_doc = "README"
SOURCES, EXECUTED = (
    {path.name for path in (ROOT / f).glob("*.ipynb")} for f in ("notebooks", "notebooks/executed/cpu")
)
NOTEBOOKS = "notebooks/executed/cpu" if SOURCES <= EXECUTED else "notebooks"
PAGES = [
    "docs/api",
    "docs/plot",
    "docs/explore",
    "docs/*",
    "data/models/python-3m/README",
    f"{NOTEBOOKS}/*",
]  # in order, as globs
include_patterns = ["README.md", "docs/**", "data/models/python-3m/README.md", f"{NOTEBOOKS}/*"]
html_theme = "furo"
html_show_sourcelink = html_copy_source = html_show_copyright = False
autodoc_member_order = "bysource"
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = [
    "misc.highlighting_failure"
]  # the card of the base shows what it writes, which is not quite Python
plot_formats = [("png", 150)]
plot_html_show_formats = plot_html_show_source_link = False
plot_working_directory = str(ROOT)  # where the examples find their tables

ENTRIES = {
    "function": "\n.. autofunction:: apexlib.{0}\n",
    "type": "\n.. autoclass:: apexlib.{0}\n   :members:\n",
    "module": "\nModule ``apexlib.{0}``: :doc:`{0}`\n",
}
MARKS = re.compile(r"`([^`]+)`(?=(\w?))|([*|])")


def complete(app, docname, source):
    """Put the table of contents below the README, and every public name into the page of names."""
    if docname == root_doc or docname.startswith("docs/"):
        source[0] = re.sub(r"\]\((\.\./)?notebooks/(?!executed)", rf"](\g<1>{NOTEBOOKS}/", source[0])
    if docname == root_doc:
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", ":glob:", "", *PAGES, "```\n"])
    if docname == "docs/api":
        for group, names in apexlib._GROUPS.items():
            source[0] += f"\n\n{group}\n{'-' * len(group)}\n"
            for name in names:
                source[0] += ENTRIES[type(getattr(apexlib, name)).__name__].format(name)


def to_rst(app, what, name, obj, options, lines):
    """Turn the marks of a docstring into Sphinx's: `code` is a link to a public name or code, others are themselves."""
    homes = dict.fromkeys(apexlib.__all__, "apexlib")
    if name.startswith("apexlib.plot"):  # elsewhere its names are those of columns
        homes |= dict.fromkeys(set(apexlib.plot.__all__) - set(homes), "apexlib.plot")

    def mark(found):
        code, after, other = found.groups()
        if other:
            return f"\\{other}"
        marked = f":py:obj:`~{homes[code]}.{code}`" if code in homes else f"``{code}``"
        return marked + "\\ " * bool(after)

    parts = "\n".join(lines).split("\n\n")
    parts = [part if part.lstrip().startswith(">>>") else MARKS.sub(mark, part) for part in parts]
    lines[:] = "\n\n".join(parts).split("\n")


def first_page(app, exception):
    """Show the README where a browser asks for a folder."""
    if not exception:
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")


def setup(app):
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", to_rst)
    app.connect("build-finished", first_page)
