"""The Train tab: what a run is told, and what it does."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from qlora_ui import presets
from qlora_ui.command_line import train_command
from qlora_ui.config import KNOBS
from qlora_ui.data import sources
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.ui import form, live, markup, more_curves, planner, queue_panel, samples, settings_file, sweep
from qlora_ui.ui.plots import loss_plot

FIRST_PRESET = "starter"
ISOLATED = "A crash, or the system's killing for want of memory, cannot then take this page down."


def first_preset() -> str:
    """The preset that a first visit finds filled in."""
    return FIRST_PRESET if FIRST_PRESET in presets.names() else presets.names()[0]


@dataclass(frozen=True, kw_only=True)
class TrainTab:
    """The components that other tabs and the timer are wired to."""

    preset: gr.Dropdown
    about: gr.HTML
    data_line: gr.HTML
    memory: planner.Planner
    plan: gr.HTML
    names: list[str]
    fields: list[gr.components.Component]
    file: settings_file.SettingsFile
    isolated: gr.Checkbox
    start: gr.Button
    line_up: gr.Button
    swept: sweep.Sweep
    resume_with: gr.Button
    use_settings: gr.Button
    differences: gr.HTML
    message: gr.HTML
    tiles: gr.HTML
    plot: gr.HTML
    log: gr.HTML


def build(services: Services, curves: Callable[..., dict[str, Any]]) -> TrainTab:
    """Components first, in reading order, then the wiring that stays within the tab."""
    names = presets.names()
    first = presets.load(first_preset())
    with gr.Row():
        with gr.Column(scale=2, min_width=320, elem_id="train-form", elem_classes=["helped"]):
            choices = [(presets.load(name).title, name) for name in names]
            preset = gr.Dropdown(choices, value=first.name, label="Preset", elem_id="preset-select")
            about = gr.HTML(markup.note(first.about), elem_id="preset-about")
            gr.HTML(form.LINE, elem_id="form-differences")
            model = gr.Dropdown(
                form.MODEL_CHOICES,
                value=first.config.model.model,
                allow_custom_value=True,
                label=KNOBS["model"].label,
                info=KNOBS["model"].help,
                elem_id="model-input",
            )
            data_line = gr.HTML(elem_id="train-data")
            fields: dict[str, gr.components.Component] = {"model": model}
            fields |= form.main_fields(first.config)
            fields |= form.advanced_fields(first.config)
            file = settings_file.build()
            with gr.Column(elem_id="start-box"):
                memory = planner.build()
                plan = gr.HTML(elem_id="train-plan")
                message = gr.HTML(elem_id="start-message")
                with gr.Row(elem_id="before-start"):
                    isolated = gr.Checkbox(label="Train in a process of its own", info=ISOLATED, elem_id="isolated-switch")
                    memory.measure.render()
                    memory.cancel.render()
                with gr.Row(equal_height=True, elem_id="start-row"):
                    start = gr.Button("Start training", variant="primary", size="lg", elem_id="start-button", scale=3)
                    line_up = queue_panel.add_button()
            with gr.Row(elem_id="resume-with"):
                resume_with = gr.Button("Resume with these settings", visible=False, size="sm", elem_id="resume-with-button")
                use_settings = gr.Button("Use this run's settings", visible=False, size="sm", elem_id="use-run-settings")
            differences = gr.HTML(elem_id="resume-differences")
            swept = sweep.build()
        with gr.Column(scale=3, min_width=340, elem_id="train-panel"):
            tiles = gr.HTML(markup.tiles(None), js_on_load=live.SHOW_NEWS, elem_id="tiles")
            gr.HTML(markup.hints([]), js_on_load=live.SHOW_NEWS, elem_id="hints")
            plot = loss_plot(curves)
            samples.build(services, samples.LIVE, "samples")
            log = gr.HTML(markup.log(), js_on_load=live.SHOW_NEWS, elem_id="log-box")
            more_curves.build(services)

    return TrainTab(
        preset=preset,
        about=about,
        data_line=data_line,
        memory=memory,
        plan=plan,
        names=list(fields),
        fields=list(fields.values()),
        file=file,
        isolated=isolated,
        start=start,
        line_up=line_up,
        swept=swept,
        resume_with=resume_with,
        use_settings=use_settings,
        differences=differences,
        message=message,
        tiles=tiles,
        plot=plot,
        log=log,
    )


def choose_preset(names: list[str], preset: str) -> list[Any]:
    """The preset's settings. The data stays what was chosen, and with it what is said of its rows."""
    values = presets.load(preset).config.values()
    return [gr.skip() if name in form.OF_THE_DATA else values[name] for name in names]


