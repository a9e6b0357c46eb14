"""Steps that are not finite: kept away from the weights, counted and told, and the end of a run when they persist."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from qlora_ui import jobs
from qlora_ui.engine import train as engine_train
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.train import StepTrainer, train
from qlora_ui.engine.watch import MOST_SKIPPED_IN_A_ROW
from qlora_ui.events import Finished, HeldOut, Paused, Resumed, Step
from qlora_ui.progress import log_line
from qlora_ui.runs import Run, Workspace

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Break = Callable[[int, torch.Tensor], torch.Tensor]
"""What becomes of a batch's loss, by the number of optimizer steps done before."""


@pytest.fixture
def place(tiny_workspace: Workspace, rows: Path) -> tuple[Workspace, Path]:
    return tiny_workspace, rows


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Break], None]:
    """Change the loss of batches from now on."""
    real = StepTrainer.compute_loss

    def install(broken: Break) -> None:
        def compute_loss(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            loss = real(trainer, *args, **kwargs)
            return broken(trainer.state.global_step, loss) if trainer.model.training else loss

        monkeypatch.setattr(StepTrainer, "compute_loss", compute_loss)

    return install


def trained(place: tuple[Workspace, Path], **values: Any) -> Run:
    run = tiny.tiny_run(*place, **{"save_steps": 1, "save_total_limit": 100, "eval_steps": 100, **values})
    jobs.execute(run, train)
    return run


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run.folder / f"checkpoint-{step}" / "adapter_model.safetensors")
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


class Explode(torch.autograd.Function):
    """Nothing on the way forward, infinity on the way back."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


# What is done to a loss, and which of loss and gradient norm is then not finite.
FAULTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[bool, bool]]] = {
    "a loss that is no number": (lambda loss: loss * float("nan"), (True, True)),
    "an infinite loss": (lambda loss: loss * float("inf"), (True, True)),
    "an infinite loss with finite gradients": (lambda loss: loss + float("inf"), (True, False)),
    "a finite loss with infinite gradients": (Explode.apply, (False, True)),
}


@pytest.mark.parametrize(("fault", "optimizer"), [*((fault, "paged_adamw_32bit") for fault in FAULTS), ("an infinite loss", "adamw_torch")])
def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were(
    place: tuple[Workspace, Path], breaks: Callable[[Break], None], fault: str, optimizer: str
) -> None:
    broken, not_finite = FAULTS[fault]
    breaks(lambda done, loss: broken(loss) if done == 2 else loss)
    run = trained(place, max_steps=4, optimizer=optimizer, weight_decay=0.1)
    steps: list[Step] = tiny.events_of(run, Step)
    assert [event.skipped for event in steps] == [False, False, True, False]
    fine = (False, False)
    assert [(event.loss is None, event.grad_norm is None) for event in steps] == [fine, fine, not_finite, fine]
    assert same(weights(run, 2), weights(run, 3))
    assert not same(weights(run, 3), weights(run, 4))
    assert all(tensor.isfinite().all() for tensor in weights(run, 4).values())
    assert "skipped: the weights stay as they were" in log_line(steps[2])
    assert run.state() == "finished"


def test_a_skipped_step_leaves_no_trace_in_the_optimizer(place: tuple[Workspace, Path], breaks: Callable[[Break], None]) -> None:
    breaks(lambda done, loss: loss * float("nan") if done == 2 else loss)
    run = trained(place, max_steps=3, weight_decay=0.1)
    before, after = (tensors(torch.load(run.folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=False)) for step in (2, 3))
    assert len(before) == len(after) == 2 * len(weights(run, 2))  # two moments each
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def tensors(tree: Any) -> list[torch.Tensor]:
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [tree] if isinstance(tree, torch.Tensor) else [tensor for part in parts for tensor in tensors(part)]


def test_one_bad_batch_of_an_accumulation_skips_the_whole_step(place: tuple[Workspace, Path], breaks: Callable[[Break], None]) -> None:
    seen: list[int] = []

    def second_of_three(done: int, loss: torch.Tensor) -> torch.Tensor:
        seen.append(done)
        return loss * float("nan") if seen == [0, 0] else loss

    breaks(second_of_three)
    run = trained(place, max_steps=2, gradient_accumulation_steps=3, micro_batch_size=1)
    assert [(event.loss is None, event.skipped) for event in tiny.events_of(run, Step)] == [(True, True), (False, False)]


def test_a_run_goes_on_after_fewer_skipped_steps_than_are_too_many(place: tuple[Workspace, Path], breaks: Callable[[Break], None]) -> None:
    few = MOST_SKIPPED_IN_A_ROW - 1
    breaks(lambda done, loss: loss if done == few else loss * float("nan"))
    run = trained(place, max_steps=2 * few + 1, save_steps=100)
    assert [event.skipped for event in tiny.events_of(run, Step)] == [True] * few + [False] + [True] * few
    assert tiny.events_of(run, Finished)


def test_a_run_whose_steps_stay_that_way_ends_with_advice(place: tuple[Workspace, Path], breaks: Callable[[Break], None]) -> None:
    breaks(lambda done, loss: loss if done < 2 else loss * float("nan"))
    run = trained(place, max_steps=50)
    (end,) = tiny.events_of(run, Paused)
    last = 2 + MOST_SKIPPED_IN_A_ROW
    assert end.traceback == ""
    assert f"In {MOST_SKIPPED_IN_A_ROW} steps in a row (3 to {last}) the loss or its gradients were not finite" in end.reason
    assert "Lower learning_rate (it is 0.01)" in end.reason
    assert [event.step for event in tiny.events_of(run, Step)] == list(range(1, last + 1))
    assert same(weights(run, 2), weights(run, last - 1))


@pytest.fixture(params=["on a CPU", pytest.param("on a GPU", marks=[pytest.mark.gpu, needs_gpu])])
def float16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training computes in float16. On a CPU accelerate leaves the loss scaling out: there it is given torch's own, which works."""
    if request.param == "on a GPU":
        return
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    here, real = detect("float32"), StepTrainer.__init__
    monkeypatch.setattr(engine_train, "detect", lambda wish: dataclasses.replace(here, compute_dtype=wish))

    def scaled(trainer: Any, **kwargs: Any) -> None:
        real(trainer, **kwargs)
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu")

    monkeypatch.setattr(StepTrainer, "__init__", scaled)


