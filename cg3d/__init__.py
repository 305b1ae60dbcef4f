"""Language-grounded 3D recognition: CG3D ("CLIP goes 3D", arXiv 2303.11313) and the tools around it."""

__version__ = "0.1.0"

import lazy_loader

# `import cg3d` is quick: names and packages are imported at their first use. They are listed in __init__.pyi,
# where editors and type checkers read them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
