"""Reading glTF 2.0: every file is written here, and its extent and color are known."""

import base64
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from gltf_writer import BOX, FACES, Gltf, picture
from mesh_checks import extent
from PIL import Image

from cg3d.core.errors import Cg3dError, InputError, MissingPackage, UnsafeFile
from cg3d.core.untrusted import limits
from cg3d.io.gltf import read_gltf

RED = (255, 0, 0)
UV = np.full((8, 2), 0.5)
# a KTX 2 picture (UASTC) of 4 x 4 red pixels, encoded by alktx2 0.1.7
KTX2 = base64.b64decode(
    "q0tUWCAyMLsNChoKAAAAAAEAAAAEAAAABAAAAAAAAAAAAAAAAQAAAAEAAAAAAAAAaAAAACwAAACUAAAALAAAAAAAAAAAAAAAAAAA"
    "AAAAAADAAAAAAAAAABAAAAAAAAAAEAAAAAAAAAAsAAAAAAAAAAIAKACmAQIAAwMAABAAAAAAAAAAAAB/AAAAAAAAAAAA/////x8A"
    "AABLVFh3cml0ZXIAQmFzaXMgVW5pdmVyc2FsIDIuMTAAAAQAAAB/fwAA9x8A4B96AAAAAAAAAAAAAA=="
)


def color(mesh) -> list[float] | None:
    "The mean color of the surface, None where nothing is known of it."
    xyz, colors = mesh.sample(2048, np.random.default_rng(0))
    assert len(xyz) == 2048
    return None if colors is None else np.nanmean(colors, 0).round(3).tolist()


def area(mesh) -> float:
    corners = np.concatenate([surface.vertices[surface.faces] for surface in mesh.surfaces])
    return float(
        np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum()
        / 2
    )


# geometry


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
@pytest.mark.parametrize("suffix", [".glb", ".gltf"])
def test_indices_of_every_type(tmp_path, dtype, suffix):
    gltf = Gltf()
    primitive = gltf.box()
    primitive["indices"] = gltf.accessor(FACES.ravel(), dtype)
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / f"x{suffix}"))
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == 12 and area(mesh) == pytest.approx(22)
    assert mesh.up == "y" and mesh.unit_in_meters == 1 and color(mesh) is None and not mesh.warnings


def test_a_glb_is_known_by_its_content(tmp_path):
    gltf = Gltf()
    path = gltf.scene({"mesh": gltf.mesh(gltf.box())}).write(tmp_path / "x.glb")
    assert extent(read_gltf(path.rename(tmp_path / "x.gltf"))) == [1, 2, 3]


def test_without_indices(tmp_path):
    gltf = Gltf()
    primitive = {"attributes": {"POSITION": gltf.accessor(BOX[FACES].reshape(-1, 3))}}
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == 12


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("mode, faces", [(4, 1), (5, 3), (6, 3)])
def test_triangles_strips_and_fans(tmp_path, mode, faces, indexed):
    corners = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 2, 0]] if mode != 6 else None
    corners = corners or [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [-1, 1, 0]]
    gltf = Gltf()
    primitive = {"attributes": {"POSITION": gltf.accessor(corners)}, "mode": mode}
    if indexed:
        primitive["indices"] = gltf.accessor(np.arange(5), "u1")
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert mesh.face_count == faces and area(mesh) == pytest.approx(0.5 * faces)


def test_points_with_linear_colors(tmp_path):
    gltf = Gltf()
    colors = gltf.accessor(np.full((8, 4), 128), "u1", normalized=True)
    primitive = {"attributes": {"POSITION": gltf.accessor(BOX), "COLOR_0": colors}, "mode": 0}
    mesh = read_gltf(
        gltf.scene({"mesh": gltf.mesh(primitive), "translation": [5, 0, 0]}).write(tmp_path / "x.glb")
    )
    assert mesh.points[:, 0].tolist() == [5] * 4 + [6] * 4
    assert mesh.point_colors == pytest.approx(np.full((8, 3), 0.7367), abs=1e-3)


def test_points_beside_faces_are_told(tmp_path):
    gltf = Gltf()
    points = {"attributes": {"POSITION": gltf.accessor(BOX * 9)}, "mode": 0}
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(gltf.box(), points)}).write(tmp_path / "x.glb"))
    assert extent(mesh) == [1, 2, 3] and "8 points" in mesh.warnings[0]


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_lines_alone_are_no_surface(tmp_path, mode):
    gltf = Gltf()
    lines = {"attributes": {"POSITION": gltf.accessor(BOX)}, "mode": mode}
    path = gltf.scene({"mesh": gltf.mesh(lines)}).write(tmp_path / "x.glb")
    with pytest.raises(InputError, match="no faces and no points"):
        read_gltf(path)
    gltf.json["meshes"][0]["primitives"].append(gltf.box())
    assert extent(read_gltf(gltf.write(path))) == [1, 2, 3]


def test_interleaved_attributes(tmp_path):
    gltf = Gltf()
    rows = np.zeros(8, [("p", "<f4", 3), ("c", "u1", 4), ("t", "<f4", 2)])
    rows["p"], rows["c"], rows["t"] = BOX, (255, 0, 0, 255), 0.5
    view = gltf.view(rows.tobytes(), byteStride=24)
    position = gltf.entry(
        "accessors", {"bufferView": view, "componentType": 5126, "count": 8, "type": "VEC3"}
    )
    shared = {"bufferView": view, "byteOffset": 12, "componentType": 5121, "normalized": True, "count": 8}
    primitive = gltf.box(COLOR_0=gltf.entry("accessors", shared | {"type": "VEC4"}))
    primitive["attributes"]["POSITION"] = position
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert extent(mesh) == [1, 2, 3] and color(mesh) == [1, 0, 0]


