"""The demo in a real browser. Screenshots stay in $GEOCHAT_ARTIFACTS, if it is set."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("playwright", reason="playwright is not installed")

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from geochat.chat.engine import Request
from geochat.data.boxes import Box, iou_matrix, parse_boxes, parse_regions
from geochat.data.draw import colour, draw_regions
from geochat.data.synthetic import draw_scene

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GROUNDING = "[grounding] Describe the image in detail."
PATIENCE = 90_000
"""Milliseconds for one step on a busy machine."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, demo: Any) -> Iterator[Callable[..., Page]]:
    """Opens the demo as a user of its own. At the end: no page went wrong, or asked another machine for anything."""
    contexts, wrong = [], []

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 1000}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("response", lambda response: wrong.append(response.url) if foreign(response.url) else None)
        page.goto(demo.url)
        page.wait_for_selector("#question textarea")
        return page

    def foreign(url: str) -> bool:
        return url.startswith("http") and not url.startswith(demo.url)

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def screenshot(tmp_path: Path) -> Callable[[Page, str], None]:
    folder = Path(os.environ.get("GEOCHAT_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def take(page: Page, name: str) -> None:
        with Image.open(io.BytesIO(page.screenshot(full_page=True))) as whole:
            whole.convert("RGB").quantize(256).save(folder / f"demo-{name}.png", optimize=True)

    return take


def status(page: Page) -> Any:
    return page.locator("#status input, #status textarea")


def show(page: Page, picture: Path) -> None:
    page.set_input_files("#picture input[type=file]", picture)
    with Image.open(picture) as image:
        expect(status(page)).to_have_value(f"{image.width} × {image.height} pixels", timeout=PATIENCE)
    # The picture is put in anew with that line; what is tapped while it loads is not seen.
    page.wait_for_function(
        "() => [...document.querySelectorAll('#picture img')].some(image => image.complete && image.naturalWidth)",
        timeout=PATIENCE,
    )


def answers(page: Page) -> Any:
    return page.locator("#chat [data-testid=bot]")


def ask(page: Page, question: str) -> str:
    """Send by keyboard; the text of the answer once it is complete."""
    before = answers(page).count()
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    expect(answers(page)).to_have_count(before + 1, timeout=PATIENCE)
    expect(status(page)).to_have_value("", timeout=PATIENCE)
    return answers(page).last.inner_text().strip()


def click_at(page: Page, x: float, y: float) -> None:
    """Click on the picture, x and y in percent of it."""
    box = page.locator("#picture img").evaluate(
        """image => {
            const frame = image.getBoundingClientRect(), natural = [image.naturalWidth, image.naturalHeight];
            const scale = Math.min(frame.width / natural[0], frame.height / natural[1]);
            const size = natural.map(side => side * scale);
            return [frame.x + (frame.width - size[0]) / 2, frame.y + (frame.height - size[1]) / 2, ...size];
        }"""
    )
    page.mouse.click(box[0] + box[2] * x / 100, box[1] + box[3] * y / 100)


def style(element: Any, name: str) -> str:
    return element.evaluate("(element, name) => getComputedStyle(element)[name]", name)


def shown(page: Page) -> Image.Image:
    source = page.locator("#picture img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def download(page: Page, button: str) -> bytes:
    with page.expect_download() as started:
        page.click(button)
    return Path(started.value.path()).read_bytes()


def test_upload_ask_stream_and_boxes_where_the_model_said(visit, demo, screenshot) -> None:
    page = visit()
    show(page, demo.scene)
    page.evaluate(
        """() => { window.lengths = new Set(); setInterval(() => {
            const last = [...document.querySelectorAll('#chat [data-testid=bot]')].at(-1);
            if (last) window.lengths.add(last.innerText.length); }, 20); }"""
    )
    said = ask(page, GROUNDING)
    assert page.evaluate("window.lengths.size") > 5  # it came piece by piece
    raw = demo.chat.answer([Request.ask(GROUNDING, demo.scene)], max_new_tokens=512)[0].text
    regions = parse_regions(raw)
    assert len(regions) > 1

    page.wait_for_selector("#png:not([disabled])")
    with Image.open(demo.scene) as scene, Image.open(io.BytesIO(download(page, "#png"))) as drawn:
        assert np.array_equal(drawn, draw_regions(scene, regions, min_side=1))
        expected = np.asarray(draw_regions(scene, regions), float)
    assert np.abs(np.asarray(shown(page), float) - expected).mean() < 2
    table = json.loads(download(page, "#geojson"))
    assert (table["question"], table["answer"]) == (GROUNDING, raw)
    rings = [feature["geometry"]["coordinates"][0][:4] for feature in table["features"]]
    truth = [box.polygon(168, 168) for box in parse_boxes(raw)]
    assert np.diag(iou_matrix(rings, truth)) == pytest.approx(1)

    spans = page.locator("#pieces .highlighted")
    assert [spans.nth(n).inner_text().strip() for n in range(spans.count())] == [r.phrase for r in regions]
    for number in range(spans.count()):
        assert style(spans.nth(number), "backgroundColor") == "rgb({}, {}, {})".format(*colour(number))
        assert (np.asarray(drawn) == colour(number)).all(axis=2).any()
        assert regions[number].phrase in said
    screenshot(page, "grounding")


def test_a_box_is_drawn_turned_and_asked_about(visit, demo, screenshot) -> None:
    page = visit()
    show(page, demo.scene)
    page.get_by_role("button", name="[identify]").click()
    expect(status(page)).to_have_value(re.compile("draw a box first"))
    source = page.locator("#picture img").get_attribute("src")
    click_at(page, 20, 30)
    expect(status(page)).to_have_value("tap the opposite corner", timeout=PATIENCE)
    click_at(page, 50, 45)
    expect(status(page)).to_have_value(re.compile("your box is"), timeout=PATIENCE)
    before = status(page).input_value()
    page.fill("#angle input[type=number]", "30")
    page.press("#angle input[type=number]", "Tab")
    expect(status(page)).not_to_have_value(before, timeout=PATIENCE)
    page.get_by_role("button", name="[identify]").click()
    question = page.locator("#question textarea")
    expect(question).to_have_value(re.compile(r"^\[identify\] .*\{<\d"), timeout=PATIENCE)
    [box] = parse_boxes(question.input_value())
    assert box.iou(Box(20, 30, 50, 45, 30), 168, 168) > 0.85  # whole percents and pixels
    assert page.locator("#picture img").get_attribute("src") != source
    screenshot(page, "identify")
    text = question.input_value()
    said = ask(page, text)
    assert said == demo.chat.answer([Request.ask(text, demo.scene)], max_new_tokens=512)[0].text
    page.click("#unbox")
    page.get_by_role("button", name="[identify]").click()
    expect(status(page)).to_have_value(re.compile("draw a box first"), timeout=PATIENCE)


def test_shortcuts_write_the_question_and_examples_are_a_click_away(visit) -> None:
    page = visit()
    page.locator("#scenes button").first.click()
    expect(status(page)).to_have_value("168 × 168 pixels", timeout=PATIENCE)
    question = page.locator("#question textarea")
    expected = {
        "Describe": "^Describe the image",
        "Classify": "^Classify the given image .*airport",
        "[refer]": "^\\[refer\\] .*<p> the ship </p>$",
        "Question": "^the ship\nAnswer",
        "[grounding]": "^\\[grounding\\]",
    }
    for task, pattern in expected.items():
        page.get_by_role("button", name=task, exact=True).click()
        expect(question).to_have_value(re.compile(pattern), timeout=PATIENCE)
    page.get_by_role("button", name="Send").click()
    expect(answers(page)).to_have_count(1, timeout=PATIENCE)
    expect(status(page)).to_have_value("", timeout=PATIENCE)
    assert page.locator("#pieces .highlighted").count() > 0


def test_two_users_stop_clear_and_leave(visit, demo) -> None:
    first, second = visit(), visit()
    show(first, demo.scene)
    first.fill("#question textarea", "count: on and on")
    first.press("#question textarea", "Enter")
    expect(answers(first)).to_have_text(re.compile("0 1 2"), timeout=PATIENCE)
    assert ask(second, "say: hello from the second") == "hello from the second"
    assert answers(first).count() == 1
    first.click("#stop")
    expect(status(first)).to_have_value("", timeout=PATIENCE)
    stopped = answers(first).inner_text()
    assert re.match(r"0 1 2( \d+)*", stopped)
    assert ask(first, "say: next") == "next"
    assert answers(first).first.inner_text() == stopped
    first.click("#clear")
    expect(answers(first)).to_have_count(0, timeout=PATIENCE)
    assert second.locator("#chat").inner_text().count("hello") == 2
    first.fill("#question textarea", "count: until I leave")
    first.press("#question textarea", "Enter")
    expect(answers(first)).to_have_text(re.compile("0 1 2"), timeout=PATIENCE)
    assert demo.service.counting == 1
    first.close()
    deadline = time.monotonic() + PATIENCE / 1000
    while demo.service.counting and time.monotonic() < deadline:
        second.wait_for_timeout(100)
    assert demo.service.counting == 0


def test_a_picture_is_pasted_by_button_and_by_keys(visit, demo, tmp_path) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    second = tmp_path / "second.png"
    with Image.open(demo.scene) as scene:
        scene.crop((0, 0, 120, 80)).save(second)
    copy(page, demo.scene)
    page.get_by_role("button", name="Paste from clipboard").click()
    expect(status(page)).to_have_value("168 × 168 pixels", timeout=PATIENCE)
    copy(page, second)
    page.press("#question textarea", "Control+v")
    expect(status(page)).to_have_value("120 × 80 pixels", timeout=PATIENCE)
    with Image.open(second) as picture:
        expected = np.asarray(draw_regions(picture, []), float)
    assert np.abs(np.asarray(shown(page), float) - expected).mean() < 2
    page.evaluate("navigator.clipboard.writeText('How many?')")
    page.press("#question textarea", "Control+v")
    expect(page.locator("#question textarea")).to_have_value("How many?", timeout=PATIENCE)


def copy(page: Page, picture: Path) -> None:
    """Put a picture on the clipboard."""
    page.evaluate(
        """async (url) => {
            const picture = await (await fetch(url)).blob();
            await navigator.clipboard.write([new ClipboardItem({ "image/png": picture })]);
        }""",
        "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode(),
    )


def test_regenerate_asks_the_last_question_again(visit) -> None:
    page = visit()
    page.click("#again")
    expect(status(page)).to_have_value("error: there is no answer yet", timeout=PATIENCE)
    assert ask(page, "say: one") == "one"
    page.fill("#question textarea", "count: on and on")
    page.press("#question textarea", "Enter")
    expect(answers(page).last).to_have_text(re.compile("0 1 2 3 4 5"), timeout=PATIENCE)
    page.click("#stop")
    expect(status(page)).to_have_value("", timeout=PATIENCE)
    stopped = answers(page).last.inner_text().strip()
    page.click("#again")
    expect(answers(page).last).to_have_text(
        re.compile(r"^\s*0( 1)?( 2)?\s*$"), timeout=PATIENCE
    )  # from the start
    expect(answers(page).last).to_have_text(re.compile(stopped), timeout=PATIENCE)
    page.click("#stop")
    expect(status(page)).to_have_value("", timeout=PATIENCE)
    assert answers(page).count() == 2
    assert answers(page).first.inner_text().strip() == "one"
    questions = page.locator("#chat [data-testid=user]")
    assert [text.strip() for text in questions.all_inner_texts()] == ["say: one", "count: on and on"]


def test_a_conversation_by_keyboard_alone(visit) -> None:
    page = visit()
    press_on(page, "#scenes button", "Enter")
    expect(status(page)).to_have_value("168 × 168 pixels", timeout=PATIENCE)
    press_on(page, "#tasks button", "Space")
    question = page.locator("#question textarea")
    expect(question).to_have_value(re.compile("^Describe the image"), timeout=PATIENCE)
    press_on(page, "#question textarea", "ControlOrMeta+a")
    page.keyboard.type("say: first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    expect(question).to_have_value("say: first\nsecond")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text(re.compile("first\\s+second"), timeout=PATIENCE)
    expect(status(page)).to_have_value("", timeout=PATIENCE)
    press_on(page, "#again", "Enter")
    expect(status(page)).to_have_value("", timeout=PATIENCE)
    expect(answers(page)).to_have_count(1)
    press_on(page, "#clear", "Space")
    expect(answers(page)).to_have_count(0, timeout=PATIENCE)


def press_on(page: Page, selector: str, key: str) -> None:
    """Walk with the Tab key to a part of the page, see that it shows where one is, and press a key on it."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            break
    focused = page.locator(":focus")
    assert focused.evaluate("(element, selector) => element.matches(selector)", selector), selector
    assert style(focused, "outlineStyle") != "none" or style(focused, "boxShadow") != "none"
    page.keyboard.press(key)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(visit, demo, screenshot, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    show(page, demo.scene)
    ask(page, "say: <p>a ship</p> {<10><20><40><60>|<45>} at sea")
    page.get_by_role("button", name="[identify]").click()
    expect(status(page)).to_have_value(re.compile("draw a box first"), timeout=PATIENCE)
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # colours fade in
    screenshot(page, scheme)
    for selector in READ:
        parts = page.locator(selector)
        assert parts.count()
        for n in range(parts.count()):
            assert parts.nth(n).evaluate(CONTRAST) >= 4.5, f"{selector} {n}"


READ = (
    "#question textarea",
    "#status textarea",
    "#tasks button",
    "#send-row button",
    "#chat [data-testid=bot]",
    "#chat [data-testid=user]",
    "#pieces .highlighted",
    "#unbox",
    "#png",
)
CONTRAST = """element => {
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const [r, g, b, alpha = 1] = parts(getComputedStyle(node).backgroundColor);
            if (alpha === 1) return [r, g, b];
            if (alpha !== 0) throw Error("half transparent: " + node.outerHTML.slice(0, 200));
        }
        return [255, 255, 255];
    };
    const luminance = (colour) => {
        const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const [low, high] = [parts(getComputedStyle(element).color), ground(element)]
        .map(colour => luminance(colour.slice(0, 3))).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}"""
"""How far an element's text stands out from what is behind it, as WCAG measures it."""


def test_what_the_model_says_is_text(visit, demo) -> None:
    page = visit()
    show(page, demo.scene)
    hostile = (
        "<img src=x onerror=window.hit=1> <script>window.hit=1</script> **bold** $$x$$ [a](javascript:hit) "
        "{{7*7}} ${7*7} <p><b>ship</b></p> {<10><10><50><50>|<90>}"
    )
    said = ask(page, f"say: {hostile}")
    assert "<img src=x onerror=window.hit=1> <script>window.hit=1</script> **bold** $$x$$" in said
    assert page.locator("#pieces .highlighted").inner_text().strip() == "<b>ship</b>"
    page.fill("#question textarea", "fail: <img src=x onerror=window.hit=1>")
    page.press("#question textarea", "Enter")
    expect(status(page)).to_have_value(re.compile("^error: the model failed"), timeout=PATIENCE)
    assert page.evaluate("window.hit") is None
    assert page.locator("#chat img, #pieces img, #chat b, #pieces b, #chat script").count() == 0


def test_a_phone_in_the_dark(visit, tmp_path, screenshot) -> None:
    page = visit(
        viewport={"width": 390, "height": 844},
        has_touch=True,
        is_mobile=True,
        device_scale_factor=2,
        color_scheme="dark",
    )
    picture = tmp_path / "wide.png"
    scene = draw_scene(11, name="airport").image
    scene.resize((900, 300)).save(picture)
    show(page, picture)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "dark" in page.locator("body").get_attribute("class").split()
    page.locator("#picture img").tap(position={"x": 100, "y": 60})
    expect(status(page)).to_have_value("tap the opposite corner", timeout=PATIENCE)
    assert ask(page, "say: <p>a plane</p> {<10><20><40><60>|<45>} on the ground") == "a plane on the ground"
    assert page.locator("#send").bounding_box()["width"] >= 44
    screenshot(page, "phone")
