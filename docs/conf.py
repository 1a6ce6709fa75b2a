"""How Sphinx builds these pages: `make docs`, and Read the Docs on its own."""

import inspect
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "docs" / "_ext")]

import commands
import docstrings
import links

import hsrjax

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
SOURCE, SITE = PROJECT["urls"]["Source"], PROJECT["urls"]["Documentation"]
BRANCH = "main"
COLAB = f"{SOURCE}/blob/{BRANCH}/notebooks".replace(
    "https://github.com", "https://colab.research.google.com/github"
)

project = PROJECT["name"]
version = release = hsrjax.__version__
copyright = "the hsrjax authors"

extensions = [
    "links",
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.linkcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
smartquotes = False  # --out is not an en dash

# Types are in the docstrings, with shapes.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autosummary_generate = False
maximum_signature_line_length = 88

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they were run
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
copybutton_exclude = ".linenos, .gp, .go"  # neither prompts nor what is printed

html_math_renderer = "mathml"
html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "hsrjax"
html_logo = html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", SITE)
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": SOURCE,
    "source_branch": BRANCH,
    "source_directory": "docs/",
    "dark_css_variables": {  # what the pictures are drawn on
        "color-background-primary": "#0d1117",
        "color-background-secondary": "#161b22",
    },
}


def linkcode_resolve(domain, info):
    """The lines of the code at its address."""
    found = sys.modules.get(info["module"])
    for name in info["fullname"].split("."):
        found = getattr(found, name, None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    if domain != "py" or not (inspect.isfunction(found) or inspect.isclass(found)):
        return None
    lines, first = inspect.getsourcelines(found)
    path = Path(inspect.getsourcefile(found)).relative_to(REPO)
    return f"{SOURCE}/blob/{BRANCH}/{path}#L{first}-L{first + len(lines) - 1}"


def render_docstring(app, what, name, thing, options, lines):
    """Sphinx's hook for docstrings."""
    lines[:] = docstrings.render(lines, links.near(name))


def sign_class(app, what, name, thing, options, signature, returns):
    """A class's fields; nothing for what the library makes, and for the protocol."""
    if what != "class":
        return None
    if "\nArgs:\n" not in inspect.getdoc(thing):
        return "", None
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(thing).parameters.values()
    ]
    return str(inspect.Signature(bare)), None


def write_pages(app, config):
    """The pages that are made: of the commands, and of the notebooks."""
    commands.write(REPO / "docs" / "commands")
    pages = REPO / "docs" / "notebooks"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    lines = []
    for path in sorted((REPO / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        title = "".join(notebook["cells"][0]["source"]).splitlines()[0].strip("# ")
        lines.append(f"- [{title}]({path.name}), [in Colab]({COLAB}/{path.name})")
        first = next(x for x in notebook["cells"] if x["cell_type"] == "code")
        first["metadata"]["tags"] = ["hide-input"]  # it finds or installs hsrjax
        (pages / path.name).write_text(json.dumps(notebook))
    (pages / "index.md").write_text(_NOTEBOOKS.format(notebooks="\n".join(lines)))


_NOTEBOOKS = """# Notebooks

Shown with the outputs that they were committed with.

{notebooks}

```{{toctree}}
:hidden:
:glob:

*
```
"""


def finish_page(app, page, template, context, doctree):
    """Pictures follow the switch of the theme, and buttons open what can be edited."""
    body = context.get("body", "")
    context["body"] = _PICTURE.sub(
        r'<img class="only-light" \2src="\3"><img class="only-dark" \2src="\1">', body
    )
    folder = page.rpartition("/")[0]
    if folder == "commands" or page == "notebooks/index":
        context["page_source_suffix"] = ""  # made here
    elif folder == "notebooks":
        context["theme_source_directory"] = ""
        context["page_source_suffix"] = ".py"


_PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">'
    r'\s*<img ([^>]*)src="([^"]+)">\s*</picture>'
)


def setup(app):
    """Connects the hooks."""
    app.connect("config-inited", write_pages)
    app.connect("html-page-context", finish_page)
    app.connect("autodoc-process-docstring", render_docstring)
    app.connect("autodoc-process-signature", sign_class)
