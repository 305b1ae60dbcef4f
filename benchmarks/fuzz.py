"""Pass mutated files of every kind through every reader: each must be read or raise a `Cg3dError`.

    python benchmarks/fuzz.py --count 5000 [--seed 0] [--keep FOLDER]

The seeds are small valid files, written here. A mutation flips, cuts, repeats or replaces bytes, writes huge and negative numbers over those that are there,
or joins two files. Each input is read in a separate process with limits of 5 seconds of processor time, 180 seconds of wall time (a busy machine must not look like a hang) and 1 GiB of additional memory. Failing inputs are printed, and stored with --keep."""

import argparse
import gzip
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import trimesh
from PIL import Image
from safetensors.torch import save_file

import cg3d
from cg3d.cli.info import describe
from cg3d.cli.jobs import read_recipe
from cg3d.core.atomic import file_hash, write_folder
from cg3d.core.errors import Cg3dError
from cg3d.core.paths import data_dir
from cg3d.core.safe_pickle import load_npy, load_pickle
from cg3d.core.state_dict import read_checkpoint
from cg3d.core.untrusted import limits
from cg3d.data.view_files import read_image
from cg3d.io.collection import read_collection, write_collection
from cg3d.io.scene import read_scene
from cg3d.io.shape import read_shape
from cg3d.search.embeddings import Embeddings, read_embeddings, write_embeddings
from cg3d.search.index import ShapeIndex
from cg3d.training.callbacks import Checkpoint as RunCheckpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cloud_writer as cloud
import foreign_writer as foreign
import miniatures
from gltf_writer import BOX, FACES, Gltf, picture

SECONDS, WAIT, GIB = 5, 180, 2**30


@dataclass
class Seed:
    "A sound folder, the file in it that is mutated, and how the folder is read."

    name: str
    folder: Path
    file: Path  # below the folder
    read: callable  # folder -> anything


