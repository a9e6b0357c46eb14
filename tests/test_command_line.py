"""The form's settings as a command: what it says is what the command line reads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from qlora_ui import cli, presets
from qlora_ui.command_line import train_command
from qlora_ui.config import RunConfig
from qlora_ui.runs import DEFAULT_HOME


def read(command: str) -> tuple[Path | None, RunConfig]:
    python, dash_m, package, *words = shlex.split(command)
    assert (python, dash_m, package) == ("python", "-m", "qlora_ui")
    arguments = cli.parser().parse_args(words)
    return arguments.home and Path(arguments.home), cli.read_config(arguments)


@pytest.mark.parametrize("preset", presets.names())
def test_a_preset_as_it_is_needs_nothing_but_its_name(preset: str) -> None:
    command = train_command(presets.load(preset).config, DEFAULT_HOME)
    assert command == f"python -m qlora_ui train --preset {preset}"


@pytest.mark.parametrize(
    "values",
    [
        {"data": "/rows/of mine.json", "lora_r": 8, "learning_rate": 1e-5, "use_dora": True, "double_quant": False},
        {"data": "", "sample_prompts": 'Who are you?\nIt\'s "you"', "columns": "output=the answer"},
        {"prompt_format": "custom", "chat_template": "{% for m in messages %}{{ m['content'] }}$HOME{% endfor %}", "model": "tiny"},
    ],
)
def test_what_differs_from_the_preset_is_read_back_as_it_was(values: dict[str, Any], tmp_path: Path) -> None:
    config = presets.load("starter").config.with_values(values)
    assert read(train_command(config, tmp_path)) == (tmp_path, config)


def test_settings_of_a_preset_that_is_gone_are_told_against_the_first() -> None:
    config = RunConfig(preset="gone")
    home, again = read(train_command(config, DEFAULT_HOME))
    assert home is None
    assert again.values() == config.values()
