"""A run of 200,000 logged steps: bytes and server time of opening, plot and refresh; memory over a simulated day; the page's work.

`python -m tests.benchmarks long-run [--short]`. The app, the store and the page are the real ones; only the trainer is a fake that
appends the events of a day as fast as the disk takes them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving import Served, chromium, go, open_page, served

from qlora_ui.events import Event, Finished, HeldOut, Phase, Planned, Step, encode
from qlora_ui.runs import Run, Workspace, write_json

from .readers import SimulatedPage, pages_of

DAY_STEPS = 86_400


def step(number: int) -> Step:
    loss = 1 + math.exp(-number / 2e4) + 0.1 * math.sin(number)
    return Step(step=number, loss=loss, learning_rate=1e-4, grad_norm=1.0, tokens_per_second=900, memory_gib=1.5, epoch=number / 1e4)


def training(first: int, last: int, total_steps: int) -> Iterator[Event]:
    """The events of steps `first` to `last`, evaluated every hundred."""
    if first == 1:
        yield Planned(total_steps=total_steps, train_rows=8, held_out_rows=2, tokens=80, trained_tokens=40)
        yield Phase(name="training")
    for number in range(first, last + 1):
        yield step(number)
        if number % 100 == 0:
            yield HeldOut(step=number, loss=1.1 + math.exp(-number / 2e4))


def long_run(workspace: Workspace, steps: int, total_steps: int, ended: bool) -> Run:
    run = Run(folder=workspace.runs / "20261122-100139-long-run")
    run.folder.mkdir()
    write_json(run.config_path, {})
    with run.events_path.open("w", encoding="utf-8") as file:
        file.writelines(encode(event) + "\n" for event in training(1, steps, total_steps))
        if ended:
            file.write(encode(Finished(step=steps)) + "\n")
    return run


def cpu_seconds(app: Served) -> float:
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{app.process.pid}/task").glob("*/schedstat")) / 1e9


def resident_mib(app: Served) -> float:
    status = Path(f"/proc/{app.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def settled(app: Served) -> None:
    """Wait until the app has imported what it warms up, so that its CPU time is of answers only."""
    while True:
        before = cpu_seconds(app)
        time.sleep(1)
        if cpu_seconds(app) - before < 0.15:
            return


async def first_look(app: Served, note: Any) -> SimulatedPage:
    """A page that is opened: it asks until the run is known, and then for its curve."""
    async with pages_of(app, 1) as (page,):
        while (await page.ask()).get("behind"):
            pass
        asked, longest = len(page.seconds), max(page.seconds)
        note("questions until the run is known", asked, f"longest {longest * 1000:.0f} ms")
        note("first look without the curve, bytes", page.bytes[-1], f"{page.seconds[-1] * 1000:.0f} ms")
        page.version = ""
        await page.ask()
        note("plot, bytes", page.bytes[-1], f"{page.seconds[-1] * 1000:.0f} ms")
        return page  # type: ignore[no-any-return]


async def refreshes(app: Served, run: Run, steps: int, times: int) -> tuple[list[int], list[float]]:
    """What one more step costs a page that is up to date."""
    async with pages_of(app, 1) as (page,):
        for _ in range(2):
            await page.ask()
        for number in range(times):
            run.append(step(steps + 1 + number))
            await page.ask()
        return page.bytes[-times:], page.seconds[-times:]


def sizes(steps: int, note: Any) -> None:
    """Opening, plot and refresh, once without the snapshot and once with it."""
    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace.open(home)
        run = long_run(workspace, steps, steps + 1000, ended=False)
        lock = run.lock()
        with lock.acquire():
            for title in ("no snapshot", "with snapshot"):
                with served(workspace.root, fresh=True) as app:
                    settled(app)
                    note(f"-- {steps:,} steps, {run.size() / 1e6:.0f} MB of events, {title}", "", "")
                    busy = cpu_seconds(app)
                    asyncio.run(first_look(app, note))
                    note("server CPU of that, ms", round((cpu_seconds(app) - busy) * 1000), "")
            with served(workspace.root, fresh=True) as app:
                settled(app)
                asyncio.run(first_look(app, lambda *_: None))
                busy = cpu_seconds(app)
                taken, seconds = asyncio.run(refreshes(app, run, steps, 20))
                each = (cpu_seconds(app) - busy) / 22
                note("refresh, bytes", max(taken), f"median {statistics.median(seconds) * 1000:.1f} ms, CPU {each * 1000:.1f} ms")


def soak(steps: int, note: Any) -> None:
    """A day of events as fast as they can be written, while pages look: the app must not grow with them."""
    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace.open(home)
        run = long_run(workspace, 100, steps, ended=False)
        with run.lock().acquire(), served(workspace.root, fresh=True) as app:
            settled(app)
            written = threading.Event()

            def write() -> None:
                for event in training(101, steps, steps):
                    run.append(event)
                written.set()

            async def look() -> list[float]:
                resident = []
                async with pages_of(app, 20) as pages:
                    writer = threading.Thread(target=write)
                    await asyncio.gather(*(page.watch(1.5, every=0.2) for page in pages))  # what 20 pages take once
                    resident.append(resident_mib(app))
                    writer.start()
                    while not written.is_set():
                        await asyncio.gather(*(page.watch(1, every=0.2) for page in pages))
                        resident.append(resident_mib(app))
                    writer.join()
                    for page in pages:
                        await page.ask()
                    assert {page.parts["status-line"] for page in pages} == {pages[0].parts["status-line"]}
                    assert {tuple(page.steps) for page in pages} == {tuple(pages[0].steps)}
                return resident

            resident = asyncio.run(look())
            note(f"-- soak: {steps:,} steps ({run.size() / 1e6:.0f} MB), 20 pages", "", "")
            note("resident MiB before, after", f"{resident[0]:.0f}, {resident[-1]:.0f}", f"most {max(resident):.0f}")


def page_share(steps: int, seconds: int, note: Any) -> None:
    """A real Chromium page on the Train tab while a run of that many steps gains one a second."""
    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace.open(home)
        run = long_run(workspace, steps, steps + 1000, ended=False)
        with run.lock().acquire(), served(workspace.root, fresh=True) as app, chromium() as browser:
            settled(app)
            page = open_page(browser, app.url)
            go(page, "Train")
            page.wait_for_function(f"document.querySelector('#loss-plot')?.dataset.lastStep >= {steps - 512}")
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable")
            finished: list[Any] = []
            page.on("requestfinished", lambda request: finished.append(request))

            def busy() -> float:
                metrics = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
                return float(metrics["TaskDuration"])

            before, begun = busy(), time.monotonic()
            for number in range(1, seconds + 1):
                run.append(step(steps + number))
                page.wait_for_timeout(1000)
            share = (busy() - before) / (time.monotonic() - begun)
            taken = [request.sizes()["responseBodySize"] + request.sizes()["responseHeadersSize"] for request in finished]
            assert page.faults == []
            note(f"-- Chromium, {steps:,} steps, one more a second for {seconds} s", "", "")
            note("requests, of which most bytes", f"{len(taken)}, {max(taken)}", f"median {statistics.median(taken):.0f}")
            note("main thread busy", f"{share:.1%}", "")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks long-run")
    parser.add_argument("--short", action="store_true", help="2,000 steps instead of 200,000, 86,400 and 100,000")
    short = parser.parse_args(arguments).short

    def note(what: str, value: Any, more: str) -> None:
        print(f"{what:<45}{value!s:>14}   {more}", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        sizes(2_000 if short else 200_000, note)
        soak(2_000 if short else DAY_STEPS, note)
        page_share(2_000 if short else 100_000, 3 if short else 30, note)
