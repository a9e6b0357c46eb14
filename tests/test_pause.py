"""Pause, go on, stop and discard, wherever a training is: nothing is lost, and what goes on is the run that never paused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_train_stop import Stop, phase_is
from transformers import AutoModelForCausalLM

from qlora_ui import execution, jobs
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Asked, CheckpointSaved, Event, Finished, HeldOut, Log, Paused, Resumed, Sample, Step, Stopped, Wish
from qlora_ui.jobs import Jobs
from qlora_ui.progress import fold
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled

STEPS = 8
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": 3,
    "eval_steps": 3,
    "lora_dropout": 0.2,
    "learning_rate": 0.005,
    "lr_scheduler": "cosine",
    "sample_every": 3,
    "save_total_limit": 3,
}


class Asking:
    """A training whose owner asks for something at one moment, once, and for nothing after that."""

    def __init__(self, wish: Wish, moment: Stop) -> None:
        self.wish, self.moment, self.told, self.asked = wish, moment, list[Event](), 0

    def __call__(self, run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool], checkpoint: Path | None) -> None:
        def told(event: Event) -> None:
            emit(event)
            self.told.append(event)
            self.asked = 0
            look()

        def look() -> bool:
            if self.moment(self.told, self.asked) and not any(isinstance(event, Asked) for event in run.read()[0]):
                run.ask(self.wish)
            self.asked += 1
            return should_stop()

        train(run, told, look, checkpoint)


def after(kind: type[Event], times: int, count: int = 0, **fields: Any) -> Stop:
    """When that event was just told, and it was asked `times` times since."""
    return lambda told, asked: (
        bool(told) and isinstance(told[-1], kind) and all(getattr(told[-1], name) == value for name, value in fields.items())
        and asked >= times and sum(isinstance(event, kind) for event in told) > count
    )  # fmt: skip


MOMENTS: dict[str, tuple[Stop, int]] = {
    "reading": (phase_is("reading"), 0),
    "quantizing": (phase_is("quantizing"), 0),
    "first samples": (after(Sample, 0), 0),
    "first measurement": (after(HeldOut, 0, step=0), 0),
    "a step": (after(Step, 0, step=4), 5),
    "a step with a checkpoint due": (after(Step, 0, step=3), 3),
    "samples": (after(Step, 2, step=3), 3),
    "measuring": (after(Sample, 1, count=3, step=3), 3),
    "measured": (after(HeldOut, 0, step=3), 3),
    "saved": (after(CheckpointSaved, 0, step=3), 4),
}


def told_of(run: Run) -> tuple[dict[int, float | None], dict[int, float], dict[int, str]]:
    """The last word on each step's loss, held-out loss and samples."""
    events = tiny.events_of(run)
    return (
        {event.step: event.loss for event in events if isinstance(event, Step)},
        {event.step: event.loss for event in events if isinstance(event, HeldOut)},
        {event.step: event.adapter for event in events if isinstance(event, Sample)},
    )


@pytest.fixture(scope="module")
def whole(place: tuple[Workspace, Path]) -> Run:
    """The run that never paused."""
    run = tiny.tiny_run(*place, **SETTINGS)
    jobs.execute(run, train)
    assert run.state() == "finished"
    return run


@pytest.fixture(scope="module")
def resting(place: tuple[Workspace, Path]) -> Callable[[], Run]:
    """Makes a run that paused after step 4."""

    def make(**values: Any) -> Run:
        run = tiny.tiny_run(*place, **{**SETTINGS, **values})
        jobs.execute(run, Asking("pause", after(Step, 0, step=3)))
        assert run.state() == "paused"
        return run

    return make


@pytest.mark.parametrize(("moment", "step"), MOMENTS.values(), ids=MOMENTS)
def test_a_run_that_paused_goes_on_as_if_it_had_not(place: tuple[Workspace, Path], whole: Run, moment: Stop, step: int) -> None:
    run = tiny.tiny_run(*place, **SETTINGS)
    jobs.execute(run, Asking("pause", moment))
    paused = tiny.events_of(run)[-1]
    assert isinstance(paused, Paused), paused
    assert (paused.step, paused.reason) == (step, "")
    assert not run.adapter.exists()
    torch.rand(17)  # another process would not be where this one was
    Jobs(place[0], train).resume_here(run, {})
    (resumed,) = tiny.events_of(run, Resumed)
    assert (resumed.step, resumed.changes) == (step, {})
    assert run.state() == "finished"
    for ours, theirs in zip(told_of(run), told_of(whole), strict=True):
        assert ours == (theirs if isinstance(theirs[STEPS], str) else pytest.approx(theirs, abs=1e-6))
    weights = [load_file(folder.adapter / "adapter_model.safetensors") for folder in (run, whole)]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[1]) < 1e-4


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    place: tuple[Workspace, Path], resting: Callable[[], Run], whole: Run
) -> None:
    run = resting()
    newest = max(run.folder.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-1] + b"!")
    Jobs(place[0], train).resume_here(run, {})
    said = [event.text for event in tiny.events_of(run, Log) if "cannot be used" in event.text]
    assert said == [f"{newest.name} cannot be used: optimizer.pt is not what was written"]
    assert run.state() == "finished"
    assert told_of(run)[0] == pytest.approx(told_of(whole)[0], abs=1e-6)


