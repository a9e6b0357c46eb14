"""Every knob from its one declaration: what it takes, what it refuses and in which words."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_ui.config import KNOBS, PARTS, VERSION, RunConfig, find_knob
from qlora_ui.errors import UserError
from qlora_ui.knobs import Knob

NUMBERS = [name for name, knob in KNOBS.items() if knob.kind in (int, float)]
CHOICES = [name for name, knob in KNOBS.items() if knob.choices]
GRAMMAR = {"layers_to_skip": ("", "0", "1, 3", "0-2,7"), "report_to": ("", "none", "wandb, tensorboard")}  # text that is not free
BOOLEANS = [name for name, knob in KNOBS.items() if knob.kind is bool]


def refusal(name: str, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        RunConfig().with_values({name: value})
    assert caught.value.field == name
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values_of(knob: Knob) -> st.SearchStrategy[Any]:
    if knob.choices:
        return st.sampled_from(knob.choices)
    if knob.kind is bool:
        return st.booleans()
    if knob.kind is str:
        if knob.name in GRAMMAR:
            return st.sampled_from(GRAMMAR[knob.name])
        written = st.text().map(str.strip)
        return written.filter(bool) if knob.name == "model" else written
    assert knob.low is not None
    assert knob.high is not None
    if knob.kind is int:
        return st.integers(int(knob.low), int(knob.high))
    return st.floats(knob.low, knob.high)


def that_agree(values: dict[str, Any]) -> dict[str, Any]:
    """What only goes together is made so."""
    if values.get("prompt_format") == "custom":
        values = {**values, "chat_template": "x"}
    if values.get("quant_bits") == "8" and "use_dora" in values:
        values = {**values, "use_dora": False}
    if values.get("init_adapter") and "init_lora_weights" in values:
        values = {**values, "init_lora_weights": "default"}
    if values.get("init_adapter") and "new_tokens" in values:
        values = {**values, "new_tokens": ""}
    if values.get("keep") == "best" or values.get("early_stopping_patience"):
        values = {**values, "held_out_rows": 1}
    return values


any_config = st.fixed_dictionaries({name: values_of(knob) for name, knob in KNOBS.items()}).map(that_agree)


@pytest.mark.parametrize("name", KNOBS)
def test_a_default_is_allowed_and_reads_back_from_its_text(name: str) -> None:
    knob = KNOBS[name]
    assert knob.parse(knob.default) == knob.default
    assert knob.parse(str(knob.default)) == knob.default
    assert RunConfig().values()[name] == knob.default
    assert knob.label
    assert knob.help.endswith(".")


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_be_its_bounds_and_nothing_beyond(name: str) -> None:
    knob = KNOBS[name]
    assert knob.low is not None
    assert knob.high is not None
    for bound in (knob.low, knob.high):
        assert RunConfig().with_values({name: bound}).values()[name] == bound
        assert type(RunConfig().with_values({name: str(bound)}).values()[name]) is knob.kind
    beyond = 1 if knob.kind is int else 1e-9
    for value in (knob.kind(knob.low - beyond), knob.kind(knob.high + beyond)):
        said = refusal(name, value)
        assert said == f"{name} is {value}: it must be {knob.requirement()}."
        for bound in (knob.low, knob.high):
            assert (f"{bound:,.0f}" if knob.kind is int else f"{bound:g}") in said


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["", None, "many", "1,5", float("nan"), float("inf"), "-inf", 10**400, "9" * 400, True, [], {}])
def test_what_is_no_number_is_refused_in_words(name: str, value: Any) -> None:
    said = refusal(name, value)
    assert said.startswith(f"{name} is ")
    shown = "empty" if value in ("", None) else "true" if value is True else "several values" if value in ([], {}) else repr(value)
    assert f"is {shown}: " in said
    assert KNOBS[name].requirement() in said


@pytest.mark.parametrize("name", [name for name in NUMBERS if KNOBS[name].kind is int])
def test_a_fraction_is_no_whole_number(name: str) -> None:
    assert "a whole number" in refusal(name, 1.5)
    assert RunConfig().with_values({name: "16.0"}).values()[name] == 16


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_outside_the_list_is_refused_with_the_list(name: str) -> None:
    for choice in KNOBS[name].choices:
        assert RunConfig().with_values({name: f" {choice} ", "chat_template": "x"}).values()[name] == choice
    assert refusal(name, "no such") == f"{name} is 'no such': use one of {', '.join(KNOBS[name].choices)}."


@pytest.mark.parametrize("name", BOOLEANS)
def test_a_switch_reads_the_usual_words(name: str) -> None:
    for word, meant in {"true": True, "YES": True, "1": True, "on": True, "False": False, "no": False, "0": False, " off ": False}.items():
        assert RunConfig().with_values({name: word}).values()[name] is meant
    assert refusal(name, "maybe") == f"{name} is 'maybe': use true or false."


def test_a_prompt_format_of_ones_own_needs_its_template() -> None:
    with pytest.raises(UserError, match="prompt_format is custom, but there is no chat_template") as caught:
        RunConfig().with_values({"prompt_format": "custom"})
    assert caught.value.field == "chat_template"


def test_an_empty_field_of_text_is_empty_text() -> None:
    assert RunConfig().with_values({"data": None}).data.data == ""


def test_the_parts_check_themselves_however_they_are_made() -> None:
    for part in PARTS.values():
        assert part() == part()
    with pytest.raises(UserError, match="lora_r is 0"):
        PARTS["adapter"](lora_r=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().preset = "other"  # type: ignore[misc]


@given(any_config)
def test_a_config_comes_back_from_its_file_form(values: dict[str, Any]) -> None:
    config = RunConfig(preset="a").with_values(values)
    assert config.values() == values
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert RunConfig.from_dict({**config.to_dict(), "versions": {"torch": "2"}, "created": 1.0}) == config


@given(st.fixed_dictionaries({}, optional={name: values_of(knob) for name, knob in KNOBS.items()}).map(that_agree))
def test_setting_some_values_leaves_the_others(values: dict[str, Any]) -> None:
    assert RunConfig().with_values(values).values() == {**RunConfig().values(), **values}


@pytest.mark.parametrize(
    ("written", "meant"), [("lora_rank", "lora_r"), ("max_seq_length", "max_seq_len"), ("learningrate", "learning_rate"), ("Seed", "seed")]
)
def test_an_unknown_name_suggests_the_nearest(written: str, meant: str) -> None:
    assert refusal(written, 1) == f"There is no setting {written!r}. Did you mean {meant}?"


def test_a_name_that_is_near_to_nothing_points_to_the_list() -> None:
    assert refusal("xyzzy", 1) == "There is no setting 'xyzzy'. The README lists all settings."
    assert find_knob("seed") is KNOBS["seed"]


@pytest.mark.parametrize("version", [VERSION + 1, "2", None, 0])
def test_another_version_is_refused_with_both_versions(version: Any) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict({**RunConfig().to_dict(), "version": version})
    assert repr(version) in str(caught.value)
    assert f"reads version {VERSION}" in str(caught.value)


def test_the_effective_batch_is_micro_batch_times_accumulation() -> None:
    assert RunConfig().with_values({"micro_batch_size": 3, "gradient_accumulation_steps": 5}).effective_batch == 15


def test_no_model_is_refused_with_what_to_give() -> None:
    with pytest.raises(UserError, match=r"No model is chosen\. Give a Hugging Face id") as caught:
        RunConfig().with_values({"model": "  "})
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("written", "meant"), [("", []), ("0", [0]), (" 3, 1 ,", [1, 3]), ("20-23", [20, 21, 22, 23]), ("0-2,1,5-5", [0, 1, 2, 5])]
)
def test_layers_to_skip_are_numbers_and_ranges(written: str, meant: list[int]) -> None:
    assert RunConfig().with_values({"layers_to_skip": written}).adapter.skipped_layers() == meant


@pytest.mark.parametrize("written", ["first", "1-", "-1", "3-1", "1.5", "0-99999999999", "1;2"])
def test_layers_to_skip_that_are_neither_are_refused(written: str) -> None:
    assert refusal("layers_to_skip", written) == f"layers_to_skip has {written!r}: write numbers and ranges, as 0, 5, 20-23."


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "eva", "lora_ga", "orthogonal", "mica"])
def test_a_start_that_does_not_go_with_a_quantized_base_is_refused_with_its_reason(start: str) -> None:
    said = refusal("init_lora_weights", start)
    assert said.startswith(f"init_lora_weights is {start!r}, but ")
    assert said.endswith(". Use default or gaussian.")
    assert len(said) > 90


def test_a_start_and_an_adapter_to_start_from_contradict_each_other() -> None:
    with pytest.raises(UserError, match="init_lora_weights is 'gaussian', but init_adapter is set") as caught:
        RunConfig().with_values({"init_lora_weights": "gaussian", "init_adapter": "some-run"})
    assert caught.value.field == "init_lora_weights"


def test_dora_and_eight_bits_are_refused_together() -> None:
    with pytest.raises(UserError, match="use_dora is true, but quant_bits is 8") as caught:
        RunConfig().with_values({"quant_bits": 8, "use_dora": True})
    assert caught.value.field == "use_dora"


def test_alpha_is_its_own_number_or_a_multiple_of_the_rank() -> None:
    assert RunConfig().with_values({"lora_r": 8, "lora_alpha": 32}).adapter.alpha == 32
    assert RunConfig().with_values({"lora_r": 8, "lora_alpha": 32, "lora_alpha_ratio": 2}).adapter.alpha == 16
    assert RunConfig().with_values({"lora_r": 3, "lora_alpha_ratio": 0.5}).adapter.alpha == 1.5
