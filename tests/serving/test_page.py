"""The page in a real headless Chromium: what a person does, and what she sees."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time

import pytest
from browser import chromium
from serving_process import ANSWER, ASKED, CLIP, ROWS, WITHOUT, running
from video_files import numbered_video

pytest.importorskip("gradio", reason=WITHOUT)
httpx = pytest.importorskip("httpx", reason=WITHOUT)

from lavis_lstp.serving.limits import Limits  # noqa: E402

CLEAR = "#video button[aria-label='Clear'], #video button[title='Clear'], #video button[aria-label='Remove']"
KNOWN = ("/assets/worker-", "VideoPreview")
"""Gradio's player wants ffmpeg.wasm from a CDN to cut videos; the policy of the page refuses that, in the console."""


@pytest.fixture(scope="module")
def server(predictor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    limits = Limits(upload_bytes=200_000)
    page = {"example": True, "feedback": folder / "thumbs.jsonl"}
    with running(predictor, folder / "uploads", limits=limits, page=page) as started:
        started.feedback = folder / "thumbs.jsonl"
        yield started


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


class Visitor:
    """A person before the page."""

    def __init__(self, window, url):
        self.window, self.driver = window, window.driver
        self.driver.get(url)
        self.until(lambda: self.one("#question textarea, #question input"))

    def until(self, true, seconds=60):
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Exception):
                if found := true():
                    return found
            assert time.monotonic() < deadline, f"not in time; the page says {self.window.texts('body')[0][:600]}"
            time.sleep(0.05)

    def one(self, selector):
        return next(iter(self.driver.find_elements("css selector", selector)), None)

    def click(self, selector):
        self.until(lambda: self.one(selector))
        self.window.script("document.querySelector(arguments[0]).click()", selector)

    def upload(self, path):
        self.until(lambda: self.one("#video input[type=file]")).send_keys(str(path))

    def has_video(self):
        return self.window.script("!!document.querySelector('#video video')")

    def type(self, text):
        box = self.one("#question textarea, #question input")
        box.clear()
        box.send_keys(text)

    def ask(self, text):
        self.type(text)
        self.click("#ask")

    def said(self, role="bot"):
        return self.window.texts(f"#chat .{role}.message")

    def times(self, place="#evidence"):
        return [float(text.split()[0]) for text in self.window.texts(f"{place} .frame span")]

    def example(self, number=1):
        self.until(lambda: len(self.window.texts("#examples button")) > number)
        self.window.script("document.querySelectorAll('#examples button')[arguments[0]].click()", number)
        self.until(
            lambda: (
                self.has_video()
                and self.window.script("document.querySelector('#question textarea, #question input').value")
            )
        )

    def reset(self):
        self.click("#reset")
        self.until(lambda: not self.said() and not self.times())


@pytest.fixture(scope="module")
def opened(window, server):
    return Visitor(window, server.url)


@pytest.fixture
def visitor(opened):
    """The page with the example's clip and an empty conversation."""
    opened.window.look()
    opened.example()
    opened.reset()
    return opened


@pytest.fixture
def gate(predictor, monkeypatch):
    """Answers end when it is set; until then the first word has been said."""
    opened, answer = threading.Event(), predictor.answer_many

    def slowly(asked):
        for one in asked:
            (one.on_text or str)(answer([dataclasses.replace(one, on_text=None)])[0].prediction[:1])
        while not opened.wait(0.02) and not all(one.cancel.is_set() for one in asked):
            pass
        return answer(asked)

    monkeypatch.setattr(predictor, "answer_many", slowly)
    yield opened
    opened.set()


def test_an_example_is_answered_with_its_frames_and_a_click_shows_one(visitor, server, predictor):
    visitor.example(1)
    visitor.click("#ask")
    visitor.until(lambda: visitor.said() == [ANSWER] and visitor.times())
    direct = predictor.answer(CLIP, ASKED)
    assert visitor.times() == pytest.approx(direct.frame_times_s, abs=0.006)
    label = visitor.one("#evidence svg").get_attribute("aria-label")
    assert "Span from 5.60 to 7.00 s" in label
    assert len(visitor.driver.find_elements("css selector", "#evidence .scores")) == 1
    visitor.window.script("document.querySelectorAll('#evidence .frame')[2].click()")
    visitor.until(
        lambda: visitor.window.script("document.querySelector('#video video').currentTime") == pytest.approx(6.2)
    )
    elsewhere = visitor.window.script(
        "performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(arguments[0]) "
        "&& !n.startsWith('data:') && !n.startsWith('blob:'))",
        server.url,
    )
    assert not elsewhere, "the page must work offline"
    assert not [line for line in visitor.window.complaints() if not any(known in line for known in KNOWN)]


