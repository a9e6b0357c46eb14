"""What the screens and the command line are handed. Knows nothing of Gradio; imports the engine only when it is used."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from qlora_ui import checkpoints, isolation, presets, queue_runner, snapshots
from qlora_ui.config import KNOBS, RunConfig
from qlora_ui.data import sources
from qlora_ui.disk import telling_trouble
from qlora_ui.errors import Busy, UserError
from qlora_ui.events import State
from qlora_ui.exporting import Exporting
from qlora_ui.inspection import Inspector
from qlora_ui.jobs import Jobs
from qlora_ui.memory.devices import Device
from qlora_ui.overview import Overview
from qlora_ui.probing import Probes
from qlora_ui.progress import Progress, duration
from qlora_ui.queueing import Entry, Queue
from qlora_ui.resuming import CHANGEABLE, changed, check_goes_on
from qlora_ui.runs import Run, Workspace
from qlora_ui.talking import Chat, EngineChat
from qlora_ui.votes import Votes

if TYPE_CHECKING:
    from qlora_ui.engine.hardware import Hardware

T = TypeVar("T")

FOLDERS = re.compile(r"(?<![\w/.])[/~][^\s'\":]*/")  # of a path, all but its last name
SILENT_SECONDS = 120.0  # more than a step takes on what most people have; a page says so then
PARTING_SECONDS = 10.0
DEAD_SECONDS = 3.0  # without a sign of life, after which a look asks whether the process is there at all


@dataclass(frozen=True, kw_only=True)
class Stand:
    """How a run stands: its progress after `offset` bytes of events, which are all there are if it is `up_to_date`."""

    progress: Progress
    offset: int
    up_to_date: bool


class Watch:
    """Every run's progress, read on from where the last look ended. Any number of pages share it."""

    def __init__(self) -> None:
        self._seen: dict[str, snapshots.Fold] = {}
        self._lock = threading.Lock()

    def progress(self, run: Run) -> Progress:
        """The run's progress as of now."""
        return self.look(run, lambda stand: stand.progress)

    def look(self, run: Run, see: Callable[[Stand], T], seconds: float = math.inf) -> T:
        """What `see` makes of how the run stands, after reading what is new for at most so long. Nothing changes while it looks."""
        with self._lock:
            fold = self._seen.pop(run.id, None) or snapshots.load(run)
            up_to_date = fold.read_on(run, seconds)
            self._seen[run.id] = fold
            if len(self._seen) > 50:
                self._seen.pop(next(iter(self._seen)))
            return see(Stand(progress=fold.progress, offset=fold.offset, up_to_date=up_to_date))


def restart_process() -> None:
    """Begin this process anew with the command it was begun with, in a moment: whoever asks for it is answered before."""
    threading.Timer(0.5, os.execv, (sys.executable, [sys.executable, *sys.orig_argv[1:]])).start()


