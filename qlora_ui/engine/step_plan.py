"""How the loaded model's steps are computed on this machine: tried out on it, each choice with its reason. Knows nothing of Gradio.

What an architecture honours is measured, not read off a list of names: a list is out of date with the next release.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qlora_ui.config import RunConfig
from qlora_ui.engine import cpu, cpu_adapter
from qlora_ui.engine.batches import Row, StepCollator, packed
from qlora_ui.engine.hardware import Hardware, autocast, free_memory_gib
from qlora_ui.engine.loss import Loss
from qlora_ui.engine.tokenized import FittedRows
from qlora_ui.engine.tokens import IGNORED, REAL_TOKENS
from qlora_ui.events import Event, Log
from qlora_ui.memory.activations import CPU_TOKEN_BUDGET
from qlora_ui.memory.devices import GIB
from qlora_ui.memory.forecast import activation_room, keeps_plain

# A row in a pack must come out this much nearer to itself alone than to itself behind another row. Rounding alone stays below.
ALIKE = 0.2
SAMPLE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What was chosen. `token_budget` is that of a packed micro-batch; 0 means that rows are padded."""

    token_budget: int
    attention_by_row: bool
    gradient_checkpointing: bool
    loss: Loss | None

    def attention(self, model: Any) -> AbstractContextManager[None]:
        """Forward and backward of a micro-batch belong within this."""
        return cpu.attention_by_row(model) if self.attention_by_row else nullcontext()

    def collator(self, config: RunConfig, pad: Callable[[Sequence[Row]], dict[str, Any]]) -> StepCollator:
        """The rows of a step as this plan parts them; `pad` makes one batch of a few, where they are not packed."""
        return StepCollator(token_budget=self.token_budget, pad_rows=config.optimization.micro_batch_size, pad=pad)


def plan_steps(model: Any, config: RunConfig, hardware: Hardware, rows: FittedRows, emit: Callable[[Event], None]) -> StepPlan:
    """Choose, and say what was chosen and why. `rows` are those to train on; a few of them are tried."""
    sample = [cut(rows[index]) for index in range(min(len(rows), 2))]
    if hardware.kind == "cpu":
        cpu.draw_dropout_faster(model)
        emit(Log(text=f"{cpu_adapter.compute_at_once(model)} 4-bit layers are computed at once with their adapters"))
    with autocast(hardware):  # modules that are trained fully are float32 among layers that are not
        loss = choose_loss(model, sample[0], emit)
        token_budget = choose_packing(model, config, hardware, sample, emit)
        by_row = bool(token_budget) and hardware.kind == "cpu" and choose_attention_by_row(model, sample, emit)
    o = config.optimization
    tokens = token_budget or o.micro_batch_size * config.data.max_seq_len
    checkpointing = choose_checkpointing(model, o.gradient_checkpointing, hardware, loss, sample[0], tokens, emit)
    if hardware.kind == "cpu":
        choose_plain_weights(model, emit)
    return StepPlan(token_budget=token_budget, attention_by_row=by_row, gradient_checkpointing=checkpointing, loss=loss)


def choose_plain_weights(model: Any, emit: Callable[[Event], None]) -> None:
    """Whether 4-bit weights are kept out of their 4 bits too, which spares a step to do it anew for each micro-batch, twice."""
    size, free = cpu_adapter.plain_bytes(model), free_memory_gib() * GIB
    if size and keeps_plain(size, free):
        cpu_adapter.keep_plain(model)
        emit(Log(text=f"The 4-bit weights are kept out of their 4 bits too: {size / GIB:.2f} of the {free / GIB:.1f} GiB that are free"))


def cut(row: Row) -> Row:
    """A row that is short enough to be tried in no time."""
    return {name: values[:SAMPLE_TOKENS] for name, values in row.items()}


# The head -----------------------------------------------------------------------------------------------------------------


def choose_loss(model: Any, row: Row, emit: Callable[[Event], None]) -> Loss | None:
    """The loss over selected positions where the model's head lets itself be used so; None for an encoder-decoder's own loss."""
    if model.config.is_encoder_decoder:
        return None
    head = model.get_output_embeddings()
    trained = {**packed([row]), "labels": torch.tensor([[IGNORED, *row["input_ids"][1:-1], IGNORED]])}
    if head is not None and _same_logits(model, Loss(head=head), trained):
        emit(Log(text="Logits are computed for trained tokens only, their loss in float32"))
        return Loss(head=head)
    emit(Log(text=f"{type(_plain(model)).__name__} has no head of its own to select tokens for: logits are computed for all of them"))
    return Loss(head=None)


def _same_logits(model: Any, loss: Loss, batch: dict[str, Any]) -> bool:
    expected = forward(model, batch)[:, :-2]
    with loss.selecting(batch["labels"].to(model.device)):
        selected = forward(model, batch)
    return selected.shape == expected.shape and not _far(selected, expected, 0.05 * expected)


def _far(one: torch.Tensor, other: torch.Tensor, measure: torch.Tensor) -> bool:
    return bool((one - other).norm() > measure.norm())


# Packing ------------------------------------------------------------------------------------------------------------------


