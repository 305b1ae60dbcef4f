"""Point operations: farthest point sampling, neighbors, balls and gathering, compared with other libraries and with simple implementations.

    python benchmarks/points.py [--quick] [--out rows.json]

One thread; on the CPU processor time is measured, which other programs do not affect. `fpsample` is compared if it is installed (`pip install fpsample`). If there is a CUDA device, the same
comparisons are also measured on it."""

import importlib.util
import subprocess
import sys
import time

import torch
from harness import Row, report, row

from cg3d.core.timing import Comparison, compare, seconds
from cg3d.geometry.ops import ball_query, farthest_point_sample, gather, knn

PART = "points"


def cloud(batch: int, points: int, device: str = "cpu") -> torch.Tensor:  # (B, N, 3)
    "Random points in the unit sphere's box"
    return (torch.rand(batch, points, 3, generator=torch.Generator().manual_seed(points)) * 2 - 1).to(device)


def pairs(ours, other, rounds: int, device: str) -> Comparison:
    "Both in turn, by the clock of the device"
    if device == "cpu":
        return compare(ours, other, rounds, 2, clock=time.process_time)
    return compare(ours, other, rounds, 2, torch.cuda.synchronize)


def table_knn(query: torch.Tensor, ref: torch.Tensor, k: int) -> torch.Tensor:  # (B, M, k)
    "A naive implementation: the whole table of distances, then topk"
    return torch.cdist(query, ref).topk(k, largest=False).indices


def table_ball(query: torch.Tensor, ref: torch.Tensor, radius: float, k: int) -> torch.Tensor:  # (B, M, k)
    "A naive implementation of PointNet++: the whole table, every index outside set to N, sorted"
    N = ref.shape[1]
    inside = (
        torch.where(torch.cdist(query, ref) > radius, N, torch.arange(N, device=ref.device))
        .sort(-1)
        .values[..., :k]
    )
    return torch.where(inside == N, inside[..., :1], inside)


