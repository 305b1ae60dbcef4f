"""Reading of shape files compared with trimesh, on the same files in one run: seconds and additional memory.

    python benchmarks/read_files.py [--quick] [--out rows.json]

One thread; processor time, which other programs do not affect. Both sides read a file of the disk's
cache into arrays of faces in world coordinates; ours decodes textures, too, which trimesh does only when they are used.
Memory is the additional peak memory of a separate process (Linux)."""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import trimesh
from harness import Row, report, row
from PIL import Image

from cg3d.core.errors import Cg3dError
from cg3d.core.timing import compare
from cg3d.io.read import read_mesh

PART = "read_files"
TARGET = 1 / 1.5  # at most 1.5 times the time of trimesh


def grid(faces: int) -> trimesh.Trimesh:
    "A wavy surface of about so many triangles, with texture coordinates"
    side = int(np.sqrt(faces / 2)) + 1
    u, v = np.meshgrid(np.arange(side), np.arange(side))
    vertices = np.stack([u, v, 5 * np.sin(u / 9) * np.cos(v / 7)], -1).reshape(-1, 3)
    index = np.arange(side * side).reshape(side, side)
    a, b, c, d = (part.ravel() for part in (index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]))
    corners = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    mesh = trimesh.Trimesh(vertices, corners, process=False)
    mesh.visual = trimesh.visual.TextureVisuals(uv=vertices[:, :2] / side)
    return mesh


def write_obj(path: Path, mesh: trimesh.Trimesh, full: bool) -> Path:
    "Lines of v and f, or of v, vt, vn and f with all three"
    rows = mesh.faces + 1
    with open(path, "w") as file:
        np.savetxt(file, mesh.vertices, "v %.6f %.6f %.6f")
        if full:
            np.savetxt(file, mesh.visual.uv, "vt %.6f %.6f")
            np.savetxt(file, np.tile([0, 0, 1.0], (len(mesh.vertices), 1)), "vn %.4f %.4f %.4f")
            np.savetxt(file, np.repeat(rows, 3, axis=1), "f %d/%d/%d %d/%d/%d %d/%d/%d")
        else:
            np.savetxt(file, rows, "f %d %d %d")
    return path


def textured(faces: int, pixels: int) -> trimesh.Trimesh:
    "A surface with a picture of noise"
    mesh = grid(faces)
    noise = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), np.uint8)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(noise))
    mesh.visual = trimesh.visual.TextureVisuals(uv=mesh.visual.uv, material=material)
    return mesh


def parts(count: int) -> trimesh.Scene:
    "Many small meshes, each below a node of its own"
    scene = trimesh.Scene()
    for i in range(count):
        place = trimesh.transformations.translation_matrix([2 * i, 0, 0])
        scene.add_geometry(trimesh.creation.box((1, 2, 3)), transform=place)
    return scene


