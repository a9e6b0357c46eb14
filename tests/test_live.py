"""What pages are told of a run: the same to all, only what they lack, and never from the beginning again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import tiny

from qlora_ui import services, snapshots
from qlora_ui.events import (
    AdapterSaved,
    Asked,
    CheckpointSaved,
    Event,
    Failed,
    Finished,
    HeldOut,
    Log,
    Paused,
    Phase,
    PhaseProgress,
    Planned,
    Resumed,
    Step,
)
from qlora_ui.progress import Progress, fold
from qlora_ui.runs import Run, Workspace
from qlora_ui.ui import live, more_curves

PLANNED = Planned(total_steps=100, train_rows=8, held_out_rows=2, tokens=80, trained_tokens=40)


def step(number: int, skipped: bool = False) -> Step:
    loss = None if skipped else 1.5
    return Step(
        step=number, loss=loss, learning_rate=1e-4, grad_norm=1.0, tokens_per_second=9.0, memory_gib=1.0, epoch=0.1, skipped=skipped
    )


@pytest.fixture
def news(workspace: Workspace) -> live.News:
    return live.News(services.build(workspace, services.WarmUp()))


@pytest.fixture
def run(workspace: Workspace, rows: Path) -> Run:
    """A run in its fifth step."""
    run = tiny.tiny_run(workspace, rows)
    for event in (Phase(name="training"), PLANNED, *map(step, range(1, 6))):
        run.append(event)
    return run


def ask(news: live.News, known: dict[str, Any] | None = None, curve: list[Any] | None = None) -> dict[str, Any]:
    known = known or {"version": "", "run": "", "log": {"count": -1}}
    return news.since(known["version"], known["run"], known["log"]["count"], curve)


def test_a_page_is_told_only_what_it_lacks(news: live.News, run: Run) -> None:
    first = ask(news)
    assert "training 5/100" in first["parts"]["status-line"]
    assert (first["log"]["start"], first["log"]["count"], len(first["log"]["lines"])) == (0, 7, 7)
    assert ask(news, first) == {}
    run.append(step(6))
    second = ask(news, first, [run.id, 0, 1, 5, 0])
    assert second["redraw"] == first["redraw"]  # a step redraws no button
    assert [line.split("  ")[1] for line in second["log"]["lines"]] == ["step 6"]
    assert [at for at, _ in second["curve"]["train"]] == [6]
    assert len(json.dumps(second)) < 2000
    run.append(Finished(step=6))
    assert ask(news, second)["redraw"] != first["redraw"]


def test_the_small_curves_are_asked_for_apart_and_only_their_new_points_come(workspace: Workspace, news: live.News, run: Run) -> None:
    assert "tokens_per_second" not in json.dumps(ask(news))
    with gr.Blocks(analytics_enabled=False):
        section = more_curves.build(services.build(workspace, services.WarmUp()))
    first = section.more_points([run.id, -1, {}])
    known = {name: [curve["stride"], len(curve["points"])] for name, curve in first["curves"].items()}
    assert [number for _, number in known.values()] == [5] * 4
    run.append(step(6))
    second = section.more_points([run.id, first["rewinds"], known])
    assert {name: curve["points"] for name, curve in second["curves"].items()} == {
        "learning_rate": [(6, 1e-4)],
        "grad_norm": [(6, 1.0)],
        "tokens_per_second": [(6, 9.0)],
        "memory_gib": [(6, 1.0)],
    }
    assert len(json.dumps(second)) < 400
    assert section.more_points(["gone", -1, {}])["curves"]["grad_norm"]["points"] == []


def test_hints_are_told_with_the_runs_own_limit_for_gradients(news: live.News, run: Run) -> None:
    assert "Nothing to point out" in ask(news)["parts"]["hints"]
    for number in range(6, 106):
        run.append(replace(step(number), loss=2 - number / 1000))
    assert "Gradients were clipped at 100 of the last 100 steps: median norm 1, limit 0.3." in ask(news)["parts"]["hints"]


def test_pages_opened_at_any_time_show_the_same_and_are_drawn_once(news: live.News, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Progress | None] = []
    draw = live.markup.tiles
    monkeypatch.setattr(live.markup, "tiles", lambda progress: drawn.append(progress) or draw(progress))
    early = ask(news)
    run.append(step(6))
    answers = [ask(news, early), ask(news), ask(news)]
    assert len({json.dumps([answer["version"], answer["parts"]]) for answer in answers}) == 1
    assert len(drawn) == 2  # once for the fifth step and once for the sixth
    assert early["log"]["lines"] + answers[0]["log"]["lines"] == answers[1]["log"]["lines"]


def test_a_page_that_lacks_more_lines_than_are_kept_gets_the_last_ones(news: live.News, run: Run) -> None:
    known = ask(news)
    for number in range(100):
        run.append(Log(text=f"line {number}"))
    log = ask(news, known)["log"]
    assert (log["start"], log["count"], len(log["lines"])) == (47, 107, 60)


def test_a_discarded_run_leaves_an_empty_page(news: live.News, run: Run) -> None:
    known = ask(news)
    run.discard()
    answer = ask(news, known)
    assert "No run yet" in answer["parts"]["status-line"]
    assert answer["redraw"].startswith("no run")
    assert ask(news, answer) == {}


def test_a_page_whose_runs_folder_is_gone_says_so_until_it_is_back(news: live.News, run: Run, workspace: Workspace) -> None:
    known = ask(news)
    workspace.runs.rename(workspace.root / "moved")
    answer = ask(news, known)
    assert f"The folder {workspace.runs} is gone. Put it back if it was moved" in answer["parts"]["status-line"]
    assert ask(news, answer) == {}
    (workspace.root / "moved").rename(workspace.runs)
    assert "training 5/100" in ask(news, answer)["parts"]["status-line"]


def test_our_bug_is_in_the_log_with_its_traceback_and_as_text(news: live.News, run: Run) -> None:
    run.append(Failed(message="<b>broke</b>", traceback="Traceback <img src=x onerror=alert(1)>"))
    answer = ask(news)
    assert "<b>" not in answer["parts"]["status-line"]
    assert answer["log"]["lines"][-1].endswith("\nTraceback <img src=x onerror=alert(1)>")  # the page writes lines as text


def test_a_long_run_is_read_in_pieces_and_its_end_not_told_before_it_is_known(
    news: live.News, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "PIECE_BYTES", 300)
    monkeypatch.setattr(live, "READING_SECONDS", 0.0)
    run.append(Log(text="long " * 200))  # longer than a piece
    run.append(Finished(step=5))
    known = ask(news)
    asked = 1
    while known.get("behind"):
        assert "reading what it did so far" in known["parts"]["status-line"]
        assert known["redraw"] == ""
        known = ask(news, known)
        asked += 1
    assert asked > 3
    assert "Finished: 5 steps" in known["parts"]["status-line"]


EVERYTHING: list[Event] = [
    Phase(name="fetching"),
    PhaseProgress(done=1, total=4, unit="bytes"),
    Phase(name="training"),
    PLANNED,
    *[event for at in range(1, 8) for event in (step(at), HeldOut(step=at, loss=3 / at))],
    step(8, skipped=True),
    CheckpointSaved(step=8, name="checkpoint-8", best=True),
    Asked(wish="pause"),
    Paused(step=8, total_steps=100, reason="The disk is full.", traceback="Traceback"),
    Resumed(step=6, checkpoint="checkpoint-6"),
    *map(step, range(7, 20)),
    AdapterSaved(step=19),
    Finished(step=19),
]


@pytest.mark.parametrize("at", range(len(EVERYTHING) + 1))
def test_progress_written_and_read_goes_on_as_if_it_had_not_been(at: int) -> None:
    progress = Progress.from_dict(json.loads(json.dumps(fold("a", EVERYTHING[:at]).to_dict())))
    for event in EVERYTHING[at:]:
        progress.add(event)
    assert progress.to_dict() == fold("a", EVERYTHING).to_dict()
    assert progress.status_line() == fold("a", EVERYTHING).status_line()


@pytest.fixture
def kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run with a snapshot of its five steps, and a sixth after it."""
    monkeypatch.setattr(snapshots, "KEEP_EVERY_BYTES", 1)
    services.Watch().progress(run)
    assert snapshots.load(run).offset == run.size()
    run.append(step(6))
    return run


