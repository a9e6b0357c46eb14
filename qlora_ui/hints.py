"""Progress -> what a person should look at, in sentences that carry their evidence. Pure: knows nothing of disk, Gradio or torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from qlora_ui.curves import Point
from qlora_ui.progress import Progress

MOST_HINTS = 2
RISES = 3
"""Fewer evaluations that got worse in a row may be chance."""
ORDINARY_SKIPS = 20
"""Within its first steps, a run in float16 skips a few while it looks for its loss scale."""
CLIPPED_SHARE = 0.9
FLAT_SHARE = 0.005


def hints(progress: Progress, max_grad_norm: float | None) -> list[str]:
    """What matters most first, and never more than a person would read. `max_grad_norm` is None where it is not known."""
    found = [held_out_rises(progress), steps_are_skipped(progress), loss_stays(progress), gradients_are_clipped(progress, max_grad_norm)]
    return [sentence for sentence in found if sentence][:MOST_HINTS]


def held_out_rises(progress: Progress) -> str:
    if progress.held_out_rises < RISES or progress.best is None:
        return ""
    return (
        f"Held-out loss has risen for {progress.held_out_rises} evaluations, to {progress.held_out_loss:.3f}. "
        f"Step {progress.best.step} was best: {progress.best.loss:.3f}."
    )


def steps_are_skipped(progress: Progress) -> str:
    recent = [step for step in progress.skipped if step > max(ORDINARY_SKIPS, progress.step - 100)]
    if len(recent) < 2:
        return ""
    return f"{len(recent)} of the last 100 steps were skipped: loss or gradients not finite. Try a lower learning rate."


def loss_stays(progress: Progress) -> str:
    """Said once there is enough to tell a trend from noise; at its end a run is flat by its schedule."""
    points, stride = progress.train.points, progress.train.stride
    quarter, fifth = len(points) // 4, len(points) // 5
    if len(points) < 20 or progress.share_done < 0.1:
        return ""
    first, last = mean_loss(points[:quarter]), mean_loss(points[-quarter:])
    if last >= first:
        return (
            f"Training loss is not falling: {first:.3f} in the first {quarter * stride} steps, {last:.3f} in the last {quarter * stride}."
        )
    if len(points) < 50 or progress.share_done > 0.9:
        return ""
    parts = [mean_loss(points[len(points) - (back + 1) * fifth : len(points) - back * fifth]) for back in range(3)]
    if max(parts) - min(parts) > FLAT_SHARE * max(parts):
        return ""
    steps = fifth * stride
    return f"Training loss is flat: {parts[0]:.3f} in the last {steps} steps, {parts[1]:.3f} and {parts[2]:.3f} in the {steps} before each."


def gradients_are_clipped(progress: Progress, max_grad_norm: float | None) -> str:
    norms = progress.grad_norms
    if max_grad_norm is None or len(norms) < (norms.maxlen or 0):
        return ""
    clipped = sum(norm > max_grad_norm for norm in norms)
    if clipped < CLIPPED_SHARE * len(norms):
        return ""
    median = statistics.median(norms)
    return f"Gradients were clipped at {clipped} of the last {len(norms)} steps: median norm {median:.2g}, limit {max_grad_norm:g}."


def mean_loss(points: Sequence[Point]) -> float:
    return statistics.fmean(loss for _, loss in points)
