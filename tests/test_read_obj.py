"""Reading OBJ and MTL: every file is written here, and its extent and color are known."""

import numpy as np
import pytest
from gltf_writer import BOX, FACES, picture
from mesh_checks import color as mean_color
from mesh_checks import extent
from PIL import Image

from cg3d.core.errors import Cg3dError, InputError, MissingFile, UnsafeFile
from cg3d.core.untrusted import limits
from cg3d.io import obj
from cg3d.io.obj import read_obj

RED = (255, 0, 0)
VERTICES = "".join("v {:g} {:g} {:g}\n".format(*row) for row in BOX)
TRIANGLES = "".join("f {} {} {}\n".format(*row) for row in FACES + 1)
TEXTURED = "".join("f {0}/1 {1}/1 {2}/1\n".format(*row) for row in FACES + 1)
QUADS = "f 1 2 4 3\nf 5 7 8 6\nf 1 5 6 2\nf 3 4 8 7\nf 1 3 7 5\nf 2 6 8 4\n"


@pytest.fixture
def write(tmp_path):
    "Write files beside each other and read the OBJ."

    def write_files(text: str | bytes, **files: str | bytes):
        for name, content in files.items():
            name = name.replace("__", ".")
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        (tmp_path / "x.obj").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_obj(tmp_path / "x.obj")

    return write_files


def colored(values: str, vertices: str = VERTICES) -> str:
    "The vertices with a color behind each."
    return vertices.replace("\n", f" {values}\n")


def color(mesh) -> list[float] | None:
    return mean_color(mesh, 3)


# lines


@pytest.mark.parametrize(
    "spelling",
    [
        lambda text: text,
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: text.replace(" ", "  "),
        lambda text: text.replace(" ", "\t"),
        lambda text: text.replace("\n", " \n"),
        lambda text: "  " + text.replace("\n", "\n  "),
        lambda text: text.replace("\n", " # first\n"),
        lambda text: text.replace("\n", "#first\n"),
        lambda text: text.replace(" 3\n", " \\\n3\n"),
        lambda text: text.replace("f ", "f \\\n \\\n"),
        lambda text: "# ends in a backslash\\\n" + text,
        lambda text: "# mtllib lost.mtl\n#usemtl\n" + text,
        lambda text: "\ufeff" + text,
        lambda text: text.replace("v 1 ", "v +1e0 "),
        lambda text: "o box\ng one two\ns off\n" + text.replace("f ", "g f\nf "),
        lambda text: text + "l 1 2\np 3\nvp 0 1\ncurv 0 1\n",
        lambda text: text.replace("v ", "vn 0 0 1\nvt .5 .5\nv "),
        lambda text: text.encode("utf-16"),
        lambda text: "# gr\u00f6\u00dfe\n".encode("latin-1") + text.encode(),
    ],
)
@pytest.mark.parametrize("faces", [TRIANGLES, QUADS])
def test_spellings_of_one_box(write, spelling, faces):
    mesh = write(spelling(VERTICES + faces))
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == 12 and not mesh.warnings


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_of_any_size_give_the_same(write, monkeypatch, block):
    text = colored("1 0 0") + "vt 0 0\nusemtl a\n" + TEXTURED + "usemtl b\nf -8/-1 -7/-1 -6/-1\n"
    whole = write(text)
    monkeypatch.setattr(obj.blocks, "__defaults__", (block,))
    parts = write(text)
    for one, other in zip(whole.surfaces, parts.surfaces):
        assert (one.vertices == other.vertices).all() and (one.faces == other.faces).all()
        assert (one.vertex_colors == other.vertex_colors).all()


# faces


@pytest.mark.parametrize(
    "corner",
    [
        "{0}",
        "{0}/{0}",
        "{0}//{0}",
        "{0}/{0}/{0}",
        "{0}/",
        "{0}//",
        "{0}/{0}/",
        "-{1}",
        "-{1}/-{1}",
        "-{1}//-{1}",
    ],
)
def test_corners_of_every_form(write, corner):
    faces = "".join(f"f {' '.join(corner.format(i + 1, 8 - i) for i in row)}\n" for row in FACES)
    mesh = write(VERTICES + "vt 0 0\n" * 8 + "vn 0 0 1\n" * 8 + faces)
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == 12


