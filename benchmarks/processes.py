"""Training on several processes: equal gradients, shorter steps, and only the local rows of the logits per process. `python benchmarks/processes.py [--quick]`

Processes of this machine's CPU, one thread each, over Gloo. Between GPUs the same code runs over NCCL: `accelerate launch -m cg3d.train -f recipe.yaml`.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from harness import Row, report
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cg3d.core.distributed import average_gradients, rank, world_size
from cg3d.core.malloc import keep_freed_memory
from cg3d.core.timing import seconds
from cg3d.training.config import TrainConfig
from cg3d.training.losses import TriModalLoss
from cg3d.training.pretrain import make_learner, make_triplets, read_data

GLOBAL = 64  # shapes a step, of all processes together


class Largest(TorchDispatchMode):
    """While inside: the bytes of the largest tensor that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.bytes = max(
            [
                self.bytes,
                *(
                    leaf.numel() * leaf.element_size()
                    for leaf in tree_leaves(out)
                    if isinstance(leaf, torch.Tensor)
                ),
            ]
        )
        return out


def work(number: int, processes: int, folder: str, steps: int, encoder: str) -> None:
    """What one process does; rank 0 writes the findings to `folder`/found.json."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet{processes}", rank=number, world_size=processes
        )
    config = TrainConfig(
        encoder=encoder,
        visual_prompt="none",
        schedule="frozen",
        augment="none",
        views=1,
        view_size=32,
        points=512,
        limit=128,
        batch_size=GLOBAL // processes,
        epochs=steps + 1,
        device="cpu",
        precision="fp32",
        out=f"{folder}/run{processes}",
    )
    learner = make_learner(
        config, config.out, make_triplets(read_data("furniture"), config, progress=False), progress=False
    )
    learner.callbacks.clear()
    took, message = [], []
    with keep_freed_memory():  # as `fit` does
        for _ in range(steps + 1):
            took.append(seconds(learner.one_step))
            message.append(seconds(lambda: average_gradients(list(learner.model.encoder.parameters()))))
    learner.reader.shutdown(cancel_futures=True)
    torch.manual_seed(0)
    rows = torch.randn(3, 1024 // processes, 512).requires_grad_()
    with Largest() as largest:
        TriModalLoss()(*rows, [f"caption {i}" for i in range(len(rows[0]))])["loss"].backward()
    if not rank():
        gradients = sum(value.numel() * 4 for value in learner.model.encoder.parameters())
        Path(folder, "found.json").write_text(
            json.dumps(
                {
                    "step": statistics.median(took[1:]),
                    "message": statistics.median(message[1:]),
                    "largest": largest.bytes,
                    "gradients": gradients,
                }
            )
        )
    if world_size() > 1:
        dist.destroy_process_group()


def run(processes: int, steps: int, encoder: str) -> dict:
    """Start so many processes and wait for what they found."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            work, (processes, folder, steps, encoder), nprocs=processes, start_method="spawn"
        )
        return json.loads(Path(folder, "found.json").read_text())


def measure(quick: bool) -> list[Row]:
    """Training steps and the loss on one process and on two."""
    rounds, steps, encoder = (1, 2, "pointnet") if quick else (5, 6, "point_transformer_small")
    pairs = [(run(1, steps, encoder), run(2, steps, encoder)) for _ in range(rounds)]
    ratios = [one["step"] / two["step"] for one, two in pairs]
    two, word = pairs[-1][1], f"{encoder}, {GLOBAL} shapes of 512 points a step"
    share = statistics.median(found["message"] / found["step"] for _, found in pairs)
    curve = [
        Row(
            "processes",
            f"{word}, one thread each",
            1e3 * statistics.median(found["step"] for found in side),
            "ms",
            along="processes",
            at=count,
        )
        for count, side in zip((1, 2), zip(*pairs))
    ]
    return curve + [
        Row(
            "processes",
            f"{word}, 2 processes x 1 thread",
            curve[1].value,
            "ms",
            "1 process x 1 thread",
            statistics.median(ratios),
            min(ratios),
            max(ratios),
            note="2 would be perfect; the processes share this machine's memory",
        ),
        Row(
            "processes",
            f"gradients of {two['gradients'] / 2**20:.1f} MiB averaged in one message: share of a step",
            100 * share,
            "%",
        ),
        Row(
            "processes",
            "largest tensor of the tri-modal loss, 1,024 x 512, on each of 2 processes",
            two["largest"] / 2**20,
            "MiB",
            note=f"{pairs[-1][0]['largest'] / 2**20:.3g} MiB on one process: the table is local x global, never square",
            target="half the square",
            met=two["largest"] <= pairs[-1][0]["largest"] / 2,
        ),
    ]


if __name__ == "__main__":
    report(measure)
