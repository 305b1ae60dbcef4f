"""Small files of 3MF, VTK and the formats that libraries of others read, written by code: a box of 1 x 2 x 3, mostly orange."""

import base64
import io
import lzma
import struct
import zipfile
import zlib

import numpy as np
from gltf_writer import BOX, FACES, picture

QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]


def step(prefix: str = ".MILLI.", color: tuple | None = (1, 0.5, 0)) -> str:
    "A faceted solid; the prefix of the meter is .MILLI., .CENTI. or $."
    lines: list[str] = []

    def add(text: str) -> int:
        lines.append(text)
        return len(lines)

    for text in (
        "APPLICATION_CONTEXT('')",
        "APPLICATION_PROTOCOL_DEFINITION('international standard','automotive_design',2000,#1)",
        "PRODUCT_CONTEXT('',#1,'mechanical')",
        "PRODUCT('box','box','',(#3))",
        "PRODUCT_DEFINITION_FORMATION('','',#4)",
        "PRODUCT_DEFINITION_CONTEXT('part definition',#1,'design')",
        "PRODUCT_DEFINITION('design','',#5,#6)",
        "PRODUCT_DEFINITION_SHAPE('','',#7)",
        f"(LENGTH_UNIT()NAMED_UNIT(*)SI_UNIT({prefix},.METRE.))",
        "(NAMED_UNIT(*)PLANE_ANGLE_UNIT()SI_UNIT($,.RADIAN.))",
        "(NAMED_UNIT(*)SI_UNIT($,.STERADIAN.)SOLID_ANGLE_UNIT())",
        "(GEOMETRIC_REPRESENTATION_CONTEXT(3)GLOBAL_UNIT_ASSIGNED_CONTEXT((#9,#10,#11))"
        "REPRESENTATION_CONTEXT('',''))",
    ):
        add(text)
    points = [add("CARTESIAN_POINT('',({:.1f},{:.1f},{:.1f}))".format(*row)) for row in BOX]
    faces = []
    for quad in QUADS:
        a, b, c = (BOX[i].astype(float) for i in quad[:3])
        normal, along = np.cross(b - a, c - a), b - a
        normal, along = normal / np.linalg.norm(normal), along / np.linalg.norm(along)
        loop = add(f"POLY_LOOP('',({','.join(f'#{points[i]}' for i in quad)}))")
        bound = add(f"FACE_OUTER_BOUND('',#{loop},.T.)")
        up = add("DIRECTION('',({:.1f},{:.1f},{:.1f}))".format(*normal))
        right = add("DIRECTION('',({:.1f},{:.1f},{:.1f}))".format(*along))
        axes = add(f"AXIS2_PLACEMENT_3D('',#{points[quad[0]]},#{up},#{right})")
        plane = add(f"PLANE('',#{axes})")
        faces.append(add(f"FACE_SURFACE('',(#{bound}),#{plane},.T.)"))
    shell = add(f"CLOSED_SHELL('',({','.join(f'#{face}' for face in faces)}))")
    solid = add(f"FACETED_BREP('box',#{shell})")
    shape = add(f"FACETED_BREP_SHAPE_REPRESENTATION('box',(#{solid}),#12)")
    add(f"SHAPE_DEFINITION_REPRESENTATION(#8,#{shape})")
    if color:
        last = add("COLOUR_RGB('',{},{},{})".format(*map(float, color)))
        for text in (
            "FILL_AREA_STYLE_COLOUR('',#{})",
            "FILL_AREA_STYLE('',(#{}))",
            "SURFACE_STYLE_FILL_AREA(#{})",
            "SURFACE_SIDE_STYLE('',(#{}))",
            "SURFACE_STYLE_USAGE(.BOTH.,#{})",
            "PRESENTATION_STYLE_ASSIGNMENT((#{}))",
        ):
            last = add(text.format(last))
        styled = add(f"STYLED_ITEM('',(#{last}),#{solid})")
        add(f"MECHANICAL_DESIGN_GEOMETRIC_PRESENTATION_REPRESENTATION('',(#{styled}),#12)")
    body = "\n".join(f"#{number}={text};" for number, text in enumerate(lines, 1))
    head = "FILE_DESCRIPTION((''),'2;1');\nFILE_NAME('','',(''),(''),'','','');\nFILE_SCHEMA(('AUTOMOTIVE_DESIGN'));"
    return f"ISO-10303-21;\nHEADER;\n{head}\nENDSEC;\nDATA;\n{body}\nENDSEC;\nEND-ISO-10303-21;\n"


