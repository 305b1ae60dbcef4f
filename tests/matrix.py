"""The core with several versions of torch, each in an environment of its own: `make matrix`.

    python tests/matrix.py [--torch 2.6.0 newest FILE.whl ...] [--folder DIR] [--keep]

Each environment gets a torch, the packages that `settings.ini` requires, and pytest; none gets PyTorch3D. open_clip is
installed without what it requires itself, so that torchvision and timm are absent: `nano` reads only its table of
words. Then `tests/core_checks.py` runs (imports, views, zero-shot classification, training in three schedules), and
tests of encoders, losses, point operations and views. A table in Markdown is printed. It is no part of `make test`,
because every torch for Linux on PyPI brings gigabytes of CUDA libraries; a wheel built without them may be given by
its path. Environments are deleted afterwards, unless --keep."""

import argparse
import configparser
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = ("2.6.0", "newest")
TESTS = (
    "tests/test_encoders.py",
    "tests/test_losses_metrics.py",
    "tests/test_points.py",
    "tests/test_render_plain.py",
    "tests/test_render_triplets.py",
)
HEADER = ("torch", "CUDA build", "absent", "modules", "losses (frozen, joint, alternate)", "tests", "result")


def requirements() -> list[str]:
    "What the core needs, without torch and open_clip."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    needed = config["DEFAULT"]["requirements"].split()
    return [need for need in needed if not need.startswith(("torch>", "open_clip", "timm"))]


def install(
    folder: Path,
    torch: str,  # a version, "newest", or the path of a wheel
) -> Path:  # the interpreter
    "An environment with the core. Raises CalledProcessError where something cannot be installed."
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    python = folder / "bin" / "python"
    if not python.exists():
        version = ".".join(map(str, sys.version_info[:2]))
        subprocess.run([uv, "venv", "--quiet", "--python", version, folder], check=True)
    wanted = {"newest": "torch"}.get(torch, torch if torch.endswith(".whl") else f"torch=={torch}")
    pip = [uv, "pip", "install", "--quiet", "--python", python]
    subprocess.run([*pip, wanted, *requirements(), "pytest", "hypothesis"], check=True)
    subprocess.run([*pip, "--no-deps", "open_clip_torch>=3.3,<4"], check=True)
    return python


def call(python: Path, *words: str, log: Path) -> tuple[int, str]:
    "Exit status and last line of the output."
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CG3D_CACHE": str(log.parent / "cache"),
    }
    done = subprocess.run([python, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    log.write_text(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return done.returncode, lines[-1]


def check(torch: str, folder: Path) -> tuple[str, ...]:
    "A row of the table."
    try:
        python = install(folder, torch)
    except subprocess.CalledProcessError as error:
        return (torch, *["-"] * (len(HEADER) - 2), f"not installed: {error}")
    status, line = call(python, "tests/core_checks.py", log=folder / "core.log")
    if status:
        return (torch, *["-"] * (len(HEADER) - 2), f"failed, {folder / 'core.log'}: {line}")
    facts = json.loads(line)
    # Fake CUDA tensors ask the CUDA runtime in torch 2.6, and a build for CUDA then fails without a driver.
    status, tests = call(python, "-m", "pytest", "-q", "-k", "not fake", *TESTS, log=folder / "tests.log")
    return (
        facts["torch"],
        facts["cuda build"] or "none",
        ", ".join(facts["absent"]),
        str(facts["modules"]),
        ", ".join(map(str, facts["losses"])),
        tests.strip(" ="),
        "passed" if status == 0 else f"failed, {folder / 'tests.log'}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=TORCH, help="versions, 'newest', or wheels")
    parser.add_argument("--folder", type=Path, help="of the environments; a temporary one if left out")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="cg3d-matrix-"))
    rows = []
    for torch in options.torch:
        place = folder / Path(torch).name.removesuffix(".whl")
        rows.append(check(torch, place))
        if not options.keep and rows[-1][-1] == "passed":
            shutil.rmtree(place)
    for row in (HEADER, ["---"] * len(HEADER), *rows):
        print("| " + " | ".join(row) + " |")
    sys.exit(any(row[-1] != "passed" for row in rows))


if __name__ == "__main__":
    main()
