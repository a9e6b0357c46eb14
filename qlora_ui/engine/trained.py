"""A run's model as it was trained, for whoever takes it elsewhere: base, adapter, tokenizer. Knows nothing of Gradio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_ui.engine import tokens
from qlora_ui.engine.adapter import load_adapter
from qlora_ui.engine.hardware import Hardware, detect
from qlora_ui.engine.logits import Reference, reference
from qlora_ui.engine.model import Found, find, load_quantized, make_room
from qlora_ui.events import Event
from qlora_ui.runs import Run

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """The base in its bits with the adapter on it, in the compute dtype that the hardware was asked for."""

    model: Any
    tokenizer: Any
    found: Found
    hardware: Hardware

    @property
    def two_sided(self) -> bool:
        """Whether it is an encoder-decoder."""
        return tokens.is_encoder_decoder(self.tokenizer)

    def reference(self) -> Reference:
        """What it says, tokens that were added included, for a copy to be compared with."""
        rows = self.model.peft_config["default"].trainable_token_indices or {}
        new = sorted({token for indices in (rows.values() if isinstance(rows, dict) else [rows]) for token in indices})
        return reference(self.model, self.tokenizer, new)


def find_base(run: Run, emit: Emit, should_stop: ShouldStop) -> Found:
    """The very base that the run was trained on, fetched where it is not here. Raises UserError or Cancelled."""
    wish = run.config().model
    revision = run.facts().get("model_commit") or wish.revision
    return find(wish.model, revision, run.workspace.models, emit, should_stop, trusted=wish.trust_remote_code)


def load_trained(run: Run, weights: Path, found: Found, emit: Emit, should_stop: ShouldStop, quantized: bool = True) -> Trained:
    """The model with the adapter in that folder. Raises UserError or Cancelled.

    Not `quantized`, it is another model: the base's original weights, in the compute dtype and the machine's memory.
    """
    quantization = run.config().quantization
    hardware = detect(quantization.compute_dtype)
    if not quantized:
        quantization, hardware = replace(quantization, quant_bits="16"), replace(hardware, kind="cpu")
    tokenizer: Any = AutoTokenizer.from_pretrained(weights, trust_remote_code=found.trusted)
    base = load_quantized(found, quantization, hardware, emit, should_stop)
    tokenizer.encoder_decoder = base.config.is_encoder_decoder
    make_room(base, len(tokenizer))
    return Trained(model=load_adapter(base, weights), tokenizer=tokenizer, found=found, hardware=hardware)