def iges(unit_flag: int = 2, unit: str = "MM") -> str:
    "Six bilinear B-spline surfaces."
    start = [f"{'box':<72}S{1:>7}"]
    text = (
        f"1H,,1H;,3Hbox,8Hbox.iges,4Hcg3d,4Hcg3d,32,38,6,308,15,3Hbox,1.0,{unit_flag},{len(unit)}H{unit},1,0.01,"
        "15H20260101.000000,0.0001,100.0,4Hcg3d,4Hcg3d,11,0,15H20260101.000000;"
    )
    head = [f"{text[i : i + 72]:<72}G{i // 72 + 1:>7}" for i in range(0, len(text), 72)]
    directory, parameters = [], []
    for a, b, c, d in ([BOX[i] for i in quad] for quad in QUADS):
        numbers = [
            "128",
            "1",
            "1",
            "1",
            "1",
            "0",
            "0",
            "1",
            "0",
            "0",
            *["0.", "0.", "1.", "1."] * 2,
            *["1."] * 4,
        ]
        numbers += [f"{value:.1f}" for corner in (a, b, d, c) for value in corner] + ["0.", "1.", "0.", "1."]
        lines, line = [], ""
        for number in numbers:
            if len(line) + len(number) + 1 > 64:
                lines, line = [*lines, line], ""
            line += number + ","
        lines.append(line[:-1] + ";")
        entry, first = len(directory) + 1, len(parameters) + 1
        parameters += [f"{line:<64}{entry:>8}P{first + i:>7}" for i, line in enumerate(lines)]
        directory.append(f"{128:>8}{first:>8}{0:>8}{0:>8}{0:>8}{0:>8}{0:>8}{0:>8}{'00000000':>8}D{entry:>7}")
        directory.append(
            f"{128:>8}{0:>8}{0:>8}{len(lines):>8}{0:>8}{'':>8}{'':>8}{'':>8}{0:>8}D{entry + 1:>7}"
        )
    end = f"S{1:>7}G{len(head):>7}D{len(directory):>7}P{len(parameters):>7}"
    return "\n".join([*start, *head, *directory, *parameters, f"{end:<72}T{1:>7}"]) + "\n"


def dae(up: str = "Y_UP", meter: float = 1, texture: str = "", vertex_colors: bool = False) -> str:
    "COLLADA; the node is moved by 5 along x."
    positions, faces = " ".join(f"{value:g}" for value in BOX.ravel()), FACES
    sources, inputs, stride = "", "", 1
    diffuse = "<color>1 0.5 0 1</color>"
    if texture:
        diffuse = '<texture texture="sampler" texcoord="UV"/>'
        places = " ".join(f"{(x > 0.5) * 0.98 + 0.01:g} {y / 2:g}" for x, y, _ in BOX)
        sources = _dae_source("uv", places, 16, "ST")
        inputs = '<input semantic="TEXCOORD" source="#uv" offset="1" set="0"/>'
        stride = 2
    if vertex_colors:
        sources, stride = _dae_source("rgb", " ".join(["1 0.5 0"] * 8), 24, "RGB"), 2
        inputs = '<input semantic="COLOR" source="#rgb" offset="1"/>'
    indices = " ".join(str(i) for face in faces for corner in face for i in [corner] * stride)
    images = f'<library_images><image id="i"><init_from>{texture}</init_from></image></library_images>'
    params = (
        '<newparam sid="surface"><surface type="2D"><init_from>i</init_from></surface></newparam>'
        '<newparam sid="sampler"><sampler2D><source>surface</source></sampler2D></newparam>'
    )
    return f"""<?xml version="1.0"?><COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">
<asset><unit name="u" meter="{meter}"/><up_axis>{up}</up_axis></asset>{images if texture else ""}
<library_effects><effect id="e"><profile_COMMON>{params if texture else ""}<technique sid="c"><lambert><diffuse>{diffuse}</diffuse>
</lambert></technique></profile_COMMON></effect></library_effects>
<library_materials><material id="m" name="m"><instance_effect url="#e"/></material></library_materials>
<library_geometries><geometry id="g"><mesh>{_dae_source("p", positions, 24, "XYZ")}{sources}
<vertices id="v"><input semantic="POSITION" source="#p"/></vertices>
<triangles count="12" material="mat"><input semantic="VERTEX" source="#v" offset="0"/>{inputs}<p>{indices}</p></triangles>
</mesh></geometry></library_geometries><library_visual_scenes><visual_scene id="s"><node id="n"><translate>5 0 0</translate>
<instance_geometry url="#g"><bind_material><technique_common><instance_material symbol="mat" target="#m">
<bind_vertex_input semantic="UV" input_semantic="TEXCOORD" input_set="0"/></instance_material></technique_common></bind_material>
</instance_geometry></node></visual_scene></library_visual_scenes><scene><instance_visual_scene url="#s"/></scene></COLLADA>"""


