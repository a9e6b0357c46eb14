"""Runs killed with SIGKILL at seeded moments, each of which must tell the truth after it, have all it reported, and go on exactly.

`python -m tests.benchmarks kill [--seed N]`. The runs are trained through the command line, in forks of one process (tests/mortal.py),
and through accelerate's launcher, where the worker, the launcher or all processes are killed from outside. After each kill the real app
is started and asked how the run stands.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny

from qlora_ui import checkpoints
from qlora_ui.events import AdapterSaved, CheckpointSaved, Finished, Interrupted, Resumed, Step
from qlora_ui.runs import Run, Workspace

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"max_steps": 8, "save_steps": 2, "eval_steps": 4, "save_total_limit": 2, "lora_dropout": 0.1, "learning_rate": 0.005}
# Phase -> the longest time after its beginning at which the kill comes, in seconds; None: exactly before what is counted.
DELAYS = {"loading": 0.3, "tokenizing": 0.02, "step": 0.03, "checkpoint": None, "sealing": None, "thinning": None}
DELAYS |= {"event": None, "adapter": None, "adapter replaced": None}
VICTIMS = ("worker", "launcher", "all")
KILLS = 40


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One to do: in which executor, in which phase, at which of its moments."""

    executor: str
    phase: str
    count: int = 1
    delay_seconds: float = 0.0
    victim: str = ""


