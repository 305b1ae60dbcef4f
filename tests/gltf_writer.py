"""Small glTF files written by code, for the tests of the reader."""

import base64
import io
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

COMPONENTS = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
KINDS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}

# a box of 1 x 2 x 3: 8 corners, 12 triangles
BOX = np.array([[x, y, z] for x in (0, 1) for y in (0, 2) for z in (0, 3)], np.float32)
FACES = np.array(
    [
        [0, 1, 3],
        [0, 3, 2],
        [4, 6, 7],
        [4, 7, 5],
        [0, 4, 5],
        [0, 5, 1],
        [2, 3, 7],
        [2, 7, 6],
        [0, 2, 6],
        [0, 6, 4],
        [1, 5, 7],
        [1, 7, 3],
    ]
)


def picture(
    color,  # of a uniform picture, or an array of pixels
    form: str = "PNG",
    mode: str = "RGB",
    **options,
) -> bytes:
    "A picture file."
    image = Image.fromarray(color) if isinstance(color, np.ndarray) else Image.new(mode, (8, 8), color)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


class Gltf:
    "A document that grows by accessors, images and nodes."

    def __init__(self, **json_parts):
        self.json = {"asset": {"version": "2.0"}, "bufferViews": [], "accessors": []} | json_parts
        self.binary = bytearray()

    def view(self, data: bytes, **extra) -> int:
        "Bytes in the buffer."
        self.binary += b"\0" * (-len(self.binary) % 4)
        entry = {"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)}
        self.binary += data
        return self.entry("bufferViews", entry | extra)

    def accessor(self, array, dtype: str = "f4", **extra) -> int:
        "An array of one row an element."
        array = np.asarray(array)
        array = array.reshape(len(array), -1).astype(f"<{dtype}")
        entry = {"componentType": COMPONENTS[dtype], "count": len(array), "type": KINDS[array.shape[1]]}
        return self.entry("accessors", entry | {"bufferView": self.view(array.tobytes())} | extra)

    def entry(self, kind: str, value: dict) -> int:
        "Append to a list of the document."
        self.json.setdefault(kind, []).append(value)
        return len(self.json[kind]) - 1

    def box(
        self, material: int | None = None, dtype: str = "f4", normalized: bool = False, **attributes
    ) -> dict:
        "A primitive of the box; further attributes are accessor numbers."
        position = self.accessor(BOX, dtype, **({"normalized": True} if normalized else {}))
        primitive = {
            "attributes": {"POSITION": position} | attributes,
            "indices": self.accessor(FACES.ravel(), "u2"),
        }
        return primitive if material is None else primitive | {"material": material}

    def mesh(self, *primitives: dict, **extra) -> int:
        "A mesh of primitives."
        return self.entry("meshes", {"primitives": list(primitives)} | extra)

    def scene(self, *nodes: dict) -> "Gltf":
        "One scene of nodes without children."
        numbers = [self.entry("nodes", node) for node in nodes]
        self.entry("scenes", {"nodes": numbers})
        self.json["scene"] = len(self.json["scenes"]) - 1
        return self

    def textured(
        self, data: bytes | None, texture: dict | None = None, image: dict | None = None, **info
    ) -> int:
        "A material with a base color texture."
        if image is None and data is not None:
            image = {"bufferView": self.view(data), "mimeType": "image/png"}
        if image is not None:
            texture = {"source": self.entry("images", image)} | (texture or {})
        number = self.entry("textures", texture or {})
        return self.entry(
            "materials", {"pbrMetallicRoughness": {"baseColorTexture": {"index": number} | info}}
        )

    def write(self, path: Path, buffer: str | None = None) -> Path:
        "A .glb, or a .gltf with the buffer in a data URI or in the file `buffer` beside it."
        document = dict(self.json)
        if path.suffix == ".gltf":
            uri = "data:application/octet-stream;base64," + base64.b64encode(self.binary).decode()
            if buffer is not None:
                (path.parent / buffer).write_bytes(self.binary)
                uri = buffer
            path.write_text(
                json.dumps(document | {"buffers": [{"byteLength": len(self.binary), "uri": uri}]})
            )
            return path
        text = json.dumps(document | {"buffers": [{"byteLength": len(self.binary)}]}).encode()
        text += b" " * (-len(text) % 4)
        binary = bytes(self.binary) + b"\0" * (-len(self.binary) % 4)
        head = (
            struct.pack("<4sIIII4s", b"glTF", 2, 28 + len(text) + len(binary), len(text), 0, b"JSON")[:16]
            + b"JSON"
        )
        path.write_bytes(head + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary)
        return path
