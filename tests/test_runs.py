"""Run folders: what a reader may rely on while somebody writes, is killed, or asks for nonsense."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from filelock import Timeout

from qlora_ui import runs
from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.events import (
    AdapterSaved,
    Asked,
    CheckpointSaved,
    Event,
    Failed,
    Finished,
    HeldOut,
    Interrupted,
    Log,
    Phase,
    Step,
    Stopped,
)
from qlora_ui.runs import ENV, Run, Workspace

ROOT = Path(__file__).resolve().parents[1]


def step(number: int) -> Step:
    return Step(step=number, loss=1.0, learning_rate=0.1, grad_norm=None, tokens_per_second=1.0, memory_gib=1.0, epoch=0.1)


@pytest.fixture
def run(workspace: Workspace) -> Run:
    """A run in its training phase, with two steps done, whose process is gone."""
    run = tiny.tiny_run(workspace, "rows.json")
    for event in (Phase(name="training"), step(1), step(2)):
        run.append(event)
    return run


HOLD = """
import sys
from qlora_ui.runs import Run
from pathlib import Path
with Run(folder=Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run's lock, as a training does."""
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


# State and its settling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "state"),
    [
        (Phase(name="saving"), "running"),
        (Log(text="a"), "running"),
        (Finished(step=2), "finished"),
        (Stopped(step=2, total_steps=4, adapter_saved=True), "stopped"),
        (Failed(message="a"), "failed"),
        (Interrupted(step=2), "interrupted"),
    ],
)
def test_the_state_is_what_the_events_say(run: Run, event: Event, state: str) -> None:
    run.append(event)
    assert run.state() == state
    run.append(AdapterSaved(step=2))
    assert run.state() == state


def test_a_long_run_is_running_although_its_phase_is_far_back(run: Run) -> None:
    for number in range(3, 700):
        run.append(step(number))
    assert run.size() > 65536
    assert run.state() == "running"
    run.append(Finished(step=699))
    assert run.state() == "finished"
    assert run.last_step() == 699


def test_settle_leaves_a_run_whose_process_lives_and_ends_it_after_a_kill(
    workspace: Workspace, run: Run, holder: subprocess.Popen[str]
) -> None:
    assert workspace.settle() == []
    assert workspace.live() == run
    assert run.state() == "running"
    holder.kill()
    holder.wait()
    assert workspace.settle() == [run]
    assert tiny.events_of(run)[-1] == Interrupted(step=2, time=tiny.events_of(run)[-1].time)
    assert workspace.settle() == []


def test_settle_does_what_a_killed_process_was_about_to_discard(workspace: Workspace, run: Run, holder: subprocess.Popen[str]) -> None:
    run.ask("discard")
    holder.kill()
    holder.wait()
    assert workspace.settle() == []
    assert list(workspace.runs.iterdir()) == []


def test_a_killed_run_is_not_taken_for_live(workspace: Workspace, run: Run, holder: subprocess.Popen[str]) -> None:
    assert workspace.live() == run
    holder.kill()
    holder.wait()
    assert workspace.live() is None
    assert run.state() == "interrupted"


@pytest.mark.parametrize("end", [Finished(step=2), Failed(message="a"), Stopped(step=2, total_steps=3, adapter_saved=True)])
def test_settle_adds_nothing_to_a_run_that_has_ended(workspace: Workspace, run: Run, end: Event) -> None:
    run.append(end)
    size = run.size()
    assert workspace.settle() == []
    assert run.size() == size


