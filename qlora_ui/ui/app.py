"""The page: tabs in the order of the work, and what crosses from one to another. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui import presets
from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.progress import Progress
from qlora_ui.services import Services
from qlora_ui.ui import (
    arena_tab,
    chat_tab,
    data_rows,
    data_source,
    data_tab,
    export_tab,
    form,
    live,
    markup,
    planner,
    queue_panel,
    run_bar,
    runs_tab,
    samples,
    scripting,
    settings_file,
    sweep,
    theme,
    train_tab,
)

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
SHOW_BLAMED = "() => setTimeout(() => window.showBlamed?.(), 100)"
"""Brings the field into sight that a start was refused for, once its sentence is in the page."""

STREAM = Path(__file__).with_name("stream.js")
NOW = "() => String(performance.now())"


def build(services: Services) -> gr.Blocks:
    """The whole page over these services. It holds no state of a run: every page reads the run folders."""
    with gr.Blocks(title="QLoRA UI", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        bar = run_bar.build()
        # Out here, because what lies in a tab that was not opened yet is not read from the browser.
        kept_chat = gr.BrowserState({}, storage_key="qlora-ui-chat", secret="not secret, only fixed")
        kept_contestants = gr.BrowserState([], storage_key="qlora-ui-arena", secret="not secret, only fixed")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Data", id="data", elem_id="tab-data"):
                data = data_tab.build(services, presets.load(train_tab.first_preset()).config)
            with gr.Tab("Train", id="train", elem_id="tab-train"):
                train = train_tab.build(services, partial(curves, services))
            with gr.Tab("Chat", id="chat", elem_id="tab-chat"):
                chat = chat_tab.build(services, kept_chat)
            with gr.Tab("Arena", id="arena", elem_id="tab-arena") as arena_shown:
                arena = arena_tab.build(services, QUIET)
            with gr.Tab("Runs", id="runs", elem_id="tab-runs") as runs_shown:
                runs = runs_tab.build(services, QUIET)
                answers = samples.build(services, "", "run-samples", visible=False)
                runs.one.change(lambda run: gr.update(value=run, visible=bool(run)), [runs.one], [answers], **QUIET)
                runs_shown.select(None, None, None, js=runs_tab.REFRESH)
            with gr.Tab("Export", id="export", elem_id="tab-export") as export_shown:
                export = export_tab.build(services, QUIET)
        news = live.News(services)
        seen = live.build(news)
        page.load(partial(chat_tab.restored, services), [kept_chat], chat.opened, **QUIET)
        arena_tab.wire(services, arena, arena_shown, tabs, page, kept_contestants, QUIET)
        wire(services, bar, tabs, data, train, chat, runs, export, seen, news, page)
        wire_export(services, bar, tabs, export, export_shown, seen, news)
        scripting.build(services)
    return page


def launch_options() -> dict[str, Any]:
    """What Gradio wants to be told at launch rather than when the page is built."""
    head = f"<script>(() => {{\n{STREAM.read_text('utf-8')}}})()</script>"
    return {"theme": theme.theme(), "css_paths": [theme.CSS], "head": head, "run_history": False, "footer_links": ["api", "settings"]}


def wire(
    services: Services,
    bar: run_bar.RunBar,
    tabs: gr.Tabs,
    data: data_tab.DataTab,
    train: train_tab.TrainTab,
    chat: chat_tab.ChatTab,
    runs: runs_tab.RunsTab,
    export: export_tab.ExportTab,
    seen: gr.HTML,
    news: live.News,
    page: gr.Blocks,
) -> None:
    """Everything that crosses from one tab to another."""
    # The page's own script writes the line, the tiles, the log and the curve; Gradio redraws what a person can press or choose,
    # and only when the script has found another key than the one that it was drawn for.
    look: dict[str, Any] = {"fn": partial(glance, services, news), "inputs": None, "outputs": [seen], **QUIET}
    chosen, shown = [chat.speaker, chat.kept, *export.chosen], [bar.chip, *bar.shown, train.plot, chat.speaker, *export.shown]
    # As they stand: after a restart of the server, Gradio would refuse a choice that the page still has.
    seen.change(partial(redraw, services), chosen, shown, preprocess=False, queue=False, **QUIET)

    # What a person has set but not started yet lives in their browser; everything else is the server's.
    draft = gr.BrowserState({}, storage_key="qlora-ui-draft", secret="not secret, only fixed")
    names, fields = [*train.names, *data.settings], [*train.fields, *data.settings.values()]
    form_values = [train.preset, data.chosen, *fields]
    plan: dict[str, Any] = {
        "fn": partial(train_tab.describe_plan, services, names),
        "inputs": form_values,
        "outputs": [train.data_line, train.plan, train.message, train.file.command],
    }
    filled = [train.preset, *fields, data.source.kind, data.chosen, data.source.path, data.source.hub_id]
    page.load(partial(opened, services, names), [draft], [train.isolated, *filled], **QUIET)
    train.file.load.upload(partial(loaded, names), [train.file.load], [train.message, *filled], **QUIET)
    saved = partial(settings_file.saved, names)
    train.file.save.click(saved, form_values, [train.message, train.file.file], **QUIET).then(
        None, [train.message], None, js=settings_file.PRESS
    )
    train.preset.input(partial(train_tab.choose_preset, names), [train.preset], fields, **QUIET)
    train.preset.change(train_tab.about_preset, [train.preset], [train.about], trigger_mode="multiple", **QUIET)
    changes = [data.chosen.change, train.preset.input, *[f.change for f in fields]]
    planned = heard(changes)
    planned.change(**plan, trigger_mode="always_last", **QUIET)
    form.build_marks(names, train.preset, fields, [page.load, train.preset.change, *[f.change for f in fields]])
    # By a writer of its own, ahead of the queue: what a person has set does not wait for a plan.
    kept = [train.isolated, *form_values]
    kept_when = heard([*changes, train.isolated.input]).change
    kept_when(partial(train_tab.draft, names), kept, [draft], trigger_mode="always_last", queue=False, **QUIET)
    planned_when = heard([*changes, bar.chip.change, page.load, train.memory.card.input]).change
    planner.wire(services, train.memory, names, form_values, planned_when, page.load, partial(after, planned), QUIET)
    wire_data(services, data, dict(zip(names, fields, strict=True)), form_values, names, planned)
    data.use.click(lambda: gr.Tabs(selected="train"), None, [tabs], **QUIET)

    started = partial(train_tab.start, services, names)
    train.start.click(started, kept, [train.message], **QUIET).then(None, None, None, js=SHOW_BLAMED).then(**look)
    lined_up = train.line_up.click(partial(queue_panel.add, services, names), kept, [train.message], **QUIET)
    lined_up.then(None, None, None, js=SHOW_BLAMED).then(None, None, None, js=queue_panel.CHANGED)
    sweep.wire(services, train.swept, names, kept, heard(changes, while_seen="#sweep-plan").change, QUIET)
    run_bar.wire(services, bar, train.isolated, look, QUIET)
    wire_resume_with(services, bar, train, names, form_values, filled, changes).then(**look)
    for button, run in ((bar.chat, bar.run), (runs.chat, runs.one)):
        begun = button.click(partial(chat_tab.begin_with, services), [run, *chat.open], chat.opened, **QUIET)
        begun.then(lambda: gr.Tabs(selected="chat"), None, [tabs], **QUIET)

    own = partial(own_settings, services, names)
    runs.settings.click(own, [runs.one], [train.message, *filled], **QUIET).then(lambda: gr.Tabs(selected="train"), None, [tabs], **QUIET)
    page.load(linked_run(services), None, [tabs, runs.table, runs.shown], **QUIET)


def wire_export(
    services: Services,
    bar: run_bar.RunBar,
    tabs: gr.Tabs,
    export: export_tab.ExportTab,
    export_shown: gr.Tab,
    seen: gr.HTML,
    news: live.News,
) -> None:
    """What the Export tab is told, and who leads to it."""
    look: dict[str, Any] = {"fn": partial(glance, services, news), "inputs": None, "outputs": [seen], **QUIET}
    wished = [export.run, export.weights, export.kind, export.quantize, export.push]
    measured = heard([bar.chip.change, *[field.change for field in wished]], while_seen="#export-form")
    gr.on([export_shown.select], None, None, [measured], js=NOW, trigger_mode="multiple", **QUIET)
    measured.change(partial(export_tab.room_words, services), wished, [export.size], trigger_mode="always_last", **QUIET)
    asked = [*wished, export.repository, export.private, export.token]
    export.start.click(partial(export_tab.start, services), asked, [export.message, export.token], **QUIET).then(**look)
    bar.export.click(lambda run: [gr.Tabs(selected="export"), run], [bar.run], [tabs, export.run], **QUIET)


def heard(events: list[Any], while_seen: str = "") -> gr.Textbox:
    """A hidden field that changes with any of these events, for one listener that wants the last word of many.

    Only `while_seen`, if that is given: while the element of this selector is on the screen.

    When a listener with `always_last` was busy, Gradio 6.31 repeats the event for all that listen to it: two of them on one event
    call each other for ever, and a preset is chosen again after a person has changed it. So each has an event of its own.
    """
    field = gr.Textbox(visible="hidden", label="Changes")
    seen = f"(last) => document.querySelector('{while_seen}')?.getClientRects().length ? ({NOW})() : last"
    gr.on(events, None, [field] if while_seen else None, [field], js=seen if while_seen else NOW, trigger_mode="multiple", **QUIET)
    return field


def after(field: gr.Textbox, event: Any) -> None:
    """Change a field of `heard` at the end of this event, each time: a listener of its own would be left out while it is busy."""
    event.then(None, None, [field], js=NOW, trigger_mode="multiple", **QUIET)


def wire_resume_with(
    services: Services,
    bar: run_bar.RunBar,
    train: train_tab.TrainTab,
    names: list[str],
    form_values: list[Any],
    filled: list[Any],
    changes: list[Any],
) -> Any:
    """The run on the bar against the settings of the form: going on with them, or taking its own. Returns the former's event."""
    compared = [train.resume_with, train.use_settings, train.differences]
    compare, own = partial(train_tab.compare, services, names), partial(own_settings, services, names)
    seen = [bar.run, bar.state, *form_values]
    heard([bar.run.change, bar.state.change, *changes]).change(compare, seen, compared, trigger_mode="always_last", **QUIET)
    train.use_settings.click(own, [bar.run], [train.message, *filled], **QUIET)
    resume = partial(train_tab.resume_with, services, names)
    asked = [bar.run, train.isolated, *form_values]
    resumed = train.resume_with.click(resume, asked, [train.message], concurrency_id="resume", **QUIET)
    return resumed.then(None, None, None, js=SHOW_BLAMED)


