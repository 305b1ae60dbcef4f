"""Point operations at their edges: bad input, one point, equal points, seeds, gradients, pickling."""

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from cg3d.geometry import augment as A
from cg3d.geometry import depth_camera as D
from cg3d.geometry import ops as P
from cg3d.geometry import segmentation as S


def clouds(batch=3, n=200, channels=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cloud = torch.rand(batch, n, channels, generator=generator)
    return P.normalize(cloud * torch.tensor([2, 1, 0.5] + [1] * (channels - 3)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "bad, error, words",
    [
        ([[0.0, 1.0, 2.0]], TypeError, "list"),
        (torch.zeros(5, 3), ValueError, r"\[None\]"),
        (torch.zeros(1, 5, 4), ValueError, r"\(1, 5, 4\)"),
        (torch.zeros(1, 2, 5, 3), ValueError, r"\(1, 2, 5, 3\)"),
        (torch.zeros(1, 5, 3, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(1, 5, 3, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(0, 5, 3), ValueError, "empty"),
        (torch.zeros(1, 0, 3), ValueError, "empty"),
        (torch.ones(2, 5, 3), ValueError, "coincide"),
    ],
)
def test_check_points_refuses(bad, error, words):
    with pytest.raises(error, match=words):
        P.check_points(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 5])
def test_check_points_names_the_broken_cloud(value, column):
    broken = clouds()
    broken[1, 7, column] = value
    with pytest.raises(ValueError, match=r"\[1\]"):
        P.check_points(broken)


def test_check_points_counts():
    assert P.check_points(torch.zeros(1, 1, 3)).shape == (1, 1, 3)
    with pytest.raises(ValueError, match="64"):
        P.check_points(clouds(n=63), min_points=64)


@pytest.mark.parametrize(
    "cloud", [torch.zeros(1, 1, 3), torch.full((2, 9, 6), 0.7), torch.full((2, 9, 3), 1e6)]
)
def test_degenerate_clouds_stay_finite(cloud):
    assert P.normalize(cloud)[..., :3].eq(0).all()
    for preset in (A.Augment.sensor(), A.Augment.official(), A.Augment(one_sided=1, uneven=1)):
        assert preset(P.normalize(cloud), seeded()).isfinite().all()


def test_normalize_undoes_place_and_size():
    cloud = clouds(channels=3)
    for moved in (cloud * 1e-6, cloud * 1e6, cloud * 25.4 + 1000):
        torch.testing.assert_close(P.normalize(moved), cloud, atol=1e-4, rtol=0)
    assert P.normalize(cloud[0]).shape == cloud[0].shape


def test_with_color():
    filled = P.with_color(clouds(channels=3))
    assert filled.shape[-1] == 6 and filled[..., 3:].eq(P.MISSING_COLOR).all()
    with pytest.raises(ValueError, match="4"):
        P.with_color(torch.zeros(1, 5, 4))


def test_sampling_edges():
    cloud = clouds(n=20)
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"k={k}"):
            P.farthest_point_sample(cloud, k)
        with pytest.raises(ValueError, match=f"k={k}"):
            P.knn(cloud, cloud, k)
    with pytest.raises(ValueError, match="start=20"):
        P.farthest_point_sample(cloud, 2, start=20)
    assert P.farthest_point_sample(cloud, 20).sort(1).values.eq(torch.arange(20)).all()
    assert (
        P.farthest_point_sample(cloud, 3)[:, 0].eq(0).all()
        and P.farthest_point_sample(cloud, 3, start=7)[:, 0].eq(7).all()
    )
    assert P.farthest_point_sample(torch.zeros(1, 5, 3), 4).shape == (
        1,
        4,
    )  # coinciding points: any indices, but valid
    starts = P.farthest_point_sample(clouds(64), 2, generator=seeded())[:, 0]
    assert len(starts.unique()) > 20 and starts.equal(
        P.farthest_point_sample(clouds(64), 2, generator=seeded())[:, 0]
    )


def test_neighbors_with_ties_and_chunks():
    cloud = torch.cat([clouds(2, 50, 3)] * 2, 1)  # every point twice
    distances, idx = P.knn(cloud, cloud, 4)
    assert distances[..., :2].eq(0).all() and (distances.diff(dim=2) >= 0).all()
    assert idx[0, :50, :2].equal(
        torch.stack([torch.arange(50), torch.arange(50) + 50], 1)
    )  # ties: the lower index first
    for max_pairs in (1, 999, 1 << 24):
        assert P.knn(cloud, cloud, 4, max_pairs)[1].equal(idx)
        assert P.ball_query(cloud, cloud, 0.3, 5, max_pairs).equal(P.ball_query(cloud, cloud, 0.3, 5))
    with pytest.raises(ValueError, match="radius"):
        P.ball_query(cloud, cloud, 0.0, 5)
    lonely = P.ball_query(torch.full((2, 1, 3), 9.0), cloud, 0.1, 3)
    assert (lonely == lonely[..., :1]).all() and lonely[..., 0].equal(
        P.knn(torch.full((2, 1, 3), 9.0), cloud, 1)[1][..., 0]
    )


@pytest.mark.parametrize("channels", [3, 6])
def test_kernels_of_pytorch3d_give_the_same_indices(monkeypatch, channels):
    """On CUDA devices they replace our code; here the CPU versions of the same functions stand in."""
    ops = pytest.importorskip("pytorch3d.ops")
    cloud = clouds(3, 300, channels, seed=4)
    query = cloud[:, 50:120] + 0.01
    calls = {
        "fps": lambda: P.farthest_point_sample(cloud, 64),
        "fps from 7": lambda: P.farthest_point_sample(cloud, 64, start=7),
        "fps at random": lambda: P.farthest_point_sample(cloud, 64, generator=seeded()),
        "fps, skipped": lambda: P.farthest_point_sample(cloud, 64, skip_below=0.1),
        "knn": lambda: P.knn(query, cloud, 12)[1],
        "knn of one": lambda: P.knn(query, cloud, 1)[1],
        "ball": lambda: P.ball_query(query, cloud, 0.2, 16),
        "ball, mostly empty": lambda: P.ball_query(query, cloud, 0.02, 4),
        "ball of all": lambda: P.ball_query(query, cloud, 9.0, 400),
    }
    own, distances = {name: call() for name, call in calls.items()}, P.knn(query, cloud, 12)[0]
    used = []

    def kernels(*tensors):
        used.append(len(tensors))
        return ops

    monkeypatch.setattr(P, "cuda_kernels", kernels)
    for name, call in calls.items():
        assert torch.equal(call(), own[name]), name
    assert len(used) == len(calls)
    torch.testing.assert_close(P.knn(query, cloud, 12)[0], distances)
    lattice = torch.arange(5.0).view(1, 5, 1).expand(-1, -1, 3) / 4 * torch.tensor([1.0, 0, 0])
    assert P.ball_query(lattice[:, :1], lattice, 0.25, 3).tolist() == [[[0, 1, 0]]], "exactly at the radius"


def test_kernels_need_float32_on_cuda():
    assert P.cuda_kernels(torch.zeros(1, 2, 3)) is None
    assert P.cuda_kernels(torch.zeros(1, 2, 3, device="meta")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_indices_do_not_depend_on_autocast(dtype):
    cloud = clouds(2, 200)
    calls = (
        lambda xyz: P.farthest_point_sample(xyz, 32),
        lambda xyz: P.knn(xyz[:, :40], xyz, 8)[1],
        lambda xyz: P.ball_query(xyz[:, :40], xyz, 0.2, 8),
    )
    for call in calls:
        expected = call(cloud)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(cloud), expected)
        assert torch.equal(call(cloud.to(dtype)), call(cloud.to(dtype).float()))


def test_fake_tensors_know_the_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        cloud = torch.empty(2, 100, 6, device="cuda", dtype=torch.bfloat16)
        indices = P.farthest_point_sample(cloud, 16)
        distances, neighbors = P.knn(P.gather(cloud, indices), cloud, 8)
        balls = P.ball_query(cloud, cloud, 0.2, 5)
    for value, shape in ((indices, (2, 16)), (neighbors, (2, 16, 8)), (balls, (2, 100, 5))):
        assert value.shape == shape and value.dtype == torch.int64 and value.device.type == "cuda"
    assert distances.shape == (2, 16, 8) and distances.dtype == torch.float32


def test_searches_do_not_import_the_compiler():
    """The import takes seconds, and no search needs it."""
    program = (
        "import sys, torch\n"
        "from cg3d.geometry.ops import ball_query, farthest_point_sample, knn\n"
        "x = torch.rand(1, 32, 3)\n"
        "farthest_point_sample(x, 4), knn(x, x, 2), ball_query(x, x, 0.1, 2)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_searches_compile_into_one_graph():
    import torch._dynamo

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def layer(points):
        centers = P.gather(points, P.farthest_point_sample(points, 16))
        distances, indices = P.knn(centers, points, 8)
        balls = P.gather(points, P.ball_query(centers, points, 0.3, 4))
        return P.gather(points, indices).sum() + distances.sum() + balls.sum()

    points = clouds(2, 100).requires_grad_()
    expected = layer(points)
    found = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)(points)
    assert torch.equal(found, expected) and len(graphs) == 1
    found.backward()
    assert points.grad.abs().sum() > 0
    calls = [node for node in graphs[0].graph.nodes if "cg3d" in str(node.target)]
    assert len(calls) == 3, "each search is one opaque operator"
    torch._dynamo.reset()


def test_gather_carries_gradients():
    cloud = clouds(2, 6).requires_grad_()
    idx = torch.tensor([[[0, 0], [1, 5]], [[2, 2], [2, 3]]])
    P.gather(cloud, idx).sum().backward()
    assert cloud.grad[0, :, 0].tolist() == [2, 1, 0, 0, 0, 1] and cloud.grad[1, :, 0].tolist() == [
        0,
        0,
        3,
        1,
        0,
        0,
    ]


def test_depth_view_angles():
    plates = torch.rand(1, 800, 6, generator=seeded())
    plates[..., 2] = torch.arange(800) % 2 * 1.6 - 0.8  # two parallel plates, facing +z and -z
    plates[..., 3] = torch.arange(800) % 2  # red marks the one at +z
    plates = P.normalize(plates)
    from_front, from_back = D.depth_view(plates, 0, 0), D.depth_view(plates, 180.0, torch.tensor([0.0]))
    assert from_front[..., 3].mean() > 0.95 and from_back[..., 3].mean() < 0.05
    both = D.depth_view(plates.expand(2, -1, -1), torch.tensor([0.0, 180.0]), 0.0)
    assert both[0].equal(from_front[0]) and both[1].equal(from_back[0])
    assert D.depth_view(plates[..., :3], 0, 0).shape == (1, 800, 3)
    with pytest.raises(ValueError, match="angle"):
        D.depth_view(plates, torch.zeros(3), 0)


def test_depth_view_keeps_the_contract():
    seen = D.depth_view(clouds(4, 1000), 30.0, 25.0, noise=0.02, generator=seeded())
    assert seen.shape == (4, 1000, 6) and seen[..., :3].mean(1).abs().max() < 1e-5
    torch.testing.assert_close(seen[..., :3].norm(dim=-1).amax(1), torch.ones(4))
    assert seen.equal(D.depth_view(clouds(4, 1000), 30.0, 25.0, noise=0.02, generator=seeded()))


@pytest.mark.parametrize("preset", ["none", "summary", "sensor", "official"])
@pytest.mark.parametrize("channels", [3, 6])
def test_presets(preset, channels):
    augment, cloud = getattr(A.Augment, preset)(), clouds(16, channels=channels)
    before = cloud.clone()
    out = augment(cloud, seeded(5))
    assert (
        out.shape == cloud.shape
        and out.dtype == torch.float32
        and out.isfinite().all()
        and cloud.equal(before)
    )
    assert out.equal(pickle.loads(pickle.dumps(augment))(cloud, seeded(5)))
    assert out.equal(cloud) == (preset == "none")
    assert preset == "none" or not out.equal(augment(cloud, seeded(6)))
    assert A.Augment(**dataclasses.asdict(augment)) == augment
    assert channels == 3 or (0 <= out[..., 3:].min() and out[..., 3:].max() <= 1)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(one_sided=1.2), "one_sided"),
        (dict(color_drop=-0.1), "color_drop"),
        (dict(tilt=-5), "tilt"),
        (dict(scale=(1.2, 0.8)), "scale"),
        (dict(scale=(0, 1)), "scale"),
        (dict(elevation=(0, 100)), "elevation"),
        (dict(rotate=float("nan")), "rotate"),
        (dict(scale=(1,)), "scale"),
    ],
)
def test_augment_refuses(settings, words):
    with pytest.raises(ValueError, match=words):
        A.Augment(**settings)