def test_corners_of_mixed_forms(write):
    rows = [
        "f 1 2 4",
        "f 1/1 4/1 3/1",
        "f 5//1 7//1 8//1 6//1",
        "f 1/1/1 5/1/1 6 2//1",
        "f 3 4 8 7",
        "f 1 3 7 5",
        "f 2 6 8 4",
    ]
    mesh = write(VERTICES + "vt 0 0\nvn 0 0 1\n" + "\n".join(rows))
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == 12
    corners = mesh.surfaces[0].vertices[mesh.surfaces[0].faces]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    assert areas.sum() == pytest.approx(22)


def test_negative_indices_of_two_objects(write):
    back = "".join("f {} {} {}\n".format(*row) for row in FACES - 8)
    second = "".join("v {:g} {:g} {:g}\n".format(*row) for row in BOX + [10, 0, 0])
    mesh = write("o a\n" + VERTICES + back + "o b\n" + second + back)
    assert extent(mesh) == [11, 2, 3] and mesh.face_count == 24


def test_negative_texture_coordinates_of_two_objects(write):
    pixels = np.uint8([[RED, (0, 0, 255)]])
    parts = []
    for shift, u in ((0, 0.25), (10, 0.75)):
        moved = "".join("v {:g} {:g} {:g}\n".format(*row) for row in BOX + [shift, 0, 0])
        faces = "".join("f {}/-1 {}/-1 {}/-1\n".format(*row) for row in FACES - 8)
        parts.append(moved + f"vt {u} 0.5\n" + faces)
    mesh = write(
        "mtllib m.mtl\nusemtl a\n" + "".join(parts), m__mtl="newmtl a\nmap_Kd t.png\n", t__png=picture(pixels)
    )
    xyz, colors = mesh.sample(1000, np.random.default_rng(0))
    left = xyz[:, 0] < 5
    assert np.allclose(colors[left], [1, 0, 0]) and np.allclose(colors[~left], [0, 0, 1])


def test_faces_above_their_vertices(write):
    assert extent(write(TRIANGLES + VERTICES)) == [1, 2, 3]


def test_polygons_of_many_corners(write):
    angle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    rows = "".join(f"v {x:.6f} {y:.6f} 0\n" for x, y in zip(np.cos(angle), np.sin(angle)))
    mesh = write(rows + "f " + " ".join(map(str, range(1, 101))) + "\nf 1 2\nf 3\n")
    assert mesh.face_count == 98


CONCAVE = {
    "arrowhead": ([[0, 2], [-1, 0], [0, 0.5], [1, 0]], 1.5),
    "letter L": ([[1, 1], [1, 3], [0, 3], [0, 0], [3, 0], [3, 1]], 5),
    "letter U": ([[0, 0], [3, 0], [3, 3], [2, 3], [2, 1], [1, 1], [1, 3], [0, 3]], 7),
    "keyhole": ([[0, 0], [4, 0], [4, 4], [0, 4], [0, 0], [1, 1], [1, 2], [2, 2], [2, 1], [1, 1]], 15),
}


@pytest.mark.parametrize("name", CONCAVE)
@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("way", [1, -1])
def test_concave_polygons(write, name, start, way):
    plan, wanted = CONCAVE[name]
    plan = np.roll(plan, start, axis=0)[::way]
    rows = "".join(f"v {x:g} 0 {y:g}\n" for x, y in plan)
    mesh = write(rows + "f " + " ".join(str(i + 1) for i in range(len(plan))) + "\n")
    corners = mesh.surfaces[0].vertices[mesh.surfaces[0].faces]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    assert areas.sum() == pytest.approx(wanted) and mesh.face_count == len(plan) - 2


def test_bare_vertices(write):
    mesh = write(VERTICES)
    assert mesh.points.shape == (8, 3) and mesh.point_colors is None
    assert write(colored("255 0 0")).point_colors.tolist() == [[1, 0, 0]] * 8


# vertex colors