def test_after_a_restart_a_run_is_read_on_from_its_snapshot(kept: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: list[int] = []
    read = Run.read
    monkeypatch.setattr(Run, "read", lambda run, offset=0, most=-1: offsets.append(offset) or read(run, offset, most))
    assert services.Watch().progress(kept).to_dict() == fold(kept.name, read(kept)[0]).to_dict()
    assert min(offsets) > 0


@pytest.mark.parametrize("damage", ["shorter", "other", "torn", "shape", "version", "deleted"])
def test_a_snapshot_that_does_not_fit_is_ignored(kept: Run, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, lines = kept.folder / snapshots.NAME, kept.events_path.read_bytes().splitlines(keepends=True)
    if damage == "shorter":
        kept.events_path.write_bytes(b"".join(lines[:3]))
    elif damage == "other":
        kept.events_path.write_bytes(b"".join(lines).replace(b"1.5", b"2.5"))
    elif damage == "torn":
        snapshot.write_bytes(snapshot.read_bytes()[:100])
    elif damage == "shape":
        snapshot.write_text(json.dumps({**json.loads(snapshot.read_text()), "progress": {"name": "a"}}))
    elif damage == "version":
        monkeypatch.setattr(snapshots, "folded_by", lambda: b"other code")
    else:
        snapshot.unlink()
    assert snapshots.load(kept).offset == 0
    assert services.Watch().progress(kept).to_dict() == fold(kept.name, kept.read()[0]).to_dict()


def test_a_folder_that_cannot_be_written_costs_only_the_snapshot(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(snapshots, "KEEP_EVERY_BYTES", 1)
    monkeypatch.setattr(snapshots, "write_json", full)
    assert services.Watch().progress(run).step == 5


def test_many_open_pages_ask_less_often_and_pages_that_are_gone_do_not_count(news: live.News, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    assert [news.wait_seconds(f"page {number}") for number in range(2)] == [1.0] * 2
    for number in range(2, 20):
        news.wait_seconds(f"page {number}")
    assert news.wait_seconds("page 0") == 8.0
    now = 61.0
    assert news.wait_seconds("page 0") == 1.0
