"""Whether an adapter does something, and its base stays what it was: their logits on one short text. Knows nothing of runs or Gradio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from qlora_ui.engine.logits import as_it_is
from qlora_ui.errors import UserError

TEXT = "Who are you, and what is 12 times 7?"
As = Callable[[], AbstractContextManager[None]]
MOST_NEW = 16
"""Of the tokens that a base lacked, so many are read too: an adapter may have learned nothing else."""


class SelfTest:
    """Remembers what a base said before any adapter was put on it."""

    def __init__(self, base: Any, tokenizer: Any, new: Sequence[int]) -> None:
        """`new` are the tokens that were added to the base's own."""
        self._base = base
        self._ids = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], *new[:MOST_NEW]]
        self._plain = self._said()
        self._noise = difference(self._said(), self._plain)  # 0, but for kernels on some GPUs that add up in no fixed order

    def check(self, name: str, as_base: As, as_tuned: As) -> str:
        """What there is to warn of, if anything, once an adapter was put on. Raises UserError where the base would no longer answer
        as it did, to the last bit: a comparison with it would be none."""
        with as_base():
            base = self._said()
        if difference(base, self._plain) > 4 * self._noise:
            raise UserError(
                f"With {name} on it the base no longer answers as it did without: its logits differ by up to "
                f"{difference(base, self._plain):.2g}, so the two cannot be compared. Please report this adapter, and choose another."
            )
        with as_tuned():
            tuned = self._said()
        if not tuned.isfinite().all():
            return f"The numbers of {name} are not finite, so what it says means nothing. Choose an earlier checkpoint."
        if difference(tuned, base) <= 4 * self._noise:
            return f"{name} changes nothing: this adapter answers exactly as its base does."
        return ""

    def _said(self) -> torch.Tensor:
        return as_it_is(self._base, self._ids)


def difference(ones: torch.Tensor, others: torch.Tensor) -> float:
    """The largest; numbers that are none count as equal."""
    return float((ones.nan_to_num() - others.nan_to_num()).abs().max())
