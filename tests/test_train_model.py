"""Real QLoRA on a tiny NF4 model: how the base is stored, what is adapted, what learns and what stays frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from training import Parts, built, logged, trained

from qlora_ui.engine import tokens
from qlora_ui.events import HeldOut
from qlora_ui.runs import Workspace


def quantized(model: Any) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_the_base_is_nf4_with_double_quantization(place: tuple[Workspace, Path]) -> None:
    model = built(tiny.tiny_run(*place)).model
    layers = quantized(model)
    assert len(layers) == 2 * len(LINEAR)
    for module in layers.values():
        assert module.weight.dtype == torch.uint8
        assert module.weight.quant_state.quant_type == "nf4"
        assert module.weight.quant_state.nested
        assert module.weight.numel() * 2 == module.weight.quant_state.shape.numel()
        assert module.compute_dtype == torch.float32


def test_only_lora_is_trained_on_every_linear_layer_and_the_base_stays_bit_for_bit(place: tuple[Workspace, Path]) -> None:
    parts = built(tiny.tiny_run(*place, max_steps=4))
    adapted = {name for name, module in parts.model.named_modules() if hasattr(module, "lora_A")}
    blocks = [f"base_model.model.model.layers.{layer}" for layer in (0, 1)]
    expected = {f"{block}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}" for block in blocks for name in LINEAR}
    assert adapted == expected
    learners = {name for name, parameter in parts.model.named_parameters() if parameter.requires_grad}
    assert learners == {f"{name}.lora_{side}.default.weight" for name in adapted for side in "AB"}
    assert all(parameter.dtype == torch.float32 for parameter in parts.model.parameters() if parameter.requires_grad)

    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    parts.trainer.train()
    after = parts.model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == learners


def gradients(parts: Parts) -> dict[str, torch.Tensor]:
    """Of every B side (the A sides have none while B is zero), over the first training rows."""
    batch = tokens.Collator(parts.tokenizer.pad_token_id)([parts.trainer.train_dataset[index] for index in range(4)])
    batch.pop(tokens.REAL_TOKENS)
    parts.model.train()
    parts.model.zero_grad()
    parts.model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in parts.model.named_parameters() if "lora_B" in name}


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_an_evaluation_leaves_the_gradients_of_every_layer_as_they_were(place: tuple[Workspace, Path], compute_dtype: str) -> None:
    """On CPUs with avx512_bf16 bitsandbytes repacks weights in eval mode, for a kernel that has no backward pass."""
    parts = built(tiny.tiny_run(*place, compute_dtype=compute_dtype))
    before = gradients(parts)
    parts.trainer.evaluate()
    after = gradients(parts)
    assert len(before) == 2 * len(LINEAR)
    for name in before:
        assert before[name].norm() > 1e-4, name
        # Trainer wraps the model in autocast when it first evaluates, so the last bits of bfloat16 may differ.
        assert (before[name] - after[name]).norm() < 0.02 * before[name].norm(), name


def test_the_adapter_learns_in_every_layer_in_bfloat16(place: tuple[Workspace, Path]) -> None:
    run = trained(*place, compute_dtype="bfloat16", max_steps=4)
    assert tiny.events_of(run, HeldOut)[0].step == 0
    weights = load_file(run.adapter / "adapter_model.safetensors")
    b_sides = {name: weight for name, weight in weights.items() if "lora_B" in name}
    assert len(b_sides) == 2 * len(LINEAR)
    assert [name for name, weight in b_sides.items() if not weight.abs().max() > 0] == []


def test_chosen_target_modules_are_the_only_ones_adapted(place: tuple[Workspace, Path]) -> None:
    run = trained(*place, target_modules="q_proj, v_proj", max_steps=1, quant_type="fp4", double_quant=False)
    assert len(load_file(run.adapter / "adapter_model.safetensors")) == 2 * 2 * 2
    assert "LoRA rank 4 on 4 linear layers" in " ".join(logged(run, "info"))
    assert "FP4 without double quantization" in " ".join(logged(run, "info"))


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_torch"])
def test_the_other_optimizers_train_too(place: tuple[Workspace, Path], optimizer: str) -> None:
    run = trained(*place, optimizer=optimizer, gradient_checkpointing="off", lr_scheduler="cosine")
    assert run.state() == "finished"
    assert tiny.events_of(run, HeldOut)[-1].loss < tiny.events_of(run, HeldOut)[0].loss
