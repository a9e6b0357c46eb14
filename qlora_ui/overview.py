"""All runs, one row each, as the table of runs shows them. Knows nothing of Gradio or torch."""

from __future__ import annotations

import calendar
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_ui import labels
from qlora_ui.config import RunConfig
from qlora_ui.curves import Point
from qlora_ui.data import sources
from qlora_ui.errors import UserError
from qlora_ui.events import State
from qlora_ui.progress import Progress
from qlora_ui.runs import STAMP, Run, Workspace
from qlora_ui.time_plan import same_pace

SPARK_POINTS = 40
RECENT = 5  # runs that are asked how long a step takes


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """What the table says of a run. `best_loss` is held-out; `started` is in seconds since 1970, UTC.

    `queue_entry` and `sweep` say where it comes from, if from there.
    """

    id: str
    title: str
    notes: str
    state: State
    model: str
    data: str
    step: int
    total_steps: int
    best_loss: float | None
    started: int
    size_bytes: int
    spark: list[float]
    queue_entry: str = ""
    sweep: str = ""


class Overview:
    """The rows of all runs. A run whose events did not grow is not looked at again."""

    def __init__(self, workspace: Workspace, progress: Callable[[Run], Progress]) -> None:
        self._workspace, self._progress = workspace, progress
        self._known: dict[str, tuple[int, RunRow]] = {}
        self._lock = threading.Lock()

    def rows(self) -> list[RunRow]:
        """Newest first."""
        with self._lock:
            known, rows = self._known, list[RunRow]()
            self._known = {}
            for run in self._workspace.all():
                try:
                    size, row = known.get(run.id, (-1, None))
                    if row is None or size != run.size():
                        size, row = run.size(), self._row(run)
                except FileNotFoundError:  # discarded meanwhile
                    continue
                self._known[run.id] = (size, row)
                rows.append(row)
            return rows

    def forget(self, run: Run) -> None:
        """What is not in its events has changed: its label."""
        with self._lock:
            self._known.pop(run.id, None)

    def _row(self, run: Run) -> RunRow:
        progress, label, facts = self._progress(run), labels.load(run), facts_of(run)
        model, data = what_is_trained(run)
        return RunRow(
            id=run.id,
            title=label.title or run.name,
            notes=label.notes,
            state=progress.state,
            model=model,
            data=data,
            step=progress.step,
            total_steps=progress.total_steps,
            best_loss=progress.best.loss if progress.best else None,
            started=calendar.timegm(time.strptime(run.id[:15], STAMP)),
            size_bytes=sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file()),
            spark=spark(progress.train.points),
            queue_entry=str(facts.get("queue_entry", "")),
            sweep=str(facts.get("sweep", "")),
        )


def what_is_trained(run: Run) -> tuple[str, str]:
    """Model and data, short; empty where the run's config is of a version that cannot be read."""
    try:
        config: RunConfig = run.config()
    except UserError:
        return "", ""
    return config.model.model.rpartition("/")[2], sources.shown(config.data.data)


def facts_of(run: Run) -> dict[str, Any]:
    """What its config says beside the settings; nothing where that cannot be read."""
    try:
        return run.facts()
    except (OSError, json.JSONDecodeError):  # discarded just now, or damaged by hand
        return {}


def of_sweep(workspace: Workspace, sweep: str) -> list[Run]:
    """The runs of a sweep so far, oldest first."""
    return [run for run in reversed(workspace.all()) if facts_of(run).get("sweep") == sweep]


def spark(points: list[Point]) -> list[float]:
    """A curve thinned to what a line of a table can show: the mean of neighbours."""
    size = -(-len(points) // SPARK_POINTS) or 1
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [sum(value for _, value in part) / len(part) for part in parts]


def measured_pace(workspace: Workspace, progress: Callable[[Run], Progress], config: RunConfig) -> float | None:
    """Seconds a step of the newest run whose steps are like these, if there is one among the last few."""
    for run in workspace.all()[:RECENT]:
        try:
            if same_pace(run.config(), config):
                pace = progress(run).seconds_a_step
                if pace is not None:
                    return pace
        except (UserError, FileNotFoundError):  # of another version of the app; discarded since
            continue
    return None
