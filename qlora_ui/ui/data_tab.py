"""The Data tab: where rows come from, what is kept of them, and what the model will learn from each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from qlora_ui.config import KNOBS, DataConfig, RunConfig
from qlora_ui.data import checks, columns, formats, sources
from qlora_ui.data.formats import FIELDS, FORMATS
from qlora_ui.errors import UserError
from qlora_ui.inspection import Look
from qlora_ui.services import Services
from qlora_ui.ui import data_markup, data_rows, data_source, downloads, form, markup

SLOTS = 4
TOLD = 9 + SLOTS  # components that a look fills
LISTED = 200  # columns; a browser stands still over ten thousand
NO_LENGTHS = markup.note("How long the rows are shows here.")
TOGETHER_SECONDS = 0.05  # what one click changes arrives as several changes, of which the last says all
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass
class Wish:
    """What one page's person wants last; Gradio keeps one for each page. A look that is not the newest `look` ends."""

    look: object = None
    stop: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was read and what was dropped, while it is read and after."""

    summary: gr.HTML
    cancel: gr.Button
    download: gr.Button
    file: gr.DownloadButton


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read, and how long they are when read so."""

    data_format: gr.Dropdown
    slots: list[gr.Dropdown]
    columns: gr.Textbox
    prompt_format: gr.components.Component
    train_on: gr.components.Component
    max_seq_len: gr.components.Component
    long_rows: gr.components.Component
    chat_template: gr.Textbox
    lengths: gr.HTML
    suggest: gr.Button
    fetch_tokenizer: gr.Button

    @property
    def mirrors(self) -> dict[str, gr.components.Component]:
        """Settings that stand on the Train tab and here."""
        return {"train_on": self.train_on, "max_seq_len": self.max_seq_len}


@dataclass(frozen=True, kw_only=True)
class DataTab:
    """The parts that other tabs are wired to, and those of this tab's own wiring that need the whole form."""

    source: data_source.DataSource
    report: Report
    reading: Reading
    rows: data_rows.Rows
    use: gr.Button
    read: gr.Textbox
    chosen: gr.State
    wish: gr.State

    @property
    def settings(self) -> dict[str, gr.components.Component]:
        """Those that stand here alone."""
        here = self.reading
        return {
            "data_format": here.data_format,
            "columns": here.columns,
            "prompt_format": here.prompt_format,
            "chat_template": here.chat_template,
            "long_rows": here.long_rows,
            "held_out_split": self.source.held_out_split,
        }

    @property
    def seen(self) -> list[gr.components.Component]:
        """What a look fills, in the order in which it tells."""
        report, reading = self.report, self.reading
        told = [self.chosen, self.read, report.summary, reading.lengths, self.use, report.cancel, report.download]
        return [*told, reading.suggest, reading.fetch_tokenizer, *reading.slots]


