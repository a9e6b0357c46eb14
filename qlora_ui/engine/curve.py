"""The held-out loss as a picture for a model card. Knows nothing of disk beyond the file it writes, of torch or Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qlora_ui.events import Event, HeldOut, Step

SIZE = (960, 480)
LEFT, TOP, RIGHT, BOTTOM = 90, 50, 930, 410
INK, GRID, TRAIN, HELD_OUT = "#1f2937", "#e5e7eb", "#9dbfe3", "#d97706"
TICKS = 5

Points = list[tuple[float, float]]


def draw(events: Sequence[Event], path: Path) -> bool:
    """Write a PNG (the Hub shows no SVG) of held-out and training loss over the steps. False, and no file, with less than two points."""
    held_out: Points = [(event.step, event.loss) for event in events if isinstance(event, HeldOut)]
    trained: Points = [(event.step, event.loss) for event in events if isinstance(event, Step) and event.loss is not None]
    if len(held_out) < 2:
        return False
    picture = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    every = [*held_out, *trained]
    last_step = max(step for step, _ in every) or 1
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    span = high - low or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        step, loss = point
        return LEFT + (RIGHT - LEFT) * step / last_step, BOTTOM - (BOTTOM - TOP) * (loss - low) / span

    for tick in range(TICKS):
        share = tick / (TICKS - 1)
        x, y = place((last_step * share, low + span * share))
        pen.line([(LEFT, y), (RIGHT, y)], GRID)
        pen.text((LEFT - 10, y), f"{low + span * share:.2f}", INK, font, anchor="rm")
        pen.text((x, BOTTOM + 10), f"{last_step * share:.0f}", INK, font, anchor="mt")
    if len(trained) > 1:
        pen.line([place(point) for point in trained], TRAIN, 2)
    pen.line([place(point) for point in held_out], HELD_OUT, 4)
    for x, y in map(place, held_out):
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], HELD_OUT)
    pen.text((LEFT, 15), "held-out loss", HELD_OUT, font)
    pen.text((LEFT + 160, 15), "training loss", "#5b8fc7", font)
    pen.text(((LEFT + RIGHT) / 2, BOTTOM + 40), "step", INK, font, anchor="mt")
    picture.save(path)
    return True
