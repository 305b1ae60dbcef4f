"""Cost of a training step: frozen towers with and without cached embeddings, prompts, waiting for data, and memory against the batch size.

python benchmarks/training.py [--quick] [--out rows.json]

Speed does not depend on the values of weights, so the ViT-B/32 of the comparison has random ones (clip_weights="random"): nothing is downloaded.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import Row, report, row

from cg3d.core.malloc import keep_freed_memory
from cg3d.core.timing import Comparison, added_memory, compare, peak_memory, seconds
from cg3d.models.registry import create_encoder
from cg3d.pretrained.factory import load
from cg3d.search.batch_embed import collection_source, embed_source
from cg3d.search.index import ShapeIndex
from cg3d.training.config import TrainConfig
from cg3d.training.learner import Learner, TowerCache
from cg3d.training.losses import TriModalLoss
from cg3d.training.pretrain import make_learner, make_model, make_triplets, read_data

PART = "training"
FROZEN = dict(
    schedule="frozen",
    visual_prompt="none",
    text_prompt="none",
    precision="fp32",
    device="cpu",
    views=1,
    image_augment=False,
)


class UncachedTowers:
    """Towers without a cache: the views and texts of a batch are encoded in every step, as in the published code."""

    def __init__(self, model, views):
        self.backbone, self.views = model.backbone, views

    @torch.no_grad()
    def image(self, batch):
        return self.backbone.encode_image(self.views[batch["row"], batch["view"]])

    @torch.no_grad()
    def text(self, texts):
        return self.backbone.encode_text(texts)


def threads() -> str:
    return f"{torch.get_num_threads()} thread(s), float32"


def learner_of(config: TrainConfig, folder: str, model=None) -> Learner:
    """A learner without callbacks that print or save."""
    triplets = make_triplets(read_data("furniture"), config, progress=False)
    learner = make_learner(config, folder, triplets, model, progress=False)
    learner.callbacks, learner.pictures = [], triplets.cache
    learner.model.train()
    return learner


def frozen(quick: bool, folder: str) -> list[Row]:
    """A step with cached features, compared with one that runs ViT-B/32, and with the 3D encoder alone."""
    rows, size, rounds = [], 8 if quick else 32, 1 if quick else 3
    shared = dict(
        clip="ViT-B-32",
        clip_weights="random",
        batch_size=size,
        limit=size,
        epochs=4 if quick else 16,
        view_size=224,
        **FROZEN,
    )
    model = make_model(TrainConfig(**shared))
    for encoder in ("point_transformer_small", *(() if quick else ("pointnet", "point_transformer"))):
        model.encoder = create_encoder(encoder, dim=model.backbone.dim, in_channels=6)
        learner = learner_of(TrainConfig(encoder=encoder, **shared), folder, model)
        cached, uncached, batch = learner.towers, UncachedTowers(model, learner.pictures), learner.batch()

        def look(towers) -> None:
            again = learner.read(0)
            towers.image(again), towers.text(again["texts"])

        def step(towers) -> None:
            learner.towers = towers
            learner.one_step()

        if not rows:
            rows.append(
                row(
                    PART,
                    f"a batch read with the towers' features, a shape, batch {size}, cached",
                    compare(lambda: look(cached), lambda: look(uncached), rounds),
                    "read and encoded in the step (ViT-B/32 with random weights)",
                    at_least=10,
                    per=size,
                    note=f"points, views and texts, no 3D encoder; {threads()}",
                )
            )
        times = compare(lambda: step(cached), lambda: step(uncached), rounds)
        alone = compare(lambda: step(cached), lambda: model.encoder(batch["points"]).sum().backward(), rounds)
        towers = (statistics.median(times.other) - statistics.median(times.ours)) / size
        rest = 100 * (1 - statistics.median(alone.ratios))
        rows.append(
            row(
                PART,
                f"frozen step a shape, {encoder}, batch {size}, cached features",
                times,
                "towers run in the step (ViT-B/32 with random weights)",
                at_least=10,
                per=size,
                note=f"the towers cost {towers * 1e3:.0f} ms a shape and the cache saves them; the ratio depends on the 3D encoder; {threads()}",
            )
        )
        rows.append(
            Row(
                PART,
                f"share of that step outside the 3D encoder, {encoder}",
                rest,
                "%",
                target="<= 5 %",
                met=rest <= 5,
                note=f"data, augmentation, loss, optimizer; {threads()}",
            )
        )
        learner.reader.shutdown(cancel_futures=True)
    return rows


def steps(encoder: str, size: int, count: int, keep: bool) -> dict[str, float]:
    """Seconds of one forward and backward pass, the median of `count`, and the peak MiB of this process."""
    model, points = (
        create_encoder(encoder, in_channels=6),
        torch.rand(size, 1024, 6, generator=torch.Generator().manual_seed(0)),
    )
    with keep_freed_memory(keep):
        took = [seconds(lambda: model(points).sum().backward()) for _ in range(count + 1)][1:]
    return {"seconds": statistics.median(took), "peak": peak_memory()}


def allocator(quick: bool) -> list[Row]:
    """Freed memory kept for the next step, as in training, or returned to the system; processes run alternately."""
    rows = []
    for encoder, size in (
        (("pointnet", 8),)
        if quick
        else (("point_transformer_small", 32), ("pointnet", 32), ("point_transformer", 16), ("pointmlp", 16))
    ):
        pairs = [
            (apart("steps", encoder, size, 3, True), apart("steps", encoder, size, 3, False))
            for _ in range(1 if quick else 3)
        ]
        times = Comparison(*(tuple(found["seconds"] for found in way) for way in zip(*pairs)))
        mib = [statistics.median(found["peak"] for found in way) for way in zip(*pairs)]
        rows.append(
            row(
                PART,
                f"forward + backward a shape, {encoder}, batch {size}, freed memory kept",
                times,
                "freed memory given back to the system",
                per=size,
                note=f"peak {mib[0]:,.0f} MiB against {mib[1]:,.0f}; {threads()}",
            )
        )
    return rows


def prompted(quick: bool, folder: str) -> list[Row]:
    """A step with deep visual prompts, with the outputs of the stem cached or computed in the step."""
    size, rows = 8 if quick else 32, []
    for clip, weights, view in (("nano", "", 128), *(() if quick else (("ViT-B-32", "random", 224),))):
        learner = learner_of(
            TrainConfig(
                clip=clip,
                clip_weights=weights,
                batch_size=size,
                limit=size,
                epochs=100,
                views=1,
                view_size=view,
                precision="fp32",
                device="cpu",
            ),
            folder,
        )
        cached, uncached = learner.towers, TowerCache(learner.model, limit=0, batch_size=size)

        def step(towers: TowerCache) -> None:
            learner.towers = towers
            learner.one_step()

        times = compare(lambda: step(cached), lambda: step(uncached), 1 if quick else 5)
        rows.append(
            row(
                PART,
                f"joint step per shape, deep prompts in {clip}, batch {size}, stem and texts cached",
                times,
                "stem and unique texts computed at every step",
                per=size,
                note=f"a part with a gradient cannot be cached; {threads()}",
            )
        )
        learner.reader.shutdown(cancel_futures=True)
    return rows


def waiting(quick: bool, folder: str) -> list[Row]:
    """Share of a run's time in which the loop waited for data, from metrics.csv."""
    rows = []
    for name, settings in (
        ("recipes/furniture.yaml", dict(ema=0.99)),
        ("schedule frozen", dict(schedule="frozen", visual_prompt="none")),
    ):
        config = TrainConfig(
            epochs=2 if quick else 4,
            limit=64 if quick else 512,
            batch_size=32 if quick else 64,
            views=1 if quick else 6,
            device="cpu",
            out=str(Path(folder) / name.replace("/", "-")),
            **settings,
        )
        triplets = make_triplets(read_data("furniture"), config, progress=False)
        make_learner(config, config.out, triplets, progress=False).fit()
        epochs = list(csv.DictReader((Path(config.out) / "metrics.csv").open()))
        spent, waited = (
            sum(float(each["seconds"]) for each in epochs),
            sum(float(each["seconds"]) * float(each["waiting"]) for each in epochs),
        )
        rows.append(
            Row(
                PART,
                f"time spent waiting for data, {name}, {config.limit} shapes, {config.epochs} epochs",
                100 * waited / spent,
                "%",
                target="< 5 %",
                met=waited / spent < 0.05,
                note=f"of {spent:.0f} s; the first batch of a run is not read ahead",
            )
        )
    return rows


