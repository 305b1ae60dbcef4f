"""Files in, shapes out: every format there and back, and what bad files say."""

import struct

import numpy as np
import pandas as pd
import pytest
import torch
import trimesh
from PIL import Image

from cg3d.core.untrusted import LIMITS
from cg3d.geometry.ops import MISSING_COLOR
from cg3d.io import collection
from cg3d.io import shape as shapes
from cg3d.io.color import to_linear

RED, BLUE = np.array([1.0, 0, 0]), np.array([0, 0, 1.0])


def two_color_box() -> trimesh.Trimesh:
    "A box 1 x 2 x 3 with its +x side red and the rest blue."
    mesh = trimesh.creation.box((1, 2, 3))
    mesh.visual.face_colors = np.where(mesh.face_normals[:, :1] > 0.9, [[255, 0, 0, 255]], [[0, 0, 255, 255]])
    return mesh


def colored_cloud(n=300) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    return generator.normal(size=(n, 3)).astype(np.float32), generator.integers(0, 256, (n, 3)).astype(
        np.uint8
    )


def write_pcd(path, xyz, rgb, form):
    packed = (rgb[:, 0].astype(np.uint32) << 16 | rgb[:, 1].astype(np.uint32) << 8 | rgb[:, 2]).view(
        np.float32
    )
    head = (
        f"# .PCD v0.7\nVERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F {'U' if form == 'ascii' else 'F'}\nCOUNT 1 1 1 1\n"
        f"WIDTH {len(xyz)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(xyz)}\nDATA {form}\n"
    ).encode()
    if form == "ascii":
        body = "\n".join(
            f"{x:.9g} {y:.9g} {z:.9g} {c}" for (x, y, z), c in zip(xyz, packed.view(np.uint32))
        ).encode()
    elif form == "binary":
        body = np.concatenate([xyz, packed[:, None]], 1).astype("<f4").tobytes()
    else:  # field by field, then LZF made of literal runs only
        raw = b"".join(column.astype("<f4").tobytes() for column in (*xyz.T, packed))
        runs = b"".join(bytes([len(raw[i : i + 32]) - 1]) + raw[i : i + 32] for i in range(0, len(raw), 32))
        body = struct.pack("<II", len(runs), len(raw)) + runs
    path.write_bytes(head + body)


@pytest.mark.parametrize("suffix", (".obj", ".ply", ".glb", ".gltf", ".stl", ".off"))
def test_mesh_formats(tmp_path, suffix):
    path = tmp_path / f"box{suffix}"
    mesh = two_color_box()
    if suffix == ".gltf":
        for name, data in trimesh.exchange.gltf.export_gltf(trimesh.Scene(mesh)).items():
            (tmp_path / (path.name if name == "model.gltf" else name)).write_bytes(data)
    else:
        mesh.export(path)
    shape = shapes.read_shape(path, points=3000, up="y")  # STL is z up otherwise
    assert shape.points.shape == (3000, 3) and shape.points.dtype == np.float32 and shape.name == "box"
    np.testing.assert_allclose(np.ptp(shape.points, axis=0), [1, 2, 3], atol=0.02)
    on_surface = np.isclose(np.abs(shape.points), [0.5, 1, 1.5], atol=1e-4).any(1)
    assert on_surface.all()
    area = np.isclose(shape.points[:, 0], 0.5, atol=1e-4).mean()
    assert area == pytest.approx(6 / 22, abs=0.03)  # the +x side has 6 of 22 units of area
    if suffix == ".ply":  # trimesh writes face colors into this one only
        red = shape.points[:, 0] > 0.4999
        np.testing.assert_allclose(shape.colors[red], np.tile(RED, (red.sum(), 1)), atol=0.01)
        np.testing.assert_allclose(shape.colors[~red], np.tile(BLUE, ((~red).sum(), 1)), atol=0.01)


def test_mesh_sampling_is_seeded(tmp_path):
    two_color_box().export(tmp_path / "a.ply")
    first, again, other = (shapes.read_shape(tmp_path / "a.ply", seed=s) for s in (0, 0, 1))
    assert (first.points == again.points).all() and not (first.points == other.points).all()


