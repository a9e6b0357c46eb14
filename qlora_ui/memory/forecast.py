"""What a run takes of a device's memory, term by term, and whether it fits. Knows nothing of disk, torch or Gradio.

The figures are those of the moment at which a training takes most: the second micro-batch of a step after the first, when
gradients and the optimizer's state are there. Rows are taken to be as long as `max_seq_len` allows, and all tokens to be
trained, so data with shorter rows take less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from qlora_ui.config import QuantizationConfig, RunConfig
from qlora_ui.memory.activations import Batch, activations_of, logits_bytes
from qlora_ui.memory.devices import GIB, Device
from qlora_ui.memory.shapes import Linear, ModelShape
from qlora_ui.memory.trained import adapted, optimizer_bytes, trained_tensors

Verdict = Literal["fits", "tight", "does not fit"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK, NESTED_BLOCK = 64, 256  # of weights that share a quantization constant, and of constants that share theirs (paper, section 3)
# Assumptions, not measured on every device. On a GPU: half a GiB for the CUDA context and the code of its kernels, a quarter
# for the workspaces of the matrix libraries and what the allocator cannot reuse. On a CPU: Python with the training stack.
OVERHEAD_BYTES = {"cuda": int(0.75 * GIB), "cpu": int(0.9 * GIB)}
FITS_WITHIN = 0.9  # of the memory; between this and all of it, the forecast's own error decides
# Of the memory that is left, activations may take this share when gradient checkpointing is auto. The rest is for gradients,
# for what the allocator cannot reuse, and for other programs.
ACTIVATION_SHARE = 0.5
# On a CPU, 4-bit weights are kept out of their 4 bits too where that takes no more than this share of the free memory: each
# micro-batch needs them so twice, and to do it anew is a twentieth of a step.
PLAIN_SHARE = 0.1
TRAINED_BYTES = 12  # of a trained parameter: its gradient and Adam's two moments, in float32


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Bytes."""

    quantized_weights: int
    quantization_constants: int
    unquantized_parts: int
    dequantized_weights: int
    adapter: int
    gradients: int
    optimizer_state: int
    activations: int
    logits: int
    overhead: int

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(dataclasses.asdict(self).items())

    @property
    def base(self) -> int:
        """What the model itself takes."""
        return self.quantized_weights + self.quantization_constants + self.unquantized_parts


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The terms, and what was assumed. `paged_bytes` of the optimizer's state may move out of a GPU."""

    terms: Terms
    paged_bytes: int
    tokens: int
    compute_dtype: str
    gradient_checkpointing: bool

    @property
    def total(self) -> int:
        return sum(size for _, size in self.terms)

    def verdict(self, memory_bytes: int) -> Verdict:
        """Tight is also what fits only because the optimizer's pages can leave the GPU: it will be slow when they do."""
        if self.total <= FITS_WITHIN * memory_bytes:
            return "fits"
        return "tight" if self.total - self.paged_bytes <= memory_bytes else "does not fit"


Plan = Callable[[RunConfig, Device], Forecast]
"""What a run with these settings would take on that device, of a model that the plan knows: `forecast`, or one that was measured."""


def forecast(shape: ModelShape, config: RunConfig, device: Device, correction: Mapping[str, float] | None = None) -> Forecast:
    """What the run would take on the device. `correction` are factors by the name of a term, as measured by a trial step."""
    dtype = device.compute_dtype if config.quantization.compute_dtype == "auto" else config.quantization.compute_dtype
    weights, constants, whole = base_bytes(shape, config.quantization, dtype)
    tensors = trained_tensors(shape, config.adapter)
    trained = sum(tensor.numel * tensor.count for tensor in tensors)
    state, paged = optimizer_bytes(tensors, config.optimization.optimizer)
    overhead = OVERHEAD_BYTES[device.kind]

    batch = Batch.of(shape, config, DTYPE_BYTES[dtype], on_cpu=device.kind == "cpu")
    held, logits = activations_of(shape, config, batch), logits_bytes(shape, batch)
    free = device.memory_bytes - overhead - weights - constants - whole - 4 * trained
    recompute = recomputes(shape, config.optimization.gradient_checkpointing, held.kept + logits, free, trained)
    terms = Terms(
        quantized_weights=weights,
        quantization_constants=constants,
        unquantized_parts=whole,
        dequantized_weights=plain_bytes(shape, config, DTYPE_BYTES[dtype], free) if device.kind == "cpu" else 0,
        adapter=4 * trained,
        gradients=4 * trained,
        optimizer_state=state,
        activations=held.at_peak(logits, recompute),
        logits=logits,
        overhead=overhead,
    )
    corrected = {name: round(size * (correction or {}).get(name, 1.0)) for name, size in terms}
    return Forecast(
        terms=Terms(**corrected),
        paged_bytes=paged if device.kind == "cuda" else 0,
        tokens=batch.tokens,
        compute_dtype=dtype,
        gradient_checkpointing=recompute,
    )


def recomputes(shape: ModelShape, wish: str, activation_bytes: float, free_bytes: float, trained_parameters: int) -> bool:
    """Whether gradient checkpointing will be on. Auto is what the engine makes of it."""
    if wish != "auto":
        return wish == "on"
    return shape.is_encoder_decoder or activation_bytes > activation_room(free_bytes, trained_parameters)


def activation_room(free_bytes: float, trained_parameters: int) -> float:
    """The bytes that activations may take without being recomputed, of those free once base and adapter are loaded."""
    return ACTIVATION_SHARE * (free_bytes - TRAINED_BYTES * trained_parameters)


def keeps_plain(weight_bytes: float, free_bytes: float) -> bool:
    """Whether a CPU keeps 4-bit weights, which would take so much out of their 4 bits, in that form too."""
    return weight_bytes <= PLAIN_SHARE * free_bytes


def plain_bytes(shape: ModelShape, config: RunConfig, dtype_bytes: int, free_bytes: float) -> int:
    """What the 4-bit weights with a plain LoRA adapter take out of their 4 bits, where they are kept so."""
    if config.quantization.quant_bits != "4" or config.adapter.use_dora:
        return 0
    size = dtype_bytes * sum(linear.weights * count for linear, count in adapted(shape, config.adapter) if linear.quantized)
    return size if keeps_plain(size, free_bytes) else 0


# The base -----------------------------------------------------------------------------------------------------------------


def base_bytes(shape: ModelShape, quantization: QuantizationConfig, dtype: str) -> tuple[int, int, int]:
    """Quantized weights, their constants, and all that is not quantized."""
    size = DTYPE_BYTES[dtype]
    weights = constants = 0
    whole = size * shape.parameters
    for linear, count in shape.linears:
        if quantization.quant_bits != "16" and linear.quantized:
            of_weights, of_constants = quantized_bytes(linear, quantization)
            weights += count * of_weights
            constants += count * of_constants
            whole -= count * size * linear.weights
        elif linear.wide and dtype == "float16":
            whole += count * 2 * linear.weights
    return weights, constants, whole


def quantized_bytes(linear: Linear, quantization: QuantizationConfig) -> tuple[int, int]:
    """A matrix as bitsandbytes stores it: the packed weights, and the constants that they are scaled by."""
    if quantization.quant_bits == "8":
        return linear.weights, 4 * linear.out_features
    packed = ceil(linear.weights / 2)
    blocks = ceil(linear.weights / BLOCK)
    if not quantization.double_quant:
        return packed, 4 * blocks
    return packed, blocks + 4 * ceil(blocks / NESTED_BLOCK) + 4  # and an offset
