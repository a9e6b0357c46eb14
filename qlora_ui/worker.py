"""The process in which an isolated training lives: `python -m qlora_ui.worker`, started by accelerate's launcher. No torch, no Gradio.

The locks of the run and of the device are held by the launcher, which was handed them; so the worker must not outlive it.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

from qlora_ui.errors import UserError
from qlora_ui.execution import Emit, ShouldStop, Train, engine_train, execute
from qlora_ui.runs import Run, Workspace

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal to get when the parent dies


def main() -> int:
    """Train the run of `--run` and return the exit code: 2 where how it went could not be written into the run's events."""
    parser = argparse.ArgumentParser(prog="python -m qlora_ui.worker")
    parser.add_argument("--home", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--most-silent-seconds", type=float, required=True)
    arguments = parser.parse_args()
    die_with(os.getsid(0))  # the launcher leads the session
    run = Workspace.open(arguments.home).get(arguments.run)
    try:
        train = ended_when_silent(engine_train, arguments.most_silent_seconds)
        execute(run, train, run.folder / arguments.checkpoint if arguments.checkpoint else None)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def ended_when_silent(train: Train, seconds: float) -> Train:
    """The training; its process ends where that gives no sign of life for so long, with a traceback of where it hung.

    Whoever started this process ends it sooner, but may be gone. The interpreter's own watchdog needs nothing that may hang too.
    """

    def watched(run: Run, emit: Emit, should_stop: ShouldStop, checkpoint: Path | None) -> None:
        def sign_of_life() -> bool:
            faulthandler.dump_traceback_later(seconds, exit=True)
            return should_stop()

        sign_of_life()
        train(run, emit, sign_of_life, checkpoint)

    return watched


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
