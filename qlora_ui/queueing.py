"""Trainings that wait for the device: a file each, their order, and who works through them. Knows nothing of Gradio or torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from qlora_ui.config import RunConfig
from qlora_ui.disk import lock_file, telling_trouble
from qlora_ui.errors import Busy, UserError
from qlora_ui.runs import Run, Workspace, write_json

THEN = "try again"
EDITING_SECONDS = 5.0
STARTING_SECONDS = 2.0  # one that was told to hold the queue needs so long to let go of it, at most


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A training that waits. `name` is the run's, empty: as its data and preset say; `sweep` is what it belongs to.

    `trouble` is why it could not begin. One whose file cannot be read has trouble and no config.
    """

    id: str = ""
    config: RunConfig | None
    name: str = ""
    isolated: bool = False
    sweep: str = ""
    trouble: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The form that is written to its file."""
        assert self.config is not None
        return {"config": self.config.to_dict(), **{name: getattr(self, name) for name in ("name", "isolated", "sweep", "trouble")}}

    @staticmethod
    def from_dict(entry_id: str, written: dict[str, Any]) -> Entry:
        """Inverse of `to_dict`. Raises UserError for a config of another version."""
        return Entry(id=entry_id, config=RunConfig.from_dict(written.pop("config")), **written)

    def facts(self) -> dict[str, str]:
        """What the run's `config.json` says of where it comes from."""
        return {"queue_entry": self.id, **({"sweep": self.sweep} if self.sweep else {})}


