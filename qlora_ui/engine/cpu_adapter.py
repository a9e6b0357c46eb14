"""A 4-bit layer and its LoRA adapter computed at once on a CPU, where PEFT's way moves more than it multiplies. Knows nothing of configs.

Besides the two products with the base's weights, PEFT's way is eight operations on tensors of the size of the layer's input or
output; here they are three. Where memory allows, the weights are kept out of their 4 bits as well, as they are computed with.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit

from qlora_ui.engine import cpu

KEPT = "weights_out_of_4_bits"
WIDTHS = {2: torch.int16, 4: torch.int32}


class AdaptedProduct(torch.autograd.Function):
    """`rows W + scale dropout(rows) A B`, of (rows, inputs). W is in 4 bits and frozen, A and B are learned, in float32."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, base: Any, down: torch.Tensor, up: torch.Tensor, scale: float, p: float) -> torch.Tensor:
        kept = cpu.drawn(p, rows.shape) if p else None
        a, b = down.to(rows.dtype), up.to(rows.dtype)
        narrow = left(rows, kept) @ a.t()
        ctx.base, ctx.scale = base, scale / (1 - p)
        ctx.save_for_backward(rows, kept, narrow, a, b)
        return torch.nn.functional.linear(rows, plain(base, rows.dtype), base.bias).addmm_(narrow, b.t(), alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, kept, narrow, a, b = ctx.saved_tensors
        through = (gradient @ b).mul_(ctx.scale)
        for_down = through.t() @ left(rows, kept)
        for_up = (gradient.t() @ narrow).float().mul_(ctx.scale)
        for_rows = left_(through @ a, kept).addmm_(gradient, plain(ctx.base, rows.dtype)) if ctx.needs_input_grad[0] else None
        return for_rows, None, for_down.float(), for_up, None, None


def left(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """The values, those that are dropped set to 0 by their bits, which is far quicker than to choose or to multiply."""
    if kept is None:
        return values
    width = WIDTHS[values.itemsize]
    return (values.view(width) & kept.to(width)).view(values.dtype)


def left_(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """The same in place."""
    if kept is not None:
        width = WIDTHS[values.itemsize]
        values.view(width).bitwise_and_(kept.to(width))
    return values


def plain(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The layer's weights out of their 4 bits, (outputs, inputs): those that are kept so, or made anew."""
    kept: torch.Tensor | None = getattr(base, KEPT, None)
    if kept is not None:
        return kept
    weights: torch.Tensor = dequantize_4bit(base.weight.view(-1, 1), base.weight.quant_state)
    return weights.to(dtype)


def compute_at_once(model: Any) -> int:
    """Let the 4-bit layers with a plain LoRA adapter be computed so while they are trained; their number. DoRA stays as it is."""
    layers = adapted_layers(model)
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def adapted_layers(model: Any) -> list[Any]:
    """The 4-bit layers with a plain LoRA adapter."""
    return [layer for layer in model.modules() if isinstance(layer, Linear4bit) and layer.lora_A and not layer.lora_variant]


def plain_bytes(model: Any) -> int:
    """What the weights of those layers take out of their 4 bits."""
    return sum(layer.in_features * layer.out_features * layer.base_layer.compute_dtype.itemsize for layer in adapted_layers(model))


def keep_plain(model: Any) -> None:
    """Keep the weights of those layers out of their 4 bits too, as long as the model lives."""
    for layer in adapted_layers(model):
        setattr(layer.base_layer, KEPT, plain(layer.base_layer, layer.base_layer.compute_dtype))  # no buffer: it is not to be saved


def _forward(layer: Any, rows: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
    base = layer.base_layer
    is_training = torch.is_grad_enabled() and not layer.disable_adapters and not layer.merged
    learns_bias = base.bias is not None and base.bias.requires_grad
    if not is_training or learns_bias or others or options or rows.dtype != base.compute_dtype:
        result: torch.Tensor = type(layer).forward(layer, rows, *others, **options)
        return result
    flat: torch.Tensor = AdaptedProduct.apply(  # type: ignore[no-untyped-call]
        rows.flatten(0, -2),
        base,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
        getattr(layer.lora_dropout["default"], "p", 0.0) if layer.training else 0.0,
    )
    return flat.view(*rows.shape[:-1], -1)
