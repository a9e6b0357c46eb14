"""How a training stops: at once in each phase, after the step in training, and with its adapter kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file
from training import Watched, trained

from qlora_ui import jobs
from qlora_ui.engine.train import train
from qlora_ui.events import Asked, Event, HeldOut, Phase, Planned, Step, Stopped
from qlora_ui.runs import Run, Workspace

Stop = Callable[[list[Event], int], bool]
"""Whether to stop, by what was told so far and by how often it was asked since the last event."""


def stopped_when(workspace: Workspace, data: Path, stop: Stop, **values: Any) -> Run:
    """A run whose owner's wish to stop depends on where it is."""
    run = tiny.tiny_run(workspace, data, **values)
    told: list[Event] = []
    asked = 0

    def emit(event: Event) -> None:
        nonlocal asked
        told.append(event)
        asked = 0
        run.append(event)
        should_stop()

    def should_stop() -> bool:
        nonlocal asked
        if not run.is_asked() and stop(told, asked):
            run.ask("stop")
        asked += 1
        return run.is_asked()

    jobs.execute(run, lambda run, _emit, _stop, _checkpoint: train(run, emit, should_stop))
    return run


def phase_is(name: str) -> Stop:
    return lambda told, asked: bool(told) and [event.name for event in told if isinstance(event, Phase)][-1:] == [name]


@pytest.mark.parametrize(
    ("phase", "comes_no_more"),
    [
        ("reading", "fetching"),
        ("fetching", "quantizing"),
        ("loading", "quantizing"),
        ("tokenizing", "quantizing"),
        ("quantizing", "training"),
    ],
)
def test_stop_before_the_training_ends_the_run_without_an_adapter(place: tuple[Workspace, Path], phase: str, comes_no_more: str) -> None:
    run = stopped_when(*place, phase_is(phase))
    assert comes_no_more not in [event.name for event in tiny.events_of(run, Phase)]
    assert_stopped(run, step=0, total_steps=0)


def assert_stopped(run: Run, step: int, total_steps: int) -> None:
    last = tiny.events_of(run)[-1]
    assert isinstance(last, Stopped)
    assert (last.step, last.total_steps, last.adapter_saved) == (step, total_steps, step > 0)
    assert run.adapter.is_dir() == (step > 0)
    assert len(tiny.events_of(run, Step)) == step
    assert len(tiny.events_of(run, Asked)) == 1
    assert not list(run.folder.glob("*.partial"))
    if step:
        weights = load_file(run.adapter / "adapter_model.safetensors")
        assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def last_is(kind: type[Event], asked_times: int = 1, **fields: Any) -> Stop:
    def stop(told: list[Event], asked: int) -> bool:
        last = told[-1] if told else None
        return isinstance(last, kind) and all(getattr(last, k) == v for k, v in fields.items()) and asked >= asked_times

    return stop


def test_stop_as_the_training_begins_ends_it_before_the_first_evaluation(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(*place, last_is(Planned))
    assert tiny.events_of(run, HeldOut) == []
    assert_stopped(run, step=0, total_steps=0)


def test_stop_in_the_first_evaluation_ends_it_at_the_next_batch(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(*place, last_is(Planned, asked_times=2), held_out_share=0.5)
    assert tiny.events_of(run, HeldOut) == []
    assert_stopped(run, step=0, total_steps=0)


def test_stop_in_training_ends_it_after_the_step_and_keeps_the_adapter(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(*place, last_is(Step, step=3), max_steps=50)
    assert_stopped(run, step=3, total_steps=50)


def test_stop_within_an_accumulation_does_not_wait_for_its_end(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(
        *place,
        last_is(Step, step=3, asked_times=3),
        max_steps=50,
        gradient_accumulation_steps=4,
        micro_batch_size=1,
        eval_steps=50,
        packing="off",
    )
    assert_stopped(run, step=3, total_steps=50)


def test_stop_in_a_later_evaluation_ends_it_at_the_next_batch(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(*place, last_is(Step, step=2, asked_times=2), max_steps=50)
    assert [event.step for event in tiny.events_of(run, HeldOut)] == [0]
    assert_stopped(run, step=2, total_steps=50)


def test_stop_after_the_last_step_or_in_the_saving_is_too_late(place: tuple[Workspace, Path]) -> None:
    for moment in (last_is(Step, step=4), last_is(Phase, name="saving")):
        run = stopped_when(*place, moment)
        assert run.state() == "finished"
        assert run.adapter.is_dir()


def test_a_stopped_run_can_be_trained_again_in_another_run(place: tuple[Workspace, Path], finished: Watched) -> None:
    stopped_when(*place, last_is(Step, step=1))
    again = trained(*place, max_steps=8)
    assert [event.loss for event in tiny.events_of(again, Step)] == [event.loss for event in tiny.events_of(finished.run, Step)]
