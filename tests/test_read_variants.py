"""Further variants of every format, as programs write them: each has a known extent, color and number of warnings."""

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cloud_writer import CLOUD, FACE, ORANGE, XYZ, off, pcd, ply, rows, stl_text, vertices
from foreign_writer import HALVES, dae, las, legacy, step, three_mf, usd_box, usd_moved_picture, usda, xml
from gltf_writer import BOX, FACES, Gltf, picture
from mesh_checks import color, extent

from cg3d.core.errors import Cg3dError
from cg3d.io.color import to_srgb
from cg3d.io.read import read_mesh
from cg3d.io.splat import SH_DEGREE_0

RED, BLUE = [1, 0, 0], [0, 0, 1]
UV = np.full((8, 2), 0.5)
V = "".join("v {:g} {:g} {:g}\n".format(*row) for row in BOX)
F = "".join("f {} {} {}\n".format(*row) for row in FACES + 1)
FT = "".join("f {0}/1 {1}/1 {2}/1\n".format(*row) for row in FACES + 1)


@dataclass
class Variant:
    "A file that is written by code, and what it holds."

    write: callable  # folder -> path
    color: list | None  # mean, sRGB
    size: list  # extent
    says: str | None  # a part of its only warning; None: no warning


VARIANTS: dict[str, Variant] = {}


def variant(color=None, size=(1, 2, 3), says=None):
    "Register a function that writes a file."

    def register(write):
        VARIANTS[write.__name__] = Variant(write, color, list(size), says)
        return write

    return register


