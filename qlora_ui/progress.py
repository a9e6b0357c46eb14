"""Events folded into what a person looks at: phase, status line, time left, thinned curves, log tail.

Pure: knows nothing of disk, Gradio or torch.
"""

from __future__ import annotations

import statistics
import textwrap
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_ui.answers import Answers
from qlora_ui.curves import Curve, CurveDelta, Point, highest, lowest
from qlora_ui.events import (
    AdapterSaved,
    Asked,
    CheckpointSaved,
    Event,
    Failed,
    Finished,
    HeldOut,
    Interrupted,
    Log,
    Paused,
    Phase,
    PhaseProgress,
    Planned,
    Resumed,
    Sample,
    State,
    Step,
    Stopped,
    Wish,
    decode,
    encode,
)

PHASE_WORDS = {
    "reading": "reading the data",
    "fetching": "fetching the model",
    "loading": "loading",
    "quantizing": "quantizing to 4 bits",
    "tokenizing": "tokenizing",
    "training": "training",
    "saving": "saving",
}
WISH_WORDS: dict[Wish, str] = {"pause": "pausing", "stop": "stopping", "discard": "discarding"}
ASKED_WORDS: dict[Wish, str] = {"pause": "A pause", "stop": "Stop", "discard": "Discarding the run"}
RESUMABLE: tuple[State, ...] = ("paused", "interrupted", "failed")

EVENTS = ("phase_progress", "planned", "last", "best", "best_checkpoint", "failure", "end")
MORE_CURVES = ("learning_rate", "grad_norm", "tokens_per_second", "memory_gib")
"""What every step says beside its loss."""
CURVES = ("train", "held_out_curve", *MORE_CURVES)
BY_STEP = (*CURVES, "answers")
"""What is rewound when a run goes on from an earlier step."""
QUEUES = ("log", "_step_seconds", "grad_norms")


