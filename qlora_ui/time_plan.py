"""What a training will do with its rows, before it is begun: steps, passes, tokens, time. Knows nothing of disk, torch or Gradio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qlora_ui.config import KNOBS, RunConfig
from qlora_ui.data.checks import DataSet, held_out_indices
from qlora_ui.errors import UserError
from qlora_ui.progress import duration

if TYPE_CHECKING:
    from qlora_ui.engine.preview import Preview

FEW_PASSES = 4  # the paper's Guanaco models saw their rows about three times
# Two runs that differ in nothing else take the same time for a step.
UNTIMED = frozenset(
    {
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "adam_beta1",
        "adam_beta2",
        "lora_alpha",
        "seed",
        "on_divergence",
        *(knob.name for knob in KNOBS.values() if knob.section == "schedule"),
    }
)


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """Rows are sequences as they are read: none of a row that is left out, several of one that is split.

    `tokens_a_pass` is None before tokens are counted, `seconds_a_step` before such steps were measured; `whose` they were.
    """

    steps: int
    steps_a_pass: int
    micro_batch_size: int
    accumulation: int
    rows: int
    held_out: int
    tokens_a_pass: int | None = None
    seconds_a_step: float | None = None
    whose: str = "of the last such run"

    @property
    def passes(self) -> float:
        """How often each row is seen."""
        return self.steps / self.steps_a_pass

    def words(self) -> str:
        """`45 steps of 4 rows (4 × 1), 1.25 passes over 144 rows, about 40,000 tokens; 9 rows held out.`"""
        batch = f"{self.micro_batch_size * self.accumulation} rows ({self.micro_batch_size} × {self.accumulation})"
        passes = f"{self.passes:.3g}" if self.passes < 1000 else f"{self.passes:,.0f}"
        passes += " pass" if passes == "1" else " passes"
        tokens = "" if self.tokens_a_pass is None else f", about {rounded(self.passes * self.tokens_a_pass):,} tokens"
        time = ""
        if self.seconds_a_step is not None:
            time = f" About {duration(self.steps * self.seconds_a_step)}, at the {self.seconds_a_step:.2g} s a step {self.whose}."
        return f"{self.steps:,} steps of {batch}, {passes} over {self.rows:,} rows{tokens}; {self.held_out:,} rows held out.{time}"

    def warning(self) -> str:
        """A sentence when the rows are seen more than a few times, else nothing."""
        if self.passes <= FEW_PASSES:
            return ""
        return (
            f"Each row is seen about {self.passes:,.0f} times: after a few passes a model learns rows by heart. "
            "Watch the held-out loss, or train for fewer steps."
        )


def time_plan(config: RunConfig, data: DataSet, preview: Preview | None, seconds_a_step: float | None) -> TimePlan:
    """As the trainer will count; before the tokens are counted, as if every row were short enough. Raises UserError without a row."""
    held_out = held_out_indices(data, config.data, config.optimization.seed)
    tokens = None
    if preview:
        fitted = preview.fitted(config.data.max_seq_len, config.data.long_rows)
        is_measured = np.isin(fitted.row, list(held_out))
        rows, measured = int(np.sum(~is_measured)), int(np.sum(is_measured))
        tokens = int(fitted.lengths[~is_measured].sum())
    else:
        rows, measured = len(data.conversations) - len(held_out), len(held_out)
    if not rows:
        raise UserError(f"No row is left to train on: max_seq_len is {config.data.max_seq_len}. Raise it.", field="max_seq_len")
    return TimePlan(
        steps=config.total_steps(rows),
        steps_a_pass=config.steps_an_epoch(rows),
        micro_batch_size=config.optimization.micro_batch_size,
        accumulation=config.optimization.gradient_accumulation_steps,
        rows=rows,
        held_out=measured or len(data.held_out),
        tokens_a_pass=tokens,
        seconds_a_step=seconds_a_step,
    )


def same_pace(one: RunConfig, other: RunConfig) -> bool:
    """Whether a step of both takes the same time on the same machine."""
    values = other.values()
    return all(values[name] == value for name, value in one.values().items() if name not in UNTIMED)


def rounded(number: float) -> int:
    """To two figures: more would say that it is exact."""
    return int(float(f"{number:.2g}"))