def _dae_source(name: str, numbers: str, count: int, axes: str) -> str:
    params = "".join(f'<param name="{axis}" type="float"/>' for axis in axes)
    accessor = (
        f'<accessor source="#{name}a" count="{count // len(axes)}" stride="{len(axes)}">{params}</accessor>'
    )
    array = f'<float_array id="{name}a" count="{count}">{numbers}</float_array>'
    return f'<source id="{name}">{array}<technique_common>{accessor}</technique_common></source>'


class Fbx:
    "A binary FBX file of version 7.4."

    def __init__(
        self,
        up: int = 1,
        unit: float = 1.0,
        picture: bytes = b"",
        name: str = "half.png",
        inside: bool = True,
    ):
        axes = {
            "UpAxis": up,
            "UpAxisSign": 1,
            "FrontAxis": 2 if up == 1 else 1,
            "FrontAxisSign": 1 if up == 1 else -1,
        }
        axes |= {"CoordAxis": 0, "CoordAxisSign": 1}
        settings = [("P", [key, "int", "Integer", "", value], []) for key, value in axes.items()]
        settings.append(("P", ["UnitScaleFactor", "double", "Number", "", float(unit)], []))
        corners = FACES.astype(np.int32).copy()
        corners[:, 2] = -corners[:, 2] - 1
        uv = np.stack([(BOX[:, 0] > 0.5) * 0.98 + 0.01, BOX[:, 1] / 2], 1)[FACES].reshape(-1)
        material = [
            ("MappingInformationType", ["AllSame"], []),
            ("ReferenceInformationType", ["IndexToDirect"], []),
        ]
        material.append(("Materials", [np.zeros(1, np.int32)], []))
        layers = [("LayerElement", [], [("Type", ["LayerElementMaterial"], []), ("TypedIndex", [0], [])])]
        geometry = [
            ("Vertices", [BOX.astype(np.float64).ravel()], []),
            ("PolygonVertexIndex", [corners.ravel()], []),
            ("GeometryVersion", [124], []),
            ("LayerElementMaterial", [0], material),
        ]
        if picture:
            mapping = [
                ("MappingInformationType", ["ByPolygonVertex"], []),
                ("ReferenceInformationType", ["Direct"], []),
            ]
            geometry.append(("LayerElementUV", [0], [*mapping, ("UV", [uv.astype(np.float64)], [])]))
            layers.append(("LayerElement", [], [("Type", ["LayerElementUV"], []), ("TypedIndex", [0], [])]))
        geometry.append(("Layer", [0], layers))
        moved = [("P", ["Lcl Translation", "Lcl Translation", "", "A", 5.0, 0.0, 0.0], [])]
        diffuse = [("P", ["DiffuseColor", "Color", "", "A", 1.0, 0.5, 0.0], [])]
        objects = [
            ("Geometry", [_Long(100), "box\0\1Geometry", "Mesh"], geometry),
            (
                "Model",
                [_Long(200), "box\0\1Model", "Mesh"],
                [("Version", [232], []), ("Properties70", [], moved)],
            ),
            (
                "Material",
                [_Long(300), "orange\0\1Material", ""],
                [("ShadingModel", ["lambert"], []), ("Properties70", [], diffuse)],
            ),
        ]
        links = [("C", ["OO", _Long(a), _Long(b)], []) for a, b in ((200, 0), (100, 200), (300, 200))]
        if picture:
            files = [("Filename", ["C:\\work\\" + name], []), ("RelativeFilename", ["..\\" + name], [])]
            content = [("Content", [picture], [])] if inside else []
            objects.append(
                ("Video", [_Long(400), "v\0\1Video", "Clip"], [("Type", ["Clip"], []), *files, *content])
            )
            used = [("FileName", ["C:\\work\\" + name], []), ("RelativeFilename", ["..\\" + name], [])]
            objects.append(
                ("Texture", [_Long(500), "t\0\1Texture", ""], [("Type", ["TextureVideoClip"], []), *used])
            )
            links += [
                ("C", ["OO", _Long(400), _Long(500)], []),
                ("C", ["OP", _Long(500), _Long(300), "DiffuseColor"], []),
            ]
        self.nodes = [
            ("FBXHeaderExtension", [], [("FBXHeaderVersion", [1003], []), ("FBXVersion", [7400], [])]),
            ("GlobalSettings", [], [("Version", [1000], []), ("Properties70", [], settings)]),
            ("Objects", [], objects),
            ("Connections", [], links),
        ]

    def bytes(self) -> bytes:
        out = b"Kaydara FBX Binary  \0\x1a\0" + struct.pack("<I", 7400)
        for node in self.nodes:
            out += self._node(node, len(out))
        return out + bytes(13) + bytes(160)

    def _node(self, node: tuple, start: int) -> bytes:
        name, properties, children = node
        values = b"".join(map(_fbx_value, properties))
        position = start + 13 + len(name) + len(values)
        body = b""
        for child in children:
            body += self._node(child, position + len(body))
        if children:
            body += bytes(13)
        head = struct.pack("<IIIB", position + len(body), len(properties), len(values), len(name))
        return head + name.encode() + values + body


