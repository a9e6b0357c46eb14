"""A forecast corrected by a step that was really made. Knows nothing of disk, torch or Gradio."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_ui.config import RunConfig
from qlora_ui.memory.devices import Device
from qlora_ui.memory.forecast import Forecast, forecast
from qlora_ui.memory.shapes import ModelShape


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


def corrected(shape: ModelShape, config: RunConfig, device: Device, measured: Measured) -> Forecast:
    """The forecast, brought to what was measured.

    Weights, adapter, gradients and optimizer state are counted as the libraries store them, so that what differs is taken to be the
    activations and logits; only if less was taken than is counted, all terms are made smaller alike. Pages of the optimizer's state
    are not in what torch allocates.
    """
    done = config.with_values({"gradient_checkpointing": "on" if measured.gradient_checkpointing else "off"})
    planned = forecast(shape, done, device)
    terms = planned.terms
    estimated = terms.activations + terms.logits
    counted = planned.total - terms.overhead - estimated - planned.paged_bytes
    if measured.memory_bytes >= counted:
        factors = dict.fromkeys(("activations", "logits"), (measured.memory_bytes - counted) / estimated)
    else:
        factors = {name: measured.memory_bytes / (counted + estimated) for name, _ in terms if name != "overhead"}
    return forecast(shape, done, device, factors)
