"""Command lines of the app, each in a fork of this one process, which has loaded the libraries and may be killed at an exact moment.

A fork spares the ten seconds that loading them takes; it has its own memory, locks and files, and dies alone. Started as
`python tests/mortal.py`, it reads a JSON object a line and answers with the fork's pid, then with its exit status.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

IN_A_RUN = re.compile(r"/runs/[^/]+/(checkpoint-\d+|adapter)[^/]*(/.*)?$")
REMOVALS = ("os.remove", "os.rmdir")


class Moments:
    """Counts what happens, by name, and kills this process at the one that was chosen: before it, half-way, or some time after it."""

    def __init__(self, record: str, death: dict[str, Any] | None) -> None:
        self.record, self.death, self.seen = Path(record), death, Counter[str]()
        self.write = os.write
        os.write = self.write_event  # type: ignore[assignment]
        sys.addaudithook(self.file_operation)

    def happens(self, name: str) -> bool:
        """Whether this is the moment."""
        self.seen[name] += 1
        return self.death is not None and (name, self.seen[name]) == (self.death["moment"], self.death["count"])

    def write_event(self, descriptor: int, block: bytes) -> int:
        if b'{"kind": "' not in block:
            return self.write(descriptor, block)
        event = json.loads(block)
        if self.happens("event"):
            self.write(descriptor, block[: len(block) // 2])
            kill()
        written = self.write(descriptor, block)
        if self.happens(event["name"] if event["kind"] == "phase" else event["kind"]) and self.death:
            threading.Timer(self.death["delay_seconds"], kill).start()
        return written

    def file_operation(self, operation: str, details: tuple[Any, ...]) -> None:
        if operation not in ("open", "os.rename", "os.mkdir", *REMOVALS) or not isinstance(details[0], str | os.PathLike):
            return
        path = os.fspath(details[0])
        if operation in REMOVALS and not os.path.isabs(path) and details[1] >= 0:  # as rmtree does it
            path = f"{os.readlink(f'/proc/self/fd/{details[1]}')}/{path}"
        found = IN_A_RUN.search(path)
        if not found:
            return
        name = "adapter" if found[1] == "adapter" else "thinning" if operation in REMOVALS else "checkpoint"
        if name == "checkpoint" and "/complete.json" in path:
            name = "sealing"
        if self.happens(name):
            kill()

    def keep(self) -> None:
        self.record.write_text(json.dumps(self.seen))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def carry_out(job: dict[str, Any]) -> None:
    """In the fork: one command line, to its end or to its death."""
    from qlora_ui.cli import main

    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 99
    try:
        moments = Moments(job["output"] + ".moments", job["death"])
        code = main(job["arguments"])
        moments.keep()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    import torch

    import qlora_ui.engine.train

    torch.set_num_threads(1)
    print(json.dumps({"ready": qlora_ui.engine.train.__name__}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            carry_out(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    serve()
