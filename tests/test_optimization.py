"""How the adapter is trained: optimizers, schedules, accumulation, the order of the rows, noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from qlora_ui import jobs
from qlora_ui.config import OPTIMIZERS, RunConfig
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.train import train, training_arguments
from qlora_ui.events import HeldOut, Log, Step
from qlora_ui.runs import Run, Workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    folder = tmp_path_factory.mktemp("optimization")
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    return workspace, tiny.tiny_rows(folder / "rows.json", 40)


def trainer_of(place: tuple[Workspace, Path], **values: Any) -> Any:
    return tiny.tiny_trainer(tiny.tiny_run(*place, **values))


def trained(place: tuple[Workspace, Path], **values: Any) -> Run:
    run = tiny.tiny_run(*place, **{"save_steps": 100, "eval_steps": 100, **values})
    jobs.execute(run, train)
    assert run.state() == "finished", tiny.events_of(run)[-1]
    return run


# Accumulation -----------------------------------------------------------------------------------------------------------


def test_eight_rows_learn_the_same_however_they_are_cut_into_micro_batches(place: tuple[Workspace, Path]) -> None:
    """The rows differ in length, so that a mean over micro-batches would not be the mean over tokens."""
    cut = {
        (rows, times): trained(
            place, micro_batch_size=rows, gradient_accumulation_steps=times, max_steps=6, optimizer="adamw_torch", packing="off"
        )
        for rows, times in [(8, 1), (4, 2), (1, 8)]
    }
    whole = cut.pop((8, 1))
    weights = load_file(whole.adapter / "adapter_model.safetensors")
    for run in cut.values():
        for kind in (Step, HeldOut):
            one, other = ([event.loss for event in tiny.events_of(which, kind)] for which in (whole, run))
            assert len(one) >= 2
            assert one == pytest.approx(other, abs=1e-4)
        its_own = load_file(run.adapter / "adapter_model.safetensors")
        assert its_own.keys() == weights.keys()
        assert max((its_own[name] - weights[name]).abs().max().item() for name in weights) < 1e-4
    assert max(weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name) > 1e-2


# Optimizers -------------------------------------------------------------------------------------------------------------


def test_the_default_is_the_papers_paged_adamw() -> None:
    assert RunConfig().optimization.optimizer == OPTIMIZERS[0] == "paged_adamw_32bit"


@pytest.fixture(scope="module")
def untrained(place: tuple[Workspace, Path]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A trainer, and the weights that its adapter starts with."""
    trainer = trainer_of(place, micro_batch_size=4, packing="off")
    return trainer, {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_that_is_offered_lowers_the_loss(
    place: tuple[Workspace, Path], untrained: tuple[Any, dict[str, torch.Tensor]], optimizer: str
) -> None:
    trainer, start = untrained
    run = tiny.tiny_run(*place, optimizer=optimizer)
    trainer.model.load_state_dict(start, strict=False)
    trainer.args, trainer.optimizer = training_arguments(run, run.config(), detect("float32"), has_held_out=False), None
    (batch,) = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])["micro_batches"]
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    trainer.create_optimizer()
    losses = []
    for _ in range(5):
        loss = trainer.model(**batch).loss
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "adamw_torch", "lion_32bit"])
def test_the_numbers_of_adam_reach_the_optimizer(place: tuple[Workspace, Path], optimizer: str) -> None:
    values = {"adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-5, "weight_decay": 0.25, "learning_rate": 0.125}
    group = trainer_of(place, optimizer=optimizer, **values).create_optimizer().param_groups[0]
    assert tuple(group["betas"]) == (0.7, 0.8)
    assert (group["weight_decay"], group["lr"]) == (0.25, 0.125)
    if "adamw" in optimizer:
        assert group["eps"] == 1e-5


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch", "adafactor"])
def test_lora_plus_lets_the_b_sides_learn_faster_all_through_the_schedule(place: tuple[Workspace, Path], optimizer: str) -> None:
    values = {"loraplus_lr_ratio": 16, "learning_rate": 0.001, "weight_decay": 0.5, "warmup_steps": 4, "max_steps": 10}
    trainer = trainer_of(place, optimizer=optimizer, **values)
    trainer.create_optimizer_and_scheduler(10)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = {
        frozenset(names[id(parameter)].split(".")[-3] for parameter in group["params"]): group for group in trainer.optimizer.param_groups
    }
    assert groups.keys() == {frozenset({"lora_A"}), frozenset({"lora_B"})}
    assert sum(len(group["params"]) for group in groups.values()) == 2 * 14
    assert {group["weight_decay"] for group in groups.values()} == {0.5}
    slow, fast = groups[frozenset({"lora_A"})], groups[frozenset({"lora_B"})]
    for _ in range(8):
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        assert fast["lr"] == pytest.approx(16 * slow["lr"])
    assert slow["lr"] == trainer._get_learning_rate() == 0.001


def test_lora_plus_trains_a_whole_run_and_the_shown_rate_is_the_a_sides(place: tuple[Workspace, Path]) -> None:
    run = trained(place, loraplus_lr_ratio=4, warmup_ratio=0, max_steps=4)
    assert [event.learning_rate for event in tiny.events_of(run, Step)] == [0.01] * 4
    plain = trained(place, warmup_ratio=0, max_steps=4)
    assert tiny.events_of(run, Step)[0].loss == tiny.events_of(plain, Step)[0].loss
    assert tiny.events_of(run, HeldOut)[-1].loss < tiny.events_of(plain, HeldOut)[-1].loss


# Schedules --------------------------------------------------------------------------------------------------------------


def rates(place: tuple[Workspace, Path], trainer: Any, **values: Any) -> list[float]:
    run = tiny.tiny_run(*place, learning_rate=1.0, optimizer="sgd", **values)
    trainer.args, trainer.optimizer = training_arguments(run, run.config(), detect("float32"), has_held_out=False), None
    trainer.lr_scheduler = None
    trainer.create_optimizer_and_scheduler(10)
    shown = []
    for _ in range(10):
        shown.append(trainer._get_learning_rate())
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return shown


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"warmup_ratio": 0}, [1.0] * 10),
        ({"warmup_ratio": 0.35}, [0, 0.25, 0.5, 0.75] + [1.0] * 6),
        ({"warmup_ratio": 0.9, "warmup_steps": 2}, [0, 0.5] + [1.0] * 8),
        ({"warmup_ratio": 0.9, "warmup_steps": 1}, [0] + [1.0] * 9),
        ({"warmup_steps": 2, "lr_scheduler": "linear"}, [0, 0.5] + [1 - step / 8 for step in range(8)]),
        ({"warmup_steps": 2, "lr_scheduler": "cosine"}, [0, 0.5] + [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(
    place: tuple[Workspace, Path], untrained: tuple[Any, dict[str, torch.Tensor]], values: dict[str, Any], expected: list[float]
) -> None:
    assert rates(place, untrained[0], **values) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "told"), [({"warmup_steps": 2}, True), ({"warmup_steps": 1}, False)])
