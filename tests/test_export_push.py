"""An export pushed to the Hugging Face Hub: one in this process, which keeps what it is sent."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from test_exporting import wait_for_exports
from training import Watched, never

from qlora_ui import exported, exporting, exports
from qlora_ui.cli import main
from qlora_ui.engine import push
from qlora_ui.errors import UserError
from qlora_ui.jobs import Jobs
from qlora_ui.runs import Run, Workspace

TOKEN = "hf_" + "secret" * 5
COMMIT = "c" * 40


class Hub:
    """A Hub that takes any file as text into its commit. `refuses` is a status that it answers everything with, `hangs` for ever."""

    def __init__(self) -> None:
        self.refuses = 0
        self.let_go = threading.Event()
        self.let_go.set()
        self.made: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.tokens.add(self.headers.get("Authorization", ""))
                hub.let_go.wait(60)
                status, answer = (hub.refuses, {}) if hub.refuses else hub.answer(self.path.partition("?")[0], body)
                said = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_POST = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            self.made = json.loads(body)
            return 200, {"url": f"{self.url}/me/guanaco"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/models/me/guanaco/preupload/main":
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        if path == "/api/models/me/guanaco/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/me/guanaco/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        if path == "/api/models/me/guanaco":
            return 200, {"id": "me/guanaco", "sha": COMMIT, "siblings": []}
        if path == "/api/models/o/licensed":
            return 200, {"id": "o/licensed", "cardData": {"license": "apache-2.0"}, "siblings": []}
        return 404, {}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.let_go.set()
    hub.server.shutdown()
    hub.server.server_close()


def test_an_adapter_is_pushed_private_and_whole_with_its_card_and_no_place_of_this_machine(
    finished: Watched, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, target = finished.run, tmp_path / "adapter"
    arguments = ["export", "--run", run.id, "--adapter", "--to", str(target), "--push", "me/guanaco", "--json"]
    assert main(["--home", str(run.workspace.root), *arguments]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["pushed"].endswith("/me/guanaco")
    assert (hub.made["name"], hub.made["organization"]) == ("guanaco", "me")
    assert hub.made.get("private") or hub.made.get("visibility") == "private"
    here = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    sent = {name: content for name, content in hub.files.items() if name != ".gitattributes"}
    assert sent == here
    assert {"README.md", "loss.png", "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"} <= set(sent)
    assert yaml.safe_load(sent["README.md"].decode().split("---\n")[1])["library_name"] == "peft"
    for content in sent.values():
        assert TOKEN.encode() not in content
        assert str(run.workspace.root).encode() not in content
    assert TOKEN not in out + err
    assert hub.tokens == {f"Bearer {TOKEN}"}


def refusal() -> str:
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        push.check(never)
    assert time.monotonic() - begun < 5
    assert caught.value.field == "push"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_stands_in_the_way_of_a_push_is_one_sentence_within_five_seconds(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuses = 401
    assert refusal() == "Nothing was exported: the Hub refuses the token. Give one that may write there."
    hub.refuses, seconds = 0, push.ANSWER_SECONDS
    hub.let_go.clear()
    monkeypatch.setattr(push, "ANSWER_SECONDS", 0.2)
    assert "the Hugging Face Hub does not answer" in refusal()
    hub.let_go.set()
    monkeypatch.setattr(push, "ANSWER_SECONDS", seconds)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hugging Face Hub cannot be reached. Check the connection" in refusal()
    monkeypatch.delenv("HF_TOKEN")
    assert "Pushing needs a token that may write: set HF_TOKEN" in refusal()


def test_a_push_that_fails_leaves_the_export(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a card")
    hub.refuses = 403
    with pytest.raises(UserError, match=r"is complete, but was not pushed to me/guanaco: the Hub refuses the token"):
        push.push(tmp_path, "me/guanaco", lambda event: None, never)
    assert (tmp_path / "README.md").read_text() == "a card"


def test_the_licence_of_a_base_on_the_hub_is_asked_for(hub: Hub) -> None:
    assert push.licence_of("o/licensed", never) == "apache-2.0"
    assert push.licence_of("o/nowhere", never) == ""


def test_a_folder_that_chats_is_not_pushed(finished: Watched) -> None:
    with pytest.raises(UserError, match="--push is for --adapter and --merged"):
        exports.plan(finished.run, "folder", "out", repository="me/guanaco")


def test_a_token_that_was_typed_is_used_and_is_in_no_file_and_no_word(
    finished: Watched, tiny_workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    run = Run(folder=Path(shutil.copytree(finished.run.folder, tiny_workspace.runs / finished.run.id)))
    maker = exporting.Exporting(tiny_workspace, Jobs(tiny_workspace))
    maker.start(exporting.into_workspace(run, "adapter", repository="me/guanaco", private=False), TOKEN)
    wait_for_exports()
    assert maker.job is not None
    assert (maker.job.stand, maker.job.log[-1]) == ("done", f"Pushed: commit {COMMIT[:12]}")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.made.get("private") is False or hub.made.get("visibility") == "public"
    assert exported.past(tiny_workspace)[maker.job.name].pushed.endswith("/me/guanaco")
    written = [path.read_bytes() for path in tiny_workspace.root.rglob("*") if path.is_file()]
    assert not [content for content in written if TOKEN.encode() in content]
    assert TOKEN not in repr(maker.job) + "".join(capfd.readouterr())
