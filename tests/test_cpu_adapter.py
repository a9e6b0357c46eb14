"""A 4-bit layer computed at once with its adapter is the layer that PEFT computes in steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_packing import trained

from qlora_ui.engine import cpu, cpu_adapter, step_plan
from qlora_ui.engine.adapter import add_adapter
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import find_here, load_quantized
from qlora_ui.events import HeldOut, Step
from qlora_ui.runs import Workspace

IDS = torch.randint(3, 200, (2, 30), generator=torch.Generator().manual_seed(1))


def adapted(workspace: Workspace, name: str = tiny.NAME, **values: Any) -> Any:
    """A model in training whose adapters change something, with the dropout that a run on a CPU has."""
    config = tiny.tiny_config("none", **values)
    found = find_here(name, "main", workspace.models)
    assert found is not None
    hardware = detect(config.quantization.compute_dtype)
    base = load_quantized(found, config.quantization, hardware, lambda event: None, lambda: False)
    model: Any = add_adapter(base, config.adapter, 0)
    torch.manual_seed(3)
    for weights_name, weights in model.named_parameters():
        if "lora_B" in weights_name:
            torch.nn.init.normal_(weights, std=0.05)
    cpu.draw_dropout_faster(model)
    return model.train()


def computed(model: Any, dtype: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients, with the same random numbers each time."""
    torch.manual_seed(7)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(input_ids=IDS).logits
    logits.float().log_softmax(-1)[..., 5].mean().backward()
    return logits.detach(), {name: weights.grad.clone() for name, weights in model.named_parameters() if weights.grad is not None}


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).float().norm() / other.float().norm()).item()


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-5), ("bfloat16", 0.08)])
@pytest.mark.parametrize("values", [{}, {"lora_dropout": 0.2}, {"quant_type": "fp4", "quant_storage": "bfloat16", "use_rslora": True}])
def test_logits_and_gradients_are_those_of_peft(tiny_workspace: Workspace, dtype: str, apart: float, values: dict[str, Any]) -> None:
    model = adapted(tiny_workspace, compute_dtype=dtype, **values)
    logits, gradients = computed(model, dtype)
    assert cpu_adapter.compute_at_once(model) == 14
    at_once, its_gradients = computed(model, dtype)
    assert far(at_once, logits) < apart
    assert its_gradients.keys() == gradients.keys()
    assert {weights.dtype for weights in its_gradients.values()} == {torch.float32}
    assert max(far(its_gradients[name], gradients[name]) for name in gradients) < apart


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_kept_out_of_their_4_bits_change_no_bit_and_are_not_saved(tiny_workspace: Workspace, dtype: str) -> None:
    model = adapted(tiny_workspace, compute_dtype=dtype, lora_dropout=0.2)
    cpu_adapter.compute_at_once(model)
    before, saved = computed(model, dtype), set(model.state_dict())
    cpu_adapter.keep_plain(model)
    kept = [getattr(layer.base_layer, cpu_adapter.KEPT) for layer in cpu_adapter.adapted_layers(model)]
    after = computed(model, dtype)
    assert sum(weights.nbytes for weights in kept) == cpu_adapter.plain_bytes(model) > 0
    assert {weights.dtype for weights in kept} == {getattr(torch, dtype)}
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][name], gradient) for name, gradient in before[1].items())
    assert set(model.state_dict()) == saved


@pytest.mark.parametrize(("free_gib", "is_kept"), [(16.0, True), (1e-6, False)])
def test_weights_are_kept_out_of_their_4_bits_where_memory_allows_and_the_log_says_so(
    tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, free_gib: float, is_kept: bool
) -> None:
    model, told = adapted(tiny_workspace), []
    monkeypatch.setattr(step_plan, "free_memory_gib", lambda: free_gib)
    step_plan.choose_plain_weights(model, told.append)
    assert [hasattr(layer.base_layer, cpu_adapter.KEPT) for layer in cpu_adapter.adapted_layers(model)] == [is_kept] * 14
    assert [event.text for event in told] == (
        ["The 4-bit weights are kept out of their 4 bits too: 0.00 of the 16.0 GiB that are free"] * is_kept
    )


def test_a_layer_with_a_bias_keeps_it_frozen_or_learned(tiny_workspace: Workspace) -> None:
    tiny.tiny_model_with_biases(tiny_workspace.models / "biased")
    for bias in ("none", "all"):
        model = adapted(tiny_workspace, "biased", lora_bias=bias)
        logits, gradients = computed(model, "float32")
        cpu_adapter.compute_at_once(model)
        at_once, its_gradients = computed(model, "float32")
        assert far(at_once, logits) < 1e-5
        assert its_gradients.keys() == gradients.keys()
        assert all(far(its_gradients[name], gradients[name]) < 1e-5 for name in gradients)


def test_what_is_no_plain_adapter_is_left_to_peft(tiny_workspace: Workspace) -> None:
    for values in ({"use_dora": True}, {"quant_bits": "8"}, {"quant_bits": "16"}):
        assert cpu_adapter.compute_at_once(adapted(tiny_workspace, **values)) == 0


def test_without_its_adapter_and_outside_training_a_model_is_what_it_was(tiny_workspace: Workspace) -> None:
    model = adapted(tiny_workspace, lora_dropout=0.2).eval()
    with torch.no_grad():
        tuned = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
        cpu_adapter.compute_at_once(model)
        assert torch.equal(model(IDS).logits, tuned)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_run_learns_the_same_step_by_step(
    tiny_workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    values = {"lora_dropout": 0.1, "gradient_checkpointing": checkpointing}
    at_once = trained(tiny_workspace, rows, **values)
    monkeypatch.setattr(step_plan.cpu_adapter, "compute_at_once", lambda model: 0)
    in_steps = trained(tiny_workspace, rows, **values)
    for kind in (Step, HeldOut):
        one, other = ([event.loss for event in tiny.events_of(run, kind)] for run in (at_once, in_steps))
        assert len(one) >= 3
        assert one == pytest.approx(other, abs=1e-4)