def meshes(folder: Path):
    "Files of one shape."
    box, rng = trimesh.creation.icosphere(1), np.random.default_rng(0)
    for suffix in ("obj", "off", "stl", "glb", "ply"):
        box.export(folder / f"mesh.{suffix}")
    (
        box.export(folder / "ascii.ply", encoding="ascii"),
        box.export(folder / "ascii.stl", file_type="stl_ascii"),
    )
    for name, content in trimesh.Scene(box).export(file_type="gltf").items():
        (folder / ("mesh.gltf" if name == "model.gltf" else name)).write_bytes(content)
    box.visual = trimesh.visual.TextureVisuals(
        uv=rng.random((len(box.vertices), 2)),
        image=Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)),
    )
    box.export(folder / "textured.glb"), box.export(folder / "textured.obj")
    cloud = rng.random((64, 6)).astype(np.float32)
    (
        np.savetxt(folder / "cloud.xyz", cloud, fmt="%.4f"),
        np.save(folder / "cloud.npy", cloud),
        np.savez(folder / "cloud.npz", points=cloud[:, :3], colors=cloud[:, 3:]),
        np.savez_compressed(folder / "packed.npz", points=cloud),
    )
    trimesh.PointCloud(cloud[:, :3], (cloud[:, 3:] * 255).astype(np.uint8)).export(folder / "cloud.ply")
    head = "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F U\nCOUNT 1 1 1 1\nWIDTH 64\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 64\nDATA "
    rows = np.zeros(64, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", "<u4")])
    for i, axis in enumerate("xyz"):
        rows[axis] = cloud[:, i]
    columns = b"".join(np.ascontiguousarray(rows[name]).tobytes() for name in rows.dtype.names)
    literal = b"".join(
        bytes([len(part) - 1]) + part for part in (columns[i : i + 32] for i in range(0, len(columns), 32))
    )
    (folder / "ascii.pcd").write_text(
        head + "ascii\n" + "\n".join(f"{x:.4f} {y:.4f} {z:.4f} 255" for x, y, z in cloud[:, :3])
    )
    (folder / "binary.pcd").write_bytes((head + "binary\n").encode() + rows.tobytes())
    (folder / "packed.pcd").write_bytes(
        (head + "binary_compressed\n").encode()
        + np.array([len(literal), len(columns)], "<u4").tobytes()
        + literal
    )


def models(folder: Path):
    "glTF files with everything that the reader follows, and an OBJ of all kinds of lines."
    import DracoPy
    import meshopt

    gltf = Gltf()
    joints = {"JOINTS_0": gltf.accessor(np.tile([0, 1, 0, 0], (8, 1)), "u1")}
    box = gltf.box(WEIGHTS_0=gltf.accessor(np.tile([0.5, 0.5, 0, 0], (8, 1))), **joints)
    inverse = gltf.accessor(np.tile(np.eye(4).ravel(), (2, 1)))
    gltf.json["skins"] = [{"joints": [1, 2], "inverseBindMatrices": inverse}]
    places = {"TRANSLATION": gltf.accessor([[0, 0, 0], [9, 0, 0]])}
    instances = {"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": places}}}
    gltf.scene({"mesh": gltf.mesh(box), "skin": 0}, {"translation": [0, 1, 0]}, {}, instances)
    gltf.write(folder / "skin.glb"), gltf.write(folder / "skin.gltf", "skin.bin")
    gltf = Gltf()
    transform = {"KHR_texture_transform": {"scale": [0.5, 1], "rotation": 1, "texCoord": 0}}
    material = gltf.textured(picture((200, 90, 30)), extensions=transform)
    uv, colors = (
        gltf.accessor(np.full((8, 2), 0.5)),
        gltf.accessor(np.full((8, 4), 99), "u1", normalized=True),
    )
    places = {"bufferView": gltf.view(np.uint16([1, 5]).tobytes()), "componentType": 5123}
    sparse = {"count": 2, "indices": places, "values": {"bufferView": gltf.view(BOX[:2].tobytes())}}
    target = {"POSITION": gltf.accessor(BOX, sparse=sparse)}
    primitive = gltf.box(material, TEXCOORD_0=uv, COLOR_0=colors) | {"targets": [target]}
    gltf.scene({"mesh": gltf.mesh(primitive, weights=[0.5]), "rotation": [0, 0, 1, 1]}).write(
        folder / "morph.glb"
    )
    gltf.write(folder / "morph.gltf")
    gltf.json["materials"][material]["alphaMode"] = "BLEND"
    gltf.write(folder / "alpha.gltf")
    gltf = Gltf(extensionsRequired=["KHR_draco_mesh_compression", "EXT_meshopt_compression"])
    packed = {"bufferView": gltf.view(DracoPy.encode(BOX, FACES)), "attributes": {"POSITION": 0}}
    first = gltf.box() | {"extensions": {"KHR_draco_mesh_compression": packed}}
    entry = gltf.json["bufferViews"][gltf.view(meshopt.encode_gltf_buffer(BOX, "ATTRIBUTES"))]
    entry["extensions"] = {
        "EXT_meshopt_compression": entry | {"byteStride": 12, "count": 8, "mode": "ATTRIBUTES"}
    }
    second = gltf.box()
    view = {
        "bufferView": len(gltf.json["bufferViews"]) - 3,
        "componentType": 5126,
        "count": 8,
        "type": "VEC3",
    }
    second["attributes"]["POSITION"] = gltf.entry("accessors", view)
    gltf.scene({"mesh": gltf.mesh(first, second)}).write(folder / "packed.glb")
    (folder / "rich.mtl").write_text("newmtl a b\nKd 1 0.5 0\nmap_Kd -s 2 2 1 rich.png\nnewmtl c\nKd 0 0 1\n")
    (folder / "rich.png").write_bytes(picture((200, 90, 30)))
    rows = "".join("v {:g} {:g} {:g} 1 0.5 0\n".format(*row) for row in BOX)
    faces = "f 1/1 2/1 4/1 3/1 # a face\nf -8//1 -7//1 -6//1\nusemtl c\nf 5 7 \\\n 8 6\nf 1/1/1 3/1/1 7/1/1 5/1/1 2/1/1\n"
    (folder / "rich.obj").write_text(
        f"mtllib rich.mtl\n#MRGB ff00ff00\nusemtl a b\n{rows}vt 0 1\nvn 0 0 1\n{faces}"
    )


