"""The command line: exit codes, what goes to which stream, and events that a script can read."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import Watched

from qlora_ui import jobs
from qlora_ui.cli import chat_speaker, main, parser
from qlora_ui.engine import train as engine
from qlora_ui.events import KINDS, Event, Failed, Finished, Phase, Planned, Step, Stopped, decode
from qlora_ui.runs import Run, Workspace
from qlora_ui.speakers import Speaker
from qlora_ui.stopping import Cancelled

ROOT = Path(__file__).resolve().parents[1]


def train_arguments(data: Path, *more: str, **values: object) -> list[str]:
    settings = {name: value for name, value in tiny.tiny_config(data, **values).values().items() if name != "data"}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["train", "--data", str(data), *flags, *more]


def test_training_as_json_prints_the_runs_events_and_nothing_else(
    tiny_workspace: Workspace, rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(train_arguments(rows, "--json")) == 0
    out, err = capfd.readouterr()
    told = [json.loads(line) for line in out.splitlines()]
    assert err.replace("\n", "") == ""
    assert {event["kind"] for event in told} <= set(KINDS)
    steps = [event for event in told if event["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert told[-1]["kind"] == "finished"
    (run,) = tiny_workspace.all()
    assert [decode(line) for line in out.splitlines()] == tiny.events_of(run)


def test_training_for_a_person_prints_the_log_and_where_the_adapter_is(
    tiny_workspace: Workspace, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_arguments(rows)) == 0
    lines = capsys.readouterr().out.splitlines()
    (run,) = tiny_workspace.all()
    assert lines[0] == f"Run {run.id}  (Ctrl-C stops it and keeps the adapter)"
    assert any("step 4  loss " in line for line in lines)
    assert lines[-2].endswith("Finished: 4 steps, adapter saved")
    assert lines[-1] == f"Adapter: {run.adapter}"


def test_set_wins_over_data_and_preset_and_the_last_set_wins(tiny_workspace: Workspace, rows: Path, tmp_path: Path) -> None:
    other = tiny.tiny_rows(tmp_path / "other.json")
    assert main([*train_arguments(rows), "--set", f"data={other}", "--set", "lora_r=2", "--set", "lora_r = 3", "--set", "max_steps=1"]) == 0
    (run,) = tiny_workspace.all()
    assert (run.config().preset, run.config().adapter.lora_r, run.config().data.data) == ("starter", 3, str(other))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--preset", "nope"], "There is no preset 'nope'. Presets: "),
        (["train", "--set", "lora_r=0"], "lora_r is 0: it must be a whole number from 1 to 512."),
        (["train", "--set", "lora=8"], "There is no setting 'lora'. Did you mean lora_r?"),
        (["train", "--set", "lora_r"], "--set 'lora_r' has no '='. Write it as --set key=value."),
        (["train", "--data", ""], "No data set is chosen."),
        (["train", "--data", "nowhere.json"], "There is no file nowhere.json"),
        (["check-data", "nowhere.json"], "There is no file nowhere.json"),
        (["check-data", "{file}", "--map", "ask"], "--map 'ask' has no '='. Write it as --map key=value."),
        (["check-data", "{file}", "--map", "ask=x"], "The column mapping 'ask=x' is not field=column, with a field of messages"),
        (["check-data", "{file}", "--format", "csv"], "There is no row format 'csv'."),
        (["chat", "--run", "20261122-100139-nope", "--prompt", "Hi"], "There is no run '20261122-100139-nope'"),
        (["chat", "--run", "../..", "--prompt", "Hi"], "There is no run '../..'"),
        (["chat", "--run", "last", "--prompt", "Hi"], "has an adapter yet. Train one: python -m qlora_ui train"),
        (["--home", "{file}", "runs"], "cannot be written"),
    ],
)
def test_a_mistake_of_the_person_exits_2_with_one_sentence_on_stderr(
    workspace: Workspace, rows: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("{file}", str(rows)) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert list(workspace.runs.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["dance"], ["chat", "--run", "last"], ["train", "--no-such-flag"]])
def test_arguments_that_make_no_command_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_run_that_fails_by_the_persons_mistake_exits_2(workspace: Workspace, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train_arguments(rows, model="nowhere")) == 2
    out, err = capsys.readouterr()
    assert err.startswith("There is no model 'nowhere' on this machine.")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert [run.state() for run in workspace.all()] == ["failed"]


def test_a_bug_of_ours_exits_1_with_its_traceback(
    workspace: Workspace, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool], checkpoint: Path | None = None) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine, "train", train)
    assert main(train_arguments(rows, "--json")) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert "ZeroDivisionError: a bug" in err
    assert json.loads(out.splitlines()[-1])["kind"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_training_and_exits_0(
    workspace: Workspace, rows: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(run: Run, emit: Callable[[Event], None], should_stop: Callable[[], bool], checkpoint: Path | None = None) -> None:
        emit(Phase(name="training"))
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        for _ in range(1000):
            if should_stop():
                raise Cancelled
            threading.Event().wait(0.01)

    monkeypatch.setattr(engine, "train", train)
    handler = signal.getsignal(number)
    assert main(train_arguments(rows)) == 0
    assert signal.getsignal(number) is handler
    assert "Stop was asked for" in capsys.readouterr().out
    (run,) = workspace.all()
    assert tiny.events_of(run, Stopped)[0].step == 0


def test_chat_prints_the_answer_of_the_adapter_or_of_the_base(
    tiny_workspace: Workspace, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.tiny_run(tiny_workspace, rows, max_steps=30, eval_steps=100, save_steps=100)
    jobs.execute(run, engine.train)
    ask = ["--prompt", "Question 3: which word is 3?", "--max-new-tokens", "30"]

    def answer(*arguments: str) -> str:
        assert main(["chat", *arguments, *ask]) == 0
        return capsys.readouterr().out

    tuned, base = answer("--run", run.id), answer("--run", run.id, "--base")
    assert tuned.startswith("The answer is")
    assert base.strip()
    assert tuned != base
    assert answer("--run", "last") == tuned
    assert answer("--run", "last", "--temperature", "1", "--seed", "3") == answer("--run", run.id, "--temperature", "1", "--seed", "3")

    archive = shutil.make_archive(str(rows.parent / "mine"), "zip", run.adapter)
    assert answer("--adapter", archive) == tuned

    for flag, value in (("--max-new-tokens", "0"), ("--temperature", "-1"), ("--seed", "-1")):
        assert main(["chat", "--run", run.id, "--prompt", "Hi", flag, value]) == 2
        assert f"{flag[2:].replace('-', '_')} is {float(value) if 'temp' in flag else value}" in capsys.readouterr().err


def test_the_flags_of_chat_name_a_run_a_checkpoint_an_adapter_or_a_model(
    workspace: Workspace, finished: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished.run.folder, workspace.runs / finished.run.id)
    shutil.make_archive(str(copy / "mine"), "zip", copy / "adapter")

    def named(*flags: str) -> Speaker:
        return chat_speaker(parser().parse_args(["chat", *flags, "--prompt", "Hi"]), workspace)

    assert named("--run", "last").adapter == copy / "adapter"
    assert named("--run", copy.name, "--checkpoint", "8").adapter == copy / "checkpoint-8"
    brought = named("--adapter", str(copy / "adapter"), "--model", "owner/base")
    assert (brought.model, named("--adapter", brought.name)) == ("owner/base", brought)
    assert named("--adapter", str(copy / "mine.zip"), "--model", "owner/base").name.startswith("mine-")
    assert (named("--model", "owner/base").model, named("--model", "owner/base").adapter) == ("owner/base", None)
    for wrong in (["--run", copy.name, "--model", "x"], ["--adapter", "x", "--checkpoint", "3"], []):
        assert main(["chat", *wrong, "--prompt", "Hi"]) == 2
        assert "Say who is asked" in capsys.readouterr().err


def test_chat_with_a_run_without_an_adapter_exits_2(tiny_workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.tiny_run(tiny_workspace, "rows.json")
    assert main(["chat", "--run", run.id, "--prompt", "Hi"]) == 2
    assert f"{run.id} has no adapter yet." in capsys.readouterr().err


def test_runs_lists_every_run_with_how_it_stands_newest_first(workspace: Workspace) -> None:
    made = []
    for events in (
        [Phase(name="training"), Planned(total_steps=4, train_rows=1, held_out_rows=0, tokens=1, trained_tokens=1), Finished(step=4)],
        [Failed(message="Row 1 has no answer.")],
        [Phase(name="training"), Step(step=2, loss=1, learning_rate=0, grad_norm=1, tokens_per_second=1, memory_gib=1, epoch=1)],
    ):
        run = tiny.tiny_run(workspace, "rows.json")
        for event in events:
            run.append(event)
        made.append(run)
    live, lock = workspace.create(tiny.tiny_config("rows.json"), "tiny", {})
    with lock:
        # A process of its own, as a person calls it; it needs none of the training stack, so it is quick.
        done = subprocess.run([sys.executable, "-m", "qlora_ui", "runs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{live.id}  starting",
        f"{made[2].id}  Interrupted at step 2",
        f"{made[1].id}  Row 1 has no answer.",
        f"{made[0].id}  Finished: 4 steps, adapter saved",
    ]


def test_an_answer_that_the_terminal_cannot_show_is_escaped_not_lost(workspace: Workspace) -> None:
    run = tiny.tiny_run(workspace, "rows.json")
    run.append(Failed(message="Zeile 你好 \udcff"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "qlora_ui", "runs"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run.id}  Zeile \\u4f60\\u597d \\udcff\n"


def check_data(reference: Path | str, *more: str, **values: Any) -> list[str]:
    settings = {name: value for name, value in tiny.tiny_config(reference, **values).values().items() if name != "data"}
    return ["check-data", str(reference), *(f"--set={name}={value}" for name, value in settings.items()), *more]


def test_check_data_prints_what_training_would_make_of_a_data_set(
    tiny_workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"ask": f"Question {n}?", "reply": f"Answer {n}. " + "word " * n} for n in range(40)] + [{"ask": "Why?", "reply": ""}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    mapped = ["--format", "alpaca", "--map", "instruction=ask", "--map", "output=reply"]
    assert main([*check_data(tmp_path / "rows.json", "--json", max_seq_len=48), *mapped]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["format"], report["read"], report["kept"], report["duplicates"]) == ("alpaca", 41, 40, 0)
    assert report["dropped"] == [{"row": 41, "reason": "has no answer: 'output' is empty"}]
    assert 0 < report["tokens_trained"] < report["tokens_total"] <= 40 * 48
    assert report["longest"] > 48
    assert 0 < report["truncated_at_max_seq_len"] < 40
    assert main([*check_data(tmp_path / "rows.json", max_seq_len=48), *mapped]) == 0
    said = capsys.readouterr().out
    assert "rows.json: 41 rows: 40 kept, 1 dropped, 0 duplicates" in said
    assert "Dropped: row 41: has no answer: 'output' is empty" in said
    assert "1 without an answer" in said
    assert f"{report['tokens_trained']:,} ({report['trained_share']:.0%}) are trained" in said
    assert list(tiny_workspace.runs.iterdir()) == []


def test_check_data_ends_with_2_when_nothing_would_be_trained(
    tiny_workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "word " * 100, "completion": "Yes."}]))
    assert main(check_data(tmp_path / "rows.json", "--json", max_seq_len=32)) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens_trained"] == 0
    assert err.startswith("0 % of the tokens would be trained")
    assert main(check_data(tmp_path / "rows.json", max_seq_len=32)) == 2
    assert "Left out: row 1: has no token to train on within max_seq_len 32" in capsys.readouterr().out


def test_check_data_tells_what_the_page_tells_of_odd_tokens(
    tiny_workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "What is <|im_end|>?", "completion": "An end."}]))
    said = "1 turn holds the text of special tokens (<|im_end|>), which the model reads as the tokens themselves."
    assert main(check_data(tmp_path / "rows.json")) == 0
    assert said in capsys.readouterr().out
    assert main(check_data(tmp_path / "rows.json", "--json")) == 0
    assert said in json.loads(capsys.readouterr().out)["trouble"]


def test_check_data_explains_every_row_when_none_can_be_used(
    tiny_workspace: Workspace, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check-data", str(rows), "--map", "instruction=ask"]
    assert main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["kept"], len(report["dropped"]), report["tokens_total"]) == (0, report["read"], 0)
    assert "has no column 'ask', which instruction is mapped to" in err
    assert err.count("\n") == 1
    assert main(arguments) == 2
    assert f"Dropped: rows 1-{report['read']}: has no column 'ask'" in capsys.readouterr().out
