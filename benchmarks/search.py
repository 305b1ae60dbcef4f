"""Recall, latency, size and build time of the search structures of an index: 1,000,000 x 512 on two cores, each kind in separate processes.

    python benchmarks/search.py --quick
    SETS=engines ROWS=300000 python benchmarks/search.py
    SETS="shapes grouped" KINDS="ivfpq hnsw" ROWS=1000000 python benchmarks/search.py --out rows.json

Two sets of vectors. `shapes`: the 790 furniture shapes, each embedded by the bundled model four times (unchanged, and three times augmented by rotation, scale and one-sided views). New vectors are
mixtures of three of the four with near ones of other shapes, displaced by differences between embeddings of one shape, and rotated into 512 dimensions, which changes no cosine. Queries are the fourth
embedding of each shape, which is in no mixture, and its texts, which are far from all shapes. `grouped`: directions around random centers, 200 per center; queries are further directions of the same
groups. The exact scan gives the ground truth. `engines` compares the folder with faiss and the Lance table over `grouped` in one process. `SETS`, `KINDS` and `ROWS` choose parts; FOLDER (the temporary one if not set) needs 5 GB for a million rows."""

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import Row, report
from threadpoolctl import threadpool_limits

import cg3d
from cg3d.core.timing import peak_memory
from cg3d.data.furniture import furniture
from cg3d.geometry.augment import Augment
from cg3d.search.backends import IVFPQ_MIN_ROWS, approximate_search, exact_search, unit_rows
from cg3d.search.filters import Filter
from cg3d.search.index import ShapeIndex

DIM, PIECE = 512, 50_000  # length of a vector; rows made together


def shape_embeddings(limit: int) -> tuple[np.ndarray, np.ndarray]:
    "Embeddings of `limit` shapes, (N, 4, D), and of their texts, (T, D)"
    model, shapes, generator = cg3d.load("nano"), furniture(), torch.Generator().manual_seed(0)
    points, change = (
        shapes.points(slice(limit)),
        Augment(
            rotate=180, one_sided=0.3, scale=(0.8, 1.2), scale_per_axis=True, jitter=0.01, color_jitter=0.2
        ),
    )
    views = [
        torch.cat([model.encode_shape(part) for part in given.split(64)])
        for given in (points, *(change(points, generator) for _ in range(3)))
    ]
    texts = sorted(
        {
            text
            for column in ("name", "caption", "query")
            for text in shapes.table[column][:limit]
            if text.strip()
        }
    )
    return torch.stack(views, 1).numpy(), model.encode_text(texts).numpy()


def mixed(views: np.ndarray, texts: np.ndarray):
    "A function that draws vectors of `shapes`, the queries, and the embeddings that are mixed"
    rng, (count, turns, length) = np.random.default_rng(0), views.shape
    known, owner = views[:, :-1].reshape(-1, length), np.repeat(np.arange(count), turns - 1)
    near = np.argsort(np.where(owner[:, None] == owner, 2, -known @ known.T), 1)[:, :16]
    turn = np.linalg.qr(rng.standard_normal((DIM, length)))[0].T.astype(np.float32)

    def draw(rows: int) -> np.ndarray:
        first = rng.integers(len(known), size=rows)
        share, second = rng.random((rows, 1), dtype=np.float32), near[first, rng.integers(16, size=rows)]
        part = (1 - share) * known[first] + share * known[second]
        for _ in range(4):
            shape, (one, other) = rng.integers(count, size=rows), rng.integers(turns - 1, size=(2, rows))
            part += (
                rng.standard_normal((rows, 1), dtype=np.float32)
                / 2
                * (views[shape, one] - views[shape, other])
            )
        return unit_rows(part @ turn)

    return draw, {"shape": views[:, -1] @ turn, "text": texts @ turn}, known


def grouped(count: int):
    "A function that draws vectors of `grouped`, and the queries"
    rng, groups = np.random.default_rng(0), count // 200
    centers = rng.standard_normal((groups, DIM), dtype=np.float32)

    def draw(rows: int) -> np.ndarray:
        return unit_rows(
            centers[rng.integers(groups, size=rows)]
            + 0.7 * rng.standard_normal((rows, DIM), dtype=np.float32)
        )

    return draw, {"shape": draw(1000)}


def dimensions(vectors: np.ndarray) -> float:
    "Effective dimension: (sum of the eigenvalues of the covariance) squared over the sum of their squares"
    spread = np.linalg.eigvalsh(np.cov(vectors.T))
    return float(spread.sum() ** 2 / (spread**2).sum())