class Progress:
    """The fold of one run's events: `add` each in order, then look."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = "running"
        self.phase = ""
        self.phase_progress: PhaseProgress | None = None
        self.planned: Planned | None = None
        self.last: Step | None = None
        self.loss: float | None = None
        self.held_out_loss: float | None = None
        self.measured_at = 0  # the step of that loss
        self.best: HeldOut | None = None
        self.best_checkpoint: CheckpointSaved | None = None
        self.skipped: list[int] = []
        self.train = Curve()
        self.held_out_curve = Curve(300, lowest)
        self.learning_rate, self.tokens_per_second = Curve(200), Curve(200)
        self.grad_norm, self.memory_gib = Curve(200, highest), Curve(200, highest)
        self.answers = Answers()
        self.grad_norms: deque[float] = deque(maxlen=100)
        self.held_out_rises = 0
        self.rewinds = 0
        self.log: deque[str] = deque(maxlen=60)
        self.logged = 0
        self.asked: Wish | None = None
        self.adapter_saved = False
        self.failure: Failed | Paused | None = None
        self.end: Event | None = None
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._step_began: float | None = None
        self._resumed_at = 0

    @property
    def step(self) -> int:
        return self.last.step if self.last else self._resumed_at

    @property
    def held_out(self) -> list[Point]:
        return self.held_out_curve.points

    @property
    def skipped_steps(self) -> int:
        """Steps whose loss or gradients were not finite, so that they did not reach the weights."""
        return len(self.skipped)

    @property
    def resumable(self) -> bool:
        """Whether the run can go on without a change: it neither came to its end nor was ended by its owner."""
        return self.state in RESUMABLE

    @property
    def total_steps(self) -> int:
        return self.planned.total_steps if self.planned else 0

    @property
    def share_done(self) -> float:
        """Of the training, 0 to 1; before it, of the current phase."""
        if self.phase in ("training", "saving") or self.state != "running":
            return self.step / self.total_steps if self.total_steps else 0.0
        return self.phase_progress.done / self.phase_progress.total if self.phase_progress and self.phase_progress.total else 0.0

    @property
    def seconds_a_step(self) -> float | None:
        """The usual pace of the last 20 steps; None before three steps are known.

        The median, because a clock that was set or a laptop that slept makes a step look hours long.
        """
        return statistics.median_low(self._step_seconds) if len(self._step_seconds) >= 2 else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training left at that pace."""
        pace = self.seconds_a_step
        return None if self.state != "running" or pace is None else pace * (self.total_steps - self.step)

    @property
    def done_at(self) -> float | None:
        """When the training will have ended by the pace of now, in seconds since 1970; None while that is not known."""
        return None if self.eta_seconds is None or self.last is None else self.last.time + self.eta_seconds

    def add(self, event: Event) -> None:
        """Take in the next event."""
        if event.state is not None:
            self.state = event.state
        if isinstance(event, Phase):
            self.phase, self.phase_progress, self.end = event.name, None, None
        elif isinstance(event, PhaseProgress):
            self.phase_progress = event
        elif isinstance(event, Planned):
            self.planned = event
        elif isinstance(event, Step):
            self.last = event
            if self._step_began is not None and event.time >= self._step_began:
                self._step_seconds.append(event.time - self._step_began)
            self._step_began = event.time
            if event.skipped:
                self.skipped.append(event.step)
            if event.loss is not None:
                self.loss = event.loss
                self.train.add(event.step, event.loss)
            for name in MORE_CURVES:
                if (value := getattr(event, name)) is not None:
                    getattr(self, name).add(event.step, value)
            if event.grad_norm is not None:
                self.grad_norms.append(event.grad_norm)
        elif isinstance(event, HeldOut):
            self._add_held_out(event)
            rose = self.held_out_loss is not None and event.loss > self.held_out_loss
            self.held_out_rises = self.held_out_rises + 1 if rose else 0
            self.held_out_loss, self.measured_at = event.loss, event.step
            self.best = event if self.best is None or event.loss < self.best.loss else self.best
            self._step_began = None  # the time of an evaluation is not the pace of a step
        elif isinstance(event, Sample):
            self.answers.add(event)
            self._step_began = None
        elif isinstance(event, CheckpointSaved):
            self.best_checkpoint = event if event.best else self.best_checkpoint
        elif isinstance(event, Asked):
            self.asked = event.wish if self.state == "running" else None
        elif isinstance(event, Resumed):
            self._rewind(event.step)
        elif isinstance(event, AdapterSaved):
            self.adapter_saved = True
        elif isinstance(event, Failed) or (isinstance(event, Paused) and event.reason):
            self.failure = event
        if event.state not in (None, "running"):
            self.end, self.asked = event, None
        line = log_line(event)
        if line:
            told = event.traceback if isinstance(event, (Failed, Paused)) else ""
            self.log.append(f"{time.strftime('%H:%M:%S', time.localtime(event.time))}  {line}" + (f"\n{told}" if told else ""))
            self.logged += 1

    def _add_held_out(self, event: HeldOut) -> None:
        curve, stride = self.held_out_curve, self.held_out_curve.stride
        if curve.points and curve.points[-1][0] >= event.step:
            curve.rewind(event.step - 1)  # a resumed run measures again
        curve.add(event.step, event.loss)
        self.rewinds += curve.stride != stride  # what a plot has drawn of it is void

    def _rewind(self, step: int) -> None:
        """What came after the step is void."""
        self.rewinds += 1
        self._resumed_at = step
        self.phase, self.phase_progress = "", None
        self.last = self.failure = self.end = self.asked = None
        for name in BY_STEP:
            getattr(self, name).rewind(step)
        self.grad_norms.clear()
        self.held_out_rises = 0
        self.skipped = [skipped for skipped in self.skipped if skipped <= step]
        self.loss = self.train.points[-1][1] if self.train.points else None
        self.measured_at, self.held_out_loss = self.held_out[-1] if self.held_out else (0, None)
        left = [HeldOut(step=at, loss=loss, time=0.0) for at, loss in self.held_out]  # when each was measured is not kept
        self.best = min(left, key=lambda seen: seen.loss, default=None)
        if self.best_checkpoint and self.best_checkpoint.step > step:
            self.best_checkpoint = None
        self._step_seconds.clear()
        self._step_began = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, from which `from_dict` makes a progress that goes on in the same way."""
        written = {name: value for name, value in vars(self).items() if name not in (*EVENTS, *BY_STEP, *QUEUES)}
        written |= {name: event and encode(event) for name, event in vars(self).items() if name in EVENTS}
        return written | {name: getattr(self, name).to_dict() for name in BY_STEP} | {name: list(getattr(self, name)) for name in QUEUES}

    @staticmethod
    def from_dict(written: Mapping[str, Any]) -> Progress:
        """Raises KeyError, TypeError or ValueError for what no `to_dict` gave."""
        progress = Progress(written["name"])
        for name, value in vars(progress).items():
            if name in BY_STEP:
                value.set_from(written[name])
            elif name in QUEUES:
                value.extend(written[name])
            else:
                setattr(progress, name, decode(written[name]) if name in EVENTS and written[name] else written[name])
        return progress

    def status_line(self) -> str:
        """One line: name, what it is doing or how it ended, loss, time left."""
        parts = [self.name]
        if self.state == "running":
            doing = PHASE_WORDS.get(self.phase, "starting")
            if self.phase == "training" and self.total_steps:
                doing += f" {self.step}/{self.total_steps}"
            elif self.phase_progress:
                doing += f" {amount(self.phase_progress)}"
            parts.append(WISH_WORDS[self.asked] if self.asked else doing)
            if self.loss is not None:
                parts.append(f"loss {self.loss:.2f}")
            if self.eta_seconds is not None and not self.asked:
                parts.append(f"{duration(self.eta_seconds)} left")
        else:
            parts.append(self.end_sentence())
            if self.held_out_loss is not None and self.measured_at == self.step and self.state != "failed":
                parts.append(f"held-out loss {self.held_out_loss:.2f}")
        if self.skipped_steps:
            parts.append(f"{self.skipped_steps} skipped step{'' if self.skipped_steps == 1 else 's'}")
        return " · ".join(parts).replace(". · ", " · ")  # a sentence goes on

    def end_sentence(self) -> str:
        """How the run ended, in one sentence; empty while it runs."""
        end = self.end
        if isinstance(end, Finished):
            return f"Finished: {end.step} steps, adapter saved{f'; {end.reason}' if end.reason else ''}"
        if isinstance(end, Stopped):
            if end.adapter_saved:
                return f"Stopped at step {end.step} of {end.total_steps}, adapter saved"
            return "Stopped before the first step, so there is no adapter"
        if isinstance(end, Paused):
            where = f"Paused at step {end.step} of {end.total_steps}" if end.total_steps else "Paused before the first step"
            return f"{where}: {end.reason}" if end.reason else where
        if isinstance(end, Interrupted):
            return f"Interrupted at step {end.step}"
        if isinstance(end, Failed):
            return end.message
        return ""

    def curves_since(self, rewinds: int, stride: int, count: int, held_out_count: int) -> CurveDelta:
        """The points that a plot lacks which has `count` training points of `stride` and `held_out_count` others, after `rewinds`."""
        older = (rewinds, stride) != (self.rewinds, self.train.stride)
        restart = older or count > len(self.train.points) or held_out_count > len(self.held_out)
        return CurveDelta(
            restart=restart,
            rewinds=self.rewinds,
            stride=self.train.stride,
            count=len(self.train.points),
            train=self.train.points[0 if restart else count :],
            held_out=self.held_out[0 if restart else held_out_count :],
            total_steps=self.total_steps,
        )

    def more_since(self, rewinds: int, known: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Of each of MORE_CURVES what a plot lacks that has `known[name]` = (stride, count) of it after `rewinds`."""
        lacks = {
            name: getattr(self, name).since(*(known[name] if rewinds == self.rewinds and name in known else (0, 0))) for name in MORE_CURVES
        }
        return {"rewinds": self.rewinds, "total_steps": self.total_steps, "curves": lacks}


