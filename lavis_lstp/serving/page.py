"""The page: a video, a conversation about it, and beside each answer the moment it came from. A Gradio application.

In: a `Server`. Out: a function that mounts the page at `/` of its FastAPI application. Questions of the page stand in
the same line as those of the API. Everything is local: no analytics, no fonts or scripts from elsewhere, no share link.
"""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lavis_lstp.config.model import AUTO, SELECTORS, asks_sampler
from lavis_lstp.errors import LstpError
from lavis_lstp.files import strict_json
from lavis_lstp.inference.contact_sheet import pictures_at
from lavis_lstp.inference.loading import EXAMPLE
from lavis_lstp.inference.prediction import Cancelled, Prediction
from lavis_lstp.serving.app import Server
from lavis_lstp.serving.line import Ticket
from lavis_lstp.serving.timeline import evidence_html

DECODING = ("beam search", "nucleus sampling")
MEDIUM = "the video"
NO_DOCS = {"docs_url": None, "redoc_url": None, "openapi_url": None}
MOST_CALL_BYTES = 1 << 20
NOTHING_YET = '<p class="evidence">Ask a question to see which moment the answer came from.</p>'
TITLE = "LSTP: the frames a question asks for"
SEEK = """
element.addEventListener('click', (event) => {
  const frame = event.target.closest('[data-time]');
  const player = document.querySelector('#video video');
  if (frame && player) { player.pause(); player.currentTime = Number(frame.dataset.time); }
});
"""
TAG = re.compile("<(?=[a-zA-Z/!?])")
Messages = list[dict[str, Any]]


