"""A page with nothing but a conversation with one model, for a Space. Knows nothing of runs, training or what else is here."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui import adapters, licences, speakers
from qlora_ui.runs import RUN_ID, Workspace
from qlora_ui.services import Services
from qlora_ui.speakers import Speaker
from qlora_ui.ui import chat_panel
from qlora_ui.ui.chat_panel import QUIET
from qlora_ui.ui.chat_turns import Wish, show_instead

LIMITS = (
    "It is a language model: what it says can be wrong, outdated, biased or harmful, however sure it sounds. Check what matters, and "
    "enter nothing private.",
    "It remembers this conversation only, and only as much of it as it can read at once.",
)


def speaker_of(wish: str, workspace: Workspace) -> Speaker:
    """Whom the owner of this machine names: a run, a checkpoint, or an adapter, fetched where it is not here. Raises UserError."""
    if RUN_ID.fullmatch(wish.partition("/")[0]) or wish.startswith((speakers.BASE_OF, speakers.ADAPTER, speakers.MODEL)):
        return speakers.find(workspace, wish)
    return adapters.named(wish, workspace, lambda event: None, lambda: False)


def build(services: Services, speaker: Speaker) -> gr.Blocks:
    """The page of that speaker."""
    with gr.Blocks(title=f"Chat with {shown(speaker.title)}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(heading(speaker, services.workspace.models), elem_id="demo-heading")
        panel = chat_panel.build(shown(speaker.title))
        gr.HTML(limits(), elem_id="demo-limits")
        chat_panel.wire(replace(services, is_public=True), panel, gr.State(speaker.id), gr.State(False), then=lambda ended: None)
        panel.clear.click(start_over, [panel.wish], [panel.tuned, panel.base, panel.note], queue=False, **QUIET)
    return page


def start_over(wish: Wish) -> list[Any]:
    """An empty conversation; an answer that is being written ends."""
    show_instead(wish, [], [])
    return [[], [], ""]


def heading(speaker: Speaker, models: Path) -> str:
    """What the model is, and under which licences."""
    base, base_licence = shown(speaker.model), licences.of_model(speaker.model, models)
    facts = {"Base model": f"{base}, {licence(base_licence)}"}
    if speaker.adapter:
        facts["Adapter"] = f"{shown(speaker.title)}, {licence(licences.of_folder(speaker.adapter))}"
    facts["Stored in"] = speaker.stored
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    what = f"{base}, fine-tuned with QLoRA." if speaker.adapter else f"{base}, as it was published."
    return f'<h1>Chat with {escape(shown(speaker.title))}</h1><p>{escape(what)}</p><dl class="demo-facts">{rows}</dl>'


def licence(name: str) -> str:
    return f"licence {name}" if name else "licence unknown: its card names none"


def limits() -> str:
    """What it must not be taken for."""
    return "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in LIMITS)


def shown(name: str) -> str:
    """A name without the folders of this machine."""
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name
