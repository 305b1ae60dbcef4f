"""Reading PLY, OFF, STL, PCD, text, numpy arrays and splats: every file is written here, its extent and color are known."""

import gzip
import struct

import numpy as np
import pytest
import trimesh
from cloud_writer import (
    CLOUD,
    FACE,
    FULL,
    MIXED,
    OFF_BOX,
    ORANGE,
    ORANGE_8,
    PACKED,
    QUADS,
    SPLAT,
    XYZ,
    off,
    pcd,
    pixels,
    ply,
    ptx,
    rows,
    splat_rows,
    stl,
    stl_text,
    vertices,
)
from gltf_writer import BOX, FACES
from mesh_checks import color, extent

from cg3d.core.errors import Cg3dError, InputError, UnsafeFile
from cg3d.core.untrusted import limits
from cg3d.io.read import read_mesh, read_points
from cg3d.io.shape import read_shape
from cg3d.io.splat import SH_DEGREE_0

# PLY


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("polygons", [FACES.tolist(), QUADS, MIXED])
@pytest.mark.parametrize("list_types", ["uchar int", "ushort uint", "int short", "uint uchar"])
def test_ply_polygons(read, form, polygons, list_types):
    face = (f"list {list_types} vertex_indices", [[list(polygon)] for polygon in polygons])
    mesh = read("a.ply", ply({"vertex": (XYZ, vertices()), "face": face}, form))
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == 12 and mesh.up is None
    assert np.isclose(
        sum(
            np.linalg.norm(
                np.cross(
                    *(mesh.surfaces[0].vertices[mesh.surfaces[0].faces] @ np.eye(3))[:, 1:].transpose(1, 0, 2)
                ),
                axis=1,
            )
            >= 0
        ),
        12,
    )


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian"])
@pytest.mark.parametrize(
    "names, values",
    [
        ("uchar red, uchar green, uchar blue", [255, 128, 0]),
        ("uchar RED, uchar GREEN, uchar BLUE", [255, 128, 0]),
        ("uchar r, uchar g, uchar b", [255, 128, 0]),
        ("uchar diffuse_red, uchar diffuse_green, uchar diffuse_blue", [255, 128, 0]),
        ("ushort red, ushort green, ushort blue", [65535, 32768, 0]),
        ("ushort red, ushort green, ushort blue", [255, 128, 0]),
        ("float red, float green, float blue", [1, 0.5, 0]),
        ("float red, float green, float blue", [255, 128, 0]),
        ("double r, double g, double b", [1, 0.5, 0]),
        ("int red, int green, int blue", [255, 128, 0]),
        ("uchar blue, uchar green, uchar red", [0, 128, 255]),
        ("uchar alpha, uchar red, uchar green, uchar blue", [7, 255, 128, 0]),
        ("float s, float t, uchar red, uchar green, uchar blue", [0.5, 0.5, 255, 128, 0]),
        ("float u, float v, uchar red, uchar green, uchar blue", [0.5, 0.5, 255, 128, 0]),
        ("float nx, float ny, float nz, uchar red, uchar green, uchar blue", [0, 0, 1, 255, 128, 0]),
        ("float intensity, uchar red, uchar green, uchar blue", [9, 255, 128, 0]),
        ("float scalar_R, float scalar_G, float scalar_B", [255, 128, 0]),
    ],
)
def test_ply_vertex_colors(read, form, names, values):
    mesh = read("a.ply", ply({"vertex": (f"{XYZ}, {names}", vertices(*values)), "face": FACE}, form))
    assert color(mesh) == ORANGE and extent(mesh) == [1, 2, 3]
    cloud = read("b.ply", ply({"vertex": (f"{XYZ}, {names}", vertices(*values))}, form))
    assert color(cloud) == ORANGE and extent(cloud) == [1, 2, 3] and len(cloud.points) == 8


@pytest.mark.parametrize(
    "names, values",
    [
        ("float nx, float ny, float nz", [0, 0, 1]),
        ("uchar intensity", [200]),
        ("float quality", [0.5]),
        ("float red, float green, float blue", [-1, 0.5, 0]),
    ],
)
def test_ply_without_colors(read, names, values):
    mesh = read("a.ply", ply({"vertex": (f"{XYZ}, {names}", vertices(*values)), "face": FACE}))
    assert color(mesh) is None and bool(mesh.warnings) == ("red" in names)


def test_ply_colors_of_faces_stay_with_their_polygon(read):
    rows = [
        [list(quad), 255 if index == 1 else 0, 0, 0 if index == 1 else 255]
        for index, quad in enumerate(QUADS)
    ]
    mesh = read(
        "a.ply",
        ply(
            {
                "vertex": (XYZ, vertices()),
                "face": ("list uchar int vertex_index, uchar red, uchar green, uchar blue", rows),
            }
        ),
    )
    xyz, rgb = mesh.sample(4000, np.random.default_rng(0))
    side = np.isclose(xyz[:, 0], 1)  # the quad 4 6 7 5
    assert (
        np.allclose(rgb[side], [1, 0, 0])
        and np.allclose(rgb[~side], [0, 0, 1])
        and abs(side.mean() - 6 / 22) < 0.01
    )