@pytest.mark.parametrize("with_view", [True, False])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_sparse_accessors(tmp_path, with_view, dtype):
    gltf = Gltf()
    base, places = (
        (BOX * [1, 1, 0], np.flatnonzero(BOX[:, 2])) if with_view else (None, np.flatnonzero(BOX.any(1)))
    )
    sparse = {
        "count": len(places),
        "indices": {
            "bufferView": gltf.view(places.astype(f"<{dtype}").tobytes()),
            "componentType": {"u1": 5121, "u2": 5123, "u4": 5125}[dtype],
        },
        "values": {"bufferView": gltf.view(BOX[places].astype("<f4").tobytes())},
    }
    primitive = gltf.box()
    if with_view:
        primitive["attributes"]["POSITION"] = gltf.accessor(base, sparse=sparse)
    else:
        entry = {"componentType": 5126, "count": 8, "type": "VEC3", "sparse": sparse}
        primitive["attributes"]["POSITION"] = gltf.entry("accessors", entry)
    assert extent(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2"])
def test_quantized_positions_of_two_nodes(tmp_path, dtype):
    top = np.iinfo(dtype).max
    gltf = Gltf(extensionsRequired=["KHR_mesh_quantization"])
    primitive = gltf.box()
    primitive["attributes"]["POSITION"] = gltf.accessor(
        np.rint(BOX / [1, 2, 3] * top), dtype, normalized=True
    )
    node = {"mesh": gltf.mesh(primitive), "scale": [1, 2, 3]}
    mesh = read_gltf(gltf.scene(node, node | {"translation": [10, 0, 0]}).write(tmp_path / "x.glb"))
    assert extent(mesh) == [11, 2, 3]


def test_integers_that_are_not_normalized_stay_what_they_are(tmp_path):
    gltf = Gltf(extensionsRequired=["KHR_mesh_quantization"])
    primitive = gltf.box()
    primitive["attributes"]["POSITION"] = gltf.accessor(BOX * 100 - 50, "i2")
    mesh = read_gltf(
        gltf.scene({"mesh": gltf.mesh(primitive), "scale": [0.01] * 3}).write(tmp_path / "x.glb")
    )
    assert extent(mesh) == [1, 2, 3] and mesh.bounds[0].round(3).tolist() == [-0.5] * 3


def test_a_large_array_shared_by_small_primitives_is_not_copied(tmp_path):
    gltf = Gltf()
    position = gltf.accessor(np.tile(BOX, (5000, 1)))
    indices = [gltf.accessor((FACES + 8 * i).ravel(), "u4") for i in range(20)]
    primitives = [{"attributes": {"POSITION": position}, "indices": index} for index in indices]
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(*primitives)}).write(tmp_path / "x.glb"))
    assert extent(mesh) == [1, 2, 3] and [len(surface.vertices) for surface in mesh.surfaces] == [8] * 20


# nodes and scenes


def test_matrix_and_its_parts_agree(tmp_path):
    half = np.sqrt(0.5)
    parts = {"translation": [1, 2, 3], "rotation": [half, 0, 0, half], "scale": [1, 2, 0.5]}
    matrix = [1, 0, 0, 0, 0, 0, 2, 0, 0, -0.5, 0, 0, 1, 2, 3, 1]
    for node in (parts, {"matrix": matrix}):
        gltf = Gltf()
        mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(gltf.box())} | node).write(tmp_path / "x.glb"))
        assert mesh.bounds.round(5).tolist() == [[1, 0.5, 3], [2, 2, 7]]


def test_mirrored_and_nested_nodes(tmp_path):
    gltf = Gltf()
    box = gltf.mesh(gltf.box())
    gltf.json["nodes"] = [
        {"children": [1], "scale": [-2, 1, 1]},
        {"children": [2], "translation": [5, 0, 0]},
        {"mesh": box, "translation": [0, 1, 0]},
    ]
    gltf.json["scenes"] = [{"nodes": [0]}]
    assert read_gltf(gltf.write(tmp_path / "x.glb")).bounds.tolist() == [[-12, 1, 0], [-10, 3, 3]]


@pytest.mark.parametrize("kind", ["camera", "light", "empty"])
def test_a_mesh_below_a_node_of_another_kind(tmp_path, kind):
    gltf = Gltf(cameras=[{"type": "perspective", "perspective": {"yfov": 1, "znear": 0.1}}])
    box = gltf.mesh(gltf.box())
    above = {
        "camera": {"camera": 0},
        "light": {"extensions": {"KHR_lights_punctual": {"light": 0}}},
        "empty": {},
    }
    gltf.json["nodes"] = [
        {"mesh": box},
        above[kind] | {"children": [2], "translation": [5, 0, 0]},
        {"mesh": box},
    ]
    gltf.json["scenes"] = [{"nodes": [0, 1]}]
    assert extent(read_gltf(gltf.write(tmp_path / "x.glb"))) == [6, 2, 3]


@pytest.mark.parametrize("scene, wanted", [(0, 1), (1, 20), (None, 1)])
def test_the_scene_that_is_shown(tmp_path, scene, wanted):
    gltf = Gltf()
    box = gltf.mesh(gltf.box())
    gltf.scene({"mesh": box}).scene({"mesh": box, "scale": [20, 1, 1]})
    gltf.json["scene"] = scene
    if scene is None:
        del gltf.json["scene"]
    assert extent(read_gltf(gltf.write(tmp_path / "x.glb")))[0] == wanted


def test_without_scenes_all_roots_are_shown(tmp_path):
    gltf = Gltf()
    box = gltf.mesh(gltf.box())
    gltf.json["nodes"] = [{"mesh": box}, {"children": [2], "translation": [4, 0, 0]}, {"mesh": box}]
    assert extent(read_gltf(gltf.write(tmp_path / "x.glb"))) == [5, 2, 3]


def test_hidden_nodes(tmp_path):
    gltf = Gltf(extensionsUsed=["KHR_node_visibility"])
    box = gltf.mesh(gltf.box())
    hidden = {"extensions": {"KHR_node_visibility": {"visible": False}}}
    gltf.json["nodes"] = [{"mesh": box}, hidden | {"children": [2]}, {"mesh": box, "translation": [9, 0, 0]}]
    gltf.json["scenes"] = [{"nodes": [0, 1]}]
    assert extent(read_gltf(gltf.write(tmp_path / "x.glb"))) == [1, 2, 3]


def test_a_chain_of_many_nodes(tmp_path):
    gltf = Gltf()
    box = gltf.mesh(gltf.box())
    gltf.json["nodes"] = [{"children": [i + 1], "translation": [1, 0, 0]} for i in range(5000)] + [
        {"mesh": box}
    ]
    gltf.json["scenes"] = [{"nodes": [0]}]
    assert read_gltf(gltf.write(tmp_path / "x.glb")).bounds[0, 0] == 5000


