"""What watching costs the trainer: steps per second with and without 20 pages, in turns.

The app is held on one core, trainer and server together, so that every answer is taken from the trainer; the pages are simulated on
the other one and ask what the page's script asks. The starter model is trained, in steps of under a second; `--tiny` trains a
model of 90 steps a second, most of it Python, which shares the interpreter's lock with the answers: the worst case.
`python -m tests.benchmarks readers [--short] [--tiny]`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
from serving import Served, served

from qlora_ui import presets
from qlora_ui.events import Step
from qlora_ui.runs import Run, Workspace

PAGES = 20
CACHED = Path(__file__).resolve().parents[1] / ".cache" / "models"


class SimulatedPage:
    """Asks as ui/live.js does, with the curve's cursor as ui/loss_plot.js keeps it, and counts what comes back."""

    def __init__(self, client: httpx.AsyncClient, component_id: int, number: int) -> None:
        self._client, self._component_id, self._session = client, component_id, f"page{number}"
        self.version, self.run, self.log_count = "", "", -1
        self.curve: list[Any] | None = None
        self.parts: dict[str, str] = {}
        self.steps: list[int] = []
        self.bytes: list[int] = []
        self.seconds: list[float] = []

    async def ask(self) -> dict[str, Any]:
        data = [self._session, self.version, self.run, self.log_count, self.curve]
        call = {"data": data, "component_id": self._component_id, "fn_name": "news", "session_hash": self._session}
        since = time.perf_counter()
        response = await self._client.post("/gradio_api/component_server", json=call)
        self.seconds.append(time.perf_counter() - since)
        self.bytes.append(response.num_bytes_downloaded)
        answer: dict[str, Any] = response.raise_for_status().json()
        if "version" in answer:
            self.version, self.run, self.log_count = answer["version"], answer["run"], answer["log"]["count"]
            self.parts |= answer["parts"]
            if self.run and (self.curve is None or self.curve[0] != self.run):  # the plot then asks for itself
                self.curve, self.version = [self.run, 0, 0, 0, 0], ""
        if "curve" in answer and self.curve:
            points = answer["curve"]
            self.steps = [*([] if points["restart"] else self.steps), *(step for step, _ in points["train"])]
            held_out = (0 if points["restart"] else self.curve[4]) + len(points["held_out"])
            self.curve = [self.run, points["rewinds"], points["stride"], points["count"], held_out]
        return answer

    async def watch(self, seconds: float, every: float | None = None) -> None:
        """Ask as often as the app says; at once again while the run's events are still being read."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            answer = await self.ask()
            await asyncio.sleep(0 if answer.get("behind") else min(every or answer["wait"], left))


@contextlib.asynccontextmanager
async def pages_of(app: Served, count: int = PAGES) -> Any:
    """That many simulated pages of an app, which compress and keep connections as a browser does."""
    limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
    async with httpx.AsyncClient(base_url=app.url, headers={"accept-encoding": "gzip, br"}, limits=limits, timeout=60) as client:
        components = (await client.get("/config")).json()["components"]
        (component_id,) = (part["id"] for part in components if part["props"].get("elem_id") == "seen")
        yield [SimulatedPage(client, component_id, number) for number in range(count)]


def watch_all(app: Served, seconds: float) -> list[SimulatedPage]:
    async def run() -> list[SimulatedPage]:
        async with pages_of(app) as pages:

            async def one(number: int, page: SimulatedPage) -> None:
                await asyncio.sleep(number / len(pages))  # people do not open pages in step
                await page.watch(seconds - number / len(pages))

            await asyncio.gather(*(one(number, page) for number, page in enumerate(pages)))
            return list(pages)

    return asyncio.run(run())


@contextlib.contextmanager
def on_cores(*cores: int) -> Iterator[None]:
    """This process, and what it starts meanwhile, stay on these cores."""
    if not hasattr(os, "sched_setaffinity"):  # macOS: there the figure is of the whole machine
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before & set(cores) or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def training_app(is_tiny: bool) -> Iterator[tuple[Served, Run]]:
    """The app on one core, training for longer than anybody looks."""
    from gradio_client import Client

    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as opened:
        workspace = Workspace.open(home)
        long = {"max_steps": 10_000_000, "save_steps": 1_000_000, "eval_steps": 1_000_000}
        if is_tiny:
            tiny.tiny_model(workspace.models / tiny.NAME)
            rows = shutil.copy(tiny.tiny_rows(Path(home) / "rows.json"), workspace.uploads)
            values = {name: value for name, value in tiny.tiny_config(rows, **long).values().items() if name != "data"}
        else:
            workspace.models.rmdir()
            workspace.models.symlink_to(CACHED)
            rows = presets.load("starter").config.data.data
            values = {**long, "micro_batch_size": 2, "held_out_share": 0}
        with on_cores(0):
            app = opened.enter_context(served(workspace.root, fresh=True))
        client = Client(app.url, verbose=False)
        run = workspace.get(client.predict("starter", rows, json.dumps(values), api_name="/start_training"))
        while run.last_step() < 20:
            assert run.state() == "running", run.read()[0][-1]
            time.sleep(0.2)
        yield app, run


def cpu_seconds(app: Served) -> tuple[float, float]:
    """CPU time of all threads of the app, and of all but the busiest, which trains."""
    spent = []
    for task in Path(f"/proc/{app.process.pid}/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            spent.append(int(task.read_text().split()[0]) / 1e9)
    return sum(spent), sum(spent) - max(spent, default=0)


def measure(is_tiny: bool, turns: int, seconds: float) -> tuple[list[float], list[float], list[float], list[SimulatedPage]]:
    """Ratios watched to unwatched, one a turn, by the clock and by the app's CPU time for a step, which other work on the machine
    changes less; the share of a core that answering took in each; the pages of the last turn."""
    spans: list[tuple[float, float, bool]] = []
    shares: dict[bool, list[float]] = {True: [], False: []}
    loads: list[float] = []
    os.environ["OMP_NUM_THREADS"] = "1"
    pages: list[SimulatedPage] = []
    with training_app(is_tiny) as (app, run), on_cores(1):
        for turn in range(2 * turns + 1):
            watched = turn % 2 == 1
            begun, (all_before, before) = time.time(), cpu_seconds(app)
            if watched:
                pages = watch_all(app, seconds)
            else:
                time.sleep(seconds)
            spans.append((begun, time.time(), watched))
            all_after, after = cpu_seconds(app)
            loads.append((all_after - all_before) / (time.time() - begun))
            shares[watched].append((after - before) / (time.time() - begun))
        steps = [event.time for event in run.read()[0] if isinstance(event, Step)]
    rates = [rate([at for at in steps if begun <= at < ended]) for begun, ended, _ in spans]
    by_cpu = ratios_of([rate / load for rate, load in zip(rates, loads, strict=True)])
    print(f"steps per second, unwatched and watched in turns: {', '.join(f'{rate:.2f}' for rate in rates)}")
    idle = statistics.mean(shares[False])
    return ratios_of(rates), by_cpu, [share - idle for share in shares[True]], pages


def ratios_of(speeds: list[float]) -> list[float]:
    """Each watched turn to the two beside it."""
    return [speeds[turn] / ((speeds[turn - 1] + speeds[turn + 1]) / 2) for turn in range(1, len(speeds), 2)]


def rate(times: list[float]) -> float:
    """Steps per second from the first of these to the last: a turn does not begin with a step."""
    return (len(times) - 1) / (times[-1] - times[0])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks readers")
    parser.add_argument("--short", action="store_true", help="one turn of four seconds instead of ten of half a minute")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead of the starter model")
    flags = parser.parse_args(arguments)
    turns, seconds = (1, 4) if flags.short else (10, 30)
    by_clock, by_cpu, shares, pages = measure(flags.tiny, turns, seconds)
    asked = [size for page in pages for size in page.bytes]
    waited = sorted(second for page in pages for second in page.seconds)
    print(f"\n{turns} turns of {seconds} s; speed with {PAGES} pages / without, goal 0.97:")
    for name, ratios in (("by the clock", by_clock), ("by the app's CPU time for a step", by_cpu)):
        error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
        print(
            f"{name}: mean {statistics.mean(ratios):.4f} ± {error:.4f} (standard error), median {statistics.median(ratios):.4f}, ", end=""
        )
        print(f"least {min(ratios):.4f}, most {max(ratios):.4f}")
    print(f"CPU time of the answers, in cores: median {statistics.median(shares):.2%}, least {min(shares):.2%}, most {max(shares):.2%}")
    print(f"answers: median {statistics.median(asked):.0f} bytes, most {max(asked)}; median wait {waited[len(waited) // 2] * 1000:.1f} ms")
