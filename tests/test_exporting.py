"""Exports made into the workspace: alone on the device, ended at any time, found again, deleted."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import Watched, never, silent

from qlora_ui import exported, exporting, exports
from qlora_ui.cli import main
from qlora_ui.engine.export import export, sizes_here
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, PhaseProgress
from qlora_ui.exporting import Emit, Exporting, Job, Made, ShouldStop
from qlora_ui.exports import Export, Kind
from qlora_ui.jobs import Jobs
from qlora_ui.runs import Run, Workspace
from qlora_ui.stopping import Cancelled


@pytest.fixture
def run(finished: Watched, tiny_workspace: Workspace) -> Run:
    """The finished run in a workspace of this test."""
    return Run(folder=Path(shutil.copytree(finished.run.folder, tiny_workspace.runs / finished.run.id)))


class Gate:
    """Makes an export that waits in its middle until it is let on, or asked to end."""

    def __init__(self) -> None:
        self.entered, self.let_on, self.over = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, wish: Export, emit: Emit, should_stop: ShouldStop, token: str) -> Made:
        emit(Log(text="Merging"))
        emit(PhaseProgress(done=3, total=12, unit="tensors"))
        self.entered.set()
        while not self.let_on.wait(0.01):
            if should_stop() or self.over.is_set():
                raise Cancelled
        return exporting.carry_out(wish, emit, should_stop, token)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.over.set()
    wait_for_exports()  # what loads models in one thread disturbs who does so in another


def wait_for_exports() -> None:
    for thread in threading.enumerate():
        if thread.name == "export":
            thread.join(60)


def ended(maker: Exporting) -> Job:
    """The newest export when it has ended."""
    wait_for_exports()
    assert maker.job is not None
    assert maker.job.stand != "running"
    return maker.job


def there(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in exported.folder_of(workspace).iterdir())


def test_a_training_and_an_export_refuse_each_other_in_a_sentence_and_the_run_stays_meanwhile(run: Run, rows: Path, gate: Gate) -> None:
    jobs = Jobs(run.workspace)
    maker = Exporting(run.workspace, jobs, make=gate)
    with run.workspace.lease(), pytest.raises(UserError, match="is training already"):
        maker.start(exporting.into_workspace(run, "adapter"))
    maker.start(exporting.into_workspace(run, "adapter"))
    assert gate.entered.wait(60)
    with pytest.raises(UserError, match="An export needs the device"):
        jobs.start(tiny.tiny_config(rows))
    with pytest.raises(UserError, match="An export needs the device"):
        maker.start(exporting.into_workspace(run, "merged"))
    with pytest.raises(UserError, match="is in use"):
        jobs.discard(run)
    assert main(["--home", str(run.workspace.root), "export", "--run", run.id, "--adapter", "--to", str(rows.parent / "out")]) == 2
    maker.cancel()
    assert ended(maker).words == f"Cancelled: nothing was written to {run.workspace.root}/exports/{run.id}-adapter.zip."
    assert not run.workspace.is_lent()
    with run.workspace.lease().acquire(timeout=0):
        assert there(run.workspace) == []


def test_what_an_export_does_can_be_seen_from_any_page_and_its_record_says_what_it_is(run: Run, gate: Gate) -> None:
    maker = Exporting(run.workspace, Jobs(run.workspace), make=gate)
    maker.start(exporting.into_workspace(run, "adapter", checkpoint=6))
    assert gate.entered.wait(60)
    seen = maker.job
    assert seen is not None
    assert (seen.stand, seen.doing, seen.share, seen.log) == ("running", "3 of 12 tensors", 0.25, ("Merging",))
    gate.let_on.set()
    job = ended(maker)
    assert (job.stand, job.name) == ("done", f"{run.id}-step6-adapter.zip")
    assert job.version > seen.version
    assert "its logits differ from those of what was trained by at most 0 on cpu (tolerance" in job.words
    record = exported.past(run.workspace)[job.name]
    assert (record.run, record.kind, record.step, record.quantized) == (run.id, "adapter", 6, False)
    assert record.bytes == (exported.folder_of(run.workspace) / job.name).stat().st_size
    assert f"{record.verified}." == job.words
    maker.cancel()  # after its end
    assert maker.job == job


@pytest.mark.parametrize("moment", ["Loading", "Copying", "Verifying"])
def test_a_real_export_that_is_cancelled_leaves_nothing(run: Run, moment: str) -> None:
    def make(wish: Export, emit: Emit, should_stop: ShouldStop, token: str) -> Made:
        def cancel_at(event: Event) -> None:
            emit(event)
            if isinstance(event, Log) and event.text.startswith(moment):
                maker.cancel()

        return exporting.carry_out(wish, cancel_at, should_stop, token)

    maker = Exporting(run.workspace, Jobs(run.workspace), make=make)
    maker.start(exporting.into_workspace(run, "adapter"))
    assert ended(maker).stand == "cancelled"
    assert there(run.workspace) == []


def test_a_bug_is_told_and_the_device_is_free_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any) -> Made:
        raise IndexError("list index out of range")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    maker = Exporting(run.workspace, Jobs(run.workspace), make=make)
    maker.start(exporting.into_workspace(run, "adapter"))
    job = ended(maker)
    assert (job.stand, job.words.partition(":")[2].partition(".")[0]) == ("failed", " list index out of range")
    assert not run.workspace.is_lent()


# What lies in the workspace -----------------------------------------------------------------------------------------------


def test_exports_are_listed_newest_first_also_those_that_nobody_recorded_and_deleted_with_their_record(workspace: Workspace) -> None:
    folder = exported.folder_of(workspace)
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("12345")
    (folder / "mine.json").write_text("{torn")
    for name, made in (("old.zip", 1.0), ("new.zip", 9e12)):
        (folder / name).write_bytes(b"1234")
        (folder / f"{name}.json").write_text(json.dumps({**vars(exported.Record(bytes=4, made=made, kind="adapter"))}))
    past = exported.past(workspace)
    assert list(past) == ["new.zip", "mine", "old.zip"]
    assert (past["mine"].bytes, past["mine"].kind) == (5, "")
    assert exported.free_name(workspace, "new.zip").name == "new-2.zip"
    for name in ("new.zip", "mine", "new.zip", "../runs"):
        exported.delete(workspace, name)
    assert there(workspace) == ["old.zip", "old.zip.json"]
    assert workspace.runs.is_dir()


def test_an_export_is_handed_over_as_one_file_unless_it_is_too_large(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported.folder_of(workspace)
    (folder / "chat").mkdir()
    (folder / "chat" / "README.md").write_text("read me")
    with exported.as_file(workspace, "chat") as path:
        shutil.unpack_archive(path, workspace.root / "unpacked")
    assert not path.exists()
    assert (workspace.root / "unpacked" / "chat" / "README.md").read_text() == "read me"
    monkeypatch.setattr(exported, "MOST_DOWNLOAD_BYTES", 6)
    with (
        pytest.raises(UserError, match=r"more than the 0\.0 MB .* Copy it from exports/chat in the workspace"),
        exported.as_file(workspace, "chat"),
    ):
        pass
    with pytest.raises(UserError, match=r"There is no export '\.\./runs' any more"), exported.as_file(workspace, "../runs"):
        pass


def test_a_kind_that_does_not_exist_is_refused_before_it_becomes_part_of_a_path(run: Run) -> None:
    with pytest.raises(UserError, match=r"is no kind of export\. Choose one of adapter, merged, folder"):
        exporting.into_workspace(run, "/../../out")  # type: ignore[arg-type]


def test_what_a_kill_left_half_made_is_swept_away_before_the_next_export(run: Run, gate: Gate) -> None:
    left = exported.folder_of(run.workspace) / ".x-merged.partial-0a1b2c3d"
    left.mkdir()
    (left / "export").write_text("half")
    maker = Exporting(run.workspace, Jobs(run.workspace), make=gate)
    maker.start(exporting.into_workspace(run, "adapter"))
    assert gate.entered.wait(60)
    assert there(run.workspace) == []


@pytest.mark.parametrize(("kind", "quantize"), [("merged", False), ("merged", True)])
def test_what_is_said_beforehand_of_its_size_is_what_its_weights_take(run: Run, kind: Kind, quantize: bool, tmp_path: Path) -> None:
    wish = exports.plan(run, kind, str(tmp_path / "out"), quantize=quantize)
    said = sizes_here(wish)
    export(wish, silent, never)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert said is not None
    assert weights == pytest.approx(said.result_bytes, rel=0.1)
    assert said.needed_bytes >= exports.bytes_in(tmp_path / "out") - 1_000_000
    shutil.rmtree(run.workspace.models)
    assert sizes_here(wish) is None
