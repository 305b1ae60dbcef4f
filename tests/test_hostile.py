"""Malicious files: nothing runs, nothing outside of their folder is read, nothing grows without bound.

Also short runs of the fuzzer and of the crash test in `benchmarks/`.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import cg3d
from cg3d.cli.jobs import read_recipe
from cg3d.core.errors import Cg3dError, PathTaken
from cg3d.core.safe_pickle import load_pickle
from cg3d.core.state_dict import read_checkpoint
from cg3d.data.modelnet import h5_arrays
from cg3d.io.shape import read_shape
from cg3d.search.batch_embed import Journal

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/owned",)


def pickle_npy(folder):
    np.save(folder / "a.npy", np.array([Evil(folder.parent)], object), allow_pickle=True)


def pickle_dat(folder):
    (folder / "a.dat").write_bytes(pickle.dumps(Evil(folder.parent)))


def torch_pickle(folder):
    torch.save({"w": Evil(folder.parent)}, folder / "a.pt")


def yaml_object(folder):
    (folder / "a.yaml").write_text(
        f"epochs: !!python/object/apply:os.system ['touch {folder.parent}/owned']\n"
    )


def yaml_laughs(folder):
    (folder / "a.yaml").write_text(
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
        + "epochs: *i\n"
    )


def zip_slip(folder):
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("../../owned", "x")


def zip_bomb(folder):
    with (
        zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("points.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f8", "fortran_order": False, "shape": (200_000_000, 3)}
        )
        for _ in range(4200):
            file.write(bytes(2**20))


def gltf(folder, uri):
    trimesh.creation.box().export(folder / "a.gltf")
    scene = json.loads((folder / "a.gltf").read_text())
    scene["buffers"] = [dict(buffer, uri=uri) for buffer in scene["buffers"]]
    (folder / "a.gltf").write_text(json.dumps(scene))


def gltf_traversal(folder):
    gltf(folder, "../secret.bin")


def gltf_escaped(folder):
    gltf(folder, "%2e%2e/secret.bin")


def gltf_network(folder):
    gltf(folder, "http://127.0.0.1:9/secret.bin")


def gltf_symlink(folder):
    gltf(folder, "link.bin")
    (folder / "link.bin").symlink_to("../secret.bin")


def gltf_loop(folder):
    gltf(folder, "gltf_buffer_0.bin")
    scene = json.loads((folder / "a.gltf").read_text())
    scene["nodes"] = [{"children": [1]}, {"children": [0]}]
    (folder / "a.gltf").write_text(json.dumps(scene))


def texture(folder, name):
    box = trimesh.creation.box()
    (folder / "a.obj").write_text(
        "mtllib a.mtl\nusemtl m\n"
        + "".join("v {} {} {}\n".format(*v) for v in box.vertices)
        + "vt 0 0\n"
        + "".join("f {0}/1 {1}/1 {2}/1\n".format(*(f + 1)) for f in box.faces)
    )
    (folder / "a.mtl").write_text(f"newmtl m\nKd 1 1 1\nmap_Kd {name}\n")


def texture_absolute(folder):
    texture(folder, folder.parent / "secret.png")


def texture_above(folder):
    texture(folder, "../secret.png")


def material_above(folder):
    (folder / "a.obj").write_text("mtllib ../secret.mtl\nusemtl m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")


def list_traversal(folder):
    shutil.copy(folder.parent / "secret.npy", folder / "sound.npy")
    (folder / "list.csv").write_text("file,name\nsound.npy,chair\n../secret.npy,secret\n")


def collada(folder):
    entities = '<!ENTITY a "lol">' + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi")
    )
    (folder / "a.dae").write_text(f"<?xml version='1.0'?><!DOCTYPE x [{entities}]><COLLADA>&i;</COLLADA>")


def h5_external_link(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        file["data"], file["label"] = h5py.ExternalLink("../secret.h5", "data"), np.zeros(3)


def h5_external_data(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("data", (3, 8, 3), "u1", external=[("../secret.bin", 0, 72)])
        file["label"] = np.zeros(3)


def h5_huge(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("data", (10**6, 10**4, 3), "f4", chunks=(1, 100, 3))
        file["label"] = np.zeros(3)


def ply(folder, vertices, faces=0):
    (folder / "a.ply").write_bytes(
        f"ply\nformat binary_little_endian 1.0\nelement vertex {vertices}\nproperty float x\nproperty float y\nproperty float z\nelement face {faces}\nproperty list uchar int vertex_indices\nend_header\n".encode()
        + bytes(120)
    )


def ply_negative(folder):
    ply(folder, -5)


def ply_overflow(folder):
    ply(folder, 2**63)


def ply_large(folder):
    ply(folder, 9_999_999)


def ply_faces(folder):
    ply(folder, 3, 2**31)


def pcd(folder, head, body=b""):
    (folder / "a.pcd").write_bytes(f"VERSION 0.7\nFIELDS x y z\n{head}".encode() + body)


def pcd_count(folder):
    pcd(
        folder,
        "SIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 999999999\nWIDTH 9\nHEIGHT 1\nPOINTS 9\nDATA binary\n",
        bytes(108),
    )


def pcd_lzf(folder):
    pcd(
        folder,
        "SIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 9\nHEIGHT 1\nPOINTS 9\nDATA binary_compressed\n",
        struct.pack("<II", 3000, 2**31) + b"\0a" + b"\xe0\xff\0" * 1000,
    )


def glb_accessor(folder):
    scene = json.dumps(
        {
            "asset": {"version": "2.0"},
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
            "accessors": [{"componentType": 5126, "count": 10**12, "type": "VEC3"}],
        }
    ).encode()
    (folder / "a.glb").write_bytes(
        struct.pack("<4sIIII", b"glTF", 2, 20 + len(scene), len(scene), 0x4E4F534A) + scene
    )


def deep_json(folder):
    (folder / "a.gltf").write_text("[" * 10**6)


HOSTILE = (
    {
        pickle_npy: lambda folder: read_shape(folder / "a.npy"),
        pickle_dat: lambda folder: load_pickle(folder / "a.dat"),
        torch_pickle: lambda folder: read_checkpoint(folder / "a.pt"),
        yaml_object: lambda folder: read_recipe(str(folder / "a.yaml")),
        yaml_laughs: lambda folder: cg3d.training.config.TrainConfig(
            epochs=read_recipe(str(folder / "a.yaml"))["epochs"]
        ),
        zip_slip: lambda folder: read_shape(folder / "a.npz"),
        zip_bomb: lambda folder: read_shape(folder / "a.npz"),
        list_traversal: lambda folder: list(cg3d.read_dataset(folder)),
        collada: lambda folder: read_shape(folder / "a.dae"),
        h5_external_link: lambda folder: h5_arrays(folder / "a.h5"),
        h5_external_data: lambda folder: h5_arrays(folder / "a.h5"),
        h5_huge: lambda folder: h5_arrays(folder / "a.h5"),
    }
    | {
        write: lambda folder: read_shape(folder / "a.gltf")
        for write in (gltf_traversal, gltf_escaped, gltf_network, gltf_symlink, gltf_loop, deep_json)
    }
    | {
        write: lambda folder: read_shape(folder / "a.ply")
        for write in (ply_negative, ply_overflow, ply_large, ply_faces)
    }
    | {write: lambda folder: read_shape(folder / "a.pcd") for write in (pcd_count, pcd_lzf)}
    | {glb_accessor: lambda folder: read_shape(folder / "a.glb")}
)


class Watch:
    """Names of what the interpreter opens, connects to or starts inside the block.

    One audit hook for the whole session, because hooks cannot be removed.
    """

    EVENTS = ("open", "socket.connect", "os.system", "subprocess.Popen")

    def __init__(self):
        self.names = None
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.names is not None and event in self.EVENTS:
            self.names.append(f"{event} {arguments[:2]}")

    def __enter__(self):
        self.names = []
        return self.names

    def __exit__(self, *error):
        self.names = None


@pytest.fixture(scope="session")
def watch():
    return Watch()


def test_the_watch_sees_what_a_reader_does(watch, tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"1")
    with watch as seen:
        (tmp_path / "secret.bin").read_bytes()
        os.system("true")
    (tmp_path / "secret.bin").read_bytes()
    assert len(seen) == 2 and "secret.bin" in seen[0] and "os.system" in seen[1]


@pytest.mark.parametrize("write", HOSTILE, ids=lambda write: write.__name__)
def test_hostile_file_is_refused(tmp_path, write, watch):
    (tmp_path / "files").mkdir()
    np.save(tmp_path / "secret.npy", np.random.rand(64, 3))
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    (tmp_path / "secret.mtl").write_text("newmtl m\nKd 1 0 0\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["data"] = np.zeros((3, 8, 3))
    write(tmp_path / "files")
    start = time.process_time()
    with watch as seen, pytest.raises(Cg3dError) as refused:
        HOSTILE[write](tmp_path / "files")
    assert time.process_time() - start < 5 and len(str(refused.value)) < 2000
    forbidden = ("secret", "socket.connect", "os.system", "subprocess.Popen")
    parser = (
        "from cg3d.io.limited import"  # our own child process, in which a foreign parser runs with limits
    )
    assert not [name for name in seen if any(word in name for word in forbidden) and parser not in name]
    assert not (tmp_path / "owned").exists() and not (tmp_path.parent / "owned").exists()


@pytest.mark.parametrize(
    "write", [texture_absolute, texture_above, material_above], ids=lambda write: write.__name__
)
def test_what_a_mesh_names_outside_of_its_folder_is_not_opened(tmp_path, write):
    "The shape itself is read; its color is unknown, and a warning says why."
    (tmp_path / "files").mkdir()
    (tmp_path / "secret.mtl").write_text("newmtl m\nKd 1 0 0\n")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "secret.png")
    write(tmp_path / "files")
    opened = []
    sys.addaudithook(
        lambda event, given: opened.append(str(given[0])) if event == "open" and opened is not None else None
    )
    with pytest.warns(UserWarning, match="outside"):
        shape = read_shape(tmp_path / "files" / "a.obj")
    seen, opened = list(opened), None
    assert shape.colors is None and not [name for name in seen if "secret" in name]


def test_a_texture_beside_the_mesh_is_read(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    texture(tmp_path, "red.png")
    assert read_shape(tmp_path / "a.obj").colors[:, 0].min() == 1


def test_a_second_embedding_into_one_output_is_refused(tmp_path):
    first = Journal.open(tmp_path / "a.npz", {"model": "m"})
    with pytest.raises(PathTaken, match="another job"):
        Journal.open(tmp_path / "a.npz", {"model": "m"})
    first.add(["k"], np.ones((1, 4)))
    first.release()
    shard = next((tmp_path / "a.npz.part").glob("0*.npz"))
    again = Journal.open(tmp_path / "a.npz", {"model": "m"})
    assert list(again.vectors) == ["k"]
    again.release()
    shard.write_bytes(shard.read_bytes()[:-40])  # a disk that lost its last write
    assert not Journal.open(tmp_path / "a.npz", {"model": "m"}).vectors and not shard.exists()


def test_a_short_fuzz():
    from fuzz import fuzz

    counts, wrong = fuzz(300, seed=int(os.environ.get("CG3D_FUZZ_SEED", 1)))
    assert (
        not wrong
        and counts["read"] + counts["refused"] == 300
        and min(counts["read"], counts["refused"]) > 30
    ), wrong[:5]


def test_a_few_kills():
    found = subprocess.run(
        [
            sys.executable,
            Path(__file__).parents[1] / "benchmarks" / "crash.py",
            "--kills",
            "3",
            "--writes",
            "3",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (
        "3 of 3 killed runs have a bit-identical result" in found.stdout
        and "3 of 3 killed writers" in found.stdout
    ), found.stdout + found.stderr
