"""Point operations at their edges: bad input, one point, equal points, seeds, gradients, pickling."""

import dataclasses
import pickle

import pytest
import torch

from cg3d.geometry import ops as P


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
    for preset in (P.Augment.sensor(), P.Augment.official(), P.Augment(one_sided=1, uneven=1)):
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
    from_front, from_back = P.depth_view(plates, 0, 0), P.depth_view(plates, 180.0, torch.tensor([0.0]))
    assert from_front[..., 3].mean() > 0.95 and from_back[..., 3].mean() < 0.05
    both = P.depth_view(plates.expand(2, -1, -1), torch.tensor([0.0, 180.0]), 0.0)
    assert both[0].equal(from_front[0]) and both[1].equal(from_back[0])
    assert P.depth_view(plates[..., :3], 0, 0).shape == (1, 800, 3)
    with pytest.raises(ValueError, match="angle"):
        P.depth_view(plates, torch.zeros(3), 0)


def test_depth_view_keeps_the_contract():
    seen = P.depth_view(clouds(4, 1000), 30.0, 25.0, noise=0.02, generator=seeded())
    assert seen.shape == (4, 1000, 6) and seen[..., :3].mean(1).abs().max() < 1e-5
    torch.testing.assert_close(seen[..., :3].norm(dim=-1).amax(1), torch.ones(4))
    assert seen.equal(P.depth_view(clouds(4, 1000), 30.0, 25.0, noise=0.02, generator=seeded()))


@pytest.mark.parametrize("preset", ["none", "summary", "sensor", "official"])
@pytest.mark.parametrize("channels", [3, 6])
def test_presets(preset, channels):
    augment, cloud = getattr(P.Augment, preset)(), clouds(16, channels=channels)
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
    assert P.Augment(**dataclasses.asdict(augment)) == augment
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
        P.Augment(**settings)


def test_augment_is_frozen_and_strict():
    with pytest.raises(TypeError, match="spin"):
        P.Augment(spin=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        P.Augment().tilt = 3
    assert P.Augment(scale=[0.9, 1.1]) == P.Augment(scale=(0.9, 1.1))


def test_missing_color_survives_color_jitter():
    gray = P.with_color(clouds(channels=3))
    assert P.jitter_color(gray, 0.5, seeded()).equal(gray)
    dropped = (
        P.drop_color(clouds(200, 10), 0.3, seeded())[..., 3:]
        .eq(P.MISSING_COLOR)
        .all(-1)
        .all(-1)
        .float()
        .mean()
    )
    assert 0.2 < dropped < 0.4
    with pytest.raises(ValueError, match="1.5"):
        P.drop_color(gray, 1.5)
