"""The header and the run bar, on every tab: which device, which run, how far, how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.ui import markup

DISMISS = """
const key = 'qlora-ui-welcome-dismissed';
const welcome = element.querySelector('.welcome');
if (localStorage.getItem(key)) welcome.hidden = true;
element.querySelector('button').addEventListener('click', () => { localStorage.setItem(key, '1'); welcome.hidden = true; });
"""
WELCOME = (
    '<div class="welcome" hidden><span>New here? Three clicks make a first success: <b>Use this data</b>, <b>Start training</b>, '
    "and when it has ended, <b>Send</b>. Everything is filled in.</span>"
    '<button type="button" aria-label="Dismiss this hint for good">Got it</button></div>'
).replace(" hidden>", ">", 1)


@dataclass(frozen=True, kw_only=True)
class RunBar:
    """The components that the timer and the tabs are wired to."""

    chip: gr.HTML
    status: gr.HTML
    progress: gr.HTML
    stop: gr.Button
    chat: gr.Button
    message: gr.HTML


def build() -> RunBar:
    """Title and device above, the run under it."""
    with gr.Row(elem_id="header"):
        gr.HTML("<h1>QLoRA UI</h1><p>Fine-tune a language model in 4 bits, watch it learn, talk to it, take it away.</p>", elem_id="title")
        chip = gr.HTML(device_chip(None), elem_id="device-chip")
    gr.HTML(WELCOME, js_on_load=DISMISS, elem_id="welcome")
    with gr.Row(elem_id="run-bar", equal_height=True):
        with gr.Column(scale=6, min_width=200):
            status = gr.HTML(markup.status(None), elem_id="status-line")
            progress = gr.HTML(markup.bar(None), elem_id="progress")
        stop = gr.Button("Stop and keep", interactive=False, elem_id="stop-button", scale=0, min_width=120, size="sm")
        chat = gr.Button("Chat with it", interactive=False, elem_id="chat-with-button", scale=0, min_width=120, size="sm")
    message = gr.HTML(elem_id="run-message")
    return RunBar(chip=chip, status=status, progress=progress, stop=stop, chat=chat, message=message)


def device_chip(hardware: Any) -> str:
    """What computes, in one line; a click says why this dtype."""
    if hardware is None:
        return '<span class="chip">Looking at the device…</span>'
    return (
        f'<details class="chip"><summary>{escape(hardware.chip())}</summary>'
        f"<p>Computes in {escape(hardware.compute_dtype)}: {escape(hardware.reason)}.</p></details>"
    )


def stop(services: Services) -> str:
    """Ask the run on the bar to stop; it answers in the status line."""
    run = services.workspace.newest()
    try:
        if run is None:
            raise UserError("There is no run to stop.")
        run.ask("stop")
    except UserError as error:
        return markup.error(str(error))
    return ""