# skins, morphs, instances


def skinned(gltf: Gltf, weights: np.ndarray, joints: np.ndarray, dtype: str = "f4", **skin) -> Gltf:
    "The box with two joints: the first at rest, the second 4 higher."
    attributes = {"JOINTS_0": gltf.accessor(joints, "u1")}
    attributes["WEIGHTS_0"] = gltf.accessor(weights, dtype, **({"normalized": True} if dtype != "f4" else {}))
    box = gltf.mesh(gltf.box(**attributes))
    gltf.json["nodes"] = [
        {"mesh": box, "skin": 0, "translation": [100, 0, 0]},  # the node's own place plays no part
        {"translation": [0, 1, 0], "children": [2]},
        {"translation": [0, 4, 0]},
    ]
    rest = np.tile(np.eye(4), (2, 1, 1))
    rest[:, 3, 1] = -1  # column by column: the inverse of 1 upward
    inverse = gltf.accessor(rest.reshape(2, 16))
    gltf.json["skins"] = [{"joints": [1, 2], "inverseBindMatrices": inverse} | skin]
    gltf.json["scenes"] = [{"nodes": [0, 1]}]
    return gltf


def one_joint(joint: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile([1, 0, 0, 0], (8, 1)), np.tile([joint, 0, 0, 0], (8, 1))


@pytest.mark.parametrize("dtype, top", [("f4", 1), ("u1", 255), ("u2", 65535), ("f4", 0.25)])
def test_a_skin_in_its_pose_at_rest(tmp_path, dtype, top):
    weights, joints = one_joint(1)
    mesh = read_gltf(skinned(Gltf(), weights * top, joints, dtype).write(tmp_path / "x.glb"))
    assert mesh.bounds.tolist() == [[0, 4, 0], [1, 6, 3]]


def test_a_vertex_between_two_joints(tmp_path):
    weights = np.tile([0.5, 0.5, 0, 0], (8, 1))
    mesh = read_gltf(skinned(Gltf(), weights, np.tile([0, 1, 0, 0], (8, 1))).write(tmp_path / "x.glb"))
    assert mesh.bounds.tolist() == [[0, 2, 0], [1, 4, 3]]


def test_a_skin_without_weight_follows_its_first_joint(tmp_path):
    mesh = read_gltf(skinned(Gltf(), np.zeros((8, 4)), one_joint(1)[1]).write(tmp_path / "x.glb"))
    assert mesh.bounds[0].tolist() == [0, 4, 0]


def test_eight_influences(tmp_path):
    gltf = skinned(Gltf(), np.tile([0.5, 0, 0, 0], (8, 1)), one_joint(0)[1])
    attributes = gltf.json["meshes"][0]["primitives"][0]["attributes"]
    attributes["JOINTS_1"] = gltf.accessor(one_joint(1)[1], "u1")
    attributes["WEIGHTS_1"] = gltf.accessor(np.tile([0.5, 0, 0, 0], (8, 1)))
    assert read_gltf(gltf.write(tmp_path / "x.glb")).bounds.tolist() == [[0, 2, 0], [1, 4, 3]]


def test_a_skin_without_inverse_bind_matrices(tmp_path):
    gltf = skinned(Gltf(), *one_joint(1))
    del gltf.json["skins"][0]["inverseBindMatrices"]
    assert read_gltf(gltf.write(tmp_path / "x.glb")).bounds.tolist() == [[0, 5, 0], [1, 7, 3]]


def test_joints_outside_of_the_scene(tmp_path):
    gltf = skinned(Gltf(), *one_joint(1))
    gltf.json["scenes"] = [{"nodes": [0]}]
    assert read_gltf(gltf.write(tmp_path / "x.glb")).bounds[0].tolist() == [0, 4, 0]


@pytest.mark.parametrize("where, wanted", [("mesh", 2), ("node", 3), ("none", 1), ("zero", 1)])
@pytest.mark.parametrize("sparse", [True, False])
def test_morph_targets(tmp_path, where, wanted, sparse):
    gltf = Gltf()
    move = BOX * [1, 0, 0]
    if sparse:
        places = np.flatnonzero(move.any(1)).astype("<u2")
        parts = {
            "count": len(places),
            "indices": {"bufferView": gltf.view(places.tobytes()), "componentType": 5123},
        }
        parts["values"] = {"bufferView": gltf.view(move[places].astype("<f4").tobytes())}
        target = gltf.entry("accessors", {"componentType": 5126, "count": 8, "type": "VEC3", "sparse": parts})
    else:
        target = gltf.accessor(move)
    weights = {"mesh": {"weights": [1]}, "node": {"weights": [1]}, "none": {}, "zero": {"weights": [0]}}[
        where
    ]
    box = gltf.mesh(gltf.box() | {"targets": [{"POSITION": target}]}, **weights)
    node = {"mesh": box} | ({"weights": [2]} if where == "node" else {})
    assert extent(read_gltf(gltf.scene(node).write(tmp_path / "x.glb"))) == [wanted, 2, 3]


def test_a_morph_of_colors_and_texture_coordinates(tmp_path):
    gltf = Gltf()
    target = {"COLOR_0": gltf.accessor(np.tile([1.0, -1, 0], (8, 1)))}
    primitive = gltf.box(COLOR_0=gltf.accessor(np.tile([0, 1.0, 0], (8, 1)))) | {"targets": [target]}
    assert color(
        read_gltf(gltf.scene({"mesh": gltf.mesh(primitive, weights=[1])}).write(tmp_path / "x.glb"))
    ) == [1, 0, 0]


def instanced(gltf: Gltf, **attributes: int) -> dict:
    return {
        "mesh": gltf.mesh(gltf.box()),
        "extensions": {"EXT_mesh_gpu_instancing": {"attributes": attributes}},
    }


def test_instances(tmp_path):
    gltf = Gltf(extensionsRequired=["EXT_mesh_gpu_instancing"])
    places = gltf.accessor([[0, 0, 0], [10, 0, 0], [20, 0, 0]])
    mesh = read_gltf(
        gltf.scene(instanced(gltf, TRANSLATION=places) | {"scale": [2, 1, 1]}).write(tmp_path / "x.glb")
    )
    assert (
        extent(mesh) == [42, 2, 3]
        and mesh.face_count == 36
        and area(mesh) == pytest.approx(3 * 2 * (4 + 6 + 6))
    )


@pytest.mark.parametrize("dtype", ["f4", "i1", "i2"])
def test_instances_that_are_turned_and_scaled(tmp_path, dtype):
    turned = np.array([[0, 0, 0, 1], [0, 0, 1, 0]]) * (1 if dtype == "f4" else np.iinfo(dtype).max)
    gltf = Gltf()
    rotation = gltf.accessor(turned, dtype, **({} if dtype == "f4" else {"normalized": True}))
    node = instanced(gltf, ROTATION=rotation, SCALE=gltf.accessor([[1, 1, 1], [3, 1, 1]]))
    mesh = read_gltf(gltf.scene(node).write(tmp_path / "x.glb"))
    assert mesh.bounds.round(4).tolist() == [[-3, -2, 0], [1, 2, 3]]


# colors


@pytest.mark.parametrize("dtype", ["f4", "u1", "u2"])
@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("below", ["nothing", "material", "factor", "texture"])
def test_vertex_colors_are_linear_and_multiplied(tmp_path, dtype, width, below):
    top = 1 if dtype == "f4" else np.iinfo(dtype).max
    gltf = Gltf()
    values = np.tile([top, 0.5 * top, 0, top][:width], (8, 1))
    if dtype == "u1" and width == 3:  # rows of three bytes are aligned to four
        padded = np.zeros((8, 4), np.uint8)
        padded[:, :3] = values
        view = gltf.view(padded.tobytes(), byteStride=4)
        entry = {"bufferView": view, "componentType": 5121, "normalized": True, "count": 8, "type": "VEC3"}
        colors = gltf.entry("accessors", entry)
    else:
        colors = gltf.accessor(values, dtype, **({} if dtype == "f4" else {"normalized": True}))
    material = {
        "nothing": lambda: None,
        "material": lambda: gltf.entry("materials", {"name": "white"}),
        "factor": lambda: gltf.entry(
            "materials", {"pbrMetallicRoughness": {"baseColorFactor": [1, 1, 1, 1]}}
        ),
        "texture": lambda: gltf.textured(picture((255, 255, 255))),
    }[below]()
    primitive = gltf.box(material, COLOR_0=colors, TEXCOORD_0=gltf.accessor(UV))
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert color(mesh) == pytest.approx([1, 0.735, 0], abs=2e-3)


def test_factor_texture_and_vertex_color_are_one_product(tmp_path):
    gltf = Gltf()
    material = gltf.textured(picture((188, 188, 188)))  # linear 0.503
    gltf.json["materials"][material]["pbrMetallicRoughness"]["baseColorFactor"] = [0.5, 1, 0, 1]
    primitive = gltf.box(material, COLOR_0=gltf.accessor(np.full((8, 3), 0.5)), TEXCOORD_0=gltf.accessor(UV))
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert color(mesh) == pytest.approx([0.390, 0.539, 0], abs=1e-3)  # sRGB of 0.1257 and 0.2514


def test_colors_of_two_materials(tmp_path):
    gltf = Gltf()
    for factor in ([1, 0, 0, 1], [0, 0, 1, 1]):
        gltf.entry("materials", {"pbrMetallicRoughness": {"baseColorFactor": factor}})
    boxes = [{"mesh": gltf.mesh(gltf.box(i)), "translation": [10 * i, 0, 0]} for i in range(2)]
    xyz, colors = read_gltf(gltf.scene(*boxes).write(tmp_path / "x.glb")).sample(
        1000, np.random.default_rng(0)
    )
    left = xyz[:, 0] < 5
    assert left.mean() == pytest.approx(0.5, abs=0.01)
    assert np.allclose(colors[left], [1, 0, 0]) and np.allclose(colors[~left], [0, 0, 1])


@pytest.mark.parametrize(
    "extension", ["KHR_materials_unlit", "KHR_materials_clearcoat", "KHR_materials_sheen"]
)
def test_extensions_of_materials_leave_the_base_color(tmp_path, extension):
    gltf = Gltf(extensionsRequired=[extension])
    color_of = {"pbrMetallicRoughness": {"baseColorFactor": [1, 0, 0, 1]}, "extensions": {extension: {}}}
    primitive = gltf.box(gltf.entry("materials", color_of))
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [1, 0, 0]


def test_variants_show_the_default(tmp_path):
    gltf = Gltf(extensionsUsed=["KHR_materials_variants"])
    for factor in ([1, 0, 0, 1], [0, 0, 1, 1]):
        gltf.entry("materials", {"pbrMetallicRoughness": {"baseColorFactor": factor}})
    variant = {"extensions": {"KHR_materials_variants": {"mappings": [{"material": 1, "variants": [0]}]}}}
    primitive = gltf.box(0) | variant
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [1, 0, 0]


@pytest.mark.parametrize("textured", [True, False])
def test_specular_glossiness_gives_its_diffuse_color(tmp_path, textured):
    gltf = Gltf(extensionsRequired=["KHR_materials_pbrSpecularGlossiness"])
    older = {"diffuseFactor": [1, 0, 0, 1]}
    if textured:
        image = gltf.entry("images", {"bufferView": gltf.view(picture((255, 255, 0)))})
        older["diffuseTexture"] = {"index": gltf.entry("textures", {"source": image})}
    material = {"extensions": {"KHR_materials_pbrSpecularGlossiness": older}}
    primitive = gltf.box(gltf.entry("materials", material), TEXCOORD_0=gltf.accessor(UV))
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [1, 0, 0]


def test_large_specular_textures_take_bounded_memory(tmp_path):
    gltf = Gltf()
    image = Image.new("P", (4000, 4000), 0)
    image.putpalette([255, 0, 0] + [0] * 765)
    image.save(tmp_path / "p.png", optimize=True)
    data = (tmp_path / "p.png").read_bytes()
    older = {}
    for key in ("diffuseTexture", "specularGlossinessTexture"):
        number = gltf.entry("images", {"bufferView": gltf.view(data)})
        older[key] = {"index": gltf.entry("textures", {"source": number})}
    material = gltf.entry("materials", {"extensions": {"KHR_materials_pbrSpecularGlossiness": older}})
    primitive = gltf.box(material, TEXCOORD_0=gltf.accessor(UV))
    path = gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb")
    code = (
        "import resource, sys, numpy as np; from cg3d.io.gltf import read_gltf; from PIL import Image;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "xyz, colors = read_gltf(sys.argv[1]).sample(100, np.random.default_rng(0));"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, *colors.mean(0))"
    )
    command = [sys.executable, "-c", code, str(path)]
    mebibytes, *mean = map(
        float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    )
    assert mean == pytest.approx([1, 0, 0]) and mebibytes < 250


# textures


@pytest.mark.parametrize(
    "data, wanted",
    [
        (picture(RED), [1, 0, 0]),
        (picture(RED, "JPEG", quality=100), [1, 0, 0]),
        (picture(RED, "BMP"), [1, 0, 0]),
        (picture((255, 0, 0, 0), mode="RGBA"), [1, 0, 0]),
        (picture((0, 255, 255, 0), "JPEG", "CMYK", quality=100), [1, 0, 0]),
        (picture(64, mode="L"), [0.251] * 3),
        (picture((64, 128), mode="LA"), [0.251] * 3),
        (picture(1, mode="1"), [1, 1, 1]),
        (picture(np.full((4, 4), 16448, np.uint16)), [0.251] * 3),
    ],
)
def test_pictures_of_every_kind(tmp_path, data, wanted):
    gltf = Gltf()
    primitive = gltf.box(gltf.textured(data), TEXCOORD_0=gltf.accessor(UV))
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert color(mesh) == pytest.approx(wanted, abs=5e-3) and not mesh.warnings


def test_a_picture_of_16_bit_colors(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">3H", 65535, 32896, 0) * 2
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")
    gltf = Gltf()
    primitive = gltf.box(gltf.textured(png), TEXCOORD_0=gltf.accessor(UV))
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert color(mesh) == pytest.approx([1, 0.502, 0], abs=5e-3)


def test_a_palette_picture(tmp_path):
    image = Image.new("P", (8, 8), 3)
    image.putpalette([9, 9, 9] * 3 + [255, 0, 0])
    image.save(tmp_path / "p.png")
    gltf = Gltf()
    primitive = gltf.box(gltf.textured((tmp_path / "p.png").read_bytes()), TEXCOORD_0=gltf.accessor(UV))
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [1, 0, 0]


def test_webp(tmp_path):
    gltf = Gltf(extensionsRequired=["EXT_texture_webp"])
    image = gltf.entry("images", {"bufferView": gltf.view(picture(RED, "WEBP", lossless=True))})
    material = gltf.textured(None, {"extensions": {"EXT_texture_webp": {"source": image}}})
    primitive = gltf.box(material, TEXCOORD_0=gltf.accessor(UV))
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [1, 0, 0]


def basisu(gltf: Gltf, data: bytes, **texture) -> Gltf:
    image = gltf.entry("images", {"bufferView": gltf.view(data), "mimeType": "image/ktx2"})
    material = gltf.textured(None, {"extensions": {"KHR_texture_basisu": {"source": image}}} | texture)
    primitive = gltf.box(material, TEXCOORD_0=gltf.accessor(UV))
    return gltf.scene({"mesh": gltf.mesh(primitive)})


def test_basis_universal(tmp_path):
    pytest.importorskip("opengl_basisu")
    gltf = basisu(Gltf(extensionsRequired=["KHR_texture_basisu"]), KTX2)
    assert color(read_gltf(gltf.write(tmp_path / "x.glb"))) == [1, 0, 0]


@pytest.mark.parametrize("data", [KTX2[:-20], picture(RED), b""])
def test_a_broken_basis_universal_picture_is_told(tmp_path, data):
    mesh = read_gltf(basisu(Gltf(), data).write(tmp_path / "x.glb"))
    assert color(mesh) is None and "the texture" in mesh.warnings[0]


def test_basis_universal_without_its_decoder_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opengl_basisu", None)
    mesh = read_gltf(basisu(Gltf(), KTX2).write(tmp_path / "x.glb"))
    assert color(mesh) is None and "opengl_basisu" in mesh.warnings[0]


def test_the_plain_picture_is_read_where_basis_universal_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opengl_basisu", None)
    gltf = Gltf()
    plain = gltf.entry("images", {"bufferView": gltf.view(picture((0, 0, 255)))})
    mesh = read_gltf(basisu(gltf, KTX2, source=plain).write(tmp_path / "x.glb"))
    assert color(mesh) == [0, 0, 1] and not mesh.warnings


HALVES = np.zeros((4, 4, 3), np.uint8)
HALVES[:, :2, 0] = 255  # red on the left
HALVES[:, 2:, 2] = 255  # blue on the right


@pytest.mark.parametrize(
    "mode, u, wanted",
    [
        (10497, 1.25, [1, 0, 0]),
        (10497, -0.25, [0, 0, 1]),
        (33071, 1.25, [0, 0, 1]),
        (33071, -0.25, [1, 0, 0]),
        (33648, 1.25, [0, 0, 1]),
        (33648, -0.25, [1, 0, 0]),
        (33648, 2.25, [1, 0, 0]),
        (None, 1.25, [1, 0, 0]),
    ],
)
def test_wrap_modes(tmp_path, mode, u, wanted):
    gltf = Gltf(samplers=[{} if mode is None else {"wrapS": mode, "wrapT": 33071}])
    primitive = gltf.box(
        gltf.textured(picture(HALVES), {"sampler": 0}), TEXCOORD_0=gltf.accessor(np.full((8, 2), [u, 7]))
    )
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == wanted


def test_v_runs_down(tmp_path):
    gltf = Gltf()
    pixels = np.ascontiguousarray(HALVES.transpose(1, 0, 2))  # red above, blue below
    primitive = gltf.box(
        gltf.textured(picture(pixels)), TEXCOORD_0=gltf.accessor(np.full((8, 2), [0.5, 0.25]))
    )
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [1, 0, 0]


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_texture_coordinates_of_every_type(tmp_path, dtype):
    gltf = Gltf()
    top = 1 if dtype == "f4" else np.iinfo(dtype).max
    extra = {} if dtype == "f4" else {"normalized": True}
    if dtype == "u1":
        view = gltf.view(np.tile(np.uint8([64, 64, 0, 0]), (8, 1)).tobytes(), byteStride=4)
        entry = {"bufferView": view, "componentType": 5121, "normalized": True, "count": 8, "type": "VEC2"}
        uv = gltf.entry("accessors", entry)
    else:
        uv = gltf.accessor(np.full((8, 2), 0.25 * top), dtype, **extra)
    primitive = gltf.box(gltf.textured(picture(HALVES)), TEXCOORD_0=uv)
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [1, 0, 0]


@pytest.mark.parametrize(
    "transform, wanted",
    [
        ({"scale": [0.1, 1]}, [1, 0, 0]),
        ({"offset": [0.5, 0]}, [1, 0, 0]),
        ({"scale": [-1, 1]}, [1, 0, 0]),
        ({"rotation": np.pi, "offset": [0.9, 0]}, [1, 0, 0]),
        ({"rotation": np.pi / 2, "offset": [0, 1]}, [1, 0, 0]),  # (0.75, 0.2) -> (0.2, 0.25)
        ({"rotation": -np.pi / 2, "offset": [1, 0]}, [0, 0, 1]),  # -> (0.8, 0.75)
        ({}, [0, 0, 1]),
    ],
)
def test_texture_transforms(tmp_path, transform, wanted):
    gltf = Gltf(extensionsRequired=["KHR_texture_transform"])
    material = gltf.textured(picture(HALVES), extensions={"KHR_texture_transform": transform})
    primitive = gltf.box(material, TEXCOORD_0=gltf.accessor(np.full((8, 2), [0.75, 0.2])))
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == wanted


@pytest.mark.parametrize("by", ["texCoord", "transform"])
def test_the_second_set_of_texture_coordinates(tmp_path, by):
    gltf = Gltf()
    info = {"texCoord": 1} if by == "texCoord" else {"extensions": {"KHR_texture_transform": {"texCoord": 1}}}
    sets = {f"TEXCOORD_{i}": gltf.accessor(np.full((8, 2), [[0.75, 0.25][i], 0.5])) for i in range(2)}
    primitive = gltf.box(gltf.textured(picture(HALVES), **info), **sets)
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [1, 0, 0]


def test_a_textured_surface_without_coordinates_is_of_unknown_color(tmp_path):
    gltf = Gltf()
    primitive = gltf.box(gltf.textured(picture(RED)))
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert color(mesh) is None and "TEXCOORD_0" in mesh.warnings[0]


# names of files


@pytest.mark.parametrize(
    "name, uri",
    [
        ("base color.png", "base%20color.png"),
        ("base color.png", "base color.png"),
        ("größe.png", "gr%C3%B6%C3%9Fe.png"),
        ("größe.png", "größe.png"),
        ("100%.png", "100%.png"),
        ("a%20b.png", "a%20b.png"),
        ("tex/wood.png", "tex/wood.png"),
        ("tex/wood.png", "tex\\wood.png"),
        ("Wood.PNG", "wood.png"),
        ("wood.png", "C:\\Users\\me\\Desktop\\wood.png"),
        ("wood.png", "./wood.png"),
    ],
)
def test_names_of_textures(tmp_path, name, uri):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(picture(RED))
    gltf = Gltf()
    primitive = gltf.box(gltf.textured(None, image={"uri": uri}), TEXCOORD_0=gltf.accessor(UV))
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.gltf", "my data.bin"))
    assert color(mesh) == [1, 0, 0] and extent(mesh) == [1, 2, 3]


def test_a_picture_in_a_data_uri(tmp_path):
    gltf = Gltf()
    uri = "data:image/png;base64," + base64.b64encode(picture(RED)).decode()
    primitive = gltf.box(gltf.textured(None, image={"uri": uri}), TEXCOORD_0=gltf.accessor(UV))
    assert color(read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))) == [1, 0, 0]


