"""Packaging for cg3d: everything is read from settings.ini, the one configuration."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {
    name: cfg[f"{name}_requirements"].split()
    for name in ("render", "notebooks", "search", "lance", "scale", "track", "data", "formats", "umap")
}
viewers = {name: cfg[f"{name}_requirements"].split() for name in ("view", "atlas")}  # large; not in "all"
inside = {"cg3d._data": "data", "cg3d.nbs": "nbs", "cg3d.recipes": "recipes"}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=f">={cfg['min_python']},<3.14",
    install_requires=cfg["requirements"].split(),
    extras_require={
        **extras,
        **viewers,
        "all": sorted({need for needs in extras.values() for need in needs}),
        "dev": cfg["dev_requirements"].split(),
    },
    # `data/`, the job notebooks, and the recipes lie at the top of the repository; in an installed wheel they are packages inside of `cg3d`.
    packages=[*find_packages(include=["cg3d", "cg3d.*"]), *inside],
    package_dir=inside,
    package_data={
        "cg3d._data": ["*", "*/*"],
        "cg3d.nbs": ["[a-z]*.ipynb", "tutorials/*.ipynb"],
        "cg3d.recipes": ["*.yaml"],
        "cg3d": ["py.typed", "*.pyi"],
    },
    zip_safe=False,
    entry_points={
        "console_scripts": ["cg3d=cg3d.cli.app:main"],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