def about_preset(preset: str) -> str:
    """What it is for and needs."""
    return markup.note(presets.load(preset).about)


def start(services: Services, names: list[str], isolated: bool, preset: str, data: str, *values: Any) -> str:
    """Start, or say why not. Of a setting that is wrong, the plan above the button says it."""
    try:
        config = form.read(preset, data, names, values)
    except UserError:
        return ""
    try:
        services.check_data(config)
        services.start(config, isolated=isolated)
    except UserError as error:
        return markup.error(str(error), error.field)
    return ""


def compare(services: Services, names: list[str], run_id: str, state: str, preset: str, data: str, *values: Any) -> list[Any]:
    """Whether the run on the bar may go on with the form's settings, and what would be another then."""
    run = services.find(run_id)
    if run is None:
        return [gr.update(visible=False), gr.update(visible=False), ""]
    may, words = False, ""
    if state != "running":
        try:
            changes = services.differences(run, form.read(preset, data, names, values))
            services.check_resume(run, changes)
            may, words = True, f"{run.name}: {change_words(run.config().values(), changes)}"
        except UserError as error:  # of a setting that is wrong, the plan says it
            words = str(error)
    button = gr.update(value=f"Resume {run.name} with these settings", visible=True, interactive=may)
    return [button, gr.update(visible=True), markup.note(words)]


def change_words(before: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """`learning rate 0.0002 → 0.0001, max steps 40 → 80`."""
    said = [f"{KNOBS[name].label.lower()} {shown(before[name])} → {shown(after)}" for name, after in changes.items()]
    return ", ".join(said) or "its settings are these"


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return textwrap.shorten(str(value), 40, placeholder=" …") or "none"


def resume_with(services: Services, names: list[str], run_id: str, isolated: bool, preset: str, data: str, *values: Any) -> str:
    """Go on with the run on the bar and the form's settings, or say why not."""
    run = services.find(run_id)
    try:
        if run is not None:
            changes = services.differences(run, form.read(preset, data, names, values))
            services.check_resume(run, changes)
            services.resume(run, changes, isolated=isolated)
    except UserError as error:
        return markup.error(str(error), error.field)
    return ""


def describe_plan(services: Services, names: list[str], preset: str, data: str, *values: Any) -> tuple[str, str, str, Any]:
    """What is chosen and what Start will do, or what is still wrong with it; what Start said before is over. And the command for it."""
    chosen = f"Data: {sources.shown(data)}" if data else "No data set is chosen. Choose one on the Data tab."
    try:
        config = form.read(preset, data, names, values)
        if data:
            sources.check(data, services.workspace.root)
        command = train_command(config, services.workspace.root)
        seen = services.inspector.known(config) if data else None
        if seen is None or seen.data is None:
            return markup.note(chosen), "", "", command
        chosen += f", {len(seen.data.conversations):,} rows"
        return markup.note(chosen), planner.time_words(services, config, seen), "", command
    except UserError as error:
        return markup.note(chosen), markup.error(str(error), error.field), "", ""


def draft(names: list[str], isolated: bool, preset: str, data: str, *values: Any) -> Any:
    """What is set, for the person's browser to keep. What is half typed leaves the last draft that was whole."""
    try:
        return {"preset": preset, "values": form.read(preset, data, names, values).values(), "isolated": isolated}
    except UserError:
        return gr.skip()