@pytest.mark.parametrize(
    "image",
    [
        {"uri": "missing.png"},
        {"uri": "https://example.org/a.png"},
        {"uri": "../../../../etc/passwd"},
        {"uri": "data:image/png;base64,AAAA"},
        {"uri": "cut.jpg"},
        {"uri": "text.png"},
        {"uri": "huge.png"},
        {"bufferView": 99},
        {},
    ],
)
def test_a_texture_that_cannot_be_read_is_told(tmp_path, image):
    (tmp_path / "cut.jpg").write_bytes(picture(RED, "JPEG")[:-90])
    (tmp_path / "text.png").write_text("not a picture")
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    (tmp_path / "huge.png").write_bytes(huge + struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT")))
    gltf = Gltf()
    primitive = gltf.box(gltf.textured(None, image=image), TEXCOORD_0=gltf.accessor(UV))
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert extent(mesh) == [1, 2, 3] and color(mesh) is None
    assert len(mesh.warnings) == 1 and "the texture" in mesh.warnings[0]


def test_the_limit_of_pixels_holds_for_all_textures_together(tmp_path):
    gltf = Gltf()
    primitives = []
    for i in range(6):
        primitives.append(gltf.box(gltf.textured(picture((i, 0, 0))), TEXCOORD_0=gltf.accessor(UV)))
    path = gltf.scene({"mesh": gltf.mesh(*primitives)}).write(tmp_path / "x.glb")
    with limits(pixels=64):
        assert len(read_gltf(path).warnings) == 2
    assert not read_gltf(path).warnings


# compression


def test_draco(tmp_path):
    DracoPy = pytest.importorskip("DracoPy")
    gltf = Gltf(
        extensionsUsed=["KHR_draco_mesh_compression"], extensionsRequired=["KHR_draco_mesh_compression"]
    )
    colors = np.tile(np.uint8([255, 0, 0, 255]), (8, 1))
    packed = DracoPy.encode(
        BOX, FACES, quantization_bits=14, colors=colors, tex_coord=UV, preserve_order=True
    )
    by_kind = {each["attribute_type"]: each["unique_id"] for each in DracoPy.decode(packed).attributes}
    names = {"POSITION": by_kind[0], "COLOR_0": by_kind[2], "TEXCOORD_0": by_kind[3]}
    attributes = {
        "POSITION": gltf.entry("accessors", {"componentType": 5126, "count": 8, "type": "VEC3"}),
        "COLOR_0": gltf.entry(
            "accessors", {"componentType": 5121, "count": 8, "type": "VEC4", "normalized": True}
        ),
        "TEXCOORD_0": gltf.entry("accessors", {"componentType": 5126, "count": 8, "type": "VEC2"}),
    }
    extension = {"bufferView": gltf.view(packed), "attributes": names}
    primitive = {
        "attributes": attributes,
        "indices": gltf.entry("accessors", {"componentType": 5125, "count": 36, "type": "SCALAR"}),
        "extensions": {"KHR_draco_mesh_compression": extension},
        "material": gltf.textured(picture((255, 255, 255))),
    }
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert (
        np.allclose(extent(mesh), [1, 2, 3], atol=1e-3) and color(mesh) == [1, 0, 0] and mesh.face_count == 12
    )


def half_draco(required: bool) -> Gltf:
    "A primitive that has Draco data of no use and a plain copy."
    name = "KHR_draco_mesh_compression"
    gltf = Gltf(extensionsUsed=[name], **({"extensionsRequired": [name]} if required else {}))
    primitive = gltf.box()
    primitive["extensions"] = {name: {"bufferView": gltf.view(b"no Draco"), "attributes": {"POSITION": 0}}}
    return gltf.scene({"mesh": gltf.mesh(primitive)})


def test_draco_without_its_decoder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "DracoPy", None)
    assert extent(read_gltf(half_draco(False).write(tmp_path / "x.glb"))) == [1, 2, 3]  # the plain copy
    with pytest.raises(MissingPackage, match="KHR_draco_mesh_compression.*DracoPy"):
        read_gltf(half_draco(True).write(tmp_path / "x.glb"))


