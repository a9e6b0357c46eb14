"""Trainings in line: kept on disk, in their order, begun one after another, and never twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from qlora_ui import queue_runner, queueing
from qlora_ui.cli import main
from qlora_ui.errors import Busy, UserError
from qlora_ui.events import Event, Finished, Paused, Phase, Step
from qlora_ui.jobs import Jobs
from qlora_ui.queue_runner import QueueRunner
from qlora_ui.queueing import Entry, Queue
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60.0


@pytest.fixture
def queue(workspace: Workspace) -> Queue:
    return Queue.of(workspace)


def waiting(queue: Queue) -> list[str]:
    return [entry.name for entry in queue.entries()]


def add(queue: Queue, data: Path | str, *names: str, **values: object) -> list[Entry]:
    return queue.add([Entry(config=tiny.tiny_config(data, **values), name=name) for name in names])


class Training:
    """Does what a run's name says: `fails`, `breaks` after a step, `rests` when it is asked to, or comes to its end."""

    def __init__(self) -> None:
        self.resting = threading.Event()

    def __call__(self, run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool], checkpoint: Path | None = None) -> None:
        emit(Phase(name="training"))
        if run.name == "fails":
            raise UserError("There is no answer. Write one.")
        emit(Step(step=1, loss=1, learning_rate=0, grad_norm=1, tokens_per_second=1, memory_gib=1, epoch=1))
        if run.name == "breaks":
            raise UserError("The loss diverged. Lower the rate.")
        if run.name == "rests":
            self.resting.set()
            while not should_stop():
                threading.Event().wait(0.01)
            raise Cancelled
        emit(Finished(step=1))


def runner(workspace: Workspace, train: Callable[..., None]) -> QueueRunner:
    jobs = Jobs(workspace, train)

    def begin(entry: Entry) -> Run:
        assert entry.config is not None
        return jobs.start(entry.config, name=entry.name, facts=entry.facts())

    return QueueRunner(workspace, begin, look_seconds=0.02)


def done(workspace: Workspace) -> list[tuple[str, str]]:
    return [(run.name, run.state()) for run in reversed(workspace.all())]


# On disk ------------------------------------------------------------------------------------------------------------------


def test_what_waits_is_a_whole_config_a_file_and_comes_back_as_it_was(workspace: Workspace, queue: Queue, rows: Path) -> None:
    entry = Entry(config=tiny.tiny_config(rows, lora_r=7), name="seven", isolated=True, sweep="today lora_r")
    (added,) = queue.add([entry])
    written = json.loads((queue.folder / f"{added.id}.json").read_text())
    assert set(written["config"]) == {"version", *tiny.tiny_config(rows).to_dict()}
    assert Queue.of(workspace).entries() == [dataclasses.replace(entry, id=added.id)]
    assert Entry.from_dict(added.id, written) == added


def test_the_order_is_that_of_adding_until_somebody_moves_one(queue: Queue, rows: Path) -> None:
    first, second, third = add(queue, rows, "first", "second", "third")
    queue.move(third.id, -1)
    assert waiting(queue) == ["first", "third", "second"]
    queue.move(third.id, -5)
    queue.move(second.id, 5)
    queue.move("nobody", 1)
    assert waiting(queue) == ["third", "first", "second"]
    add(queue, rows, "fourth")
    queue.remove(first.id)
    queue.remove(first.id)
    assert waiting(queue) == ["third", "second", "fourth"]
    (queue.folder / "order.json").write_text("[")
    assert waiting(queue) == ["second", "third", "fourth"]


