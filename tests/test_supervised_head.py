"""Logits of trained tokens only: the same loss and gradients, far fewer logits, and the plain way where that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from test_packing import nf4, row, trained

from qlora_ui.engine.batches import packed
from qlora_ui.engine.loss import Loss, SummedCrossEntropy, predicting
from qlora_ui.engine.step_plan import choose_loss
from qlora_ui.engine.tokens import REAL_TOKENS, Collator
from qlora_ui.events import Log, Step
from qlora_ui.runs import Workspace

ROWS = [row(length, seed) for seed, length in enumerate((31, 4, 12))]


def batch_of(kind: str) -> dict[str, Any]:
    batch = packed(ROWS) if kind == "packed" else dict(Collator(0)(ROWS))
    batch.pop(REAL_TOKENS)
    return batch


def loss_and_gradients(model: Any, loss: Loss, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    batch = batch_of(kind)
    labels = batch.pop("labels")
    model.zero_grad()
    with loss.selecting(labels):
        value = loss(model(**batch), labels)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def model_with(head: str, workspace: Workspace) -> Any:
    """The tiny NF4 model with a head that is tied to the embeddings, its own, or its own and in 4 bits."""
    if head == "tied":
        return nf4(workspace)
    tiny.tiny_model(workspace.models / "untied", tied=False)
    model = nf4(workspace, "untied")
    base = model.get_base_model()
    if head == "NF4":
        plain = base.lm_head
        quantized = Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        quantized.load_state_dict(plain.state_dict())
        quantized.support_avx512bf16_for_cpu = False
        base.lm_head = quantized.to("cpu").requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("head", ["tied", "untied", "NF4"])
def test_selected_logits_give_the_loss_and_gradients_of_all_logits(tiny_workspace: Workspace, head: str, kind: str) -> None:
    model = model_with(head, tiny_workspace).train()
    selected = Loss(head=model.get_output_embeddings())
    loss, gradients = loss_and_gradients(model, selected, kind)
    plain, expected = loss_and_gradients(model, Loss(head=None), kind)
    batch = batch_of(kind)
    assert loss == pytest.approx(plain, abs=1e-5)
    assert loss == pytest.approx(model(**batch).loss.item(), abs=1e-5)
    assert gradients.keys() == expected.keys()
    assert gradients
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_there_are_as_many_logits_as_trained_tokens(tiny_workspace: Workspace, kind: str) -> None:
    model = nf4(tiny_workspace)
    loss = Loss(head=model.get_output_embeddings())
    batch = batch_of(kind)
    labels = batch.pop("labels")
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with loss.selecting(labels):
        model(**batch)
    model(**batch)
    vocabulary = model.config.vocab_size
    trained_tokens = sum(label >= 0 for one in ROWS for label in one["labels"][1:])
    assert int(predicting(labels).sum()) == trained_tokens
    assert seen == [(1, trained_tokens, vocabulary), (*labels.shape, vocabulary)]  # and all of them once it is over


def test_the_loss_is_float32_when_the_logits_are_not() -> None:
    logits = torch.randn(1, 6, 50).bfloat16()
    labels = torch.tensor([[-100, 4, 5, -100, 7, 8]])
    expected = torch.nn.functional.cross_entropy(logits[0, [0, 1, 3, 4]].float(), torch.tensor([4, 5, 7, 8]), reduction="sum")
    value = Loss(head=None)({"logits": logits}, labels, num_items_in_batch=10)
    assert value.dtype == torch.float32
    assert value == pytest.approx(expected / 10)


def test_a_model_without_a_head_of_its_own_makes_all_logits_and_the_log_says_so(
    tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nf4(tiny_workspace)
    said: list[Log] = []
    monkeypatch.setattr(type(model.get_base_model()), "get_output_embeddings", lambda self: None)
    loss = choose_loss(model, ROWS[0], said.append)  # type: ignore[arg-type]
    assert loss is not None
    assert loss.head is None
    assert [log.text for log in said] == [
        "LlamaForCausalLM has no head of its own to select tokens for: logits are computed for all of them"
    ]


def test_a_head_that_is_not_where_the_logits_come_from_is_found_out(tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nf4(tiny_workspace)
    said: list[Log] = []
    aside = torch.nn.Linear(64, model.config.vocab_size)
    monkeypatch.setattr(type(model.get_base_model()), "get_output_embeddings", lambda self: aside)
    loss = choose_loss(model, ROWS[0], said.append)  # type: ignore[arg-type]
    assert loss is not None
    assert loss.head is None


def test_a_run_with_all_logits_learns_the_same(tiny_workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selected = trained(tiny_workspace, rows)
    monkeypatch.setattr("qlora_ui.engine.step_plan._same_logits", lambda *_: False)
    plain = trained(tiny_workspace, rows)
    assert "logits are computed for all of them" in " ".join(event.text for event in tiny.events_of(plain, Log))
    one, other = ([event.loss for event in tiny.events_of(run, Step)] for run in (selected, plain))
    assert one == pytest.approx(other, abs=1e-4)


def test_the_logits_of_a_run_stay_in_the_compute_dtype(tiny_workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer's accelerate would copy them, the largest tensor of all, to float32."""
    met: list[tuple[bool, torch.dtype]] = []
    plain = Loss.__call__

    def looked_at(self: Loss, outputs: Any, *rest: Any, **named: Any) -> torch.Tensor:
        met.append((torch.is_grad_enabled(), outputs["logits"].dtype))
        return plain(self, outputs, *rest, **named)

    monkeypatch.setattr(Loss, "__call__", looked_at)
    run = trained(tiny_workspace, rows, compute_dtype="bfloat16", max_steps=1, gradient_checkpointing="off")
    assert run.state() == "finished", tiny.events_of(run)[-1]
    assert set(met) == {(True, torch.bfloat16), (False, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 64, 150])
def test_the_loss_a_few_tokens_at_a_time_is_cross_entropy(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(tokens, 300) * 4).to(dtype).requires_grad_()
    words = torch.randint(0, 300, (tokens,))
    plain = torch.nn.functional.cross_entropy(logits.float(), words, reduction="sum")
    (expected,) = torch.autograd.grad(plain * 1024, logits)
    summed: Any = SummedCrossEntropy.apply(logits, words)  # type: ignore[no-untyped-call]
    (gradient,) = torch.autograd.grad(summed * 1024, logits)
    assert summed.item() == pytest.approx(plain.item(), rel=1e-5)
    assert gradient.dtype == dtype
    assert torch.allclose(gradient, expected, rtol=1e-2, atol=1e-4)
