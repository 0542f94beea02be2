"""The studio in headless Chromium: every tab draws, follows its sliders, and tells mistakes in the page."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shell import ROOT

pytestmark = pytest.mark.slow

INSTALL = (
    "this test needs Gradio (make studio), Playwright (.venv-studio/bin/python -m pip install playwright) and Chromium"
    " (apt-get install chromium, or CHROMIUM=/path/to/it); then .venv-studio/bin/python -m pytest -m slow tests/studio"
)
PATIENCE = 300_000  # milliseconds: another program may have the processor


@pytest.fixture(scope="module")
def face_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("later") / "faces.safetensors"


@pytest.fixture(scope="module")
def address(
    tiny_digit_weights, face_file, pipeline_folder, controlnet_folder, words_file, custom_file
) -> Iterator[str]:
    """A studio with small weights, but for the faces, which has none yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "studio" / "app.py", "--port", str(port), "--quiet", "--device", "cpu"]
    command += ["--digit-weights", tiny_digit_weights, "--face-weights", face_file, "--base", pipeline_folder]
    command += ["--controlnet", controlnet_folder, "--words", words_file, "--custom", custom_file]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE / 1000
    try:
        while True:
            if process.poll() is not None:
                pytest.fail(f"{process.stderr.read().strip()[-500:]}\n{INSTALL}")
            try:
                urllib.request.urlopen(address).close()
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail(INSTALL)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail(INSTALL)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator:
    """The page, freshly loaded; whatever it asks for elsewhere, and errors in its scripts, fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    complaints = []
    own = address, "data:", "blob:"
    page.on("request", lambda request: None if request.url.startswith(own) else complaints.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(address)
    yield page
    page.close()
    assert complaints == []


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def tell(page, place: str, text: str) -> None:
    """Wait until a place has a text."""
    page.locator(place, has_text=text).wait_for()


def draw(page, name: str) -> None:
    """Click, and wait until it is done."""
    page.locator(f"#{name}-draw").click()
    tell(page, f"#{name}-status", "Done.")


def sizes(page, place: str) -> list[int]:
    """Widths of the pictures in a place, in pixels of the file; 0 for one that is broken."""
    return page.locator(f"{place} img").evaluate_all("images => images.map(image => image.naturalWidth)")


def source(page, place: str) -> str:
    return page.locator(f"{place} img").get_attribute("src")


def wait_for_another(page, place: str, before: str) -> None:
    """Wait until a place has another picture than before."""
    page.wait_for_function(f"before => document.querySelector('{place} img')?.src != before", arg=before)


def test_no_event_has_two_functions_that_defer(address):
    """Gradio would run them in turn without end."""
    with urllib.request.urlopen(address + "config") as answer:
        functions = json.load(answer)["dependencies"]
    once = "load", "then"  # these start their one function by its number
    deferring = [function for function in functions if function["trigger_mode"] == "always_last"]
    events = [tuple(event) for function in deferring for event in function["targets"] if event[1] not in once]
    assert events
    assert len(events) == len(set(events))


def test_digits_and_the_way_there(page):
    tab(page, "Digits")
    assert sizes(page, "#digits-xt") == []
    draw(page, "digits")
    assert sizes(page, "#digits-xt") == sizes(page, "#digits-the") == [4 * 114 + 2]
    assert source(page, "#digits-xt") == source(page, "#digits-the")
    end = source(page, "#digits-xt")
    slider = page.locator("#digits-walk input[type=range]")
    assert slider.get_attribute("max") == "10"
    slider.focus()
    page.keyboard.press("Home")
    tell(page, "#digits-xt", "xt at t = 999")
    assert source(page, "#digits-xt") not in (end, source(page, "#digits-the"))


def test_faces_come_when_their_weights_do(page, face_file, face_weights):
    tab(page, "Two faces")
    notice = page.locator("#faces-note [role=note]")
    assert str(face_file) in notice.inner_text()
    tell(page, "#faces-told", "√D = 110.9")  # sqrt(3 x 64 x 64)
    page.locator("#faces-plot img").wait_for()
    page.locator("#faces-draw").click()
    tell(page, "#faces-status [role=alert]", "no such weights file")
    shutil.copy(face_weights, face_file)
    draw(page, "faces")
    for name in ("first", "slerp", "lerp", "second"):
        assert sizes(page, f"#faces-{name}") == [256], name
    notice.wait_for(state="detached")
    before = source(page, "#faces-slerp")
    slider = page.locator("#faces-alpha input[type=range]")
    box = slider.bounding_box()
    slider.click(position={"x": box["width"] * 0.9, "y": box["height"] / 2})
    wait_for_another(page, "#faces-slerp", before)
    tell(page, "#faces-status", "Done.")


def test_circles_go_where_one_clicks(page):
    tab(page, "Circles")
    hint = page.locator("#circles-outlines img")
    prompt = page.locator("#circles-prompt textarea")
    assert prompt.input_value() == "gold circle and navy circle with pink background"
    before, box = hint.get_attribute("src"), hint.bounding_box()
    # The left circle goes to the right of the other, so the sentence turns round.
    x1, x2 = (page.locator(f"#circles-x{k} input[type=number]") for k in (1, 2))
    x2.fill("20")
    x2.press("Enter")
    page.wait_for_function(
        "document.querySelector('#circles-prompt textarea').value == 'navy circle and gold circle with pink background'"
    )
    wait_for_another(page, "#circles-outlines", before)
    hint.click(position={"x": 0.8 * box["width"], "y": 0.3 * box["height"]})
    page.wait_for_function("document.querySelector('#circles-x1 input[type=number]').value == '80'")
    draw(page, "circles")
    assert sizes(page, "#circles-picture") == [384]
    x1.fill("")
    alert = page.locator("#circles-told [role=alert]")
    assert alert.inner_text() == "circle 1: x is empty: choose from 0 to 100"
    x1.fill("30")
    alert.wait_for(state="detached")
    assert "Done." in page.locator("#circles-status").inner_text()


def test_learned_words(page):
    tab(page, "Learned words")
    tell(page, "#words-note", "Learned: <new1>, <new2>")
    prompt = page.locator("#words-prompt textarea")
    prompt.fill("a <new2> here")
    page.locator("#words-draw").click()
    assert "<new2> is no learned word" in page.locator("#words-status [role=alert]").inner_text()
    page.get_by_label("Custom Diffusion").check()
    draw(page, "words")
    assert sizes(page, "#words-pictures") == [4 * 258 + 2]


def test_a_drawing_stops(page):
    tab(page, "Digits")
    page.locator("#digits-steps input[type=number]").fill("200")
    page.locator("#digits-draw").click()
    tell(page, "#digits-status", "of 200")
    page.locator("#digits-stop").click()
    tell(page, "#digits-status", "Stopped.")
    page.locator("#digits-steps input[type=number]").fill("2")
    draw(page, "digits")
