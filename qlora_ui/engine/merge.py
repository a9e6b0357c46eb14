"""The adapter merged into its base: dequantized, added in float32, rounded once. Knows nothing of runs, disk or Gradio."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from transformers.pytorch_utils import Conv1D

from qlora_ui.errors import UserError
from qlora_ui.events import Event, PhaseProgress
from qlora_ui.stopping import Cancelled

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]


def dequantize(base: Any, emit: Emit, should_stop: ShouldStop) -> Any:
    """Give the base plain linear layers with the very weights that its quantized ones multiply with, all in the CPU's memory."""
    quantized = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, (Linear4bit, Linear8bitLt))]
    dtype = base.get_input_embeddings().weight.dtype  # the compute dtype, to which each product dequantizes
    for done, (name, layer) in enumerate(quantized, 1):
        if should_stop():
            raise Cancelled
        base.set_submodule(name, _plain(layer, dtype))
        emit(PhaseProgress(done=done, total=len(quantized), unit="layers dequantized"))
    if quantized:
        base.hf_quantizer.remove_quantization_config(base)
        base.is_loaded_in_4bit = base.is_loaded_in_8bit = False
    remove_hook_from_module(base, recurse=True)  # which would carry its inputs to where the layers were
    base.hf_device_map = {}
    return base.to("cpu")


def _plain(layer: Any, dtype: torch.dtype) -> Any:
    weight = dequantize_module_weight(layer).detach().to("cpu", dtype)
    kind = getattr(layer, "source_cls", None)
    if kind is Conv1D:  # GPT-2's, which keeps its weights the other way round
        plain: Any = kind(1, 1)
        plain.nf, plain.nx = layer.out_features, layer.in_features
        weight = weight.T.contiguous()
    else:
        plain = torch.nn.Linear(layer.in_features, layer.out_features, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain


def merge(model: PeftModel, dtype: torch.dtype, emit: Emit, should_stop: ShouldStop) -> Any:
    """The base with the adapter in it, in `dtype`. Raises UserError for an adapter with numbers that are not finite."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for done, layer in enumerate(layers, 1):
        if should_stop():
            raise Cancelled
        inner: Any = layer.get_base_layer().float()  # one layer at a time: all of them in float32 would be twice the memory
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"The adapter cannot be merged: {error}. Choose an earlier checkpoint.", field="run") from error
        inner.to(dtype)
        emit(PhaseProgress(done=done, total=len(layers), unit="layers merged"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return model.merge_and_unload().to(dtype)
