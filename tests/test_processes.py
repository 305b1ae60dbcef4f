"""Several processes give the results of one: gradients, losses, checkpoints; large batches in parts."""

import contextlib
import json
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
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
    *("--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]
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
        ("pointnet", ["positives=decoupled", "views=3", "views_per_step=2", "texts_per_step=2"]),
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


@pytest.mark.parametrize(
    "several", [[], ["positives=decoupled", "views=2", "views_per_step=2", "texts_per_step=3"]]
)
def test_a_batch_in_parts_has_the_gradients_of_the_whole(tmp_path, several):
    words = ["point_transformer_small drop_path=0", 64 if not several else 16, "visual_prompt=deep", *several]
    whole, parts = (
        gradients(ONE, tmp_path / "whole", *words, STILL="1"),
        gradients(ONE, tmp_path / "parts", *words, f"part={words[1] * 3 // 8}", STILL="1"),
    )
    again = gradients(ONE, tmp_path / "again", *words, "checkpointing=True", STILL="1")
    assert max(furthest(whole, parts), furthest(whole, again)) < 1e-5


LOSSES = """
import itertools, json, sys
import torch
from cg3d.core.distributed import all_gather_with_grad, all_reduce_sum, rank, world_size
from cg3d.training.losses import POSITIVES, TriModalLoss

if len(sys.argv) > 1:
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
sides = torch.randn(3, 12, 16).requires_grad_()
texts = ["a chair", "A chair ", "lamp", "bed"] * 3
own = slice(rank() * 12 // world_size(), (rank() + 1) * 12 // world_size())
for positives, hard in itertools.product(POSITIVES, (0.0, 0.4)):
    sides.grad = None
    out = TriModalLoss(positives=positives, hard_negatives=hard)(*sides[:, own], texts[own])
    out["loss"].backward()
    loss = all_reduce_sum(out["loss"].detach()) / world_size()
    gradient = all_reduce_sum(sides.grad) / world_size()
    if not rank():
        print(json.dumps([loss.item(), *gradient.flatten().tolist()]))
groups = [torch.randn(12, count, 16).requires_grad_() for count in (1, 3, 2)]
pairs = [(text, f"{text} {i % 5}") for i, text in enumerate(texts)]
for positives, hard in itertools.product(("caption", "masked", "diagonal", "decoupled"), (0.0, 0.4)):
    for side in groups:
        side.grad = None
    points, image, text = (side[own] for side in groups)
    out = TriModalLoss(positives=positives, hard_negatives=hard)(points[:, 0], image, text, pairs[own])
    out["loss"].backward()
    loss = all_reduce_sum(out["loss"].detach()) / world_size()
    gradient = all_reduce_sum(torch.cat([side.grad for side in groups], 1).flatten()) / world_size()
    if not rank():
        print(json.dumps([loss.item(), *gradient[: 3 * 12 * 16].tolist()]))
if world_size() > 1:
    torch.distributed.destroy_process_group()
"""


def test_every_kind_of_loss_is_that_of_the_whole_batch(tmp_path):
    (tmp_path / "losses.py").write_text(LOSSES)
    one, two = (
        torch.tensor(
            [json.loads(line) for line in start(launcher, tmp_path / "losses.py", *words).splitlines()]
        )
        for launcher, *words in ((ONE,), (TWO, "two"))
    )
    assert one.shape == (18, 1 + 3 * 12 * 16)
    different = len({round(row[0], 4) for row in one.tolist()})
    assert different == 16  # with one view and one text, decoupled is masked
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


HELPERS = """
import json
import torch
import torch.distributed as dist
from torch import nn
from cg3d.core.distributed import *

dist.init_process_group("gloo")
result = {}

# the gradient by a reduce-scatter, which is what GPUs use, and by an all-reduce
get_backend = dist.get_backend
for backend in ("gloo", "nccl"):
    dist.get_backend = lambda name=backend: name
    for kind in (torch.float32, torch.bfloat16):
        rows = (torch.arange(6.0).view(2, 3) + 10 * rank()).to(kind).requires_grad_()
        gathered = all_gather_with_grad(rows)
        (gathered * torch.arange(12).view(4, 3) * (1 + rank())).sum().backward()
        result[f"{backend} {kind}"] = [gathered.tolist(), all_gather_object(rows.grad.tolist())]
dist.get_backend = get_backend

# no plain gradient beside sharded ones: nothing asks for the norm of an empty list
layer = nn.Linear(8, 4)
broadcast_module(layer)
shard_module(layer)
layer(torch.ones(2, 8)).sum().backward()
lists, total_norm = [], nn.utils.get_total_norm
nn.utils.get_total_norm = lambda gradients: (lists.append(len(gradients)), total_norm(gradients))[1]
frozen = nn.Parameter(torch.ones(1))
before = clip_gradients([*layer.parameters(), frozen], 1.0)
result["norm"] = [before, clip_gradients(list(layer.parameters()), 9.0)]
result["lists"] = lists

# whole tensors are on rank 0 only
whole = full_tensors({"w": [layer.weight, torch.ones(3)], "step": 7})
result["whole"] = all_gather_object([whole["w"][0].numel(), whole["w"][1].numel(), whole["step"]])
like = shard_like(torch.arange(32.0).view(4, 8), layer.weight)
result["like"] = all_gather_object(like.to_local().flatten().tolist())

if not rank():
    print(json.dumps(result))
dist.barrier()  # no process closes its connections while another one still uses them
dist.destroy_process_group()
"""


def test_collectives_and_sharded_tensors(tmp_path):
    (tmp_path / "helpers.py").write_text(HELPERS)
    first = json.loads(start(TWO, tmp_path / "helpers.py"))
    rows = torch.cat([torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3) + 10])
    gradient = 3 * torch.arange(12.0).view(2, 2, 3)
    for backend in ("gloo", "nccl"):
        for kind in ("float32", "bfloat16"):
            assert first[f"{backend} torch.{kind}"] == [rows.tolist(), gradient.tolist()]
    norm = (36 * 2.0**2) ** 0.5  # 32 weights and 4 biases, each with the gradient 2
    assert first["norm"] == pytest.approx([norm, 1.0], abs=1e-5) and first["lists"] == [2, 2]
    assert first["whole"] == [[32, 3, 7], [0, 3, 7]]
    assert first["like"] == [list(range(16)), list(range(16, 32))]


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