def choose_packing(model: Any, config: RunConfig, hardware: Hardware, sample: Sequence[Row], emit: Callable[[Event], None]) -> int:
    """Tokens of a packed micro-batch, or 0 when rows are padded."""
    o, longest = config.optimization, config.data.max_seq_len
    if o.packing == "off":
        emit(Log(text=f"Packing is off: {o.micro_batch_size} rows a micro-batch, padded to the longest of them"))
        return 0
    reason = "NEFTune's noise goes by the length of a row" if o.neftune_noise_alpha else cannot_pack(model, sample)
    if reason:
        level: Literal["warning", "info"] = "warning" if o.packing == "on" else "info"
        emit(Log(text=f"Rows are padded, not packed: {reason}", level=level))
        return 0
    wanted = o.micro_batch_size * longest
    budget = min(wanted, CPU_TOKEN_BUDGET) if hardware.kind == "cpu" else wanted
    why = f"micro_batch_size {o.micro_batch_size} x max_seq_len {longest}"
    if budget < wanted:
        why = f"longer ones are slower on a CPU; {why} would allow {wanted:,}"
    emit(Log(text=f"Rows are packed without padding into sequences of up to {budget:,} tokens ({why}); they do not see each other"))
    return budget


def cannot_pack(model: Any, sample: Sequence[Row]) -> str:
    """Why this model would mix packed rows up, or nothing: tried on the model itself."""
    name = type(_plain(model)).__name__
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if "position_ids" not in inspect.signature(_plain(model).forward).parameters:
        return f"{name} takes no positions"
    first, second = sample[0], sample[-1]
    length = len(second["input_ids"])
    together = packed([first, second])
    joined = {**together, "position_ids": torch.arange(together["input_ids"].shape[1])[None]}
    alone, apart, mixed = (forward(model, batch)[0, -length:] for batch in (packed([second]), together, joined))
    if not mixed.isfinite().all():
        return f"the logits of {name} are not finite, so it cannot be tried whether it keeps packed rows apart"
    if _far(apart, alone, ALIKE * (mixed - alone)):
        return f"{name} lets a row see the one before it in a pack (tried on this model)"
    return ""


def choose_attention_by_row(model: Any, sample: Sequence[Row], emit: Callable[[Event], None]) -> bool:
    """Whether packed rows are attended to one by one, without computing what the mask then hides: tried on the model itself."""
    batch = packed([sample[0], sample[-1]])
    together = forward(model, batch)
    try:
        with cpu.attention_by_row(model):
            apart = forward(model, batch)
        reason = "its logits change" if _far(apart, together, 0.05 * together) else ""
    except NotImplementedError as error:
        reason = str(error)
    said = f"not chosen: {reason} (tried on this model)" if reason else "on: each packed row is computed without the others"
    emit(Log(text=f"Attention row by row is {said}"))
    return not reason


@torch.no_grad()
def forward(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The logits of a batch in float32, without dropout, leaving the model in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        logits: torch.Tensor = model(**_model_inputs(model, batch)).logits.float()
    finally:
        model.train(was_training)
    return logits


def _model_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    names = batch.keys() - {"labels", REAL_TOKENS}
    return {name: batch[name].to(model.device) if torch.is_tensor(batch[name]) else batch[name] for name in names}


def _plain(model: Any) -> Any:
    """The model without PEFT around it, whose signature says what it takes."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Gradient checkpointing -----------------------------------------------------------------------------------------------------


def choose_checkpointing(
    model: Any, wish: str, hardware: Hardware, loss: Loss | None, row: Row, tokens: int, emit: Callable[[Event], None]
) -> bool:
    """Whether activations are computed twice instead of kept: on, off, or when those of a micro-batch would not fit."""
    if wish != "auto":
        emit(Log(text=f"Gradient checkpointing is {wish}: chosen in the form"))
        return wish == "on"
    if loss is None:
        emit(Log(text="Gradient checkpointing is on: an encoder-decoder's activations are not measured beforehand"))
        return True
    needed: float = activation_bytes(model, hardware, loss, row) * tokens / GIB
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    usable = activation_room(free_memory_gib() * GIB, trained) / GIB
    on = bool(needed > usable)
    said = "more than" if on else "within"
    emit(
        Log(
            text=f"Gradient checkpointing is {'on' if on else 'off'}: the activations of {tokens:,} tokens take about {needed:.1f} GiB, "
            f"{said} the {max(usable, 0):.1f} GiB that may be used for them"
        )
    )
    return on


def activation_bytes(model: Any, hardware: Hardware, loss: Loss, row: Row) -> float:
    """Bytes per token that a forward pass keeps for the backward pass, weighed on one row. Weights are not among them."""
    batch = packed([{**row, "labels": row["input_ids"]}])  # as if all were trained: some rows are nearly all answer
    labels = batch["labels"].to(model.device)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def weigh(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.train()
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor),
            autocast(hardware),
            loss.selecting(labels),
        ):
            outputs = model(**_model_inputs(model, batch))
            _held = loss(outputs, labels)  # as long as it is referred to, nothing that was kept is freed
    finally:
        model.train(was_training)
    return sum(kept.values()) / len(row["input_ids"])
