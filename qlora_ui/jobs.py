"""One training at a time: who may train, where it runs, how it ends, how it goes on. Knows nothing of torch or Gradio."""

from __future__ import annotations

import importlib
import re
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import Timeout

from qlora_ui import checkpoints, progress
from qlora_ui.config import RunConfig
from qlora_ui.data import sources
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Failed, Finished, Log, Paused, Phase, Resumed, Stopped
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled, abandonable

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]
Train = Callable[[Run, Emit, ShouldStop, Path | None], None]
OnStart = Callable[[Run, int], None]
"""Told the run, and how many bytes of events it had before."""
RECORDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "gradio")


def engine_train(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None = None) -> None:
    """The real training; its libraries are loaded here, because importing them takes seconds."""
    emit(Phase(name="loading", detail="libraries"))
    abandonable(lambda: importlib.import_module("qlora_ui.engine.train"), should_stop)
    from qlora_ui.engine.train import train

    train(run, emit, should_stop, checkpoint)


class Jobs:
    """Starts, ends and resumes trainings. The lease is a lock file, so that it also holds against another process."""

    def __init__(self, workspace: Workspace, train: Train = engine_train, make_room: Callable[[], None] = lambda: None) -> None:
        """`make_room` is called before a training starts: whoever holds the device's memory gives it back."""
        self.workspace, self._train, self._make_room = workspace, train, make_room

    def start(self, config: RunConfig) -> Run:
        """Begin training in a thread of this process and return at once. Raises UserError, leaving no folder, when it may not."""
        run, locks = self._admit(config)
        self._in_background(run, locks, lambda: execute(run, self._train_in_its_room))
        return run

    def run_here(self, config: RunConfig, on_start: OnStart = lambda run, offset: None) -> Run:
        """Train in the calling thread and return when it has ended, however it ended."""
        run, locks = self._admit(config)
        with locks:
            on_start(run, 0)
            execute(run, self._train_in_its_room)
        return run

    def resume(self, run: Run, changes: Mapping[str, Any] | None = None) -> None:
        """Go on from the newest complete checkpoint, in a thread of this process, and return at once. Raises UserError when it may not."""
        checkpoint, locks = self._readmit(run, changes or {})
        self._in_background(run, locks, lambda: execute(run, self._train_in_its_room, checkpoint))

    def resume_here(self, run: Run, changes: Mapping[str, Any], on_start: OnStart = lambda run, offset: None) -> Run:
        """Go on in the calling thread and return when it has ended, however it ended."""
        offset = run.size()
        checkpoint, locks = self._readmit(run, changes)
        with locks:
            on_start(run, offset)
            execute(run, self._train_in_its_room, checkpoint)
        return run

    def pause(self, run: Run) -> None:
        """End the training so that it can go on later."""
        run.ask("pause")

    def stop(self, run: Run) -> None:
        """End the run and keep its adapter: that of the last step, or of a resting run's newest complete checkpoint."""
        self.workspace.settle()
        run.ask("stop")
        if run.state() not in progress.RESUMABLE or not checkpoints.newest_complete(run):
            return
        with self._hold(run) as locks:
            run.append(Phase(name="saving"))
            self._in_background(run, locks.pop_all(), lambda: execute(run, _keep_newest))

    def discard(self, run: Run) -> None:
        """End the run and delete it, with all that it made."""
        if not run.folder.is_dir():
            return  # somebody else was quicker
        self.workspace.settle()
        run.ask("discard")
        if run.state() != "running":
            with self._hold(run):
                run.discard()

    def _in_background(self, run: Run, locks: ExitStack, work: Callable[[], None]) -> None:
        def held() -> None:
            with locks:
                work()

        threading.Thread(target=held, name=f"train {run.id}", daemon=True).start()

    def _admit(self, config: RunConfig) -> tuple[Run, ExitStack]:
        """Check what can be checked in no time, take the lease, make the folder. The locks come back held."""
        sources.check(config.data.data, None)
        with self._lease() as locks:
            run, lock = self.workspace.create(config, run_name(config), {name: version(name) for name in RECORDED})
            locks.callback(lock.release)
            return run, locks.pop_all()

    def _readmit(self, run: Run, changes: Mapping[str, Any]) -> tuple[Path | None, ExitStack]:
        """Take the locks, find the checkpoint, write down what changes. The locks come back held."""
        with self._lease() as locks:
            locks.enter_context(self._hold(run))
            checkpoint = checkpoints.newest_complete(run)
            step = checkpoints.step_of(checkpoint) if checkpoint else 0
            before, config = run.config(), changed(run.config(), changes)
            check_goes_on(run, config, step)
            values = config.values()
            differences = {name: [value, values[name]] for name, value in before.values().items() if value != values[name]}
            run.forget_wishes()
            if differences:
                run.note(**config.to_dict())
            unusable = checkpoints.put_aside(run, checkpoint)
            run.append(Resumed(step=step, checkpoint=checkpoint.name if checkpoint else "", changes=differences))
            for line in unusable:
                run.append(Log(text=line, level="warning"))
            return checkpoint, locks.pop_all()

    def _lease(self) -> ExitStack:
        """The device, for one training. Raises UserError when another has it."""
        with ExitStack() as locks:
            try:
                locks.enter_context(self.workspace.lease().acquire(timeout=0))
            except Timeout:
                live = self.workspace.live()
                raise UserError(f"{live.id if live else 'Another run'} is training already. Stop it or wait for its end.") from None
            self.workspace.settle()
            return locks.pop_all()

    def _hold(self, run: Run) -> ExitStack:
        """The run, for whoever writes in it. Raises UserError when somebody else does."""
        with ExitStack() as locks:
            try:
                locks.enter_context(run.lock().acquire(timeout=0))
            except Timeout:
                raise UserError(f"{run.id} is in use. Wait until it has ended.") from None
            return locks.pop_all()

    def _train_in_its_room(self, run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None) -> None:
        abandonable(self._make_room, should_stop)  # a chat that is still loading its model gives nothing back until it has
        self._train(run, emit, should_stop, checkpoint)


