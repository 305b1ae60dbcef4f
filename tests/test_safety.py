"""Full disks, folders that may not be written, damaged checkpoints, signals, numbers that are none: nothing is lost, and one readable line says what to do."""

import io
import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_learner import Strike, backbone, config, learner, toys, weights  # noqa: F401

from cg3d.cli import jobs as runjob
from cg3d.core.atomic import exclusive_lock, read_manifest, reserve
from cg3d.core.errors import CannotWrite, Cg3dError, DamagedFile, PathTaken
from cg3d.search.index import ShapeIndex
from cg3d.training.callbacks import Checkpoint
from cg3d.training.config import TrainConfig
from cg3d.training.learner import Callback


@pytest.fixture(scope="module")
def half(toys, backbone, tmp_path_factory):  # noqa: F811
    """A run that was struck at step 3 of 6 (it keeps the checkpoints of steps 2 and 3), and the same one undisturbed."""
    folder = tmp_path_factory.mktemp("half")
    chosen = TrainConfig(
        data=toys,
        encoder="pointnet",
        clip_weights="random",
        points=64,
        views=2,
        view_size=32,
        epochs=3,
        batch_size=4,
        ema=0.9,
        augment="summary",
        device="cpu",
        precision="fp32",
        out=str(folder / "run"),
    )
    learner(chosen, backbone, Strike(3)).fit()
    return chosen, learner(replace(chosen, out=str(folder / "whole")), backbone).fit()


@pytest.fixture
def struck(half, tmp_path):
    """A fresh copy of that run; its settings for going on."""
    shutil.copytree(half[0].out, tmp_path / "run")
    return replace(half[0], out=str(tmp_path / "run"), resume=True)


def same_end(config, half, backbone):  # noqa: F811
    again = learner(config, backbone).fit()
    assert all(torch.equal(value, weights(half[1])[name]) for name, value in weights(again).items())
    assert (Path(config.out) / "model.safetensors").read_bytes() == (
        Path(half[1].config.out) / "model.safetensors"
    ).read_bytes()
    assert [line.split(",")[1] for line in (Path(config.out) / "metrics.csv").read_text().splitlines()] == [
        "step",
        "2",
        "4",
        "6",
    ]


class Full(Callback):
    """From a step on, no file may grow beyond `room` bytes: what a full disk does, without a disk."""

    def __init__(self, at, room=20_000):
        self.at, self.room = at, room

    def after_step(self, learner):
        if learner.step == self.at:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (self.room, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )


def test_a_full_disk_costs_nothing_that_was_saved(struck, half, backbone):  # noqa: F811
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CannotWrite, match="free space"):
            learner(struck, backbone, Full(5)).fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(Path(struck.out).glob("**/*.part"))
    same_end(struck, half, backbone)


def test_space_is_taken_before_it_is_mapped(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(CannotWrite, match="views.npy cannot be written"):
            reserve(tmp_path / "views.npy", 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_place_that_may_not_be_written(config, backbone):  # noqa: F811
    with pytest.raises(CannotWrite, match="choose another place"):
        learner(replace(config, out="/proc/cg3d/run"), backbone)  # not even root may


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "bit": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "manifest empty": lambda file: (file.parent / "manifest.json").write_bytes(b""),
    "manifest gone": lambda file: (file.parent / "manifest.json").unlink(),
    "manifest zeros": lambda file: (file.parent / "manifest.json").write_bytes(bytes(300)),
    "manifest of another": lambda file: shutil.copy(
        file.parents[1] / "00000002" / "manifest.json", file.parent
    ),
    "nothing": lambda file: (shutil.rmtree(file.parent), file.parent.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_left_out(struck, damage, capsys):
    folder = Path(struck.out)

    def state(step):
        return read_manifest(folder / "checkpoints" / step)["files"]["state.pt"]["file"]

    assert Checkpoint(folder).read_newest(torch.device("cpu"))["step"] == 3
    DAMAGES[damage](state("00000003"))
    assert (
        Checkpoint(folder).read_newest(torch.device("cpu"))["step"] == 2
        and "skipped" in capsys.readouterr().out
    )
    flip(state("00000002"))
    with pytest.raises(DamagedFile, match="resume=False"):
        Checkpoint(folder).read_newest(torch.device("cpu"))


def test_what_else_was_lost_is_written_again(struck, half, backbone):  # noqa: F811
    folder = Path(struck.out)
    flip(read_manifest(folder / "checkpoints" / "00000003")["files"]["state.pt"]["file"])
    with (folder / "metrics.csv").open("ab") as file:
        file.write(b"2,4,1.5,0.1\0\0\0\0")
    same_end(struck, half, backbone)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    (folder / "model.safetensors").write_bytes(b"")  # the last write of a finished run did not arrive
    same_end(struck, half, backbone)
    assert (
        sorted(path.name for path in (folder / "checkpoints").iterdir()) == kept == ["00000004", "00000006"]
    )


def test_a_second_job_is_refused(struck, backbone):  # noqa: F811
    lock, before = (
        exclusive_lock(struck.out),
        {path: path.stat().st_mtime_ns for path in Path(struck.out).rglob("*")},
    )
    with pytest.raises(PathTaken, match="another job"):
        learner(struck, backbone).fit()
    assert {path: path.stat().st_mtime_ns for path in Path(struck.out).rglob("*")} == before
    lock.release()


class Send(Callback):
    def __init__(self, *numbers):
        self.numbers = numbers

    def after_step(self, learner):
        if learner.step == 5:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)], ids=str
)
def test_a_scheduler_that_ends_the_job(struck, half, backbone, numbers):  # noqa: F811
    with pytest.raises(SystemExit) as left:
        learner(struck, backbone, Send(*numbers)).fit()
    assert (
        left.value.code == 143
        and max(path.name for path in (Path(struck.out) / "checkpoints").iterdir()) == "00000005"
    )
    same_end(struck, half, backbone)


