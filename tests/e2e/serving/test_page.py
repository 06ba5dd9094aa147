"""The demo page in a real headless Chromium."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

from rl.store import RunFolder
from tests.conftest import make_prompt
from tests.e2e.serving.conftest import SEEN, Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and this machine has none")
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    path.write_bytes(make_prompt().images[0].png)
    return path


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page with a key given, and whatever it complains about in `page.faults`."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    opened.faults = []
    opened.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.on("request", lambda request: opened.faults.append(request.url) if foreign(request.url, server) else None)
    opened.goto(server.url)
    opened.get_by_label("API key").fill(server.key)
    opened.get_by_label("API key").press("Enter")
    opened.locator("#settings:not([open])").wait_for()
    yield opened
    assert opened.faults == []
    context.close()


def foreign(url: str, server: Server) -> bool:
    return not url.startswith((server.url, "data:", "blob:"))


def ask(page: Any, picture: Path, question: str = "What do you see?") -> Any:
    """Begin anew, ask with the keyboard alone, and wait for both answers; returns the turn."""
    page.get_by_role("button", name="New").click()
    page.locator("#file").set_input_files(str(picture))
    page.get_by_alt_text("Picture 1 to send").wait_for()
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    turn.locator(".answer[aria-busy=false]").nth(1).wait_for(timeout=60_000)
    return turn


def test_without_a_key_the_page_says_that_it_needs_one(browser: Any, server: Server) -> None:
    opened = browser.new_page()
    opened.goto(server.url)
    opened.get_by_text("This server asks for an API key").wait_for()
    assert opened.evaluate("document.activeElement.id") == "key"
    opened.close()


def test_a_question_with_a_picture_is_answered_twice_and_a_choice_becomes_a_pair(
    page: Any,
    server: Server,
    picture: Path,
    tmp_path: Path,
) -> None:
    turn = ask(page, picture)
    answers = turn.locator(".answer")
    assert answers.locator("h2").all_inner_texts() == ["base", "aligned"]
    for index, name in enumerate(("base", "aligned")):
        card = server.client.models.retrieve(name).model_dump()
        assert answers.nth(index).locator("code").inner_text() == f"{card['version']} · {card['revision']}"
        assert all(part in answers.nth(index).inner_text() for part in SEEN)
    answers.nth(1).get_by_role("button", name="Copy").click()
    page.get_by_text("Copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == answers.nth(1).locator("p").inner_text()
    page.screenshot(path=tmp_path / "page.png", full_page=True)

    turn.get_by_role("button", name="Both bad").press("Enter")
    page.get_by_text("your choice is kept").wait_for()
    assert page.evaluate("document.activeElement.id") == "text", "the place of who uses the keyboard is not lost"
    log = (server.folder / "preferences/choices.jsonl").read_text().splitlines()
    said = json.loads(log[-1])
    assert (said["choice"], said["answers"]) == ("both_bad", answers.locator("p").all_inner_texts())

    page.get_by_label("Temperature").evaluate("element => { element.value = 1.8; }")
    for _ in range(10):  # until the two answers differ
        turn = ask(page, picture)
        texts = [text.strip() for text in turn.locator(".answer p").all_inner_texts()]
        if texts[0] != texts[1]:
            break
    assert all(texts)
    assert texts[0] != texts[1]
    turn.get_by_role("button", name="Left", exact=True).click()
    page.get_by_text("your choice is kept").wait_for()
    store = RunFolder(str(server.folder / "preferences"))
    batch = store.read_batch(store.steps()[-1])
    assert batch is not None
    assert [one.text for one in batch.pairs[0].completions] == texts


def test_pictures_come_by_drop_and_paste_and_can_be_taken_away(page: Any, picture: Path) -> None:
    content = list(picture.read_bytes())
    give = """([kind, content]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(content)], "a.png", {type: "image/png"}));
        const options = {bubbles: true, cancelable: true};
        document.dispatchEvent(kind === "drop" ? new DragEvent("drop", {...options, dataTransfer: data})
            : new ClipboardEvent("paste", {...options, clipboardData: data}));
    }"""
    for kind in ("drop", "paste"):
        page.evaluate(give, [kind, content])
        page.get_by_alt_text("Picture 1 to send").wait_for()
        page.get_by_role("button", name="Remove picture 1").click()
        assert page.locator("#thumbnails li").count() == 0


def test_what_cannot_be_sent_is_said_before_it_is(page: Any, picture: Path, tmp_path: Path) -> None:
    page.on("request", lambda request: page.faults.append("sent") if "chat" in request.url else None)
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "torn.png").write_bytes(picture.read_bytes()[:40])
    for name, says in (
        ("drawing.svg", "drawing.svg is not a PNG, JPEG, WebP, GIF or BMP picture."),
        ("torn.png", "torn.png cannot be read as a picture."),
    ):
        page.locator("#file").set_input_files(str(tmp_path / name))
        expect(page.get_by_role("status")).to_have_text(says)
        assert page.locator("#thumbnails li").count() == 0
    page.locator("#file").set_input_files(str(picture))
    page.get_by_alt_text("Picture 1 to send").wait_for()
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status")).to_have_text("Ask something about the picture.")
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0.75")
    for most in ("9999", ""):
        page.get_by_label("Longest answer").fill(most)
        page.keyboard.press("Escape")
        page.locator("#settings:not([open])").wait_for()
        page.get_by_label("Question", exact=True).fill("What do you see?")
        page.keyboard.press("Enter")
        page.locator("#settings[open]").wait_for()
        assert page.evaluate("document.activeElement.id") == "max-tokens"


def test_an_answer_can_be_stopped_and_a_hidden_side_is_shown_after_the_choice(page: Any, picture: Path) -> None:
    page.get_by_label("Hide which is which").check()
    turn = ask(page, picture)
    assert turn.locator("h2").all_inner_texts() == ["Left", "Right"]
    assert turn.locator("code").all_inner_texts() == ["", ""]
    turn.get_by_role("button", name="Equal").click()
    page.get_by_text("your choice is kept").wait_for()
    assert set(turn.locator("h2").all_inner_texts()) == {"base", "aligned"}
    page.get_by_label("Question", exact=True).fill("What do you see?")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send").wait_for()
    assert page.evaluate("document.activeElement.id") == "text"
    assert page.locator(".turn").last.locator(".answer[aria-busy=true]").count() == 0


def test_a_new_conversation_does_not_wait_for_the_old_one(page: Any, picture: Path) -> None:
    ask(page, picture)
    page.get_by_label("Question", exact=True).fill("What do you see?")
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if "chat" in request.url else None)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="New").click()
    page.get_by_role("button", name="Send").wait_for()
    assert page.locator(".turn").count() == 0
    sent.clear()
    page.get_by_label("Question", exact=True).fill("copy: b c")
    page.keyboard.press("Enter")
    page.locator(".answer[aria-busy=false]").nth(1).wait_for()
    assert [len(body["messages"]) for body in sent] == [1, 1]


def test_what_cannot_be_answered_comes_back_to_be_mended(page: Any) -> None:
    page.get_by_label("Question", exact=True).fill("word " * 400)
    page.keyboard.press("Enter")
    page.locator(".answer p.error").nth(1).wait_for()
    assert "maximum context length" in page.locator(".answer p.error").first.inner_text()
    expect(page.get_by_label("Question", exact=True)).to_have_value(re.compile("^word word"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_colours(page: Any, picture: Path, scheme: str, tmp_path: Path) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(PHONE)
    turn = ask(page, picture)
    page.screenshot(path=tmp_path / f"phone-{scheme}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    boxes = [turn.locator(".answer").nth(index).bounding_box() for index in (0, 1)]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"], "one above the other"
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, back[4:-1].split(","))) < 64) == (scheme == "dark")


def test_every_control_has_a_name_and_the_answers_are_announced(page: Any, picture: Path) -> None:
    ask(page, picture)
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea")]
        .filter((one) => one.offsetParent && !(one.innerText || one.ariaLabel || one.labels?.length))
        .map((one) => one.outerHTML)""")
    assert nameless == []
    assert "Left: there is a red circle" in page.locator("#announced[aria-live=polite]").inner_text()
