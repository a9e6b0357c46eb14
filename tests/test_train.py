"""Real QLoRA on a tiny NF4 model: what is learned, what stays frozen, what is kept, and how it stops."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file

from qlora_ui import jobs
from qlora_ui.data import checks
from qlora_ui.engine import tokens
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import Found, add_adapter, find_here, load_quantized, load_tokenizer
from qlora_ui.engine.train import encode, make_trainer, read_rows, train
from qlora_ui.events import (
    AdapterSaved,
    CheckpointSaved,
    Event,
    Failed,
    Finished,
    HeldOut,
    Log,
    Phase,
    Planned,
    Step,
    Stopped,
    StopRequested,
)
from qlora_ui.runs import Run, Workspace

# Loss of each of 8 steps of tiny.tiny_config on 12 rows, on a CPU in float32. They change only with what is computed:
# data order, format, masking, quantization, LoRA's start, schedule, optimizer. Then look why, before writing new ones here.
PINNED_LOSSES = [7.1763, 7.2789, 5.9358, 5.4023, 5.3225, 3.7215, 3.2942, 2.4945]
PINNED_HELD_OUT = [7.2694, 6.5542, 5.1335, 4.1630, 3.2825]


def never() -> bool:
    return False


def silent(event: Event) -> None:
    pass


def trained(workspace: Workspace, data: Path, **values: Any) -> Run:
    """A run that was trained to its end, or to its failure."""
    run = tiny.tiny_run(workspace, data, **values)
    jobs.execute(run, train)
    return run


def logged(run: Run, level: str = "warning") -> list[str]:
    return [event.text for event in tiny.events_of(run, Log) if event.level == level]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    """A workspace with the tiny model and a file of 12 rows, for the runs that are only looked at."""
    folder = tmp_path_factory.mktemp("train")
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    return workspace, tiny.tiny_rows(folder / "rows.json")


@dataclass
class Watched:
    """A finished run, and what lay in its folder at the moment each checkpoint was reported."""

    run: Run
    at_checkpoint: dict[str, set[str]]
    checkpoints_there: list[list[str]]


@pytest.fixture(scope="module")
def finished(place: tuple[Workspace, Path]) -> Watched:
    run = tiny.tiny_run(*place, max_steps=8)
    watched = Watched(run=run, at_checkpoint={}, checkpoints_there=[])

    def emit(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            watched.at_checkpoint[event.name] = {path.name for path in (run.folder / event.name).iterdir()}
            watched.checkpoints_there.append(sorted(path.name for path in run.folder.glob("checkpoint-*")))
        run.append(event)

    train(run, emit, never)
    return watched


# The loss ---------------------------------------------------------------------------------------------------------------


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


def test_eight_rows_at_once_learn_the_same_as_eight_accumulated(tiny_workspace: Workspace, tmp_path: Path) -> None:
    data = tiny.tiny_rows(tmp_path / "rows.json", 40)
    at_once = trained(tiny_workspace, data, micro_batch_size=8, gradient_accumulation_steps=1)
    accumulated = trained(tiny_workspace, data, micro_batch_size=1, gradient_accumulation_steps=8)
    for kind in (Step, HeldOut):
        one, other = ([event.loss for event in tiny.events_of(run, kind)] for run in (at_once, accumulated))
        assert len(one) >= 3
        assert one == pytest.approx(other, abs=1e-4)


def test_the_held_out_loss_is_the_mean_over_assistant_tokens_of_the_quantized_base(finished: Watched) -> None:
    config = finished.run.config()
    parts = built(finished.run)
    _, held_out = checks.split(checks.load(finished.run.folder / "data").conversations, config.data.held_out_share, 42)
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
    config = run.config()
    _, held_out = read_rows(run, config, silent, never)
    return encode(built(run).tokenizer, held_out, config, silent, never).trained_tokens


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


# The model --------------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """What `train` puts together on its way, for tests that look inside."""

    found: Found
    tokenizer: Any
    model: Any
    trainer: Any


def built(run: Run) -> Parts:
    config = run.config()
    found = find_here(config.model.model, config.model.revision, run.workspace.models)
    assert found is not None
    hardware = detect(config.quantization.compute_dtype)
    tokenizer = load_tokenizer(found)
    tokens.set_prompt_format(tokenizer, config.data.prompt_format)
    train_set, held_out_set = read_rows(run, config, silent, never)
    rows = [encode(tokenizer, part, config, silent, never) for part in (train_set, held_out_set)]
    model = add_adapter(load_quantized(found, config.quantization, hardware, silent, never), config.adapter, config.optimization.seed)
    trainer = make_trainer(run, config, hardware, model, tokenizer, rows[0], rows[1], silent, never)
    return Parts(found=found, tokenizer=tokenizer, model=model, trainer=trainer)


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
    batch = parts.trainer.data_collator([parts.trainer.train_dataset[index] for index in range(4)])
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
    run = trained(*place, optimizer=optimizer, gradient_checkpointing=False, lr_scheduler="cosine")
    assert run.state() == "finished"
    assert tiny.events_of(run, HeldOut)[-1].loss < tiny.events_of(run, HeldOut)[0].loss


# What is left on disk -----------------------------------------------------------------------------------------------------

COMPLETE = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_a_checkpoint_is_complete_when_it_is_reported_and_only_the_newest_are_kept(finished: Watched) -> None:
    assert list(finished.at_checkpoint) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert [name for name, files in finished.at_checkpoint.items() if not files >= COMPLETE] == []
    assert finished.checkpoints_there == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
        ["checkpoint-6", "checkpoint-8"],
    ]
    assert [folder.name for folder in finished.run.checkpoints()] == ["checkpoint-6", "checkpoint-8"]
    for folder in finished.run.checkpoints():
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == int(folder.name.split("-")[1])


def test_the_last_checkpoint_is_the_adapter(finished: Watched) -> None:
    last, adapter = (load_file(folder / "adapter_model.safetensors") for folder in (finished.run.checkpoints()[-1], finished.run.adapter))
    assert all(torch.equal(last[name], adapter[name]) for name in adapter | last)


def test_the_run_folder_holds_what_a_person_needs_to_know_of_it(finished: Watched) -> None:
    run = finished.run
    assert isinstance(tiny.events_of(run)[-1], Finished)
    assert [event.step for event in tiny.events_of(run, AdapterSaved)] == [8]
    assert [event.name for event in tiny.events_of(run, Phase)] == [
        "reading",
        "fetching",
        "loading",
        "tokenizing",
        "quantizing",
        "training",
        "saving",
    ]
    assert run.facts()["model_origin"] == "already in the workspace"
    assert run.facts()["data_fingerprint"] == checks.load(run.folder / "data").report.fingerprint
    planned = tiny.events_of(run, Planned)[0]
    assert (planned.train_rows, planned.held_out_rows, planned.total_steps) == (10, 2, 8)
    assert 0 < planned.trained_tokens < planned.tokens
    template = (run.adapter / "chat_template.jinja").read_text()
    assert template == tokens.TEMPLATES["chatml"]
    assert not list(run.folder.glob("*.partial"))


ELSEWHERE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
adapter = sys.argv[1]
model = json.load(open(adapter + "/adapter_config.json"))["base_model_name_or_path"]
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(adapter)
turns = [{"role": "user", "content": "Question 1: which word is 1?"}]
ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
with torch.no_grad():
    untuned = base(ids).logits[0, -1]
    tuned = PeftModel.from_pretrained(base, adapter).eval()(ids).logits[0, -1]
print(json.dumps({"ids": ids[0].tolist(), "difference": (tuned - untuned).abs().max().item(),
                  "ours": [name for name in sys.modules if name.startswith("qlora_ui")]}))
"""