def test_an_upload_streams_is_stopped_and_regenerated(visitor, tmp_path, gate, server):
    visitor.click(CLEAR)
    visitor.until(lambda: not visitor.has_video())
    visitor.upload(numbered_video(tmp_path / "mine.mp4", 30))
    visitor.until(visitor.has_video)
    visitor.ask("first?")
    visitor.until(lambda: visitor.said() and len(visitor.said()[0]) == 1)  # a piece of the answer
    assert not visitor.times() and len(server.line) == 1
    visitor.click("#stop")
    visitor.until(lambda: len(server.line) == 0)
    gate.set()
    visitor.click("#regenerate")
    visitor.until(lambda: len(visitor.times()) == 4)
    assert visitor.said("user") == ["first?"] and len(visitor.said()) == 1 and len(visitor.said()[0]) > 1
    visitor.ask("second?")
    visitor.until(lambda: visitor.said("user") == ["first?", "second?"] and len(visitor.said()) == 2)
    visitor.reset()
    visitor.click(CLEAR)
    visitor.until(lambda: not visitor.has_video())


@pytest.mark.parametrize("letters", [0, 1, 2])
def test_nothing_arrives_behind_a_reset(visitor, gate, server, letters):
    """The page is emptied between two pieces of an answer, or as it ends."""
    gate.set()
    visitor.ask("first?")
    visitor.until(lambda: visitor.said() and len(visitor.said()[0]) >= letters)
    visitor.reset()
    visitor.until(lambda: len(server.line) == 0)
    for _ in range(5):
        time.sleep(0.05)
        assert not visitor.said() and not visitor.times()
    assert "Error" not in visitor.window.texts("body")[0]


def test_a_question_is_edited_and_what_followed_it_is_dropped(visitor):
    for row in ROWS[:2]:
        visitor.ask(row["question"])
        visitor.until(lambda row=row: visitor.said()[-1:] == [row["answer"]] and visitor.times())

    def edited():
        """The box of the first question; a press while the page still draws the last answer is lost."""
        if box := visitor.one("#chat textarea"):
            return box
        visitor.one("#chat button[aria-label='Edit'], #chat button[title='Edit']").click()

    box = visitor.until(edited)
    box.send_keys("\ue009a\ue000", ROWS[2]["question"])
    visitor.click("#chat button[aria-label='Submit'], #chat button[title='Submit']")
    visitor.until(lambda: visitor.said("user") == [ROWS[2]["question"]] and visitor.said() == [ROWS[2]["answer"]])


def test_eight_frames_or_as_many_as_the_scores_ask_for(visitor, predictor):
    visitor.click("#settings button")
    number = visitor.until(lambda: visitor.one("#frames input[type=number]"))
    visitor.until(number.is_displayed)
    for value in ("8", "4"):
        number.send_keys("\ue009a\ue000", value, "\ue004")  # Ctrl+A, value, Tab
        visitor.ask(ASKED)
        visitor.until(lambda value=value: len(visitor.times()) == int(value))
    visitor.click("#auto input")
    visitor.ask(ASKED)
    asked_for = predictor.answer(CLIP, ASKED, num_selected="auto").frame_times_s
    assert len(asked_for) not in (4, 8)
    visitor.until(lambda: visitor.times() == pytest.approx(asked_for, abs=0.006))
    visitor.click("#auto input")
    visitor.click("#settings button")


def test_three_ways_to_choose_side_by_side(visitor, predictor):
    visitor.type(ASKED)
    visitor.click("#compare")
    visitor.until(lambda: len(visitor.window.texts("#compared .answer")) == 3)
    assert visitor.window.texts("#compared h3") == ["uniform", "lstp", "argmax"]
    direct = [predictor.answer(CLIP, ASKED, selector=name) for name in ("uniform", "lstp", "argmax")]
    assert visitor.window.texts("#compared .answer") == [one.prediction for one in direct]
    assert len(visitor.times("#compared")) == 12


def test_files_that_cannot_be_used_are_said(visitor, tmp_path):
    broken, large = tmp_path / "broken.mp4", tmp_path / "large.mp4"
    broken.write_bytes(b"no video <img src=x onerror=alert(1)>")
    large.write_bytes(b"\0" * 300_000)
    visitor.click(CLEAR)
    visitor.until(lambda: not visitor.has_video())
    visitor.upload(large)
    visitor.until(lambda: "maximum" in visitor.window.texts("body")[0].lower())
    visitor.driver.refresh()
    visitor.until(lambda: visitor.one("#video input[type=file]"))
    visitor.upload(broken)
    visitor.until(visitor.has_video)
    visitor.ask("what?")
    visitor.until(lambda: "the video: cannot be read as a video" in visitor.window.texts("body")[0])
    assert not visitor.said() or visitor.said() == [""]
    visitor.driver.refresh()
    visitor.until(lambda: visitor.one("#question textarea, #question input"))


def test_two_browsers_have_conversations_of_their_own(visitor, server):
    visitor.ask(ROWS[0]["question"])
    visitor.until(lambda: visitor.said() == [ROWS[0]["answer"]])
    first = visitor.driver.current_window_handle
    visitor.driver.switch_to.new_window("tab")
    try:
        other = Visitor(visitor.window, server.url)
        assert not other.said()
        other.example(2)
        other.click("#ask")
        other.until(lambda: other.said() == [ROWS[2]["answer"]])
    finally:
        visitor.driver.close()
        visitor.driver.switch_to.window(first)
    assert visitor.said() == [ROWS[0]["answer"]]