def test_of_several_that_cannot_all_be_written_none_waits(queue: Queue, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(queue, rows, "before")
    write, written = queueing.write_json, list[Path]()

    def full(path: Path, value: object) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        write(path, value)

    monkeypatch.setattr(queueing, "write_json", full)
    with pytest.raises(UserError, match=r"The disk of .* is full"):
        add(queue, rows, "one", "two")
    assert waiting(queue) == ["before"]


def test_a_file_that_cannot_be_read_is_shown_with_its_trouble_and_the_others_are_not_held_up(
    workspace: Workspace, queue: Queue, rows: Path
) -> None:
    broken, old, _ = add(queue, rows, "broken", "old", "good")
    (queue.folder / f"{broken.id}.json").write_text("{")
    path = queue.folder / f"{old.id}.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    troubles = {entry.id: entry.trouble for entry in queue.entries()}
    assert "is damaged" in troubles[broken.id]
    assert "has version 99" in troubles[old.id]
    runner(workspace, Training()).go(until_empty=True)
    assert done(workspace) == [("good", "finished")]
    queue.remove(broken.id)
    assert [entry.id for entry in queue.entries()] == [old.id]


# One after another --------------------------------------------------------------------------------------------------------


def test_runs_begin_one_after_another_and_one_that_fails_does_not_end_the_queue(workspace: Workspace, queue: Queue, rows: Path) -> None:
    add(queue, rows, "first", "fails", "breaks")
    (gone,) = add(queue, rows.with_name("gone.json"), "gone")
    add(queue, rows, "last")
    told: list[str] = []
    runner(workspace, Training()).go(
        until_empty=True, on_start=lambda run: told.append(f"{run.name} begins"), on_end=lambda run: told.append(run.state())
    )
    assert done(workspace) == [("first", "finished"), ("fails", "failed"), ("breaks", "paused"), ("last", "finished")]
    assert told[:4] == ["first begins", "finished", "fails begins", "failed"]
    (left,) = queue.entries()
    assert left.id == gone.id
    assert "gone.json" in left.trouble
    tiny.tiny_rows(rows.with_name("gone.json"))
    queue.let_go()
    runner(workspace, Training()).go(until_empty=True)
    assert done(workspace)[-1] == ("gone", "finished")
    assert queue.entries() == []


def test_a_run_that_trains_already_is_waited_for(workspace: Workspace, queue: Queue, rows: Path) -> None:
    train = Training()
    jobs = Jobs(workspace, train)
    add(queue, rows, "next")
    live = jobs.start(tiny.tiny_config(rows), name="rests")
    assert train.resting.wait(SECONDS)
    works = threading.Thread(target=runner(workspace, train).go, kwargs={"until_empty": True})
    works.start()
    assert waiting(queue) == ["next"]
    live.ask("stop")
    works.join(SECONDS)
    assert done(workspace) == [("rests", "stopped"), ("next", "finished")]


def test_a_pause_by_its_owner_holds_the_queue_and_says_so(workspace: Workspace, queue: Queue, rows: Path) -> None:
    train = Training()
    add(queue, rows, "rests", "next")
    works = threading.Thread(target=runner(workspace, train).go)
    works.start()
    assert train.resting.wait(SECONDS)
    assert queue.is_going()
    workspace.all()[0].ask("pause")
    works.join(SECONDS)
    assert done(workspace) == [("rests", "paused")]
    assert waiting(queue) == ["next"]
    assert not queue.is_going()
    assert queue.why_held() == "Held, because rests was paused. Start the queue to go on with the next."


def test_a_queue_that_is_held_lets_the_run_go_on_and_begins_nothing_after_it(workspace: Workspace, queue: Queue, rows: Path) -> None:
    train = Training()
    add(queue, rows, "rests", "next")
    works = threading.Thread(target=runner(workspace, train).go)
    works.start()
    assert train.resting.wait(SECONDS)
    queue.hold()
    assert (queue.is_going(), queue.is_worked_through()) == (False, True)
    workspace.all()[0].ask("stop")
    works.join(SECONDS)
    assert waiting(queue) == ["next"]
    assert not queue.is_worked_through()


def test_two_who_work_at_once_begin_nothing_twice(workspace: Workspace, queue: Queue, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing, "STARTING_SECONDS", 0.1)
    names = [f"run-{number}" for number in range(6)]
    add(queue, rows, *names)
    together, busy = threading.Barrier(3), list[str]()

    def work() -> None:
        together.wait()
        try:
            runner(workspace, Training()).go(until_empty=True)
        except Busy as error:
            busy.append(str(error))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    assert [name for name, _ in done(workspace)] == names
    assert all("worked through already" in said for said in busy)


def test_what_had_begun_when_its_starter_was_killed_is_not_begun_again(workspace: Workspace, queue: Queue, rows: Path) -> None:
    killed, _ = add(queue, rows, "killed", "next")
    run, lock = workspace.create(tiny.tiny_config(rows), "killed", {}, killed.facts())
    lock.release()
    run.append(Phase(name="training"))
    runner(workspace, Training()).go(until_empty=True)
    assert done(workspace) == [("killed", "interrupted"), ("next", "finished")]


def test_trouble_of_the_disk_holds_the_queue_with_its_sentence(
    workspace: Workspace, queue: Queue, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(queue, rows, "first")

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    def refuse(entry: Entry) -> Run:
        raise UserError("The disk is full.")

    works = QueueRunner(workspace, refuse)
    works.queue.let_go()
    monkeypatch.setattr(queueing, "write_json", full)
    works._go_on()
    assert queue.why_held().startswith("Held, because of trouble: The disk of")
    assert waiting(queue) == ["first"]
    assert "is full" in capsys.readouterr().err


def test_what_surely_cannot_begin_is_refused_when_it_is_put_in_line(workspace: Workspace, rows: Path) -> None:
    queue_runner.check(workspace, tiny.tiny_config(rows, model="owner/on-the-hub"), isolated=False)
    with pytest.raises(UserError, match="There is no model 'tiny' on this machine"):
        queue_runner.check(workspace, tiny.tiny_config(rows), isolated=False)
    with pytest.raises(UserError, match=r"There is no file .*nowhere\.json"):
        queue_runner.check(workspace, tiny.tiny_config("nowhere.json"), isolated=False)


# The command line, with real trainings ------------------------------------------------------------------------------------


def flags(data: Path, **values: object) -> list[str]:
    config = {**tiny.tiny_config(data, **values).values()}
    return ["--data", str(data), *(part for name, value in config.items() if name != "data" for part in ("--set", f"{name}={value}"))]


def test_the_terminal_trains_what_waits_in_both_executors_and_a_kill_loses_nothing(
    tiny_workspace: Workspace, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = Queue.of(tiny_workspace)
    assert main(["queue", "--add", *flags(rows, max_steps=1_000_000)]) == 0
    assert main(["queue", "--add", *flags(rows, max_steps=2)]) == 0
    assert main(["queue", "--add", "--isolated", *flags(rows, max_steps=1)]) == 0
    assert "waits as number 3. Train what waits with: python -m qlora_ui queue --run" in capsys.readouterr().out
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qlora_ui", "queue", "--run", "--json"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert any(json.loads(line)["kind"] == "step" for line in child.stdout)
        assert queue.is_going()
        assert main(["queue", "--run"]) == 2  # another works through it
        assert "worked through already" in capsys.readouterr().err
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not queue.is_going()
    assert len(queue.entries()) == 2
    assert main(["queue", "--list"]) == 0
    assert "The queue is held" in capsys.readouterr().out

    assert main(["queue", "--run"]) == 0
    assert [state for _, state in done(tiny_workspace)] == ["interrupted", "finished", "finished"]
    assert (tiny_workspace.all()[0].folder / "process.log").is_file()
    assert queue.entries() == []
    assert capsys.readouterr().out.count("Finished: ") == 2


def test_the_terminal_lists_moves_and_removes(tiny_workspace: Workspace, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = Queue.of(tiny_workspace)
    first, second = add(queue, rows, "first", "second")
    assert main(["queue", "--up", second.id]) == 0
    assert main(["queue", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert ([entry["name"] for entry in listed["entries"]], listed["going"]) == (["second", "first"], False)
    assert main(["queue", "--remove", first.id]) == 0
    assert main(["queue", "--remove", first.id]) == 2
    assert "Nothing in the queue has the id" in capsys.readouterr().err
    assert waiting(queue) == ["second"]


def test_ctrl_c_keeps_the_run_and_holds_the_queue(workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, train = Queue.of(workspace), Training()
    add(queue, rows, "rests", "next")
    monkeypatch.setattr("qlora_ui.queue_cli.Jobs", lambda workspace: Jobs(workspace, train))
    threading.Thread(target=lambda: train.resting.wait(SECONDS) and os.kill(os.getpid(), signal.SIGINT)).start()
    assert main(["queue", "--run"]) == 0
    assert done(workspace) == [("rests", "stopped")]
    assert waiting(queue) == ["next"]
    assert "Ctrl-C was pressed" in queue.why_held()


def test_a_run_from_the_queue_that_was_paused_by_trouble_is_told_by_the_exit_code(
    workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(Queue.of(workspace), rows, "breaks", "last")
    monkeypatch.setattr("qlora_ui.queue_cli.Jobs", lambda workspace: Jobs(workspace, Training()))
    assert main(["queue", "--run"]) == 2
    assert "The loss diverged. Lower the rate." in capsys.readouterr().err
    assert done(workspace) == [("breaks", "paused"), ("last", "finished")]
    assert isinstance(workspace.all()[1].last_word(), Paused)
