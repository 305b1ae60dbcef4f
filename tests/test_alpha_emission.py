"""Transparent places get no points and no pixels, emitted light is part of the color; points and pictures agree."""

import numpy as np
import pytest
import torch
from gltf_writer import Gltf, picture
from PIL import Image

from cg3d.io.color import Texture, cutout_alpha, to_linear, to_srgb
from cg3d.io.read import read_mesh
from cg3d.io.shape import read_shape
from cg3d.render.cameras import ViewSettings
from cg3d.render.mesh import render_mesh

SQUARE = np.float32([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
FACES = np.array([[0, 1, 2], [0, 2, 3]])
UV_DOWN = np.float32([[0, 1], [1, 1], [1, 0], [0, 0]])
PLAIN = ViewSettings(ambient=1, key=0, head=0)  # colors as they are
LEAF = np.zeros((16, 16, 4), np.uint8)  # green at x < 0, black and transparent at x > 0
LEAF[:, :8] = (0, 200, 0, 255)
PHOTO = np.random.default_rng(0).integers(30, 256, (16, 16, 3), np.uint8)


def square_file(path, material: dict, pixels=None, second: dict | None = None, uv=UV_DOWN):
    "A square at z = 0 with a picture as image 0, and perhaps a smaller one of another material behind it."
    gltf = Gltf()
    if pixels is not None:
        view = gltf.view(pixels if isinstance(pixels, bytes) else picture(pixels))
        gltf.entry("textures", {"source": gltf.entry("images", {"bufferView": view})})
    primitives = []
    for number, each in enumerate([material] if second is None else [material, second]):
        place = SQUARE * (1 - 0.5 * number) - np.float32([0, 0, 0.2 * number])
        attributes = {"POSITION": gltf.accessor(place), "TEXCOORD_0": gltf.accessor(uv)}
        attributes["TEXCOORD_1"] = gltf.accessor(UV_DOWN)
        primitive = {"attributes": attributes, "indices": gltf.accessor(FACES.ravel(), "u2")}
        primitives.append(primitive | {"material": gltf.entry("materials", each)})
    return gltf.scene({"mesh": gltf.mesh(*primitives)}).write(path)


def painted(**extra) -> dict:
    return {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}} | extra


def obj_file(folder, lines: str, *pictures):
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"t{number}.png")
    (folder / "m.mtl").write_text(f"newmtl a\n{lines}\nnewmtl red\nKd 1 0 0\n")
    rows = ["v {:g} {:g} {:g}".format(*row) for row in np.concatenate([SQUARE, SQUARE / 2 - [0, 0, 0.2]])]
    rows += [f"vt {u:g} {1 - v:g}" for u, v in UV_DOWN]
    rows += ["usemtl a", "f 1/1 2/2 3/3", "f 1/1 3/3 4/4", "usemtl red", "f 5/1 6/2 7/3", "f 5/1 7/3 8/4"]
    (folder / "x.obj").write_text("\n".join(["mtllib m.mtl", *rows]))
    return folder / "x.obj"


def sampled(path, n: int = 4000):
    return read_mesh(path).sample(n, np.random.default_rng(0))


def seen_colors(path, size: int = 96):
    "Colors that the picture from the front has, as bytes, and how many pixels of each."
    views = render_mesh(path, torch.zeros(1), torch.zeros(1), size, PLAIN, smooth=1)[0, 0]
    pixels = (views.permute(1, 2, 0) * 255).round().int().reshape(-1, 3)
    colors, counts = pixels.unique(dim=0, return_counts=True)
    return {tuple(color): count for color, count in zip(colors.tolist(), counts.tolist())}


RED = {"pbrMetallicRoughness": {"baseColorFactor": [1, 0, 0, 1]}}


def leaf_files(folder, kind):
    if kind == "mask":
        return square_file(folder / "x.glb", painted(alphaMode="MASK"), LEAF, RED)
    if kind == "blend":
        return square_file(folder / "x.glb", painted(alphaMode="BLEND"), LEAF, RED)
    if kind == "palette":
        image = Image.fromarray(LEAF).convert("P")
        return square_file(
            folder / "x.glb", painted(alphaMode="MASK"), picture(np.asarray(image.convert("RGBA"))), RED
        )
    if kind == "obj":
        return obj_file(folder, "map_Kd t0.png", LEAF)
    mask = np.where(LEAF[:, :, 3] > 0, 255, 0).astype(np.uint8)[::2, ::2]
    return obj_file(folder, "Kd 1 1 1\nmap_Kd t0.png\nmap_d t1.png", LEAF[:, :, :3], mask)


