"""A Hub in this process: as much of its HTTP interface as loading a data set asks for, and a fresh process that asks it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

ROOT = Path(__file__).resolve().parents[1]
UNREACHABLE = "http://127.0.0.1:9"

Repositories = Mapping[str, Mapping[str, bytes]]
"""By `owner/name`, or `owner/name@revision`: the files there. A file whose content is SILENCE is never sent."""

SILENCE = b"(silence)"
Said = dict[str, tuple[Any, float]]
"""By reference: the rows that were read or the sentence that came instead, and the seconds that it took."""


def _commit(key: str) -> str:
    return hashlib.sha1(key.encode()).hexdigest()


def _listed(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What the tree endpoint lists below a folder."""
    inside = {name: content for name, content in files.items() if not folder or name.startswith(folder + "/")}
    entries: dict[str, dict[str, Any]] = {}
    for name, content in inside.items():
        parts = name.split("/")
        depth = folder.count("/") + 1 if folder else 0
        for end in range(depth + 1, len(parts)):
            entries["/".join(parts[:end])] = {"type": "directory", "path": "/".join(parts[:end]), "oid": "0"}
        entries[name] = {"type": "file", "path": name, "size": len(content), "oid": "0"}
    return [entry for path, entry in entries.items() if recursive or path.count("/") == (folder.count("/") + 1 if folder else 0)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: apart, each answer waits 40 ms for an acknowledgement
    repositories: Repositories
    closing: threading.Event

    def log_message(self, *args: object) -> None: ...

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        match = re.match(r"/(api/)?datasets/([\w-]+/[\w.-]+)(?:/(tree|resolve|revision|paths-info)/([^/]+))?/?(.*)", path)
        if match is None or match[2] not in self.repositories:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        _, name, what, revision, file = (unquote(part or "") for part in match.groups())
        keys = [key for key in self.repositories if key.split("@")[0] == name]
        key = next((key for key in keys if _commit(key) == revision), f"{name}@{revision}" if revision not in ("", "main") else name)
        if key not in keys:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        files = self.repositories[key]
        if what == "tree":
            return self.answer(200, json.dumps(_listed(files, file, "recursive=true" in query.lower())).encode())
        if what == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).get("paths", [])
            return self.answer(200, json.dumps([entry for entry in _listed(files, "", True) if entry["path"] in asked]).encode())
        if match[1]:
            return self.about(name, key)
        return self.file(name, key, file)

    do_HEAD = do_POST = do_GET

    def about(self, name: str, key: str) -> None:
        if name == "o/silent":
            self.closing.wait()
        elif name == "o/overloaded":
            self.answer(503)
        elif name == "o/refused":
            self.answer(403, b"{}")
        else:
            siblings = [{"rfilename": file} for file in self.repositories[key]]
            self.answer(200, json.dumps({"id": name, "sha": _commit(key), "siblings": siblings}).encode())

    def file(self, name: str, key: str, file: str) -> None:
        content = self.repositories[key].get(file)
        if name == "o/gated":
            self.answer(401, b"{}", X_Error_Code="GatedRepo")
        elif content is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=_commit(key))
        elif content == SILENCE:
            self.closing.wait()
        elif asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, end = int(asked[1]), min(int(asked[2]), len(content) - 1)
            self.answer(206, content[begin : end + 1], Content_Range=f"bytes {begin}-{end}/{len(content)}")
        else:
            self.answer(200, content, X_Repo_Commit=_commit(key), ETag=f'"{_commit(key + file)}"')


@contextmanager
def hub_of(repositories: Repositories) -> Iterator[str]:
    """Its address, while it serves."""
    closing = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"repositories": repositories, "closing": closing}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()


_CLIENT = """
import json, sys, time
import datasets, datasets.load, huggingface_hub.hf_api  # so that the clock below does not count their import
from qlora_ui.data import hub
from qlora_ui.errors import UserError
for reference in sys.argv[2:]:
    hub._OPENING_SECONDS = 1.0 if "silent" in reference else 60.0
    begun = time.monotonic()
    try:
        said = list(getattr(hub, sys.argv[1])(reference))
    except UserError as error:
        said = str(error)
    print("@" + json.dumps([reference, said, time.monotonic() - begun], default=repr))
"""


def ask(endpoint: str, home: Path, *references: str, about: str = "rows", **environment: str) -> Said:
    """What a fresh process says: the Hub's libraries read the endpoint once, when they are imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-c", _CLIENT, about, *references], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    return {reference: (said, seconds) for reference, said, seconds in told}
