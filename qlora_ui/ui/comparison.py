"""Runs beside each other, as escaped HTML: their curves in one picture and the settings that differ. Knows nothing of disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from qlora_ui.config import KNOBS
from qlora_ui.curves import Point
from qlora_ui.data import sources
from qlora_ui.progress import Progress

MOST_CHARACTERS = 60  # of a setting's value
MOST_RUNS = 8  # as many colours as colour-blind eyes can tell apart


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A run in a comparison: what it is called, how it stands, and its settings by name."""

    title: str
    progress: Progress
    settings: Mapping[str, Any]


def report(run: Shown) -> str:
    """One run: how it ended, its curve, and all its settings."""
    progress = run.progress
    best = f"best held-out loss {progress.best.loss:.3f} at step {progress.best.step:,}" if progress.best else "no held-out loss"
    said = progress.end_sentence() or f"{progress.phase or 'starting'}, step {progress.step:,}"
    rows = "".join(f"<tr><th scope='row'>{label(name)}</th><td>{cell(name, value)}</td></tr>" for name, value in run.settings.items())
    log = "\n".join(progress.log)
    return (
        f'<p class="headline">{escape(said)}</p><p class="note">{escape(best)}</p>{picture([run])}'
        f'<details><summary>Settings</summary><div class="scroll" tabindex="0"><table>{rows}</table></div></details>'
        f'<details><summary>Log</summary><pre class="log" tabindex="0">{escape(log)}</pre></details>'
    )


def comparison(runs: Sequence[Shown]) -> str:
    """Several runs: their curves over each other and the settings that are not the same in all."""
    different = different_settings(runs)
    head = "".join(f'<th scope="col"><i class="key run-{at}"></i>{escape(run.title)}</th>' for at, run in enumerate(runs))
    figures = {
        "Steps": [f"{run.progress.step:,} of {run.progress.total_steps:,}" for run in runs],
        "Best held-out loss": [f"{run.progress.best.loss:.3f}" if run.progress.best else "–" for run in runs],
        "Last training loss": [f"{run.progress.loss:.3f}" if run.progress.loss is not None else "–" for run in runs],
    }
    lines = [(escape(name), values) for name, values in figures.items()]
    lines += [(label(name), [cell(name, run.settings.get(name)) for run in runs]) for name in different]
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>' for name, values in lines)
    said = f"{len(different)} settings differ." if len(different) > 1 else "One setting differs." if different else "Same settings."
    return (
        f'{picture(runs)}<div class="scroll" tabindex="0" role="region" aria-label="Runs side by side"><table>'
        f'<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div><p class="note">{said}</p>'
    )


def different_settings(runs: Sequence[Shown]) -> list[str]:
    """Those that are not the same in all."""
    return [name for name in runs[0].settings if len({repr(run.settings.get(name)) for run in runs}) > 1]


def label(name: str) -> str:
    return escape(KNOBS[name].label)


def cell(name: str, value: Any) -> str:
    """A setting's value, a data set's as it is called; what is cut short or left out, a pointer that rests on it tells."""
    whole = f"{value:g}" if isinstance(value, float) else str(value)
    text = sources.shown(whole) if name == "data" else whole
    text = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
    return escape(text or "–") if text == whole else f'<span title="{escape(whole)}">{escape(text)}</span>'


# The picture --------------------------------------------------------------------------------------------------------------


def picture(runs: Sequence[Shown]) -> str:
    """Smoothed training loss as a line and held-out loss as joined points, in a colour for each run."""
    drawn = [(run, smoothed(run.progress.train.points, run.progress.total_steps), run.progress.held_out) for run in runs]
    points = [point for _, train, held_out in drawn for point in (*train, *held_out) if math.isfinite(point[1])]
    if not points:
        return '<p class="note">No loss yet.</p>'
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(losses), max(losses)
    margin = (high - low) * 0.06 or 0.1
    scale = Scale(last_step=max(*steps, 1), low=low - margin, high=high + margin)
    lines = "".join(line(at, scale, train, held_out) for at, (_, train, held_out) in enumerate(drawn))
    measured = "".join(dots(at, scale, held_out) for at, (_, _, held_out) in enumerate(drawn))
    names = ", ".join(f"{run.title} down to {min(loss for _, loss in train):.3f}" for run, train, _ in drawn if train)
    keys = "".join(f'<span><i class="key run-{at}"></i>{escape(run.title)}</span>' for at, (run, _, _) in enumerate(drawn))
    said = escape(f"Training loss: {names}")
    return (
        f'<figure class="curves"><div class="plot" role="img" aria-label="{said}">{"".join(axes(scale))}'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{lines}</svg>{measured}</div><figcaption>{keys}'
        '<span class="quiet">line: training loss, smoothed · points: held-out loss</span></figcaption></figure>'
    )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From step and loss to hundredths of the picture's width and height, so that it fits a phone as well as a desk."""

    last_step: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return step / self.last_step * 100

    def y(self, loss: float) -> float:
        return (self.high - loss) / (self.high - self.low) * 100


def smoothed(points: Sequence[Point], total_steps: int) -> list[Point]:
    """An exponential moving average with bias correction, as the live plot draws it."""
    memory, total, weight, made = max(6.0, total_steps / 50), 0.0, 0.0, list[Point]()
    before = points[0][0] - 1 if points else 0
    for step, loss in points:
        keep, before = math.exp((before - step) / memory), step
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        made.append((step, total / weight))
    return made


def line(at: int, scale: Scale, train: Sequence[Point], held_out: Sequence[Point]) -> str:
    def path(points: Sequence[Point]) -> str:
        return " ".join(f"{scale.x(step):.2f},{scale.y(loss):.2f}" for step, loss in points if math.isfinite(loss))

    return f'<g class="run-{at}"><polyline points="{path(train)}"/><polyline class="held" points="{path(held_out)}"/></g>'


def dots(at: int, scale: Scale, held_out: Sequence[Point]) -> str:
    """Outside the drawing, which is stretched: dots stay round."""
    places = [(scale.x(step), scale.y(loss)) for step, loss in held_out if math.isfinite(loss)]
    return "".join(f'<i class="dot run-{at}" style="left:{x:.2f}%;top:{y:.2f}%"></i>' for x, y in places)


def axes(scale: Scale) -> Iterator[str]:
    """Faint lines and their numbers."""
    for loss in ticks(scale.low, scale.high, most=7):
        yield f'<i class="loss" style="top:{scale.y(loss):.2f}%"><b>{loss:g}</b></i>'
    for step in filter(float.is_integer, ticks(0, scale.last_step)):
        yield f'<i class="step" style="left:{scale.x(step):.2f}%"><b>{step:,.0f}</b></i>'


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within the range, about `most` or fewer."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    distance = next(n * power for n in (1, 2, 5, 10) if n * power >= (high - low) / most)
    return [round(n * distance, 10) for n in range(math.ceil(low / distance), math.floor(high / distance) + 1)]
