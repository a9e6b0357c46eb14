"""How a run goes on: from which checkpoint, with which settings, and for what reason. Knows nothing of Gradio."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_ui import checkpoints, progress
from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.events import Finished, Log, Resumed
from qlora_ui.memory.advice import advice_after_lack
from qlora_ui.model_shapes import find_shape
from qlora_ui.runs import Run
from qlora_ui.stopping import Diverged

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
        "on_divergence",
        "packing",
        "gradient_checkpointing",
    }
)
TOO_LITTLE_MEMORY = "The memory did not suffice"
DIVERGED = "The loss diverged"
SLOWER = 5  # what the learning rate is divided by after that


def go_on(run: Run, config: RunConfig, checkpoint: Path | None, reason: str = "") -> None:
    """Write down that the run goes on from a checkpoint (None: from its beginning) with this config. Its lock must be held."""
    values = config.values()
    differences = {name: [value, values[name]] for name, value in run.config().values().items() if value != values[name]}
    unusable = checkpoints.put_aside(run, checkpoint)  # first, for the room that it gives back
    if differences:
        run.note(**config.to_dict())
    step, name = (checkpoints.step_of(checkpoint), checkpoint.name) if checkpoint else (0, "")
    run.append(Resumed(step=step, checkpoint=name, changes=differences, reason=reason))
    for line in unusable:
        run.append(Log(text=line, level="warning"))


def with_less(run: Run, lack: str) -> Path | None:
    """Go on from the newest complete checkpoint with less memory. Raises UserError when there is nothing left to save."""
    config, phase = run.config(), progress.fold(run.name, run.read()[0]).phase
    changes = less_memory(config)
    if phase not in ("training", "saving"):
        raise UserError(
            f"{config.model.model} does not fit into the memory of this machine ({lack}). {memory_advice(run, config, loading=True)}",
            field="model",
        )
    if not changes:
        raise UserError(
            f"{TOO_LITTLE_MEMORY} even for one row at a time with gradient checkpointing ({lack}). "
            f"{memory_advice(run, config, loading=False)}",
            field="max_seq_len",
        )
    checkpoint = checkpoints.newest_complete(run)
    go_on(run, config.with_values(changes), checkpoint, f"{TOO_LITTLE_MEMORY} ({lack})")
    return checkpoint


def less_memory(config: RunConfig) -> dict[str, Any]:
    """The next change that saves memory and leaves what is learned alone: smaller micro-batches, then gradient checkpointing."""
    o = config.optimization
    smaller = [rows for rows in range(1, o.micro_batch_size // 2 + 1) if config.effective_batch % rows == 0]
    if smaller:
        return {"micro_batch_size": smaller[-1], "gradient_accumulation_steps": config.effective_batch // smaller[-1]}
    return {} if o.gradient_checkpointing == "on" else {"gradient_checkpointing": "on"}


def memory_advice(run: Run, config: RunConfig, *, loading: bool) -> str:
    """What the memory planner advises for this device as it is now; for a model that it does not know, what always helps."""
    from qlora_ui.engine import hardware

    try:
        shape = find_shape(config.model.model, config.model.revision, run.workspace.models)
    except UserError as unknown:
        return (
            f"Lower max_seq_len (it is {config.data.max_seq_len}) or lora_r ({config.adapter.lora_r}), choose a smaller model, or close "
            f"what else uses the memory. {unknown}"
        )
    return advice_after_lack(shape, config, hardware.detect(config.quantization.compute_dtype).device(), loading=loading)


def slower(run: Run, error: Diverged) -> Path | None:
    """Go back to the last checkpoint before the loss diverged, with a lower learning rate, where the owner chose so; once.

    Raises the error again otherwise.
    """
    config = run.config()
    went_back = any(isinstance(event, Resumed) and event.reason.startswith(DIVERGED) for event in run.read()[0])
    if config.optimization.on_divergence == "pause" or went_back:
        raise error
    checkpoint = checkpoints.newest_complete(run, before=error.first_step)
    rate = config.optimization.learning_rate / SLOWER
    go_on(run, config.with_values({"learning_rate": rate}), checkpoint, f"{DIVERGED} in step {error.first_step} and did not recover")
    return checkpoint


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
