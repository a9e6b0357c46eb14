"""transformers' own callbacks for trackers, held so that they cannot end a training. Knows nothing of rows or Gradio."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from qlora_ui.engine.step_trainer import StepTrainer
from qlora_ui.events import Event, Log
from qlora_ui.runs import Run
from qlora_ui.stopping import Cancelled, abandonable
from qlora_ui.trackers import without_secrets

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]

PROJECT = "qlora-ui"
CONNECTING_SECONDS = 30.0
SENDING_SECONDS = 60.0  # for what a tracker holds back at the end of a run: the device waits for it


@contextlib.contextmanager
def reporting(run: Run, trainer: StepTrainer, emit: Emit, should_stop: ShouldStop) -> Iterator[None]:
    """While the block trains, its metrics go to the run's trackers too."""
    trackers = [Tracker(name, run, trainer, emit) for name in run.config().schedule.trackers()]
    for tracker in trackers:
        tracker.begin(should_stop)
        trainer.callback_handler.callbacks.insert(0, tracker)  # before those that end a step: it is to hear of the last one too
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.end()


class Tracker(TrainerCallback):
    """Passes on what Trainer tells to one tracker's callback. Its first trouble is told, and it hears no more."""

    def __init__(self, name: str, run: Run, trainer: StepTrainer, emit: Emit) -> None:
        self.name, self.run, self.trainer, self.emit = name, run, trainer, emit
        self.callback: Any = None
        self.ended = False

    def begin(self, should_stop: ShouldStop) -> None:
        """Open it. A network that hangs does not keep a run from being stopped."""
        with self.telling_trouble("cannot be begun"):
            if self.name == "wandb":
                abandonable(lambda: begin_wandb(self.run), should_stop)
            (make,) = get_reporting_integration_callbacks([self.name])
            callback = make()
            if self.name == "tensorboard":
                callback.logging_dir = str(self.run.folder / "tensorboard")
            self.callback, place = callback, where(self.name, self.run)
        if self.callback is not None:
            self.emit(Log(text=f"Metrics go to {self.name} too: {place}"))

    def end(self) -> None:
        """Close it, also when the training was ended on its way."""
        self.on_train_end(self.trainer.args, self.trainer.state, self.trainer.control, model=self.trainer.model)
        self.callback = None
        if self.name == "wandb" and getattr(sys.modules.get("wandb"), "run", None):  # which its callback leaves open
            with self.telling_trouble(f"holds back what was not sent within {SENDING_SECONDS:g} s"):
                until = time.monotonic() + SENDING_SECONDS
                try:
                    abandonable(importlib.import_module("wandb").finish, lambda: time.monotonic() > until)
                except Cancelled:
                    raise TimeoutError(f"wandb sync {self.run.folder / 'wandb'} sends it later") from None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        if logs and "loss" in logs and not self.trainer.finite_steps.loss_is_finite:
            logs = {**logs, "loss": math.nan}  # which Trainer was told is 0
        self.pass_on("on_log", args, state, control, logs=logs, **more)

    def on_train_begin(self, *told: Any, **more: Any) -> None:
        self.pass_on("on_train_begin", *told, **more)

    def on_save(self, *told: Any, **more: Any) -> None:
        self.pass_on("on_save", *told, **more)

    def on_train_end(self, *told: Any, **more: Any) -> None:
        if not self.ended:
            self.ended = True
            self.pass_on("on_train_end", *told, **more)

    def pass_on(self, event: str, *told: Any, **more: Any) -> None:
        if self.callback is not None:
            with self.telling_trouble("is left out from here on"):
                getattr(self.callback, event)(*told, **more)

    @contextlib.contextmanager
    def telling_trouble(self, what: str) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # on which some chat; stdout belongs to the caller
                yield
        except Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - a tracker may raise anything, even SystemExit, and the run matters more
            self.callback = None
            reason = without_secrets(str(error).strip().partition("\n")[0][:300] or type(error).__name__)
            self.emit(Log(text=f"{self.name} {what}, the run goes on: {reason}", level="warning"))


def begin_wandb(run: Run) -> None:
    """Its run, under our run's id, so that one that goes on goes on there too. Its files lie in the run folder."""
    wandb = importlib.import_module("wandb")
    if wandb.run is not None:
        raise RuntimeError(f"it is still sending {wandb.run.name}")
    settings = wandb.Settings(console="off", silent=True, init_timeout=CONNECTING_SECONDS)  # what the app prints is not this run's
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    wandb.init(project=project, id=run.id, name=run.id, resume="allow", dir=str(run.folder), settings=settings)


def where(name: str, run: Run) -> str:
    """Where a person finds them."""
    if name == "tensorboard":
        return f"tensorboard --logdir {run.folder / 'tensorboard'}"
    if name == "trackio":
        return os.environ.get("TRACKIO_SPACE_ID") or f"trackio show --project {PROJECT}"
    return importlib.import_module("wandb").run.url or f"wandb sync {run.folder / 'wandb'} sends them later"
