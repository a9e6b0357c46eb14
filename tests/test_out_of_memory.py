"""Memory that runs out: the run goes on with less of it, from its last step, and all that the failed attempt held is let go."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from qlora_ui import jobs
from qlora_ui.config import RunConfig
from qlora_ui.engine import train as engine_train
from qlora_ui.engine.hardware import detect, is_out_of_memory
from qlora_ui.engine.step_trainer import StepTrainer
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Failed, Finished, Paused, Phase, Resumed, Step
from qlora_ui.progress import log_line
from qlora_ui.resuming import less_memory, with_less
from qlora_ui.runs import Run, Workspace

LACK = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
SETTINGS = {"packing": "off", "gradient_checkpointing": "off", "micro_batch_size": 4, "save_steps": 100, "eval_steps": 100, "max_steps": 4}
Fault = Callable[[Any, int], bool]
"""Whether the allocation of a forward pass fails, for the trainer and the rows of the micro-batch."""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    """Let allocations of the forward pass fail from now on."""
    real = StepTrainer.compute_loss

    def install(fault: Fault) -> None:
        def compute_loss(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training and fault(trainer, len(inputs["input_ids"])):
                raise RuntimeError(LACK)
            return real(trainer, model, inputs, *args, **kwargs)

        monkeypatch.setattr(StepTrainer, "compute_loss", compute_loss)

    return install


def trained(place: tuple[Workspace, Path], **values: Any) -> Run:
    run = tiny.tiny_run(*place, **{**SETTINGS, **values})
    jobs.execute(run, train)
    return run


def losses(run: Run) -> dict[int, float | None]:
    return {event.step: event.loss for event in tiny.events_of(run, Step)}


@pytest.fixture(scope="module")
def whole(place: tuple[Workspace, Path]) -> Run:
    return trained(place)


def test_it_goes_on_from_its_last_step_with_half_the_micro_batch(
    place: tuple[Workspace, Path], failing: Callable[[Fault], None], whole: Run
) -> None:
    failing(lambda trainer, rows: trainer.state.global_step == 1 and rows > 2)
    run = trained(place)
    (resumed,) = tiny.events_of(run, Resumed)
    assert (resumed.step, resumed.checkpoint) == (1, "checkpoint-1")
    assert resumed.changes == {"micro_batch_size": [4, 2], "gradient_accumulation_steps": [1, 2]}
    assert log_line(resumed).startswith("The memory did not suffice (")
    assert [event.step for event in tiny.events_of(run, Step)] == [1, 2, 3, 4]  # no step twice
    assert losses(run) == pytest.approx(losses(whole), abs=1e-4)
    assert run.config().effective_batch == 4
    assert tiny.events_of(run, Finished)


def test_when_single_rows_do_not_fit_it_computes_activations_twice(
    place: tuple[Workspace, Path], failing: Callable[[Fault], None], whole: Run
) -> None:
    failing(lambda trainer, rows: not trainer.args.activation_checkpointing)
    run = trained(place)
    assert [list(event.changes) for event in tiny.events_of(run, Resumed)] == [
        ["micro_batch_size", "gradient_accumulation_steps"],
        ["micro_batch_size", "gradient_accumulation_steps"],
        ["gradient_checkpointing"],
    ]
    assert losses(run) == pytest.approx(losses(whole), abs=1e-4)


def test_when_nothing_is_left_to_save_it_rests_with_advice_and_keeps_its_last_step(
    place: tuple[Workspace, Path], failing: Callable[[Fault], None]
) -> None:
    failing(lambda trainer, rows: trainer.state.global_step == 2)
    run = trained(place, micro_batch_size=1, gradient_checkpointing="on")
    (paused,) = tiny.events_of(run, Paused)
    assert (paused.step, paused.traceback) == (2, "")
    assert "even for one row at a time with gradient checkpointing" in paused.reason
    assert "By the forecast the run takes 0.9 GiB, and " in paused.reason
    assert paused.reason.endswith(" GiB are free now. Close what else uses the memory, or choose a smaller model.")
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("kind", "gib", "said"),
    [
        ("llama", 0.5, "It takes about 0.9 GiB. Use a larger GPU (T4 is enough), or choose a smaller model."),
        (
            "odd",
            0.5,
            "Lower max_seq_len (it is 128) or lora_r (4), choose a smaller model, or close what else uses the memory. The memory of",
        ),
    ],
)
def test_its_advice_is_the_memory_planners_for_what_is_free_now(
    tiny_workspace: Workspace, rows: Path, kind: str, gib: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = tiny_workspace.models / "tiny" / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "model_type": kind}))
    found = dataclasses.replace(detect("float32"), memory_free_gib=gib)
    monkeypatch.setattr("qlora_ui.engine.hardware.detect", lambda wish: found)
    run = tiny.tiny_run(tiny_workspace, rows, micro_batch_size=1, gradient_checkpointing="on")
    run.append(Phase(name="training"))
    with pytest.raises(UserError) as told:
        with_less(run, LACK)
    assert f"({LACK}). {said}" in str(told.value)


def test_a_half_done_update_is_not_saved(place: tuple[Workspace, Path], whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    updated = list[Any]()

    def prefetch_state(optimizer: Any, parameter: Any) -> None:
        updated.append(parameter)
        if len(updated) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 bytes.")

    monkeypatch.setattr("bitsandbytes.optim.optimizer.Optimizer8bit.prefetch_state", prefetch_state)
    run = trained(place, save_steps=1)
    (resumed,) = tiny.events_of(run, Resumed)
    assert resumed.step == 0
    assert losses(run) == pytest.approx(losses(whole), abs=1e-4)


def test_all_that_the_failed_attempt_held_is_let_go_before_the_next(
    place: tuple[Workspace, Path], failing: Callable[[Fault], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(lambda trainer, rows: rows > 2)
    real, held = engine_train.load_quantized, list[Any]()
    alive: list[list[bool]] = []

    def load_quantized(*args: Any) -> Any:
        alive.append([tensor() is not None for tensor in held])
        base = real(*args)
        held.extend(weakref.ref(parameter) for parameter in base.parameters())
        return base

    monkeypatch.setattr(engine_train, "load_quantized", load_quantized)
    assert trained(place).state() == "finished"
    assert len(alive) == 2
    assert len(alive[1]) > 10
    assert not any(alive[1])


def test_a_base_that_does_not_fit_is_told_at_once(place: tuple[Workspace, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_quantized(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(engine_train, "load_quantized", load_quantized)
    run = trained(place)
    (failed,) = tiny.events_of(run, Failed)
    assert failed.message.startswith(
        "tiny does not fit into the memory of this machine (MemoryError). By the forecast its weights take 0.0 GiB"
    )
    assert not tiny.events_of(run, Resumed)


@pytest.mark.parametrize(
    ("micro", "accumulation", "less"), [(4, 4, (2, 8)), (3, 4, (1, 12)), (6, 1, (3, 2)), (5, 2, (2, 5)), (16, 1, (8, 2))]
)
def test_the_effective_batch_stays(micro: int, accumulation: int, less: tuple[int, int]) -> None:
    config = RunConfig().with_values({"micro_batch_size": micro, "gradient_accumulation_steps": accumulation})
    changes = less_memory(config)
    assert (changes["micro_batch_size"], changes["gradient_accumulation_steps"]) == less
    assert config.with_values(changes).effective_batch == config.effective_batch


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError(LACK), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (OSError("No space left on device"), False),
    ],
)
def test_what_counts_as_memory_that_ran_out(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_really_runs_out_on_a_gpu(place: tuple[Workspace, Path], failing: Callable[[Fault], None]) -> None:
    taken: list[Any] = []

    def take_it_all(trainer: Any, rows: int) -> bool:
        if rows > 2:
            taken.append(torch.empty(torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda"))
        return False

    failing(take_it_all)
    run = trained(place)
    assert [event.changes["micro_batch_size"] for event in tiny.events_of(run, Resumed)] == [[4, 2]]
    assert run.state() == "finished"
