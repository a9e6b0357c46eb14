"""A training carried out: tried again where that helps, and its end written down whatever it was. Knows nothing of torch or Gradio."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from pathlib import Path

from qlora_ui import checkpoints, progress, resuming
from qlora_ui.disk import trouble_with_disk
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Failed, Paused, Phase, Stopped
from qlora_ui.runs import Run
from qlora_ui.stopping import Cancelled, Diverged, OutOfMemory, abandonable

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]
Train = Callable[[Run, Emit, ShouldStop, Path | None], None]


def engine_train(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None = None) -> None:
    """The real training; its libraries are loaded here, because importing them takes seconds."""
    emit(Phase(name="loading", detail="libraries"))
    abandonable(lambda: importlib.import_module("qlora_ui.engine"), should_stop)
    from qlora_ui.engine import train

    train.train(run, emit, should_stop, checkpoint)


def execute(run: Run, train: Train, checkpoint: Path | None = None) -> None:
    """Call the training and write down how it ended, whatever happens in it. Raises UserError when that cannot be written down."""
    try:
        try:
            _insist(run, train, checkpoint)
        except Cancelled:
            end_as_asked(run)
    except BaseException as error:  # noqa: BLE001 - the run's books must be closed; the traceback is kept in them
        if trouble := trouble_with_disk(run.folder, error):
            pause(run, trouble)
        elif isinstance(error, UserError):
            break_off(run, str(error)[:2000], "")
        else:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            told = traceback.format_exc()[-8000:]  # an end must stay short: whoever asks for the state reads the last 64 KiB only
            break_off(run, f"Training broke off at step {run.last_step()}: {reason[0][:300]}", told)


def _insist(run: Run, train: Train, checkpoint: Path | None) -> None:
    """Call the training, again with less where memory ran out, and again more slowly where the owner wants that."""

    def should_stop() -> bool:
        run.beat()
        return run.is_asked()

    run.beat()
    while True:
        try:
            return train(run, run.append, should_stop, checkpoint)
        except OutOfMemory as error:
            checkpoint = resuming.with_less(run, str(error))
        except Diverged as error:
            checkpoint = resuming.slower(run, error)


def end_as_asked(run: Run) -> None:
    """Write down the end of a training that its owner ended."""
    wish, checkpoint = run.wish(), checkpoints.newest_complete(run)
    if wish == "discard":
        run.discard()
    elif wish == "pause":
        run.append(Paused(step=run.last_step(), total_steps=planned_steps(run)))
    elif checkpoint:  # it had gone on from there, and not a step further
        keep_newest(run, run.append, lambda: False, checkpoint)
    else:
        run.append(Stopped(step=0, total_steps=0, adapter_saved=False))


def break_off(run: Run, message: str, told: str) -> None:
    """Write down an end that nobody asked for: a pause, where there is something to go on from."""
    if run.last_step() or checkpoints.newest_complete(run):
        pause(run, message, told)
    else:
        run.append(Failed(message=message, traceback=told))


def pause(run: Run, reason: str, told: str = "") -> None:
    """Write down that the run rests, and why. Raises UserError with that reason when it cannot be written."""
    try:
        run.append(Paused(step=run.last_step(), total_steps=planned_steps(run), reason=reason, traceback=told))
    except OSError as error:
        raise UserError(reason) from error


def planned_steps(run: Run) -> int:
    """The steps of the whole training, or 0 while they are not known."""
    return progress.fold(run.name, run.read()[0]).total_steps


def keep_newest(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None) -> None:
    """Make the newest complete checkpoint's adapter the run's result."""
    abandonable(lambda: importlib.import_module("qlora_ui.engine"), should_stop)
    from qlora_ui.engine import result

    newest = checkpoint or checkpoints.newest_complete(run)
    if newest is None:
        raise UserError(f"{run.id} has no complete checkpoint, so there is no adapter to keep.")
    result.keep(run, newest, emit)
    emit(Stopped(step=checkpoints.step_of(newest), total_steps=planned_steps(run), adapter_saved=True))
