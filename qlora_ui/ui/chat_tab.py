"""The Chat tab: talk to a run's model, alone or beside its base."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from qlora_ui import speakers
from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.talking import Side
from qlora_ui.ui import markup

if TYPE_CHECKING:
    from qlora_ui.engine.decoding import Answers

FIRST_QUESTION = "Who are you?"
BUSY = [gr.update(interactive=False), gr.update(interactive=True)]  # of Send and Stop
READY = [gr.update(interactive=True), gr.update(interactive=False)]
PRESS = "() => setTimeout(() => document.querySelector('#chat-file').click(), 100)"
Turn = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ChatTab:
    """The components that other tabs and the timer are wired to."""

    run: gr.Dropdown
    send: gr.Button
    tuned: gr.Chatbot
    base: gr.Chatbot


@dataclass
class Wish:
    """What one page's person wants of the answer being written; Gradio keeps one for each page."""

    stop: bool = False
    start_over: bool = False


def build(services: Services, kept: gr.BrowserState) -> ChatTab:
    """Components first, in reading order, then the wiring. `kept` is what the browser keeps of the conversation."""
    with gr.Row(equal_height=True, elem_id="chat-head"):
        run = gr.Dropdown([], label="Talk to", info="Any run whose adapter was saved.", elem_id="run-select", scale=4)
        compare = gr.Checkbox(label="Compare with base", elem_id="compare-switch", scale=1, min_width=180)
    column: dict[str, Any] = {"height": 440, "buttons": ["copy"], "editable": "user"}
    with gr.Row(elem_id="chat-columns"):
        tuned = gr.Chatbot(label="Tuned", elem_id="chat-tuned", placeholder="Ask something below.", **column)
        base = gr.Chatbot(label="Base", elem_id="chat-base", visible=False, height=440, buttons=["copy"])
    note = gr.HTML(elem_id="chat-note")
    with gr.Row(equal_height=True, elem_id="chat-bar"):
        text = gr.Textbox(
            FIRST_QUESTION, label="Message", show_label=False, placeholder="Write a message", container=False, elem_id="chat-input", scale=6
        )
        send = gr.Button("Send", variant="primary", elem_id="chat-send", scale=1, min_width=90)
        stop = gr.Button("Stop", interactive=False, elem_id="chat-stop", scale=1, min_width=90)
        clear = gr.Button("New chat", elem_id="chat-clear", scale=1, min_width=110)
    with gr.Accordion("System prompt and sampling", open=False, elem_id="chat-settings"):
        system = gr.Textbox(
            label="System prompt", info="Said before the conversation. Empty: nothing is added.", lines=2, elem_id="chat-system"
        )
        with gr.Row():
            temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0 always takes the likeliest token.")
            top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="Draws from the likeliest tokens of this total share.")
            top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="Draws from so many of the likeliest tokens; 0 from all.")
        with gr.Row():
            penalty = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty", info="Makes tokens that were said less likely; 1 does not.")
            max_new_tokens = gr.Slider(1, 1024, 200, step=1, label="Max new tokens")
            seed = gr.Number(0, precision=0, label="Seed", info="The same seed draws the same answer.", elem_id="chat-seed")
    with gr.Row(elem_id="chat-files"):
        as_text = gr.Button("Save chat as Markdown", size="sm", elem_id="chat-markdown")
        as_json = gr.Button("Save chat as JSON", size="sm", elem_id="chat-json")
        file = gr.DownloadButton("Chat", visible="hidden", elem_id="chat-file")

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "chat", **quiet}
    wish = gr.State(Wish())
    asked = [wish, run, text, compare, tuned, base, system, temperature, top_p, top_k, penalty, max_new_tokens, seed]
    told = [tuned, base, note, text, send, stop]

    def edited(change: gr.EditData, *values: Any) -> Iterator[list[Any]]:
        yield from ask_instead(services, change, *values)

    keep: dict[str, Any] = {"fn": kept_chat, "inputs": [run, tuned, base], "outputs": [kept], "queue": False, **quiet}
    gr.on([send.click, text.submit], partial(answer, services), asked, told, **one_at_a_time).then(**keep)
    tuned.retry(partial(retry, services), asked, [*told, seed], **one_at_a_time).then(**keep)
    tuned.edit(edited, asked, told, **one_at_a_time).then(**keep)
    tuned.undo(undo, [tuned, base], [tuned, base, text], **quiet).then(**keep)
    stop.click(ask_to_stop, [wish], None, queue=False, **quiet)
    gr.on([clear.click, run.input], start_over, [wish], [tuned, base, note], queue=False, **quiet).then(**keep)
    compare.change(switch_compare, [compare, tuned, base], [base], **quiet)
    for button, form in ((as_text, "md"), (as_json, "json")):
        button.click(partial(saved, form), [run, tuned, base, compare], [file], **quiet).then(None, None, None, js=PRESS)
    gr.api(partial_named(services), api_name="chat", concurrency_limit=1, concurrency_id="chat")
    return ChatTab(run=run, send=send, tuned=tuned, base=base)


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
    services: Services, wish: Wish, run_id: str | None, text: str, compare: bool, tuned: list[Turn], base: list[Turn], *settings: Any
) -> Iterator[list[Any]]:
    """Stream the answer, or both answers, of one turn. A page that goes away closes this generator and with it the answer."""
    yield from respond(services, wish, run_id, text, compare, tuned, base, settings, ("", text))


