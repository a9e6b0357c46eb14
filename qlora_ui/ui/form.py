"""The form, generated from the knobs of `config.py`. Knows nothing of any single hyperparameter but where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from qlora_ui import presets
from qlora_ui.config import KNOBS, STARTER_MODEL, RunConfig
from qlora_ui.errors import UserError
from qlora_ui.knobs import Knob

# The model has a field of its own; what rows are and how they are read is set on the Data tab, where its effect shows.
ELSEWHERE = ("model", "data", "data_format", "columns", "prompt_format", "chat_template", "long_rows", "held_out_split")
GROUPS = {
    "quantization": "Quantization",
    "adapter": "Adapter",
    "data": "Data",
    "optimization": "Optimization",
    "schedule": "Measuring and saving",
    "model": "Model",
}
MODEL_CHOICES = [("SmolLM2-135M-Instruct (starter)", STARTER_MODEL)]


def field(knob: Knob, value: Any, elem_id: str = "") -> gr.components.Component:
    """The component that suits a knob's type. Bounds are checked by the config, whose sentences are better than a browser's."""
    common = {"label": knob.title, "info": knob.help, "elem_id": elem_id or f"field-{knob.name}", "value": value}
    if knob.kind is bool:
        return gr.Checkbox(**common)
    if knob.choices:
        return gr.Dropdown(choices=list(knob.choices), **common)
    if knob.kind in (int, float):
        return gr.Number(step=1 if knob.kind is int else (knob.default or 0.1) / 10, **common)  # of the arrow keys
    return gr.Textbox(**common)


def main_fields(config: RunConfig) -> dict[str, gr.components.Component]:
    """The settings that matter, two in a row."""
    knobs = [knob for knob in KNOBS.values() if knob.main and knob.name not in ELSEWHERE]
    made = {}
    for left in range(0, len(knobs), 2):
        with gr.Row(equal_height=True):
            for knob in knobs[left : left + 2]:
                made[knob.name] = field(knob, config.values()[knob.name])
    return made


def advanced_fields(config: RunConfig) -> dict[str, gr.components.Component]:
    """All others, in named groups."""
    made = {}
    with gr.Accordion("Advanced", open=False):
        for section, title in GROUPS.items():
            knobs = [k for k in KNOBS.values() if k.section == section and not k.main and k.name not in ELSEWHERE]
            gr.Markdown(f"#### {title}")
            for knob in knobs:
                made[knob.name] = field(knob, config.values()[knob.name])
    return made


def read(preset: str, data: str, names: list[str], values: tuple[Any, ...]) -> RunConfig:
    """The config that the form says. Raises UserError naming the field."""
    return presets.load(preset).config.with_values({**dict(zip(names, values, strict=True)), "data": data})


def filled(names: list[str], config: Mapping[str, Any]) -> list[Any]:
    """Updates that show these values and clear all marks."""
    return [gr.update(value=config[name], info=None if name == "model" else KNOBS[name].help, elem_classes=[]) for name in names]


def marked(names: list[str], error: UserError | None) -> list[Any]:
    """Updates that put the error's sentence at the field that caused it, and clear the others."""
    blamed = error.field if error else ""
    return [
        gr.update(info=str(error), elem_classes=["blamed"])
        if name == blamed
        else gr.update(info=None if name == "model" else KNOBS[name].help, elem_classes=[])
        for name in names
    ]
