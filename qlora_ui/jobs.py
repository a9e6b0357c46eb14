"""One training at a time: who may train, where it runs, how it ends. Knows nothing of torch or Gradio."""

from __future__ import annotations

import importlib
import re
import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version

from filelock import Timeout

from qlora_ui.config import RunConfig
from qlora_ui.data import sources
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Failed, Phase, Stopped
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled, abandonable

Train = Callable[[Run, Callable[[Event], None], Callable[[], bool]], None]
RECORDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "gradio")


def engine_train(run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
    """The real training; its libraries are loaded here, because importing them takes seconds."""
    emit(Phase(name="loading", detail="libraries"))
    abandonable(lambda: importlib.import_module("qlora_ui.engine.train"), should_stop)
    from qlora_ui.engine.train import train

    train(run, emit, should_stop)


class Jobs:
    """Starts and stops trainings. The lease is a lock file, so that it also holds against another process."""

    def __init__(self, workspace: Workspace, train: Train = engine_train, make_room: Callable[[], None] = lambda: None) -> None:
        """`make_room` is called before a training starts: whoever holds the device's memory gives it back."""
        self.workspace, self._train, self._make_room = workspace, train, make_room

    def start(self, config: RunConfig) -> Run:
        """Begin training in a thread of this process and return at once. Raises UserError, leaving no folder, when it may not."""
        run, locks = self._admit(config)
        threading.Thread(target=self._execute, args=(run, locks), name=f"train {run.id}", daemon=True).start()
        return run

    def run_here(self, config: RunConfig, on_start: Callable[[Run], None] = lambda run: None) -> Run:
        """Train in the calling thread and return when it has ended, however it ended."""
        run, locks = self._admit(config)
        on_start(run)
        self._execute(run, locks)
        return run

    def _admit(self, config: RunConfig) -> tuple[Run, ExitStack]:
        """Check what can be checked in no time, take the lease, make the folder. The locks come back held."""
        sources.check(config.data.data, None)
        with ExitStack() as locks:
            try:
                locks.enter_context(self.workspace.lease().acquire(timeout=0))
            except Timeout:
                live = self.workspace.live()
                raise UserError(f"{live.id if live else 'Another run'} is training already. Stop it or wait for its end.") from None
            self.workspace.settle()
            run, lock = self.workspace.create(config, run_name(config), {name: version(name) for name in RECORDED})
            locks.callback(lock.release)
            held = locks.pop_all()
        return run, held

    def _execute(self, run: Run, locks: ExitStack) -> None:
        with locks:
            execute(run, self._train_in_its_room)

    def _train_in_its_room(self, run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
        abandonable(self._make_room, should_stop)  # a chat that is still loading its model gives nothing back until it has
        self._train(run, emit, should_stop)


def execute(run: Run, train: Train) -> None:
    """Call the training and write down how it ended, whatever happens in it."""
    try:
        train(run, run.append, run.stop_requested)
    except Cancelled:
        run.append(Stopped(step=0, total_steps=0, adapter_saved=False))
    except UserError as error:
        run.append(Failed(message=str(error)[:2000]))
    except BaseException as error:  # noqa: BLE001 - the run's books must be closed; the traceback is kept in them
        reason = str(error).strip().splitlines() or [type(error).__name__]
        told = traceback.format_exc()[-8000:]  # an end must stay short: whoever asks for the state reads the last 64 KiB only
        run.append(Failed(message=f"Training broke off at step {run.last_step()}: {reason[0][:300]}", traceback=told))


def run_name(config: RunConfig) -> str:
    """`preset-data` in a slug: what a person recognises the run by."""
    data = sources.name_of(config.data.data)
    preset = re.sub(r"[^a-z0-9]+", "-", config.preset.lower()).strip("-")
    return (data if not preset or data.endswith(preset) else f"{data}-{preset}")[:48].strip("-")
