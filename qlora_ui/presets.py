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
    path = folder / f"{name}.yaml"
    if name not in names(folder):
        raise UserError(f"There is no preset {name!r}. Presets: {', '.join(names(folder))}.", field="preset")
    try:
        written = yaml.safe_load(path.read_text("utf-8"))
        config = RunConfig(preset=name).with_values(written["settings"])
        return Preset(name=name, title=written["title"], about=written["about"], config=config)
    except UserError as error:
        raise UserError(f"Preset {path.name}: {error}", field="preset") from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"Preset {path.name} cannot be read: it needs title, about and settings ({error}).", field="preset") from error


def names(folder: Path = FOLDER) -> list[str]:
    """All presets' names; `starter`-like small ones first is the file order, so files are simply sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))