COLORS = {
    "0 to 1": ("1 0.5 0", [1, 0.5, 0]),
    "0 to 255": ("255 128 0", [1, 0.502, 0]),
    "with alpha": ("1 0.5 0 1", [1, 0.5, 0]),
    "16 bit": ("65535 32768 0", [1, 0.5, 0]),
    "white": ("1 1 1", [1, 1, 1]),
    "unit length": ("0 0 1", [0, 0, 1]),
}


@pytest.mark.parametrize("kind", COLORS)
@pytest.mark.parametrize("below", ["nothing", "vt", "white material", "no color in material", "lost library"])
def test_vertex_colors(write, kind, below):
    values, wanted = COLORS[kind]
    head = {"white material": "mtllib m.mtl\nusemtl a\n", "no color in material": "mtllib m.mtl\nusemtl b\n"}
    head = head.get(below, "mtllib lost.mtl\nusemtl a\n" if below == "lost library" else "")
    faces = "vt 0 0\n" + TEXTURED if below == "vt" else TRIANGLES
    mesh = write(head + colored(values) + faces, m__mtl="newmtl a\nKd 1 1 1\nnewmtl b\nKa 0 0 0\n")
    assert color(mesh) == pytest.approx(wanted, abs=2e-3)
    assert bool(mesh.warnings) == (below == "lost library")


def test_vertex_colors_times_the_material(write):
    mesh = write("mtllib m.mtl\nusemtl a\n" + colored("1 1 0") + TRIANGLES, m__mtl="newmtl a\nKd 1 0.5 0.5\n")
    assert color(mesh) == pytest.approx([1, 0.5, 0], abs=1e-3)


def test_a_vertex_without_color_is_unknown(write):
    mesh = write(colored("1 0 0", VERTICES[:40]) + VERTICES[40:] + TRIANGLES)
    _, colors = mesh.sample(1000, np.random.default_rng(0))
    assert 0 < np.isnan(colors).any(1).mean() < 1 and np.allclose(np.nanmean(colors, 0), [1, 0, 0])


@pytest.mark.parametrize("values", ["-1 0 0", "70000 0 0"])
def test_numbers_that_are_no_colors(write, values):
    assert color(write(colored(values) + TRIANGLES)) is None


def test_a_weight_is_no_color(write):
    assert color(write(colored("1.0") + TRIANGLES)) is None


def test_colors_of_zbrush(write):
    mesh = write(VERTICES + "#MRGB " + "ffff0000" * 4 + "\n#MRGB " + "ffff0000" * 4 + "\n" + TRIANGLES)
    assert color(mesh) == [1, 0, 0]


# materials


@pytest.mark.parametrize(
    "library, wanted",
    [
        ("newmtl a\nKd 1 0 0\n", [1, 0, 0]),
        ("newmtl a\r\nKd 1 0 0\r\n", [1, 0, 0]),
        ("newmtl a\rKd 1 0 0\r", [1, 0, 0]),
        ("\ufeffnewmtl a\nKd 1 0 0\n", [1, 0, 0]),
        ("\tnewmtl a\n\tKd  1  0  0 # red\n", [1, 0, 0]),
        ("newmtl a\nKD 1 0 0\n", [1, 0, 0]),
        ("newmtl a\nKd 0.5\n", [0.5, 0.5, 0.5]),
        ("newmtl a\nKd 255 0 0\n", [1, 0, 0]),
        ("newmtl a\nKd 1 0 0\nd 0\nTr 1\nillum 2\nKs 1 1 1\n", [1, 0, 0]),
        ("newmtl b\nKd 0 0 1\nnewmtl a\nKd 1 0 0\n", [1, 0, 0]),
        ("newmtl a\nKd 0.25 0.5 0.75\n", [0.25, 0.5, 0.75]),
        ("# newmtl c\nnewmtl a\n# Kd 0 1 0\nKd 1 0 0\n", [1, 0, 0]),
        ("newmtl a\nKd spectral red.rfl 1\n", None),
        ("newmtl a\nKd 1 0\n", None),
        ("newmtl a\nKa 1 0 0\n", None),
        ("newmtl A\nKd 1 0 0\n", None),
    ],
)
def test_kd(write, library, wanted):
    mesh = write("mtllib m.mtl\nusemtl a\n" + VERTICES + TRIANGLES, m__mtl=library)
    assert extent(mesh) == [1, 2, 3] and color(mesh) == (wanted and pytest.approx(wanted, abs=1e-3))


