"""Measuring a few steps of a run that is not begun: what it says, that it leaves nothing, and that it can be ended."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from qlora_ui import cli, services
from qlora_ui.config import RunConfig
from qlora_ui.engine import probe
from qlora_ui.engine.tokenized import Tokenized, fit
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Phase, Step
from qlora_ui.execution import Emit, ShouldStop
from qlora_ui.inspection import Inspector
from qlora_ui.memory.advice import advice_for
from qlora_ui.memory.devices import GIB, Device
from qlora_ui.memory.forecast import forecast
from qlora_ui.memory.measured import Measured, plan_by
from qlora_ui.model_shapes import find_shape
from qlora_ui.probing import Probes
from qlora_ui.runs import Workspace
from qlora_ui.services import WarmUp
from qlora_ui.stopping import Cancelled, OutOfMemory
from qlora_ui.ui import planner

MEASURED = Measured(memory_bytes=GIB, seconds_a_step=2.0, train_rows=10, gradient_checkpointing=False)
CPU = Device(name="CPU", kind="cpu", memory_bytes=8 * GIB, compute_dtype="float32")


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_real_steps_are_measured_and_nothing_is_left_but_the_cached_tokens(tiny_workspace: Workspace, rows: Path) -> None:
    config = tiny.tiny_config(rows, micro_batch_size=2, gradient_accumulation_steps=2)
    before = files(tiny_workspace.root)
    told: list[Event] = []
    measured = probe.measure(config, tiny_workspace, told.append, lambda: False)
    steps = [event for event in told if isinstance(event, Step)]
    assert len(steps) == probe.STEPS
    assert measured.memory_bytes > 0
    assert measured.train_rows == 10  # of 12, a fifth of which is held out
    assert 0 < measured.seconds_a_step < 60
    assert {path.suffix for path in files(tiny_workspace.root) - before} <= {".npz"}
    assert not list((tiny_workspace.root / "cache").glob(f"{probe.PREFIX}*"))
    assert tiny_workspace.all() == []


def test_the_longest_rows_come_twice_and_then_rows_of_all_lengths() -> None:
    sizes = np.array([5, 50, 10, 40, 30, 20])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    ids = np.zeros(starts[-1], np.int32)
    rows = fit(Tokenized(rows=np.arange(6), starts=starts, ids=ids, trained=np.ones(len(ids), bool)), 512, "truncate")
    assert probe.rows_of_steps(rows, 3).fitted.lengths.tolist() == [50, 40, 30, 50, 40, 30, 40, 20, 5]
    assert len(probe.rows_of_steps(rows, 16)) == probe.STEPS * 16


@pytest.mark.parametrize("phase", ["reading", "training"])
def test_it_ends_when_told_to_and_leaves_nothing(tiny_workspace: Workspace, rows: Path, phase: str) -> None:
    stop = threading.Event()

    def emit(event: Event) -> None:
        if isinstance(event, Phase) and event.name == phase:
            stop.set()

    with pytest.raises(Cancelled):
        probe.measure(tiny.tiny_config(rows), tiny_workspace, emit, stop.is_set)
    assert not list((tiny_workspace.root / "cache").glob(f"{probe.PREFIX}*"))


def test_the_forecast_is_brought_to_what_was_measured(tiny_workspace: Workspace) -> None:
    shape, config = find_shape(tiny.NAME, "main", tiny_workspace.models), tiny.tiny_config("")
    planned = forecast(shape, config, CPU)
    known = planned.total - planned.terms.overhead - planned.terms.activations - planned.terms.logits
    for taken in (3 * planned.total, known + 1000, known // 2):
        measured = Measured(memory_bytes=taken, seconds_a_step=1, train_rows=1, gradient_checkpointing=True)
        after = plan_by(shape, config, CPU, measured)(config, CPU)
        assert after.total - after.terms.overhead == pytest.approx(taken, abs=10)
        assert after.gradient_checkpointing
        assert (after.terms.base == planned.terms.base) == (taken >= known)


# The service that pages share ---------------------------------------------------------------------------------------------


class Gate:
    """A measuring that goes on until it is let go, or told to stop."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, config: RunConfig, workspace: Workspace, emit: Emit, should_stop: ShouldStop) -> Measured:
        emit(Phase(name="quantizing"))
        self.begun.set()
        while not self.open.wait(0.01):
            if should_stop():
                raise Cancelled
        return MEASURED


def wait_for_end(probes: Probes) -> None:
    for thread in threading.enumerate():
        if thread.name == "measure a step":
            thread.join(20)
    assert probes.doing == ""


