"""Synthetic rooms: no overlaps, real sizes, reproducible seeds, partial scans, and errors where objects do not fit."""

import numpy as np
import pandas as pd
import pytest

from cg3d.data.furniture import furniture
from cg3d.io.collection import Collection, Packed, write_collection
from cg3d.io.scene import Scene
from cg3d.io.shape import Shape
from cg3d.scenes.synthetic_rooms import (
    RoomSettings,
    compose_room,
    kinect_noise,
    placeable_shapes,
    resample_surface,
    simulate_scan,
    visible_points,
)

COARSE = RoomSettings(spacing=0.05, min_points=200)
SIDES = ["width", "height", "depth"]


@pytest.fixture(scope="module")
def test_shapes():
    return furniture().select(split="test")


@pytest.fixture(scope="module")
def rooms():
    return [compose_room(seed, settings=COARSE) for seed in range(4)]


def boxes(room):
    "Low and high corner of each thing, (things, 2, 3)."
    return np.stack(
        [
            np.stack([room.points[room.instance == i].min(0), room.points[room.instance == i].max(0)])
            for i in room.instances()
        ]
    )


def overlap(a, b):
    return bool((np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]) > 0.005).all())


def test_objects_do_not_overlap_and_are_inside(rooms):
    for room in rooms:
        found, shell = boxes(room), room.points[room.instance < 0]
        assert isinstance(room, Scene) and len(found) > 5
        for i in range(len(found)):
            for j in range(i):
                if not overlap(found[i], found[j]):
                    continue
                below = room.points[
                    room.instance == j
                ]  # a rim or a lid may rise into the box of what stands on top
                assert (
                    found[i][0, 1] > 0.05 and found[j][0, 1] < 0.02 and found[j][1, 1] - found[i][0, 1] < 0.08
                )
                assert ((below > found[i][0]) & (below < found[i][1])).all(1).mean() < 0.05
        assert (found[:, 0] >= shell.min(0) - 1e-3).all() and (found[:, 1] <= shell.max(0) + 1e-3).all()


def test_every_object_stands_on_something(rooms):
    for room in rooms:
        found = boxes(room)
        for low in found[:, 0]:
            middle_below = [
                other[1, 1]
                for other in found
                if (other[0, [0, 2]] <= low[[0, 2]]).all() and (other[1, [0, 2]] >= low[[0, 2]]).all()
            ]
            assert any(abs(low[1] - height) < 0.06 for height in [0.0, *middle_below]), low


def test_sizes_are_real(rooms, test_shapes):
    for room in rooms:
        for i, row in zip(room.instances(), room.shapes):
            size, thing = test_shapes.table[SIDES].iloc[row].to_numpy(float), room.points[room.instance == i]
            assert abs(np.ptp(thing[:, 1]) - size[1]) < COARSE.spacing
            flat = thing[:, [0, 2]]
            radius = np.linalg.norm(flat - (flat.min(0) + flat.max(0)) / 2, axis=1).max()
            assert radius <= np.hypot(size[0], size[2]) / 2 + COARSE.spacing, "no wider than its diagonal"
            assert room.names[i] == (
                test_shapes.table["category"].iloc[row] or test_shapes.table["name"].iloc[row]
            )


def test_resampled_points_are_uniform():
    square = np.random.default_rng(0).uniform([-1, 0, -1], [1, 0.0, 1], (2000, 3))
    xyz, rgb = resample_surface(Shape(square, size=(3.0, 0.02, 3.0)), 0.03, 10, np.random.default_rng(0))
    assert 0.5 < len(xyz) / (9 / 0.03**2) < 2 and np.allclose(np.ptp(xyz[:, [0, 2]], axis=0), 3, atol=0.05)
    per_quarter = np.histogram2d(xyz[:, 0], xyz[:, 2], 4)[0]
    assert per_quarter.max() / per_quarter.min() < 1.6 and np.allclose(rgb, 0.4)
    repeated = Shape(np.repeat(square[:500], 4, 0), size=(3.0, 0.02, 3.0))
    assert len(resample_surface(repeated, 0.03, 10, np.random.default_rng(0))[0]) > 4000, (
        "repeated points do not thin a surface out"
    )


def test_seeds_repeat(rooms):
    again = compose_room(1, settings=COARSE)
    assert (
        (again.points == rooms[1].points).all()
        and (again.colors == rooms[1].colors).all()
        and again.names == rooms[1].names
    )
    assert again.shapes != rooms[2].shapes
    a, b = simulate_scan(again, 2, seed=5), simulate_scan(again, 2, seed=5)
    assert (a.points == b.points).all() and len(simulate_scan(again, 2, seed=6)) != len(a)
    seen = compose_room(1, settings=COARSE, cameras=2)
    assert (seen.points == simulate_scan(rooms[1], 2, seed=1, spacing=COARSE.spacing).points).all()


def test_cameras_see_a_strict_subset(rooms):
    for room in rooms:
        whole = {tuple(point) for point in room.points.tolist()}
        counts = []
        for cameras in (1, 3):
            seen = simulate_scan(room, cameras, noise=0, spacing=COARSE.spacing)
            assert set(map(tuple, seen.points.tolist())) < whole
            counts.append(len(seen))
        assert counts[0] < counts[1]


