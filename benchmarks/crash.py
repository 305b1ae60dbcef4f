"""Kill training with `kill -9` at random moments, resume it, and compare the weights with those of an uninterrupted run.

    python benchmarks/crash.py                 # 50 killed training runs over all schedules, then 20 killed writers of embeddings, indices and collections
    python benchmarks/crash.py --kills 6 --writes 6

Each attempt is a forked child, so that torch is imported once; a child that is killed leaves only its files."""

import argparse
import hashlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import cg3d
from cg3d.core.atomic import check_hash, read_manifest
from cg3d.data.furniture import furniture
from cg3d.io.collection import read_collection, write_collection
from cg3d.search.batch_embed import collection_source, embed_source
from cg3d.search.embeddings import read_embeddings
from cg3d.search.index import ShapeIndex
from cg3d.training.config import TrainConfig
from cg3d.training.pretrain import make_learner, make_model, make_triplets, read_data

SCHEDULES = {"joint": {}, "alternate": {"prompt_optimizer": "sgd"}, "frozen": {"visual_prompt": "none"}}


def child(work) -> int:
    "Process number of a child that does `work` and exits"
    process = os.fork()
    if process:
        return process
    out = os.open(os.devnull, os.O_WRONLY)
    os.dup2(out, 1)
    try:
        work(), os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def attempt(work, seconds: float = math.inf, begun=lambda: True) -> float | None:
    "Seconds from when `begun()` to the end of the child, or None: it was killed `seconds` after `begun()`"
    process, start = child(work), None
    while not (found := os.waitpid(process, os.WNOHANG))[0]:
        if start is None and begun():
            start = time.monotonic()
        if start is not None and time.monotonic() - start > seconds:
            os.kill(process, signal.SIGKILL)
            found = os.waitpid(process, 0)
            break
        time.sleep(0.002)
    if found[1] and not os.WIFSIGNALED(found[1]):
        raise RuntimeError(f"the job failed by itself: status {found[1]}")
    return time.monotonic() - (start or time.monotonic()) if not found[1] else None


def flat(value, name=""):
    "Every leaf of a state under its name"
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else None
    )
    if children is None:
        yield name, value
    else:
        for key, item in children:
            yield from flat(item, f"{name}.{key}")


