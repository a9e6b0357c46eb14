"""The left of the Data tab: where rows come from. A source gives a reference, whatever it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui.config import KNOBS, RunConfig
from qlora_ui.data import catalog, formats, hub, sources
from qlora_ui.data.files import SUFFIXES
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.ui import data_markup, form, markup

BUNDLED, UPLOAD, HUB, PASTE, WORKSPACE = "Bundled", "Upload", "Hugging Face", "Paste", "Workspace"
NOTHING_YET = {
    UPLOAD: "Drop one or more files at the left.",
    HUB: "Name a data set at the left, or choose one of the paper's.",
    PASTE: "Paste rows at the left.",
    WORKSPACE: "Pick a file at the left.",
}
STARTER_SET = "bundled:guanaco-starter"
AS_NEW = [0, formats.AUTO, ""]  # page, format and mapping of rows that nobody has looked at yet
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """The components of the left column."""

    kind: gr.Radio
    boxes: list[gr.components.Component | gr.Column]
    upload: gr.File
    hub_id: gr.Textbox
    held_out_split: gr.components.Component
    read_hub: gr.Button
    cards: list[gr.Button]
    pasted: gr.Textbox
    read_paste: gr.Button
    path: gr.Dropdown


def build(config: RunConfig) -> DataSource:
    """One box a source; the one that is selected shows."""
    kinds = [BUNDLED, UPLOAD, HUB, PASTE, WORKSPACE]
    kind = gr.Radio(kinds, value=BUNDLED, label="Where the rows come from", elem_id="data-source")
    bundled = gr.HTML(data_markup.bundled_cards(), elem_id="data-bundled")
    upload = gr.File(
        label=f"Files: {' '.join(SUFFIXES)} (.gz)",
        file_count="multiple",
        file_types=[*SUFFIXES, ".gz"],
        visible=False,
        elem_id="data-upload",
    )
    with gr.Column(visible=False) as hub_box:
        hub_id = gr.Textbox(
            label="Data set id",
            placeholder="owner/name",
            info="Public sets need no account. Where wanted: owner/name:subset@revision#split",
            elem_id="data-hub",
        )
        held_out_split = form.field(KNOBS["held_out_split"], config.data.held_out_split)
        read_hub = gr.Button("Read it", elem_id="data-fetch")
        gr.Markdown("#### Data sets of the QLoRA paper")
        with gr.Column(elem_id="data-catalog"):
            cards = [catalog_card(entry) for entry in catalog.CATALOG.values()]
    with gr.Column(visible=False) as paste_box:
        pasted = gr.Textbox(
            label="Rows as text", lines=8, max_lines=14, placeholder='{"instruction": "…", "output": "…"}', elem_id="data-paste"
        )
        read_paste = gr.Button("Read it", elem_id="data-paste-read")
    with gr.Column(visible=False) as workspace_box:
        path = gr.Dropdown(
            [],
            allow_custom_value=True,
            label="File or folder in the workspace",
            info="Earlier uploads are listed; a path inside the workspace works too.",
            elem_id="data-path",
        )
    return DataSource(
        kind=kind,
        boxes=[bundled, upload, hub_box, paste_box, workspace_box],
        upload=upload,
        hub_id=hub_id,
        held_out_split=held_out_split,
        read_hub=read_hub,
        cards=cards,
        pasted=pasted,
        read_paste=read_paste,
        path=path,
    )


def wire(services: Services, source: DataSource, told: list[gr.components.Component]) -> None:
    """`told` is what a choice sets: reference, page, format, mapping, and a sentence where the report will be."""
    held = [source.kind, source.upload, source.hub_id, source.pasted, source.path]
    source.kind.change(partial(switch_source, services), [source.kind], [*source.boxes, source.path], **QUIET)
    asked = [
        source.kind.input,
        source.upload.upload,
        source.upload.clear,
        source.read_hub.click,
        source.hub_id.submit,
        source.read_paste.click,
        source.path.input,
    ]
    # Whoever clicks faster than the server answers gets what was clicked last, not what was clicked first.
    gr.on(asked, partial(choose_held, services), held, [*told, source.held_out_split], trigger_mode="always_last", **QUIET)
    for button, entry in zip(source.cards, catalog.CATALOG.values(), strict=True):
        button.click(partial(choose_named, entry), None, [*told, source.held_out_split, source.hub_id], **QUIET)


def catalog_card(entry: catalog.PaperSet) -> gr.Button:
    with gr.Group():
        gr.HTML(data_markup.catalog_card(entry))
        words = f"Read {entry.title}" if entry.reference else "Never released"
        return gr.Button(words, size="sm", interactive=bool(entry.reference), elem_id=f"data-set-{entry.name}")


def switch_source(services: Services, source: str) -> list[Any]:
    """Show what the source needs; the workspace's own list is looked up when it is opened."""
    uploads = services.workspace.uploads
    listed = [(sources.shown(str(found)), str(found)) for found in sorted(uploads.iterdir()) if not found.name.startswith(".")]
    visible = [gr.update(visible=source == kind) for kind in (BUNDLED, UPLOAD, HUB, PASTE, WORKSPACE)]
    return [*visible, gr.update(choices=listed) if source == WORKSPACE else gr.skip()]


def source_of(reference: str) -> str:
    """Which source a reference came from; of what is not here any more, a file's."""
    if reference.startswith(sources.BUNDLED_PREFIX):
        return BUNDLED
    try:
        return HUB if sources.is_hub(reference) else WORKSPACE
    except UserError:  # the tabs say so of what is chosen
        return WORKSPACE


def choose_held(
    services: Services, source: str, paths: list[str] | None, hub_id: str | None, pasted: str | None, path: str | None
) -> list[Any]:
    """Choose what the selected source holds, so that left and right of the tab always speak of the same rows."""
    try:
        reference = held(services, source, paths or [], (hub_id or "").strip(), (pasted or "").strip(), (path or "").strip())
    except UserError as error:
        return ["", *AS_NEW, markup.error(str(error)), gr.skip()]
    # Only sets of the Hub have splits, and the field of one shows only there.
    return [reference, *AS_NEW, gr.skip() if reference else markup.note(NOTHING_YET[source]), gr.skip() if source == HUB else ""]


def held(services: Services, source: str, paths: list[str], hub_id: str, pasted: str, path: str) -> str:
    """The reference to what a source holds, empty when it holds nothing yet. Raises UserError when that is no data set."""
    uploads = services.workspace.uploads
    if source == BUNDLED:
        return STARTER_SET
    if not {UPLOAD: paths, PASTE: pasted, WORKSPACE: path, HUB: hub_id}[source]:
        return ""
    if source == UPLOAD:
        return sources.import_uploads([Path(found) for found in paths], uploads)
    if source == PASTE:
        return sources.import_paste(pasted, uploads)
    if source == WORKSPACE:
        inside = services.workspace.root / path
        sources.check(str(inside), services.workspace.root)
        return str(inside)
    if not hub.is_reference(hub_id) or Path(hub_id).exists():
        raise UserError(f"{hub_id[:60]!r} is no Hugging Face id. Write it at the left as owner/name.", field="data")
    sources.check(hub_id, services.workspace.root)
    return hub_id


def choose_named(entry: catalog.PaperSet) -> list[Any]:
    """A card was clicked: its id and its split go into the boxes as well, so that they can be changed."""
    return [entry.reference, *AS_NEW, gr.skip(), entry.held_out_split, entry.reference]