def test_a_thumb_is_stored(visitor, server):
    visitor.ask(ASKED)
    visitor.until(lambda: visitor.said() == [ANSWER])
    visitor.click("#chat button[aria-label='Like'], #chat button[title='Like'], #chat button[aria-label='like']")
    row = json.loads(visitor.until(lambda: server.feedback.exists() and server.feedback.read_text()))
    assert (row["question"], row["answer"], row["liked"]) == (ASKED, ANSWER, True)


def test_what_is_typed_is_text(visitor):
    typed = "<img src=x onerror='document.title=1'> **bold** <b>x</b>"
    visitor.ask(typed)
    visitor.until(lambda: visitor.times())
    assert visitor.said("user") == [typed]
    visitor.type(typed)
    visitor.click("#compare")
    visitor.until(lambda: visitor.window.texts("#compared h2") == [f"Compared: {typed}"])
    assert visitor.driver.title != "1" and visitor.window.script("document.querySelectorAll('img[src=x]').length") == 0


CONTRASTS = """(() => {
  const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const found = rgba(getComputedStyle(e).backgroundColor);
      if (found[3] > 230) return found;
    }
    return [255, 255, 255];
  };
  const found = [];
  const check = (e, colour, text) => {
    const [most, least] = [light(rgba(colour)), light(ground(e))].sort((a, b) => b - a);
    found.push([Math.round(100 * most / least) / 100, text.slice(0, 40)]);
  };
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true}) || e.disabled) continue;
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join(' ').trim();
    if (text) check(e, getComputedStyle(e).color, text);
    if (e.placeholder && !e.value) check(e, getComputedStyle(e, '::placeholder').color, e.placeholder);
  }
  return found;
})()"""
"""Of each text that is shown: its contrast, as WCAG 2 defines it, and the text."""


def test_every_text_has_the_contrast_that_wcag_asks_for(visitor):
    visitor.ask(ASKED)
    visitor.until(lambda: visitor.times())
    visitor.click("#settings button")
    visitor.until(lambda: visitor.one("#auto input").is_displayed())

    def low():
        return [one for one in visitor.window.script(CONTRASTS) if one[0] < 4.5]

    for dark in (False, True):
        visitor.window.script("document.body.classList.toggle('dark', arguments[0])", dark)
        with contextlib.suppress(AssertionError):
            visitor.until(lambda: not low(), 5)  # colours fade
        assert not low(), dark
    shown = [text for _, text in visitor.window.script(CONTRASTS)]
    assert {"What happens first?", "Frames", ASKED, "bar"} <= set(shown)
    visitor.window.script("document.body.classList.remove('dark')")
    visitor.click("#settings button")


def test_it_is_usable_by_keyboard_on_narrow_screens_and_by_screen_readers(visitor, tmp_path):
    visitor.ask(ASKED)
    visitor.until(lambda: visitor.times())
    visitor.window.look(360)
    visitor.until(lambda: visitor.window.overflow() == 0)
    assert not any(e.is_displayed() for e in visitor.driver.find_elements("css selector", "#video [title^=Trim]"))
    scale = visitor.window.script("document.querySelector('#evidence svg').getBoundingClientRect().width / 600")
    size = visitor.window.script("getComputedStyle(document.querySelector('#evidence svg text')).fontSize")
    assert float(size.removesuffix("px")) * scale > 9, "times under the timeline are readable"
    nameless = visitor.window.script(
        """[...document.querySelectorAll('button, input, textarea, video')].filter(e => e.offsetParent).filter(e =>
        !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.title && !(e.labels && e.labels.length)
        && !e.getAttribute('aria-labelledby') && e.tagName !== 'VIDEO').map(e => e.outerHTML.slice(0, 200))"""
    )
    assert not nameless
    assert visitor.window.script("[...document.querySelectorAll('#evidence img')].every(e => e.alt.length > 8)")
    frame = visitor.one("#evidence .frame")
    frame.send_keys("\ue007")  # Enter
    wanted = float(frame.get_attribute("data-time"))
    visitor.until(
        lambda: visitor.window.script("document.querySelector('#video video').currentTime") == pytest.approx(wanted)
    )
    visitor.window.look()


def test_a_page_with_keys_asks_for_one(predictor, tmp_path):
    key = "a-key-of-many-characters"
    page = {"example": False, "feedback": None}
    with running(predictor, tmp_path, keys=[key], page=page) as server, httpx.Client(base_url=server.url) as client:
        calls = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert client.post("/gradio_api/queue/join", json=calls).status_code == 401
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "x", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "x", "password": key}).status_code == 200
        assert client.get("/config").status_code == 200
        big = client.post("/gradio_api/queue/join", json={**calls, "data": ["x" * (2 << 20)]})
        assert big.status_code in (400, 413)