@dataclass(frozen=True, kw_only=True)
class Queue:
    """One folder of a workspace. All of it is read from disk at each call, so that any page, terminal or app can look and ask.

    Whoever works through it holds its lock. When that process dies the lock is free, and the queue rests until it is started anew.
    """

    folder: Path

    @staticmethod
    def of(workspace: Workspace) -> Queue:
        """The workspace's queue. A look at it makes no folder; whatever changes it does."""
        return Queue(folder=workspace.root / "queue")

    # The line ---------------------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All that wait, in their order; those that were never moved after those that were."""
        ids = sorted(path.stem for path in self.folder.glob("[0-9]*.json"))
        return [entry for entry in map(self._read, [*dict.fromkeys([*self._order(), *ids])]) if entry is not None]

    def add(self, entries: Sequence[Entry]) -> list[Entry]:
        """Put them at the end of the line, in their order; all of them or none. Raises UserError when they cannot be written."""
        with self._editing():
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
            made = [replace(entry, id=f"{stamp}-{number:03d}") for number, entry in enumerate(entries)]
            order = [entry.id for entry in self.entries()]
            try:
                for entry in made:
                    write_json(self._path(entry.id), entry.to_dict())
                self._set_order([*order, *(entry.id for entry in made)])
            except OSError:
                for entry in made:
                    self._path(entry.id).unlink(missing_ok=True)
                raise
            return made

    def remove(self, entry_id: str) -> None:
        """Take it out of the line. One that is gone already is no error for a page, whose click came late."""
        with self._editing():
            if entry_id in {entry.id for entry in self.entries()}:
                self._path(entry_id).unlink(missing_ok=True)

    def move(self, entry_id: str, places: int) -> None:
        """So many places towards the front (below 0) or the end, as far as there are any."""
        with self._editing():
            order = [entry.id for entry in self.entries()]
            if entry_id in order:
                place = order.index(entry_id)
                order.remove(entry_id)
                order.insert(max(0, place + places), entry_id)
                self._set_order(order)

    def find(self, entry_id: str) -> Entry:
        """The entry of that id. Raises UserError when there is none."""
        for entry in self.entries():
            if entry.id == entry_id:
                return entry
        raise UserError(f"Nothing in the queue has the id {entry_id!r}. List it with: python -m qlora_ui queue --list", field="remove")

    def take(self, begin: Callable[[Entry], Run]) -> Run | None:
        """Let the first that can begin do so, and strike it off. One that cannot is set aside, with the reason. None when nobody waits.

        Raises Busy when the device is somebody else's.
        """
        with self._editing():
            for entry in self.entries():
                if entry.trouble:
                    continue
                try:
                    run = begin(entry)
                except Busy:
                    raise
                except UserError as error:
                    write_json(self._path(entry.id), replace(entry, trouble=str(error)).to_dict())
                    continue
                self._path(entry.id).unlink()
                return run
            return None

    def strike_off(self, started: set[str]) -> None:
        """Those that have begun, but whose starter was killed before it could strike them off itself."""
        with self._editing():
            for entry in self.entries():
                if entry.id in started:
                    self._path(entry.id).unlink(missing_ok=True)

    # Who works through it ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """Work through it: one process at a time. Raises Busy when another does."""
        try:
            with self._writing():
                lock = self._lock().acquire(timeout=STARTING_SECONDS).lock
        except Timeout:
            raise Busy("The queue is being worked through already, by an app or a terminal. Look at its runs, or hold it first.") from None
        try:
            with self._writing():
                self._going.touch()
            yield
        finally:
            self._going.unlink(missing_ok=True)
            lock.release()

    def is_going(self) -> bool:
        """Whether somebody works through it and will begin with the next."""
        return not self._held.exists() and self.is_worked_through()

    def is_worked_through(self) -> bool:
        """Whether some process has it, be it only until the run that trains has ended."""
        try:
            self._lock().acquire(timeout=0).lock.release()
        except Timeout:
            return True
        except (OSError, UserError):  # gone, or closed to writing: nobody starts anything there
            return False
        return False

    def hold(self, reason: str = "") -> None:
        """Begin with nothing more. What trains goes on. Raises UserError when that cannot be written."""
        with self._writing():
            self._held.write_text(reason, "utf-8")

    def let_go(self) -> None:
        """Undo `hold`, and let those that could not begin try again."""
        with self._editing():
            self._held.unlink(missing_ok=True)
            for entry in self.entries():
                if entry.trouble and entry.config:
                    write_json(self._path(entry.id), replace(entry, trouble="").to_dict())

    def is_held(self) -> bool:
        """Whether somebody asked that nothing more begins."""
        return self._held.exists()

    def why_held(self) -> str:
        """The reason that was given, if one was."""
        try:
            return self._held.read_text("utf-8")
        except OSError:
            return ""

    def stamp(self) -> str:
        """Another text when anything has changed: the cheap question of a page."""
        try:
            changed = self.folder.stat().st_mtime_ns
        except OSError:
            return ""
        # What was left by a process that was killed; to try the lock costs more than to look for a file.
        return f"{changed} {self._going.exists() and self.is_worked_through()}"

    # On disk ----------------------------------------------------------------------------------------------------------------

    @property
    def _held(self) -> Path:
        return self.folder / "hold"

    @property
    def _going(self) -> Path:
        return self.folder / "going"

    def _path(self, entry_id: str) -> Path:
        return self.folder / f"{entry_id}.json"

    def _lock(self) -> Any:
        return lock_file(self.folder / "queue.lock", THEN)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """In a folder that is there. Raises UserError for the trouble of its disk."""
        with telling_trouble(self.folder.parent, THEN):
            self.folder.mkdir(exist_ok=True)
        with telling_trouble(self.folder, THEN):
            yield

    @contextlib.contextmanager
    def _editing(self) -> Iterator[None]:
        """One change at a time, whoever makes it."""
        try:
            with self._writing(), lock_file(self.folder / "edit.lock", THEN).acquire(timeout=EDITING_SECONDS):
                yield
        except Timeout:
            raise Busy("Somebody else is changing the queue. Try again in a moment.") from None

    def _order(self) -> list[str]:
        try:
            return [str(entry_id) for entry_id in json.loads((self.folder / "order.json").read_text("utf-8"))]
        except (OSError, ValueError, TypeError):  # never moved, or damaged: then by age
            return []

    def _set_order(self, ids: Sequence[str]) -> None:
        write_json(self.folder / "order.json", list(ids))

    def _read(self, entry_id: str) -> Entry | None:
        """None for one that is gone."""
        try:
            return Entry.from_dict(entry_id, json.loads(self._path(entry_id).read_text("utf-8")))
        except OSError:
            return None
        except UserError as error:
            return Entry(id=entry_id, config=None, trouble=str(error))
        except (ValueError, KeyError, TypeError, AttributeError):
            return Entry(id=entry_id, config=None, trouble=f"{self._path(entry_id)} is damaged. Remove it, and add the run anew.")
