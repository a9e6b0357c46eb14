"""The header and the run bar, on every tab: which device, which run, how far, how it ended, and the buttons that end it or go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from qlora_ui.errors import UserError
from qlora_ui.exports import has_weights
from qlora_ui.progress import Progress
from qlora_ui.runs import Run
from qlora_ui.services import Services
from qlora_ui.ui import markup

DISMISS = """
const key = 'qlora-ui-welcome-dismissed';
const welcome = element.querySelector('.welcome');
if (localStorage.getItem(key)) welcome.hidden = true;
element.querySelector('button').addEventListener('click', () => { localStorage.setItem(key, '1'); welcome.hidden = true; });
"""
FOCUS = "() => setTimeout(() => document.querySelector('#discard-cancel')?.focus(), 50)"
NO_QUESTION = [gr.update(visible=False), "", ""]
OFF, GONE = gr.update(interactive=False), gr.update(visible=False)
NO_RUN = [gr.update(visible=True, interactive=False), GONE, OFF, OFF, OFF, OFF, GONE, "", ""]
WELCOME = (
    '<div class="welcome" hidden><span>New here? Three clicks make a first success: <b>Use this data</b>, <b>Start training</b>, '
    "and when it has ended, <b>Send</b>. Everything is filled in.</span>"
    '<button type="button" aria-label="Dismiss this hint for good">Got it</button></div>'
).replace(" hidden>", ">", 1)


@dataclass(frozen=True, kw_only=True)
class RunBar:
    """The components that the timer and the tabs are wired to. `run` and `state` are what this page shows, as text in the page."""

    chip: gr.HTML
    status: gr.HTML
    progress: gr.HTML
    pause: gr.Button
    resume: gr.Button
    stop: gr.Button
    discard: gr.Button
    chat: gr.Button
    export: gr.Button
    restart: gr.Button
    message: gr.HTML
    run: gr.Textbox
    state: gr.Textbox
    asked: gr.Row
    question: gr.HTML
    doomed: gr.Textbox
    confirm: gr.Button
    cancel: gr.Button

    @property
    def shown(self) -> list[gr.components.Component]:
        """What `look` fills, in its order."""
        buttons = [self.pause, self.resume, self.stop, self.discard, self.chat, self.export, self.restart]
        return [*buttons, self.run, self.state]


def build() -> RunBar:
    """Title and device above, the run under it."""
    with gr.Row(elem_id="header"):
        gr.HTML("<h1>QLoRA UI</h1><p>Fine-tune a language model in 4 bits, watch it learn, talk to it, take it away.</p>", elem_id="title")
        chip = gr.HTML(device_chip(None), elem_id="device-chip")
    gr.HTML(WELCOME, js_on_load=DISMISS, elem_id="welcome")
    small: dict[str, Any] = {"size": "sm", "scale": 0, "min_width": 60}
    with gr.Row(elem_id="run-bar", equal_height=True):
        with gr.Column(scale=6, min_width=200, elem_id="run-shown"):
            status = gr.HTML(markup.status(None), elem_id="status-line")
            progress = gr.HTML(markup.bar(None), elem_id="progress")
        with gr.Row(elem_id="run-buttons"):
            restart = gr.Button("Restart the app", visible=False, elem_id="restart-button", **small)
            pause = gr.Button("Pause", interactive=False, elem_id="pause-button", **small)
            resume = gr.Button("Resume", visible=False, elem_id="resume-button", **small)
            stop = gr.Button("Stop and keep", interactive=False, elem_id="stop-button", **small)
            discard = gr.Button("Discard", interactive=False, elem_id="discard-button", **small)
            chat = gr.Button("Chat with it", interactive=False, elem_id="chat-with-button", **small)
            export = gr.Button("Export", interactive=False, elem_id="export-button", **small)
        with gr.Row(visible=False, elem_id="discard-question") as asked:
            question = gr.HTML(elem_id="discard-words")
            confirm = gr.Button("Delete it", variant="stop", elem_id="discard-confirm", **small)
            cancel = gr.Button("Keep it", elem_id="discard-cancel", **small)
    message = gr.HTML(elem_id="run-message")
    # Not gr.State: what a page shows must outlive the server.
    run, state, doomed = (gr.Textbox(visible="hidden", label=label) for label in ("Run", "Its state", "Run to discard"))
    return RunBar(
        chip=chip,
        status=status,
        progress=progress,
        pause=pause,
        resume=resume,
        stop=stop,
        discard=discard,
        chat=chat,
        export=export,
        restart=restart,
        message=message,
        run=run,
        state=state,
        asked=asked,
        question=question,
        doomed=doomed,
        confirm=confirm,
        cancel=cancel,
    )


def wire(services: Services, bar: RunBar, isolated: gr.Checkbox, look: dict[str, Any], quiet: dict[str, Any]) -> None:
    """The buttons act on the run that this page showed when they were clicked. `look` shows what came of it."""
    for button, work in ((bar.pause, services.jobs.pause), (bar.stop, services.stop), (bar.restart, services.restart_app)):
        button.click(partial(act, services, work), [bar.run], [bar.message], **quiet).then(**look)
    resume = partial(act, services, lambda run, isolated: services.resume(run, isolated=isolated))
    bar.resume.click(resume, [bar.run, isolated], [bar.message], concurrency_id="resume", **quiet).then(**look)
    asking = [bar.asked, bar.question, bar.doomed]
    bar.discard.click(partial(ask, services), [bar.run], asking, **quiet).then(None, None, None, js=FOCUS)
    closed: dict[str, Any] = {"fn": lambda: NO_QUESTION, "inputs": None, "outputs": asking, **quiet}
    bar.cancel.click(**closed)
    discard = partial(act, services, services.discard)
    bar.confirm.click(discard, [bar.doomed], [bar.message], **quiet).then(**closed).then(**look)


def look(services: Services, run: Run | None, progress: Progress | None) -> list[Any]:
    """The buttons for the run that is newest. What may not be clicked now stays where it is, disabled; two buttons share one place."""
    if run is None or progress is None:
        return NO_RUN
    rests = progress.state != "running"
    may_stop = progress.resumable and services.checkpoints(run) > 0 if rests else progress.asked not in ("stop", "discard")
    return [
        gr.update(visible=not rests, interactive=not progress.asked),
        gr.update(visible=rests, interactive=progress.resumable or progress.state == "stopped"),
        gr.update(interactive=may_stop),
        gr.update(interactive=progress.asked != "discard"),
        gr.update(interactive=rests and progress.adapter_saved),
        gr.update(interactive=rests and has_weights(run)),
        gr.update(visible=services.hangs_here(run)),
        run.id,
        progress.state,
    ]


def act(services: Services, work: Callable[..., None], run_id: str, *settings: Any) -> str:
    """Do what a button says. A click that comes too late, when its run is discarded, is no error: the bar shows what is."""
    run = services.find(run_id)
    try:
        if run is not None:
            work(run, *settings)
    except UserError as error:
        return markup.error(str(error))
    except FileNotFoundError:
        if run is not None and run.folder.is_dir():
            raise
    return ""


def ask(services: Services, run_id: str) -> list[Any]:
    """Before a run is discarded: what will be gone?"""
    run = services.find(run_id)
    if run is None:
        return NO_QUESTION
    count = services.checkpoints(run)
    parts = [f"{count} checkpoint{'' if count == 1 else 's'}"] if count else []
    parts += ["adapter"] if run.adapter.is_dir() else []
    its = f"{', '.join(parts)} and log" if parts else "log"
    return [gr.update(visible=True), markup.question(f"Delete {run.name} with its {its}?"), run.id]


def device_chip(hardware: Any) -> str:
    """What computes, in one line; a click says why this dtype."""
    if hardware is None:
        return '<span class="chip">Looking at the device…</span>'
    return (
        f'<details class="chip"><summary>{escape(hardware.chip())}</summary>'
        f"<p>Computes in {escape(hardware.compute_dtype)}: {escape(hardware.reason)}.</p></details>"
    )
