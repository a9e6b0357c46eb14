"""The planners on the Train tab: what memory and time a run would take, moving with every field. Knows nothing of torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from qlora_ui import overview
from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.inspection import Look
from qlora_ui.memory.advice import advice_for, dtype_caution
from qlora_ui.memory.devices import CARDS, GIB, Device, find_device
from qlora_ui.memory.forecast import Forecast, Verdict
from qlora_ui.memory.measured import Measured, plan_by
from qlora_ui.model_configs import NotHere
from qlora_ui.model_shapes import NotCounted, find_shape, find_shape_within
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
# While it is counted anew, the figures on the page are of the settings before.
COUNTING = "(...values) => { document.querySelector('#start-box')?.setAttribute('aria-busy', 'true'); return values; }"
COUNTED = "() => document.querySelector('#start-box')?.removeAttribute('aria-busy')"
LOOKING = "Memory: this machine is being looked at …"
FOLLOW_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Planner:
    """The components, in reading order."""

    verdict: gr.HTML
    card: gr.Dropdown
    bar: gr.HTML
    ask_hub: gr.Button
    measure: gr.Button
    cancel: gr.Button

    @property
    def shown(self) -> list[gr.components.Component]:
        """What `look` fills, in its order."""
        return [self.verdict, self.bar, self.ask_hub, self.measure]

    @property
    def measuring(self) -> list[gr.components.Component]:
        """What `follow` fills, in its order."""
        return [self.verdict, self.measure, self.cancel]


def build() -> Planner:
    """Verdict and card in a row, the bar under them. The two buttons that measure are rendered by whoever has room for them."""
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
    small: dict[str, Any] = {"size": "sm", "scale": 0, "min_width": 140, "render": False}  # one place for two buttons
    measure = gr.Button("Measure one step", elem_id="memory-measure", **small)
    cancel = gr.Button("Cancel measuring", visible=False, elem_id="memory-cancel", **small)
    return Planner(verdict=verdict, card=card, bar=bar, ask_hub=ask_hub, measure=measure, cancel=cancel)


def wire(
    services: Services, planner: Planner, names: list[str], values: list[Any], changed: Any, opened: Any, then: Any, quiet: dict[str, Any]
) -> None:
    """Plan again at every `changed` event. Only the button asks anybody outside this machine. `then` is told of what was measured."""
    plan: dict[str, Any] = {"inputs": [planner.card, *values], "outputs": planner.shown, **quiet}
    fn = partial(look, services, names, False)
    changed(fn, **plan, js=COUNTING, queue=False, trigger_mode="always_last").then(None, None, None, js=COUNTED)
    planner.ask_hub.click(partial(look, services, names, True), **plan)
    told: dict[str, Any] = {"outputs": planner.measuring, "concurrency_limit": 8, **quiet}
    measured = planner.measure.click(measure_step(services, names), values, **told)
    followed = opened(follow(services), None, **told)  # one that was begun before this page was opened
    for event in (measured, followed):
        then(event.then(fn, **plan))
    planner.cancel.click(services.probes.cancel, None, None, queue=False, **quiet)


def look(services: Services, names: list[str], ask_hub: bool, card: str, preset: str, data: str, *values: Any) -> list[Any]:
    """The plan for a card or this machine, or in its place why there is none."""
    hidden, off = gr.update(visible=False), gr.update(interactive=False)
    try:
        config = form.read(preset, data, names, values)
    except UserError:  # the form says which field
        return [markup.note("Memory is counted again when the settings are right."), "", hidden, off]
    may_measure = gr.update(interactive=bool(data) and card == HERE)
    measured = services.probes.known(config) if card == HERE else None
    trouble = services.probes.trouble(config) if card == HERE else ""
    try:
        find = find_shape if ask_hub else find_shape_within
        shape = find(config.model.model, config.model.revision, services.workspace.models, with_torch=services.hardware() is not None)
        device = device_of(services, card)
        if device is None:
            return [markup.note(LOOKING), "", hidden, off]
        plan = plan_by(shape, config, device, measured)
        planned = plan(config, device)
        advice = "" if planned.verdict(device.memory_bytes) == "fits" else advice_for(plan, config, device)
        said = verdict(planned, device, card, is_measured=measured is not None)
        return [said + markup.error(trouble), bar(planned, device, advice, dtype_caution(config, device), measured), hidden, may_measure]
    except NotCounted:  # the libraries are still being loaded
        return [markup.note(LOOKING), "", hidden, off]
    except UserError as error:
        took = f" A measured step took {gib(measured.memory_bytes)} beside the libraries' own." if measured else ""
        said = markup.note(f"Memory: {error}{took}") + markup.error(trouble)
        return [said, "", gr.update(visible=isinstance(error, NotHere)), may_measure]


def device_of(services: Services, card: str) -> Device | None:
    """The card of that name, or what trains here; None while that is not known yet."""
    return services.device() if card == HERE else find_device(card)


# A measured step ----------------------------------------------------------------------------------------------------------


def measure_step(services: Services, names: list[str]) -> Any:
    """Begins to measure and tells how far it is. Gradio takes plain generator functions only."""

    def measured(preset: str, data: str, *values: Any) -> Iterator[list[Any]]:
        if not services.probes.doing:  # else it is somebody's, and followed
            with contextlib.suppress(UserError):  # of a setting, which the form says
                services.measure(form.read(preset, data, names, values))
        yield from follow(services)()

    return measured


def follow(services: Services) -> Any:
    """Tells how far a measuring is, until it has ended. A page that goes away closes this, and the measuring goes on."""

    def followed() -> Iterator[list[Any]]:
        while doing := services.probes.doing:
            said = f'<p class="verdict"><b>Measuring</b> <span>{escape(doing)}</span></p>'
            yield [said, gr.update(visible=False), gr.update(visible=True)]
            time.sleep(FOLLOW_SECONDS)
        yield [gr.skip(), gr.update(visible=True), gr.update(visible=False)]

    return followed


# Memory, as HTML ----------------------------------------------------------------------------------------------------------


def verdict(planned: Forecast, device: Device, card: str, *, is_measured: bool = False) -> str:
    """`Fits  about 2.1 of 19.8 GiB free here`."""
    said = planned.verdict(device.memory_bytes)
    of = f"{planned.total / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB {'free here' if card == HERE else f'on {card}'}"
    figures = f"{'measured' if is_measured else 'about'} {of}"
    return f'<p class="verdict" role="status" data-verdict="{said}"><b>{VERDICT_WORDS[said]}</b> <span>{escape(figures)}</span></p>'


def bar(planned: Forecast, device: Device, advice: str, caution: str = "", measured: Measured | None = None) -> str:
    """The terms side by side to the scale of the memory, what to change, what else to know, and the figures behind it."""
    scale = max(planned.total, device.memory_bytes)
    parts = "".join(
        f'<i class="{name}" style="width:{100 * size / scale:.2f}%" title="{title(name)}: {gib(size)}"></i>' for name, size in planned.terms
    )
    limit = f'<u style="left:{100 * device.memory_bytes / scale:.2f}%"></u>' if planned.total > device.memory_bytes else ""
    terms = ", ".join(f"{title(name)} {gib(size)}" for name, size in planned.terms)
    said = f"Memory of {gib(device.memory_bytes)}, of which the run takes {gib(planned.total)}: {terms}."
    told = "".join(f'<p class="{kind}">{escape(words)}</p>' for kind, words in (("advice", advice), ("caution", caution)) if words)
    return f'<div class="memory-bar" role="img" aria-label="{escape(said)}">{parts}{limit}</div>{told}{table(planned, device, measured)}'


def table(planned: Forecast, device: Device, measured: Measured | None) -> str:
    """Every term with its colour and its size."""
    rows = "".join(f'<tr><th scope="row"><i class="{name}"></i>{title(name)}</th><td>{gib(size)}</td></tr>' for name, size in planned.terms)
    activations = "recomputed" if planned.gradient_checkpointing else "kept"
    assumed = f"{planned.tokens:,} tokens at once in {planned.compute_dtype}, all of them trained; activations are {activations}."
    if measured:
        assumed = (
            f"Measured on the longest rows: {gib(measured.memory_bytes)} beside the overhead; a usual step took "
            f"{measured.seconds_a_step:.2g} s. "
            f"Activations are {activations}; they and the logits have the room that nothing else is counted for."
        )
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
    seconds, whose = pace(services, config)
    plan = replace(time_plan(config, seen.data, seen.preview, seconds), whose=whose)
    return markup.note(plan.words()) + (f'<p class="caution">{escape(plan.warning())}</p>' if plan.warning() else "")


def pace(services: Services, config: RunConfig) -> tuple[float | None, str]:
    """Seconds a step, and whose: of a step that was measured, else of the newest run whose steps are like these."""
    if measured := services.probes.known(config):
        return measured.seconds_a_step, "measured here"
    return overview.measured_pace(services.workspace, services.watch.progress, config), "of the last such run"