def wire_data(
    services: Services,
    data: data_tab.DataTab,
    field: dict[str, Any],
    form_values: list[Any],
    names: list[str],
    planned: gr.Textbox,
) -> None:
    """What the Data tab does with settings, which may stand on either tab."""
    # Two settings stand on both tabs. Only what a person types moves the other, so that they cannot chase each other.
    for name, mirror in data.reading.mirrors.items():
        typed = [mirror.submit, mirror.blur] if isinstance(mirror, gr.Number) else [mirror.input]
        gr.on(typed, lambda value: value, [mirror], [field[name]], **QUIET)
        field[name].change(lambda value: value, [field[name]], [mirror], trigger_mode="multiple", **QUIET)
    data.reading.suggest.click(partial(suggested, services, names), form_values, [field["max_seq_len"]], **QUIET)

    read_by = ("model", "data_format", "columns", "prompt_format", "train_on", "max_seq_len", "long_rows", "held_out_split")
    looks: dict[str, Any] = {"inputs": [data.wish, *form_values], "outputs": data.seen, "concurrency_limit": 8, **QUIET}
    left = [field["chat_template"].blur, field["new_tokens"].blur]
    changes = [data.chosen.change, *[field[name].change for name in read_by], *left]
    look = gr.on(changes, partial(data_tab.look, services, names, False), trigger_mode="multiple", **looks)  # the newest ends the others
    fetch = data.reading.fetch_tokenizer.click(partial(data_tab.look, services, names, True), **looks)
    turned = [part.change for part in data.rows.wanted if part is not data.rows.search]
    turned_to = heard([*turned, data.rows.search.submit, data.rows.search.blur, data.read.change])
    shown = [data.rows.preview, data.rows.pager]
    rows = partial(data_rows.show, services, names)
    turned_to.change(rows, [*data.rows.wanted, *form_values], shown, trigger_mode="always_last", **QUIET)
    for event in (look, fetch):
        after(turned_to, event)
        after(planned, event)
    mapped = partial(data_tab.map_columns, services, names)
    gr.on(
        [slot.input for slot in data.reading.slots],
        mapped,
        [*form_values, *data.reading.slots],
        [field["columns"], field["data_format"]],
        **QUIET,
    )
    data.report.download.click(partial(data_tab.write_dropped, services, names), form_values, [data.report.file], **QUIET).then(
        None, None, None, js="() => setTimeout(() => document.querySelector('#data-dropped-file').click(), 100)"
    )


