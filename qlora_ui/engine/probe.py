"""A few steps of a run that is not begun, to measure their memory and time. Nothing of them is kept. Knows nothing of Gradio."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from qlora_ui.config import RunConfig
from qlora_ui.engine.hardware import MemoryGrowth
from qlora_ui.engine.tokenized import FittedRows
from qlora_ui.engine.train import Emit, ShouldStop, in_given_memory, prepare
from qlora_ui.events import Phase
from qlora_ui.memory.measured import Measured
from qlora_ui.runs import Run, Workspace, write_json

PREFIX = "probe-"
STEPS = 3  # two on the longest rows, because the optimizer's state is there from the second on; one on rows of all lengths


def measure(config: RunConfig, workspace: Workspace, emit: Emit, should_stop: ShouldStop) -> Measured:
    """Load the model as the run would, make the steps, and forget them. The device's lease must be held.

    Raises UserError, OutOfMemory, or Cancelled when it was asked to end.
    """
    cache = workspace.root / "cache"
    cache.mkdir(exist_ok=True)
    for left in cache.glob(f"{PREFIX}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    run = Run(folder=Path(tempfile.mkdtemp(prefix=PREFIX, dir=cache)))
    try:
        write_json(run.config_path, config.with_values({"max_steps": STEPS}).to_dict())
        return in_given_memory(lambda: make_steps(run, config, emit, should_stop))
    finally:
        shutil.rmtree(run.folder, ignore_errors=True)


def make_steps(run: Run, config: RunConfig, emit: Emit, should_stop: ShouldStop) -> Measured:
    """The steps, with Trainer's own loop; nothing is saved."""
    known: dict[str, int] = {}

    def chosen(train: FittedRows, held_out: FittedRows) -> tuple[FittedRows, FittedRows]:
        known["train_rows"] = len(train)
        return rows_of_steps(train, config.effective_batch), held_out.select(np.arange(0))

    stopwatch = Stopwatch()
    with MemoryGrowth() as growth:
        trainer, _ = prepare(run, emit, should_stop, choose=chosen)
        trainer.args.train_sampling_strategy = "sequential"
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.add_callback(stopwatch)
        emit(Phase(name="training"))
        trainer.train()
    return Measured(
        memory_bytes=growth.peak_bytes,
        seconds_a_step=stopwatch.seconds[-1],
        train_rows=known["train_rows"],
        gradient_checkpointing=trainer.plan.gradient_checkpointing,
    )


def rows_of_steps(rows: FittedRows, effective_batch: int) -> FittedRows:
    """Twice the longest rows that a step can have, then as many from the longest to the shortest. Few rows are used again."""
    longest_first = np.argsort(-rows.fitted.lengths, kind="stable")
    longest = np.resize(longest_first, effective_batch)
    of_all_lengths = longest_first[((np.arange(effective_batch) + 0.5) * len(rows) / effective_batch).astype(int)]
    return rows.select(np.concatenate([longest, longest, of_all_lengths]))


class Stopwatch(TrainerCallback):
    """Seconds of each step, to the moment at which its loss is known."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if "loss" in (logs or {}):
            self.seconds.append(time.perf_counter() - self.began)
