"""The tutorial with the widgets in a real JupyterLab, driven by headless Chromium through Playwright.

Skipped, with the reason, where Chromium or Playwright is missing. Screenshots go to $CG3D_SHOTS, or to pytest's own folder."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import trimesh
from chromium import CHROMIUM

ROOT = Path(__file__).parent.parent.parent
TUTORIAL = "09_hands_on.ipynb"
SOFTWARE_GL = (
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
)  # WebGL without a GPU

pytest.importorskip("playwright", reason="Playwright is not installed: pip install playwright")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'cg3d[notebooks]'")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("CG3D_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that serves a copy of the tutorial."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "nbs" / "tutorials" / TUTORIAL, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True",  # to switch the theme
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail((folder / "lab.log").read_text()[-2000:])
            yield f"http://127.0.0.1:{port}/lab/tree/{TUTORIAL}?reset"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture(scope="module")
def page(lab):
    """The tutorial, run from top to bottom."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=120_000)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *SOFTWARE_GL])
        page = browser.new_page(viewport=dict(width=1400, height=1300))
        page.set_default_timeout(120_000)
        page.goto(lab)
        page.locator(".jp-Notebook .jp-CodeCell").first.click(timeout=180_000)
        page.wait_for_timeout(2000)
        page.get_by_text("Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt")
        expect(prompts.last).not_to_have_text(re.compile(r"\[\*\]:"), timeout=600_000)
        expect(
            page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
        ).to_have_count(0)
        if page.get_by_text("Open privacy policy").count():
            page.get_by_role("button", name="No", exact=True).click()  # no news from Jupyter
        yield page
        browser.close()


def status(page, cell: str):
    """The status line of the widget that stands under the cell with this text."""
    return page.locator(".jp-CodeCell", has_text=cell).locator(".cg3d-status").first


def panel(page, cell: str):
    """The widget that stands under the cell with this text."""
    return page.locator(".jp-CodeCell", has_text=cell).locator(".cg3d-panel").first


def shoot(page, widget, path: Path) -> None:
    """A screenshot of one widget, when Plotly has drawn it."""
    widget.scroll_into_view_if_needed()
    page.wait_for_timeout(2500)
    widget.screenshot(path=path)


def camera(widget) -> list[float]:
    """Position of the camera of the widget's 3D figure, as the browser has it."""
    read = "plots => { const c = [...plots].find(p => p.layout.scene).layout.scene.camera.eye; return [c.x, c.y, c.z]; }"
    return [round(value, 3) for value in widget.locator(".js-plotly-plot").evaluate_all(read)]


def click_a_mark(page, widget) -> None:
    """Click a mark that is a shape, at the pixel where Plotly has drawn it."""
    find = """plots => {
        const plot = [...plots].find(p => p._fullLayout.xaxis), box = plot.getBoundingClientRect(), layout = plot._fullLayout;
        const trace = plot._fullData.find(t => t.customdata && t.name !== "others");
        const x = layout.xaxis._offset + layout.xaxis.d2p(trace.x[1]), y = layout.yaxis._offset + layout.yaxis.d2p(trace.y[1]);
        return [box.left + x, box.top + y]; }"""
    x, y = widget.locator(".js-plotly-plot").evaluate_all(find)
    page.mouse.move(x - 40, y - 40)
    page.mouse.move(x, y, steps=5)
    page.wait_for_timeout(800)
    page.mouse.click(x, y)


def test_a_typed_question_and_a_click_change_what_is_shown(page, shots):
    from playwright.sync_api import expect

    cell = "explorer = Explorer("
    line, widget = status(page, cell), panel(page, cell)
    question = widget.locator("input[placeholder='a round table']")
    question.scroll_into_view_if_needed()
    expect(line).to_contain_text("a wooden chair")  # what the next cell asked
    question.fill("a bottle")
    question.press("Enter")
    expect(line).to_contain_text("“a bottle”: shown is")
    expect(widget.locator(".cg3d-lists")).to_contain_text("nearest texts")
    shoot(page, widget, shots / "explorer.png")
    asked = line.inner_text()

    click_a_mark(page, widget)
    expect(line).not_to_have_text(asked)
    expect(line).not_to_contain_text("“a bottle”")
    expect(widget.locator("img[width='112']")).to_have_count(1)
    shoot(page, widget, shots / "explorer_click.png")

    question.press("Enter")  # the same text again
    expect(line).to_have_text(asked)
    widget.locator("select").first.select_option(index=3)  # as the keyboard does
    expect(line).not_to_have_text(asked)
    question.fill("!!!")
    question.press("Enter")
    expect(line).to_contain_text("no word")
    expect(widget.locator(".cg3d-lists")).to_have_count(0)