@pytest.mark.parametrize("where", ["vertex", "face"])
def test_ply_texture(read, where):
    halves = pixels([(255, 0, 0), (0, 0, 255)])
    uv = np.stack([(BOX[:, 0] > 0.5) * 0.98 + 0.01, BOX[:, 1] / 2], 1)  # left red, right blue
    if where == "vertex":
        rows, face = [[*row, *place] for row, place in zip(BOX, uv)], FACE
        properties = f"{XYZ}, float s, float t"
    else:
        rows, properties = vertices(), XYZ
        face = (
            "list uchar int vertex_indices, list uchar float texcoord",
            [[list(f), uv[f].ravel().tolist()] for f in FACES],
        )
    mesh = read(
        "a.ply",
        ply({"vertex": (properties, rows), "face": face}, extra="comment TextureFile half.png"),
        half__png=halves,
    )
    xyz, rgb = mesh.sample(2000, np.random.default_rng(0))
    assert np.allclose(rgb[xyz[:, 0] < 0.4], [1, 0, 0]) and np.allclose(rgb[xyz[:, 0] > 0.6], [0, 0, 1])


def test_ply_texture_rows_run_up(read):
    "v = 0 is the lowest row of the picture."
    rows = pixels([(255, 0, 0)], [(0, 0, 255)])
    places = [[*row, 0.5, 0.01 + 0.98 * row[1] / 2] for row in BOX]
    mesh = read(
        "a.ply",
        ply(
            {"vertex": (f"{XYZ}, float u, float v", places), "face": FACE}, extra="comment TextureFile t.png"
        ),
        t__png=rows,
    )
    xyz, rgb = mesh.sample(2000, np.random.default_rng(0))
    assert np.allclose(rgb[xyz[:, 1] < 0.8], [0, 0, 1]) and np.allclose(rgb[xyz[:, 1] > 1.2], [1, 0, 0])


def test_ply_two_textures(read):
    face = (
        "list uchar int vertex_indices, list uchar float texcoord, int texnumber",
        [[list(f), [0.5] * 6, int(i >= 6)] for i, f in enumerate(FACES)],
    )
    extra = "comment TextureFile a.png\ncomment TextureFile b.png"
    mesh = read(
        "a.ply",
        ply({"vertex": (XYZ, vertices()), "face": face}, "binary_little_endian", extra),
        a__png=pixels([(255, 0, 0)]),
        b__png=pixels([(0, 0, 255)]),
    )
    _, rgb = mesh.sample(2000, np.random.default_rng(0))
    assert {tuple(row) for row in rgb.round().tolist()} == {(1, 0, 0), (0, 0, 1)} and extent(mesh) == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("name", ["gone.png", "../secret.png", "cut.png"])
def test_ply_texture_that_cannot_be_had_is_reported(read, name, tmp_path):
    (tmp_path.parent / "secret.png").write_bytes(pixels([(255, 0, 0)]))
    content = ply(
        {"vertex": (f"{XYZ}, float s, float t", vertices(0.5, 0.5)), "face": FACE},
        extra=f"comment TextureFile {name}",
    )
    mesh = read("a.ply", content, cut__png=pixels([(255, 0, 0)])[:40])
    assert color(mesh) is None and len(mesh.warnings) == 1 and name in mesh.warnings[0]


@pytest.mark.parametrize("form", ["ascii", "binary_big_endian"])
def test_ply_elements_in_any_order(read, form):
    elements = {
        "material": ("uchar ambient, list uchar float spectrum", [[1, [0.5, 0.5]], [2, []]]),
        "face": (
            "uchar flag, list uchar int vertex_indices, float quality",
            [[1, list(face), 0.5] for face in MIXED],
        ),
        "edge": ("int vertex1, int vertex2", [[0, 1], [1, 2]]),
        "vertex": (
            "double z, int y, list uchar uchar names, short x",
            [[z, y, [1] * int(x + y), x] for x, y, z in BOX],
        ),
    }
    mesh = read("a.ply", ply(elements, form, "obj_info made here\ncomment a comment"))
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == 12


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("form", ["ascii", "binary_little_endian"])
def test_ply_line_ends(read, newline, form):
    mesh = read("a.ply", ply({"vertex": (XYZ, vertices()), "face": FACE}, form, newline=newline))
    assert extent(mesh) == [1, 2, 3]


def test_ply_lines_in_cr_whose_data_begin_with_a_line_feed(read):
    rows = [[10, 1], [12, 5]]
    content = ply(
        {"vertex": ("uchar x, uchar y, uchar z", [[a, b, 0] for a, b in rows])},
        "binary_little_endian",
        newline="\r",
    )
    assert read("a.ply", content).points[:, 0].tolist() == [10, 12]