def test_going_on_with_changes_says_them_and_does_them(place: tuple[Workspace, Path], resting: Callable[..., Run]) -> None:
    run = resting(lr_scheduler="constant", warmup_ratio=0)
    Jobs(place[0], train).resume_here(run, {"learning_rate": "0.001", "max_steps": 10, "save_total_limit": 3})
    (resumed,) = tiny.events_of(run, Resumed)
    assert resumed.changes == {"learning_rate": [0.005, 0.001], "max_steps": [8, 10]}
    assert fold(run.name, run.read()[0]).total_steps == 10
    assert run.config().optimization.learning_rate == 0.001
    rates = {event.step: event.learning_rate for event in tiny.events_of(run, Step)}
    assert rates == pytest.approx({**dict.fromkeys(range(1, 4), 0.005), **dict.fromkeys(range(4, 11), 0.001)})
    assert tiny.events_of(run, Finished)[-1].step == 10


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_r": 8}, "lora_r is 8, but this run began with 4"),
        ({"max_seq_len": 64}, "max_seq_len is 64, but"),
        ({"micro_batch_size": 1}, "The effective batch would be 1, but this run began with 2"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"nonsense": 1}, "There is no setting 'nonsense'"),
    ],
)
def test_what_a_run_is_cannot_change_on_the_way(
    place: tuple[Workspace, Path], resting: Callable[[], Run], changes: dict[str, Any], sentence: str
) -> None:
    run = resting()
    before = run.size()
    with pytest.raises(UserError, match=sentence):
        Jobs(place[0], train).resume(run, changes)
    assert (run.size(), run.state()) == (before, "paused")
    with place[0].lease().acquire(timeout=0), run.lock().acquire(timeout=0):
        pass  # nothing is held


def test_a_finished_run_goes_on_only_to_train_longer(place: tuple[Workspace, Path]) -> None:
    run = tiny.tiny_run(*place)
    jobs.execute(run, train)
    with pytest.raises(UserError, match=f"{run.id} is finished: all 4 steps are done. To train longer, set max_steps"):
        Jobs(place[0], train).resume_here(run, {})
    Jobs(place[0], train).resume_here(run, {"max_steps": 6})
    assert run.state() == "finished"
    assert list(told_of(run)[0]) == [1, 2, 3, 4, 5, 6]


def test_stop_and_keep_of_a_resting_run_makes_its_adapter(place: tuple[Workspace, Path], resting: Callable[[], Run]) -> None:
    run = resting()
    manager = Jobs(place[0], train)
    for _ in range(2):  # a double click
        manager.stop(run)
    run.lock().acquire(timeout=20).lock.release()
    (stopped,) = tiny.events_of(run, Stopped)
    assert (stopped.step, stopped.total_steps, stopped.adapter_saved) == (3, STEPS, True)
    assert {path.suffix for path in run.adapter.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    assert json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("models/tiny")
    assert f"{stopped.step} steps" in (run.adapter / "README.md").read_text() or "3" in (run.adapter / "README.md").read_text()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place[0].models / "tiny"), run.adapter)
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


def test_the_wish_that_made_a_run_rest_does_not_end_its_stop_and_keep(
    place: tuple[Workspace, Path], resting: Callable[[], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(call: Callable[[], Any], should_stop: Callable[[], bool]) -> Any:
        if should_stop():
            raise Cancelled
        return call()

    monkeypatch.setattr(execution, "abandonable", slow)  # as the first import of the libraries is
    run = resting()
    assert run.wish() == "pause"
    Jobs(place[0], train).stop(run)
    run.lock().acquire(timeout=20).lock.release()
    assert run.state() == "stopped"


def test_a_stop_while_it_goes_on_keeps_what_it_had(place: tuple[Workspace, Path], resting: Callable[[], Run]) -> None:
    run = resting()
    Jobs(place[0], Asking("stop", phase_is("quantizing"))).resume_here(run, {})
    run.forget_wishes()
    assert run.state() in ("stopped", "finished")
    assert run.adapter.is_dir()


@pytest.mark.parametrize("moment", [phase_is("quantizing"), after(Step, 0, step=4), after(CheckpointSaved, 0, step=3)])
def test_discard_leaves_nothing(place: tuple[Workspace, Path], moment: Stop) -> None:
    workspace = place[0]
    run = tiny.tiny_run(*place, **SETTINGS)
    jobs.execute(run, Asking("discard", moment))
    assert not run.folder.exists()
    assert not list(workspace.runs.glob(".discarded-*"))


def test_a_resting_run_is_discarded_at_once_and_twice_is_no_harm(place: tuple[Workspace, Path], resting: Callable[[], Run]) -> None:
    run = resting()
    Jobs(place[0], train).discard(run)
    assert not run.folder.exists()
    Jobs(place[0], train).discard(run)


def test_of_several_wishes_the_one_that_ends_more_is_done(place: tuple[Workspace, Path]) -> None:
    run = tiny.tiny_run(*place)
    for wish in ("pause", "stop", "pause"):
        run.ask(wish)  # type: ignore[arg-type]
    assert run.wish() == "stop"
    assert [event.wish for event in tiny.events_of(run, Asked)] == ["pause", "stop"]
    run.forget_wishes()
    assert run.wish() is None


def test_only_one_may_resume(place: tuple[Workspace, Path], resting: Callable[[], Run]) -> None:
    run = resting()
    with place[0].lease().acquire(timeout=0), pytest.raises(UserError, match="is training already"):
        Jobs(place[0], train).resume(run)
    with run.lock().acquire(timeout=0), pytest.raises(UserError, match=f"{run.id} is in use"):
        Jobs(place[0], train).resume(run)
    assert run.state() == "paused"
