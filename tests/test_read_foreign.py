"""Reading CAD, FBX, COLLADA, USD, 3MF, VTK, laser scans: every file is written here, its extent, color, unit and axis are known."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
from foreign_writer import (
    HALVES,
    PLACES,
    Fbx,
    ac3d,
    amf,
    dae,
    direct_x,
    e57,
    iges,
    las,
    legacy,
    step,
    three_ds,
    three_mf,
    usd_box,
    usd_material,
    usda,
    usdz,
    xml,
)
from gltf_writer import BOX, FACES
from mesh_checks import color, extent

from cg3d.core.errors import Cg3dError, InputError, MissingPackage, UnsafeFile
from cg3d.core.untrusted import limits
from cg3d.io import limited
from cg3d.io.foreign import parse_las
from cg3d.io.read import read_mesh
from cg3d.io.shape import read_shape

ORANGE = [1, 0.5, 0]


def is_half_red_half_blue(mesh) -> bool:
    "Red below the middle of x, blue above, as `HALVES` over texture coordinates that follow x."
    xyz, rgb = mesh.sample(2000, np.random.default_rng(0))
    place = (xyz[:, 0] - xyz[:, 0].min()) / np.ptp(xyz[:, 0])
    return np.allclose(rgb[place < 0.4], [1, 0, 0]) and np.allclose(rgb[place > 0.6], [0, 0, 1])


# the child process


PARSERS = """
import os, signal, sys, time
import numpy as np
def size(path): return path.stat().st_size
def array(path): return np.arange(5)
def crash(path): os.kill(os.getpid(), signal.SIGSEGV)
def abort(path): sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'"); sys.stderr.flush(); os.abort()
def leave(path): os._exit(3)
def endless(path): time.sleep(60)
def busy(path):
    while True: pass
def greedy(path): return len(bytes(3 * 2**30))
def broken(path): raise KeyError("node 7")
def refuse(path):
    from cg3d.core.errors import UnsafeFile
    raise UnsafeFile(f"{path}: no", file=path, value=7)
