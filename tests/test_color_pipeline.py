"""One color pipeline: a picture of a mesh and points sampled from it have the same colors, whatever file it is."""

import numpy as np
import pytest
import torch
import trimesh
from gltf_writer import Gltf, picture
from PIL import Image

from cg3d.core.errors import InputError, UnsafeFile
from cg3d.core.untrusted import limits
from cg3d.io.color import Material, Texture, decode_image, require_colors, to_linear, to_srgb, unit_colors
from cg3d.io.mesh import Mesh, Surface, from_trimesh, surface_colors
from cg3d.io.read import read_mesh
from cg3d.render.cameras import ViewSettings
from cg3d.render.mesh import render_mesh

# a square that the camera looks at from the front, and 16 x 16 colors on it
SQUARE = np.float32([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
FACES = np.array([[0, 1, 2], [0, 2, 3]])
UV_DOWN = np.float32([[0, 1], [1, 1], [1, 0], [0, 0]])
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
PIXELS[:8] //= 2  # the upper half is darker
CORNERS = np.float32([[1, 1, 1], [1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1]])
PLAIN = ViewSettings(ambient=1, key=0, head=0)  # colors as they are


def gltf_file(folder, texture: bool, factor: bool, vertex: bool, older: bool = False):
    gltf = Gltf()
    attributes = {"POSITION": gltf.accessor(SQUARE)}
    base = {"baseColorFactor": [0.9, 0.4, 0.6, 1]} if factor else {}
    if texture:
        attributes["TEXCOORD_0"] = gltf.accessor(UV_DOWN)
        image = gltf.entry("images", {"bufferView": gltf.view(picture(PIXELS))})
        base["baseColorTexture"] = {"index": gltf.entry("textures", {"source": image})}
    if vertex:
        attributes["COLOR_0"] = gltf.accessor(CORNERS)
    material = {"pbrMetallicRoughness": base}
    if older:
        names = {"baseColorFactor": "diffuseFactor", "baseColorTexture": "diffuseTexture"}
        values = {names[key]: value for key, value in base.items()}
        material = {"extensions": {"KHR_materials_pbrSpecularGlossiness": values}}
    indices = gltf.accessor(FACES.ravel(), "u2")
    primitive = {"attributes": attributes, "indices": indices, "material": gltf.entry("materials", material)}
    return gltf.scene({"mesh": gltf.mesh(primitive)}).write(folder / "x.glb")


def obj_file(folder, texture: bool, factor: bool, vertex: bool):
    colors = [" {:g} {:g} {:g}".format(*row) if vertex else "" for row in CORNERS]
    lines = ["v {:g} {:g} {:g}".format(*row) + color for row, color in zip(SQUARE, colors)]
    lines += [f"vt {u:g} {1 - v:g}" for u, v in UV_DOWN]
    (folder / "m.mtl").write_text("newmtl a\nKd 0.9 0.4 0.6\n" + ("map_Kd t.png\n" if texture else ""))
    Image.fromarray(PIXELS).save(folder / "t.png")
    head = ["mtllib m.mtl", "usemtl a"] if factor or texture else []
    (folder / "x.obj").write_text("\n".join(head + lines + ["f 1/1 2/2 3/3", "f 1/1 3/3 4/4"]))
    return folder / "x.obj"


def ply_file(folder):
    rows = ["{:g} {:g} {:g} {} {} {}".format(*xyz, *rgb) for xyz, rgb in zip(SQUARE, np.uint8(CORNERS * 255))]
    head = "ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
    head += "property uchar red\nproperty uchar green\nproperty uchar blue\n"
    head += "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    (folder / "x.ply").write_text(head + "\n".join(rows + ["3 0 1 2", "3 0 2 3"]) + "\n")
    return folder / "x.ply"


def picture_and_points(
    mesh,
) -> tuple[np.ndarray, np.ndarray]:  # mean colors of the upper and the lower half, (2, 3) each
    seen = render_mesh(mesh, torch.zeros(1), torch.zeros(1), 160, PLAIN, smooth=1)[0, 0].double().numpy()
    rows, columns = np.nonzero((seen < 1).any(0))
    middle = (rows.min() + rows.max() + 1) / 2
    pixels = seen[:, rows, columns].T
    in_picture = np.stack([pixels[rows < middle].mean(0), pixels[rows > middle].mean(0)])
    opened = mesh if isinstance(mesh, Mesh) else read_mesh(mesh)
    xyz, colors = opened.sample(40_000, np.random.default_rng(0))
    return in_picture, np.stack([colors[xyz[:, 1] > 0].mean(0), colors[xyz[:, 1] < 0].mean(0)])


LAYERS = [(t, f, v) for t in (True, False) for f in (True, False) for v in (True, False) if t or f or v]


@pytest.mark.parametrize("texture, factor, vertex", LAYERS)
@pytest.mark.parametrize("kind", ["glb", "obj", "specular glossiness"])
def test_pictures_and_points_have_the_same_colors(tmp_path, kind, texture, factor, vertex):
    if kind == "obj":
        path = obj_file(tmp_path, texture, factor, vertex)
    else:
        path = gltf_file(tmp_path, texture, factor, vertex, kind != "glb")
    in_picture, in_points = picture_and_points(path)
    assert np.abs(in_picture - in_points).max() < 0.01
    if texture and not vertex:
        assert (
            in_points[0] < in_points[1]
        ).all()  # the texture stands upright: its upper half is the darker one
    if factor and not texture and not vertex:
        wanted = [0.9, 0.4, 0.6] if kind == "obj" else to_srgb(np.array([0.9, 0.4, 0.6]))
        assert np.allclose(in_points, wanted, atol=1e-6) and np.allclose(in_picture, wanted, atol=1e-6)


def test_ply_in_pictures_and_points(tmp_path):
    in_picture, in_points = picture_and_points(ply_file(tmp_path))
    assert np.abs(in_picture - in_points).max() < 0.01


def test_one_surface_in_three_formats(tmp_path):
    "The same linear colors at the corners, once as COLOR_0, once as sRGB in PLY and OBJ"
    linear = gltf_file(tmp_path, False, False, True)
    gltf_colors = read_mesh(linear).sample(2000, np.random.default_rng(0))[1]
    text = "".join(
        "v {:g} {:g} {:g} {:.9f} {:.9f} {:.9f}\n".format(*xyz, *rgb)
        for xyz, rgb in zip(SQUARE, to_srgb(CORNERS))
    )
    (tmp_path / "y.obj").write_text(text + "f 1 2 3\nf 1 3 4\n")
    obj_colors = read_mesh(tmp_path / "y.obj").sample(2000, np.random.default_rng(0))[1]
    assert np.allclose(gltf_colors, obj_colors, atol=1e-6)


def test_trimesh_objects_have_the_colors_of_their_file(tmp_path):
    mesh = trimesh.Trimesh(SQUARE, FACES, process=False)
    mesh.visual = trimesh.visual.TextureVisuals(
        uv=UV_DOWN * [1, -1] + [0, 1],
        material=trimesh.visual.material.PBRMaterial(
            baseColorTexture=Image.fromarray(PIXELS), baseColorFactor=[230, 102, 153, 255]
        ),
    )
    mesh.export(tmp_path / "x.glb")
    direct = from_trimesh(mesh).sample(2000, np.random.default_rng(0))[1]
    read = read_mesh(tmp_path / "x.glb").sample(2000, np.random.default_rng(0))[1]
    assert np.allclose(direct, read, atol=2e-3)


@pytest.mark.parametrize("value", [0, 1, 13, 100, 128, 200, 254, 255])
def test_a_constant_comes_back_exactly(value):
    light = np.full((4, 3), to_linear(np.array(value / 255)), np.float32)
    pixels = np.full((4, 4, 3), value, np.uint8)
    at = np.random.default_rng(0).integers(0, 2, 1000), np.random.default_rng(1).dirichlet([1, 1, 1], 1000)
    by_vertex = Surface(SQUARE, FACES, vertex_colors=light)
    by_face = Surface(SQUARE, FACES, face_colors=light[:2])
    by_texture = Surface(
        SQUARE, FACES, [UV_DOWN], material=Material(factor=np.ones(3), texture=Texture(pixels))
    )
    for surface in (by_vertex, by_face, by_texture):
        assert np.allclose(surface_colors(surface, *at) * 255, value, atol=2e-5)


def test_colors_that_are_partly_unknown():
    values = np.array([[255, 0, 0], [np.nan, 0, 0], [0, 0, 255.0]])
    colors = unit_colors(values)
    assert colors[[0, 2]].tolist() == [[1, 0, 0], [0, 0, 1]] and np.isnan(colors[1]).all()
    assert unit_colors(np.full((2, 3), np.nan)) is None and unit_colors(np.array([["a", "b", "c"]])) is None


def test_colors_that_fit_no_range():
    assert unit_colors(np.array([[0.2, 1.4, 0.1]])) is None  # too large for [0, 1], too small for bytes
    assert np.allclose(unit_colors(np.array([[1.0005, 0.5, -0.0005]])), [[1, 0.5, 0]])
    assert np.allclose(unit_colors(np.array([[0, 1, 2]])), np.array([[0, 1, 2]]) / 255)
    with pytest.raises(ValueError, match="a.npy: the largest color is 1.4: too large for"):
        require_colors(np.array([[0.2, 1.4, 0.1]]), "a.npy")
    for wrong in (300.0, -0.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="neither in .0, 1. nor in 0..255"):
            require_colors(np.array([[wrong, 0, 0]]), "a.npy")


def test_the_limit_of_pixels_is_ours_and_not_that_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    assert decode_image(picture((255, 0, 0)), "a.png").shape == (8, 8, 3) and Image.MAX_IMAGE_PIXELS == 16
    with limits(pixels=63), pytest.raises(UnsafeFile, match="64 pixels of a texture, more than the 63"):
        decode_image(picture((255, 0, 0)), "a.png")
    with pytest.raises(InputError, match="not a picture"):
        decode_image(b"no picture", "a.png")
    assert Image.MAX_IMAGE_PIXELS == 16