def files(folder: Path, quick: bool) -> dict[str, Path]:
    "What is read, by what it is"
    million = 10_000 if quick else 1_000_000
    size = f"{million:,} faces"
    plain = grid(million)
    found = {
        f"OBJ of {size}, v and f": write_obj(folder / "plain.obj", plain, False),
        f"OBJ of {size}, v, vt, vn and f": write_obj(folder / "full.obj", plain, True),
    }
    side = 256 if quick else 2048
    for kind, name in {"PLY": "p.ply", "STL": "s.stl", "OFF": "o.off"}.items():
        found[f"{kind} of {size}"] = folder / name
        plain.export(folder / name)
    few = million // 10
    found[f"PLY of {few:,} faces, text"] = folder / "text.ply"
    grid(few).export(folder / "text.ply", encoding="ascii")
    scenes = {
        f"GLB of {size}": plain,
        f"GLB of {million // 10:,} faces and a texture of {side:,} x {side:,}": textured(million // 10, side),
        f"GLB of {million // 500:,} nodes": parts(million // 500),
    }
    for number, (what, scene) in enumerate(scenes.items()):
        found[what] = folder / f"{number}.glb"
        scene.export(found[what])
    return found


def theirs(path: Path) -> list:
    "Trimesh's way to the same: parts in world coordinates"
    return trimesh.load_scene(path, process=False).dump()


CHILD = """
import resource, sys, time
from pathlib import Path
path, side = Path(sys.argv[1]), sys.argv[2]
from cg3d.core.timing import added_memory
import numpy, trimesh, PIL.Image
from cg3d.io.read import read_mesh as read
if side == "theirs":
    read = lambda path: trimesh.load_scene(path, process=False).dump()
kept = []
start = time.process_time()
added = added_memory(lambda: kept.append(read(path)))
print(added, time.process_time() - start)
"""


def alone(path: Path, side: str) -> tuple[float, float]:  # MiB added, seconds
    "One reading in a process of its own"
    command = [sys.executable, "-c", CHILD, str(path), side]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(words[0]), float(words[1])


def largest(folder: Path, quick: bool) -> list[Row]:
    "The largest GLB that is read without raising a limit"
    faces = 50_000 if quick else 4_990_000
    mesh = grid(faces)
    path = folder / "largest.glb"
    mesh.export(path)
    what = f"GLB of {len(mesh.faces):,} faces ({path.stat().st_size / 2**20:,.0f} MiB)"
    del mesh
    (ours, seconds), (other, other_seconds) = alone(path, "ours"), alone(path, "theirs")
    note = f"trimesh: {other_seconds:.2f} s and {other:,.0f} MiB"
    return [
        Row(PART, what, seconds, "s", note=note),
        Row(PART, f"{what}, memory added at the peak", ours, "MiB", note=note),
    ]


def cloud_ply(path: Path, points: int) -> Path:
    "A binary cloud with 8-bit colors"
    rows = np.zeros(points, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    rows["xyz"] = np.random.default_rng(0).random((points, 3), np.float32)
    rows["rgb"] = np.random.default_rng(1).integers(0, 256, (points, 3), np.uint8)
    names = [f"property float {axis}" for axis in "xyz"] + [
        f"property uchar {c}" for c in ("red", "green", "blue")
    ]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {points}", *names, "end_header", ""]
    path.write_bytes("\n".join(head).encode() + rows.tobytes())
    return path


def mixed_ply(path: Path, faces: int) -> Path:
    "A binary mesh of alternating quads and triangles, which trimesh does not read"
    mesh = grid(faces)
    pairs = mesh.faces.reshape(2, -1, 3)
    quads = np.zeros(len(pairs[0]) // 2, [("n", "u1"), ("v", "<i4", 4)])
    quads["n"], quads["v"] = 4, np.concatenate([pairs[0][: len(quads)], pairs[1][: len(quads), 2:]], 1)
    rest = np.concatenate([pairs[0][len(quads) :], pairs[1][len(quads) :]])
    triangles = np.zeros(len(rest), [("n", "u1"), ("v", "<i4", 3)])
    triangles["n"], triangles["v"] = 3, rest
    names = "\n".join(f"property float {axis}" for axis in "xyz")
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(mesh.vertices)}\n{names}\n"
    head += (
        f"element face {len(quads) + len(triangles)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    body = mesh.vertices.astype("<f4").tobytes() + quads.tobytes() + triangles.tobytes()
    path.write_bytes(head.encode() + body)
    return path


def largest_clouds(folder: Path, quick: bool) -> list[Row]:
    "The largest PLY cloud that is read without raising a limit, and a mesh of mixed polygons"
    points = 100_000 if quick else 10_000_000
    path = cloud_ply(folder / "cloud.ply", points)
    what = f"PLY of {points:,} colored points ({path.stat().st_size / 2**20:,.0f} MiB)"
    (ours, seconds), (other, other_seconds) = alone(path, "ours"), alone(path, "theirs")
    note = f"trimesh: {other_seconds:.2f} s and {other:,.0f} MiB"
    rows = [
        Row(PART, what, seconds, "s", note=note),
        Row(PART, f"{what}, memory added at the peak", ours, "MiB", note=note),
    ]
    path = mixed_ply(folder / "mixed.ply", 10_000 if quick else 1_000_000)
    faces = read_mesh(path).face_count
    added, seconds = alone(path, "ours")
    what = f"PLY of {faces:,} faces, quads and triangles"
    rows.append(
        Row(PART, what, seconds, "s", note=f"adds {added:,.0f} MiB at the peak; trimesh refuses the file")
    )
    return rows


def measure(quick: bool) -> list[Row]:
    "Readers of shape files compared with trimesh."
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, path in files(folder, quick).items():
            if read_mesh(path).face_count != sum(len(part.faces) for part in theirs(path)):
                raise Cg3dError(f"{what}: the two readers differ in faces")
            rounds = 3 if quick else 5
            times = compare(
                partial(read_mesh, path), partial(theirs, path), rounds, 1, clock=time.process_time
            )
            (ours, _), (other, _) = alone(path, "ours"), alone(path, "theirs")
            note = f"adds {ours:,.0f} MiB at the peak, trimesh {other:,.0f} MiB"
            rows.append(row(PART, what, times, "trimesh", TARGET, unit="ms", note=note))
        rows += largest(folder, quick) + largest_clouds(folder, quick)
    return rows


if __name__ == "__main__":
    report(measure)
