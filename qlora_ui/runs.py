"""Run folders on disk: the truth about every run. Knows nothing of Gradio or torch."""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_ui.config import RunConfig
from qlora_ui.disk import append_line, lock_file, telling_trouble
from qlora_ui.errors import UserError
from qlora_ui.events import AdapterSaved, Asked, CheckpointSaved, Event, Interrupted, Resumed, State, Step, Wish, decode, encode

ENV = "QLORA_UI_HOME"
DEFAULT_HOME = Path(__file__).resolve().parent.parent / "workspace"
WISHES: tuple[Wish, ...] = ("discard", "stop", "pause")  # of several, the first is done
DISCARDED = ".discarded-"
TAIL_BYTES = 65536
RESERVE_BYTES = 65536
STAMP = "%Y%m%d-%H%M%S"
RUN_ID = re.compile(r"\d{8}-\d{6}-[a-z0-9.-]{1,51}")


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The one folder that holds all that a person made with the app."""

    root: Path

    @staticmethod
    def open(home: str | os.PathLike[str] | None = None) -> Workspace:
        """The workspace of `--home`, else of QLORA_UI_HOME, else the project's own; made when missing."""
        root = Path(home or os.environ.get(ENV) or DEFAULT_HOME)
        try:
            workspace = Workspace(root=root.expanduser().resolve())
            for folder in (workspace.runs, workspace.models, workspace.uploads):
                folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # the latter for the home of a user that is not
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"The workspace {root} cannot be written ({reason}). Choose another with --home or {ENV}.") from error
        return workspace

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def uploads(self) -> Path:
        return self.root / "uploads"

    @property
    def exports(self) -> Path:
        return self.root / "exports"

    def lease(self) -> FileLock:
        """The lock of the device: whoever trains holds it, so that two apps on one workspace cannot train at once."""
        return lock_file(self.root / "training.lock", "start again")

    def loan(self) -> FileLock:
        """Held beside the lease by whoever works with the device without training."""
        return lock_file(self.root / "loan.lock", "try again")

    def is_lent(self) -> bool:
        """Whether somebody does, in whichever process."""
        return is_held(self.loan)

    def is_busy(self) -> bool:
        """Whether a training, or somebody else, has the device."""
        return self.is_lent() or self.live() is not None

    def create(
        self, config: RunConfig, name: str, versions: Mapping[str, str], facts: Mapping[str, Any] | None = None
    ) -> tuple[Run, FileLock]:
        """Make the folder of a new run and write its config. `name` is a slug of [a-z0-9.-]; `facts` say where the run comes from.

        The run's lock is held on return, and was before the config made the folder a run: nobody can find it orphaned.
        """
        run = self._new_folder(name)
        lock = run.lock()
        try:
            lock.acquire(timeout=0)
            run.events_path.touch()
            write_json(run.config_path, {**config.to_dict(), "versions": dict(versions), "created": time.time(), **(facts or {})})
        except BaseException:  # a full disk, say: what is no run must not stay
            lock.release()
            shutil.rmtree(run.folder, ignore_errors=True)
            raise
        return run, lock

    def _new_folder(self, name: str) -> Run:
        """An empty folder whose id sorts after all others, also when the clock was set back or two runs start within a second."""
        while True:
            newest = max((seen for seen in os.listdir(self.runs) if RUN_ID.fullmatch(seen)), default="")
            moment = int(time.time())
            with contextlib.suppress(ValueError):  # there is none, or one whose stamp is no date
                moment = max(moment, calendar.timegm(time.strptime(newest[:15], STAMP)) + 1)
            run = Run(folder=self.runs / f"{time.strftime(STAMP, time.gmtime(moment))}-{name}")
            with contextlib.suppress(FileExistsError):  # somebody else took it just now
                run.folder.mkdir()
                return run

    def get(self, run_id: str) -> Run:
        """The run of that id. Raises UserError when there is none, or when the id is no id."""
        run = Run(folder=self.runs / run_id)
        if not RUN_ID.fullmatch(run_id) or not run.is_there():
            raise UserError(f"There is no run {run_id!r} in {self.runs}. List them with: python -m qlora_ui runs", field="run")
        return run

    def all(self) -> list[Run]:
        """All runs, newest first."""
        return list(self._newest_first())

    def newest(self) -> Run | None:
        """The run that was started last, at the cost of one folder listing."""
        return next(self._newest_first(), None)

    def live(self) -> Run | None:
        """The run that is training, in whichever process; one whose process was killed since is settled by the look."""
        self.settle()
        return next((run for run in self._newest_first() if run.state() == "running" and run.is_held()), None)

    def _newest_first(self) -> Iterator[Run]:
        for name in sorted(os.listdir(self.runs) if self.runs.is_dir() else (), reverse=True):
            run = Run(folder=self.runs / name)
            if RUN_ID.fullmatch(name) and run.is_there():
                yield run

    def settle(self) -> list[Run]:
        """Close the books of runs whose process is gone: a run without an end whose lock is free was interrupted.

        One that was to be discarded is discarded.
        """
        for left in self.runs.glob(DISCARDED + "*"):  # a kill while it was being deleted
            shutil.rmtree(left, ignore_errors=True)
        settled = []
        for run in self.all():
            # Somebody trains it, it was deleted just now, or nothing can be written there: then it stays as it is.
            with contextlib.suppress(OSError, UserError):
                if run.state() == "running":
                    with run.lock().acquire(timeout=0):
                        if run.state() == "running":  # it may have ended between the two looks
                            if run.wish() == "discard":
                                run.discard()
                                continue
                            run.put_result_back()
                            run.append(Interrupted(step=run.last_step()))
                            settled.append(run)
        return settled


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder. All of it is read from disk at each call; nothing is remembered here."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        """The id without its time stamp."""
        return self.id[16:]

    @property
    def workspace(self) -> Workspace:
        return Workspace(root=self.folder.parents[1])

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def adapter(self) -> Path:
        """The result. It is written aside and renamed: if it exists, it is complete."""
        return self.folder / "adapter"

    def is_there(self) -> bool:
        """Whether its folder has what makes it a run. One that is half deleted or half copied is none."""
        return self.config_path.is_file() and self.events_path.is_file()

    def config(self) -> RunConfig:
        """Its settings. Raises UserError for those of another version of the app, and for a damaged file."""
        try:
            written = self.facts()
        except ValueError as error:  # no JSON, or no text at all
            raise UserError(f"{self.config_path} is damaged ({error}). Start the run anew.") from error
        return RunConfig.from_dict(written)

    def note(self, **facts: Any) -> None:
        """Add what was only learned later (model revision, data fingerprint) to the written config."""
        write_json(self.config_path, {**json.loads(self.config_path.read_text("utf-8")), **(facts or {})})

    def facts(self) -> dict[str, Any]:
        """The whole of `config.json`."""
        written: dict[str, Any] = json.loads(self.config_path.read_text("utf-8"))
        return written

    def lock(self) -> FileLock:
        """Held while the process that trains lives; the system frees it when that process dies."""
        return lock_file(self.folder / "run.lock")

    def is_held(self) -> bool:
        """Whether some process trains it, or writes in it otherwise."""
        return is_held(self.lock)

    def ask(self, wish: Wish) -> None:
        """Ask whoever trains it, in whichever process. Twice, or after the end, is no change. Raises UserError when it cannot be asked."""
        with telling_trouble(self.folder), contextlib.suppress(FileExistsError):  # of two who ask at once, one is first
            if self.state() == "running":
                (self.folder / wish).touch(exist_ok=False)
                self.append(Asked(wish=wish))

    def wish(self) -> Wish | None:
        """What the owner asked for; of several wishes the one that ends more."""
        return next((wish for wish in WISHES if (self.folder / wish).exists()), None)

    def is_asked(self) -> bool:
        """Whether the training is to end at its next safe point, for whichever wish."""
        return self.wish() is not None

    def beat(self) -> None:
        """Leave a sign of life. In the clock of this machine's uptime, which nobody sets."""
        now = time.monotonic()
        heartbeat = self.folder / "heartbeat"
        try:
            os.utime(heartbeat, (now, now))
        except FileNotFoundError:
            if self.events_path.exists():  # else it is being deleted, and a new file would be in the way
                heartbeat.touch()
                os.utime(heartbeat, (now, now))

    def silent_seconds(self) -> float:
        """Seconds since whoever trains it gave a sign of life; 0 before the first."""
        try:
            return max(0.0, time.monotonic() - (self.folder / "heartbeat").stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def forget_wishes(self) -> None:
        """A run that goes on is not asked for anything yet."""
        for wish in WISHES:
            (self.folder / wish).unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the run and all that it made. It is gone at once, in one rename; nobody may be training it any more."""
        gone = self.folder.with_name(DISCARDED + self.id)
        self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def append(self, event: Event) -> None:
        """Write one event. It is on its way to disk, whole, when this returns: a kill of the process cannot lose it."""
        line = encodable(encode(event) + "\n")
        self._keep_room(event)
        append_line(self.events_path, line, sync=event.state is not None)

    def _keep_room(self, event: Event) -> None:
        """Hold a little of the disk from the run's beginning to its end, so that it can tell its end on a full one."""
        reserve = self.folder / "reserve"
        if event.state == "running" and not reserve.exists():
            try:
                reserve.write_bytes(os.urandom(RESERVE_BYTES))  # random, because some file systems store zeros in no room
            except OSError:
                reserve.unlink(missing_ok=True)
                raise
        elif event.state not in (None, "running"):
            with contextlib.suppress(OSError):  # whether its end can be told is seen by telling it
                reserve.unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes of events so far: the cheap question whether anything is new."""
        return self.events_path.stat().st_size

    def read(self, offset: int = 0, most: int = -1) -> tuple[list[Event], int]:
        """The events whose lines are complete after `offset` bytes (of the next `most`), and the offset to go on from."""
        with self.events_path.open("rb") as file:
            file.seek(offset)
            block = file.read(most)
        whole = block[: block.rfind(b"\n") + 1]
        events = [decode(line.decode("utf-8", "replace")) for line in whole.splitlines()]
        return [event for event in events if event is not None], offset + len(whole)

    def state(self) -> State:
        """What the run is in."""
        last = self.last_word()
        return "running" if last is None or last.state is None else last.state

    def last_word(self) -> Event | None:
        """The newest event that says what the run is in. An end is the last thing a run says, so that the tail of the events tells."""
        return next((event for event in reversed(self._tail()) if event.state is not None), None)

    def last_step(self) -> int:
        """Number of optimizer steps done, and not undone by going on from an earlier checkpoint."""
        for read in (self._tail, lambda: self.read()[0]):  # the whole only where the tail does not tell
            for event in reversed(read()):
                if isinstance(event, (Step, Resumed)):
                    return event.step
        return 0

    def _tail(self) -> list[Event]:
        return self.read(max(0, self.size() - TAIL_BYTES))[0]

    def checkpoints(self) -> list[Path]:
        """Checkpoints that were reported complete and are still there, oldest first."""
        said = [event.name for event in self.read()[0] if isinstance(event, CheckpointSaved)]
        return [self.folder / name for name in dict.fromkeys(said) if (self.folder / name).is_dir()]

    def publish_adapter(self, aside: Path, step: int) -> None:
        """Make a completely written folder the run's result, in one rename, and say so."""
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        shutil.rmtree(self._replaced, ignore_errors=True)
        if self.adapter.exists():
            self.adapter.rename(self._replaced)  # never deleted in place: half a folder must not bear the name
        aside.rename(self.adapter)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self.append(AdapterSaved(step=step))

    @property
    def _replaced(self) -> Path:
        return self.folder / "adapter.replaced"

    def put_result_back(self) -> None:
        """Undo a publishing that was killed between its two renames: the result before it is the result."""
        if self._replaced.exists() and not self.adapter.exists():
            self._replaced.rename(self.adapter)


def is_held(lock: Callable[[], FileLock]) -> bool:
    """Whether somebody has the lock."""
    try:
        lock().acquire(timeout=0).lock.release()
    except Timeout:
        return True
    except (OSError, UserError):  # its folder is gone, or closed to writing: nobody works there
        return False
    return False


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never half of it."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(encodable(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
    aside.replace(path)


def encodable(json_text: str) -> bytes:
    """JSON in UTF-8. A lone surrogate (a file name that is not UTF-8) becomes its escape, which means the same in JSON."""
    return json_text.encode("utf-8", "backslashreplace")
