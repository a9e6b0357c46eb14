"""Presets: named settings in `presets/*.yaml`. A preset is data; no code knows one's name. Knows nothing of torch or Gradio."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "presets"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One file: a title, one sentence on what it is for and needs, and the resolved config."""

    name: str
    title: str
    about: str
    config: RunConfig


def load(name: str, folder: Path = FOLDER) -> Preset:
    """Read and validate a preset. Raises UserError for an unknown name or a bad value, naming file and value."""
    if name not in names(folder):
        raise UserError(f"There is no preset {name!r}. Presets: {', '.join(names(folder))}.", field="preset")
    return parse((folder / f"{name}.yaml").read_bytes(), f"Preset {name}.yaml", name)


def parse(text: bytes, called: str, name: str = "") -> Preset:
    """A preset's file, read and validated. What a person saved says itself which preset it was made from. Raises UserError."""
    try:
        written = yaml.safe_load(text.decode("utf-8"))
    except RecursionError as error:
        raise UserError(f"{called} cannot be read: it is nested too deeply. Settings are one level deep.", field="preset") from error
    except (yaml.YAMLError, ValueError) as error:  # of an impossible date, or of bytes that are no text
        raise UserError(f"{called} cannot be read: it is no YAML ({' '.join(str(error).split())[:300]}).", field="preset") from error
    if not isinstance(written, dict) or not {"title", "about"} <= written.keys() or not isinstance(written.get("settings"), dict):
        raise UserError(f"{called} cannot be read: it needs title, about and settings.", field="preset")
    name = name or str(written.get("preset", ""))
    try:
        config = RunConfig(preset=name).with_values({str(knob): value for knob, value in written["settings"].items()})
    except UserError as error:
        raise UserError(f"{called}: {error}", field="preset") from error
    return Preset(name=name, title=str(written["title"]), about=str(written["about"]), config=config)


def dump(config: RunConfig, title: str, about: str = "Saved from the form.") -> str:
    """Inverse of `parse`: every setting, so that the file means the same when a default changes."""
    written = {"title": title, "about": about, "preset": config.preset, "settings": config.values()}
    return yaml.safe_dump(written, sort_keys=False, allow_unicode=True)


def names(folder: Path = FOLDER) -> list[str]:
    """All presets' names; `starter`-like small ones first is the file order, so files are simply sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))