@dataclass(frozen=True, kw_only=True)
class Services:
    """All that a screen may use."""

    workspace: Workspace
    jobs: Jobs
    exporting: Exporting
    chat: Chat
    votes: Votes
    watch: Watch
    overview: Overview
    inspector: Inspector
    probes: Probes
    hardware: Callable[[], Hardware | None]
    device: Callable[[], Device | None]
    restart: Callable[[], None] = restart_process
    is_public: bool = False
    _isolated: dict[str, bool] = field(default_factory=dict, init=False)
    """The runs that this process set going, and whether it did so in a process of their own."""

    def told(self, error: Exception) -> str:
        """What it says, or its kind where it says nothing, on a page. A public one names no folder of this machine."""
        said = str(error) or type(error).__name__
        return FOLDERS.sub("", said) if self.is_public else said

    def check_data(self, config: RunConfig) -> None:
        """Raise UserError when the data cannot be read, none of it can be kept, or none of its tokens would be trained."""
        if config.data.data:
            self.inspector.read(config.data)
            seen = self.inspector.known(config)
            if seen is not None and seen.problem:
                raise UserError(seen.problem, field="max_seq_len")

    def start(self, config: RunConfig, *, isolated: bool = False) -> Run:
        """Start a training asked for by a page. Raises UserError when it may not."""
        self.check_start(config)
        self.check_free()
        if self.workspace.live() is None and not self.workspace.is_lent():
            _wait_for(self.workspace.lease())
        run = self.jobs.start(config, isolated=isolated)
        self._isolated[run.id] = isolated
        return run

    def check_start(self, config: RunConfig) -> None:
        """Raise UserError for what a page may not start: its paths lie inside the workspace, its code is the owner's choice."""
        sources.check(config.data.data, self.workspace.root)
        if self._is_elsewhere(config.model.model):
            raise UserError(
                f"The model {config.model.model} is outside the workspace. Put its folder into {self.workspace.models} and give its name.",
                field="model",
            )
        if config.model.trust_remote_code and not self._is_allowed(config):
            raise UserError(
                f"trust_remote_code is on, but a page may not let {config.model.model} run its own code. Train it on the command line with "
                "--set trust_remote_code=true, or write a preset file for it.",
                field="trust_remote_code",
            )

    def measure(self, config: RunConfig) -> None:
        """Begin to measure a step of a run like this. What is in its way is told as the probes' trouble."""
        try:
            self.check_start(config)
            self.check_data(config)
            self.probes.begin(config)
        except UserError as error:
            self.probes.fail(config, str(error))

    def check_free(self) -> None:
        """Raise Busy while a step is measured."""
        if self.probes.doing:
            raise Busy("A step is being measured and has the device. Wait some seconds for its end, or cancel it.")

    def line_up(self, entries: Sequence[Entry]) -> int:
        """Put trainings that a page asks for at the end of the queue; all of them or none. Returns how many wait then.

        Raises UserError for one that surely could not begin.
        """
        for entry in entries:
            assert entry.config is not None
            self.check_start(entry.config)
            queue_runner.check(self.workspace, entry.config, entry.isolated)
            self.check_data(entry.config)
        self.queue.add(entries)
        return len(self.queue.entries())

    @property
    def queue(self) -> Queue:
        """The trainings that wait."""
        return Queue.of(self.workspace)

    def start_queue(self) -> None:
        """Work through the queue from now on, in a thread of this app, until it is held."""
        queue_runner.QueueRunner(self.workspace, self._begin).start()

    def _begin(self, entry: Entry) -> Run:
        assert entry.config is not None
        self.check_free()
        run = self.jobs.start(entry.config, isolated=entry.isolated, name=entry.name, facts=entry.facts())
        self._isolated[run.id] = entry.isolated
        return run

    def resume(self, run: Run, changes: Mapping[str, Any] | None = None, *, isolated: bool = False) -> None:
        """Go on with a run that rests. One that goes on already is left to whoever was quicker. Raises UserError when it may not."""
        live = self.workspace.live()
        if live == run and not changes:
            return
        self.check_free()
        if live is None and not self.workspace.is_lent():
            _wait_for(run.lock(), self.workspace.lease())
            with telling_trouble(run.folder):
                run.beat()  # its last sign of life is as old as its rest
        self.jobs.resume(run, changes, isolated=isolated)
        self._isolated[run.id] = isolated

    def stop(self, run: Run) -> None:
        """End the run and keep its adapter, also that of a run that rests. Twice is no error. Raises UserError when it is in use."""
        if run.state() != "running":
            _wait_for(run.lock())
            with telling_trouble(run.folder):
                run.beat()
        self.jobs.stop(run)

    def discard(self, run: Run) -> None:
        """End the run and delete it. Twice is no error. Raises UserError when it is in use."""
        if run.state() != "running":
            _wait_for(run.lock())
        self.jobs.discard(run)

    def find(self, run_id: str) -> Run | None:
        """The run of that id, or None when it was discarded since."""
        try:
            return self.workspace.get(run_id)
        except UserError:
            return None

    def differences(self, run: Run, config: RunConfig) -> dict[str, Any]:
        """The settings that are others in a config than in the run's own."""
        own = run.config().values()
        return {name: value for name, value in config.values().items() if value != own[name]}

    def check_resume(self, run: Run, changes: Mapping[str, Any]) -> None:
        """Raise UserError when the run may not go on with these settings changed."""
        fixed = [name for name in changes if name not in CHANGEABLE and KNOBS[name].section != "schedule"]
        if len(fixed) > 1:
            raise UserError(
                f"{run.name} has another {', '.join(fixed)}: these cannot change on the way. Use its settings, or start a new run.",
                field=fixed[0],
            )
        config, progress = changed(run.config(), changes), self.watch.progress(run)
        if progress.state == "finished":
            check_goes_on(run, config, progress.step)

    def checkpoints(self, run: Run) -> int:
        """How many checkpoints the run says are complete. A look at names only."""
        return sum((folder / checkpoints.SEAL).exists() for folder in checkpoints.all_of(run))

    def write_script(self, run: Run, path: Path) -> None:
        """A zip file with what trains the run again without this app. Raises UserError for a run that no script can repeat."""
        from qlora_ui.engine import script

        folder = path.with_suffix("")
        script.write(run, folder)
        shutil.make_archive(str(folder), "zip", folder.parent, folder.name)

    def silence(self, run: Run, state: State) -> str:
        """What there is to say of a run that runs and gives no sign of life; empty for all others. A dead one is settled by the look."""
        seconds = run.silent_seconds()
        if seconds < DEAD_SECONDS or state != "running":
            return ""
        if self._is_dead(run):
            self.workspace.settle()
            return ""
        if seconds < SILENT_SECONDS:
            return ""
        grace = f"; its process is ended after {duration(isolation.GRACE_SECONDS)}" if self._isolated.get(run.id) else ""
        return f"no sign of life for {duration(seconds)}{grace}"

    def hangs_here(self, run: Run) -> bool:
        """Whether it gives no sign of life in a thread of this process, which nobody can end."""
        return self._isolated.get(run.id) is False and bool(self.silence(run, run.state()))

    def restart_app(self, run: Run) -> None:
        """Begin the app anew, after which a run that hung in it can go on. Raises UserError while it does not hang."""
        if not self.hangs_here(run):
            raise UserError(f"{run.id} gives signs of life, so that the app need not be restarted. Pause or stop the run.")
        self.restart()

    def _is_dead(self, run: Run) -> bool:
        try:
            with run.lock().acquire(timeout=0):
                return True
        except Timeout:
            return False

    def _is_allowed(self, config: RunConfig) -> bool:
        """Whether the owner's own preset file lets this very model run its code."""
        return config.preset in presets.names() and presets.load(config.preset).config.model == config.model

    def _is_elsewhere(self, model: str) -> bool:
        """Whether the name is a path that exists outside the workspace."""
        try:
            path = Path(model).expanduser()
            return path.exists() and not path.resolve().is_relative_to(self.workspace.root)
        except (OSError, RuntimeError, ValueError):  # no path at all: a name too long, a NUL, the home of nobody
            return False


