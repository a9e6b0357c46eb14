"""A run's progress kept beside its events, so that a long run is not read from its beginning again. Knows nothing of Gradio or torch.

The events stay the truth: a snapshot that does not fit them is ignored, and it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qlora_ui import answers, curves, events, progress
from qlora_ui.progress import Progress
from qlora_ui.runs import Run, write_json

PIECE_BYTES = 1 << 19
KEEP_EVERY_BYTES = 4 << 20
NAME = "progress.json"


@dataclass
class Fold:
    """The progress of a run after `offset` bytes of its events; `kept` of them are in the snapshot on disk."""

    progress: Progress
    offset: int = 0
    kept: int = 0

    def read_on(self, run: Run, seconds: float) -> bool:
        """Take in what is new, in pieces, for at most so long. Returns whether that was all."""
        until = time.monotonic() + seconds
        piece = PIECE_BYTES
        while (size := run.size()) != self.offset:
            if size < self.offset:  # other events than those that were read
                self.progress, self.offset, self.kept = Progress(run.name), 0, 0
            found, end = run.read(self.offset, piece)
            if end == self.offset:
                if size <= self.offset + piece:
                    break  # the last line is not whole yet
                piece *= 2  # a line longer than a piece
                continue
            for event in found:
                self.progress.add(event)
            self.offset = end
            if self.offset - self.kept >= KEEP_EVERY_BYTES:
                self.keep(run)
            if time.monotonic() > until:
                return run.size() == self.offset
        if self.progress.state != "running" and self.offset - self.kept >= PIECE_BYTES:
            self.keep(run)
        return True

    def keep(self, run: Run) -> None:
        """Write the snapshot. A full disk or a folder that is gone only costs the next reader some time."""
        self.kept = self.offset
        with contextlib.suppress(OSError):
            fold = {"offset": self.offset, "fits": fits(run, self.offset), "progress": self.progress.to_dict()}
            write_json(run.folder / NAME, fold)


def load(run: Run) -> Fold:
    """The snapshot of a run where there is one that fits its events and this version, else a fold that has read nothing."""
    try:
        found = json.loads((run.folder / NAME).read_text("utf-8"))
        if run.size() >= found["offset"] and found["fits"] == fits(run, found["offset"]):
            return Fold(progress=Progress.from_dict(found["progress"]), offset=found["offset"], kept=found["offset"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or torn, or of another shape
        pass
    return Fold(progress=Progress(run.name))


def fits(run: Run, offset: int) -> str:
    """What a snapshot must agree with: the events before its offset, and the code that folded them."""
    with run.events_path.open("rb") as file:
        file.seek(max(0, offset - 4096))
        return hashlib.sha256(file.read(min(offset, 4096)) + folded_by()).hexdigest()


@cache
def folded_by() -> bytes:
    """The code that makes progress of events, so that a snapshot of another version never fits."""
    return b"".join(Path(str(module.__file__)).read_bytes() for module in (events, curves, answers, progress))
