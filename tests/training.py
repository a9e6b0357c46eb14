"""Runs of the tiny model: trained to their end, watched on their way, or built and not trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

from qlora_ui import speakers
from qlora_ui.engine import tokens
from qlora_ui.engine.adapter import add_adapter
from qlora_ui.engine.chat import ChatModel
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import Found, find_here, load_quantized, load_tokenizer
from qlora_ui.engine.train import encode, make_trainer, read_rows, train
from qlora_ui.events import CheckpointSaved, Event, Log
from qlora_ui.execution import execute
from qlora_ui.runs import Run, Workspace


def never() -> bool:
    return False


def silent(event: Event) -> None:
    pass


def trained(workspace: Workspace, data: Path, **values: Any) -> Run:
    """A run that was trained to its end, or to its failure."""
    run = tiny.tiny_run(workspace, data, **values)
    execute(run, train)
    return run


def chat_model(run: Run) -> ChatModel:
    """The model of a run's adapter, ready to answer."""
    return ChatModel(speakers.of_run(run), run.workspace.models, silent, never)


def logged(run: Run, level: str = "warning") -> list[str]:
    return [event.text for event in tiny.events_of(run, Log) if event.level == level]


@dataclass
class Watched:
    """A finished run, and what lay in its folder at the moment each checkpoint was reported."""

    run: Run
    at_checkpoint: dict[str, set[str]]
    checkpoints_there: list[list[str]]


def watch(workspace: Workspace, data: Path) -> Watched:
    """Train 8 steps, the run that most tests look at."""
    run = tiny.tiny_run(workspace, data, max_steps=8)
    watched = Watched(run=run, at_checkpoint={}, checkpoints_there=[])

    def emit(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            watched.at_checkpoint[event.name] = {path.name for path in (run.folder / event.name).iterdir()}
            watched.checkpoints_there.append(sorted(path.name for path in run.folder.glob("checkpoint-*")))
        run.append(event)

    train(run, emit, never)
    return watched


@dataclass
class Parts:
    """What `train` puts together on its way, for tests that look inside."""

    found: Found
    tokenizer: Any
    model: Any
    trainer: Any


def built(run: Run) -> Parts:
    config = run.config()
    found = find_here(config.model.model, config.model.revision, run.workspace.models)
    assert found is not None
    hardware = detect(config.quantization.compute_dtype)
    tokenizer = load_tokenizer(found)
    tokens.set_prompt_format(tokenizer, config.data.prompt_format)
    rows = encode(run, tokenizer, read_rows(run, config, silent, never), silent, never)
    model = add_adapter(load_quantized(found, config.quantization, hardware, silent, never), config.adapter, config.optimization.seed)
    trainer = make_trainer(run, config, hardware, model, tokenizer, rows[0], rows[1], silent, never)
    return Parts(found=found, tokenizer=tokenizer, model=model, trainer=trainer)