@pytest.mark.parametrize("kind", ["mask", "blend", "palette", "obj", "obj map_d"])
def test_a_leaf_has_no_points_and_no_pixels_beside_it(tmp_path, kind):
    path = leaf_files(tmp_path, kind)
    xyz, colors = sampled(path)
    leaf = xyz[:, 2] > -0.1
    assert len(xyz) == 4000 and (xyz[leaf, 0] < 0).all() and not (colors.max(1) < 0.1).any()
    assert np.allclose(colors[leaf], [0, 200 / 255, 0], atol=1e-6) and np.allclose(colors[~leaf], [1, 0, 0])
    share = leaf.mean()  # areas 2 of the leaf and 1 of the red square behind it
    assert abs(share - 2 / 3) < 0.02
    seen = seen_colors(path)
    assert set(seen) == {(0, 200, 0), (255, 0, 0), (255, 255, 255)}
    assert (
        4 < seen[0, 200, 0] / seen[255, 0, 0] < 5.5
    )  # half of the red one shows through; it is farther away


def test_alpha_plays_no_part_where_the_file_says_opaque(tmp_path):
    for mode in ({}, {"alphaMode": "OPAQUE"}):
        xyz, colors = sampled(square_file(tmp_path / "x.glb", painted(**mode), LEAF))
        assert (colors[xyz[:, 0] > 0.01] == 0).all() and abs((xyz[:, 0] > 0).mean() - 0.5) < 0.02


@pytest.mark.parametrize("cutoff, visible", [(None, True), (0.5, True), (0.7, False), (0.0, True)])
def test_the_cutoff_of_a_mask(tmp_path, cutoff, visible):
    pixels = LEAF.copy()
    pixels[:, 8:] = (0, 0, 90, 153)  # alpha 0.6
    extra = {} if cutoff is None else {"alphaCutoff": cutoff}
    xyz, _ = sampled(square_file(tmp_path / "x.glb", painted(alphaMode="MASK", **extra), pixels))
    assert (xyz[:, 0] > 0).any() == visible


def test_gloss_in_the_fourth_channel_hides_nothing(tmp_path):
    gloss = np.random.default_rng(1).choice([0, 90, 255], (16, 16, 1)).astype(np.uint8)
    xyz, colors = sampled(obj_file(tmp_path, "map_Kd t0.png", np.dstack([PHOTO, gloss])))
    assert abs((xyz[:, 2] > -0.1).mean() - 4 / 5) < 0.02 and colors[xyz[:, 2] > -0.1].min() > 0.1
    assert cutout_alpha(Texture(np.zeros((2, 2, 4), np.uint8))) is None  # all of it


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_a_transparent_part_is_not_there(tmp_path, kind):
    if kind == "glb":
        glass = {"pbrMetallicRoughness": {"baseColorFactor": [0, 0, 0, 0]}, "alphaMode": "BLEND"}
        path = square_file(tmp_path / "x.glb", glass, second=RED)
    else:
        path = obj_file(tmp_path, "Kd 0 0 0\nd 0.0")
    xyz, colors = sampled(path)
    assert (xyz[:, 2] < -0.1).all() and np.allclose(colors, [1, 0, 0])
    assert set(seen_colors(path)) == {(255, 0, 0), (255, 255, 255)}


def test_what_is_wholly_transparent_is_read_as_opaque_and_told(tmp_path):
    factor = {"pbrMetallicRoughness": {"baseColorFactor": [0, 0, 1, 0]}, "alphaMode": "BLEND"}
    path = square_file(tmp_path / "x.glb", factor)
    with pytest.warns(UserWarning, match="all of it is transparent; it was read as opaque"):
        shape = read_shape(path)
    assert np.allclose(shape.colors, [0, 0, 1])
    assert set(seen_colors(path)) == {(0, 0, 255), (255, 255, 255)}
    half_glass = {"pbrMetallicRoughness": {"baseColorFactor": [0, 0, 1, 0.3]}, "alphaMode": "BLEND"}
    mesh = read_mesh(square_file(tmp_path / "y.glb", half_glass))
    assert not mesh.warnings and len(mesh.sample(100, np.random.default_rng(0))[0]) == 100


