"""One training at a time, and an end in the books whatever happens to it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from filelock import Timeout
from safetensors.torch import load_file

from qlora_ui import services
from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.events import Asked, Event, Failed, Finished, Interrupted, Paused, Phase, Step, Stopped
from qlora_ui.jobs import Jobs, execute, run_name
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 20.0


class Gated:
    """A training that tells when it has begun and lasts until it is let go or asked to stop."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool], checkpoint: Path | None = None) -> None:
        emit(Phase(name="training"))
        self.begun.set()
        while not self.go.wait(0.01):
            if should_stop():
                raise Cancelled
        emit(Finished(step=0))


def ended(jobs: Jobs) -> None:
    """Wait until no training holds the device."""
    jobs.workspace.lease().acquire(timeout=SECONDS).lock.release()


def folders(workspace: Workspace) -> list[str]:
    return sorted(os.listdir(workspace.runs))


# One at a time -----------------------------------------------------------------------------------------------------------


def test_start_returns_while_the_training_goes_on(workspace: Workspace, rows: Path) -> None:
    train = Gated()
    jobs = Jobs(workspace, train)
    run = jobs.start(tiny.tiny_config(rows))
    assert train.begun.wait(SECONDS)
    assert workspace.live() == run
    train.go.set()
    ended(jobs)
    assert run.state() == "finished"
    assert workspace.live() is None


def test_a_second_start_is_refused_with_the_name_of_the_first_and_leaves_no_folder(workspace: Workspace, rows: Path) -> None:
    train = Gated()
    jobs = Jobs(workspace, train)
    run = jobs.start(tiny.tiny_config(rows))
    assert train.begun.wait(SECONDS)
    before = run.size()
    for other in (jobs, Jobs(workspace, train)):
        for start in (other.start, other.run_here):
            with pytest.raises(UserError, match=f"^{run.id} is training already. Stop it or wait for its end.$"):
                start(tiny.tiny_config(rows))
    assert folders(workspace) == [run.id]
    assert run.size() == before
    train.go.set()
    ended(jobs)
    again = jobs.run_here(tiny.tiny_config(rows))
    assert again.state() == "finished"
    assert len(folders(workspace)) == 2


def test_of_many_who_start_at_once_one_starts(workspace: Workspace, rows: Path) -> None:
    train, together = Gated(), threading.Barrier(6)
    jobs, started, refused = Jobs(workspace, train), list[Run](), list[str]()

    def start() -> None:
        together.wait()
        try:
            started.append(jobs.start(tiny.tiny_config(rows)))
        except UserError as error:
            refused.append(str(error))

    clicks = [threading.Thread(target=start) for _ in range(6)]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    assert (len(started), len(refused), len(folders(workspace))) == (1, 5, 1)
    train.go.set()
    ended(jobs)
    assert started[0].state() == "finished"


