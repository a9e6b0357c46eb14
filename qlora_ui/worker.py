"""The process in which an isolated training lives: `python -m qlora_ui.worker`, started by accelerate's launcher. No torch, no Gradio.

The locks of the run and of the device are held by the launcher, which was handed them; so the worker must not outlive it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import threading
import time

from qlora_ui.errors import UserError
from qlora_ui.execution import engine_train, execute
from qlora_ui.runs import Workspace

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal to get when the parent dies


def main() -> int:
    """Train the run of `--run` and return the exit code: 2 where how it went could not be written into the run's events."""
    parser = argparse.ArgumentParser(prog="python -m qlora_ui.worker")
    parser.add_argument("--home", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--checkpoint", default="")
    arguments = parser.parse_args()
    die_with(os.getsid(0))  # the launcher leads the session
    run = Workspace.open(arguments.home).get(arguments.run)
    try:
        execute(run, engine_train, run.folder / arguments.checkpoint if arguments.checkpoint else None)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def die_with(launcher: int) -> None:
    """End this process when the launcher is gone: by the kernel where it can, else within a second."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(launcher,), name="watch launcher", daemon=True).start()
    if os.getppid() != launcher:
        os._exit(1)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    code = main()
    os._exit(code)  # without waiting for threads that were left to themselves, such as a request to a Hub that hangs
