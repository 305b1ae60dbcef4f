"""Coverage-guided fuzzing (atheris) of the parsers that are part of cg3d.

    pip install atheris && python benchmarks/bytes.py --seconds 60 [lzf pickle npy npz ply pcd off stl xyz ...]

Each parser runs in a separate process and starts from the same valid files as benchmarks/fuzz.py. An input that raises anything but a `Cg3dError` ends the run and is stored."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def parsers(folder: Path) -> dict:
    "Name -> a function of bytes"
    from cg3d.core import safe_pickle as unpickle
    from cg3d.core import untrusted as guard
    from cg3d.io.pcd import lzf_decompress
    from cg3d.io.read import FORMATS, read_mesh

    def of(read, name):
        def parse(data: bytes):
            (folder / name).write_bytes(data)
            return read(folder / name)

        return parse

    def npz(path):
        with guard.open_npz(path) as archive:
            return [archive[name] for name in archive.files]

    return {
        "lzf": lambda data: lzf_decompress(data[2:], int.from_bytes(data[:2], "little")),
        "pickle": unpickle.unpickle,
        "npy": of(unpickle.load_npy, "a.npy"),
        "npz": of(npz, "a.npz"),
    } | {
        suffix[1:]: of(guard.reading("a shape")(read_mesh), f"a{suffix}")
        for each in FORMATS
        for suffix in each.suffixes
        if not each.packages and suffix not in (".npy", ".npz")
    }


def fuzz(name: str, seconds: int, folder: Path) -> None:
    "Run one parser until the time is over or an input fails; does not return"
    import pickle

    import atheris

    with atheris.instrument_imports(
        include=["cg3d.io", "cg3d.core.untrusted", "cg3d.core.safe_pickle", "pickle"]
    ):
        from cg3d.core.errors import Cg3dError

        parse = parsers(folder)[name]
    from fuzz import meshes

    (folder / "seeds").mkdir(), (folder / "corpus").mkdir()
    meshes(folder / "seeds")
    for file in (folder / "seeds").iterdir():
        if name in ("lzf", "pickle") or file.suffix == f".{name}":
            (folder / "corpus" / file.name).write_bytes(
                file.read_bytes()
                if name != "pickle"
                else pickle.dumps([file.read_bytes(), {"a": (1.5, "x")}], 2)
            )

    def once(data: bytes):
        try:
            parse(data)
        except Cg3dError:
            pass

    atheris.Setup(
        [
            sys.argv[0],
            str(folder / "corpus"),
            f"-max_total_time={seconds}",
            "-timeout=5",
            "-rss_limit_mb=3000",
            "-max_len=8192",
            f"-artifact_prefix={Path.cwd()}/{name}-",
            "-print_final_stats=1",
        ],
        once,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    (
        parser.add_argument(
            "names", nargs="*", default=["lzf", "pickle", "npy", "npz", "pcd", "xyz", "ply", "gltf", "glb"]
        ),
        parser.add_argument("--seconds", type=int, default=60),
        parser.add_argument("--here", type=Path, help=argparse.SUPPRESS),
    )
    arguments = parser.parse_args()
    if arguments.here:
        fuzz(arguments.names[0], arguments.seconds, arguments.here)
    bad = 0
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, __file__, name, "--seconds", str(arguments.seconds), "--here", folder],
                capture_output=True,
                text=True,
            )
        facts = {
            key: line.split()[-1]
            for line in done.stderr.splitlines()
            for key in ("number_of_executed_units", "peak_rss_mb")
            if line.startswith(f"stat::{key}")
        }
        covered = next((line for line in reversed(done.stderr.splitlines()) if "cov:" in line), "")
        bad += done.returncode != 0
        print(
            f"{name}: {facts.get('number_of_executed_units', '?')} inputs, {covered.partition('corp:')[0].partition('cov:')[2].split()[:1]} branches, {facts.get('peak_rss_mb', '?')} MB, {'nothing found' if done.returncode == 0 else done.stderr[-3000:]}",
            flush=True,
        )
    sys.exit(bool(bad))