def fold(name: str, events: Iterable[Event]) -> Progress:
    """How a run of that name stands after these events."""
    progress = Progress(name)
    for event in events:
        progress.add(event)
    return progress


def log_line(event: Event) -> str:
    """The event as a line of the log; empty for those that would only be noise there."""
    if isinstance(event, Log):
        return ("Note: " if event.level == "warning" else "") + event.text
    if isinstance(event, Phase):
        return f"{PHASE_WORDS[event.name].capitalize()}{': ' + event.detail if event.detail else ''}"
    if isinstance(event, Planned):
        return (
            f"{event.total_steps} steps over {event.train_rows} rows ({event.held_out_rows} held out); "
            f"{event.tokens:,} tokens a pass, {event.trained_tokens:,} of them trained on"
        )
    if isinstance(event, Step):
        loss = "not finite" if event.loss is None else f"{event.loss:.4f}"
        skipped = "  skipped: the weights stay as they were" if event.skipped else ""
        return f"step {event.step}  loss {loss}  lr {event.learning_rate:.2e}  {event.tokens_per_second:.0f} tokens/s{skipped}"
    if isinstance(event, HeldOut):
        return f"step {event.step}  held-out loss {event.loss:.4f}  perplexity {event.perplexity:.4g}"
    if isinstance(event, Sample):
        asked, base, adapter = (textwrap.shorten(said, 160, placeholder=" …") for said in (event.prompt, event.base, event.adapter))
        return f"step {event.step}  asked: {asked}  ·  base: {base}  ·  adapter: {adapter}"
    if isinstance(event, CheckpointSaved):
        return f"step {event.step}  checkpoint saved{', the best so far' if event.best else ''}"
    if isinstance(event, Asked):
        return f"{ASKED_WORDS[event.wish]} was asked for"
    if isinstance(event, Resumed):
        changed = "".join(f"; {name} {before} → {after}" for name, (before, after) in event.changes.items())
        reason = f"{event.reason}. " if event.reason else ""
        return reason + (f"Goes on from step {event.step}" if event.checkpoint else "Begins again") + changed
    if event.state not in (None, "running"):
        end = Progress("")
        end.end = event
        return end.end_sentence()
    return ""


def amount(progress: PhaseProgress) -> str:
    """How far a phase is: `12 of 93 MB`, `40 of 272 tensors`."""
    scale, unit = (1e6, "MB") if progress.unit == "bytes" else (1, progress.unit)
    done, total = f"{progress.done / scale:,.0f}", f"{progress.total / scale:,.0f}"
    return f"{done} of {total} {unit}" if progress.total else f"{done} {unit}"


def duration(seconds: float) -> str:
    """Short words for a time: `40 s`, `3 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{max(0, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
