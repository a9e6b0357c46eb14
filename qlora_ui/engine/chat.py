"""Answers of speakers that share a base, out of one model in memory. Knows nothing of runs or Gradio."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from qlora_ui import checkpoints
from qlora_ui.config import QuantizationConfig
from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.engine.adapter import WEIGHTS, load_adapter, mixes
from qlora_ui.engine.decoding import Answers, Pass, Sampling, draw
from qlora_ui.engine.faster import Faster, kept_packed, use_quick_products
from qlora_ui.engine.hardware import detect, free_memory_gib
from qlora_ui.engine.model import Found, find, find_here, load_quantized, load_tokenizer, make_room
from qlora_ui.engine.prefixes import Prefixes, Row
from qlora_ui.engine.self_test import SelfTest
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log
from qlora_ui.memory.devices import GIB
from qlora_ui.speakers import Speaker
from qlora_ui.turns import Turns

BASE = "__base__"  # PEFT's name for no adapter
SHARE_FOR_PREFIXES = 0.25  # of the memory that is free once the model is loaded
MOST_ADAPTERS = 8  # in memory at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Words:
    """What a speaker is asked in: a tokenizer with its chat template, and the tokens that end an answer. `note` says of a fallback."""

    tokenizer: Any
    end_ids: list[int]
    note: str


def load_words(speaker: Speaker, found: Found) -> Words:
    """The speaker's own words, else those of its base. Raises UserError when there is no tokenizer that can be read."""
    note = ""
    tokenizer = load_tokenizer(found, speaker.vocabulary)
    if not tokenizer.chat_template and speaker.vocabulary:
        tokenizer.chat_template = load_tokenizer(found).chat_template
    if not tokenizer.chat_template and speaker.prompt_format == "tokenizer":
        tokenizer.chat_template = tokens.TEMPLATES["guanaco"]
        note = f"{speaker.name} has no chat template: it is asked in Guanaco's format."
    tokens.set_prompt_format(tokenizer, speaker.prompt_format)
    tokenizer.padding_side = "left"
    return Words(tokenizer=tokenizer, end_ids=tokens.end_ids(tokenizer), note=note)


