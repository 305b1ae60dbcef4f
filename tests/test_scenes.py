"""Scenes from file to result: what is refused, what is reported, and whether grounding is better than chance."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import miniatures
import numpy as np
import pandas as pd
import pytest
import torch
import trimesh

import cg3d
from cg3d.data.furniture import furniture
from cg3d.evaluation.conditions import CONDITIONS, conditions
from cg3d.geometry.segmentation import overlaps
from cg3d.io.scene import Scene, read_scene
from cg3d.render.scene import scene_picture
from cg3d.scenes.evaluation import (
    SceneQueryConfig,
    description_queries,
    evaluate_scenes,
    function_queries,
    name_queries,
    named_instances,
)
from cg3d.scenes.grounding import propose, query_scene
from cg3d.scenes.synthetic_rooms import RoomSettings, compose_room, simulate_scan

ROOT = Path(__file__).parent.parent
COARSE = RoomSettings(floor_objects=7, small_objects=3, spacing=0.04)


@pytest.fixture(scope="module")
def model():
    return cg3d.load("nano")


@pytest.fixture(scope="module")
def rooms():
    return [compose_room(seed, settings=COARSE) for seed in range(3)]


def test_rooms_have_only_test_shapes_at_their_sizes(rooms):
    test = furniture().select(split="test")
    for room in rooms:
        assert len(room.shapes) == len(room.instances()) and len(set(room.shapes)) == len(room.shapes)
        for number, row in zip(room.instances(), room.shapes):
            assert np.isclose(
                np.ptp(room.points[room.instance == number], axis=0)[1],
                test.table["height"].iloc[row],
                atol=0.05,
            )


def test_a_camera_sees_a_part_and_nothing_else(rooms):
    room = rooms[0]
    seen = simulate_scan(room, 2, noise=0.0)
    whole = {tuple(point) for point in room.points.round(4).tolist()}
    assert (
        100 < len(seen) < len(room)
        and all(tuple(point) in whole for point in seen.points.round(4).tolist())
        and seen.shapes == room.shapes
    )
    with pytest.raises(ValueError, match="cameras=0 must be at least 1"):
        simulate_scan(room, 0)


def test_segments_cover_most_objects(rooms):
    best = np.concatenate(
        [
            overlaps(propose(room, "geometry").indices, list(named_instances(room).values()), len(room)).max(
                0
            )
            for room in rooms
        ]
    )
    assert (best >= 0.5).mean() > 0.7, best


@pytest.mark.parametrize("source", ["instances", "geometry"])
def test_grounding_is_better_than_chance_and_the_largest_object(rooms, model, source):
    table = evaluate_scenes(rooms, model, name_queries, [source], progress=False).set_index("method")
    assert table.loc["cg3d", "top3_25"] > table.loc["chance", "top3_25"] and table.loc["cg3d", "miou"] > max(
        table.loc["chance", "miou"], table.loc["largest object", "miou"]
    )
    assert table.loc["cg3d", "mean_class"] > table.loc["chance", "mean_class"]
    stated = conditions(model, [True], "{} | a {}. (2)")
    assert (table[list(CONDITIONS)] == pd.Series(stated)).all().all() and stated["file"] != "-"


def test_function_and_description_queries(rooms):
    test = furniture().select(split="test")
    for room in rooms:
        assert sum(map(len, description_queries(room, test).values())) == len(named_instances(room))
        for numbers in function_queries(room).values():
            assert set(numbers) <= set(named_instances(room))
    with pytest.raises(ValueError, match="composed room"):
        description_queries(Scene(rooms[0].points, up="y", unit="m"), test)


@pytest.mark.parametrize("query,words", [("", "empty"), ("  ", "blank"), ("?!", "contains no word")])
def test_empty_queries_are_refused(rooms, model, query, words):
    with pytest.raises(ValueError, match=words):
        query_scene(rooms[0], query, model)


def test_a_query_in_another_script_gives_a_warning_and_a_result(rooms, model):
    with pytest.warns(UserWarning, match="cyrillic"):
        answer = query_scene(rooms[0], "стул", model, "instances", progress=False)
    assert len(answer.table) == len(propose(rooms[0], "instances"))


def test_a_changed_model_embeds_again(rooms):
    model = cg3d.load("nano", device="cpu")
    first = query_scene(rooms[0], "a chair", model, "instances", progress=False).table
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.mul_(0.9)
    again = query_scene(rooms[0], "a chair", model, "instances", progress=False).table
    assert not np.allclose(again.sort_values("proposal")["score"], first.sort_values("proposal")["score"])


def test_a_second_query_embeds_and_hashes_nothing(rooms, monkeypatch):
    """The first query hashes the weights and embeds proposals and background; a second one only its own text."""
    model = cg3d.load("nano", device="cpu")
    query_scene(rooms[0], "a chair", model, "instances", progress=False)
    hashed, texts = [], []
    real_update, real_encode = cg3d.models.cg3d.update_hash, model.encode_text
    monkeypatch.setattr(cg3d.models.cg3d, "update_hash", lambda *a: (hashed.append(1), real_update(*a)))
    monkeypatch.setattr(model, "encode_text", lambda t, **o: (texts.append(list(t)), real_encode(t, **o))[1])
    monkeypatch.setattr(model, "encode_shape", lambda *a, **o: pytest.fail("proposals are embedded again"))
    query_scene(rooms[0], "a sofa", model, "instances", progress=False)
    assert not hashed and texts == [["sofa", "a sofa."]]


def test_background_phrases_are_checked_and_the_query_is_left_out(rooms, model):
    with pytest.raises(TypeError, match="single string 'wall'"):
        query_scene(rooms[0], "a chair", model, "instances", background="wall", progress=False)
    with pytest.raises(ValueError, match="no phrase other than the query"):
        query_scene(rooms[0], "Wall", model, "instances", background=["wall"], progress=False)
    both = query_scene(rooms[0], "chair", model, "instances", background=["wall", "chair"], progress=False)
    alone = query_scene(rooms[0], "chair", model, "instances", background=["a wall", "wall"], progress=False)
    assert both.table["score"].tolist() == alone.table["score"].tolist()


def test_the_whole_scan_is_the_last_result(model):
    "A table-top scan: the object, not the whole scan."
    rng = np.random.default_rng(0)
    top = np.concatenate([rng.random((4000, 1)) * 1.2, np.zeros((4000, 1)), rng.random((4000, 1)) * 0.8], 1)
    mug = furniture().table.query("category in ('mug', 'cup', 'drinking glass')").index[0]
    thing = furniture()[mug].points
    thing = 0.06 * (thing - [0, thing[:, 1].min(), 0]) + [0.6, 0.004, 0.4]
    scene = Scene(np.concatenate([top, thing]), up="y", unit="m")
    answer = query_scene(scene, "a mug", model, progress=False)
    assert (answer.indices() >= 4000).mean() > 0.9, answer.table


def test_millimeters_z_up_and_broken_points_are_reported(rooms, tmp_path):
    room = rooms[0]
    points = 1000 * room.upright[:, [2, 0, 1]]
    points[3] = np.nan
    trimesh.PointCloud(points, (255 * room.colors).astype(np.uint8)).export(tmp_path / "scan.ply")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scene = read_scene(tmp_path / "scan.ply")
    notes = "\n".join(scene.notes)
    assert (
        "1 of" in notes
        and "NaN" in notes
        and "millimeters" in notes
        and "found to be z" in notes
        and any("millimeters" in str(one.message) for one in caught)
    )
    assert np.isclose(np.ptp(scene.upright[:, 1]), np.ptp(room.upright[:, 1]), atol=0.05)
    whole = read_scene(tmp_path / "scan.ply", up="y", unit="m")  # stated beats estimated
    assert np.ptp(whole.points, axis=0).max() > 1000


def test_a_scannet_folder_is_queried(model, tmp_path):
    "The layout's files, with more vertices than the miniature of the readers' tests."
    small, root = (miniatures.scannet(tmp_path / name) / "scans/scene0000_00" for name in ("small", "large"))
    with pytest.raises(ValueError, match="no instance has at least 10 points"):
        propose(read_scene(small), "instances")
    assert propose(read_scene(small)).kinds[0] != "instance", "too small instances: geometry instead"
    boxes = [((4, 3, 0.1), (0, 0, 0)), ((0.5, 0.5, 2), (1, 0.5, 1.1)), ((1, 0.4, 0.4), (-1, 0, 0.3))]
    parts = [
        trimesh.creation.box(size).subdivide().subdivide().subdivide().apply_translation(at)
        for size, at in boxes
    ]
    for part in parts:
        part.visual.vertex_colors = [90, 90, 200, 255]
    trimesh.util.concatenate(parts).export(root / "scene0000_00_vh_clean_2.ply")
    segments = [number for number, part in zip((1, 4, 7), parts) for _ in part.vertices]
    (root / "scene0000_00_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps({"sceneId": "scene0000_00", "segIndices": segments})
    )
    scene = read_scene(root)
    assert (
        scene.up == "z"
        and sorted(scene.names.values()) == ["bench", "cabinet"]
        and [len(rows) for rows in named_instances(scene).values()]
        == [len(part.vertices) for part in parts[1:]]
    )
    table = evaluate_scenes([scene], model, sources=["instances"], progress=False)
    assert set(table["method"]) == {"cg3d", "largest object", "chance"} and (table["queries"] == 2).all()


def test_a_scene_with_one_object_and_no_floor(model):
    shape = furniture()[0]
    alone = Scene(shape.points * np.float32(0.5), shape.colors, up="y", unit="m")
    answer = query_scene(alone, "a thing", model, progress=False)
    assert len(answer.indices()) > 0.8 * len(alone) and answer.heat.max() > 0
    dots = Scene(10 * np.random.default_rng(0).random((50, 3)), up="y", unit="m")  # nothing holds together
    assert len(query_scene(dots, "a chair", model, progress=False).table) >= 1


def test_a_room_without_floor_and_walls(rooms, model):
    room = rooms[0].subset(rooms[0].instance >= 0)
    best = overlaps(propose(room, "geometry").indices, list(named_instances(room).values()), len(room)).max(0)
    assert (best >= 0.5).mean() > 0.7, best
    assert len(query_scene(room, "a chair", model, "geometry", progress=False).indices()) < 0.5 * len(room)


@pytest.mark.parametrize(
    "points,error,words",
    [
        (np.full((20, 3), np.nan), ValueError, "0 usable points|usable points"),
        (np.ones((20, 3)), ValueError, "all 20 points are equal"),
        (np.zeros((4, 3)), ValueError, "at least 10"),
        (np.zeros((20, 2)), ValueError, r"\(N, 3\)"),
    ],
)
def test_points_that_are_no_scene(points, error, words):
    with pytest.raises(error, match=words):
        Scene(points)


def test_pictures(rooms, model):
    answer = query_scene(rooms[0], "a chair", model, "instances", progress=False)
    plain, hot = (np.asarray(scene_picture(rooms[0], heat, 120)).astype(int) for heat in (None, answer.heat))
    assert plain.shape == (120, 120, 3) and (plain != hot).any()
    with pytest.raises(ValueError, match="heat has the shape"):
        scene_picture(rooms[0], answer.heat[:5])


@pytest.mark.parametrize(
    "values,words",
    [
        ({"proposals": "boxes"}, "instances, geometry"),
        ({"queries": "colors"}, "names, functions, descriptions"),
        ({"rooms": 0}, "rooms=0"),
        ({"ask": "a | ."}, "contains no word"),
    ],
)
def test_settings_are_checked(values, words):
    with pytest.raises(ValueError, match=words):
        SceneQueryConfig(**values)


def test_the_job_on_rooms_and_on_a_scan(rooms, tmp_path):
    def job(*parameters):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "papermill",
            "--no-progress-bar",
            str(ROOT / "nbs/scene_query.ipynb"),
            str(tmp_path / "out.ipynb"),
            *map(str, parameters),
        ]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    done = job(
        "-p",
        "rooms",
        1,
        "-p",
        "views",
        "partial",
        "-p",
        "proposals",
        "instances",
        "-p",
        "queries",
        "names",
        "-p",
        "ask",
        "a chair",
        "-p",
        "out",
        tmp_path / "rooms",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        set(pd.read_csv(tmp_path / "rooms/results.csv")["method"]) == {"cg3d", "largest object", "chance"}
        and json.loads((tmp_path / "rooms/scene_query.json").read_text())["rooms"] == 1
    )
    np.savez(tmp_path / "scan.npz", points=rooms[0].points, colors=rooms[0].colors)
    done = job(
        "-p",
        "scene",
        tmp_path / "scan.npz",
        "-p",
        "up",
        "y",
        "-p",
        "ask",
        "a chair | a table",
        "-p",
        "out",
        tmp_path / "scan",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        len(pd.read_csv(tmp_path / "scan/answers.csv")) == 6
        and (tmp_path / "scan/figures/heat_1.png").stat().st_size > 0
    )
