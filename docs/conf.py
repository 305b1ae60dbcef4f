"""Sphinx configuration; `docs/build.py` copies it beside the collected pages."""

import shutil
from pathlib import Path

project = "cg3d"
author = "The cg3d authors"
copyright = "2026, The cg3d authors"
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "cg3d"
html_static_path = ["_static"]
html_css_files = ["site.css"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["**/.ipynb_checkpoints"]
suppress_warnings = [
    "myst.header",  # notebooks of jobs begin with front matter, component notebooks may skip a heading level
    "mystnb.unknown_mime_type",  # widget state and Plotly JSON; Plotly is drawn by the hook below
    "misc.highlighting_failure",
]


def copy_plotly(app, exception) -> None:
    "Put the plotly.js of the installed package beside the pages, so that figures need no network."
    if exception is None and app.builder.name == "html":
        import plotly

        script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
        shutil.copy(script, Path(app.outdir) / "_static" / "plotly.min.js")


def setup(app) -> None:
    app.connect("build-finished", copy_plotly)