def save(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(tmp_path, name):
    wanted = VARIANTS[name]
    mesh = read_mesh(wanted.write(tmp_path))
    assert extent(mesh) == pytest.approx(wanted.size, rel=1e-3)
    assert (
        color(mesh) is None if wanted.color is None else color(mesh) == pytest.approx(wanted.color, abs=0.01)
    )
    assert (
        not mesh.warnings
        if wanted.says is None
        else len(mesh.warnings) == 1 and wanted.says in mesh.warnings[0]
    )


def test_there_are_forty():
    assert len(VARIANTS) >= 40


# glTF


def scene(folder, gltf: Gltf, primitive: dict, name: str = "a.glb", **node) -> Path:
    return gltf.scene({"mesh": gltf.mesh(primitive)} | node).write(folder / name)


@variant(RED)
def gltf_sparse_vertex_colors(folder):
    gltf = Gltf()
    places = {"bufferView": gltf.view(np.arange(8, dtype="<u2").tobytes()), "componentType": 5123}
    values = {"bufferView": gltf.view(np.tile(np.float32(RED), (8, 1)).tobytes())}
    entry = {"componentType": 5126, "count": 8, "type": "VEC3"}
    sparse = {"sparse": {"count": 8, "indices": places, "values": values}}
    return scene(folder, gltf, gltf.box(COLOR_0=gltf.entry("accessors", entry | sparse)))


@variant(BLUE)
def gltf_quantized_uv_with_texture_transform(folder):
    "As gltfpack writes it: whole numbers of 12 bits, scaled by the material."
    gltf = Gltf(extensionsRequired=["KHR_mesh_quantization", "KHR_texture_transform"])
    transform = {"KHR_texture_transform": {"scale": [1 / 4095, 1 / 4095]}}
    material = gltf.textured(HALVES, extensions=transform)
    return scene(folder, gltf, gltf.box(material, TEXCOORD_0=gltf.accessor(np.full((8, 2), 3000), "u2")))


@variant(size=(2, 1, 3))
def gltf_instances_below_a_turned_node(folder):
    gltf = Gltf()
    places = {"TRANSLATION": gltf.accessor([[0, 0, 0]])}
    node = {"mesh": gltf.mesh(gltf.box()), "extensions": {"EXT_mesh_gpu_instancing": {"attributes": places}}}
    turned = {"rotation": [0, 0, np.sqrt(0.5), np.sqrt(0.5)], "children": [0]}
    gltf.json |= {"nodes": [node, turned], "scenes": [{"nodes": [1]}], "scene": 0}
    return gltf.write(folder / "a.glb")


@variant(size=(1.5, 2, 3))
def gltf_morph_of_quantized_moves(folder):
    gltf = Gltf()
    move = gltf.accessor(np.rint(BOX * [127, 0, 0]), "i1", normalized=True)
    mesh = gltf.mesh(gltf.box() | {"targets": [{"POSITION": move}]}, weights=[0.5])
    return gltf.scene({"mesh": mesh}).write(folder / "a.glb")


@variant()
def gltf_bytes_behind_the_last_chunk(folder):
    gltf = Gltf()
    path = scene(folder, gltf, gltf.box())
    return save(path, path.read_bytes() + b"\0\0\0\0\0")


@variant()
def gltf_text_with_byte_order_mark_and_buffer_of_a_quoted_name(folder):
    gltf = Gltf()
    gltf.scene({"mesh": gltf.mesh(gltf.box())}).write(folder / "a.gltf", "my buffer (1).bin")
    text = (folder / "a.gltf").read_text().replace("my buffer (1)", "my%20buffer%20%281%29")
    return save(folder / "a.gltf", "\ufeff" + text)


@variant(RED)
def gltf_texture_of_upper_case_and_backslash(folder):
    save(folder / "textures" / "Red.PNG", picture((255, 0, 0)))
    gltf = Gltf()
    material = gltf.textured(None, image={"uri": "Textures\\red.png"})
    return scene(folder, gltf, gltf.box(material, TEXCOORD_0=gltf.accessor(UV)), "a.gltf")


@variant(RED)
def gltf_avif(folder):
    gltf = Gltf(extensionsRequired=["EXT_texture_avif"])
    image = gltf.entry("images", {"bufferView": gltf.view(picture((255, 0, 0), "AVIF", quality=100))})
    material = gltf.textured(None, {"extensions": {"EXT_texture_avif": {"source": image}}})
    return scene(folder, gltf, gltf.box(material, TEXCOORD_0=gltf.accessor(UV)))


def with_alpha(folder, **material) -> Path:
    "The right half (x = 1) is transparent and blue, the left one red; all of it is where alpha plays no part."
    gltf = Gltf()
    right = BOX[:, :1] > 0.5
    colors = np.where(right, [0, 0, 1, 0.0], [1, 0, 0, 1.0])
    corners = BOX[FACES].reshape(-1, 3)
    flat = np.abs(np.ptp(BOX[FACES][:, :, 0], axis=1)) < 0.5  # the two sides at x = 0 and x = 1
    rows = np.flatnonzero(np.repeat(flat, 3))
    attributes = {
        "POSITION": gltf.accessor(corners[rows]),
        "COLOR_0": gltf.accessor(colors[FACES.ravel()[rows]]),
    }
    primitive = {"attributes": attributes}
    if material:
        primitive["material"] = gltf.entry("materials", material)
    return scene(folder, gltf, primitive)


@variant([0.5, 0, 0.5])
def gltf_alpha_of_vertices_where_the_file_says_opaque(folder):
    return with_alpha(folder, alphaMode="OPAQUE")


@variant([0.5, 0, 0.5])
def gltf_alpha_of_vertices_without_a_material(folder):
    return with_alpha(folder)


@variant(RED)
def gltf_alpha_of_vertices_as_a_mask(folder):
    return with_alpha(folder, alphaMode="MASK")


@variant(RED)
def gltf_alpha_of_vertices_that_is_blended(folder):
    return with_alpha(folder, alphaMode="BLEND")


@variant(RED, says="8 of an opacity below 0.1 were left out")
def gltf_alpha_of_points(folder):
    gltf = Gltf()
    colors = np.concatenate([np.tile([1, 0, 0, 1.0], (8, 1)), np.tile([0, 0, 1, 0.0], (8, 1))])
    attributes = {"POSITION": gltf.accessor(np.tile(BOX, (2, 1))), "COLOR_0": gltf.accessor(colors)}
    material = gltf.entry("materials", {"alphaMode": "BLEND"})
    return scene(folder, gltf, {"attributes": attributes, "mode": 0, "material": material})


# OBJ


@variant([0.5, 0, 0.5], size=(11, 2, 3))
def obj_bytes_as_vertex_colors_of_two_objects_with_negative_indices(folder):
    back = "".join("f {} {} {}\n".format(*row) for row in FACES - 8)
    parts = []
    for shift, rgb in ((0, "255 0 0"), (10, "0 0 255")):
        parts.append("o a\n" + "".join(f"v {x + shift:g} {y:g} {z:g} {rgb}\n" for x, y, z in BOX) + back)
    return save(folder / "a.obj", "".join(parts))


@variant()
def obj_tabs_signs_and_exponents(folder):
    numbers = "".join("v\t{:+.3e}\t{:+.3e}\t{:+.3e}\n".format(*row) for row in BOX)
    return save(folder / "a.obj", numbers + F.replace(" ", "\t"))


@variant(RED)
def obj_utf16(folder):
    save(folder / "m.mtl", "newmtl a\nKd 1 0 0\n".encode("utf-16"))
    return save(folder / "a.obj", ("mtllib m.mtl\nusemtl a\n" + V + F).encode("utf-16"))


@variant(RED)
def obj_library_and_texture_in_a_subfolder(folder):
    "Names in a library are relative to the library."
    save(folder / "sub" / "m.mtl", "newmtl a\nmap_Kd t.png\n")
    save(folder / "sub" / "t.png", picture((255, 0, 0)))
    return save(folder / "a.obj", "mtllib sub/m.mtl\nusemtl a\nvt 0.5 0.5\n" + V + FT)


@variant(RED)
def obj_texture_below_the_folder_of_its_library(folder):
    save(folder / "sub" / "m.mtl", "newmtl a\nmap_Kd ../tex/t.png\n")
    save(folder / "tex" / "t.png", picture((255, 0, 0)))
    return save(folder / "a.obj", "mtllib sub/m.mtl\nusemtl a\nvt 0.5 0.5\n" + V + FT)


@variant()
def obj_slashes_without_numbers(folder):
    return save(folder / "a.obj", V + "".join("f {}// {}// {}//\n".format(*row) for row in FACES + 1))


@variant()
def obj_lines_and_points_beside_faces(folder):
    return save(folder / "a.obj", V + "p 1 2\nl 1 2 3\n" + F + "s off\ng x y\n")


@variant([0.5, 0.5, 0.5], says="m.mtl")
def obj_a_library_that_is_not_there_beside_one_that_is(folder):
    save(folder / "n.mtl", "newmtl a\nKd 0.5 0.5 0.5\n")
    return save(folder / "a.obj", "mtllib m.mtl\nmtllib n.mtl\nusemtl a\n" + V + F)


# PLY


@variant([1, 0, 0])
def ply_alpha_of_a_cloud(folder):
    "What is more transparent than a splat that is left out is left out."
    clear = [[*row, 0, 0, 255, 0] for row in BOX]
    opaque = [[*row, 255, 0, 0, 255] for row in BOX]
    names = f"{XYZ}, uchar red, uchar green, uchar blue, uchar alpha"
    return save(folder / "a.ply", ply({"vertex": (names, opaque + clear)}, "binary_little_endian"))


VARIANTS["ply_alpha_of_a_cloud"].says = "8 of an opacity below 0.1 were left out"


@variant([1, 0, 0], size=(0, 2, 3))
def ply_alpha_of_a_mesh(folder):
    names = f"{XYZ}, uchar red, uchar green, uchar blue, uchar alpha"
    values = [[*row, *((0, 0, 255, 0) if row[0] > 0.5 else (255, 0, 0, 255))] for row in BOX]
    sides = [[list(f)] for f in FACES if np.ptp(BOX[f][:, 0]) == 0]
    content = ply({"vertex": (names, values), "face": ("list uchar int vertex_indices", sides)})
    return save(folder / "a.ply", content)


VARIANTS["ply_alpha_of_a_mesh"].size = [1, 2, 3]  # the bounds are those of all faces


@variant(ORANGE, says="transparent")
def ply_alpha_that_hides_everything(folder):
    "PCL writes 0 where it has no alpha."
    names = f"{XYZ}, uchar red, uchar green, uchar blue, uchar alpha"
    return save(folder / "a.ply", ply({"vertex": (names, vertices(255, 128, 0, 0))}))


@variant(ORANGE, says="read as a cloud of 30 centers")
def ply_splat_without_opacity_and_with_all_harmonics(folder):
    names = (
        XYZ
        + "".join(f", float f_dc_{i}" for i in range(3))
        + "".join(f", float f_rest_{i}" for i in range(45))
    )
    values = (np.array(ORANGE) - 0.5) / SH_DEGREE_0
    return save(
        folder / "a.ply",
        ply({"vertex": (names, [[*row, *values, *[0.3] * 45] for row in CLOUD])}, "binary_little_endian"),
    )


@variant()
def ply_upper_case_elements_and_polygons_of_two_corners(folder):
    faces = [[list(face)] for face in FACES] + [[[0, 1]], [[]]]
    content = ply(
        {"Vertex": (XYZ, vertices()), "FACE": ("list uchar int Vertex_Indices", faces)}, "binary_big_endian"
    )
    return save(folder / "a.ply", content)


@variant(ORANGE)
def ply_sized_types_and_colors_between_the_coordinates(folder):
    names = "double x, uchar red, double y, uchar green, double z, uchar blue"
    values = [[x, 255, y, 128, z, 0] for x, y, z in BOX]
    content = ply({"vertex": (names, values), "face": FACE}, "binary_big_endian")
    content = content.replace(b"property double", b"property float64").replace(
        b"property uchar", b"property uint8"
    )
    return save(folder / "a.ply", content.replace(b"list uchar int", b"list uint8 int32"))


@variant(ORANGE)
def ply_strips_with_vertex_colors(folder):
    strips = (
        "list int int vertex_indices",
        [[[0, 1, 4, 5, 6, 7, 2, 3, 0, 1, -1, 0, 4, 2, 6, -1, 1, 3, 5, 7]]],
    )
    elements = {
        "vertex": (f"{XYZ}, uchar red, uchar green, uchar blue", vertices(255, 128, 0)),
        "tristrips": strips,
    }
    return save(folder / "a.ply", ply(elements, "binary_little_endian"))


# OFF and STL


@variant(ORANGE)
def off_bytes_as_floats(folder):
    return save(folder / "a.off", off("COFF", " 255.0 128.0 0.0 255.0"))


@variant()
def off_comment_behind_the_word_and_no_edges(folder):
    return save(folder / "a.off", off().replace("OFF\n8 12 0", "OFF # made here\n\n8 12"))


@variant()
def stl_text_with_normals_that_are_no_numbers(folder):
    return save(folder / "a.stl", stl_text().replace("0 0 1e0", "nan -nan nan"))


@variant()
def stl_text_of_tabs_and_several_solids_named_after_keywords(folder):
    text = (
        stl_text()
        .replace("solid a facet vertex 1 2 3", "solid endfacet vertex 9 9 9")
        .replace(" vertex", "\tvertex")
    )
    return save(folder / "a.stl", text + text)


# PCD, text, numpy, splats


@variant(ORANGE)
def pcd_organized_with_holes(folder):
    holes = np.concatenate([CLOUD, np.full((30, 3), np.nan)])
    packed = np.full(60, 255 << 16 | 128 << 8, np.uint32).view(np.float32)
    content = pcd("x y z rgb", "F F F F", "4 4 4 4", [*holes.T, packed], "binary")
    return save(folder / "a.pcd", content.replace(b"WIDTH 60\nHEIGHT 1", b"WIDTH 30\nHEIGHT 2"))


@variant(ORANGE)
def pcd_text_without_counts_and_with_comments(folder):
    columns = [*CLOUD.T, *np.tile([[255], [128], [0]], 30)]
    content = pcd("x y z r g b", "F F F U U U", "4 4 4 1 1 1", columns)
    return save(
        folder / "a.pcd",
        content.replace(b"COUNT 1 1 1 1 1 1\n", b"# no counts\n").replace(b"DATA ascii", b"DATA ASCII"),
    )


@variant(ORANGE)
def text_of_decimal_commas_and_tabs(folder):
    return save(folder / "a.txt", rows("255", "128", "0", separator="\t").replace(".", ","))


@variant(ORANGE)
def text_headed_by_units(folder):
    return save(folder / "a.asc", "X(m) Y(m) Z(m) Intensity Red Green Blue\n" + rows("7", "255", "128", "0"))


@variant(ORANGE)
def text_of_normals_before_colors(folder):
    return save(folder / "a.xyz", rows("0.6", "0", "-0.8", "255", "128", "0"))


@variant()
def text_of_a_scalar_field(folder):
    return save(folder / "a.xyz", rows("-3.25"))


@variant(ORANGE)
def numpy_records_of_vectors(folder):
    array = np.zeros(30, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    array["xyz"], array["rgb"] = CLOUD, [255, 128, 0]
    np.save(folder / "a.npy", array)
    return folder / "a.npy"


@variant(ORANGE)
def numpy_records_with_a_packed_color(folder):
    "As ROS gives it: four bytes of b g r in a float."
    array = np.zeros(30, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", "<f4")])
    for i, axis in enumerate("xyz"):
        array[axis] = CLOUD[:, i]
    array["rgb"] = np.full(30, 255 << 16 | 128 << 8, np.uint32).view(np.float32)
    np.save(folder / "a.npy", array)
    return folder / "a.npy"


@variant(ORANGE)
def numpy_half_floats(folder):
    np.save(folder / "a.npy", np.c_[CLOUD, np.tile(ORANGE, (30, 1))].astype(np.float16))
    return folder / "a.npy"


@variant()
def numpy_archive_of_quads(folder):
    from cloud_writer import QUADS

    np.savez(folder / "a.npz", vertices=BOX, faces=np.array(QUADS))
    return folder / "a.npz"


@variant(ORANGE, says="read as a cloud of 2 centers")
def splat_compressed_with_colors_of_its_chunks(folder):
    ends = ", ".join(
        f"float {end}_{name}" for end in ("min", "max") for name in ("x", "y", "z", "r", "g", "b")
    )
    chunk = (ends, [[0, 0, 0, 0, 0, 0, 1, 2, 3, 1, 0.5, 0.5]])
    names = "uint packed_position, uint packed_rotation, uint packed_scale, uint packed_color"
    vertex = (names, [[0, 0, 0, 0xFFFF00FF], [0xFFFFFFFF, 0, 0, 0xFFFF00FF]])
    return save(folder / "a.ply", ply({"chunk": chunk, "vertex": vertex}, "binary_little_endian"))


@variant(RED, says="10 of an opacity below 0.1 were left out")
def splat_file_of_which_a_part_is_clear(folder):
    row = np.dtype([("xyz", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])
    values = np.zeros(40, row)
    values["xyz"], values["rgba"] = np.concatenate([CLOUD, CLOUD[:10] * 9]), [255, 0, 0, 255]
    values["rgba"][30:] = [0, 0, 255, 20]
    return save(folder / "a.splat", values.tobytes())


# VTK and 3MF


@variant(ORANGE)
def vtk_colors_of_cells_beside_vertices_and_lines(folder):
    "Cells are counted through vertices, lines and polygons."
    text = legacy(data="cell").decode()
    text = text.replace("POLYGONS", "VERTICES 1 2\n1 0\nLINES 1 3\n2 0 7\nPOLYGONS")
    text = text.replace("CELL_DATA 6", "CELL_DATA 8").replace("RGB 3 6", "RGB 3 8")
    return save(folder / "a.vtk", text.replace("unsigned_char\n", "unsigned_char\n0 0 255 0 0 255 "))


@variant(ORANGE)
def vtk_words_in_a_field(folder):
    text = legacy(data="point").decode()
    return save(
        folder / "a.vtk", text.replace("DATASET", "FIELD FieldData 1\nname 1 2 string\nbox\nof mine\nDATASET")
    )


@variant(ORANGE)
def vtk_of_windows_line_ends(folder):
    return save(folder / "a.vtk", legacy(data="cell").replace(b"\n", b"\r\n"))


@variant(ORANGE)
def vtk_xml_of_one_empty_piece_and_one_full(folder):
    content = xml()
    empty = b'<Piece NumberOfPoints="0" NumberOfPolys="0"><Points><DataArray type="Float32" NumberOfComponents="3" format="ascii"></DataArray></Points></Piece>'
    return save(folder / "a.vtp", content.replace(b"<Piece", empty + b"<Piece", 1))


GROUP = '<m:colorgroup id="6"><m:color color="#FF8000FF"/><m:color color="#0000FF"/></m:colorgroup>'


@variant(None, says="multiproperties")
def threemf_of_several_properties(folder):
    more = GROUP + '<m:multiproperties id="7" pids="6"><m:multi pindices="0"/></m:multiproperties>'
    return save(folder / "a.3mf", three_mf(more, 'pid="7" pindex="0"'))


@variant(ORANGE, size=(2, 6, 3))
def threemf_scaled_and_turned_item(folder):
    item = '<item objectid="1" transform="0 3 0 -1 0 0 0 0 1 0 0 0"/>'
    return save(folder / "a.3mf", three_mf(GROUP, 'pid="6" pindex="0"', build=item))


VARIANTS["threemf_scaled_and_turned_item"].size = [2, 3, 3]


# COLLADA, AMF, STEP, scans


@variant(ORANGE, size=(2, 1, 3))
def dae_matrix_of_a_node(folder):
    matrix = "<matrix>0 -1 0 0 1 0 0 0 0 0 1 0 0 0 0 1</matrix>"
    return save(folder / "a.dae", dae().replace("<translate>5 0 0</translate>", matrix))


@variant(ORANGE, size=(11, 2, 3))
def dae_two_nodes_of_one_geometry(folder):
    text = dae()
    node = text[text.index('<node id="n">') : text.index("</visual_scene>")]
    return save(
        folder / "a.dae", text.replace(node, node + node.replace('"n"', '"o"').replace("5 0 0", "15 0 0"))
    )


@variant(ORANGE, size=(0.0254, 0.0508, 0.0762))
def step_in_inches(folder):
    text = step().replace(
        "(LENGTH_UNIT()NAMED_UNIT(*)SI_UNIT(.MILLI.,.METRE.))",
        "(CONVERSION_BASED_UNIT('INCH',#901)LENGTH_UNIT()NAMED_UNIT(#900))",
    )
    more = "#900=DIMENSIONAL_EXPONENTS(1.,0.,0.,0.,0.,0.,0.);\n#901=LENGTH_MEASURE_WITH_UNIT(LENGTH_MEASURE(25.4),#902);\n"
    more += "#902=(LENGTH_UNIT()NAMED_UNIT(*)SI_UNIT(.MILLI.,.METRE.));\n"
    return save(folder / "a.step", text.replace("DATA;\n", "DATA;\n" + more))


@variant(ORANGE, size=(11, 2, 3))
def e57_of_a_scan_with_colors_and_one_without(folder):
    import pye57

    with pye57.E57(str(folder / "a.e57"), mode="w") as file:
        for shift in (0, 10):
            data = {f"cartesian{axis}": BOX[:, i] + float(shift * (i == 0)) for i, axis in enumerate("XYZ")}
            if not shift:
                channels = zip(("Red", "Green", "Blue"), (255, 128, 0))
                data |= {f"color{name}": np.full(8, value, np.uint8) for name, value in channels}
            file.write_scan_raw({name: values.copy() for name, values in data.items()})
    return folder / "a.e57"


@variant(None, size=(1, 2, 3), says="its colors are 0")
def las_of_black(folder):
    return las(folder / "a.las", rgb=(0, 0, 0))


# USD


def usd_picture(folder, body: str) -> Path:
    save(folder / "half.png", HALVES)
    return save(folder / "a.usda", usda(body))


@variant(BLUE)
def usd_picture_that_is_moved(folder):
    return usd_picture(folder, usd_moved_picture("float2 inputs:translation = (0.5, 0)"))


@variant(BLUE)
def usd_picture_that_is_scaled(folder):
    return usd_picture(folder, usd_moved_picture("float2 inputs:scale = (3, 1)"))


@variant(BLUE)
def usd_picture_that_is_turned(folder):
    "(0.2, -0.75) by 90 degrees counter-clockwise is (0.75, 0.2)."
    return usd_picture(folder, usd_moved_picture("float inputs:rotation = 90", "(0.2, -0.75)"))


@variant(to_srgb(np.array([0.5, 0, 0])).tolist())
def usd_factor_of_a_picture(folder):
    "Exporters write the factor of the base color as the scale of the picture."
    text = usd_moved_picture("")
    return usd_picture(
        folder,
        text.replace("asset inputs:file", "float4 inputs:scale = (0.5, 1, 1, 1)\n        asset inputs:file"),
    )


@variant(RED, says="NurbsPatch")
def usd_prims_that_are_no_mesh(folder):
    display = "color3f[] primvars:displayColor = [(1, 0, 0)]"
    return save(folder / "a.usda", usda(usd_box(more=display) + 'def NurbsPatch "n"\n{\n}\n'))


@variant(ORANGE)
def usd_variant_that_is_selected(folder):
    display = "color3f[] primvars:displayColor = [({})]"
    body = f"""def Xform "root" (
    variants = {{ string look = "orange" }}
    prepend variantSets = "look"
)
{{
    variantSet "look" = {{
        "orange" {{
{usd_box(more=display.format("1, 0.2140411, 0"))}
        }}
        "blue" {{
{usd_box(more=display.format("0, 0, 1"))}
        }}
    }}
}}
"""
    return save(folder / "a.usda", usda(body))


@variant(None, size=(1, 0, 2))
def usd_plane(folder):
    return save(
        folder / "a.usda",
        usda(
            'def Plane "p"\n{\n    double width = 1\n    double length = 2\n    uniform token axis = "Y"\n}\n'
        ),
    )


# hostile siblings

LONG = b"<?xml version='1.0'?><!--" + b"x" * 5000 + b"-->"
ENTITIES = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


def archive(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.vtp", LONG + ENTITIES + xml()[21:], "document type"),
        (
            "a.vtk",
            legacy().replace(b"DATASET", b"FIELD f 1\nw 1 999999999999999999 string\nDATASET"),
            "words",
        ),
        (
            "a.vtk",
            legacy("BINARY").replace(b"DATASET", b"FIELD f 1\nw 1 9 string\n\x00" + b"\xff" * 7),
            "words|cut",
        ),
        ("a.vtk", legacy().replace(b"DATASET", b"FIELD f 1\nw -1 -1 string\nDATASET")[:60], "a.vtk"),
        ("a.npz", archive(vertices=BOX, faces=np.zeros((1, 10**7), np.int8)), "9,999,998 faces"),
        ("a.npz", archive(vertices=BOX, faces=np.full((2, 4), 8)), "names vertex 8"),
        ("a.npz", archive(vertices=BOX, faces=np.full((2, 4), -1)), "names vertex -1"),
        ("a.usda", usda(usd_moved_picture("float2 inputs:scale = (nan, inf)")), None),
        ("a.usda", usda(usd_moved_picture('string inputs:scale = "wide"')), "a.usda"),
        ("a.usda", usda('def Plane "p"\n{\n    double width = inf\n}\n'), "NaN or infinite"),
        ("a.3mf", three_mf('<m:multiproperties id="x"/>'), "a.3mf"),
        ("a.amf", '<amf unit="parsec"><object id="0"></object></amf>', "a.amf"),
        (
            "a.ply",
            ply({"vertex": (f"{XYZ}, uchar red, uchar green, uchar blue, list uchar int alpha", [])}),
            "a.ply",
        ),
    ],
)
def test_hostile_variant(tmp_path, name, content, says):
    path = save(tmp_path / name, content)
    if says is None:
        assert color(read_mesh(path)) is None
        return
    with pytest.raises(Cg3dError, match=says) as refused:
        read_mesh(path)
    assert name in str(refused.value)


MANY = 1_000_000
BLANK = b"\n" * MANY


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.ply", ply({"vertex": (f"{XYZ}, float {'[' * MANY}", vertices(1))})),
        ("a.csv", ("x,y,z," + "[" * MANY + "\n" + rows("1", separator=",")).encode()),
        ("a.xyz", ("#" + "(" * MANY + "\n" + rows()).encode()),
        ("a.stl", stl_text().encode() + BLANK),
        ("a.off", off().encode() + BLANK),
        ("a.vtk", legacy().replace(b"POLYGONS", BLANK + b"POLYGONS")),
        ("a.vtp", b"<VTKFile type='PolyData'>" + b"<AppendedData " * (MANY // 10)),
        ("a.obj", b" " * MANY + b"v 0 0 0\n" + b"v 1 0 0\nv 0 1 0\n" * 2000 + b"f 1 2 3\n"),
        (
            "a.obj",
            b"".join(b"mtllib %d\n" % i for i in range(2000)) + b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n",
        ),
    ],
)
def test_no_time_that_grows_with_the_square(tmp_path, name, content):
    "Minutes of processor time where it does, less than a second where it does not."
    path = save(tmp_path / name, content)
    begin = time.process_time()
    try:
        read_mesh(path)
    except Cg3dError as refused:
        assert name in str(refused)
    assert time.process_time() - begin < 10