def noisy(path): sys.stdout.write("x" * 10**6); sys.stderr.write("y" * 10**6); return 1
"""


@pytest.fixture
def parsers(tmp_path, monkeypatch):
    (tmp_path / "some_parsers.py").write_text(PARSERS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.step").write_text("12345")
    return tmp_path / "a.step"


@pytest.mark.parametrize(
    "name, kind, says",
    [
        ("crash", InputError, "its parser crashed \\(SIGSEGV\\)"),
        ("abort", UnsafeFile, "needs more than 2,000 MB"),
        ("leave", InputError, "crashed \\(exit code 3"),
        ("endless", UnsafeFile, "stopped after 3 s"),
        ("busy", UnsafeFile, "stopped after 3 s"),
        ("greedy", UnsafeFile, "needs more than 2,000 MB"),
        ("broken", InputError, "cannot be read as .step \\(KeyError"),
        ("refuse", UnsafeFile, "a.step: no"),
        ("missing", InputError, "cannot be read as .step \\(AttributeError"),
    ],
)
def test_a_child_that_fails(parsers, name, kind, says):
    with pytest.raises(kind, match=says) as caught:
        limited.run_limited(f"some_parsers:{name}", parsers, seconds=3, megabytes=2000)
    assert "a.step" in str(caught.value) and (name != "refuse" or caught.value.value == 7)


def test_a_child_that_answers(parsers):
    assert limited.run_limited("some_parsers:size", parsers) == 5
    assert limited.run_limited("some_parsers:array", parsers).tolist() == [0, 1, 2, 3, 4]
    assert limited.run_limited("some_parsers:noisy", parsers) == 1


def test_the_limits_reach_the_child(tmp_path):
    with limits(faces=11), pytest.raises(UnsafeFile, match="12 faces, more than the 11"):
        (tmp_path / "a.ac").write_text(ac3d())
        read_mesh(tmp_path / "a.ac")


def test_the_import_needs_no_module_of_unix():
    "On Windows there is no `resource`."
    code = "import sys; sys.modules['resource'] = None; from cg3d.io import limited, foreign, usd; limited._limit_resources(1, 1)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "name, module, command",
    [
        ("a.step", "cascadio", "pip install cascadio"),
        ("a.igs", "cascadio", "pip install cascadio"),
        ("a.fbx", "assimp_py", "pip install assimp-py"),
        ("a.dae", "assimp_py", "pip install assimp-py"),
        ("a.usdc", "pxr", "pip install usd-core"),
        ("a.las", "laspy", "pip install laspy"),
        ("a.laz", "lazrs", "pip install lazrs"),
        ("a.e57", "pye57", "pip install pye57"),
    ],
)
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, name, module, command):
    find = limited.importlib.util.find_spec
    monkeypatch.setattr(
        limited.importlib.util, "find_spec", lambda wanted: None if wanted == module else find(wanted)
    )
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(MissingPackage, match=f"{name}.*{command}$") as caught:
        read_mesh(tmp_path / name)
    assert caught.value.remedy == command


# CAD


@pytest.mark.parametrize(
    "name, content, factor, expected",
    [
        ("a.step", step(), 0.001, ORANGE),
        ("a.stp", step("$"), 1, ORANGE),
        ("A.STEP", step(".CENTI."), 0.01, ORANGE),
        ("a.step", step(color=(0, 0, 1)), 0.001, [0, 0, 1]),
        ("a.step", step(color=None), 0.001, None),
        ("a.iges", iges(), 0.001, None),
        ("a.igs", iges(1, "IN"), 0.0254, None),
    ],
)
def test_cad(read, name, content, factor, expected):
    mesh = read(name, content)
    assert np.allclose(np.ptp(mesh.bounds, axis=0), np.array([1, 2, 3]) * factor, rtol=1e-4)
    assert (mesh.up, mesh.unit_in_meters) == ("z", 1.0)
    assert color(mesh) is None if expected is None else np.allclose(color(mesh), expected, atol=0.01)


def test_cad_is_turned_and_sized(tmp_path):
    (tmp_path / "a.step").write_text(step("$"))
    shape = read_shape(tmp_path / "a.step")
    assert np.allclose(np.ptp(shape.points, axis=0), [1, 3, 2], atol=0.02) and np.allclose(
        shape.size, [1, 3, 2], atol=0.02
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.step", step()[:1500]),
        ("a.step", "ISO-10303-21;\n"),
        ("a.iges", iges()[:500]),
        ("a.step", b"\0" * 500),
    ],
)
def test_cad_that_is_wrong(read, name, content):
    with pytest.raises(InputError, match=name):
        read(name, content)


# Assimp


@pytest.mark.parametrize(
    "name, content, size, up, unit",
    [
        ("a.dae", dae(), [1, 2, 3], "y", 1.0),
        ("a.dae", dae("Z_UP"), [1, 3, 2], "y", 1.0),
        ("a.dae", dae("X_UP"), [2, 1, 3], "y", 1.0),
        ("a.dae", dae(meter=0.01), [0.01, 0.02, 0.03], "y", 1.0),
        ("a.dae", dae(vertex_colors=True), [1, 2, 3], "y", 1.0),
        ("a.fbx", Fbx().bytes(), [0.01, 0.02, 0.03], "y", 1.0),
        ("a.fbx", Fbx(unit=100).bytes(), [1, 2, 3], "y", 1.0),
        ("a.fbx", Fbx(up=2, unit=100).bytes(), [1, 3, 2], "y", 1.0),
        ("a.3ds", three_ds(), [1, 3, 2], "y", None),
        ("a.ac", ac3d(), [1, 2, 3], "y", None),
        ("a.x", direct_x(), [1, 2, 3], "y", None),
        ("a.amf", amf(), [1, 2, 3], "z", 0.001),
        ("a.amf", amf().replace('unit="millimeter"', ""), [1, 2, 3], "z", 0.001),
        ("a.amf", amf().replace("millimeter", "inch"), [1, 2, 3], "z", 0.0254),
        ("a.amf", amf().replace('"millimeter"', "'feet'"), [1, 2, 3], "z", 0.3048),
    ],
)
def test_assimp(read, name, content, size, up, unit):
    mesh = read(name, content)
    assert np.allclose(extent(mesh), size, atol=1e-4) and (mesh.up, mesh.unit_in_meters) == (up, unit)
    assert np.allclose(color(mesh), ORANGE, atol=0.01)


def test_assimp_applies_the_transform(read):
    assert np.allclose(read("a.dae", dae()).bounds, [[5, 0, 0], [6, 2, 3]], atol=1e-5)
    assert np.allclose(read("a.fbx", Fbx(unit=100).bytes()).bounds, [[5, 0, 0], [6, 2, 3]], atol=1e-5)


def test_assimp_texture_beside(read):
    assert is_half_red_half_blue(read("a.dae", dae(texture="half.png"), half__png=HALVES))
    assert is_half_red_half_blue(read("a.fbx", Fbx(picture=HALVES, inside=False).bytes(), half__png=HALVES))


@pytest.mark.parametrize("name", ["half.png", "HALF.PNG", "textures\\half.png"])
def test_fbx_texture_within_the_file(read, name):
    assert is_half_red_half_blue(read("a.fbx", Fbx(picture=HALVES, name=name).bytes()))


@pytest.mark.parametrize(
    "content", [dae(texture="gone.png"), dae(texture="../../secret.png"), dae(texture="/etc/passwd")]
)
def test_assimp_texture_that_is_missing_is_reported(read, content):
    mesh = read("a.dae", content)
    assert (
        color(mesh) is None
        and "its color is unknown" in mesh.warnings[0]
        and np.allclose(extent(mesh), [1, 2, 3])
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.dae", dae()[:900]),
        ("a.fbx", Fbx().bytes()[:700]),
        ("a.3ds", three_ds()[:60]),
        ("a.fbx", b"Kaydara FBX Binary  \0\x1a\0" + b"\xff" * 200),
        ("a.x", "xof 0303txt 0032\nMesh {"),
        ("a.amf", "<amf>"),
        ("a.ac", "AC3Db\nOBJECT poly\nnumvert 99999999\n"),
    ],
)
def test_assimp_files_that_are_wrong(read, name, content):
    with pytest.raises(InputError, match=name):
        read(name, content)


# USD


DISPLAY = 'color3f[] primvars:displayColor = [(1, 0.2140411, 0)] ( interpolation = "constant" )'
FOUR = '({}) ( interpolation = "{}" )'
BOUND = "rel material:binding = </paint>"
UV = 'texCoord2f[] primvars:st = [{}] ( interpolation = "vertex" )'.format(
    ", ".join(f"({(x > 0.5) * 0.98 + 0.01:g}, {y / 2:g})" for x, y, _ in BOX)
)
MOVED = 'double3 xformOp:translate = (5, 0, 0)\n    uniform token[] xformOpOrder = ["xformOp:translate"]'


@pytest.mark.parametrize(
    "body, expected",
    [
        (usd_box(), None),
        (usd_box(quads=True), None),
        (usd_box(more=DISPLAY), ORANGE),
        (
            usd_box(
                more=f'color3f[] primvars:displayColor = [{", ".join(["(1, 0.2140411, 0)"] * 8)}] ( interpolation = "vertex" )'
            ),
            ORANGE,
        ),
        (
            usd_box(
                more=f'color3f[] primvars:displayColor = [{", ".join(["(1, 0.2140411, 0)"] * 12)}] ( interpolation = "uniform" )'
            ),
            ORANGE,
        ),
        (
            usd_box(
                more=f'color3f[] primvars:displayColor = [{", ".join(["(1, 0.2140411, 0)"] * 36)}] ( interpolation = "faceVarying" )'
            ),
            ORANGE,
        ),
        (
            usd_box(
                more=f'color3f[] primvars:displayColor = [(1, 0.2140411, 0)] ( interpolation = "uniform" )\n    int[] primvars:displayColor:indices = [{", ".join(["0"] * 12)}]'
            ),
            ORANGE,
        ),
        (usd_box(more=BOUND, schemas="MaterialBindingAPI") + usd_material(), ORANGE),
        (
            usd_box(more=f"{BOUND}\n    {DISPLAY}", schemas="MaterialBindingAPI")
            + usd_material("color3f inputs:diffuseColor = (0, 0, 1)"),
            [0, 0, 1],
        ),
        (usd_box(more=DISPLAY) + usd_box("hidden", f'token visibility = "invisible"\n    {MOVED}'), ORANGE),
        (usd_box(more=DISPLAY) + usd_box("guide", f'uniform token purpose = "guide"\n    {MOVED}'), ORANGE),
        (f'def Xform "root"\n{{\n{DISPLAY}\n{usd_box()}\n}}\n', ORANGE),
    ],
)
def test_usd(read, body, expected):
    mesh = read("a.usda", usda(body))
    assert extent(mesh) == [1, 2, 3] and (mesh.up, mesh.unit_in_meters) == ("y", 1.0)
    assert color(mesh) == expected


def test_usd_units_and_axis(tmp_path):
    (tmp_path / "a.usd").write_text(usda(usd_box(), "Z", 0.01))
    mesh, shape = read_mesh(tmp_path / "a.usd"), read_shape(tmp_path / "a.usd")
    assert (mesh.up, mesh.unit_in_meters) == ("z", 0.01)
    assert np.allclose(np.ptp(shape.points, axis=0), [1, 3, 2], atol=0.02) and np.allclose(
        shape.size, [0.01, 0.03, 0.02], atol=2e-4
    )


def test_usd_crate(tmp_path):
    from pxr import Sdf

    (tmp_path / "a.usda").write_text(usda(usd_box(more=DISPLAY)))
    Sdf.Layer.FindOrOpen(str(tmp_path / "a.usda")).Export(str(tmp_path / "a.usdc"))
    mesh = read_mesh(tmp_path / "a.usdc")
    assert extent(mesh) == [1, 2, 3] and color(mesh) == ORANGE


def test_usd_texture_beside_and_in_a_package(read, tmp_path):
    body = usd_box(more=f"{BOUND}\n    {UV}", schemas="MaterialBindingAPI") + usd_material(texture="half.png")
    assert is_half_red_half_blue(read("a.usda", usda(body), half__png=HALVES))
    assert is_half_red_half_blue(read("a.usdz", usdz(tmp_path, body, half__png=HALVES)))


@pytest.mark.parametrize("name", ["gone.png", "../secret.png", "/etc/passwd"])
def test_usd_texture_that_is_missing_is_reported(read, tmp_path, name):
    (tmp_path.parent / "secret.png").write_bytes(HALVES)
    body = usd_box(more=f"{BOUND}\n    {UV}", schemas="MaterialBindingAPI") + usd_material(texture=name)
    mesh = read("a.usda", usda(body))
    assert color(mesh) is None and name in mesh.warnings[0]


def test_usd_subsets_have_their_own_materials(read):
    subset = """def GeomSubset "side" ( prepend apiSchemas = ["MaterialBindingAPI"] )
    {
        uniform token elementType = "face"
        uniform token familyName = "materialBind"
        int[] indices = [2, 3]
        rel material:binding = </paint>
    }
    """
    mesh = read("a.usda", usda(usd_box(more=subset) + usd_material()))
    xyz, rgb = mesh.sample(2000, np.random.default_rng(0))
    side = np.isclose(xyz[:, 0], 1)
    assert np.allclose(rgb[side], [1, 0.5, 0], atol=1e-3) and np.isnan(rgb[~side]).all()


def test_usd_references_and_instances(read):
    prototype = f'def Xform "proto"\n{{\n{usd_box(more=DISPLAY)}\n}}\n'
    uses = "".join(
        f'def Xform "use{i}" ( instanceable = true\n references = </proto> )\n{{\n    double3 xformOp:translate = ({10 * i}, 0, 0)\n    uniform token[] xformOpOrder = ["xformOp:translate"]\n}}\n'
        for i in range(3)
    )
    mesh = read("a.usda", usda(prototype + uses))
    assert extent(mesh) == [21, 2, 3] and color(mesh) == ORANGE and mesh.face_count == 48


def test_usd_point_instancer(read):
    body = f"""def PointInstancer "many"
{{
    rel prototypes = </many/box>
    int[] protoIndices = [0, 0, 0]
    point3f[] positions = [(0, 0, 0), (10, 0, 0), (20, 0, 0)]
    {usd_box(more=DISPLAY)}
}}
"""
    mesh = read("a.usda", usda(body))
    assert extent(mesh) == [21, 2, 3] and mesh.face_count == 36 and color(mesh) == ORANGE


def test_usd_points(read):
    points = ", ".join("({:g}, {:g}, {:g})".format(*row) for row in BOX)
    mesh = read("a.usda", usda(f'def Points "p"\n{{\n    point3f[] points = [{points}]\n    {DISPLAY}\n}}\n'))
    assert len(mesh.points) == 8 and extent(mesh) == [1, 2, 3] and color(mesh) == ORANGE


@pytest.mark.parametrize(
    "prim, size",
    [
        ('def Cube "a" {\n double size = 2\n}', [2, 2, 2]),
        ('def Sphere "a" {\n double radius = 2\n}', [4, 4, 4]),
        (
            'def Cylinder "a" {\n double radius = 1\n double height = 6\n uniform token axis = "X"\n}',
            [6, 2, 2],
        ),
        ('def Cylinder "a" {\n double radius = 1\n double height = 6\n}', [2, 2, 6]),
        ('def Cone "a" {\n double radius = 1\n double height = 6\n uniform token axis = "Y"\n}', [2, 6, 2]),
        ('def Capsule "a" {\n double radius = 1\n double height = 6\n}', [2, 2, 8]),
    ],
)
def test_usd_solids(read, prim, size):
    mesh = read("a.usda", usda(prim))
    assert np.allclose(extent(mesh), size, atol=0.02) and np.allclose(mesh.bounds.sum(0), 0, atol=0.02)


def test_usd_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.usda").write_text(usda(usd_box()))
    (tmp_path / "inner").mkdir()
    for name, body in {
        "a.usda": 'def "a" ( references = @../secret.usda@</box> ) {}',
        "b.usda": f'def "a" ( references = @{tmp_path}/secret.usda@</box> ) {{}}',
    }.items():
        (tmp_path / "inner" / name).write_text(usda(body))
        with pytest.raises(UnsafeFile, match="outside of its folder"):
            read_mesh(tmp_path / "inner" / name)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.usda", "#usda 1.0\ndef Mesh {"),
        ("a.usdc", b"PXR-USDC" + bytes(80)),
        ("a.usdz", b"PK\x03\x04" + bytes(60)),
        ("a.usda", usda(usd_box()).replace("[3, 3", "[99, 3", 1)),
        ("a.usda", usda(usd_box()).replace("faceVertexIndices = [0", "faceVertexIndices = [77", 1)),
        ("a.usda", usda('def Xform "empty" {}')),
    ],
)
def test_usd_that_is_wrong(read, name, content):
    with pytest.raises(InputError, match=name):
        read(name, content)


# 3MF

BASE = '<basematerials id="5"><base name="o" displaycolor="#FF8000"/><base name="b" displaycolor="#0000FFFF"/></basematerials>'
GROUP = '<m:colorgroup id="6"><m:color color="#FF8000FF"/><m:color color="#0000FF"/></m:colorgroup>'


@pytest.mark.parametrize(
    "content, expected",
    [
        (three_mf(), None),
        (three_mf(BASE, 'pid="5" pindex="0"'), ORANGE),
        (three_mf(BASE, 'pid="5" pindex="1"', lambda i: 'pid="5" p1="0"'), ORANGE),
        (three_mf(GROUP, "", lambda i: 'pid="6" p1="0"'), ORANGE),
        (three_mf(GROUP, "", lambda i: 'pid="6" p1="0" p2="0" p3="0"'), ORANGE),
        (three_mf(GROUP, 'pid="6" pindex="0"'), ORANGE),
        (three_mf(GROUP, 'pid="9" pindex="0"'), None),
        (three_mf(GROUP, 'pid="6" pindex="7"'), None),
    ],
)
def test_3mf(read, content, expected):
    mesh = read("a.3mf", content)
    assert (
        extent(mesh) == [1, 2, 3] and (mesh.up, mesh.unit_in_meters) == ("z", 0.001) and mesh.face_count == 12
    )
    assert color(mesh) is None if expected is None else np.allclose(color(mesh), expected, atol=0.01)


def test_3mf_colors_of_triangles_do_not_blend(read):
    mesh = read("a.3mf", three_mf(GROUP, "", lambda i: f'pid="6" p1="{int(i in (2, 3))}"'))
    xyz, rgb = mesh.sample(2000, np.random.default_rng(0))
    side = np.isclose(xyz[:, 0], 1)  # triangles 2 and 3
    assert np.allclose(rgb[side], [0, 0, 1]) and np.allclose(rgb[~side], [1, 128 / 255, 0])


@pytest.mark.parametrize(
    "unit, meters",
    [
        ("micron", 1e-6),
        ("millimeter", 1e-3),
        ("centimeter", 0.01),
        ("inch", 0.0254),
        ("foot", 0.3048),
        ("meter", 1.0),
    ],
)
def test_3mf_units(tmp_path, unit, meters):
    (tmp_path / "a.3mf").write_bytes(three_mf(unit=unit))
    assert np.allclose(read_shape(tmp_path / "a.3mf").size, np.array([1, 3, 2]) * meters, rtol=0.02)


def test_3mf_components_and_items(read):
    parts = '|<object id="2"><components><component objectid="1"/><component objectid="1" transform="1 0 0 0 1 0 0 0 1 10 0 0"/></components></object>'
    items = '<item objectid="2"/><item objectid="2" transform="0 1 0 -1 0 0 0 0 1 0 50 0"/>'
    mesh = read("a.3mf", three_mf(parts, build=items))
    assert mesh.face_count == 48 and np.allclose(mesh.bounds, [[-2, 0, 0], [11, 61, 3]])


def test_3mf_of_several_parts(read):
    other = three_mf()
    with zipfile.ZipFile(__import__("io").BytesIO(other)) as archive:
        content = archive.read("3D/box.model").decode()
    parts = '|<object id="2"><components><component objectid="1"/><component p:path="/3D/other.model" objectid="1" transform="1 0 0 0 1 0 0 0 1 10 0 0" xmlns:p="http://schemas.microsoft.com/3dmanufacturing/production/2015/06"/></components></object>'
    mesh = read(
        "a.3mf", three_mf(parts, build='<item objectid="2"/>', **{"3D/other__model": content.encode()})
    )
    assert extent(mesh) == [11, 2, 3]


def test_3mf_texture(read):
    places = "".join(f'<m:tex2coord u="{(x > 0.5) * 0.98 + 0.01:g}" v="{y / 2:g}"/>' for x, y, _ in BOX)
    texture = f'<m:texture2d id="7" path="/3D/half.png" contenttype="image/png"/><m:texture2dgroup id="8" texid="7">{places}</m:texture2dgroup>'
    used = lambda i: 'pid="8" p1="{}" p2="{}" p3="{}"'.format(*FACES[i])  # noqa: E731
    assert is_half_red_half_blue(read("a.3mf", three_mf(texture, "", used, **{"3D/half__png": HALVES})))
    mesh = read("a.3mf", three_mf(texture, "", used))
    assert color(mesh) is None and "half.png" in mesh.warnings[0]


@pytest.mark.parametrize(
    "content, says",
    [
        (three_mf()[:-100], "a.3mf"),
        (three_mf(build='<item objectid="9"/>'), "object '9' is missing"),
        (
            three_mf(
                '|<object id="2"><components><component objectid="2"/></components></object>',
                build='<item objectid="2"/>',
            ),
            "contains itself",
        ),
        (three_mf(unit="parsec"), "parsec"),
        (three_mf().replace(b"3D/box.model", b"3D/box.mobel"), "no 3D model|3D/box.model"),
        (three_mf(build='<item objectid="1" transform="1 0 0"/>'), "cannot be read as 3MF"),
        (three_mf(of_triangle=lambda i: 'v1="99"' if False else "v4='<'"), "a.3mf"),
        (b"PK\x05\x06" + bytes(18), "a.3mf"),
    ],
)
def test_3mf_that_is_wrong(read, content, says):
    with pytest.raises(InputError, match=says):
        read("a.3mf", content)


def test_3mf_nested_without_end_is_bounded(read):
    "Each object holds the one before it ten times."
    nested = "|" + "".join(
        f'<object id="{i}"><components>{f"<component objectid={chr(34)}{i - 1}{chr(34)}/>" * 10}</components></object>'
        for i in range(2, 12)
    )
    with limits(faces=2**40), pytest.raises(UnsafeFile, match="placed objects"):
        read("a.3mf", three_mf(nested, build='<item objectid="11"/>'))


def test_3mf_that_unpacks_to_too_much(read):
    with limits(unpacked=100_000), pytest.raises(UnsafeFile, match="when unpacked"):
        read("a.3mf", three_mf(**{"bomb__bin": bytes(10**6)}))


# VTK


@pytest.mark.parametrize("kind", ["ASCII", "BINARY"])
@pytest.mark.parametrize(
    "cells, faces",
    [
        ("polygons", 12),
        ("offsets", 12),
        ("mixed", 12),
        ("hexahedron", 12),
        ("tetrahedra", 12),
        ("strips", 12),
    ],
)
@pytest.mark.parametrize("data", ["", "point", "cell"])
def test_vtk_legacy(read, kind, cells, faces, data):
    mesh = read("a.vtk", legacy(kind, cells, data))
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == faces
    if data == "point" or (data == "cell" and cells != "strips"):
        assert np.allclose(color(mesh), ORANGE, atol=0.01)
    else:
        assert color(mesh) is None


@pytest.mark.parametrize("kind, suffix", [("PolyData", ".vtp"), ("UnstructuredGrid", ".vtu")])
@pytest.mark.parametrize(
    "form, encoding", [("ascii", "raw"), ("binary", "raw"), ("appended", "raw"), ("appended", "base64")]
)
@pytest.mark.parametrize("compressor", ["", "vtkZLibDataCompressor", "vtkLZMADataCompressor"])
def test_vtk_xml(read, kind, suffix, form, encoding, compressor):
    mesh = read(f"a{suffix}", xml(form, compressor, kind, encoding=encoding))
    assert extent(mesh) == [1, 2, 3] and mesh.face_count == 12 and np.allclose(color(mesh), ORANGE, atol=0.01)


@pytest.mark.parametrize("header", ["UInt32", "UInt64"])
@pytest.mark.parametrize("order", ["LittleEndian", "BigEndian"])
def test_vtk_byte_orders(read, header, order):
    assert np.allclose(
        color(read("a.vtp", xml("appended", "vtkZLibDataCompressor", header=header, order=order))),
        ORANGE,
        atol=0.01,
    )


@pytest.mark.parametrize(
    "name, content, says",
    [
        (
            "a.vtk",
            legacy().replace(b"POLYDATA", b"STRUCTURED_POINTS"),
            "STRUCTURED_POINTS is a grid without a surface",
        ),
        ("a.vtp", xml().replace(b'type="PolyData"', b'type="ImageData"', 1), "ImageData is no surface"),
        ("a.vtp", xml("binary", "vtkLZ4DataCompressor"), "vtkLZ4DataCompressor are not read"),
        ("a.vtp", b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]>' + xml()[21:], "document type"),
        ("a.vtk", legacy("BINARY")[:180], "cut short"),
        ("a.vtk", legacy()[:150], "cut short"),
        ("a.vtp", xml("appended")[:-150], "a.vtp"),
        ("a.vtk", legacy().replace(b"POINTS 8", b"POINTS 99999999"), "99,999,999 points"),
        ("a.vtk", legacy().replace(b"4 0 1 3 2", b"4 0 1 3 9"), "names vertex 9"),
        (
            "a.vtk",
            legacy(cells="hexahedron").replace(b"CELL_TYPES 1\n12", b"CELL_TYPES 1\n25"),
            "type 25 are not read",
        ),
        ("a.vtk", b"# vtk DataFile Version 3.0\n", "no head"),
        (
            "a.vtu",
            xml(kind="UnstructuredGrid").replace(b">8</DataArray>", b">99</DataArray>"),
            "offsets of Cells",
        ),
    ],
)
def test_vtk_that_is_wrong(read, name, content, says):
    with pytest.raises(InputError, match=says):
        read(name, content)


# laser scans


@pytest.mark.parametrize("suffix", [".las", ".laz"])
@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ORANGE),
        ({"scale": 255}, ORANGE),
        ({"form": 3}, ORANGE),
        ({"form": 7, "version": "1.4"}, ORANGE),
        ({"form": 1}, None),
        ({"rgb": (0, 0, 0)}, None),
    ],
)
def test_las(tmp_path, suffix, options, expected):
    mesh = read_mesh(las(tmp_path / f"a{suffix}", **options))
    assert extent(mesh) == [1, 2, 3] and mesh.up == "z" and len(mesh.points) == 4 and color(mesh) == expected
    assert bool(mesh.warnings) == ("rgb" in options)


METER, FOOT = 'UNIT["metre",1,AUTHORITY["EPSG","9001"]]', 'UNIT["US survey foot",0.3048006096012192]'
DEGREES = 'GEOGCS["WGS 84",DATUM["W",SPHEROID["W",6378137,298.2]],UNIT["degree",0.0174532925199433]]'
WKT2 = 'PROJCRS["x",BASEGEOGCRS["w",ELLIPSOID["w",6378137,298.2,LENGTHUNIT["metre",1]]],CS[Cartesian,2],'
WKT2 += 'AXIS["e",east],AXIS["n",north],LENGTHUNIT["foot",0.3048]]'


@pytest.mark.parametrize(
    "text, unit",
    [
        (f'PROJCS["UTM",{DEGREES},PARAMETER["x",0],{METER}]', 1.0),
        (f'PROJCS["x",{DEGREES},{FOOT}]', 0.3048006096012192),
        (
            f'COMPD_CS["x",PROJCS["x",{DEGREES},{FOOT}],VERT_CS["h",VERT_DATUM["h",2005],{FOOT}]]',
            0.3048006096,
        ),
        (f'COMPD_CS["x",PROJCS["x",{DEGREES},{FOOT}],VERT_CS["h",VERT_DATUM["h",2005],{METER}]]', None),
        (WKT2, 0.3048),
        (DEGREES, None),
        ("", None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(another unit|degrees)")
def test_units_of_laser_scans_as_text(tmp_path, text, unit):
    laspy = pytest.importorskip("laspy")
    made = laspy.read(las(tmp_path / "a.las", form=7, version="1.4"))
    if text:
        made.vlrs.append(laspy.vlrs.known.WktCoordinateSystemVlr(text))
    made.write(tmp_path / "b.las")
    mesh, shape = read_mesh(tmp_path / "b.las"), read_shape(tmp_path / "b.las")
    assert mesh.unit_in_meters == (None if unit is None else pytest.approx(unit, rel=1e-9))
    said = "degrees" if text == DEGREES else "another unit" if text and unit is None else ""
    assert said in " ".join(mesh.warnings) and bool(mesh.warnings) == bool(said)
    assert shape.size == (None if unit is None else pytest.approx((unit, 3 * unit, 2 * unit), rel=1e-6))


@pytest.mark.parametrize(
    "keys, unit",
    [
        ({3076: 9001}, 1.0),
        ({3076: 9002}, 0.3048),
        ({3076: 9003, 4099: 9003}, 1200 / 3937),
        ({3076: 9003, 4099: 9001}, None),
        ({3076: 9999}, None),
        ({4099: 9001}, None),
        ({1024: 2}, None),
        ({}, None),
    ],
)
def test_units_of_laser_scans_as_geotiff_keys(tmp_path, keys, unit):
    mesh = read_mesh(las_with_keys(tmp_path, keys))
    assert mesh.unit_in_meters == unit and bool(mesh.warnings) == (
        keys in ({3076: 9003, 4099: 9001}, {1024: 2})
    )


def las_with_keys(folder, keys: dict[int, int]):
    "A scan whose coordinate system is stated by GeoTIFF keys."
    laspy = pytest.importorskip("laspy")
    made = laspy.read(las(folder / "a.las"))
    rows = [[1, 1, 0, len(keys)], *([key, 0, 1, value] for key, value in keys.items())]
    made.vlrs.append(laspy.VLR("LASF_Projection", 34735, "", np.array(rows, "<u2").tobytes()))
    made.write(folder / "b.las")
    return folder / "b.las"


@pytest.mark.parametrize(
    "keys, unit, says",
    [
        ({3072: 32633}, 1.0, None),  # UTM
        ({3072: 2225}, 1200 / 3937, None),  # California, US survey feet
        ({3072: 2225, 4096: 6360}, 1200 / 3937, None),  # heights in US survey feet
        ({3072: 2225, 4096: 5703}, None, "another unit"),  # heights in meters
        ({3072: 4326}, None, "degrees"),
        ({3072: 65000}, None, "EPSG:65000 is unknown"),
        ({3072: 32767}, None, None),  # defined by its user
        ({3072: 2225, 3076: 9001}, 1.0, None),  # the unit that is stated counts
    ],
)
def test_units_of_laser_scans_as_codes_of_epsg(tmp_path, keys, unit, says):
    pytest.importorskip("pyproj")
    mesh = read_mesh(las_with_keys(tmp_path, keys))
    assert mesh.unit_in_meters == (None if unit is None else pytest.approx(unit, rel=1e-9))
    assert not mesh.warnings if says is None else says in mesh.warnings[0]


def test_a_unit_that_pyproj_would_have_to_look_up_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyproj", None)
    mesh = parse_las(las_with_keys(tmp_path, {3072: 32633}))
    assert mesh.unit_in_meters is None and "EPSG:32633; install pyproj" in mesh.warnings[0]


def test_las_keeps_its_digits_and_stands_up(tmp_path):
    shape = read_shape(las(tmp_path / "a.las"))
    assert np.allclose(np.ptp(shape.points, axis=0), [1, 3, 2], atol=1e-6)
    assert np.allclose(
        shape.points - shape.points[0], [[0, 0, 0], [1, 0, 0], [0, 3, -2], [1, 0, -2]], atol=1e-6
    )


@pytest.mark.parametrize("suffix", [".las", ".laz"])
@pytest.mark.parametrize("keep", [0.9, 0.5, 60])
def test_las_cut_short(tmp_path, suffix, keep):
    content = las(tmp_path / f"whole{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(InputError, match=f"a{suffix}"):
        read_mesh(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("at, value", [(100, 2**32 - 1), (100, 10**6), (107, 2**32 - 1)])
def test_las_that_announces_too_much(tmp_path, at, value):
    "Records, points."
    content = bytearray(las(tmp_path / "whole.las").read_bytes())
    content[at : at + 4] = value.to_bytes(4, "little")
    (tmp_path / "a.las").write_bytes(content)
    with pytest.raises(InputError, match="records, more than|points, more than|announces"):
        read_mesh(tmp_path / "a.las")


@pytest.mark.parametrize(
    "scans, colored, size", [(1, True, [2, 1, 3]), (1, False, [2, 1, 3]), (3, True, [22, 1, 3])]
)
def test_e57(tmp_path, scans, colored, size):
    mesh = read_mesh(e57(tmp_path / "a.e57", scans, colored))
    assert (
        extent(mesh) == size
        and (mesh.up, mesh.unit_in_meters) == ("z", 1.0)
        and len(mesh.points) == 4 * scans
    )
    assert color(mesh) == (ORANGE if colored else None)
    assert np.allclose(mesh.points[:4], PLACES[:, [1, 0, 2]] * [-1, 1, 1], atol=1e-6)


@pytest.mark.parametrize("keep", [0.9, 0.4, 100])
def test_e57_cut_short(tmp_path, keep):
    content = e57(tmp_path / "whole.e57").read_bytes()
    (tmp_path / "a.e57").write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(InputError, match="a.e57"):
        read_mesh(tmp_path / "a.e57")


def test_laser_scans_beyond_the_limit(tmp_path):
    for path in (las(tmp_path / "a.las"), las(tmp_path / "a.laz"), e57(tmp_path / "a.e57")):
        with limits(points=3), pytest.raises(UnsafeFile, match="4 points, more than the 3"):
            read_mesh(path)


def test_damaged_files_give_errors_of_this_package(tmp_path):
    "A byte changed here and there: read, or refused with the name of the file."
    generator = np.random.default_rng(0)
    sound = {
        "a.3ds": three_ds(),
        "a.fbx": Fbx().bytes(),
        "a.las": las(tmp_path / "s.las").read_bytes(),
        "a.3mf": three_mf(),
        "a.vtk": legacy("BINARY"),
    }
    for name, content in sound.items():
        for _ in range(4):
            changed = bytearray(content)
            for position in generator.integers(0, len(content), 5):
                changed[position] = generator.integers(256)
            (tmp_path / name).write_bytes(changed)
            try:
                read_mesh(tmp_path / name)
            except Cg3dError as error:
                assert name in str(error)
