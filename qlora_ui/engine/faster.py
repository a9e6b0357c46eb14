"""How answers come faster: on a CPU by bitsandbytes' own products, else by weights out of their 4 bits; on a GPU by compiling.

Knows nothing of runs or Gradio.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from transformers import CompileConfig

from qlora_ui.config import QuantizationConfig
from qlora_ui.engine.cpu_adapter import plain
from qlora_ui.engine.hardware import Hardware, free_memory_gib, give_memory_back
from qlora_ui.errors import UserError
from qlora_ui.memory.devices import GIB
from qlora_ui.memory.shapes import ModelShape


def use_quick_products(model: Any) -> None:
    """Let bitsandbytes pack the 4-bit weights for the products that it has for some CPUs, as it does when used by itself.

    They round in another way, and nothing can be learned through them. Only bfloat16 is computed so: others would be rounded to it.
    """
    for layer in four_bit(model):
        block, (out_features, in_features) = layer.weight.quant_state.blocksize, layer.weight.quant_state.shape
        fits = out_features % 32 == 0 and in_features % block == 0  # else it breaks off
        layer.support_avx512bf16_for_cpu = has_avx512bf16() and fits and layer.compute_dtype == torch.bfloat16


@contextlib.contextmanager
def kept_packed(model: Any) -> Iterator[None]:
    """Asked for its `state_dict`, as PEFT does when an adapter is loaded, a layer unpacks its weights for good. Packed again they are
    not quite the same; so nothing is said of the packing meanwhile, and the 4-bit weights must not be read from that dict."""
    packed = [layer.weight.quant_state for layer in four_bit(model) if getattr(layer.weight.quant_state, "packing_format_for_cpu", False)]
    for state in packed:
        state.packing_format_for_cpu = False
    try:
        yield
    finally:
        for state in packed:
            state.packing_format_for_cpu = True


def offered_gib(shape: ModelShape, quantization: QuantizationConfig, hardware: Hardware) -> float:
    """The memory that `Faster` takes, of a model that is not loaded; 0 where there is nothing to gain."""
    dtype = hardware.compute_dtype if quantization.compute_dtype == "auto" else quantization.compute_dtype
    if hardware.kind != "cpu" or quantization.quant_bits != "4" or (has_avx512bf16() and dtype == "bfloat16"):
        return 0
    weights = sum(linear.weights * count for linear, count in shape.linears if linear.quantized)
    return weights * (4 if dtype == "float32" else 2) / GIB


def four_bit(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, Linear4bit)]


class Faster:
    """Switches a model between its own layers and quicker ones.

    On a CPU: plain ones with the very weights that the 4-bit layers multiply with; these stay in memory. On a GPU: compiled ones.
    """

    def __init__(self, model: Any, compiles: bool | None = None) -> None:
        """The base, or one with adapters; these may be put on it later. `compiles` on a GPU, unless it is said otherwise."""
        self._model = model
        self._compiles = model.device.type == "cuda" if compiles is None else compiles
        self._layers = [] if self._compiles else [layer for layer in four_bit(model) if not layer.support_avx512bf16_for_cpu]
        self.is_on = False

    @property
    def gib(self) -> float:
        """The memory that it takes; 0 where there is nothing to gain by memory."""
        return float(sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in self._layers) / GIB)

    @property
    def compiled(self) -> dict[str, Any]:
        """What `generate` is told meanwhile, if it compiles: a cache of fixed size, which takes no prefix, and the compiler's mode.

        Compiled code does not see hooks that come and go, so that speakers must answer one after the other.
        """
        # Its default would record CUDA graphs, which belong to one thread; ours ends when nobody is in line.
        return {"cache_implementation": "static", "compile_config": CompileConfig(mode="default")} if self._compiles and self.is_on else {}

    def switch(self, on: bool) -> None:
        """Raises UserError where the memory is not there."""
        if on == self.is_on:
            return
        if on and self.gib > free_memory_gib():
            raise UserError(
                f"Faster answers take {self.gib:.1f} GiB, but {free_memory_gib():.1f} GiB are free. Close what else uses the memory, "
                "or leave it off."
            )
        if on and self._compiles:
            allow_compiling(self._model)
        for layer in self._layers:
            if on:
                layer.forward = Unpacked(layer)
            else:
                del layer.forward
        self.is_on = on
        if not on:
            give_memory_back()


def allow_compiling(model: Any) -> None:
    """transformers does not compile bitsandbytes' layers of itself, though these can be."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        quantizer.__class__ = type("Compileable", (type(quantizer),), {"is_compileable": True})


class Unpacked:
    """A 4-bit layer's product, as bitsandbytes makes it, with weights that were taken out of their 4 bits before."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._weight = plain(layer, layer.compute_dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        bias = self._layer.bias
        product = torch.nn.functional.linear(
            rows.to(self._weight.dtype), self._weight, None if bias is None else bias.to(self._weight.dtype)
        )
        return product.to(rows.dtype)
