"""What keeps a folder from being written: a full disk, a read-only one, somebody who deleted it. Knows nothing of what is in it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from qlora_ui.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
TORN = b" (torn)\n"  # what ends a line that was not written whole: no reader has seen it, and none will
LEAST_FREE_BYTES = 1 << 20  # a writer that gave up leaves a little; no checkpoint fits into less


def lock_file(path: Path, then: str = "resume") -> FileLock:
    """A lock file in a folder that exists. Raises UserError when that is gone: the lock would bring it back."""
    if not path.parent.is_dir():
        raise UserError(trouble_with_disk(path.parent, then=then))
    return FileLock(path, thread_local=False)


def append_line(path: Path, line: bytes, *, sync: bool) -> None:
    """Write a line at the end of a file that is there; `sync` waits until a power cut cannot lose it. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)  # never made here: what was deleted stays deleted
    try:
        if os.lseek(descriptor, 0, os.SEEK_END):
            os.lseek(descriptor, -1, os.SEEK_END)
            if os.read(descriptor, 1) != b"\n":
                line = TORN + line  # a full disk or a power cut tore the last line: it must not swallow this one
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trouble_with_disk(folder: Path, error: BaseException | None = None, then: str = "resume") -> str:
    """What keeps a folder from being written, and the remedy; empty when nothing does.

    The disk is asked, because libraries wrap its errors in their own. `error` is what somebody broke off with: it may name
    another full disk. `then` is what to do after the remedy.
    """
    if not folder.is_dir():
        otherwise = "else start a new run" if then == "resume" else f"else make it anew, then {then}"
        return f"The folder {folder} is gone. Put it back if it was moved, {otherwise}."
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"The folder {folder} is read-only. Make it writable, then {then}."
    full = _full_disk(error)
    if shutil.disk_usage(folder).free >= LEAST_FREE_BYTES:
        if full is None:
            return ""
        elsewhere = Path(str(getattr(full, "filename", None) or folder))
        folder = next((part for part in (elsewhere, *elsewhere.parents) if part.is_dir()), folder)
    return f"The disk of {folder} is full ({shutil.disk_usage(folder).free:,} bytes free). Free some space, then {then}."


def _full_disk(error: BaseException | None) -> BaseException | None:
    """Of an error and its causes the one that says that a disk is full."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or os.strerror(errno.ENOSPC) in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def telling_trouble(folder: Path, then: str = "resume") -> Iterator[None]:
    """An OSError that comes from the folder's disk becomes a UserError."""
    try:
        yield
    except OSError as error:
        trouble = trouble_with_disk(folder, error, then)
        if not trouble:
            raise
        raise UserError(trouble) from error