def written_gather(points: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:  # (B, ..., C)
    "A naive implementation: `gather` with the index repeated for every channel"
    return points.gather(1, idx.reshape(len(idx), -1, 1).expand(-1, -1, points.shape[-1])).reshape(
        *idx.shape, -1
    )


def sampling(quick: bool, device: str, rounds: int) -> list[Row]:
    from pytorch3d.ops import sample_farthest_points

    rows = []
    for batch, points, count in (
        (1, 10_000, 512),
        (16, 1024, 512),
        (16, 1024, 64),
        (8, 1024, 512),
        (1, 1024, 512),
        (1, 1024, 64),
    ):
        xyz, what = cloud(batch, points, device), f"FPS {batch} x {points:,} -> {count}, {device}"
        ours = lambda: farthest_point_sample(xyz, count)
        if points == 10_000 and device == "cpu":
            if importlib.util.find_spec("fpsample"):
                import fpsample

                rows_of = xyz[0].numpy()
                theirs = lambda: fpsample.fps_sampling(rows_of, count, start_idx=0)
                assert (torch.from_numpy(theirs().astype("int64")) == ours()[0]).all()
                rows.append(
                    row(
                        PART,
                        what,
                        pairs(ours, theirs, 2 * rounds + 1, device),
                        "fpsample.fps_sampling, exact",
                        at_least=1 / 1.5,
                        note="target: at most 1.5 times its time; the same indices; one thread",
                    )
                )
            else:
                rows.append(
                    Row(
                        PART,
                        what,
                        1e3 * min(seconds(ours, clock=time.process_time) for _ in range(rounds)),
                        "ms",
                        note="fpsample is not installed: pip install fpsample",
                    )
                )
        theirs = lambda: sample_farthest_points(xyz, K=count)[1]
        assert torch.equal(theirs(), ours())
        rows.append(
            row(
                PART,
                what,
                pairs(ours, theirs, 2 * rounds + 1, device),
                "pytorch3d.ops.sample_farthest_points",
                note="the same indices",
            )
        )
    return rows


def neighbors(quick: bool, device: str, rounds: int) -> list[Row]:
    from pytorch3d.ops import ball_query as other_ball
    from pytorch3d.ops import knn_points

    rows = []
    sizes = [(16, 512, 1024, 24), (16, 64, 1024, 32)] + ([] if quick else [(1, 10_000, 10_000, 24)])
    for batch, queries, points, k in sizes:
        ref = cloud(batch, points, device)
        query, size = ref[:, :queries].contiguous(), f"{batch} x {queries:,} x {points:,}, k={k}, {device}"
        ours = lambda: knn(query, ref, k)
        for versus, theirs in (
            ("cdist and topk, whole table", lambda: table_knn(query, ref, k)),
            ("pytorch3d.ops.knn_points", lambda: knn_points(query, ref, K=k).idx),
        ):
            same = (theirs() == ours()[1]).float().mean().item()
            rows.append(
                row(
                    PART,
                    f"kNN {size}",
                    pairs(ours, theirs, rounds, device),
                    versus,
                    note=f"{same:.4%} of the indices agree",
                )
            )
        balls = lambda: ball_query(query, ref, 0.2, k)
        for versus, theirs in (
            ("cdist and sort, whole table", lambda: table_ball(query, ref, 0.2, k)),
            ("pytorch3d.ops.ball_query", lambda: other_ball(query, ref, K=k, radius=0.2).idx),
        ):
            if versus.startswith("cdist") and points > 4096:
                continue  # a sort of 10^8 places
            rows.append(
                row(
                    PART,
                    f"ball query {size}, radius 0.2",
                    pairs(balls, theirs, rounds, device),
                    versus,
                    note="pytorch3d pads with -1, PointNet++ and we with the first"
                    if "ops" in versus
                    else "",
                )
            )
    return rows


def collecting(quick: bool, device: str, rounds: int) -> list[Row]:
    rows = []
    for channels in (64,) if quick else (64, 256):
        points, idx = (
            torch.randn(16, 1024, channels, device=device, requires_grad=True),
            torch.randint(1024, (16, 512, 24), device=device),
        )

        def both(collect):  # forward and backward
            out = collect(points, idx)
            out.backward(out.detach())

        assert torch.equal(gather(points, idx), written_gather(points, idx))
        rows.append(
            row(
                PART,
                f"gather 16 x 512 x 24 of 1,024 x {channels}, forward + backward, {device}",
                pairs(lambda: both(gather), lambda: both(written_gather), rounds, device),
                "Tensor.gather",
            )
        )
    return rows


def compiled(device: str, rounds: int) -> list[Row]:
    "Neighbors by torch.compile; the loop of the sampling is no case for it: one round waits for the other"
    ref = cloud(16, 1024, device)
    query, other = ref[:, :512].contiguous(), torch.compile(table_knn)
    return [
        row(
            PART,
            f"kNN 16 x 512 x 1,024, k=24, {device}",
            pairs(lambda: knn(query, ref, 24), lambda: other(query, ref, 24), rounds, device),
            "torch.compile of cdist and topk",
        )
    ]


def memory(points: int, queries: int = 1024) -> float:  # MiB
    "What a search among so many points adds to a child process at its peak (Linux: the kernel's mark is set back before)"
    code = (
        "import torch; torch.set_num_threads(1)\nfrom cg3d.geometry.ops import knn\nfrom cg3d.core.timing import added_memory\n"
        f"ref = torch.rand(1, {points}, 3); knn(ref[:, :64], ref[:, :64], 8); print(added_memory(lambda: knn(ref[:, :{queries}], ref, 24)))"
    )
    return float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )


def growth(quick: bool, rounds: int) -> list[Row]:
    "Time and memory against the number of points"
    rows = []
    for points in (1024, 4096) if quick else (1024, 2048, 4096, 8192, 16384, 32768):
        xyz = cloud(1, points)
        for name, run in (
            ("FPS -> 512", lambda: farthest_point_sample(xyz, 512)),
            ("kNN of 512 queries, k=24", lambda: knn(xyz[:, :512], xyz, 24)),
        ):
            spent = min(seconds(run, clock=time.process_time) for _ in range(rounds))
            rows.append(
                Row(
                    PART,
                    name,
                    1e3 * spent,
                    "ms",
                    note="processor time, one thread",
                    along="points",
                    at=points,
                )
            )
    for points in (10_000,) if quick else (10_000, 40_000, 100_000):
        rows.append(
            Row(
                PART,
                "kNN of 1,024 queries, memory added at the peak",
                memory(points),
                "MiB",
                note=f"the whole table would be {points * 1024 * 4 / 2**20:,.0f} MiB",
                along="points",
                at=points,
            )
        )
    return rows


def measure(quick: bool) -> list[Row]:
    "Point operations against other ways of doing the same."
    torch.set_num_threads(1)
    rounds = 3 if quick else 7
    rows = [each for part in (sampling, neighbors, collecting) for each in part(quick, "cpu", rounds)]
    if not quick:
        rows += compiled("cpu", rounds)
    rows += growth(quick, rounds)
    if torch.cuda.is_available():
        rows += [each for part in (sampling, neighbors, collecting) for each in part(quick, "cuda", rounds)]
        rows += compiled("cuda", rounds)
    return rows


if __name__ == "__main__":
    report(measure)
