"""The paper's models are presets with the paper's numbers, and every preset is one that could be started."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from qlora_ui import presets
from qlora_ui.config import KNOBS

# QLoRA, arXiv 2305.14314, and the scripts of artidoro/qlora; dropout as in the scripts.
EVERYWHERE = {
    "quant_type": "nf4",
    "double_quant": True,
    "compute_dtype": "bfloat16",
    "lora_r": 64,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "lr_scheduler": "constant",
    "warmup_ratio": 0.03,
    "optimizer": "paged_adamw_32bit",
    "adam_beta2": 0.999,
    "max_grad_norm": 0.3,
    "weight_decay": 0.0,
    "group_by_length": True,
    "max_steps": 1875,
    "max_seq_len": 512,
    "data": "timdettmers/openassistant-guanaco",
    "held_out_split": "test",
    "prompt_format": "guanaco",
    "train_on": "everything",
}
EACH = {
    "guanaco-7b": {"model": "huggyllama/llama-7b", "lora_dropout": 0.1, "learning_rate": 2e-4},
    "guanaco-13b": {"model": "huggyllama/llama-13b", "lora_dropout": 0.05, "learning_rate": 2e-4},
    "guanaco-33b": {"model": "huggyllama/llama-30b", "lora_dropout": 0.05, "learning_rate": 1e-4},
    "guanaco-65b": {"model": "huggyllama/llama-65b", "lora_dropout": 0.05, "learning_rate": 1e-4},
    "llama2-guanaco-7b": {"model": "meta-llama/Llama-2-7b-hf", "lora_dropout": 0.1, "learning_rate": 2e-4},
}


def written(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((presets.FOLDER / f"{name}.yaml").read_text("utf-8"))["settings"]
    return settings


@pytest.mark.parametrize("name", EACH)
def test_a_preset_of_the_paper_has_its_numbers_in_the_file_itself(name: str) -> None:
    values = presets.load(name).config.values()
    wanted = {**EVERYWHERE, **EACH[name]}
    assert {knob: values[knob] for knob in wanted} == wanted
    assert wanted.keys() <= written(name).keys()  # not left to a default, which may change
    assert presets.load(name).config.effective_batch == 16


@pytest.mark.parametrize("name", EACH)
def test_each_value_of_a_paper_preset_names_its_source(name: str) -> None:
    lines = (presets.FOLDER / f"{name}.yaml").read_text("utf-8").partition("settings:")[2].splitlines()
    block = ""  # a comment on a line of its own holds up to the next empty line
    for line in lines:
        if line.strip().startswith("#"):
            block = line
        elif not line.strip():
            block = ""
        else:
            assert re.search(r"# \S", line) or block, line


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_can_be_started_as_it_is_and_runs_no_strangers_code(name: str) -> None:
    preset = presets.load(name)
    assert preset.config.data.data
    assert not preset.config.model.trust_remote_code
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", preset.config.model.model)
    assert set(written(name)) <= set(KNOBS)


@pytest.mark.parametrize("billions", [1, 3, 7, 8, 13, 32, 33, 65, 70])
def test_there_is_a_preset_of_each_usual_size(billions: int) -> None:
    assert [name for name in presets.names() if re.search(rf"(?<!\d){billions}b", name)]


def test_the_titles_are_different() -> None:
    titles = [presets.load(name).title for name in presets.names()]
    assert len(set(titles)) == len(titles)
