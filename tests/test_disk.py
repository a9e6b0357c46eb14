"""A disk that is full, read-only or gone, a clock that is set, a second app: a run rests with one sentence, and nothing saved is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from qlora_ui import disk, services
from qlora_ui.checkpoints import damage
from qlora_ui.cli import main
from qlora_ui.disk import trouble_with_disk
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Finished, Log, Paused, Phase, Planned, Step
from qlora_ui.execution import Emit, ShouldStop, Train, execute
from qlora_ui.jobs import Jobs
from qlora_ui.progress import fold
from qlora_ui.runs import Run, Workspace

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"max_steps": 6, "save_steps": 2, "eval_steps": 6, "lora_dropout": 0.2, "learning_rate": 0.005}
FULL = os.strerror(errno.ENOSPC)
SECONDS = 20.0


def at(moment: Callable[[Event], bool], act: Callable[[Run], object]) -> Train:
    """The real training, in which something happens right after an event was told."""

    def training(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None = None) -> None:
        def told(event: Event) -> None:
            emit(event)
            if moment(event):
                act(run)

        train(run, told, should_stop, checkpoint)

    return training


def is_step(number: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Step) and event.step == number


def is_phase(name: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Phase) and event.name == name


def losses(run: Run) -> dict[int, float | None]:
    """The last that was said of each step."""
    return {event.step: event.loss for event in tiny.events_of(run, Step)}


@pytest.fixture(scope="module")
def whole(place: tuple[Workspace, Path]) -> dict[int, float | None]:
    """The losses of a run that nothing happened to."""
    run = tiny.tiny_run(*place, **SETTINGS)
    execute(run, train)
    assert run.state() == "finished"
    return losses(run)


def check_pause(run: Run, sentence: str) -> None:
    """It rests, for that one reason, and the checkpoint before is complete."""
    (paused,) = tiny.events_of(run, Paused)
    assert (paused.reason.partition(" (")[0], paused.traceback) == (sentence, "")
    assert paused.step == tiny.events_of(run, Step)[-1].step
    assert run.state() == "paused"
    assert damage(run.checkpoints()[-1]) == ""


def check_goes_on(run: Run, whole: dict[int, float | None]) -> None:
    """It comes to its end as the run that nothing happened to."""
    Jobs(run.workspace, train).resume_here(run, {})
    assert run.state() == "finished"
    assert losses(run) == pytest.approx(whole, abs=1e-4)
    assert not (run.folder / "reserve").exists()


# A full disk --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(*mounts: list[str | Path]) -> Iterator[None]:
    """Something mounted, where that is permitted. The last argument of each is the place."""
    done = []
    try:
        for mount in mounts:
            try:
                subprocess.run(["mount", *mount], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"mounting is not permitted here: {error}")
            done.append(mount[-1])
        yield
    finally:
        for folder in dict.fromkeys(done):
            subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int) -> None:
    """Take all of a small disk but `leave` bytes."""
    with (folder / "something-large").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(file.name, os.stat(file.name).st_size // 4096 * 4096 - leave)


@pytest.mark.parametrize(
    ("moment", "leave", "half_written"),
    [(is_step(3), 0, "checkpoint-4"), (is_step(3), 120_000, "checkpoint-4"), (is_phase("saving"), 20_000, "")],
    ids=["nothing is left", "half a checkpoint fits", "half the adapter fits"],
)
def test_on_a_disk_that_fills_up_the_run_rests_and_goes_on_when_there_is_room(
    tiny_workspace: Workspace, rows: Path, whole: dict[int, float | None], moment: Callable[[Event], bool], leave: int, half_written: str
) -> None:
    with mounted(["-t", "tmpfs", "-o", "size=4m", "tmpfs", tiny_workspace.runs]):
        run = tiny.tiny_run(tiny_workspace, rows, **SETTINGS)
        execute(run, at(moment, lambda run: fill(tiny_workspace.runs, leave)))
        check_pause(run, f"The disk of {run.folder} is full")
        if not leave:
            fill(tiny_workspace.runs, 0)
            with pytest.raises(UserError, match=f"The disk of {run.folder} is full .* Free some space, then resume"):
                Jobs(tiny_workspace, train).resume(run)
            with pytest.raises(UserError, match=f"The disk of {tiny_workspace.runs} is full .* Free some space, then start again"):
                Jobs(tiny_workspace, train).start(run.config())
            assert tiny_workspace.all() == [run]
        (tiny_workspace.runs / "something-large").unlink()
        check_goes_on(run, whole)
        said = [event.text for event in tiny.events_of(run, Log) if "cannot be used" in event.text]
        assert set(said) <= {f"{half_written} cannot be used: it was never finished"}
        assert run.adapter.is_dir()


def no_room_for_an_event(patch: pytest.MonkeyPatch) -> None:
    write = os.write

    def half(descriptor: int, block: bytes) -> int:
        return write(descriptor, block[: len(block) // 2] if b'"kind": "step", "time"' in block else block)

    patch.setattr(os, "write", half)


def no_room_for_weights(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)")

    patch.setattr(safetensors.torch, "serialize_file", refuse)


def no_room_for_the_optimizer(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 22")

    patch.setattr(torch, "save", refuse)
    patch.setattr(disk.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 0))


@pytest.mark.parametrize("harm", [no_room_for_an_event, no_room_for_weights, no_room_for_the_optimizer])
def test_a_full_disk_is_known_in_whatever_words_a_library_tells_it(
    place: tuple[Workspace, Path], whole: dict[int, float | None], harm: Callable[[pytest.MonkeyPatch], None]
) -> None:
    run = tiny.tiny_run(*place, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        execute(run, at(is_step(3), lambda run: harm(patch)))
    check_pause(run, f"The disk of {run.folder} is full")
    check_goes_on(run, whole)


def test_a_full_disk_before_the_first_step_is_a_pause_too(workspace: Workspace) -> None:
    run = tiny.tiny_run(workspace, "rows.json")

    def refuse(*_: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, FULL, str(run.folder / "data" / "rows.jsonl"))
        except OSError as error:
            raise UserError("The rows could not be kept.") from error

    execute(run, refuse)
    assert fold("tiny", run.read()[0]).status_line().startswith(f"tiny · Paused before the first step: The disk of {run.folder} is full (")


def test_the_disk_that_is_full_is_the_one_that_is_named(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    error = RuntimeError("a library's own words")
    error.__cause__ = OSError(errno.ENOSPC, FULL, str(elsewhere / "not-made" / "file"))
    assert trouble_with_disk(tmp_path, error).startswith(f"The disk of {elsewhere} is full (")
    assert trouble_with_disk(tmp_path, ValueError("no trouble with a disk")) == ""


def test_room_for_the_end_is_held_from_the_first_word_to_the_last(workspace: Workspace, rows: Path) -> None:
    reserve = []

    def look(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None) -> None:
        emit(Phase(name="loading"))
        reserve.append((run.folder / "reserve").stat().st_size)
        emit(Finished(step=0))
        reserve.append((run.folder / "reserve").exists())

    Jobs(workspace, look).run_here(tiny.tiny_config(rows))
    assert reserve == [65536, False]


# A read-only folder, and one that is gone ---------------------------------------------------------------------------------


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made in the folder, whoever asks: for root its disk is read-only, for others its mode."""
    if os.geteuid() == 0:
        with mounted(["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
            yield
        return
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(0o700)


def test_a_run_whose_folder_turns_read_only_says_so_and_goes_on(place: tuple[Workspace, Path], whole: dict[int, float | None]) -> None:
    run, told = tiny.tiny_run(*place, **SETTINGS), ""
    with contextlib.ExitStack() as closed:
        try:
            execute(run, at(is_step(3), lambda run: closed.enter_context(read_only(run.folder))))
        except UserError as error:  # not even its end could be written
            told = str(error)
        assert place[0].live() is None
        with pytest.raises(UserError, match=f"{run.folder} is read-only"):
            Jobs(place[0], train).resume(run)
    place[0].settle()
    assert run.state() == ("interrupted" if told else "paused")
    told = told or tiny.events_of(run, Paused)[-1].reason
    assert told == f"The folder {run.folder} is read-only. Make it writable, then resume."
    assert damage(run.checkpoints()[-1]) == ""
    check_goes_on(run, whole)


def test_in_a_read_only_workspace_the_app_opens_and_every_start_is_a_sentence(workspace: Workspace, rows: Path) -> None:
    killed = tiny.tiny_run(workspace, rows)
    killed.append(Phase(name="loading"))
    for folder in (workspace.root, workspace.runs, killed.folder):
        folder.chmod(0o500)  # for others than root, whose disk is read-only
    with read_only(workspace.root):
        assert Workspace.open(workspace.root).settle() == []
        assert workspace.live() is None
        with pytest.raises(UserError, match=r"is read-only\. Make it writable, then start again"):
            Jobs(workspace).start(tiny.tiny_config(rows))
        with pytest.raises(UserError, match=r"is read-only\. Make it writable, then resume"):
            services.build(workspace, services.WarmUp()).resume(killed)  # as the page does
    for folder in (workspace.root, workspace.runs, killed.folder):
        folder.chmod(0o700)
    assert workspace.settle() == [killed]


@pytest.mark.parametrize(
    ("moment", "depth"),
    [(is_phase("loading"), 0), (is_step(4), 0), (is_phase("saving"), 0), (is_step(3), 2)],
    ids=["loading", "before a checkpoint", "before the adapter", "with the whole workspace"],
)
def test_what_was_deleted_while_it_trained_stays_deleted(
    tiny_workspace: Workspace, rows: Path, moment: Callable[[Event], bool], depth: int
) -> None:
    gone: list[Path] = []

    def delete(run: Run) -> None:
        gone.append([run.folder, *run.folder.parents][depth])
        shutil.rmtree(gone[0])

    with pytest.raises(UserError, match=r"^The folder .* is gone\. Put it back if it was moved, else start a new run\.$"):
        Jobs(tiny_workspace, at(moment, delete)).run_here(tiny.tiny_config(rows, **SETTINGS))
    assert not gone[0].exists()


def test_no_lock_brings_a_deleted_folder_back(workspace: Workspace, rows: Path) -> None:
    run = tiny.tiny_run(workspace, rows)
    shutil.rmtree(run.folder)
    with pytest.raises(UserError, match=f"The folder {run.folder} is gone"):
        Jobs(workspace).resume(run)
    assert not run.folder.exists()
    shutil.rmtree(workspace.root)
    with pytest.raises(UserError, match=f"The folder {workspace.root} is gone. .* else make it anew, then start again"):
        Jobs(workspace).start(tiny.tiny_config(rows))
    assert (workspace.all(), workspace.live(), workspace.root.exists()) == ([], None, False)


def test_the_page_goes_on_when_the_run_it_shows_is_deleted(
    workspace: Workspace, rows: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_ui.ui.app import glance, redraw
    from qlora_ui.ui.live import News

    begun, go = threading.Event(), threading.Event()

    def wait(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None) -> None:
        emit(Phase(name="training"))
        begun.set()
        go.wait(SECONDS)
        emit(Finished(step=0))

    page = dataclasses.replace(services.build(workspace, services.WarmUp()), jobs=Jobs(workspace, wait))
    news = News(page)
    run = page.jobs.start(tiny.tiny_config(rows))
    assert begun.wait(SECONDS)
    assert run.id in glance(page, news)
    shutil.rmtree(run.folder)
    assert glance(page, news).startswith("no run")
    assert news.since("", "", 0, None)["run"] == ""
    assert redraw(page, None, None, None, None, None, "")
    go.set()
    workspace.lease().acquire(timeout=SECONDS).lock.release()
    assert f"The folder {run.folder} is gone" in capfd.readouterr().err
    again = page.jobs.start(tiny.tiny_config(rows))
    workspace.lease().acquire(timeout=SECONDS).lock.release()
    assert (again.state(), os.listdir(workspace.runs)) == ("finished", [again.id])


def test_on_the_command_line_a_deleted_run_is_one_sentence_and_exit_code_2(
    tiny_workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append = Run.append

    def append_and_delete(run: Run, event: Event) -> None:
        append(run, event)
        if is_step(2)(event):
            shutil.rmtree(run.folder)

    monkeypatch.setattr(Run, "append", append_and_delete)
    settings = tiny.tiny_config(rows, **SETTINGS).values()
    code = main(["train", *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))])
    said = capsys.readouterr().err.strip().splitlines()
    assert (code, tiny_workspace.all()) == (2, [])
    assert said[-1].startswith(f"The folder {tiny_workspace.runs}")
    assert "Traceback" not in "".join(said)


# A clock that is set ------------------------------------------------------------------------------------------------------

HOURS = 3600.0


def step(number: int, moment: float) -> Step:
    return Step(step=number, loss=1.0, learning_rate=0.1, grad_norm=1.0, tokens_per_second=1.0, memory_gib=1.0, epoch=0.1, time=moment)


@given(st.integers(0, 30), st.floats(-9 * HOURS, -2) | st.floats(0, 9 * HOURS))
def test_the_time_left_is_right_at_every_step_whenever_the_clock_is_set(after: int, seconds: float) -> None:
    progress = fold("", [Phase(name="training"), Planned(total_steps=30, train_rows=1, held_out_rows=0, tokens=1, trained_tokens=1)])
    for number in range(1, 31):
        progress.add(step(number, 2.0 * number + (seconds if number > after else 0)))
        left = progress.eta_seconds
        assert left == pytest.approx(2.0 * (30 - number)) if number > 3 or left is not None else number <= 3


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_training_whose_clock_is_set_is_measured_and_ends_and_is_found_as_ever(
    tiny_workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    clock = time.time

    def set_clock(run: Run) -> None:
        monkeypatch.setattr(time, "time", lambda: clock() + hours * HOURS)

    jobs = Jobs(tiny_workspace, at(is_step(3), set_clock))
    first = jobs.run_here(tiny.tiny_config(rows, **SETTINGS))
    assert first.state() == "finished"
    speeds = [event.tokens_per_second for event in tiny.events_of(first, Step)]
    assert 0 < max(speeds[3:]) / 20 < min(speeds[:3])
    second = tiny.tiny_run(tiny_workspace, rows)
    assert tiny_workspace.newest() == second
    assert tiny_workspace.settle() == [second]


# Two apps on one workspace ------------------------------------------------------------------------------------------------

APP = """
import sys
from qlora_ui.config import RunConfig
from qlora_ui.errors import UserError
from qlora_ui.events import Phase, Planned, Step
from qlora_ui.jobs import Jobs
from qlora_ui.progress import fold
from qlora_ui.runs import Workspace

def train(run, emit, should_stop, checkpoint):
    emit(Phase(name="training"))
    emit(Step(step=1, loss=1.0, learning_rate=0.1, grad_norm=1.0, tokens_per_second=1.0, memory_gib=1.0, epoch=0.1))
    emit(Planned(total_steps=9, train_rows=1, held_out_rows=0, tokens=1, trained_tokens=1))
    print("training", flush=True)
    sys.stdin.readline()
    raise UserError("The learning rate is too high. Lower it.")

workspace = Workspace.open()
jobs = Jobs(workspace, train)
for line in iter(sys.stdin.readline, ""):
    what, _, told = line.strip().partition(" ")
    try:
        if what == "train":
            jobs.run_here(RunConfig().with_values({"data": told}))
        elif what == "resume":
            jobs.resume_here(workspace.newest(), {})
        elif what == "settle":
            print(workspace.settle(), flush=True)
        print(fold("it", workspace.newest().read()[0]).status_line(), flush=True)
    except UserError as error:
        print(error, flush=True)
"""


class App:
    """Another process over the workspace, whose trainings last until a line is said."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", APP], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.answer()


@pytest.fixture
def apps(workspace: Workspace) -> Iterator[tuple[App, App]]:
    """Two of them."""
    pair = App(), App()
    yield pair
    for app in pair:
        app.process.kill()
        app.process.communicate()


def test_of_two_apps_one_trains_and_both_say_the_same(workspace: Workspace, rows: Path, apps: tuple[App, App]) -> None:
    one, other = apps
    assert one.ask(f"train {rows}") == "training"
    run = workspace.newest()
    assert run is not None
    for line in (f"train {rows}", "resume"):
        assert other.ask(line) == f"{run.id} is training already. Stop it or wait for its end."
    assert other.ask("settle") == "[]"
    assert other.answer() == fold("it", run.read()[0]).status_line() == "it · training 1/9 · loss 1.00"
    assert workspace.all() == [run]
    rests = "it · Paused at step 1 of 9: The learning rate is too high. Lower it."
    assert [one.ask(""), other.ask("")] == [rests, rests]

    for app in apps:  # both at once
        app.say("resume")
    refused, goes_on = sorted([one.answer(), other.answer()])
    assert goes_on == "training"
    # Which run it is can be said only once the quicker has written that it goes on.
    assert refused in {f"{name} is training already. Stop it or wait for its end." for name in (run.id, "Another run")}
    assert len([event for event in tiny.events_of(run) if event.kind == "resumed"]) == 1