def test_obj_materials_and_texture(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)).save(
        tmp_path / "t.png"
    )  # left red, right blue
    (tmp_path / "a.mtl").write_text("newmtl pic\nKd 0.2 0.2 0.2\nmap_Kd t.png\nnewmtl flat\nKd 0 0.5 0\n")
    (tmp_path / "a.obj").write_text(
        "mtllib a.mtl\nv 0 0 0\nv 2 0 0\nv 2 1 0\nv 0 1 0\nv 5 0 0\nv 6 0 0\nv 6 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
        "usemtl pic\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\nusemtl flat\nf 5 6 7\n"
    )
    shape = shapes.read_shape(tmp_path / "a.obj")
    x = shape.points[:, 0]
    np.testing.assert_allclose(shape.colors[x < 0.99], np.tile(RED, ((x < 0.99).sum(), 1)))
    np.testing.assert_allclose(
        shape.colors[(x > 1.01) & (x < 3)], np.tile(BLUE, (((x > 1.01) & (x < 3)).sum(), 1))
    )
    np.testing.assert_allclose(shape.colors[x > 4], np.tile([0, 0.5, 0], ((x > 4).sum(), 1)), atol=0.003)


def test_obj_without_its_materials_is_uncolored(tmp_path):
    (tmp_path / "a.obj").write_text("mtllib gone.mtl\nusemtl x\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    shape = shapes.read_shape(tmp_path / "a.obj")
    assert shape.colors is None and (shape.cloud()[:, 3:] == MISSING_COLOR).all()


@pytest.mark.parametrize("textured", [False, True])
def test_gltf_factor_and_texture(tmp_path, textured):
    factor = [1.0, 0.214, 0.0, 1.0]  # linear light; 0.214 is 0.5 on a screen
    image = Image.fromarray(np.full((4, 4, 3), [255, 255, 255], np.uint8)) if textured else None
    mesh = trimesh.creation.box()
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=factor, baseColorTexture=image)
    mesh.visual = trimesh.visual.TextureVisuals(uv=mesh.vertices[:, :2] + 0.5, material=material)
    mesh.export(tmp_path / "a.glb")
    shape = shapes.read_shape(tmp_path / "a.glb", points=50)
    np.testing.assert_allclose(shape.colors, np.tile([1, 0.5, 0], (50, 1)), atol=0.01)
    assert shape.size == pytest.approx((1, 1, 1), abs=0.2)  # glTF is in meters


def test_gltf_scene_transforms(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(
        trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([0, 0, 0])
    )
    scene.add_geometry(
        trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([0, 9, 0])
    )
    scene.export(tmp_path / "s.glb")
    y = shapes.read_shape(tmp_path / "s.glb").points[:, 1]
    assert (
        y.max() == pytest.approx(9.5, abs=1e-3)
        and ((y < 0.6) | (y > 8.4)).all()
        and (y > 5).mean() == pytest.approx(0.5, abs=0.05)
    )


def test_vertex_colors_blend(tmp_path):
    mesh = trimesh.Trimesh(
        [[0, 0, 0], [1, 0, 0], [0, 1, 0]],
        [[0, 1, 2]],
        vertex_colors=[[255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 255, 255]],
        process=False,
    )
    mesh.export(tmp_path / "v.ply")
    shape = shapes.read_shape(tmp_path / "v.ply")
    # in linear light, as a renderer blends them
    np.testing.assert_allclose(to_linear(shape.colors[:, 1]), shape.points[:, 0], atol=1e-5)
    np.testing.assert_allclose(to_linear(shape.colors[:, 2]), shape.points[:, 1], atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "a.npy",
        "a.npz",
        "a.xyz",
        "comma.xyz",
        "header.xyz",
        "ascii.pcd",
        "binary.pcd",
        "binary_compressed.pcd",
        "a.ply",
    ],
)
def test_cloud_formats(tmp_path, name):
    xyz, rgb = colored_cloud()
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, np.concatenate([xyz, rgb / 255], 1))
    elif name == "a.npz":
        np.savez(path, points=xyz, colors=rgb)
    elif path.suffix == ".pcd":
        write_pcd(path, xyz, rgb, path.stem)
    elif name == "a.ply":
        trimesh.PointCloud(xyz, colors=np.c_[rgb, np.full(len(rgb), 255)]).export(path)
    else:
        np.savetxt(
            path,
            np.concatenate([xyz, rgb], 1),
            fmt="%.7g",
            delimiter="," if "comma" in name else " ",
            header="X Y Z R G B" if "header" in name else "",
            comments="//",
        )
    shape = shapes.read_shape(path, points=None)
    np.testing.assert_allclose(shape.points, xyz, atol=1e-5)
    np.testing.assert_allclose(shape.colors, rgb / 255, atol=1e-3)
    few = shapes.read_shape(path, points=100)
    assert len(few.points) == 100 and len(np.unique(few.points, axis=0)) == 100


