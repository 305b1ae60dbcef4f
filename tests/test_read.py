"""Reading any file: the table of formats, what a file really is, folders, the up axis, units, and what is told."""

import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import trimesh
from gltf_writer import BOX, FACES
from typer.testing import CliRunner

import cg3d
from cg3d.core.errors import Cg3dError, InputError, MissingFile
from cg3d.io import upright
from cg3d.io.collection import read_collection, write_collection
from cg3d.io.mesh import Mesh, Surface
from cg3d.io.read import (
    FOLDER_SUFFIXES,
    FORMATS,
    SUFFIXES,
    find_format,
    formats,
    formats_markdown,
    left_out_words,
    read_mesh,
    read_points,
    shape_files,
)
from cg3d.io.scene import read_scene
from cg3d.io.shape import Shape, read_shape, up_of

ROOT = Path(__file__).parents[1]
CLOUD = np.random.default_rng(0).random((60, 3)) * [1, 2, 3]


# the table


def test_each_suffix_has_one_format_and_each_reader_exists():
    assert len(set(SUFFIXES)) == sum(len(each.suffixes) for each in FORMATS) and all(
        s == s.lower() for s in SUFFIXES
    )
    for each in FORMATS:
        module, _, name = each.reader.partition(":")
        assert callable(getattr(importlib.import_module(module), name)) and each.up in ("", "y", "z", "file")


def test_the_documentation_holds_the_table():
    assert (ROOT / "docs" / "formats.md").read_text().endswith(formats_markdown()), (
        "write it anew: docs/formats.md"
    )
    for suffix in SUFFIXES:
        assert suffix in formats_markdown()


def test_the_table_names_what_is_missing(monkeypatch):
    assert set(formats()["install"]) == {""}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    commands = dict(zip(formats()["name"], formats()["install"]))
    assert (
        commands["LAZ"] == "pip install laspy lazrs"
        and commands["PLY"] == ""
        and commands["USD"] == "pip install usd-core"
    )


def test_the_extra_holds_every_package():
    line = next(
        line
        for line in (ROOT / "settings.ini").read_text().splitlines()
        if line.startswith("formats_requirements")
    )
    for package in {package for each in FORMATS for _, package in each.packages}:
        assert f" {package}>=" in line, package


@pytest.mark.parametrize("name", ["a.dwg", "a", "a.", "a.tar.gz"])
def test_unknown_suffixes(name):
    with pytest.raises(InputError, match="unknown suffix"):
        find_format(name)


# what a file really is