def test_one_measures_at_a_time_and_a_start_is_told_so(workspace: Workspace, rows: Path) -> None:
    gate = Gate()
    made = services.build(workspace, WarmUp())
    probes = Probes(workspace, measure=gate)
    object.__setattr__(made, "probes", probes)
    config = tiny.tiny_config(rows)
    probes.begin(config)
    assert gate.begun.wait(20)
    assert "quantizing" in probes.doing
    assert workspace.is_lent()  # by which a chat knows that it has to wait
    with pytest.raises(UserError, match="uses the device now"):
        probes.begin(config)
    with pytest.raises(UserError, match="A step is being measured"):
        made.start(tiny.tiny_config("bundled:guanaco-starter"))
    gate.open.set()
    wait_for_end(probes)
    assert probes.known(config.with_values({"learning_rate": 0.5, "max_steps": 99})) == MEASURED
    assert probes.known(config.with_values({"max_seq_len": 64})) is None
    assert not workspace.is_busy()  # it was given back


def test_a_cancelled_measuring_is_no_trouble_and_gives_the_device_back(workspace: Workspace, rows: Path) -> None:
    gate = Gate()
    probes = Probes(workspace, measure=gate)
    probes.begin(tiny.tiny_config(rows))
    probes.cancel()
    wait_for_end(probes)
    assert probes.trouble(tiny.tiny_config(rows)) == ""
    assert probes.known(tiny.tiny_config(rows)) is None
    probes.begin(tiny.tiny_config(rows))
    gate.open.set()
    wait_for_end(probes)
    assert probes.known(tiny.tiny_config(rows)) == MEASURED


def test_too_little_memory_is_said_in_a_sentence(workspace: Workspace, rows: Path) -> None:
    def lacks(*_: object) -> Measured:
        raise OutOfMemory("tried to allocate 4 GiB")

    probes = Probes(workspace, measure=lacks)
    probes.begin(tiny.tiny_config(rows))
    wait_for_end(probes)
    assert probes.trouble(tiny.tiny_config(rows)).startswith("The memory did not suffice for a step (tried to allocate 4 GiB).")


def test_the_planner_says_what_was_measured_until_a_setting_changes_it(tiny_workspace: Workspace, rows: Path) -> None:
    from test_planner import over

    made = over(tiny_workspace)
    config = tiny.tiny_config(rows)
    values = config.values()
    made.probes._known = [(config, MEASURED)]

    def verdict(card: str = planner.HERE, **changed: object) -> str:
        told = {**values, **changed}
        said: str = planner.look(made, list(told), False, card, "starter", str(rows), *told.values())[0]
        return said

    assert "measured 1.9 of 4.0 GiB free here" in verdict()  # with the overhead
    assert "measured" in verdict(learning_rate=0.5)
    assert "about" in verdict(lora_r=64)
    assert "about" in verdict("T4")
    *_, seen = Inspector(tiny_workspace, within=None).look(config)
    assert "at the 2 s a step measured here." in planner.time_words(made, config, seen)


def test_what_was_measured_is_what_the_advice_goes_by(tiny_workspace: Workspace) -> None:
    shape, config = find_shape(tiny.NAME, "main", tiny_workspace.models), tiny.tiny_config("", micro_batch_size=4)
    measured = replace(MEASURED, memory_bytes=12 * GIB, gradient_checkpointing=True)
    assert "It takes about 0.9 of 8.0" in advice_for(plan_by(shape, config, CPU, None), config, CPU)
    plan = plan_by(shape, config, CPU, measured)
    assert plan(config, CPU).verdict(CPU.memory_bytes) == "does not fit"
    said = advice_for(plan, config, CPU)
    assert said.startswith("Set micro_batch_size from 4 to 2 and gradient_accumulation_steps from ")
    assert said.endswith("which fits 8.0 GiB.")
    # What was measured of kept activations says nothing of recomputed ones.
    kept = config.with_values({"gradient_checkpointing": "off"})
    plan = plan_by(shape, kept, CPU, replace(measured, gradient_checkpointing=False))
    said = advice_for(plan, kept, CPU)
    assert said.startswith("Set gradient_checkpointing from off to on (slower by about a third): about 0.9 GiB instead of 12.9")


def test_the_command_line_measures_and_plans_with_it(tiny_workspace: Workspace, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"--set={name}={value}" for name, value in tiny.tiny_config("", max_steps=7).values().items() if name != "data"]
    assert cli.main(["plan", "--preset", "starter", "--data", str(rows), *settings, "--probe", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 7
    assert said["measured"]["memory_bytes"] == pytest.approx(said["total"] - said["terms"]["overhead"], abs=10)
    assert cli.main(["plan", "--probe", "--gpu", "T4"]) == 2
    assert "Leave out --gpu" in capsys.readouterr().err
