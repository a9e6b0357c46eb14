"""Sample answers while a model trains, by base and adapter. Nothing of the training changes by them. Knows nothing of Gradio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_ui.config import ScheduleConfig
from qlora_ui.data.checks import Conversation
from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, Sample
from qlora_ui.stopping import Cancelled

PROMPTS = 3  # taken from the rows, when the owner named none
PROMPT_TOKENS = 256  # the longest that is taken from the rows
ANSWER_TOKENS = 48

Prompt = tuple[Message, ...]
Precision = Callable[[], AbstractContextManager[Any]]


def sampler(
    schedule: ScheduleConfig,
    rows: Sequence[Conversation],
    tokenizer: Any,
    emit: Callable[[Event], None],
    should_stop: Callable[[], bool],
    precision: Precision,
) -> list[TrainerCallback]:
    """The sampler that this schedule asks for, if any. A prompt format that nothing can be asked in is told."""
    if not schedule.sample_every:
        return []
    try:
        asked = prompts(schedule.sample_prompts, rows, tokenizer)
        return [Sampler(schedule.sample_every, asked, tokenizer, emit, should_stop, precision)]
    except UserError as error:
        emit(Log(text=f"There are no sample answers: {error}", level="warning"))
        return []


def prompts(written: str, rows: Sequence[Conversation], tokenizer: Any) -> list[Prompt]:
    """What is asked: the owner's lines, or the first questions of these rows that are short enough."""
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    if lines:
        return [(Message(role="user", content=line),) for line in lines]
    asked = (_question(row) for row in rows)
    return list(islice((prompt for prompt in asked if prompt and _length(tokenizer, prompt) <= PROMPT_TOKENS), PROMPTS))


def _question(row: Conversation) -> Prompt:
    """The row up to its first answer; nothing for a text that is no conversation."""
    roles = [message.role for message in row.messages]
    return tuple(row.messages[: roles.index("assistant")]) if "assistant" in roles else ()


def _length(tokenizer: Any, prompt: Prompt) -> int:
    return len(tokenizer(tokens.prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"])


class Sampler(TrainerCallback):
    """Asks the prompts before the first step, every so many steps, and at the end. The base is asked once: it does not change.

    Within `precision` the model computes as it does in its steps.
    """

    def __init__(
        self,
        every: int,
        asked: Sequence[Prompt],
        tokenizer: Any,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        precision: Precision = nullcontext,
    ) -> None:
        self.every, self.asked, self.tokenizer, self.emit, self.should_stop = every, asked, tokenizer, emit, should_stop
        self.precision = precision
        self.ends = tokens.end_ids(tokenizer)
        self.base: list[str] = []
        self.last_step = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:  # not where a run goes on between two rounds
            self.ask(kwargs["model"], state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        # Not at the end of the step: the reporter measures the step's time until it is logged.
        if "loss" in (logs or {}) and state.global_step % self.every == 0:
            self.ask(kwargs["model"], state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ask(kwargs["model"], state.global_step)

    def ask(self, model: Any, step: int) -> None:
        """Emit a Sample for each prompt, unless that was done at this step. Raises Cancelled when stopped, within a token."""
        if not self.asked or step == self.last_step:
            return
        self.last_step = step
        if not self.base:
            with model.disable_adapter():
                self.base = self._answers(model)
        for prompt, base, adapter in zip(self.asked, self.base, self._answers(model), strict=True):
            self.emit(Sample(step=step, prompt=prompt[-1].content, base=base, adapter=adapter))

    def _answers(self, model: Any) -> list[str]:
        """Greedy answers, all in one batch."""
        texts = [tokens.prompt(self.tokenizer, prompt) for prompt in self.asked]
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        was_training = model.training
        model.eval()
        # Taking the likeliest token draws no random number; a model's own code might.
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), self.precision():
            written = model.generate(
                **batch,
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=self.ends,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([_Stopped(self.should_stop)]),
            )
        model.train(was_training)
        if self.should_stop():
            raise Cancelled
        asked = 1 if tokens.is_encoder_decoder(self.tokenizer) else batch["input_ids"].shape[1]  # a decoder begins with a token of its own
        return [self._text(row) for row in written[:, asked:].tolist()]

    def _text(self, ids: list[int]) -> str:
        length = next((place for place, id in enumerate(ids) if id in self.ends), len(ids))
        text: str = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return text.strip()


class _Stopped(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.should_stop(), device=input_ids.device, dtype=torch.bool)
