"""The planners of the Train tab: what they say of memory and time, and that they ask nobody outside this machine by themselves."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
from training import Watched

from qlora_ui import presets, services
from qlora_ui.config import RunConfig
from qlora_ui.data.checks import held_out_indices
from qlora_ui.engine.hardware import Hardware
from qlora_ui.errors import UserError
from qlora_ui.events import Planned
from qlora_ui.inspection import Inspector
from qlora_ui.memory.devices import CARDS, GIB
from qlora_ui.memory.forecast import Terms
from qlora_ui.memory.measured import Measured
from qlora_ui.progress import Progress
from qlora_ui.runs import Workspace
from qlora_ui.services import Services, WarmUp
from qlora_ui.time_plan import TimePlan, same_pace, time_plan
from qlora_ui.ui import planner

HARDWARE = Hardware(
    kind="cpu", name="x86", cores=2, memory_total_gib=8, memory_free_gib=4, compute_dtype="float32", reason="this is a test"
)


def over(workspace: Workspace, hardware: Hardware | None = HARDWARE) -> Services:
    built = services.build(workspace, WarmUp())
    return dataclasses.replace(built, hardware=lambda: hardware, device=lambda: hardware.device() if hardware else None)


def look(
    workspace: Workspace, card: str = planner.HERE, preset: str = "starter", ask_hub: bool = False, **values: Any
) -> tuple[str, str, bool]:
    verdict, bar, button, _ = planner.look(over(workspace), list(values), ask_hub, card, preset, "", *values.values())
    return verdict, bar, button["visible"]


@pytest.mark.parametrize("preset", presets.names())
def test_a_preset_is_planned_for_every_card(workspace: Workspace, preset: str) -> None:
    for card in (planner.HERE, *(card.name for card in CARDS)):
        verdict, bar, asks = look(workspace, card, preset)
        said = re.findall(r'data-verdict="([^"]+)"', verdict)[0]
        assert said in planner.VERDICT_WORDS
        widths = [float(width) for width in re.findall(r'<i class="\w+" style="width:([\d.]+)%"', bar)]
        assert len(widths) == len(dataclasses.fields(Terms))
        assert sum(widths) <= 100.1
        assert ('class="advice"' in bar) == (said != "fits")
        assert not asks


def test_the_bar_tells_in_words_and_in_a_table_what_it_shows(workspace: Workspace) -> None:
    _, bar, _ = look(workspace, "T4", "guanaco-7b")
    told = re.findall(r'aria-label="([^"]+)"', bar)[0]
    for field in dataclasses.fields(Terms):
        words = field.name.replace("_", " ")
        size = re.findall(rf"</i>{words}</th><td>([^<]+)</td>", bar)
        assert f"{words} {size[0]}" in told


def test_it_moves_with_every_field_and_says_the_one_change_that_would_make_it_fit(workspace: Workspace) -> None:
    _, before, _ = look(workspace, "T4", "guanaco-7b")
    verdict, after, _ = look(workspace, "T4", "guanaco-7b", gradient_checkpointing="off")
    assert before != after
    assert "Does not fit" in verdict
    advised = re.findall(r'class="advice">([^<]+)', after)[0]
    assert advised.startswith("Set gradient_checkpointing from off to on (slower by about a third): about ")


def test_a_compute_dtype_that_does_not_suit_the_device_is_told(workspace: Workspace) -> None:
    assert "T4 has no bfloat16 units" in look(workspace, "T4", "guanaco-7b")[1]
    assert "compute_dtype is float16, which needs a GPU" in look(workspace, compute_dtype="float16")[1]
    for card, preset in (("L4", "guanaco-7b"), ("T4", "colab-t4-7b"), (planner.HERE, "starter")):
        assert 'class="caution"' not in look(workspace, card, preset)[1]


def test_this_machine_is_planned_with_the_memory_that_is_free_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may have taken some since the app was started; what the app's own chat took, a training gets."""
    taken = iter([1.0, 3.0])
    monkeypatch.setattr("qlora_ui.engine.hardware.detect", lambda: HARDWARE)
    monkeypatch.setattr("qlora_ui.engine.hardware.memory_gib", lambda: next(taken))
    monkeypatch.setattr("qlora_ui.engine.hardware.free_memory_gib", lambda: 1.5)
    warm_up = WarmUp()
    warm_up._run()
    device = warm_up.device()
    assert device is not None
    assert device.memory_bytes == 3.5 * GIB


def test_before_the_machine_is_known_only_cards_are_planned_for(workspace: Workspace) -> None:
    for card, said in ((planner.HERE, "this machine is being looked at"), ("T4", "Fits")):
        verdict, *_ = planner.look(over(workspace, None), [], False, card, "starter", "")
        assert said in verdict


def test_what_no_reader_knows_is_counted_once_the_training_libraries_are_there(workspace: Workspace) -> None:
    architectures.build(workspace.models / "experts", "experts")
    for hardware, said in ((None, "this machine is being looked at"), (HARDWARE, "Fits")):
        verdict, *_ = planner.look(over(workspace, hardware), ["model"], False, "T4", "starter", "", "experts")
        assert said in verdict


