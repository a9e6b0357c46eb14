"""Answers from a run's adapter and from its base, out of one model in memory. Knows nothing of Gradio."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.engine.adapter import load_adapter, mixes
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import find, load_quantized, make_room
from qlora_ui.errors import UserError
from qlora_ui.events import Event
from qlora_ui.runs import Run

ADAPTER = "adapter"
BASE = "base"
BOUNDS = {
    "temperature": (0, 10),
    "top_p": (0, 1),
    "top_k": (0, 1_000_000),
    "repetition_penalty": (0.1, 10),
    "max_new_tokens": (1, 1_000_000),
    "seed": (0, 2**32 - 1),
}
PEFT_NAMES = {ADAPTER: "default", BASE: "__base__"}


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
    no longer fitted.
    """

    texts: tuple[str, ...]
    tokens: int
    seconds: float
    context: int
    context_limit: int
    left_out: int


class ChatModel:
    """A run's base in 4 bits with its adapter on it, in the prompt format it was trained in. One conversation turn at a time."""

    def __init__(self, run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
        """Load it; takes seconds to minutes. Raises UserError when the run has no adapter or its base cannot be had."""
        if not run.adapter.is_dir():
            raise UserError(f"{run.id} has no adapter yet. Choose a run that finished or was stopped after its first step.", field="run")
        config = run.config()
        revision = run.facts().get("model_commit") or config.model.revision  # the very base that it was trained on
        found = find(config.model.model, revision, run.workspace.models, emit, should_stop, trusted=config.model.trust_remote_code)
        base = load_quantized(found, config.quantization, detect(config.quantization.compute_dtype), emit, should_stop)
        self.run_id = run.id
        self.tokenizer: Any = AutoTokenizer.from_pretrained(run.adapter, trust_remote_code=found.trusted, padding_side="left")
        self.tokenizer.encoder_decoder = base.config.is_encoder_decoder
        make_room(base, len(self.tokenizer))
        self._base_biases = [(bias, bias.detach().clone()) for name, bias in base.named_parameters() if name.endswith(".bias")]
        self.model: Any = load_adapter(base, run.adapter)
        self._mixes = mixes(self.model)
        self.end_ids = tokens.end_ids(self.tokenizer)
        self._lock = threading.Lock()

    def reply(self, sides: Sequence[tuple[str, Sequence[Message]]], sampling: Sampling) -> Iterator[Answers]:
        """Stream one answer per side: ("adapter" or "base", conversation up to the question). All sides decode in one batch,
        or one after the other where the adapter cannot be mixed with its base.

        Closing the generator ends the generation at its next token. Raises what the generation raised.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30)
        fitted = [self._fitting(messages, limit, sampling.max_new_tokens) for _, messages in sides]
        prompts = [prompt for prompt, _ in fitted]
        batch = self.tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.model.device)
        room = limit - batch["input_ids"].shape[1]
        if room < 1:
            raise UserError("This conversation is longer than the model can read. Start a new one.")
        if self.model.config.is_encoder_decoder:
            room = limit - 1  # the answer is a line of its own
        read = {"context": batch["input_ids"].shape[1], "context_limit": limit, "left_out": max(left_out for _, left_out in fitted)}
        stream = _Rows(len(sides), self.tokenizer, self.end_ids, read)
        stopped = threading.Event()
        passes = [list(range(len(sides)))] if self._mixes else [[row] for row in range(len(sides))]

        def generate() -> None:
            try:
                for rows in passes:
                    if stopped.is_set():
                        break
                    stream.rows = rows
                    with self._lock, torch.inference_mode(), self._answering([sides[row][0] for row in rows]):
                        torch.manual_seed(sampling.seed)
                        self.model.generate(
                            **{name: tensor[rows] for name, tensor in batch.items()},
                            streamer=stream,
                            stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
                            eos_token_id=self.end_ids,
                            pad_token_id=self.tokenizer.pad_token_id,
                            max_new_tokens=min(sampling.max_new_tokens, room),
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

    def _fitting(self, messages: Sequence[Message], limit: int, max_new_tokens: int) -> tuple[str, int]:
        """The prompt, without as many of the oldest turns as must leave for an answer to have room; their number.

        A question leaves with its answer; what the system says and the last question stay.
        """
        kept = list(messages)
        first = int(kept[0].role == "system")
        while True:
            prompt = tokens.prompt(self.tokenizer, kept)
            length = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if length + min(max_new_tokens, limit // 4) <= limit or len(kept) - first < 3:
                return prompt, len(messages) - len(kept)
            del kept[first : first + 2]

    @contextlib.contextmanager
    def _answering(self, sides: Sequence[str]) -> Iterator[None]:
        """The model as these sides."""
        if len(set(sides)) > 1:
            with _mixed(self.model, [PEFT_NAMES[side] for side in sides]):
                yield
        elif sides[0] == ADAPTER:
            yield
        else:  # PEFT leaves biases that were trained as they are
            tuned = [bias.data for bias, _ in self._base_biases]
            for bias, its_own in self._base_biases:
                bias.data = its_own.to(bias.dtype)
            try:
                with self.model.disable_adapter():
                    yield
            finally:
                for (bias, _), learned in zip(self._base_biases, tuned, strict=True):
                    bias.data = learned


@contextlib.contextmanager
def _mixed(model: Any, names: Sequence[str]) -> Iterator[None]:
    """Let each row of a batch be answered by the adapter of its name.

    PEFT's own `adapter_names` of `generate` breaks on models that hand all positions of all rows to a layer in one line, as OPT does.
    """

    def choose(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        lines = args[0].shape[0] // len(names)
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(lines)]}

    layers = [module for module in model.modules() if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))]
    hooks = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Stopped(StoppingCriteria):
    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device, dtype=torch.bool)


class _Rows(BaseStreamer):
    """Collects the tokens of every row of the batch; transformers' own text streamer takes one row only.

    `rows` are those that are being generated: all, or one after the other.
    """

    def __init__(self, rows: int, tokenizer: Any, end_ids: Sequence[int], read: Mapping[str, int]) -> None:
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
