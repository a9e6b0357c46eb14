"""Files that a page hands out, made anew at each press. Gradio copies what it is told of into its own cache, which it clears itself."""

from __future__ import annotations

import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

COPIED_SECONDS = 600.0  # by then Gradio has


def fresh(name: str) -> Path:
    """Where to write a file of that name. What was handed out before is removed: it may be private, and many would fill a disk."""
    for folder in Path(_room().name).iterdir():
        if folder.stat().st_mtime < time.time() - COPIED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)  # another press may be removing it
    return Path(tempfile.mkdtemp(dir=_room().name)) / name


@cache
def _room() -> tempfile.TemporaryDirectory[str]:
    """Of this process, and gone with it."""
    return tempfile.TemporaryDirectory(prefix="qlora-ui-")