class WarmUp:
    """Imports the training stack in the background after the page is up, and then knows the hardware."""

    def __init__(self) -> None:
        self._hardware: Hardware | None = None
        self._own_gib = 0.0  # what this process took when the hardware was looked at
        self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hardware(self) -> Hardware | None:
        """What was seen at the start, or None while it is not known yet."""
        return self._hardware

    def device(self) -> Device | None:
        """What trains here with the memory that is free now. What this app took since the start counts as free: a training gets it."""
        seen = self._hardware
        if seen is None:
            return None
        from qlora_ui.engine import hardware

        grown = max(0.0, hardware.memory_gib() - self._own_gib)
        return replace(seen, memory_free_gib=min(hardware.free_memory_gib() + grown, seen.memory_total_gib)).device()

    def _run(self) -> None:
        from qlora_ui.engine import hardware

        seen, self._own_gib = hardware.detect(), hardware.memory_gib()
        self._hardware = seen
        from qlora_ui.engine import chat, train  # noqa: F401


def build(workspace: Workspace, warm_up: WarmUp) -> Services:
    """The real services over a workspace."""
    chat = EngineChat(workspace)
    jobs = Jobs(workspace, make_room=chat.release)
    watch = Watch()
    return Services(
        workspace=workspace,
        jobs=jobs,
        exporting=Exporting(workspace, jobs, make_room=chat.release),
        chat=chat,
        votes=Votes(workspace.root),
        watch=watch,
        overview=Overview(workspace, watch.progress),
        inspector=Inspector(workspace, workspace.root),
        probes=Probes(workspace, make_room=chat.release),
        hardware=warm_up.hardware,
        device=warm_up.device,
    )


def _wait_for(*locks: FileLock) -> None:
    """A process of its own holds its locks for some seconds after its last word. Who holds them longer is somebody else."""
    for lock in locks:
        with contextlib.suppress(Timeout, OSError), lock.acquire(timeout=PARTING_SECONDS):
            pass
