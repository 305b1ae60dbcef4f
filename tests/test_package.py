"""The package as a whole: what an import costs, what it offers, how large its files are, and bad input that crosses modules."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

import cg3d
from cg3d.core.config import settings_from
from cg3d.core.paths import data_dir
from cg3d.data.furniture import furniture
from cg3d.evaluation.zero_shot import zero_shot
from cg3d.geometry.ops import MISSING_COLOR
from cg3d.io.shape import Shape, read_shape
from cg3d.models.cg3d import CG3D
from cg3d.models.clip_backbone import load_backbone
from cg3d.training.config import TrainConfig, ZeroShotConfig
from cg3d.training.pretrain import make_model, read_data

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for path in (ROOT / "cg3d").rglob("*.py") if path.name != "_modidx.py")
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
NAMES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
HEAVY = (
    "open_clip",
    "timm",
    "pytorch3d",
    "plotly",
    "matplotlib",
    "accelerate",
    "trimesh",
    "sklearn",
    "papermill",
)


def run(code: str) -> str:
    """Standard output of a fresh interpreter that stands in the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    ).stdout


# ------------------------------------------------------------------ import


def test_import_is_light():
    """`import cg3d` loads nothing but itself, lazy_loader and the standard library."""
    code = (
        "import sys; before = set(sys.modules); import cg3d\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(name for name in new if name not in sys.stdlib_module_names))"
    )
    assert run(code).strip() == "['cg3d', 'lazy_loader']"