def build(services: Services, config: RunConfig) -> DataTab:
    """Components first, in reading order, then the wiring that needs nothing of other tabs."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            source = data_source.build(config)
        with gr.Column(scale=2, min_width=320):
            report = build_report()
            reading = build_reading(config)
            rows = data_rows.build()
            use = gr.Button("Use this data", variant="primary", interactive=False, elem_id="data-use")
            read = gr.Textbox(visible="hidden", label="Rows that have been read", elem_id="data-read")
    chosen, wish = gr.State(""), gr.State(Wish())

    data_source.wire(services, source, [chosen, rows.page, reading.data_format, reading.columns, report.summary])
    report.cancel.click(ask_to_stop, [wish], None, queue=False, **QUIET)
    return DataTab(source=source, report=report, reading=reading, rows=rows, use=use, read=read, chosen=chosen, wish=wish)


def build_report() -> Report:
    with gr.Row(elem_id="data-report"):
        return Report(
            summary=gr.HTML(elem_id="data-summary"),
            cancel=gr.Button("Cancel", size="sm", visible=False, elem_id="data-cancel"),
            download=gr.Button("Download dropped rows", size="sm", visible=False, elem_id="data-dropped"),
            file=gr.DownloadButton("Dropped rows", visible="hidden", elem_id="data-dropped-file"),
        )


def build_reading(config: RunConfig) -> Reading:
    values = config.values()
    with gr.Row(equal_height=True, elem_id="data-mapping", elem_classes=["helped"]):
        known = [("Detected", formats.AUTO), *((data_markup.title(name), name) for name in FORMATS)]
        data_format = gr.Dropdown(
            known, value=values["data_format"], label="Row format", elem_id="field-data_format", scale=2, min_width=220
        )
        slots = [gr.Dropdown([], visible=False, elem_id=f"data-slot-{n}", min_width=130) for n in range(SLOTS)]
    mapping = gr.Textbox(values["columns"], label=KNOBS["columns"].label, visible="hidden", elem_id="field-columns")
    with gr.Row(equal_height=True, elem_id="data-reading", elem_classes=["helped"]):
        prompt_format = form.field(KNOBS["prompt_format"], values["prompt_format"])
        train_on = form.field(KNOBS["train_on"], values["train_on"], elem_id="data-train-on")
        max_seq_len = form.field(KNOBS["max_seq_len"], values["max_seq_len"], elem_id="data-max-len")
        long_rows = form.field(KNOBS["long_rows"], values["long_rows"])
    template = gr.Textbox(
        values["chat_template"],
        label=KNOBS["chat_template"].label,
        info=KNOBS["chat_template"].help,
        lines=5,
        max_lines=12,
        visible=values["prompt_format"] == "custom",
        elem_id="field-chat_template",
    )
    lengths = gr.HTML(elem_id="data-lengths")
    with gr.Row(elem_classes=["toolbar"]):
        suggest = gr.Button("Use the suggested max length", size="sm", visible=False, elem_id="data-suggest")
        fetch_tokenizer = gr.Button("Fetch the tokenizer", size="sm", visible=False, elem_id="data-tokenizer")

    data_format.input(lambda: "", None, [mapping], **QUIET)  # the other format has other fields
    prompt_format.change(
        lambda chosen: gr.update(visible=chosen == "custom"), [prompt_format], [template], trigger_mode="multiple", **QUIET
    )
    return Reading(
        data_format=data_format,
        slots=slots,
        columns=mapping,
        prompt_format=prompt_format,
        train_on=train_on,
        max_seq_len=max_seq_len,
        long_rows=long_rows,
        chat_template=template,
        lengths=lengths,
        suggest=suggest,
        fetch_tokenizer=fetch_tokenizer,
    )


# Looking -------------------------------------------------------------------------------------------------------------


def ask_to_stop(wish: Wish) -> None:
    wish.stop = True


def look(services: Services, names: list[str], fetch: bool, wish: Wish, preset: str, chosen: str, *values: Any) -> Iterator[list[Any]]:
    """The report as it grows: a sample, all rows, their tokens. A page that goes away closes this and with it the reading."""
    wish.stop = False
    mine = wish.look = object()  # not a number, of which two that begin together could make the same
    time.sleep(TOGETHER_SECONDS)
    for told in tell(services, names, fetch, wish, preset, chosen, values) if wish.look is mine else ():
        if wish.look is not mine:  # asked once the words are made, which may take long
            break
        yield told
    if wish.look is not mine:
        # Gradio 6.31 repeats the last word of a generator when it ends: of an old look, over what a newer one has told meanwhile.
        # Not at the end of every look: this would also undo what the page has heard and not shown yet.
        yield [gr.skip()] * TOLD


def tell(
    services: Services, names: list[str], fetch: bool, wish: Wish, preset: str, chosen: str, values: tuple[Any, ...]
) -> Iterator[list[Any]]:
    """What one look finds, in the components of the page, up to its end, its error or the person's wish to stop."""
    if not chosen:
        yield [gr.skip(), "", gr.skip(), NO_LENGTHS, *idle()]
        return
    yield [*[gr.skip()] * 4, gr.update(interactive=False), gr.update(visible=True), *[gr.skip()] * (3 + SLOTS)]
    try:
        config = form.read(preset, chosen, names, values)
        looks = services.inspector.look(config, fetch)
        for seen in looks:
            yield [gr.skip(), *shown(services, config, seen)]
            if wish.stop:
                looks.close()
                yield ["", "", markup.note("Cancelled. Choose the data again to read it."), NO_LENGTHS, *idle()]
                return
    except UserError as error:
        report = error.report if isinstance(error, checks.NothingKept) else None
        told = markup.error(str(error)) + (data_markup.details(report) if report else "")
        yield [gr.skip(), "", told, NO_LENGTHS, *idle(slots_for(services, preset, chosen, names, values), dropped=report is not None)]


