"""The memory planner's terms against what is there: bitsandbytes' bytes, PEFT's adapters, optimizers' states, torch's kept tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from test_memory_shapes import small
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from qlora_ui.config import OPTIMIZERS, RunConfig
from qlora_ui.engine import cpu, cpu_adapter
from qlora_ui.engine.adapter import add_adapter
from qlora_ui.engine.batches import packed
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.layers import measure_storage
from qlora_ui.engine.model import Found, load_quantized
from qlora_ui.errors import UserError
from qlora_ui.memory.activations import Batch, copy_bytes, layer_bytes
from qlora_ui.memory.forecast import base_bytes, plain_bytes
from qlora_ui.memory.shapes import ModelShape, read_shape
from qlora_ui.memory.trained import Trained, optimizer_bytes, trained_tensors
from qlora_ui.model_configs import shipped

# The base -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models, made once."""
    folder = tmp_path_factory.mktemp("memory")
    return {name: architectures.build(folder / name, name) for name in ("llama", "phi3", "gpt-neox", "opt", "falcon", "t5")}


def quantized(folder: Path, **values: Any) -> tuple[Any, ModelShape, RunConfig]:
    config = RunConfig().with_values({"compute_dtype": "float32", **values})
    return loaded(folder, config), read_shape(AutoConfig.from_pretrained(folder).to_dict(), "tiny"), config


def loaded(folder: Path, config: RunConfig) -> Any:
    found = Found(folder=folder, public_name="tiny", origin="here")
    return load_quantized(found, config.quantization, detect(config.quantization.compute_dtype), lambda event: None, lambda: False)


EVERY_WAY = [
    {"quant_type": "nf4"},
    {"quant_type": "fp4"},
    {"double_quant": False},
    {"quant_type": "fp4", "double_quant": False},
    {"quant_storage": "bfloat16"},
    {"quant_bits": 8},
    {"quant_bits": 16},
    {"quant_bits": 16, "compute_dtype": "bfloat16"},
]


@pytest.mark.parametrize(
    ("name", "values"),
    [*(("llama", values) for values in EVERY_WAY), *((name, {}) for name in ("phi3", "gpt-neox", "opt", "falcon", "t5"))],
)
def test_the_base_takes_the_bytes_that_are_forecast(built: dict[str, Path], name: str, values: dict[str, Any]) -> None:
    base, shape, config = quantized(built[name], **values)
    weights, constants, whole = base_bytes(shape, config.quantization, config.quantization.compute_dtype)
    unquantized = [p for p in base.parameters() if not (hasattr(p, "quant_state") or hasattr(p, "SCB"))]
    assert whole == sum(parameter.nbytes for parameter in unquantized)
    assert weights + constants == (0 if values.get("quant_bits") == 16 else measure_storage(base).bytes)


@pytest.mark.parametrize(
    "values", [{}, {"compute_dtype": "bfloat16"}, {"target_modules": "attention"}, {"use_dora": True}, {"quant_bits": 8}]
)
def test_weights_kept_out_of_their_4_bits_take_the_bytes_that_are_forecast(built: dict[str, Path], values: dict[str, Any]) -> None:
    base, shape, config = quantized(built["llama"], **values)
    size = cpu_adapter.plain_bytes(add_adapter(base, config.adapter, 0))
    dtype_bytes = 2 if "compute_dtype" in values else 4
    assert plain_bytes(shape, config, dtype_bytes, free_bytes=10 * size) == size
    assert plain_bytes(shape, config, dtype_bytes, free_bytes=10 * size - 1) == 0


def test_four_bits_take_what_the_paper_says() -> None:
    shape = read_shape(shipped()["huggyllama/llama-7b"], "7b")
    linear = sum(one.weights * count for one, count in shape.linears)
    for double_quant, bits in ((True, 4.127), (False, 4.5)):
        quantization = RunConfig().with_values({"double_quant": double_quant}).quantization
        weights, constants, _ = base_bytes(shape, quantization, "bfloat16")
        assert 8 * (weights + constants) / linear == pytest.approx(bits, abs=5e-4)


def test_the_matrices_that_t5_keeps_whole_are_in_float32_where_float16_would_overflow() -> None:
    shape = read_shape(shipped()["google/flan-t5-base"], "t5")
    in_16_bits, in_float16 = (base_bytes(shape, RunConfig().quantization, dtype)[2] for dtype in ("bfloat16", "float16"))
    assert in_float16 - in_16_bits == 2 * 24 * 2048 * 768


def test_linear4bit_is_what_is_counted(built: dict[str, Path]) -> None:
    base, shape, _ = quantized(built["t5"])
    real = sum(isinstance(module, Linear4bit) for module in base.modules())
    assert real == sum(count for linear, count in shape.linears if linear.quantized)


