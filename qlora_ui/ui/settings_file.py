"""Settings as a file, saved from the form and loaded into it, and as a command. Knows nothing of runs or torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui import presets
from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.ui import downloads, form, markup

MOST_BYTES = 1_000_000
PRESS = "(said) => { if (!said) setTimeout(() => document.querySelector('#settings-file').click(), 100); }"


@dataclass(frozen=True, kw_only=True)
class SettingsFile:
    """The two buttons, the hidden one that hands over what was saved, and the command that trains with the same settings."""

    load: gr.UploadButton
    save: gr.Button
    file: gr.DownloadButton
    command: gr.Textbox


def build() -> SettingsFile:
    with gr.Row(elem_id="settings-as-file"):
        load = gr.UploadButton("Load settings", file_types=[".yaml", ".yml"], size="sm", elem_id="settings-load")
        save = gr.Button("Save settings", size="sm", elem_id="settings-save")
        file = gr.DownloadButton("Settings", visible="hidden", elem_id="settings-file")
    with gr.Accordion("As a command", open=False, elem_id="settings-as-command"):
        command = gr.Textbox(
            label="Trains with these settings, without a browser",
            lines=2,
            max_lines=8,
            interactive=False,
            buttons=["copy"],
            elem_id="settings-command",
        )
    return SettingsFile(load=load, save=save, file=file, command=command)


def saved(names: list[str], preset: str, data: str, *values: Any) -> list[Any]:
    """The form's settings as a file for the hidden button, or why there is none."""
    try:
        return ["", gr.update(value=written(form.read(preset, data, names, values), f"{preset}-settings"))]
    except UserError as error:
        return [markup.error(str(error)), gr.skip()]


def written(config: RunConfig, name: str) -> str:
    """The path of a new file that holds them."""
    path = downloads.fresh(f"{name}.yaml")
    path.write_text(presets.dump(config, title=name), "utf-8")
    return str(path)


def read(path: str) -> RunConfig:
    """What a file says. Raises UserError when it cannot be read or a value is wrong."""
    file = Path(path)
    if file.stat().st_size > MOST_BYTES:
        raise UserError(f"{file.name} has {file.stat().st_size:,} bytes, more than settings ever need. Choose a file that was saved here.")
    return presets.parse(file.read_bytes(), file.name).config