def test_the_adapter_loads_in_plain_peft_where_this_app_is_not(finished: Watched, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ELSEWHERE, str(finished.run.adapter)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ours"] == []
    assert told["difference"] > 0.1
    tokenizer = built(finished.run).tokenizer
    asked = "<|im_start|>user\nQuestion 1: which word is 1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(told["ids"]) == asked


# Stop -------------------------------------------------------------------------------------------------------------------

Stop = Callable[[list[Event], int], bool]
"""Whether to stop, by what was told so far and by how often it was asked since the last event."""


def stopped_when(workspace: Workspace, data: Path, stop: Stop, **values: Any) -> Run:
    """A run whose owner's wish to stop depends on where it is."""
    run = tiny.tiny_run(workspace, data, **values)
    told: list[Event] = []
    asked = 0

    def emit(event: Event) -> None:
        nonlocal asked
        told.append(event)
        asked = 0
        run.append(event)
        should_stop()

    def should_stop() -> bool:
        nonlocal asked
        if not run.stop_requested() and stop(told, asked):
            run.request_stop()
        asked += 1
        return run.stop_requested()

    jobs.execute(run, lambda run, _emit, _stop: train(run, emit, should_stop))
    return run


def phase_is(name: str) -> Stop:
    return lambda told, asked: bool(told) and [event.name for event in told if isinstance(event, Phase)][-1:] == [name]


@pytest.mark.parametrize(
    ("phase", "comes_no_more"),
    [
        ("reading", "fetching"),
        ("fetching", "quantizing"),
        ("loading", "quantizing"),
        ("tokenizing", "quantizing"),
        ("quantizing", "training"),
    ],
)
def test_stop_before_the_training_ends_the_run_without_an_adapter(place: tuple[Workspace, Path], phase: str, comes_no_more: str) -> None:
    run = stopped_when(*place, phase_is(phase))
    assert comes_no_more not in [event.name for event in tiny.events_of(run, Phase)]
    assert_stopped(run, step=0, total_steps=0)


def assert_stopped(run: Run, step: int, total_steps: int) -> None:
    last = tiny.events_of(run)[-1]
    assert isinstance(last, Stopped)
    assert (last.step, last.total_steps, last.adapter_saved) == (step, total_steps, step > 0)
    assert run.adapter.is_dir() == (step > 0)
    assert len(tiny.events_of(run, Step)) == step
    assert len(tiny.events_of(run, StopRequested)) == 1
    assert not list(run.folder.glob("*.partial"))
    if step:
        weights = load_file(run.adapter / "adapter_model.safetensors")
        assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def last_is(kind: type[Event], asked_times: int = 1, **fields: Any) -> Stop:
    def stop(told: list[Event], asked: int) -> bool:
        last = told[-1] if told else None
        return isinstance(last, kind) and all(getattr(last, k) == v for k, v in fields.items()) and asked >= asked_times

    return stop


def test_stop_as_the_training_begins_ends_it_before_the_first_evaluation(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(*place, last_is(Planned))
    assert tiny.events_of(run, HeldOut) == []
    assert_stopped(run, step=0, total_steps=0)


def test_stop_in_the_first_evaluation_ends_it_at_the_next_batch(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(*place, last_is(Planned, asked_times=2), held_out_share=0.5)
    assert tiny.events_of(run, HeldOut) == []
    assert_stopped(run, step=0, total_steps=0)


def test_stop_in_training_ends_it_after_the_step_and_keeps_the_adapter(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(*place, last_is(Step, step=3), max_steps=50)
    assert_stopped(run, step=3, total_steps=50)


def test_stop_within_an_accumulation_does_not_wait_for_its_end(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(
        *place, last_is(Step, step=3, asked_times=3), max_steps=50, gradient_accumulation_steps=4, micro_batch_size=1, eval_steps=50
    )
    assert_stopped(run, step=3, total_steps=50)


def test_stop_in_a_later_evaluation_ends_it_at_the_next_batch(place: tuple[Workspace, Path]) -> None:
    run = stopped_when(*place, last_is(Step, step=2, asked_times=2), max_steps=50)
    assert [event.step for event in tiny.events_of(run, HeldOut)] == [0]
    assert_stopped(run, step=2, total_steps=50)


def test_stop_at_the_last_step_is_a_stop_and_in_the_saving_it_is_too_late(place: tuple[Workspace, Path]) -> None:
    assert_stopped(stopped_when(*place, last_is(Step, step=4)), step=4, total_steps=4)
    run = stopped_when(*place, last_is(Phase, name="saving"))
    assert run.state() == "finished"


def test_a_stopped_run_can_be_trained_again_in_another_run(place: tuple[Workspace, Path], finished: Watched) -> None:
    stopped_when(*place, last_is(Step, step=1))
    again = trained(*place, max_steps=8)
    assert [event.loss for event in tiny.events_of(again, Step)] == [event.loss for event in tiny.events_of(finished.run, Step)]


# Rows and models that cannot be trained on ----------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text(json.dumps([{"instruction": question, "output": answer} for question, answer in rows]))
    return path


def failure(run: Run) -> str:
    last = tiny.events_of(run)[-1]
    assert isinstance(last, Failed)
    assert last.traceback == ""
    assert "\n" not in last.message
    return last.message


def test_what_is_dropped_and_cut_is_told(place: tuple[Workspace, Path], tmp_path: Path) -> None:
    rows = [("Q", "A" * number) for number in range(1, 9)] + [("Q", ""), ("Q" * 300, "A"), ("Q", "A" * 300)]
    run = trained(place[0], write_rows(tmp_path / "rows.json", rows), held_out_share=0, max_steps=1, max_seq_len=64)
    told = logged(run)
    assert "11 rows: 10 kept, 1 dropped, 0 duplicates" in told
    assert "Row 9 was dropped: has no answer: 'output' is empty" in told
    assert "2 rows are longer than max_seq_len 64 and were cut" in told
    assert "1 rows were left out, nothing to train on in them after the cut: 10" in told
    assert tiny.events_of(run, Planned)[0].train_rows == 9


def test_rows_without_a_token_to_train_on_are_one_sentence(place: tuple[Workspace, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json", [("Q" * 90 + str(number), "A") for number in range(6)])
    said = failure(trained(place[0], data, max_seq_len=16))
    assert said.startswith("None of the 5 rows has a token to train on within max_seq_len 16. Raise max_seq_len")


def test_held_out_rows_without_a_token_to_measure_are_told_and_the_run_goes_on(place: tuple[Workspace, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json", [("Q" * 500, "A"), *((f"Q{number}", "A" * number) for number in range(1, 9))])
    conversations = checks.prepare(str(data)).conversations
    seed = next(seed for seed in range(100) if checks.split(conversations, 0.1, seed)[1][0].row == 1)
    run = trained(place[0], data, held_out_share=0.1, seed=seed, max_steps=2)
    assert "No held-out row has a token to measure within max_seq_len, so there is no held-out loss" in logged(run)
    assert not [line for line in logged(run) if "not finite" in line]
    assert tiny.events_of(run, HeldOut) == []
    assert run.state() == "finished"


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_special_tokens(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in settings.items() if key not in ("pad_token", "eos_token")}))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "is not a valid JSON file. Fetch or copy the model again"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "The tokenizer of "),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "The tokenizer of "),
        (without_special_tokens, "has neither a pad nor an end token"),
        (without_template, "has no chat template. Set prompt_format to chatml or guanaco."),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (cut_weights, "cannot be loaded"),
        (drop_a_weight, "lacks 1 of its weights (the first is model.norm.weight)"),
    ],
)
def test_a_damaged_model_is_one_sentence_with_its_folder(workspace: Workspace, rows: Path, damage: Damage, said: str) -> None:
    damage(tiny.tiny_model(workspace.models / "damaged"))
    message = failure(trained(workspace, rows, model="damaged", prompt_format="tokenizer", max_steps=1))
    assert said in message
    assert "damaged" in message or "prompt_format" in message


@pytest.mark.parametrize("model", ["nowhere", "..", "~", "~nobody-here/x", "a\0b", "x" * 300, "a/" + "x" * 300, "a b/c", "a/b/c"])
def test_a_model_that_is_nowhere_is_one_sentence_with_its_name(workspace: Workspace, rows: Path, model: str) -> None:
    message = failure(trained(workspace, rows, model=model))
    assert "no model" in message
    assert repr(model)[:40] in message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_modules": "nowhere"}, "target_modules is 'nowhere': "),
        ({"target_modules": ","}, "target_modules is ',': "),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16', but there is no GPU here: use auto, float32 or bfloat16."),
    ],
)
def test_a_setting_that_this_model_or_machine_cannot_serve_is_one_sentence(
    place: tuple[Workspace, Path], values: dict[str, Any], said: str
) -> None:
    if "compute_dtype" in values and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert failure(trained(*place, **values)).startswith(said)
