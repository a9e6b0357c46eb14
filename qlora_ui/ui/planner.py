"""The planners on the Train tab: what memory and time a run would take, moving with every field. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from qlora_ui import overview
from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.inspection import Look
from qlora_ui.memory.advice import advice_for
from qlora_ui.memory.devices import CARDS, GIB, Device, find_device
from qlora_ui.memory.forecast import Forecast, Verdict, forecast
from qlora_ui.memory.shapes import ModelShape
from qlora_ui.model_configs import NotHere, find_shape, find_shape_within
from qlora_ui.services import Services
from qlora_ui.time_plan import time_plan
from qlora_ui.ui import form, markup

HERE = "this machine"
VERDICT_WORDS: dict[Verdict, str] = {"fits": "Fits", "tight": "Tight", "does not fit": "Does not fit"}
# What is opened to be read stays so when a field changes.
STAY_OPEN = """
let open = false;
element.addEventListener('click', event => {
  const summary = event.target.closest('summary');
  if (summary) open = !summary.parentElement.open;
});
watch('value', () => { for (const details of element.querySelectorAll('details')) details.open = open; });
"""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """The components, in reading order."""

    verdict: gr.HTML
    card: gr.Dropdown
    bar: gr.HTML
    ask_hub: gr.Button

    @property
    def shown(self) -> list[gr.components.Component]:
        """What `look` fills, in its order."""
        return [self.verdict, self.bar, self.ask_hub]


def build() -> Planner:
    """Verdict and card in a row, the bar under them."""
    with gr.Row(elem_id="memory-head"):
        verdict = gr.HTML(elem_id="memory-verdict")
        card = gr.Dropdown(
            [("This machine", HERE), *((card.title, card.name) for card in CARDS)],
            value=HERE,
            label="Memory of",
            show_label=False,
            container=False,
            min_width=150,
            scale=0,
            elem_id="memory-card",
        )
    bar = gr.HTML(js_on_load=STAY_OPEN, elem_id="memory-plan")
    ask_hub = gr.Button("Ask the Hub for its shape", visible=False, size="sm", elem_id="memory-ask-hub")
    return Planner(verdict=verdict, card=card, bar=bar, ask_hub=ask_hub)


def wire(services: Services, planner: Planner, names: list[str], values: list[Any], changed: Any, quiet: dict[str, Any]) -> None:
    """Plan again at every `changed` event. Only the button asks anybody outside this machine."""
    plan: dict[str, Any] = {"inputs": [planner.card, *values], "outputs": planner.shown, **quiet}
    fn = partial(look, services, names, False)
    changed(fn, **plan, queue=False, trigger_mode="always_last")
    planner.ask_hub.click(partial(look, services, names, True), **plan)


def look(services: Services, names: list[str], ask_hub: bool, card: str, preset: str, data: str, *values: Any) -> list[Any]:
    """The forecast for the form's settings, or why there is none."""
    try:
        config = form.read(preset, data, names, values)
    except UserError:  # the plan above Start says it
        return [markup.note("Memory is counted again when the settings are right."), "", gr.update(visible=False)]
    try:
        find = find_shape if ask_hub else find_shape_within
        shape = find(config.model.model, config.model.revision, services.workspace.models)
        device = device_of(services, card)
        if device is None:
            return [markup.note("Memory: this machine is being looked at …"), "", gr.update(visible=False)]
        planned = forecast(shape, config, device)
        return [verdict(planned, device, card), bar(planned, device, advised(shape, config, planned, device)), gr.update(visible=False)]
    except UserError as error:
        return [markup.note(f"Memory: {error}"), "", gr.update(visible=isinstance(error, NotHere))]


def device_of(services: Services, card: str) -> Device | None:
    """The card of that name, or what trains here; None while that is not known yet."""
    if card != HERE:
        return find_device(card)
    hardware = services.hardware()
    return hardware.device() if hardware else None


def advised(shape: ModelShape, config: RunConfig, planned: Forecast, device: Device) -> str:
    """What to change, where the run does not simply fit."""
    return "" if planned.verdict(device.memory_bytes) == "fits" else advice_for(shape, config, device)


# Memory, as HTML ----------------------------------------------------------------------------------------------------------


def verdict(planned: Forecast, device: Device, card: str) -> str:
    """`Fits  about 2.1 of 19.8 GiB free here`."""
    said = planned.verdict(device.memory_bytes)
    figures = f"about {planned.total / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB {'free here' if card == HERE else f'on {card}'}"
    return f'<p class="verdict" role="status" data-verdict="{said}"><b>{VERDICT_WORDS[said]}</b> <span>{escape(figures)}</span></p>'


def bar(planned: Forecast, device: Device, advice: str) -> str:
    """The terms side by side to the scale of the memory, what to change, and the figures behind it."""
    scale = max(planned.total, device.memory_bytes)
    parts = "".join(
        f'<i class="{name}" style="width:{100 * size / scale:.2f}%" title="{title(name)}: {gib(size)}"></i>' for name, size in planned.terms
    )
    limit = f'<u style="left:{100 * device.memory_bytes / scale:.2f}%"></u>' if planned.total > device.memory_bytes else ""
    terms = ", ".join(f"{title(name)} {gib(size)}" for name, size in planned.terms)
    said = f"Memory of {gib(device.memory_bytes)}, of which the run takes {gib(planned.total)}: {terms}."
    told = f'<p class="advice">{escape(advice)}</p>' if advice else ""
    return f'<div class="memory-bar" role="img" aria-label="{escape(said)}">{parts}{limit}</div>{told}{table(planned, device)}'


def table(planned: Forecast, device: Device) -> str:
    """Every term with its colour and its size."""
    rows = "".join(f'<tr><th scope="row"><i class="{name}"></i>{title(name)}</th><td>{gib(size)}</td></tr>' for name, size in planned.terms)
    activations = "recomputed" if planned.gradient_checkpointing else "kept"
    assumed = f"{planned.tokens:,} tokens at once in {planned.compute_dtype}, all of them trained; activations are {activations}."
    if planned.paged_bytes:
        assumed += f" {gib(planned.paged_bytes)} of the optimizer state can move to the CPU's memory."
    free = device.memory_bytes - planned.total
    left = f'<tr><th scope="row"><i></i>{"left" if free >= 0 else "lacking"}</th><td>{gib(abs(free))}</td></tr>'
    return (
        '<details class="memory-terms"><summary>What takes it</summary>'
        f'<table><caption class="visually-hidden">Memory by what takes it</caption>{rows}'
        f'<tr><th scope="row"><i></i>all</th><td>{gib(planned.total)}</td></tr>{left}</table>{markup.note(assumed)}</details>'
    )


def title(term: str) -> str:
    return term.replace("_", " ")


def gib(size: int) -> str:
    """With as many figures as tell something."""
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.1f} MiB"


# Time ---------------------------------------------------------------------------------------------------------------------


def time_words(services: Services, config: RunConfig, seen: Look) -> str:
    """Steps, passes and tokens, the time where a run with such steps was measured here, and a word on rows that are seen too often."""
    assert seen.data is not None
    plan = time_plan(config, seen.data, seen.preview, measured_pace(services, config))
    return markup.note(plan.words()) + (f'<p class="caution">{escape(plan.warning())}</p>' if plan.warning() else "")


def measured_pace(services: Services, config: RunConfig) -> float | None:
    """Seconds a step of the newest run whose steps are like these."""
    return overview.measured_pace(services.workspace, services.watch.progress, config)
