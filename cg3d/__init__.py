"""Language-grounded 3D recognition: CG3D ("CLIP goes 3D", arXiv 2303.11313) and the tools around it."""

__version__ = "0.1.0"

import os

import lazy_loader

# Threads that wait must sleep: by default they spin, and on a busy machine a query takes many times as long
# (docs/robustness.md). OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# `import cg3d` is quick: names and packages are imported at their first use. They are listed in __init__.pyi,
# where editors and type checkers read them.
_imported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str):
    value = _imported(name)
    if callable(value):
        from cg3d.core.help import document_name, is_interactive

        if is_interactive():
            document_name(value)
    return value
