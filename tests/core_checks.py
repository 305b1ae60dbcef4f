"""The core of the package in one process: `python tests/core_checks.py [--without MODULE ...]`.

Every module is imported, views are rendered, `nano` classifies bundled shapes, an encoder is trained on point views and
evaluated, and the trained run is loaded again. Modules named after `--without` cannot be imported meanwhile. The last
line of the output is a JSON object of what was found. `tests/matrix.py` runs it in environments of their own where
optional packages are not installed."""

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent


WIDGETS = {"cg3d.viz.upload", "cg3d.viz.widgets"}  # need the extra `notebooks`, and say so


def import_everything() -> int:
    "Import every module; returns how many."
    import cg3d
    from cg3d.core.errors import MissingPackage

    folder = Path(cg3d.__file__).parent
    paths = sorted(path for path in folder.rglob("*.py") if path.name not in ("_modidx.py", "__init__.py"))
    count = 0
    for path in paths:
        name = ".".join(("cg3d", *path.relative_to(folder).with_suffix("").parts))
        try:
            importlib.import_module(name)
            count += 1
        except MissingPackage:
            assert name in WIDGETS, name
    return count


def render() -> float:
    "Mean brightness of twelve views of bundled shapes."
    from cg3d.data.furniture import furniture
    from cg3d.render.cameras import ring_views
    from cg3d.render.points import render_points

    views = render_points(furniture().points([0, 100, 200]), *ring_views(4))
    assert views.shape == (3, 4, 3, 128, 128) and views.isfinite().all()
    return round(views.mean().item(), 4)


def classify() -> float:
    "Share of eight bundled chairs and lamps that `nano` tells apart."
    import cg3d
    from cg3d.data.furniture import furniture

    model, shapes = cg3d.load("nano", device="cpu"), furniture()
    right = []
    for label in ("chair", "lamp"):
        rows = [row for row, shape in enumerate(shapes.table["name"]) if shape.split()[-1] == label][:4]
        right += [model.classify(shapes[row], ["chair", "lamp"])["label"].iloc[0] == label for row in rows]
    assert len(right) == 8
    return sum(right) / len(right)


def train(folder: Path) -> list[float]:
    "Losses of an epoch of each schedule, from point views; the run is evaluated and loaded again."
    import pandas as pd

    import cg3d
    from cg3d.train import pretrain
    from cg3d.training.config import TrainConfig

    losses = []
    for schedule in ("frozen", "joint", "alternate"):
        config = TrainConfig(
            limit=8,
            points=256,
            views=1,
            view_size=64,
            encoder="pointnet",
            epochs=1,
            batch_size=4,
            min_shapes=8,
            schedule=schedule,
            **(dict(visual_prompt="none", text_prompt="none") if schedule == "frozen" else {}),
            device="cpu",
            out=schedule,
        )
        table = pretrain(config, folder / schedule, progress=False)
        assert len(table) and (folder / schedule / "results.csv").is_file()
        losses.append(round(float(pd.read_csv(folder / schedule / "metrics.csv")["loss"].iloc[-1]), 3))
    model = cg3d.load(folder / "joint", device="cpu")
    assert abs(model.encode_text("a chair").norm().item() - 1) < 1e-5
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without", nargs="*", default=[], help="modules that cannot be imported")
    blocked = parser.parse_args().without
    for name in blocked:
        sys.modules[name] = None  # an import of it raises ModuleNotFoundError
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    facts, start = {"python": platform.python_version()}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CG3D_CACHE"] = str(Path(folder, "cache"))
        facts["modules"] = import_everything()
        facts["brightness"] = render()
        facts["classified"] = classify()
        facts["losses"] = train(Path(folder))
    import torch

    optional = ("pytorch3d", "torchvision", "timm", "accelerate")
    facts["torch"], facts["cuda build"] = torch.__version__, torch.version.cuda
    facts["absent"] = [name for name in optional if name in blocked or find_spec(name) is None]
    facts["seconds"] = round(time.perf_counter() - start)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