def mounted(server: Server, *, example: bool, feedback: Path | None) -> Callable[[FastAPI], FastAPI]:
    """Return the function that mounts the page in the application.

    Args:
        example: offer the shipped clip and its questions.
        feedback: a file for thumbs, as JSON lines; None = thumbs are not shown.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    folder = tempfile.TemporaryDirectory(prefix="lavis_lstp_page_")  # goes when the process ends
    os.environ["GRADIO_TEMP_DIR"] = folder.name

    page = Page(server, example=example, feedback=feedback)
    page.folder = folder

    def mount(app: FastAPI) -> FastAPI:
        return gr.mount_gradio_app(
            app,
            page.build(),
            path="/",
            footer_links=[],
            app_kwargs={**NO_DOCS, "middleware": [Middleware(CallLimit)]},
            auth=(lambda _, password: server.has_key(password)) if server.keys else None,
            auth_message="Any name; the API key as password." if server.keys else None,
            max_file_size=server.limits.upload_bytes,
            ssr_mode=False,
            enable_monitoring=False,
            show_error=True,
            theme=_theme(),
            css_paths=Path(__file__).with_name("page.css"),
        )

    return mount


class CallLimit:
    """Bounds what the page's own calls send; files, which are bounded by Gradio, come through another path."""

    def __init__(self, app: ASGIApp):
        self.app, self.bounded = app, RequestBodyLimitMiddleware(app, MOST_CALL_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_upload = scope["type"] != "http" or scope["path"].startswith("/gradio_api/upload")
        await (self.app if is_upload else self.bounded)(scope, receive, send)


def _theme() -> gr.themes.Base:
    """Fonts of the reader's machine, and colours whose contrast is 4.5 to 1 or more; Gradio's greys have 1.9."""
    fonts = {"font": [gr.themes.Font("system-ui")], "font_mono": [gr.themes.Font("monospace")]}
    button = ("button_primary_background_fill", "button_primary_background_fill_dark")
    return gr.themes.Default(primary_hue="blue", **fonts).set(
        **dict.fromkeys(button, "*primary_700"),
        body_text_color_subdued="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


class Page:
    """The page's parts and what they do; one object for all browsers, whose conversations are their own."""

    def __init__(self, server: Server, *, example: bool, feedback: Path | None):
        self.server, self.example, self.feedback = server, example, feedback
        self._feedback_lock = threading.Lock()
        self._waiting: dict[str, list[Ticket]] = {}  # by browser
        self.selectors = selectors_of(server.predictor.model)
        self.folder: Any = None

    # ---- layout -----------------------------------------------------------------------------------------------------

    def build(self) -> Any:
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            gr.Markdown(f"# {TITLE}")
            for note in self.server.predictor.notes:
                gr.Markdown(f"**Note:** {note}")
            with gr.Row():
                with gr.Column():
                    self.video = gr.Video(label="Video", sources=["upload"], elem_id="video", buttons=[])
                    self.chat = gr.Chatbot(
                        label="Conversation",
                        elem_id="chat",
                        height=260,
                        render_markdown=False,
                        sanitize_html=True,
                        allow_tags=False,
                        editable="user",
                        buttons=["copy"],
                        feedback_options=("Like", "Dislike") if self.feedback else None,
                    )
                    self.question = gr.Textbox(
                        label="Question", placeholder="What happens first?", elem_id="question", max_length=2000
                    )
                    with gr.Row():
                        self.ask_button = gr.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                        self.stop_button = gr.Button("Stop", elem_id="stop", min_width=90)
                        self.again_button = gr.Button("Regenerate", elem_id="regenerate", min_width=115)
                        self.reset_button = gr.Button("Reset", elem_id="reset", min_width=90)
                    if self.example:
                        self._examples()
                with gr.Column():
                    self.evidence = gr.HTML(NOTHING_YET, elem_id="evidence", js_on_load=SEEK, label="Evidence")
                    settings = self._settings()
                    with gr.Row():
                        self.third = gr.Dropdown(
                            others := [name for name in self.selectors if name not in ("uniform", "lstp")],
                            value=others[0],
                            label="Compare uniform and lstp with",
                        )
                        self.compare_button = gr.Button("Compare", elem_id="compare")
            self.compared = gr.HTML("", elem_id="compared", js_on_load=SEEK, label="Comparison")
            self._connect(settings)
        return blocks

    def _examples(self) -> None:
        rows = strict_json((EXAMPLE / "questions.json").read_text(encoding="utf-8"))
        clip = str(EXAMPLE / "clip.mp4")
        gr.Examples(
            [[clip, row["question"]] for row in rows],
            inputs=[self.video, self.question],
            example_labels=[row["question"] for row in rows],
            label="Examples: click one, then Ask",
            elem_id="examples",
            api_name=None,
        )

    def _settings(self) -> list[Any]:
        """Widgets, in the order of `settings_of_widgets`."""
        model = self.server.predictor.model
        made, used = model.generation, model.selector
        longest, beams = made.get("max_new_tokens") or 20, made.get("num_beams") or 1
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            return [
                gr.Slider(1, max(8, used.most), value=used.most, step=1, label="Frames", elem_id="frames"),
                gr.Checkbox(
                    value=used.num_selected == AUTO,
                    label="As many frames as the scores ask for, where the selector has scores",
                    elem_id="auto",
                ),
                gr.Dropdown(
                    self.selectors,
                    value=used.name if used.name in self.selectors else self.selectors[0],
                    label="How frames are chosen",
                ),
                gr.Slider(1, max(128, longest), value=longest, step=1, label="Longest answer, tokens"),
                gr.Slider(0, 128, value=0, step=1, label="Shortest answer, tokens", elem_id="shortest"),
                gr.Radio(list(DECODING), value=DECODING[bool(made.get("do_sample"))], label="Decoding"),
                gr.Slider(1, max(10, beams), value=beams, step=1, label="Beams"),
                gr.Slider(0.05, 1, value=made.get("top_p") or 0.9, step=0.05, label="Top-p"),
                gr.Slider(0.1, 2, value=made.get("temperature") or 1, step=0.1, label="Temperature"),
                gr.Slider(1, 5, value=made.get("repetition_penalty") or 1, step=0.1, label="Repetition penalty"),
                gr.Slider(-3, 3, value=made.get("length_penalty") or 1, step=0.1, label="Length penalty"),
                gr.Checkbox(value=not self.example, label="The model reads earlier turns"),
            ]

    def _connect(self, settings: list[Any]) -> None:
        shown = [self.chat, self.evidence, self.question]
        private = {"api_visibility": "private", "concurrency_limit": None}
        ending = {"fn": self.end, "queue": False} | private
        begun = {"js": "(...inputs) => { window.lstpEmptied = false; return inputs; }"} | private
        inputs = [self.video, self.question, self.chat, *settings]
        earlier = [self.video, self.chat, *settings]
        compared = [*inputs[:3], self.third, *settings]
        asked = [
            self.ask_button.click(self.ask, inputs, shown, **begun),
            self.question.submit(self.ask, inputs, shown, **begun),
            self.again_button.click(self.again, earlier, shown, **begun),
            self.chat.edit(self.edited, earlier, shown, **begun),
            self.compare_button.click(self.compare, compared, [self.compared], **begun),
        ]
        self.stop_button.click(**ending)
        # First the server ends what is under way, so that a question to the empty page is not ended with it. Pieces of
        # the answer may arrive behind: the page is emptied again when it has ended. Gradio's own `cancels` would show
        # "Error" on parts whose answer is cut off.
        empty = {self.chat: [], self.evidence: NOTHING_YET, self.compared: "", self.question: ""}
        answered = list(empty)[:3]

        def emptied(parts: list[Any]) -> str:
            return json.dumps([empty[part] for part in parts])

        for happens, parts in ((self.reset_button.click, list(empty)), (self.video.change, answered)):
            js = f"() => {{ window.lstpEmptied = true; return {emptied(parts)}; }}"
            happens(**ending)
            happens(js=js, fn=None, outputs=parts, **private)
        for one in asked:
            one.then(js=f"() => window.lstpEmptied ? {emptied(answered)} : []", fn=None, outputs=answered, **private)
        if self.feedback:
            self.chat.like(self.liked, [self.chat], None, **private)

    # ---- what happens -----------------------------------------------------------------------------------------------

    async def end(self, request: gr.Request) -> None:
        """End what this browser has asked."""
        for ticket in self._waiting.get(request.session_hash, ()):
            self.server.line.give_up(ticket)

    async def ask(
        self, request: gr.Request, video: str | None, question: str, chat: Messages, *settings: Any
    ) -> AsyncIterator[tuple]:
        """Yields the conversation, the evidence and the question's box as the answer is written."""
        earlier = plain(chat)
        turns = [*earlier, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        turns = [{**turn, "content": literal(turn["content"])} for turn in turns]
        keep = gr.skip()
        ticket = None
        try:
            ticket = self._join(request, video, question, earlier, settings, stream=True)
            await ticket.ready
            yield turns, keep, ""
            async for piece in ticket.pieces():
                turns[-1]["content"] += literal(piece)
                yield turns, keep, keep
            found = await ticket.result
            turns[-1]["content"] = literal(found.prediction)
            yield turns, await self._evidence(video, found), keep
        except Cancelled:
            return
        except LstpError as error:
            raise _told(error) from None
        finally:
            if ticket is not None:
                self._leave(request, ticket)

    async def again(
        self, request: gr.Request, video: str | None, chat: Messages, *settings: Any
    ) -> AsyncIterator[tuple]:
        """Ask the last question once more."""
        earlier = plain(chat)
        places = [number for number, turn in enumerate(earlier) if turn["role"] == "user"]
        if not places:
            raise _told(LstpError("nothing has been asked yet"))
        last = places[-1]
        async for shown in self.ask(request, video, earlier[last]["content"], earlier[:last], *settings):
            yield shown

    async def edited(
        self, event: gr.EditData, request: gr.Request, video: str | None, chat: Messages, *settings: Any
    ) -> AsyncIterator[tuple]:
        """Ask an earlier question in other words; the turns after it are dropped."""
        earlier = plain(chat)
        place = event.index if isinstance(event.index, int) else event.index[0]
        async for shown in self.ask(request, video, str(event.value), earlier[:place], *settings):
            yield shown

    async def compare(
        self, request: gr.Request, video: str | None, question: str, chat: Messages, third: str, *settings: Any
    ) -> AsyncIterator[str]:
        """The question, or else the last one, answered from frames that are chosen in three ways."""
        asked = [turn["content"] for turn in plain(chat) if turn["role"] == "user"]
        question = question.strip() or (asked[-1] if asked else "")
        names, tickets = [name for name in ("uniform", "lstp", third) if name in self.selectors], []
        try:
            for name in names:
                tickets.append(self._join(request, video, question, [], (*settings[:2], name, *settings[3:])))
            parts = []
            for name, ticket in zip(names, tickets, strict=True):
                found = await ticket.result
                shown = await self._evidence(video, found)
                answer = f"<h3>{html.escape(name)}</h3><p class='answer'>{html.escape(found.prediction)}</p>"
                parts.append(f"<div>{answer}{shown}</div>")
                head = f"<h2>Compared: {html.escape(question)}</h2>"
                yield f'{head}<div class="compared">{"".join(parts)}</div>'
        except Cancelled:
            return
        except LstpError as error:
            raise _told(error) from None
        finally:
            for ticket in tickets:
                self._leave(request, ticket)

    def liked(self, event: gr.LikeData, chat: Messages) -> None:
        """Store a thumb with its question and answer."""
        turns = plain(chat)
        place = event.index if isinstance(event.index, int) else event.index[0]
        row = {
            "time": round(time.time(), 3),
            "model": self.server.name,
            "question": turns[place - 1]["content"] if place else "",
            "answer": turns[place]["content"],
            "liked": event.liked is True or event.liked == "Like",
        }
        with self._feedback_lock, self.feedback.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    # ---- the line ---------------------------------------------------------------------------------------------------

    def _join(
        self,
        request: gr.Request,
        video: str | None,
        question: str,
        earlier: Messages,
        widgets: tuple,
        *,
        stream: bool = False,
    ) -> Ticket:
        given, reads_history = settings_of_widgets(widgets)
        pairs = [
            (earlier[i]["content"], earlier[i + 1]["content"])
            for i in range(0, len(earlier) - 1, 2)
            if earlier[i + 1]["content"]
        ]
        settings = self.server.predictor.settings(**given)
        history = pairs if reads_history else []
        ticket = self.server.line.join(
            video, question or "", history=history, settings=settings, name=MEDIUM, stream=stream
        )
        self._waiting.setdefault(request.session_hash, []).append(ticket)
        return ticket

    def _leave(self, request: gr.Request, ticket: Ticket) -> None:
        waiting = self._waiting[request.session_hash]
        waiting.remove(ticket)
        if not waiting:
            del self._waiting[request.session_hash]
        self.server.line.give_up(ticket)

    async def _evidence(self, video: str | None, found: Prediction) -> str:
        def draw() -> str:
            pictures: list[Image.Image] = []
            if video is not None:
                pictures = pictures_at(video, found.frame_times_s, name=MEDIUM)
            return evidence_html(found, pictures)

        return await asyncio.to_thread(draw)


def selectors_of(model: Any) -> list[str]:
    """Names of the selectors that this model can follow: without a temporal sampler, those that ask for none."""
    found = {name: kind for name, kind in SELECTORS.items() if not kind.by_data and name != "best_span"}
    asked = model.chooser.frame_scorer
    scorer = "sampler" if asked is None else "another"
    found = {name: kind for name, kind in found.items() if "features" not in kind.needs or model.chooser.has_features}
    return [name for name in found if model.sampler is not None or not asks_sampler(name, scorer)]


def settings_of_widgets(widgets: tuple) -> tuple[dict[str, Any], bool]:
    """Settings of `Predictor.settings`, and whether earlier turns are read."""
    frames, auto, selector, longest, shortest, decoding, beams, top_p, temperature, *others = widgets
    repetition, length, history = others
    given = {
        "num_selected": AUTO if auto and SELECTORS[selector].by_sampler else frames,
        "selector": selector,
        "max_new_tokens": max(longest, shortest),
        "min_new_tokens": shortest or None,
        "repetition_penalty": float(repetition),
    }
    if decoding == DECODING[1]:
        seed = time.time_ns() % 2**31  # another answer each time
        given |= {"do_sample": True, "num_beams": 1, "top_p": top_p, "temperature": float(temperature), "seed": seed}
    else:
        given |= {"do_sample": False, "num_beams": beams}
        if beams > 1:
            given["length_penalty"] = float(length)
    return given, bool(history)


def literal(text: str) -> str:
    """Text that the conversation shows as it is: Gradio would leave out what could be a tag."""
    return TAG.sub("&lt;", text)


def plain(chat: Messages | None) -> Messages:
    """Gradio's messages as {role, content: text}, as they were before `literal`."""
    found = []
    for message in chat or []:
        content = message["content"]
        if isinstance(content, list):
            content = "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
        found.append({"role": message["role"], "content": str(content).replace("&lt;", "<")})
    return found


def _told(error: Exception) -> Exception:
    """Return an error as Gradio shows it: a note that stays until it is closed."""
    return gr.Error(html.escape(str(error)), duration=None, print_exception=False)
