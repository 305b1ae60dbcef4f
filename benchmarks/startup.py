"""From the start of a process to the first prediction: seconds, processor seconds and memory, each in a new process.

python benchmarks/startup.py [--quick] [--out rows.json]

Compiled modules are kept in a temporary folder, filled by a first run that is not counted, as in an installation by pip.
If PYTHONDONTWRITEBYTECODE is set, Python compiles every module at every start; one row measures this case.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

from harness import Row, report

ANSWER = "import cg3d; from cg3d.io.shape import furniture; model = cg3d.load('nano'{}); model.classify(furniture()[0], ['chair', 'table', 'lamp'])"
OURS = ANSWER.format("")
OPEN_CLIP = (
    "from cg3d.models.clip_backbone import load_backbone; from cg3d.io.shape import data_dir; "
    + ANSWER.format(", backbone=load_backbone(data_dir() / 'nano')")
)
WORK = {
    "import cg3d": ["-c", "import cg3d"],
    "cg3d --help": ["-m", "cg3d.cli", "--help"],
    "import torch": ["-c", "import torch"],
    "first answer": ["-c", OURS],
    "by open_clip": ["-c", OPEN_CLIP],
}


def fresh(words: list[str], **variables: str) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak MiB of a Python process."""
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    } | variables
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return (
        time.perf_counter() - start,
        used.ru_utime + used.ru_stime,
        used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
    )


def line(
    what: str, runs: list[tuple[float, float, float]], limit: float | None = None, note: str = ""
) -> Row:
    """The row of some runs: median wall seconds; the rest is in the note."""
    wall, cpu, memory = map(statistics.median, zip(*runs))
    said = f"wall {min(run[0] for run in runs):.2f}-{max(run[0] for run in runs):.2f} s in {len(runs)} processes, {cpu:.2f} processor seconds, peak {memory:.0f} MiB"
    return Row(
        "startup",
        what,
        wall,
        "s",
        target="" if limit is None else f"<= {limit:g} s",
        met=None if limit is None else wall <= limit,
        note=f"{said}; {note}" if note else said,
    )


def measure(quick: bool) -> list[Row]:
    """Time from the start of a process to a prediction of the bundled model."""
    with tempfile.TemporaryDirectory() as cache:
        for words in WORK.values():
            fresh(words, PYTHONPYCACHEPREFIX=cache)
        rounds = [
            {what: fresh(words, PYTHONPYCACHEPREFIX=cache) for what, words in WORK.items()}
            for _ in range(1 if quick else 7)
        ]  # in turn
    runs = {what: [each[what] for each in rounds] for what in WORK}
    ratios = [theirs[1] / ours[1] for ours, theirs in zip(runs["first answer"], runs["by open_clip"])]
    floor = [ours[1] / torch[1] for ours, torch in zip(runs["first answer"], runs["import torch"])]
    rows = [
        line("`import cg3d`, whole process", runs["import cg3d"], 0.3),
        line("`cg3d --help`, whole process", runs["cg3d --help"]),
        line("`import torch` alone, whole process", runs["import torch"], note="the floor of an answer"),
        line(
            "nano loaded and one shape classified, whole process",
            runs["first answer"],
            3,
            f"{statistics.median(floor):.2f} times the processor seconds of `import torch`",
        ),
        Row(
            "startup",
            "the same, processor seconds",
            statistics.median(run[1] for run in runs["first answer"]),
            "s",
            "the same weights through open_clip and timm",
            statistics.median(ratios),
            min(ratios),
            max(ratios),
            note="same numbers, nbs/models/05_nano_clip.ipynb",
        ),
        Row(
            "startup",
            "the same, peak memory",
            statistics.median(run[2] for run in runs["first answer"]),
            "MiB",
            note=f"`import torch` alone {statistics.median(run[2] for run in runs['import torch']):.0f} MiB",
        ),
    ]
    if not quick:
        rows.append(
            line(
                "the same where no compiled modules are kept",
                [fresh(WORK["first answer"], PYTHONDONTWRITEBYTECODE="1") for _ in range(3)],
                note="PYTHONDONTWRITEBYTECODE=1",
            )
        )
    return rows


if __name__ == "__main__":
    report(measure)
