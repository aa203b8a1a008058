"""Everything the browser loads comes from the site itself: no page asks another host for anything.

The scripts are npm packages (``package.json``; ``npm ci`` fetches them) and are copied beside the theme's own files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError

SCRIPTS = (
    "mathjax/es5/tex-svg-full.js",  # one file with its fonts: also works from file://
    "requirejs/require.js",
    "@jupyter-widgets/html-manager/dist/embed-amd.js",
)

# The widget manager typesets through MathJax 2's queue; MathJax 3 has none.
MATHJAX_2_QUEUE = """
window.MathJax = Object.assign(window.MathJax || {}, {
  Hub: {Queue: (call) => window.MathJax.typesetPromise?.([call[2]])},
});
"""

# The Play widget changes the class of its icon's <i>, which Font Awesome would otherwise have replaced.
NESTED_ICONS = "window.FontAwesomeConfig = {autoReplaceSvg: 'nest'};"


def node_modules(start: Path) -> Path:
    """Find the packages as node does: in the nearest ``node_modules``, upwards from ``start``."""
    for folder in (start, *start.parents):
        if (folder / "node_modules").is_dir():
            return folder / "node_modules"
    raise ExtensionError("no node_modules beside or above the book: run `npm ci` (or `make html`) in the repository")


def use_local_scripts(app: Sphinx, config: Config) -> None:
    """Point MathJax and the widgets at the site's copies."""
    drop_thebe(app)
    packages = node_modules(Path(app.srcdir))
    # Single files, not a folder called _static: of that one Jupyter Book loads every script on every page.
    config.html_static_path = [*config.html_static_path, *(str(packages / script) for script in SCRIPTS)]
    config.html_static_path.append(str(Path(__file__).with_name("book.css")))
    config.mathjax_path = "tex-svg-full.js"
    config.nb_ipywidgets_js = {"require.js": {}, "embed-amd.js": {}}


def drop_thebe(app: Sphinx) -> None:
    """Switch off the extension that would start kernels on a public server: its script names another host.

    Jupyter Book loads it in every book and has no option against it.
    """
    for listeners in app.events.listeners.values():
        listeners[:] = [listener for listener in listeners if listener.handler.__module__ != "sphinx_thebe"]
    app.registry.css_files = [(name, attributes) for name, attributes in app.registry.css_files if "thebe" not in name]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("config-inited", use_local_scripts)
    app.add_js_file(None, body=NESTED_ICONS, priority=100)
    app.add_js_file(None, body=MATHJAX_2_QUEUE, priority=100)
    app.add_css_file("book.css", priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
