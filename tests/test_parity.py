"""Fifty steps against a plain PyTorch loop that is written here and shares none of the engine's training code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_ui import jobs
from qlora_ui.engine.train import train
from qlora_ui.events import Step
from qlora_ui.runs import Workspace

STEPS, ROWS, ACCUMULATED = 50, 3, 2
RATE, BETA1, BETA2, EPSILON, DECAY, MAX_NORM, WARMUP = 0.003, 0.9, 0.95, 1e-6, 0.1, 0.3, 5


def plain_model(folder: Path) -> Any:
    """The same base and the same start of the adapter."""
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, dtype=torch.float32).requires_grad_(False)
    torch.manual_seed(42)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def padded(rows: list[dict[str, list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids, labels, mask = torch.zeros(3, len(rows), width, dtype=torch.long)
    labels.fill_(-1)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        labels[index, :length] = torch.tensor(row["labels"]).clamp(min=-1)
        mask[index, :length] = 1
    return ids, labels, mask


def rate(step: int) -> float:
    """Linear warm-up, then half a cosine down."""
    if step < WARMUP:
        return RATE * step / WARMUP
    return RATE * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def plain_loop(model: Any, batches: list[list[dict[str, list[int]]]]) -> list[float]:
    """Cross-entropy summed over a step's trained tokens and divided by their number, clipping, AdamW: all by hand."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    losses = []
    for step in range(STEPS):
        micro_batches = [padded(rows) for rows in batches[step * ACCUMULATED : (step + 1) * ACCUMULATED]]
        count = sum(int((labels[:, 1:] >= 0).sum()) for _, labels, _ in micro_batches)
        total = 0.0
        for ids, labels, mask in micro_batches:
            scores = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            trained = labels[:, 1:] >= 0
            loss = -scores.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)[trained].sum() / count
            loss.backward()
            total += loss.item()
        losses.append(total)
        norm = torch.stack([weight.grad.square().sum() for weight in weights]).sum().sqrt()
        with torch.no_grad():
            for weight, mean, square in zip(weights, means, squares, strict=True):
                gradient = weight.grad * min(1.0, MAX_NORM / (norm.item() + 1e-6))
                weight.mul_(1 - rate(step) * DECAY)
                mean.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
                square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
                unbiased = (square / (1 - BETA2 ** (step + 1))).sqrt() + EPSILON
                weight.sub_(rate(step) * (mean / (1 - BETA1 ** (step + 1))) / unbiased)
                weight.grad = None
    return losses


def test_fifty_losses_and_the_weights_after_them_are_those_of_a_plain_loop(tiny_workspace: Workspace, tmp_path: Path) -> None:
    run = tiny.tiny_run(
        tiny_workspace,
        tiny.tiny_rows(tmp_path / "rows.json", 40),
        max_steps=STEPS,
        micro_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATED,
        held_out_share=0,
        optimizer="adamw_torch",
        learning_rate=RATE,
        adam_beta1=BETA1,
        adam_beta2=BETA2,
        adam_epsilon=EPSILON,
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        warmup_steps=WARMUP,
        lr_scheduler="cosine",
        save_steps=1000,
    )
    jobs.execute(run, train)
    told = [event.loss for event in tiny.events_of(run, Step)]
    assert len(told) == STEPS

    model = plain_model(tiny_workspace.models / tiny.NAME)
    losses = plain_loop(model, met_batches(run))
    assert told == pytest.approx(losses, abs=1e-4)
    assert told[-1] < told[0] / 2
    saved = load_file(run.adapter / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (saved[name.replace(".default", "")] - parameter).abs().max() < 1e-3, name


def met_batches(run: Any) -> list[list[dict[str, list[int]]]]:
    """The rows of every micro-batch, in the order in which the engine's loader hands them out, epoch by epoch."""
    trainer = tiny.tiny_trainer(run)
    loader = trainer.get_train_dataloader()
    batches: list[list[dict[str, list[int]]]] = []
    for epoch in range(1000):
        if len(batches) >= STEPS * ACCUMULATED:
            break
        loader.set_epoch(epoch)
        for step in loader:
            rows = tiny.rows_of_step(step)
            each = -(-len(rows) // ACCUMULATED)
            batches += [rows[first : first + each] for first in range(0, len(rows), each)]
        assert len(batches) % ACCUMULATED == 0, "a step at the end of an epoch would have fewer micro-batches"
    return batches
