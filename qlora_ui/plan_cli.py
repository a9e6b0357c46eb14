"""`plan`: what memory a run would take, printed. Knows nothing of Gradio; of torch only when this machine is looked at or measured."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from qlora_ui import presets
from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.events import Event
from qlora_ui.export_cli import CANCELLED, stop_on_signals
from qlora_ui.memory.advice import advice_for, dtype_caution
from qlora_ui.memory.devices import CARDS, GIB, Device, find_device
from qlora_ui.memory.forecast import Forecast, forecast
from qlora_ui.memory.measured import Measured, plan_by
from qlora_ui.memory.shapes import ModelShape
from qlora_ui.model_shapes import find_shape
from qlora_ui.probing import measure_here
from qlora_ui.progress import Progress, duration
from qlora_ui.runs import Workspace
from qlora_ui.stopping import Cancelled

BAR = 40  # characters for all of the device's memory
# GB that the QLoRA paper (arXiv 2305.14314) names for the 4-bit model, and for its Guanaco models.
PAPER = {"guanaco-7b": (5, 5), "guanaco-13b": (10, 10), "guanaco-33b": (None, 21), "guanaco-65b": (35, 41)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan`."""
    parser.add_argument("--preset", help="a file of presets/, without .yaml (default: starter, or plain settings with --model)")
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: the preset's)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be repeated")
    cards = ", ".join(card.name for card in CARDS)
    parser.add_argument("--gpu", metavar="GIB", help=f"plan for a GPU of so many GiB, or one of {cards} (default: this machine, as free)")
    parser.add_argument("--data", help="with --probe: the rows to measure on, as in `train` (default: the preset's)")
    parser.add_argument("--probe", action="store_true", help="train three steps on this machine to measure them; nothing is kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object; sizes are bytes")


def read_config(preset: str | None, model: str | None, settings: dict[str, str]) -> RunConfig:
    """Preset, then --model, then each --set, the later winning."""
    config = RunConfig() if model and not preset else presets.load(preset or "starter").config
    return config.with_values({**({"model": model} if model else {}), **settings})


def plan(config: RunConfig, workspace: Workspace, gpu: str | None, probe: bool, as_json: bool) -> int:
    """Print the forecast for this card, or for this machine, where it can be measured too."""
    if probe and gpu:
        raise UserError("--probe measures on this machine. Leave out --gpu, or --probe.")
    shape = find_shape(config.model.model, config.model.revision, workspace.models)
    device = find_device(gpu) if gpu else this_machine(config)
    try:
        measured = measure(config, workspace) if probe else None
    except Cancelled:
        print("Cancelled: nothing was measured.", file=sys.stderr)
        return CANCELLED
    forecast_of = plan_by(shape, config, device, measured)
    planned = forecast_of(config, device)
    said = f"{advice_for(forecast_of, config, device)} {dtype_caution(config, device)}".rstrip()
    if as_json:
        print(json.dumps(report(config, shape, device, planned, said, measured)))
    else:
        print(words(config, shape, device, planned, said))
        print(measured_words(config, measured), end="")
    return 0


def measure(config: RunConfig, workspace: Workspace) -> Measured:
    """Train the steps, telling how far they are where somebody looks."""
    progress = Progress("Measuring")

    def emit(event: Event) -> None:
        progress.add(event)
        if sys.stderr.isatty():
            print(f"\r\033[K{progress.status_line()}", end="", file=sys.stderr, flush=True)

    with stop_on_signals() as stop:
        measured = measure_here(config, workspace, emit, stop.is_set)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return measured


def measured_words(config: RunConfig, measured: Measured | None) -> str:
    """What was measured, and how long the run would take."""
    if measured is None:
        return ""
    steps = config.total_steps(measured.train_rows)
    return (
        f"Measured: {measured.memory_bytes / GIB:.2f} GiB beside the overhead; {measured.seconds_a_step:.2g} s a step, so that "
        f"{steps:,} steps take about {duration(steps * measured.seconds_a_step)} without measuring and saving.\n"
    )


def this_machine(config: RunConfig) -> Device:
    """What would train here, with the memory that is free now."""
    from qlora_ui.engine import hardware

    hardware.detect(config.quantization.compute_dtype)  # refuses what this machine cannot compute in
    return hardware.detect().device()


def report(
    config: RunConfig, shape: ModelShape, device: Device, planned: Forecast, said: str, measured: Measured | None
) -> dict[str, object]:
    """The forecast as scripts read it."""
    return {
        "terms": dict(planned.terms),
        "total": planned.total,
        "verdict": planned.verdict(device.memory_bytes),
        "advice": said,
        "paged": planned.paged_bytes,
        "device": device.name,
        "memory": device.memory_bytes,
        "model": config.model.model,
        "parameters": shape.parameters,
        "compute_dtype": planned.compute_dtype,
        "gradient_checkpointing": planned.gradient_checkpointing,
        "tokens": planned.tokens,
        "measured": dataclasses.asdict(measured) if measured else None,
        "steps": config.total_steps(measured.train_rows) if measured else None,
    }


def words(config: RunConfig, shape: ModelShape, device: Device, planned: Forecast, said: str) -> str:
    """The forecast as a person reads it: a bar for each term, drawn to the scale of the device's memory."""
    recomputed = "recomputed" if planned.gradient_checkpointing else "kept"
    lines = [
        f"{config.model.model} ({shape.parameters / 1e9:.2f} billion parameters) on {device.name}, {device.memory_bytes / GIB:.1f} GiB",
        f"{config.quantization.quant_bits} bits, computed in {planned.compute_dtype}; {planned.tokens:,} tokens at once, "
        f"activations {recomputed}",
        "",
    ]
    rows = [*planned.terms, ("total", planned.total)]
    for name, size in rows:
        bar = "█" * min(round(BAR * size / device.memory_bytes), BAR)
        lines.append(f"{name.replace('_', ' '):24}{size / GIB:8.2f} GiB  {bar}".rstrip())
    if planned.paged_bytes:
        lines.append(f"Of the optimizer state {planned.paged_bytes / GIB:.2f} GiB are pages that may move to the CPU's memory.")
    if config.adapter.init_adapter:
        lines.append("The adapter to go on with is counted as if it had this run's rank and targets.")
    return "\n".join([*lines, "", f"Verdict: {planned.verdict(device.memory_bytes)}. {said}".rstrip()])


def paper_table() -> str:
    """The planner's figures beside the paper's, as the README shows them, in GB of a thousand million bytes."""
    lines = [
        "| preset | parameters | base model | paper: 4-bit model | with adapter, gradients, optimizer | all, activations recomputed "
        "| paper: Guanaco |",
        "|---|---|---|---|---|---|---|",
    ]
    card = find_device("48")
    for name, (of_weights, of_guanaco) in PAPER.items():
        config = presets.load(name).config.with_values({"gradient_checkpointing": "on"})
        shape = find_shape(config.model.model, config.model.revision, presets.FOLDER)
        planned = forecast(shape, config, card)
        terms = planned.terms
        trained = terms.base + terms.adapter + terms.gradients + terms.optimizer_state
        lines.append(
            f"| `{name}` | {shape.parameters / 1e9:.2f} billion | {terms.base / 1e9:.1f} GB | {f'{of_weights} GB' if of_weights else ''} "
            f"| {trained / 1e9:.1f} GB | {planned.total / 1e9:.1f} GB | {of_guanaco} GB |"
        )
    return "\n".join(lines)