@pytest.mark.parametrize(
    "strips, expected",
    [
        ([[0, 1, 2, 3]], 2),
        ([[0, 1, 2, -1, 1, 3, 2]], 2),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 4),
        ([[0, 1, 1, 2, 3]], 1),
    ],
)
def test_ply_strips(read, strips, expected):
    mesh = read(
        "a.ply",
        ply(
            {
                "vertex": (XYZ, vertices()),
                "tristrips": ("list int int vertex_indices", [[strip] for strip in strips]),
            }
        ),
    )
    assert mesh.face_count == expected


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("polygons", [None, FACES.tolist(), MIXED])
def test_ply_cut_short_is_refused_with_its_numbers(read, form, polygons):
    elements = {"vertex": (XYZ, vertices())}
    if polygons:
        elements["face"] = ("list uchar int vertex_indices", [[list(p)] for p in polygons])
    content = ply(elements, form)
    rows, name = (8, "vertices") if polygons is None else (len(polygons), "faces")
    with pytest.raises(
        InputError, match=f"announces {rows} {name}, holds {rows - 1}; the file was cut short"
    ):
        read("a.ply", content[:-4] if form != "ascii" else content[:-7])


@pytest.mark.parametrize(
    "content, says",
    [
        (b"ply\nformat ascii 1.0\nelement vertex 3\n", "no end_header"),
        (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "no element vertex; its elements are face"),
        (
            b"ply\nformat ascii 2.0x\nelement vertex 1\nproperty half x\nend_header\n0\n",
            "declares no property",
        ),
        (b"ply\nformat magic 1.0\nend_header\n", "is none of PLY"),
        (b"ply\nelement vertex 0\nend_header\n", "names no format"),
        (ply({"vertex": ("float u, float v", [[0, 0]])}), "have no x, y, z; their properties are u, v"),
        (
            ply({"vertex": (XYZ, vertices()), "face": ("list uchar int vertex_indices", [[[0, 1, 8]]])}),
            "names vertex 8 of 8",
        ),
        (
            ply({"vertex": (XYZ, vertices()), "face": ("list uchar int vertex_indices", [[[0, 1, -1]]])}),
            "names vertex -1 of 8",
        ),
        (
            ply(
                {
                    "vertex": (XYZ, vertices()),
                    "face": ("list uchar int a, list uchar int b", [[[0, 1, 2], [0]]]),
                }
            ),
            "no list of vertices among a, b",
        ),
        (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n0 zero 0\n",
            "'zero' stands where a number",
        ),
        (b"\0ply", "no PLY header"),
    ],
)
def test_ply_that_is_wrong(read, content, says):
    with pytest.raises(InputError, match=says):
        read("a.ply", content)


@pytest.mark.parametrize("count", ["10000001", "99999999999999999", "-1"])
def test_ply_that_announces_too_much(read, count):
    with pytest.raises(InputError, match="points|rows of element vertex"):
        read(
            "a.ply",
            f"ply\nformat binary_little_endian 1.0\nelement vertex {count}\nproperty float x\nend_header\n",
        )


def test_ply_with_properties_without_end(read):
    names = "".join(f"property float p{index}\n" for index in range(5000))
    with pytest.raises(UnsafeFile, match="4,097 properties"):
        read("a.ply", f"ply\nformat ascii 1.0\nelement vertex 1\n{names}end_header\n")


def test_ply_equals_trimesh_where_trimesh_is_right(tmp_path):
    "Same places for the same seed: face order and sampling are those of earlier versions."
    ball = trimesh.creation.icosphere(2)
    ball.export(tmp_path / "a.ply")
    xyz, _ = read_points(tmp_path / "a.ply", 500, 3)
    triangles, generator = ball.triangles.astype(np.float32).astype(np.float64), np.random.default_rng(3)
    areas = np.linalg.norm(
        np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1
    )
    total = np.cumsum(areas)
    faces = np.searchsorted(total, (np.arange(500) + generator.random(500)) / 500 * total[-1], side="right")
    root, v = np.sqrt(generator.random(500)), generator.random(500)
    weights, order = np.stack([1 - root, root * (1 - v), root * v], 1), generator.permutation(500)
    np.testing.assert_allclose(xyz, (triangles[faces] * weights[:, :, None]).sum(1)[order], atol=1e-12)


# Gaussian splats


@pytest.mark.parametrize("rgb", [(1, 0, 0), (0, 0, 1), (0.25, 0.5, 0.75)])
@pytest.mark.parametrize("form", ["ascii", "binary_little_endian"])
def test_splat_ply(read, rgb, form):
    rows = splat_rows(rgb, 2.0) + splat_rows((0, 1, 0), -4.0)
    mesh = read("a.ply", ply({"vertex": (SPLAT, rows)}, form))
    assert len(mesh.points) == 5 and np.allclose(mesh.point_colors, rgb, atol=1e-5)
    assert (
        "Gaussian splat" in mesh.warnings[0] and "5 of an opacity below 0.1 were left out" in mesh.warnings[0]
    )


def test_splat_of_nothing_is_refused(read):
    with pytest.raises(InputError, match="all 5 Gaussian splats have an opacity below 0.1"):
        read("a.ply", ply({"vertex": (SPLAT, splat_rows((1, 0, 0), -9))}))


