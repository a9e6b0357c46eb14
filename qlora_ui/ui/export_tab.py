"""The Export tab: take a run's model away, and find again what was taken. Knows nothing of torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from qlora_ui import checkpoints, exported, exporting, labels
from qlora_ui.errors import UserError
from qlora_ui.exports import Kind, has_weights, likely_weights, sealed_checkpoints, size_words
from qlora_ui.services import Services
from qlora_ui.ui import export_markup, live, markup

DEFAULT = "result"
SHOWN = 6  # fields are filled by `look`
KINDS = [(title, kind) for kind, title in export_markup.TITLES.items()]
TOKEN = "Used for this push only, and kept nowhere. Empty: the server's own HF_TOKEN or login."
PRESS = "(said) => { if (!said) setTimeout(() => document.querySelector('#export-file').click(), 100); }"
FOCUS = "() => setTimeout(() => document.querySelector('#export-delete-cancel')?.focus(), 50)"
HIDDEN, VISIBLE = gr.update(visible=False), gr.update(visible=True)


@dataclass(frozen=True, kw_only=True)
class ExportTab:
    """The components that other tabs and the timer are wired to."""

    run: gr.Dropdown
    weights: gr.Dropdown
    kind: gr.Radio
    quantize: gr.Checkbox
    push: gr.Checkbox
    repository: gr.Textbox
    private: gr.Checkbox
    token: gr.Textbox
    size: gr.HTML
    message: gr.HTML
    start: gr.Button
    cancel: gr.Button
    past: gr.Radio
    newest: gr.Textbox

    @property
    def chosen(self) -> list[gr.components.Component]:
        """What `look` is told, in its order."""
        return [self.run, self.weights, self.past, self.newest]

    @property
    def shown(self) -> list[gr.components.Component]:
        """What `look` fills, in its order."""
        return [self.run, self.weights, self.start, self.cancel, self.past, self.newest]


def build(services: Services, quiet: dict[str, Any]) -> ExportTab:
    """Components first, in reading order, then the wiring that stays within the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320, elem_id="export-form"):
            run = gr.Dropdown([], label="Run", elem_id="export-run")
            weights = gr.Dropdown([], label="Weights", elem_id="export-weights")
            kind = gr.Radio(KINDS, value="adapter", label="What to take", elem_id="export-kind")
            about = gr.HTML(markup.note(export_markup.ABOUT["adapter"]), elem_id="export-about")
            quantize = gr.Checkbox(label="Quantize it again to NF4", visible=False, elem_id="export-quantize")
            push = gr.Checkbox(label="Push it to the Hugging Face Hub too", elem_id="export-push")
            with gr.Column(visible=False, elem_id="export-hub") as hub:
                repository = gr.Textbox(label="Repository", placeholder="owner/name", max_lines=1, elem_id="export-repository")
                private = gr.Checkbox(True, label="Private, where it is made anew", elem_id="export-private")
                token = gr.Textbox(label="Token that may write", type="password", info=TOKEN, max_lines=1, elem_id="export-token")
            size = gr.HTML(elem_id="export-size")
            message = gr.HTML(elem_id="export-message")
            with gr.Row(elem_id="export-buttons"):
                start = gr.Button("Export", variant="primary", interactive=False, elem_id="export-start", scale=3)
                cancel = gr.Button("Cancel", interactive=False, elem_id="export-cancel", scale=1, min_width=90)
        with gr.Column(scale=3, min_width=340, elem_id="export-panel"):
            gr.HTML(export_markup.NOTHING, js_on_load=live.SHOW_NEWS, elem_id="export-now")
            past = gr.Radio([], label="In the workspace", elem_id="export-past")
            chosen = gr.HTML(elem_id="export-chosen")
            small: dict[str, Any] = {"size": "sm", "scale": 0, "min_width": 110}
            with gr.Row(elem_id="export-past-buttons"):
                download = gr.Button("Download", interactive=False, elem_id="export-download", **small)
                delete = gr.Button("Delete", interactive=False, elem_id="export-delete", **small)
            with gr.Row(visible=False, elem_id="export-delete-question") as asked:
                question = gr.HTML()
                confirm = gr.Button("Delete it", variant="stop", elem_id="export-delete-confirm", **small)
                keep = gr.Button("Keep it", elem_id="export-delete-cancel", **small)
            past_message = gr.HTML(elem_id="export-past-message")
            with gr.Accordion("GGUF, for llama.cpp and Ollama", open=False, elem_id="export-gguf"):
                gguf = gr.HTML(export_markup.gguf(""))
    file = gr.DownloadButton("Export", visible="hidden", elem_id="export-file")
    newest, doomed = (gr.Textbox(visible="hidden", label=label) for label in ("Newest export", "Export to delete"))

    run.change(partial(weight_choices, services), [run], [weights], trigger_mode="multiple", **quiet)
    gr.on([kind.change, push.change], about_kind, [kind, push], [about, quantize, push, hub], trigger_mode="multiple", **quiet)
    cancel.click(services.exporting.cancel, None, None, **quiet)
    past.change(partial(look_at, services), [past], [chosen, download, delete, gguf, asked, past_message], **quiet)
    taken = download.click(partial(taken_as_file, services), [past], [past_message, file], api_visibility="private")
    taken.success(None, [past_message], None, js=PRESS)
    delete.click(partial(ask, services), [past], [asked, question, doomed], **quiet).then(None, None, None, js=FOCUS)
    keep.click(lambda: HIDDEN, None, [asked], **quiet)
    confirm.click(partial(deleted, services), [doomed, past], [past, past_message, asked], **quiet)
    return ExportTab(
        run=run,
        weights=weights,
        kind=kind,
        quantize=quantize,
        push=push,
        repository=repository,
        private=private,
        token=token,
        size=size,
        message=message,
        start=start,
        cancel=cancel,
        past=past,
        newest=newest,
    )


