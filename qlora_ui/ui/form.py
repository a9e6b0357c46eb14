"""The form, generated from the knobs of `config.py`. Knows nothing of any single hyperparameter but where it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui import presets
from qlora_ui.config import KNOBS, STARTER_MODEL, RunConfig
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
# What a preset says of its data is chosen with the data: another preset leaves it alone, so it is no difference.
OF_THE_DATA = ("data_format", "columns", "held_out_split")
SCRIPT = Path(__file__).with_name("form.js")
LINE = '<div class="differences" role="status">All settings are the preset\'s.</div>'
"""The line that the script writes into: how many settings differ from the preset, and which."""


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
    with gr.Accordion("Advanced", open=False, elem_id="advanced-settings"):
        for section, title in GROUPS.items():
            knobs = [k for k in KNOBS.values() if k.section == section and not k.main and k.name not in ELSEWHERE]
            gr.Markdown(f"#### {title}")
            for knob in knobs:
                made[knob.name] = field(knob, config.values()[knob.name])
    return made


def read(preset: str, data: str, names: list[str], values: tuple[Any, ...]) -> RunConfig:
    """The config that the form says. Raises UserError naming the field."""
    return presets.load(preset).config.with_values({**dict(zip(names, values, strict=True)), "data": data})


# What the page's own script says at the fields --------------------------------------------------------------------------------


def declarations(names: list[str]) -> dict[str, Any]:
    """How these settings are declared and what each preset says of them, for the script. A preset's values are those not the default."""
    defaults = {name: KNOBS[name].default for name in names}
    said = {name: presets.load(name).config.values() for name in presets.names()}
    return {
        "names": names,
        "knobs": {name: declaration(KNOBS[name]) for name in names},
        "defaults": defaults,
        "presets": {preset: {name: own[name] for name in names if own[name] != defaults[name]} for preset, own in said.items()},
        "data_tab": [name for name in ELSEWHERE if name != "model"],
    }


def declaration(knob: Knob) -> dict[str, Any]:
    """What the script needs of one: `requirement` is empty where there is nothing to check while a person types."""
    told: dict[str, Any] = {"label": knob.label, "of_preset": knob.name not in OF_THE_DATA}
    if knob.kind in (int, float):
        told |= {"whole": knob.kind is int, "low": knob.low, "high": knob.high, "requirement": knob.requirement()}
    return told


def build_marks(names: list[str], preset: gr.Dropdown, fields: list[Any], changes: list[Any]) -> None:
    """The hidden component that marks fields. No event of it asks the server: it is told all values, and sets some of them back."""
    script = f"const declared = {json.dumps(declarations(names))};\n{SCRIPT.read_text('utf-8')}"
    marks = gr.HTML("", html_template="", js_on_load=script, visible="hidden", elem_id="form-values")
    told = "(...values) => JSON.stringify(values)"
    gr.on(changes, None, [preset, *fields], [marks], js=told, trigger_mode="multiple", api_visibility="private")
    marks.submit(None, fields, fields, js="(...values) => window.formReset(values)", api_visibility="private")