@pytest.mark.parametrize(
    "head, files",
    [
        (
            "mtllib a.mtl\nmtllib b.mtl\n",
            {"a__mtl": "newmtl x\nKd 0 1 0\n", "b__mtl": "newmtl m\nKd 0 0 1\n"},
        ),
        ("mtllib a.mtl b.mtl\n", {"a__mtl": "newmtl x\nKd 0 1 0\n", "b__mtl": "newmtl m\nKd 0 0 1\n"}),
        ("mtllib my materials.mtl\n", {"my materials__mtl": "newmtl m\nKd 0 0 1\n"}),
        ('mtllib "my materials.mtl"\n', {"my materials__mtl": "newmtl m\nKd 0 0 1\n"}),
        ("mtllib ./b.mtl\n", {"b__mtl": "newmtl m\nKd 0 0 1\n"}),
        ("mtllib .\\b.mtl\n", {"b__mtl": "newmtl m\nKd 0 0 1\n"}),
        ("mtllib C:\\work\\b.mtl\n", {"b__mtl": "newmtl m\nKd 0 0 1\n"}),
        ("mtllib B.MTL\n", {"b__mtl": "newmtl m\nKd 0 0 1\n"}),
        ("mtllib\tb.mtl\t\n", {"b__mtl": "newmtl m\nKd 0 0 1\n"}),
        ("# the mtllib is below\nmtllib b.mtl\n", {"b__mtl": "newmtl m\nKd 0 0 1\n"}),
        ("mtllib gr\u00f6\u00dfe.mtl\n", {"gr\u00f6\u00dfe__mtl": "newmtl m\nKd 0 0 1\n"}),
    ],
)
def test_libraries(write, head, files):
    mesh = write(head + "usemtl m\n" + VERTICES + TRIANGLES, **files)
    assert color(mesh) == [0, 0, 1] and not mesh.warnings


def test_a_library_below_the_faces(write):
    text = VERTICES + "usemtl m\n" + TRIANGLES + "mtllib b.mtl\n"
    assert color(write(text, b__mtl="newmtl m\nKd 0 0 1\n")) == [0, 0, 1]


@pytest.mark.parametrize("name", ["red paint", "red#2", "r\u00f6t", "(1)", "a.b", "-x"])
def test_names_of_materials(write, name):
    mesh = write(f"mtllib m.mtl\nusemtl {name}\n" + VERTICES + TRIANGLES, m__mtl=f"newmtl {name}\nKd 1 0 0\n")
    assert color(mesh) == [1, 0, 0]


def test_a_name_in_an_old_code(write):
    text = "mtllib m.mtl\nusemtl r\u00f6t\n" + VERTICES + TRIANGLES
    assert color(write(text.encode("latin-1"), m__mtl="newmtl r\u00f6t\nKd 1 0 0\n".encode("latin-1"))) == [
        1,
        0,
        0,
    ]
    mesh = write(text.encode("latin-1"), m__mtl="")
    assert "material" in mesh.warnings[0] and mesh.warnings[0].encode()


def test_materials_of_faces(write):
    text = "mtllib m.mtl\nusemtl a\n" + VERTICES + "\n".join(QUADS.splitlines()[:3]) + "\nusemtl b\n"
    text += "\n".join(QUADS.splitlines()[3:5]) + "\nusemtl a\n" + QUADS.splitlines()[5] + "\n"
    mesh = write(text, m__mtl="newmtl a\nKd 1 0 0\nnewmtl b\nKd 0 0 1\n")
    assert [(surface.material.name, len(surface.faces)) for surface in mesh.surfaces] == [("a", 8), ("b", 4)]
    xyz, colors = mesh.sample(4000, np.random.default_rng(0))
    blue = np.isclose(colors[:, 2], 1)
    assert blue.mean() == pytest.approx((3 + 2) / 22, abs=0.01)
    assert (np.isclose(xyz[blue, 1], 2) | np.isclose(xyz[blue, 2], 0)).all()


# textures


