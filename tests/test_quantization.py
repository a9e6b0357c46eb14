"""How the base is stored: the bytes that are there against the arithmetic, and that every way of storing trains."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from qlora_ui import jobs
from qlora_ui.config import RunConfig
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.layers import describe_storage, measure_storage
from qlora_ui.engine.model import Found, load_quantized
from qlora_ui.engine.train import train
from qlora_ui.events import HeldOut, Log
from qlora_ui.runs import Run, Workspace

SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)] * 2  # out, in: the two layers of the tiny Llama
PARAMETERS = sum(rows * columns for rows, columns in SHAPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("quantization") / "model")


def loaded(folder: Path, **values: Any) -> Any:
    config = RunConfig().with_values({"compute_dtype": "float32", **values}).quantization
    found = Found(folder=folder, public_name="tiny", origin="here")
    return load_quantized(found, config, detect(config.compute_dtype), lambda event: None, lambda: False)


def layer_bytes(parameters: int, double_quant: bool) -> int:
    """Half a byte a weight; a float32 for every 64, or with double quantization a byte, with a float32 for every 256 and an offset."""
    blocks = ceil(parameters / 64)
    return parameters // 2 + (blocks + 4 * ceil(blocks / 256) + 4 if double_quant else 4 * blocks)


@pytest.mark.parametrize("quant_storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_stored_bytes_are_those_of_the_arithmetic(folder: Path, quant_type: str, double_quant: bool, quant_storage: str) -> None:
    base = loaded(folder, quant_type=quant_type, double_quant=double_quant, quant_storage=quant_storage)
    storage = measure_storage(base)
    assert storage.layers == len(SHAPES)
    assert storage.parameters == PARAMETERS
    assert storage.bytes == sum(layer_bytes(rows * columns, double_quant) for rows, columns in SHAPES)
    assert storage.bits_per_parameter == pytest.approx(4.141 if double_quant else 4.5, abs=0.02)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            assert module.weight.quant_state.quant_type == quant_type
            assert module.weight.dtype == getattr(torch, quant_storage)


@pytest.mark.parametrize(("double_quant", "papers_figure"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)])
def test_a_layer_of_real_size_takes_what_the_paper_says(double_quant: bool, papers_figure: float) -> None:
    layer = Linear4bit(1024, 2048, bias=False, compress_statistics=double_quant, quant_type="nf4").to("cpu")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def get_output_embeddings(self) -> None:
            return None

    measured = measure_storage(Model()).bits_per_parameter
    assert measured == pytest.approx(papers_figure, abs=1e-4)
    assert f"{measured:.3f}" == ("4.127" if double_quant else "4.500")


def test_eight_bits_are_a_byte_a_weight_and_a_scale_a_row_before_and_after_a_forward(folder: Path) -> None:
    base = loaded(folder, quant_bits="8")
    expected = PARAMETERS + sum(4 * rows for rows, _ in SHAPES)
    assert measure_storage(base).bytes == expected
    base(torch.tensor([[5, 6, 7]]))
    assert measure_storage(base).bytes == expected
    assert sum(isinstance(module, Linear8bitLt) for module in base.modules()) == len(SHAPES)


@pytest.mark.parametrize(("compute_dtype", "bits"), [("float32", 32), ("bfloat16", 16)])
def test_an_unquantized_base_has_the_bits_of_its_compute_dtype(folder: Path, compute_dtype: str, bits: int) -> None:
    base = loaded(folder, quant_bits="16", compute_dtype=compute_dtype)
    assert measure_storage(base).bits_per_parameter == bits
    assert not any(isinstance(module, (Linear4bit, Linear8bitLt)) for module in base.modules())
    quantization = RunConfig().with_values({"quant_bits": "16"}).quantization
    assert (
        describe_storage(base, quantization)
        == f"Base stored as unquantized {compute_dtype}: {bits}.000 bits per parameter in 14 linear layers"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    folder = tmp_path_factory.mktemp("quantization")
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    return workspace, tiny.tiny_rows(folder / "rows.json")


def trained(place: tuple[Workspace, Path], **values: Any) -> Run:
    run = tiny.tiny_run(*place, save_steps=100, eval_steps=100, max_steps=6, **values)
    jobs.execute(run, train)
    assert run.state() == "finished", tiny.events_of(run)[-1]
    return run


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "Base stored as NF4 with double quantization: 4.1"),
        ({"quant_type": "fp4", "double_quant": False}, "Base stored as FP4 without double quantization: 4.500 bits"),
        ({"quant_storage": "bfloat16"}, "Base stored as NF4 with double quantization packed in bfloat16: 4.1"),
        ({"quant_bits": 8}, "Base stored as LLM.int8: 8."),
        ({"quant_bits": 8, "compute_dtype": "bfloat16"}, "Base stored as LLM.int8: 8."),
        ({"quant_bits": 16}, "Base stored as unquantized float32: 32.000 bits"),
        ({"quant_bits": 16, "compute_dtype": "bfloat16"}, "Base stored as unquantized bfloat16: 16.000 bits"),
    ],
)
def test_every_way_of_storing_learns_and_says_its_bits(place: tuple[Workspace, Path], values: dict[str, Any], said: str) -> None:
    run = trained(place, **values)
    (line,) = [event.text for event in tiny.events_of(run, Log) if event.text.startswith("Base stored as")]
    assert line.startswith(said)
    assert line.endswith("bits per parameter in 14 linear layers")
    assert not [event.text for event in tiny.events_of(run, Log) if "does not quantize" in event.text]
    before, after = [event.loss for event in tiny.events_of(run, HeldOut)]
    assert after < before - 1


def test_the_dtype_that_weights_are_packed_in_changes_nothing_that_is_learned(place: tuple[Workspace, Path]) -> None:
    losses = [[event.loss for event in tiny.events_of(trained(place, quant_storage=kind), HeldOut)] for kind in ("uint8", "bfloat16")]
    assert losses[0] == losses[1]