class ChatModel:
    """A base in its bits, with the adapters of those who were talked to on it. One conversation turn at a time."""

    def __init__(self, speaker: Speaker, models: Path, emit: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
        """Load the base, which takes seconds to minutes, and the speaker's adapter. Raises UserError when either cannot be had."""
        self.speaker = speaker
        self._models = models
        self._found = find(speaker.model, speaker.revision, models, emit, should_stop, trusted=speaker.trust_remote_code)
        first = load_words(speaker, self._found)
        self.tokenizer, self.end_ids = first.tokenizer, first.end_ids
        self._words = {_asked_in(speaker): first}
        self._vocabulary = self.tokenizer.get_vocab()
        self.model: Any = load_quantized(self._found, speaker.quantization, detect(speaker.quantization.compute_dtype), emit, should_stop)
        known = self.model.get_input_embeddings().weight.shape[0]
        make_room(self.model, len(self.tokenizer))
        use_quick_products(self.model)
        self._base_biases = [(bias, bias.detach().clone()) for name, bias in self.model.named_parameters() if name.endswith(".bias")]
        self._names: dict[tuple[Path, int], str] = {}
        self._mixes = True
        self._turns = Turns("answer")
        self._self_test = SelfTest(self.model, self.tokenizer, range(known, len(self.tokenizer)))
        self.prefixes = Prefixes(self.model, int(SHARE_FOR_PREFIXES * free_memory_gib() * GIB))
        self.faster = Faster(self.model)
        self.add(speaker, emit)

    def takes(self, speaker: Speaker) -> bool:
        """Whether it can answer too: out of the same weights in the same bits, with the same tokens, and beside the adapters here."""
        here = find_here(speaker.model, speaker.revision, self._models)
        if here is None or here.folder != self._found.folder:
            return False
        if (_bits(speaker), speaker.trust_remote_code) != (_bits(self.speaker), self.speaker.trust_remote_code):
            return False
        if self.words(speaker).tokenizer.get_vocab() != self._vocabulary:
            return False
        return bool(self._name(speaker)) or self._has_room(speaker)

    def words(self, speaker: Speaker) -> Words:
        """What the speaker is asked in."""
        if _asked_in(speaker) not in self._words:
            self._words[_asked_in(speaker)] = load_words(speaker, self._found)
        return self._words[_asked_in(speaker)]

    def _name(self, speaker: Speaker) -> str:
        """PEFT's name for it; empty for an adapter that was not added, or was replaced since."""
        return BASE if speaker.adapter is None else self._names.get(_version(speaker.adapter), "")

    def _has_room(self, speaker: Speaker) -> bool:
        """Trained biases, of which PEFT takes one adapter's, want the base for themselves."""
        assert speaker.adapter is not None
        written = json.loads((speaker.adapter / "adapter_config.json").read_text("utf-8"))
        biased = any(config.bias != "none" for config in getattr(self.model, "peft_config", {}).values())
        return not self._names or (len(self._names) < MOST_ADAPTERS and not biased and written.get("bias", "none") == "none")

    def add(self, speaker: Speaker, emit: Callable[[Event], None]) -> None:
        """Put its adapter beside the others, and look whether it does something and leaves the base as it was.

        Raises UserError when it cannot be used, after which the model must not be either.
        """
        if speaker.adapter is None or self._name(speaker):
            return
        if (speaker.adapter / checkpoints.SEAL).exists() and (wrong := checkpoints.damage(speaker.adapter)):
            raise UserError(f"{speaker.name} cannot be used: {wrong}. Choose another checkpoint.", field="checkpoint")
        name = f"adapter-{len(self._names)}"
        with kept_packed(self.model):
            self.model = load_adapter(self.model, speaker.adapter, name)
        self._names[_version(speaker.adapter)] = name
        self._mixes = mixes(self.model)
        if warning := self._self_test.check(speaker.name, partial(self._answering, [BASE]), partial(self._answering, [name])):
            emit(Log(text=warning, level="warning"))

    def reply(self, sides: Sequence[tuple[Speaker, Sequence[Message]]], sampling: Sampling) -> Iterator[Answers]:
        """`answer` as a stream, first come, first served. Closing it ends the answers at their next token. Raises what they raise."""
        for news in self._turns.ask(partial(self.answer, sides, sampling)):
            if isinstance(news, Answers):
                yield news

    def answer(
        self,
        sides: Sequence[tuple[Speaker, Sequence[Message]]],
        sampling: Sampling,
        tell: Callable[[Answers], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Tell one answer per side at each token: of a speaker that was added, or a base, to the conversation up to the question.

        All sides decode in one batch, or one after the other where their adapters cannot be mixed; they end with the same tokens.
        One call at a time.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30)
        fitted = [self._fitting(self.words(speaker).tokenizer, messages, limit, sampling.max_new_tokens) for speaker, messages in sides]
        prompts = [prompt for prompt, _ in fitted]
        batch = self.tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.model.device)
        room = limit - batch["input_ids"].shape[1]
        if room < 1:
            raise UserError(
                f"The last message alone is longer than the model can read ({limit:,} tokens, with the system prompt and an answer). "
                "Shorten it."
            )
        if self.model.config.is_encoder_decoder:
            room = limit - 1  # the answer is a line of its own
        notes = dict.fromkeys(self.words(speaker).note for speaker, _ in sides)
        read = {
            "context": batch["input_ids"].shape[1],
            "context_limit": limit,
            "left_out": max(left_out for _, left_out in fitted),
            "note": " ".join(filter(None, notes)),
        }
        names = [self._name(speaker) for speaker, _ in sides]
        ids = [line[mask.bool()].tolist() for line, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        rows = [Row(speaker=name, ids=ids[at], answering=partial(self._answering, [name])) for at, name in enumerate(names)]
        compiled = self.faster.compiled
        together = len(set(names)) == 1 or (self._mixes and not compiled)
        passes = [
            Pass(
                rows=at_once,
                answering=partial(self._answering, [names[row] for row in at_once]),
                recall=partial(self.prefixes.recall, [] if compiled else [rows[row] for row in at_once], should_stop),
            )
            for at_once in ([range(len(sides))] if together else [[row] for row in range(len(sides))])
        ]
        drawn = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        draw(self.model, self.tokenizer, batch, passes, drawn, self.words(sides[0][0]).end_ids, read, tell, should_stop, compiled)

    def _fitting(self, tokenizer: Any, messages: Sequence[Message], limit: int, max_new_tokens: int) -> tuple[str, int]:
        """The prompt, without as many of the oldest turns as must leave for an answer to have room; their number.

        A question leaves with its answer; what the system says and the last question stay.
        """
        kept = list(messages)
        first = int(kept[0].role == "system")
        while True:
            prompt = tokens.prompt(tokenizer, kept)
            length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if length + min(max_new_tokens, limit // 4) <= limit or len(kept) - first < 3:
                return prompt, len(messages) - len(kept)
            del kept[first : first + 2]

    @contextlib.contextmanager
    def _answering(self, names: Sequence[str]) -> Iterator[None]:
        """The model as these, in PEFT's names."""
        if not self._names:
            yield
        elif len(set(names)) > 1:
            with _mixed(self.model, names):
                yield
        elif names[0] != BASE:
            self.model.set_adapter(names[0], inference_mode=True)
            yield
        else:  # PEFT leaves biases that were trained as they are
            tuned = [bias.data for bias, _ in self._base_biases]
            for bias, its_own in self._base_biases:
                bias.data = its_own.to(bias.dtype)
            try:
                with _bare(self.model):
                    yield
            finally:
                for (bias, _), learned in zip(self._base_biases, tuned, strict=True):
                    bias.data = learned


def _asked_in(speaker: Speaker) -> tuple[Path | None, str]:
    return speaker.vocabulary, speaker.prompt_format


def _bits(speaker: Speaker) -> QuantizationConfig:
    """How its base is stored and computed with, on this machine."""
    return replace(speaker.quantization, compute_dtype=detect(speaker.quantization.compute_dtype).compute_dtype)


def _version(adapter: Path) -> tuple[Path, int]:
    """The adapter in a folder as it is now: a run that went on puts another in its place."""
    return adapter, (adapter / WEIGHTS).stat().st_mtime_ns if (adapter / WEIGHTS).is_file() else 0


@contextlib.contextmanager
def _bare(model: Any) -> Iterator[None]:
    """The model without its adapters. PEFT's layers would find out anew for each token that they are switched off."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.forward = layer.base_layer.forward
    try:
        with model.disable_adapter():  # modules that were trained whole, and new tokens
            yield
    finally:
        for layer in layers:
            del layer.forward


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