def retry(
    services: Services, wish: Wish, run_id: str | None, text: str, compare: bool, tuned: list[Turn], base: list[Turn], *settings: Any
) -> Iterator[list[Any]]:
    """Ask the last question again, with the next seed, which the field then shows."""
    question, before = last_question(tuned)
    *others, seed = settings
    seed = int(seed or 0) + 1
    for shown in respond(services, wish, run_id, question, compare, before, base[: len(before)], (*others, seed)):
        yield [*shown, seed]


def ask_instead(
    services: Services,
    change: gr.EditData,
    wish: Wish,
    run_id: str | None,
    text: str,
    compare: bool,
    tuned: list[Turn],
    base: list[Turn],
    *settings: Any,
) -> Iterator[list[Any]]:
    """A question was changed: what was said before it stays, and it is asked instead."""
    at = change.index if isinstance(change.index, int) else change.index[0]
    return respond(services, wish, run_id, plain(change.value), compare, tuned[:at], base[:at], settings)


def undo(tuned: list[Turn], base: list[Turn]) -> list[Any]:
    """Take back the last question and its answer; the question can be changed and sent again."""
    question, before = last_question(tuned)
    return [before, base[: len(before)], question]


def last_question(history: Sequence[Turn]) -> tuple[str, list[Turn]]:
    """The last thing that was asked, and the conversation before it."""
    at = max(number for number, turn in enumerate(history) if turn["role"] == "user")
    return plain(history[at]["content"]), list(history[:at])


