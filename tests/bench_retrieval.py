"""How long a large index takes: `python tests/bench_retrieval.py FOLDER [rows] [length] [kind]`. Not run by pytest.

Random unit vectors in groups are written as an index (1,000,000 x 512 by default, 2 GB), opened in a fresh process and asked.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from cg3d.index import ShapeIndex
from cg3d.vectors import exact_top

ASK = """
import json, resource, sys, time
import numpy as np
from cg3d.index import ShapeIndex
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, start = memory(), time.perf_counter()
index = ShapeIndex.open(sys.argv[1])
opened, grown = time.perf_counter() - start, memory() - before
query = np.array(index.vectors[len(index) // 2])
def ask(repeats=7):
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = index.search(query, k=10)
        took.append(time.perf_counter() - start)
    return took, found
first, found = ask(1)
took, found = ask()
assert found["row"][0] == len(index) // 2
print(json.dumps({"rows": len(index), "length": index.dim, "kind": index.kind, "open ms": 1e3 * opened, "open MB": grown, "first query s": first[0], "query ms, best": 1e3 * min(took), "query ms, median": 1e3 * float(np.median(took))}))
"""


def grouped(rows: int, length: int, groups: int = 5000) -> np.ndarray:
    """Unit vectors around random centres, made in pieces."""
    rng = np.random.default_rng(0)
    centres, vectors = rng.standard_normal((groups, length), dtype=np.float32), np.empty((rows, length), np.float32)
    for first in range(0, rows, 50_000):
        part = vectors[first : first + 50_000]
        part[:] = centres[rng.integers(groups, size=len(part))] + 0.7 * rng.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def main(folder: str, rows: int = 1_000_000, length: int = 512, kind: str = "exact") -> None:
    table = pd.DataFrame({"name": [f"shape {i}" for i in range(rows)], "category": [f"noun {i % 200}" for i in range(rows)], "height": np.linspace(0, 2, rows)})
    start = time.perf_counter()
    index = ShapeIndex.from_embeddings(grouped(rows, length), table, "0" * 64, "random vectors", kind)
    made, start = time.perf_counter() - start, time.perf_counter()
    index.save(Path(folder))
    saved, facts = time.perf_counter() - start, {}
    if index.kind not in ("exact", "flat"):
        queries = np.array(index.vectors[:: rows // 50][:50])
        queries = queries + np.random.default_rng(1).standard_normal(queries.shape, dtype=np.float32) * 0.3 / length ** 0.5
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        found = index.search(queries, k=10)["row"].to_numpy().reshape(-1, 10)
        facts["Recall@10 against the scan"] = float(np.mean([len(set(a) & set(b)) / 10 for a, (_, b) in zip(found, exact_top(index.vectors, queries, 10))]))
    del index, table
    asked = subprocess.run([sys.executable, "-c", ASK, folder], capture_output=True, text=True)
    if asked.returncode: raise SystemExit(asked.stderr)
    print(json.dumps(json.loads(asked.stdout) | {"make s": made, "save s (structure included)": saved} | facts, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:5])
