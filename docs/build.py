"""Build the documentation site offline: Markdown of `docs/`, the notebooks as committed, and an API reference.

`python docs/build.py [OUT]` (or `make docs`) writes HTML to `_docs/site`. The API pages are generated from the
docments (one comment a parameter) of the exported modules.
"""

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

from fastcore.docments import docments, docstring

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "core geometry io render models pretrained data training evaluation search scenes viz cli"
).split()
GUIDES = (
    "shell",
    "jobs",
    "formats",
    "published",
    "architecture",
    "benchmarks",
    "results",
    "robustness",
    "related",
    "glossary",
)
JOBS = ("train", "zero_shot", "retrieval", "scene_query", "finetune", "backbone", "benchmark")


def table_cell(text: object) -> str:
    "Text for a Markdown table cell."
    return " ".join(str(text).split()).replace("|", "\\|")


def annotation_text(annotation: object) -> str:
    "A type as a reader would write it."
    if annotation in (inspect.Parameter.empty, None):
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("typing.", "").replace("collections.abc.", "").replace("pathlib.", "")


def parameter_table(function: object) -> list[str]:
    "Markdown rows of a function's parameters and result, from its docments."
    try:
        documented = docments(function, full=True)
    except (TypeError, ValueError, OSError, AttributeError):
        return []
    rows = []
    for name, item in documented.items():
        if name == "self":
            continue
        default = "" if item.default is inspect.Parameter.empty else f"`{table_cell(repr(item.default))}`"
        kind = annotation_text(item.anno)
        label = "returns" if name == "return" else f"`{name}`"
        comment = table_cell(item.docment or "")
        if name != "return" or kind or comment:
            rows.append(
                f"| {label} | {f'`{table_cell(kind)}`' if kind else ''} | {'' if name == 'return' else default} | {comment} |"
            )
    return ["| parameter | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []


def describe(name: str, item: object, level: int) -> list[str]:
    "Heading, docstring and parameter table of a function or class, with its public methods."
    lines = [f"{'#' * level} `{name}`", "", docstring(item) or "", ""]
    if inspect.isclass(item):
        if "__init__" in vars(item):
            lines += parameter_table(item.__init__)
        elif hasattr(item, "__dataclass_fields__"):
            lines += parameter_table(item)
        for method_name, method in vars(item).items():
            function = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
            if inspect.isfunction(function) and not method_name.startswith("_"):
                lines += describe(f"{name}.{method_name}", function, level + 1)
    else:
        lines += parameter_table(item)
    return lines


def api_page(module_name: str) -> str | None:
    "Markdown of a module's public functions and classes; None when it has none."
    module = importlib.import_module(module_name)
    names = [name for name in getattr(module, "__all__", ()) if not name.isupper()]
    items = [(name, getattr(module, name)) for name in names]
    items = [(name, item) for name, item in items if inspect.isclass(item) or inspect.isfunction(item)]
    if not items:
        return None
    lines = [f"# {module_name}", "", (module.__doc__ or "").strip(), ""]
    for name, item in items:
        lines += describe(name, item, 2)
    return "\n".join(lines) + "\n"


def toctree(caption: str, entries: list[str], depth: int = 1) -> str:
    "A Sphinx table of contents in MyST."
    body = "\n".join(entries)
    return f"```{{toctree}}\n:caption: {caption}\n:maxdepth: {depth}\n\n{body}\n```\n"


def write_api(source: Path) -> list[str]:
    "Write one page a module and one index a package; returns the entries of the table of contents."
    entries = []
    for package in PACKAGES:
        pages = []
        for path in sorted((ROOT / "cg3d" / package).glob("[a-z]*.py")):
            page = api_page(f"cg3d.{package}.{path.stem}")
            if page:
                target = source / "api" / package / f"{path.stem}.md"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(page, encoding="utf-8")
                pages.append(path.stem)
        if pages:
            text = f"# cg3d.{package}\n\n" + toctree("modules", [f"{package}/{page}" for page in pages])
            (source / "api" / f"{package}.md").write_text(text, encoding="utf-8")
            entries.append(f"api/{package}")
    return entries


PLOTLY = "application/vnd.plotly.v1+json"


def draw_plotly(path: Path, source: Path) -> None:
    "Replace Plotly's JSON in the outputs of a notebook by HTML that draws it with the plotly.js beside the pages."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    count = 0
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            figure = output.get("data", {}).get(PLOTLY)
            if figure is None:
                continue
            name = f"plotly-{count}"
            static = "../" * (len(path.relative_to(source).parts) - 1) + "_static/plotly.min.js"
            script = f'<script src="{static}"></script>' if count == 0 else ""
            data = json.dumps([figure["data"], figure.get("layout", {})]).replace("</", "<\\/")
            output["data"] = {
                "text/html": f'{script}<div id="{name}"></div>'
                f'<script>Plotly.newPlot("{name}", ...{data}, {{responsive: true}});</script>'
            }
            count += 1
    if count:
        path.write_text(json.dumps(notebook), encoding="utf-8")


def write_sources(source: Path) -> None:
    "Copy pages and notebooks, keeping their relative links, and write the front page."
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copytree(
        ROOT / "nbs", source / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*.yml")
    )
    shutil.copytree(ROOT / "docs", source / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copytree(ROOT / "docs" / "_static", source / "_static", dirs_exist_ok=True)
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    for path in (source / "nbs").rglob("*.ipynb"):
        draw_plotly(path, source)
    (source / "data").mkdir()
    shutil.copy(ROOT / "data" / "ATTRIBUTION.md", source / "data")
    shutil.copy(ROOT / "LICENSE", source)
    components = [
        f"nbs/{package}/{path.stem}"
        for package in PACKAGES
        for path in sorted((ROOT / "nbs" / package).glob("[0-9]*.ipynb"))
    ]
    guides = [f"docs/{name}" for name in GUIDES if (ROOT / "docs" / f"{name}.md").is_file()]
    tutorials = [
        f"nbs/tutorials/{path.stem}" for path in sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
    ]
    project = [
        name for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG") if (source / f"{name}.md").is_file()
    ]
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    front += "\n" + toctree("Tutorials", tutorials)
    front += toctree("Guides and results", guides)
    front += toctree("Jobs, as executed", [f"nbs/{job}" for job in JOBS])
    front += toctree("API reference", write_api(source), depth=2)
    front += toctree("Component notebooks", components)
    front += toctree("Project", [*project, "data/ATTRIBUTION"])
    (source / "index.md").write_text(front, encoding="utf-8")
    (source / "README.md").unlink()
    shutil.copy(ROOT / "docs" / "conf.py", source / "conf.py")


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs" / "site").resolve()
    source = out.parent / "source"
    write_sources(source)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-j",
        "2",
        "-b",
        "html",
        str(source),
        str(out),
    ]
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
