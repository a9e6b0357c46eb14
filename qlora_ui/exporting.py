"""Making exports: one at a time, with the device to itself, if wished in a thread that pages look at. Knows nothing of Gradio.

Imports the engine only when it is used.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from qlora_ui import exported, exports
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, PhaseProgress
from qlora_ui.exports import Export, Kind
from qlora_ui.jobs import Held, Jobs
from qlora_ui.progress import amount, log_line
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled, abandonable

if TYPE_CHECKING:
    from qlora_ui.engine.export import Exported, Sizes

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]
Stand = Literal["running", "done", "cancelled", "failed"]

MOST_LINES = 40


@dataclass(frozen=True, kw_only=True)
class Made:
    """A complete export, and its address on the Hub if it was pushed."""

    export: Exported
    pushed: str = ""


Make = Callable[[Export, Emit, ShouldStop, str], Made]


@dataclass(frozen=True, kw_only=True)
class Job:
    """How the newest export of this process stands. `doing` is how far its current phase is, `share` the same from 0 to 1 where known.

    `words` are said at its end, `name` is what was made. `version` grows with every change.
    """

    run: str
    kind: Kind
    step: int
    stand: Stand = "running"
    asked_to_end: bool = False
    log: tuple[str, ...] = ()
    doing: str = ""
    share: float | None = None
    words: str = ""
    name: str = ""
    version: int = 0


def into_workspace(
    run: Run, kind: Kind, checkpoint: int | None = None, quantize: bool = False, repository: str = "", private: bool = True
) -> Export:
    """An export to a place of its own among those of the workspace; an adapter that is not pushed is a zip. Raises UserError."""
    if kind not in get_args(Kind):
        raise UserError(f"{kind!r} is no kind of export. Choose one of {', '.join(get_args(Kind))}.")
    step = "" if checkpoint is None else f"-step{checkpoint}"
    form = "-nf4" if quantize else ".zip" if kind == "adapter" and not repository else ""
    target = exported.free_name(run.workspace, f"{run.id}{step}-{kind}{form}")
    return exports.plan(run, kind, str(target), checkpoint, quantize, repository, private)


def carry_out(wish: Export, emit: Emit, should_stop: ShouldStop, token: str = "") -> Made:
    """Make it and, if wished, push it. Raises UserError or Cancelled: then there is nothing, or all but the pushing."""
    emit(Log(text="Loading the libraries"))
    abandonable(lambda: importlib.import_module("qlora_ui.engine"), should_stop)
    from qlora_ui.engine import export, push

    if wish.repository:
        push.check(should_stop, token)
    made = export.export(wish, emit, should_stop)
    exported.keep_record(wish, made.bytes, made.verification.sentence())
    if not wish.repository:
        return Made(export=made)
    pushed = push.push(made.path, wish.repository, emit, should_stop, token, wish.private)
    exported.keep_record(wish, made.bytes, made.verification.sentence(), pushed)
    return Made(export=made, pushed=pushed)


def cancelled_words(wish: Export) -> str:
    """What there is after a cancelled export."""
    return f"{wish.target} is complete, but was not pushed" if wish.target.exists() else f"nothing was written to {wish.target}"


def sizes(run: Run, kind: Kind, checkpoint: int | None, quantize: bool, pushed: bool) -> Sizes | None:
    """What such an export takes, without asking a network; None where that depends on what is not on this machine."""
    from qlora_ui.engine import export

    folder = exports.likely_weights(run, checkpoint)
    if folder is None:
        return None
    target = exported.folder_of(run.workspace) / ("one.zip" if kind == "adapter" and not pushed else "one")
    weights = exports.Weights(folder=folder, step=0, why="")
    return export.sizes_here(Export(run=run, kind=kind, weights=weights, target=target, quantize=quantize))


class Exporting:
    """Makes exports in a thread of this process. Any number of pages share it, and what they see survives their reload."""

    def __init__(self, workspace: Workspace, jobs: Jobs, make_room: Callable[[], None] = lambda: None, make: Make = carry_out) -> None:
        """`make_room` is called before an export begins: whoever holds the device's memory gives it back."""
        self.workspace, self._jobs, self._make_room, self._make = workspace, jobs, make_room, make
        self._job: Job | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @property
    def job(self) -> Job | None:
        """The newest export of this process, as it stands."""
        return self._job

    def start(self, wish: Export, token: str = "") -> None:
        """Begin and return at once. Raises UserError when the device or the run is in use."""
        held = self._jobs.lend(wish.run)
        self._stop = threading.Event()
        version = self._job.version + 1 if self._job else 0
        self._job = Job(run=wish.run.id, kind=wish.kind, step=wish.weights.step, version=version)
        threading.Thread(target=self._work, args=(wish, token, held, self._stop.is_set), name="export", daemon=True).start()

    def cancel(self) -> None:
        """Ask the export to end. At any time: after its end it is no change."""
        if self._job and self._job.stand == "running":
            self._stop.set()
            self._tell(asked_to_end=True)

    def _work(self, wish: Export, token: str, held: Held, should_stop: ShouldStop) -> None:
        try:
            with held:  # free again before the end is told: who reads of it may use the device at once
                exported.sweep(self.workspace)
                abandonable(self._make_room, should_stop)
                made = self._make(wish, self._hear, should_stop, token)
        except Cancelled:
            self._end("cancelled", f"Cancelled: {cancelled_words(wish)}.", wish)
        except UserError as error:
            self._end("failed", str(error), wish)
        except Exception as error:  # our bug: the page says so, and the server's log has its traceback
            self._end("failed", f"The export broke off: {error}. Nothing half made was kept. Please report it.", wish)
            raise
        else:
            pushed = f" Pushed: {made.pushed}" if made.pushed else ""
            self._end("done", f"{made.export.verification.sentence()}.{pushed}", wish)

    def _hear(self, event: Event) -> None:
        if isinstance(event, PhaseProgress):
            self._tell(doing=amount(event), share=event.done / event.total if event.total else None)
        elif self._job and (line := log_line(event)):
            self._tell(log=(*self._job.log, line)[-MOST_LINES:], doing="", share=None)

    def _end(self, stand: Stand, words: str, wish: Export) -> None:
        self._tell(stand=stand, words=words, name=wish.target.name if wish.target.exists() else "", doing="", share=None)

    def _tell(self, **news: Any) -> None:
        with self._lock:
            assert self._job is not None
            self._job = replace(self._job, version=self._job.version + 1, **news)
