"""The Runs tab: every past run found again, compared, named, deleted. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui import labels
from qlora_ui.errors import UserError
from qlora_ui.overview import facts_of
from qlora_ui.runs import Run
from qlora_ui.services import Services
from qlora_ui.ui import downloads, markup, queue_panel, sweep
from qlora_ui.ui.comparison import MOST_RUNS, Shown, comparison, report

SCRIPT = Path(__file__).with_name("runs_table.js")
REFRESH = "() => { window.runsChanged?.(); window.queueChanged?.(); }"
PRESS = "(said) => { if (!said) setTimeout(() => document.querySelector('#run-script-file').click(), 100); }"
COLUMNS = {
    "title": "Name",
    "state": "State",
    "model": "Model",
    "data": "Data",
    "step": "Steps",
    "best_loss": "Best held-out loss",
    "started": "When",
    "size_bytes": "Size",
}
HEAD = "".join(f'<th scope="col" data-by="{by}"><button type="button">{label}</button></th>' for by, label in COLUMNS.items())
TEMPLATE = f"""
<div class="find"><input type="search" placeholder="Search name, notes, model, data, state" aria-label="Search runs">
<span class="said" aria-live="polite"></span></div>
<div class="scroll" tabindex="0" role="region" aria-label="All runs"><table>
<thead><tr><td></td>{HEAD}<th scope="col">Loss</th></tr></thead><tbody></tbody></table></div>
"""
NOTHING = markup.note("Choose a run by its name to see it, or tick several to compare them.")


@dataclass(frozen=True, kw_only=True)
class RunsTab:
    """The components that other tabs are wired to."""

    table: gr.HTML
    settings: gr.Button
    chat: gr.Button
    one: gr.Textbox
    shown: gr.HTML


def build(services: Services, quiet: dict[str, Any]) -> RunsTab:
    """Components first, in reading order, then the wiring that stays within the tab."""

    def run_rows(_: list[Any]) -> list[dict[str, Any]]:
        """What the page calls; Gradio hands over a list of arguments, also where there are none."""
        return [asdict(row) for row in services.overview.rows()]

    queue_panel.build(services)
    table = gr.HTML(
        [],
        html_template=TEMPLATE,
        js_on_load=SCRIPT.read_text(encoding="utf-8"),
        server_functions=[run_rows],
        apply_default_css=False,
        elem_id="runs-table",
    )
    with gr.Row(visible=False, elem_id="run-actions") as actions:
        title = gr.Textbox(label="Name", max_length=labels.MOST_TITLE, elem_id="run-title")
        notes = gr.Textbox(label="Notes", lines=1, max_lines=6, max_length=labels.MOST_NOTES, elem_id="run-notes")
        small: dict[str, Any] = {"size": "sm", "scale": 0, "min_width": 120}
        settings = gr.Button("Use its settings", elem_id="run-clone", **small)
        chat = gr.Button("Chat with this run", elem_id="run-chat", **small)
        script = gr.Button("Script to train it anew", elem_id="run-script", **small)
        delete = gr.Button("Delete", elem_id="run-delete", **small)
        file = gr.DownloadButton("Script", visible="hidden", elem_id="run-script-file")
    with gr.Row(visible=False, elem_id="run-delete-question") as asked:
        question = gr.HTML()
        confirm = gr.Button("Delete it", variant="stop", elem_id="run-delete-confirm", **small)
        cancel = gr.Button("Keep it", elem_id="run-delete-cancel", **small)
    message = gr.HTML(elem_id="runs-message")
    shown = gr.HTML(NOTHING, elem_id="runs-shown")
    one = gr.Textbox(visible="hidden", label="Chosen run")

    outputs = [actions, title, notes, chat, shown, one, asked]
    table.change(partial(show, services), [table], outputs, trigger_mode="always_last", **quiet)
    left = [event for field in (title, notes) for event in (field.submit, field.blur)]
    renamed = gr.on(left, partial(rename, services), [one, title, notes], [message], trigger_mode="always_last", **quiet)
    renamed.then(None, None, None, js=REFRESH)
    taken = script.click(partial(take_script, services), [one], [message, file], api_visibility="private")
    taken.success(None, [message], None, js=PRESS)
    delete.click(partial(ask, services), [one], [asked, question], **quiet).then(
        None, None, None, js="() => setTimeout(() => document.querySelector('#run-delete-cancel')?.focus(), 50)"
    )
    cancel.click(lambda: gr.update(visible=False), None, [asked], **quiet)
    confirm.click(partial(discard, services), [one], [message, asked], **quiet).then(None, None, None, js=REFRESH)
    return RunsTab(table=table, settings=settings, chat=chat, one=one, shown=shown)


def show(services: Services, chosen: list[str]) -> list[Any]:
    """What was chosen in the table: one run with all that can be done to it, several beside each other."""
    runs = [run for run in map(services.find, chosen or []) if run is not None]
    hidden = gr.update(visible=False)
    if not runs:
        return [hidden, "", "", gr.skip(), NOTHING, "", hidden]
    swept = len(runs) > 1 and len({facts_of(run).get("sweep", run.id) for run in runs}) == 1
    if len(runs) > MOST_RUNS and not swept:
        words = markup.error(f"{len(runs)} runs are chosen. Choose {MOST_RUNS} or fewer to compare them.")
        return [hidden, "", "", gr.skip(), words, "", hidden]
    try:
        troubles = [trouble(run) for run in runs]
        if len(runs) > 1 and any(troubles):
            raise UserError(next(filter(None, troubles)))
        seen = [shown(services, run) for run in runs]
        titles = [look.title for look in seen]
        seen = [replace(look, title=run.id) if titles.count(look.title) > 1 else look for look, run in zip(seen, runs, strict=True)]
    except (UserError, FileNotFoundError) as error:
        return [hidden, "", "", gr.skip(), markup.error(str(error)), "", hidden]
    if swept:
        seen = sweep.best_first(seen)
    if len(runs) > 1:
        beside = sweep.results(seen) if swept else comparison(seen)
        return [hidden, "", "", gr.skip(), beside, "", hidden]
    run, label = runs[0], labels.load(runs[0])
    talks = gr.update(interactive=run.adapter.is_dir())
    return [
        gr.update(visible=True),
        label.title or run.name,
        label.notes,
        talks,
        markup.error(troubles[0]) + report(seen[0]),
        run.id,
        hidden,
    ]


def shown(services: Services, run: Run) -> Shown:
    settings = {} if trouble(run) else run.config().values()
    return Shown(title=labels.title(run), progress=services.watch.progress(run), settings=settings)


def trouble(run: Run) -> str:
    """Why its settings cannot be read. Its curve and log are there all the same, and it can be deleted."""
    try:
        run.config()
    except UserError as error:
        return f"{labels.title(run)}: {error}"
    return ""


def on(services: Services, run_id: str, work: Callable[[Run], None]) -> str:
    """Do something to a run, or say why not. One that was deleted since is no error: the table shows what is."""
    run = services.find(run_id)
    try:
        if run is not None:
            work(run)
    except UserError as error:
        return markup.error(str(error))
    return ""


def rename(services: Services, run_id: str, title: str, notes: str) -> str:
    def keep(run: Run) -> None:
        named = title.strip()
        labels.save(run, labels.Label(title="" if named == run.name else named, notes=notes.strip()))
        services.overview.forget(run)

    return on(services, run_id, keep)


def take_script(services: Services, run_id: str) -> list[Any]:
    """A zip for the hidden button, or why there is none."""
    run = services.find(run_id)
    if run is None:
        return ["", gr.skip()]
    path = downloads.fresh(f"{run.id}.zip")
    try:
        services.write_script(run, path)
        return ["", gr.update(value=str(path))]
    except UserError as error:
        return [markup.error(str(error)), gr.skip()]


def ask(services: Services, run_id: str) -> list[Any]:
    """Before a run is deleted: what will be gone?"""
    run = services.find(run_id)
    if run is None:
        return [gr.update(visible=False), ""]
    count = services.checkpoints(run)
    parts = [f"{count} checkpoint{'' if count == 1 else 's'}"] if count else []
    its = ", ".join([*parts, *(["adapter"] if run.adapter.is_dir() else []), "log"])
    return [gr.update(visible=True), markup.question(f"Delete {labels.title(run)} with its {its}?")]


def discard(services: Services, run_id: str) -> list[Any]:
    return [on(services, run_id, services.discard), gr.update(visible=False)]