@pytest.mark.usefixtures("float16")
def test_float16_scales_its_loss_and_trains_float32_adapters(place: tuple[Workspace, Path]) -> None:
    run = trained(place, compute_dtype="float16", max_steps=16, eval_steps=16, save_steps=16, warmup_ratio=0)
    steps: list[Step] = tiny.events_of(run, Step)
    assert sum(event.skipped for event in steps) < 6
    assert (run.folder / "checkpoint-16" / "scaler.pt").is_file()
    before, *_, after = (event.loss for event in tiny.events_of(run, HeldOut))
    assert after < before
    assert {tensor.dtype for tensor in load_file(run.adapter / "adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.usefixtures("float16")
def test_float16_skips_and_counts_a_step_that_overflows(place: tuple[Workspace, Path], breaks: Callable[[Break], None]) -> None:
    breaks(lambda done, loss: loss * 1e30 if done == 3 else loss)
    run = trained(place, compute_dtype="float16", max_steps=8)
    assert tiny.events_of(run, Step)[3].skipped
    assert same(weights(run, 3), weights(run, 4))
    assert not same(weights(run, 4), weights(run, 8))


def test_where_the_owner_chose_so_it_goes_back_once_and_learns_more_slowly(
    place: tuple[Workspace, Path], breaks: Callable[[Break], None]
) -> None:
    rates: list[float] = []

    def broken(done: int, loss: torch.Tensor) -> torch.Tensor:
        return loss if done < 3 or rates else loss * float("nan")

    breaks(broken)
    real = StepTrainer.create_optimizer
    with pytest.MonkeyPatch.context() as patch:

        def create_optimizer(trainer: Any, model: Any = None) -> Any:
            if trainer.args.learning_rate < 0.01:
                rates.append(trainer.args.learning_rate)
            return real(trainer, model)

        patch.setattr(StepTrainer, "create_optimizer", create_optimizer)
        run = trained(place, max_steps=16, on_divergence="go_back", save_steps=2)
    (resumed,) = tiny.events_of(run, Resumed)
    assert (resumed.step, resumed.checkpoint) == (2, "checkpoint-2")
    assert resumed.changes == {"learning_rate": [0.01, 0.002]}
    assert "The loss diverged in step 4 and did not recover. Goes on from step 2" in log_line(resumed)
    assert run.state() == "finished"
    assert [event.step for event in tiny.events_of(run, Step)] == [*range(1, 14), *range(3, 17)]


def test_the_second_time_it_pauses(place: tuple[Workspace, Path], breaks: Callable[[Break], None]) -> None:
    breaks(lambda done, loss: loss if done < 2 else loss * float("nan"))
    run = trained(place, max_steps=50, on_divergence="go_back")
    assert len(tiny.events_of(run, Resumed)) == 1
    (end,) = tiny.events_of(run, Paused)
    assert "Lower learning_rate (it is 0.002)" in end.reason