def test_splat_compressed_ply(read):
    chunk = (
        ", ".join(f"float {end}_{name}" for end in ("min", "max") for name in ("x", "y", "z")),
        [[0, 0, 0, 1, 2, 3]],
    )
    packed = (
        "uint packed_position, uint packed_rotation, uint packed_scale, uint packed_color",
        [[0, 0, 0, 0xFF8000FF], [0xFFFFFFFF, 0, 0, 0xFF8000FF], [0, 0, 0, 0]],
    )
    mesh = read("a.ply", ply({"chunk": chunk, "vertex": packed}, "binary_little_endian"))
    assert extent(mesh) == [1, 2, 3] and color(mesh) == ORANGE and len(mesh.points) == 2


def test_splat_file(read):
    row = np.dtype([("xyz", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])
    rows = np.zeros(30, row)
    rows["xyz"], rows["rgba"] = CLOUD, [255, 128, 0, 200]
    mesh = read("a.splat", rows.tobytes())
    assert extent(mesh) == [1, 2, 3] and color(mesh) == ORANGE
    with pytest.raises(InputError, match="no whole number of splats"):
        read("a.splat", rows.tobytes()[:-5])


@pytest.mark.parametrize("version", [1, 2, 3])
def test_spz(read, version):
    places = BOX.astype(np.float64)
    if version == 1:
        body = places.astype("<f2").tobytes()
    else:
        body = np.rint(places * 2**12).astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes()
    red = round(255 * (0.5 / SH_DEGREE_0 * 0.15 + 0.5))
    head = struct.pack("<4sIIBBBB", b"NGSP", version, 8, 0, 12, 0, 0)
    content = (
        head
        + body
        + bytes([255] * 8)
        + bytes([red, 128, 255 - red] * 8)
        + bytes(8 * (7 if version > 2 else 6))
    )
    mesh = read("a.spz", gzip.compress(content))
    assert extent(mesh) == [1, 2, 3] and np.allclose(color(mesh), [1, 0.5, 0], atol=0.01) and mesh.up == "y"
    with pytest.raises(InputError):
        read("a.spz", gzip.compress(content[:40]))


@pytest.mark.parametrize(
    "content",
    [
        b"NGSP" + bytes(40),
        gzip.compress(struct.pack("<4sIIBBBB", b"NGSP", 4, 8, 0, 12, 0, 0)),
        gzip.compress(b"x"),
        gzip.compress(struct.pack("<4sIIBBBB", b"NGSP", 2, 2**31, 0, 12, 0, 0)),
    ],
    ids=["not compressed", "version", "no header", "count"],
)
def test_spz_that_is_wrong(read, content):
    with pytest.raises(InputError):
        read("a.spz", content)


# OFF


@pytest.mark.parametrize(
    "content, expected",
    [
        (off(), None),
        (off(faces=QUADS), None),
        (off(faces=MIXED), None),
        (off(counts=" "), None),
        (off(head="OFF", counts="").replace("OFF\n", "OFF"), None),
        (off(head="", counts=" ").lstrip(), None),
        (off().replace("\n", "\r\n"), None),
        (off().replace("\n", "\r"), None),
        (off().replace("\n", "\n\n"), None),
        (off().replace("OFF\n", "OFF\n# a comment\n").replace("\n0 1", "   # first face\n0 1"), None),
        ("\ufeff" + off(), None),
        (off("COFF", " 255 128 0 255"), ORANGE),
        (off("COFF", " 255 128 0"), ORANGE),
        (off("COFF", " 1.0 0.5 0.0 1.0"), ORANGE),
        (off("COFF", " 1 0.5 0 1", faces=MIXED), ORANGE),
        (off("OFF", " 255 128 0"), ORANGE),
        (off("OFF", " 255 128 0 255"), ORANGE),
        (off("NOFF", " 0 0 1"), None),
        (off("CNOFF", " 0 0 1 255 128 0 255"), ORANGE),
        (off("STOFF", " 0.5 0.5"), None),
        (off(face_more=" 255 128 0"), ORANGE),
        (off(face_more=" 255 128 0 255"), ORANGE),
        (off(face_more=" 1.0 0.5 0.0"), ORANGE),
        (off(face_more="  1 0.5 0 1", faces=MIXED), ORANGE),
        (off(face_more=" 3"), None),
        (off().replace("\n3 ", "\n3\n"), None),
        (
            "".join(
                f"{line}\n"
                for line in off()
                .replace("OFF\n8 12 0", "OFF 8 12 0")
                .replace("0 0 0\n", "0 0\n0\n", 1)
                .split("\n")
            ),
            None,
        ),
    ],
)
def test_off(read, content, expected):
    mesh = read("a.off", content)
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == 12 and color(mesh) == expected


def test_off_some_faces_colored(read):
    lines = off(faces=QUADS).rstrip().split("\n")
    lines[-1] += " 255 128 0"
    mesh = read("a.off", "\n".join(lines))
    assert (
        extent(mesh) == [1, 2, 3] and color(mesh) == ORANGE and np.isnan(mesh.surfaces[0].face_colors).any()
    )


def test_off_without_faces_is_a_cloud(read):
    assert len(read("a.off", f"OFF\n8 0 0\n{OFF_BOX}\n").points) == 8


@pytest.mark.parametrize(
    "content, says",
    [
        (off()[:-8], "announces 12 faces"),
        (f"OFF\n8 12 0\n{OFF_BOX[:20]}", "announces 8 vertices"),
        (off().replace("3 0 1", "3 0 9", 1), "."),
        ("4OFF\n1 0 0\n0 0 0 1\n", "four or more dimensions"),
        ("OFF BINARY\n", "binary kind"),
        ("OFF\nmany vertices\n", "instead of OFF and its counts"),
        ("OFF\n99999999 1 0\n", "99,999,999 points"),
        ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 one 0\n3 0 1 2\n", "'one' stands"),
    ],
)
def test_off_that_is_wrong(read, content, says):
    with pytest.raises(InputError, match=says):
        read("a.off", content)


# STL


@pytest.mark.parametrize(
    "content, expected",
    [
        (stl(), None),
        (stl(b"solid exported by something"), None),
        (stl(b"solid facet normal"), None),
        (stl(more=bytes(10)), None),
        (stl(b"solid x", more=b"trailing"), None),
        (stl(attribute=1 << 15 | 31 << 10 | 16 << 5), ORANGE),
        (stl(b"COLOR=\x00\x00\x00\xff", 31 | 16 << 5), ORANGE),
        (stl(b"COLOR=\xff\x80\x00\xff,MATERIAL=", 1 << 15), ORANGE),
        (stl_text(), None),
        (stl_text("\r\n"), None),
        (stl_text("\r"), None),
        (stl_text(upper=True), None),
        (stl_text() + stl_text(), None),
        (stl_text(end=""), None),
    ],
)
def test_stl(read, content, expected):
    mesh = read("a.stl", content)
    assert extent(mesh) == [1, 2, 3] and mesh.up == "z"
    assert expected is None and color(mesh) is None or np.allclose(color(mesh), expected, atol=0.02)


def test_stl_trailing_bytes_are_reported(read):
    assert read("a.stl", stl(more=bytes(10))).warnings == ["10 bytes after the last triangle were left out"]


@pytest.mark.parametrize(
    "content, says",
    [
        (stl()[:-60], "announces 12 triangles, holds 10"),
        (stl()[:50], "announces 0|holds 0"),
        (stl_text()[:-60], "cut short"),
        (stl()[:80] + b"\xff\xff\xff\x7f", "announces 2,147,483,647"),
        (b"solid x\nendsolid x\n", "a.stl"),
        (b"solid x\nfacet normal a b c\n", "stands where a number"),
    ],
)
def test_stl_that_is_wrong(read, content, says):
    with pytest.raises(InputError, match=says):
        read("a.stl", content)


# PCD


@pytest.mark.parametrize("form", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize(
    "fields, types, sizes, columns, expected",
    [
        ("x y z", "F F F", "4 4 4", [], None),
        ("x y z", "F F F", "8 8 8", [], None),
        (
            "X Y Z Red Green Blue",
            "F F F U U U",
            "4 4 4 2 2 2",
            [FULL * 65535, FULL * 32768, FULL * 0],
            ORANGE,
        ),
        ("x y z r g b", "F F F U U U", "4 4 4 1 1 1", [FULL * 255, FULL * 128, FULL * 0], ORANGE),
        ("x y z red green blue", "F F F F F F", "4 4 4 4 4 4", [FULL * 1, FULL * 0.5, FULL * 0], ORANGE),
        ("x y z rgb", "F F F F", "4 4 4 4", [PACKED.view(np.float32)], ORANGE),
        ("x y z rgb", "F F F U", "4 4 4 4", [PACKED], ORANGE),
        ("x y z rgba", "F F F U", "4 4 4 4", [PACKED | np.uint32(255 << 24)], ORANGE),
        ("x y z RGB", "F F F I", "4 4 4 4", [PACKED], ORANGE),
        ("x y z intensity", "F F F F", "4 4 4 4", [FULL * 0.5], None),
        ("x y z normal_x normal_y normal_z", "F F F F F F", "4 4 4 4 4 4", [FULL * 0, FULL * 0, FULL], None),
        ("x y z _ rgb", "F F F U F", "4 4 4 1 4", [FULL * 7, PACKED.view(np.float32)], ORANGE),
    ],
)
def test_pcd(read, form, fields, types, sizes, columns, expected):
    mesh = read("a.pcd", pcd(fields, types, sizes, [*CLOUD.T, *columns], form))
    assert extent(mesh) == [1, 2, 3] and len(mesh.points) == 30 and color(mesh) == expected


@pytest.mark.parametrize("form", ["ascii", "binary", "binary_compressed"])
def test_pcd_fields_of_several_values(read, form):
    columns = [*CLOUD.T[:2], np.tile([9.0, 8, 7], (30, 1)), CLOUD[:, 2]]
    mesh = read("a.pcd", pcd("x y histogram z", "F F F F", "4 4 4 4", columns, form, counts="1 1 3 1"))
    assert extent(mesh) == [1, 2, 3]


def test_pcd_integer_in_a_float_field(read):
    mesh = read("a.pcd", pcd("x y z rgb", "F F F F", "4 4 4 4", [*CLOUD.T, PACKED.astype(float)]))
    assert color(mesh) == ORANGE


def test_pcd_pixels_without_a_reading(read):
    holes = CLOUD.copy()
    holes[5:9] = np.nan
    mesh = read(
        "a.pcd", pcd("x y z rgb", "F F F F", "4 4 4 4", [*holes.T, PACKED.view(np.float32)], "binary")
    )
    assert len(mesh.points) == 26 and color(mesh) == ORANGE


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_pcd_line_ends(read, newline):
    assert extent(read("a.pcd", pcd("x y z", "F F F", "4 4 4", [*CLOUD.T], "binary", newline))) == [1, 2, 3]


@pytest.mark.parametrize(
    "content, says",
    [
        (pcd("x y z", "F F F", "4 4 4", [*CLOUD.T], "binary")[:-5], "announces 30 points, holds 29"),
        (pcd("x y z", "F F F", "4 4 4", [*CLOUD.T])[:-30], "announces 30 points, holds 2"),
        (pcd("x y z", "F F F", "4 4 4", [*CLOUD.T], "binary_compressed")[:-9], "LZF stream"),
        (pcd("a b c", "F F F", "4 4 4", [*CLOUD.T]), "lack x, y, z"),
        (pcd("x y z", "F F F", "4 4 4", [*CLOUD.T]).replace(b"DATA ascii", b"DATA zip"), "DATA zip is not"),
        (
            pcd("x y z", "F F F", "4 4 4", [*CLOUD.T]).replace(b"POINTS 30", b"POINTS many"),
            "announces many points",
        ),
        (
            pcd("x y z", "F F F", "4 4 4", [*CLOUD.T]).replace(b"POINTS 30", b"POINTS 99999999999"),
            "99,999,999,999 points",
        ),
        (pcd("x y z", "F F F", "4 4 4", [*CLOUD.T]).replace(b"TYPE F F F", b"TYPE F F"), "differ in length"),
        (pcd("x y z", "F F F", "4 4 4", [*CLOUD.T]).replace(b"SIZE 4 4 4", b"SIZE 3 4 4"), "none of PCD"),
        (b"FIELDS x y z\n" * 10, "no DATA line"),
    ],
)
def test_pcd_that_is_wrong(read, content, says):
    with pytest.raises(InputError, match=says):
        read("a.pcd", content)


# text


@pytest.mark.parametrize("suffix", [".xyz", ".txt", ".asc", ".csv", ".pts"])
@pytest.mark.parametrize(
    "content, expected",
    [
        (rows(), None),
        (rows(*ORANGE_8), ORANGE),
        (rows("65535", "32768", "0"), ORANGE),
        (rows("1.0", "0.5", "0.0"), ORANGE),
        (rows("100", *ORANGE_8), ORANGE),
        (rows("-700", *ORANGE_8), ORANGE),
        (rows("0.25", *ORANGE_8), ORANGE),
        (rows("0", "0", "1"), None),
        (rows("0.6", "0", "0.8"), None),
        (rows("0", "-0.6", "0.8"), None),
        (rows("100"), None),
        (rows(*ORANGE_8, "0", "0", "1"), ORANGE),
        (rows("0", "0", "1", *ORANGE_8), ORANGE),
        (rows("100", *ORANGE_8, "0", "0", "1"), ORANGE),
        (rows(*ORANGE_8, separator=","), ORANGE),
        (rows(*ORANGE_8, separator=", "), ORANGE),
        (rows(*ORANGE_8, separator=";"), ORANGE),
        (rows(*ORANGE_8, separator="\t"), ORANGE),
        (rows(*ORANGE_8, separator="   "), ORANGE),
        (rows(*ORANGE_8, separator=";").replace(".", ","), ORANGE),
        (rows(*ORANGE_8).replace(".", ","), ORANGE),
        (rows(*ORANGE_8).replace("\n", "\r\n"), ORANGE),
        (rows(*ORANGE_8).replace("\n", "\r"), ORANGE),
        (rows(*ORANGE_8).replace("\n", "\n\n"), ORANGE),
        (rows(*ORANGE_8).replace("\n", " \n"), ORANGE),
        (rows(*ORANGE_8, separator=",").replace("\n", ",\n"), ORANGE),
        (rows(*ORANGE_8).rstrip("\n"), ORANGE),
        ("\ufeff" + rows(*ORANGE_8), ORANGE),
        ("# made here\n# x y z\n" + rows(*ORANGE_8), ORANGE),
        ("X Y Z R G B\n" + rows(*ORANGE_8), ORANGE),
        ("//X Y Z R G B\n30\n" + rows(*ORANGE_8), ORANGE),
        ("30\n" + rows(*ORANGE_8), ORANGE),
        ("30\n" + rows("-700", *ORANGE_8), ORANGE),
        ("x,y,z,intensity,red,green,blue\n" + rows("9", *ORANGE_8, separator=","), ORANGE),
        ("x,y,z,a,b,c\n" + rows(*ORANGE_8, separator=","), None),
        ('"X [m]";"Y [m]";"Z [m]";"B";"G";"R"\n' + rows(*ORANGE_8[::-1], separator=";"), ORANGE),
        ("# x y z nx ny nz\n" + rows("0.6", "0", "0.8"), None),
        ("x,y,z,label,r,g,b\n" + rows("tree", *ORANGE_8, separator=","), ORANGE),
    ],
)
def test_text(read, suffix, content, expected):
    mesh = read(f"a{suffix}", content)
    assert extent(mesh) == [1, 2, 3] and len(mesh.points) == 30 and color(mesh) == expected


def test_text_columns_by_name_in_any_order(read):
    content = "label,b,z,g,y,r,x\n" + "".join(
        f"tree,0,{z:.4f},128,{y:.4f},255,{x:.4f}\n" for x, y, z in CLOUD
    )
    mesh = read("a.csv", content)
    assert extent(mesh) == [1, 2, 3] and color(mesh) == ORANGE


def test_text_says_what_it_assumed(read):
    assert read("a.xyz", rows("100", *ORANGE_8)).warnings == [
        "columns 4 to 7 were read as intensity, red, green, blue"
    ]
    assert "read as normals" in read("a.xyz", rows("0", "0", "1")).warnings[0]
    assert (
        not read("a.xyz", rows(*ORANGE_8)).warnings
        and not read("a.pts", "30\n" + rows("-7", *ORANGE_8)).warnings
    )


def test_text_of_opaque_rgba(read):
    content = "".join(
        "{:.4f} {:.4f} {:.4f} {} 128 0 255\n".format(*row, 254 + index % 2) for index, row in enumerate(CLOUD)
    )
    assert color(read("a.xyz", content)) == ORANGE


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.xyz", rows(*ORANGE_8)[:-8], "of 6 values in the last row; the file was cut short"),
        ("a.csv", rows(*ORANGE_8, separator=",").rstrip()[:-6], "of 6 values in the last row"),
        ("a.xyz", rows(*ORANGE_8) + "1 2 3\n" + rows(*ORANGE_8), "3 of 6 values in row 31"),
        ("a.pts", "31\n" + rows(*ORANGE_8), "announces 31 points, holds 30"),
        ("a.pts", "20\n" + rows(*ORANGE_8), None),
        ("a.txt", rows() + "four five six\n", "not made of numbers"),
        ("a.txt", "hello\nworld\n", "no row of at least three numbers"),
        ("a.xyz", "3\nwater\nO 0 0 0\nH 1 0 0\nH 0 1 0\n", "no row of at least three numbers"),
        ("a.asc", "ncols 4\nnrows 2\nxllcorner 0\n1 2 3 4\n", "ESRI grid"),
        (
            "a.txt",
            "\n".join(" ".join("0.5" for _ in range(32)) for _ in range(24)),
            "looks like a picture or like features",
        ),
        ("a.csv", "x,y,z\n1,2,3\n4,,6\n", "lack a number; the first is row 2"),
        ("a.xyz", "1 2\n3 4\n", "no row of at least three numbers"),
        ("a.xyz", b"\xff\xfe\x00\x01" * 50, "a.xyz"),
    ],
)
def test_text_that_is_wrong(read, name, content, says):
    if says is None:
        mesh = read(name, content)
        assert len(mesh.points) == 20 and "10 more rows than announced" in mesh.warnings[0]
        return
    with pytest.raises(InputError, match=says):
        read(name, content)


