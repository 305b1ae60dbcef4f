"""The 3D encoders compared with the published implementations: forward and backward at published sizes, the lower bound, scaling with points and clouds.

    python benchmarks/encoders.py [--quick] [--out rows.json]

Batch 16, 1,024 points, xyz and rgb, training mode, float32, two threads, with freed memory kept by the process as in training (`cg3d.core.malloc`), for both. On a machine with a CUDA device the same command also compares
bfloat16 with `torch.compile` to float32 (target on an H100: 3 times as fast)."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from harness import Row, report, row
from published_encoders import published

from cg3d.core.malloc import keep_freed_memory
from cg3d.core.timing import compare, peaks, seconds
from cg3d.models.layers import compile_encoder, group_points
from cg3d.models.registry import create_encoder

PART, NAMES, THREADS = "encoders", ("pointmlp", "point_transformer"), 2


def cloud(batch: int, points: int, device: str = "cpu") -> torch.Tensor:  # (B, N, 6)
    "Points in a shell, and their colors"
    draw = torch.Generator().manual_seed(batch * points)
    direction = torch.nn.functional.normalize(torch.randn(batch, points, 3, generator=draw), dim=-1)
    return torch.cat(
        [
            direction * (0.5 + 0.5 * torch.rand(batch, points, 1, generator=draw)),
            torch.rand(batch, points, 3, generator=draw),
        ],
        -1,
    ).to(device)


def step(encoder, points: torch.Tensor, run=None) -> None:
    "Forward, by `run` if it is given, and backward"
    encoder.zero_grad(set_to_none=True)
    (run or encoder)(points).float().square().sum().backward()


def pair(name: str, device: str = "cpu") -> tuple[torch.nn.Module, torch.nn.Module]:
    "Ours and the published layout, one set of weights"
    torch.manual_seed(0)
    ours = create_encoder(name).to(device)
    return ours, published(name, ours)


def warmed(encoder, points: torch.Tensor):
    "The compiled encoder, its batch norm past the steps that are not compiled"
    for _ in range(10):
        encoder(points[:2])
    return compile_encoder(encoder)


def same(ours, other, points: torch.Tensor) -> float:  # largest difference; an error beyond 1e-4
    "The same answer?"
    with torch.no_grad():
        difference = (ours.eval()(points) - other.eval()(points)).abs().max().item()
    assert difference < 1e-4, f"the two layouts differ by {difference}"
    ours.train(), other.train()
    return difference


def against_published(
    name: str, batch: int, points: int, rounds: int, ceiling: tuple[float, float]
) -> list[Row]:
    ours, other = pair(name)
    xyz = cloud(batch, points)
    difference, size = same(ours, other, xyz), f"{name}, forward + backward, {batch} x {points:,} points"
    rows = [
        row(
            PART,
            size,
            compare(lambda: step(ours, xyz), lambda: step(other, xyz), rounds),
            "the published layout",
            at_least=1.5 if batch == 16 else None,
            per=batch,
            note=f"ms a cloud; {THREADS} threads; outputs differ by {difference:.0e}",
        )
    ]
    torch.set_num_threads(1)
    times = compare(lambda: step(ours, xyz), lambda: step(other, xyz), rounds, clock=time.process_time)
    rows.append(
        row(
            PART,
            size + ", processor time",
            times,
            "the published layout",
            at_least=1.5 if batch == 16 else None,
            per=batch,
            note="ms a cloud; one thread, time of other programs not counted",
        )
    )
    work, traffic = operations(ours, xyz), moved(ours, xyz)
    floor = work / ceiling[0] + traffic / ceiling[1]
    rows.append(
        Row(
            PART,
            size + ", share of the floor",
            floor / statistics.median(times.ours),
            "of 1",
            note=f"floor {floor:.2f} s on one thread: {work / 1e9:,.0f} G operations at {ceiling[0] / 1e9:.0f} G/s, "
            f"{traffic / 2**30:.1f} GiB kept for the way back, written and read once, at {ceiling[1] / 1e9:.1f} GB/s; the published layout needs {operations(other, xyz) / 1e9:,.0f} G operations",
        )
    )
    torch.set_num_threads(THREADS)
    return rows


def operations(encoder, points: torch.Tensor) -> int:
    "Floating point operations of products, forward and backward"
    with FlopCounterMode(display=False) as counted:
        step(encoder, points)
    return counted.get_total_flops()


def moved(encoder, points: torch.Tensor) -> int:  # bytes
    "What the backward pass needs of the forward pass, once out and once in"
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(points)
    return 2 * sum(kept.values())


def other_ways(name: str, batch: int, points: int, rounds: int) -> list[Row]:
    "bfloat16 and torch.compile on the CPU"
    ours, _ = pair(name)
    xyz = cloud(batch, points)
    quick = warmed(ours, xyz)

    def half():
        with torch.autocast("cpu", torch.bfloat16):
            step(ours, xyz)

    return [
        row(
            PART,
            f"{name}, forward + backward, {batch} x {points:,} points, {what}",
            compare(run, lambda: step(ours, xyz), rounds, 2),
            "float32, eager",
            per=batch,
            note=f"ms a cloud; {THREADS} threads",
        )
        for what, run in (("bfloat16 autocast", half), ("torch.compile", lambda: step(ours, xyz, quick)))
    ]


def neighbors_share(batch: int, points: int) -> Row:
    "What sampling and searching take of a step"
    ours, _ = pair("pointmlp")
    xyz, spent = cloud(batch, points), 0.0
    places = xyz[..., :3]
    for grouper in ours.local_grouper_list:
        spent += seconds(lambda: group_points(places, grouper.anchors, grouper.neighbors))
        places = places[:, : grouper.anchors]
    return Row(
        PART,
        f"pointmlp, {batch} x {points:,} points, share of sampling and neighbors in a step",
        spent / seconds(lambda: step(ours, xyz)),
        "of 1",
    )


def alone(
    name: str, batch: int, points: int
) -> tuple[float, float]:  # seconds of the second step, MiB at the peak
    "Two steps in a process of their own"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads({THREADS})\n"
        "from encoders import cloud, create_encoder, keep_freed_memory, step; from cg3d.core.timing import peak_memory, seconds\n"
        f"encoder, points = create_encoder({name!r}), cloud({batch}, {points})\n"
        "with keep_freed_memory(): step(encoder, points); print(seconds(lambda: step(encoder, points)), peak_memory())"
    )
    return tuple(
        map(
            float,
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout.split(),
        )
    )


def growth(name: str) -> list[Row]:
    "Time and memory against points and against clouds"
    rows = []
    for along, sizes in (
        ("points", [(2, points) for points in (512, 1024, 2048, 4096, 8192)]),
        ("clouds", [(batch, 1024) for batch in (1, 2, 4, 8, 16, 32)]),
    ):
        for batch, points in sizes:
            spent, most = alone(name, batch, points)
            what, at = (
                f"{name}, step of {'2 clouds' if along == 'points' else 'clouds of 1,024 points'}",
                dict(along=along, at=points if along == "points" else batch),
            )
            rows += [
                Row(PART, what, 1e3 * spent, "ms", note=f"{THREADS} threads", **at),
                Row(PART, what, most, "MiB", note="peak of the process, libraries included", **at),
            ]
    return rows


def on_cuda(name: str, rounds: int) -> list[Row]:
    "float32 against bfloat16 autocast with torch.compile, and against the published layout"
    ours, other = pair(name, "cuda")
    xyz, wait = cloud(64, 1024, "cuda"), torch.cuda.synchronize
    quick = warmed(ours, xyz)

    def half():
        with torch.autocast("cuda", torch.bfloat16):
            step(ours, xyz, quick)

    size, card = f"{name}, forward + backward, 64 x 1,024 points", torch.cuda.get_device_name()
    rows = [
        row(
            PART,
            f"{size}, bfloat16 + torch.compile",
            compare(half, lambda: step(ours, xyz), rounds, 3, wait),
            "float32, eager",
            at_least=3,
            per=64,
            note=f"ms a cloud; {card}",
        ),
        row(
            PART,
            size,
            compare(lambda: step(ours, xyz), lambda: step(other, xyz), rounds, 2, wait),
            "the published layout",
            per=64,
            note=f"ms a cloud; {card}",
        ),
    ]
    return rows + [
        Row(PART, f"{size}, peak memory", torch.cuda.max_memory_allocated() / 2**20, "MiB", note=card)
    ]


def measure(quick: bool) -> list[Row]:
    "Encoders against their published layout, against the floor, and as they grow."
    torch.set_num_threads(1)
    ceiling = peaks_of_convolution()
    torch.set_num_threads(THREADS)
    with keep_freed_memory():
        rows = [
            each
            for name in NAMES
            for each in against_published(name, *((1, 512, 1) if quick else (16, 1024, 5)), ceiling)
        ]
        if not quick:
            rows.append(neighbors_share(16, 1024))
            rows += [each for name in NAMES for each in other_ways(name, 16, 1024, 3)]
    if not quick:
        rows += [each for name in NAMES for each in growth(name)]
    if torch.cuda.is_available():
        rows += [each for name in NAMES for each in on_cuda(name, 3 if quick else 7)]
    return rows


def peaks_of_convolution() -> tuple[float, float]:  # operations a second, bytes a second
    "What this processor does at best: the faster of its two libraries for products, and a copy"
    product, copy = peaks(clock=time.process_time)
    images, weight = (
        torch.randn(16, 1024, 1, 256).to(memory_format=torch.channels_last),
        torch.randn(1024, 1024, 1, 1),
    )
    return max(
        product,
        2
        * 16
        * 256
        * 1024**2
        / min(seconds(lambda: torch.conv2d(images, weight), clock=time.process_time) for _ in range(5)),
    ), copy


if __name__ == "__main__":
    report(measure)