def outcome(folder: Path) -> str:
    "Hash over the model's file and everything in the last checkpoint"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    file = read_manifest(max((folder / "checkpoints").iterdir()), ["state.pt"])["files"]["state.pt"]
    check_hash(file)
    for name, leaf in flat(torch.load(file["file"], weights_only=True)):
        if name not in (".config.out", ".config.resume"):
            digest.update(
                name.encode()
                + (leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
            )
    return digest.hexdigest()


def training(kills: int, place: Path) -> tuple[int, int]:
    "Number of killed runs with a bit-identical result, and number of kills"
    os.environ["CG3D_CACHE"] = str(place / "cache")
    collection, same, killed_times = read_data("furniture"), 0, 0
    for number, (schedule, options) in enumerate(SCHEDULES.items()):
        config = TrainConfig(
            encoder="pointnet",
            limit=16,
            points=128,
            views=2,
            view_size=32,
            batch_size=8,
            epochs=4,
            ema=0.9,
            schedule=schedule,
            texts="all",
            learnable_temperature=True,
            device="cpu",
            precision="fp32",
            **options,
        )
        triplets = make_triplets(collection, config, progress=False)

        def work(folder, resume):
            make_learner(
                replace(config, out=str(folder), resume=resume),
                folder,
                triplets,
                make_model(config),
                progress=False,
            ).fit()

        seconds = attempt(
            lambda: work(place / schedule, False), begun=(place / schedule / "metrics.csv").exists
        )  # of training, without what comes before
        good, turn = outcome(place / schedule), 0
        while turn < kills // 3 + (number < kills % 3):
            folder, deaths = place / f"{schedule}{turn}", 0
            shutil.rmtree(place / "cache" / "features", ignore_errors=True) if turn % 2 else None
            begun = (
                (folder / "metrics.csv").exists if turn % 5 != 4 else lambda: True
            )  # one in five is killed at any moment, the others while they train
            while (
                attempt(
                    lambda: work(folder, any((folder / "checkpoints").glob("[0-9]*"))),
                    random.uniform(0, seconds) if deaths < 1 + (turn % 3 == 0) else math.inf,
                    begun,
                )
                is None
            ):
                deaths += 1  # every third run is killed twice
            left = sorted(path.name for path in (folder / "checkpoints").iterdir())
            epochs = (folder / "metrics.csv").read_text().count("\n") - 1
            found = (outcome(folder), len(left), epochs)
            shutil.rmtree(folder)
            if not deaths:
                continue  # finished before it was killed: not counted
            turn, killed_times, same = (
                turn + 1,
                killed_times + deaths,
                same + (found == (good, 2, config.epochs)),
            )
            if found != (good, 2, config.epochs):
                print(f"{schedule} {turn}: {found}, expected {(good, 2, config.epochs)}")
        print(f"{schedule}: {seconds:.1f} s uninterrupted, {same} bit-identical results so far", flush=True)
    return same, killed_times


def writing(kills: int, place: Path) -> int:
    "Number of outputs of `kills` killed writers that hold every row once, as those of an uninterrupted writer"
    model, shapes, sound, turn = cg3d.load("nano"), furniture().select(split="test"), 0, 0
    source = collection_source(shapes, "furniture")
    source.table, source.stamps = source.table.iloc[:48].reset_index(drop=True), source.stamps[:48]
    vectors = np.random.default_rng(0).standard_normal((20_000, 64), dtype=np.float32)
    table = shapes.table.iloc[np.random.default_rng(1).integers(len(shapes), size=20_000)].assign(
        id=np.arange(20_000)
    )

    def embed(path):
        embed_source(source, model, path, batch_size=4)

    def index(path):
        ShapeIndex.from_embeddings(vectors, table, "f").save(path)

    def collect(path):
        write_collection(path, [shapes[i] for i in range(60)], n=1024)

    def read_embed(path):
        return (found := read_embeddings(path)).matrix, found.table["id"].tolist()

    def read_index(path):
        found = ShapeIndex.load(path)
        found.verify()
        return np.array(found.vectors), found.table["id"].tolist()

    def read_collect(path):
        return (found := read_collection(path)).points().numpy(), found.table["name"].tolist()

    def before(path):
        ShapeIndex.from_embeddings(vectors[:5000], table[:5000], "f").save(path)

    while turn < kills:
        write, read, name = (
            (embed, read_embed, "a.npz"),
            (index, read_index, "index"),
            (collect, read_collect, "collection"),
        )[turn % 3]
        path, whole = place / f"{turn}" / name, place / "whole" / f"{turn}" / name
        if write is index:
            before(path), before(whole)  # replaced by a larger one
        seconds = attempt(lambda: write(whole))
        good, killed = read(whole), attempt(lambda: write(path), random.uniform(0, seconds)) is None
        between = write is not index or len(read(path)[1]) in (
            5000,
            20_000,
        )  # a concurrent reader finds the old or the new index
        attempt(lambda: write(path))
        found = read(path)
        left = sorted(
            other.name
            for other in path.parent.iterdir()
            if other.name.endswith(".part") and not other.name.startswith(".")
        )
        shutil.rmtree(path.parent), shutil.rmtree(whole.parent)
        if not killed:
            continue
        turn += 1
        if (
            between
            and not left
            and np.allclose(found[0], good[0], atol=0 if write is not embed else 1e-6)
            and found[1] == good[1]
        ):
            sound += 1
        else:
            print(f"{name} {turn}: {len(found[1])} of {len(good[1])} rows, left {left}")
    return sound


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    (
        parser.add_argument("--kills", type=int, default=50),
        parser.add_argument("--writes", type=int, default=20),
        parser.add_argument("--seed", type=int, default=0),
    )
    arguments = parser.parse_args()
    random.seed(arguments.seed), torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        same, killed_times = training(arguments.kills, Path(folder))
        print(
            f"training: {same} of {arguments.kills} killed runs have a bit-identical result, after {killed_times} kills",
            flush=True,
        )
        sound = writing(arguments.writes, Path(folder))
        print(f"writing: {sound} of {arguments.writes} killed writers leave every row once")
    sys.exit((same, sound) != (arguments.kills, arguments.writes))