def test_pts_of_several_clouds(read):
    mesh = read("a.pts", "30\n" + rows("-7", *ORANGE_8) + "30\n" + rows("-7", *ORANGE_8).replace("\n", "\n"))
    assert len(mesh.points) == 60 and extent(mesh) == [1, 2, 3] and color(mesh) == ORANGE and mesh.up == "z"


@pytest.mark.parametrize("more, expected", [(" 0.5 255 128 0", ORANGE), (" 0.5", None)])
def test_ptx(read, more, expected):
    mesh = read("a.ptx", ptx(more=more) + ptx("10 0 0 1", more))
    assert (
        extent(mesh) == [11, 2, 3]
        and color(mesh) == expected
        and (mesh.up, mesh.unit_in_meters) == ("z", 1.0)
    )
    assert len(mesh.points) == 58  # the place 0 0 0 of each scan is a ray without an echo


@pytest.mark.parametrize(
    "content, says",
    [
        (ptx()[:-80], "announces 30 points, holds 2"),
        (ptx() + "1\n", "does not begin a scan"),
        (ptx(count="9999999\n9999999\n"), "points"),
        (rows(), "does not begin a scan"),
    ],
)
def test_ptx_that_is_wrong(read, content, says):
    with pytest.raises(InputError, match=says):
        read("a.ptx", content)


