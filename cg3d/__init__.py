__version__ = "0.1.0"

# `import cg3d` costs nothing: names and modules are looked up at their first use (PEP 562).
_HOME = {
    "load": "model", "CG3D": "model", "CG3DConfig": "model", "classify": "model",
    "load_backbone": "backbone", "Backbone": "backbone", "Prompts": "prompts",
    "Cg3dError": "errors",
    "Shape": "shapes", "read_shape": "shapes", "Collection": "shapes", "read_collection": "shapes", "write_collection": "shapes",
    "load_published": "published", "read_dataset": "datasets", "check_data": "datasets", "ShapeIndex": "index",
    "read_scene": "scans", "compose_room": "rooms", "query_scene": "scenes", "ask_scene": "scenes",
    "create_encoder": "encoders.registry", "list_encoders": "encoders.registry",
}
_MODULES = {
    "errors", "guard", "timing", "processes", "parts", "points", "pictures", "shards", "streams", "pack", "many", "speed", "files", "unpickle", "shapes", "datasets", "readers", "furniture", "render", "triplets", "train", "encoders", "folders", "checkpoint", "nanoclip", "backbone", "slip",
    "prompts", "contracts", "model", "towers", "nano", "published", "layouts", "losses", "metrics", "bulk", "callbacks", "canvas", "cli", "config",
    "describe", "evaluate", "fetch", "filters", "finetune", "index", "inspector", "jobs", "learner", "plots", "probe", "queries", "retrieval",
    "rooms", "runjob", "scans", "scene_scores", "scenes", "segments", "share", "shell", "starts", "stills", "study", "vectors", "widgets", "zeroshot"}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    from importlib import import_module
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
