"""The queue on a screen: what waits, in its order, who works through it, how it went; and the button that adds. Knows nothing of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui import jobs, presets, sweeping
from qlora_ui.config import KNOBS, RunConfig
from qlora_ui.data import sources
from qlora_ui.errors import UserError
from qlora_ui.overview import RunRow
from qlora_ui.queueing import Entry
from qlora_ui.services import Services
from qlora_ui.ui import form, markup

SCRIPT = Path(__file__).with_name("queue_panel.js")
MOST_ENDED, MOST_SWEEPS, MOST_CHANGES = 5, 5, 3
ALREADY_SAID = ("model", "data", "max_steps", "num_train_epochs")
TEMPLATE = """
<section aria-label="Queue"><header><h3>Queue</h3><span class="state-of-queue" aria-live="polite"></span>
<button type="button" class="start">Start the queue</button><button type="button" class="hold">Hold the queue</button></header>
<p class="problem" role="alert" hidden></p><ol tabindex="-1"></ol><div class="sweeps"></div>
<details class="ended" open><summary>Trained from the queue</summary><ul></ul></details></section>
"""
CHANGED = "() => window.queueChanged?.()"


def build(services: Services) -> gr.HTML:
    """Drawn by the page's script, which asks when something has changed and after each click."""

    def queue(asked: list[str]) -> dict[str, Any]:
        """What the page calls: does what was clicked, and says how the queue stands. Gradio hands several arguments over as one list."""
        what, entry_id = (*map(str, asked), "", "")[:2]
        return {"said": act(services, what, entry_id), **state(services)}

    script = SCRIPT.read_text(encoding="utf-8")
    return gr.HTML("", html_template=TEMPLATE, js_on_load=script, server_functions=[queue], apply_default_css=False, elem_id="queue")


def add_button() -> gr.Button:
    return gr.Button("Add to queue", elem_id="queue-add", scale=1, min_width=120)


def act(services: Services, what: str, entry_id: str) -> str:
    """Do what was clicked; why not, where that cannot be."""
    queue = services.queue
    actions: dict[str, Callable[[], None]] = {
        "start": services.start_queue,
        "hold": queue.hold,
        "up": lambda: queue.move(entry_id, -1),
        "down": lambda: queue.move(entry_id, 1),
        "remove": lambda: queue.remove(entry_id),
    }
    try:
        if what in actions:
            actions[what]()
    except UserError as error:
        return str(error)
    return ""


def state(services: Services) -> dict[str, Any]:
    """How the queue stands, in words that the page sets as text."""
    queue, rows = services.queue, services.overview.rows()
    entries = queue.entries()
    return {
        "going": queue.is_going(),
        "line": line(len(entries), queue.is_going(), queue.is_held() and queue.is_worked_through(), queue.why_held()),
        "entries": [described(entry) for entry in entries],
        "ended": [ended(services, row) for row in rows if row.queue_entry and row.state != "running"][:MOST_ENDED],
        "sweeps": sweeps(entries, rows),
    }


def line(waiting: int, going: bool, ends: bool, why: str) -> str:
    """`2 wait. Held: nothing begins until you start the queue.`"""
    count = f"{waiting} wait{'s' if waiting == 1 else ''}" if waiting else "Nothing waits"
    held = "Held: the run that trains goes on, nothing begins after it." if ends else "Held: nothing begins until you start the queue."
    return f"{count}. {'Going: the next begins when the device is free.' if going else why or held}"


def described(entry: Entry) -> dict[str, Any]:
    config = entry.config
    about = ""
    if config:
        o = config.optimization
        length = f"{o.max_steps:,} steps" if o.max_steps else f"{o.num_train_epochs:g} epoch{'' if o.num_train_epochs == 1 else 's'}"
        alone = ["in a process of its own"] if entry.isolated else []
        own = [] if entry.name else changes(config)  # a run of a sweep is named by them
        about = " · ".join([config.model.model.rpartition("/")[2], sources.shown(config.data.data), length, *own, *alone])
    title = entry.name or (jobs.run_name(config) if config else entry.id)
    return {"id": entry.id, "title": title, "about": about, "trouble": entry.trouble}


def changes(config: RunConfig) -> list[str]:
    """The first few settings that are not as the preset has them, by which one entry is told from another."""
    if config.preset not in presets.names():
        return []
    told = presets.load(config.preset).config.values()
    changed = [name for name, value in config.values().items() if value != told[name] and name not in ALREADY_SAID]
    more = [f"{len(changed) - MOST_CHANGES} more settings of its own"] if len(changed) > MOST_CHANGES + 1 else []
    shown = changed[:MOST_CHANGES] if more else changed
    return [f"{KNOBS[name].label} {sweeping.shown(config.values()[name]) or 'none'}"[:60] for name in shown] + more


def ended(services: Services, row: RunRow) -> dict[str, str]:
    run = services.find(row.id)
    said = services.watch.progress(run).end_sentence() if run else "discarded"
    return {"run": row.id, "title": row.title, "state": row.state, "said": said}


def sweeps(entries: list[Entry], rows: list[RunRow]) -> list[dict[str, Any]]:
    """The newest sweeps of which a run has begun, with the runs to compare."""
    waiting = Counter(entry.sweep for entry in entries)
    runs: dict[str, list[str]] = {}
    for row in rows:
        if row.sweep:
            runs.setdefault(row.sweep, []).insert(0, row.id)
    newest = [*runs.items()][:MOST_SWEEPS]
    return [{"name": name, "runs": ids, "said": f"{len(ids)} of {len(ids) + waiting[name]} begun"} for name, ids in newest]


def add(services: Services, names: list[str], isolated: bool, preset: str, data: str, *values: Any) -> str:
    """The form's settings go to the end of the line, or what is wrong with them is said where Start would say it."""
    try:
        config = form.read(preset, data, names, values)
    except UserError:  # the plan above the button says it
        return ""
    try:
        waiting = services.line_up([Entry(config=config, isolated=isolated)])
    except UserError as error:
        return markup.error(str(error), error.field)
    return markup.note(lined_up(services, f"In line as number {waiting}."))


def lined_up(services: Services, said: str) -> str:
    return f"{said} {'Its turn comes by itself.' if services.queue.is_going() else 'The queue is held: start it on the Runs tab.'}"
