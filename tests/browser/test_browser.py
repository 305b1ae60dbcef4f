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

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
TUTORIAL = "09_hands_on.ipynb"

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

    expect.set_options(timeout=60_000)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=dict(width=1400, height=1300))
        page.set_default_timeout(60_000)
        page.goto(lab)
        page.locator(".jp-Notebook .jp-CodeCell").first.click(timeout=180_000)
        page.wait_for_timeout(2000)
        page.get_by_text("Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        expect(page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").last).to_have_text(
            re.compile(r"\[\d+\]:"), timeout=240_000
        )
        if page.get_by_text("Open privacy policy").count():
            page.get_by_role("button", name="No", exact=True).click()  # no news from Jupyter
        yield page
        browser.close()


def status(page, cell: str):
    """The status line of the widget that stands under the cell with this text."""
    return page.locator(".jp-CodeCell", has_text=cell).locator(".cg3d-status").first


def test_a_typed_question_and_a_click_change_what_is_shown(page, shots):
    from playwright.sync_api import expect

    line = status(page, "explorer = Explorer(")
    question = page.locator("input[placeholder='a round table']")
    question.scroll_into_view_if_needed()
    expect(line).to_contain_text("a wooden chair")  # what the next cell asked
    question.fill("a bottle")
    question.press("Enter")
    expect(line).to_contain_text("“a bottle”: shown is")
    expect(page.locator(".cg3d-lists")).to_contain_text("nearest texts")
    asked, cloud = line.inner_text(), page.locator("canvas.cg3d-cloud").first
    drawn = cloud.evaluate("c => c.toDataURL()")
    page.screenshot(path=shots / "1_question.png")

    places = page.locator("canvas.cg3d-map")
    places.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(800)
    page.screenshot(path=shots / "2_keyboard.png")
    page.keyboard.press("Enter")  # chooses by keyboard
    expect(line).not_to_have_text(asked)
    by_key = line.inner_text()

    area, clicked = places.bounding_box(), False
    for dx in range(
        40, int(area["width"]), 12
    ):  # walk the pointer until another mark is under it, then click
        for dy in range(40, int(area["height"]), 12):
            places.hover(position=dict(x=dx, y=dy))
            label = places.get_attribute("aria-label")
            if (
                "Enter chooses it" in label
                and "marks;" in label
                and label.split("; ")[1].split(" ·")[0] not in by_key
            ):
                places.click(position=dict(x=dx, y=dy))
                clicked = True
                break
        if clicked:
            break
    assert clicked, "no mark under the pointer anywhere on the map"
    expect(line).not_to_have_text(by_key)
    page.wait_for_timeout(800)
    assert cloud.evaluate("c => c.toDataURL()") != drawn, "another shape is drawn"
    page.screenshot(path=shots / "3_click.png")


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
    line, upload = status(page, "mine = ClassifyMyShape("), page.locator(".cg3d-upload input[type=file]")
    upload.scroll_into_view_if_needed()
    expect(line).to_contain_text("Choose a file")
    upload.set_input_files(tmp_path / "my_chair.glb")
    expect(line).to_contain_text("my_chair: ")
    bars = page.locator(".cg3d-bars")
    first = bars.inner_text()
    labels = page.locator("textarea[rows='8']")
    labels.fill("chair\nball\nspoon")
    labels.press("Tab")
    expect(line).to_contain_text("of 3 labels")
    assert bars.inner_text() != first
    page.screenshot(path=shots / "4_upload.png")
    kept = bars.inner_text()
    for name, words in (
        ("letter.glb", "letter.glb: its JSON cannot be parsed"),
        ("huge.ply", "huge.ply has 200 MB; the limit is 50 MB"),
    ):
        upload.set_input_files(tmp_path / name)
        expect(line).to_contain_text(words)
        assert bars.inner_text() == kept, "the last answer stays"
    labels.fill("chair\nball\nchair")
    labels.press("Tab")
    expect(line).to_contain_text("label 'chair' is given 2 times")
    page.screenshot(path=shots / "5_refused.png")
    assert page.get_by_text("Traceback").count() == 0


def test_the_room_lights_up(page, shots):
    from playwright.sync_api import expect

    line, question = (
        status(page, "asking = AskTheRoom("),
        page.locator("input[placeholder='something to sit on']"),
    )
    question.scroll_into_view_if_needed()
    cloud = page.locator(".jp-CodeCell", has_text="asking = AskTheRoom(").locator("canvas.cg3d-cloud")
    before = cloud.evaluate("c => c.toDataURL()")
    question.fill("a plant")
    question.press("Enter")
    expect(line).to_contain_text("“a plant”: the best of")
    page.wait_for_timeout(800)
    lit = cloud.evaluate("c => c.toDataURL()")
    assert lit != before
    cloud.scroll_into_view_if_needed()
    page.screenshot(path=shots / "6_room.png")
    cloud.focus()
    page.keyboard.press("ArrowRight")
    assert cloud.evaluate("c => c.toDataURL()") != lit, "arrow keys turn it"


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
    page.screenshot(path=shots / "7_monitor.png")