def respond(
    services: Services,
    wish: Wish,
    run_id: str | None,
    text: str,
    compare: bool,
    tuned: list[Turn],
    base: list[Turn],
    settings: Sequence[Any],
    typed: tuple[Any, Any] | None = None,
) -> Iterator[list[Any]]:
    """The columns, the note, the text field and the buttons while a question is answered.

    `settings` are the system prompt and those of the sampling, as they stand on the page. `typed` is what the text field holds
    meanwhile and after a failure; without it the field is left alone.
    """
    during, after_failure = typed or (gr.skip(), gr.skip())
    system, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed = settings
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
    said_first = (
        [Message(role="system", content=system.strip())] if system and system.strip() else []
    )  # Gradio gives None for an untouched one
    yield [*columns(histories), markup.note("Getting the model ready…"), during, *BUSY]
    try:
        from qlora_ui.engine import decoding

        speaker = speakers.find(services.workspace, run_id)
        asked = zip((speaker, speaker.base), histories, strict=False)
        sides: list[Side] = [(who, [*said_first, *messages(history)]) for who, history in asked]
        drawn = decoding.Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=int(top_k),
            repetition_penalty=repetition_penalty,
            max_new_tokens=int(max_new_tokens),
            seed=int(seed or 0),
        )
        for answers in services.chat.reply(sides, drawn):
            spoken = [[*h, {"role": "assistant", "content": said}] for h, said in zip(histories, answers.texts, strict=True)]
            said = " · ".join(filter(None, [figures(answers, drawn.seed) if answers.tokens else "", answers.note]))
            yield [*columns(spoken if answers.tokens else histories), markup.note(said), gr.skip(), *BUSY]
            if wish.stop:
                break
    except UserError as error:
        yield [tuned, base, markup.error(str(error)), after_failure, *READY]
    except Exception as error:  # shown in the answer's place; the next answer works
        yield [tuned, base, markup.error(f"The answer broke off: {error}. Send again, or choose another run."), after_failure, *READY]
        raise
    else:
        yield [[], [], "", gr.skip(), *READY] if wish.start_over else [gr.skip(), gr.skip(), gr.skip(), gr.skip(), *READY]


def figures(answers: Answers, seed: int) -> str:
    """What an answer took, and what no longer fitted, in one line."""
    speed = answers.tokens / max(answers.seconds, 1e-6)
    known = answers.context_limit < 1 << 30
    context = f"context {answers.context + answers.tokens:,}" + (f" of {answers.context_limit:,}" if known else "")
    parts = [f"{answers.tokens} tokens", f"{speed:.1f} tokens/s", f"seed {seed}", context]
    if answers.left_out:
        parts.append(f"the oldest {answers.left_out} turns no longer fit and were left out")
    return " · ".join(parts)


# What stays of a conversation ---------------------------------------------------------------------------------------------


def kept_chat(run_id: str | None, tuned: list[Turn], base: list[Turn]) -> dict[str, Any]:
    """What the person's browser keeps, so that a reload loses nothing."""
    return {"run": run_id, "tuned": spoken(tuned), "base": spoken(base)}


def restored(services: Services, kept: dict[str, Any] | None) -> list[Any]:
    """The conversation that this browser kept, while its run is still there."""
    run = services.find(str(kept.get("run", ""))) if kept else None
    if not kept or run is None or not run.adapter.is_dir():
        return [gr.skip(), gr.skip(), gr.skip()]
    return [gr.update(choices=[run.id], value=run.id), kept.get("tuned") or [], kept.get("base") or []]


def spoken(history: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": plain(turn["content"])} for turn in history]


def saved(form: str, run_id: str | None, tuned: list[Turn], base: list[Turn], compare: bool) -> Any:
    """The conversation as a file for the hidden button."""
    columns = {"tuned": spoken(tuned)} | ({"base": spoken(base)} if compare else {})
    path = Path(tempfile.mkdtemp(prefix="chat-")) / f"chat-{run_id or 'empty'}.{form}"
    path.write_text(
        json.dumps({"run": run_id, **columns}, indent=2, ensure_ascii=False) if form == "json" else as_markdown(columns), "utf-8"
    )
    return gr.update(value=str(path))


def as_markdown(columns: dict[str, list[dict[str, str]]]) -> str:
    return "\n\n".join(
        f"# {name.capitalize()}\n\n" + "\n\n".join(f"**{turn['role'].capitalize()}**\n\n{turn['content']}" for turn in turns)
        for name, turns in columns.items()
    )


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
        from qlora_ui.engine import decoding

        said = ""
        try:
            drawn = decoding.Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
            speaker = speakers.find(services.workspace, run)
            asked = [(speaker.base if base else speaker, [Message(role="user", content=prompt)])]
            for answers in services.chat.reply(asked, drawn):
                said = answers.texts[0]
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return said

    return chat
