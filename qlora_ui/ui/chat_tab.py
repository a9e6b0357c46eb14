"""The Chat tab: talk to anybody on this machine, alone or beside the base, in conversations that the browser keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from qlora_ui import speakers
from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.ui import bring, chat_panel, chat_turns, conversations, downloads, markup
from qlora_ui.ui.chat_panel import QUIET, Panel
from qlora_ui.ui.chat_turns import Wish
from qlora_ui.ui.conversations import NEW, Kept, Turn

LEFT = "The page was left before this question was answered. Send it again, or change it."
UNCHANGED = [gr.skip()] * 8
"""Of what shows a conversation."""
PRESS = "() => setTimeout(() => document.querySelector('#chat-file').click(), 100)"


@dataclass(frozen=True, kw_only=True)
class ChatTab:
    """The components that other tabs and the timer are wired to. `current` holds the id of the conversation on the page.

    Not gr.State, which another answer of the server may have changed since the page asked: Gradio 6.31 tells of one choice twice, and
    the words of the conversation before would be kept as those of the chosen one.
    """

    speaker: gr.Dropdown
    conversation: gr.Dropdown
    current: gr.Textbox
    kept: gr.BrowserState
    panel: Panel

    @property
    def open(self) -> list[Any]:
        """What says what is on the page: the inputs of those who open another conversation."""
        return [self.panel.wish, self.kept, self.current, self.panel.tuned, self.panel.base]

    @property
    def opened(self) -> list[Any]:
        """What shows a conversation: their outputs."""
        panel = self.panel
        return [self.speaker, panel.tuned, panel.base, panel.note, panel.text, self.kept, self.current, self.conversation]


def build(services: Services, kept: gr.BrowserState) -> ChatTab:
    """Components first, in reading order, then the wiring. `kept` is what the browser keeps of the conversations."""
    with gr.Row(equal_height=True, elem_id="chat-head"):
        whom, kept_where = "A run, a checkpoint, an adapter or a base.", f"This browser keeps the newest {conversations.MOST}."
        speaker = gr.Dropdown([], label="Talk to", info=whom, elem_id="run-select", scale=4, min_width=240)
        conversation = gr.Dropdown(
            conversations.choices({}), value=NEW, label="Conversation", info=kept_where, elem_id="chat-kept", scale=3, min_width=200
        )
        delete = gr.Button("Delete", size="sm", elem_id="chat-delete", scale=0, min_width=80)
        compare = gr.Checkbox(label="Compare with base", elem_id="compare-switch", scale=1, min_width=190)
    about = gr.HTML(elem_id="chat-about")
    panel = chat_panel.build("Tuned")
    with gr.Row(elem_id="chat-files"):
        as_text = gr.Button("Save chat as Markdown", size="sm", elem_id="chat-markdown")
        as_json = gr.Button("Save chat as JSON", size="sm", elem_id="chat-json")
        file = gr.DownloadButton("Chat", visible="hidden", elem_id="chat-file")
    brought = bring.build(services)
    current = gr.Textbox(NEW, visible="hidden", label="Conversation on the page")
    tab = ChatTab(speaker=speaker, conversation=conversation, current=current, kept=kept, panel=panel)

    keep: dict[str, Any] = {"fn": kept_now, "inputs": [speaker, *tab.open], "outputs": [kept, tab.current, conversation], "queue": False}
    asked = {**keep, "fn": kept_asking, "inputs": [panel.text, speaker, *tab.open]}
    gr.on([panel.send.click, panel.text.submit], **asked, trigger_mode="multiple", **QUIET)  # Gradio waits for it before the answer begins
    chat_panel.wire(services, panel, speaker, compare, then=lambda ended: ended.then(**keep, trigger_mode="always_last", **QUIET))
    new: dict[str, Any] = {"inputs": [speaker, *tab.open], "outputs": tab.opened, "queue": False, "trigger_mode": "multiple", **QUIET}
    gr.on([panel.clear.click, speaker.input], partial(begin, services), **new)
    conversation.input(partial(choose, services), **{**new, "inputs": [conversation, *tab.open]})
    delete.click(partial(forget, services), **new)
    speaker.change(partial(describe, services), [speaker], [about], queue=False, trigger_mode="multiple", **QUIET)
    brought.change(partial(begin, services), **{**new, "inputs": [brought, *tab.open]})
    compare.change(switch_compare, [compare, panel.wish, panel.tuned, panel.base], [panel.base], **QUIET)
    for button, form in ((as_text, "md"), (as_json, "json")):
        button.click(partial(saved, form), [speaker, panel.tuned, panel.base, compare], [file], **QUIET).then(None, None, None, js=PRESS)
    gr.api(scripted(services), api_name="chat", concurrency_limit=8)  # each holds one of the page's threads while it waits
    return tab


# Who is talked to ---------------------------------------------------------------------------------------------------------


def choices(services: Services, talking_to: str | None) -> Any:
    """All that can be talked to; the choice that was made stays while it is there."""
    found = [(speaker.name, speaker.id) for speaker in speakers.all_of(services.workspace)]
    try:
        chosen = speakers.find(services.workspace, talking_to or "")
    except UserError:
        return gr.update(choices=found, value=found[0][1] if found else None)
    others = [] if chosen.id in dict(found).values() else [(chosen.name, chosen.id)]
    return gr.update(choices=[*others, *found], value=chosen.id)


def describe(services: Services, speaker_id: str | None) -> str:
    """The line under the choice."""
    try:
        return markup.note(speakers.find(services.workspace, speaker_id).about) if speaker_id else ""
    except UserError as error:
        return markup.error(str(error))


# Which conversation is open -----------------------------------------------------------------------------------------------


def kept_now(speaker_id: str | None, wish: Wish, kept: Kept, current: str, tuned: list[Turn], base: list[Turn]) -> list[Any]:
    """What the browser keeps, the conversation on the page included, and the list of it."""
    if is_superseded(wish, current):
        return [gr.skip()] * 3
    with_whom = conversations.find(kept, current)["speaker"] or wish.speaker or speaker_id or ""
    kept = conversations.keep(kept, current, with_whom, tuned, base)
    current = gr.skip() if current else kept["open"]  # another may have been opened meanwhile
    return [kept, current, gr.update(choices=conversations.choices(kept), value=kept["open"])]


def kept_asking(text: str, speaker_id: str | None, wish: Wish, kept: Kept, current: str, tuned: list[Turn], base: list[Turn]) -> list[Any]:
    """As `kept_now`, with the question that is being asked, so that whoever leaves the page before its answer finds it again."""
    if not text.strip() or not speaker_id or not wish.is_answered:
        return [gr.skip()] * 3
    wish.speaker = speaker_id
    return kept_now(speaker_id, wish, kept, current, [*tuned, {"role": "user", "content": text.strip()}], base)


def is_superseded(wish: Wish, current: str) -> bool:
    """Whether another conversation was opened that the page does not show yet: the one on it has been kept, and may be a mixture now."""
    return wish.conversation not in (NEW, current)


def begin(
    services: Services, speaker_id: str | None, wish: Wish, kept: Kept, current: str, tuned: list[Turn], base: list[Turn]
) -> list[Any]:
    """A new conversation with that speaker; the one on the page is kept as far as it got."""
    if is_superseded(wish, current):
        return UNCHANGED
    kept, *_ = kept_now(speaker_id, wish, kept, current, tuned, base)
    return show(services, {**conversations.find(kept, NEW), "speaker": speaker_id}, wish, kept)


def begin_with(services: Services, speaker_id: str, *page: Any) -> list[Any]:
    """As `begin`, unless the conversation on the page is with that speaker already."""
    _, kept, current, *_ = page
    if conversations.find(kept, current)["speaker"] == speaker_id:
        return UNCHANGED
    return begin(services, speaker_id, *page)


def choose(services: Services, wanted: str, wish: Wish, kept: Kept, current: str, tuned: list[Turn], base: list[Turn]) -> list[Any]:
    """Another conversation of the list, with whom it was; the one on the page is kept as far as it got.

    Gradio 6.31 tells of one choice twice, and of the one that is open when a person leaves the list without choosing.
    """
    if is_superseded(wish, current) or wanted == conversations.find(kept, current)["id"]:
        return UNCHANGED
    kept, *_ = kept_now(None, wish, kept, current, tuned, base)
    return show(services, conversations.find(kept, wanted), wish, kept)


def forget(
    services: Services, speaker_id: str | None, wish: Wish, kept: Kept, current: str, tuned: list[Turn], base: list[Turn]
) -> list[Any]:
    """Delete the conversation on the page."""
    return show(services, {**conversations.find({}, NEW), "speaker": speaker_id}, wish, conversations.without(kept, current))


def show(services: Services, conversation: dict[str, Any], wish: Wish, kept: Kept) -> list[Any]:
    """A conversation in place of the one on the page, whose answer ends. A question without an answer can be sent again."""
    tuned, question = conversations.unanswered(conversation["tuned"])
    base, _ = conversations.unanswered(conversation["base"])
    chat_turns.show_instead(wish, tuned, base)
    kept = {**kept, "open": conversation["id"]}
    chosen = gr.update(choices=conversations.choices(kept), value=conversation["id"])
    who, note = choices(services, conversation["speaker"]), markup.note(LEFT) if question else ""
    if conversation["tuned"] and who["value"] != conversation["speaker"]:
        note = markup.error(f"{conversation['speaker']}, with whom this conversation was, is not here any more.")
    wish.conversation = current = conversation["id"] or conversations.new_id()  # from its beginning: kept twice it is kept once
    return [who, tuned, base, note, question or gr.skip(), kept, current, chosen]


def open_speaker(kept: Kept | None) -> str:
    """With whom the conversation is that was open in this browser; empty for a new one."""
    return str(conversations.find(kept or {}, (kept or {}).get("open", NEW))["speaker"])


def restored(services: Services, kept: Kept) -> list[Any]:
    """The conversation that was open in this browser."""
    return show(services, conversations.find(kept, (kept or {}).get("open", NEW)), Wish(), kept or {})


def switch_compare(on: bool, wish: Wish, tuned: list[Turn], base: list[Turn]) -> Any:
    """A base that joins late continues from the same conversation, so that the next two answers can be compared.

    While an answer is being written it is left alone: the next question takes care of it.
    """
    joins = on and wish.is_answered and chat_turns.questions(base) != chat_turns.questions(tuned)
    return gr.update(visible=on, value=tuned) if joins else gr.update(visible=on)


def saved(form: str, speaker_id: str | None, tuned: list[Turn], base: list[Turn], compare: bool) -> Any:
    """The conversation as a file for the hidden button."""
    columns = {"tuned": conversations.spoken(tuned)} | ({"base": conversations.spoken(base)} if compare else {})
    write = conversations.as_json if form == "json" else conversations.as_markdown
    path = downloads.fresh(f"chat.{form}")
    path.write_text(write(speaker_id or "", columns), "utf-8")
    return gr.update(value=str(path))


def scripted(services: Services) -> Any:
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
