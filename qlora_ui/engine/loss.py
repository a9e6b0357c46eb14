"""The loss of trained tokens, without logits for all others. Knows nothing of rows, configs or Gradio.

The head turns each hidden state into one number per word of the vocabulary: in a small model that is most of the memory
and a third of the work, and where only answers are trained more than half of it would be thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qlora_ui.engine.tokens import IGNORED


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy in float32 of (tokens, words) logits to the tokens' words, summed; a few tokens at a time.

    Its gradient is made along with it, in the dtype of the logits, so that nothing of their size is held in float32. Only that
    of float16 logits is: most of its numbers are too small for float16 before the loss scaling has made them larger.
    """

    CHUNK = 64

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=logits.device)
        ctx.dtype = logits.dtype
        gradient = torch.empty_like(logits, dtype=torch.float32 if logits.dtype == torch.float16 else None)
        for first in range(0, len(words), SummedCrossEntropy.CHUNK):
            here = slice(first, first + SummedCrossEntropy.CHUNK)
            word = words[here, None]
            log_shares = torch.log_softmax(logits[here].float(), -1)
            total -= log_shares.gather(1, word).sum()
            gradient[here] = log_shares.exp_().scatter_add_(1, word, torch.full_like(word, -1, dtype=log_shares.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)).to(ctx.dtype), None


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """Cross-entropy in float32 of the trained tokens. `head` is the module that makes logits, or None to let the model make them all."""

    head: torch.nn.Module | None

    @contextlib.contextmanager
    def selecting(self, labels: torch.Tensor) -> Iterator[None]:
        """Within this, the head is handed only the hidden states from which a trained token is predicted."""
        if self.head is None:
            yield
            return

        def select(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden, *others = inputs
            return hidden[:, :-1][predicting(labels).to(hidden.device)][None], *others

        hook = self.head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            hook.remove()

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """The sum over the trained tokens, divided by `num_items_in_batch`: those of the whole step. Without it, their mean."""
        which = predicting(labels)
        logits = outputs["logits"]
        logits = logits[0] if self.head is not None else logits[:, :-1][which.to(logits.device)]
        total: torch.Tensor = SummedCrossEntropy.apply(logits, labels[:, 1:][which].to(logits.device))  # type: ignore[no-untyped-call]
        return total / (which.sum() if num_items_in_batch is None else num_items_in_batch)


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """Of (rows, tokens - 1) positions, those whose next token is trained."""
    return labels[:, 1:] != IGNORED
