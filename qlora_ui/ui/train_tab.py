"""The Train tab: what a run is told, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from qlora_ui import presets
from qlora_ui.config import RunConfig
from qlora_ui.data import checks, sources
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.ui import form, live, markup
from qlora_ui.ui.plots import loss_plot

if TYPE_CHECKING:
    from qlora_ui.engine.preview import Preview

FIRST_PRESET = "starter"


def first_preset() -> str:
    """The preset that a first visit finds filled in."""
    return FIRST_PRESET if FIRST_PRESET in presets.names() else presets.names()[0]


@dataclass(frozen=True, kw_only=True)
class TrainTab:
    """The components that other tabs and the timer are wired to."""

    preset: gr.Dropdown
    data_line: gr.HTML
    plan: gr.HTML
    names: list[str]
    fields: list[gr.components.Component]
    start: gr.Button
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
            preset = gr.Dropdown(choices, value=first.name, label="Preset", info=first.about, elem_id="preset-select")
            model = gr.Dropdown(
                form.MODEL_CHOICES, value=first.config.model.model, allow_custom_value=True, label="Model", elem_id="model-input"
            )
            data_line = gr.HTML(elem_id="train-data")
            fields: dict[str, gr.components.Component] = {"model": model}
            fields |= form.main_fields(first.config)
            fields |= form.advanced_fields(first.config)
            with gr.Column(elem_id="start-box"):
                plan = gr.HTML(elem_id="train-plan")
                message = gr.HTML(elem_id="start-message")
                start = gr.Button("Start training", variant="primary", size="lg", elem_id="start-button")
        with gr.Column(scale=3, min_width=340, elem_id="train-panel"):
            tiles = gr.HTML(markup.tiles(None), js_on_load=live.SHOW_NEWS, elem_id="tiles")
            plot = loss_plot(curves)
            log = gr.HTML(markup.log(), js_on_load=live.SHOW_NEWS, elem_id="log-box")

    return TrainTab(
        preset=preset,
        data_line=data_line,
        plan=plan,
        names=list(fields),
        fields=list(fields.values()),
        start=start,
        message=message,
        tiles=tiles,
        plot=plot,
        log=log,
    )


def choose_preset(names: list[str], preset: str) -> list[Any]:
    chosen = presets.load(preset)
    return [gr.update(info=chosen.about), *form.filled(names, chosen.config.values())]


def start(services: Services, names: list[str], preset: str, data: str, *values: Any) -> list[Any]:
    """Start, or say why not: at the field that is wrong (the plan above the button says it too), else above the button."""
    try:
        config = form.read(preset, data, names, values)
    except UserError as error:
        return ["", *form.marked(names, error)]
    try:
        services.check_data(config)
        services.start(config)
    except UserError as error:
        return [markup.error(str(error)), *form.marked(names, error)]
    return ["", *form.marked(names, None)]


def describe_plan(services: Services, names: list[str], preset: str, data: str, *values: Any) -> tuple[str, str, str]:
    """What is chosen and what Start will do, or what is still wrong with it; what Start said before is over."""
    if not data:
        return markup.note("No data set is chosen. Choose one on the Data tab."), "", ""
    chosen = f"Data: {sources.shown(data)}"
    try:
        config = form.read(preset, data, names, values)
        seen = services.inspector.known(config)
        if seen is None or seen.data is None:
            return markup.note(chosen), "", ""
        chosen += f", {len(seen.data.conversations):,} rows"
        return markup.note(chosen), markup.note(plan_words(config, seen.data, seen.preview)), ""
    except UserError as error:
        return markup.note(chosen), markup.error(str(error)), ""


def draft(names: list[str], preset: str, data: str, *values: Any) -> Any:
    """What is set, for the person's browser to keep. What is half typed leaves the last draft that was whole."""
    try:
        return {"preset": preset, "values": form.read(preset, data, names, values).values()}
    except UserError:
        return gr.skip()


def plan_words(config: RunConfig, rows: checks.DataSet, preview: Preview | None) -> str:
    """Steps, batch and passes, as the trainer will count them; before the tokens are counted, as if every row were short enough."""
    held_out = checks.held_out_indices(rows, config.data, config.optimization.seed)
    made = preview.sequences(config.data.max_seq_len, config.data.long_rows) if preview else [1] * len(rows.conversations)
    measured = sum(made[index] for index in held_out) or len(rows.held_out)
    trained = sum(made) - sum(made[index] for index in held_out)
    if not trained:
        raise UserError("No row is left to train on within the max length.", field="max_seq_len")
    steps = config.total_steps(trained)
    passes = steps * config.effective_batch / trained
    return (
        f"{steps:,} steps of {config.effective_batch} rows ({config.optimization.micro_batch_size} × "
        f"{config.optimization.gradient_accumulation_steps}), {passes:.3g} passes over {trained:,} rows; "
        f"{measured:,} rows held out."
    )