def test_broken_draco_is_refused_by_its_name(tmp_path):
    pytest.importorskip("DracoPy")
    with pytest.raises(InputError, match="KHR_draco_mesh_compression"):
        read_gltf(half_draco(True).write(tmp_path / "x.glb"))


def meshopt_view(gltf: Gltf, data: bytes, rows: np.ndarray, mode: str, name: str, **extra) -> int:
    packed = gltf.view(data)
    entry = gltf.json["bufferViews"].pop(packed)
    stride = rows.nbytes // len(rows)
    extension = entry | {"byteStride": stride, "count": len(rows), "mode": mode} | extra
    size = {"buffer": 1, "byteLength": rows.nbytes}
    return gltf.entry("bufferViews", size | {"extensions": {name: extension}})


@pytest.mark.parametrize("name", ["EXT_meshopt_compression", "KHR_meshopt_compression"])
@pytest.mark.parametrize("mode", ["TRIANGLES", "INDICES"])
@pytest.mark.parametrize("exponential", [True, False])
def test_meshopt(tmp_path, name, mode, exponential):
    meshopt = pytest.importorskip("meshopt")
    gltf = Gltf(extensionsRequired=[name])
    indices = FACES.ravel().astype(np.uint32)
    rows = meshopt.encode_filter_exp(BOX, 15) if exponential else BOX
    packed = meshopt.encode_gltf_buffer(rows, "ATTRIBUTES")
    extra = {"filter": "EXPONENTIAL"} if exponential else {}
    positions = meshopt_view(gltf, packed, BOX, "ATTRIBUTES", name, **extra)
    corners = meshopt_view(gltf, meshopt.encode_gltf_buffer(indices, mode), indices, mode, name)
    entry = {"bufferView": positions, "componentType": 5126, "count": 8, "type": "VEC3"}
    primitive = {"attributes": {"POSITION": gltf.entry("accessors", entry)}}
    entry = {"bufferView": corners, "componentType": 5125, "count": 36, "type": "SCALAR"}
    primitive["indices"] = gltf.entry("accessors", entry)
    mesh = read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))
    assert np.allclose(extent(mesh), [1, 2, 3], atol=1e-3) and mesh.face_count == 12


