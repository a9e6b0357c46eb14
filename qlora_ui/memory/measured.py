"""Forecasts corrected by a step that was really made. Knows nothing of disk, torch or Gradio."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from qlora_ui.config import RunConfig
from qlora_ui.memory.devices import Device
from qlora_ui.memory.forecast import Forecast, Plan, forecast
from qlora_ui.memory.shapes import ModelShape

ESTIMATED = ("activations", "logits")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a few steps of a run took on this machine.

    `memory_bytes`: the most, on the longest rows, beside the libraries themselves (a forecast's overhead): what torch allocated
    on a GPU, what the process grew by on a CPU. `seconds_a_step`: of a step with rows of all lengths, without measuring or saving.
    """

    memory_bytes: int
    seconds_a_step: float
    train_rows: int
    gradient_checkpointing: bool


def plan_by(shape: ModelShape, config: RunConfig, device: Device, measured: Measured | None) -> Plan:
    """Forecasts brought to what was measured of `config` on `device`: its own, and those of other settings and cards.

    Weights, adapter, gradients and optimizer state are counted as the libraries store them, so that what differs is taken to be the
    activations and logits; only if less was taken than is counted, all terms are made smaller alike. Pages of the optimizer's state
    are not in what torch allocates. Of activations that are recomputed, what was measured of kept ones says nothing, nor the other
    way round. Automatic gradient checkpointing is taken to choose again what it chose.
    """
    if measured is None:
        return partial(forecast, shape)

    def as_measured(other: RunConfig) -> RunConfig:
        if other.optimization.gradient_checkpointing != "auto":
            return other
        return other.with_values({"gradient_checkpointing": "on" if measured.gradient_checkpointing else "off"})

    planned = forecast(shape, as_measured(config), device)
    estimated = planned.terms.activations + planned.terms.logits
    counted = planned.total - planned.terms.overhead - estimated - planned.paged_bytes
    if measured.memory_bytes >= counted:
        factors = dict.fromkeys(ESTIMATED, (measured.memory_bytes - counted) / estimated)
    else:
        factors = {name: measured.memory_bytes / (counted + estimated) for name, _ in planned.terms if name != "overhead"}
    of_others = {name: factor for name, factor in factors.items() if name not in ESTIMATED}

    def corrected(other: RunConfig, on: Device) -> Forecast:
        done = as_measured(other)
        is_alike = (done.optimization.gradient_checkpointing == "on") == measured.gradient_checkpointing
        return forecast(shape, done, on, factors if is_alike else of_others)

    return corrected
