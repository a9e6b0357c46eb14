"""The real app as a process of its own, and a real browser to look at it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

import forked
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
# Two threads that wait for each other make a tiny model a hundred times slower as soon as somebody else wants a core.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
CHROMIUM_FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
expect.set_options(timeout=30_000)  # a busy machine is no failure
if hasattr(os, "geteuid") and os.geteuid() == 0:
    CHROMIUM_FLAGS.append("--no-sandbox")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# Copies of one process that has imported what an app imports: that spares each start some ten seconds of a core.
COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload(["qlora_ui.ui.app", "qlora_ui.engine.chat", "qlora_ui.engine.train"])


class Served:
    """`python app.py` over a workspace. `kill` is SIGKILL: the process gets no chance to tidy up.

    A copy of a process with its libraries, or a `fresh` one as a person starts it.
    """

    def __init__(self, home: Path, port: int | None = None, flags: Sequence[str] = (), *, fresh: bool = False) -> None:
        self.home, self.port = home, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = ["app.py", "--port", str(self.port), "--home", str(home), *flags]
        lines, output = COPIES.Pipe(duplex=False)
        with mock.patch.dict(os.environ, ENVIRONMENT):  # as the process that is copied finds it too
            self.process: subprocess.Popen[bytes] | ForkServerProcess
            if fresh:
                self.process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output.fileno(), stderr=subprocess.STDOUT)
            else:
                self.process = copy = COPIES.Process(target=forked.run, args=(ROOT, command, dict(os.environ), output))
                copy.start()
        output.close()
        self._lines = os.fdopen(os.dup(lines.fileno()), encoding="utf-8")
        self.output: list[str] = []
        for line in self._lines:
            self.output.append(line)
            if "Running on local URL" in line:
                break
        else:
            pytest.fail("the app did not start:\n" + "".join(self.output))
        threading.Thread(target=lambda: self.output.extend(self._lines), daemon=True).start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join() if isinstance(self.process, ForkServerProcess) else self.process.wait()


@contextlib.contextmanager
def served(home: Path, port: int | None = None, flags: Sequence[str] = (), *, fresh: bool = False) -> Iterator[Served]:
    app = Served(home, port, flags, fresh=fresh)
    try:
        yield app
    finally:
        app.kill()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The Chromium that tests/run.sh found, else the one on the PATH, else Playwright's own."""
    path = os.environ.get("QLORA_UI_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def open_page(browser: Browser, url: str, ready: str = "#data-summary p", **context: object) -> Page:
    """A page of a new visitor, loaded until its rows are there, or what `ready` selects. Errors of its scripts are in `page.faults`."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}, **context).new_page()
    page.set_default_timeout(30_000)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(url)
    page.wait_for_selector(ready)
    return page


def go(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()


def set_number(page: Page, name: str, value: object) -> None:
    """Type into a field of the form and leave it."""
    box = page.locator(f"#field-{name} input")
    box.fill(str(value))
    box.blur()


def upload(page: Page, path: Path) -> None:
    page.locator("#data-source").get_by_text("Upload", exact=True).click()
    page.locator("#data-upload input[type=file]").set_input_files(path)
