"""A conversation on a page: its columns, the field to write in, how answers are drawn. Knows nothing of who is talked to or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from qlora_ui.services import Services
from qlora_ui.ui import chat_turns, faster_switch
from qlora_ui.ui.chat_turns import Wish
from qlora_ui.ui.examples import EXAMPLES

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The components of a conversation. `settings` are the system prompt and those of the sampling, the seed last."""

    wish: gr.State
    tuned: gr.Chatbot
    base: gr.Chatbot
    note: gr.HTML
    text: gr.Textbox
    send: gr.Button
    stop: gr.Button
    clear: gr.Button
    settings: list[Any]
    faster: gr.Checkbox


def build(label: str) -> Panel:
    """The conversation on the left, the settings on the right, or below it where there is no room."""
    column: dict[str, Any] = {"height": 480, "buttons": ["copy"], "layout": "bubble"}
    examples: Any = [{"text": question, "display_text": f"{kind}: {question}"} for kind, question in EXAMPLES.items()]
    with gr.Row(elem_id="chat-panel"):
        with gr.Column(scale=3, min_width=320):
            with gr.Row(elem_id="chat-columns"):
                tuned = gr.Chatbot(
                    label=label,
                    elem_id="chat-tuned",
                    editable="user",
                    placeholder="Ask something, as one of these:",
                    examples=examples,
                    **column,
                )
                base = gr.Chatbot(label="Base", elem_id="chat-base", visible=False, **column)
            note = gr.HTML(elem_id="chat-note")
            with gr.Row(equal_height=True, elem_id="chat-bar"):
                text = gr.Textbox(
                    label="Message", show_label=False, placeholder="Write a message", container=False, elem_id="chat-input", scale=6
                )
                send = gr.Button("Send", variant="primary", elem_id="chat-send", scale=1, min_width=90)
                stop = gr.Button("Stop", interactive=False, elem_id="chat-stop", scale=1, min_width=90)
                clear = gr.Button("New chat", elem_id="chat-clear", scale=1, min_width=130)
        with (
            gr.Column(scale=1, min_width=260, elem_id="chat-side"),
            gr.Accordion("System prompt and sampling", open=True, elem_id="chat-settings"),
        ):
            settings = build_settings()
            faster = faster_switch.build()
    wish = gr.State(Wish())
    return Panel(
        wish=wish, tuned=tuned, base=base, note=note, text=text, send=send, stop=stop, clear=clear, settings=settings, faster=faster
    )


def build_settings(of: str = "chat") -> list[Any]:
    """How answers are drawn, in the order in which `chat_turns.respond` takes it; `of` begins what the page calls the fields."""
    return [
        gr.Textbox(label="System prompt", placeholder="Nothing is added", lines=2, elem_id=f"{of}-system"),
        gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0: the likeliest token"),
        gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="Share drawn from"),
        gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: from all tokens"),
        gr.Slider(1, 2, 1, step=0.05, label="Repetition", info="1: no penalty"),
        gr.Slider(1, 1024, 200, step=1, label="Max new tokens", elem_id=f"{of}-max-new-tokens"),
        gr.Number(0, precision=0, label="Seed", info="The same draws the same answer", elem_id=f"{of}-seed"),
    ]


def wire(services: Services, panel: Panel, speaker: Any, compare: Any, then: Callable[[Any], None]) -> None:
    """Ask, retry, change, take back and stop, of the speaker whose id that component holds. `then` is told of all that ends a turn."""
    # All at once: who waits for whom is the chat's own line, which tells each page its place, and which all other doors share.
    # `multiple`, as an answer's last word says that one may ask again a moment before Gradio knows that it was the last.
    at_once: dict[str, Any] = {"concurrency_limit": None, "trigger_mode": "multiple", **QUIET}
    asked = [panel.wish, speaker, panel.text, compare, panel.tuned, panel.base, *panel.settings]
    told = [panel.tuned, panel.base, panel.note, panel.text, panel.send, panel.stop]

    def edited(change: gr.EditData, *values: Any) -> Iterator[list[Any]]:
        yield from chat_turns.ask_instead(services, change, *values)

    def example(chosen: gr.SelectData, wish: Wish, speaker_id: str | None, text: str, *values: Any) -> Iterator[list[Any]]:
        for shown in chat_turns.answer(services, wish, speaker_id, chosen.value["text"], *values):
            yield [*shown[:3], gr.skip(), *shown[4:]]

    send = gr.on([panel.send.click, panel.text.submit], partial(chat_turns.answer, services), asked, told, **at_once)
    then(send)
    then(panel.tuned.example_select(example, asked, told, **at_once))
    then(panel.tuned.retry(partial(chat_turns.retry, services), asked, [*told, panel.settings[-1]], **at_once))
    then(panel.tuned.edit(edited, asked, told, **at_once))
    then(panel.tuned.undo(chat_turns.undo, [panel.tuned, panel.base], [panel.tuned, panel.base, panel.text, panel.note], **QUIET))
    faster_switch.wire(services, panel.faster, speaker.change, send.then, speaker=speaker, **QUIET)
    panel.stop.click(chat_turns.ask_to_stop, [panel.wish], None, queue=False, **QUIET)
