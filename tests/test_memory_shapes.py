"""Models' shapes, read from their configs alone, against transformers' models and the published numbers of parameters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import architectures
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qlora_ui import presets
from qlora_ui.errors import UserError
from qlora_ui.memory.shapes import READERS, read_shape
from qlora_ui.model_configs import shipped

# As the models' pages on the Hub and their papers count them.
PUBLISHED = {
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "huggyllama/llama-30b": 32_528_943_616,
    "huggyllama/llama-65b": 65_285_660_672,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "google-t5/t5-small": 60_506_624,
    "google-t5/t5-base": 222_903_552,
    "google-t5/t5-large": 737_668_096,
    "google-t5/t5-3b": 2_851_598_336,
    "google-t5/t5-11b": 11_307_321_344,
    "google/flan-t5-small": 76_961_152,
    "google/flan-t5-base": 247_577_856,
    "google/flan-t5-large": 783_150_080,
    "google/flan-t5-xl": 2_849_757_184,
    "google/flan-t5-xxl": 11_135_332_352,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "allenai/Llama-3.1-Tulu-3-70B": 70_553_706_496 + 2 * 8 * 8192,  # Llama 3.1 70B, and eight more words
}
BASE = {**architectures.GROUPED, **architectures.LONG, "vocab_size": 300}
PLAIN = {**architectures.SMALL, **architectures.LONG, "vocab_size": 300}
FALCON = {name: value for name, value in PLAIN.items() if name != "intermediate_size"}
OPT = {**FALCON, "ffn_dim": 64}
T5 = {**architectures.T5, "vocab_size": 300, "decoder_start_token_id": 0}
TINY = {
    "llama": ("LlamaConfig", BASE),
    "llama with biases, tied": ("LlamaConfig", {**BASE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**BASE, "head_dim": 16}),
    "ministral": ("MinistralConfig", {**BASE, "head_dim": 16}),
    "ministral3": ("Ministral3Config", {**BASE, "head_dim": 16}),
    "granite": ("GraniteConfig", BASE),
    "helium": ("HeliumConfig", {**BASE, "head_dim": 8}),
    "ernie4_5": ("Ernie4_5Config", {**BASE, "head_dim": 8}),
    "hunyuan": ("HunYuanDenseV1Config", {**BASE, "head_dim": 8}),
    "exaone4": ("Exaone4Config", {**BASE, "head_dim": 8}),
    "qwen2": ("Qwen2Config", BASE),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 8}),
    "smollm3": ("SmolLM3Config", {**BASE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "olmo2": ("Olmo2Config", BASE),
    "olmo3": ("Olmo3Config", BASE),
    "gemma": ("GemmaConfig", {**BASE, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**BASE, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**BASE, "head_dim": 8}),
    "phi3": ("Phi3Config", {**BASE, "pad_token_id": 0}),
    "gpt-neox": ("GPTNeoXConfig", PLAIN),
    "gpt-neox without attention biases": ("GPTNeoXConfig", {**PLAIN, "attention_bias": False}),
    "opt": ("OPTConfig", {**OPT, "word_embed_proj_dim": 32}),
    "opt with projections, norms behind": ("OPTConfig", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "falcon": ("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon with one key head": ("FalconConfig", FALCON),
    "falcon one after the other": ("FalconConfig", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}),
    "t5": ("T5Config", {**T5, "feed_forward_proj": "relu", "num_decoder_layers": 3}),
    "t5 gated": ("T5Config", T5),
}


def on_meta(config: Any) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)


def small(name: str, **more: Any) -> Any:
    """A tiny config of that architecture."""
    kind, sizes = TINY[name]
    return getattr(transformers, kind)(**{**sizes, **more})


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_shipped_shape_has_the_published_parameters(model: str) -> None:
    shape = read_shape(shipped()[model], model)
    assert shape.parameters == PUBLISHED[model]


@pytest.mark.parametrize("model", PUBLISHED)
def test_transformers_counts_the_same_for_a_shipped_shape(model: str) -> None:
    shape = read_shape(shipped()[model], model)
    base = on_meta(AutoConfig.for_model(**shipped()[model]))
    ties_always = shape.kind == "t5" and not shape.tied  # until it loads weights that are not tied
    assert shape.parameters == sum(p.numel() for p in base.parameters()) + ties_always * shape.head.weights


def test_all_models_of_the_presets_and_no_others_are_shipped() -> None:
    assert set(shipped()) == set(PUBLISHED)
    assert {presets.load(name).config.model.model for name in presets.names()} <= set(shipped())


@pytest.mark.parametrize("name", TINY)
def test_every_matrix_of_an_architecture_is_known(name: str) -> None:
    config = small(name)
    base, shape = on_meta(config), read_shape(config.to_dict(), name)
    assert shape.parameters == sum(parameter.numel() for parameter in base.parameters())
    head = base.get_output_embeddings()
    real = Counter(
        (path.split(".", path.count(".") - known.path.count("."))[-1], module.in_features, module.out_features, module.bias is not None)
        for path, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
        for known in [next(linear for linear, _ in shape.linears if f".{path}".endswith(f".{linear.path}"))]
    )
    ours: Counter[tuple[str, int, int, bool]] = Counter()
    for linear, count in shape.linears:
        ours[linear.path, linear.in_features, linear.out_features, linear.bias] += count
    assert ours == real


def test_every_reader_is_tried() -> None:
    assert {small(name).model_type for name in TINY} == set(READERS)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba"}, "m is of the architecture 'mamba', whose memory is not known. Known are ernie4_5, exaone4, "),
        ({}, "m is of the architecture 'nothing'"),
        ({"model_type": "llama", "vocab_size": 3}, "The config.json of m does not say num_attention_heads."),
        ({"model_type": "t5", "num_heads": "many"}, "The config.json of m cannot be read: invalid literal"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_in_a_sentence(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_shape(config, "m")
    assert str(caught.value).startswith(said)
    assert caught.value.field == "model"
