"""The program `cg3d`: answers, exit codes, bad input, interrupted runs; and how models and embeddings are shared."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import trimesh
from PIL import Image
from published_layouts import write_layout
from typer.core import TyperCommand
from typer.testing import CliRunner

import cg3d
from cg3d.cli import collection_commands, job_commands, shape_commands
from cg3d.cli.app import app
from cg3d.cli.info import describe
from cg3d.cli.job_commands import JobCommand, table_rows
from cg3d.cli.jobs import job_notebook, job_values, parameters_of
from cg3d.cli.options import load_model, read_labels
from cg3d.core.errors import Cg3dError, InputError
from cg3d.data.furniture import furniture
from cg3d.io.collection import write_collection
from cg3d.io.shape import read_shape
from cg3d.models.cg3d import CG3D
from cg3d.models.hub import model_card
from cg3d.pretrained.factory import list_models, load
from cg3d.search.batch_embed import Journal, open_source
from cg3d.search.embeddings import Embeddings, from_arrow, read_embeddings, to_arrow, write_embeddings

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "ask",
    "classify",
    "parts",
    "embed",
    "pack",
    "index",
    "search",
    "render",
    "view",
    "train",
    "evaluate",
    "finetune",
    "calibrate",
    "check-data",
    "info",
    "models",
    "parity",
    "score",
    "download",
    "rerun",
)


def program(*words, **options):
    """The program in a process of its own; Ctrl-C reaches it even where the tests run in the background, whose children ignore it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-m", "cg3d.cli", *map(str, words)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def call(*words):
    """The program in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(done, *patterns, code=2):
    """One line on standard error that says what to do, an exit code, no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.exit_code == code and "Traceback" not in done.output, done.output
    assert (
        lines and lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1
    ), lines
    for pattern in patterns:
        assert re.search(pattern, lines[-1]), (pattern, lines[-1])
    return lines


@pytest.fixture(scope="module")
def nano() -> CG3D:
    return load("nano")


