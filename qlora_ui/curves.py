"""Curves that stay small however long a run is: points, thinned, and what a plot lacks of them. Knows nothing of events or runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[int, float]


def mean(points: Sequence[Point]) -> Point:
    """Neighbours as one point, at the step of the last."""
    return points[-1][0], sum(value for _, value in points) / len(points)


def lowest(points: Sequence[Point]) -> Point:
    """The neighbour that stands for the others, so that the best of all stays."""
    return min(points, key=lambda point: point[1])


def highest(points: Sequence[Point]) -> Point:
    """The neighbour that stands for the others, so that a spike stays."""
    return max(points, key=lambda point: point[1])


class Curve:
    """A curve of at most `limit` points. When it is full, neighbours are joined in pairs and the stride doubles."""

    def __init__(self, limit: int = 600, join: Callable[[Sequence[Point]], Point] = mean) -> None:
        self.limit = limit - limit % 2  # halved in pairs, so that no point is left over
        self.join = join
        self.stride = 1
        self.points: list[Point] = []
        self._bucket: list[Point] = []

    def add(self, step: int, value: float) -> None:
        """Append a value at a step greater than all before."""
        self._bucket.append((step, value))
        if len(self._bucket) < self.stride:
            return
        self.points.append(self.join(self._bucket))
        self._bucket = []
        if len(self.points) >= self.limit:
            self.points = [self.join(pair) for pair in zip(self.points[::2], self.points[1::2], strict=False)]
            self.stride *= 2

    def rewind(self, step: int) -> None:
        """Forget all after a step."""
        self.points = [point for point in self.points if point[0] <= step]
        self._bucket = []

    def since(self, stride: int, count: int) -> dict[str, Any]:
        """What a plot lacks that has `count` points of that stride; it starts over when `restart` is true."""
        restart = stride != self.stride or count > len(self.points)
        return {"restart": restart, "stride": self.stride, "points": self.points[0 if restart else count :]}

    def to_dict(self) -> dict[str, Any]:
        return {"stride": self.stride, "points": self.points, "bucket": self._bucket}

    def set_from(self, written: Mapping[str, Any]) -> None:
        """Go on from what `to_dict` gave."""
        self.stride = written["stride"]
        self.points, self._bucket = ([(step, value) for step, value in written[name]] for name in ("points", "bucket"))


@dataclass(frozen=True, kw_only=True)
class CurveDelta:
    """What a plot lacks that has seen `count` points of stride `stride` since `rewinds`; it starts over when `restart` is true."""

    restart: bool
    rewinds: int
    stride: int
    count: int
    train: list[Point]
    held_out: list[Point]
    total_steps: int
