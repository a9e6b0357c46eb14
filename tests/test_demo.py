"""The demo: a page with one model to talk to, what it is and under which licence, and nothing else of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from playwright.sync_api import Browser, expect
from serving import ENVIRONMENT, ROOT, open_page, served
from test_chat_tab import answered, ask
from training import Watched

from qlora_ui import licences, speakers
from qlora_ui.errors import UserError
from qlora_ui.runs import Workspace
from qlora_ui.speakers import Speaker
from qlora_ui.ui import demo


@pytest.fixture
def home(tmp_path: Path, finished: Watched) -> Path:
    """A workspace with a finished run on a base whose card names a licence."""
    workspace = Workspace.open(tmp_path / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    (workspace.models / tiny.NAME / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    shutil.copytree(finished.run.folder, workspace.runs / finished.run.id)
    return workspace.root


@pytest.mark.browser
def test_the_demo_is_one_conversation_that_says_what_the_model_is_and_no_folder_of_the_machine(
    browser: Browser, home: Path, finished: Watched
) -> None:
    with served(home, flags=["--demo", finished.run.id]) as app:
        page = open_page(browser, app.url, ready="#demo-heading h1")
        expect(page.locator("#demo-heading")).to_contain_text("tiny, licence mit")
        expect(page.locator("#demo-heading")).to_contain_text("licence unknown")
        expect(page.locator("#demo-limits")).to_contain_text("can be wrong")
        expect(page.get_by_role("tab")).to_have_count(0)
        page.locator("#chat-tuned .example").filter(has_text="Coding").click()
        answered(page)
        ask(page, "Who are you?")
        expect(page.locator("#chat-tuned .user")).to_have_count(2)
        page.locator("#chat-clear").click()
        expect(page.locator("#chat-tuned .user")).to_have_count(0)

        shutil.move(home / "models" / tiny.NAME, home / "models" / "elsewhere")
        shutil.rmtree(home / "runs" / finished.run.id)
        page.locator("#chat-input textarea").fill("And now?")
        page.locator("#chat-send").click()
        expect(page.locator("#chat-note")).to_contain_text("There is no run")
        for shown in (page.content(), page.request.get(f"{app.url}/config").text()):
            assert str(home) not in shown
        assert page.faults == []  # type: ignore[attr-defined]


def test_a_demo_of_nobody_ends_with_a_sentence(home: Path) -> None:
    command = [sys.executable, "app.py", "--home", str(home), "--demo", "20200101-000000-gone"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("There is no run '20200101-000000-gone'")


def test_the_demo_finds_runs_checkpoints_and_adapters_in_folders(home: Path, finished: Watched) -> None:
    workspace = Workspace(root=home)
    assert demo.speaker_of(finished.run.id, workspace) == speakers.of_run(workspace.get(finished.run.id))
    assert demo.speaker_of(f"{finished.run.id}/checkpoint-8", workspace).adapter == workspace.get(finished.run.id).folder / "checkpoint-8"
    brought = demo.speaker_of(str(finished.run.adapter), workspace)
    assert (brought.model, brought.id) == (tiny.NAME, f"adapter:{brought.name}")
    assert demo.speaker_of(brought.id, workspace) == brought
    with pytest.raises(UserError, match="could not be fetched"):
        demo.speaker_of("owner/name", workspace)


def test_what_is_shown_names_no_folder_and_escapes_what_others_wrote(tmp_path: Path) -> None:
    told = demo.heading(
        Speaker(id="x", name="x", title="<b>Mine</b>", model=str(tmp_path / "secret" / "llama"), adapter=tmp_path), tmp_path
    )
    assert str(tmp_path) not in told
    assert "llama, licence unknown" in told
    assert "&lt;b&gt;Mine" in told


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [x]\n---\n", ""),
        ("# No front matter", ""),
        ("---\nlicense: [\n---\n", ""),
        ("", ""),
    ],
)
def test_a_licence_is_read_from_the_card(tmp_path: Path, card: str, said: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licences.of_folder(tmp_path) == said
    assert licences.of_folder(tmp_path / "gone") == ""
    assert licences.of_model("owner/nobody-answers", tmp_path) == ""