def test_an_upload_is_named_and_bad_ones_are_refused(page, shots, tmp_path):
    from playwright.sync_api import expect

    parts = [
        trimesh.creation.box(size, trimesh.transformations.translation_matrix(at))
        for size, at in [
            ((0.45, 0.06, 0.45), (0, 0.47, 0)),
            ((0.45, 0.48, 0.05), (0, 0.74, -0.2)),
            *(((0.05, 0.44, 0.05), (x, 0.22, z)) for x in (-0.19, 0.19) for z in (-0.19, 0.19)),
        ]
    ]
    trimesh.util.concatenate(parts).export(tmp_path / "my_chair.glb")
    (tmp_path / "letter.glb").write_text("I am a letter")
    with (tmp_path / "huge.ply").open("wb") as file:
        file.truncate(200_000_000)
    cell = "mine = ClassifyMyShape("
    line, widget = status(page, cell), panel(page, cell)
    upload, bars = widget.locator(".cg3d-upload input[type=file]"), widget.locator(".cg3d-bars")
    upload.scroll_into_view_if_needed()
    expect(line).to_contain_text("Choose a file")
    upload.set_input_files(tmp_path / "my_chair.glb")
    expect(line).to_contain_text("my_chair: ")
    first = bars.inner_text()
    shoot(page, widget, shots / "classify.png")
    labels = widget.locator("textarea")
    labels.fill("chair\nball\nspoon")
    labels.press("Tab")
    expect(line).to_contain_text("of 3 labels")
    assert bars.inner_text() != first
    labels.fill("chair\nball\nchair")
    labels.press("Tab")
    expect(line).to_contain_text("label 'chair' is given 2 times")
    expect(bars).to_have_count(0)
    labels.fill("chair\nball")
    labels.press("Tab")
    expect(bars).to_have_count(1)
    for name, words in (
        ("letter.glb", "letter.glb: its JSON cannot be parsed"),
        ("huge.ply", "huge.ply has 200 MB; the limit is 50 MB"),
    ):
        upload.set_input_files(tmp_path / name)
        expect(line).to_contain_text(words)
        expect(bars).to_have_count(0)
    shoot(page, widget, shots / "classify_refused.png")
    assert page.get_by_text("Traceback").count() == 0
    upload.set_input_files(tmp_path / "my_chair.glb")
    expect(line).to_contain_text("my_chair: ")


def test_the_answer_is_tinted_and_the_camera_stays(page, shots):
    from playwright.sync_api import expect

    cell = "asking = AskTheRoom("
    line, widget = status(page, cell), panel(page, cell)
    question = widget.locator("input[placeholder='something to sit on']")
    question.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)
    box = widget.locator(".js-plotly-plot").first.bounding_box()
    before, middle = camera(widget), (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1] + 10, steps=5)
    page.mouse.up()
    page.wait_for_timeout(1500)
    turned = camera(widget)
    assert turned != before, "dragging turns the room"
    question.fill("a sofa")
    question.press("Enter")
    expect(line).to_contain_text("“a sofa”: the best of")
    expect(widget.locator(".cg3d-parts tr")).to_have_count(4)
    shoot(page, widget, shots / "room.png")
    assert camera(widget) == turned, "an answer keeps the camera"
    points = "plots => [...plots][0].data[0].x.length"
    assert widget.locator(".js-plotly-plot").evaluate_all(points) >= 30_000
    widget.get_by_role("button", name=re.compile(r"^2 ")).click()
    expect(line).to_contain_text("part ")
    question.fill("")
    widget.get_by_role("button", name="Ask", exact=True).click()
    expect(line).to_contain_text("the question is empty")
    expect(widget.locator(".cg3d-parts")).to_have_count(0)
    question.fill("something to sit on")
    question.press("Enter")
    expect(line).to_contain_text("“something to sit on”: the best of")


