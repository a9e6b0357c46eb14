"""The page: tabs in the order of the work, and the one timer that asks whether anything is new. Knows nothing of torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import gradio as gr

from qlora_ui import presets
from qlora_ui.errors import UserError
from qlora_ui.progress import Progress
from qlora_ui.runs import Run
from qlora_ui.services import Services
from qlora_ui.ui import chat_tab, data_tab, form, markup, run_bar, theme, train_tab

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build(services: Services) -> gr.Blocks:
    """The whole page over these services. It holds no state of a run: every page reads the run folders."""
    with gr.Blocks(title="QLoRA UI", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        bar = run_bar.build()
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Data", id="data", elem_id="tab-data"):
                data = data_tab.build(services)
            with gr.Tab("Train", id="train", elem_id="tab-train"):
                train = train_tab.build(services, partial(curves, services))
            with gr.Tab("Chat", id="chat", elem_id="tab-chat"):
                chat = chat_tab.build(services)
        seen = gr.Textbox(visible="hidden", label="What there is to see", elem_id="seen")
        timer = gr.Timer(1.0)
        wire(services, bar, tabs, data, train, chat, seen, timer, page)
        gr.api(scripted_start(services), api_name="start_training")
        gr.api(scripted_stop(services), api_name="stop_training")
        gr.api(scripted_status(services), api_name="run_status")
    return page


def launch_options() -> dict[str, Any]:
    """What Gradio wants to be told at launch rather than when the page is built."""
    return {"theme": theme.theme(), "css_paths": [theme.CSS], "run_history": False, "footer_links": ["api", "settings"]}


def wire(
    services: Services,
    bar: run_bar.RunBar,
    tabs: gr.Tabs,
    data: data_tab.DataTab,
    train: train_tab.TrainTab,
    chat: chat_tab.ChatTab,
    seen: gr.Textbox,
    timer: gr.Timer,
    page: gr.Blocks,
) -> None:
    """Everything that crosses from one tab to another."""
    # Two steps, so that a tick without news touches no component: only a change of what was seen redraws.
    look = partial(glance, services)
    timer.tick(look, None, [seen], queue=False, **QUIET)
    page.load(look, None, [seen], queue=False, **QUIET)
    shown = [bar.chip, bar.status, bar.progress, bar.stop, bar.chat, train.tiles, train.plot, train.log, chat.run]
    seen.change(partial(redraw, services), [chat.run], shown, queue=False, **QUIET)

    # What a person has set but not started yet lives in their browser; everything else is the server's.
    draft = gr.BrowserState({}, storage_key="qlora-ui-draft", secret="not secret, only fixed")
    form_values = [train.preset, data.chosen, *train.fields]
    plan = partial(train_tab.describe_plan, services, train.names)
    page.load(
        partial(opened, services, train.names),
        [draft],
        [train.preset, *train.fields, data.source, data.chosen, data.page, data.summary, data.preview, data.use],
        **QUIET,
    ).then(plan, form_values, [train.data_line, train.plan, train.message, draft], **QUIET)
    changes = [data.chosen.change, train.preset.input, *[f.change for f in train.fields]]
    gr.on(changes, plan, form_values, [train.data_line, train.plan, train.message, draft], trigger_mode="always_last", **QUIET)

    rows_of = [data.chosen, data.page, data.view, train.preset]
    gr.on(
        [data.page.change, data.view.change, data.chosen.change],
        partial(show_rows, services, train.names),
        [*rows_of, *train.fields],
        [data.preview],
        api_visibility="private",
    )
    data.use.click(lambda: gr.Tabs(selected="train"), None, [tabs], **QUIET)

    started = partial(train_tab.start, services, train.names)
    train.start.click(started, form_values, [train.message, *train.fields], **QUIET).then(look, None, [seen], **QUIET)
    bar.stop.click(partial(run_bar.stop, services), None, [bar.message], **QUIET).then(look, None, [seen], **QUIET)
    bar.chat.click(partial(talk_to_newest, services), None, [tabs, chat.run], **QUIET)


def opened(services: Services, names: list[str], draft: dict[str, Any]) -> list[Any]:
    """A page was opened: close the books of runs whose process died, and put back what was set here last."""
    services.workspace.settle()
    try:
        config = presets.load(draft["preset"]).config.with_values(draft["values"])
        reference, *shown = data_tab.choose(services, config.data.data)
    except (UserError, KeyError):  # a first visit, or a draft of another version
        config = presets.load(train_tab.first_preset()).config
        reference, *shown = data_tab.choose(services, config.data.data)
    return [gr.update(value=config.preset), *form.filled(names, config.values()), data_tab.source_of(reference), reference, *shown]


def show_rows(services: Services, names: list[str], chosen: str, page: int, view: str, preset: str, *values: Any) -> str:
    return data_tab.show_rows(services, chosen, page, view, preset, names, *values)


def glance(services: Services) -> str:
    """The timer's question: what is there to see? It costs a folder listing and a stat."""
    run = services.workspace.newest()
    return f"{run.id if run else 'no run'} {run.size() if run else 0} {'device' if services.hardware() else 'no device yet'}"