def execute(run: Run, train: Train, checkpoint: Path | None = None) -> None:
    """Call the training and write down how it ended, whatever happens in it."""
    try:
        try:
            train(run, run.append, run.is_asked, checkpoint)
        except Cancelled:
            end_as_asked(run)
    except UserError as error:
        break_off(run, str(error)[:2000], "")
    except BaseException as error:  # noqa: BLE001 - the run's books must be closed; the traceback is kept in them
        reason = str(error).strip().splitlines() or [type(error).__name__]
        told = traceback.format_exc()[-8000:]  # an end must stay short: whoever asks for the state reads the last 64 KiB only
        break_off(run, f"Training broke off at step {run.last_step()}: {reason[0][:300]}", told)


def end_as_asked(run: Run) -> None:
    """Write down the end of a training that its owner ended."""
    wish, checkpoint = run.wish(), checkpoints.newest_complete(run)
    if wish == "discard":
        run.discard()
    elif wish == "pause":
        run.append(Paused(step=run.last_step(), total_steps=planned_steps(run)))
    elif checkpoint:  # it had gone on from there, and not a step further
        _keep_newest(run, run.append, lambda: False, checkpoint)
    else:
        run.append(Stopped(step=0, total_steps=0, adapter_saved=False))


def break_off(run: Run, message: str, told: str) -> None:
    """Write down an end that nobody asked for: a pause, where there is something to go on from."""
    if run.last_step() or checkpoints.newest_complete(run):
        run.append(Paused(step=run.last_step(), total_steps=planned_steps(run), reason=message, traceback=told))
    else:
        run.append(Failed(message=message, traceback=told))


def planned_steps(run: Run) -> int:
    """The steps of the whole training, or 0 while they are not known."""
    return progress.fold(run.name, run.read()[0]).total_steps


def _keep_newest(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None) -> None:
    """Make the newest complete checkpoint's adapter the run's result."""
    abandonable(lambda: importlib.import_module("qlora_ui.engine.result"), should_stop)
    from qlora_ui.engine.result import keep

    newest = checkpoint or checkpoints.newest_complete(run)
    if newest is None:
        raise UserError(f"{run.id} has no complete checkpoint, so there is no adapter to keep.")
    keep(run, newest, emit)
    emit(Stopped(step=checkpoints.step_of(newest), total_steps=planned_steps(run), adapter_saved=True))


# What may be another when a run goes on: how it learns from here, and what it measures and saves. Not what it is.
CHANGEABLE = frozenset(
    {
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler",
        "warmup_ratio",
        "warmup_steps",
        "max_grad_norm",
        "weight_decay",
        "neftune_noise_alpha",
        "packing",
        "gradient_checkpointing",
    }
)


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The config to go on with. Raises UserError for what cannot be another in the middle of a run."""
    after = config.with_values(changes)
    measuring = {knob.name for knob in after.schedule.knobs()}
    values = after.values()
    for name, before in config.values().items():
        if values[name] != before and name not in CHANGEABLE | measuring:
            raise UserError(
                f"{name} is {values[name]!r}, but this run began with {before!r}: it cannot change on the way. "
                "Start a new run, with init_adapter to go on from this one's adapter.",
                field=name,
            )
    if after.effective_batch != config.effective_batch:
        raise UserError(
            f"The effective batch would be {after.effective_batch}, but this run began with {config.effective_batch}, by which its place "
            "in the data is counted. Change micro_batch_size and gradient_accumulation_steps together.",
            field="micro_batch_size",
        )
    return after


def check_goes_on(run: Run, config: RunConfig, step: int) -> None:
    """Raise UserError for a run that is at its end with this config. A run that its owner stopped may go on."""
    stand = progress.fold(run.name, run.read()[0])
    if not isinstance(stand.end, Finished) or stand.planned is None:
        return
    same_rows = config.total_steps(stand.planned.train_rows)
    if same_rows <= step:
        raise UserError(
            f"{run.id} is finished: all {step} steps are done. To train longer, set max_steps or num_train_epochs higher.",
            field="max_steps",
        )


def run_name(config: RunConfig) -> str:
    """`preset-data` in a slug: what a person recognises the run by."""
    data = sources.name_of(config.data.data)
    preset = re.sub(r"[^a-z0-9]+", "-", config.preset.lower()).strip("-")
    return (data if not preset or data.endswith(preset) else f"{data}-{preset}")[:48].strip("-")
