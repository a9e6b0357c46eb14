"""A training in a process of its own: the same run folder, the same ends, and nobody dies with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from filelock import Timeout

from qlora_ui import isolation
from qlora_ui.errors import UserError
from qlora_ui.events import CheckpointSaved, Event, Finished, Interrupted, Paused, Phase, Step, Stopped
from qlora_ui.jobs import Jobs
from qlora_ui.runs import Run, Workspace

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 90.0
pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks are handed on through POSIX file descriptors")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is this small is a hundred times slower with two threads that wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def left_over(tiny_workspace: Workspace) -> Iterator[None]:
    """Ends what a failed test left running."""
    yield
    for process in workers(tiny_workspace):
        process.kill()


def workers(workspace: Workspace) -> list[psutil.Process]:
    """Launchers and workers over this workspace."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "qlora_ui.worker" in line and str(workspace.root) in line:
            found.append(process)
    return found


def worker(workspace: Workspace) -> psutil.Process:
    return next(process for process in workers(workspace) if "accelerate.commands.launch" not in process.cmdline())


def follow(run: Run, seen: Callable[[Event], bool]) -> Event:
    """The first event that is the one waited for."""
    offset, end = 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        events, offset = run.read(offset)
        for event in events:
            if seen(event):
                return event
        threading.Event().wait(0.02)
    pytest.fail(f"it did not happen: {[event.kind for event in tiny.events_of(run)][-5:]}")