def redraw(services: Services, talking_to: str | None) -> list[Any]:
    """Everything that shows the newest run."""
    run = services.workspace.newest()
    progress = services.watch.progress(run) if run else None
    running = progress is not None and progress.state == "running"
    return [
        run_bar.device_chip(services.hardware()),
        markup.status(progress),
        markup.bar(progress),
        gr.update(interactive=running and not (progress and progress.stopping)),
        gr.update(interactive=progress is not None and progress.adapter_saved and not running),
        markup.tiles(progress),
        {"run": run.id if run else "", "version": run.size() if run else 0},
        markup.log(progress),
        gr.skip() if running and talking_to else run_choices(services, talking_to),
    ]


def run_choices(services: Services, talking_to: str | None) -> Any:
    """All runs that can be talked to, newest first; the choice that was made stays."""
    ids = [run.id for run in services.workspace.all() if run.adapter.is_dir()]
    return gr.update(choices=ids, value=talking_to if talking_to in ids else (ids[0] if ids else None))


def talk_to_newest(services: Services) -> list[Any]:
    run = services.workspace.newest()
    return [gr.Tabs(selected="chat"), run_choices(services, run.id if run else None)]


def curves(services: Services, run_id: str, stride: int, count: int, held_out_count: int) -> dict[str, Any]:
    """The points of a run's curves that a plot lacks."""
    try:
        progress = services.watch.progress(services.workspace.get(run_id))
    except UserError:
        progress = Progress("")  # no run yet: an empty plot
    return asdict(progress.curves_since(int(stride), int(count), int(held_out_count)))


def scripted_start(services: Services) -> Any:
    """The endpoint /start_training."""

    def start_training(preset: str = "starter", data: str = "", settings: str = "{}") -> str:
        """Start a run and return its id. `settings` is a JSON object of setting names and values."""
        try:
            values = json.loads(settings or "{}")
            config = presets.load(preset).config.with_values({**values, **({"data": data} if data else {})})
            return services.start(config).id
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except (ValueError, TypeError) as error:
            raise gr.Error(f"settings is {settings!r}: it must be a JSON object.", print_exception=False) from error

    return start_training


def scripted_stop(services: Services) -> Any:
    """The endpoint /stop_training."""

    def stop_training(run: str = "") -> str:
        """Ask a run (or, without an id, the newest) to stop and keep its adapter. Returns the run's id."""
        found = find_run(services, run)
        found.request_stop()
        return found.id

    return stop_training


def scripted_status(services: Services) -> Any:
    """The endpoint /run_status."""

    def run_status(run: str = "") -> dict[str, Any]:
        """How a run (or, without an id, the newest) stands."""
        found = find_run(services, run)
        progress = services.watch.progress(found)
        return {
            "run": found.id,
            "state": progress.state,
            "phase": progress.phase,
            "step": progress.step,
            "total_steps": progress.total_steps,
            "loss": progress.loss,
            "held_out_loss": progress.held_out_loss,
            "adapter_saved": progress.adapter_saved,
            "status": progress.status_line(),
        }

    return run_status


def find_run(services: Services, run_id: str) -> Run:
    """The run of that id, or the newest. What is wrong reaches the script as a sentence."""
    try:
        newest = services.workspace.newest()
        if run_id or newest is None:
            return services.workspace.get(run_id)
        return newest
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
