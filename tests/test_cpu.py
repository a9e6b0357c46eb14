"""What is quicker on a CPU is still the same: dropout that drops its share, attention that each packed row has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_packing import nf4, row
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_ui.engine import cpu
from qlora_ui.engine.batches import packed
from qlora_ui.engine.step_plan import choose_attention_by_row, forward
from qlora_ui.events import Event
from qlora_ui.runs import Workspace


def said(model: Any) -> str:
    heard: list[Event] = []
    choose_attention_by_row(model, [row(20, 1), row(9, 2)], heard.append)
    (event,) = heard
    return str(getattr(event, "text", ""))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dropped = cpu.Dropout(share)(torch.ones(501, 1001, dtype=dtype))
    assert dropped.dtype == dtype
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.005)
    assert dropped[dropped != 0].unique().tolist() == pytest.approx([1 / (1 - share)], rel=0.01)
    columns = (dropped == 0).float().mean(0)  # of the four elements that share a draw none is special
    assert [columns[place::4].mean().item() for place in range(4)] == pytest.approx([share] * 4, abs=0.01)


def test_dropout_is_repeated_by_its_seed_has_a_gradient_and_rests_outside_training() -> None:
    dropout, values = cpu.Dropout(0.3), torch.ones(7, 11, requires_grad=True)
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(dropout(values))
    assert torch.equal(drawn[0], drawn[1])
    drawn[0].sum().backward()
    assert torch.equal(values.grad, drawn[0].detach())
    assert dropout.eval()(values) is values


def test_only_an_adapters_dropout_is_replaced(tiny_workspace: Workspace) -> None:
    model = nf4(tiny_workspace)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.25)
    model.get_base_model().outside = torch.nn.Dropout(0.5)
    cpu.draw_dropout_faster(model)
    assert {type(d): d.p for m in model.modules() for d in getattr(m, "lora_dropout", {}).values()} == {cpu.Dropout: 0.25}
    assert isinstance(model.get_base_model().outside, torch.nn.Dropout)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_row_by_row_is_that_of_each_row_alone(dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SHORT_ROW", 12)  # so that of these rows one is long
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).to(dtype)
    rows = [row(length, seed) for seed, length in enumerate((9, 17, 1, 12))]
    alone = torch.cat([forward(model, packed([one])) for one in rows], 1)
    with cpu.attention_by_row(model):
        together = forward(model, packed(rows))
    assert model.config._attn_implementation == "sdpa"
    assert (together - alone).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)


def test_attention_that_is_more_than_a_softmax_is_left_alone(tiny_workspace: Workspace) -> None:
    assert said(nf4(tiny_workspace)) == "Attention row by row is on: each packed row is computed without the others"
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    told = said(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert told == "Attention row by row is not chosen: its attention is told of softcap (tried on this model)"


def test_a_model_whose_attention_does_not_ask_for_it_is_found_out(tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nf4(tiny_workspace)
    monkeypatch.setattr(cpu, "BY_ROW", "sdpa_without_mask")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    AttentionMaskInterface.register("sdpa_without_mask", lambda *_, **__: None)
    assert "not chosen: its logits change" in said(model)


def test_packed_rows_have_the_gradients_that_they_have_under_a_mask(tiny_workspace: Workspace) -> None:
    model = nf4(tiny_workspace)
    batch = packed([row(20, 1), row(9, 2), row(30, 3)])
    batch = {key: value for key, value in batch.items() if key in ("input_ids", "position_ids", "use_cache")}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).logits.float().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    masked = gradients()
    with cpu.attention_by_row(model):
        by_row = gradients()
    assert masked.keys() == by_row.keys()
    assert all(torch.allclose(by_row[name], masked[name], atol=1e-6) for name in masked)