def write(folder: Path, rows: int, draw, queries: dict, query_count: int) -> float:  # effective dimension
    "Write vectors.npy, and each kind of query with its ten nearest rows"
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (rows, DIM))
    for first in range(0, rows, PIECE):
        vectors[first : first + PIECE] = draw(min(PIECE, rows - first))
    for name, query_vectors in queries.items():
        query_vectors = unit_rows(
            query_vectors[np.random.default_rng(1).permutation(len(query_vectors))[:query_count]]
        )
        np.savez(
            folder / f"{name}.npz",
            query_vectors=query_vectors,
            truth=[
                row
                for first in range(0, len(query_vectors), 250)
                for _, row in exact_search(vectors, query_vectors[first : first + 250], 10)
            ],
        )
    return dimensions(vectors[:PIECE])


def build(folder: Path, kind: str) -> dict:
    "Build and save one index"
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    table = pd.DataFrame(
        {
            "id": np.arange(len(vectors)).astype(str),
            "name": "a shape",
            "category": np.arange(len(vectors)) % 200,
            "height": np.linspace(0, 2, len(vectors)),
        }
    )
    index, start, work = (
        ShapeIndex.from_embeddings(vectors, table, "0" * 64, "vectors", kind),
        time.perf_counter(),
        time.process_time(),
    )
    if kind != "exact":
        index.faiss_index()
    facts = {
        "build": time.perf_counter() - start,
        "build cpu": time.process_time() - work,
        "peak": peak_memory(),
    }
    index.save(folder / kind)
    return facts | {
        "bytes": sum(path.stat().st_size for path in (folder / kind).glob("faiss*")) / len(vectors)
    }


def resident() -> float:
    "MiB of anonymous memory (not mapped from files) of this process; NaN outside Linux"
    try:
        return (
            next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
            / 1024
        )
    except OSError:
        return float("nan")


def run_queries(folder: Path, kind: str, query_count: int) -> dict:
    "Open an index in this new process and search it: one query at a time on one thread, then all in one call on two"
    files = {path.stem: np.load(path) for path in sorted(folder.glob("*.npz"))}
    queries = {name: (file["query_vectors"], file["truth"]) for name, file in files.items()}
    before, start = resident(), time.perf_counter()
    index = ShapeIndex.load(folder / kind)
    facts, start = {"open": time.perf_counter() - start}, time.perf_counter()
    index.search(queries["shape"][0][0])
    facts |= {"first": time.perf_counter() - start, "resident": resident() - before}
    with threadpool_limits(1):
        for name, (query_vectors, truth) in queries.items():
            query_vectors = query_vectors[:query_count]
            for turn in (
                "cold",
                "warm",
            ):  # rows that the first round reads from the disk are in the page cache in the second
                wall, cpu, found = [], [], []
                for query in query_vectors:
                    start, work = time.perf_counter(), time.thread_time()
                    found.append(index.search(query)["row"].to_numpy())
                    wall.append(time.perf_counter() - start), cpu.append(time.thread_time() - work)
                if turn == "cold":
                    cold = np.median(wall)
            facts[name] = {
                "recall": np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth)]),
                "p50": np.median(wall),
                "p99": np.quantile(wall, 0.99),
                "cpu": np.median(cpu),
                "cold": cold,
                "query_count": len(query_vectors),
            }
        query_vectors, bare = queries["shape"][0][:query_count], []
        for query in query_vectors[:50]:
            work = time.thread_time()
            exact_search(index.vectors, query[None], 10) if kind == "exact" else approximate_search(
                index.faiss_index(), index.vectors, query[None], 10
            )
            bare.append(time.thread_time() - work)
        start = time.perf_counter()
        index.search(query_vectors[0], where="height < 1")
        facts |= {"bare": np.median(bare), "filter": time.perf_counter() - start}
    with threadpool_limits(2):
        start = time.perf_counter()
        index.search(query_vectors)
        facts["batch"] = len(query_vectors) / (time.perf_counter() - start)
    return facts