def opened(services: Services, names: list[str], draft: dict[str, Any]) -> list[Any]:
    """A page was opened: close the books of runs whose process died, and put back what was set here last."""
    services.workspace.settle()
    try:
        config = presets.load(draft["preset"]).config.with_values(draft["values"])
        return [draft.get("isolated", False), *filled_by(names, config)]
    except (UserError, KeyError):  # a first visit, or a draft of another version
        return [False, *filled_by(names, presets.load(train_tab.first_preset()).config)]


def own_settings(services: Services, names: list[str], run_id: str) -> list[Any]:
    """What a run was told goes into the form."""
    run = services.find(run_id)
    try:
        return ["", *(filled_by(names, run.config()) if run else [gr.skip()] * (len(names) + 5))]
    except UserError as error:
        return [markup.error(str(error)), *[gr.skip()] * (len(names) + 5)]


def loaded(names: list[str], path: str) -> list[Any]:
    """What a file says goes into the form."""
    try:
        return ["", *filled_by(names, settings_file.read(path))]
    except UserError as error:
        return [markup.error(str(error)), *[gr.skip()] * (len(names) + 5)]


def filled_by(names: list[str], config: RunConfig) -> list[Any]:
    """The form with a config's settings, and where its rows come from."""
    reference = config.data.data
    source = data_source.source_of(reference)
    path, hub_id = (reference if source == kind else None for kind in (data_source.WORKSPACE, data_source.HUB))
    preset = config.preset if config.preset in presets.names() else gr.skip()
    values = config.values()
    return [preset, *[values[name] for name in names], source, reference, path, hub_id]