def test_the_run_monitor_follows_a_file(page, shots):
    from playwright.sync_api import expect

    line = status(page, "monitor = RunMonitor(")
    line.scroll_into_view_if_needed()
    expect(line).to_contain_text("epoch 8")
    cell = page.locator(".jp-CodeCell").last
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(
        "monitor.button.value = True\nwith (run / 'metrics.csv').open('a') as file: _ = file.write('9,1.5,1.0,0.5\\n')"
    )
    page.keyboard.press("Control+Enter")
    expect(line).to_contain_text("epoch 9, loss 1.5")
    widget = panel(page, "monitor = RunMonitor(")
    shoot(page, widget, shots / "monitor.png")
    drawn = "plots => [...plots][0].data.map(line => [line.name, line.y[8]])"
    for _ in range(30):  # Plotly draws after the status line has changed
        lines = widget.locator(".js-plotly-plot").evaluate_all(drawn)
        if lines and lines[0][1] is not None:
            break
        page.wait_for_timeout(1000)
    assert lines == [["loss", 1.5], ["3d_text", 1.0], ["3d_image", 0.5]]


CELLS = {
    "explorer": "explorer = Explorer(",
    "classify": "mine = ClassifyMyShape(",
    "room": "asking = AskTheRoom(",
    "monitor": "monitor = RunMonitor(",
}


LEGEND_AND_AXES = """plot => {
    const legend = plot.querySelector(".legend"), axes = plot.querySelector(".nsewdrag, .gl-container canvas");
    return legend && axes && [plot, legend, axes].map(part => part.getBoundingClientRect().toJSON()); }"""


def layout_faults(widget) -> list[str]:
    "What is cut off, covered or squeezed in a widget"
    faults, edge = [], widget.bounding_box()
    right = edge["x"] + edge["width"]
    for part in widget.locator(".js-plotly-plot, input, button, textarea, select, table").all():
        box = part.bounding_box() if part.is_visible() else None
        if box and box["x"] + box["width"] > right + 2:
            faults.append(
                f"cut off at {right}: {box}, {part.evaluate('part => part.outerHTML.slice(0, 120)')}"
            )
    for plot in widget.locator(".js-plotly-plot").all():
        drawn = plot.bounding_box()["width"]
        if drawn < min(250, edge["width"] - 8):  # a panel has 232 in a window of 600 beside the file browser
            faults.append(f"a figure is squeezed to {drawn}")
        boxes = plot.evaluate(LEGEND_AND_AXES)
        if boxes:
            figure, legend, axes = boxes
            checks = {
                "the legend is cut off at the side": figure["left"] <= legend["left"]
                and legend["right"] <= figure["right"] + 1,
                "the legend is cut off below": legend["bottom"] <= figure["bottom"] + 1,
                "the legend covers the figure": legend["top"] >= axes["bottom"] - 1,
                "the legend leaves no room": axes["bottom"] - axes["top"] >= 120,
            }
            faults += [f"{fault}: {boxes}" for fault, right_place in checks.items() if not right_place]
    return faults


@pytest.mark.parametrize("width", [600, 1400])
@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_narrow_windows_and_both_themes(page, shots, theme, width):
    page.set_viewport_size(dict(width=width, height=1300))
    page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{ theme: 'JupyterLab {theme}' }})")
    page.wait_for_timeout(2500)
    for name, cell in CELLS.items():
        widget = panel(page, cell)
        widget.scroll_into_view_if_needed()  # JupyterLab does not lay out cells outside of the window
        for _ in range(30):  # Plotly draws after the window has changed; without a GPU that takes seconds
            faults = layout_faults(widget)
            if not faults:
                break
            page.wait_for_timeout(1000)
        shoot(page, widget, shots / f"{name}_{theme.lower()}_{width}.png")
        assert not faults, f"{name}: {faults}"
        ink = widget.locator(".legendtext, .gtitle").evaluate_all(
            "texts => [...new Set(texts.map(t => getComputedStyle(t).fill))]"
        )
        for color in ink:
            level = sum(map(int, re.findall(r"\d+", color)[:3])) / 3
            assert level > 128 if theme == "Dark" else level < 128, (
                f"{name}: text {color} in the {theme} theme"
            )
