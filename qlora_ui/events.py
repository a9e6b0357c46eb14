"""What can happen to a run: a closed set of frozen events and their one-line JSON form. Knows nothing of disk or page."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

State = Literal["running", "paused", "finished", "stopped", "failed", "interrupted"]
Wish = Literal["pause", "stop", "discard"]
PhaseName = Literal["reading", "fetching", "loading", "quantizing", "tokenizing", "training", "saving"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events. `time` is seconds since the epoch; `state` is what the run is in after the event, if it says."""

    kind: ClassVar[str]
    state: ClassVar[State | None] = None
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Phase(Event):
    """The run enters a phase; the trainer emits exactly one of these per phase."""

    kind: ClassVar[str] = "phase"
    state: ClassVar[State | None] = "running"
    name: PhaseName
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class PhaseProgress(Event):
    """How far the current phase is: `done` of `total` (0 = unknown), counted in `unit` (bytes, tensors, rows)."""

    kind: ClassVar[str] = "phase_progress"
    done: int
    total: int
    unit: str


@dataclass(frozen=True, kw_only=True)
class Log(Event):
    """One line for the person: a resolved value with its reason, or (level `warning`) something they should look at."""

    kind: ClassVar[str] = "log"
    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """What the training will be, known once the rows are tokens. Tokens count one pass over the training rows."""

    kind: ClassVar[str] = "planned"
    total_steps: int
    train_rows: int
    held_out_rows: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """One optimizer step done. `loss` is the mean over the step's trained tokens; None when it was not finite.

    A step whose loss or gradients were not finite is `skipped`: it counts, but nothing of it reached the weights.
    """

    kind: ClassVar[str] = "step"
    step: int
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens_per_second: float
    memory_gib: float
    epoch: float
    skipped: bool = False


@dataclass(frozen=True, kw_only=True)
class HeldOut(Event):
    """Mean loss per trained token on the held-out rows, measured after `step` optimizer steps."""

    kind: ClassVar[str] = "held_out"
    step: int
    loss: float

    @property
    def perplexity(self) -> float:
        """Of how many tokens the model was in doubt, on average; bounded, because a float is."""
        return math.exp(min(self.loss, 700))


@dataclass(frozen=True, kw_only=True)
class Sample(Event):
    """What the untouched base and the adapter answer to the same prompt after `step` optimizer steps."""

    kind: ClassVar[str] = "sample"
    step: int
    prompt: str
    base: str
    adapter: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete on disk; `name` is its folder inside the run folder. `best`: no saved one before was better."""

    kind: ClassVar[str] = "checkpoint_saved"
    step: int
    name: str
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class AdapterSaved(Event):
    """The result is complete on disk in `adapter/`."""

    kind: ClassVar[str] = "adapter_saved"
    step: int


@dataclass(frozen=True, kw_only=True)
class Asked(Event):
    """The owner asked the run to pause, to stop and keep what it has, or to be discarded."""

    kind: ClassVar[str] = "asked"
    wish: Wish


@dataclass(frozen=True, kw_only=True)
class Paused(Event):
    """The run rests after `step` of `total_steps` (0 = not known yet) and can go on.

    `reason` says why, where the owner did not ask for it; `traceback` is ours, where it was our bug.
    """

    kind: ClassVar[str] = "paused"
    state: ClassVar[State | None] = "paused"
    step: int
    total_steps: int
    reason: str = ""
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run goes on after `step`, that of `checkpoint` (empty: from its beginning). What came after that step is void.

    `changes` are settings that are others from here on: name -> [before, after]. `reason` says why it goes on by itself,
    where nobody asked for it.
    """

    kind: ClassVar[str] = "resumed"
    state: ClassVar[State | None] = "running"
    step: int
    checkpoint: str = ""
    changes: dict[str, list[Any]] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The training came to its end and the adapter was saved. `reason` says why it ended before its last step, if it did."""

    kind: ClassVar[str] = "finished"
    state: ClassVar[State | None] = "finished"
    step: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The owner stopped the run after `step` of `total_steps` (0 = not known yet)."""

    kind: ClassVar[str] = "stopped"
    state: ClassVar[State | None] = "stopped"
    step: int
    total_steps: int
    adapter_saved: bool


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The run ended in an error before its first step. `traceback` is empty when the person can mend it, ours otherwise."""

    kind: ClassVar[str] = "failed"
    state: ClassVar[State | None] = "failed"
    message: str
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class Interrupted(Event):
    """The process that trained is gone without a word; written by whoever finds the run so."""

    kind: ClassVar[str] = "interrupted"
    state: ClassVar[State | None] = "interrupted"
    step: int


KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        Phase,
        PhaseProgress,
        Log,
        Planned,
        Step,
        HeldOut,
        Sample,
        CheckpointSaved,
        AdapterSaved,
        Asked,
        Paused,
        Resumed,
        Finished,
        Stopped,
        Failed,
        Interrupted,
    )
}


def finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it (NaN and the infinities)."""
    return value if math.isfinite(value) else None


def encode(event: Event) -> str:
    """One line of strict JSON, without its newline. Raises ValueError for a number that is not finite."""
    return json.dumps({"kind": event.kind, **dataclasses.asdict(event)}, ensure_ascii=False, allow_nan=False)


def decode(line: str) -> Event | None:
    """The event of a line, or None for a kind or a shape that this version does not know."""
    try:
        fields: dict[str, Any] = json.loads(line)
        return KINDS[fields.pop("kind")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
