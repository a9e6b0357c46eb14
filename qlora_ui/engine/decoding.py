"""Draws the answers of a batch of prompts, token by token, in a thread that can be ended. Knows nothing of runs or Gradio."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_ui.errors import UserError

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
    no longer fitted. `note` is what there is to say beside, as what is waited for before the first token.
    """

    texts: tuple[str, ...]
    tokens: int
    seconds: float
    context: int
    context_limit: int
    left_out: int
    note: str = ""


def draw(
    model: Any,
    tokenizer: Any,
    batch: Mapping[str, torch.Tensor],
    passes: Sequence[tuple[Sequence[int], Callable[[], AbstractContextManager[None]]]],
    sampling: Sampling,
    end_ids: Sequence[int],
    read: Mapping[str, Any],
) -> Iterator[Answers]:
    """Stream the answers of all rows of the batch. Each pass names rows that decode together, and what the model has to be meanwhile.

    `sampling.max_new_tokens` is what there is room for; `read` goes into every `Answers`. Closing the generator ends the generation
    at its next token. Raises what the generation raised.
    """
    stream = _Rows(len(batch["input_ids"]), tokenizer, end_ids, read)
    stopped = threading.Event()

    def generate() -> None:
        try:
            for rows, answering in passes:
                if stopped.is_set():
                    break
                stream.rows = list(rows)
                with torch.inference_mode(), answering():
                    torch.manual_seed(sampling.seed)
                    model.generate(
                        **{name: tensor[stream.rows] for name, tensor in batch.items()},
                        streamer=stream,
                        stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
                        eos_token_id=list(end_ids),
                        pad_token_id=tokenizer.pad_token_id,
                        max_new_tokens=sampling.max_new_tokens,
                        do_sample=sampling.temperature > 0,
                        temperature=float(sampling.temperature) or None,  # transformers refuses an int
                        top_p=sampling.top_p if sampling.temperature > 0 else None,
                        top_k=sampling.top_k or None if sampling.temperature > 0 else None,
                        repetition_penalty=float(sampling.repetition_penalty),
                    )
        except BaseException as error:  # noqa: BLE001 - it belongs to the reader of the stream, who raises it
            stream.news.put(error)
        finally:
            stream.news.put(None)

    thread = threading.Thread(target=generate, name="generate", daemon=True)
    started = time.perf_counter()
    thread.start()
    try:
        yield from stream.read(started)
    finally:
        stopped.set()
        thread.join()


class _Stopped(StoppingCriteria):
    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device, dtype=torch.bool)


class _Rows(BaseStreamer):
    """Collects the tokens of every row of the batch; transformers' own text streamer takes one row only.

    `rows` are those that are being generated: all, or one after the other.
    """

    def __init__(self, rows: int, tokenizer: Any, end_ids: Sequence[int], read: Mapping[str, Any]) -> None:
        self.news: queue.Queue[list[tuple[int, int]] | BaseException | None] = queue.Queue()
        self.rows = list(range(rows))
        self._decoders = [DecodeStream(skip_special_tokens=True) for _ in range(rows)]
        self._backend = tokenizer.backend_tokenizer
        self._ended = [False] * rows
        self._end_ids = set(end_ids)
        self._prompt_seen = False
        self._read = read

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.news.put(list(zip(self.rows, value.flatten().tolist(), strict=True)))
        self._prompt_seen = True

    def end(self) -> None:
        """The next generation starts with its prompt. All ends with the thread's last word, which also comes after an error."""
        self._prompt_seen = False

    def read(self, started: float) -> Iterator[Answers]:
        texts = [""] * len(self._ended)
        count = 0
        while (news := self.news.get()) is not None:
            if isinstance(news, BaseException):
                raise news
            for row, token in news:
                self._ended[row] = self._ended[row] or token in self._end_ids
                if not self._ended[row]:
                    texts[row] += self._decoders[row].step(self._backend, token) or ""
                    count += 1
            # The blank before an answer is the format's (Guanaco's). Kept, the next turn would have two.
            said = tuple(text.lstrip() for text in texts)
            yield Answers(texts=said, tokens=count, seconds=time.perf_counter() - started, **self._read)
