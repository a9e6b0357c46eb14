"""Which layers of a base are in few bits, beyond what transformers sees by itself, and what they take. Knows nothing of disk."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from qlora_ui.config import QuantizationConfig


@contextlib.contextmanager
def plain_linears(model_class: type | None) -> Iterator[None]:
    """While a model of this class is built, its own kinds of linear layer that compute just what `nn.Linear` does are `nn.Linear`.

    transformers quantizes only layers of exactly that class: Falcon's, a subclass, would all stay in 16 bits.
    """
    own = plain_linear_kinds(model_class) if model_class else {}
    module = sys.modules[model_class.__module__] if model_class else None
    for name in own:
        setattr(module, name, nn.Linear)
    try:
        yield
    finally:
        for name, kind in own.items():
            setattr(module, name, kind)


def plain_linear_kinds(model_class: type) -> dict[str, type]:
    """Those of the module that defines the model, by their names there."""
    return {name: kind for name, kind in vars(sys.modules[model_class.__module__]).items() if _is_plain(kind)}


def _is_plain(kind: Any) -> bool:
    """Whether this is a subclass of `nn.Linear` that differs in nothing but its name: told by its answer."""
    if not (isinstance(kind, type) and issubclass(kind, nn.Linear)) or kind is nn.Linear:
        return False
    try:
        with torch.random.fork_rng(devices=[]):
            layer, rows = kind(5, 3), torch.randn(2, 5)
        with torch.no_grad():
            return torch.allclose(layer(rows), nn.functional.linear(rows, layer.weight, layer.bias), atol=1e-5)
    except Exception:  # noqa: BLE001  it wants other arguments, or answers in another form: then it is something else
        return False


def left_whole(model: Any) -> dict[str, int]:
    """Names and parameters of the matrices that were not quantized, though they are neither embeddings nor head."""
    left: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt, nn.Embedding)) or module is model.get_output_embeddings():
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1:
                label = path.rpartition(".")[2] if name == "weight" else name
                left[label] = left.get(label, 0) + weight.numel()
    return left


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What the base's linear layers take: their number, parameters as the model counts them, and bytes as they are stored."""

    layers: int
    parameters: int
    bytes: int

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes / self.parameters


def measure_storage(base: Any) -> Storage:
    """Counted in the tensors that are there: weights, their quantization constants, and the constants of those.

    Of the quantized layers, or of all linear ones when none is. Not counted: biases, the code books that are the same for
    every layer, and the output head, which is never quantized.
    """
    head = base.get_output_embeddings()
    linear = [module for module in base.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    layers = [module for module in linear if isinstance(module, (Linear4bit, Linear8bitLt))] or linear
    tensors: list[torch.Tensor] = [module.weight for module in layers]
    parameters = 0
    for module in layers:
        parameters += module.in_features * module.out_features
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
        elif isinstance(module, Linear8bitLt):
            tensors.append(module.weight.SCB if module.weight.SCB is not None else module.state.SCB)  # the first forward moves it
    return Storage(layers=len(layers), parameters=parameters, bytes=sum(tensor.nbytes for tensor in tensors))


def describe_storage(base: Any, quantization: QuantizationConfig) -> str:
    """One line: how the base is stored, and the measured bits per parameter."""
    storage = measure_storage(base)
    name = {"8": "LLM.int8", "16": f"unquantized {str(base.dtype).removeprefix('torch.')}"}.get(quantization.quant_bits)
    if name is None:
        double = "with" if quantization.double_quant else "without"
        packed = "" if quantization.quant_storage == "uint8" else f" packed in {quantization.quant_storage}"
        name = f"{quantization.quant_type.upper()} {double} double quantization{packed}"
    return f"Base stored as {name}: {storage.bits_per_parameter:.3f} bits per parameter in {storage.layers} linear layers"
