"""The page in a real browser: sliders moved, questions asked, both answers read.

The page's process and the browser are watched: neither may speak to anything but this machine.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.inference.test_server import FakeServer
from tests.interrupts import with_ctrl_c
from tests.playground.models import EVIL, play_folders

CHROMIUM = os.environ.get("STEERJAX_CHROMIUM") or shutil.which("chromium")
MISSING = [name for name in ("gradio", "playwright") if not importlib.util.find_spec(name)]
MISSING += [] if CHROMIUM else ["chromium (Debian's package, or STEERJAX_CHROMIUM)"]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"the playground's page needs {', '.join(MISSING)}"),
]
SMOLLM2 = os.environ.get("STEERJAX_SMOLLM2")
PICTURES = os.environ.get("STEERJAX_PICTURES")  # a folder that screenshots are left in
WAIT = 120_000  # milliseconds; the first answer compiles
# Runs the command; every address that its process connects to or looks up is written down.
WATCHED = """
import sys
def seen(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        where = args[1] if event != "socket.getaddrinfo" else args[:1]
        with open(sys.argv[1], "a") as file: print(event, where, file=file)
sys.addaudithook(seen)
pause = float(sys.argv.pop(2))
if pause:  # between tokens, as a larger model has it
    import time
    from steerjax.inference import engine
    answer = engine.Engine._answer
    engine.Engine._answer = lambda *x: time.sleep(pause) or answer(*x)
from steerjax.play import main
main(sys.argv[2:])
"""


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@contextmanager
def playing(log: Path, *arguments: object, pause: float = 0.0):
    """The address of a running playground; it ends as Ctrl-C ends it, and has spoken to nobody else. Its own
    model waits `pause` seconds after each token."""
    port = free_port()
    command = [sys.executable, "-c", WATCHED, str(log), str(pause), *map(str, arguments), "--port", str(port)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": "/tmp/steerjax-test-cache"}
    with open(f"{log}.out", "w+") as output:
        process = subprocess.Popen(with_ctrl_c(command), stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(1200):
                said = Path(output.name).read_text()
                assert process.poll() is None, said
                if f"at {address}" in said:
                    break
                time.sleep(0.1)
            yield address
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, Path(output.name).read_text()
        finally:
            process.kill()
            process.wait()
    spoken = log.read_text().splitlines() if log.exists() else []
    assert [line for line in spoken if not re.search(r"127\.0\.0\.1|localhost|'::1'|None", line)] == []
    assert "Traceback" not in Path(output.name).read_text()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], headless=True)
        yield browser
        browser.close()


@contextmanager
def visiting(browser, address: str, width: int = 1280, height: int = 1000):
    """A page as someone else has it; every request is to the address, and no script fails."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page, requested, wrong = context.new_page(), [], []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    page.locator("#ask").wait_for(timeout=WAIT)
    yield page
    assert {url for url in requested if not url.startswith((address, "data:", "blob:"))} == set()
    assert len(requested) > 5
    assert wrong == []
    context.close()


def slide(page, side: str, name: str, value: int) -> None:
    """As with the keyboard: the slider's own handle is moved."""
    handle = page.locator(f"#slider-{side}-{name} input[type=range]")
    handle.focus()
    for _ in range(20):
        now = int(handle.input_value())
        if now == value:
            return
        page.keyboard.press("ArrowRight" if now < value else "ArrowLeft")
    raise AssertionError(f"{name} of {side} stays at {now}")


def ask(page, prompt: str) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#ask").click()


def answer(page, side: str) -> str:
    """Once it is whole."""
    page.locator(f"#note-{side}", has_text=re.compile(r"\d s")).wait_for(timeout=WAIT)
    return page.locator(f"#answer-{side} textarea").input_value()


def answer_note(page, side: str) -> str:
    answer(page, side)
    return page.locator(f"#note-{side}").inner_text()


def problem(page) -> str:
    page.locator("#problem .problem").wait_for(timeout=WAIT)
    return page.locator("#problem").inner_text().strip()


def picture(page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/{name}.png", full_page=True)


def code(page, which: str, side: str) -> str:
    """The call as it would be copied."""
    return "\n".join(page.locator(f"#{which}-{side} .cm-line").all_text_contents())


def no_wider_than_the_window(page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return play_folders(tmp_path_factory.mktemp("play"))


@pytest.fixture(scope="module")
def own(folders, tmp_path_factory):
    """A tiny chat model with attributes of its own (wit 1..5, depth 1..10), and a reward model of them."""
    log = tmp_path_factory.mktemp("log") / "own"
    with playing(
        log, "--model", folders["chat"], "--reward-model", folders["reward"], "--max-new-tokens", 8
    ) as address:
        yield address


def test_two_settings_side_by_side(browser, own, folders, capsys):
    from steerjax.generate import main

    with visiting(browser, own) as page:
        bounds = page.locator("#slider-A-depth input[type=range]")
        assert (bounds.get_attribute("min"), bounds.get_attribute("max")) == ("1", "10")
        assert f"1 to 5: {EVIL}" in page.locator("#asked-A-wit").inner_text()  # the meaning, as text
        slide(page, "A", "wit", 5)
        slide(page, "B", "wit", 1)
        page.locator("#tick-B-depth input").uncheck()
        page.locator("#slider-B-depth input[type=range][disabled]").wait_for()
        ask(page, "Why <b>so</b> & how?")
        got = [answer(page, side) for side in "AB"]
        for side, asked in (("A", ["5", "6"]), ("B", ["1", "left out"])):
            page.locator(f"#plot-{side} .numbers").first.wait_for(timeout=WAIT)
            numbers = page.locator(f"#plot-{side} .numbers").all_inner_texts()
            assert [text.split(" →")[0] for text in numbers] == asked
        picture(page, "own_wide")
        page.locator("#calls-B button").first.click()
        page.locator("#calls-B").get_by_text("steerjax").first.wait_for()
        assert '"attributes": {"wit": 1, "depth": null}' in code(page, "curl", "B")
        assert "attributes={'wit': 1, 'depth': None}" in code(page, "python", "B")
        assert "Why <b>so</b> & how?" in code(page, "python", "B")
        picture(page, "own_calls")
    for text, setting in zip(got, ("wit=5,depth=6", "wit=1,depth=none"), strict=True):
        main(["--model", str(folders["chat"]), "--prompt", "Why <b>so</b> & how?", "--attributes", setting,
              "--max-new-tokens", "8"])  # fmt: skip
        assert capsys.readouterr().out.split() == text.split()


def test_errors_are_one_sentence_and_the_next_question_works(browser, own):
    with visiting(browser, own, width=420, height=900) as page:
        page.locator("#ask").click()
        assert "empty" in problem(page)
        ask(page, "why " * 2000)
        page.locator("#problem", has_text="1024").wait_for(timeout=WAIT)
        assert "\n" not in problem(page)
        ask(page, "Why?")
        assert answer(page, "B")
        assert page.locator("#problem").inner_text().strip() == ""
        no_wider_than_the_window(page)
        picture(page, "own_narrow")


def test_two_people_at_once(browser, own):
    """Each reads the answers to their own question, the same as when nobody else asks."""
    prompts = ["Name a prime.", "Tell me of rivers and of very old stones."]
    alone, together = [], []
    for prompt in prompts:
        with visiting(browser, own) as page:
            ask(page, prompt)
            alone.append([answer(page, side) for side in "AB"])
    with visiting(browser, own) as one, visiting(browser, own) as other:
        for page, prompt in ((one, prompts[0]), (other, prompts[1])):
            ask(page, prompt)
        together = [[answer(page, side) for side in "AB"] for page in (one, other)]
    assert alone[0] != alone[1]
    assert together == alone


def test_stop_keeps_what_is_there_and_the_next_question_works(browser, folders, tmp_path):
    """The folder's model goes on for 45 seconds where nobody stops it."""
    slow = {"pause": 0.05}
    with playing(tmp_path / "log", "--model", folders["chat"], "--max-new-tokens", 900, **slow) as address:
        with visiting(browser, address) as gone:  # a tab that is closed in the middle
            ask(gone, "Why?")
            gone.wait_for_function("document.querySelector('#answer-A textarea').value.length > 9", timeout=WAIT)
        with visiting(browser, address) as page:
            ask(page, "Why?")
            page.wait_for_function("document.querySelector('#answer-A textarea').value.length > 9", timeout=WAIT)
            page.locator("#stop").click()
            page.locator("#note-A", has_text="stopped").wait_for(timeout=10_000)
            picture(page, "stopped")
            assert len(page.locator("#answer-A textarea").input_value()) > 9
            assert page.locator("#answer-B textarea").input_value() == ""
            assert "Error" not in page.locator("body").inner_text()
            page.locator("#more button").first.click()
            page.get_by_label("number input for Longest answer, in tokens").fill("5")
            ask(page, "How?")
            page.locator("#note-A", has_text="5 tokens").wait_for(timeout=WAIT)
            assert "5 tokens" in answer_note(page, "B")


def test_a_server_answers_goes_down_and_says_markup(browser, tmp_path):
    server = FakeServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    options = ("--server", server.url, "--schema", "helpsteer")
    with playing(tmp_path / "log", *options) as address, visiting(browser, address) as page:
        for side, rating in (("A", 0), ("B", 4)):
            slide(page, side, "verbosity", rating)
        ask(page, "Why?")
        for side, rating in (("A", 0), ("B", 4)):  # the made-up server says what it was asked for
            assert json.loads(answer(page, side))["verbosity"] == rating
        server.text = text = "<script>alert(1)</script><img src=http://example.com/x onerror=alert(2)> **b** \n\n&amp;"
        ask(page, "Why not?")
        page.locator("#note-B", has_text="9 tokens").wait_for(timeout=WAIT)
        page.wait_for_function("document.querySelector('#answer-B textarea').value.includes('script')")
        assert answer(page, "B") == text
        server.shutdown()
        server.server_close()
        ask(page, "Still there?")
        said = problem(page)
        assert server.url in said
        assert "\n" not in said


@pytest.mark.smollm2
@pytest.mark.skipif(not SMOLLM2, reason="STEERJAX_SMOLLM2 is not set")
def test_smollm2(browser, tmp_path, folders):
    options = ("--model", SMOLLM2, "--template", "chatml", "--schema", "helpsteer", "--max-new-tokens", 24)
    with playing(tmp_path / "log", *options, "--mesh", "data=1") as address, visiting(browser, address) as page:
        slide(page, "A", "verbosity", 0)
        slide(page, "B", "verbosity", 4)
        page.locator("#prompt textarea").fill("Name three rivers of Europe.")
        page.locator("#ask").click()
        page.wait_for_function("document.querySelector('#answer-A textarea').value.length > 0", timeout=WAIT)
        assert not re.search(r"\d s", page.locator("#note-A").inner_text())  # it stands there before it is whole
        assert all(len(answer(page, side).split()) > 3 for side in "AB")
        picture(page, "smollm2_wide")
        page.set_viewport_size({"width": 420, "height": 900})
        no_wider_than_the_window(page)
        picture(page, "smollm2_narrow")
