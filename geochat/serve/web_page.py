"""The page of the web demo: its layout, and what each part of it does."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from geochat.data.draw import colour
from geochat.serve.web_session import Asked, Session, Sessions
from geochat.serve.web_view import COLOURS, TASKS, Draft, coloured, readable, shortcut

log = logging.getLogger(__name__)

Changes = dict[Any, Any]
"""New values of the page's parts."""

BUTTONS: Any = (
    ("Send", "primary", "send"),
    ("Stop", "stop", "stop"),
    ("Regenerate", "secondary", "again"),
    ("Clear", "secondary", "clear"),
)


class Page:
    """The layout. `blocks` is what Gradio serves."""

    def __init__(
        self, sessions: Sessions, service: Asked, scenes: Sequence[tuple[Path, str]], model: str
    ) -> None:
        """`scenes` are example pictures with their captions; `model` is the name in the heading."""
        self.sessions, self.service, self.scenes = sessions, service, scenes
        with gr.Blocks(
            title="geochat", analytics_enabled=False, delete_cache=(60, 3600), fill_width=True
        ) as self.blocks:
            gr.Markdown(f"## geochat · {model}")
            with gr.Row(elem_id="page"):
                with gr.Column(min_width=320):
                    self._lay_out_picture()
                with gr.Column(min_width=320):
                    self._lay_out_talk()
            self.shown = [self.picture, self.pieces, self.png, self.geojson]
            self.talk = [self.chat, self.question, self.status]
            self._connect()

    def _lay_out_picture(self) -> None:
        self.picture = gr.Image(
            label="Picture",
            show_label=False,
            type="filepath",
            sources=["upload", "clipboard"],
            buttons=["fullscreen"],
            placeholder="Drop, paste or choose a picture",
            elem_id="picture",
        )
        self.pieces = gr.HighlightedText(
            label="Answer",
            color_map={str(n + 1): "#{:02x}{:02x}{:02x}".format(*colour(n)) for n in range(COLOURS)},
            show_label=False,
            show_inline_category=False,
            elem_id="pieces",
        )
        self.gallery = gr.Gallery(
            [(str(file), caption) for file, caption in self.scenes],
            label="Example scenes",
            show_label=False,
            columns=len(self.scenes),
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="scenes",
        )
        download: Any = {"size": "md", "min_width": 120, "interactive": False}
        with gr.Row():
            self.png = gr.DownloadButton("PNG", **download, elem_id="png")
            self.geojson = gr.DownloadButton("GeoJSON", **download, elem_id="geojson")
        with gr.Row():
            self.angle = gr.Slider(
                -90,
                90,
                0,
                step=1,
                label="Turn your box, degrees",
                info="Two taps on the picture draw it.",
                scale=3,
                min_width=240,
                elem_id="angle",
            )
            self.unbox = gr.Button("Remove your box", size="md", elem_id="unbox", min_width=120)

    def _lay_out_talk(self) -> None:
        self.chat = gr.Chatbot(
            label="Conversation",
            render_markdown=False,
            latex_delimiters=[],
            allow_tags=False,
            buttons=["copy_all"],
            placeholder="Show a picture, then ask about it.",
            elem_id="chat",
        )
        self.status = gr.Textbox(
            label="Status",
            show_label=False,
            container=False,
            interactive=False,
            max_lines=3,
            elem_id="status",
        )
        with gr.Row(elem_id="tasks"):
            self.tasks = [gr.Button(task, size="sm", min_width=75) for task in TASKS]
        self.question = gr.Textbox(
            label="Question",
            show_label=False,
            container=False,
            placeholder="Ask about the picture; the buttons above write a question for you",
            lines=1,
            max_lines=8,
            autofocus=True,
            elem_id="question",
        )
        with gr.Row(elem_id="send-row"):
            self.send, self.stop, self.again, self.clear = (
                gr.Button(name, variant=variant, size="md", min_width=110, elem_id=elem_id)
                for name, variant, elem_id in BUTTONS
            )
        with gr.Accordion("Settings", open=False):
            self.settings = [
                gr.Slider(1, 2048, 512, step=1, label="Most new tokens"),
                gr.Slider(0, 2, 0, step=0.05, label="Temperature: 0 takes the likeliest word"),
                gr.Slider(0.05, 1, 1, step=0.05, label="Top-p"),
            ]

    def _connect(self) -> None:
        everything = [*self.talk, *self.shown]
        answers: Any = {"outputs": everything, "concurrency_limit": None, "show_progress": "hidden"}
        at_once: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on(
            [self.question.submit, self.send.click],
            self.ask,
            [self.question, *self.settings],
            api_name="ask",
            **answers,
        )
        self.again.click(self.ask_again, self.settings, api_name="regenerate", **answers)
        self.stop.click(self.stop_answer, queue=False, api_name="stop")
        self.clear.click(self.forget, None, everything, queue=False, api_name="clear")
        self.chat.clear(self.forget, None, everything, **at_once)
        # Without Gradio's own preprocessing, which would decode the picture before our checks.
        self.picture.upload(
            self.show, self.picture, everything, preprocess=False, concurrency_limit=4, api_name="show"
        )
        self.picture.clear(self.put_away, None, everything, **at_once)
        self.gallery.select(self.show_scene, None, everything, **at_once)
        self.picture.select(self.tap, self.angle, [self.picture, self.status], **at_once)
        self.angle.input(
            self.turn, self.angle, [self.picture, self.status], trigger_mode="always_last", **at_once
        )
        self.unbox.click(self.remove_box, None, [self.picture, self.status], **at_once)
        for button in self.tasks:
            button.click(self.fill_in, [button, self.question], [self.question, self.status], **at_once)
        self.blocks.unload(self.leave)

    # -- what the parts do ----------------------------------------------------------------------------------------

    def show(self, upload: dict[str, Any] | None, request: gr.Request) -> Changes:
        """A new picture, and with it a new conversation."""
        if upload is None:
            return self.put_away(request)
        return self._take(Path(upload["path"]), request)

    def show_scene(self, request: gr.Request, chosen: gr.SelectData) -> Changes:
        return self._take(self.scenes[chosen.index][0], request)

    def _take(self, file: Path, request: gr.Request) -> Changes:
        session = self._session(request)
        try:
            session.show(file)
        except ValueError as error:
            return self._talk(session, refusal(error)) | self._shown(session)
        return self._talk(session, "{} × {} pixels".format(*session.size)) | self._shown(session)

    def put_away(self, request: gr.Request) -> Changes:
        session = self._session(request)
        session.clear()
        return self._talk(session) | self._shown(session)

    def forget(self, request: gr.Request) -> Changes:
        """A new conversation about the same picture."""
        session = self._session(request)
        session.forget()
        return self._talk(session) | self._shown(session) | {self.question: ""}

    def ask(
        self, question: str, max_new_tokens: int, temperature: float, top_p: float, request: gr.Request
    ) -> Iterator[Changes]:
        """Answer a question about the picture. The last value is the status: empty, or why there is no answer."""
        session = self._session(request)
        answer = session.ask(
            self.service, question, max_new_tokens=int(max_new_tokens), temperature=temperature, top_p=top_p
        )
        sent = {self.question: ""}
        try:
            for before in answer:
                status = f"waiting, {before} before you" if before else "answering"
                yield self._talk(session, status, arriving=True) | sent
                sent = {}
        except ValueError as error:
            yield self._talk(session, refusal(error))
            return
        except Exception:  # whatever it is, it must not end the server
            log.exception("a question could not be answered")
            yield self._talk(session, "error: the model failed on this question; the server's log says why")
            return
        yield self._talk(session) | self._shown(session)

    def ask_again(
        self, max_new_tokens: int, temperature: float, top_p: float, request: gr.Request
    ) -> Iterator[Changes]:
        """Answer the last question anew."""
        session = self._session(request)
        try:
            question = session.take_back()
        except ValueError as error:
            yield self._talk(session, refusal(error))
            return
        yield from self.ask(question, max_new_tokens, temperature, top_p, request)

    def stop_answer(self, request: gr.Request) -> None:
        """End the answer; what has arrived of it stays."""
        self._session(request).stop()

    def tap(self, angle: float, request: gr.Request, at: gr.SelectData) -> Changes:
        session = self._session(request)
        x, y = at.index
        session.tap(x, y, angle)
        return self._draft(session)

    def turn(self, angle: float, request: gr.Request) -> Changes:
        session = self._session(request)
        session.draft = replace(session.draft, angle=angle)
        return self._draft(session)

    def remove_box(self, request: gr.Request) -> Changes:
        session = self._session(request)
        session.draft = Draft()
        return self._draft(session)

    def fill_in(self, task: str, typed: str, request: gr.Request) -> Changes:
        """Write a task's question into the field, where it can still be changed."""
        session = self._session(request)
        try:
            return {self.question: shortcut(task, typed, session.box()), self.status: ""}
        except ValueError as error:
            return {self.status: refusal(error)}

    def leave(self, request: gr.Request) -> None:
        self.sessions.close(request.session_hash or "")

    # -- what is seen ---------------------------------------------------------------------------------------------

    def _session(self, request: gr.Request) -> Session:
        return self.sessions[request.session_hash or ""]

    def _talk(self, session: Session, status: str = "", arriving: bool = False) -> Changes:
        messages = []  # escaped: Gradio's conversation would take what looks like HTML for HTML
        for exchange in session.exchanges:
            text = readable(exchange.answer, arriving=arriving and exchange is session.exchanges[-1])
            messages.append({"role": "user", "content": html.escape(exchange.question, quote=False)})
            messages.append({"role": "assistant", "content": html.escape(text, quote=False)})
        return {self.chat: messages, self.status: status}

    def _draft(self, session: Session) -> Changes:
        if box := session.box():
            said = f"your box is {box.format()}"
        else:
            said = "tap the opposite corner" if session.draft.corners else ""
        return {self.picture: session.draw(), self.status: said}

    def _shown(self, session: Session) -> Changes:
        """The picture and what can be downloaded; the answer's phrases in the colours of their boxes."""
        png, boxes = session.save_answer()
        return {
            self.picture: session.draw(),
            self.pieces: coloured(session.exchanges[-1].answer) if session.exchanges else [],
            self.png: gr.DownloadButton(value=png, interactive=png is not None),
            self.geojson: gr.DownloadButton(value=boxes, interactive=boxes is not None),
        }


def refusal(error: ValueError) -> str:
    """One line on why something was not done."""
    return "error: " + " ".join(str(error).removeprefix("request 0: ").split())
