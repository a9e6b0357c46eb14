"""The starter preset on the starter model, as a first visit trains it: its held-out loss is pinned."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from qlora_ui import jobs, presets
from qlora_ui.engine.train import train
from qlora_ui.events import Finished, HeldOut
from qlora_ui.runs import Workspace


def test_the_starter_preset_learns_what_it_is_known_to_learn(starter_home: Path) -> None:
    """2.01 to 2.03 was measured, in float32 as in bfloat16; before the first step it is 3.84."""
    workspace = Workspace.open(starter_home)
    config = presets.load("starter").config
    run, lock = workspace.create(config, "starter", {})
    with lock:
        jobs.execute(run, train)
    (finished,) = tiny.events_of(run, Finished)
    first, *_, last = tiny.events_of(run, HeldOut)
    assert (first.step, last.step) == (0, finished.step)
    assert first.loss == pytest.approx(3.84, abs=0.05)
    assert last.loss == pytest.approx(2.02, abs=0.08)
