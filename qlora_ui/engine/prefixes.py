"""What a model computed of the conversations that it read, kept for their next turns. Knows nothing of runs, threads or Gradio.

What is computed of a token depends on the tokens before it, and in its last bits on how many are computed at once. So prompts
are read in blocks that begin at fixed places, and only whole blocks are kept: an answer is the same, to the last bit, whether
they were kept or are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qlora_ui.stopping import Cancelled

BLOCK = 256  # tokens. A first question is seldom longer, and so is read at once, as plain `generate` does
KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each layer, of shape (rows, heads, tokens, width)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A prompt, who reads it, and what the model has to be meanwhile."""

    speaker: str
    ids: Sequence[int]
    answering: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """The beginning of a conversation as one speaker read it: whole blocks of tokens, and what was computed of them."""

    speaker: str
    ids: Sequence[int]
    computed: KeysAndValues

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.computed for tensor in pair)


class Prefixes:
    """The prefixes that were read last, in at most so many bytes. For one model, and for as long as its speakers stay as they are."""

    def __init__(self, model: Any, most_bytes: int) -> None:
        """The base. Adapters may be put on it later."""
        self._model, self._most_bytes = model, most_bytes
        self._kept: list[Prefix] = []  # the one that was read last is the last
        self._no_logits = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        self._is_possible = keeps_every_token(model)

    @property
    def bytes(self) -> int:
        return sum(prefix.bytes for prefix in self._kept)

    def forget(self) -> None:
        self._kept.clear()

    def recall(self, rows: Sequence[Row], should_stop: Callable[[], bool]) -> DynamicCache | None:
        """What was computed of these prompts, as if they were padded at the left. What is missing of their whole blocks is
        computed now.

        None where no prompt fills a block, or the model keeps what it computes in another way. Raises Cancelled.
        """
        whole = [(len(row.ids) - 1) // BLOCK * BLOCK for row in rows]  # the last token is the one that generating begins with
        if not self._is_possible or not any(whole):
            return None
        read = [self._read(row, row.ids[:end], should_stop) if end else None for row, end in zip(rows, whole, strict=True)]
        if sum(prefix is not None for prefix in read) < sum(end > 0 for end in whole):
            self._is_possible = False  # it has another way that its config does not tell of
            return None
        rest = max(len(row.ids) - end for row, end in zip(rows, whole, strict=True))  # of every row, since they go on together
        return joined([(prefix.computed if prefix else [], max(0, len(row.ids) - rest)) for prefix, row in zip(read, rows, strict=True)])

    def _read(self, row: Row, ids: Sequence[int], should_stop: Callable[[], bool]) -> Prefix | None:
        mine = [prefix for prefix in self._kept if prefix.speaker == row.speaker]
        known = max(mine, key=lambda prefix: shared(prefix.ids, ids), default=None)
        start = shared(known.ids, ids) if known else 0
        cache = DynamicCache([(keys[:, :, :start], values[:, :, :start]) for keys, values in known.computed] if known and start else None)
        with row.answering():
            for place in range(start, len(ids), BLOCK):
                if should_stop():
                    raise Cancelled
                block = torch.tensor([ids[place : place + BLOCK]], device=self._model.device)
                seen = torch.ones(1, place + BLOCK, dtype=torch.long, device=self._model.device)
                self._model(input_ids=block, attention_mask=seen, past_key_values=cache, use_cache=True, **self._no_logits)
        if cache.get_seq_length() != len(ids) or not all(layer.is_initialized for layer in cache.layers):
            return None
        prefix = Prefix(speaker=row.speaker, ids=list(ids), computed=[(layer.keys, layer.values) for layer in cache.layers])
        self._keep(prefix, known)
        return prefix

    def _keep(self, prefix: Prefix, known: Prefix | None) -> None:
        """Instead of the one that it goes on from. One that goes on further stays, and is the last that was read."""
        is_within = known is not None and shared(known.ids, prefix.ids) == len(prefix.ids)
        goes_on = known is not None and shared(known.ids, prefix.ids) == len(known.ids)
        self._kept = [one for one in self._kept if one is not known or not (is_within or goes_on)]
        self._kept.append(known if known is not None and is_within else prefix)
        while self.bytes > self._most_bytes:
            self._kept.pop(0)


def keeps_every_token(model: Any) -> bool:
    """Whether keys and values of all tokens stay: not with sliding windows, states in their place, or two sides."""
    if model.config.is_encoder_decoder:
        return False
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def shared(ones: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens of whole blocks two conversations begin with in common."""
    count = 0
    while count < min(len(ones), len(others)) and ones[count : count + BLOCK] == others[count : count + BLOCK]:
        count += BLOCK
    return count


def joined(parts: Sequence[tuple[KeysAndValues, int]]) -> DynamicCache:
    """So many tokens of each prompt as one batch, padded at the left with what the attention mask hides."""
    longest = max(length for _, length in parts)
    some = next(computed for computed, _ in parts if computed)

    def batch(layer: int, side: int) -> torch.Tensor:
        cut = [(computed or some)[layer][side][:, :, :length] for computed, length in parts]
        return torch.cat([pad(tensor, (0, 0, longest - tensor.shape[2], 0)) for tensor in cut])

    return DynamicCache([(batch(layer, 0), batch(layer, 1)) for layer in range(len(some))])
