"""What an open page lacks of the run that it shows, drawn once for all pages. Knows nothing of torch."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui.disk import trouble_with_disk
from qlora_ui.errors import UserError
from qlora_ui.hints import hints
from qlora_ui.progress import Progress
from qlora_ui.runs import Run
from qlora_ui.services import Services, Stand
from qlora_ui.ui import export_markup, markup

SCRIPT = Path(__file__).with_name("live.js")
SHOW_NEWS = "window.showNews?.()"
"""The `js_on_load` of what the script writes into and what stands inside a tab: it is filled at once when the tab is opened."""

QUESTIONS_A_SECOND = 2.5
"""Of all open pages together. An answer takes about 4 ms of one core, most of it Gradio's own: so the many cost about 1 %."""

GONE_SECONDS = 60.0
READING_SECONDS = 0.15
"""How long one question may read events: a long run whose snapshot is missing is known after a few questions, and nobody waits."""


class News:
    """The answers to what pages ask once a second."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._drawn: tuple[str, dict[str, str]] = ("", {})
        self._asked: dict[str, float] = {}

    def key(self, run: Run | None, progress: Progress | None) -> str:
        """What buttons and choices depend on. They are drawn by Gradio, and only when this changes."""
        parts = ["no run"]
        if run and progress:
            silence = self._services.silence(run, progress.state)
            parts = [run.id, progress.state, progress.phase, progress.asked or "", str(progress.adapter_saved), silence]
        known = "device" if self._services.hardware() else "no device yet"
        runs = self._services.workspace.runs
        seen = (runs, self._services.workspace.exports)
        changed = [str(folder.stat().st_mtime_ns) if folder.is_dir() else "no folder" for folder in seen]
        job = self._services.exporting.job
        export = f"{job.stand} {job.asked_to_end}" if job else "no export"
        return " ".join([*parts, known, export, *changed, self._services.queue.stamp()])

    def wait_seconds(self, page: str) -> float:
        """After how long a page is to ask again: a second, or longer where so many are open that answers would slow a training down."""
        now = time.monotonic()
        self._asked[page] = now
        if len(self._asked) > QUESTIONS_A_SECOND:
            self._asked = {one: asked for one, asked in self._asked.items() if now - asked < GONE_SECONDS}
        return max(1.0, len(self._asked) / QUESTIONS_A_SECOND)

    def since(self, version: str, run_id: str, log_count: int, curve: list[Any] | None) -> dict[str, Any]:
        """What a page lacks that has `version`, `log_count` lines of that run's log, and the plot's cursor `curve`; {} when nothing."""
        run = self._services.workspace.newest()
        if run is None:
            return self._nothing(version)
        try:
            return self._services.watch.look(run, partial(self._of, run, version, run_id, log_count, curve), READING_SECONDS)
        except FileNotFoundError:  # discarded since: the next look sees the one before it
            return {}

    def _nothing(self, version: str) -> dict[str, Any]:
        now, runs = self.key(None, None), self._services.workspace.runs
        if version == now:
            return {}
        gone = "" if runs.is_dir() else trouble_with_disk(runs, then="start again")
        log = {"start": 0, "count": -1, "lines": [markup.NO_LOG]}
        return {"version": now, "run": "", "redraw": now, "parts": self._parts(now, None, gone), "log": log, "answers": 0}

    def _of(self, run: Run, version: str, run_id: str, log_count: int, curve: list[Any] | None, stand: Stand) -> dict[str, Any]:
        progress = stand.progress
        key = self.key(run, progress)
        job = self._services.exporting.job
        now = f"{key} {stand.offset} {job.version if job else 0}"
        if not stand.up_to_date:  # what is known so far may be long over
            parts = {"status-line": markup.reading(run.name, stand.offset / max(1, run.size()))}
            log = {"start": 0, "count": 0, "lines": []}
            return {"version": now, "run": "", "redraw": "", "parts": parts, "log": log, "answers": 0, "behind": True}
        if now == version:
            return {}
        known = log_count if run_id == run.id and 0 <= log_count <= progress.logged else 0
        start = max(known, progress.logged - len(progress.log))
        log = {"start": start, "count": progress.logged, "lines": list(progress.log)[len(progress.log) - (progress.logged - start) :]}
        parts = self._parts(now, progress, self._services.silence(run, progress.state), max_grad_norm(run))
        answer = {"version": now, "run": run.id, "redraw": key, "parts": parts, "log": log, "answers": progress.answers.serial}
        if curve and curve[0] == run.id:
            answer["curve"] = asdict(progress.curves_since(*(max(0, int(number)) for number in curve[1:])))
        return answer

    def _parts(self, version: str, progress: Progress | None, silence: str, max_grad_norm: float | None = None) -> dict[str, str]:
        """The inner HTML of elements by id, the same for all pages. Guarded by the watch's lock."""
        if self._drawn[0] != version:
            parts = {"status-line": markup.status(progress, silence), "progress": markup.bar(progress), "tiles": markup.tiles(progress)}
            parts["hints"] = markup.hints(hints(progress, max_grad_norm) if progress else [])
            parts["export-now"] = export_markup.now(self._services.exporting.job)
            self._drawn = (version, parts)
        return self._drawn[1]


def max_grad_norm(run: Run) -> float | None:
    """The run's own; None where its config is of a version that cannot be read."""
    try:
        return run.config().optimization.max_grad_norm
    except UserError:
        return None


def build(news: News) -> gr.HTML:
    """The hidden component that asks. Its value is the key for which buttons and choices were drawn last."""

    def told(cursor: list[Any]) -> dict[str, Any]:
        """What the page calls; Gradio hands several arguments over as one list."""
        page, version, run_id, log_count, curve = cursor
        wait = news.wait_seconds(str(page))
        return {**news.since(str(version), str(run_id), int(log_count), curve), "wait": wait}

    told.__name__ = "news"
    script = SCRIPT.read_text(encoding="utf-8")
    return gr.HTML("", html_template="", js_on_load=script, server_functions=[told], visible="hidden", elem_id="seen")