# numpy


def saved(tmp_path, name: str, array=None, **arrays):
    np.save(tmp_path / name, array, allow_pickle=True) if array is not None else np.savez(
        tmp_path / name, **arrays
    )
    return read_mesh(tmp_path / name)


@pytest.mark.parametrize(
    "array, expected",
    [
        (CLOUD, None),
        (CLOUD.astype(np.float32), None),
        (np.asfortranarray(CLOUD), None),
        (np.c_[CLOUD, np.tile(ORANGE, (30, 1))], ORANGE),
        (np.c_[CLOUD, np.tile([255, 128, 0], (30, 1))], ORANGE),
        (np.c_[CLOUD, np.tile([65535, 32768, 0], (30, 1))], ORANGE),
        (np.c_[CLOUD, np.tile([0, 0, 1], (30, 1))], None),
        (np.c_[CLOUD, CLOUD - 0.5], None),
        (np.c_[CLOUD, np.full(30, 99), np.tile([255, 128, 0], (30, 1))], ORANGE),
        (np.c_[CLOUD, np.full(30, 99)], None),
        (
            np.rec.fromarrays([*CLOUD.T, *np.tile([[255], [128], [0]], 30)], names="X,Y,Z,red,green,blue"),
            ORANGE,
        ),
    ],
)
def test_npy(tmp_path, array, expected):
    mesh = saved(tmp_path, "a.npy", array)
    assert extent(mesh) == [1, 2, 3] and color(mesh) == expected


