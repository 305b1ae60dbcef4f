"""Long runs in one process: memory and open files after 10,000 calls, and searches in threads while another thread adds rows.

python benchmarks/soak.py [--calls 10000] [--seconds 30]"""

import argparse
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import cg3d
from cg3d.search.index import ShapeIndex


def now() -> tuple[float, int]:
    "Resident memory in MiB and open files of this process"
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20, len(
        os.listdir("/proc/self/fd")
    )


def soak(name: str, call, calls: int) -> bool:
    "Whether memory and files are the same after all calls as after the first tenth"
    start = time.monotonic()
    for turn in range(calls):
        call(turn)
        if turn == calls // 10:
            before = now()
    after = now()
    print(
        f"{name}: {calls:,} calls in {time.monotonic() - start:.0f} s; {before[0]:.0f} MiB and {before[1]} files after the first tenth, {after[0]:.0f} MiB and {after[1]} at the end",
        flush=True,
    )
    return after[0] - before[0] < 20 and after[1] <= before[1]


def threads(seconds: float, readers: int = 8) -> bool:
    "Whether every search returns the correct row while another thread adds rows"
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20_000, 64), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = ShapeIndex.from_embeddings(
        vectors, pd.DataFrame({"id": np.arange(20_000).astype(str), "name": "x"}), "f"
    )
    end, searches, wrong, added = time.monotonic() + seconds, [0] * readers, [], [0]

    def search(number):
        own = np.random.default_rng(number)
        while time.monotonic() < end:
            row = int(own.integers(20_000))
            try:
                found = index.search(vectors[row : row + 1], 3)
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
                return
            searches[number] += 1
            if found["id"].iloc[0] != str(row) or not found["score"].is_monotonic_decreasing:
                wrong.append(f"row {row}: {found['id'].tolist()}")

    def add():
        while time.monotonic() < end:
            fresh = rng.standard_normal((100, 64), dtype=np.float32)
            index.add(
                fresh,
                table=pd.DataFrame({"id": [f"n{added[0]}-{i}" for i in range(100)], "name": "y"}),
                fingerprint="f",
            )
            added[0] += 100
            time.sleep(0.05)

    workers = [threading.Thread(target=search, args=(number,)) for number in range(readers)] + [
        threading.Thread(target=add)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(
        f"threads: {sum(searches):,} searches by {readers} threads while {added[0]:,} rows were added, {len(wrong)} wrong results {wrong[:3]}"
    )
    return not wrong and len(index) == 20_000 + added[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    (
        parser.add_argument("--calls", type=int, default=10_000),
        parser.add_argument("--seconds", type=float, default=30),
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, shapes = cg3d.load("nano"), cg3d.data.furniture.furniture().select(split="test")
    index = ShapeIndex.from_items(model, shapes)
    queries = np.random.default_rng(0).standard_normal((arguments.calls, index.dim), dtype=np.float32)
    good = soak("search", lambda turn: index.search(queries[turn : turn + 1], 10), arguments.calls)
    good &= threads(arguments.seconds)
    good &= soak(
        "classify",
        lambda turn: model.classify(shapes[turn % len(shapes)], ["chair", "table", "bed", "lamp"]),
        arguments.calls,
    )
    sys.exit(not good)
