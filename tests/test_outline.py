"""Shapes of architectures that have no reader, counted on transformers' own models: against real ones, and against the readers."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers
from peft import get_peft_model
from test_memory import kept, loaded
from test_memory_shapes import BASE, TINY, on_meta, small
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from qlora_ui.config import RunConfig
from qlora_ui.engine import cpu, outline
from qlora_ui.engine.layers import measure_storage
from qlora_ui.engine.model import Found
from qlora_ui.engine.shape import check, lora_config
from qlora_ui.errors import UserError
from qlora_ui.memory.activations import Batch, copy_bytes, layer_bytes
from qlora_ui.memory.devices import find_device
from qlora_ui.memory.forecast import base_bytes, forecast
from qlora_ui.memory.shapes import ModelShape, read_shape
from qlora_ui.memory.trained import trained_tensors
from qlora_ui.model_shapes import NotCounted, find_shape, find_shape_within, shape_of

GPT = {"n_embd": 32, "n_head": 4, "n_positions": 256, "vocab_size": 300, "num_hidden_layers": 2}
STILL_GPT = {**GPT, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
SEEING = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
EXPERTS = {**BASE, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT),
    "gpt2 without dropout": ("GPT2Config", STILL_GPT),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_head": 4, "vocab_size": 300, "num_hidden_layers": 2}),
    "phi": ("PhiConfig", BASE),
    "olmo": ("OlmoConfig", BASE),
    "cohere": ("CohereConfig", BASE),
    "stablelm": ("StableLmConfig", BASE),
    "starcoder2": ("Starcoder2Config", BASE),
    "glm4": ("Glm4Config", {**BASE, "head_dim": 8, "pad_token_id": 0}),
    "arcee": ("ArceeConfig", BASE),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4}),
    "qwen3 with experts": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    "deepseek, dense at first": (
        "DeepseekV3Config",
        {**EXPERTS, **LATENT, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    ),
    "mamba": ("MambaConfig", {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 300}),
    "gemma3 that sees": ("Gemma3Config", {"text_config": {**BASE, "head_dim": 8}, "vision_config": SEEING, "mm_tokens_per_image": 1}),
    "bart": ("BartConfig", {**architectures.ARCHITECTURES["bart"][1], "vocab_size": 300, "decoder_start_token_id": 0}),
}
# Of these, only the bytes of weights and adapter are told exactly; with experts, products in 16 bits are made in another way here.
LESS_EXACT = ("bloom", "deepseek, dense at first", "mamba", "gemma3 that sees", "bart")
WITH_EXPERTS = ("mixtral", "qwen3 with experts")
CARD = find_device("24")


def tiny_config(name: str, **more: Any) -> Any:
    kind, sizes = OTHERS[name]
    return getattr(transformers, kind)(**{**sizes, **more})


def counted(config: Any) -> ModelShape:
    return outline.count_shape(config.to_dict(), "tiny")


@pytest.mark.parametrize("name", OTHERS)
def test_every_matrix_and_every_parameter_is_counted(name: str) -> None:
    base, shape = on_meta(tiny_config(name)), counted(tiny_config(name))
    assert shape.parameters == sum(parameter.numel() for parameter in base.parameters())
    real = Counter(
        tuple(module.weight.shape if isinstance(module, torch.nn.Linear) else reversed(module.weight.shape))
        for module in base.modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not base.get_output_embeddings()
    )
    ours: Counter[tuple[int, ...]] = Counter()
    for linear, count in shape.linears:
        if not linear.experts:
            ours[linear.out_features, linear.in_features] += count
    assert ours == real


@pytest.mark.parametrize("name", TINY)
def test_counting_and_reading_find_the_same(name: str) -> None:
    config = small(name).to_dict()
    for values in ({}, {"compute_dtype": "float32"}, {"gradient_checkpointing": "on", "lora_dropout": 0}):
        run = RunConfig().with_values({"max_seq_len": 128, **values})
        read, ours = (forecast(shape, run, CARD) for shape in (read_shape(config, name), outline.count_shape(config, name)))
        assert [*ours.terms][:6] == [*read.terms][:6]
        assert ours.terms.activations == pytest.approx(read.terms.activations, rel=0.1)


@pytest.mark.parametrize("name", ["experts", "bart", "gpt2", "gemma3 that sees", "mamba"])
def test_the_base_takes_the_bytes_that_are_forecast(tmp_path: Path, name: str) -> None:
    if name in architectures.ARCHITECTURES:
        architectures.build(tmp_path, name)
    else:
        transformers.AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(tmp_path)
    config = RunConfig().with_values({"compute_dtype": "float32"})
    base = loaded(tmp_path, config)
    weights, constants, whole = base_bytes(counted(AutoConfig.from_pretrained(tmp_path)), config.quantization, "float32")
    assert weights + constants == measure_storage(base).bytes
    assert whole == sum(p.nbytes for p in base.parameters() if not hasattr(p, "quant_state"))


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "mamba"])  # which PEFT adapts by name only
@pytest.mark.parametrize("values", [{"lora_r": 3}, {"target_modules": "attention", "layers_to_skip": "0"}])
def test_the_adapter_has_the_parameters_that_are_forecast(name: str, values: dict[str, Any]) -> None:
    adapter = RunConfig().with_values({"lora_dropout": 0, **values}).adapter
    base, shape = on_meta(tiny_config(name)).requires_grad_(False), counted(tiny_config(name))
    with torch.device("meta"):
        model = get_peft_model(base, lora_config(base, adapter))
    real = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(tensor.numel * tensor.count for tensor in trained_tensors(shape, adapter)) == real


@pytest.mark.parametrize(
    ("name", "compute_dtype"),
    [
        *((name, "float32") for name in OTHERS if name not in LESS_EXACT),
        *((name, "bfloat16") for name in OTHERS if name not in (*LESS_EXACT, *WITH_EXPERTS)),
    ],
)
def test_a_layer_keeps_about_the_bytes_that_are_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, compute_dtype: str
) -> None:
    has_experts, tokens, size = name in WITH_EXPERTS, 200, 2 if compute_dtype == "bfloat16" else 4
    if has_experts:  # whose attention is told more than what is computed by rows takes
        monkeypatch.setattr(cpu, "attention_by_row", lambda model: contextlib.nullcontext())
    config = RunConfig().with_values({"compute_dtype": compute_dtype, "lora_dropout": 0 if has_experts else 0.1, "lora_r": 4})
    one, two = (kept(tmp_path, tiny_config(name, num_hidden_layers=layers), config, tokens) for layers in (1, 2))
    shape = counted(tiny_config(name))
    batch = Batch(tokens=tokens, sequence=tokens, masked=False, dtype_bytes=size, on_cpu=True)
    ours = layer_bytes(shape, shape.stacks[0], config, batch, tokens) + copy_bytes(shape, shape.stacks[0], config, batch)
    assert ours == pytest.approx(two - one, rel=0.07)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "it is of the architecture 'nothing', which transformers does not know. Measure one step instead."),
        (
            {"model_type": "whisper"},
            "'whisper', which transformers does not load as a model of text alone. Choose another model.",
        ),
        ({"model_type": "bloom", "n_head": 0}, "of which no shape could be made from its config.json (ZeroDivisionError: "),
        ({"model_type": "bloom", "n_head": "many"}, "(TypeError: Field 'n_head' expected int, got str (value: 'many')). Fetch"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_a_sentence(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        outline.count_shape(config, "m")
    assert str(caught.value).startswith("The memory of m cannot be counted: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "model"


def test_a_models_own_code_is_not_run_for_its_shape(tmp_path: Path) -> None:
    folder = architectures.build(tmp_path / "models" / "own", "experts")
    (folder / "modeling_own.py").write_text("raise SystemExit('its code was run')")
    config = AutoConfig.from_pretrained(folder).to_dict()
    plain = outline.count_shape(config, "own")
    assert outline.count_shape({**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "own") == plain
    assert outline.count_shape({**config, "_attn_implementation": "owner/kernel"}, "own") == plain


def test_only_what_no_reader_knows_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models"
    for name in ("llama", "experts"):
        architectures.build(models / name, name)
    with pytest.raises(NotCounted):
        find_shape_within("experts", "main", models, with_torch=False)
    assert find_shape("experts", "main", models) == find_shape_within("experts", "main", models)
    monkeypatch.setattr(outline, "count_shape", None)
    assert find_shape_within("llama", "main", models, with_torch=False).kind == "llama"


def test_a_head_that_the_config_says_is_not_tied_is_counted() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 300, "feed_forward_proj": "gated-gelu"}
    tied, apart = ({"model_type": "mt5", **sizes, "tie_word_embeddings": tied} for tied in (True, False))
    assert outline.count_shape(apart, "m").parameters - outline.count_shape(tied, "m").parameters == 300 * 32
    assert outline.count_shape(apart, "m").parameters == read_shape({**apart, "model_type": "t5"}, "m").parameters


def test_counting_leaves_torchs_default_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**tiny_config("phi", hidden_size=48).to_dict(), "dtype": "float16"}

    def changed(dtype: torch.dtype) -> None:
        pytest.fail(f"it is set to {dtype} for all threads, of which one may train")

    monkeypatch.setattr(torch, "set_default_dtype", changed)
    assert outline.count_shape(config, "phi").hidden == 48


@pytest.mark.parametrize(
    ("field", "value", "plain"), [("lora_dropout", 0.05, "0"), ("use_dora", True, "off"), ("layers_to_skip", "1", "nothing")]
)
def test_what_adapters_of_experts_cannot_have_is_said_before_anything_is_loaded(
    tmp_path: Path, field: str, value: object, plain: str
) -> None:
    adapter = RunConfig().with_values({"lora_dropout": 0, field: value}).adapter
    said = f"{field} is {'on' if value is True else value}, which an adapter on a mixture of experts cannot have. Set it to {plain}, "
    found = Found(folder=architectures.build(tmp_path / "m", "experts"), public_name="m", origin="here")
    for refused in (
        lambda: trained_tensors(counted(tiny_config("mixtral")), adapter),
        lambda: check(found, torch.float32, adapter, 300, ()),
    ):
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value) == f"{said}or target_modules to attention."
        assert caught.value.field == field
    on_attention = RunConfig().with_values({"target_modules": "attention", field: value}).adapter
    assert trained_tensors(counted(tiny_config("mixtral")), on_attention)
    check(found, torch.float32, on_attention, 300, ())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, but it must be at most 1,000"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2, but it must be at least 1"),
        ({"vocab_size": 0}, "vocab_size is 0, but it must be at least 1"),
        ({"num_labels": 10**9}, "num_labels is 1,000,000,000, but it must be at most 100,000"),
        ({"vision_config": {"depth": 10**6}}, "depth is 1,000,000, but it must be at most 1,000"),
    ],
)
def test_numbers_that_no_model_has_are_refused_before_so_many_layers_are_made(kind: str, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        shape_of({**small("llama").to_dict(), "model_type": kind, **wrong}, "m", with_torch=True)
    assert str(caught.value) == f"In the config.json of m, {said}. Fetch or copy the model again."


@pytest.mark.parametrize("kind", [["llama"], {}, None, 3])
def test_an_architecture_that_is_no_name_is_refused(kind: object) -> None:
    with pytest.raises(UserError, match="which transformers does not know"):
        shape_of({"model_type": kind}, "m", with_torch=True)


def test_a_config_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="Fetch or copy the model again"):
        find_shape("deep", "main", tmp_path)


def test_what_has_no_attention_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    shape, adapter = counted(tiny_config("mamba")), RunConfig().with_values({"target_modules": "attention"}).adapter
    with pytest.raises(UserError, match="target_modules is 'attention', but no module of this model is named so"):
        trained_tensors(shape, adapter)
    tiny_config("mamba").save_pretrained(tmp_path)
    found = Found(folder=tmp_path, public_name="m", origin="here")
    with pytest.raises(UserError, match=r"target_modules is 'all-linear': .*Module 'out_proj' is incompatible with Mamba-based models"):
        check(found, torch.float32, RunConfig().adapter, 300, ())