@pytest.mark.parametrize("installed", [True, False])
def test_meshopt_is_refused_by_its_name(tmp_path, monkeypatch, installed):
    if installed:
        pytest.importorskip("meshopt")
    else:
        monkeypatch.setitem(sys.modules, "meshopt", None)
    gltf = Gltf(extensionsRequired=["EXT_meshopt_compression"])
    view = meshopt_view(gltf, b"no meshopt data", BOX, "ATTRIBUTES", "EXT_meshopt_compression")
    primitive = gltf.box()
    entry = {"bufferView": view, "componentType": 5126, "count": 8, "type": "VEC3"}
    primitive["attributes"]["POSITION"] = gltf.entry("accessors", entry)
    with pytest.raises(Cg3dError, match="EXT_meshopt_compression"):
        read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))


@pytest.mark.parametrize("required", [True, False])
def test_unknown_extensions(tmp_path, required):
    gltf = Gltf(
        extensionsUsed=["ACME_wrinkles"], **({"extensionsRequired": ["ACME_wrinkles"]} if required else {})
    )
    path = gltf.scene({"mesh": gltf.mesh(gltf.box())}).write(tmp_path / "x.glb")
    if required:
        with pytest.raises(InputError, match="ACME_wrinkles"):
            read_gltf(path)
    else:
        assert extent(read_gltf(path)) == [1, 2, 3]


