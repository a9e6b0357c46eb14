"""Works through the queue: when the device is free, the next that waits begins. Knows nothing of Gradio or torch."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable

from filelock import Timeout

from qlora_ui import isolation, trackers
from qlora_ui.config import RunConfig
from qlora_ui.data import sources
from qlora_ui.disk import telling_trouble
from qlora_ui.errors import Busy, UserError
from qlora_ui.events import Paused
from qlora_ui.model_configs import NotHere, find_config
from qlora_ui.overview import facts_of
from qlora_ui.queueing import THEN, Entry, Queue
from qlora_ui.runs import Run, Workspace

LOOK_SECONDS = 1.0


class QueueRunner:
    """One thread in an app, or the terminal's own. It begins runs and waits for their end; training them is their executor's business."""

    def __init__(self, workspace: Workspace, begin: Callable[[Entry], Run], look_seconds: float = LOOK_SECONDS) -> None:
        self.workspace, self.queue, self._begin, self._look_seconds = workspace, Queue.of(workspace), begin, look_seconds

    def start(self) -> None:
        """Go on from now, in the background, also with what is added later, until the queue is held."""
        self.queue.let_go()
        threading.Thread(target=self._go_on, name="queue", daemon=True).start()

    def _go_on(self) -> None:
        try:
            self.go()
        except Busy:  # another app or a terminal does it
            return
        except UserError as error:
            print(error, file=sys.stderr)
            self.queue.hold(f"Held, because of trouble: {error}")
        except BaseException as error:
            self.queue.hold(f"Held, because of a fault of the app, which is in its terminal: {error}")
            raise

    def go(
        self,
        *,
        until_empty: bool = False,
        on_start: Callable[[Run], None] = lambda run: None,
        on_end: Callable[[Run], None] = lambda run: None,
    ) -> None:
        """Train what waits, one after another, until the queue is held; or also until nothing waits. Raises Busy when another does so."""
        with self.queue.going():
            self.queue.strike_off(self._begun())
            while not self.queue.is_held():
                if not self._device_is_free():
                    self._await_end(self.workspace.live())
                    continue
                try:
                    run = self.queue.take(self._begin)
                except Busy:  # somebody pressed Start in this moment
                    continue
                if run is not None:
                    on_start(run)
                    self._await_end(run)
                    on_end(run)
                elif until_empty:
                    return
                else:
                    time.sleep(self._look_seconds)

    def _await_end(self, run: Run | None) -> None:
        """Wait until the device is free again. Whoever paused a run wants the device: then nothing more begins."""
        while not self._device_is_free(self._look_seconds):
            pass
        with contextlib.suppress(FileNotFoundError):  # discarded
            last = run.last_word() if run is not None else None
            if run is not None and isinstance(last, Paused) and not last.reason:
                self.queue.hold(f"Held, because {run.name} was paused. Start the queue to go on with the next.")

    def _device_is_free(self, seconds: float = 0.0) -> bool:
        """Whether nobody trains, waiting so long for it."""
        try:
            with telling_trouble(self.workspace.root, THEN), self.workspace.lease().acquire(timeout=seconds, poll_interval=0.2):
                return True
        except Timeout:
            return False

    def _begun(self) -> set[str]:
        """The entries that runs say they come from."""
        return {str(facts_of(run).get("queue_entry")) for run in self.workspace.all()}


def check(workspace: Workspace, config: RunConfig, isolated: bool) -> None:
    """Raise UserError for what surely cannot begin, as far as this machine knows at once and without asking anybody."""
    sources.check(config.data.data, None)
    trackers.check(config.schedule.trackers())
    if isolated:
        isolation.check()
    named = config.model
    with contextlib.suppress(NotHere):  # the Hub may have it
        find_config(named.model, named.revision, workspace.models, ask_hub=False)