class Made:
    """Any number of shapes with random points and features."""

    def __init__(self, count: int, points: int, dim: int):
        self.count, self.points, self.dim = count, points, dim

    def __len__(self) -> int:
        return self.count

    def batch(self, rows, epoch):
        generator = torch.Generator().manual_seed(epoch)
        points = torch.rand(len(rows), self.points, 6, generator=generator)
        return dict(
            points=points,
            images=torch.randn(len(rows), self.dim, generator=generator),
            texts=[f"thing {row}" for row in rows],
            row=torch.tensor(rows),
            view=torch.zeros(len(rows), dtype=torch.long),
        )


def one_batch(size: int, part: int, checkpointing: bool, points: int) -> dict[str, float]:
    """MiB that a step adds at its peak, and its seconds, in this process."""
    config = TrainConfig(
        batch_size=size,
        part=part,
        checkpointing=checkpointing,
        epochs=2,
        points=points,
        augment="none",
        **FROZEN,
    )
    model = make_model(config)
    data = Made(size, points, model.backbone.dim)
    learner = Learner(model, TriModalLoss((1.0, 1.0, 0.0), 0.07, False, "caption", 0.0), data, config)
    model.train()
    model.backbone.encode_text = lambda texts: torch.randn(
        len(texts), data.dim
    )  # only the encoder counts here
    took = []
    added = added_memory(lambda: took.append(seconds(learner.one_step)))
    learner.reader.shutdown(cancel_futures=True)
    return {"added": added, "seconds": took[0]}


