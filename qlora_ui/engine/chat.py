"""Answers from a run's adapter and from its base, out of one model in memory. Knows nothing of Gradio."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoTokenizer

from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.engine.adapter import load_adapter, mixes
from qlora_ui.engine.decoding import Answers, Sampling, draw
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import find, load_quantized, make_room
from qlora_ui.errors import UserError
from qlora_ui.events import Event
from qlora_ui.runs import Run

ADAPTER = "adapter"
BASE = "base"
PEFT_NAMES = {ADAPTER: "default", BASE: "__base__"}


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
        passes = [list(range(len(sides)))] if self._mixes else [[row] for row in range(len(sides))]
        as_sides = [(rows, partial(self._answering, [sides[row][0] for row in rows])) for rows in passes]
        drawn = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        with self._lock:
            yield from draw(self.model, self.tokenizer, batch, as_sides, drawn, self.end_ids, read)

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