# hostile files


def plain() -> Gltf:
    gltf = Gltf()
    return gltf.scene({"mesh": gltf.mesh(gltf.box())})


def changed(*keys, value):
    def apply(document: dict) -> None:
        place = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return apply


HUGE = {"componentType": 5126, "count": 10**15, "type": "VEC3"}
DAMAGES = {
    "offset below zero": changed("bufferViews", 0, "byteOffset", value=-4),
    "offset behind the end": changed("bufferViews", 0, "byteOffset", value=10**6),
    "offset of a fraction": changed("accessors", 0, "byteOffset", value=0.5),
    "offset of a word": changed("accessors", 0, "byteOffset", value="12"),
    "count of 10^15": changed("accessors", 0, "count", value=10**15),
    "count below zero": changed("accessors", 0, "count", value=-8),
    "10^15 rows of nothing": changed("accessors", 0, value=HUGE),
    "rows that are not there": changed("accessors", 0, "count", value=9),
    "stride of 1": changed("bufferViews", 0, "byteStride", value=1),
    "unknown component": changed("accessors", 0, "componentType", value=5124),
    "unknown type": changed("accessors", 0, "type", value="VEC5"),
    "positions of two coordinates": changed("accessors", 0, "type", value="VEC2"),
    "indices of floats": changed("meshes", 0, "primitives", 0, "indices", value=0),
    "accessor of another list": changed("meshes", 0, "primitives", 0, "attributes", "POSITION", value=7),
    "negative accessor": changed("meshes", 0, "primitives", 0, "attributes", "POSITION", value=-1),
    "true for an index": changed("meshes", 0, "primitives", 0, "attributes", "POSITION", value=True),
    "unknown mode": changed("meshes", 0, "primitives", 0, "mode", value=9),
    "node below itself": changed("nodes", 0, "children", value=[0]),
    "child that is not there": changed("nodes", 0, "children", value=[5]),
    "negative child": changed("nodes", 0, "children", value=[-1]),
    "node twice in the scene": changed("scenes", 0, "nodes", value=[0, 0]),
    "scene that is not there": changed("scene", value=3),
    "matrix of two numbers": changed("nodes", 0, "matrix", value=[1, 2]),
    "matrix of NaN": changed("nodes", 0, "matrix", value=[float("nan")] * 16),
    "scale of infinity": changed("nodes", 0, "scale", value=[float("inf"), 1, 1]),
    "rotation of zeros": changed("nodes", 0, "rotation", value=[0, 0, 0, 0]),
    "huge numbers": changed("nodes", 0, "scale", value=[1e308, 1e308, 1e308]),
    "skin that is not there": changed("nodes", 0, "skin", value=0),
    "nodes that are a word": changed("nodes", value="many"),
    "meshes that are numbers": changed("meshes", value=[1, 2]),
    "weights of words": changed("meshes", 0, "weights", value=["a"]),
    "unfinished buffer": changed("bufferViews", 0, "buffer", value=1),
    "version 1": changed("asset", "version", value="1.0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_hostile_documents(tmp_path, damage):
    gltf = plain()
    DAMAGES[damage](gltf.json)
    with pytest.raises(Cg3dError) as refused:
        read_gltf(gltf.write(tmp_path / "x.glb"))
    assert str(tmp_path / "x.glb") in str(refused.value)


def test_cycles_and_two_parents(tmp_path):
    for nodes in (
        [{"children": [1]}, {"children": [0]}],
        [{"children": [2]}, {"children": [2]}, {"mesh": 0}],
        [{"mesh": 0}, {"children": [2]}, {"children": [1]}],
    ):
        gltf = plain()
        gltf.json |= {"nodes": nodes, "scenes": [{"nodes": [0]}], "scene": 0}
        with pytest.raises(InputError, match="tree"):
            read_gltf(gltf.write(tmp_path / "x.glb"))


def test_faces_of_vertices_that_are_not_there(tmp_path):
    gltf = Gltf()
    primitive = gltf.box()
    primitive["indices"] = gltf.accessor([0, 1, 8], "u2")
    with pytest.raises(InputError, match="vertex 8 of 8"):
        read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))


