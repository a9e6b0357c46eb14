"""A sweep on the screens: values for a setting or two, put in line as runs; and how those came out, beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from qlora_ui import sweeping
from qlora_ui.config import KNOBS, RunConfig
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.ui import form, markup, planner, queue_panel
from qlora_ui.ui.comparison import MOST_RUNS, Shown, different_settings, label, picture

NOT_SWEPT = ("model", "revision", "trust_remote_code", "data", "chat_template", "sample_prompts")
FIRST = ("learning_rate", "1e-4, 2e-4")
ABOUT = "Give one setting or two some values, with commas. Each combination becomes a run in the queue, all else as the form says."


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The components: the fold, in it twice a setting and its values, what that would be, and the button."""

    fold: gr.Accordion
    asked: list[gr.components.Component]
    plan: gr.HTML
    add: gr.Button


def build() -> Sweep:
    """Folded away: most people never need it."""
    choices = [("–", ""), *sorted((knob.label, name) for name, knob in KNOBS.items() if name not in NOT_SWEPT)]
    asked: list[gr.components.Component] = []
    with gr.Accordion("Sweep: try several values", open=False, elem_id="sweep") as fold:
        gr.HTML(markup.note(ABOUT))
        for place, (name, values) in enumerate((FIRST, ("", "")), 1):
            with gr.Row(equal_height=True):
                asked.append(gr.Dropdown(choices, value=name, label=f"Setting {place}", min_width=170, elem_id=f"sweep-setting-{place}"))
                asked.append(gr.Textbox(values, label="Values", max_lines=1, min_width=170, elem_id=f"sweep-values-{place}"))
        plan = gr.HTML(elem_id="sweep-plan")
        add = gr.Button("Add the sweep to the queue", size="sm", elem_id="sweep-add")
    return Sweep(fold=fold, asked=asked, plan=plan, add=add)


def wire(
    services: Services, swept: Sweep, names: list[str], kept: list[gr.components.Component], form_changed: Any, quiet: dict[str, Any]
) -> None:
    """`kept` is the form: whether in a process of its own, the preset, the data, the settings. What it would be follows it too."""
    told: dict[str, Any] = {"inputs": [*swept.asked, *kept], "outputs": [swept.plan], **quiet}
    settings, values = swept.asked[0::2], swept.asked[1::2]
    typed = [event for text in values for event in (text.submit, text.blur)]
    changed = [swept.fold.expand, *(setting.input for setting in settings), *typed]
    gr.on(changed, partial(look, services, names), trigger_mode="multiple", **told)
    form_changed(partial(look, services, names), trigger_mode="always_last", **told)
    swept.add.click(partial(add, services, names), **told).then(None, None, None, js=queue_panel.CHANGED)


def read(asked: Sequence[str], config: RunConfig) -> tuple[dict[str, list[Any]], dict[str, RunConfig]]:
    """The values by setting, and each combination's config by its name. Raises UserError."""
    first, its_values, second, other_values = (str(part or "").strip() for part in asked)
    if first and first == second:
        raise UserError(f"{KNOBS[first].label} is chosen twice. Choose another setting, or none.", field=first)
    over = {name: sweeping.read_values(name, text) for name, text in ((first, its_values), (second, other_values)) if name}
    return over, sweeping.combinations(config, over)


def plan_words(services: Services, config: RunConfig, configs: Sequence[RunConfig]) -> str:
    """How many runs, how many steps, how long in all. A value that was not measured yet counts with the pace of the form's own."""

    def pace(one: RunConfig) -> float | None:
        return planner.pace(services, one)[0] or planner.pace(services, config)[0]

    for one in configs:
        services.check_start(one)
    return sweeping.plan_words(sweeping.plans(configs, services.inspector, pace))


def look(services: Services, names: list[str], *told: Any) -> str:
    """What the sweep would be, or what is wrong with it."""
    asked, (_, preset, data, *values) = told[:4], told[4:]
    try:
        config = form.read(preset, data, names, tuple(values))
        return markup.note(plan_words(services, config, list(read(asked, config)[1].values())))
    except UserError as error:
        return markup.error(str(error))


def add(services: Services, names: list[str], *told: Any) -> str:
    """Every combination goes in line, or none of them, and why."""
    asked, (isolated, preset, data, *values) = told[:4], told[4:]
    try:
        config = form.read(preset, data, names, tuple(values))
        over, configs = read(asked, config)
        words = plan_words(services, config, list(configs.values()))
        services.line_up(sweeping.entries(configs, over, isolated))
    except UserError as error:
        return markup.error(str(error))
    return markup.note(f"In line. {queue_panel.lined_up(services, words)}")


# How it came out, as HTML -------------------------------------------------------------------------------------------------


def best_first(runs: Sequence[Shown]) -> list[Shown]:
    """By best held-out loss; those without one last."""
    return sorted(runs, key=best_loss)


def best_loss(run: Shown) -> float:
    return run.progress.best.loss if run.progress.best else math.inf


def results(runs: Sequence[Shown]) -> str:
    """The settings that differ against the best held-out loss, of which the best is marked, and the curves. The runs come best first."""
    different = different_settings(runs)
    head = "".join(f'<th scope="col">{title}</th>' for title in [*map(label, different), "Best held-out loss", "At step", "State"])
    body = []
    for at, run in enumerate(runs):
        best = run.progress.best
        key = f'<i class="key run-{at}"></i>' if at < MOST_RUNS else ""
        cells = "".join(f"<td>{escape(sweeping.shown(run.settings[name]))}</td>" for name in different)
        is_best = best is not None and best.loss == best_loss(runs[0])
        mark = " <b>best</b>" if is_best else ""
        figures = (f"{best.loss:.3f}{mark}", f"{best.step:,}") if best else ("–", "–")
        row = f'<th scope="row">{key}{escape(run.title)}</th>{cells}<td>{figures[0]}</td><td>{figures[1]}</td>'
        body.append(f"<tr{' class=best' if is_best else ''}>{row}<td>{run.progress.state}</td></tr>")
    return (
        '<div class="scroll sweep-results" tabindex="0" role="region" aria-label="The sweep\'s runs, best first"><table>'
        f'<thead><tr><th scope="col">Run</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        f"{picture(runs[:MOST_RUNS])}"
    )
