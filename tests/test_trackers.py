"""Metrics that go to trackers too: they arrive, nothing secret is written down, and no tracker's trouble ends a run."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import logged, trained
from transformers.integrations import TensorBoardCallback

from qlora_ui import jobs, trackers
from qlora_ui.cli import main
from qlora_ui.engine import tracking
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Finished, HeldOut, Step
from qlora_ui.jobs import Jobs
from qlora_ui.runs import Workspace

KEY = "a5ecre7" * 6


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """What must not be written anywhere."""
    for name in trackers.SECRETS:
        monkeypatch.setenv(name, KEY)
    return KEY


def holding(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_metrics_arrive_in_tensorboard_and_no_key_is_written_down(place: tuple[Workspace, Path], tmp_path: Path, key: str) -> None:
    run = trained(*place, report_to="tensorboard", max_steps=3)
    assert isinstance(run.last_word(), Finished)
    read = EventAccumulator(str(run.folder / "tensorboard"))
    read.Reload()
    for tag, events in (("train/loss", tiny.events_of(run, Step)), ("eval/loss", tiny.events_of(run, HeldOut))):
        assert [(entry.step, entry.value) for entry in read.Scalars(tag)] == [
            (event.step, pytest.approx(event.loss, abs=1e-4)) for event in events
        ]
    assert f"Metrics go to tensorboard too: tensorboard --logdir {run.folder / 'tensorboard'}" in logged(run, "info")
    home = ["--home", str(place[0].root)]
    assert main([*home, "export", "--run", run.id, "--adapter", "--to", str(tmp_path / "adapter")]) == 0
    assert main([*home, "script", "--run", run.id, "--to", str(tmp_path / "script")]) == 0
    assert holding(run.folder, key) == holding(tmp_path, key) == []


def test_trouble_of_a_tracker_is_told_once_without_its_secrets_and_the_run_goes_on(
    place: tuple[Workspace, Path], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError(f"nobody listens to {KEY}\nat all")

    monkeypatch.setattr(TensorBoardCallback, "on_log", no_network)
    run = trained(*place, report_to="tensorboard", max_steps=2)
    assert isinstance(run.last_word(), Finished)
    assert [line for line in logged(run) if "tensorboard" in line] == [
        "tensorboard is left out from here on, the run goes on: nobody listens to …"
    ]
    assert holding(run.folder, key) == []


def test_a_tracker_that_cannot_be_begun_is_left_out(place: tuple[Workspace, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise SystemExit("no licence")

    monkeypatch.setattr(TensorBoardCallback, "__init__", refuse)
    run = trained(*place, report_to="tensorboard", max_steps=1)
    assert isinstance(run.last_word(), Finished)
    assert "tensorboard cannot be begun, the run goes on: no licence" in logged(run)


WANDB = """
import json, pathlib, types
told = pathlib.Path(__file__).with_name("told.jsonl")
run = None
def tell(**what):
    with told.open("a") as file:
        file.write(json.dumps(what) + "\\n")
class Settings(types.SimpleNamespace): pass
class Run:
    url, summary = "https://wandb.test/run", {}
    def _label(self, code): pass
class Config(dict):
    def update(self, values, allow_val_change): tell(config=sorted(values))
config = Config()
def init(project, id, name, resume, dir, settings):
    global run
    run = Run()
    tell(init=id, project=project, resume=resume, dir=dir)
def log(metrics): tell(log=metrics)
def finish():
    global run
    run = None
    tell(finished=True)
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A wandb that writes down what it is told, for transformers' own callback to talk to. Returns that file."""
    folder = tmp_path / "packages" / "wandb"
    (folder / "sdk" / "lib").mkdir(parents=True)
    (folder / "__init__.py").write_text(WANDB)
    (folder / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass")
    monkeypatch.syspath_prepend(str(folder.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    yield folder / "told.jsonl"
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def test_wandb_hears_of_every_step_under_the_runs_id_and_is_closed_at_the_end(place: tuple[Workspace, Path], wandb: Path) -> None:
    run = trained(*place, report_to="wandb", max_steps=2)
    told = [json.loads(line) for line in wandb.read_text().splitlines()]
    assert told[0] == {"init": run.id, "project": "qlora-ui", "resume": "allow", "dir": str(run.folder)}
    losses = [entry["log"]["train/loss"] for entry in told if "train/loss" in entry.get("log", {})]
    assert losses == pytest.approx([event.loss for event in tiny.events_of(run, Step)], abs=1e-4)
    assert told[-1] == {"finished": True}
    assert "Metrics go to wandb too: https://wandb.test/run" in logged(run, "info")


def test_a_tracker_that_hangs_while_it_connects_does_not_keep_a_run_from_being_stopped(
    place: tuple[Workspace, Path], wandb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connecting, let_go = threading.Event(), threading.Event()

    def hang(run: object) -> None:
        connecting.set()
        let_go.wait(60)

    monkeypatch.setattr(tracking, "begin_wandb", hang)
    run = tiny.tiny_run(*place, report_to="wandb", max_steps=2)
    works = threading.Thread(target=jobs.execute, args=(run, train))
    works.start()
    assert connecting.wait(60)
    run.ask("stop")
    works.join(20)
    assert run.state() == "stopped"
    let_go.set()


def test_a_loss_that_was_not_finite_is_none_to_a_tracker_either() -> None:
    heard: list[Any] = []
    trainer: Any = SimpleNamespace(finite_steps=SimpleNamespace(loss_is_finite=False))
    tracker = tracking.Tracker("tensorboard", None, trainer, heard.append)  # type: ignore[arg-type]
    tracker.callback = SimpleNamespace(on_log=lambda *_, logs: heard.append(logs))
    tracker.on_log(None, None, None, logs={"loss": 0.0, "epoch": 1.0})
    assert heard[0]["loss"] != heard[0]["loss"]
    assert heard[0]["epoch"] == 1.0


# Refused before anything begins -------------------------------------------------------------------------------------------


def test_a_name_that_is_no_trackers_is_refused_and_none_is_none() -> None:
    with pytest.raises(UserError, match="report_to names 'tensorbord': use tensorboard, wandb, trackio, with commas"):
        tiny.tiny_config("rows.json", report_to="tensorbord")
    assert tiny.tiny_config("rows.json", report_to=" WandB, tensorboard,wandb").schedule.trackers() == ["wandb", "tensorboard"]
    assert tiny.tiny_config("rows.json", report_to="none").schedule.trackers() == []


def test_one_that_is_not_installed_is_refused_with_the_package_and_leaves_no_folder(
    workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(UserError, match=f"^report_to names {name}, which is not installed. Install it with: pip install {name}$"):
            Jobs(workspace).start(tiny.tiny_config(rows, report_to=name))
    assert workspace.all() == []


def test_one_without_a_key_is_refused_where_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (*trackers.SECRETS, "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"there is no key for it on this machine\. Log in with: wandb login, or set WANDB_API_KEY"):
        trackers.check(["wandb"])
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    trackers.check(["wandb", "trackio"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    for name, value in (("WANDB_API_KEY", "k"), ("WANDB_MODE", "offline")):
        with pytest.raises(UserError, match="there is no key"):
            trackers.check(["wandb"])
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            trackers.check(["wandb"])
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(UserError, match=r"there is no Hugging Face token on this machine\. Set HF_TOKEN"):
        trackers.check(["trackio"])
    monkeypatch.setenv("HF_TOKEN", "k")
    trackers.check(["trackio"])
