"""Going on from a checkpoint: the steps are those of a run that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from qlora_ui import jobs
from qlora_ui.engine.train import train
from qlora_ui.events import Event, Finished, HeldOut, Step
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled

STEPS, BROKEN_OFF = 12, 7


def never() -> bool:
    return False


def losses(run: Run) -> dict[int, float | None]:
    """The last that was said of each step."""
    return {event.step: event.loss for event in tiny.events_of(run, Step)}


class Killed(Exception):
    pass


def interrupted(run: Run) -> None:
    """Train until a step after the last checkpoint, and then break off as a killed process does: nothing more is written."""

    def emit(event: Event) -> None:
        run.append(event)
        if isinstance(event, Step) and event.step == BROKEN_OFF:
            raise Killed

    with pytest.raises(Killed):
        train(run, emit, never)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"packing": "off", "lora_dropout": 0.2, "lr_scheduler": "cosine"},
        {"group_by_length": True, "packing": "off"},
        {"optimizer": "adamw_torch", "neftune_noise_alpha": 5, "gradient_accumulation_steps": 2},
    ],
)
def test_a_run_that_goes_on_is_the_run_that_was_never_interrupted(tiny_workspace: Workspace, rows: Path, values: dict[str, Any]) -> None:
    settings = {"max_steps": STEPS, "save_steps": 5, "eval_steps": 5, "learning_rate": 0.005, **values}
    whole, broken = (tiny.tiny_run(tiny_workspace, rows, **settings) for _ in range(2))
    jobs.execute(whole, train)
    interrupted(broken)
    (checkpoint,) = broken.checkpoints()
    assert checkpoint.name == "checkpoint-5"
    torch.rand(17)  # another process would not be where this one was
    train(broken, broken.append, never, checkpoint)
    assert list(losses(broken)) == list(range(1, STEPS + 1))
    assert losses(broken) == pytest.approx(losses(whole), abs=1e-4)
    held_out = [{event.step: event.loss for event in tiny.events_of(run, HeldOut)} for run in (broken, whole)]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-4)
    assert tiny.events_of(broken, Finished)
    weights = [load_file(run.adapter / "adapter_model.safetensors") for run in (broken, whole)]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-4 for name in weights[1])


def test_going_on_can_be_stopped_like_any_training(tiny_workspace: Workspace, rows: Path) -> None:
    run = tiny.tiny_run(tiny_workspace, rows, max_steps=STEPS, save_steps=5)
    interrupted(run)
    with pytest.raises(Cancelled):
        train(run, run.append, lambda: True, run.checkpoints()[-1])
