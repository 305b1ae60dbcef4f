"""Results as files (`ask`, `classify`, `search`, `duplicates` with -o), and what newcomers stumbled over."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import trimesh
from typer.testing import CliRunner

import cg3d
import cg3d.cli.jobs
from cg3d.cli import collection_commands, shape_commands
from cg3d.cli.app import app
from cg3d.cli.console import exit_code
from cg3d.cli.jobs import JobError, job_values, run_job
from cg3d.cli.options import check_model
from cg3d.cli.start import copy_tutorials, sample_chair
from cg3d.core.errors import InputError, MissingFile, PathTaken
from cg3d.data.shards import read_shards
from cg3d.io.scene import read_scene
from cg3d.io.write import Cloud, check_form, write_result
from cg3d.scenes.answers import ask_scene, part_files
from cg3d.scenes.synthetic_rooms import RoomSettings, compose_room
from cg3d.search.batch_embed import open_source
from cg3d.search.embeddings import read_embeddings
from cg3d.search.index import ShapeIndex
from cg3d.search.words import WordIndex, hybrid_search
from cg3d.training.callbacks import environment
from cg3d.training.config import TrainConfig, encoder_choice, start_run

ROOT = Path(__file__).parent.parent


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(done, words):
    assert done.exit_code == 2 and words in done.stderr and "Traceback" not in done.output, done.output


@pytest.fixture(scope="module")
def model():
    return cg3d.load("nano")


@pytest.fixture(autouse=True)
def loaded_once(model, monkeypatch):
    for commands in (collection_commands, shape_commands):
        monkeypatch.setattr(commands, "load_model", lambda *names: model)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A room in millimeters, z up, in a file that states neither."""
    room = compose_room(2, settings=RoomSettings(floor_objects=4, small_objects=1, spacing=0.05))
    path = tmp_path_factory.mktemp("scan") / "scan.ply"
    points = 1000 * room.points[:, [0, 2, 1]] * [1, -1, 1]
    return write_result(path, cloud=lambda: Cloud(points, room.colors))


@pytest.fixture
def lying(tmp_path):
    """Two chairs that lie on their backs, and a list that states that z is up."""
    folder = tmp_path / "cad"
    folder.mkdir()
    chair = sample_chair()
    chair.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, (1, 0, 0)))
    for name in "ab":
        chair.export(folder / f"{name}.ply")
    rows = (
        "file,name,up,split,category,caption\na.ply,one,z,train,chair,a red seat\nb.ply,two,z,test,chair,\n"
    )
    (folder / "list.csv").write_text(rows)
    return folder


# ------------------------------------------------------------------ ask


def test_ask_writes_every_form(scan, tmp_path):
    files = [tmp_path / f"a.{suffix}" for suffix in ("ply", "glb", "csv", "json", "png")]
    outputs = [word for file in files for word in ("-o", file)]
    done = call("ask", scan, "something to sit on", "a box", *outputs, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["up"] == {"axis": "z", "how": "found"} and told["unit"] == {"name": "mm", "how": "found"}
    assert 2 < max(told["extent"]) < 8, "meters"
    assert [query["query"] for query in told["queries"]] == ["something to sit on", "a box"]
    before, after = trimesh.load(scan), trimesh.load(files[0])
    np.testing.assert_allclose(after.vertices, before.vertices, atol=1)  # the same file frame, millimeters
    assert (after.colors != before.colors).any()
    table = pd.read_csv(files[2])
    parts = [part for query in told["queries"] for part in query["parts"]]
    assert table["points"].tolist() == [part["points"] for part in parts]
    assert json.loads(files[3].read_text())["queries"] == told["queries"]
    boxes = trimesh.load(files[1])
    low, high = boxes.geometry["box of something to sit on 1"].bounds
    best = parts[0]
    np.testing.assert_allclose(high - low, [best["width"], best["height"], best["depth"]], rtol=0.1)
    refused(call("ask", scan, "a box", "-o", files[0]), "--overwrite")


def test_ask_splits_into_parts(scan, model, tmp_path):
    answer = ask_scene(read_scene(scan), ["a box"], model, progress=False)
    files = answer.write(tmp_path / "part.ply", split=True)
    assert files == part_files(tmp_path / "part.ply", answer.parts) and files[0].name == "part-1-a-box-1.ply"
    assert len(trimesh.load(files[0]).vertices) == answer.parts["points"].iloc[0]
    with pytest.raises(InputError, match=r"\.ply \.glb"):
        answer.write(tmp_path / "part.csv", split=True)


def test_ask_works_for_a_shape_and_says_that_it_is_one_part(tmp_path):
    sample_chair().export(tmp_path / "chair.glb")
    done = call("ask", tmp_path / "chair.glb", "a chair", "--json")
    told = json.loads(done.stdout)
    assert told["up"]["how"] == "stated" and told["unit"] == {"name": "m", "how": "stated"}
    assert any("whole file" in note for note in told["notes"])


@pytest.mark.parametrize(
    "words,message",
    [
        (("gone.ply", "a box"), "no such file"),
        (("", "a box"), "a path is empty"),
        (("{scan}", "a box", "a box"), "given twice"),
        (("{scan}", "a box", "-o", "x.step"), "written as .ply .glb .csv"),
        (("{scan}", "a box", "--threshold", "0"), "must be above 0"),
        (("{scan}", "a box", "--up", "w"), "is not one of"),
    ],
)
def test_what_ask_refuses(scan, words, message):
    refused(call("ask", *(word.format(scan=scan) for word in words)), message)


def test_the_frame_of_a_file_is_kept_whatever_unit_it_states(tmp_path):
    points = np.random.default_rng(0).random((500, 3)) * [4, 3, 2.5]
    for factor, unit in ((1, "m"), (100, "cm"), (1000, "mm")):
        scene = cg3d.io.scene.Scene(points * factor, up="z", unit=unit)
        np.testing.assert_allclose(scene.file_points(), points * factor, rtol=1e-5)
        assert scene.file_unit == unit and scene.sources == {"up": "given", "unit": "given"}


# ------------------------------------------------------------------ tables, pictures, pages


def test_classify_and_search_write_results(lying, tmp_path):
    outputs = [word for suffix in ("csv", "json", "png", "html") for word in ("-o", tmp_path / f"c.{suffix}")]
    done = call("classify", lying, "-l", "chair, table", *outputs)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "c.csv")
    assert table.groupby("shape")["label"].first().tolist() == ["chair", "chair"]
    page = (tmp_path / "c.html").read_text()
    assert page.count("data:image/png") == 2 and "<script" not in page and "http://" not in page
    assert call("embed", lying, "-o", tmp_path / "e.npz").exit_code == 0
    assert call("index", tmp_path / "e.npz", "-o", tmp_path / "lib.idx").exit_code == 0
    done = call(
        "search", tmp_path / "lib.idx", "a chair", "a lamp", "-o", tmp_path / "s.html", "--facet", "split"
    )
    assert done.exit_code == 0 and "train" in done.stdout, done.output
    assert (tmp_path / "s.html").read_text().count("data:image/png") == 4
    refused(call("search", tmp_path / "lib.idx", "a chair", "-o", "s.ply"), "written as .csv .json .png")
    refused(call("search", tmp_path / "e.npz", "a chair"), "cg3d index")


