"""The demo in headless Chromium: `make test-demo`.

DEMO_MODEL names a trained model, by default a tiny random one; with SCREENSHOTS=docs the pictures
of the README are written.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests import worlds

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs chromium and chromedriver: apt install chromium chromium-driver",
    ),
]
webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1280,1000", "--force-device-scale-factor=1", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Where `unifluid demo` listens, as a process of its own."""
    folder = tmp_path_factory.mktemp("demo")
    workdir = os.environ.get("DEMO_MODEL")
    if not workdir:
        worlds.save_checkpoint(folder / "tiny", worlds.make_config(folder))
        workdir = folder / "tiny"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "unifluid_jax", "demo"]
    command += [f"--workdir={workdir}", f"--port={port}", "--queue=1"]
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
        # A mistake of a visitor is nothing for the log, and nothing else went wrong.
        assert "Traceback" not in (folder / "log").read_text()
    finally:
        server.terminate()
        server.wait(timeout=60)


def open_browser(folder):
    options = webdriver.ChromeOptions()
    for flag in (*_FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    options.binary_location = shutil.which("chromium")
    return webdriver.Chrome(options, service)


@pytest.fixture
def browser(url, tmp_path):
    browser = open_browser(tmp_path / "profile")
    browser.get(url)
    Page(browser).find("#draw")
    yield Page(browser)
    browser.quit()


class Page:
    """The page as its visitors use it."""

    def __init__(self, browser):
        self.browser = browser

    def wait(self, found, what, seconds=900):
        # The page replaces its parts at any time.
        ignored = [StaleElementReferenceException]
        wait = WebDriverWait(self.browser, seconds, 0.2, ignored)
        return wait.until(lambda _: found(), what)

    def find(self, selector):
        def visible():
            elements = self.browser.find_elements(By.CSS_SELECTOR, selector)
            return next((x for x in elements if x.is_displayed()), None)

        return self.wait(visible, f"no {selector}", 60)

    def tab(self, name):
        def button():
            tabs = self.browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
            return next((x for x in tabs if x.text == name and x.is_displayed()), None)

        self.wait(button, f"no tab {name}", 60).click()

    def type(self, selector, text):
        box = self.find(selector)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text)

    def value(self, selector):
        return self.find(selector).get_attribute("value")

    def pictures(self, gallery="#pictures"):
        return self.browser.find_elements(By.CSS_SELECTOR, f"{gallery} img")

    def done(self):
        self.wait(lambda: self.value("#status textarea, #status input").startswith("done"), "done")

    def fresh_status(self):
        return self.value("#status textarea, #status input")

    def toast(self):
        script = (
            "return [...document.querySelectorAll('.toast-body')].map(x => x.innerText).join(' ')"
        )

        def text():
            return self.browser.execute_script(script)

        return self.wait(text, "no message")

    def shot(self, name):
        if folder := os.environ.get("SCREENSHOTS"):
            time.sleep(1)  # fading in
            path = Path(folder) / f"demo_{name}.png"
            self.browser.save_screenshot(str(path))
            # Few colours are plenty, and a third of the size.
            Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def test_all_five_things_one_after_the_other(browser):
    page = browser
    page.type("#prompt textarea, #prompt input", "a red circle")
    page.browser.execute_script(
        "window.seen = new Set();"
        "const box = document.querySelector('#status :is(textarea, input)');"
        "setInterval(() => seen.add(box.value), 10)"
    )
    page.find("#draw").click()
    page.done()
    # Half-made pictures came before the whole one.
    assert any(x.startswith("step ") for x in page.browser.execute_script("return [...seen]"))
    assert page.pictures()
    page.wait(lambda: page.pictures("#history"), "no history")
    page.shot("draw")

    page.find("#use").click()
    page.wait(lambda: page.find("#do-edit"), "no edit tab")
    boxes = "input[placeholder='make it blue'], textarea[placeholder='make it blue']"
    page.type(boxes, "make it blue")
    page.find("#do-edit").click()
    page.wait(lambda: len(page.pictures("#history")) >= 2, "no second in the history")
    page.shot("edit")

    page.tab("Describe")
    page.find("#do-caption").click()
    page.wait(lambda: page.value("#caption textarea, #caption input"), "no caption")
    page.tab("Ask")
    boxes = "input[placeholder^='what color'], textarea[placeholder^='what color']"
    page.type(boxes, "what color is the shape?")
    page.find("#do-answer").click()
    page.wait(lambda: page.value("#answer textarea, #answer input"), "no answer")
    page.done()
    page.shot("ask")

    page.tab("Inpaint")
    canvas = page.find("canvas")
    time.sleep(1)  # the canvas is laid out after it is there
    actions = webdriver.ActionChains(page.browser)
    # In the upper left quarter: the tiny model has four cells, and one must stay.
    actions.move_to_element_with_offset(canvas, -95, -95).click_and_hold()
    actions.move_by_offset(10, 5).move_by_offset(0, 10).release().perform()
    boxes = "input[placeholder='a red circle'], textarea[placeholder='a red circle']"
    page.type(boxes, "a red circle")
    before = len(page.pictures("#history"))
    page.find("#do-inpaint").click()
    page.wait(lambda: len(page.pictures("#history")) > before, "nothing inpainted")
    page.shot("inpaint")


def test_mistakes_are_told_in_words(browser, tmp_path):
    page = browser
    page.find("#draw").click()
    assert "The prompt of the task generate is empty" in page.toast()
    page.tab("Describe")
    page.find("#do-caption").click()
    page.wait(lambda: "There is no picture" in page.toast(), "no message")
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    uploads = page.browser.find_elements(By.CSS_SELECTOR, "input[type=file]")
    for upload in uploads:
        if upload.find_elements(
            By.XPATH, "./ancestor::*[@role='tabpanel'][not(contains(@style,'none'))]"
        ):
            upload.send_keys(str(bad))
    time.sleep(1)
    page.find("#do-caption").click()
    page.wait(lambda: "cannot be read as a picture" in page.toast(), "no message")
    assert "Traceback" not in page.browser.page_source


def test_two_visitors_share_the_model_and_a_third_is_told_to_wait(url, browser, tmp_path):
    others = [open_browser(tmp_path / f"other{i}") for i in range(2)]
    try:
        pages = [browser, *map(Page, others)]
        for page in pages[1:]:
            page.browser.get(url)
            page.find("#draw")
        for i, page in enumerate(pages):
            page.type("#prompt textarea, #prompt input", f"a red circle {i}")
        for page in pages:
            page.find("#draw").click()
        told = 0
        for page in pages:

            def ended(page=page):
                return page.fresh_status().startswith("done") or page.browser.find_elements(
                    By.CSS_SELECTOR, ".toast-body"
                )

            page.wait(ended, "neither done nor told")
            told += not page.fresh_status().startswith("done")
            if page.fresh_status().startswith("done"):
                assert page.pictures()
        assert told <= 1
        # And it goes on working.
        browser.find("#draw").click()
        time.sleep(1)
        browser.done()
    finally:
        for other in others:
            other.quit()
