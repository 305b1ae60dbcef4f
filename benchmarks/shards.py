"""Shards compared with the packed collection and single files: write and read rates, waiting in training, and embedding over Ray.

    python benchmarks/shards.py            # about 5 minutes on 2 cores
    python benchmarks/shards.py --quick    # checks that everything runs, without Ray

One thread per process. Files are read from the page cache, so the rates are those of decoding; a disk or network adds its own."""

import itertools
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import Row, report, row

from cg3d.core.timing import compare, peak_memory, seconds
from cg3d.data.furniture import furniture
from cg3d.data.shard_writer import write_shards
from cg3d.data.shards import read_shards
from cg3d.io.collection import read_collection, write_collection
from cg3d.io.shape import Shape, read_shape
from cg3d.pretrained.factory import load
from cg3d.search.batch_embed import collection_source, embed_source
from cg3d.search.ray import embed_with_ray, ray_cluster
from cg3d.training.config import TrainConfig
from cg3d.training.pretrain import make_learner, make_triplets


def grown(count: int) -> list[Shape]:
    "So many shapes: the embedded ones, jittered"
    shapes, random = furniture(), np.random.default_rng(0)
    return [
        Shape(
            shape.points + random.normal(0, 1e-3, shape.points.shape).astype("float32"),
            shape.colors,
            name=shape.name,
            caption=shape.caption,
            id=f"{i}",
            source="benchmark",
        )
        for i, shape in zip(range(count), itertools.cycle(shapes))
    ]


def writing(shapes, folder: Path, rounds: int) -> list[Row]:
    "The three forms of the same shapes"
    fresh = itertools.count()

    def new():
        return folder / f"{next(fresh)}"

    def files():
        place = new()
        place.mkdir()
        for shape in shapes:
            np.save(place / f"{shape.id}.npy", shape.cloud().numpy().astype("float16"))

    packed = write_collection(folder / "packed", shapes)
    shards = lambda: write_shards(packed, new(), per_shard=500)
    count, note = len(shapes), "2,048 colored points, float16; 1 thread"
    return [
        row(
            "shards",
            f"write {count:,} shapes as shards, a shape",
            compare(shards, lambda: write_collection(new(), shapes), rounds),
            "the packed collection (compressed)",
            per=count,
            note=note,
        ),
        row(
            "shards",
            f"write {count:,} shapes as shards, a shape",
            compare(shards, files, rounds),
            "one .npy a shape",
            per=count,
            note=note + "; the files hold no words",
        ),
    ]


def reading(shapes, folder: Path, rounds: int) -> list[Row]:
    "All shapes in order, and at random in batches of 64"
    count, packed = len(shapes), read_collection(folder / "packed")
    place, files = folder / "read", folder / "files"
    shards, size = write_shards(packed, place, per_shard=500), 64
    files.mkdir()
    for shape in shapes:
        np.save(
            files / f"{shape.id}.npy",
            np.concatenate([shape.points, shape.colors], 1) if shape.colors is not None else shape.points,
        )
    order, mixed = np.arange(count), np.random.default_rng(0).permutation(count)

    def all_of(rows, window=size):
        shards.packed.cache = {}
        for first in range(0, count, window):
            shards.packed.read_many(shards.rows[rows[first : first + window]])

    def singly():
        return [read_shape(files / f"{i}.npy", points=None) for i in mixed]

    stream, random, bytes_each = (
        compare(lambda: all_of(order, 1024), singly, rounds),
        compare(lambda: all_of(mixed), singly, rounds),
        sum(entry["bytes"] for entry in shards.manifest["shards"]) / count,
    )
    both = compare(lambda: all_of(order, 1024), lambda: all_of(mixed), rounds)
    rate = 1 / (sorted(stream.ours)[rounds // 2] / count)
    return [
        row(
            "shards",
            "read and decode a sample, front to back",
            stream,
            "one .npy a shape",
            per=count,
            note=f"{rate:,.0f} samples/s, {rate * bytes_each / 1e6:,.0f} MB/s, from the page cache, 1 thread",
        ),
        row(
            "shards",
            "read and decode a sample, rows at random in batches of 64",
            random,
            "one .npy a shape",
            per=count,
        ),
        row(
            "shards",
            "read and decode a sample, front to back",
            both,
            "rows at random in batches of 64",
            per=count,
        ),
        row(
            "shards",
            f"read all {count:,} shapes as one tensor, a shape",
            compare(
                lambda: read_shards(place).points(),
                lambda: read_collection(folder / "packed").points(),
                rounds,
            ),
            "the packed collection (which must fit in memory)",
            per=count,
        ),
        Row(
            "shards",
            "bytes of a sample in a shard",
            bytes_each,
            "bytes",
            "the packed collection",
            *[(folder / "packed.npz").stat().st_size / count / bytes_each] * 3,
            note="ratio: the packed collection's bytes a shape over ours",
        ),
    ]


def waiting(folder: Path, steps: int) -> Row:
    "Share of a training run that waits for the next batch"
    config = TrainConfig(
        data=str(folder / "read"),
        out=str(folder / "run"),
        batch_size=16,
        epochs=1,
        limit=16 * steps,
        weight_3d_image=0,
        weight_image_text=0,
        visual_prompt="none",
        device="cpu",
        precision="fp32",
    )
    learner = make_learner(
        config, config.out, make_triplets(read_shards(config.data), config, progress=False), progress=False
    )

    def train():
        learner.model.train()
        for _ in range(steps):
            learner.one_step()

    took, waited = seconds(train), learner.waited
    learner.reader.shutdown(cancel_futures=True)
    return Row(
        "shards",
        f"waiting for data, share of {steps} steps from shards",
        100 * waited / took,
        "%",
        target="< 5 %",
        met=waited / took < 0.05,
        note="point_transformer_small, batch 16, 1,024 points, 1 thread; texts and points only",
    )


def embedding(folder: Path, count: int, rounds: int) -> list[Row]:
    "The same shapes in this process and over Ray with one and two workers"
    model, packed = load("nano"), read_collection(folder / "packed")
    source, fresh = (
        collection_source(packed.select(np.arange(len(packed)) < count), "benchmark"),
        itertools.count(),
    )

    def new():
        return folder / f"e{next(fresh)}.parquet"

    start = time.perf_counter()
    with ray_cluster(2):
        begun, found = time.perf_counter() - start, []
        for workers in (1, 2):
            times = compare(
                lambda: embed_with_ray(source, model, new(), workers=workers),
                lambda: embed_source(source, model, new()),
                rounds,
                warmup=0,
            )
            found.append(
                row(
                    "shards",
                    f"embed {count:,} shapes with {workers} Ray worker{'s' * (workers > 1)}",
                    times,
                    "this process alone",
                    unit="s",
                    note="the start of the workers (imports, the model) is part of it",
                )
            )
    return [*found, Row("shards", "start of a local Ray", begun, "s")]


def measure(quick: bool) -> list[Row]:
    "Shards: rates, waiting, Ray."
    torch.set_num_threads(1)
    folder, rounds = Path(tempfile.mkdtemp()), 2 if quick else 5
    os.environ["CG3D_CACHE"] = str(folder / "cache")
    try:
        shapes = grown(200 if quick else 2000)
        rows = [
            *writing(shapes, folder, rounds),
            *reading(shapes, folder, rounds),
            waiting(folder, 3 if quick else 12),
        ]
        if not quick:
            rows += embedding(folder, 1000, 2)
        return [*rows, Row("shards", "peak memory of this process", peak_memory(), "MiB")]
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    report(measure)
