"""transformers' Trainer, a whole optimizer step at a time. Knows nothing of configs, run folders or Gradio."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from qlora_ui.checkpoints import SEAL
from qlora_ui.engine import seq2seq
from qlora_ui.engine.batches import MICRO_BATCHES, ROWS
from qlora_ui.engine.loss import predicting
from qlora_ui.engine.optimization import LengthGroups, loraplus_optimizer
from qlora_ui.engine.step_plan import StepPlan
from qlora_ui.engine.tokens import IGNORED, REAL_TOKENS
from qlora_ui.engine.watch import FiniteSteps


class Updates(TrainerCallback):
    """Knows whether the optimizer is at work, which an error may leave half done."""

    updating = False

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.updating = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.updating = False


class StepTrainer(Trainer):
    """Trainer whose batch is a whole optimizer step in micro-batches. `on_tokens` is told of each that goes through the model."""

    control: TrainerControl

    def __init__(
        self, *, plan: StepPlan, on_tokens: Callable[[int], None], finite_steps: FiniteSteps, loraplus_lr_ratio: float, **kwargs: Any
    ) -> None:
        # Of several GPUs that one process sees, Trainer would give each a batch of its own; the model is on one, or over all of them.
        kwargs["args"]._n_gpu = min(kwargs["args"].n_gpu, 1)
        super().__init__(compute_loss_func=plan.loss or seq2seq.loss, **kwargs)
        self.plan, self.on_tokens, self.finite_steps, self.loraplus_lr_ratio = plan, on_tokens, finite_steps, loraplus_lr_ratio
        self.updates = Updates()
        self.add_callback(self.updates)

    def create_optimizer(self, model: Any = None) -> Any:
        """With LoRA+, the two halves of each adapter learn at different rates."""
        if self.loraplus_lr_ratio != 1 and self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = loraplus_optimizer(model or self.model, self.args, self.loraplus_lr_ratio)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        return LengthGroups(sampler, self.args.seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's way, which restores the learning rate too; a run that goes on may have been told another one."""
        if checkpoint is None:
            return
        told: list[dict[str, Any]] = [
            {name: group[name] for name in ("initial_lr", "weight_decay") if name in group} for group in self.optimizer.param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, values in zip(self.optimizer.param_groups, told, strict=True):
            group.update(values)
        schedule: Any = self.lr_scheduler
        schedule.base_lrs = [values["initial_lr"] for values in told]
        for group, base, share in zip(self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * share(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last step, outside Trainer's own times for it."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(exist_ok=True)  # Trainer would make the run's folder too, which somebody may have deleted
        (folder / SEAL).unlink(missing_ok=True)  # what is written over is not complete
        super()._save_checkpoint(model, trial)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's way, without drawing from the random numbers of the training: a run may end and go on in the middle of it."""
        with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
            measured: dict[str, float] = super().evaluate(*args, **kwargs)
        return measured

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of each micro-batch; between two of them is a place to stop. The gradients are shared at the last.

        The loss of a step that is not finite is kept out of Trainer's running sum, and its gradients out of the weights.
        """
        *others, last = inputs[MICRO_BATCHES]
        self.current_gradient_accumulation_steps = len(others) + 1  # by which Trainer divides a loss that the model averaged itself
        loss: torch.Tensor = torch.zeros((), device=self.args.device)
        with self.plan.attention(self.model):
            for batch in others:
                with self.accelerator.no_sync(model):
                    loss += super().training_step(model, batch, num_items_in_batch)
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
            loss += super().training_step(model, last, num_items_in_batch)
        return self.finite_steps.take(loss)

    def compute_loss_context_manager(self) -> Any:
        """The autocast that accelerate puts around the model's forward, which `compute_loss` takes away."""
        precision = self.accelerator.mixed_precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.args.device.type, dtype=dtype, enabled=precision != "no")

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's way, with the head held to the trained tokens, and without accelerate's copy of all logits in float32."""
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        with self.plan.loss.selecting(inputs["labels"]) if self.plan.loss else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        batches = [batch for step in batch_samples for batch in step.get(MICRO_BATCHES, [step])]
        return super()._get_num_items_in_batch(batches, device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.on_tokens(inputs.pop(REAL_TOKENS))  # Trainer's own count waits for the device
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer takes the mean over rows of their batch's loss; weighted so, that is the mean over all trained tokens."""
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs[MICRO_BATCHES]):
            if number:
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            labels = batch["labels"]
            trained = (predicting(labels) if self.plan.loss else labels != IGNORED).sum()
            with self.plan.attention(self.model):
                total += super().prediction_step(model, batch, *args, **kwargs)[0] * trained
        held_out: Any = self.eval_dataset
        return total / inputs[ROWS] * len(held_out) / held_out.trained_tokens, None, None