def alone(work, *given):
    "Run a function in a new process, so that its memory is measured alone"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def rows_of(name: str, kind: str, rows: int, made: dict, got: dict) -> list[Row]:
    "The rows of the table for one kind"

    def row(what, value, unit, target="", met=None, note=""):
        return Row(
            "search",
            f"{what}, {kind}, {rows:,} x {DIM} {name}",
            float(value),
            unit,
            target=target,
            met=None if met is None else bool(met),
            note=note,
        )

    at = f"wall time, load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores, this process included"
    has_target = rows >= 1_000_000 and kind in ("hnsw", "ivfpq")  # targets are for a million rows

    def aim(text: str, met: bool) -> dict:
        return {"target": text, "met": met} if has_target else {}

    small = aim("<= 80", made["bytes"] <= 80) if kind == "ivfpq" else {}
    out = [
        row(
            "build",
            made["build"],
            "s",
            note=f"{made['build cpu']:.0f} s of processor; peak {made['peak']:,.0f} MiB, mapped vectors included; {at}",
        ),
        row(
            "bytes a vector of the structure",
            made["bytes"],
            "bytes",
            **small,
            note=f"the vectors ({4 * DIM:,} bytes each) stay in their file, memory-mapped, and are read for re-ranking; memory of the process grew by {got['resident']:,.0f} MiB at the first query, including the table of texts",
        ),
    ]
    for query_kind in ("shape", "text"):
        if query_kind not in got:
            continue
        it = got[query_kind]
        out += [
            row(
                f"recall@10 of {query_kind} queries",
                it["recall"],
                "",
                **aim(">= 0.95", it["recall"] >= 0.95),
                note=f"{it['query_count']:,} queries",
            ),
            row(
                f"one {query_kind} query, p50",
                1e3 * it["p50"],
                "ms",
                **aim("<= 3 ms", it["p50"] <= 0.003),
                note=f"p99 {1e3 * it['p99']:.2f} ms; processor time {1e3 * it['cpu']:.2f} ms; p50 of the first round, with rows read from the disk, {1e3 * it['cold']:.2f} ms; one thread, ShapeIndex.search with its table of results, {it['query_count']:,} queries; {at}",
            ),
        ]
    out += [
        row("the same without the table of results, processor time", 1e3 * got["bare"], "ms"),
        row("all queries in one call", got["batch"], "queries/s", note="two threads"),
        row(
            "open",
            1e3 * got["open"],
            "ms",
            note=f"first query {got['first']:.2f} s: it reads the structure, checks its hash, and reads the table",
        ),
        row(
            "one query with a filter that half of the rows match",
            1e3 * got["filter"],
            "ms",
            note="always exact",
        ),
    ]
    return out


def curve(name: str, kind: str, rows: int, made: dict, got: dict) -> list[Row]:
    "One size of a kind, as a point of the scaling curves"
    return [
        Row("search", f"{what}, {kind}, {name}", float(value), unit, along="rows", at=rows)
        for what, value, unit in (
            ("build", made["build"], "s"),
            ("peak of the build", made["peak"], "MiB"),
            ("one query, p50", 1e3 * got["shape"]["p50"], "ms"),
        )
        if what != "build" or kind != "exact"
    ]  # an exact index has nothing to build


def cut(folder: Path, rows: int) -> Path:
    "A folder with the first rows and the same queries"
    place = folder / f"{rows}"
    place.mkdir()
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")[:rows]
    np.save(place / "vectors.npy", vectors)
    query_vectors = np.load(folder / "shape.npz")["query_vectors"][:200]
    np.savez(
        place / "shape.npz",
        query_vectors=query_vectors,
        truth=[found for _, found in exact_search(vectors, query_vectors, 10)],
    )
    return place


def evict(place: Path) -> None:
    "Remove the files of a folder from the page cache"
    for file in place.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def filtered_queries(
    index: ShapeIndex, queries: np.ndarray, truth: list, where: str | None
) -> tuple[float, float]:
    "Recall of the ten nearest, and the median time of a query in milliseconds"
    took, right = [], []
    for query, ids in zip(queries, truth):
        start = time.perf_counter()
        found = index.search(query, where=where)
        took.append(time.perf_counter() - start)
        right.append(len(set(found["id"]) & ids) / len(ids))
    return float(np.mean(right)), 1e3 * float(np.median(took))


def add_while_searching(place: Path, index: ShapeIndex, rows: np.ndarray, queries: np.ndarray) -> dict:
    "Seconds until ten parts of new rows are stored, and the median time of the queries meanwhile"
    writer = (
        index if place.suffix != ".lance" else ShapeIndex.load(place)
    )  # a folder has one writer in one process
    took, stop = [], threading.Event()

    def search() -> None:
        while not stop.is_set():
            start = time.perf_counter()
            index.search(queries[len(took) % len(queries)])
            took.append(1e3 * (time.perf_counter() - start))

    thread, start = threading.Thread(target=search), time.perf_counter()
    thread.start()
    for number, part in enumerate(np.array_split(rows, 10)):
        names = pd.DataFrame({"id": [f"new {number} {row}" for row in range(len(part))]})
        writer.add(part, names, fingerprint="0" * 64)
    added = time.perf_counter() - start
    writer.save(place)
    stored = time.perf_counter() - start
    stop.set()
    thread.join()
    return {"add": added, "add and save": stored, "p50": float(np.median(took)), "queries": len(took)}