# What is trained ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama", {"lora_r": 3}),
        ("llama", {"target_modules": "attention", "layers_to_skip": "1"}),
        ("llama", {"target_modules": "q_proj, mlp.down_proj"}),
        ("llama", {"target_modules": "q_proj,lm_head"}),
        ("llama", {"use_dora": True}),
        ("llama", {"modules_to_save": "lm_head"}),
        ("llama", {"modules_to_save": "lm_head,embed_tokens"}),
        ("phi3", {}),
        ("opt", {}),
        ("falcon", {"target_modules": "attention"}),
        ("t5", {}),
        ("t5", {"target_modules": "attention", "layers_to_skip": "0"}),
    ],
)
def test_the_adapter_has_the_bytes_that_are_forecast(built: dict[str, Path], name: str, values: dict[str, Any]) -> None:
    base, shape, config = quantized(built[name], **values)
    model = add_adapter(base, config.adapter, 0)
    real = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = trained_tensors(shape, config.adapter)
    assert sum(tensor.numel * tensor.count for tensor in ours) == sum(parameter.numel() for parameter in real)
    assert {parameter.dtype for parameter in real} == {torch.float32}


def test_targets_that_no_matrix_has_are_refused() -> None:
    shape = read_shape(shipped()["huggyllama/llama-7b"], "7b")
    with pytest.raises(
        UserError, match=r"target_modules is 'query', which names no matrix of a llama model. Its matrices are mlp.down_proj"
    ):
        trained_tensors(shape, RunConfig().with_values({"target_modules": "query"}).adapter)


@pytest.mark.parametrize(("skip", "said"), [("0-31", "names all layers"), ("32", "has 32, but this model's layers are 0 to 31")])
def test_layers_that_cannot_be_skipped_are_told_before_a_run(skip: str, said: str) -> None:
    shape = read_shape(shipped()["huggyllama/llama-7b"], "7b")
    with pytest.raises(UserError, match=said):
        trained_tensors(shape, RunConfig().with_values({"layers_to_skip": skip}).adapter)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_remembers_the_bytes_that_are_forecast(tmp_path: Path, name: str) -> None:
    sizes = [(8, 700), (512, 8), (300, 16), (4, 64)]
    weights = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True))
    optimizer = kind(weights, **settings)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    # The step's number and the code books, which are one for all tensors, are not counted.
    real = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and value.numel() > 1 and not key.startswith("qmap")
    )
    state, paged = optimizer_bytes([Trained(rows=rows, columns=columns, count=1) for rows, columns in sizes], name)
    assert state == real
    assert paged == 0


def test_only_the_state_of_large_tensors_is_paged() -> None:
    large, small = Trained(rows=64, columns=4096, count=3), Trained(rows=16, columns=4096, count=3)
    state, paged = optimizer_bytes([large, small], "paged_adamw_32bit")
    assert (state, paged) == (8 * 3 * (large.numel + small.numel), 8 * 3 * large.numel)


# Activations --------------------------------------------------------------------------------------------------------------


def kept(folder: Path, made: Any, config: RunConfig, tokens: int) -> int:
    """Bytes of all tensors that a forward pass of a model of this config keeps, weights not among them."""
    folder = folder / f"{made.num_hidden_layers}"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    base = loaded(folder, config)
    model = add_adapter(base, config.adapter, 0).train()
    cpu.draw_dropout_faster(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def weigh(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = {"input_ids": list(range(tokens)), "labels": list(range(tokens))}
    inputs = {name: value for name, value in packed([row]).items() if name in ("input_ids", "position_ids", "use_cache")}
    half = config.quantization.compute_dtype == "bfloat16"
    with (
        torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        cpu.attention_by_row(model),
    ):
        _held = model(**inputs)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("name", "compute_dtype", "lora_dropout"),
    [
        ("llama", "bfloat16", 0.1),
        ("llama", "bfloat16", 0.0),
        ("llama", "float32", 0.1),
        ("llama", "float32", 0.0),
        ("qwen3", "float32", 0.1),
        ("olmo2", "float32", 0.1),
        ("granite", "float32", 0.1),
        ("exaone4", "float32", 0.1),
        ("phi3", "float32", 0.1),
        ("gpt-neox", "float32", 0.1),
    ],
)
def test_a_layer_keeps_the_bytes_that_are_forecast(tmp_path: Path, name: str, compute_dtype: str, lora_dropout: float) -> None:
    config = RunConfig().with_values({"compute_dtype": compute_dtype, "lora_dropout": lora_dropout, "lora_r": 4})
    tokens, shape = 200, read_shape(small(name).to_dict(), name)
    size = 2 if compute_dtype == "bfloat16" else 4
    batch = Batch(tokens=tokens, sequence=tokens, masked=False, dtype_bytes=size, on_cpu=True)
    one, two = (kept(tmp_path, small(name, num_hidden_layers=layers), config, tokens) for layers in (1, 2))
    ours = layer_bytes(shape, shape.stacks[0], config, batch, tokens) + copy_bytes(shape, shape.stacks[0], config, batch)
    assert ours == pytest.approx(two - one, rel=0.03)
