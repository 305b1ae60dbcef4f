"""The job notebooks through papermill, as a user runs them; and the recipes."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import miniatures as mini
import pandas as pd
import pytest
import torch
import yaml
from papermill import inspect_notebook
from PIL import Image
from published_layouts import write_layout
from safetensors.torch import save_file

from cg3d.core.config import settings_from
from cg3d.models.clip_backbone import NANO_CONFIG, load_backbone
from cg3d.pretrained.factory import load
from cg3d.training.config import TrainConfig, ZeroShotConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from summary import BenchmarkConfig  # noqa: E402


def papermill(notebook, out, *parameters, cwd=ROOT):
    """Run a job notebook in a process of its own, cg3d importable wherever it starts."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "CG3D_CACHE": str(out / "cache"),
    }
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        str(Path(os.path.relpath(ROOT / "nbs", cwd)) / notebook),
        str(out / notebook),
        *map(str, parameters),
    ]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke recipe, on untrained towers in a folder, so that it tests the job and not the weights."""
    out = tmp_path_factory.mktemp("smoke")
    towers = out / "towers"
    towers.mkdir()
    (towers / "open_clip_config.json").write_text(json.dumps(NANO_CONFIG))
    save_file(load_backbone("nano", "random").clip.state_dict(), towers / "open_clip_model.safetensors")
    done = papermill(
        "train.ipynb", out, "-f", ROOT / "recipes/smoke.yaml", "-p", "clip", towers, "-p", "out", out / "run"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_train_writes_its_run(smoke):
    run = smoke / "run"
    for name in (
        "train.json",
        "config.json",
        "model.safetensors",
        "environment.json",
        "checkpoints",
        "metrics.csv",
        "results.csv",
        "figures/loss.png",
        "figures/confusion.png",
    ):
        assert (run / name).stat().st_size > 0, name
    table = pd.read_csv(run / "results.csv")
    assert {"3D encoder", "majority class", "rendered views, image tower"} <= set(table["method"])
    assert table[["top1", "top5", "mean_class"]].apply(lambda column: column.between(0, 100).all()).all()
    assert json.loads((run / "train.json").read_text())["encoder"] == "pointnet"
    text = (smoke / "train.ipynb").read_text()
    assert "frozen model unchanged" in text


def test_zero_shot_reads_the_run_from_another_folder(smoke):
    out = smoke / "zero"
    done = papermill(
        "zero_shot.ipynb",
        smoke,
        "-p",
        "checkpoint",
        smoke / "run",
        "-p",
        "out",
        out,
        "-p",
        "labels",
        "chair, table, sofa, lamp",
        cwd=ROOT / "nbs",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(out / "results.csv")
    assert (
        list(table["method"])[:3] == ["3D encoder", "majority class", "rendered views, image tower"]
        and (table["classes"] == 4).all()
    )
    assert (
        len(pd.read_csv(out / "predictions.csv")) == table["shapes"][0]
        and (out / "figures/confusion.png").exists()
    )


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("lrr", 3, "unknown parameter lrr"),
        ("epochs", "true", "epochs='true' is a str"),
        ("schedule", "both", "joint, alternate, frozen"),
    ],
)
def test_wrong_parameters_stop_the_job(tmp_path, name, value, words):
    done = papermill("train.ipynb", tmp_path, "-p", name, value)
    assert done.returncode != 0 and words in done.stderr


def test_a_benchmark_writes_its_table_and_picture(tmp_path):
    done = papermill(
        "benchmark.ipynb",
        tmp_path,
        "-p",
        "out",
        tmp_path / "run",
        "-p",
        "parts",
        "points",
        "-p",
        "quick",
        "True",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = pd.read_csv(tmp_path / "run" / "benchmark.csv")
    assert (
        (rows["part"] == "points").all()
        and (rows["ratio"].dropna() > 0).all()
        and rows["ratio"].notna().sum() > 5
    )
    table, grown = (tmp_path / "run" / "benchmark.md").read_text().split("\n\n")
    points = sum(line.split("|")[4].count(": ") for line in grown.splitlines()[2:])
    assert table.count("\n") + 1 - 2 + points == len(rows), (
        "every row is told, alone or as a point of a curve"
    )
    for name in ("speed", "growth"):
        with Image.open(tmp_path / "run" / "figures" / f"{name}.png") as picture:
            assert picture.width > 600 and len(picture.convert("RGB").getcolors(2**24)) > 8, name


@pytest.mark.parametrize(
    "notebook,config", [("train", TrainConfig), ("zero_shot", ZeroShotConfig), ("benchmark", BenchmarkConfig)]
)
def test_parameters_cell_is_the_table_of_settings(notebook, config):
    cells = json.loads((ROOT / f"nbs/{notebook}.ipynb").read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    lines = [
        line for line in "".join(cell["source"]).splitlines() if line.strip() and not line.startswith("#")
    ]
    found = {node.target.id: ast.literal_eval(node.value) for node in ast.parse("\n".join(lines)).body}
    assert found == asdict(config()) and all("  # " in line for line in lines)


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_recipes_are_settings(recipe):
    values = yaml.safe_load((ROOT / "recipes" / recipe).read_text())
    if set(values) <= set(asdict(TrainConfig())):
        settings_from(TrainConfig, values)
    else:
        assert "backbone" in recipe, sorted(set(values) - set(asdict(TrainConfig())))


@pytest.mark.parametrize(
    "recipe,writer,methods",
    [
        (
            "official",
            mini.cg3d,
            {
                "3D encoder",
                "majority class",
                "rendered views, image tower",
                "rendered views, prompted image tower",
            },
        ),
        ("shapenet", mini.ulip, {"3D encoder", "majority class", "rendered views, image tower"}),
    ],
)
def test_published_recipes_run_on_published_layouts(tmp_path, recipe, writer, methods):
    """By parameters only: SLIP's file, the folder, and a size for a short test. Numbers in the file are random, so only the machinery is tested."""
    data, slip = (
        writer(tmp_path / "data"),
        write_layout(tmp_path / "slip_base_100ep.pt", "slip", small_towers=True),
    )
    done = papermill(
        "train.ipynb",
        tmp_path,
        "-f",
        ROOT / f"recipes/{recipe}.yaml",
        "-p",
        "data",
        data,
        "-p",
        "clip",
        slip,
        "-p",
        "epochs",
        2,
        "-p",
        "batch_size",
        4,
        "-p",
        "encoder",
        "point_transformer depth=1 width=96 heads=2",
        "-p",
        "out",
        tmp_path / "run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics, results = pd.read_csv(tmp_path / "run/metrics.csv"), pd.read_csv(tmp_path / "run/results.csv")
    assert metrics["loss"].gt(0).all() and len(metrics) == 2 and set(results["method"]) == methods
    assert (
        results["classes"].eq(55).all() and results["shapes"].eq(4).all()
    )  # asked for the set's own list of classes
    config, model = json.loads((tmp_path / "run/train.json").read_text()), load(tmp_path / "run")
    assert (config["schedule"], config["color"], config["augment"]) == (
        ("alternate", False, "official") if recipe == "official" else ("frozen", False, "sensor")
    )
    assert model.config.visual_prompt == ("deep" if recipe == "official" else None) and model.encode_shape(
        torch.rand(2, 1024, 3)
    ).shape == (2, model.backbone.dim)


@pytest.mark.parametrize("notebook", sorted(path.name for path in (ROOT / "nbs").glob("*.ipynb")))
def test_papermill_reads_every_parameter(notebook, caplog):
    "A comment with an equals sign made papermill warn about an unknown parameter."
    found = inspect_notebook(str(ROOT / "nbs" / notebook))
    assert found and not caplog.records
    assert all(entry["default"] != "(" for entry in found.values()), "a value over several lines is not read"