class _Long(int):
    "A 64-bit number."


def _fbx_value(value) -> bytes:
    if isinstance(value, _Long):
        return b"L" + struct.pack("<q", value)
    if isinstance(value, int):
        return b"I" + struct.pack("<i", value)
    if isinstance(value, float):
        return b"D" + struct.pack("<d", value)
    if isinstance(value, str):
        return b"S" + struct.pack("<I", len(value)) + value.encode()
    if isinstance(value, bytes):
        return b"R" + struct.pack("<I", len(value)) + value
    kind = b"d" if value.dtype == np.float64 else b"i"
    return kind + struct.pack("<III", len(value), 0, value.nbytes) + value.tobytes()


def three_ds() -> bytes:
    def chunk(kind: int, body: bytes) -> bytes:
        return struct.pack("<HI", kind, len(body) + 6) + body

    material = chunk(0xA000, b"orange\0") + chunk(0xA020, chunk(0x0011, bytes((255, 128, 0))))
    vertices = chunk(0x4110, struct.pack("<H", 8) + BOX.astype("<f4").tobytes())
    used = chunk(0x4130, b"orange\0" + struct.pack("<H12H", 12, *range(12)))
    faces = b"".join(struct.pack("<HHHH", *face, 7) for face in FACES)
    mesh = chunk(0x4100, vertices + chunk(0x4120, struct.pack("<H", 12) + faces + used))
    edit = chunk(0x3D3D, chunk(0xAFFF, material) + chunk(0x4000, b"box\0" + mesh))
    return chunk(0x4D4D, chunk(0x0002, struct.pack("<I", 3)) + edit)


def ac3d() -> str:
    head = 'AC3Db\nMATERIAL "orange" rgb 1 0.5 0 amb 0 0 0 emis 0 0 0 spec 0 0 0 shi 10 trans 0\n'
    head += 'OBJECT world\nkids 1\nOBJECT poly\nname "box"\nloc 5 0 0\nnumvert 8\n'
    rows = "".join("{:g} {:g} {:g}\n".format(*row) for row in BOX)
    faces = "".join(
        "SURF 0x10\nmat 0\nrefs 3\n" + "".join(f"{corner} 0 0\n" for corner in face) for face in FACES
    )
    return f"{head}{rows}numsurf 12\n{faces}kids 0\n"


def direct_x() -> str:
    rows = ",\n".join("{:g};{:g};{:g};".format(*row) for row in BOX) + ";"
    faces = ",\n".join("3;{},{},{};".format(*face) for face in FACES) + ";"
    used = ",".join("0" for _ in FACES) + ";"
    return f"""xof 0303txt 0032
Mesh box {{
 8;
 {rows}
 12;
 {faces}
 MeshMaterialList {{
  1;
  12;
  {used}
  Material orange {{
   1.0;0.5;0.0;1.0;;
   1.0;
   0.0;0.0;0.0;;
   0.0;0.0;0.0;;
  }}
 }}
}}
"""