@pytest.mark.parametrize(
    "array, says",
    [
        (np.random.rand(24, 32), "depth picture or features"),
        (np.ones((24, 32), np.uint16), "a picture"),
        (np.zeros((24, 32, 3), np.uint8), "a picture"),
        (CLOUD.T.repeat(20, 1), "transposed"),
        (np.ones((6, 500)), "transposed"),
        (np.random.rand(1000, 512), "features"),
        (CLOUD[None], "a batch of one cloud"),
        (np.random.rand(5, 100, 3), "several clouds, or a grid"),
        (np.ones((50, 3), bool), "a mask"),
        (np.ones(50), "1 dimensions"),
        (np.ones((50, 2)), "a table of 2 columns"),
        (np.array(["a"]), "not numbers"),
        (np.array([{}], object), "pickled objects"),
        (np.ones((50, 3), complex), "not numbers"),
        (np.full((50, 3), np.nan), "NaN or infinite"),
        (np.empty((0, 3)), "no points"),
    ],
)
def test_npy_that_is_no_cloud(tmp_path, array, says):
    with pytest.raises(InputError, match=says):
        saved(tmp_path, "a.npy", array)


@pytest.mark.parametrize(
    "arrays, expected",
    [
        ({"points": CLOUD}, None),
        ({"xyz": CLOUD, "rgb": np.tile(np.uint8([255, 128, 0]), (30, 1))}, ORANGE),
        ({"points": CLOUD, "colors": np.tile(ORANGE, (30, 1))}, ORANGE),
        ({"points": CLOUD, "colours": np.tile(np.uint8([255, 128, 0, 255]), (30, 1))}, ORANGE),
        ({"arr_0": np.c_[CLOUD, np.tile(ORANGE, (30, 1))]}, ORANGE),
        ({"points": np.c_[CLOUD, np.tile([0, 0, 1], (30, 1))], "colors": np.tile(ORANGE, (30, 1))}, ORANGE),
        ({"vertices": BOX, "faces": FACES}, None),
        ({"vertices": BOX, "faces": FACES, "colors": np.tile(np.uint8([255, 128, 0]), (8, 1))}, ORANGE),
    ],
)
def test_npz(tmp_path, arrays, expected):
    mesh = saved(tmp_path, "a.npz", **arrays)
    assert (
        extent(mesh) == [1, 2, 3] and color(mesh) == expected and bool(mesh.face_count) == ("faces" in arrays)
    )


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"features": CLOUD}, "no array named"),
        ({"points": np.zeros((5, 100, 3))}, "use read_collection"),
        ({"points": CLOUD, "colors": CLOUD[:5]}, "do not match"),
        ({"points": np.random.rand(24, 32)}, "depth picture"),
        ({"vertices": BOX, "faces": FACES + 1}, "names vertex 8"),
        ({"vertices": BOX, "faces": FACES.astype(float)}, "whole numbers"),
        ({"points": np.array([{}], object)}, "pickled"),
    ],
)
def test_npz_that_is_no_cloud(tmp_path, arrays, says):
    with pytest.raises(InputError, match=says):
        saved(tmp_path, "a.npz", **arrays)


