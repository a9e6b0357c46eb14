"""What looks after a training: the best checkpoint, an early end, steps that must not count. Knows nothing of rows or Gradio."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_ui.config import ScheduleConfig
from qlora_ui.stopping import Diverged

# Loss scaling for float16 starts high on purpose and halves itself at each skipped step, so that a few are ordinary.
# Ten in a row have brought it from 65536 to 64, and are no accident in any other dtype either.
MOST_SKIPPED_IN_A_ROW = 10


class BestCheckpoint(TrainerCallback):
    """Knows the best of the saved checkpoints by held-out loss, and ends a training that does not get better any more.

    Trainer spares from `save_total_limit` what the state calls best. It would call so any step that was measured; here it
    is one that is saved too.
    """

    def __init__(self, schedule: ScheduleConfig) -> None:
        self.keeps_best, self.patience = schedule.keep == "best", schedule.early_stopping_patience
        self.ended_because = ""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            return
        losses = measured(state)
        loss = losses[-1][1]
        if loss < (math.inf if state.best_metric is None else state.best_metric):
            control.should_save = control.should_save or self.keeps_best
            if control.should_save:
                state.best_metric, state.best_global_step = loss, state.global_step
        best = min(range(len(losses)), key=lambda index: losses[index][1])
        if self.patience and len(losses) - 1 - best >= self.patience and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            self.ended_because = (
                f"ended before step {state.max_steps}, because {self.patience} measurements in a row "
                f"were not better than the held-out loss {losses[best][1]:.4f} of step {losses[best][0]}"
            )


def measured(state: TrainerState) -> list[tuple[int, float]]:
    """Step and held-out loss of every measurement so far, read from the state, so that a resumed run knows it too."""
    losses = {int(entry["step"]): float(entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry}
    return [(step, loss if math.isfinite(loss) else math.inf) for step, loss in losses.items()]


def owes_measurement(checkpoint: Path, eval_steps: int) -> bool:
    """Whether a run that goes on from there ended when it was due to measure the held-out loss, before it had."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step % eval_steps == 0 and state.global_step not in dict(measured(state))


class FiniteSteps(TrainerCallback):
    """Keeps a step whose loss or gradients are not finite away from the weights, and gives up when that persists."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.loss_is_finite: torch.Tensor | bool = True  # a tensor on the device: to ask it would wait for the device
        self.skipped = False
        self.in_a_row = 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.loss_is_finite = True

    def take(self, loss: torch.Tensor) -> torch.Tensor:
        """Look at a batch's loss. What is returned is finite: Trainer keeps a running sum, which would never recover."""
        self.loss_is_finite = loss.isfinite() & self.loss_is_finite
        return loss.nan_to_num(0, 0, 0)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any) -> None:
        # Clipping to a norm that is not finite has made the gradients so too, all or some, so that this sees either.
        norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        self.skipped = not bool(self.loss_is_finite & norm.isfinite())
        self.in_a_row = self.in_a_row + 1 if self.skipped else 0
        if self.skipped:
            model.zero_grad()  # optimizers leave alone what has no gradient, their own memory of it included

    def give_up_if_it_persists(self, step: int) -> None:
        """Raise Diverged when too many steps in a row were skipped."""
        if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise Diverged(
                f"In {self.in_a_row} steps in a row ({step - self.in_a_row + 1} to {step}) the loss or its gradients were not finite, "
                f"so the training was ended; none of these steps changed the weights. Lower learning_rate (it is {self.learning_rate:g}) "
                "or raise warmup_ratio; with compute_dtype float16, use bfloat16 or float32. "
                "If it began with step 1, look at the model and the rows.",
                first_step=step - self.in_a_row + 1,
            )