def apart(function: str, *values, **variables: str) -> dict[str, float]:
    """Result of a function of this file in a separate process."""
    code = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads({torch.get_num_threads()}); import training; print(json.dumps(training.{function}(*{values!r})))"
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | variables,
        ).stdout.splitlines()[-1]
    )


def memory(quick: bool) -> list[Row]:
    """Peak memory against the batch size: plain, with activation checkpointing, and with gradient caching.

    glibc keeps freed blocks and so shows up to half more than is in use, a constant in the batch; here large ones go back to the system at once.
    """
    points = 256 if quick else 1024
    sizes = (
        [(64, 0, False), (64, 0, True), (128, 64, False)]
        if quick
        else [
            (64, 0, False),
            (64, 0, True),
            (256, 0, False),
            (256, 0, True),
            (256, 64, False),
            (2048, 64, False),
        ]
    )
    found = {case: apart("one_batch", *case, points, MALLOC_MMAP_THRESHOLD_="65536") for case in sizes}
    grown = {case: each["added"] for case, each in found.items()}
    plain, rows = grown[sizes[0]], []
    for (size, part, again), mib in grown.items():
        last = (size, part, again) == sizes[-1]
        rows.append(
            Row(
                PART,
                f"memory of a step{f' in parts of {part}' if part else ''}{', activations recomputed' if again else ''}",
                mib,
                "MiB",
                target="<= 1.5 times batch 64" if last else "",
                met=mib <= 1.5 * plain if last else None,
                note=f"{mib / plain:.2f} times batch 64 plain; beside libraries and weights; {found[size, part, again]['seconds'] / size * 1e3:.0f} ms a shape; point_transformer_small, {points} points, float32, MALLOC_MMAP_THRESHOLD_=65536",
                along="shapes a step",
                at=size,
            )
        )
    return rows


def job(work: str, count: int) -> dict[str, float]:
    """Peak MiB of this process, which does one job, and the job's seconds."""
    start, collection = time.perf_counter(), read_data("furniture")
    with tempfile.TemporaryDirectory() as folder:
        if work == "training":
            config = TrainConfig(epochs=1, limit=count, device="cpu", out=folder)
            make_learner(
                config, folder, make_triplets(collection, config, progress=False), progress=False
            ).fit()
        elif work == "embedding":
            embed_source(
                collection_source(collection.select(np.arange(len(collection)) < count), "furniture"),
                load("nano"),
                Path(folder) / "vectors.npz",
            )
        else:
            vectors = np.random.default_rng(0).standard_normal((count, 384), dtype=np.float32)
            ShapeIndex.from_embeddings(
                vectors, pd.DataFrame({"name": [f"thing {row}" for row in range(count)]}), "0" * 64
            ).save(Path(folder) / "index")
    return {"peak": peak_memory(), "seconds": time.perf_counter() - start}


def measure(quick: bool) -> list[Row]:
    """Training: time and memory of its parts."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CG3D_CACHE"] = folder
        with keep_freed_memory():
            rows = [*frozen(quick, folder), *prompted(quick, folder)]
        rows += [*allocator(quick), *waiting(quick, folder), *memory(quick)]
        for work, counts in (
            (("training", (64,)), ("embedding", (64,)), ("indexing", (10_000,)))
            if quick
            else (("training", (128, 512)), ("embedding", (200, 400, 790)), ("indexing", (10_000, 100_000)))
        ):
            for count in counts:
                found = apart("job", work, count)
                rows += [
                    Row(PART, f"{work}, whole process, peak", found["peak"], "MiB", along="shapes", at=count),
                    Row(PART, f"{work}, whole process", found["seconds"], "s", along="shapes", at=count),
                ]
    return rows


if __name__ == "__main__":
    report(measure)
