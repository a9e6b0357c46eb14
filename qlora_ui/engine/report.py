"""What Trainer does, told in events; its checkpoints sealed and thinned; its end where one is wished. Knows nothing of Gradio."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_ui import checkpoints
from qlora_ui.engine.hardware import memory_gib
from qlora_ui.engine.tokenized import FittedRows
from qlora_ui.engine.watch import FiniteSteps
from qlora_ui.events import CheckpointSaved, Event, HeldOut, Log, Planned, Step, finite
from qlora_ui.runs import Run
from qlora_ui.stopping import Cancelled

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]


class Reporter(TrainerCallback):
    """Turns what Trainer does into events, a checkpoint into a complete one, and the wish to end into an end at the next safe point."""

    def __init__(
        self, run: Run, emit: Emit, should_stop: ShouldStop, train: FittedRows, held_out: FittedRows, finite_steps: FiniteSteps
    ) -> None:
        self.run, self.emit, self.should_stop, self.finite_steps = run, emit, should_stop, finite_steps
        self.limit = run.config().schedule.save_total_limit
        self.train_rows, self.held_out_rows = train, held_out
        self.step_started = 0.0
        self.step_tokens = 0

    def count(self, tokens: int) -> None:
        """Tokens that go through the model now."""
        self.step_tokens += tokens

    def _end_here(self, *_: Any, **__: Any) -> None:
        if self.should_stop():
            raise Cancelled

    def _stop_here(self, *_: Any, **__: Any) -> None:
        if self.should_stop() and self.run.wish() != "pause":  # which waits for the end of the step
            raise Cancelled

    on_prediction_step = _end_here
    on_substep_end = _stop_here

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.emit(
            Planned(
                total_steps=state.max_steps,
                train_rows=len(self.train_rows),
                held_out_rows=len(self.held_out_rows),
                tokens=self.train_rows.tokens,
                trained_tokens=self.train_rows.trained_tokens,
            )
        )
        warm_up = args.get_warmup_steps(state.max_steps)
        if warm_up >= state.max_steps:
            what = f"The warm-up takes all of the {state.max_steps} steps, so that the learning rate never is {args.learning_rate:g}"
            self.emit(Log(text=f"{what}. Train longer, or lower warmup_ratio or warmup_steps", level="warning"))
        self._end_here()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:  # it went on from the last step, of which only the result is missing
            raise Cancelled
        self.step_started, self.step_tokens = time.perf_counter(), 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps and len(self.held_out_rows):
            control.should_evaluate = True  # else the result's held-out loss would be that of some step before
        elif self.should_stop() and self.run.wish() == "pause":
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # a run that goes on begins with what it owes

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self.step_started
        self.emit(
            Step(
                step=state.global_step,
                loss=finite(logs["loss"]) if self.finite_steps.loss_is_finite else None,
                learning_rate=logs["learning_rate"],
                grad_norm=finite(logs.get("grad_norm", float("nan"))),
                tokens_per_second=self.step_tokens / seconds,
                memory_gib=memory_gib(),
                epoch=state.epoch or 0.0,
                skipped=self.finite_steps.skipped,
            )
        )
        self.finite_steps.give_up_if_it_persists(state.global_step)
        self._stop_here()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        loss = finite((metrics or {}).get("eval_loss", float("nan")))
        if loss is not None:
            self.emit(HeldOut(step=state.global_step, loss=loss))
        else:
            self.emit(Log(text=f"step {state.global_step}: the held-out loss is not finite", level="warning"))
        self._end_here()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        best = state.best_global_step == state.global_step
        folder = self.run.folder / f"checkpoint-{state.global_step}"
        checkpoints.seal(folder)
        checkpoints.thin(self.run, self.limit, f"checkpoint-{state.best_global_step}")
        self.emit(CheckpointSaved(step=state.global_step, name=folder.name, best=best))