def test_a_gradient_that_is_no_number_changes_nothing(config, backbone, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        "cg3d.training.learner.all_gather_object", lambda mine: [mine, ["of another process"]]
    )
    run, seen = learner(config, backbone), []
    first = next(run.model.encoder.parameters())
    handle = first.register_hook(lambda gradient: gradient * torch.nan if run.step == 2 else gradient)

    class Look(Callback):
        def before_step(self, learner):
            self.was = (
                weights(learner),
                json.dumps(
                    [
                        sorted(map(str, optimizer.state_dict()["state"].values()))
                        for optimizer in learner.optimizers
                    ]
                ),
            )

        def after_step(self, learner):
            now = (
                weights(learner),
                json.dumps(
                    [
                        sorted(map(str, optimizer.state_dict()["state"].values()))
                        for optimizer in learner.optimizers
                    ]
                ),
            )
            seen.append(
                all(torch.equal(value, now[0][name]) for name, value in self.was[0].items())
                and self.was[1] == now[1]
            )

    run.callbacks.append(Look())
    run.fit()
    handle.remove()
    (line,) = map(json.loads, (Path(config.out) / "skipped.jsonl").read_text().splitlines())
    assert seen == [False, False, True, False, False, False] and run.skipped == 1
    assert (
        line["step"] == 2
        and "gradient" in line["trouble"]
        and len(line["ids"]) == 5
        and line["ids"][-1] == "of another process"
    )


CELL = """
import os, signal, time
from pathlib import Path
got = []
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda number, frame: got.append(number))
print("ready", flush=True)
while not got: time.sleep(0.01)
Path(out).with_suffix(".saved").write_text(signal.Signals(got[0]).name)
if got[0] == signal.SIGTERM: raise SystemExit(143)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_program_reaches_the_notebook(tmp_path, monkeypatch, name):
    cells = [
        {
            "cell_type": "code",
            "id": str(i),
            "metadata": {"tags": tags},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for i, (tags, source) in enumerate(
            [(["parameters"], 'out: str = "x"  # folder'), ([], CELL), ([], "print('after')")]
        )
    ]
    (tmp_path / "job.ipynb").write_text(
        json.dumps(
            {
                "nbformat": 4,
                "nbformat_minor": 5,
                "metadata": {
                    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
                },
                "cells": cells,
            }
        )
    )
    monkeypatch.setattr(runjob, "job_notebook", lambda job: tmp_path / "job.ipynb")

    class Said(io.StringIO):
        def write(self, text):
            if "ready" in text:
                os.kill(os.getpid(), getattr(signal, name))
            return super().write(text)

    before, said = signal.getsignal(signal.SIGTERM), Said()
    with pytest.raises(runjob.JobError, match="was interrupted; what it has saved"):
        runjob.run_job("train", {"out": str(tmp_path / "run")}, stream=said)
    assert (
        (tmp_path / "run.saved").read_text() == name
        and ("after" in said.getvalue()) == (name == "SIGINT")
        and signal.getsignal(signal.SIGTERM) is before
    )


def test_a_damaged_folder_is_written_again(tmp_path):
    import pandas as pd

    index = ShapeIndex.from_embeddings(
        np.eye(4, dtype=np.float32), pd.DataFrame({"id": list("abcd"), "name": "x"}), "f"
    )
    index.save(tmp_path / "index")
    (tmp_path / "index" / "manifest.json").write_bytes(bytes(200))
    with pytest.raises(Cg3dError, match="write it again"):
        ShapeIndex.load(tmp_path / "index")
    index.save(tmp_path / "index")
    assert ShapeIndex.load(tmp_path / "index").search(np.eye(4, dtype=np.float32)[:1], 1)["id"].tolist() == [
        "a"
    ]


def test_every_refusal_is_one_line():
    """In IPython too, which asks errors how they want to be shown."""
    error = DamagedFile("x is cut short; write it again")
    assert error._render_traceback_() == ["DamagedFile: x is cut short; write it again"]
