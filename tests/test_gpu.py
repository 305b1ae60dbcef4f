"""Checks on a real GPU: `pytest -m gpu tests/test_gpu.py`; skipped where there is none.

Searches, losses and collectives against the CPU. `CG3D_TEST_DEVICE=cpu pytest tests/test_gpu.py` runs all of them on
the CPU, against itself, which shows that their bodies work. None has met a GPU yet.
"""

import os

import pytest
import torch
import torch.distributed as dist

from cg3d.core.distributed import _AllGather, _AllReduceSum
from cg3d.geometry.ops import ball_query, farthest_point_sample, knn, normalize
from cg3d.training.losses import POSITIVES, TriModalLoss

DEVICE = torch.device(os.environ.get("CG3D_TEST_DEVICE") or "cuda")
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision():
    "Matrix products without TF32, as comparisons with the CPU need."
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = cudnn


def clouds(count=4, points=1024, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xyz = normalize(torch.randn(count, points, 3, generator=generator))
    return torch.cat([xyz, torch.rand(count, points, 3, generator=generator)], -1)


def test_searches_find_the_same_points():
    xyz = clouds(4, 2048)[..., :3]
    there = xyz.to(DEVICE)
    chosen = farthest_point_sample(xyz, 256)
    assert torch.equal(farthest_point_sample(there, 256).cpu(), chosen)
    assert torch.equal(
        farthest_point_sample(there, 64, start=7, skip_below=1e-3).cpu(),
        farthest_point_sample(xyz, 64, start=7, skip_below=1e-3),
    )
    distance, nearest = knn(xyz[:, :128], xyz, 32)
    distance_there, nearest_there = knn(there[:, :128], there, 32)
    assert torch.equal(nearest_there.cpu(), nearest)
    torch.testing.assert_close(distance_there.cpu(), distance, atol=1e-6, rtol=1e-5)
    inside = ball_query(xyz[:, :128], xyz, 0.2, 32)
    assert torch.equal(ball_query(there[:, :128], there, 0.2, 32).cpu(), inside)


@pytest.mark.parametrize("positives", POSITIVES)
def test_losses_have_the_gradients_of_the_cpu(positives):
    generator = torch.Generator().manual_seed(0)
    texts = ["a chair", "a bed", "a chair", *(f"thing {i}" for i in range(21))]
    results = []
    for device in ("cpu", DEVICE):
        generator.manual_seed(0)
        sides = [torch.randn(24, 64, generator=generator).to(device).requires_grad_() for _ in range(3)]
        loss = TriModalLoss(positives=positives, hard_negatives=0.3).to(device)(*sides, texts)["loss"]
        loss.backward()
        results.append([loss.detach().cpu(), *(side.grad.cpu() for side in sides)])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-4)


def test_collectives_of_one_process(tmp_path):
    backend = "nccl" if ON_GPU else "gloo"
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        rows = torch.randn(4, 3, device=DEVICE, requires_grad=True)
        for function in (_AllGather, _AllReduceSum):
            rows.grad = None
            result = function.apply(rows)
            (result * torch.arange(12.0, device=DEVICE).view(4, 3)).sum().backward()
            assert torch.equal(result, rows)
            assert rows.grad.flatten().tolist() == list(range(12))
    finally:
        dist.destroy_process_group()