def amf() -> str:
    rows = "".join(
        "<vertex><coordinates><x>{:g}</x><y>{:g}</y><z>{:g}</z></coordinates></vertex>".format(*row)
        for row in BOX
    )
    faces = "".join("<triangle><v1>{}</v1><v2>{}</v2><v3>{}</v3></triangle>".format(*face) for face in FACES)
    mesh = f'<mesh><vertices>{rows}</vertices><volume materialid="1">{faces}</volume></mesh>'
    material = '<material id="1"><color><r>1</r><g>0.5</g><b>0</b></color></material>'
    return f'<?xml version="1.0"?><amf unit="millimeter"><object id="0">{mesh}</object>{material}</amf>'


MF_RELATIONS = """<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">
<Relationship Target="/3D/box.model" Id="r" Type="http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"/></Relationships>"""


def three_mf(
    resources: str = "",
    of_object: str = "",
    of_triangle=lambda index: "",
    unit: str = "millimeter",
    build: str = "",
    **parts: bytes,
) -> bytes:
    "A package with the box as object 1; further parts by name with __ for a dot."
    rows = "".join('<vertex x="{:g}" y="{:g}" z="{:g}"/>'.format(*row) for row in BOX)
    faces = "".join(
        '<triangle v1="{}" v2="{}" v3="{}" {}/>'.format(*face, of_triangle(index))
        for index, face in enumerate(FACES)
    )
    mesh = f"<mesh><vertices>{rows}</vertices><triangles>{faces}</triangles></mesh>"
    spaces = 'xmlns="http://schemas.microsoft.com/3dmanufacturing/core/2015/02" xmlns:m="http://schemas.microsoft.com/3dmanufacturing/material/2015/02"'
    content = f"""<?xml version="1.0"?><model unit="{unit}" {spaces}><resources>{resources.partition("|")[0]}
<object id="1" type="model" {of_object}>{mesh}</object>{resources.partition("|")[2]}</resources>
<build>{build or '<item objectid="1"/>'}</build></model>"""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("_rels/.rels", MF_RELATIONS)
        archive.writestr("3D/box.model", content)
        for name, data in parts.items():
            archive.writestr(name.replace("__", "."), data)
    return buffer.getvalue()


def usda(body: str, up: str = "Y", meters: float = 1.0) -> str:
    return f'#usda 1.0\n(\n    upAxis = "{up}"\n    metersPerUnit = {meters}\n)\n{body}'


def usd_box(name: str = "box", more: str = "", schemas: str = "", quads: bool = False) -> str:
    "A mesh prim."
    polygons = QUADS if quads else FACES.tolist()
    points = ", ".join("({:g}, {:g}, {:g})".format(*row) for row in BOX)
    corners = ", ".join(str(corner) for polygon in polygons for corner in polygon)
    head = f'def Mesh "{name}"' + (f' ( prepend apiSchemas = ["{schemas}"] )' if schemas else "")
    return f"""{head}
{{
    int[] faceVertexCounts = [{", ".join(str(len(polygon)) for polygon in polygons)}]
    int[] faceVertexIndices = [{corners}]
    point3f[] points = [{points}]
    {more}
}}
"""


def usd_material(color: str = "color3f inputs:diffuseColor = (1, 0.2140411, 0)", texture: str = "") -> str:
    "A UsdPreviewSurface at /paint, perhaps with a texture."
    shaders = ""
    if texture:
        color = "color3f inputs:diffuseColor.connect = </paint/texture.outputs:rgb>"
        shaders = f"""    def Shader "texture"
    {{
        uniform token info:id = "UsdUVTexture"
        asset inputs:file = @{texture}@
        float2 inputs:st.connect = </paint/reader.outputs:result>
        float3 outputs:rgb
    }}
    def Shader "reader"
    {{
        uniform token info:id = "UsdPrimvarReader_float2"
        string inputs:varname = "st"
        float2 outputs:result
    }}
"""
    return f"""def Material "paint"
{{
    token outputs:surface.connect = </paint/shader.outputs:surface>
    def Shader "shader"
    {{
        uniform token info:id = "UsdPreviewSurface"
        {color}
        token outputs:surface
    }}
{shaders}}}
"""