@pytest.fixture(autouse=True)
def loaded_once(request, monkeypatch):
    """`--model nano` without reading it again for every call; other names take the way they always take."""

    def load_once(name, *rest):
        return request.getfixturevalue("nano") if name == "nano" else load_model(name, *rest)

    for commands in (collection_commands, job_commands, shape_commands):
        monkeypatch.setattr(commands, "load_model", load_once)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no hub


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> Path:
    """Twenty-four pieces of furniture as a packed collection."""
    rows = furniture().select(category=["table", "chair", "lamp"])
    place = tmp_path_factory.mktemp("data") / "some"
    write_collection(place, [rows[i] for i in range(0, len(rows), len(rows) // 24)][:24])
    return place


@pytest.fixture(scope="module")
def table(some, nano) -> Path:
    """Their embeddings, as `cg3d embed` writes them."""
    source = open_source(some)
    matrix = nano.encode_shape([source.read(i) for i in range(len(source))]).numpy()
    return write_embeddings(
        some.parent / "e.parquet", Embeddings(matrix, source.table, "nano", nano.fingerprint())
    )


@pytest.fixture
def hundred(tmp_path) -> Path:
    """Ninety-seven boxes and three files that are no shapes, in two folders."""
    folder = tmp_path / "shapes"
    (folder / "deep").mkdir(parents=True)
    box = trimesh.creation.box()
    for i in range(97):
        box.vertices[:, 1] *= 1.01
        box.export(folder / ("deep" if i % 2 else "") / f"box{i:02d}.ply")
    (folder / "letter.glb").write_text("Dear reader, this is not a mesh.")
    (folder / "deep" / "empty.obj").write_text("")
    np.save(folder / "nan.npy", np.full((9, 3), np.nan))
    (folder / "notes.txt").write_text("no shape")
    (folder / ".hidden.ply").write_text("not looked at")
    return folder


# ------------------------------------------------------------------ help


HEAVY = {"torch", "numpy", "pandas", "scipy", "rich", "papermill", "huggingface_hub", "trimesh", "pytorch3d"}


def test_help_imports_nothing_heavy_and_is_complete():
    """Every import of the process is listed by -X importtime, those of functions included."""
    command = [sys.executable, "-X", "importtime", "-m", "cg3d.cli", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in lines}
    assert "typer" in imported and "cg3d" in imported and not imported & HEAVY
    assert all(re.search(rf"^  {command}\b", done.stdout, re.M) for command in COMMANDS)
    for option in ("--install-completion", "--show-completion", "--debug"):
        assert option in done.stdout


def test_the_program_imports_nothing_heavy():
    code = f"import sys, cg3d.cli.app; print(sorted({HEAVY!r} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = call(command, "--help")
    assert done.exit_code == 0 and "--help" in done.stdout
    assert ("--json" in done.stdout) == (command != "view"), "every command that prints results"


def test_completion_script():
    out, err = program("--show-completion", "bash").communicate(timeout=60)
    assert "complete" in out.lower(), err


def test_version_and_unknown_words():
    assert call("--version").stdout.strip() == cg3d.__version__
    refused(call("clasify"), "No such command 'clasify'", "classify")
    refused(call("embed", "x.glb"), "Missing option", "--out")
    refused(call("--fast"), "No such option")


# ------------------------------------------------------------------ from a folder to answers


def test_pipeline(some, nano, tmp_path):
    done = call("embed", some, "-o", tmp_path / "e.parquet", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (
        told["shapes"] == 24
        and told["dim"] == nano.config.dim
        and told["problems"] == []
        and not (tmp_path / "e.parquet.part").exists()
    )
    frame = pd.read_parquet(tmp_path / "e.parquet")
    assert (
        {"id", "name", "category", "embedding"} <= set(frame)
        and frame["embedding"][0].dtype == np.float32
        and frame["id"].is_unique
    )
    assert (
        json.loads(call("index", tmp_path / "e.parquet", "-o", tmp_path / "lib.idx", "--json").stdout)[
            "shapes"
        ]
        == 24
    )
    found = json.loads(call("search", tmp_path / "lib.idx", "a round table", "-k", "5", "--json").stdout)[
        "results"
    ]
    scores = (
        np.stack(frame["embedding"]) @ nano.encode_text("a round table")[0].numpy()
    )  # the slow, obvious way
    best = np.argsort(-scores)[:5]
    assert [row["id"] for row in found] == frame["id"][best].tolist()
    np.testing.assert_allclose([row["score"] for row in found], scores[best], atol=1e-5)
    assert found[0]["category"] == "table"
    only = json.loads(
        call(
            "search", tmp_path / "lib.idx", "a round table", "--where", "category == 'lamp'", "--json"
        ).stdout
    )["results"]
    assert only and {row["category"] for row in only} == {"lamp"}
    assert "rank" in call("search", tmp_path / "lib.idx", "a lamp").stdout
    assert json.loads(call("info", tmp_path / "lib.idx", "--json").stdout)["kind"] == "index"
    assert describe(tmp_path / "e.parquet")["shapes"] == 24


def test_search_by_shape_and_picture(table, tmp_path):
    assert call("index", table, "-o", tmp_path / "lib.idx").exit_code == 0
    trimesh.creation.cylinder(0.5, 0.1).export(tmp_path / "disc.glb")
    Image.new("RGB", (64, 64), "brown").save(tmp_path / "brown.png")
    for option, file in (("--shape", "disc.glb"), ("--image", "brown.png")):
        assert (
            len(
                json.loads(
                    call("search", tmp_path / "lib.idx", option, tmp_path / file, "-k", 3, "--json").stdout
                )["results"]
            )
            == 3
        )
    refused(call("search", tmp_path / "lib.idx"), "give one query")
    refused(
        call("search", tmp_path / "lib.idx", "a lamp", "--image", tmp_path / "brown.png"), "give one query"
    )
    refused(call("search", tmp_path / "lib.idx", "--image", tmp_path / "disc.glb"), "not a picture")
    refused(call("search", tmp_path / "lib.idx", " "), "blank")
    refused(call("search", tmp_path / "lib.idx", "a lamp", "--where", "color == 'red'"), "no column 'color'")
    refused(call("search", tmp_path / "none.idx", "a lamp"), "no such index", "cg3d index")


def test_three_broken_files_among_a_hundred(hundred, tmp_path):
    out = tmp_path / "e.npz"
    done = call("embed", hundred, "-o", out)
    lines = refused(done, r"3 of 100 shapes could not be read", "other 97", "--skip-broken")
    assert [
        name for name in ("letter.glb", "empty.obj", "nan.npy") if any(name in line for line in lines[:-1])
    ] == ["letter.glb", "empty.obj", "nan.npy"]
    read = read_embeddings(out)
    assert (
        len(read) == 97
        and read.table["id"].is_unique
        and "deep/box01.ply" in set(read.table["id"])
        and not Path(f"{out}.part").exists()
    )
    again = call("embed", hundred, "-o", out, "--overwrite", "--skip-broken", "--json")
    assert again.exit_code == 0 and len(json.loads(again.stdout)["problems"]) == 3
    np.testing.assert_allclose(read_embeddings(out).matrix, read.matrix, atol=1e-6)


def test_interrupted_and_resumed(hundred, tmp_path, monkeypatch, nano):
    for name in ("letter.glb", "deep/empty.obj", "nan.npy"):
        (hundred / name).unlink()
    whole, torn = tmp_path / "whole.parquet", tmp_path / "torn.parquet"
    assert call("embed", hundred, "-o", whole).exit_code == 0
    count, embedded = [0], []

    def impatient(path, **options):
        count[0] += 1
        if count[0] in (50, 80):
            raise KeyboardInterrupt
        return read_shape(path, **options)

    encode_shape = nano.encode_shape

    def record(shapes, **options):
        embedded.extend(shape.source for shape in shapes)
        return encode_shape(shapes, **options)

    monkeypatch.setattr("cg3d.search.batch_embed.read_shape", impatient)
    monkeypatch.setattr(nano, "encode_shape", record)
    refused(call("embed", hundred, "-o", torn), "interrupted: 49 of 97", "same command", code=130)
    assert (
        not torn.exists()
        and Path(f"{torn}.part").is_dir()
        and describe(f"{torn}.part")["kind"] == "unfinished embedding"
    )
    refused(call("embed", hundred, "-o", torn), "interrupted: 78 of 97", code=130)
    done = call("embed", hundred, "-o", torn, "--json")
    assert (
        done.exit_code == 0 and json.loads(done.stdout)["resumed"] == 78 and not Path(f"{torn}.part").exists()
    )
    assert len(embedded) == len(set(embedded)) == 97  # nothing lost, nothing twice
    first, second = read_embeddings(whole), read_embeddings(torn)
    pd.testing.assert_frame_equal(first.table, second.table)
    np.testing.assert_allclose(first.matrix, second.matrix, atol=1e-6)


def test_a_real_ctrl_c(hundred, tmp_path):
    """The signal itself, in a process of its own; then the same command does the rest."""
    out = tmp_path / "e.npz"
    running = program("embed", hundred, "-o", out, "--batch-size", "1", "--skip-broken")
    until = time.monotonic() + 240
    while (
        time.monotonic() < until
        and running.poll() is None
        and len(list(Path(f"{out}.part").glob("0*.npz"))) < 2
    ):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert (
        running.returncode == 130
        and "Traceback" not in err
        and "error: interrupted: " in err
        and "the same command embeds the rest" in err
    ), err
    kept = int(re.search(r"interrupted: (\d+) of 100", err)[1])
    assert 0 < kept < 97 and not out.exists()
    done = call("embed", hundred, "-o", out, "--batch-size", "1", "--skip-broken", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["resumed"] == kept
    assert len(read_embeddings(out)) == 97 and read_embeddings(out).table["id"].is_unique


def test_a_run_with_other_settings_does_not_go_on(hundred, tmp_path):
    Journal.open(tmp_path / "e.npz", {"model": "other", "fingerprint": "f", "source": "s"})
    refused(
        call("embed", hundred, "-o", tmp_path / "e.npz"),
        "unfinished run with another model",
        "delete the folder",
    )


# ------------------------------------------------------------------ naming and drawing


@pytest.fixture(scope="module")
def ring(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ring") / "ring.glb"
    trimesh.creation.annulus(0.3, 0.5, 0.1).export(path)
    return path


def test_classify(ring, nano):
    done = call("classify", ring, "--labels", "ring, ball", "-l", "box", "--json")
    assert done.exit_code == 0, done.output
    (answer,) = json.loads(done.stdout)["shapes"]
    slow = nano.classify(read_shape(ring), ["ring", "ball", "box"])
    assert [row["label"] for row in answer["labels"]] == slow["label"].tolist()
    np.testing.assert_allclose(
        [row["probability"] for row in answer["labels"]], slow["probability"], atol=1e-5
    )
    assert "probability" in call("classify", ring, "-l", "ring,ball").stdout
    assert (
        len(
            json.loads(call("classify", ring, "-l", "ring,ball,box", "--top", 1, "--json").stdout)["shapes"][
                0
            ]["labels"]
        )
        == 1
    )


def test_labels(tmp_path):
    (tmp_path / "labels.txt").write_text("chair\ntea table\n")
    assert read_labels(["chair , sofa", "lamp"]) == ["chair", "sofa", "lamp"] and read_labels(
        [str(tmp_path / "labels.txt")]
    ) == ["chair", "tea table"]


@pytest.mark.parametrize(
    "labels,words",
    [
        ("", "no labels"),
        ("chair,,lamp", "label 2 of 3 is blank"),
        ("chair, lamp,", "blank"),
        ("chair, lamp, chair", "'chair' is given 2 times"),
        (" , ", "no labels"),
    ],
)
def test_bad_labels(ring, labels, words):
    refused(call("classify", ring, "--labels", labels), words)
    if "," in labels.strip(" ,"):
        refused(call("evaluate", "-p", "labels", labels), words)


def test_bad_shapes(tmp_path):
    (tmp_path / "letter.glb").write_text("Dear reader, this is not a mesh.")
    with open(tmp_path / "huge.glb", "wb") as file:
        file.truncate(200_000_000)
    (tmp_path / "empty").mkdir()
    messages = {
        "letter.glb": "letter.glb.*its JSON cannot be parsed",
        "huge.glb": r"huge.glb.*200 MB.*100 MB.*--max-mb",
        "gone.glb": "gone.glb: no such file",
        "empty": "no shape in it",
    }
    for command, *options in (
        ("classify", "-l", "chair,lamp"),
        ("render", "-o", tmp_path / "x.png"),
        ("embed", "-o", tmp_path / "x.npz"),
    ):
        for name, message in messages.items():
            refused(call(command, tmp_path / name, *options), message)
    refused(call("info", tmp_path / "letter.glb"), "its JSON cannot be parsed")
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "x.npz").exists()


def test_outputs_that_cannot_be_written(ring, table, tmp_path):
    (tmp_path / "there").write_text("mine")
    for name in ("there.png", "there.npz", "there.idx"):
        (tmp_path / name).write_text("mine")
    blocked = tmp_path / "there"
    for command, source, name in (
        ("render", ring, "there.png"),
        ("embed", ring, "there.npz"),
        ("index", table, "there.idx"),
    ):
        refused(
            call(command, source, "-o", tmp_path / name), "exists; choose another name, or pass --overwrite"
        )
        refused(call(command, source, "-o", blocked / name), "cannot be written.*is a file, not a folder")
        refused(call(command, source, "-o", f"/proc/{name}"), "cannot be written")
    refused(call("embed", ring, "-o", tmp_path / "x.csv"), ".parquet or .npz")
    refused(call("render", ring, "-o", tmp_path / "x.gif"), ".png or .jpg")
    assert all((tmp_path / name).read_text() == "mine" for name in ("there", "there.png", "there.npz"))


def test_render_needs_no_display(ring, tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for options in ((), ("--points",)):
        done = call(
            "render",
            ring,
            "-o",
            tmp_path / "ring.png",
            "--views",
            3,
            "--size",
            48,
            "--overwrite",
            "--json",
            *options,
        )
        assert done.exit_code == 0 and json.loads(done.stdout)["views"] == 3, done.output
        pixels = np.asarray(Image.open(tmp_path / "ring.png"))
        assert pixels.shape == (48, 144, 3) and all(
            (part < 250).any() and (part == 255).any() for part in np.split(pixels, 3, axis=1)
        )


def test_a_surface_that_cannot_be_drawn_is_an_error(ring, tmp_path, monkeypatch):
    def fail(mesh, *cameras, **options):
        raise InputError("the texture of part 0 is damaged; repair the file")

    monkeypatch.setattr("cg3d.render.mesh.render_mesh", fail)
    refused(call("render", ring, "-o", tmp_path / "x.png"), "texture of part 0 is damaged")
    assert not (tmp_path / "x.png").exists()
    assert call("render", ring, "-o", tmp_path / "x.png", "--points").exit_code == 0

    def bug(mesh, *cameras, **options):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("cg3d.render.mesh.render_mesh", bug)
    done = call("render", ring, "-o", tmp_path / "y.png")
    assert done.exit_code == 1 and "ValueError: operands could not be broadcast" in done.stderr
    assert "this is a bug in cg3d" in done.stderr and "Traceback" not in done.output


def test_a_file_without_faces_is_drawn_as_points(tmp_path):
    vertices = trimesh.creation.icosphere().vertices
    trimesh.PointCloud(vertices).export(tmp_path / "cloud.ply")
    done = call("render", tmp_path / "cloud.ply", "-o", tmp_path / "x.png", "--views", 1, "--size", 32)
    assert done.exit_code == 0 and "cloud.ply: no faces in it, its points are drawn" in done.stderr
    assert (np.asarray(Image.open(tmp_path / "x.png")) < 250).any()


def test_a_folder_with_one_mesh_is_drawn_as_its_surface(ring, tmp_path):
    for name, shape in (("file.png", ring), ("folder.png", ring.parent)):
        done = call("render", shape, "-o", tmp_path / name, "--views", 2, "--size", 32)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "file.png").read_bytes() == (tmp_path / "folder.png").read_bytes()


def test_a_halved_batch_is_told_once(ring, tmp_path, nano, monkeypatch):
    real = nano.encode_shape

    def small_device(shapes, *, batch_size):
        if min(batch_size, len(shapes)) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(shapes, batch_size=batch_size)

    for i in range(3):
        (tmp_path / "shapes").mkdir(exist_ok=True)
        (tmp_path / "shapes" / f"{i}.glb").write_bytes(ring.read_bytes())
    monkeypatch.setattr(nano, "encode_shape", small_device)
    done = call("embed", tmp_path / "shapes", "-o", tmp_path / "e.npz", "--batch-size", 4)
    assert done.exit_code == 0 and len(read_embeddings(tmp_path / "e.npz")) == 3
    assert done.stderr.count("warning: batch_size=4 does not fit into the memory of cpu") == 1


def test_models_are_listed():
    rows = json.loads(call("models", "--json").stdout)["models"]
    assert [row["name"] for row in rows] == list_models() and rows[0]["name"] == "nano"


def test_models_that_are_not_there(ring, tmp_path):
    refused(
        call("classify", ring, "-l", "a,b", "-m", "nobody/nothing"),
        "HF_HUB_OFFLINE|cannot be reached",
        "local folder",
    )
    refused(call("classify", ring, "-l", "a,b", "-m", tmp_path / "none"), "no model")
    refused(call("classify", ring, "-l", "a,b", "-m", "nano", "--up", "x"), "up='x'")
    refused(call("info", "nowhere"), "no such file")


def test_debug_shows_where(tmp_path):
    assert "Traceback" not in call("info", tmp_path / "gone").output
    for words in (("info", tmp_path / "gone", "--debug"), ("--debug", "info", tmp_path / "gone")):
        done = call(*words)
        assert (
            done.exit_code == 2
            and "Traceback" in done.stderr
            and done.stderr.strip().splitlines()[-1].startswith("error: ")
        )


# ------------------------------------------------------------------ what is this, where do I get it


def test_info(some, nano, table, tmp_path):
    assert describe("nano")["weights"] == {
        part: sum(v.numel() for v in getattr(nano, part).state_dict().values())
        for part in ("encoder", "prompts")
    }
    assert (
        describe(some)["shapes"] == 24
        and describe("furniture")["kind"] == "collection"
        and describe(table)["model"] == "nano"
    )
    shown = call("info", "nano")
    assert (
        shown.exit_code == 0
        and "point_transformer" in shown.stdout
        and json.loads(call("info", "nano", "--json").stdout)["kind"] == "checkpoint"
    )


def test_check_data(tmp_path, some):
    assert call("check-data", some).exit_code == 0
    told = json.loads(call("check-data", some, "--json").stdout)
    assert told["ok"] and sum(row["found"] for row in told["splits"]) == 24
    (tmp_path / "nothing").mkdir()
    refused(call("check-data", tmp_path / "nothing"), "no known layout")
    refused(call("check-data", tmp_path / "gone"), "no such file")
    refused(call("check-data", some, "--layout", "modelnet99"), "unknown", "known are")


def test_download(tmp_path):
    known = json.loads(call("download", "--json").stdout)["known"]
    assert {"uni3d-b", "openshape-g14", "modelnet40"} <= {row["name"] for row in known}
    refused(call("download", "uni3d-b", "-o", tmp_path), "HF_HUB_OFFLINE|cannot be reached")
    refused(call("download", "uni4d", "-o", tmp_path), "nothing to download.*uni3d-b")
    (tmp_path / "served.bin").write_bytes(b"bytes")
    refused(
        call("download", "http://127.0.0.1:9/served.bin", "-o", tmp_path / "new"),
        "cannot be reached",
        "copy it to",
    )
    refused(
        call("download", "http://127.0.0.1:9/served.bin", "-o", tmp_path, "--sha256", "0" * 64),
        "SHA-256 is .*expected 0000",
    )
    right = "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"
    done = call("download", "http://127.0.0.1:9/served.bin", "-o", tmp_path, "--sha256", right, "--json")
    assert (
        done.exit_code == 0 and json.loads(done.stdout)["files"][0]["checked"] == "pinned"
    )  # it is there: no network is needed
    assert (tmp_path / "SHA256SUMS").read_text() == f"{right}  served.bin\n"


# ------------------------------------------------------------------ jobs


@pytest.mark.parametrize(
    "words,pattern",
    [
        (("train", "-p", "epoch", "3"), "no parameter 'epoch'.*epochs"),
        (("train", "-p", "epochs", "many"), "epochs='many' is a str"),
        (("train", "-p", "epochs"), "needs a value"),
        (("train", "-f", "furnitur"), "no recipe 'furnitur'.*furniture"),
        (("evaluate", "-f", "furniture"), "evaluate has no parameter"),
        (("evaluate", "-p", "out", "/proc/x/y"), "cannot be written"),
    ],
)
def test_jobs_refuse_before_they_start(words, pattern):
    start = time.monotonic()
    refused(call(*words), pattern)
    assert time.monotonic() - start < 20


def test_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("epoch\n")
    refused(call("train", "-p", "out", tmp_path / "run"), "holds a run.*resume True.*--overwrite")
    for job in ("evaluate", "retrieval", "scene"):
        lines = refused(
            call(job, "-p", "out", tmp_path / "run"), "holds a run.*out NAME, or pass --overwrite"
        )
        assert "resume" not in lines[-1], "these jobs cannot be resumed"


def test_parameters_are_read_as_papermill_reads_them():
    from papermill.cli import _resolve_type

    known = parameters_of(job_notebook("train"))
    for name, text in (
        ("epochs", "3"),
        ("lr", "1e-3"),
        ("color", "False"),
        ("data", "furniture"),
        ("lr", "2"),
    ):
        assert job_values("train", [], [(name, text)])[name] == _resolve_type(text)
    assert (
        known["epochs"].kind is int
        and known["epochs"].about
        and job_values("train", [], [("out", "3")])["out"] == "3"
    )
    listed = json.loads(call("train", "--list", "--json").stdout)
    assert [row["parameter"] for row in listed["parameters"]] == list(known) and "furniture" in listed[
        "recipes"
    ]


def test_names_and_values_may_stand_apart(monkeypatch):
    seen = []
    monkeypatch.setattr(TyperCommand, "parse_args", lambda self, ctx, args: seen.extend(args))
    JobCommand(name="train").parse_args(
        None, ["-p", "encoder", "pointnet width=2", "-p", "a=b", "--json", "-p", "lr", "-1"]
    )
    assert seen == ["-p", "encoder=pointnet width=2", "-p", "a=b", "--json", "-p", "lr=-1"]


def test_evaluate_runs_the_notebook(some, tmp_path):
    done = call(
        "evaluate",
        "-p",
        "checkpoint",
        "nano",
        "-p",
        "data",
        some,
        "-p",
        "split",
        "all",
        "-p",
        "labels",
        "table, chair, lamp",
        "-p",
        "out",
        tmp_path / "zero",
        "--json",
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (
        Path(told["notebook"]).is_file()
        and told["results"][0]["shapes"] == 24
        and {"3D encoder", "majority class"} <= {row["method"] for row in told["results"]}
    )


def test_evaluate_on_corrupted_clouds(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(job_commands, "execute_job", lambda *values: seen.update(values=values))
    assert call("evaluate", "--corruptions").exit_code == 0
    job, values, *_ = seen["values"]
    assert (job, values["corruptions"]) == ("evaluate", "all")
    assert job_commands.second_table(job, values) == "robustness.csv"
    assert call("evaluate").exit_code == 0
    assert job_commands.second_table("evaluate", seen["values"][1]) == ""
    (tmp_path / "robustness.csv").write_text("model,mCE\nnano,\n")
    assert table_rows(tmp_path / "robustness.csv") == [{"model": "nano", "mCE": None}]


def test_a_job_that_fails_inside_says_why(tmp_path):
    done = call(
        "evaluate",
        "-p",
        "checkpoint",
        "nano",
        "-p",
        "data",
        tmp_path / "gone",
        "-p",
        "out",
        tmp_path / "zero",
    )
    refused(done, "evaluate stopped.*gone", "traceback is in")


# ------------------------------------------------------------------ sharing


def test_share_through_a_folder(nano, tmp_path, some):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.json").write_text(
        json.dumps(
            {"data": "furniture", "train_split": "train", "epochs": 7, "seed": 3, "shuffle_labels": False}
        )
    )
    pd.DataFrame({"method": ["3D encoder"], "top1": [61.25]}).to_csv(
        tmp_path / "run" / "results.csv", index=False
    )
    place = nano.save_pretrained(tmp_path / "model", run=tmp_path / "run", license="apache-2.0")
    card = (Path(place) / "README.md").read_text()
    for words in (
        "license: apache-2.0",
        "library_name: cg3d",
        "7 epochs, seed 3",
        "61.25",
        "1024 points",
        "384 numbers",
        "Sweet Home 3D",
    ):
        assert words in card, words
    again = CG3D.from_pretrained(place, backbone=nano.backbone)
    points = open_source(some).read(0)
    assert torch.equal(again.encode_shape(points), nano.encode_shape(points))
    assert "Not measured" in model_card(nano, "a/b") and "Not stated" in model_card(nano, "a/b")
    with pytest.raises(FileNotFoundError, match="no train.json"):
        nano.save_pretrained(tmp_path / "other", run=tmp_path)
    with pytest.raises(ValueError, match="owner/name"):
        nano.push_to_hub("name")
    with pytest.raises(Cg3dError, match="local folder"):
        CG3D.from_pretrained("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="no model 'nanoo'"):
        CG3D.from_pretrained("nanoo")


def test_tables_of_embeddings(tmp_path):
    rng = np.random.default_rng(0)
    made = Embeddings(
        rng.standard_normal((5, 7)),
        pd.DataFrame(
            {"id": list("abcde"), "name": ["ä", "", "x|y", "中", "e"], "height": [1.0, np.nan, 3, 4, 5]}
        ),
        "nano",
        "f" * 64,
    )
    assert str(to_arrow(made).schema.field("embedding").type) == "list<item: float>"
    for back in (
        from_arrow(to_arrow(made)),
        *(read_embeddings(write_embeddings(tmp_path / name, made)) for name in ("e.parquet", "e.npz")),
    ):
        assert (back.matrix == made.matrix).all() and (back.model, back.fingerprint) == ("nano", "f" * 64)
        pd.testing.assert_frame_equal(back.table, made.table, check_dtype=False)
    plain = pd.DataFrame({"name": ["a", "b"], "embedding": [[1.0, 0.0], [0.0, 1.0]]})
    plain.to_parquet(tmp_path / "plain.parquet")  # not written by cg3d
    assert read_embeddings(tmp_path / "plain.parquet").matrix.tolist() == [[1, 0], [0, 1]]
    pd.DataFrame({"name": ["a", "b"], "embedding": [[1.0], [0.0, 1.0]]}).to_parquet(
        tmp_path / "ragged.parquet"
    )
    with pytest.raises(ValueError, match="different lengths"):
        read_embeddings(tmp_path / "ragged.parquet")
    with pytest.raises(ValueError, match="column 'embedding'"):
        Embeddings(np.ones((1, 2)), pd.DataFrame({"embedding": [1]}))
    with pytest.raises(ValueError, match="NaN"):
        Embeddings(np.full((1, 2), np.nan), pd.DataFrame({"id": ["a"]}))


def test_a_run_is_repeated_from_its_folder(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "cg3d.cli", "train", "-f", "smoke", "-p", "out", f"{tmp_path}/x"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    again = subprocess.run(
        [sys.executable, "-m", "cg3d.cli", "rerun", f"{tmp_path}/x", "--json"],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert (
        found["same_weights"] is True
        and found["other_versions"] == []
        and (tmp_path / "x-rerun/results.csv").is_file()
    )
    refused = subprocess.run(
        [sys.executable, "-m", "cg3d.cli", "rerun", f"{tmp_path}"], capture_output=True, text=True
    )
    assert refused.returncode == 2 and "no run in it" in refused.stderr


def test_parity_with_an_adapter_and_through_files(tmp_path):
    file = write_layout(tmp_path / "point_transformer_1k.pth", "cg3d/point_transformer", small_towers=True)
    alone = json.loads(call("parity", str(file), "--clouds", str(tmp_path / "clouds.npz"), "--json").stdout)
    assert alone["contract"] == "cg3d/point_transformer-1k" and alone["ties"] == "pointnet2"
    assert [row["cloud"] for row in alone["clouds"]] == ["generic", "grid", "near origin"]
    assert all(row["difference"] is None and row["size"] > 0 for row in alone["clouds"])
    outputs = {name: np.zeros(512, np.float32) for name in np.load(tmp_path / "clouds.npz").files}
    np.savez(tmp_path / "theirs.npz", **outputs)
    zeros = json.loads(call("parity", str(file), "--outputs", str(tmp_path / "theirs.npz"), "--json").stdout)
    assert all(abs(row["difference"] - row["size"]) < 1e-5 for row in zeros["clouds"])
    (tmp_path / "adapter.py").write_text(
        "def build(path):\n    return lambda cloud: cloud.new_zeros(1, 512)\n"
    )
    adapted = call("parity", str(file), "--official", f"{tmp_path}/adapter.py:build")
    assert "point_transformer-1k" in adapted.stdout and "near origin" in adapted.stdout
    for wrong in ("adapter", f"{tmp_path}/none.py:build", f"{tmp_path}/adapter.py:other"):
        refused(call("parity", file, "--official", wrong), "adapter|none")


def test_score_under_both_protocols(tmp_path):
    file = write_layout(tmp_path / "ulip.pt", "ulip/pointmlp", small_towers=True)
    trimesh.creation.box((1, 0.5, 0.7)).export(tmp_path / "box.glb")
    trimesh.creation.box((100, 50, 70)).export(tmp_path / "large.glb")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    words = ("-t", "a red box", "-i", tmp_path / "red.png", "-m", file, "--json")
    scores = {
        name: pd.DataFrame(json.loads(call("score", tmp_path / name, *words).stdout)["scores"])
        for name in ("box.glb", "large.glb")
    }
    rows = scores["box.glb"]
    assert rows.protocol.tolist() == ["as-published"] * 2 + ["contract"] * 2
    assert (
        rows.kind.tolist() == ["text", "image"] * 2 and rows.normalized.tolist() == [False] * 2 + [True] * 2
    )
    change = (rows.score - scores["large.glb"].score).abs()
    assert change[:2].max() > 1e-3 and change[2:].max() < 1e-4, (
        "only the published score depends on the scale"
    )
    refused(call("score", tmp_path / "box.glb", "-m", file), "give --text or --image")
    refused(
        call("score", tmp_path / "box.glb", "-t", "x", "-m", file, "--protocol", "paper"),
        "none of as-published",
    )
    refused(call("score", tmp_path / "box.glb", "-t", "x", "-m", "nano"), "needs published weights")


def test_calibrate_stores_what_classify_says(tmp_path, monkeypatch):
    import cg3d.training.pretrain as pretrain

    torch.manual_seed(0)
    folder = CG3D.build(encoder="pointnet", points=64).save(tmp_path / "model")
    shapes = furniture().select(split="val", category=["chair", "table", "lamp", "bed"])
    monkeypatch.setattr(pretrain, "read_data", lambda data: shapes)
    words = [
        "classify",
        str(shapes_file(tmp_path)),
        "--labels",
        "chair,lamp",
        "--model",
        str(folder),
        "--json",
    ]
    before = json.loads(CliRunner().invoke(app, words).stdout)["shapes"][0]
    assert "believable" not in before
    answer = CliRunner().invoke(app, ["calibrate", str(folder), "--json"])
    assert answer.exit_code == 0, answer.output
    facts = json.loads(answer.stdout)
    stored = json.loads((folder / "config.json").read_text())["calibration"]
    assert stored == {"points": {key: facts[key] for key in ("logit_scale", "none_bias")}}
    after = json.loads(CliRunner().invoke(app, words).stdout)["shapes"][0]
    assert after["believable"] == (after["none_of_these"] < 0.5)
    assert after["labels"][0]["similarity"] == before["labels"][0]["similarity"]
    missing = CliRunner().invoke(app, ["calibrate", str(tmp_path / "nothing")])
    assert missing.exit_code == 2 and "no saved model" in missing.output


def shapes_file(folder):
    path = folder / "box.glb"
    trimesh.creation.box().export(path)
    return path
