"""The best checkpoint and the early end: which one is marked and spared, when a training ends, which weights are the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from qlora_ui import jobs
from qlora_ui.engine.train import StepTrainer, train
from qlora_ui.errors import UserError
from qlora_ui.events import AdapterSaved, CheckpointSaved, Finished, HeldOut, Log, Step, decode
from qlora_ui.progress import Progress
from qlora_ui.runs import Run, Workspace

NAN = float("nan")


@pytest.fixture
def place(tiny_workspace: Workspace, rows: Path) -> tuple[Workspace, Path]:
    return tiny_workspace, rows


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The held-out losses that the next run will measure, the one before the first step included."""
    losses: list[float] = []

    def evaluation_loop(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(trainer, *args, **kwargs)
        output.metrics["eval_loss"] = losses.pop(0)
        return output

    real = StepTrainer.evaluation_loop
    monkeypatch.setattr(StepTrainer, "evaluation_loop", evaluation_loop)
    return losses


def trained(place: tuple[Workspace, Path], **values: Any) -> Run:
    run = tiny.tiny_run(*place, **{"max_steps": 8, "eval_steps": 1, "save_steps": 1, **values})
    jobs.execute(run, train)
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(weights(one)[name], weights(other)[name]) for name in weights(one) | weights(other))


def test_the_best_checkpoint_is_marked_and_outlives_newer_ones(place: tuple[Workspace, Path], measures: list[float]) -> None:
    measures += [9, 3, 2, 4, 5, 6]
    run = trained(place, max_steps=5, save_total_limit=2)
    assert [(event.step, event.best) for event in tiny.events_of(run, CheckpointSaved)] == [
        (1, True),
        (2, True),
        (3, False),
        (4, False),
        (5, False),
    ]
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-2", "checkpoint-5"]
    progress = Progress("run")
    for event in tiny.events_of(run):
        progress.add(event)
    assert progress.best_checkpoint is not None
    assert progress.best_checkpoint.name == "checkpoint-2"


def test_only_what_was_saved_can_be_the_best_checkpoint(place: tuple[Workspace, Path], measures: list[float]) -> None:
    measures += [9, 1, 5, 1, 4, 1, 6]  # steps 1, 3 and 5 are better, but not saved
    run = trained(place, max_steps=6, save_steps=2, save_total_limit=1)
    assert [(event.step, event.best) for event in tiny.events_of(run, CheckpointSaved)] == [(2, True), (4, True), (6, False)]
    assert "checkpoint-4" in [folder.name for folder in run.checkpoints()]


def test_the_result_is_the_last_step_unless_the_best_is_asked_for(place: tuple[Workspace, Path], measures: list[float]) -> None:
    measures += [9, 3, 2, 4] * 2
    last = trained(place, max_steps=3)
    best = trained(place, max_steps=3, keep="best")
    assert same(last.adapter, last.folder / "checkpoint-3")
    assert not same(last.adapter, last.folder / "checkpoint-2")
    assert same(best.adapter, best.folder / "checkpoint-2")
    assert [event.step for run in (last, best) for event in tiny.events_of(run, AdapterSaved)] == [3, 2]
    assert [event.step for event in tiny.events_of(best, Finished)] == [3]
    said = [event.text for event in tiny.events_of(best, Log)]
    assert "The adapter is that of step 2, which had the best held-out loss: 2.0000" in said


def test_when_the_best_is_asked_for_it_is_saved_whenever_it_is_measured(place: tuple[Workspace, Path], measures: list[float]) -> None:
    measures += [9, 3, 4, 2, 5]
    run = trained(place, max_steps=4, save_steps=100, keep="best", save_total_limit=2)
    assert [event.step for event in tiny.events_of(run, CheckpointSaved)] == [1, 3, 4]
    assert same(run.adapter, run.folder / "checkpoint-3")


def test_the_training_ends_when_nothing_got_better_for_as_long_as_was_asked(place: tuple[Workspace, Path], measures: list[float]) -> None:
    measures += [9, 3, 4, 2, 2, 2.5, 7, 1]
    run = trained(place, early_stopping_patience=3, save_steps=100)
    (end,) = tiny.events_of(run, Finished)
    assert end.step == 6
    assert run.state() == "finished"
    assert end.reason == "ended before step 8, because 3 measurements in a row were not better than the held-out loss 2.0000 of step 3"
    assert [event.step for event in tiny.events_of(run, Step)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in tiny.events_of(run, HeldOut)] == [0, 1, 2, 3, 4, 5, 6]
    assert same(run.adapter, run.folder / "checkpoint-6")


def test_a_training_that_never_beats_the_base_ends_too(place: tuple[Workspace, Path], measures: list[float]) -> None:
    measures += [1, 2, NAN, 9]
    run = trained(place, early_stopping_patience=2)
    assert [event.step for event in tiny.events_of(run, Finished)] == [2]
    assert "held-out loss 1.0000 of step 0" in tiny.events_of(run, Finished)[0].reason


def test_without_patience_a_training_goes_on_to_its_end(place: tuple[Workspace, Path], measures: list[float]) -> None:
    measures += [1, 2, 3, 4, 5]
    run = trained(place, max_steps=4, early_stopping_patience=4)
    assert [(event.step, event.reason) for event in tiny.events_of(run, Finished)] == [(4, "")]
    measures += [1, 2, 3, 4, 5]
    assert [event.step for event in tiny.events_of(trained(place, max_steps=4), Finished)] == [4]


@pytest.mark.parametrize("values", [{"early_stopping_patience": 3}, {"keep": "best"}])
def test_what_needs_held_out_rows_is_refused_without_them(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no row is held out to measure on") as refused:
        tiny.tiny_config("rows.json", held_out_share=0, **values)
    assert refused.value.field == next(iter(values))
    assert tiny.tiny_config("rows.json", held_out_share=0, held_out_rows=2, **values).values()[refused.value.field]


def test_ends_and_steps_of_an_older_app_are_still_read() -> None:
    assert decode('{"kind": "finished", "time": 1.0, "step": 3}') == Finished(step=3, time=1.0)
    saved = decode('{"kind": "checkpoint_saved", "time": 1.0, "step": 3, "name": "checkpoint-3"}')
    assert saved == CheckpointSaved(step=3, name="checkpoint-3", time=1.0)
