"""A training in a process of its own, through accelerate's launcher, over the same run folder. Knows nothing of torch or Gradio.

A crash of CUDA or the kernel's out-of-memory killer then ends that process and not the page, and its memory is given back
with certainty. The process outlives this one: the launcher is handed the locks, and the folder tells the next app all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from qlora_ui import resuming
from qlora_ui.disk import trouble_with_disk
from qlora_ui.errors import UserError
from qlora_ui.events import Log, Phase
from qlora_ui.execution import break_off, end_as_asked, pause
from qlora_ui.progress import duration
from qlora_ui.runs import Run

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 1800.0  # one micro-batch of a large model on a CPU takes minutes
DISCARD_SECONDS = 10.0  # without a sign of life: of what is to be deleted, nothing can be lost
TAIL_BYTES = 4000


def check() -> None:
    """Raise UserError where a lock cannot be handed to another process."""
    if os.name != "posix":
        raise UserError("A process of its own needs Linux or macOS. Train without it.", field="isolated")


def execute(run: Run, checkpoint: Path | None, locks: Sequence[FileLock], grace_seconds: float = GRACE_SECONDS) -> None:
    """Train in a process of its own and return when it has ended. What it could not write down itself is written down here.

    Raises UserError when that cannot be written down either.
    """
    run.beat()
    said = run.folder / "process.log"
    with said.open("wb") as output:
        process = subprocess.Popen(
            command(run, checkpoint),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C here is this process's business
            pass_fds=[descriptor(lock) for lock in locks],
        )
    why = wait(process, run, grace_seconds)
    trouble = trouble_with_disk(run.folder)
    if not run.folder.is_dir():
        if process.returncode:
            raise UserError(trouble)
        return  # discarded
    if run.state() != "running":
        return
    if trouble:
        pause(run, trouble)
        return
    tail = said.read_bytes()[-TAIL_BYTES:].decode("utf-8", "replace")
    if run.is_asked():
        run.append(Log(text=f"{why}.", level="warning"))
        end_as_asked(run)
        return
    if "SIGKILL" in tail:
        why = f"Its process was killed, as the system does when memory runs out. {remedy(run)}"
    break_off(run, f"{why}.", tail)


def remedy(run: Run) -> str:
    """What to do before a run goes on whose process was killed for want of memory, perhaps."""
    less = [f"{name} {value}" for name, value in resuming.less_memory(run.config()).items()]
    return f"Resume; if it happens again, with {' and '.join(less)}" if less else "Close what else uses the memory, then resume"


def command(run: Run, checkpoint: Path | None) -> list[str]:
    """What starts the worker."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    # The launcher would give it one thread.
    settings = ["--dynamo_backend=no", f"--num_cpu_threads_per_process={os.environ.get('OMP_NUM_THREADS') or os.cpu_count()}"]
    worker = ["-m", "qlora_ui.worker", "--home", str(run.workspace.root), "--run", run.id]
    worker.append(f"--most-silent-seconds={GRACE_SECONDS + 60}")  # by then nobody is here who ends it
    return [*launcher, *settings, *worker, *(["--checkpoint", checkpoint.name] if checkpoint else [])]


def descriptor(lock: FileLock) -> int:
    """Of the open file that a held lock is on: who inherits it holds the lock too, until the last of them is gone."""
    number = lock._context.lock_file_fd
    assert number is not None, f"{lock.lock_file} is not held"
    return number


def wait(process: subprocess.Popen[bytes], run: Run, grace_seconds: float) -> str:
    """Until the process has ended, or is ended here: wedged, or asked to end before it could listen. Returns why, in words."""
    before = run.size()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
                return "Its process ended without a word"
            if not run.folder.is_dir():  # it was discarded, which it is about to end with, or somebody deleted it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                return "Its folder is gone"
            if run.is_asked() and not any(isinstance(event, Phase) for event in run.read(before)[0]):
                return "It was ended before it had begun"
            if run.wish() == "discard" and run.silent_seconds() > DISCARD_SECONDS:
                return "It was ended to be discarded"
            if run.silent_seconds() > grace_seconds:
                return f"It gave no sign of life for {duration(grace_seconds)}, so its process was ended"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the worker too, where only the launcher died
        process.wait()
