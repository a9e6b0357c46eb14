"""A run's settings as the command that trains with them, the inverse of what the command line reads. Knows nothing of disk or Gradio."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from qlora_ui import presets
from qlora_ui.config import RunConfig
from qlora_ui.runs import DEFAULT_HOME

PRESET = "starter"  # what the command line begins with where none is named


def train_command(config: RunConfig, home: Path) -> str:
    """Preset, data, and what differs from the preset: whatever the preset says of the rest is not repeated."""
    preset = config.preset if config.preset in presets.names() else PRESET
    before = presets.load(preset).config.values()
    changed = {name: value for name, value in config.values().items() if value != before[name]}
    words = ["python", "-m", "qlora_ui", *([] if home == DEFAULT_HOME else ["--home", str(home)]), "train", "--preset", preset]
    if "data" in changed:
        words += ["--data", changed.pop("data")]
    for name, value in changed.items():
        words += ["--set", f"{name}={written(value)}"]
    return shlex.join(words)


def written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
