"""What a person is pointed to, and what is left unsaid."""

from __future__ import annotations

import math

import pytest

from qlora_ui.events import Event, HeldOut, Phase, Planned, Resumed, Step
from qlora_ui.hints import hints
from qlora_ui.progress import fold

LIMIT = 0.3


def run(total_steps: int, *events: Event) -> list[str]:
    planned = Planned(total_steps=total_steps, train_rows=8, held_out_rows=2, tokens=80, trained_tokens=40)
    return hints(fold("run", [Phase(name="training"), planned, *events]), LIMIT)


def step(number: int, loss: float | None, grad_norm: float = 0.1) -> Step:
    return Step(
        step=number,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=grad_norm,
        tokens_per_second=9.0,
        memory_gib=1.0,
        epoch=0.1,
        skipped=loss is None,
    )


def falling(steps: int, grad_norm: float = 0.1) -> list[Step]:
    return [step(number, 2 - number / 1000, grad_norm) for number in range(1, steps + 1)]


def held_out(*losses: float) -> list[HeldOut]:
    return [HeldOut(step=10 * number, loss=loss) for number, loss in enumerate(losses)]


@pytest.mark.parametrize("steps", [0, 1, 30, 200, 500])
def test_a_run_that_learns_is_left_in_peace(steps: int) -> None:
    assert run(500, *falling(steps), *held_out(3, 2, 1.5, 1.6, 1.4)) == []


def test_held_out_loss_that_rose_three_times_names_the_best_step() -> None:
    assert run(100, *held_out(3, 2, 2.1, 2.2)) == []
    assert run(100, *held_out(3, 2, 2.1, 2.2, 2.3)) == ["Held-out loss has risen for 3 evaluations, to 2.300. Step 10 was best: 2.000."]
    assert run(100, *held_out(3, 2, 2.1, 2.2, 2.3, 2.25)) == []


def test_a_run_that_goes_on_from_before_the_rise_is_judged_anew() -> None:
    assert run(100, *held_out(3, 2, 2.1, 2.2, 2.3), Resumed(step=10)) == []


def test_a_loss_that_does_not_fall_is_said_after_the_first_tenth() -> None:
    rising = [step(number, 2 + number / 1000) for number in range(1, 31)]
    assert run(400, *rising) == []
    assert run(300, *rising) == ["Training loss is not falling: 2.004 in the first 7 steps, 2.027 in the last 7."]


def test_a_flat_loss_is_said_with_three_stretches_until_the_last_tenth_of_the_run() -> None:
    flat = [step(number, 1 + math.exp(-number / 5)) for number in range(1, 101)]
    assert run(150, *flat) == ["Training loss is flat: 1.000 in the last 20 steps, 1.000 and 1.000 in the 20 before each."]
    assert run(100, *flat) == []


def test_the_steps_of_a_long_run_are_counted_and_not_its_points() -> None:
    rising = [step(number, 2 + number / 1000) for number in range(1, 1201)]
    assert run(1200, *rising)[0].endswith("in the last 300.")


def test_gradients_are_clipped_at_most_of_a_hundred_steps() -> None:
    assert run(500, *falling(99, 1.2)) == []
    assert run(500, *falling(100, 1.2)) == ["Gradients were clipped at 100 of the last 100 steps: median norm 1.2, limit 0.3."]
    assert run(500, *falling(100, LIMIT)) == []
    planned = Planned(total_steps=500, train_rows=8, held_out_rows=2, tokens=80, trained_tokens=40)
    assert hints(fold("run", [planned, *falling(100, 1.2)]), None) == []


def test_skipped_steps_are_said_while_they_are_news_and_not_while_float16_looks_for_its_scale() -> None:
    assert run(500, *[step(number, None) for number in range(1, 6)], *[step(number, 2 - number / 1000) for number in range(6, 40)]) == []
    skipping = [step(number, None if number in (50, 60) else 2 - number / 1000) for number in range(1, 200)]
    said = "2 of the last 100 steps were skipped: loss or gradients not finite. Try a lower learning rate."
    assert run(500, *skipping[:70]) == [said]
    assert run(500, *skipping) == []


def test_never_more_than_two_at_a_time_and_the_weightiest_first() -> None:
    steps = [step(number, None if number in (110, 115) else 2.0, 1.2) for number in range(1, 121)]
    found = run(500, *steps, *held_out(3, 2, 2.1, 2.2, 2.3))
    assert [sentence.split()[0] for sentence in found] == ["Held-out", "2"]
