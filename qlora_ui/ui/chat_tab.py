"""The Chat tab: talk to a run's model, alone or beside its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gradio as gr

from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.services import Services, Side
from qlora_ui.ui import markup

FIRST_QUESTION = "Who are you?"
BUSY = [gr.update(interactive=False), gr.update(interactive=True)]  # of Send and Stop
READY = [gr.update(interactive=True), gr.update(interactive=False)]
Turn = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ChatTab:
    """The components that other tabs and the timer are wired to."""

    run: gr.Dropdown
    send: gr.Button


@dataclass
class Wish:
    """What one page's person wants of the answer being written; Gradio keeps one for each page."""

    stop: bool = False
    start_over: bool = False


def build(services: Services) -> ChatTab:
    """Components first, in reading order, then the wiring."""
    with gr.Row(equal_height=True, elem_id="chat-head"):
        run = gr.Dropdown([], label="Talk to", info="Any run whose adapter was saved.", elem_id="run-select", scale=4)
        compare = gr.Checkbox(label="Compare with base", elem_id="compare-switch", scale=1, min_width=180)
    with gr.Row(elem_id="chat-columns"):
        tuned = gr.Chatbot(label="Tuned", elem_id="chat-tuned", height=440, buttons=["copy"], placeholder="Ask something below.")
        base = gr.Chatbot(label="Base", elem_id="chat-base", height=440, buttons=["copy"], visible=False)
    note = gr.HTML(elem_id="chat-note")
    with gr.Row(equal_height=True, elem_id="chat-bar"):
        text = gr.Textbox(
            FIRST_QUESTION, label="Message", show_label=False, placeholder="Write a message", container=False, elem_id="chat-input", scale=6
        )
        send = gr.Button("Send", variant="primary", elem_id="chat-send", scale=1, min_width=90)
        stop = gr.Button("Stop", interactive=False, elem_id="chat-stop", scale=1, min_width=90)
        clear = gr.Button("New chat", elem_id="chat-clear", scale=1, min_width=110)
    with gr.Accordion("Sampling", open=False), gr.Row():
        temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0 always takes the likeliest token.")
        top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="Draws from the likeliest tokens of this total share.")
        max_new_tokens = gr.Slider(1, 1024, 200, step=1, label="Max new tokens")
        seed = gr.Number(0, precision=0, label="Seed", info="The same seed draws the same answer.")

    asked = [run, text, compare, tuned, base, temperature, top_p, max_new_tokens, seed]
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    told = [tuned, base, note, text, send, stop]
    wish = gr.State(Wish())
    gr.on([send.click, text.submit], partial(answer, services), [wish, *asked], told, concurrency_limit=1, concurrency_id="chat", **quiet)
    stop.click(ask_to_stop, [wish], None, queue=False, **quiet)
    gr.on([clear.click, run.input], start_over, [wish], [tuned, base, note], queue=False, **quiet)
    compare.change(switch_compare, [compare, tuned, base], [base], **quiet)
    gr.api(partial_named(services), api_name="chat", concurrency_limit=1, concurrency_id="chat")
    return ChatTab(run=run, send=send)


def ask_to_stop(wish: Wish) -> None:
    wish.stop = True


def switch_compare(on: bool, tuned: list[Turn], base: list[Turn]) -> Any:
    """A base that joins late continues from the same conversation, so that the next two answers can be compared."""
    return gr.update(visible=on, value=tuned) if on and len(base) != len(tuned) else gr.update(visible=on)


def start_over(wish: Wish) -> list[Any]:
    """Empty both columns; an answer that is being written ends, and empties them once more."""
    wish.stop = wish.start_over = True
    return [[], [], ""]


def answer(
    services: Services,
    wish: Wish,
    run_id: str | None,
    text: str,
    compare: bool,
    tuned: list[Turn],
    base: list[Turn],
    temperature: float,
    top_p: float,
    max_new_tokens: float,
    seed: float | None,
) -> Iterator[list[Any]]:
    """Stream the answer, or both answers, of one turn. A page that goes away closes this generator and with it the answer."""
    wish.stop = wish.start_over = False
    if not text.strip() or not run_id:
        why = (
            "There is no run to talk to yet. Train one first, on the Train tab."
            if not run_id
            else "The message is empty. Write a question."
        )
        yield [gr.skip(), gr.skip(), markup.error(why), gr.skip(), *READY]
        return
    question = {"role": "user", "content": text.strip()}
    histories = [[*tuned, question], [*base, question]] if compare else [[*tuned, question]]
    whos: tuple[Literal["adapter", "base"], ...] = ("adapter", "base")
    sides: list[Side] = [(who, messages(history)) for who, history in zip(whos, histories, strict=False)]
    yield [*columns(histories), markup.note("Getting the model ready…"), "", *BUSY]
    try:
        from qlora_ui.engine import chat

        drawn = chat.Sampling(temperature=temperature, top_p=top_p, max_new_tokens=int(max_new_tokens), seed=int(seed or 0))
        for answers in services.chat.reply(services.workspace.get(run_id), sides, drawn):
            spoken = [[*h, {"role": "assistant", "content": said}] for h, said in zip(histories, answers.texts, strict=True)]
            speed = answers.tokens / max(answers.seconds, 1e-6)
            yield [*columns(spoken), markup.note(f"{answers.tokens} tokens · {speed:.1f} tokens/s · seed {drawn.seed}"), gr.skip(), *BUSY]
            if wish.stop:
                break
    except UserError as error:
        yield [tuned, base, markup.error(str(error)), text, *READY]
    except Exception as error:  # shown in the answer's place; the next answer works
        yield [tuned, base, markup.error(f"The answer broke off: {error}. Send again, or choose another run."), text, *READY]
        raise
    else:
        yield [[], [], "", gr.skip(), *READY] if wish.start_over else [gr.skip(), gr.skip(), gr.skip(), gr.skip(), *READY]


def columns(histories: Sequence[list[Turn]]) -> list[Any]:
    """Both chat columns; without comparison the base's stays as it is."""
    return [histories[0], histories[1] if len(histories) > 1 else gr.skip()]


def messages(history: Sequence[Turn]) -> list[Message]:
    """Gradio's turns, whose content may be a list of parts, as messages."""
    return [Message(role=turn["role"], content=plain(turn["content"])) for turn in history]


def plain(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def partial_named(services: Services) -> Any:
    """The scripting endpoint /chat; Gradio reads its name and types from the function."""

    def chat(run: str, prompt: str, base: bool = False, temperature: float = 0.0, max_new_tokens: int = 200, seed: int = 0) -> str:
        from qlora_ui.engine import chat

        who: Literal["adapter", "base"] = "base" if base else "adapter"
        said = ""
        try:
            drawn = chat.Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
            for answers in services.chat.reply(services.workspace.get(run), [(who, [Message(role="user", content=prompt)])], drawn):
                said = answers.texts[0]
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return said

    return chat