def test_help_shows_the_parameters_at_a_prompt(tmp_path):
    """`help()` and Jupyter's `?` read docstrings: at a prompt they get the parameters' comments, in a script not."""
    code = "import cg3d\nhelp(cg3d.load)\nhelp(cg3d.CG3D.encode_shape)\nprint(cg3d.ShapeIndex.search.__doc__)"
    shown = run(code)
    assert shown.count("Parameters") == 3 and "None: that of a given backbone, else CUDA if there" in shown
    script = tmp_path / "script.py"
    script.write_text("import cg3d\nprint(cg3d.load.__doc__)\n")
    quiet = subprocess.run(
        [sys.executable, script], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert "Open a trained model" in quiet and "Parameters" not in quiet


def test_no_module_imports_what_it_does_not_need():
    names = [name for name in NAMES if "encoders." not in name]
    assert (
        run(
            f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
        ).strip()
        == "[]"
    )


def test_the_shipped_model_answers_without_the_libraries_it_was_made_with():
    code = (
        "import sys, cg3d\nfrom cg3d.data.furniture import furniture\nmodel = cg3d.load('nano')\nassert len(model.classify(furniture()[0], ['chair', 'lamp'])) == 2\n"
        "print(sorted({'open_clip', 'timm', 'torchvision', 'huggingface_hub', 'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    assert run(code).strip() == "[]"


def test_public_names_are_reachable():
    expected = {
        "create_model",
        "list_models",
        "load",
        "read_shape",
        "Shape",
        "CG3D",
        "create_encoder",
        "furniture",
    }
    assert expected <= set(cg3d.__all__) <= set(dir(cg3d))
    packages = {path.parent.name for path in Path(cg3d.__file__).parent.glob("*/__init__.py")}
    assert packages - {"data"} <= set(dir(cg3d)) and "data" in cg3d.__all__
    assert cg3d.read_shape is read_shape and cg3d.create_model.__module__ == "cg3d.pretrained.factory"
    with pytest.raises(AttributeError, match="attribute 'laod'|attribute laod"):
        getattr(cg3d, "laod")  # noqa: B009


def test_public_names_are_found_without_other_imports():
    """Each in a process in which nothing else was imported before."""
    code = "import cg3d; print([name for name in cg3d.__all__ if getattr(cg3d, name, None) is None])"
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_modules_keep_their_promises(name):
    module = importlib.import_module(name)
    assert module.__doc__ or name in ("cg3d", "cg3d.encoders", "cg3d.readers"), "a module says what it is"
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), f"{name}.__all__ promises {public}"


# ------------------------------------------------------------------ size and form


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small_and_without_errors(path):
    assert path.stat().st_size <= 200 * 1024, f"{path.stat().st_size / 1024:.0f} KB"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    first = next(
        text for text in cells if not text.startswith("---")
    )  # job notebooks begin with nbdev's front matter
    assert first.startswith("# ") and "\n> " in first, (
        "a notebook opens with a title and one line on what it is"
    )
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [
        output
        for output in outputs
        if "application/vnd.plotly.v1+json" in output.get("data", {}) and "text/html" in output["data"]
    ], "plotly.js is stored in it"


def test_what_is_shipped_is_small():
    size = {
        folder: sum(path.stat().st_size for path in (data_dir() / folder).rglob("*") if path.is_file()) / 1e6
        for folder in ("nano", "nano-3d")
    }
    assert 0 < size["nano"] <= 30 and 0 < size["nano-3d"] <= 15, size
    assert (data_dir() / "furniture.npz").stat().st_size < 12e6


# ------------------------------------------------------------------ bad input that crosses modules


@pytest.fixture(scope="module")
def model() -> CG3D:
    torch.manual_seed(0)
    return CG3D.build(
        backbone=load_backbone("nano", "random"),
        encoder="point_transformer_small",
        points=256,
        clip_weights="random",
        encoder_cfg=dict(depth=1),
    ).eval()


@pytest.fixture(scope="module")
def lamp() -> trimesh.Trimesh:
    """A foot, a pole and a shade, y up, with nothing symmetrical between up and down."""
    parts = [
        trimesh.creation.box(size, trimesh.transformations.translation_matrix((0, y, 0)))
        for size, y in (((0.3, 0.04, 0.3), 0.02), ((0.04, 1.2, 0.04), 0.6), ((0.5, 0.3, 0.5), 1.3))
    ]
    return trimesh.util.concatenate(parts)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda: read_data("furnitur"), FileNotFoundError, "furnitur"),
        (lambda: cg3d.load("nanoo"), FileNotFoundError, "no model 'nanoo'.*nano"),
        (
            lambda: make_model(TrainConfig(encoder="pointnett", clip_weights="random")),
            ValueError,
            "no encoder 'pointnett'; there are .*pointnet",
        ),
        (
            lambda: make_model(TrainConfig(encoder="pointnet depht=2", clip_weights="random")),
            ValueError,
            "no setting 'depht'",
        ),
        (lambda: make_model(TrainConfig(clip="ViT-B-32")), ValueError, "needs weights.*openai"),
        (
            lambda: make_model(TrainConfig(clip="ViT-B-32", clip_weights="opanai")),
            ValueError,
            "'opanai' is neither a file nor a tag",
        ),
        (
            lambda: make_model(TrainConfig(clip="ViT-B-23", clip_weights="openai")),
            ValueError,
            "unknown backbone 'ViT-B-23'.*ViT-B-32",
        ),
        (lambda: settings_from(TrainConfig, {"visual_prompt": "deeep"}), ValueError, "'deeep'.*deep"),
        (
            lambda: settings_from(ZeroShotConfig, {"chekpoint": "nano"}),
            ValueError,
            "chekpoint; known are checkpoint",
        ),
        (lambda: settings_from(ZeroShotConfig, {"views": "three"}), TypeError, "views='three' is a str"),
        (lambda: furniture().select(split="tset"), ValueError, "'tset'.*test"),
    ],
    ids=[
        "dataset",
        "published name",
        "encoder",
        "encoder setting",
        "no weights",
        "weights tag",
        "backbone",
        "prompt",
        "parameter",
        "type",
        "split",
    ],
)
def test_unknown_names_are_refused_and_the_known_ones_named(call, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        call()


def test_labels_that_leave_nothing_to_choose(model):
    some = furniture().select(split="test")
    for labels, words in (
        ([], "at least two labels|no shape has one of the 0 labels"),
        (["chair"], "at least two labels"),
        (["unicorn", "dragon"], "no shape has one of.*unicorn"),
    ):
        with pytest.raises(ValueError, match=words):
            zero_shot(model, some, labels)
    with pytest.raises(ValueError, match="no column 'color'.*category"):
        zero_shot(model, some, column="color")


def test_a_z_up_file_is_the_same_shape_once_that_is_said(model, lamp, tmp_path):
    lamp.export(tmp_path / "y.ply")
    lamp.copy().apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, (1, 0, 0))).export(
        tmp_path / "z.ply"
    )
    y, z, wrong = (
        read_shape(tmp_path / "y.ply"),
        read_shape(tmp_path / "z.ply", up="z"),
        read_shape(tmp_path / "z.ply"),
    )
    np.testing.assert_allclose(z.points, y.points, atol=1e-5)
    assert np.ptp(wrong.points, axis=0).argmax() == 2 and np.ptp(y.points, axis=0).argmax() == 1
    same, other = ((model.encode_shape(y) - model.encode_shape(shape)).norm().item() for shape in (z, wrong))
    assert same < 1e-3 < other and other > 20 * same, (same, other)
    with pytest.raises(ValueError, match="up='x'"):
        read_shape(tmp_path / "y.ply", up="x")


def test_a_cloud_without_color_is_gray(model, lamp, tmp_path):
    trimesh.PointCloud(lamp.sample(500, seed=0)).export(tmp_path / "bare.xyz")
    shape = read_shape(tmp_path / "bare.xyz")
    assert shape.colors is None and (shape.cloud()[:, 3:] == MISSING_COLOR).all()
    xyz = shape.cloud()[None, :, :3]
    gray = torch.cat([xyz, torch.full_like(xyz, MISSING_COLOR)], -1)
    torch.testing.assert_close(model.encode_shape(xyz), model.encode_shape(gray))
    torch.testing.assert_close(model.encode_shape(shape), model.encode_shape(gray))


def test_fewer_points_than_groups_are_repeated_by_embed_and_refused_by_the_bare_encoder(model):
    few = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0)).abs().clamp(max=1)
    found = model.encode_shape(few)
    assert (
        found.shape == (2, model.config.dim)
        and found.isfinite().all()
        and torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-5)
    )
    with pytest.raises(ValueError, match=f"at least {model.encoder.min_points} points, got 20"):
        model.encoder(few)
    two = Shape([[0, 0, 0], [0, 1, 0]], name="two points")
    assert model.encode_shape(two).isfinite().all()
