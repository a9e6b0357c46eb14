"""Gradient checkpointing: on, off, or when the activations would not fit; it changes memory, not what is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_packing import logged, nf4, row, trained
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_ui.config import RunConfig
from qlora_ui.engine import step_plan
from qlora_ui.engine.batches import packed
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.loss import Loss
from qlora_ui.engine.step_plan import activation_bytes
from qlora_ui.engine.tokens import REAL_TOKENS
from qlora_ui.errors import UserError
from qlora_ui.events import HeldOut, Step
from qlora_ui.runs import Workspace


@pytest.mark.parametrize(("free_gib", "chosen", "said"), [(100, "off", "within the 50.0 GiB"), (0, "on", "more than the 0.0 GiB")])
def test_auto_asks_whether_the_activations_fit(
    tiny_workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, chosen: str, said: str
) -> None:
    monkeypatch.setattr(step_plan, "free_memory_gib", lambda: free_gib)
    run = trained(tiny_workspace, rows, max_steps=1)
    assert f"Gradient checkpointing is {chosen}: the activations of 256 tokens take about" in logged(run)
    assert said in logged(run)
    assert run.state() == "finished"


def test_what_is_chosen_reaches_the_model_and_changes_nothing_that_is_learned(
    tiny_workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = 0
    original = LlamaMLP.forward

    def counted(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal computed
        computed += self.training
        return original(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    curves, counts = {}, {}
    for wish in ("on", "off"):
        computed = 0
        run = trained(tiny_workspace, rows, gradient_checkpointing=wish, max_steps=2)
        assert f"Gradient checkpointing is {wish}: chosen in the form" in logged(run)
        curves[wish] = [event.loss for event in tiny.events_of(run, Step, HeldOut)]
        counts[wish] = computed
    assert counts == {"on": 8, "off": 4}  # of two layers in two steps
    assert curves["on"] == pytest.approx(curves["off"], abs=1e-4)


def test_activations_are_weighed_as_torch_keeps_them(tiny_workspace: Workspace) -> None:
    """Against the arithmetic of what the tiny Llama must keep at the least, and against twice as many tokens."""
    model = nf4(tiny_workspace)
    loss = Loss(head=model.get_output_embeddings())
    hardware = detect("float32")
    per_token = activation_bytes(model, hardware, loss, row(60, 1))
    hidden, inner, layers, vocabulary = 64, 128, 2, model.config.vocab_size
    # A layer's inputs to its seven adapters, what the two norms and the SwiGLU multiply; then the logits' softmax.
    least = 4 * (layers * (4 * hidden + 3 * inner) + vocabulary)
    assert least < per_token < 5 * least
    assert activation_bytes(model, hardware, loss, row(120, 2)) == pytest.approx(per_token, rel=0.05)


def test_weighing_leaves_no_gradient_no_mode_and_no_random_number_behind(tiny_workspace: Workspace) -> None:
    model = nf4(tiny_workspace).eval()
    batch = {name: value for name, value in packed([row(20, 3)]).items() if name != REAL_TOKENS}
    before = model(**batch).logits
    activation_bytes(model, detect("float32"), Loss(head=model.get_output_embeddings()), row(60, 1))
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize(
    ("written", "read"), [(True, "on"), ("true", "on"), ("Yes", "on"), (False, "off"), ("off", "off"), ("auto", "auto")]
)
@pytest.mark.parametrize("name", ["gradient_checkpointing", "packing"])
def test_older_and_yaml_spellings_of_a_switch_are_read(name: str, written: object, read: str) -> None:
    assert RunConfig().with_values({name: written}).values()[name] == read
    old = RunConfig().to_dict()
    old["optimization"][name] = written
    assert RunConfig.from_dict(old).values()[name] == read


def test_a_switch_that_is_no_choice_is_one_sentence() -> None:
    with pytest.raises(UserError, match="gradient_checkpointing is 'maybe': use one of auto, on, off"):
        RunConfig().with_values({"gradient_checkpointing": "maybe"})