@pytest.mark.parametrize(
    "statement",
    [
        "map_Kd t.png",
        "map_kd t.png",
        "MAP_KD t.png",
        "map_Kd  t.png ",
        "map_Kd -s 1 1 1 t.png",
        "map_Kd -s 2 t.png",
        "map_Kd -o 0.5 0.5 -s 1 1 t.png",
        "map_Kd -clamp on t.png",
        "map_Kd -blendu on -blendv off -mm 0 1 t.png",
        "map_Kd -bm 1.0 -imfchan m -texres 512 -type sphere -cc off -boost 2 -t 0 0 0 t.png",
        "map_Kd ./t.png",
        "map_Kd .\\t.png",
        "map_Kd C:\\Users\\me\\textures\\t.png",
        "map_Kd C:\\\\Users\\\\me\\\\t.png",
        "map_Kd /home/me/t.png",
        "map_Kd T.PNG",
        'map_Kd "t.png"',
        "map_Kd t.png # the texture",
    ],
)
def test_map_kd(write, statement):
    mesh = write(
        "mtllib m.mtl\nusemtl a\nvt 0.5 0.5\n" + VERTICES + TEXTURED,
        m__mtl=f"newmtl a\nKd 0 1 0\n{statement}\n",
        t__png=picture(RED),
    )
    assert color(mesh) == [1, 0, 0] and not mesh.warnings


@pytest.mark.parametrize(
    "name", ["my wood.png", "t-1.png", "2.png", "-x.png", "a#b.png", "\u6728.png", "tex/wood.png"]
)
def test_names_of_textures(write, tmp_path, name):
    (tmp_path / "tex").mkdir()
    (tmp_path / name).write_bytes(picture(RED))
    for written in (name, f"-s 1 1 1 {name}", name.replace("/", "\\")):
        text = "mtllib m.mtl\nusemtl a\nvt 0.5 0.5\n" + VERTICES + TEXTURED
        assert color(write(text, m__mtl=f"newmtl a\nmap_Kd {written}\n")) == [1, 0, 0]


