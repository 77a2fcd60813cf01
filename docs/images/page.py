"""Draw docs/images/page.png and page_phone.png: `make screenshots`. Chromium opens the page of the shipped model."""

import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from pointalign import assets, build
from pointalign.page import serving
from pointalign.page.examples import load_examples

FOLDER = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"
# Chromium draws WebGL without a graphics card; its sandbox wants a user that containers do not have.
ARGUMENTS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
PATIENCE = 300_000  # milliseconds, on a machine that does something else beside


def main() -> None:
    expect.set_options(timeout=PATIENCE)
    model, processor, _ = build.load(assets.SHIPPED_CHECKPOINT)
    examples = load_examples(assets.embedded_objects())
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        blocks = serving.serve(model, processor, examples, assets.SHIPPED_CHECKPOINT, Path(folder), wait=False)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 1080})
        page.set_default_timeout(PATIENCE)
        page.goto(blocks.local_url)
        expect(page.locator("#view canvas").first).to_be_visible()
        compare(page)
        save(page, FOLDER / "page.png")
        page.set_viewport_size({"width": 360, "height": 740})
        page.emulate_media(color_scheme="dark")
        look(page)
        save(page, FOLDER / "page_phone.png")
        browser.close()
        blocks.close()


def compare(page: Page) -> None:
    """Two objects, and two questions about them."""
    pick(page, "sedan car")
    page.get_by_role("radio", name="2 · compare with").check()
    pick(page, "horse")
    page.get_by_role("radio", name="Where it looked").check()
    expect(page.locator("#view .cbtitle")).to_be_visible()
    questions = ("Are these two the same kind of object?", "Which object is taller for its width")
    for number, question in enumerate(questions):
        page.get_by_role("button", name=question).click()
        expect(page.locator("#chat .message.bot")).to_have_count(number + 1)
        expect(page.locator("#notice")).to_contain_text("answer after")


def look(page: Page) -> None:
    """What each layer knows of the second object, on a phone."""
    page.get_by_role("radio", name="What each layer still knows").check()
    expect(page.locator("#view .scatterlayer .point").first).to_be_visible()


def pick(page: Page, name: str) -> None:
    page.locator("#examples button", has_text=name).click()
    expect(page.locator("#caption")).to_contain_text(name)


def save(page: Page, path: Path) -> None:
    """What the window shows, as a small file."""
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(2000)  # the cloud is drawn after its figure
    page.screenshot(path=path)
    Image.open(path).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    main()