SMALL = {"limit": 32, "batch_size": 8, "views": 1, "view_size": 32, "points": 256, "encoder": "pointnet"}
SMALL |= {"device": "cpu", "precision": "fp32"}
TRAIN = ["-m", "cg3d.train", *(word for name, value in SMALL.items() for word in ("-p", name, str(value)))]


def test_accelerate_launch_trains_as_torchrun_does(tmp_path):
    """Two CPU processes over Gloo; `--multi_gpu` means several processes, with `--cpu` accelerate wants mpirun."""
    command = [*TRAIN, "-p", "epochs", 1, "-p", "schedule", "frozen", "-p", "visual_prompt", "none"]
    environment = {"CG3D_CACHE": str(tmp_path / "cache")}  # both processes need views and features at once
    output = start(ACCELERATE, *command, "-p", "out", tmp_path / "accelerate", **environment)
    assert output.startswith(f"results: {tmp_path / 'accelerate'}\n") and "3D encoder" in output
    assert output.count("majority class") == 1  # the first process tests alone
    start(TWO, *command, "-p", "out", tmp_path / "torchrun", **environment)
    models = [tmp_path / name / "model.safetensors" for name in ("accelerate", "torchrun")]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2


def test_an_interrupt_of_one_process_stops_all_after_the_same_step(tmp_path):
    folder = tmp_path / "run"
    running = subprocess.Popen(
        [*TWO, *TRAIN, "-p", "epochs", "2000", "-p", "out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not list(folder.glob("checkpoints/[0-9]*/manifest.json")) and running.poll() is None:
        time.sleep(0.02)
    workers = [number for number in processes_with(folder) if number != running.pid]
    environments = {number: Path(f"/proc/{number}/environ").read_bytes().split(b"\0") for number in workers}
    (second,) = [number for number, words in environments.items() if b"RANK=1" in words]
    os.kill(second, signal.SIGINT)
    output, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors[-3000:]
    assert output.count("finishing the step") == 1 and "3D encoder" in output
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert 0 < steps[-1] < 4000