def idle(slots: list[Any] | None = None, dropped: bool = False) -> list[Any]:
    """No data to use: the buttons after the summary and the lengths, and the mapping."""
    hidden = gr.update(visible=False)
    return [gr.update(interactive=False), hidden, gr.update(visible=dropped), hidden, hidden, *(slots or [hidden] * SLOTS)]


def shown(services: Services, config: RunConfig, seen: Look) -> list[Any]:
    """One look in the components of the page."""
    if seen.data is None:
        begun = [gr.skip(), gr.update(interactive=False), gr.update(visible=True)]
        return [gr.skip(), data_markup.progress(seen), *begun, *[gr.skip()] * (3 + SLOTS)]
    report, lengths = seen.data.report, seen.lengths
    suggested = lengths.suggested_max_seq_len if lengths else config.data.max_seq_len
    return [
        report.fingerprint,
        data_markup.summary(seen) + markup.error(seen.problem),
        (data_markup.lengths(lengths) if lengths else markup.note(seen.no_tokens) or NO_LENGTHS) + markup.note(seen.trouble),
        gr.update(interactive=not seen.doing and not seen.problem),
        gr.update(visible=bool(seen.doing)),
        gr.update(visible=not seen.doing and bool(report.dropped or seen.left_out)),
        gr.update(visible=suggested != config.data.max_seq_len and not seen.doing, value=f"Set max length to {suggested}"),
        gr.update(visible=bool(seen.no_tokens)),
        *slot_updates(services, config.data, report.format),
    ]


def slots_for(services: Services, preset: str, chosen: str, names: list[str], values: tuple[Any, ...]) -> list[Any] | None:
    """The mapping fields for rows that none could be kept of; none when they cannot be read at all."""
    try:
        config = form.read(preset, chosen, names, values)
        return slot_updates(services, config.data, "")
    except UserError:  # said already
        return None


def slot_updates(services: Services, data: DataConfig, found: str) -> list[Any]:
    """A field of the format with the column that it is read from, for as many as the format has."""
    format = found if data.data_format == formats.AUTO else data.data_format
    rows = services.inspector.raw_rows(data)
    mapping = columns.parse(data.columns)
    updates = []
    for field, names in FIELDS.get(format, {}).items():
        there = columns.choices(rows, field)
        value = mapping.get(field, next((name for name in names if name in there), ""))
        more = f" {len(there) - LISTED:,} more are not listed: type the name." if len(there) > LISTED else ""
        updates.append(
            gr.update(
                visible=True,
                label=field,
                info=f"The column that holds the {field}.{more}",
                choices=[("(none)", ""), *there[:LISTED]],
                value=value,
                allow_custom_value=bool(more),
            )
        )
    return updates + [gr.update(visible=False)] * (SLOTS - len(updates))


def map_columns(services: Services, names: list[str], preset: str, chosen: str, *values: Any) -> list[str]:
    """What the mapping fields say, as the settings `columns` and `data_format`.

    Only what differs from what the format finds by itself is a mapping; the format stays the one whose fields these are.
    """
    values, slots = values[:-SLOTS], values[-SLOTS:]
    config = form.read(preset, chosen, names, values)
    known = services.inspector.known(config)
    found = known.data.report.format if known and known.data else ""
    format = found if config.data.data_format == formats.AUTO else config.data.data_format
    rows = services.inspector.raw_rows(config.data)
    mapping = {}
    for (field, aliases), column in zip(FIELDS.get(format, {}).items(), slots, strict=False):
        there = columns.choices(rows, field)
        if (column or "") != next((name for name in aliases if name in there), ""):
            mapping[field] = column or ""
    return [columns.write(mapping), format]


def write_dropped(services: Services, names: list[str], preset: str, chosen: str, *values: Any) -> Any:
    """Make the file of dropped rows, and hand it to the button that the page then presses."""
    config = form.read(preset, chosen, names, values)
    try:
        dropped = services.inspector.read(config.data).report.dropped
        seen = services.inspector.known(config)
        dropped += seen.left_out if seen else ()
    except checks.NothingKept as error:
        dropped = error.report.dropped
    path = downloads.fresh(f"{sources.name_of(chosen)}-dropped.jsonl")
    with path.open("w", encoding="utf-8") as file:
        for row in checks.dropped_rows(config.data, dropped, services.workspace.root):
            file.write(json.dumps(row, default=str) + "\n")
    return gr.update(value=str(path))