def linked_run(services: Services) -> Any:
    """Opens the run of the page's address, `?run=ID`. Gradio gives a request to plain functions only."""

    def opened_by_link(request: gr.Request) -> list[Any]:
        wanted = str(request.query_params.get("run", ""))
        if not wanted or "pair" in request.query_params:  # a pair that waits for a vote is shown by the arena
            return [gr.skip()] * 3
        run = services.find(wanted)
        if run is None:
            gone = markup.error(f"There is no run {wanted[:80]!r} here: it was deleted, or is in another workspace. Choose another.")
            return [gr.Tabs(selected="runs"), gr.skip(), gone]
        return [gr.Tabs(selected="runs"), [run.id], gr.skip()]

    return opened_by_link


def suggested(services: Services, names: list[str], preset: str, chosen: str, *values: Any) -> Any:
    """The max length that the lengths of the rows suggest."""
    seen = services.inspector.known(form.read(preset, chosen, names, values))
    return seen.lengths.suggested_max_seq_len if seen and seen.lengths else gr.skip()


def glance(services: Services, news: live.News) -> str:
    """What buttons and choices depend on, as it is now: asked for after a click, so that nobody waits for the next second."""
    run = services.workspace.newest()
    try:
        return news.key(run, services.watch.progress(run) if run else None)
    except FileNotFoundError:  # discarded between the two looks
        return "a run is gone"


def redraw(services: Services, talking_to: str | None, kept: dict[str, Any] | None = None, *exporting: Any) -> list[Any]:
    """What can be pressed and chosen, for the newest run and for exports. Of a page that was just opened, `kept` knows who speaks."""
    talking_to = talking_to or chat_tab.open_speaker(kept)
    run = services.workspace.newest()
    try:
        progress = services.watch.progress(run) if run else None
        bar = run_bar.look(services, run, progress)
        drawn = {"run": run.id if run else "", "version": run.size() if run else 0}
        export = export_tab.look(services, *exporting)
    except FileNotFoundError:  # discarded since: the next glance says so
        return [gr.skip()] * (len(run_bar.NO_RUN) + 3 + export_tab.SHOWN)
    running = progress is not None and progress.state == "running"
    choices = gr.skip() if running and talking_to else chat_tab.choices(services, talking_to)
    return [run_bar.device_chip(services.hardware()), *bar, drawn, choices, *export]


def curves(services: Services, run_id: str, rewinds: int, stride: int, count: int, held_out_count: int) -> dict[str, Any]:
    """The points of a run's curves that a plot lacks."""
    try:
        progress = services.watch.progress(services.workspace.get(run_id))
    except UserError:
        progress = Progress("")  # no run yet: an empty plot
    return asdict(progress.curves_since(int(rewinds), int(stride), int(count), int(held_out_count)))
