"""One training at a time: who may train, where it runs, how it is asked to end and to go on. Knows nothing of torch or Gradio."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_ui import checkpoints, isolation, progress, trackers
from qlora_ui.config import RunConfig
from qlora_ui.data import sources
from qlora_ui.disk import telling_trouble
from qlora_ui.errors import Busy, UserError
from qlora_ui.events import Phase
from qlora_ui.execution import Emit, ShouldStop, Train, engine_train, execute, keep_newest
from qlora_ui.resuming import changed, check_goes_on, go_on
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import abandonable

OnStart = Callable[[Run, int], None]
"""Told the run, and how many bytes of events it had before."""
RECORDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "gradio")


class Held(ExitStack):
    """Locks that are held together, and can be handed to another process."""

    def __init__(self) -> None:
        super().__init__()
        self.locks: list[FileLock] = []

    def take(self, lock: FileLock) -> None:
        """Raises Timeout when somebody else holds it. One that is held here already only joins."""
        if not lock.is_locked:
            lock.acquire(timeout=0)
        self.callback(lock.release)
        self.locks.append(lock)

    def pop_all(self) -> Held:
        """All of them, which are then no longer released with this."""
        held = super().pop_all()
        assert isinstance(held, Held)
        held.locks, self.locks = self.locks, []
        return held


class Jobs:
    """Starts, ends and resumes trainings. The lease is a lock file, so that it also holds against another process.

    A training lives in a thread of this process, or `isolated` in a process of its own.
    """

    def __init__(
        self,
        workspace: Workspace,
        train: Train = engine_train,
        make_room: Callable[[], None] = lambda: None,
        grace_seconds: float = isolation.GRACE_SECONDS,
    ) -> None:
        """`make_room` is called before a training starts: whoever holds the device's memory gives it back.

        `grace_seconds`: so long may a process give no sign of life before it is ended.
        """
        self.workspace, self._train, self._make_room, self._grace_seconds = workspace, train, make_room, grace_seconds

    def start(self, config: RunConfig, *, isolated: bool = False, name: str = "", facts: Mapping[str, Any] | None = None) -> Run:
        """Begin training and return at once. Raises UserError, leaving no folder, when it may not; Busy while another run trains.

        `name` is a slug, empty: as data and preset say. `facts` say in the run's config where it comes from.
        """
        run, held = self._admit(config, isolated, name, facts)
        self._in_background(run, held, lambda: self._carry_out(run, None, held, isolated))
        return run

    def run_here(self, config: RunConfig, on_start: OnStart = lambda run, offset: None, *, isolated: bool = False) -> Run:
        """Train and return when it has ended, however it ended."""
        run, held = self._admit(config, isolated)
        with held:
            on_start(run, 0)
            self._carry_out(run, None, held, isolated)
        return run

    def resume(self, run: Run, changes: Mapping[str, Any] | None = None, *, isolated: bool = False) -> None:
        """Go on from the newest complete checkpoint and return at once. Raises UserError when it may not."""
        checkpoint, held = self._readmit(run, changes or {}, isolated)
        self._in_background(run, held, lambda: self._carry_out(run, checkpoint, held, isolated))

    def resume_here(
        self, run: Run, changes: Mapping[str, Any], on_start: OnStart = lambda run, offset: None, *, isolated: bool = False
    ) -> Run:
        """Go on and return when it has ended, however it ended."""
        offset = run.size()
        checkpoint, held = self._readmit(run, changes, isolated)
        with held:
            on_start(run, offset)
            self._carry_out(run, checkpoint, held, isolated)
        return run

    def pause(self, run: Run) -> None:
        """End the training so that it can go on later."""
        run.ask("pause")

    def stop(self, run: Run) -> None:
        """End the run and keep its adapter: that of the last step, or of a resting run's newest complete checkpoint."""
        self.workspace.settle()
        run.ask("stop")
        if run.state() not in progress.RESUMABLE or not checkpoints.newest_complete(run):
            return
        with self._hold(run) as held:
            run.forget_wishes()  # what made it rest would end this too
            run.append(Phase(name="saving"))
            self._in_background(run, held.pop_all(), lambda: execute(run, keep_newest))

    def discard(self, run: Run) -> None:
        """End the run and delete it, with all that it made."""
        self.workspace.settle()
        if not run.folder.is_dir():
            return  # somebody else was quicker
        run.ask("discard")
        if run.state() != "running":
            with self._hold(run):
                run.discard()

    def lend(self, run: Run) -> Held:
        """The device and a run, for whoever works with them without training. Raises UserError when somebody else has one of them."""
        with telling_trouble(self.workspace.root, "try again"), self._lease() as held:
            self._take(held, run)
            loan = self.workspace.loan()
            loan.acquire(timeout=1)  # whoever asks whether the device is lent may have it for a moment
            held.take(loan)
            return held.pop_all()

    def _in_background(self, run: Run, held: Held, work: Callable[[], None]) -> None:
        def holding() -> None:
            with held:
                try:
                    work()
                except UserError as error:  # the run could not be told how it ended
                    print(error, file=sys.stderr)

        threading.Thread(target=holding, name=f"train {run.id}", daemon=True).start()

    def _carry_out(self, run: Run, checkpoint: Path | None, held: Held, isolated: bool) -> None:
        if isolated:
            self._make_room()
            isolation.execute(run, checkpoint, held.locks, self._grace_seconds)
        else:
            execute(run, self._train_in_its_room, checkpoint)

    def _train_in_its_room(self, run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None) -> None:
        abandonable(self._make_room, should_stop)  # a chat that is still loading its model gives nothing back until it has
        self._train(run, emit, should_stop, checkpoint)

    def _admit(self, config: RunConfig, isolated: bool, name: str = "", facts: Mapping[str, Any] | None = None) -> tuple[Run, Held]:
        """Check what can be checked in no time, take the lease, make the folder. The locks come back held."""
        sources.check(config.data.data, None)
        trackers.check(config.schedule.trackers())
        if isolated:
            isolation.check()
        with telling_trouble(self.workspace.runs, "start again"), self._lease() as held:
            versions = {package: version(package) for package in RECORDED}
            run, lock = self.workspace.create(config, name or run_name(config), versions, facts)
            held.take(lock)
            return run, held.pop_all()

    def _readmit(self, run: Run, changes: Mapping[str, Any], isolated: bool) -> tuple[Path | None, Held]:
        """Take the locks, find the checkpoint, write down what changes. The locks come back held."""
        if isolated:
            isolation.check()
        with telling_trouble(run.folder), self._lease() as held:
            self._take(held, run)
            checkpoint = checkpoints.newest_complete(run)
            config = changed(run.config(), changes)
            trackers.check(config.schedule.trackers())
            check_goes_on(run, config, checkpoints.step_of(checkpoint) if checkpoint else 0)
            run.forget_wishes()
            go_on(run, config, checkpoint)
            return checkpoint, held.pop_all()

    def _lease(self) -> Held:
        """The device, for one training. Raises Busy when another has it."""
        with Held() as held:
            try:
                held.take(self.workspace.lease())
            except Timeout:
                live = self.workspace.live()
                if live is None and self.workspace.is_lent():
                    raise Busy("An export needs the device, or a step is measured. Wait for its end, or cancel it on its tab.") from None
                raise Busy(f"{live.id if live else 'Another run'} is training already. Stop it or wait for its end.") from None
            self.workspace.settle()
            return held.pop_all()

    def _hold(self, run: Run) -> Held:
        """The run, for whoever writes in it. Raises UserError when somebody else does."""
        with Held() as held:
            self._take(held, run)
            return held.pop_all()

    def _take(self, held: Held, run: Run) -> None:
        try:
            held.take(run.lock())
        except Timeout:
            raise UserError(f"{run.id} is in use. Wait until it has ended.") from None


def run_name(config: RunConfig) -> str:
    """`preset-data` in a slug: what a person recognises the run by."""
    data = sources.name_of(config.data.data)
    preset = re.sub(r"[^a-z0-9]+", "-", config.preset.lower()).strip("-")
    return (data if not preset or data.endswith(preset) else f"{data}-{preset}")[:48].strip("-")