def test_vertices_that_are_not_finite(tmp_path):
    gltf = Gltf()
    primitive = gltf.box()
    primitive["attributes"]["POSITION"] = gltf.accessor(np.where(BOX == 3, np.nan, BOX))
    with pytest.raises(InputError, match="NaN"):
        read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))


def test_attributes_of_different_lengths(tmp_path):
    gltf = Gltf()
    primitive = gltf.box(COLOR_0=gltf.accessor(np.ones((3, 3))))
    with pytest.raises(InputError, match="COLOR_0 has 3 rows for 8"):
        read_gltf(gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb"))


def test_a_joint_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="joints"):
        read_gltf(skinned(Gltf(), one_joint(0)[0], one_joint(7)[1]).write(tmp_path / "x.glb"))


def test_a_sparse_row_that_is_not_there(tmp_path):
    gltf = plain()
    places = gltf.view(np.uint16([99]).tobytes())
    sparse = {
        "count": 1,
        "indices": {"bufferView": places, "componentType": 5123},
        "values": {"bufferView": 0},
    }
    gltf.json["accessors"][0]["sparse"] = sparse
    with pytest.raises(InputError, match="row 99 of 8"):
        read_gltf(gltf.write(tmp_path / "x.glb"))


def test_instances_beyond_the_limit_are_not_built(tmp_path):
    gltf = Gltf()
    places = gltf.accessor(np.zeros((1000, 3)))
    path = gltf.scene(instanced(gltf, TRANSLATION=places)).write(tmp_path / "x.glb")
    assert read_gltf(path).face_count == 12_000
    with limits(faces=11_999), pytest.raises(UnsafeFile, match="12,000 faces"):
        read_gltf(path)


@pytest.mark.parametrize("cut", [1, 100, 0.5, 0.9])
def test_files_cut_short(tmp_path, cut):
    path = plain().write(tmp_path / "x.glb")
    data = path.read_bytes()
    path.write_bytes(data[: -cut if cut >= 1 else int(len(data) * cut)])
    with pytest.raises(InputError):
        read_gltf(path)


def test_a_buffer_outside_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    gltf = plain()
    path = gltf.write(tmp_path / "in" / "x.gltf")
    document = json.loads(path.read_text())
    document["buffers"][0]["uri"] = "../secret.bin"
    path.write_text(json.dumps(document))
    with pytest.raises(UnsafeFile, match="outside"):
        read_gltf(path)


def test_deep_json(tmp_path):
    path = tmp_path / "x.gltf"
    path.write_text('{"asset": {"version": "2.0"}, "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(InputError):
        read_gltf(path)


def test_a_missing_file():
    with pytest.raises(Cg3dError):
        read_gltf(Path("nothing.glb"))
