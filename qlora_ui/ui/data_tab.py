"""The Data tab: where rows come from, which are kept, and what the model reads of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui.data import sources
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.ui import form, markup

BUNDLED, UPLOAD, HUB = "Bundled", "Upload", "Hugging Face"
ROWS_A_PAGE = 4
AS_CHAT, AS_READ = "As a chat", "As the model reads it"


@dataclass(frozen=True, kw_only=True)
class DataTab:
    """The components that other tabs are wired to."""

    source: gr.Radio
    chosen: gr.State
    use: gr.Button
    view: gr.Radio
    page: gr.State
    summary: gr.HTML
    preview: gr.HTML


def build(services: Services) -> DataTab:
    """Components first, in reading order, then the wiring."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            source = gr.Radio([BUNDLED, UPLOAD, HUB], value=BUNDLED, label="Where the rows come from", elem_id="data-source")
            bundled = gr.HTML(bundled_card(), elem_id="data-bundled")
            upload = gr.File(
                label="A .json, .jsonl, .csv or .parquet file", file_types=list(sources.SUFFIXES), visible=False, elem_id="data-upload"
            )
            with gr.Column(visible=False) as hub_box:
                hub_id = gr.Textbox(label="Data set id", placeholder="owner/name", info="Public sets need no account.", elem_id="data-hub")
                fetch = gr.Button("Read it", elem_id="data-fetch")
        with gr.Column(scale=2, min_width=320):
            summary = gr.HTML(elem_id="data-summary")
            with gr.Row(elem_classes=["toolbar"]):
                view = gr.Radio([AS_CHAT, AS_READ], value=AS_CHAT, show_label=False, container=False, elem_id="data-view", label="View")
                back = gr.Button("Previous", size="sm", elem_id="data-back")
                onward = gr.Button("Next", size="sm", elem_id="data-next")
            preview = gr.HTML(elem_id="data-preview")
            use = gr.Button("Use this data", variant="primary", elem_id="data-use")
    chosen = gr.State("bundled:guanaco-starter")
    page = gr.State(0)

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    shown = [chosen, page, summary, preview, use]
    source.change(switch_source, [source], [bundled, upload, hub_box], **quiet)
    held = [source, upload, hub_id]
    source.input(partial(choose_held, services), held, shown, **quiet)
    gr.on([upload.upload, upload.clear], partial(choose_held, services), held, shown, api_visibility="private")
    gr.on([fetch.click, hub_id.submit], partial(choose_held, services), held, shown, api_visibility="private")
    back.click(partial(turn_page, services, -1), [chosen, page], [page], **quiet)
    onward.click(partial(turn_page, services, 1), [chosen, page], [page], **quiet)
    return DataTab(source=source, chosen=chosen, use=use, view=view, page=page, summary=summary, preview=preview)


def bundled_card() -> str:
    """The bundled sets, each with rows, licence and use."""
    cards = (
        f'<article class="set-card"><h4>{escape(b.title)}</h4><p>{escape(b.about)}</p>'
        f'<p class="note">{b.rows} rows · {escape(b.licence)}</p></article>'
        for b in sources.BUNDLED.values()
    )
    return "".join(cards)


def switch_source(source: str) -> list[Any]:
    return [gr.update(visible=source == kind) for kind in (BUNDLED, UPLOAD, HUB)]


def source_of(reference: str) -> str:
    """Which source a reference came from."""
    if reference.startswith(sources.BUNDLED_PREFIX):
        return BUNDLED
    return UPLOAD if Path(reference).suffix.lower() in sources.SUFFIXES else HUB


def choose_held(services: Services, source: str, path: str | None, hub_id: str | None) -> list[Any]:
    """Choose what the selected source holds, so that left and right of the tab always speak of the same rows."""
    try:
        if source == BUNDLED:
            return choose(services, "bundled:guanaco-starter")
        if source == UPLOAD:
            if not path:
                raise UserError("No file is chosen. Drop one at the left.", field="data")
            return choose(services, sources.import_upload(Path(path), services.workspace.uploads))
        named = (hub_id or "").strip()
        if "/" not in named or Path(named).exists():
            raise UserError(f"{named!r} is no Hugging Face id. Write it at the left as owner/name.", field="data")
        return choose(services, named)
    except UserError as error:
        return refused(error)


def choose(services: Services, reference: str) -> list[Any]:
    """Read a data set and show its report; a set that cannot be used is not chosen."""
    try:
        data = services.shelf.read(reference)
    except UserError as error:
        return refused(error)
    rows = data.conversations[:ROWS_A_PAGE]
    return [reference, 0, markup.summary(data.report), markup.bubbles(rows), gr.update(interactive=True)]


def refused(error: UserError) -> list[Any]:
    """Nothing is chosen, so that Start cannot train on something else than what is on the screen."""
    return ["", 0, markup.error(str(error)), "", gr.update(interactive=False)]


def turn_page(services: Services, by: int, chosen: str, page: int) -> int:
    if not chosen:
        return 0
    pages = -(-len(services.shelf.read(chosen).conversations) // ROWS_A_PAGE)
    return (page + by) % pages


def show_rows(services: Services, chosen: str, page: int, view: str, preset: str, names: list[str], *values: Any) -> str:
    """The page's rows as chat, or through the tokenizer and template that training uses."""
    if not chosen:
        return ""
    rows = services.shelf.read(chosen).conversations[page * ROWS_A_PAGE : (page + 1) * ROWS_A_PAGE]
    if view == AS_CHAT:
        return markup.bubbles(rows)
    try:
        pieces = services.trained_pieces(form.read(preset, chosen, names, values), rows)
    except UserError as error:
        return markup.note(str(error)) + markup.bubbles(rows)
    return markup.token_view(rows, pieces)
