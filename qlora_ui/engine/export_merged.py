"""A run's merged model on disk, in 16 bits or quantized again, and proven by reloading. Knows nothing of Gradio or the Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from qlora_ui.config import QuantizationConfig
from qlora_ui.engine import export_cards, tokens
from qlora_ui.engine.hardware import give_memory_back, torch_dtype
from qlora_ui.engine.logits import Reference, Verification
from qlora_ui.engine.merge import dequantize, merge
from qlora_ui.engine.model import Found, quantization_config, watched_bars
from qlora_ui.engine.trained import load_trained
from qlora_ui.events import Event, Log
from qlora_ui.exports import Export

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]

SHARD = "4GB"
LOST = "Quantized again, it is no closer to what was trained than the base without its adapter. Take the adapter, or merge it in 16 bits."


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    """What a merged model on disk must say, the dtype it is stored in, and the one that the run computes in."""

    said: Reference
    stored: torch.dtype
    compute: torch.dtype


def write_merged(wish: Export, found: Found, place: Path, emit: Emit, should_stop: ShouldStop) -> Verification:
    """Base and adapter in one, sharded."""
    with watched_bars(emit, should_stop):
        merged = _merge(wish, found, place, emit, should_stop)
        give_memory_back()
        if wish.quantize:
            emit(Log(text="Quantizing it to NF4, as bitsandbytes stores it"))
            said = _quantize(wish, found, place, merged)
            give_memory_back()
            emit(Log(text="Verifying it, loaded with plain transformers"))
            verified = said.compare(_load(place, found, merged.stored))
            if verified.divergence >= verified.divergence_without_adapter:
                emit(Log(text=LOST, level="warning"))
            return verified
        emit(Log(text="Verifying it, loaded with plain transformers"))
        return merged.said.compare(_load(place, found, merged.compute), rounded_to=merged.stored)


def _merge(wish: Export, found: Found, place: Path, emit: Emit, should_stop: ShouldStop) -> Merged:
    """Write it. The models that this takes are garbage on return."""
    trained = load_trained(wish.run, wish.weights.folder, found, emit, should_stop)
    said, compute = trained.reference(), torch_dtype(trained.hardware)
    stored = compute if compute.itemsize == 2 else torch.bfloat16
    name = str(stored).removeprefix("torch.")
    emit(Log(text=f"Merging in {name}. {export_cards.WHY_ORIGINAL if wish.quantize else export_cards.WHY_DEQUANTIZED}"))
    if wish.quantize:
        trained = load_trained(wish.run, wish.weights.folder, found, emit, should_stop, quantized=False)
        model = trained.model
    else:
        model = PeftModel.from_pretrained(dequantize(trained.model.unload(), emit, should_stop), wish.weights.folder)
    if wish.run.config().quantization.quant_bits == "8" and not wish.quantize:
        said = said.after(model, "its dequantized form")
        rounds = "LLM.int8 also rounds what goes into a layer, which a merged model does not"
        emit(Log(text=f"{rounds}: that alone is {said.divergence(said.logits):.2g} nats a token from what was trained", level="warning"))
    whole = merge(model, stored, emit, should_stop)
    _let_it_end(whole, trained.tokenizer)
    emit(Log(text="Writing it"))
    whole.save_pretrained(place, max_shard_size=SHARD)
    trained.tokenizer.chat_template = plain_template(trained.tokenizer.chat_template)
    trained.tokenizer.save_pretrained(place)
    export_cards.write(wish, found, place, export_cards.merged_form(name, wish.quantize, trained.two_sided))
    return Merged(said=said, stored=stored, compute=compute)


def plain_template(template: str) -> str:
    """The same without the marks of what is trained: transformers' own tag, at which llama.cpp and others stop."""
    return re.sub(r"(\{%-?\s*)endgeneration\b", r"\1endif", re.sub(r"(\{%-?\s*)generation\b", r"\1if true", template))


def _let_it_end(model: Any, tokenizer: Any) -> None:
    """Make plain `generate()` end where the prompt format ends an answer."""
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = tokens.end_ids(tokenizer), tokenizer.pad_token_id
    try:
        settings.validate(strict=True)
    except ValueError:  # some bases name a temperature without sampling, which can be read but not written
        settings.do_sample = True


def _load(folder: Path, found: Found, dtype: torch.dtype, bits: BitsAndBytesConfig | None = None) -> Any:
    """A model folder as plain transformers loads it, on the GPU where it fits."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kind = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    quantized = {"quantization_config": bits} if bits else {}  # None would hide what the folder itself says
    on_gpu = torch.cuda.is_available() and size * 1.2 < torch.cuda.mem_get_info()[0]
    return kind.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": "cuda:0" if on_gpu else "cpu"},
        **quantized,
        trust_remote_code=found.trusted,
        use_safetensors=True,
    )


def _quantize(wish: Export, found: Found, place: Path, merged: Merged) -> Reference:
    """Put a 4-bit checkpoint in the place of the 16-bit one. Returns what it says while it is in memory."""
    bits = quantization_config(QuantizationConfig(double_quant=wish.run.config().quantization.double_quant), merged.stored)
    model = _load(place, found, merged.stored, bits)
    said = merged.said.after(model, "its form quantized again")
    aside = place.with_name("quantized")
    model.save_pretrained(aside, max_shard_size=SHARD)
    for path in list(place.iterdir()):
        if "safetensors" not in path.name and not (aside / path.name).exists():
            path.rename(aside / path.name)
    shutil.rmtree(place)
    aside.rename(place)
    return said
