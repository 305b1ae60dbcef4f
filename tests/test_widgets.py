"""The widgets without a browser: the methods behind typing, clicking and uploading, and their errors."""

import re
import time

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
    explorer.question.value = "a wooden chair"
    assert not explorer.problem and "a wooden chair" in status_text(explorer)
    cosine = explorer.vectors @ model.encode_text(["a wooden chair"])[0].cpu()
    for kind, part in explorer.nearest.groupby("kind"):
        rows = [row for row, word in enumerate(explorer.kinds) if word == kind]
        expected = sorted(rows, key=lambda row: -cosine[row])[: explorer.top]
        assert part["row"].tolist() == expected
        np.testing.assert_allclose(part["cosine"], cosine[expected], atol=1e-6)
    assert explorer.cloud.label == explorer.shapes[explorer.selected].name and len(explorer.map.query) == 2
    for heading in ("nearest texts", "nearest images", "nearest shapes"):
        assert heading in words(explorer.lists)
    assert explorer.lists.value.count("<img") == 2 * explorer.top, "a picture for every shape and image"


def test_a_click_on_the_map_shows_that_shape_and_not_itself_among_its_neighbors(explorer):
    explorer.question.value = "a wooden chair"
    before, asked = explorer.cloud.xyz, words(explorer.lists)
    row = next(row for row in range(12) if row != explorer.selected)
    explorer.map.selected = row
    assert (
        explorer.selected == row
        and explorer.cloud.label == explorer.shapes[row].name
        and explorer.cloud.xyz != before
    )
    assert (
        words(explorer.lists) != asked
        and row not in explorer.nearest["row"].tolist()
        and explorer.map.query == []
    )
    explorer.map.selected = 12 + row  # its picture
    assert explorer.selected == row
    explorer.map.selected = explorer.kinds.index("text")
    assert not explorer.problem and "text" in status_text(explorer)


def test_the_pointer_over_a_mark_brings_its_picture(explorer):
    explorer.map.hovered = 3
    assert explorer.map.pictured == 3 and explorer.map.picture.startswith("data:image/png;base64,")


def test_an_empty_or_strange_question_leaves_the_last_answer(explorer):
    explorer.search("a lamp")
    kept = explorer.lists.value
    for question in ("", "   "):
        explorer.search(question)
        assert explorer.problem and "empty" in status_text(explorer) and explorer.lists.value == kept
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
        and mine.cloud.label == "my box"
        and len(mine.cloud.xyz) > 0
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
def test_bad_labels_are_a_clear_line_and_the_last_bars_stay(mine, box, labels, line):
    send(mine.upload, "box.glb", box)
    kept = mine.bars.value
    mine.labels.value = labels
    assert mine.problem and line in status_text(mine) and mine.bars.value == kept
    mine.labels.value = "box\nball"
    assert not mine.problem, "and the next good labels work"


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
def test_bad_files_are_a_clear_line_and_the_last_shape_stays(mine, box, name, data, line):
    send(mine.upload, "box.glb", box)
    shape, bars = mine.shape, mine.bars.value
    send(mine.upload, name, data)
    assert mine.problem and line in status_text(mine) and mine.shape is shape and mine.bars.value == bars
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


def test_a_query_colors_the_room_by_heat(model):
    room = compose_room(1005, settings=RoomSettings(floor_objects=4, small_objects=1, spacing=0.05))
    asking = AskTheRoom(room, model)
    plain = asking.cloud.rgb
    asking.question.value = "something to sit on"
    assert (
        not asking.problem
        and "something to sit on" in status_text(asking)
        and asking.cloud.label == "something to sit on"
    )
    colors = np.frombuffer(asking.cloud.rgb, np.uint8).reshape(-1, 3)
    assert (
        asking.cloud.rgb != plain
        and len(np.unique(colors, axis=0)) >= 3
        and len(colors) == min(asking.limit, len(room))
    )
    kept = asking.cloud.rgb
    for question in ("", "?!"):
        asking.ask(question)
        assert asking.problem and status_text(asking) and asking.cloud.rgb == kept
    asking.show_colors()
    assert asking.cloud.rgb == plain and not asking.problem


def test_a_scan_without_colors_or_with_z_up(model):
    generator = np.random.default_rng(0)
    floor = np.c_[generator.uniform(0, 3, (1500, 2)), np.zeros(1500)]
    thing = np.c_[generator.uniform(1, 1.6, (600, 2)), generator.uniform(0.02, 0.8, 600)]
    asking = AskTheRoom(Scene(np.r_[floor, thing].astype(np.float32), up="z", unit="m"), model)
    asking.ask("a box")
    assert not asking.problem, asking.message
    assert np.ptp(asking.points[:, 1].numpy()) < 1, "y is up"


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
            first = bytes(monitor.picture.value)
            assert first.startswith(b"\x89PNG") and "epoch 2, loss 3" in monitor.message
            file.write("3,2."), file.flush()  # half a row
            time.sleep(0.3)
            assert len(monitor.table) == 2 and not monitor.problem
            file.write("5,1,2\n"), file.flush()
            until(lambda: len(monitor.table) == 3)
        assert monitor.table["loss"].tolist() == [3.5, 3.0, 2.5] and bytes(monitor.picture.value) != first
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


def test_a_notebook_with_all_four_stays_under_200_kb(tmp_path):
    cells = [
        "from cg3d.viz.widgets import AskTheRoom, ClassifyMyShape, Explorer, RunMonitor\nfrom cg3d import load\nfrom cg3d.scenes.synthetic_rooms import compose_room\nimport trimesh\nfrom IPython.display import display\nmodel = load('nano')",
        "explorer = Explorer(model, limit=40); explorer.search('a wooden chair'); explorer.map.hovered = 2; display(explorer)",
        "mine = ClassifyMyShape(model); mine.receive('box.glb', trimesh.creation.box((1, 2, 1)).export(file_type='glb')); display(mine)",
        "asking = AskTheRoom(compose_room(1)); asking.ask('a chair'); display(asking)",
        "open('metrics.csv', 'w').write('epoch,loss\\n1,3\\n2,2\\n'); monitor = RunMonitor('metrics.csv', follow=False); display(monitor)",
        "assert not any(panel.problem for panel in (explorer, mine, asking, monitor)), [panel.message for panel in (explorer, mine, asking, monitor)]",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    ExecutePreprocessor(
        timeout=300, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path)))
    ).preprocess(notebook, dict(metadata=dict(path=str(tmp_path))))
    nbformat.write(notebook, tmp_path / "four.ipynb")
    views = [
        output["data"]
        for cell in notebook.cells
        for output in cell.outputs
        if output.output_type == "display_data"
    ]
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in views) == 4
    assert (tmp_path / "four.ipynb").stat().st_size < 200_000, (tmp_path / "four.ipynb").stat().st_size
