"""How fast are answers drawn, and how soon does the first word come? Ours against plain `generate()` on the same NF4 model.

Each contender answers at its turn, so that a busy machine is busy for all of them. Drawing is timed from the first token to the
last. The first token is timed apart, at the first and the sixth turn of one conversation, whose answers are given so that all read
the same. Give the workspace with the starter model in QLORA_UI_HOME.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_ui.data.formats import Message

CACHED = Path(__file__).resolve().parents[1] / ".cache"
ROUNDS, TOKENS = 5, 48
QUESTION = "Write a long story about a shepherd who loses a llama in the mountains and finds it again in an unexpected place."
SAID = (
    "That is a good question. Llamas graze on high meadows, they drink little, they carry up to thirty kilograms over long ways, and "
    "they warn the herd with a high call when something comes near. Shepherds keep them together with sheep for that reason, and shear "
    "them once in two years. Their wool is fine and without grease, so that it can be spun as it is, and ropes are made of the rest. "
)
ASKED = "Thank you. Now tell me more about how a shepherd looks after them in winter, what they eat then, and where they sleep at night."
Timed = tuple[float, float]
"""Seconds to the first token, and tokens a second after it."""


def conversation(turns: int) -> list[Message]:
    """So many questions, and the answers to all but the last."""
    said = [Message(role="user", content=QUESTION)]
    for _ in range(turns - 1):
        said += [Message(role="assistant", content=SAID), Message(role="user", content=ASKED)]
    return said


def timed(at: Sequence[float]) -> Timed:
    """From the moment of the beginning and that of each token."""
    begun, first, *_, last = at
    return first - begun, (len(at) - 2) / (last - first)


class Plain:
    """What `transformers` and `bitsandbytes` do by themselves, with the adapter in PEFT or without."""

    def __init__(self, folder: Path, dtype: Any, adapter: Path | None) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        self.tokenizer = AutoTokenizer.from_pretrained(adapter or folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, dtype=dtype).eval()
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def __call__(self, messages: Sequence[Message], tokens: int) -> Timed:
        from transformers.generation.streamers import BaseStreamer

        at = [time.perf_counter()]

        class Watch(BaseStreamer):
            def put(self, value: Any) -> None:
                at.append(time.perf_counter())

            def end(self) -> None:
                pass

        turns = [{"role": message.role, "content": message.content} for message in messages]
        asked = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        self.model.generate(**asked, streamer=Watch(), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        return timed([at[0], *at[2:]])  # the streamer is given the prompt first
