"""A run's sample answers by step, few enough to be kept and shown however long it is. Knows nothing of disk, Gradio or torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qlora_ui.events import Sample

MOST_ROUNDS = 40


class Answers:
    """Rounds of the same prompts. When there are too many, every second goes; the first and the newest stay.

    `serial` grows with every answer, and a round bears that of its last one: whoever has a round of that serial has all of it.
    """

    def __init__(self) -> None:
        self.serial = 0
        self.rounds: list[dict[str, Any]] = []
        self._is_open = False  # whether the next answer of the same step belongs to the newest round

    def add(self, event: Sample) -> None:
        """Take in the answer to one prompt."""
        self.serial += 1
        if not (self._is_open and self.rounds[-1]["step"] == event.step):
            self._begin(event.step)
        self.rounds[-1]["serial"] = self.serial
        self.rounds[-1]["said"].append({"prompt": event.prompt, "base": event.base, "adapter": event.adapter})

    def _begin(self, step: int) -> None:
        """A new round; a run that went on may ask again where it had asked."""
        rounds = [seen for seen in self.rounds if seen["step"] < step]
        thinned = [rounds[0], *rounds[2::2]] if len(rounds) > MOST_ROUNDS else rounds
        self.rounds, self._is_open = [*thinned, {"step": step, "serial": 0, "said": []}], True

    def rewind(self, step: int) -> None:
        """Forget all after a step."""
        self.serial += 1
        self.rounds, self._is_open = [seen for seen in self.rounds if seen["step"] <= step], False

    def since(self, known: Collection[int]) -> dict[str, Any]:
        """The serials of all rounds in order, and those rounds that a page lacks which knows these."""
        return {
            "serial": self.serial,
            "rounds": [seen["serial"] for seen in self.rounds],
            "news": [seen for seen in self.rounds if seen["serial"] not in known],
        }

    def to_dict(self) -> dict[str, Any]:
        return {"serial": self.serial, "rounds": self.rounds, "is_open": self._is_open}

    def set_from(self, written: Mapping[str, Any]) -> None:
        """Go on from what `to_dict` gave."""
        self.serial, self._is_open = written["serial"], written["is_open"]
        self.rounds = [{**seen, "said": list(seen["said"])} for seen in written["rounds"]]