def engines(rows: int, query_count: int) -> list[Row]:
    "The default engine and Lance, one after the other in this process, over the same `grouped` vectors"
    out = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("FOLDER")) as place:
        folder = Path(place)
        draw, queries = grouped(rows)
        write(folder, rows, draw, queries, query_count)
        vectors, new = np.load(folder / "vectors.npy", mmap_mode="r"), draw(rows // 30)
        percent = np.random.default_rng(2).permutation(rows) % 100
        table = pd.DataFrame({"id": np.arange(rows).astype(str), "name": "a shape", "percent": percent})
        queries = np.load(folder / "shape.npz")["query_vectors"][:query_count]
        filters = {"no filter": None, "1 %": "percent == 3", "10 %": "percent < 10"}
        truth = {}
        for name, where in filters.items():
            kept = None if where is None else np.flatnonzero(Filter(where, table).mask())
            truth[name] = [set(map(str, found)) for _, found in exact_search(vectors, queries, 10, kept)]
        for engine, suffix in (("folder and faiss", ""), ("Lance", ".lance")):

            def row(what: str, value: float, unit: str, note: str = "") -> None:
                out.append(
                    Row("search", f"{what}, {engine}, {rows:,} x {DIM} grouped", value, unit, note=note)
                )
                print(f"{out[-1].what}: {value:.4g} {unit} {note}", file=sys.stderr, flush=True)

            place = folder / f"index{suffix}"
            start, work = time.perf_counter(), time.process_time()
            ShapeIndex(vectors, table, "0" * 64, kind="ivfpq").save(place)
            seconds, work = time.perf_counter() - start, time.process_time() - work
            row("build and write", seconds, "s", f"{work:.0f} s of processor")
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            row("bytes a row, vectors and table included", size / rows, "bytes")
            evict(place)
            start = time.perf_counter()
            index = ShapeIndex.load(place)
            opened = time.perf_counter() - start
            index.search(queries[0])
            first = time.perf_counter() - start
            row(
                "open", 1e3 * opened, "ms", f"with the first query {first:.2f} s; files not in the page cache"
            )
            for name, where in filters.items():
                recall, p50 = filtered_queries(index, queries, truth[name], where)
                row(f"recall@10, {name}", recall, "", f"{len(queries)} queries")
                row(f"one query, p50, {name}", p50, "ms")
            facts = add_while_searching(place, index, new, queries)
            note = f"{len(new):,} rows in ten parts; until saved {facts['add and save']:.1f} s"
            row("add while searching", facts["add"], "s", note)
            row("one query meanwhile, p50", facts["p50"], "ms", f"{facts['queries']} queries")
            del index
    load = os.getloadavg()[0]
    print(f"load {load:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    return out


def measure(quick: bool) -> list[Row]:
    "Recall, latency, size and build time of each kind of index"
    rows, query_count = int(os.environ.get("ROWS", 20_000 if quick else 1_000_000)), 100 if quick else 1000
    sets, kinds, out = (
        os.environ.get("SETS", "shapes").split(),
        os.environ.get("KINDS", "exact flat hnsw ivfpq").split(),
        [],
    )
    torch.set_num_threads(2)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # of the child processes: idle threads do not spin
    if "engines" in sets:
        out += engines(rows, min(query_count, 100))
        sets.remove("engines")
    for name in sets:
        with tempfile.TemporaryDirectory(dir=os.environ.get("FOLDER")) as place:
            folder, real = Path(place), float("nan")
            if name == "shapes":
                draw, queries, known = mixed(*shape_embeddings(64 if quick else 790))
                real = dimensions(known)
            else:
                draw, queries = grouped(rows)
            made = write(folder, rows, draw, queries, query_count)
            out.append(
                Row(
                    "search",
                    f"effective dimension, {rows:,} x {DIM} {name}",
                    made,
                    "",
                    note=f"of the mixed embeddings: {real:.1f}" if name == "shapes" else "",
                )
            )
            smaller = (
                [cut(folder, count) for count in (rows // 100, rows // 10)]
                if rows // 100 >= IVFPQ_MIN_ROWS
                else []
            )
            for kind in kinds:
                facts = alone(build, folder, kind)
                results = alone(
                    run_queries,
                    folder,
                    kind,
                    query_count if kind in ("hnsw", "ivfpq") else min(query_count, 50),
                )
                out += rows_of(name, kind, rows, facts, results)
                print(
                    *(f"{row.what}: {row.value:.4g} {row.unit}" for row in out[-12:]),
                    sep="\n",
                    file=sys.stderr,
                    flush=True,
                )
                if kind in ("exact", "ivfpq") and smaller:
                    out += [
                        each
                        for place in smaller
                        for each in curve(
                            name,
                            kind,
                            int(place.name),
                            alone(build, place, kind),
                            alone(run_queries, place, kind, 200),
                        )
                    ]
                    out += curve(name, kind, rows, facts, results)
    return out


if __name__ == "__main__":
    report(measure)