def test_a_wrong_setting_is_waited_for_and_what_a_person_typed_is_text(workspace: Workspace) -> None:
    verdict, bar, _ = look(workspace, lora_r=0)
    assert "Memory is counted again when the settings are right." in verdict
    assert bar == ""
    verdict, bar, _ = look(workspace, model="<img src=x onerror=alert(1)>")
    assert "&lt;img" in verdict
    assert "<img" not in verdict + bar


def test_the_hub_is_asked_for_a_shape_only_at_a_persons_wish(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def from_hub(model: str, revision: str) -> Path:
        asked.append(model)
        raise UserError("The Hub could not be asked.", field="model")

    monkeypatch.setattr("qlora_ui.model_configs._from_hub", from_hub)
    verdict, _, offers = look(workspace, model="o/new")
    assert "The shape of o/new is not on this machine" in verdict
    assert offers
    assert asked == []
    verdict, _, offers = look(workspace, model="o/new", ask_hub=True)
    assert "The Hub could not be asked." in verdict
    assert asked == ["o/new"]


def test_what_was_measured_is_told_also_of_a_model_whose_memory_cannot_be_counted(workspace: Workspace) -> None:
    served = over(workspace)
    config = presets.load("starter").config.with_values({"model": "o/new"})

    def look_again() -> str:
        verdict: str = planner.look(served, ["model"], False, planner.HERE, "starter", config.data.data, "o/new")[0]
        return verdict

    served.probes.fail(config, "o/new could not be fetched.")
    assert "o/new could not be fetched." in look_again()
    served.probes._known = [(config, Measured(memory_bytes=3 * GIB, seconds_a_step=2.0, train_rows=9, gradient_checkpointing=False))]
    assert "A measured step took 3.00 GiB" in look_again()


def test_a_folder_outside_the_workspace_is_not_looked_at(tiny_workspace: Workspace, tmp_path: Path) -> None:
    tiny.tiny_model(tmp_path / "elsewhere")
    assert "There is no model" in look(tiny_workspace, model=str(tmp_path / "elsewhere"))[0]
    for inside in (tiny.NAME, str(tiny_workspace.models / tiny.NAME)):
        assert "Fits" in look(tiny_workspace, model=inside)[0]


# Time ---------------------------------------------------------------------------------------------------------------------


def test_steps_and_tokens_are_those_that_the_run_had(finished: Watched, workspace: Workspace) -> None:
    run = finished.run
    config = run.config()
    shutil.copytree(run.folder, workspace.runs / run.id)  # where it is the last run, whatever other tests trained since
    made = services.build(workspace, WarmUp())
    *_, seen = Inspector(run.workspace, within=None).look(config)
    assert seen.data is not None
    (planned,) = tiny.events_of(run, Planned)
    plan = time_plan(config, seen.data, seen.preview, None)
    assert (plan.steps, plan.rows, plan.held_out, plan.tokens_a_pass) == (
        planned.total_steps,
        planned.train_rows,
        planned.held_out_rows,
        planned.tokens,
    )
    assert held_out_indices(seen.data, config.data, config.optimization.seed)
    pace, whose = planner.pace(made, config)
    assert whose == "of the last such run"
    assert pace is not None
    assert f"at the {pace:.2g} s a step of the last such run" in planner.time_words(made, config, seen)
    assert planner.pace(made, config.with_values({"learning_rate": 1e-5, "max_steps": 99}))[0] == pace
    assert planner.pace(made, config.with_values({"max_seq_len": 64}))[0] is None


def test_three_epochs_of_few_rows_are_three_passes_though_a_step_could_have_more_rows(workspace: Workspace, tmp_path: Path) -> None:
    """A pass ends with a smaller step: ten rows and a batch of 16 are one step a pass, and no row is seen oftener."""
    config = tiny.tiny_config(
        tiny.tiny_rows(tmp_path / "ten.json", 10),
        max_steps=0,
        num_train_epochs=3,
        held_out_share=0,
        micro_batch_size=4,
        gradient_accumulation_steps=4,
    )
    plan = time_plan(config, Inspector(workspace, within=None).read(config.data), None, None)
    assert (plan.steps, plan.passes, plan.warning()) == (3, 3, "")


def test_a_step_is_not_timed_by_what_only_the_learning_depends_on() -> None:
    config = RunConfig()
    assert same_pace(config, config.with_values({"num_train_epochs": 9, "eval_steps": 7, "seed": 3}))
    assert not same_pace(config, config.with_values({"lora_r": 9}))
    assert Progress("").seconds_a_step is None


@pytest.mark.parametrize(("steps", "warns"), [(60, False), (120, False), (121, True), (3000, True)])
def test_rows_that_are_seen_more_than_a_few_times_are_warned_of(steps: int, warns: bool) -> None:
    plan = TimePlan(
        steps=steps,
        steps_a_pass=30,
        micro_batch_size=2,
        accumulation=2,
        rows=120,
        held_out=8,
        tokens_a_pass=12_345,
        seconds_a_step=2.0,
    )
    assert bool(plan.warning()) == warns
    if steps == 3000:
        assert plan.warning().startswith("Each row is seen about 100 times")
        assert plan.words() == (
            "3,000 steps of 4 rows (2 × 2), 100 passes over 120 rows, about 1,200,000 tokens; 8 rows held out. "
            "About 1 h 40 min, at the 2 s a step of the last such run."
        )
