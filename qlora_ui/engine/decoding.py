"""Draws the answers of a batch of prompts, token by token, until it is asked to end. Knows nothing of runs, threads or Gradio."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled

BOUNDS = {
    "temperature": (0, 10),
    "top_p": (0, 1),
    "top_k": (0, 1_000_000),
    "repetition_penalty": (0.1, 10),
    "max_new_tokens": (1, 1_000_000),
    "seed": (0, 2**32 - 1),
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn. Temperature 0 always takes the likeliest token, `top_k` 0 draws from all.

    Raises UserError for a value out of bounds.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} is {value}: it must be from {low} to {high}.", field=name)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers so far, in the order of the asked sides, with the number of tokens drawn and the seconds it took.

    `context` tokens of the `context_limit` that the model can read were read, on the longest side; `left_out` of its oldest turns
    no longer fitted. `note` is what there is to say beside, as what is waited for before the first token. While `before` others are
    before you, there are no words yet.
    """

    texts: tuple[str, ...]
    tokens: int
    seconds: float
    context: int
    context_limit: int
    left_out: int
    note: str = ""
    before: int = 0


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Rows of the batch that decode together.

    `answering` is what the model has to be meanwhile; `recall` gives what it computed of these prompts before, if anything.
    """

    rows: Sequence[int]
    answering: Callable[[], AbstractContextManager[None]]
    recall: Callable[[], DynamicCache | None]


def draw(
    model: Any,
    tokenizer: Any,
    batch: Mapping[str, torch.Tensor],
    passes: Sequence[Pass],
    sampling: Sampling,
    end_ids: Sequence[int],
    read: Mapping[str, Any],
    tell: Callable[[Answers], None],
    should_stop: Callable[[], bool],
    options: Mapping[str, Any],
) -> None:
    """Tell the answers of all rows of the batch, at each token. `sampling.max_new_tokens` is what there is room for; `read` goes
    into every `Answers`, `options` to `generate`."""
    stream = _Rows(len(batch["input_ids"]), tokenizer, end_ids, read, tell)
    for one in passes:
        if should_stop():
            return
        stream.rows = list(one.rows)
        longest = int(batch["attention_mask"][stream.rows].sum(1).max())
        with torch.inference_mode(), suppress(Cancelled):
            cache = one.recall()
            with one.answering():
                torch.manual_seed(sampling.seed)
                model.generate(
                    **{name: tensor[stream.rows, -longest:] for name, tensor in batch.items()},
                    **({"past_key_values": cache} if cache else {}),
                    **options,
                    streamer=stream,
                    stopping_criteria=StoppingCriteriaList([_Stopped(should_stop)]),
                    eos_token_id=list(end_ids),
                    pad_token_id=tokenizer.pad_token_id,
                    max_new_tokens=sampling.max_new_tokens,
                    do_sample=sampling.temperature > 0,
                    temperature=float(sampling.temperature) or None,  # transformers refuses an int
                    top_p=sampling.top_p if sampling.temperature > 0 else None,
                    top_k=sampling.top_k or None if sampling.temperature > 0 else None,
                    repetition_penalty=float(sampling.repetition_penalty),
                )


class _Stopped(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.should_stop(), device=input_ids.device, dtype=torch.bool)


class _Rows(BaseStreamer):
    """Collects the tokens of every row of the batch; transformers' own text streamer takes one row only.

    `rows` are those that are being generated: all, or one after the other.
    """

    def __init__(self, rows: int, tokenizer: Any, end_ids: Sequence[int], read: Mapping[str, Any], tell: Callable[[Answers], None]) -> None:
        self.rows = list(range(rows))
        self._texts = [""] * rows
        self._count = 0
        self._decoders = [DecodeStream(skip_special_tokens=True) for _ in range(rows)]
        self._backend = tokenizer.backend_tokenizer
        self._ended = [False] * rows
        self._end_ids = set(end_ids)
        self._prompt_seen = False
        self._read, self._tell = read, tell
        self._started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate begins with it
            self._prompt_seen = True
            return
        for row, token in zip(self.rows, value.flatten().tolist(), strict=True):
            self._ended[row] = self._ended[row] or token in self._end_ids
            if not self._ended[row]:
                self._texts[row] += self._decoders[row].step(self._backend, token) or ""
                self._count += 1
        # The blank before an answer is the format's (Guanaco's). Kept, the next turn would have two.
        said = tuple(text.lstrip() for text in self._texts)
        self._tell(Answers(texts=said, tokens=self._count, seconds=time.perf_counter() - self._started, **self._read))

    def end(self) -> None:
        """The next generation starts with its prompt."""
        self._prompt_seen = False
