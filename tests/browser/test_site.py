"""The built documentation in headless Chromium: widths of phone, tablet and desktop, light and dark, search, links.

Skipped, with the reason, where Chromium or Playwright is missing or `make docs` has not been run; the gate runs it first."""

import functools
import http.server
import threading
from pathlib import Path

import pytest
from chromium import CHROMIUM

SITE = Path(__file__).parent.parent.parent / "_docs" / "site"
PAGES = ("index.html", "docs/results.html", "nbs/tutorials/01_first_steps.html", "nbs/io/06_gltf.html")

pytest.importorskip("playwright", reason="Playwright is not installed: pip install playwright")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="no site in _docs/site: run make docs"),
]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """The address of a server of the site."""
    handler = functools.partial(QuietHandler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def open_page(browser, width: int, theme: str):
    """A page, and the list to which its failed requests and script errors are added."""
    page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=theme)
    faults = []
    page.on("response", lambda answer: faults.append(answer.url) if answer.status >= 400 else None)
    page.on("requestfailed", lambda request: faults.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    return page, faults


@pytest.mark.parametrize("width", [390, 900, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_fit_the_window_in_both_themes(browser, address, theme, width):
    page, faults = open_page(browser, width, theme)
    for name in PAGES:
        page.goto(f"{address}/{name}")
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) <= 0, f"{name} is wider than {width} pixels"
        colors = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        ink, paper = (sum(map(int, color.strip("rgba()").split(",")[:3])) for color in colors)
        assert (ink > paper) == (theme == "dark"), f"{name}: {colors} in the {theme} theme"
        assert page.locator("h1").first.is_visible()
    assert not faults
    page.close()


def test_search_finds_pages(browser, address):
    page, faults = open_page(browser, 1400, "light")
    page.goto(f"{address}/index.html")
    page.locator("input[name=q]").first.fill("farthest point sampling")
    page.locator("input[name=q]").first.press("Enter")
    page.locator("#search-results li a").first.wait_for(timeout=60_000)
    titles = page.locator("#search-results li > a").all_inner_texts()
    assert any("sampling" in title.lower() or "point" in title.lower() for title in titles), titles
    page.close()
    assert not faults


def test_links_of_the_sidebar_open(browser, address):
    page, faults = open_page(browser, 1400, "light")
    page.goto(f"{address}/index.html")
    links = page.locator(".sidebar-tree a.reference.internal").evaluate_all(
        "links => links.map(link => link.href)"
    )
    assert len(links) > 100
    for link in sorted({link.split("#")[0] for link in links}):
        answer = page.request.get(link)
        assert answer.ok, link
    page.close()
    assert not faults
