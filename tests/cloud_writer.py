"""Small clouds and meshes in text and bytes, written by code: a box or 30 points of 1 x 2 x 3, mostly orange."""

import struct

import numpy as np
from gltf_writer import BOX, FACES, picture

from cg3d.io.splat import SH_DEGREE_0

ORANGE = [1, 0.5, 0]

CLOUD = np.random.default_rng(0).random((30, 3)) * [1, 2, 3]
CLOUD[:2] = [0, 0, 0], [1, 2, 3]

QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]

MIXED = [*QUADS[:5], (1, 5, 7), (1, 7, 3)]


def pixels(*rows: list[tuple]) -> bytes:
    "A PNG of these rows."
    return picture(np.array(rows, np.uint8))


TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
}


def ply(
    elements: dict[str, tuple[str, list]], form: str = "ascii", extra: str = "", newline: str = "\n"
) -> bytes:
    "Elements: name -> (properties such as 'float x, list uchar int vertex_indices', rows of numbers and lists)."
    order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[form]
    head, body = ["ply", f"format {form} 1.0"] + ([extra] if extra else []), []
    for name, (properties, rows) in elements.items():
        declared = [each.strip() for each in properties.split(",")]
        head += [f"element {name} {len(rows)}", *(f"property {each}" for each in declared)]
        for row in rows:
            for words, value in zip((each.split() for each in declared), row):
                if words[0] == "list":
                    parts = [(TYPES[words[1]], [len(value)]), (TYPES[words[2]], value)]
                else:
                    parts = [(TYPES[words[0]], [value])]
                for kind, values in parts:
                    body.append(
                        " ".join(f"{v:g}" for v in values).encode() + b" "
                        if not order
                        else np.array(values, order + kind).tobytes()
                    )
            if not order:
                body.append(newline.encode())
    return (newline.join([*head, "end_header"]) + newline).encode() + b"".join(body)


def vertices(*more: float) -> list:
    return [[*row, *more] for row in BOX]


XYZ = "float x, float y, float z"

FACE = ("list uchar int vertex_indices", [[list(face)] for face in FACES])


def splat_rows(rgb, opacity: float, n: int = 5) -> list:
    coefficients = (np.array(rgb) - 0.5) / SH_DEGREE_0
    return [[*row, 0, 0, 0, *coefficients, 0.1, opacity, 1, 1, 1, 1, 0, 0, 0] for row in CLOUD[:n]]


SPLAT = f"{XYZ}, float nx, float ny, float nz, float f_dc_0, float f_dc_1, float f_dc_2, float f_rest_0, float opacity, float scale_0, float scale_1, float scale_2, float rot_0, float rot_1, float rot_2, float rot_3"

OFF_BOX = "\n".join("{:g} {:g} {:g}".format(*row) for row in BOX)


def off(head: str = "OFF", vertex_more: str = "", faces=FACES, face_more: str = "", counts: str = "") -> str:
    rows = "\n".join(row + vertex_more for row in OFF_BOX.split("\n"))
    polygons = "\n".join(f"{len(face)} {' '.join(map(str, face))}{face_more}" for face in faces)
    return f"{head}{counts or chr(10)}8 {len(faces)} 0\n{rows}\n{polygons}\n"


def stl(head: bytes = b"", attribute=0, faces=FACES, more: bytes = b"") -> bytes:
    row = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    rows = np.zeros(len(faces), row)
    rows["corners"], rows["attribute"] = BOX[faces], attribute
    return head.ljust(80, b" ") + struct.pack("<I", len(faces)) + rows.tobytes() + more


def stl_text(newline="\n", upper=False, end="endsolid a b") -> str:
    lines = ["solid a facet vertex 1 2 3"]
    for face in BOX[FACES]:
        lines += [
            "facet normal 0 0 1e0",
            " outer loop",
            *(f"  vertex {x:g} {y:e} {z:.3f}" for x, y, z in face),
            " endloop",
            "endfacet",
        ]
    text = newline.join([*lines, end, ""])
    return text.upper() if upper else text


def pcd(
    fields: str,
    types: str,
    sizes: str,
    columns: list[np.ndarray],
    form: str = "ascii",
    newline: str = "\n",
    counts: str = "",
) -> bytes:
    kinds = [f"<{kind.lower()}{size}" for kind, size in zip(types.split(), sizes.split())]
    head = [
        "# .PCD v0.7",
        "VERSION 0.7",
        f"FIELDS {fields}",
        f"SIZE {sizes}",
        f"TYPE {types}",
        f"COUNT {counts or ' '.join('1' for _ in kinds)}",
    ]
    head += [
        f"WIDTH {len(columns[0])}",
        "HEIGHT 1",
        "VIEWPOINT 0 0 0 1 0 0 0",
        f"POINTS {len(columns[0])}",
        f"DATA {form}",
        "",
    ]
    arrays = [np.asarray(column).astype(kind) for column, kind in zip(columns, kinds)]
    if form == "ascii":
        body = "\n".join(
            " ".join(f"{value:.10g}" for column in arrays for value in np.ravel(column[row]))
            for row in range(len(columns[0]))
        ).encode()
    elif form == "binary":
        body = b"".join(column[row].tobytes() for row in range(len(columns[0])) for column in arrays)
    else:
        raw = b"".join(column.tobytes() for column in arrays)
        runs = b"".join(bytes([len(raw[i : i + 32]) - 1]) + raw[i : i + 32] for i in range(0, len(raw), 32))
        body = struct.pack("<II", len(runs), len(raw)) + runs
    return newline.join(head).encode() + body


FULL = np.full(30, 1)

PACKED = np.full(30, 255 << 16 | 128 << 8, np.uint32)


def rows(*more: str, separator: str = " ", form: str = "{:.4f}") -> str:
    return "".join(separator.join([*(form.format(value) for value in row), *more]) + "\n" for row in CLOUD)


ORANGE_8 = ("255", "128", "0")

POSE = "0 0 0\n1 0 0\n0 1 0\n0 0 1\n"

IDENTITY = "1 0 0 0\n0 1 0 0\n0 0 1 0\n"


def ptx(shift: str = "0 0 0 1", more: str = " 0.5 255 128 0", count: str = "6\n5\n") -> str:
    places = ["0 0 0"] + ["{:.4f} {:.4f} {:.4f}".format(*row) for row in CLOUD[:29] + 1]
    return count + POSE + IDENTITY + shift + "\n" + "".join(f"{place}{more}\n" for place in places)