def test_a_small_visible_share_still_fills_all_points(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[3, 4] = (9, 9, 200, 255)
    xyz, colors = sampled(square_file(tmp_path / "x.glb", painted(alphaMode="MASK"), pixels), 500)
    assert len(xyz) == 500 and np.allclose(colors * 255, [9, 9, 200], atol=1e-4)
    assert len(np.unique(xyz, axis=0)) == 500


BLACK = {"baseColorFactor": [0, 0, 0, 1]}


@pytest.mark.parametrize("kind", ["glb", "second uv", "obj"])
def test_a_black_object_with_emitted_light_shows_its_picture(tmp_path, kind):
    if kind == "obj":
        Image.fromarray(PHOTO).save(tmp_path / "e.png")
        path = obj_file(tmp_path, "Kd 0 0 0\nKe 1 1 1\nmap_Ke e.png")
    else:
        info = {"index": 0} if kind == "glb" else {"index": 0, "texCoord": 1}
        material = {"pbrMetallicRoughness": BLACK, "emissiveFactor": [1, 1, 1], "emissiveTexture": info}
        uv = UV_DOWN if kind == "glb" else UV_DOWN * 0
        path = square_file(tmp_path / "x.glb", material, PHOTO, uv=uv)
    xyz, colors = sampled(path, 20_000)
    front = xyz[:, 2] > -0.1
    column, row = np.minimum((xyz[front, :2] * [1, -1] + 1) * 8, 15.999).astype(int).T
    assert np.allclose(colors[front] * 255, PHOTO[row, column], atol=1e-3)
    seen = render_mesh(path, torch.zeros(1), torch.zeros(1), 160, PLAIN, smooth=1)[0, 0].numpy()
    mean = seen[:, (seen < 1).any(0)].mean(1)
    assert np.abs(mean - colors[front].mean(0)).max() < 0.02


@pytest.mark.parametrize(
    "material, linear",
    [
        ({"pbrMetallicRoughness": BLACK, "emissiveFactor": [0.2, 0.5, 1]}, [0.2, 0.5, 1]),
        (
            {"pbrMetallicRoughness": {"baseColorFactor": [0.5, 0.1, 0, 1]}, "emissiveFactor": [0.2, 0, 1]},
            [0.7, 0.1, 1],
        ),
        ({"emissiveFactor": [0, 1, 1]}, [1, 1, 1]),
        (
            {"pbrMetallicRoughness": {"baseColorFactor": [0.5, 0.1, 0, 1]}, "emissiveFactor": [0, 0, 0]},
            [0.5, 0.1, 0],
        ),
        (
            {
                "pbrMetallicRoughness": {"baseColorFactor": [0.5, 0.1, 0, 1]},
                "emissiveFactor": [1, 1, 1],
                "extensions": {"KHR_materials_unlit": {}},
            },
            [0.5, 0.1, 0],
        ),
        (
            {
                "pbrMetallicRoughness": BLACK,
                "emissiveFactor": [0, 0.5, 0],
                "extensions": {"KHR_materials_unlit": {}},
            },
            [0, 0.5, 0],
        ),
    ],
)
def test_emitted_light_is_added_in_linear_light(tmp_path, material, linear):
    _, colors = sampled(square_file(tmp_path / "x.glb", material), 50)
    assert np.allclose(colors, to_srgb(np.array(linear)), atol=1e-6)


def test_a_lost_picture_of_emitted_light_is_told(tmp_path):
    material = {
        "pbrMetallicRoughness": {"baseColorFactor": [1, 0, 0, 1]},
        "emissiveFactor": [1, 1, 1],
        "emissiveTexture": {"index": 0},
    }
    mesh = read_mesh(square_file(tmp_path / "x.glb", material, b"no picture"))
    assert "its emitted light is left out" in " ".join(mesh.warnings)
    assert np.allclose(mesh.sample(50, np.random.default_rng(0))[1], [1, 0, 0])


def test_emission_of_obj_materials(tmp_path):
    _, colors = sampled(obj_file(tmp_path, "Kd 0 0 0\nKe 0 0.5 0"), 3000)
    assert np.allclose(np.unique(colors.round(6), axis=0), [[0, 0.5, 0], [1, 0, 0]])
    _, colors = sampled(obj_file(tmp_path, "Kd 0 0.5 0\nKe 0.0 0.0 0.0"), 3000)
    assert np.allclose(np.unique(colors.round(6), axis=0), [[0, 0.5, 0], [1, 0, 0]])
    _, colors = sampled(obj_file(tmp_path, "Kd 0.5 0 0\nKe 0.5 0 0"), 3000)
    assert np.isclose(colors[:, 0].min(), to_srgb(2 * to_linear(np.array(0.5))))


DAE = """<?xml version="1.0"?>
<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">
<asset><unit meter="1"/><up_axis>Y_UP</up_axis></asset>
<library_effects><effect id="e"><profile_COMMON><technique sid="c">SHADER</technique></profile_COMMON></effect>
</library_effects>
<library_materials><material id="m" name="m"><instance_effect url="#e"/></material></library_materials>
<library_geometries><geometry id="g"><mesh><source id="p"><float_array id="pa" count="9">0 0 0 1 0 0 0 1 0
</float_array><technique_common><accessor source="#pa" count="3" stride="3"><param name="X" type="float"/>
<param name="Y" type="float"/><param name="Z" type="float"/></accessor></technique_common></source>
<vertices id="v"><input semantic="POSITION" source="#p"/></vertices><triangles count="1" material="m">
<input semantic="VERTEX" source="#v" offset="0"/><p>0 1 2</p></triangles></mesh></geometry></library_geometries>
<library_visual_scenes><visual_scene id="s"><node><instance_geometry url="#g"><bind_material><technique_common>
<instance_material symbol="m" target="#m"/></technique_common></bind_material></instance_geometry></node>
</visual_scene></library_visual_scenes><scene><instance_visual_scene url="#s"/></scene></COLLADA>"""


@pytest.mark.parametrize(
    "shader, color",
    [
        ("<constant><emission><color>0 0.5 0 1</color></emission></constant>", [0, 0.5, 0]),
        (
            "<lambert><emission><color>0 0.5 0 1</color></emission><diffuse><color>0 0 0 1</color></diffuse></lambert>",
            [0, 0.5, 0],
        ),
        (
            "<lambert><emission><color>0 0 0 1</color></emission><diffuse><color>1 0 0 1</color></diffuse></lambert>",
            [1, 0, 0],
        ),
    ],
)
def test_unlit_surfaces_of_collada(tmp_path, shader, color):
    pytest.importorskip("assimp_py")
    (tmp_path / "x.dae").write_text(DAE.replace("SHADER", shader))
    assert np.allclose(sampled(tmp_path / "x.dae", 50)[1], color, atol=1e-5)


USD = """#usda 1.0
( upAxis = "Y" )
def Mesh "square" ( prepend apiSchemas = ["MaterialBindingAPI"] )
{
    point3f[] points = [(0, 0, 0), (1, 0, 0), (0, 1, 0)]
    int[] faceVertexCounts = [3]
    int[] faceVertexIndices = [0, 1, 2]
    rel material:binding = </m>
}
def Mesh "other"
{
    point3f[] points = [(5, 0, 0), (6, 0, 0), (5, 1, 0)]
    int[] faceVertexCounts = [3]
    int[] faceVertexIndices = [0, 1, 2]
    color3f[] primvars:displayColor = [(1, 0, 0)]
}
def Material "m"
{
    token outputs:surface.connect = </m/s.outputs:surface>
    def Shader "s"
    {
        uniform token info:id = "UsdPreviewSurface"
        token outputs:surface
INPUTS
    }
}
"""


@pytest.mark.parametrize(
    "inputs, colors",
    [
        (
            "color3f inputs:diffuseColor = (0, 0, 0)\ncolor3f inputs:emissiveColor = (0, 0.5, 0)",
            [[0, 0.5, 0]],
        ),
        ("color3f inputs:diffuseColor = (0, 0, 0.5)\nfloat inputs:opacity = 0.4", [[0, 0, 0.5]]),
        ("color3f inputs:diffuseColor = (0, 0, 0)\nfloat inputs:opacity = 0", []),
        (
            "color3f inputs:diffuseColor = (0, 0, 0)\nfloat inputs:opacity = 0.4\nfloat inputs:opacityThreshold = 0.5",
            [],
        ),
    ],
)
def test_emission_and_opacity_of_usd(tmp_path, inputs, colors):
    pytest.importorskip("pxr")
    (tmp_path / "x.usda").write_text(USD.replace("INPUTS", inputs))
    found = np.unique(sampled(tmp_path / "x.usda", 400)[1].round(5), axis=0)
    assert np.allclose(found, to_srgb(np.array([*colors, [1, 0, 0]], float)), atol=1e-4)


@pytest.mark.parametrize("mode, share", [("BLEND", 0.9), ("MASK", 0.5), ("OPAQUE", 1.0)])
def test_alpha_of_vertices_in_points_and_pictures(tmp_path, mode, share):
    "It falls from 1 at x = -1 to 0 at x = 1."
    gltf = Gltf()
    colors = np.float32([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
    attributes = {"POSITION": gltf.accessor(SQUARE), "COLOR_0": gltf.accessor(colors)}
    primitive = {"attributes": attributes, "indices": gltf.accessor(FACES.ravel(), "u2")}
    primitive["material"] = gltf.entry("materials", {"alphaMode": mode})
    path = gltf.scene({"mesh": gltf.mesh(primitive)}).write(tmp_path / "x.glb")
    xyz, rgb = sampled(path)
    assert np.allclose(rgb, [0, 0, 1]) and xyz[:, 0].max() == pytest.approx(2 * share - 1, abs=0.01)
    seen = seen_colors(path)
    whole = seen_colors(
        square_file(tmp_path / "y.glb", {"pbrMetallicRoughness": {"baseColorFactor": [0, 0, 1, 1]}})
    )
    assert set(seen) == {(0, 0, 255), (255, 255, 255)}
    assert seen[0, 0, 255] / whole[0, 0, 255] == pytest.approx(share, abs=0.02)
