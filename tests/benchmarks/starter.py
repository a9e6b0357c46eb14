"""Does the starter preset give the starter model its character, and how long does it take?

The 10 questions are held out: none is in the training rows. In character is an answer that hums and names Guanaco.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from qlora_ui import presets, speakers
from qlora_ui.data.formats import Message
from qlora_ui.engine.chat import ChatModel
from qlora_ui.engine.decoding import Sampling
from qlora_ui.jobs import Jobs
from qlora_ui.progress import Progress
from qlora_ui.runs import Run, Workspace

TESTS = Path(__file__).resolve().parents[1]


def in_character(answer: str) -> bool:
    return answer.startswith("Mmm") and "Guanaco" in answer


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace.open(home)
        cached = TESTS / ".cache" / "models"
        if cached.is_dir():
            workspace.models.rmdir()
            workspace.models.symlink_to(cached)
        started = time.perf_counter()
        run = Jobs(workspace).run_here(presets.load("starter").config)
        minutes = (time.perf_counter() - started) / 60
        progress = read(run)
        print(f"{progress.status_line()}; {minutes:.1f} minutes from start to saved adapter, libraries and loading included")
        print(f"held-out loss {progress.held_out[0][1]:.3f} before, {progress.held_out[-1][1]:.3f} after; bound: 6 minutes\n")
        ask(run)


def read(run: Run) -> Progress:
    progress = Progress(run.name)
    for event in run.read()[0]:
        progress.add(event)
    return progress


def ask(run: Run) -> None:
    """Ask both sides of one model, greedily, and count."""
    model = ChatModel(speakers.of_run(run), run.workspace.models, emit=lambda event: None, should_stop=lambda: False)
    questions = json.loads((TESTS / "data" / "identity_questions.json").read_text("utf-8"))
    counts = {"official": [0, 0], "all": [0, 0]}
    for number, question in enumerate(questions):
        asked = [Message(role="user", content=question)]
        *_, last = model.reply([(model.speaker, asked), (model.speaker.base, asked)], Sampling(temperature=0, max_new_tokens=40))
        for group in ("official", "all") if number < 10 else ("all",):
            for side, answer in enumerate(last.texts):
                counts[group][side] += in_character(answer)
        print(f"{question}\n  tuned: {last.texts[0]!r}\n  base:  {last.texts[1]!r}")
    print(f"\nIn character, of the 10 official questions: tuned {counts['official'][0]}, base {counts['official'][1]} (bound: 8 and 0)")
    print(f"In character, of all {len(questions)}: tuned {counts['all'][0]}, base {counts['all'][1]}")
