"""Models from the Hugging Face Hub: fetched with progress, refused in one sentence, and stopped while it hangs."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import tiny
from huggingface_hub import constants

from qlora_ui import jobs
from qlora_ui.engine.model import Found, find
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, Phase, PhaseProgress, Stopped
from qlora_ui.runs import Workspace
from qlora_ui.stopping import Cancelled

COMMIT = "a" * 40
CLOSED = constants.ENDPOINT
ERRORS = {
    "o/gated": (403, "GatedRepo", "Access to model o/gated is restricted."),
    "o/private": (401, "RepoNotFound", "Repository not found"),
    "o/bad-token": (401, "", "Invalid credentials in Authorization header"),
    "o/forbidden": (403, "", "Forbidden"),
    "o/busy": (503, "", "Service unavailable"),
    "o/limited": (400, "", "Bad request"),
}


class Hub:
    """A Hub with a few models. It can hang at a question, or half-way through the weights, until it is let go."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.asked: list[str] = []
        self.hang_at = ""
        self.hanging, self.let_go = threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.asked.append(self.path)
                hub.answer(self, unquote(urlparse(self.path).path).strip("/").split("/"))

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler, parts: list[str]) -> None:
        if parts[:2] == ["api", "models"]:
            self.hang("question")
            name, rest = "/".join(parts[2:4]), parts[4:]
            if name not in self.models:
                status, code, message = ERRORS.get(name, (404, "RepoNotFound", "Repository not found"))
                self.send(handler, status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})
            elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                self.send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            elif rest[:1] == ["tree"]:
                files = sorted(self.models[name].iterdir())
                tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": digest(file)} for file in files]
                self.send(handler, 200, json.dumps(tree).encode(), {})
            else:
                self.send(handler, 200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode(), {})
        elif parts[2:3] == ["resolve"]:
            file = self.models["/".join(parts[:2])] / parts[4]
            headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT}
            self.send(handler, 200, file.read_bytes(), headers)
        else:
            self.send(handler, 404, b"{}", {})

    def send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        half = len(body) // 2 if handler.path.endswith(".safetensors") else 0
        handler.wfile.write(body[:half])
        if half:
            handler.wfile.flush()
            self.hang("weights")
        handler.wfile.write(body[half:])

    def hang(self, place: str) -> None:
        if self.hang_at == place:
            self.hanging.set()
            self.let_go.wait(60)

    def end_of_hanging(self) -> None:
        """Answer everything, and wait for those who were left alone with a question."""
        self.hang_at = ""
        self.let_go.set()
        for thread in threading.enumerate():
            if thread.name.startswith("abandonable"):
                thread.join(20)
                assert not thread.is_alive()


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The Hub's client reads its address when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    good = tiny.tiny_model(tmp_path / "good")
    (good / "modeling_evil.py").write_text("raise SystemExit('this must never be fetched')")
    pickled = Path(shutil.copytree(good, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hub = Hub({"o/good": good, "o/pickled": pickled})
    use(monkeypatch, hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.end_of_hanging()
    hub.server.shutdown()
    hub.server.server_close()


def fetched(workspace: Workspace, model: str = "o/good", revision: str = "main") -> tuple[Found, list[Event]]:
    told: list[Event] = []
    return find(model, revision, workspace.models, told.append, lambda: False), told


def refusal(workspace: Workspace, model: str, revision: str = "main") -> str:
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        fetched(workspace, model, revision)
    assert time.monotonic() - begun < 5
    assert caught.value.field == "model"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_is_fetched_with_its_bytes_counted(workspace: Workspace, hub: Hub) -> None:
    found, told = fetched(workspace)
    assert (found.public_name, found.origin, found.commit) == ("o/good", "the Hugging Face Hub", COMMIT)
    files = {path.name: path for path in found.folder.iterdir()}
    assert files["model.safetensors"].read_bytes() == (hub.models["o/good"] / "model.safetensors").read_bytes()
    assert "modeling_evil.py" not in files
    progress = [event for event in told if isinstance(event, PhaseProgress)]
    total = sum(path.stat().st_size for path in files.values())
    assert {event.unit for event in progress} == {"bytes"}
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert (progress[-1].done, progress[-1].total) == (total, total)


def test_code_is_fetched_only_of_a_model_that_is_trusted(workspace: Workspace, hub: Hub) -> None:
    assert not list(fetched(workspace)[0].folder.glob("*.py"))
    found = find("o/good", "main", workspace.models, lambda event: None, lambda: False, trusted=True)
    assert found.trusted
    assert [path.name for path in found.folder.glob("*.py")] == ["modeling_evil.py"]


def test_a_model_in_the_cache_is_not_fetched_again_and_serves_when_the_hub_is_away(
    workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = fetched(workspace)
    asked = len(hub.asked)
    again, told = fetched(workspace)
    assert again == first
    assert len(hub.asked) == asked + 1  # whether there is a newer commit
    use(monkeypatch, CLOSED)
    away, told = fetched(workspace)
    assert (away.folder, away.commit) == (first.folder, COMMIT)
    assert [event.level for event in told if isinstance(event, Log)] in ([], ["warning"])


def test_a_model_in_the_workspace_comes_first_and_the_hub_is_not_asked(workspace: Workspace, hub: Hub) -> None:
    folder = tiny.tiny_model(workspace.models / "o--good")
    found, _ = fetched(workspace)
    assert (found.folder, found.public_name, found.origin) == (folder, "o/good", "already in the workspace")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("o/nowhere", "The Hub has no model 'o/nowhere' at revision 'main', or it is private. Check the spelling, or set HF_TOKEN."),
        ("o/private", "The Hub has no model 'o/private' at revision 'main', or it is private. Check the spelling, or set HF_TOKEN."),
        ("o/gated", "o/gated is gated: accept its licence on its Hub page and set HF_TOKEN to your token."),
        ("o/bad-token", "HTTP status 401. Check that HF_TOKEN is a valid token that may read it, or use one on this machine."),
        ("o/forbidden", "HTTP status 403. Check that HF_TOKEN is a valid token that may read it, or use one on this machine."),
        ("o/busy", "o/busy could not be fetched: the Hugging Face Hub answered with HTTP status 503. Try again later, or use one"),
        ("o/limited", "HTTP status 400. Try again later"),
        ("o/pickled", "o/pickled has no safetensors weights; other formats can run code when loaded. Choose another model."),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_sentence(workspace: Workspace, hub: Hub, model: str, said: str) -> None:
    assert said in refusal(workspace, model)


def test_a_revision_that_is_not_there_is_told_with_its_name(workspace: Workspace, hub: Hub) -> None:
    assert "at revision 'v9'" in refusal(workspace, "o/good", "v9")


def test_a_hub_out_of_reach_is_told_at_once(workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CLOSED)
    assert refusal(workspace, "o/good") == (
        "o/good could not be fetched: the Hugging Face Hub cannot be reached. Check the connection, or use one on this machine."
    )


@pytest.mark.parametrize("place", ["question", "weights"])
def test_stop_does_not_wait_for_a_hub_that_hangs(workspace: Workspace, hub: Hub, rows: Path, place: str) -> None:
    hub.hang_at = place
    run = tiny.tiny_run(workspace, rows, model="o/good")
    training = threading.Thread(target=jobs.execute, args=(run, train))
    training.start()
    assert hub.hanging.wait(20)
    begun = time.monotonic()
    run.ask("stop")
    training.join(20)
    assert time.monotonic() - begun < 2
    assert [event.name for event in tiny.events_of(run, Phase)] == ["reading", "fetching"]
    assert isinstance(tiny.events_of(run)[-1], Stopped)


def test_what_was_abandoned_ends_by_itself_and_the_next_fetch_is_whole(workspace: Workspace, hub: Hub) -> None:
    hub.hang_at = "weights"
    with pytest.raises(Cancelled):
        find("o/good", "main", workspace.models, lambda event: None, hub.hanging.is_set)
    hub.end_of_hanging()
    found, _ = fetched(workspace)
    assert (found.folder / "model.safetensors").read_bytes() == (hub.models["o/good"] / "model.safetensors").read_bytes()


def test_a_model_of_the_hub_trains_and_its_adapter_names_it(workspace: Workspace, hub: Hub, rows: Path) -> None:
    run = tiny.tiny_run(workspace, rows, model="o/good", max_steps=1)
    jobs.execute(run, train)
    assert run.state() == "finished"
    assert (run.facts()["model_origin"], run.facts()["model_commit"]) == ("the Hugging Face Hub", COMMIT)
    written = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("o/good", COMMIT)
