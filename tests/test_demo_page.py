"""The page in a real browser: Chromium, driven by Playwright, asks a tiny model."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import lively, tiny_model

if not find_spec("gradio"):
    pytest.skip("gradio is not installed: pip install -e '.[demo]'", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium", allow_module_level=True)

expect = playwright.expect
expect.set_options(timeout=60_000)  # milliseconds; other programs may use the same cores
SIZE = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def address(processor, tmp_path_factory):
    """A page of a tiny model, and the folder of its uploads."""
    from pointalign.page import serving  # with gradio, which takes seconds that a worker with other files does not need
    from pointalign.page.intake import Item

    model = lively(tiny_model())
    model.generation_config.eos_token_id = None  # an answer is as long as it may be, so that it can be stopped
    clouds = [np.load(path).astype(np.float32) for path in sorted((Path(__file__).parent / "clouds").glob("*.npy"))]
    examples = [Item(f"example {number}", cloud, ("by nobody",)) for number, cloud in enumerate(clouds[:3])]
    folder = tmp_path_factory.mktemp("uploads")
    blocks = serving.serve(model, processor, examples, "tiny", folder, wait=False)
    yield blocks.local_url, folder
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened(browser, address):
    """The page, opened once: its programs take seconds to load. Faults of the page's programs are collected."""
    page = browser.new_page(viewport=SIZE)
    page.set_default_timeout(60_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if not is_local(request.url, address[0]) else None)
    page.goto(address[0])
    expect(page.locator("#view canvas").first).to_be_visible()
    yield page
    assert faults == [], "an error, or a request to another computer"


def is_local(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


@pytest.fixture
def page(opened, address):
    """Opened anew: with the first example, an empty conversation and the view of the object."""
    opened.set_viewport_size(SIZE)
    opened.goto(address[0])
    expect(opened.locator("#caption")).to_contain_text("example 0")
    expect(opened.locator("#view canvas").first).to_be_visible()
    return opened


def ask(page, question: str) -> None:
    page.get_by_role("textbox", name="Question").fill(question)
    page.get_by_role("textbox", name="Question").press("Enter")


def answers(page):
    return page.locator("#chat .message.bot")


def choose(page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).check()


def test_it_opens_on_this_computer_alone(address, opened):
    assert address[0].startswith("http://127.0.0.1:")
    expect(opened.locator("#heading")).to_contain_text("Answers come from tiny on this computer")


def test_it_works_by_keyboard(opened):
    """From the question forward to the buttons, and back to the thumbnails and the views."""
    names = []
    opened.locator("h1").click()
    for _ in range(40):
        opened.keyboard.press("Tab")
        names.append(opened.evaluate("(e => e.getAttribute('aria-label') || e.value || e.innerText || e.placeholder)"
                                     "(document.activeElement)"))  # fmt: skip
    for name in ("Where it looked", "Thumbnail 2 of 3", "Click to upload or drop files", "What is this?", "Ask"):
        assert any(name in str(other) for other in names), (name, names)
    opened.get_by_role("button", name="Thumbnail 2 of 3").focus()
    opened.keyboard.press("Enter")
    expect(opened.locator("#caption")).to_contain_text("example 1")


def test_no_question_is_a_message(opened):
    ask(opened, " ")
    expect(opened.get_by_role("alert")).to_contain_text("there is no question")


def test_questions_and_answers_in_turn(page):
    page.get_by_role("button", name="What is this?").click()
    expect(page.locator("#notice")).to_contain_text(re.compile(r"first word after [\d.]+ s, answer after [\d.]+ s"))
    expect(page.locator("#chat")).to_contain_text("What is this?")
    expect(answers(page)).to_have_count(1)
    first = answers(page).first.inner_text()
    assert first.strip() not in ("", "…")
    ask(page, "And <b>why</b>?")
    expect(answers(page)).to_have_count(2)
    expect(page.locator("#notice")).to_contain_text("answer after")
    expect(page.locator("#chat")).to_contain_text("And <b>why</b>?")  # what is typed is text
    assert answers(page).first.inner_text() == first
    expect(page.get_by_role("textbox", name="Question")).to_have_value("")
    page.get_by_role("button", name="Clear the conversation").click()
    expect(answers(page)).to_have_count(0)


def test_an_answer_grows_and_is_stopped(page, monkeypatch):
    """A conversation that says a word after the other until it is stopped."""
    from test_demo import Slow

    from pointalign.page import talk

    monkeypatch.setattr(Slow, "pause", 0.5)
    monkeypatch.setattr(talk, "Conversation", Slow)
    page.get_by_role("button", name="Thumbnail 2 of 3").click()
    expect(page.locator("#caption")).to_contain_text("example 1")
    ask(page, "Go on?")
    expect(answers(page)).to_contain_text("on on on on")
    length = len(answers(page).inner_text())
    page.wait_for_function("n => document.querySelector('#chat .message.bot').innerText.length > n", arg=length)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#notice")).to_contain_text("stopped after")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def test_two_objects_in_one_prompt(page, address, tmp_path, clouds):
    choose(page, "2 · compare with …")
    expect(page.locator("#caption")).to_contain_text("it becomes the second object")
    np.save(tmp_path / "mine.npy", clouds[2][:500])
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "mine.npy")
    expect(page.locator("#caption")).to_contain_text("mine.npy: 500 points, of which the model reads 256")
    page.get_by_role("button", name="Are these two the same kind of object?").click()
    expect(page.locator("#notice")).to_contain_text("answer after")
    choose(page, "1 · example 0")
    expect(page.locator("#caption")).to_contain_text("example 0")
    expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Remove the second object").click()
    expect(answers(page)).to_have_count(0)
    assert not list(address[1].rglob("mine*")), "an upload is removed once it is read"


def test_where_it_looked_and_what_each_layer_knows(page):
    choose(page, "Where it looked")
    expect(page.locator("#caption")).to_contain_text("over 8 patches")
    expect(page.locator("#view .cbtitle")).to_contain_text("× the average patch")
    page.get_by_label("Attention of").click()
    page.get_by_role("option", name="query 3").click()
    expect(page.locator("#view canvas").first).to_be_visible()
    choose(page, "What each layer still knows")
    expect(page.locator("#view .scatterlayer .point")).to_have_count(5)  # the input and four layers
    choose(page, "Object")
    choose(page, "above")
    expect(page.locator("#caption")).to_contain_text("example 0")


def test_a_bad_file_is_a_message_and_the_page_goes_on(page, address):
    for number, name in enumerate(("lies.npy", "<img src=x onerror=document.title='owned'>.npy", "program.exe"), 1):
        page.locator("#upload input[type=file]").set_input_files(
            {"name": name, "mimeType": "application/octet-stream", "buffer": b"\x93NUMPY no cloud at all"}
        )
        alert = page.get_by_role("alert")
        expect(alert).to_be_visible()
        assert len(alert.inner_text()) < 350 and str(address[1]) not in alert.inner_text()
        assert page.title() == "pointalign" and page.locator("img[src=x]").count() == 0
        ask(page, f"Still there after {number}?")
        expect(answers(page)).to_have_count(number)
        expect(page.locator("#notice")).to_contain_text("answer after")
        assert [path for path in address[1].rglob("*") if path.suffix in (".npy", ".exe")] == [], name


def test_everything_fits_a_narrow_screen_in_light_and_dark(page):
    page.set_viewport_size({"width": 360, "height": 740})
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for part in ("#view", "#examples", "#upload", "#chat", "#suggestions", "#ask"):
            box = page.locator(part).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360, part
    ask(page, "On a phone?")
    expect(page.locator("#notice")).to_contain_text("answer after")
