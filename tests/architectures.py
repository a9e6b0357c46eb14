"""The smallest random models of many architectures, each in a folder as the Hub would have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
STILL = {"dropout": 0.0, "attention_dropout": 0.0}  # else no two runs could be compared
LONG = {"max_position_embeddings": 256}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))}
# The name of the config's class, and what makes it tiny. Width of a head: 8, or as said.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GROUPED, **LONG}),
    "mistral": ("MistralConfig", {**GROUPED, **LONG, "sliding_window": 64}),
    "qwen3": ("Qwen3Config", {**GROUPED, **LONG, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, **LONG, "head_dim": 8, "sliding_window": 64}),
    "phi3": ("Phi3Config", {**GROUPED, **LONG}),
    "gpt-neox": ("GPTNeoXConfig", {**SMALL, **LONG}),
    "opt": ("OPTConfig", {**SMALL, **LONG, "ffn_dim": 64, "word_embed_proj_dim": 32, "intermediate_size": None, **STILL}),
    "falcon": ("FalconConfig", {**SMALL, **LONG, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "experts": ("MixtralConfig", {**GROUPED, **LONG, "num_local_experts": 4}),
    "t5": ("T5Config", {**T5, "tie_word_embeddings": False}),
    "bart": ("BartConfig", {**LONG, **STILL, "d_model": 32, **SIDES}),
}


def build(folder: Path, name: str) -> Path:
    """Make `folder` a model of that architecture with the tiny tokenizer."""
    torch.set_num_threads(1)
    tokenizer = tiny.tiny_tokenizer()
    kind, sizes = ARCHITECTURES[name]
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), **special, **sizes)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = tokenizer.pad_token_id
    make: Callable[..., Any] = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20261122)
        model = make.from_config(config)
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.2)  # so that greedy answers are not decided by rounding
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
