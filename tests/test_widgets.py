"""The widgets without a browser: the methods behind typing, clicking and uploading, and their errors."""

import json
import re
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import trimesh
from nbconvert.preprocessors import ExecutePreprocessor

from cg3d.io.scene import Scene
from cg3d.pretrained.factory import load
from cg3d.scenes.synthetic_rooms import RoomSettings, compose_room
from cg3d.viz.widgets import AskTheRoom, ClassifyMyShape, Explorer, RunMonitor


@pytest.fixture(scope="module")
def model():
    return load("nano")


@pytest.fixture(scope="module")
def explorer(model):
    return Explorer(model, limit=12)


def words(widget) -> str:
    """Text of an HTML part without its tags."""
    return re.sub(r"<[^>]+>", " ", widget.value)


def status_text(panel) -> str:
    """Text of the status line, which must be one line without a traceback or a temporary path."""
    assert "\n" not in panel.message and "Traceback" not in panel.message and "/tmp" not in panel.message
    assert 'role="status"' in panel.status.value and 'aria-live="polite"' in panel.status.value
    return panel.message


def press_enter(question) -> None:
    """Enter in a text field whose text has not changed, as the browser sends it."""
    question._on_message(question.text, {"event": "submit"}, [])


def click(explorer, row: int) -> None:
    """A click on a mark of the map, through Plotly's own dispatch."""
    from plotly.callbacks import InputDeviceState, Points

    trace = next(trace for trace in explorer._groups if row in trace.customdata)
    index = trace.customdata.tolist().index(row)
    trace._dispatch_on_click(Points(point_inds=[index], trace_name=trace.name), InputDeviceState())