def comes_true(condition: Callable[[], bool]) -> None:
    """A process that was killed is gone a moment later."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.02)


def is_dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def ended(workspace: Workspace) -> None:
    workspace.lease().acquire(timeout=SECONDS).lock.release()


def kinds(*classes: type[Event]) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, classes)


@pytest.fixture
def started(tiny_workspace: Workspace, rows: Path, left_over: None) -> Callable[..., tuple[Jobs, Run]]:
    def start(**values: Any) -> tuple[Jobs, Run]:
        jobs = Jobs(tiny_workspace)
        return jobs, jobs.start(tiny.tiny_config(rows, **values), isolated=True)

    return start


def test_it_pauses_goes_on_and_stops_as_a_thread_does(started: Callable[..., tuple[Jobs, Run]], tiny_workspace: Workspace) -> None:
    jobs, run = started(max_steps=100_000)
    follow(run, kinds(CheckpointSaved))
    assert tiny_workspace.live() == run
    with pytest.raises(UserError, match="is training already"):
        jobs.start(run.config(), isolated=True)
    jobs.pause(run)
    ended(tiny_workspace)
    (paused,) = tiny.events_of(run, Paused)
    assert (paused.reason, paused.step) == ("", run.last_step())
    comes_true(lambda: not workers(tiny_workspace))
    jobs.resume(run, isolated=True)
    follow(run, lambda event: isinstance(event, Step) and event.step > paused.step)
    jobs.stop(run)
    ended(tiny_workspace)
    assert run.state() == "stopped"
    assert run.adapter.is_dir()
    comes_true(lambda: not workers(tiny_workspace))


def test_a_killed_worker_is_a_pause_that_says_so_and_can_go_on(started: Callable[..., tuple[Jobs, Run]], tiny_workspace: Workspace) -> None:
    jobs, run = started(max_steps=100_000)
    follow(run, kinds(CheckpointSaved))
    worker(tiny_workspace).kill()
    ended(tiny_workspace)
    (paused,) = tiny.events_of(run, Paused)
    assert "Its process was killed, as the system does when memory runs out" in paused.reason
    assert paused.reason.endswith("if it happens again, with micro_batch_size 1 and gradient_accumulation_steps 2.")
    comes_true(lambda: not workers(tiny_workspace))
    jobs.resume(run, {"max_steps": run.last_step() + 1}, isolated=True)
    ended(tiny_workspace)
    assert tiny.events_of(run, Finished)


def test_a_wedged_process_is_ended_after_a_grace_time_with_all_that_it_started(tiny_workspace: Workspace, rows: Path) -> None:
    run = tiny.tiny_run(tiny_workspace, rows)
    run.append(Phase(name="training"))
    run.beat()
    command = ["sh", "-c", "sleep 600 & echo $!; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        said = isolation.wait(process, run, grace_seconds=0.5)
    assert said == "It gave no sign of life for 0 s, so its process was ended"
    assert process.returncode == -signal.SIGKILL
    comes_true(lambda: is_dead(child))


def test_a_wedged_process_that_is_to_be_discarded_is_ended_soon(
    tiny_workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "DISCARD_SECONDS", 0.1)
    run = tiny.tiny_run(tiny_workspace, rows)
    run.beat()

    def begin_and_ask() -> None:
        run.append(Phase(name="training"))
        run.ask("discard")

    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        threading.Timer(0.2, begin_and_ask).start()
        assert isolation.wait(process, run, grace_seconds=600) == "It was ended to be discarded"


HANGS = """
import sys, threading
from qlora_ui.worker import ended_when_silent
ended_when_silent(lambda *_: threading.Event().wait(), 0.2)(None, print, lambda: False, None)
"""


def test_a_worker_that_hangs_ends_itself_also_when_who_started_it_is_gone() -> None:
    ended_itself = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended_itself.returncode == 1
    assert "in watched" in ended_itself.stderr


@pytest.mark.parametrize("wish", ["pause", "stop", "discard"])
def test_a_wish_before_it_has_begun_is_done_at_once(started: Callable[..., tuple[Jobs, Run]], tiny_workspace: Workspace, wish: Any) -> None:
    jobs, run = started()
    began = time.monotonic()
    getattr(jobs, wish)(run)
    ended(tiny_workspace)
    assert time.monotonic() - began < 2
    assert run.folder.is_dir() == (wish != "discard")
    if wish != "discard":
        assert isinstance(tiny.events_of(run)[-1], Paused if wish == "pause" else Stopped)
    comes_true(lambda: not workers(tiny_workspace))


APP = """
import sys
from pathlib import Path
import tiny
from qlora_ui.jobs import Jobs
from qlora_ui.runs import Workspace
jobs = Jobs(Workspace.open())
print(jobs.start(tiny.tiny_config(sys.argv[1], max_steps=int(sys.argv[2])), isolated=True).id, flush=True)
sys.stdin.read()
"""


def test_it_outlives_an_app_that_is_killed_and_keeps_its_locks(tiny_workspace: Workspace, rows: Path, left_over: None) -> None:
    command = [sys.executable, "-c", APP, str(rows), "100000"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        run = tiny_workspace.get(app.stdout.readline().strip())
        follow(run, kinds(Phase))
        app.kill()
        app.wait()
    step = follow(run, kinds(Step))
    assert isinstance(step, Step)
    assert tiny_workspace.settle() == []
    assert tiny_workspace.live() == run
    with pytest.raises(Timeout):
        run.lock().acquire(timeout=0)
    worker(tiny_workspace).kill()  # now nobody is there to write down what happened
    ended(tiny_workspace)
    assert tiny_workspace.settle() == [run]
    assert tiny.events_of(run, Interrupted)[-1].step == run.last_step()


def test_a_worker_does_not_outlive_its_launcher(started: Callable[..., tuple[Jobs, Run]], tiny_workspace: Workspace) -> None:
    _, run = started(max_steps=100_000)
    follow(run, kinds(Step))
    child = worker(tiny_workspace)
    launcher = child.parent()
    assert launcher is not None
    launcher.kill()
    comes_true(lambda: is_dead(child))
    ended(tiny_workspace)
    assert run.state() == "paused"


def test_the_launcher_is_handed_the_run_and_its_threads(tiny_workspace: Workspace, rows: Path) -> None:
    run = tiny.tiny_run(tiny_workspace, rows)
    line = isolation.command(run, run.folder / "checkpoint-2")
    assert line[1:3] == ["-m", "accelerate.commands.launch"]
    assert "--num_cpu_threads_per_process=1" in line
    assert line[-2:] == ["--checkpoint", "checkpoint-2"]
