"""Measuring a few steps of a run that is not begun: one at a time, with the device's lease. Knows nothing of torch or Gradio."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator

from filelock import Timeout

from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Phase
from qlora_ui.execution import Emit, ShouldStop
from qlora_ui.memory.measured import Measured
from qlora_ui.progress import Progress
from qlora_ui.runs import Workspace
from qlora_ui.stopping import Cancelled, OutOfMemory, abandonable
from qlora_ui.time_plan import same_pace

Measure = Callable[[RunConfig, Workspace, Emit, ShouldStop], Measured]
NAME = "Measuring"
KEPT = 8  # what was measured last; a convenience, so it is in memory only


def engine_measure(config: RunConfig, workspace: Workspace, emit: Emit, should_stop: ShouldStop) -> Measured:
    """The real steps; their libraries are loaded here, because importing them takes seconds."""
    emit(Phase(name="loading", detail="libraries"))
    abandonable(lambda: importlib.import_module("qlora_ui.engine"), should_stop)
    from qlora_ui.engine import probe

    return probe.measure(config, workspace, emit, should_stop)


def measure_here(
    config: RunConfig, workspace: Workspace, emit: Emit, should_stop: ShouldStop, measure: Measure = engine_measure
) -> Measured:
    """Measure and return when it is done. Raises UserError, or Cancelled when told to stop."""
    with device(workspace):
        return in_words(lambda: measure(config, workspace, emit, should_stop))


@contextlib.contextmanager
def device(workspace: Workspace) -> Iterator[None]:
    """Hold the device, as lent to work that is no training. Raises UserError when somebody has it."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(workspace.lease().acquire(timeout=0))
            held.enter_context(workspace.loan().acquire(timeout=1))  # whoever asks whether the device is lent may have it for a moment
        except Timeout:
            live = workspace.live()
            raise UserError(f"{live.id if live else 'Something else'} uses the device now. Measure when it has ended.") from None
        yield


def in_words(work: Callable[[], Measured]) -> Measured:
    """The result; that the memory did not suffice is what a person wanted to know, and no fault."""
    try:
        return work()
    except OutOfMemory as error:
        raise UserError(
            f"The memory did not suffice for a step ({error}). See what would make it fit, or close what else uses it."
        ) from error


class Probes:
    """Measures for any number of pages, in a thread. What it measured is known for all settings that take the same."""

    def __init__(self, workspace: Workspace, make_room: Callable[[], None] = lambda: None, measure: Measure = engine_measure) -> None:
        self._workspace, self._make_room, self._measure = workspace, make_room, measure
        self._known: list[tuple[RunConfig, Measured]] = []
        self._progress: Progress | None = None
        self._stop = threading.Event()
        self._failed: tuple[RunConfig, str] | None = None

    @property
    def doing(self) -> str:
        """How far it is, in words; empty while nothing is measured."""
        progress = self._progress
        return progress.status_line().removeprefix(f"{NAME} · ") if progress else ""

    def known(self, config: RunConfig) -> Measured | None:
        """What was measured with these settings, or with others that take the same memory and time."""
        return next((measured for settings, measured in reversed(self._known) if same_pace(settings, config)), None)

    def trouble(self, config: RunConfig) -> str:
        """Why the last one, of these settings, measured nothing; empty where it did, or was cancelled."""
        return self._failed[1] if self._failed and same_pace(self._failed[0], config) else ""

    def fail(self, config: RunConfig, trouble: str) -> None:
        """Nothing can be measured of these settings now."""
        self._failed = (config, trouble)

    def begin(self, config: RunConfig) -> None:
        """Measure in the background. Raises UserError when the device is in use."""
        holding = contextlib.ExitStack()
        holding.enter_context(device(self._workspace))
        self._stop.clear()
        self._failed, self._progress = None, Progress(NAME)
        threading.Thread(target=self._carry_out, args=(config, holding, self._progress), name="measure a step", daemon=True).start()

    def cancel(self) -> None:
        """End it at its next safe point. Twice, or when nothing is measured, is no error."""
        self._stop.set()

    def _carry_out(self, config: RunConfig, holding: contextlib.ExitStack, progress: Progress) -> None:
        def emit(event: Event) -> None:
            progress.add(event)

        try:
            with holding, contextlib.suppress(Cancelled):
                abandonable(self._make_room, self._stop.is_set)
                measured = in_words(lambda: self._measure(config, self._workspace, emit, self._stop.is_set))
                self._known = [*self._known[1 - KEPT :], (config, measured)]
        except UserError as error:
            self.fail(config, str(error))
        except Exception as error:
            self.fail(config, f"The step could not be measured: {error}")
            raise  # to the server's log, with its traceback
        finally:
            self._progress = None