def look(services: Services, run_id: str | None, weights: str | None, past: str | None, newest: str) -> list[Any]:
    """What can be chosen and pressed now. Choices that were made stay; an export that is new is chosen."""
    runs = [run for run in services.workspace.all() if has_weights(run)]
    ids = [run.id for run in runs]
    chosen = run_id if run_id in ids else (ids[0] if ids else None)
    names = [(f"{labels.title(run)} ({run.id})" if labels.title(run) != run.name else run.id, run.id) for run in runs]
    job = services.exporting.job
    works = job is not None and job.stand == "running"
    there = exported.past(services.workspace)
    first = next(iter(there), "")
    keeps = past in there and (first == newest or not newest)
    return [
        gr.update(choices=names, value=chosen),
        weight_choices(services, chosen, weights),
        gr.update(interactive=bool(ids) and not works),
        gr.update(interactive=works and job is not None and not job.asked_to_end),
        gr.update(choices=[(export_markup.label(*each), each[0]) for each in there.items()], value=past if keeps else first or None),
        first,
    ]


def weight_choices(services: Services, run_id: str | None, chosen: str | None = DEFAULT) -> Any:
    """The run's result, or what stands for it, and its checkpoints."""
    run = services.find(run_id or "")
    if run is None:
        return gr.update(choices=[], value=None)
    steps = [str(checkpoints.step_of(folder)) for folder in sealed_checkpoints(run)]
    first = "The result" if likely_weights(run) == run.adapter else f"The newest checkpoint: step {steps[0]}" if steps else "None yet"
    choices = [(first, DEFAULT), *((f"Checkpoint of step {step}", step) for step in steps)]
    return gr.update(choices=choices, value=chosen if chosen in (DEFAULT, *steps) else DEFAULT)


def about_kind(kind: Kind, push: bool) -> list[Any]:
    """What the kind is for, and the switches that belong to it."""
    pushable = kind != "folder"
    return [
        markup.note(export_markup.ABOUT[kind]),
        gr.update(visible=kind == "merged"),
        gr.update(visible=pushable),
        gr.update(visible=pushable and push),
    ]