def send(upload, name: str, data: bytes, announced: int | None = None, pieces: int = 3) -> None:
    """A file as the browser sends it."""
    upload._receive(
        upload, dict(kind="start", name=name, size=len(data) if announced is None else announced), []
    )
    step = max(1, -(-len(data) // pieces))
    for start in range(0, len(data), step):
        upload._receive(upload, dict(kind="piece"), [memoryview(data[start : start + step])])
    upload._receive(upload, dict(kind="end"), [])


# ------------------------------------------------------------------ Explorer


def test_explorer_answers_a_question_with_the_nearest_of_each_kind(explorer, model):
    explorer.question.text.value = "a wooden chair"
    assert not explorer.problem and "a wooden chair" in status_text(explorer)
    cosine = explorer.vectors @ model.encode_text(["a wooden chair"])[0].cpu()
    for kind, part in explorer.nearest.groupby("kind"):
        rows = [row for row, word in enumerate(explorer.kinds) if word == kind]
        expected = sorted(rows, key=lambda row: -cosine[row])[: explorer.top]
        assert part["row"].tolist() == expected
        np.testing.assert_allclose(part["cosine"], cosine[expected], atol=1e-6)
    assert explorer.cloud.title == explorer.shapes[explorer.selected].name
    assert explorer._query.x[0] is not None and explorer._chosen.x[0] is None
    for heading in ("nearest texts", "nearest images", "nearest shapes"):
        assert heading in words(explorer.lists)
    assert explorer.lists.value.count("<img") == 2 * explorer.top, "a picture for every shape and image"


def test_a_click_on_the_map_shows_that_shape_and_not_itself_among_its_neighbors(explorer):
    explorer.search("a wooden chair")
    before, asked = explorer.cloud.figure.data[0].x.copy(), words(explorer.lists)
    row = next(row for row in range(12) if row != explorer.selected)
    click(explorer, row)
    assert explorer.selected == row and explorer.cloud.title == explorer.shapes[row].name
    assert not np.array_equal(explorer.cloud.figure.data[0].x, before)
    assert words(explorer.lists) != asked and row not in explorer.nearest["row"].tolist()
    assert explorer._query.x[0] is None and explorer._chosen.x[0] == explorer.layout.table["x"][row]
    click(explorer, 12 + row)  # its picture
    assert explorer.selected == row and explorer.mark.value == 12 + row
    explorer.mark.value = explorer.kinds.index("text")  # as the keyboard does
    assert not explorer.problem and "text" in status_text(explorer)


def test_enter_on_an_unchanged_question_asks_again(explorer):
    explorer.question.text.value = "a lamp"
    asked = words(explorer.lists)
    click(explorer, 3)
    assert words(explorer.lists) != asked
    press_enter(explorer.question)
    assert words(explorer.lists) == asked and "“a lamp”" in status_text(explorer)


def test_the_map_has_every_mark_once_and_a_legend(explorer):
    rows = [int(row) for trace in explorer._groups for row in trace.customdata]
    assert sorted(rows) == list(range(len(explorer.names)))
    for trace in explorer._groups:
        assert trace.type == "scattergl" and trace.name and trace.showlegend is not False
        named = [f"{explorer.names[row]} · {explorer.kinds[row]}" for row in trace.customdata]
        assert list(trace.hovertext) == named
        np.testing.assert_array_equal(trace.x, explorer.layout.table["x"][trace.customdata])
    assert explorer.map.layout.uirevision and explorer.cloud.figure.layout.scene.uirevision


def test_the_pointer_over_a_mark_brings_its_picture(explorer):
    trace = next(trace for trace in explorer._groups if 3 in trace.customdata)
    explorer._on_hover(trace, [trace.customdata.tolist().index(3)])
    assert explorer.shapes[3].name in words(explorer.preview)
    assert 'src="data:image/png;base64,' in explorer.preview.value


def test_an_empty_or_strange_question_clears_the_last_answer(explorer):
    for question in ("", "   "):
        explorer.search("a lamp")
        assert explorer.lists.value and len(explorer.cloud.figure.data[0].x)
        explorer.search(question)
        assert explorer.problem and "empty" in status_text(explorer)
        assert not explorer.lists.value and not len(explorer.cloud.figure.data[0].x)
        assert explorer._query.x[0] is None and explorer.nearest.empty
    explorer.select(10_000)
    assert explorer.problem and "10000" in status_text(explorer)
    explorer.search("<script>alert(1)</script> " + "word " * 300)  # long, and what a browser must not run
    assert "<script>" not in explorer.status.value and "<script>" not in explorer.lists.value


def test_explorer_needs_three_shapes(model):
    with pytest.raises(ValueError, match="at least three"):
        Explorer(model, limit=2)


# ------------------------------------------------------------------ Classify my shape


@pytest.fixture
def mine(model):
    return ClassifyMyShape(model, labels=["box", "ball", "spoon"], limit_mb=1)


@pytest.fixture(scope="module")
def box() -> bytes:
    return trimesh.creation.box((1, 2, 1)).export(file_type="glb")


def test_an_upload_in_pieces_is_read_and_named(mine, model, box):
    send(mine.upload, "my box.glb", box)
    assert (
        not mine.problem
        and status_text(mine).startswith("my box: ")
        and mine.cloud.title == "my box"
        and len(mine.cloud.figure.data[0].x) > 2048
    )
    expected = model.classify(mine.shape, ["box", "ball", "spoon"])
    assert mine.answers["label"].tolist() == expected["label"].tolist()
    np.testing.assert_allclose(mine.answers["probability"], expected["probability"], atol=1e-6)
    assert f"{100 * expected['probability'].iloc[0]:.1f} %" in words(mine.bars) and mine.answers[
        "probability"
    ].sum() == pytest.approx(1, abs=1e-4)


def test_edited_labels_change_the_bars_without_a_second_upload(mine, box):
    send(mine.upload, "box.glb", box)
    shape, before = mine.shape, mine.bars.value
    mine.labels.value = "chair\n\n  box  \n\n"
    assert (
        mine.shape is shape
        and mine.bars.value != before
        and sorted(mine.answers["label"]) == ["box", "chair"]
        and "blank" in status_text(mine)
    )


@pytest.mark.parametrize(
    "labels, line",
    [
        ("box\nball\nbox", "label 'box' is given 2 times"),
        (" box\nbox ", "label 'box' is given 2 times"),
        ("box", "at least two labels"),
        ("", "at least two labels"),
        ("\n \n", "at least two labels"),
    ],
)
def test_bad_labels_are_a_clear_line_and_no_stale_bars(mine, box, labels, line):
    send(mine.upload, "box.glb", box)
    mine.labels.value = labels
    assert mine.problem and line in status_text(mine) and not mine.bars.value and mine.answers.empty
    mine.labels.value = "box\nball"
    assert not mine.problem and mine.bars.value, "and the next good labels work"


def test_classify_without_a_file_says_so(mine):
    mine.button.click()
    assert mine.problem and "choose a file first" in status_text(mine)


@pytest.mark.parametrize(
    "name, data, line",
    [
        ("letter.glb", b"I am a letter, not a mesh", "letter.glb: its JSON cannot be parsed"),
        ("empty.ply", b"", "empty.ply is empty"),
        ("chair.blend", b"BLENDER", "chair.blend: unknown suffix '.blend'"),
        ("noname", b"x", "noname: unknown suffix"),
        ("broken.obj", b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "broken.obj"),
        ("faces.stl", b"solid \x00\xff\xfe nothing", "faces.stl"),
        ("../../etc/passwd.glb", b"root", "passwd.glb: its JSON cannot be parsed"),
    ],
)
def test_bad_files_are_a_clear_line_and_no_stale_shape(mine, box, name, data, line):
    send(mine.upload, "box.glb", box)
    send(mine.upload, name, data)
    assert mine.problem and line in status_text(mine)
    assert mine.shape is None and not mine.bars.value and not len(mine.cloud.figure.data[0].x)
    send(mine.upload, "again.glb", box)
    assert not mine.problem and mine.shape.name == "again"


def test_a_200_mb_upload_is_refused_before_it_is_sent(mine):
    mine.upload._receive(mine.upload, dict(kind="refused", name="huge.ply", size=200_000_000), [])
    assert mine.problem and status_text(mine).startswith("huge.ply has 200 MB; the limit is 1 MB")
    mine.upload._receive(mine.upload, dict(kind="start", name="huge.ply", size=200_000_000), [])
    mine.upload._receive(mine.upload, dict(kind="piece"), [b"x" * 1000])
    mine.upload._receive(mine.upload, dict(kind="end"), [])
    assert mine.problem and mine.shape is None and "limit is 1 MB" in status_text(mine)
    send(mine.upload, "liar.ply", bytes(5000), announced=1000)
    assert mine.problem and "more than" in status_text(mine)
    send(mine.upload, "short.ply", bytes(100), announced=1000)
    assert mine.problem and "100 of 1,000 bytes" in status_text(mine)
    mine.receive("big.ply", bytes(1_500_000))  # past the upload box
    assert mine.problem and "limit is 1 MB" in status_text(mine)


def test_the_up_axis_can_be_set_after_the_upload(mine):
    send(mine.upload, "tall.glb", trimesh.creation.box((1, 1, 3)).export(file_type="glb"))
    before = np.ptp(mine.shape.points, axis=0)
    mine.up.value = "z"
    after = np.ptp(mine.shape.points, axis=0)
    assert before.argmax() == 2 and after.argmax() == 1 and not mine.problem


# ------------------------------------------------------------------ Ask the room


@pytest.fixture(scope="module")
def room():
    return compose_room(1005, settings=RoomSettings(floor_objects=4, small_objects=1, spacing=0.05))


def drawn_colors(asking) -> np.ndarray:
    """Colors of the drawn points, (N, 3), 0 to 255."""
    marker = asking.figure.data[0].marker
    scale = [entry[1].removeprefix("rgb(").removesuffix(")").split(",") for entry in marker.colorscale]
    return np.array(scale, int)[np.asarray(marker.color)]


def test_a_query_tints_the_answer_alone(model, room):
    asking = AskTheRoom(room, model)
    plain = drawn_colors(asking)
    asking.question.text.value = "something to sit on"
    assert not asking.problem and "something to sit on" in status_text(asking)
    assert asking.figure.layout.title.text == "something to sit on"
    changed = np.abs(drawn_colors(asking) - plain).max(1)
    answer = asking.answer.mask()[asking.drawn]
    assert answer.any() and (changed[answer] > 40).mean() > 0.8 and (changed[~answer] > 25).mean() < 0.02
    for wrong in ("", "?!"):
        asking.ask("something to sit on")
        asking.ask(wrong)
        assert asking.problem and status_text(asking) and asking.answer is None and not asking.table.value
        assert np.array_equal(drawn_colors(asking), plain) and not asking.figure.layout.scene.annotations
        assert not any(box.visible for box in asking.figure.data[1:])
    asking.ask("something to sit on")
    asking.show_colors()
    assert np.array_equal(drawn_colors(asking), plain) and not asking.problem and asking.answer is None


def test_the_best_three_parts_have_boxes_and_names_and_points_can_be_chosen(model, room):
    asking = AskTheRoom(room, model)
    asking.ask("a chair")
    assert [box.visible for box in asking.figure.data[1:]] == [True] * 3 + [False]
    for place, (rank, name) in enumerate(zip(asking.parts["rank"], asking.parts["name"])):
        points, box = room.upright[asking.answer.indices(rank)], asking.figure.data[1 + place]
        inside = [(points[:, i] * 1000 >= np.nanmin(box[axis]) - 1).mean() for i, axis in enumerate("xyz")]
        assert min(inside) > 0.95 and name in set(room.names.values())
        assert f"{place + 1} {name}" in asking.figure.layout.scene.annotations[place].text
        assert asking.choose(int(asking.answer.indices(rank)[0])) <= rank
        assert asking.figure.data[4].visible
    camera = asking.figure.layout.scene.camera.eye.x
    asking.ask("a sofa")
    assert asking.figure.layout.scene.camera.eye.x == camera and not asking.figure.data[4].visible


def test_a_room_draws_thirty_thousand_points(model):
    asking = AskTheRoom(compose_room(1005, settings=RoomSettings(floor_objects=1, small_objects=0)), model)
    assert len(asking.figure.data[0].x) >= 30_000


def test_a_scan_without_colors_or_with_z_up(model):
    generator = np.random.default_rng(0)
    floor = np.c_[generator.uniform(0, 3, (1500, 2)), np.zeros(1500)]
    thing = np.c_[generator.uniform(1, 1.6, (600, 2)), generator.uniform(0.02, 0.8, 600)]
    asking = AskTheRoom(Scene(np.r_[floor, thing].astype(np.float32), up="z", unit="m"), model)
    asking.ask("a box")
    assert not asking.problem, asking.message
    assert np.ptp(asking.figure.data[0].y) < 1000, "y is up"
    assert all(name.endswith("?") for name in asking.parts["name"]), "names without labels are guesses"


# ------------------------------------------------------------------ Run monitor


def until(true, seconds: float = 20) -> None:
    end = time.time() + seconds
    while not true() and time.time() < end:
        time.sleep(0.05)
    assert true()


def test_the_monitor_follows_a_table_that_grows(tmp_path):
    monitor = RunMonitor(tmp_path / "run", every=0.05)
    try:
        assert monitor.message.startswith("waiting for") and not monitor.problem
        (tmp_path / "run").mkdir()
        with (tmp_path / "run" / "metrics.csv").open("w") as file:
            file.write("epoch,loss,3d_text,seconds\n1,3.5,1.5,2\n2,3.0,1.25,2\n"), file.flush()
            until(lambda: len(monitor.table) == 2)
            assert list(monitor.figure.data[0].y) == [3.5, 3.0] and "epoch 2, loss 3" in monitor.message
            file.write("3,2."), file.flush()  # half a row
            time.sleep(0.3)
            assert len(monitor.table) == 2 and not monitor.problem
            file.write("5,1,2\n"), file.flush()
            until(lambda: len(monitor.table) == 3)
        assert monitor.table["loss"].tolist() == [3.5, 3.0, 2.5]
        assert list(monitor.figure.data[0].y) == [3.5, 3.0, 2.5] and monitor.figure.data[1].name == "3d_text"
        monitor.button.value = False
        with (tmp_path / "run" / "metrics.csv").open("a") as file:
            file.write("4,2.0,1,2\n")
        time.sleep(0.3)
        assert len(monitor.table) == 3, "stopped"
        monitor.button.value = True
        until(lambda: len(monitor.table) == 4)
    finally:
        monitor.stop()


def test_a_table_without_epochs_or_columns_is_one_line(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss\n")
    monitor = RunMonitor(path, follow=False)
    assert monitor.problem and "no finished epoch" in monitor.message
    path.write_text("when,what\n1,2\n2,3\n")
    monitor.refresh()
    assert monitor.problem and "no column" in monitor.message and "\n" not in monitor.message
    with pytest.raises(ValueError, match="every=0"):
        RunMonitor(path, every=0)


# ------------------------------------------------------------------ what a notebook keeps


def test_a_notebook_with_all_four_stays_small(tmp_path):
    cells = [
        "from cg3d.viz.widgets import AskTheRoom, ClassifyMyShape, Explorer, RunMonitor\nfrom cg3d import load\nfrom cg3d.scenes.synthetic_rooms import RoomSettings, compose_room\nimport trimesh\nfrom IPython.display import display\nmodel = load('nano')",
        "explorer = Explorer(model, limit=6); explorer.search('a wooden chair'); display(explorer)",
        "mine = ClassifyMyShape(model); mine.receive('box.glb', trimesh.creation.box((1, 2, 1)).export(file_type='glb')); display(mine)",
        "asking = AskTheRoom(compose_room(1, settings=RoomSettings(floor_objects=2, small_objects=1, spacing=0.05)), model); asking.ask('a chair'); display(asking)",
        "open('metrics.csv', 'w').write('epoch,loss\\n1,3\\n2,2\\n'); monitor = RunMonitor('metrics.csv', follow=False); display(monitor)",
        "assert not any(panel.problem for panel in (explorer, mine, asking, monitor)), [panel.message for panel in (explorer, mine, asking, monitor)]",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    ExecutePreprocessor(
        timeout=600,
        kernel_name="python3",
        store_widget_state=False,
        resources=dict(metadata=dict(path=str(tmp_path))),
    ).preprocess(notebook, dict(metadata=dict(path=str(tmp_path))))
    nbformat.write(notebook, tmp_path / "four.ipynb")
    views = [
        output["data"]
        for cell in notebook.cells
        for output in cell.outputs
        if output.output_type == "display_data"
    ]
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in views) == 4
    assert (tmp_path / "four.ipynb").stat().st_size < 20_000, (tmp_path / "four.ipynb").stat().st_size


def test_no_notebook_of_the_repository_stores_the_state_of_its_widgets():
    root = Path(__file__).parent.parent / "nbs"
    folders = ("viz", "tutorials")
    stored = [
        path.name
        for folder in folders
        for path in sorted((root / folder).glob("*.ipynb"))
        if "widgets" in json.loads(path.read_text()).get("metadata", {})
    ]
    assert not stored, "execute these with store_widget_state=False"
