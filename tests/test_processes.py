"""Several processes are one: gradients, losses of every kind, checkpoints; large batches in parts."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def start(launcher, *words, **environment):
    done = subprocess.run(
        [*launcher, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def gradients(launcher, folder, *words, **environment):
    start(launcher, HERE / "gradients_worker.py", folder, *words, **environment)
    return torch.load(folder / "gradients.pt", weights_only=True)


def furthest(a, b, part="gradients"):
    assert a[part].keys() == b[part].keys()
    return max((a[part][name] - b[part][name]).abs().max().item() for name in a[part])


@pytest.mark.parametrize(
    "encoder, more",
    [
        ("point_transformer_small drop_path=0", ["visual_prompt=deep"]),
        ("pointmlp_small", ["positives=similar", "hard_negatives=0.3", "visual_prompt=none"]),
    ],
)
def test_two_processes_of_32_have_the_gradients_of_one_of_64(tmp_path, encoder, more):
    one, two = (
        gradients(ONE, tmp_path / "one", encoder, 64, *more),
        gradients(TWO, tmp_path / "two", encoder, 32, *more),
    )
    assert (one["world"], two["world"]) == (1, 2)
    assert (
        max(value.abs().max().item() for value in one["gradients"].values()) > 0.1
        and furthest(one, two) < 1e-5
    )
    assert furthest(one, two, "buffers") < 1e-5  # batch norm has seen all 64


def test_a_batch_in_parts_has_the_gradients_of_the_whole(tmp_path):
    words = ["point_transformer_small drop_path=0", 64, "visual_prompt=deep"]
    whole, parts = (
        gradients(ONE, tmp_path / "whole", *words, STILL="1"),
        gradients(ONE, tmp_path / "parts", *words, "part=24", STILL="1"),
    )
    again = gradients(ONE, tmp_path / "again", *words, "checkpointing=True", STILL="1")
    assert max(furthest(whole, parts), furthest(whole, again)) < 1e-5


LOSSES = """
import itertools, json, sys, torch
from cg3d.losses import POSITIVES, TriModalLoss
from cg3d.processes import everyones, rank, total, world
if len(sys.argv) > 1: torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
sides, texts = torch.randn(3, 12, 16).requires_grad_(), ["a chair", "A chair ", "lamp", "bed"] * 3
mine = slice(rank() * 12 // world(), (rank() + 1) * 12 // world())
for positives, hard in itertools.product(POSITIVES, (0.0, 0.4)):
    sides.grad = None
    out = TriModalLoss(positives=positives, hard_negatives=hard)(*sides[:, mine], texts[mine])
    out["loss"].backward()
    said = total(out["loss"].detach()).item() / world(), (total(sides.grad) / world()).flatten().tolist()
    if not rank(): print(json.dumps([said[0], *said[1]]))
if world() > 1: torch.distributed.destroy_process_group()
"""


def test_every_kind_of_loss_is_that_of_the_whole_batch(tmp_path):
    (tmp_path / "losses.py").write_text(LOSSES)
    one, two = (
        torch.tensor([eval(line) for line in start(launcher, tmp_path / "losses.py", *words).splitlines()])
        for launcher, *words in ((ONE,), (TWO, "two"))
    )
    assert one.shape == (8, 1 + 3 * 12 * 16) and len({round(row[0], 4) for row in one.tolist()}) == 8
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def processes_with(word):
    "Numbers of the processes in whose command line the word stands"
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(word).encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def test_two_processes_killed_together_end_bit_identical(tmp_path):
    settings = {
        "epochs": 3,
        "limit": 64,
        "batch_size": 8,
        "views": 1,
        "view_size": 32,
        "points": 256,
        "encoder": "pointnet",
        "device": "cpu",
    }
    command = [
        *TWO,
        "-m",
        "cg3d.train",
        *(word for name, value in settings.items() for word in ("-p", name, str(value))),
    ]
    start(command, "-p", "out", tmp_path / "whole")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        [*command, "-p", "out", tmp_path / "killed"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    while not list(tmp_path.glob("killed/checkpoints/[0-9]*/manifest.json")) and killed.poll() is None:
        time.sleep(0.02)
    assert killed.poll() is None, "it came to its end before it was killed"
    os.killpg(killed.pid, signal.SIGKILL), killed.wait()
    while left := processes_with(tmp_path / "killed"):  # torchrun gives its workers sessions of their own
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.05)
    alone = subprocess.run(
        [
            *ONE,
            "-m",
            "cg3d.train",
            *command[len(TWO) + 2 :],
            "-p",
            "out",
            tmp_path / "killed",
            "-p",
            "resume",
            "true",
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert "the checkpoint is of 2 process(es), here are 1" in alone.stderr
    start(command, "-p", "out", tmp_path / "killed", "-p", "resume", "true")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "killed" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "killed" / "metrics.csv").read_text().count("\n") == 4
    shutil.rmtree(tmp_path)


def test_a_split_model_has_the_gradients_and_the_checkpoint_of_a_whole_one(tmp_path):
    words = ["point_transformer_small drop_path=0", 16, "visual_prompt=deep"]
    parts, halves = (
        gradients(TWO, tmp_path / "parts", *words),
        gradients(TWO, tmp_path / "halves", *words, "split=True"),
    )
    assert (
        furthest(parts, halves)
        < 1e-5
        < 0.1
        < max(value.abs().max().item() for value in parts["gradients"].values())
    )
    assert halves["held"] < 0.6 * parts["held"]  # weights that the first process keeps
    settings = {
        "limit": 48,
        "batch_size": 8,
        "views": 1,
        "view_size": 32,
        "points": 256,
        "encoder": "pointmlp_small",
        "device": "cpu",
        "ema": 0.9,
        "epochs": 2,
    }
    command = [
        "-m",
        "cg3d.train",
        *(word for name, value in settings.items() for word in ("-p", name, str(value))),
    ]
    start(TWO, *command, "-p", "out", tmp_path / "split", ACCELERATE_USE_FSDP="true")
    newest = max((tmp_path / "split" / "checkpoints").iterdir())
    shutil.rmtree(newest)  # as if the run had been killed before its last epoch
    (tmp_path / "split" / "model.safetensors").rename(tmp_path / "first.safetensors")
    start(TWO, *command, "-p", "out", tmp_path / "split", "-p", "resume", "true", "-p", "split", "true")
    assert (tmp_path / "first.safetensors").read_bytes() == (
        tmp_path / "split" / "model.safetensors"
    ).read_bytes()
