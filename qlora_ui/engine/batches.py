"""The rows of one optimizer step as micro-batches, packed or padded. Knows nothing of models or Gradio.

Packed means: rows one after the other in one sequence, without padding, each with positions of its own. From positions
that restart, transformers builds the attention mask that keeps the rows apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_ui.data.lengths import pack
from qlora_ui.engine.tokens import IGNORED, REAL_TOKENS

MICRO_BATCHES = "micro_batches"
ROWS = "rows"
Row = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class StepCollator:
    """All rows of an optimizer step to its micro-batches: packed up to `token_budget` tokens, or with 0 `pad_rows` rows each, padded.

    The loss is averaged over the trained tokens of the whole step, so how the rows are parted changes nothing that is learned.
    """

    token_budget: int
    pad_rows: int
    pad: Callable[[Sequence[Row]], dict[str, Any]]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The micro-batches, and the number of rows in them."""
        if self.token_budget:
            # A row longer than the budget counts as all of it, so that it goes alone.
            bins = pack([min(len(row["input_ids"]), self.token_budget) for row in rows], self.token_budget)
            batches = [packed([rows[index] for index in sorted(bin)]) for bin in bins]
        else:
            batches = [self.pad(rows[first : first + self.pad_rows]) for first in range(0, len(rows), self.pad_rows)]
        return {MICRO_BATCHES: batches, ROWS: len(rows)}


def packed(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as one sequence of a batch. The first token of each is predicted by nobody, least of all by the row before it."""
    lengths = [len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in rows for label in (IGNORED, *row["labels"][1:])]]),
        "position_ids": torch.tensor([[position for length in lengths for position in range(length)]]),
        "use_cache": False,  # with a cache transformers would not look at the positions, and rows would see each other
        REAL_TOKENS: sum(lengths),
    }
