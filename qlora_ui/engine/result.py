"""The adapter that a run leaves: with tokenizer, chat template and card, complete or absent. Knows nothing of training or Gradio."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_ui.checkpoints import SEAL, step_of
from qlora_ui.engine import card
from qlora_ui.events import Event, Phase
from qlora_ui.runs import Run

# What Trainer's checkpoints have beside the adapter: its own memory, some of it in files that can run code when loaded.
TRAINERS_OWN = (".pt", ".pth", ".bin", "trainer_state.json", SEAL)


def publish(run: Run, model: Any, tokenizer: Any, step: int) -> None:
    """Make the model's adapter, trained for `step` steps, the run's result."""
    aside = _room_aside(run)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    _publish(run, aside, step)


def keep(run: Run, checkpoint: Path, emit: Callable[[Event], None]) -> None:
    """Make a checkpoint's adapter the run's result, without loading anything."""
    emit(Phase(name="saving", detail=checkpoint.name))
    aside = _room_aside(run)
    shutil.copytree(checkpoint, aside, dirs_exist_ok=True, ignore=lambda _, names: [name for name in names if name.endswith(TRAINERS_OWN)])
    _publish(run, aside, step_of(checkpoint))


def _room_aside(run: Run) -> Path:
    aside = run.folder / "adapter.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()  # here, because a library would make the run's folder too, which somebody may have deleted
    return aside


def _publish(run: Run, aside: Path, step: int) -> None:
    adapter = json.loads((aside / "adapter_config.json").read_text("utf-8"))
    (aside / "README.md").write_text(card.text(run.facts(), run.config(), run.read()[0], adapter), "utf-8")
    run.publish_adapter(aside, step)