def room_words(services: Services, run_id: str | None, weights: str | None, kind: Kind, quantize: bool, push: bool) -> str:
    """How large it gets, and whether there is room."""
    run = services.find(run_id or "")
    if run is None:
        return markup.note("There is nothing to export yet. Train a run first, on the Train tab.")
    if services.hardware() is None:  # the libraries that measure it are still being loaded
        return markup.note("Looking at the device…")
    try:
        sizes = exporting.sizes(run, kind, step_of(weights), quantize and kind == "merged", push and kind != "folder")
        free = shutil.disk_usage(exported.folder_of(services.workspace)).free
    except UserError as error:
        return markup.error(str(error))
    room = f"the disk has {size_words(free)} free."
    if sizes is None:
        return markup.note(f"How large it gets is known once the base model is on this machine: it is fetched first. {room.capitalize()}")
    words = f"About {size_words(sizes.result_bytes)}, and {size_words(sizes.needed_bytes)} while it is made; {room}"
    return markup.note(words) if sizes.needed_bytes <= free else markup.error(f"{words} Free some space first.")


def start(
    services: Services,
    run_id: str | None,
    weights: str | None,
    kind: Kind,
    quantize: bool,
    push: bool,
    repository: str | None,
    private: bool,
    token: str | None,
) -> list[Any]:
    """Begin, or say why not. The token leaves its field once it was taken."""
    pushes, to = push and kind != "folder", (repository or "").strip()
    try:
        if pushes and not to:
            raise UserError("The repository to push to is empty. Write it as owner/name.")
        run = services.workspace.get(run_id or "")
        nf4 = quantize and kind == "merged"
        wish = exporting.into_workspace(run, kind, step_of(weights), nf4, to if pushes else "", private)
        services.exporting.start(wish, (token or "").strip() if pushes else "")
    except UserError as error:
        return [markup.error(str(error)), gr.skip()]
    return ["", ""]


def step_of(weights: str | None) -> int | None:
    """The checkpoint that is meant; None for the result."""
    return int(weights) if weights and weights != DEFAULT else None


def look_at(services: Services, name: str | None) -> list[Any]:
    """What is known of the chosen export, and what can be done with it. What was asked or said of another is over."""
    record = exported.past(services.workspace).get(name or "")
    if not name or record is None:
        off = gr.update(interactive=False)
        return [markup.note("No export lies in the workspace yet."), off, off, export_markup.gguf(""), HIDDEN, ""]
    small = record.bytes <= exported.MOST_DOWNLOAD_BYTES
    convertible = record.kind == "merged" and not record.quantized
    folder = str(exported.place_of(services.workspace, name)) if convertible else ""
    on = gr.update(interactive=True)
    return [export_markup.facts(name, record), gr.update(interactive=small), on, export_markup.gguf(folder), HIDDEN, ""]


def taken_as_file(services: Services, name: str | None) -> Iterator[list[Any]]:
    """The chosen export for the hidden button, or why not. Gradio has its own copy when it asks for more."""
    try:
        with exported.as_file(services.workspace, name or "") as path:
            yield ["", gr.update(value=str(path))]
    except UserError as error:
        yield [markup.error(str(error)), gr.skip()]


def ask(services: Services, name: str | None) -> list[Any]:
    """Before an export is deleted: which?"""
    record = exported.past(services.workspace).get(name or "")
    if not name or record is None:
        return [HIDDEN, "", ""]
    return [VISIBLE, markup.question(f"Delete exports/{name} ({size_words(record.bytes)})? The run stays."), name]


def deleted(services: Services, name: str, chosen: str | None) -> list[Any]:
    """Delete it, and show what is left."""
    try:
        exported.delete(services.workspace, name)
        said = ""
    except UserError as error:
        said = markup.error(str(error))
    left = exported.past(services.workspace)
    value = chosen if chosen in left else next(iter(left), None)
    return [gr.update(choices=[(export_markup.label(*each), each[0]) for each in left.items()], value=value), said, HIDDEN]