HOLD = """
import sys
from qlora_ui.runs import Workspace
with Workspace.open().lease():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lease_holds_against_another_process_until_that_is_killed(workspace: Workspace, rows: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(Timeout):
            workspace.lease().acquire(timeout=0)
        with pytest.raises(UserError, match=r"^Another run is training already"):
            Jobs(workspace, Gated()).start(tiny.tiny_config(rows))
        assert folders(workspace) == []
        child.kill()
        child.wait()
    train = Gated()
    train.go.set()
    assert Jobs(workspace, train).run_here(tiny.tiny_config(rows)).state() == "finished"


@pytest.mark.parametrize("data", ["", "nowhere.json", "bundled:nope"])
def test_training_with_no_data_is_refused_at_once_and_leaves_no_folder(workspace: Workspace, data: str) -> None:
    jobs = Jobs(workspace, Gated())
    with pytest.raises(UserError) as caught:
        jobs.start(tiny.tiny_config(data))
    assert caught.value.field == "data"
    assert folders(workspace) == []
    ended(jobs)  # and the lease is free


def test_a_start_that_breaks_off_gives_the_lease_back(workspace: Workspace, rows: Path) -> None:
    jobs = Jobs(workspace, Gated())
    workspace.runs.rmdir()
    with pytest.raises(UserError, match=f"The folder {workspace.runs} is gone"):
        jobs.start(tiny.tiny_config(rows))
    workspace.runs.mkdir()
    ended(jobs)


def test_starting_settles_runs_that_were_killed(workspace: Workspace, rows: Path) -> None:
    killed = tiny.tiny_run(workspace, rows)
    killed.append(Phase(name="training"))
    train = Gated()
    train.go.set()
    Jobs(workspace, train).run_here(tiny.tiny_config(rows))
    assert killed.state() == "interrupted"


def test_the_device_is_given_back_before_the_training_and_in_its_books_if_that_fails(workspace: Workspace, rows: Path) -> None:
    order: list[str] = []
    jobs = Jobs(workspace, lambda run, emit, stop, checkpoint: order.append("train"), lambda: order.append("room"))
    jobs.run_here(tiny.tiny_config(rows))
    assert order == ["room", "train"]

    def no_room() -> None:
        raise RuntimeError("the chat would not let go")

    run = Jobs(workspace, Gated(), no_room).run_here(tiny.tiny_config(rows))
    assert run.state() == "failed"
    assert "the chat would not let go" in tiny.events_of(run, Failed)[0].message


def test_stop_does_not_wait_for_the_device_to_be_given_back(workspace: Workspace, rows: Path) -> None:
    asked, let_go = threading.Event(), threading.Event()

    def make_room() -> None:
        asked.set()
        let_go.wait(SECONDS)

    jobs = Jobs(workspace, Gated(), make_room)
    run = jobs.start(tiny.tiny_config(rows))
    assert asked.wait(SECONDS)
    run.ask("stop")
    ended(jobs)
    assert not let_go.is_set()
    assert run.state() == "stopped"
    let_go.set()


# How it ends --------------------------------------------------------------------------------------------------------------


def after(workspace: Workspace, error: BaseException, steps: int = 0) -> Run:
    run = tiny.tiny_run(workspace, "rows.json")

    def train(run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool], checkpoint: Path | None = None) -> None:
        for step in range(1, steps + 1):
            emit(Step(step=step, loss=1, learning_rate=0, grad_norm=1, tokens_per_second=1, memory_gib=1, epoch=1))
        raise error

    execute(run, train)
    return run


def test_a_mistake_of_the_person_fails_the_run_in_its_words_without_a_traceback(workspace: Workspace) -> None:
    run = after(workspace, UserError("Row 1 has no answer. Choose the answer column.", field="data"))
    (failed,) = tiny.events_of(run, Failed)
    assert (failed.message, failed.traceback) == ("Row 1 has no answer. Choose the answer column.", "")
    assert run.state() == "failed"


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero\nand more"), KeyError("a"), MemoryError(), SystemExit(3), KeyboardInterrupt()]
)
def test_a_bug_of_ours_fails_the_run_with_its_step_and_traceback(workspace: Workspace, error: BaseException) -> None:
    run = after(workspace, error)
    (failed,) = tiny.events_of(run, Failed)
    assert failed.message.startswith("Training broke off at step 0: ")
    assert "\n" not in failed.message
    assert (str(error).splitlines() or [type(error).__name__])[0] in failed.message
    assert failed.traceback.startswith("Traceback")
    assert type(error).__name__ in failed.traceback
    assert run.state() == "failed"


@pytest.mark.parametrize("error", [UserError("The learning rate is too high. Lower it."), ZeroDivisionError("by zero\nand more")])
def test_after_a_step_every_end_that_nobody_asked_for_is_a_pause_with_its_reason(workspace: Workspace, error: Exception) -> None:
    run = after(workspace, error, steps=3)
    (paused,) = tiny.events_of(run, Paused)
    assert paused.step == 3
    assert str(error).splitlines()[0] in paused.reason
    assert paused.traceback.startswith("Traceback") == isinstance(error, ZeroDivisionError)
    assert run.state() == "paused"


@pytest.mark.parametrize("error", [RuntimeError("\0" * 100_000), UserError("é" * 100_000), RuntimeError("short\n" + "x" * 10**6)])
def test_an_end_with_a_huge_message_is_still_an_end(workspace: Workspace, error: Exception) -> None:
    assert after(workspace, error).state() == "failed"
    assert workspace.settle() == []


def test_a_stop_before_the_first_step_is_no_failure(workspace: Workspace) -> None:
    run = after(workspace, Cancelled())
    (stopped,) = tiny.events_of(run, Stopped)
    assert (stopped.step, stopped.adapter_saved) == (0, False)
    assert run.state() == "stopped"


def test_stop_reaches_a_training_in_the_thread(workspace: Workspace, rows: Path) -> None:
    train = Gated()
    jobs = Jobs(workspace, train)
    run = jobs.start(tiny.tiny_config(rows))
    assert train.begun.wait(SECONDS)
    run.ask("stop")
    ended(jobs)
    assert run.state() == "stopped"
    assert len(tiny.events_of(run, Asked)) == 1


def test_a_real_training_in_the_thread_ends_with_its_adapter(tiny_workspace: Workspace, rows: Path) -> None:
    jobs = Jobs(tiny_workspace)
    run = jobs.start(tiny.tiny_config(rows))
    ended(jobs)
    assert run.state() == "finished"
    assert run.adapter.is_dir()
    assert run.facts()["versions"]["peft"]


def test_killed_training_is_interrupted_at_its_step_with_a_checkpoint_that_loads(tiny_workspace: Workspace, rows: Path) -> None:
    settings = {**tiny.tiny_config(rows, max_steps=1_000_000, save_steps=3, eval_steps=1_000_000).values()}
    command = [sys.executable, "-m", "qlora_ui", "train", "--json"]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = []
        for line in child.stdout:
            told.append(json.loads(line))
            if told[-1]["kind"] == "checkpoint_saved":
                break
        (run,) = tiny_workspace.all()
        assert tiny_workspace.settle() == []
        assert run.state() == "running"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert told[-1]["kind"] == "checkpoint_saved", told
    assert [event["step"] for event in told if event["kind"] == "step"][:3] == [1, 2, 3]
    assert tiny_workspace.settle() == [run]
    (interrupted,) = tiny.events_of(run, Interrupted)
    assert interrupted.step == tiny.events_of(run, Step)[-1].step >= 3
    assert not run.adapter.exists()
    checkpoint = run.checkpoints()[-1]
    assert int(checkpoint.name.split("-")[1]) <= interrupted.step
    assert load_file(checkpoint / "adapter_model.safetensors")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] % 3 == 0
    assert (checkpoint / "optimizer.pt").stat().st_size > 0
    ended(Jobs(tiny_workspace))


# Names --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "preset", "name"),
    [
        ("bundled:guanaco-starter", "starter", "guanaco-starter"),
        ("/a/b/My Rows (1).jsonl", "", "my-rows-1"),
        ("owner/name", "QLoRA 7B", "name-qlora-7b"),
        ("ß" * 50 + ".csv", "", "data"),
        ("x" * 80 + ".csv", "y" * 80, "x" * 40 + "-" + "y" * 7),
        ("x" * 80 + ".csv", "1234567 8", "x" * 40 + "-1234567"),
    ],
)
def test_a_run_is_named_by_its_data_and_preset_in_a_slug(workspace: Workspace, data: str, preset: str, name: str) -> None:
    config = RunConfig(preset=preset).with_values({"data": data})
    assert run_name(config) == name
    run, lock = workspace.create(config, run_name(config), {})
    lock.release()
    assert workspace.get(run.id) == run


def test_a_start_waits_for_the_parting_of_a_process_whose_run_has_ended(workspace: Workspace, rows: Path) -> None:
    page = dataclasses.replace(services.build(workspace, services.WarmUp()), jobs=Jobs(workspace, Gated()))
    parting = workspace.lease()
    parting.acquire()
    threading.Timer(0.5, parting.release).start()
    shutil.copy(rows, workspace.uploads)
    run = page.start(tiny.tiny_config(workspace.uploads / rows.name))
    assert not parting.is_locked
    assert run.state() == "running"
    page.jobs.stop(run)
    ended(page.jobs)
