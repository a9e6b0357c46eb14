"""What is different for encoder-decoder models (T5): the batch, the loss, and what they cannot do. Knows nothing of disk or Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qlora_ui.config import DataConfig
from qlora_ui.engine.tokens import IGNORED, REAL_TOKENS, is_encoder_decoder
from qlora_ui.errors import UserError


def check(tokenizer: Any, data: DataConfig, neftune_noise_alpha: float = 0) -> None:
    """Raise UserError when the settings ask an encoder-decoder for what only a causal model can do."""
    if not is_encoder_decoder(tokenizer):
        return
    if data.train_on == "everything":
        raise UserError(
            "train_on is 'everything', but this is an encoder-decoder model: its encoder only reads. Set train_on to last.",
            field="train_on",
        )
    if neftune_noise_alpha:  # Trainer would add it to an embedding that neither half reads through
        raise UserError(
            f"neftune_noise_alpha is {neftune_noise_alpha:g}, but this is an encoder-decoder model, which NEFTune's noise does not reach. "
            "Set it to 0.",
            field="neftune_noise_alpha",
        )
    if data.long_rows == "split":
        raise UserError(
            "long_rows is 'split', but this is an encoder-decoder model, for which a piece without its question teaches nothing. "
            "Set long_rows to truncate or drop.",
            field="long_rows",
        )


class Collator:
    """Rows to a batch: what comes before a row's first trained token goes to the encoder, the rest is the decoder's target."""

    def __init__(self, pad_token_id: int, model_config: Any) -> None:
        self.pad_token_id, self.start_token_id = pad_token_id, model_config.decoder_start_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor | int]:
        """Four int64 tensors, sources and targets padded each to their longest, and the number of tokens that are not padding.

        The decoder reads its target one place late: at each place it sees what comes before what it has to write.
        """
        borders = [next(place for place, label in enumerate(row["labels"]) if label != IGNORED) for row in rows]
        sources = [row["input_ids"][:border] for row, border in zip(rows, borders, strict=True)]
        seen = [[self.start_token_id, *row["input_ids"][border:-1]] for row, border in zip(rows, borders, strict=True)]
        targets = [row["labels"][border:] for row, border in zip(rows, borders, strict=True)]
        return {
            "input_ids": padded(sources, self.pad_token_id),
            "attention_mask": padded([[1] * len(source) for source in sources], 0),
            "decoder_input_ids": padded(seen, self.pad_token_id),
            "labels": padded(targets, IGNORED),
            REAL_TOKENS: sum(len(row["input_ids"]) for row in rows),
        }


def padded(lines: Sequence[list[int]], filler: int) -> torch.Tensor:
    """Lines of different lengths as one tensor, filled up at the right."""
    longest = max(map(len, lines))
    return torch.tensor([line + [filler] * (longest - len(line)) for line in lines])


def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over all target tokens of an optimizer step.

    T5's own loss is the mean of its micro-batch, which Trainer takes for a share of the step's: the sum of k accumulated
    micro-batches would be k times the loss, and k times the gradient.
    """
    logits = outputs["logits"].float().flatten(0, 1)
    labels = labels.to(logits.device).flatten()
    total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum())
