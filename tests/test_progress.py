"""What a person sees of a run's events: the status line, the time left, the curves, the log."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_ui.curves import Curve
from qlora_ui.events import (
    KINDS,
    AdapterSaved,
    Asked,
    CheckpointSaved,
    Event,
    Failed,
    Finished,
    HeldOut,
    Interrupted,
    Log,
    Paused,
    Phase,
    PhaseProgress,
    Planned,
    Resumed,
    Sample,
    Step,
    Stopped,
)
from qlora_ui.progress import MORE_CURVES, PHASE_WORDS, Progress, amount, duration, log_line


def step(number: int, loss: float | None = 1.234, time: float = 0.0, skipped: bool = False) -> Step:
    return Step(
        step=number,
        loss=loss,
        learning_rate=2e-4,
        grad_norm=0.5,
        tokens_per_second=99.6,
        memory_gib=1.0,
        epoch=number / 10,
        time=time,
        skipped=skipped,
    )


def planned(steps: int) -> Planned:
    return Planned(total_steps=steps, train_rows=8, held_out_rows=2, tokens=12345, trained_tokens=678)


def after(*events: Event) -> Progress:
    progress = Progress("name")
    for event in events:
        progress.add(event)
    return progress


TRAINING = (Phase(name="training"), planned(10))


@pytest.mark.parametrize(
    ("events", "line"),
    [
        ([], "name · starting"),
        ([Log(text="a")], "name · starting"),
        ([Phase(name="reading")], "name · reading the data"),
        ([Phase(name="reading"), PhaseProgress(done=1500, total=0, unit="rows")], "name · reading the data 1,500 rows"),
        (
            [Phase(name="fetching"), PhaseProgress(done=12_400_000, total=92_871_040, unit="bytes")],
            "name · fetching the model 12 of 93 MB",
        ),
        ([Phase(name="fetching"), PhaseProgress(done=1, total=2, unit="bytes"), Phase(name="loading")], "name · loading"),
        ([Phase(name="quantizing"), PhaseProgress(done=40, total=272, unit="tensors")], "name · quantizing to 4 bits 40 of 272 tensors"),
        ([Phase(name="tokenizing")], "name · tokenizing"),
        ([Phase(name="training")], "name · training"),
        ([*TRAINING], "name · training 0/10"),
        ([*TRAINING, HeldOut(step=0, loss=3)], "name · training 0/10"),
        ([*TRAINING, step(1, time=1.0)], "name · training 1/10 · loss 1.23"),
        ([*TRAINING, step(1, time=1.0), step(2, time=3.0), step(3, time=5.0)], "name · training 3/10 · loss 1.23 · 14 s left"),
        ([*TRAINING, step(1), step(2), step(3, None)], "name · training 3/10 · loss 1.23 · 0 s left"),
        ([*TRAINING, step(1), step(2, time=2.0), Asked(wish="stop")], "name · stopping · loss 1.23"),
        ([*TRAINING, step(10), Phase(name="saving")], "name · saving · loss 1.23"),
        (
            [*TRAINING, step(10), HeldOut(step=10, loss=0.9876), Finished(step=10)],
            "name · Finished: 10 steps, adapter saved · held-out loss 0.99",
        ),
        ([*TRAINING, HeldOut(step=0, loss=3), step(2), Paused(step=2, total_steps=10)], "name · Paused at step 2 of 10"),
        ([*TRAINING, step(2), Paused(step=2, total_steps=10), Resumed(step=2)], "name · starting · loss 1.23"),
        ([*TRAINING, step(2), step(3, None, skipped=True)], "name · training 3/10 · loss 1.23 · 1 skipped step"),
        ([*TRAINING, step(10), Finished(step=10)], "name · Finished: 10 steps, adapter saved"),
        (
            [*TRAINING, step(3), Asked(wish="stop"), Stopped(step=3, total_steps=10, adapter_saved=True)],
            "name · Stopped at step 3 of 10, adapter saved",
        ),
        (
            [Phase(name="loading"), Asked(wish="stop"), Stopped(step=0, total_steps=0, adapter_saved=False)],
            "name · Stopped before the first step, so there is no adapter",
        ),
        ([*TRAINING, step(3), Interrupted(step=3)], "name · Interrupted at step 3"),
        ([*TRAINING, HeldOut(step=0, loss=1), Failed(message="Row 1 has no answer.")], "name · Row 1 has no answer."),
    ],
)
def test_the_status_line_says_where_the_run_stands(events: list[Event], line: str) -> None:
    assert after(*events).status_line() == line


def test_every_phase_has_words() -> None:
    for name in PHASE_WORDS:
        assert PHASE_WORDS[name] in after(Phase(name=name)).status_line()  # type: ignore[arg-type]


def test_the_share_done_is_of_the_training_and_before_it_of_the_phase() -> None:
    assert after().share_done == 0
    assert after(Phase(name="fetching"), PhaseProgress(done=1, total=4, unit="bytes")).share_done == 0.25
    assert after(Phase(name="fetching"), PhaseProgress(done=1, total=0, unit="bytes")).share_done == 0
    assert after(Phase(name="fetching"), PhaseProgress(done=1, total=4, unit="bytes"), *TRAINING).share_done == 0
    assert after(*TRAINING, step(5)).share_done == 0.5
    assert after(*TRAINING, step(10), Finished(step=10)).share_done == 1


def test_the_best_checkpoint_and_the_skipped_steps_are_counted_on_the_way() -> None:
    saved = [CheckpointSaved(step=number, name=f"checkpoint-{number}", best=best) for number, best in ((2, True), (4, True), (6, False))]
    progress = after(*TRAINING, step(1), step(2, None, skipped=True), *saved)
    assert progress.best_checkpoint == saved[1]
    assert progress.skipped_steps == 1


def test_the_time_left_is_the_pace_of_the_last_steps_without_the_evaluations() -> None:
    progress = after(*TRAINING)
    assert progress.eta_seconds is None
    for event in (step(1, time=100.0), step(2, time=102.0)):
        progress.add(event)
        assert progress.eta_seconds is None
    progress.add(step(3, time=104.0))
    assert progress.eta_seconds == 14
    assert progress.done_at == 118
    progress.add(HeldOut(step=3, loss=1, time=150.0))
    progress.add(step(4, time=151.0))
    progress.add(Sample(step=4, prompt="", base="", adapter="", time=181.5))
    progress.add(step(5, time=182.0))
    assert progress.eta_seconds == 10
    progress.add(step(6, time=184.0))
    assert progress.eta_seconds == 8
    progress.add(Finished(step=6))
    assert progress.eta_seconds is progress.done_at is None


def test_the_pace_forgets_steps_long_ago() -> None:
    progress = after(Phase(name="training"), planned(100))
    for number in range(1, 41):
        progress.add(step(number, time=number * 10.0 if number <= 20 else 200.0 + number))
    assert progress.eta_seconds == pytest.approx(60)


def test_losses_are_kept_apart_and_the_best_held_out_one_is_known() -> None:
    progress = after(*TRAINING, HeldOut(step=0, loss=3), step(1, 2.0), HeldOut(step=1, loss=1), step(2, None), HeldOut(step=2, loss=2))
    assert progress.train.points == [(1, 2.0)]
    assert progress.held_out == [(0, 3), (1, 1), (2, 2)]
    assert progress.best is not None
    assert (progress.best.step, progress.best.loss) == (1, 1)
    assert (progress.loss, progress.held_out_loss, progress.step) == (2.0, 2, 2)


def test_a_run_that_goes_on_after_its_end_is_running_again() -> None:
    progress = after(*TRAINING, step(3), Asked(wish="stop"), Interrupted(step=3), Phase(name="loading"))
    assert progress.state == "running"
    assert progress.status_line() == "name · loading · loss 1.23"
    assert progress.end_sentence() == ""


# Curves -----------------------------------------------------------------------------------------------------------------

losses = st.lists(st.floats(-1e6, 1e6), max_size=300)


@given(losses, st.integers(2, 40))
def test_a_curve_keeps_at_most_its_limit_and_the_mean(values: list[float], limit: int) -> None:
    curve = Curve(limit)
    for number, value in enumerate(values, 1):
        curve.add(number, value)
        assert len(curve.points) <= limit
    kept = len(curve.points) * curve.stride
    assert len(values) - kept < curve.stride
    assert sum(value for _, value in curve.points) * curve.stride == pytest.approx(sum(values[:kept]), abs=1e-3)
    assert [at for at, _ in curve.points] == [curve.stride * (index + 1) for index in range(len(curve.points))]


def test_a_curve_that_fits_is_not_thinned() -> None:
    curve = Curve(600)
    for number in range(1, 600):
        curve.add(number, number)
    assert curve.points == [(number, number) for number in range(1, 600)]
    curve.add(600, 600)
    assert curve.points[0] == (2, 1.5)
    assert curve.points[-1] == (600, 599.5)
    assert len(curve.points) == 300


def test_of_many_evaluations_the_best_one_stays_and_a_plot_starts_over_when_they_are_thinned() -> None:
    progress = after(*TRAINING, *(HeldOut(step=at, loss=1 + abs(at - 777) / 1000) for at in range(1, 1000)))
    assert len(progress.held_out) < 300
    assert min(loss for _, loss in progress.held_out) == 1
    assert (777, 1) in progress.held_out
    before = (progress.rewinds, 1, 0, len(progress.held_out))
    for at in range(1000, 1300):
        progress.add(HeldOut(step=at, loss=2))
    assert progress.curves_since(*before).restart


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 10)), max_size=120), st.data())
def test_what_a_plot_lacks_adds_up_to_the_whole(history: list[tuple[bool, float]], data: st.DataObject) -> None:
    progress = after(*TRAINING)
    progress.train = Curve(8)
    looks = data.draw(st.sets(st.integers(0, len(history))))
    stride, train, held_out = 1, [], []  # what the plot has
    for at in range(len(history) + 1):
        if at in looks or at == len(history):
            delta = progress.curves_since(0, stride, len(train), len(held_out))
            if delta.restart:
                train, held_out = [], []
            train, held_out, stride = train + delta.train, held_out + delta.held_out, delta.stride
            assert (train, held_out) == (progress.train.points, progress.held_out)
            assert (delta.count, delta.total_steps) == (len(train), 10)
            again = progress.curves_since(0, stride, len(train), len(held_out))
            assert (again.restart, again.train, again.held_out) == (False, [], [])
        if at < len(history):
            is_step, loss = history[at]
            progress.add(step(at + 1, loss) if is_step else HeldOut(step=at + 1, loss=loss))


def test_a_plot_that_shows_another_run_starts_over() -> None:
    progress = after(*TRAINING, step(1), HeldOut(step=1, loss=2))
    for seen in [(0, 1, 500, 0), (0, 1, 0, 7), (0, 4, 1, 1), (1, 1, 1, 1)]:
        delta = progress.curves_since(*seen)
        assert delta.restart
        assert (delta.train, delta.held_out) == (progress.train.points, progress.held_out)


@given(st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_what_the_small_curves_lack_adds_up_to_the_whole_also_after_a_resumed_run(seen: int, more: int, resumed: bool) -> None:
    progress = after(*TRAINING)
    progress.grad_norm = Curve(8)  # is thinned on the way
    for number in range(1, seen + 1):
        progress.add(step(number))
    first = progress.more_since(-1, {})
    known = {name: (first["curves"][name]["stride"], len(first["curves"][name]["points"])) for name in MORE_CURVES}
    if resumed:
        progress.add(Resumed(step=seen // 2))
    for number in range(progress.step + 1, progress.step + 1 + more):
        progress.add(step(number))
    second = progress.more_since(first["rewinds"], known)
    for name in MORE_CURVES:
        before, news = first["curves"][name], second["curves"][name]
        assert [*([] if news["restart"] else before["points"]), *news["points"]] == getattr(progress, name).points
        assert not news["restart"] or resumed or name == "grad_norm"


def test_a_step_without_a_gradient_norm_and_a_spike_are_no_gap_in_the_small_curves() -> None:
    progress = after(*TRAINING, *(replace(step(at), grad_norm=None if at % 2 else at) for at in range(1, 601)))
    assert max(progress.grad_norm.points) == (600, 600)
    assert len(progress.learning_rate.points) < 200
    assert {value for _, value in progress.memory_gib.points} == {1.0}


# Log --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Log(text="a"), "a"),
        (Log(text="a", level="warning"), "Note: a"),
        (Phase(name="fetching", detail="owner/name"), "Fetching the model: owner/name"),
        (Phase(name="saving"), "Saving"),
        (PhaseProgress(done=1, total=2, unit="rows"), ""),
        (planned(10), "10 steps over 8 rows (2 held out); 12,345 tokens a pass, 678 of them trained on"),
        (step(3), "step 3  loss 1.2340  lr 2.00e-04  100 tokens/s"),
        (step(3, None), "step 3  loss not finite  lr 2.00e-04  100 tokens/s"),
        (HeldOut(step=3, loss=1), "step 3  held-out loss 1.0000  perplexity 2.718"),
        (HeldOut(step=3, loss=1e9), "step 3  held-out loss 1000000000.0000  perplexity 1.014e+304"),
        (
            Sample(step=3, prompt="Who\nare you?", base="I am", adapter="word " * 50),
            f"step 3  asked: Who are you?  ·  base: I am  ·  adapter: {'word ' * 31}…",
        ),
        (CheckpointSaved(step=3, name="checkpoint-3", best=True), "step 3  checkpoint saved, the best so far"),
        (step(3, None, skipped=True), "step 3  loss not finite  lr 2.00e-04  100 tokens/s  skipped: the weights stay as they were"),
        (Finished(step=3, reason="ended before step 9"), "Finished: 3 steps, adapter saved; ended before step 9"),
        (CheckpointSaved(step=3, name="checkpoint-3"), "step 3  checkpoint saved"),
        (AdapterSaved(step=3), ""),
        (Asked(wish="stop"), "Stop was asked for"),
        (Asked(wish="pause"), "A pause was asked for"),
        (Paused(step=4, total_steps=10), "Paused at step 4 of 10"),
        (Paused(step=0, total_steps=0), "Paused before the first step"),
        (Paused(step=4, total_steps=10, reason="The disk is full."), "Paused at step 4 of 10: The disk is full."),
        (Resumed(step=0), "Begins again"),
        (Resumed(step=4, checkpoint="checkpoint-4", changes={"max_steps": [10, 20]}), "Goes on from step 4; max_steps 10 → 20"),
        (Finished(step=3), "Finished: 3 steps, adapter saved"),
        (Failed(message="why", traceback="Traceback"), "why"),
        (Interrupted(step=3), "Interrupted at step 3"),
        (Stopped(step=3, total_steps=9, adapter_saved=True), "Stopped at step 3 of 9, adapter saved"),
    ],
)
def test_each_kind_of_event_has_its_line_in_the_log(event: Event, line: str) -> None:
    assert log_line(event) == line


def test_no_kind_of_event_is_forgotten_here() -> None:
    cases = next(mark for mark in test_each_kind_of_event_has_its_line_in_the_log.pytestmark).args[1]  # type: ignore[attr-defined]
    assert {type(event) for event, _ in cases} == set(KINDS.values())


def test_the_log_keeps_its_tail_with_the_time_of_day() -> None:
    progress = after(*(Log(text=f"line {number}", time=0) for number in range(100)), PhaseProgress(done=1, total=2, unit="rows"))
    assert len(progress.log) == 60
    assert progress.log[-1].endswith("  line 99")
    assert progress.log[-1][:8].count(":") == 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3, "0 s"), (0.4, "0 s"), (89, "89 s"), (90, "2 min"), (89 * 60, "89 min"), (90 * 60, "1 h 30 min"), (125 * 60, "2 h 5 min")],
)
def test_a_time_is_said_in_short_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_an_amount_of_unknown_total_is_said_alone() -> None:
    assert amount(PhaseProgress(done=2_000_000, total=0, unit="bytes")) == "2 MB"
    assert amount(PhaseProgress(done=1234, total=5678, unit="rows")) == "1,234 of 5,678 rows"