def test_points_behind_a_surface_are_hidden():
    "Against a ray test: a point of the far wall is seen where its ray misses the board in front."
    generator = np.random.default_rng(0)
    board, wall = (
        generator.uniform([-0.5, 0.5, 1.5], [0.5, 1.5, 1.5], (8000, 3)),
        generator.uniform([-1.5, 0, 3], [1.5, 2, 3], (40000, 3)),
    )
    eye = np.array([0.0, 1.0, 0.0])
    seen = visible_points(np.concatenate([board, wall]), eye, np.array([0.0, 1.0, 3.0]), 0.015)
    cut = eye + (wall - eye) / 2  # where the ray to the wall passes z = 1.5
    margin = np.maximum(
        np.abs(cut[:, 0]) - 0.5, np.abs(cut[:, 1] - 1.0) - 0.5
    )  # below zero: behind the board
    assert (
        seen[:8000].mean() > 0.99
        and seen[8000:][margin < -0.03].mean() < 0.01
        and seen[8000:][margin > 0.03].mean() > 0.99
    )


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_noise_has_the_stated_deviation(rooms, noise):
    eye = np.array([0.6, 1.5, 0.6])
    exact, rough = (simulate_scan(rooms[0], noise=n, eyes=[eye], spacing=COARSE.spacing) for n in (0, noise))
    ray = exact.points.astype(float) - eye
    depth = np.linalg.norm(ray, axis=1)
    move = rough.points - exact.points
    along = (move * ray).sum(1) / depth
    assert abs((along / kinect_noise(depth)).std() - noise) < 0.05 * noise and abs(along.mean()) < 0.001
    assert np.abs(np.linalg.norm(move, axis=1) - np.abs(along)).max() < 1e-4, "along the ray only"


def test_rows_objects_and_size_are_exact():
    room = compose_room(0, rows=[54, 33, 54, 12], size=(4, 3.5), settings=COARSE)
    assert sorted(room.shapes) == [12, 33, 54, 54] and np.allclose(
        room.points.max(0)[[0, 2]], [4, 3.5], atol=0.02
    )
    for objects in (1, 8, 12):
        assert len(compose_room(1, objects=objects, settings=COARSE).instances()) == objects


def test_backs_turn_to_the_wall(test_shapes):
    settings, at_wall = RoomSettings(backs_to_wall=True, spacing=0.06), 0
    for seed in range(16):
        sofa = compose_room(seed, rows=[54], size=(4, 4), settings=settings)
        sofa = sofa.points[sofa.instance == 0]
        low, high = sofa.min(0)[[0, 2]], sofa.max(0)[[0, 2]]
        sides = np.concatenate([low, 4 - high])
        if sides.min() > settings.gap + 0.002:
            continue
        back = sofa[sofa[:, 1] > 0.7][:, [0, 2]].mean(0)
        at_wall += 1
        assert sides[np.argmin(np.concatenate([back, 4 - back]))] <= settings.gap + 0.002
    assert at_wall >= 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objects": 40, "size": (3, 3)}, "larger size="),
        ({"objects": 0}, "objects=0"),
        ({"rows": []}, "rows= is empty"),
        ({"rows": [92]}, "not rows"),
        ({"rows": [35], "size": (3, 3)}, "larger size="),
        ({"rows": [50]}, "higher than the room"),
        ({"size": (0.2, 3)}, "1 to 50"),
        ({"size": 4}, "1 to 50"),
        ({"rows": [1], "objects": 2}, "not both"),
        ({"cameras": -1}, "cameras=-1"),
    ],
)
def test_rooms_that_are_impossible(options, words):
    with pytest.raises(ValueError, match=words):
        compose_room(0, settings=COARSE, **options)


@pytest.mark.parametrize(
    "values", [{"spacing": 1.0}, {"floor_objects": 0}, {"smallest": (7, 7)}, {"smallest": (0, 4)}]
)
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        RoomSettings(**values)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"noise": -1}, "noise=-1"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"eyes": [1, 2, 3]}, "positions"),
        ({"cameras": 0}, "cameras=0"),
    ],
)
def test_wrong_cameras(rooms, wrong, words):
    with pytest.raises(ValueError, match=words):
        simulate_scan(rooms[0], **wrong)


def test_shapes_without_a_size(tmp_path, test_shapes):
    sized, bare = test_shapes[0], Shape(test_shapes[1].points, test_shapes[1].colors, name="thing")
    mixed = write_collection(tmp_path / "mixed", [sized, bare])
    assert placeable_shapes(mixed, COARSE) == ([0], []), "left out"
    assert compose_room(0, mixed, settings=COARSE).shapes == [0]
    with pytest.raises(ValueError, match="no size"):
        compose_room(0, mixed, rows=[1], settings=COARSE)
    with pytest.raises(ValueError, match="no shape that fits"):
        compose_room(0, mixed.select([False, True]), settings=COARSE)
    with pytest.raises(ValueError, match="no shape that fits"):
        compose_room(0, mixed.select([False, False]), settings=COARSE)
    with pytest.raises(ValueError, match="width, height and depth"):
        compose_room(
            0,
            Collection(pd.DataFrame({"name": ["a", "b"]}), Packed(mixed.packed.path, 2), np.arange(2)),
            settings=COARSE,
        )
    with pytest.raises(ValueError, match="size in meters is not known"):
        resample_surface(bare, 0.02, 10, np.random.default_rng(0))