def test_normals_are_no_colors(tmp_path):
    xyz, _ = colored_cloud()
    np.save(tmp_path / "n.npy", np.concatenate([xyz, -xyz], 1))
    assert shapes.read_shape(tmp_path / "n.npy").colors is None


def test_z_up_is_rotated_not_mirrored(tmp_path):
    spiral = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 5.0]])
    np.save(tmp_path / "z.npy", spiral)
    turned = shapes.read_shape(tmp_path / "z.npy", up="z").points

    def handedness(p):
        return np.linalg.det(p[1:] - p[0])

    assert handedness(turned) == pytest.approx(handedness(spiral)) and turned[3].tolist() == [0, 5, 0]
    assert (shapes.read_shape(tmp_path / "z.npy").points == spiral).all()
    with pytest.raises(ValueError, match="'x' is not one of"):
        shapes.read_shape(tmp_path / "z.npy", up="x")


def test_far_from_the_origin_keeps_its_form(tmp_path):
    xyz, _ = colored_cloud()
    np.savetxt(tmp_path / "near.xyz", xyz, fmt="%.6f")
    np.savetxt(tmp_path / "far.xyz", xyz.astype(np.float64) + 5e6, fmt="%.6f")
    near, far = (shapes.read_shape(tmp_path / name).cloud() for name in ("near.xyz", "far.xyz"))
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)