GROUP = '<m:colorgroup id="6"><m:color color="#FF8000"/><m:color color="#0000FF80"/></m:colorgroup>'  # of 3MF


def clouds(folder: Path):
    "Files of the formats that this project parses itself, with everything that the readers follow."
    faces = [[list(face), [0.5] * 2 * len(face), i % 2] for i, face in enumerate(cloud.MIXED)]
    lists = "list uchar int vertex_indices, list uchar float texcoord, int texnumber"
    colored = {"vertex": (f"{cloud.XYZ}, uchar red, uchar green, uchar blue", cloud.vertices(255, 128, 0))}
    texture = "comment TextureFile rich.png\ncomment TextureFile gone.png"
    (folder / "rich.png").write_bytes(picture((200, 90, 30)))
    strips = {"tristrips": ("list int int vertex_indices", [[[0, 1, 2, -1, 1, 3, 2]]])}
    splat = {"vertex": (cloud.SPLAT, cloud.splat_rows((1, 0, 0), 2.0))}
    ends = ", ".join(f"float {end}_{axis}" for end in ("min", "max") for axis in "xyz")
    packed = {"chunk": (ends, [[0, 0, 0, 1, 2, 3]])}
    names = "uint packed_position, uint packed_rotation, uint packed_scale, uint packed_color"
    packed["vertex"] = (names, [[0, 0, 0, 2**32 - 1], [2**32 - 1, 0, 0, 2**32 - 1]])
    gray = np.full((30, 3), 65535).T
    types, sizes = "F F F U U U", "4 4 4 2 2 2"
    columns = [*cloud.CLOUD.T, *gray]
    files = {
        "rich.ply": cloud.ply(colored | {"face": (lists, faces)}, "binary_big_endian", texture),
        "rich_ascii.ply": cloud.ply(colored | {"face": (lists, faces)}, extra=texture),
        "strips.ply": cloud.ply(colored | strips, "binary_little_endian"),
        "splat.ply": cloud.ply(splat, "binary_little_endian"),
        "packed.ply": cloud.ply(packed, "binary_little_endian"),
        "colored.off": cloud.off("COFF", " 255 128 0 255", cloud.MIXED).encode(),
        "painted.off": cloud.off(face_more=" 1.0 0.5 0.0").encode(),
        "colored.stl": cloud.stl(b"COLOR=\xff\x80\x00\xff", 31 | 16 << 5),
        "text.stl": cloud.stl_text().encode(),
        "fields.pcd": cloud.pcd("X Y Z Red Green Blue", types, sizes, columns, "binary_compressed"),
        "fields_ascii.pcd": cloud.pcd("X Y Z Red Green Blue", types, sizes, columns),
        "leica.pts": ("30\n" + cloud.rows("-7", *cloud.ORANGE_8)).encode(),
        "leica.ptx": cloud.ptx().encode(),
        "named.csv": ("x,y,z,label,r,g,b\n" + cloud.rows("t", *cloud.ORANGE_8, separator=",")).encode(),
        "decimal.txt": cloud.rows(*cloud.ORANGE_8, separator=";").replace(".", ",").encode(),
        "intensity.xyz": cloud.rows("100", *cloud.ORANGE_8).encode(),
        "packed.spz": gzip.compress(
            struct.pack("<4sIIBBBB", b"NGSP", 2, 8, 0, 12, 0, 0) + bytes(range(72)) + b"\xff" * 40
        ),
        "splats.splat": (b"\0\0\x80\x3f" * 6 + b"\xff" * 8 + bytes(24) + b"\xff" * 8),
        "group.3mf": foreign.three_mf(GROUP, "", lambda index: f'pid="6" p1="{index % 2}"'),
        "text.vtk": foreign.legacy(data="point"),
        "binary.vtk": foreign.legacy("BINARY", "hexahedron", "cell"),
        "offsets.vtk": foreign.legacy("BINARY", "offsets"),
        "packed.vtp": foreign.xml("appended", "vtkZLibDataCompressor"),
        "base64.vtu": foreign.xml("binary", kind="UnstructuredGrid"),
        "text.vtp": foreign.xml(),
        "words.vtk": foreign.legacy("BINARY", data="point").replace(
            b"DATASET", b"FIELD FieldData 1\nname 1 2 string\n\xc3box\xc4mine\nDATASET"
        ),
    }
    paint = f"{cloud.XYZ}, uchar red, uchar green, uchar blue, uchar alpha"
    seen = [[*row, 255, 128, 0, 255 * (i % 2)] for i, row in enumerate(BOX)]
    files["alpha.ply"] = cloud.ply({"vertex": (paint, seen), "face": cloud.FACE}, "binary_little_endian")
    records = np.zeros(30, [("xyz", "<f4", 3), ("rgb", "<u4")])
    records["xyz"], records["rgb"] = cloud.CLOUD, cloud.PACKED
    np.save(folder / "records.npy", records)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def foreigners(folder: Path):
    "Files that libraries of others parse."
    foreign.las(folder / "a.las"), foreign.las(folder / "a.laz"), foreign.e57(folder / "a.e57")
    body = (
        foreign.usd_box(more="rel material:binding = </paint>", schemas="MaterialBindingAPI")
        + foreign.usd_material()
    )
    (folder / "a.usdz").write_bytes(foreign.usdz(folder, body))
    (folder / "part").unlink(), (folder / "package.usdz").unlink()
    import laspy

    keyed = laspy.read(folder / "a.las")
    keys = np.array([[1, 1, 0, 2], [1024, 0, 1, 1], [3072, 0, 1, 32633]], "<u2").tobytes()
    keyed.vlrs.append(laspy.VLR("LASF_Projection", 34735, "", keys))
    keyed.write(folder / "keys.las")
    files = {
        "a.usda": foreign.usda(body),
        "moved.usda": foreign.usda(foreign.usd_moved_picture("float2 inputs:scale = (3, 1)")),
        "a.step": foreign.step(),
        "a.iges": foreign.iges(),
        "a.dae": foreign.dae(),
        "a.fbx": foreign.Fbx(picture=foreign.HALVES).bytes(),
        "a.3ds": foreign.three_ds(),
        "a.ac": foreign.ac3d(),
        "a.x": foreign.direct_x(),
        "a.amf": foreign.amf(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


SHAPE_SEEDS = (  # folder, what writes it, and who names files that are read with another one
    ("shape", meshes, {".bin": "mesh.gltf", ".mtl": "textured.obj", ".png": "textured.obj"}),
    ("model-file", models, {".bin": "skin.gltf", ".mtl": "rich.obj", ".png": "rich.obj"}),
    ("cloud-file", clouds, {".png": "rich.ply"}),
)


def shape_reader(owner: dict[str, str], file: Path):
    "What reads a folder in which this file is mutated."
    return lambda folder: read_shape(folder / owner.get(file.suffix, file)).cloud(256)


def foreign_reader(file: Path):
    "The same in a child that has less time and memory than usual."

    def read(folder: Path):
        with limits(child_seconds=60, child_megabytes=3000):
            return read_shape(folder / file).cloud(256)

    return read


def walk(folder: Path, layout: str | None = None):
    "Every row of a data set."
    found = cg3d.read_dataset(folder, layout)
    for row in range(min(len(found), 6)):
        if found.table["found"].iat[row] if "found" in found.table else True:
            found[row]


def seeds(place: Path) -> list[Seed]:
    "One sound input of each kind that cg3d reads."
    made, rng = [], np.random.default_rng(1)

    def add(name, write, read, files=None):
        folder = place / name
        folder.mkdir(parents=True)
        write(folder)
        found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        if files is None and name.startswith("data-"):
            found = list(
                {
                    (
                        file.parent.parent.name if len(file.parts) > 3 else "",
                        file.suffix,
                        re.sub(r"[0-9a-f]{2,}", "", file.name),
                    ): file
                    for file in found
                }.values()
            )  # one of each kind
        for file in files or found:
            if (folder / file).stat().st_size:
                made.append(
                    Seed(
                        f"{name}/{file}",
                        folder,
                        Path(file),
                        read(Path(file))
                        if files is None and name in ("shape", "model-file", "cloud-file", "foreign", "scene")
                        else read,
                    )
                )

    for name, writer, owner in SHAPE_SEEDS:
        add(name, writer, partial(shape_reader, owner))
    add("foreign", foreigners, foreign_reader)
    add(
        "picture",
        lambda folder: Image.fromarray(rng.integers(0, 255, (32, 24, 3), np.uint8)).save(folder / "p.png"),
        lambda folder: read_image(folder / "p.png", 16),
    )
    add(
        "photo",
        lambda folder: Image.fromarray(rng.integers(0, 255, (32, 24, 3), np.uint8)).save(folder / "p.jpg"),
        lambda folder: read_image(folder / "p.jpg", 16),
    )

    def scene(folder):
        xyz = rng.random((200, 3)).astype(np.float32)
        np.savez(
            folder / "scene.npz",
            points=xyz,
            colors=xyz,
            instance=np.repeat([0, 1], 100),
            labels=np.array(["chair", "bed"]),
            up="z",
        )
        trimesh.PointCloud(xyz).export(folder / "scene.ply")
        trimesh.creation.box().export(folder / "room.glb")

    add("scene", scene, lambda file: lambda folder: read_scene(folder / file))
    shapes = [cg3d.Shape(rng.random((64, 3)).astype(np.float32), None, name=f"thing {i}") for i in range(4)]
    add(
        "collection",
        lambda folder: write_collection(folder / "set", shapes, n=64),
        lambda folder: read_collection(folder / "set").points(),
    )
    table = pd.DataFrame({"id": list("abcd"), "name": ["w", "x", "y", "z"]})
    vectors = rng.standard_normal((4, 8)).astype(np.float32)
    for suffix in ("npz", "parquet"):
        add(
            f"embeddings-{suffix}",
            lambda folder: write_embeddings(folder / f"e.{suffix}", Embeddings(vectors, table, "m", "f")),
            lambda folder, suffix=suffix: read_embeddings(folder / f"e.{suffix}"),
        )

    def search(folder):
        index = ShapeIndex.load(folder / "index")
        index.verify()
        return index.search(vectors[:1], 2)

    def approximate(folder):  # under hashes that fit, as a stranger can write them
        place = folder / "index"
        manifest = json.loads((place / "manifest.json").read_text())
        entry = manifest["files"]["faiss.index"]
        entry |= {"bytes": (place / entry["file"]).stat().st_size, "sha256": file_hash(place / entry["file"])}
        (place / "manifest.json").write_text(json.dumps(manifest))
        return ShapeIndex.load(place).search(many[:1], 2)

    many, numbered = (
        rng.standard_normal((40, 8)).astype(np.float32),
        pd.DataFrame({"id": [f"{row}" for row in range(40)], "name": "x"}),
    )
    add(
        "faiss",
        lambda folder: ShapeIndex.from_embeddings(many, numbered, "f", kind="hnsw").save(folder / "index"),
        approximate,
    )
    made[:] = [one for one in made if not one.name.startswith("faiss/") or one.file.suffix == ".index"]
    add(
        "index", lambda folder: ShapeIndex.from_embeddings(vectors, table, "f").save(folder / "index"), search
    )

    def run(folder):
        return RunCheckpoint(folder).read_newest(torch.device("cpu"))

    def two(folder):
        for step in (2, 4):
            write_folder(
                folder / "checkpoints" / f"{step:08d}",
                {"state.pt": lambda path: torch.save({"step": step, "w": torch.zeros(9)}, path)},
                {"step": step},
            )

    add("run", two, run)
    state = {"state_dict": {"module.a.weight": torch.randn(4, 4), "b": torch.zeros(3)}, "epoch": 3}
    add(
        "checkpoint-pt",
        lambda folder: torch.save(state, folder / "w.pt"),
        lambda folder: read_checkpoint(folder / "w.pt"),
    )
    add(
        "checkpoint-old",
        lambda folder: torch.save(state, folder / "w.pth", _use_new_zipfile_serialization=False),
        lambda folder: read_checkpoint(folder / "w.pth"),
    )
    add(
        "checkpoint-safe",
        lambda folder: save_file(state["state_dict"], folder / "w.safetensors"),
        lambda folder: read_checkpoint(folder / "w.safetensors"),
    )
    nano = cg3d.load("nano")
    small = data_dir() / "nano-3d"
    add(
        "model",
        lambda folder: shutil.copy(small / "config.json", folder),
        lambda folder: (
            shutil.copy(small / "model.safetensors", folder),
            cg3d.load(folder, backbone=nano.backbone),
        ),
        ["config.json"],
    )
    add(
        "recipe",
        lambda folder: shutil.copy(Path(__file__).parents[1] / "recipes" / "quick.yaml", folder),
        lambda folder: read_recipe(str(folder / "quick.yaml")),
    )
    add(
        "pickle",
        lambda folder: (folder / "p.dat").write_bytes(pickle.dumps([[vectors], [1, 2], {"a": (1, "x")}])),
        lambda folder: load_pickle(folder / "p.dat"),
    )
    add(
        "npy",
        lambda folder: np.save(folder / "o.npy", np.array({"xyz": vectors}, object), allow_pickle=True),
        lambda folder: load_npy(folder / "o.npy"),
    )
    for name, write in (
        ("cg3d", miniatures.cg3d),
        ("ulip", miniatures.ulip),
        ("modelnet_text", miniatures.modelnet_text),
        ("modelnet_h5", miniatures.modelnet_h5),
        ("modelnet_pickle", miniatures.modelnet_pickle),
        ("objaverse", miniatures.objaverse),
        ("uni3d_lvis", miniatures.uni3d_lvis),
        ("ulip_lvis", miniatures.ulip_lvis),
        ("scannet", miniatures.scannet),
        ("folder", miniatures.folder),
    ):
        root = {}

        def dataset(folder, write=write):
            root["at"] = Path(write(folder)).relative_to(folder)

        add(f"data-{name}", dataset, lambda folder, at=root: walk(folder / at["at"]))
    for one in [
        one
        for one in made
        if one.name.startswith(("checkpoint-safe", "embeddings-", "shape/cloud.npz", "shape/mesh.obj"))
    ]:  # and what `cg3d info` says of it
        made.append(
            Seed(
                f"info-{one.name}",
                one.folder,
                one.file,
                lambda folder, file=one.file: describe(folder / file),
            )
        )
    return made


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    "One to four changes."
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(9)
        if kind == 0 and data:  # a bit
            at = rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]  # cut
        elif kind == 2:
            data = data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at + rng.randint(0, 16) :]
        elif kind == 3:
            data = data[:at] + data[at : at + rng.randint(1, 200)] * rng.randint(2, 20) + data[at:]  # repeat
        elif kind == 4:
            data = data[:at] + data[at + rng.randint(1, 64) :]  # drop
        elif kind == 5:  # a number in text
            numbers = list(re.finditer(rb"-?\d+", data[:65536]))
            if numbers:
                found = rng.choice(numbers)
                data = (
                    data[: found.start()]
                    + rng.choice(
                        [
                            b"-1",
                            b"0",
                            b"99999999999",
                            b"4294967295",
                            b"1e400",
                            b"nan",
                            b"2147483648",
                            b"10000000",
                            b"x",
                        ]
                    )
                    + data[found.end() :]
                )
        elif kind == 6:
            data = (
                data[:at]
                + rng.choice(
                    [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x80", b"\x80\x96\x98\0"]
                )
                + data[at + 4 :]
            )  # a number in bytes
        elif kind == 7:
            data = data[:at] + other[rng.randrange(len(other) + 1) :]
        else:
            data = (
                data[:at]
                + rng.choice(
                    [
                        b"../../../../etc/passwd",
                        b"[" * 20_000,
                        b'{"a":' * 5_000,
                        b"\0" * 64,
                        b"file:///etc/passwd",
                        b"\n" * 100,
                        b"&a [*a, *a]",
                    ]
                )
                + data[at:]
            )
    return data


def outcome(seed: Seed, data: bytes) -> tuple[str, str]:  # read, refused, or what is wrong; words
    "Read one input, which stands in the place of the sound file for a while."
    file = seed.folder / seed.file
    sound = file.read_bytes()
    file.write_bytes(data)
    try:
        return in_a_process(seed)
    finally:
        file.write_bytes(sound)


def in_a_process(seed: Seed) -> tuple[str, str]:  # as above
    "Read the folder of a seed in a process of its own."
    out, into = os.pipe()
    process = os.fork()
    if not process:
        os.close(out)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        torch.set_num_threads(1)  # a forked process has no pool of threads
        signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.setitimer(signal.ITIMER_REAL, WAIT)
        signal.signal(signal.SIGPROF, signal.SIG_DFL), signal.setitimer(signal.ITIMER_PROF, SECONDS)
        pages = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 6 * GIB, size + 6 * GIB))
        try:
            seed.read(seed.folder)
            told = ("read", "")
        except Cg3dError as error:
            told = ("refused", str(error)[:300])
        except BaseException as error:
            at = error.__traceback__
            while at.tb_next:
                at = at.tb_next
            told = (
                f"{type(error).__name__}",
                f"{str(error)[:200]} at {at.tb_frame.f_code.co_filename}:{at.tb_lineno}",
            )
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages
        if grown > GIB:
            told = ("memory", f"{grown / GIB:.1f} GiB; {told}")
        os.write(into, json.dumps(told).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as file:
        told = file.read()
    status = os.waitpid(process, 0)[1]
    if told:
        return tuple(json.loads(told))
    slow = {
        signal.SIGPROF: f"computes for more than {SECONDS} s",
        signal.SIGALRM: f"waits for more than {WAIT} s",
    }
    return (
        ("hang", slow[os.WTERMSIG(status)])
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in slow
        else ("crash", f"status {status}")
    )


def fuzz(
    count: int,
    seed: int = 0,
    keep: Path | None = None,
    only: str = "",  # seeds whose names begin so
) -> tuple[Counter, list[tuple[str, str, str]]]:
    "How many were read and refused, and what went wrong: seed, kind, words."
    rng, wrong, counts, spent = random.Random(seed), [], Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        made = [one for one in seeds(Path(folder)) if one.name.startswith(only)]
        for one in made:
            kind, words = outcome(one, (one.folder / one.file).read_bytes())
            if kind != "read":
                wrong.append((one.name, f"sound, {kind}", words))
        for turn in range(count):
            one, other = made[turn % len(made)], rng.choice(made)
            data = mutate((one.folder / one.file).read_bytes(), (other.folder / other.file).read_bytes(), rng)
            begin = time.monotonic()
            if turn and turn % 500 == 0:
                print(
                    f"{turn:,} of {count:,}: {dict(counts)}, {len(wrong)} findings",
                    file=sys.stderr,
                    flush=True,
                )
            kind, words = outcome(one, data)
            counts[kind] += 1
            spent[one.name] = spent.get(one.name, 0) + time.monotonic() - begin
            if kind in ("read", "refused"):
                continue
            wrong.append((one.name, kind, words))
            if keep:
                (
                    keep.mkdir(parents=True, exist_ok=True),
                    (keep / f"{len(wrong):03d}-{one.name.replace('/', '-')}").write_bytes(data),
                )
    print(
        "slowest kinds, seconds:",
        {name: round(spent[name], 1) for name in sorted(spent, key=spent.get)[-8:]},
        len(made),
        "seeds",
    )
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    (
        parser.add_argument("--count", type=int, default=5000),
        parser.add_argument("--seed", type=int, default=0),
        parser.add_argument("--keep", type=Path),
        parser.add_argument(
            "--only", default="", help="seeds whose names begin so: shape, cloud-file, foreign, ..."
        ),
    )
    asked, start = parser.parse_args(), time.monotonic()
    torch.set_num_threads(1)
    counts, wrong = fuzz(asked.count, asked.seed, asked.keep, asked.only)
    for name, kind, words in wrong:
        print(f"{name}: {kind}: {words}")
    print(f"{sum(counts.values()):,} inputs in {time.monotonic() - start:.0f} s: {dict(counts)}")
    sys.exit(bool(wrong))