def usd_moved_picture(inputs: str, place: str = "(0.25, 0.5)") -> str:
    "The box under one place of half.png, with a UsdTransform2d between the picture and its coordinates."
    between = f"""    def Shader "move"
    {{
        uniform token info:id = "UsdTransform2d"
        float2 inputs:in.connect = </paint/reader.outputs:result>
        {inputs}
        float2 outputs:result
    }}
"""
    material = usd_material(texture="half.png").replace("</paint/reader.outputs", "</paint/move.outputs")
    material = material.replace('    def Shader "reader"', between + '    def Shader "reader"')
    places = f'texCoord2f[] primvars:st = [{", ".join([place] * 8)}] ( interpolation = "vertex" )'
    bound = f"rel material:binding = </paint>\n    {places}"
    return usd_box(more=bound, schemas="MaterialBindingAPI") + material


HALVES = picture(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))  # left red, right blue


def usdz(folder, body: str, **parts: bytes) -> bytes:
    "A package."
    from pxr import Sdf

    writer = Sdf.ZipFileWriter.CreateNew(str(folder / "package.usdz"))
    for name, data in {"box__usda": usda(body).encode(), **parts}.items():
        (folder / "part").write_bytes(data)
        writer.AddFile(str(folder / "part"), name.replace("__", "."))
    writer.Save()
    return (folder / "package.usdz").read_bytes()


SQUARES = [list(quad) for quad in QUADS]


def legacy(kind: str = "ASCII", cells: str = "polygons", data: str = "", version: str = "3.0") -> bytes:
    binary = kind == "BINARY"

    def block(values, dtype: str) -> bytes:
        values = np.asarray(values)
        return (
            values.astype(dtype).tobytes()
            if binary
            else " ".join(f"{value:g}" for value in values.ravel()).encode()
        )

    out = f"# vtk DataFile Version {version}\nbox\n{kind}\nDATASET {'UNSTRUCTURED_GRID' if cells in ('mixed', 'hexahedron', 'tetrahedra') else 'POLYDATA'}\n".encode()
    out += b"POINTS 8 float\n" + block(BOX, ">f4") + b"\n"
    lists = {
        "polygons": SQUARES,
        "mixed": SQUARES[:5] + [[1, 5, 7], [1, 7, 3]],
        "hexahedron": [[0, 4, 6, 2, 1, 5, 7, 3]],
        "tetrahedra": [[0, 4, 6, 5], [0, 6, 2, 3], [0, 5, 3, 1], [6, 5, 7, 3], [0, 6, 5, 3]],
        "strips": [[0, 1, 4, 5, 6, 7, 2, 3, 0, 1], [0, 4, 2, 6], [1, 3, 5, 7]],
    }[cells if cells != "offsets" else "polygons"]
    keyword = {"polygons": "POLYGONS", "offsets": "POLYGONS", "strips": "TRIANGLE_STRIPS"}.get(cells, "CELLS")
    flat = [value for row in lists for value in [len(row), *row]]
    if cells == "offsets":
        ends = np.cumsum([0, *map(len, lists)])
        out += f"{keyword} {len(ends)} {ends[-1]}\nOFFSETS vtktypeint64\n".encode() + block(ends, ">i8")
        out += b"\nCONNECTIVITY vtktypeint64\n" + block([v for row in lists for v in row], ">i8") + b"\n"
    else:
        out += f"{keyword} {len(lists)} {len(flat)}\n".encode() + block(flat, ">i4") + b"\n"
    if keyword == "CELLS":
        types = {"hexahedron": [12], "tetrahedra": [10] * 5, "mixed": [9] * 5 + [5, 5]}[cells]
        out += f"CELL_TYPES {len(types)}\n".encode() + block(types, ">i4") + b"\n"
    if data == "point":
        out += (
            b"POINT_DATA 8\nSCALARS heat float 1\nLOOKUP_TABLE default\n" + block(np.arange(8), ">f4") + b"\n"
        )
        out += (
            b"COLOR_SCALARS paint 3\n"
            + (np.tile(np.uint8([255, 128, 0]), 8).tobytes() if binary else b"1 0.502 0 " * 8)
            + b"\n"
        )
    elif data == "cell":
        out += f"CELL_DATA {len(lists)}\nFIELD attributes 1\nRGB 3 {len(lists)} unsigned_char\n".encode()
        out += block(np.tile([255, 128, 0], len(lists)), "u1") + b"\n"
    return out