class Trainer:
    """A workspace with the tiny model, and the process whose forks train in it."""

    def __init__(self, folder: Path) -> None:
        self.workspace = Workspace.open(folder / "home")
        self.model = tiny.tiny_model(self.workspace.models / tiny.NAME)
        self.rows = tiny.tiny_rows(folder / "rows.json")
        self.output = folder / "output"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "QLORA_UI_HOME": str(self.workspace.root)}
        command = [sys.executable, "tests/mortal.py"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.answer()
        self.whole = self.train(None)
        self.moments: dict[str, int] = json.loads(Path(f"{self.output}.moments").read_text("utf-8"))
        self.losses = losses(self.whole)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told

    def begin(self, arguments: list[str], death: dict[str, Any] | None = None) -> int:
        assert self.process.stdin is not None
        print(json.dumps({"arguments": arguments, "death": death, "output": str(self.output)}), file=self.process.stdin, flush=True)
        return int(self.answer()["pid"])

    def train_arguments(self, *more: str) -> list[str]:
        values = tiny.tiny_config(self.rows, **SETTINGS).values()
        flags = [part for name, value in values.items() if name != "data" for part in ("--set", f"{name}={value}")]
        return ["train", "--data", str(self.rows), *flags, *more]

    def train(self, death: dict[str, Any] | None) -> Run:
        """A run trained to its end, or to its death."""
        self.begin(self.train_arguments(), death)
        self.ended(death is not None)
        run = self.workspace.newest()
        assert run is not None
        return run

    def resume(self, run: Run, *more: str, death: dict[str, Any] | None = None) -> None:
        self.begin(["resume", "--run", run.id, *more], death)
        self.ended(death is not None)

    def ended(self, killed: bool) -> None:
        status = self.answer()["status"]
        expected = -signal.SIGKILL if killed else 0
        assert status == expected, f"status {status}, not {expected}: {self.output.read_text('utf-8')[-2000:]}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def trainer() -> Iterator[Trainer]:
    with tempfile.TemporaryDirectory() as folder:
        opened = Trainer(Path(folder))
        try:
            yield opened
        finally:
            opened.close()


def losses(run: Run) -> dict[int, float | None]:
    """The last that was said of each step."""
    return {event.step: event.loss for event in run.read()[0] if isinstance(event, Step)}


def plan(moments: dict[str, int], seed: int, kills: int) -> list[Kill]:
    """The kills of a seed: phases in turns, one in four in a process of its own, each at a random moment of its phase."""
    chance, planned, phases = random.Random(seed), list[Kill](), list(DELAYS)
    for number in range(kills):
        if number % 4 == 3:
            victim, step = VICTIMS[number // 4 % 3], chance.randrange(0, 7)
            planned.append(Kill(executor="process", phase="step" if step else "loading", count=step, victim=victim))
            continue
        phase = phases[(number - number // 4) % len(phases)]
        delay, name = DELAYS[phase], phase.partition(" ")[0]
        count = chance.randint(1, moments[name] - (phase == "step"))
        if phase == "adapter replaced":
            count = moments[name] + chance.randint(0, 3)  # about the two renames, with which it ends
        planned.append(Kill(executor="thread", phase=phase, count=count, delay_seconds=chance.uniform(0, delay or 0)))
    return planned


def settle(trainer: Trainer, _: Run) -> None:
    """What an app does first."""
    trainer.workspace.settle()


def ask_app(trainer: Trainer, run: Run) -> None:
    """Start the real app on what is left; it must say how the run stands."""
    from gradio_client import Client
    from serving import served

    with served(trainer.workspace.root, fresh=True) as app:
        told: dict[str, Any] = Client(app.url, verbose=False).predict(run.id, api_name="/run_status")
    assert told["state"] == run.state(), (told, run.state())


def kill(trainer: Trainer, planned: Kill, look: Callable[[Trainer, Run], None] = settle) -> Run:
    """Do it, and look. Raises AssertionError where the run does not tell the truth after it, lacks something, or does not go on exactly."""
    shutil.rmtree(trainer.workspace.root / "cache", ignore_errors=True)  # else only the first would tokenize
    run = kill_process(trainer, planned) if planned.executor == "process" else kill_thread(trainer, planned)
    look(trainer, run)
    check_truth(run, planned)
    check_saved(run, trainer.model)
    if run.state() != "finished":
        trainer.resume(run)
    check_whole(run, trainer)
    return run


def kill_thread(trainer: Trainer, planned: Kill) -> Run:
    name = planned.phase.partition(" ")[0]
    death = {"moment": name, "count": planned.count, "delay_seconds": planned.delay_seconds}
    if planned.phase != "adapter replaced":
        return trainer.train(death)
    run = trainer.train(None)
    trainer.resume(run, "--set", "max_steps=10", death=death)
    return run


def kill_process(trainer: Trainer, planned: Kill) -> Run:
    """Kill processes of an isolated training when its events tell that the moment has come."""
    before = trainer.workspace.newest()
    parent = psutil.Process(trainer.begin(trainer.train_arguments("--isolated")))
    deadline = time.monotonic() + 300
    while True:
        assert time.monotonic() < deadline, "the moment did not come"
        run = trainer.workspace.newest()
        if run and run != before and (run.last_step() >= planned.count if planned.count else run.size()):
            break
        time.sleep(0.002)
    family = parent.children(recursive=True)
    launcher = next(process for process in family if "accelerate.commands.launch" in process.cmdline())
    workers = [process for process in family if process.ppid() == launcher.pid and "qlora_ui.worker" in process.cmdline()]
    assert workers, "the worker is gone already"
    victims = {"worker": workers, "launcher": [launcher], "all": [parent, *family]}[planned.victim]
    for victim in victims:
        victim.kill()
    status = trainer.answer()["status"]
    assert (status == -signal.SIGKILL) == (planned.victim == "all"), status
    left = psutil.wait_procs(family, timeout=10)[1]
    assert not left, f"left behind: {left}"
    return run


def check_truth(run: Run, planned: Kill) -> None:
    """The run says what it had reached."""
    events = run.read()[0]
    if any(isinstance(event, Finished) for event in events[-1:]):
        return
    reached = next((event.step for event in reversed(events) if isinstance(event, Step | Resumed)), 0)
    end = events[-1]
    if planned.executor == "thread" or planned.victim == "all":
        assert isinstance(end, Interrupted), end
        assert end.step == reached, (end, reached)
    else:
        assert run.state() == ("paused" if reached else "failed"), end


def check_saved(run: Run, model: Path) -> None:
    """What the run reported as saved is there, but for what was thinned on purpose."""
    events = run.read()[0]
    reported = [event for event in events if isinstance(event, CheckpointSaved)]
    complete = [folder.name for folder in checkpoints.all_of(run) if not checkpoints.damage(folder)]
    assert len(complete) >= min(SETTINGS["save_total_limit"], len(reported)), (complete, reported)
    for folder in run.checkpoints():
        if (folder / checkpoints.SEAL).exists():
            assert not checkpoints.damage(folder), checkpoints.damage(folder)
    if reported:
        newest = checkpoints.newest_complete(run)
        assert newest is not None
        assert checkpoints.step_of(newest) >= reported[-1].step
    if any(isinstance(event, AdapterSaved) for event in events):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run.adapter)


def check_whole(run: Run, trainer: Trainer) -> None:
    """It came to its end as the run that was never interrupted, and nothing half done is left."""
    assert run.state() == "finished", run.read()[0][-1]
    ours, theirs = losses(run), trainer.losses
    assert set(ours) >= set(theirs), ours
    for step, loss in theirs.items():
        told = ours[step]
        assert told is not None
        assert loss is not None
        assert abs(told - loss) < 1e-4, (step, told, loss)
    check_saved(run, trainer.model)
    left = [path.name for path in run.folder.iterdir() if path.name.endswith((".partial", ".replaced"))]
    assert not left, left
    assert all(not checkpoints.damage(folder) for folder in checkpoints.all_of(run))


def main(arguments: list[str], kills: int = KILLS) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks kill")
    parser.add_argument("--seed", type=int, default=20261125, help="of the moments at which it kills")
    seed = parser.parse_args(arguments).seed
    done: dict[tuple[str, str], list[bool]] = {}
    with trainer() as opened:
        for number, planned in enumerate(plan(opened.moments, seed, kills)):
            where = planned.phase if planned.executor == "thread" else f"{planned.victim} killed"
            held = done.setdefault((planned.executor, where), [])
            try:
                kill(opened, planned, ask_app)
                held.append(True)
            except AssertionError as error:
                held.append(False)
                print(f"{planned}: {error}", flush=True)
            print(f"{number + 1} of {kills}: {planned} {'held' if held[-1] else 'BROKE'}", flush=True)
    print(f"\nSeed {seed}: {sum(map(sum, done.values()))} of {kills}\n\n| executor | killed | held |\n|---|---|---|")
    for (executor, where), held in sorted(done.items()):
        print(f"| {executor} | {where} | {sum(held)} of {len(held)} |")
