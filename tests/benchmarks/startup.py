"""How long a person waits: for the server, for the page, for the first loss point of the starter preset. Five rounds."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving import chromium, go, open_page, served

from qlora_ui.runs import Workspace

MODELS = Path(__file__).resolve().parents[1] / ".cache" / "models"
ROUNDS = 5


def main() -> None:
    figures: dict[str, list[float]] = {}

    def note(name: str, since: float) -> None:
        figures.setdefault(name, []).append(time.perf_counter() - since)

    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as home, chromium() as browser:
            workspace = Workspace.open(home)
            workspace.models.rmdir()
            workspace.models.symlink_to(MODELS)
            start = time.perf_counter()
            with served(workspace.root, fresh=True) as app:
                note("command to server up", start)
                page = open_page(browser, app.url)
                note("command to page with its rows", start)
                go(page, "Train")
                clicked = time.perf_counter()
                page.locator("#start-button").click()
                page.wait_for_function("Number(document.querySelector('#loss-plot')?.dataset.heldOut || 0) > 0", timeout=120_000)
                note("Start to held-out loss at step 0", clicked)
                page.wait_for_function("Number(document.querySelector('#loss-plot')?.dataset.points || 0) > 0", timeout=120_000)
                note("Start to first training loss", clicked)
    print(f"| seconds, {ROUNDS} rounds | median | least | most |\n|---|---|---|---|")
    for name, seconds in figures.items():
        print(f"| {name} | {statistics.median(seconds):.1f} | {min(seconds):.1f} | {max(seconds):.1f} |")