def xml(
    form: str = "ascii",
    compressor: str = "",
    kind: str = "PolyData",
    header: str = "UInt32",
    order: str = "LittleEndian",
    encoding: str = "raw",
    scalars: str = "RGB",
) -> bytes:
    "A .vtp or .vtu file of the box."
    sign, width = ("<" if order == "LittleEndian" else ">"), {"UInt32": "u4", "UInt64": "u8"}[header]
    appendix = b""

    def number(*values: int) -> bytes:
        return np.array(values, sign + width).tobytes()

    def array(values, dtype: str, type_name: str, name: str, components: int = 1) -> str:
        nonlocal appendix
        values = np.asarray(values).ravel()
        head = (
            f'<DataArray type="{type_name}" Name="{name}" NumberOfComponents="{components}" format="{form}"'
        )
        if form == "ascii":
            return f"{head}>{' '.join(f'{v:g}' for v in values)}</DataArray>"
        raw = values.astype(sign + dtype).tobytes()
        sizes, content = number(len(raw)), raw
        if compressor:
            pack = {
                "vtkZLibDataCompressor": zlib.compress,
                "vtkLZMADataCompressor": lzma.compress,
            }.get(compressor, bytes)
            blocks = [pack(raw[i : i + 64]) for i in range(0, len(raw), 64)]
            sizes, content = number(len(blocks), 64, len(raw) % 64, *map(len, blocks)), b"".join(blocks)
        if form == "binary" or encoding == "base64":
            stored = (
                base64.b64encode(sizes) + base64.b64encode(content)
                if compressor
                else base64.b64encode(sizes + content)
            )
        else:
            stored = sizes + content
        if form == "binary":
            return f"{head}>{stored.decode()}</DataArray>"
        offset, appendix = len(appendix), appendix + stored
        return f'{head} offset="{offset}"/>'

    points = array(BOX, "f4", "Float32", "Points", 3)
    lists = SQUARES if kind == "PolyData" else [[0, 4, 6, 2, 1, 5, 7, 3]]
    cells = array([v for row in lists for v in row], "i8", "Int64", "connectivity") + array(
        np.cumsum([*map(len, lists)]), "i8", "Int64", "offsets"
    )
    tag = "Polys"
    if kind == "UnstructuredGrid":
        tag, cells = "Cells", cells + array([12], "u1", "UInt8", "types")
    colors = array(np.tile([255, 128, 0], 8), "u1", "UInt8", scalars, 3) + array(
        np.arange(8), "f4", "Float32", "heat"
    )
    attributes = f'type="{kind}" version="1.0" byte_order="{order}" header_type="{header}"' + (
        f' compressor="{compressor}"' if compressor else ""
    )
    body = f'<?xml version="1.0"?>\n<VTKFile {attributes}><{kind}><Piece NumberOfPoints="8" NumberOfPolys="6" NumberOfCells="1"><PointData>{colors}</PointData><Points>{points}</Points><{tag}>{cells}</{tag}></Piece></{kind}>'
    end = (
        f'<AppendedData encoding="{encoding}">\n _'.encode() + appendix + b"\n</AppendedData>"
        if appendix
        else b""
    )
    return body.encode() + end + b"</VTKFile>"


PLACES = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 3], [1, 2, 0]], np.float64)


def las(path, scale: int = 65535, form: int = 2, version: str = "1.2", rgb=(1, 0.5, 0)):
    import laspy

    made = laspy.create(point_format=form, file_version=version)
    made.header.offsets, made.header.scales = [500_000, 5_400_000, 0], [0.001] * 3
    made.x, made.y, made.z = (PLACES + [500_000, 5_400_000, 100]).T
    if "red" in made.point_format.dimension_names:
        made.red, made.green, made.blue = (np.full(4, round(channel * scale)) for channel in rgb)
    made.intensity = np.full(4, 9)
    made.write(path)
    return path


def e57(path, scans: int = 1, colored: bool = True):
    import pye57

    data = {f"cartesian{axis}": PLACES[:, i].copy() for i, axis in enumerate("XYZ")}
    if colored:
        data |= {
            f"color{name}": np.full(4, value, np.uint8)
            for name, value in (("Red", 255), ("Green", 128), ("Blue", 0))
        }
    turn = np.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)])  # a quarter about z
    with pye57.E57(str(path), mode="w") as file:
        for scan in range(scans):
            file.write_scan_raw(data, rotation=turn, translation=np.array([10.0 * scan, 0, 0]))
    return path