QUARTERS = np.uint8(
    [[RED, (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]]
)  # above: red, green; below: blue, white


@pytest.mark.parametrize(
    "uv, options, wanted",
    [
        ("0.25 0.75", "", [1, 0, 0]),
        ("0.75 0.75", "", [0, 1, 0]),
        ("0.25 0.25", "", [0, 0, 1]),
        ("0.25 0.25 0", "", [0, 0, 1]),
        ("1.25 -0.75", "", [0, 0, 1]),
        ("1.25 -0.75", "-clamp on ", [1, 1, 1]),
        ("0.125 0.375", "-s 2 2 1 ", [1, 0, 0]),
        ("0.25 0.25", "-o 0.5 0.5 0 ", [0, 1, 0]),
        ("0.125 0.125", "-s 2 2 -o 0.5 0 ", [1, 1, 1]),
        ("0.75", "", [1, 1, 1]),
    ],
)
def test_places_in_a_texture(write, uv, options, wanted):
    text = f"mtllib m.mtl\nusemtl a\nvt {uv}\n" + VERTICES + TEXTURED
    mesh = write(text, m__mtl=f"newmtl a\nmap_Kd {options}t.png\n", t__png=picture(QUARTERS))
    assert color(mesh) == (wanted if " " in uv else None)


def test_faces_without_texture_coordinates_are_unknown(write):
    half = "\n".join(TEXTURED.splitlines()[:6] + TRIANGLES.splitlines()[6:])
    mesh = write(
        "mtllib m.mtl\nusemtl a\nvt 0 0\n" + VERTICES + half,
        m__mtl="newmtl a\nmap_Kd t.png\n",
        t__png=picture(RED),
    )
    _, colors = mesh.sample(1000, np.random.default_rng(0))
    assert 0.2 < np.isnan(colors).any(1).mean() < 0.8


@pytest.mark.parametrize("kd, wanted", [("0 1 0", [0, 1, 0]), ("0.8 0.8 0.8", None), (None, None)])
@pytest.mark.parametrize(
    "lost", ["missing.png", "cut.jpg", "text.png", "../../../etc/passwd", "https://a.b/c.png"]
)
def test_a_texture_that_cannot_be_read_is_told(write, lost, kd, wanted):
    library = "newmtl a\n" + (f"Kd {kd}\n" if kd else "") + f"map_Kd {lost}\n"
    cut = picture(RED, "JPEG")[:-90]
    text = "mtllib m.mtl\nusemtl a\nvt 0 0\n" + VERTICES + TEXTURED
    mesh = write(text, m__mtl=library, cut__jpg=cut, text__png="no picture")
    assert extent(mesh) == [1, 2, 3] and color(mesh) == wanted
    assert len(mesh.warnings) == 1 and "the texture" in mesh.warnings[0]


@pytest.mark.parametrize("name", ["lost.mtl", "../lost.mtl", "/etc/passwd", "a b.mtl", "x\0y.mtl"])
def test_a_missing_library_is_told(write, name):
    mesh = write(f"mtllib {name}\nusemtl a\n" + VERTICES + TRIANGLES)
    assert extent(mesh) == [1, 2, 3] and color(mesh) is None
    assert "library is missing" in mesh.warnings[0]


def test_pictures_of_16_bit_and_palettes(write, tmp_path):
    Image.fromarray(np.full((4, 4), 16448, np.uint16)).save(tmp_path / "gray.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png")
    for name, wanted in (("gray.png", [0.251] * 3), ("palette.png", [1, 0, 0])):
        text = "mtllib m.mtl\nusemtl a\nvt 0 0\n" + VERTICES + TEXTURED
        assert color(write(text, m__mtl=f"newmtl a\nmap_Kd {name}\n")) == pytest.approx(wanted, abs=1e-3)


# damaged files


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>404</html>\n",
        "f 1 2 3\n",
        "v 0 0\n" + TRIANGLES,
        VERTICES + "f 1 2 9\n",
        VERTICES + "f 1 2 0\n",
        VERTICES + "f 1 2 -9\n",
        VERTICES + "f 1 2 99999999999999999999\n",
        VERTICES + "f 1 2 x\n",
        VERTICES + "f 1 2 3.5\n",
        VERTICES + "f 1/1/1/1 2/2/2/2 3/3/3/3\n",
        VERTICES + "f / / /\n",
        VERTICES.replace("v 1", "v nan") + TRIANGLES,
        VERTICES.replace("v 1", "v inf") + TRIANGLES,
        VERTICES.replace("v 1", "v 1,0") + TRIANGLES,
        VERTICES.replace("v 1", "v 0x1") + TRIANGLES,
        VERTICES.replace("v 1", "v 1.#IND") + TRIANGLES,
        VERTICES.replace("v 1", "v one") + TRIANGLES,
        "\0" * 1000,
    ],
)
def test_damaged_files_are_refused(write, text):
    with pytest.raises(InputError):
        write(text)


def test_texture_coordinates_that_are_not_there(write):
    text = "mtllib m.mtl\nusemtl a\n" + VERTICES + TEXTURED
    with pytest.raises(InputError, match="texture coordinate 1 of 0"):
        write(text, m__mtl="newmtl a\nmap_Kd t.png\n", t__png=picture(RED))


def test_random_bytes_give_one_kind_of_error(write):
    generator = np.random.default_rng(0)
    whole = (colored("1 0 0") + "vt 0 0\nmtllib m.mtl\nusemtl a\n" + TEXTURED).encode()
    for _ in range(200):
        data = np.frombuffer(whole, np.uint8).copy()
        places = generator.integers(0, len(data), 8)
        data[places] = generator.integers(0, 256, 8)
        try:
            write(data.tobytes(), m__mtl=data.tobytes())
        except Cg3dError:
            pass


def test_free_forms_are_refused(write):
    with pytest.raises(InputError, match="curves and surfaces are not read"):
        write(VERTICES + "cstype bspline\ndeg 1 1\nsurf 0 1 0 1 1 2 3 4\nparm u 0 0 1 1\nend\n")


def test_limits(write):
    with limits(faces=11), pytest.raises(UnsafeFile, match="faces"):
        write(VERTICES + TRIANGLES)
    with limits(points=7), pytest.raises(UnsafeFile, match="points"):
        write(VERTICES + TRIANGLES)


def test_a_missing_file():
    with pytest.raises(MissingFile):
        read_obj("nothing.obj")