def test_a_training_that_is_all_warm_up_is_told(place: tuple[Workspace, Path], values: dict[str, Any], told: bool) -> None:
    said = [event.text for event in tiny.events_of(trained(place, max_steps=2, held_out_share=0, **values), Log)]
    assert any(line.startswith("The warm-up takes all of the 2 steps, so that the learning rate never is 0.01") for line in said) == told


# Noise and order --------------------------------------------------------------------------------------------------------


def test_neftune_makes_training_noisy_and_nothing_else(place: tuple[Workspace, Path]) -> None:
    plain, noisy = (trained(place, neftune_noise_alpha=alpha, max_steps=2) for alpha in (0, 20))
    assert tiny.events_of(noisy, HeldOut)[0].loss == tiny.events_of(plain, HeldOut)[0].loss
    assert abs(tiny.events_of(noisy, Step)[0].loss - tiny.events_of(plain, Step)[0].loss) > 1e-3
    again = trained(place, neftune_noise_alpha=20, max_steps=2)
    assert [event.loss for event in tiny.events_of(again, Step)] == [event.loss for event in tiny.events_of(noisy, Step)]


def order(trainer: Any, epoch: int) -> list[int]:
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    places = {tuple(trainer.train_dataset[index]["input_ids"]): index for index in range(len(trainer.train_dataset))}
    return [places[tuple(row["input_ids"])] for step in loader for row in tiny.rows_of_step(step)]


def padding(trainer: Any, places: list[int], rows: int) -> int:
    sizes = [len(trainer.train_dataset[place]["input_ids"]) for place in places]
    batches = [sizes[first : first + rows] for first in range(0, len(sizes), rows)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


def test_rows_grouped_by_length_need_less_padding_and_are_all_there(place: tuple[Workspace, Path]) -> None:
    plain = trainer_of(place, micro_batch_size=4, packing="off")
    grouped = trainer_of(place, micro_batch_size=4, packing="off", group_by_length=True)
    by_length, at_random = order(grouped, 0), order(plain, 0)
    assert sorted(by_length) == sorted(at_random) == list(range(32))
    assert padding(grouped, by_length, 4) < 0.75 * padding(plain, at_random, 4)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_the_order_is_the_seeds_and_the_epochs_whatever_was_drawn_before(place: tuple[Workspace, Path], group_by_length: bool) -> None:
    """So that a resumed run meets in its second epoch what it would have met."""
    first = trainer_of(place, packing="off", group_by_length=group_by_length)
    orders = [order(first, 0), order(first, 1)]
    assert orders[0] != orders[1]
    later = trainer_of(place, packing="off", group_by_length=group_by_length)
    torch.rand(1000)
    assert [order(later, 1), order(later, 0)] == orders[::-1]
    assert order(trainer_of(place, packing="off", group_by_length=group_by_length, seed=1), 0) != orders[0]
