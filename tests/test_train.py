"""Real QLoRA on a tiny NF4 model: what it learns, measures and tells, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from training import Watched, built, logged, never, silent, trained

from qlora_ui.data import checks
from qlora_ui.engine import tokens
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import load_quantized
from qlora_ui.engine.train import encode, read_rows
from qlora_ui.events import Finished, HeldOut, Planned, Step
from qlora_ui.runs import Run, Workspace

# Loss of each of 8 steps of tiny.tiny_config on 12 rows, on a CPU in float32. They change only with what is computed:
# data order, format, masking, quantization, LoRA's start, schedule, optimizer. Then look why, before writing new ones here.
PINNED_LOSSES = [7.1763, 7.2789, 5.9358, 5.4023, 5.3225, 3.7215, 3.2942, 2.4945]
PINNED_HELD_OUT = [7.2694, 6.5542, 5.1335, 4.1630, 3.2825]


def test_the_losses_of_a_seeded_run_are_these(finished: Watched) -> None:
    assert [event.loss for event in tiny.events_of(finished.run, Step)] == pytest.approx(PINNED_LOSSES, abs=1e-3)
    assert [event.loss for event in tiny.events_of(finished.run, HeldOut)] == pytest.approx(PINNED_HELD_OUT, abs=1e-3)


def test_the_same_run_again_learns_exactly_the_same(finished: Watched, place: tuple[Workspace, Path]) -> None:
    again = trained(*place, max_steps=8)
    for kind in (Step, HeldOut):
        assert [event.loss for event in tiny.events_of(again, kind)] == [event.loss for event in tiny.events_of(finished.run, kind)]
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (finished.run, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_learns_something_else(finished: Watched, place: tuple[Workspace, Path]) -> None:
    other = trained(*place, max_steps=2, seed=7)
    assert tiny.events_of(other, Step)[0].loss != tiny.events_of(finished.run, Step)[0].loss


def test_the_held_out_loss_is_the_mean_over_assistant_tokens_of_the_quantized_base(finished: Watched) -> None:
    config = finished.run.config()
    parts = built(finished.run)
    _, held_out = checks.split(checks.load(finished.run.folder / "data"), config.data, 42)
    losses, count = 0.0, 0
    base = load_quantized(parts.found, config.quantization, detect("float32"), silent, never).eval()
    for conversation in held_out:
        prompt = tokens.prompt(parts.tokenizer, conversation.messages[:-1])
        answer = conversation.messages[-1].content + "<|im_end|>"
        before = parts.tokenizer(prompt)["input_ids"]
        spoken = parts.tokenizer(answer)["input_ids"]
        with torch.no_grad():
            logits = base(torch.tensor([before + spoken])).logits[0, len(before) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(spoken), reduction="sum").item()
        count += len(spoken)
    assert count == held_out_tokens(finished.run)
    assert tiny.events_of(finished.run, HeldOut)[0].loss == pytest.approx(losses / count, abs=1e-4)


def held_out_tokens(run: Run) -> int:
    data = read_rows(run, run.config(), silent, never)
    return encode(run, built(run).tokenizer, data, silent, never)[1].trained_tokens


def test_held_out_loss_is_measured_before_the_first_step(finished: Watched) -> None:
    events = tiny.events_of(finished.run, HeldOut, Step)
    assert isinstance(events[0], HeldOut)
    assert [event.step for event in events if isinstance(event, HeldOut)] == [0, 2, 4, 6, 8]
    assert [event.step for event in events if isinstance(event, Step)] == list(range(1, 9))
    losses = [event.loss for event in events if isinstance(event, HeldOut)]
    assert losses == sorted(losses, reverse=True)


def test_the_result_is_measured_also_when_the_last_step_is_between_two_measurements(place: tuple[Workspace, Path]) -> None:
    run = trained(*place, max_steps=3, eval_steps=100)
    assert [event.step for event in tiny.events_of(run, HeldOut)] == [0, 3]


def test_without_a_held_out_share_there_is_no_held_out_loss(place: tuple[Workspace, Path]) -> None:
    run = trained(*place, held_out_share=0, max_steps=1)
    assert run.state() == "finished"
    assert tiny.events_of(run, HeldOut) == []
    assert tiny.events_of(run, Planned)[0].held_out_rows == 0


def test_every_step_tells_its_pace_and_the_memory(finished: Watched) -> None:
    for event in tiny.events_of(finished.run, Step):
        assert event.tokens_per_second > 0
        assert event.memory_gib > 0.1
        assert event.grad_norm > 0


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"warmup_ratio": 0}, [0.01, 0.01, 0.01, 0.01]),
        ({"warmup_ratio": 0.5}, [0.0, 0.005, 0.01, 0.01]),
        ({"warmup_ratio": 0, "lr_scheduler": "linear"}, [0.01, 0.0075, 0.005, 0.0025]),
    ],
)
def test_the_learning_rate_follows_the_schedule(place: tuple[Workspace, Path], schedule: dict[str, Any], rates: list[float]) -> None:
    run = trained(*place, held_out_share=0, save_steps=100, **schedule)
    assert [event.learning_rate for event in tiny.events_of(run, Step)] == pytest.approx(rates)


@pytest.mark.parametrize(
    "values",
    [
        {"num_train_epochs": 1.5, "micro_batch_size": 3},
        {"num_train_epochs": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 0.01, "micro_batch_size": 64},
    ],
)
def test_the_number_of_steps_is_the_one_the_form_foretells(place: tuple[Workspace, Path], values: dict[str, Any]) -> None:
    run = trained(*place, max_steps=0, save_steps=100, eval_steps=100, **values)
    planned = tiny.events_of(run, Planned)[0]
    assert planned.total_steps == run.config().total_steps(planned.train_rows)
    assert tiny.events_of(run, Finished)[0].step == planned.total_steps == len(tiny.events_of(run, Step))


def test_a_loss_that_is_not_finite_is_told_and_does_not_break_the_run(place: tuple[Workspace, Path]) -> None:
    workspace, data = place
    tiny.tiny_model(workspace.models / "broken")
    weights = load_file(workspace.models / "broken" / "model.safetensors")
    weights["model.norm.weight"].fill_(float("inf"))
    save_file(weights, workspace.models / "broken" / "model.safetensors", metadata={"format": "pt"})
    run = trained(workspace, data, model="broken", max_steps=2)
    assert [event.loss for event in tiny.events_of(run, Step)] == [None, None]
    assert "step 0: the held-out loss is not finite" in logged(run)
    assert run.state() == "finished"
