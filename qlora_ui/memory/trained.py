"""What is trained beside the frozen base, and what its optimizer remembers of it. Knows nothing of disk, torch or Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from qlora_ui.config import AdapterConfig
from qlora_ui.errors import UserError
from qlora_ui.memory.shapes import Linear, ModelShape

ATTENTION = ("attn", "attention")
# Numbers that an optimizer keeps for each trained one. Adafactor is apart: it keeps one a row and one a column.
STATES = {"adamw": 2, "adam": 2, "lion": 1, "ademamix": 3, "rmsprop": 1, "adagrad": 1, "sgd": 0}
# bitsandbytes leaves the state of small tensors in 32 bits, and does not page that of tensors which are not large.
LEAST_IN_8_BITS, BLOCK_8_BITS, LEAST_PAGED = 4096, 256, 100_000


@dataclass(frozen=True, kw_only=True)
class Trained:
    """So many trained tensors that are alike, kept in float32."""

    rows: int
    columns: int
    count: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def adapted(shape: ModelShape, adapter: AdapterConfig) -> list[tuple[Linear, int]]:
    """The matrices that get an adapter, and how many of each. Raises UserError for settings that this model cannot have."""
    found = _targeted(shape, adapter)
    if any(linear.experts for linear, _ in found):
        check_experts(adapter)
    return found


def check_experts(adapter: AdapterConfig) -> None:
    """Raise UserError for what PEFT does not do on the bare tensors of experts."""
    wishes = (("lora_dropout", adapter.lora_dropout, "0"), ("use_dora", adapter.use_dora, "off"))
    for field, value, plain in (*wishes, ("layers_to_skip", adapter.layers_to_skip, "nothing")):
        if value:
            said = f"{field} is {'on' if value is True else value}, which an adapter on a mixture of experts cannot have."
            raise UserError(f"{said} Set it to {plain}, or target_modules to attention.", field=field)


def _targeted(shape: ModelShape, adapter: AdapterConfig) -> list[tuple[Linear, int]]:
    skipped, layers = adapter.skipped_layers(), max(stack.first + stack.layers for stack in shape.stacks)
    if missing := [layer for layer in skipped if layer >= layers]:
        raise UserError(f"layers_to_skip has {missing[0]}, but this model's layers are 0 to {layers - 1}.", field="layers_to_skip")
    if len(skipped) == layers:
        raise UserError("layers_to_skip names all layers of this model. Leave one to the adapter.", field="layers_to_skip")
    left = [sum(stack.first + n not in skipped for n in range(stack.layers)) for stack in shape.stacks]
    inner = [(linear, layers) for stack, layers in zip(shape.stacks, left, strict=True) for linear in stack.linears]
    linears = [*inner, *((linear, 1) for linear in shape.outer)]
    if adapter.target_modules == "all-linear":
        return [(linear, n) for linear, n in linears if linear.ranks]
    if adapter.target_modules == "attention":
        named = [(linear, n) for linear, n in linears if any(word in linear.path.lower().rpartition(".")[0] for word in ATTENTION)]
        if not named:
            said = "target_modules is 'attention', but no module of this model is named so. Name the modules."
            raise UserError(said, field="target_modules")
        return named
    found = [(linear, n) for linear, n in (*linears, (shape.head, 1), (shape.embedding, 1)) if _named(linear, adapter.target_modules)]
    if not found:
        raise UserError(
            f"target_modules is {adapter.target_modules!r}, which names no matrix of a {shape.kind} model. "
            f"Its matrices are {', '.join(sorted({linear.path for linear, _ in linears}))}.",
            field="target_modules",
        )
    return found


def _named(linear: Linear, names: str) -> bool:
    return any(name.strip() and f".{linear.path}".endswith(f".{name.strip()}") for name in names.split(","))


def trained_tensors(shape: ModelShape, adapter: AdapterConfig) -> list[Trained]:
    """The adapter's tensors, and whole matrices trained with it. Norms and biases that are trained too are too few to count."""
    tensors = []
    for linear, count in adapted(shape, adapter):
        rank = adapter.lora_r * linear.ranks
        tensors.append(Trained(rows=rank, columns=linear.in_features, count=count))
        tensors.append(Trained(rows=linear.out_features, columns=rank, count=count))
        if adapter.use_dora:
            tensors.append(Trained(rows=1, columns=linear.out_features, count=count))
    whole = [linear for linear in (shape.head, shape.embedding) if _named(linear, adapter.modules_to_save)]
    tensors += [Trained(rows=linear.out_features, columns=linear.in_features, count=1) for linear in whole[: 1 if shape.tied else 2]]
    return tensors


def optimizer_bytes(tensors: Sequence[Trained], optimizer: str) -> tuple[int, int]:
    """What the optimizer keeps, and the part of it that may be paged out of the GPU."""
    name = optimizer.removeprefix("paged_").partition("_")[0]
    if name == "adafactor":
        return sum(4 * (t.rows + t.columns if min(t.rows, t.columns) > 1 else t.numel) * t.count for t in tensors), 0
    state = paged = 0
    for tensor in tensors:
        small = not optimizer.endswith("8bit") or tensor.numel < LEAST_IN_8_BITS
        each = 4 * tensor.numel if small else tensor.numel + 4 * ceil(tensor.numel / BLOCK_8_BITS)
        state += STATES[name] * each * tensor.count
        if optimizer.startswith("paged") and tensor.numel >= LEAST_PAGED:
            paged += STATES[name] * tensor.numel * (4 if small else 1) * tensor.count
    return state, paged
