"""Runs of earlier days: their config still loads, or says in a sentence why not."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError

# As the app wrote it when version 1 had fewer settings. Literal, because what is written is what must be read.
FIRST: dict[str, Any] = {
    "version": 1,
    "preset": "starter",
    "model": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "main"},
    "quantization": {"quant_type": "fp4", "double_quant": False, "compute_dtype": "float32"},
    "adapter": {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "data": {
        "data": "bundled:guanaco-starter",
        "prompt_format": "chatml",
        "train_on": "last",
        "max_seq_len": 256,
        "held_out_share": 0.06,
    },
    "optimization": {
        "learning_rate": 0.0005,
        "num_train_epochs": 1.25,
        "max_steps": 0,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.03,
        "optimizer": "paged_adamw_32bit",
        "adam_beta2": 0.999,
        "max_grad_norm": 0.3,
        "weight_decay": 0.0,
        "gradient_checkpointing": True,
        "seed": 7,
    },
    "schedule": {"eval_steps": 20, "save_steps": 20, "save_total_limit": 2},
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
    "created": 1795000000.0,
    "model_origin": "already in the workspace",
}


def test_a_config_from_before_todays_settings_loads_with_their_defaults() -> None:
    config, default = RunConfig.from_dict(FIRST), RunConfig()
    assert config.preset == "starter"
    assert (config.quantization.quant_type, config.data.train_on, config.optimization.seed) == ("fp4", "last", 7)
    assert (config.data.long_rows, config.data.data_format, config.data.columns) == (
        default.data.long_rows,
        default.data.data_format,
        default.data.columns,
    )
    assert config.model.trust_remote_code is False
    assert RunConfig.from_dict(config.to_dict()) == config


def test_a_config_with_a_whole_part_missing_loads_with_its_defaults() -> None:
    without = {key: value for key, value in FIRST.items() if key != "schedule"}
    assert RunConfig.from_dict(without).schedule == RunConfig().schedule


def test_settings_of_a_newer_app_are_refused_by_their_names() -> None:
    newer = {**FIRST, "data": {**FIRST["data"], "moon_phase": 3}, "adapter": {**FIRST["adapter"], "colour": "red"}}
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(newer)
    assert str(caught.value) == "This run's config has settings that this app does not know: colour, moon_phase. Use the app that wrote it."


@pytest.mark.parametrize("part", [3, None, ["lora_r"]])
def test_a_part_that_holds_no_settings_is_one_sentence(part: Any) -> None:
    with pytest.raises(UserError, match="This run's config is damaged: adapter holds no settings"):
        RunConfig.from_dict({**FIRST, "adapter": part})


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused_with_what_this_app_reads(version: Any) -> None:
    with pytest.raises(UserError, match=r"has version .*; this app reads version 1\. Use the app that wrote it"):
        RunConfig.from_dict({**FIRST, "version": version})
