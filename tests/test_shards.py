"""Shapes in shards: training bit for bit, many processes through Ray, kill -9."""

import os
import shutil
import signal
import subprocess
import sys

import miniatures
import numpy as np
import pytest
import torch

from cg3d.core.errors import Cg3dError, DamagedFile, InputError, MissingFile, MissingPackage
from cg3d.data.furniture import furniture
from cg3d.data.registry import check_data, read_dataset
from cg3d.data.shard_writer import write_shards
from cg3d.data.shards import read_shards
from cg3d.data.triplets import Triplets, collate
from cg3d.io.collection import write_collection
from cg3d.models.clip_backbone import load_backbone
from cg3d.pretrained.factory import load
from cg3d.search.batch_embed import embed_source, open_source
from cg3d.search.embeddings import read_embeddings
from cg3d.search.ray import embed_with_ray, pack_with_ray, ray_cluster
from cg3d.training.config import TrainConfig
from cg3d.training.pretrain import make_learner, make_triplets, read_data

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def some():
    return furniture().select(np.arange(790) % 13 == 0)  # 61 shapes


@pytest.fixture(scope="module")
def shards(some, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(some, folder, per_shard=9, dtype="float32")
    return folder


def config_of(data, folder, **more):
    return TrainConfig(
        data=str(data),
        out=str(folder),
        train_split="train+val+test",
        limit=24,
        batch_size=8,
        epochs=2,
        points=128,
        encoder="pointnet",
        weight_3d_image=0,
        weight_image_text=0,
        visual_prompt="none",
        device="cpu",
        precision="fp32",
        **more,
    )


def fit(data, folder, **more):
    config = config_of(data, folder, **more)
    return (
        make_learner(
            config, folder, make_triplets(read_data(config.data), config, progress=False), progress=False
        )
        .fit()
        .model.encoder.state_dict()
    )


def test_the_learner_trains_from_a_folder_or_a_url_and_goes_on_bit_for_bit(some, shards, tmp_path):
    write_shards(some, "memory://some/where", per_shard=20, dtype="float32")
    config = config_of(shards, tmp_path)
    packed, ours = (
        make_triplets(data, config, progress=False).batch([0, 23, 5], 1)
        for data in (some, read_data(config.data))
    )
    assert (packed["points"] - ours["points"]).abs().max() < 1e-6 and all(
        packed[key] == ours[key] for key in ("texts", "id", "name")
    )
    folder, memory = fit(shards, tmp_path / "a"), fit("memory://some/where", tmp_path / "b")
    assert all(torch.equal(folder[name], memory[name]) for name in folder)
    shutil.rmtree(max(tmp_path.glob("a/checkpoints/[0-9]*")))  # back to the first epoch
    assert all(
        torch.equal(value, folder[name]) for name, value in fit(shards, tmp_path / "a", resume=True).items()
    )


def test_workers_of_a_data_loader_see_every_shape_once_and_the_same_items(shards):
    triplets = Triplets(read_shards(shards), points=64, views=0)
    loader = torch.utils.data.DataLoader(triplets, batch_size=7, num_workers=2, collate_fn=collate)
    batches = list(loader)
    assert [name for batch in batches for name in batch["id"]] == triplets.ids
    direct = triplets.batch(range(61))
    assert torch.equal(torch.cat([batch["points"] for batch in batches]), direct["points"])
    assert [text for batch in batches for text in batch["texts"]] == direct["texts"]


def test_frozen_training_takes_the_features_in_the_shards(some, tmp_path, monkeypatch):
    few, tower = some.select(np.arange(61) < 8), load_backbone("nano")
    write_shards(few, tmp_path / "s", backbone=tower, form="none", per_shard=5, views=2, size=32)
    monkeypatch.setattr(tower, "encode_image", None)
    config = TrainConfig(
        data=str(tmp_path / "s"),
        out=str(tmp_path / "r"),
        train_split="train+val+test",
        schedule="frozen",
        visual_prompt="none",
        weight_image_text=0,
        views=2,
        view_size=32,
        batch_size=4,
        epochs=1,
        points=128,
        encoder="pointnet",
        device="cpu",
        precision="fp32",
    )
    learner = make_learner(
        config, config.out, make_triplets(read_data(config.data), config, progress=False), progress=False
    )
    assert learner.data.batch([0, 3])["images"].shape == (2, tower.dim) and np.isfinite(
        learner.fit().logs["loss"]
    )
    with pytest.raises(MissingFile, match="features and no images"):
        make_triplets(read_data(config.data), config, progress=False).batch([0])


def test_shards_in_an_archive(shards, tmp_path):
    whole = read_shards(shards)
    shutil.make_archive(str(tmp_path / "s"), "zip", shards)
    packed = read_shards(f"zip://::file://{tmp_path}/s.zip")
    assert torch.equal(packed.points([60, 0, 30]), whole.points([60, 0, 30])) and packed.table.equals(
        whole.table
    )


def test_damage_is_told_with_shard_and_sample(some, tmp_path):
    write_shards(some.select(np.arange(61) < 6), tmp_path / "s", per_shard=3)
    tar, whole = tmp_path / "s" / "shard-000001.tar", (tmp_path / "s" / "shard-000001.tar").read_bytes()
    shards = read_shards(tmp_path / "s")
    at = int(shards.packed.start[4]) + 3000
    tar.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    read_shards(tmp_path / "s")[3]
    with pytest.raises(DamagedFile, match=r"shard-000001.tar: sample '.*checksum"):
        read_shards(tmp_path / "s")[4]
    tar.write_bytes(whole[:-512])
    with pytest.raises(DamagedFile, match="shard-000001.tar has"):
        read_shards(tmp_path / "s")
    tar.unlink()
    with pytest.raises(MissingFile, match="shard-000001.tar"):
        read_shards(tmp_path / "s")
    tar.write_bytes(whole)
    for file in ("index.parquet", "manifest.json"):
        good = (tmp_path / "s" / file).read_bytes()
        for bad in (
            b"",
            good[:-20],
            b"[" * 50_000,
            b'{"shards": [{"file": "../../etc/passwd"}], "index": {}}',
        ):
            (tmp_path / "s" / file).write_bytes(bad)
            with pytest.raises(Cg3dError):
                read_shards(tmp_path / "s")
        (tmp_path / "s" / file).write_bytes(good)
    read_shards(tmp_path / "s")


def test_a_published_set_travels_with_its_labels_and_pictures(tmp_path):
    miniatures.cg3d(tmp_path / "raw")
    published = read_dataset(tmp_path / "raw")
    write_shards(published, tmp_path / "s", per_shard=3, points=published.points_per_shape, views=3, size=32)
    again = read_dataset(tmp_path / "s")
    assert (
        check_data(tmp_path / "s").ok
        and again.labels == published.labels
        and again.table["id"].tolist() == published.table["id"].tolist()
        and "file" not in again.table
    )
    assert (again.points([0, 1]) - published.points([0, 1])).abs().max() < 1e-3
    assert (again.views(3, 32)[[0, 1], [2, 1]] - published.views(3, 32)[[0, 1], [2, 1]]).abs().max() < 1 / 255


def test_a_broken_file_costs_a_line_in_the_manifest(some, tmp_path):
    (tmp_path / "raw").mkdir()
    for i in range(3):
        np.save(tmp_path / "raw" / f"{i}.npy", some[i].points)
    (tmp_path / "raw" / "1.npy").write_text("no array")
    shards = write_shards(open_source(tmp_path / "raw"), tmp_path / "s", per_shard=2)
    assert (
        shards.table["id"].tolist() == ["0.npy", "2.npy"]
        and [name for name, _ in shards.manifest["problems"]] == ["1.npy"]
        and "path" not in shards.table
    )
    assert (
        (shards[1].cloud(2048)[:, :3] - some[2].cloud(2048)[:, :3]).abs().max() < 1e-3
        and shards[1].colors is None
        and shards.words(1)["colors"] == []
    )
    for i in (0, 2):
        (tmp_path / "raw" / f"{i}.npy").write_text("no array")
    with pytest.raises(InputError, match="none of the 3 shapes"):
        write_shards(open_source(tmp_path / "raw"), tmp_path / "t")
    assert not list((tmp_path / "t").iterdir())


class FailingSource:
    "A collection of which the second shape raises an error."

    def __init__(self, shapes, error):
        self.shapes, self.error, self.name, self.table, self.tried = shapes, error, "failing", shapes.table, 0

    def __len__(self):
        return len(self.shapes)

    def read(self, row):
        self.tried += 1
        if row >= 1 and self.error:
            raise self.error
        return self.shapes[row]


def test_a_problem_of_the_shape_costs_a_line_and_a_problem_of_the_program_stops(some, tmp_path):
    few = some.select(np.arange(61) < 6)
    source = FailingSource(few, InputError("points hold NaN; mend the file"))
    shards = write_shards(source, tmp_path / "a", per_shard=3)
    assert len(shards) == 1 and len(shards.manifest["problems"]) == 5
    source = FailingSource(few, KeyError("a mistake in a program"))
    with pytest.raises(KeyError, match="a mistake"):
        write_shards(source, tmp_path / "b", per_shard=3)
    assert source.tried == 2


def out_of_memory(kind):
    "Memory that runs out, as the libraries report it."
    if kind == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if kind == "cpu":
        return RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    if kind == "file":  # as `cg3d.core.untrusted.refusal` wraps it
        error = InputError("a.ply: needs more memory than there is")
        error.__cause__ = MemoryError()
        return error
    return MemoryError()


@pytest.mark.parametrize("kind", ["cuda", "cpu", "file", "python"])
def test_exhausted_memory_is_told_once_and_the_same_call_continues(some, tmp_path, kind):
    few = some.select(np.arange(61) < 6)
    source = FailingSource(few, out_of_memory(kind))
    with pytest.raises(Cg3dError, match="out of memory while shard 0 was made.*the same call continues"):
        write_shards(source, tmp_path / "s", per_shard=3)
    assert source.tried == 2 and not (tmp_path / "s" / "manifest.json").exists()
    source.error = None
    assert len(write_shards(source, tmp_path / "s", per_shard=3)) == 6


def test_a_full_gpu_halves_the_batch_of_views(some, tmp_path, monkeypatch):
    few, tower, sizes = some.select(np.arange(61) < 2), load_backbone("nano"), []
    encode = tower.encode_image

    def small_gpu(images):
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(images)

    options = {"backbone": tower, "form": "none", "views": 3, "size": 32}
    whole = write_shards(few, tmp_path / "a", **options)
    monkeypatch.setattr(tower, "encode_image", small_gpu)
    halved = write_shards(few, tmp_path / "b", **options)
    assert sizes == [3, 1, 2, 1, 1] * 2
    for row in range(2):
        cosine = (halved.features(row)["views"] * whole.features(row)["views"]).sum(1, dtype=np.float32)
        norms = np.linalg.norm(whole.features(row)["views"].astype(np.float32), axis=1) ** 2
        assert halved.features(row)["views"].shape == (3, tower.dim) and np.allclose(
            cosine / norms, 1, atol=1e-2
        )
    monkeypatch.setattr(tower, "encode_image", lambda images: small_gpu(images.repeat(2, 1, 1, 1)))
    with pytest.raises(Cg3dError, match="out of memory"):
        write_shards(few, tmp_path / "c", **options)


def ours(pid):
    "Processes below this one"
    table = [
        line.split()
        for line in subprocess.run(
            ["ps", "-eo", "pid,ppid"], capture_output=True, text=True
        ).stdout.splitlines()[1:]
    ]
    below = {str(pid)}
    while more := {child for child, parent in table if parent in below} - below:
        below |= more
    return below - {str(pid)}


KILLED = """
import sys, time
from cg3d.pretrained.factory import load
from cg3d.search.batch_embed import open_source
from cg3d.search.ray import embed_with_ray

calls = []


def wait_at_third(count):
    calls.append(count)
    if len(calls) == 3:
        print("waiting", flush=True)
        time.sleep(600)


folder = sys.argv[1]
embed_with_ray(
    open_source(folder + "/some"),
    load("nano"),
    folder + "/e.parquet",
    name="nano",
    batch_size=2,
    settings={"up": ""},
    on_progress=wait_at_third,
)
"""


def test_many_processes_killed_and_started_again_have_every_shape_once(some, tmp_path):
    pytest.importorskip("ray")
    write_collection(tmp_path / "some", some)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "1"},
    )
    assert child.stdout.readline() == "waiting\n"  # two pieces are done
    family = ours(child.pid)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "e.parquet").exists() and family
    source, model, done = open_source(f"{tmp_path}/some"), load("nano"), []
    with ray_cluster(2) as ray:
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        report = embed_with_ray(
            source,
            model,
            tmp_path / "e.parquet",
            name="nano",
            batch_size=2,
            settings={"up": ""},
            on_progress=done.append,
        )
        pack_with_ray(some, tmp_path / "many", per_shard=16, views=1, size=16)
    assert not ray.is_initialized()
    serial = embed_source(source, model, tmp_path / "serial.parquet", name="nano", batch_size=2)
    many = read_embeddings(tmp_path / "e.parquet")
    assert report.resumed == 16 and done[0] == report.resumed and sum(done) == 61
    assert many.table["id"].tolist() == serial.embeddings.table["id"].tolist() == source.table["id"].tolist()
    assert np.abs(many.matrix - serial.embeddings.matrix).max() < 1e-6
    write_shards(some, tmp_path / "one", per_shard=16, views=1, size=16)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()
    }
    left = {pid: open(f"/proc/{pid}/cmdline").read() for pid in family if os.path.exists(f"/proc/{pid}")}
    for pid, command in left.items():
        if command.startswith("ray::"):
            os.kill(
                int(pid), signal.SIGKILL
            )  # Ray's own agents may outlive a kill -9; nothing that works does
    assert not [
        command
        for command in left.values()
        if "raylet/raylet" in command or "gcs_server" in command or "Worker" in command
    ]


def test_without_ray_it_is_said_what_to_install(some, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"pip install '.*\[scale\]'"):
        pack_with_ray(some, tmp_path / "s")