def test_words_find_names_that_vectors_do_not(model):
    texts = ["Body1", "bracket_M6", "bracket_M8", "lamp", "chair"]
    index = ShapeIndex.from_items(model, texts)
    words = WordIndex(index.table)
    for way in ("words", "both"):
        found = hybrid_search(index, words, "M6 bracket", 2, way=way)
        assert found["name"].iloc[0] == "bracket_M6"
    only = hybrid_search(index, words, "bracket", 5, where="name != 'bracket_M6'")
    assert "bracket_M6" not in set(only["name"])
    with pytest.raises(InputError, match="did you mean 'words'"):
        hybrid_search(index, words, "x", way="wordz")


def test_duplicates_are_grouped_and_nothing_is_deleted(tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()
    chair = sample_chair()
    chair.export(folder / "chair.ply")
    chair.apply_scale(1000).export(folder / "chair in mm.ply")
    trimesh.creation.icosphere(3).export(folder / "ball.ply")
    red = sample_chair()
    red.visual.face_colors = (220, 20, 20, 255)
    red.export(folder / "red chair.ply")
    done = call("duplicates", folder, "-o", tmp_path / "d.html", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    kinds = {row["name"]: row["kind"] for row in told["members"]}
    assert told["groups"] == 1 and set(kinds) == {"chair", "chair in mm", "red chair"}
    assert kinds["red chair"] in ("recolored", "first") and "same" in kinds.values()
    assert len(list(folder.iterdir())) == 4 and "Group 1: 3 shapes" in (tmp_path / "d.html").read_text()


# ------------------------------------------------------------------ folders with a list


def test_the_list_of_a_folder_counts_for_embed_classify_and_pack(lying, tmp_path, model):
    upright = model.encode_shape(cg3d.read_shape(lying / "a.ply", up="z"))[0].numpy()
    assert call("embed", lying, "-o", tmp_path / "e.npz").exit_code == 0
    embedded = read_embeddings(tmp_path / "e.npz")
    assert min(embedded.matrix @ upright) > 0.99 and embedded.table["split"].tolist() == ["train", "test"]
    lying_down = model.encode_shape(cg3d.read_shape(lying / "a.ply"))[0].numpy()
    assert lying_down @ upright < 0.9, "the list matters"
    assert call("pack", lying, "-o", tmp_path / "shards").exit_code == 0
    packed = read_shards(tmp_path / "shards")
    extent = np.ptp(packed[0].points, axis=0)
    assert extent[1] > 1.5 * extent[0] and packed[0].caption == "a red seat"
    found = json.loads(call("classify", lying, "-l", "chair, table, bed", "--json").stdout)
    assert all(shape["labels"][0]["label"] == "chair" for shape in found["shapes"])


def test_a_list_that_cannot_be_read_is_mentioned(lying, tmp_path):
    (lying / "list.csv").write_text("part,score\n1,2\n")
    assert "list.csv: not read" in open_source(lying).notes[0]
    (lying / "list.csv").write_text("file,name\na.ply,one\n")
    assert "1 files have no row" in open_source(lying).notes[0]
    (lying / "list.csv").write_text("file,name,up\na.ply,one,w\n")
    with pytest.raises(InputError, match="up='w'"):
        open_source(lying)
    with pytest.raises(InputError, match="empty"):
        open_source("")


# ------------------------------------------------------------------ first minutes


def test_labels(tmp_path, model):
    sample_chair().export(tmp_path / "chair.glb")
    refused(
        call("classify", tmp_path / "chair.glb", "-l", "labels.txt"), "labels.txt: no such file of labels"
    )
    (tmp_path / "l.txt").write_text("chair\n\ntable\n")
    refused(call("classify", tmp_path / "chair.glb", "-l", tmp_path / "l.txt"), "l.txt: line 2 is blank")
    done = call("classify", tmp_path / "chair.glb", "-l", "chiar, tabel")
    assert "did you mean 'chair'" in done.stderr and "did you mean 'table'" in done.stderr
    assert "one label" in call("classify", tmp_path / "chair.glb", "-l", "chair").stderr
    default = json.loads(call("classify", tmp_path / "chair.glb", "--json").stdout)
    assert default["shapes"][0]["labels"][0]["label"] == "chair"
    refused(call("classify", "", "-l", "chair, table"), "a path is empty")


@pytest.mark.parametrize(
    "words",
    [
        ("classify", "gone.glb"),
        ("classify", "README.md"),
        ("embed", "gone", "-o", "e.npz"),
        ("embed", "gone", "-o", "e.csv"),
    ],
)
def test_cheap_checks_come_before_torch(words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cg3d.cli", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 2 and "torch" not in imported, done.stderr[-300:]


def test_nearest_names():
    with pytest.raises(MissingFile, match="did you mean 'nano'"):
        check_model("nan0")
    with pytest.raises(InputError, match="did you mean 'epochs'"):
        job_values("train", pairs=[("epoch", "3")])
    with pytest.raises(MissingFile, match="did you mean 'smoke'"):
        job_values("train", ["smok"])
    with pytest.raises(InputError, match="did you mean 'pointnet'"):
        encoder_choice("pointnett")
    refused(call("rerun", "runs/nothing"), "no such run")


def test_samples_doctor_and_tutorials(tmp_path):
    assert call("lab", tmp_path / "t", "--no-start").exit_code == 0
    copies = copy_tutorials(tmp_path / "t")
    assert [copy.name for copy in copies] == sorted(
        path.name for path in (ROOT / "nbs/tutorials").glob("*.ipynb")
    )
    assert {"torch", "device", "extra render"} <= {
        row["what"] for row in json.loads(call("doctor", "--json").stdout)
    }
    for command in ("demo", "retrieval", "scene", "duplicates", "ask"):
        assert call(command, "--help").exit_code == 0
    with pytest.raises(InputError, match=r"\.csv"):
        check_form("x.ply", ["table"])


# ------------------------------------------------------------------ runs


def test_a_trained_run_is_kept(tmp_path):
    (tmp_path / "checkpoints" / "00000003").mkdir(parents=True)
    with pytest.raises(PathTaken, match="resume=True"):
        start_run(TrainConfig(), tmp_path)
    assert start_run(TrainConfig(resume=True), tmp_path) == tmp_path
    assert start_run(TrainConfig(overwrite=True), tmp_path) == tmp_path


def test_an_interrupted_job_does_not_end_well(tmp_path, monkeypatch):
    """The notebook handles the signal and ends in order, as train.ipynb does; the job is interrupted all the same."""
    source = (
        f"import time, pathlib\nopen({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')"
    )
    cells = [("p", 'out: str = "x"  # folder', ["parameters"]), ("w", source, [])]
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "cells": [
            {
                "cell_type": "code",
                "id": name,
                "metadata": {"tags": tags},
                "source": text,
                "outputs": [],
                "execution_count": None,
            }
            for name, text, tags in cells
        ],
    }
    (tmp_path / "job.ipynb").write_text(json.dumps(notebook))
    monkeypatch.setattr(cg3d.cli.jobs, "job_notebook", lambda job: tmp_path / "job.ipynb")

    def interrupt():
        while not (tmp_path / "ready").exists():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(JobError, match="cg3d train -p resume True") as caught:
        run_job("train", {"out": str(tmp_path / "run")}, again="cg3d train -p resume True")
    assert exit_code(caught.value) == 130 and exit_code(KeyboardInterrupt()) == 130


def test_the_environment_of_a_run_names_commit_date_and_processor():
    found = environment()
    assert found["date"].endswith("+00:00") and found["processor"]
    if (ROOT / ".git").exists():
        assert len(found["commit"].partition("+")[0]) == 40


def test_waiting_threads_sleep():
    code = "import os, cg3d; print(os.environ['OMP_WAIT_POLICY'])"
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | {
        "PYTHONPATH": str(ROOT)
    }
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env | ({"OMP_WAIT_POLICY": given} if given else {}),
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == expected, done.stderr
