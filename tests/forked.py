"""The app in a process that is a copy of one in which its libraries are imported already. Imports next to nothing itself."""

from __future__ import annotations

import os
import runpy
import sys
from multiprocessing.connection import Connection
from pathlib import Path


def run(root: Path, command: list[str], environment: dict[str, str], output: Connection) -> None:
    """As `python COMMAND` in that folder and environment would."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(root)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output.fileno(), stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