# limits hold for all of them


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.ply", ply({"vertex": (XYZ, vertices())})),
        ("a.off", off()),
        ("a.pcd", pcd("x y z", "F F F", "4 4 4", [*CLOUD.T])),
        ("a.xyz", rows()),
        ("a.pts", "30\n" + rows()),
        ("a.ptx", ptx()),
        ("a.splat", bytes(320)),
    ],
)
def test_more_points_than_allowed(read, name, content):
    with limits(points=7), pytest.raises(UnsafeFile, match="points, more than the 7"):
        read(name, content)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.ply", ply({"vertex": (XYZ, vertices()), "face": FACE})),
        ("a.off", off()),
        ("a.stl", stl()),
        ("b.stl", stl_text()),
    ],
)
def test_more_faces_than_allowed(read, name, content):
    with limits(faces=11), pytest.raises(UnsafeFile, match="12 faces, more than the 11"):
        read(name, content)


def test_every_refusal_names_the_file(tmp_path):
    for name, content in {
        "a.ply": b"ply\n",
        "a.off": b"OFF\n",
        "a.stl": b"x",
        "a.pcd": b"x",
        "a.xyz": b"x",
        "a.npy": b"x",
        "a.npz": b"x",
        "a.ptx": b"x",
        "a.splat": b"x",
        "a.spz": b"x",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Cg3dError, match=name):
            read_shape(tmp_path / name)