@pytest.mark.parametrize(
    "content, what",
    [
        (b"ply\nformat ascii 1.0\n", "a PLY file.*rename it to .ply"),
        (b"ply\r\nformat", "a PLY file"),
        (b"glTF\2\0\0\0", "a binary glTF file.*rename it to .glb"),
        (b"\x93NUMPY\1\0", "a numpy array"),
        (b"LASF\0\0", "a LAS or LAZ file"),
        (b"ASTM-E57", "an E57 file"),
        (b"ISO-10303-21;\n", "a STEP file"),
        (b"# vtk DataFile Version 3.0\n", "a VTK file"),
        (b"Kaydara FBX Binary  \0", "an FBX file"),
        (b"#usda 1.0\n", "a USD file"),
        (b"PXR-USDC", "a USD file"),
        (b"PK\3\4", "a zip archive.*unpack it first"),
        (b"\x1f\x8b\x08", "a gzip archive.*unpack it first"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"  <html>", "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a pointer of Git LFS .run git lfs pull",
        ),
        (b'<?xml version="1.0"?>\n<COLLADA xmlns="x">', "a COLLADA file"),
        (b'<?xml version="1.0"?>\n<VTKFile type="PolyData">', "a VTK file"),
        (b"# .PCD v0.7\nVERSION 0.7\n", "a PCD file"),
        (b"COFF\n8 12 0\n", "an OFF file"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, what):
    for name in ("a.obj", "a.stl", "a.xyz"):
        (tmp_path / name).write_bytes(content + bytes(50))
        with pytest.raises(InputError, match=f"{name}: is {what}"):
            read_mesh(tmp_path / name)


def test_missing_and_empty(tmp_path):
    (tmp_path / "a.glb").touch()
    for name in SUFFIXES:
        with pytest.raises(MissingFile, match="no such file"):
            read_mesh(tmp_path / f"none{name}")
        (tmp_path / f"a{name}").write_bytes(b"")
        with pytest.raises(InputError, match="empty"):
            read_mesh(tmp_path / f"a{name}")
        (tmp_path / f"a{name}").unlink()


def test_upper_case_suffixes(tmp_path):
    trimesh.creation.box((1, 2, 3)).export(tmp_path / "a.ply")
    (tmp_path / "a.ply").rename(tmp_path / "A.PLY")
    assert np.ptp(read_mesh(tmp_path / "A.PLY").bounds, axis=0).tolist() == [1, 2, 3]


# folders


def test_a_folder_counts_what_it_leaves_out(tmp_path):
    for name in (
        "a.glb",
        "inner/b.PLY",
        "c.step",
        "d.blend",
        "e.blend",
        "f.txt",
        "g.csv",
        "h.png",
        "i.mtl",
        ".j.ply",
        ".k/l.ply",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, others = shape_files(tmp_path)
    assert [path.name for path in found] == ["a.glb", "c.step", "b.PLY"] and others == {
        ".blend": 2,
        ".txt": 1,
    }
    assert (
        left_out_words(others)
        == "3 files of other kinds were left out (2 .blend, 1 .txt); .txt files are read when they are named one by one"
    )
    assert left_out_words({}) == "" and ".txt" not in FOLDER_SUFFIXES and ".txt" in SUFFIXES


def test_the_command_line_says_what_it_left_out(tmp_path):
    from cg3d.cli.app import app

    trimesh.creation.icosphere(1).export(tmp_path / "ball.ply")
    (tmp_path / "x.blend").touch()
    answer = CliRunner().invoke(app, ["embed", str(tmp_path), "-o", str(tmp_path / "e.npz"), "--json"])
    assert answer.exit_code == 0 and json.loads(answer.stdout)["left_out"] == {".blend": 1}
    assert "1 files of other kinds were left out (1 .blend)" in answer.stderr
    (tmp_path / "ball.ply").unlink()
    answer = CliRunner().invoke(app, ["embed", str(tmp_path), "-o", str(tmp_path / "f.npz")])
    assert answer.exit_code == 2 and "1 .blend" in answer.stderr


def test_cg3d_formats():
    from cg3d.cli.app import app

    answer = CliRunner().invoke(app, ["formats"])
    assert answer.exit_code == 0 and all(suffix in answer.stdout for suffix in SUFFIXES)
    rows = json.loads(CliRunner().invoke(app, ["formats", "--json"]).stdout)
    assert len(rows) == len(FORMATS) and rows[0]["name"] == "glTF 2.0"


def test_cg3d_formats_agrees_with_the_documentation():
    from cg3d.cli.app import app

    lines = (ROOT / "docs" / "formats.md").read_text().partition("## Table of formats")[2].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    columns = ["geometry", "color", "textures", "transforms", "units", "up", "refused"]
    assert table[0] == ["format", "files", "read by", *columns]
    shown = json.loads(CliRunner().invoke(app, ["formats", "--json"]).stdout)
    up = {"": "y, assumed", "file": "as stated"}
    for cells, row in zip(table[2:], shown, strict=True):
        assert cells[:2] == [row["name"], row["suffixes"]] and cells[2].startswith(row["library"])
        row["up"] = up.get(row["up"], row["up"])
        assert cells[3:] == [row[name] or "-" for name in columns]


def test_the_command_line_shows_warnings(tmp_path):
    from cg3d.cli.app import app

    (tmp_path / "a.obj").write_text("mtllib gone.mtl\nusemtl x\nv 0 0 0\nv 1 0 0\nv 0 1 1\nf 1 2 3\n")
    for command in (
        ["classify", "-l", "chair, table"],
        ["info"],
        ["render", "-o", str(tmp_path / "a.png"), "--size", "32", "--views", "1"],
    ):
        answer = CliRunner().invoke(app, [command[0], str(tmp_path / "a.obj"), *command[1:]])
        assert answer.exit_code == 0 and "gone.mtl" in answer.output, (command, answer.output)


def test_info_of_a_file(tmp_path):
    from cg3d.cli.info import describe

    trimesh.creation.box((1, 2, 3)).export(tmp_path / "a.stl")
    facts = describe(tmp_path / "a.stl")
    assert (facts["kind"], facts["format"], facts["faces"], facts["up"], facts["unit"]) == (
        "mesh",
        "STL",
        12,
        "z",
        "not stated",
    )
    assert facts["extent"] == [1, 2, 3]
    np.save(tmp_path / "b.npy", CLOUD)
    facts = describe(tmp_path / "b.npy")
    assert (facts["kind"], facts["points"], facts["up"]) == ("cloud", 60, "not stated, taken for y")


# up, units, warnings


@pytest.mark.parametrize(
    "suffix, turned", [(".glb", False), (".obj", False), (".ply", False), (".off", False), (".stl", True)]
)
def test_the_up_axis_by_format(tmp_path, suffix, turned):
    mesh = trimesh.creation.box((1, 2, 3))
    mesh.export(tmp_path / f"a{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = np.ptp(read_shape(tmp_path / f"a{suffix}").points, axis=0)
        given = np.ptp(read_shape(tmp_path / f"a{suffix}", up="z").points, axis=0)
        kept = np.ptp(read_shape(tmp_path / f"a{suffix}", up="y").points, axis=0)
    assert np.allclose(size, [1, 3, 2] if turned else [1, 2, 3], atol=0.02)
    assert np.allclose(given, [1, 3, 2], atol=0.02) and np.allclose(kept, [1, 2, 3], atol=0.02)


def standing_table() -> np.ndarray:
    "A table with y up."
    move = trimesh.transformations.translation_matrix
    legs = [
        trimesh.creation.box((0.08, 0.7, 0.08), move([x, 0.35, z]))
        for x in (-0.6, 0.6)
        for z in (-0.35, 0.35)
    ]
    top = trimesh.creation.box((1.4, 0.05, 0.9), move([0, 0.72, 0]))
    return trimesh.sample.sample_surface(trimesh.util.concatenate([*legs, top]), 2048, seed=0)[0]


def test_what_looks_z_up_is_told_and_not_turned(tmp_path):
    standing = standing_table()
    lying = standing @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]).T
    assert upright.estimate_up(standing)[0] == "y" and upright.estimate_up(lying)[0] == "z"
    np.save(tmp_path / "lying.npy", lying)
    with pytest.warns(UserWarning, match="by its form z is likelier .*give up='z'"):
        shape = read_shape(tmp_path / "lying.npy", points=None)
    assert np.allclose(shape.points, lying.astype(np.float32)) and len(shape.warnings) == 1
    np.save(tmp_path / "standing.npy", standing)
    for path, up in (("standing.npy", None), ("lying.npy", "z"), ("lying.npy", "y")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not read_shape(tmp_path / path, up=up).warnings


@pytest.mark.parametrize(
    "points",
    [
        np.zeros((3, 3)),
        np.random.rand(500, 3) * [1, 1, 0],
        np.random.rand(500, 3) * [1, 0, 1],
        np.linspace(0, 1, 300).reshape(-1, 3),
    ],
)
def test_flat_and_tiny_forms_say_nothing(points):
    assert upright.estimate_up(points)[0] in ("y", "z") and upright.estimate_up(points)[1] < 0.9


@pytest.mark.parametrize(
    "stated, given, expected", [("z", None, "z"), ("y", None, "y"), ("z", "y", "y"), (None, "z", "z")]
)
def test_what_is_given_wins_over_what_is_stated(stated, given, expected):
    assert up_of(Mesh(points=CLOUD, up=stated), CLOUD, given) == (expected, None)


def test_the_unit_gives_the_size():
    from cg3d.io.shape import shape_of

    mesh = Mesh([Surface(BOX, FACES)], up="z", unit_in_meters=0.01)
    for points in (2, 2048):  # the extent of the surface, not that of the points drawn from it
        assert np.allclose(shape_of(Path("a.usd"), mesh, points).size, [0.01, 0.03, 0.02], rtol=1e-12)
    mesh.unit_in_meters = None
    assert shape_of(Path("a.usd"), mesh).size is None


def test_a_scene_takes_unit_and_axis_from_its_file(tmp_path):
    body = "\n".join("{:.3f} {:.3f} {:.3f} 0.5 255 128 0".format(*row) for row in CLOUD + 1)
    pose = "60\n1\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"
    (tmp_path / "room.ptx").write_text(pose + body)
    scene = read_scene(tmp_path / "room.ptx")
    assert scene.up == "z" and len(scene) == 60 and np.allclose(scene.colors, [1, 128 / 255, 0], atol=1e-3)
    assert np.allclose(np.ptp(scene.upright, axis=0), np.ptp(CLOUD, axis=0)[[0, 2, 1]], atol=2e-3)


def test_a_scene_keeps_vertices_with_instances(tmp_path):
    head = "ply\nformat ascii 1.0\nelement vertex 60\nproperty float x\nproperty float y\nproperty float z\nproperty float nx\nproperty float ny\nproperty float nz\nproperty uchar red\nproperty uchar green\nproperty uchar blue\nproperty int object_id\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    rows = "".join(
        "{:.3f} {:.3f} {:.3f} 0 0 1 255 128 0 {}\n".format(*row, index // 30)
        for index, row in enumerate(CLOUD)
    )
    (tmp_path / "a.ply").write_text(head + rows + "3 0 1 2\n")
    scene = read_scene(tmp_path / "a.ply", up="z", unit="m")
    assert scene.instance.tolist() == [0] * 30 + [1] * 30 and np.allclose(scene.points, CLOUD, atol=1e-3)
    assert np.allclose(scene.normals, [0, 0, 1]) and np.allclose(scene.colors, [1, 128 / 255, 0], atol=1e-3)


# numbers that are not what they seem


def test_colors_beyond_one_are_refused_by_the_model():
    model = cg3d.load("nano")
    points = torch.rand(2, 64, 6)
    vectors = model.encode_shape(points)
    for change in (lambda rgb: rgb * 255, lambda rgb: rgb - 0.5, lambda rgb: rgb * 1.1 + 0.2):
        wrong = points.clone()
        wrong[..., 3:] = change(wrong[..., 3:])
        with pytest.raises(InputError, match=r"rgb must lie in \[0, 1\], got .*divide by 255"):
            model.encode_shape(wrong)
    assert (
        torch.allclose(model.encode_shape(points), vectors)
        and model.encode_shape(points[..., :3]).shape == vectors.shape
    )


@pytest.mark.parametrize("offset", [[500_000, 5_400_000, 0], [-3e7, 0, 2e6]])
def test_map_coordinates_keep_their_form(offset):
    near, far = Shape(CLOUD), Shape(CLOUD + offset)
    assert far.points.dtype == np.float32 and len(np.unique(far.points[:, 1])) == 60
    assert torch.allclose(near.cloud(), far.cloud(), atol=1e-5)


def test_near_coordinates_and_float32_stay_as_they_are():
    assert (Shape(CLOUD).points == CLOUD.astype(np.float32)).all()
    far = (CLOUD + 50_000).astype(np.float32)
    assert (Shape(far).points == far).all()
    assert np.allclose(Shape((CLOUD * 1000).astype(np.int64) + 10**7).points.mean(0), 0, atol=1e-3)


def test_digits_are_words_in_a_collection(tmp_path):
    shapes = [
        Shape(CLOUD, name="007", category="02691156", id="0001"),
        Shape(CLOUD, name="1e5", category="02747177", id="2"),
    ]
    columns = pd.DataFrame(
        {"judged": [0, 1], "synset": ["02691156", "02747177"], "score": [0.5, 1.5], "zip": ["00", "10"]}
    )
    kept = write_collection(tmp_path / "c", shapes, n=32, columns=columns)
    assert [(shape.name, shape.category, shape.id) for shape in kept] == [
        ("007", "02691156", "0001"),
        ("1e5", "02747177", "2"),
    ]
    assert len(kept.select(category="02691156")) == 1 and len(kept.select(synset="02747177", judged=1)) == 1
    assert kept.table["score"].tolist() == [0.5, 1.5] and kept.table["zip"].tolist() == ["00", "10"]
    assert read_collection(tmp_path / "c").table["judged"].dtype.kind == "i"


def test_points_of_a_file_are_those_of_its_mesh(tmp_path):
    trimesh.creation.icosphere(2).export(tmp_path / "a.ply")
    xyz, colors = read_points(tmp_path / "a.ply", 100, seed=4)
    again, _ = read_mesh(tmp_path / "a.ply").sample(100, np.random.default_rng(4))
    assert (xyz == again).all() and colors is None
    with pytest.raises(Cg3dError, match="a.ply"):
        (tmp_path / "a.ply").write_text("ply\n")
        read_points(tmp_path / "a.ply")
