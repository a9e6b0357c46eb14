"""Presets: every file that ships is proven, and a bad one is told by its file and its value."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_ui import presets
from qlora_ui.config import RunConfig
from qlora_ui.data import sources
from qlora_ui.errors import UserError


def refusal(name: str, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        presets.load(name, folder)
    assert caught.value.field == "preset"
    return str(caught.value)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_that_ships_is_valid_and_its_data_can_be_had(name: str) -> None:
    preset = presets.load(name)
    assert preset.name == preset.config.preset == name
    assert preset.title
    assert preset.about.endswith(".")
    assert RunConfig.from_dict(preset.config.to_dict()) == preset.config
    if preset.config.data.data:
        sources.check(preset.config.data.data)


def test_the_starter_preset_ships() -> None:
    assert "starter" in presets.names()


def test_settings_of_the_file_are_on_top_of_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "title: Mine\nabout: Ünë.\nsettings: {lora_r: 8, learning_rate: 1e-4, double_quant: off}\n", "utf-8"
    )
    preset = presets.load("mine", tmp_path)
    assert (preset.title, preset.about) == ("Mine", "Ünë.")
    changed = {"lora_r": 8, "learning_rate": 1e-4, "double_quant": False}
    assert preset.config.values() == {**RunConfig().values(), **changed}
    assert presets.names(tmp_path) == ["mine"]


def test_what_is_dumped_is_read_again_with_every_setting() -> None:
    config = presets.load("starter").config.with_values({"lora_r": 32, "chat_template": "{{ 'ä: #' }}\n", "data": "uploads/x.json"})
    read = presets.parse(presets.dump(config, title="mine").encode(), "mine.yaml")
    assert (read.name, read.title, read.config) == ("starter", "mine", config)
    with pytest.raises(UserError, match=r"^mine.yaml: .*lora_r"):
        presets.parse(b"title: x\nabout: x\nsettings: {lora_r: -1}", "mine.yaml")


@pytest.mark.parametrize("name", ["nope", "../mine", "mine.yaml", "", "/etc/passwd", "mine/../mine"])
def test_an_unknown_name_is_refused_with_those_there_are(tmp_path: Path, name: str) -> None:
    (tmp_path / "presets").mkdir()
    for file in (tmp_path / "mine.yaml", tmp_path / "presets" / "other.yaml"):
        file.write_text("title: a\nabout: a\nsettings: {}\n")
    assert refusal(name, tmp_path / "presets") == f"There is no preset {name!r}. Presets: other."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("title: a\nabout: b\nsettings: {lora_r: 0}", "Preset mine.yaml: lora_r is 0: it must be a whole number from 1 to 512."),
        ("title: a\nabout: b\nsettings: {lora: 8}", "Preset mine.yaml: There is no setting 'lora'. Did you mean lora_r?"),
        ("title: a\nabout: b\nsettings: {lora_r: true}", "Preset mine.yaml: lora_r is true: it must be a whole number"),
        ("title: a\nsettings: {}", "Preset mine.yaml cannot be read: it needs title, about and settings."),
        ("title: a\nabout: b\nsettings: 3", "Preset mine.yaml cannot be read: "),
        ("title: a\nabout: b\nsettings: [lora_r]", "Preset mine.yaml cannot be read: "),
        ("title: a\nabout: b\nsettings:", "Preset mine.yaml cannot be read: "),
        ("title: a\nabout: b\nsettings: {1: 2}", "Preset mine.yaml: There is no setting '1'."),
        ("title: a\nabout: b\nsettings: {model: {a: b}}", "Preset mine.yaml: model is several values: it must be one."),
        ("title: a\nabout: b\nsettings: {lora_r: [8, 16]}", "Preset mine.yaml: lora_r is several values: it must be a whole number"),
        ("title: a\nabout: b\nsettings: {model: 2026-99-01}", "Preset mine.yaml cannot be read: it is no YAML (month must be"),
        ("[" * 5000, "Preset mine.yaml cannot be read: it is nested too deeply."),
        ("- a", "Preset mine.yaml cannot be read: "),
        ("", "Preset mine.yaml cannot be read: "),
        ("a: [", "Preset mine.yaml cannot be read: "),
        ("a: !!python/object:os.system {}", "Preset mine.yaml cannot be read: "),
        (b"title: \xff", "Preset mine.yaml cannot be read: "),
    ],
)
def test_a_bad_file_is_told_by_its_name_and_its_value(tmp_path: Path, content: str | bytes, said: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    assert refusal("mine", tmp_path).startswith(said)