def test_augment_is_frozen_and_strict():
    with pytest.raises(TypeError, match="spin"):
        A.Augment(spin=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        A.Augment().tilt = 3
    assert A.Augment(scale=[0.9, 1.1]) == A.Augment(scale=(0.9, 1.1))


def test_missing_color_survives_color_jitter():
    gray = P.with_color(clouds(channels=3))
    assert A.jitter_color(gray, 0.5, seeded()).equal(gray)
    dropped = (
        A.drop_color(clouds(200, 10), 0.3, seeded())[..., 3:]
        .eq(P.MISSING_COLOR)
        .all(-1)
        .all(-1)
        .float()
        .mean()
    )
    assert 0.2 < dropped < 0.4
    with pytest.raises(ValueError, match="1.5"):
        A.drop_color(gray, 1.5)


@pytest.mark.parametrize(
    "settings, words",
    [(dict(max_side=0), "max_side"), (dict(gaps=(1.5, -1)), "gaps"), (dict(min_points=0), "min_points")],
)
def test_segment_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        S.SegmentSettings(**settings)


def test_floor_needs_nothing_below_it():
    """The lowest wide plane is the floor, unless more than a twentieth of the points are below it."""
    generator = np.random.default_rng(0)

    def level(height, side, count):
        xyz = generator.random((count, 3)) * [side, 0, side]
        return xyz + [0, height, 0] + 0.002 * generator.normal(size=(count, 3))

    def kinds(*parts):
        planes = S.segment(np.concatenate(parts).astype(np.float32))[2]
        return sorted(plane.kind for plane in planes if plane.kind)

    assert kinds(level(0, 3, 20_000), level(0.7, 1.2, 5_000)) == ["floor", "support"]
    assert kinds(level(0, 3, 20_000), level(2.5, 3, 20_000)) == ["ceiling", "floor"]
    below = level(-0.6, 0.4, 3_000) + [0, 0.5, 0] * generator.random((3_000, 1))
    assert set(kinds(level(0, 3, 20_000), below)) == {"support"}, "an eighth of the points is below"
