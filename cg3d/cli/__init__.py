"""The command cg3d and its jobs."""

import pkgutil

import lazy_loader

# Modules of this package are imported when they are first used: cg3d.cli.NAME works after `import cg3d`.
_modules = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, _modules)
