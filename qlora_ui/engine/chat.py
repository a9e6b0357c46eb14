"""Answers from a run's adapter and from its base, out of one model in memory. Knows nothing of Gradio."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import find, load_adapter, load_quantized
from qlora_ui.errors import UserError
from qlora_ui.events import Event
from qlora_ui.runs import Run

ADAPTER = "adapter"
BASE = "base"
BOUNDS = {"temperature": (0, 10), "top_p": (0, 1), "max_new_tokens": (1, 1_000_000), "seed": (0, 2**32 - 1)}
PEFT_NAMES = {ADAPTER: "default", BASE: "__base__"}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn. Temperature 0 always takes the likeliest token. Raises UserError for a value out of bounds."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} is {value}: it must be from {low} to {high}.", field=name)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers so far, in the order of the asked sides, with the number of tokens drawn and the seconds it took."""

    texts: tuple[str, ...]
    tokens: int
    seconds: float


class ChatModel:
    """A run's base in 4 bits with its adapter on it, in the prompt format it was trained in. One conversation turn at a time."""

    def __init__(self, run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
        """Load it; takes seconds to minutes. Raises UserError when the run has no adapter or its base cannot be had."""
        if not run.adapter.is_dir():
            raise UserError(f"{run.id} has no adapter yet. Choose a run that finished or was stopped after its first step.", field="run")
        config = run.config()
        revision = run.facts().get("model_commit") or config.model.revision  # the very base that it was trained on
        found = find(config.model.model, revision, run.workspace.models, emit, should_stop)
        base = load_quantized(found, config.quantization, detect(config.quantization.compute_dtype), emit, should_stop)
        self.run_id = run.id
        self.tokenizer: Any = AutoTokenizer.from_pretrained(run.adapter, trust_remote_code=False, padding_side="left")
        self.model: Any = load_adapter(base, run.adapter)
        self.end_ids = self._end_ids()
        self._lock = threading.Lock()

    def _end_ids(self) -> list[int]:
        """Tokens that end a turn: the tokenizer's end of text, and whatever closes an assistant turn in this prompt format."""
        sample = [Message(role="user", content="a"), Message(role="assistant", content="b")]
        row = tokens.encode(self.tokenizer, sample, "assistant", max_seq_len=10_000)
        last = [label for label in row.labels if label != tokens.IGNORED][-1]
        ends = {self.tokenizer.eos_token_id, last if last in self.tokenizer.all_special_ids else None}
        return sorted(end for end in ends if end is not None)

    def reply(self, sides: Sequence[tuple[str, Sequence[Message]]], sampling: Sampling) -> Iterator[Answers]:
        """Stream one answer per side: ("adapter" or "base", conversation up to the question). All sides decode in one batch.

        Closing the generator ends the generation at its next token. Raises what the generation raised.
        """
        prompts = [tokens.prompt(self.tokenizer, messages) for _, messages in sides]
        batch = self.tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.model.device)
        room = getattr(self.model.config, "max_position_embeddings", 1 << 30) - batch["input_ids"].shape[1]
        if room < 1:
            raise UserError("This conversation is longer than the model can read. Start a new one.")
        stream = _Rows(len(sides), self.tokenizer, self.end_ids)
        stopped = threading.Event()

        def generate() -> None:
            try:
                with self._lock, torch.inference_mode():
                    torch.manual_seed(sampling.seed)
                    self.model.generate(
                        **batch,
                        adapter_names=[PEFT_NAMES[side] for side, _ in sides],
                        streamer=stream,
                        stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
                        eos_token_id=self.end_ids,
                        pad_token_id=self.tokenizer.pad_token_id,
                        max_new_tokens=min(sampling.max_new_tokens, room),
                        do_sample=sampling.temperature > 0,
                        temperature=sampling.temperature or None,
                        top_p=sampling.top_p if sampling.temperature > 0 else None,
                        top_k=None,
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
    """Collects the tokens of every row of the batch; transformers' own text streamer takes one row only."""

    def __init__(self, rows: int, tokenizer: Any, end_ids: Sequence[int]) -> None:
        self.news: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        self._decoders = [DecodeStream(skip_special_tokens=True) for _ in range(rows)]
        self._backend = tokenizer.backend_tokenizer
        self._ended = [False] * rows
        self._end_ids = set(end_ids)
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.news.put(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Generation tells its end through the thread's last word, which also comes after an error."""

    def read(self, started: float) -> Iterator[Answers]:
        texts = [""] * len(self._ended)
        count = 0
        while (news := self.news.get()) is not None:
            if isinstance(news, BaseException):
                raise news
            for row, token in enumerate(news):
                self._ended[row] = self._ended[row] or token in self._end_ids
                if not self._ended[row]:
                    texts[row] += self._decoders[row].step(self._backend, token) or ""
                    count += 1
            # The blank before an answer is the format's (Guanaco's). Kept, the next turn would have two.
            yield Answers(texts=tuple(text.lstrip() for text in texts), tokens=count, seconds=time.perf_counter() - started)
