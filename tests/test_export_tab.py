"""The Export tab in a real Chromium: a run's model is taken away, and used by a process that knows nothing of this project."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from serving import free_port, go, open_page
from test_export import ASKED, ELSEWHERE, said_by
from test_exporting import Gate, gate, run, there  # noqa: F401 - two are fixtures

from qlora_ui import services
from qlora_ui.exporting import Exporting
from qlora_ui.runs import Run
from qlora_ui.ui import app

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")]
MINUTE = 60_000


@pytest.fixture
def url(run: Run, gate: Gate) -> Iterator[str]:  # noqa: F811
    """The app over the run's workspace, whose exports wait at the gate."""
    warm_up = services.WarmUp()
    made = services.build(run.workspace, warm_up)
    page = app.build(replace(made, exporting=Exporting(run.workspace, made.jobs, made.chat.release, gate)))
    port = free_port()
    page.launch(server_port=port, prevent_thread_lock=True, quiet=True, **app.launch_options())
    warm_up.start()
    yield f"http://127.0.0.1:{port}"
    page.close()


def taken(page: Page, to: Path) -> str:
    """Where the chosen export lies, after it was downloaded and unpacked."""
    with page.expect_download() as download:
        page.locator("#export-download").click()
    shutil.unpack_archive(download.value.path(), to, "zip")
    return str(to)


def test_a_person_cancels_exports_downloads_uses_elsewhere_and_deletes(
    browser: Browser,
    url: str,
    run: Run,  # noqa: F811
    gate: Gate,  # noqa: F811
    tmp_path: Path,
) -> None:
    page = open_page(browser, url)
    page.locator("#export-button").click()
    start, now, past = page.locator("#export-start"), page.locator("#export-now"), page.locator("#export-past label")
    expect(page.locator("#export-size")).to_contain_text("the disk has", timeout=MINUTE)
    start.click()
    expect(now).to_contain_text("3 of 12 tensors")
    page.reload()
    go(page, "Export")
    expect(now).to_contain_text(f"Exporting: adapter of {run.id}, step 8")
    expect(start).to_be_disabled()
    page.locator("#export-cancel").click()
    expect(now).to_contain_text("Cancelled: nothing was written to")
    expect(start).to_be_enabled()
    assert there(run.workspace) == []

    gate.let_on.set()
    start.click()
    expect(now).to_contain_text("its logits differ from those of what was trained by at most 0 on cpu", timeout=MINUTE)
    expect(past).to_have_count(1)
    adapter = taken(page, tmp_path / "adapter")
    page.get_by_label("Folder that chats", exact=True).check()
    start.click()
    expect(past).to_have_count(2, timeout=MINUTE)
    expect(page.locator("#export-chosen")).to_contain_text(f"exports/{run.id}-folder in the workspace")
    folder = f"{taken(page, tmp_path / 'chat')}/{run.id}-folder"

    base = str(run.workspace.models / "tiny")
    asked = {"adapter": ("adapter", adapter, base), "folder": ("script", folder, base)}
    command = [sys.executable, "-I", "-c", ELSEWHERE, json.dumps(asked), ASKED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    answer = json.loads(next(line[1:] for line in done.stdout.splitlines() if line.startswith("@")))
    logits, words = said_by(run, run.adapter)
    assert answer["ours"] == []
    assert all(torch.equal(torch.tensor(told["logits"]), logits) for told in answer["told"].values())
    assert answer["told"]["folder"]["answer"] == words

    page.locator("#export-delete").click()
    expect(page.locator("#export-delete-question")).to_contain_text(f"Delete exports/{run.id}-folder")
    page.locator("#export-delete-cancel").click()
    expect(page.locator("#export-delete-question")).to_be_hidden()
    page.locator("#export-delete").click()
    page.locator("#export-delete-confirm").click()
    expect(past).to_have_count(1)
    assert there(run.workspace) == [f"{run.id}-adapter.zip", f"{run.id}-adapter.zip.json"]
    assert page.faults == []  # type: ignore[attr-defined]