def test_two_who_settle_at_once_write_one_end(workspace: Workspace, run: Run) -> None:
    together = threading.Barrier(4)

    def settle() -> None:
        together.wait()
        workspace.settle()

    threads = [threading.Thread(target=settle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    workspace.settle()
    assert len(tiny.events_of(run, Interrupted)) == 1


# Making and finding -----------------------------------------------------------------------------------------------------


def test_a_new_run_is_locked_and_holds_its_config(workspace: Workspace) -> None:
    config = tiny.tiny_config("rows.json")
    run, lock = workspace.create(config, "a-name", {"torch": "2"})
    with pytest.raises(Timeout):
        run.lock().acquire(timeout=0)
    assert workspace.settle() == []
    lock.release()
    assert run.name == "a-name"
    assert run.workspace == workspace
    assert run.config() == config
    assert run.facts()["versions"] == {"torch": "2"}
    assert run.read() == ([], 0)
    run.note(model_commit="abc")
    assert run.facts()["model_commit"] == "abc"
    assert run.config() == config
    assert not list(run.folder.glob("*.partial"))


@pytest.mark.parametrize("seconds", [0, -7 * 3600, 7 * 3600])
def test_every_new_run_sorts_after_all_others_whatever_the_clock_says(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    made = []
    for number in range(12):
        monkeypatch.setattr(runs.time, "time", lambda number=number: 1_795_000_000.0 + number * seconds)
        made.append(tiny_lock_free(workspace, f"{'z' if number % 2 else 'a'}" * 48))
        assert workspace.newest() == made[-1]
    assert workspace.all() == made[::-1]
    assert [workspace.get(run.id) for run in made] == made


def tiny_lock_free(workspace: Workspace, name: str) -> Run:
    run, lock = workspace.create(RunConfig(), name, {})
    lock.release()
    return run


def test_a_run_that_cannot_be_written_down_leaves_no_folder(workspace: Workspace) -> None:
    unwritable: dict[str, Any] = {"torch": object()}
    with pytest.raises(TypeError):
        workspace.create(RunConfig(), "a", unwritable)
    assert list(workspace.runs.iterdir()) == []


@pytest.mark.parametrize("lost", ["config_path", "events_path"])
def test_what_is_half_deleted_is_no_run(workspace: Workspace, run: Run, lost: str) -> None:
    getattr(run, lost).unlink()
    assert (workspace.all(), workspace.newest(), workspace.live(), workspace.settle()) == ([], None, None, [])
    with pytest.raises(UserError, match="There is no run"):
        workspace.get(run.id)


def test_the_newest_run_is_first_and_other_folders_are_no_runs(workspace: Workspace) -> None:
    assert workspace.newest() is None
    for stamp in ("20261122-100139", "20270101-000000", "20261122-100140"):
        tiny_lock_free(workspace, "a").folder.rename(workspace.runs / f"{stamp}-a")
    (workspace.runs / "20280101-000000-no-config").mkdir()
    (workspace.runs / "notes").mkdir()
    (workspace.runs / ".DS_Store").touch()
    assert [run.id for run in workspace.all()] == ["20270101-000000-a", "20261122-100140-a", "20261122-100139-a"]
    newest = workspace.newest()
    assert newest is not None
    assert newest.id == "20270101-000000-a"


@pytest.mark.parametrize(
    "run_id",
    [
        "",
        ".",
        "..",
        "../runs/{}",
        "{}/",
        "{}/../{}",
        "/{}",
        "{}\n",
        "{}\0",
        "{} ",
        "20261122-100139-a/../../x",
        "20261122-100139-missing",
        "x" * 5000,
    ],
)
def test_an_id_with_path_parts_or_of_no_run_is_refused(workspace: Workspace, run: Run, run_id: str) -> None:
    with pytest.raises(UserError, match="There is no run") as caught:
        workspace.get(run_id.replace("{}", run.id))
    assert caught.value.field == "run"
    assert workspace.get(run.id) == run


def test_the_workspace_is_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert Workspace.open().root == home.resolve()
    assert Workspace.open(tmp_path / "flag").root == (tmp_path / "flag").resolve()
    assert all(folder.is_dir() for folder in (Workspace.open().runs, Workspace.open().models, Workspace.open().uploads))
    monkeypatch.setenv(ENV, "")
    monkeypatch.setattr(runs, "DEFAULT_HOME", tmp_path / "default")
    assert Workspace.open().root == (tmp_path / "default").resolve()


def test_a_workspace_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^The workspace ~nobody-here/x cannot be written \(.+\)\. Choose another"):
        Workspace.open("~nobody-here/x")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"The workspace {tmp_path}/file cannot be written \(.+\)\. Choose another with --home or {ENV}\."):
        Workspace.open(tmp_path / "file")


# Stop, checkpoints, result ------------------------------------------------------------------------------------------------


def test_asking_twice_to_stop_is_asking_once(run: Run) -> None:
    assert not run.is_asked()
    run.ask("stop")
    run.ask("stop")
    assert run.is_asked()
    assert len(tiny.events_of(run, Asked)) == 1


def test_many_who_ask_to_stop_at_once_ask_once(run: Run) -> None:
    together = threading.Barrier(8)

    def ask() -> None:
        together.wait()
        run.ask("stop")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tiny.events_of(run, Asked)) == 1


def test_asking_a_run_that_has_ended_to_stop_changes_nothing(run: Run) -> None:
    run.append(Finished(step=2))
    size = run.size()
    run.ask("stop")
    assert run.size() == size
    assert not run.is_asked()


def test_checkpoints_are_those_that_were_reported_and_are_still_there(run: Run) -> None:
    for number in (2, 4, 6):
        (run.folder / f"checkpoint-{number}").mkdir()
        run.append(CheckpointSaved(step=number, name=f"checkpoint-{number}"))
    (run.folder / "checkpoint-2").rmdir()
    (run.folder / "checkpoint-8").mkdir()  # being written
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-4", "checkpoint-6"]


def test_the_result_appears_whole_and_its_predecessor_is_never_deleted_in_place(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, removed = runs.shutil.rmtree, []

    def watched(folder: Path, **options: Any) -> None:
        removed.append(folder)
        remove(folder, **options)

    monkeypatch.setattr(runs.shutil, "rmtree", watched)
    for version in ("one", "two"):
        aside = run.folder / "adapter.partial"
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "weights").write_text(version)
        run.publish_adapter(aside, 2)
        assert (run.adapter / "inner" / "weights").read_text() == version
        assert not aside.exists()
    assert run.adapter not in removed
    assert sorted(path.name for path in run.folder.iterdir() if path.is_dir()) == ["adapter"]
    assert [event.step for event in tiny.events_of(run, AdapterSaved)] == [2, 2]


def test_the_written_config_is_json_that_other_tools_read(run: Run) -> None:
    written = json.loads(run.config_path.read_bytes().decode("ascii"))
    assert written["version"] == 1
    assert written["model"]["model"] == tiny.NAME
    assert HeldOut.kind not in written