def test_pcd_missing_pixels_are_left_out(tmp_path):
    xyz, rgb = colored_cloud()
    xyz[:20] = np.nan
    write_pcd(tmp_path / "depth.pcd", xyz, rgb, "binary")
    shape = shapes.read_shape(tmp_path / "depth.pcd", points=None)
    np.testing.assert_array_equal(shape.points, xyz[20:])
    np.testing.assert_allclose(shape.colors, rgb[20:] / 255, atol=1e-6)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.obj", b"", "empty"),
        ("a.obj", b"# nothing\n", "no faces and no points"),
        ("a.glb", b"glTF but not really", "a.glb"),
        ("a.ply", b"\x00" * 100, "no PLY header"),
        ("a.stl", b"solid x\nendsolid x\n", "a.stl"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n", "a.off"),
        ("a.npy", b"not numpy", "a.npy: no numpy array"),
        ("a.npz", b"PK not zip", "cannot be read as an archive"),
        ("a.pcd", b"hello\n", "no PCD header"),
        ("a.xyz", b"C H O\n", "no row of at least three numbers"),
        ("a.xyz", b"1 2 3\n4 five 6\n", "not made of numbers"),
        ("a.xyz", b"1 2 3\n", "at least two"),
        ("a.xyz", b"1 2 3\n1 2 3\n1 2 3\n", "equal"),
        ("a.xyz", b"1 2 3\nnan 5 6\n", "NaN"),
        ("a.dwg", b"x", "unknown suffix '.dwg'"),
        ("a.obj", b"v 0 0 0\nv 1 1 1\nv 2 2 2\nf 1 2 3\n", "no area"),
        ("a.obj", b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "a.obj"),
        ("a.gltf", b"{}", "a.gltf"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        shapes.read_shape(tmp_path / name)
    assert name in str(caught.value)


def test_missing_and_pickled_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.glb"):
        shapes.read_shape(tmp_path / "none.glb")
    np.save(tmp_path / "p.npy", np.array([{"xyz": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="p.npy"):
        shapes.read_shape(tmp_path / "p.npy")


def test_nan_mesh_vertices(tmp_path):
    mesh = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]], [[0, 1, 2]], process=False)
    mesh.export(tmp_path / "n.stl")
    with pytest.raises(ValueError, match="NaN"):
        shapes.read_shape(tmp_path / "n.stl")


def test_huge_cloud_is_read_up_to_the_limit_and_refused_above(tmp_path):
    rows = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float16, (LIMITS.points, 3))
    rows[::1000] = np.arange(LIMITS.points // 1000)[:, None] % 7
    del rows
    assert shapes.read_shape(tmp_path / "big.npy").points.shape == (2048, 3)
    np.lib.format.open_memmap(tmp_path / "over.npy", "w+", np.float16, (LIMITS.points + 1, 3))
    with pytest.raises(ValueError, match="10,000,001 points, more than the 10,000,000"):
        shapes.read_shape(tmp_path / "over.npy")
    head = b"ply\nformat binary_little_endian 1.0\nelement vertex %d\nproperty float x\nproperty float y\nproperty float z\nelement face %d\nproperty list uchar int vertex_indices\nend_header\n"
    (tmp_path / "over.ply").write_bytes(head % (9, LIMITS.faces + 1))
    with pytest.raises(ValueError, match="5,000,001 faces"):
        shapes.read_shape(tmp_path / "over.ply")


def test_shape_refuses_what_cannot_be_a_shape():
    for points, says in (
        ([[0, 0, 0]], "at least two"),
        (np.zeros((5, 3)), "equal"),
        (np.zeros((5, 6)), r"\(N, 3\)"),
        ([[0, 0, 0], [0, np.inf, 0]], "NaN"),
    ):
        with pytest.raises(ValueError, match=says):
            shapes.Shape(points, name="bad")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        shapes.Shape(np.eye(3), np.full((3, 3), 2.0))
    cloud = shapes.Shape(np.eye(3)).cloud(7)
    assert (
        cloud.shape == (7, 6)
        and cloud.dtype == torch.float32
        and cloud[:, :3].norm(dim=1).max() == pytest.approx(1)
    )


def small_collection(tmp_path):
    generator = np.random.default_rng(0)
    made = [
        shapes.Shape(
            generator.normal(size=(64, 3)),
            generator.random((64, 3)) if i else None,
            name=name,
            tags=("a", "b"),
            size=(1, 2, 3),
            id=f"k/{i}",
            source="s",
        )
        for i, name in enumerate(["null", "chair", "chair"])
    ]
    columns = pd.DataFrame({"split": ["train", "train", "test"], "judged": [0, 1, 1]})
    return made, collection.write_collection(tmp_path / "c", made, n=64, columns=columns)


def test_collection_round_trip(tmp_path):
    made, kept = small_collection(tmp_path)
    first = (tmp_path / "c.npz").read_bytes(), (tmp_path / "c.csv").read_bytes()
    small_collection(tmp_path)
    assert first == ((tmp_path / "c.npz").read_bytes(), (tmp_path / "c.csv").read_bytes())  # byte for byte
    assert (
        len(kept) == 3
        and kept[0].name == "null"
        and kept[0].tags == ("a", "b")
        and kept[1].size == (1, 2, 3)
        and kept[0].colors is None
    )
    for shape, row in zip(made, kept.points()):
        torch.testing.assert_close(row, shape.cloud(64), atol=3e-3, rtol=0)
    test = kept.select(split="test", judged=1)
    assert len(test) == 1 and test[0].id == "k/2"
    torch.testing.assert_close(test.points()[0], kept.points([2])[0])
    assert kept.points(n=16).shape == (3, 16, 6) and kept.points([0], n=100).shape == (1, 100, 6)
    with pytest.raises(ValueError, match="no row has split='tset'"):
        kept.select(split="tset")
    with pytest.raises(ValueError, match="no column 'spilt'"):
        kept.select(spilt="test")


def test_collection_takes_texts_from_beside(tmp_path):
    small_collection(tmp_path)
    table = pd.read_csv(tmp_path / "c.csv", keep_default_na=False).drop(columns=["caption", "query"])
    table.assign(id=["k/0", "k/1", "k/1"]).to_csv(tmp_path / "c.csv", index=False)
    pd.DataFrame(
        {
            "id": ["k/1", "k/1", "k/0"],
            "source": "s",
            "caption": ["one", "two", "nought"],
            "query": ["q1", "", "q0"],
        }
    ).to_csv(tmp_path / "captions.csv", index=False)
    kept = collection.read_collection(tmp_path / "c.npz")
    assert kept.table["caption"].tolist() == ["nought", "one", "two"] and kept[2].query == ""


def test_collection_is_lazy_and_checks_itself(tmp_path):
    small_collection(tmp_path)
    np.savez(
        tmp_path / "c.npz",
        points=np.zeros((2, 4, 3), np.int16),
        colors=np.zeros((2, 4, 3), np.uint8),
        has_color=np.ones(2, bool),
    )
    kept = collection.read_collection(tmp_path / "c")  # geometry is not opened yet
    with pytest.raises(ValueError, match="2 shapes but 3 rows"):
        kept.points()
    with pytest.raises(FileNotFoundError, match="none.npz"):
        collection.read_collection(tmp_path / "none")
