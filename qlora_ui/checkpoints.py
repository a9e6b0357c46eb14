"""Which checkpoints of a run can be believed: sealed when whole, told from damaged ones by content. Knows nothing of torch or Gradio."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

from qlora_ui.runs import Run, write_json

SEAL = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")
DAMAGED = "damaged-"


def seal(folder: Path) -> None:
    """Bring a written checkpoint to disk, then list what must be in it: name -> bytes, SHA-256. From here on it is complete."""
    contents = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL):
        contents[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest(path, to_disk=True)]
    write_json(folder / SEAL, contents)


def digest(path: Path, *, to_disk: bool = False) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        if to_disk:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str:
    """What keeps a checkpoint from being used, in words; empty when it is complete."""
    try:
        contents: dict[str, list[object]] = json.loads((folder / SEAL).read_text("utf-8"))
        expected = {name: (size, sha256) for name, (size, sha256) in contents.items()}
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError, AttributeError, TypeError):
        return f"its {SEAL} cannot be read"
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and not {size:,}"
        if digest(path) != sha256:
            return f"{name} is not what was written"
    return ""


def step_of(folder: Path) -> int:
    """The optimizer steps behind a checkpoint."""
    return int(folder.name.removeprefix("checkpoint-"))


def all_of(run: Run) -> list[Path]:
    """The run's checkpoint folders, complete or not, newest first."""
    folders = [folder for folder in run.folder.glob("checkpoint-*") if NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def newest_complete(run: Run, before: float = math.inf) -> Path | None:
    """The checkpoint to go on from, of those before a step. It takes a reading of the newest, and of older ones while they are damaged."""
    return next((folder for folder in all_of(run) if step_of(folder) < before and not damage(folder)), None)


def put_aside(run: Run, newest: Path | None) -> list[str]:
    """Take what is newer than the checkpoint to go on from out of the way, and say what was wrong with each.

    What was never finished is deleted: nobody was told that it is there. What was complete once is kept under another name.
    What is complete holds steps that are void from here on.
    """
    said = []
    for folder in all_of(run):
        if newest and step_of(folder) <= step_of(newest):
            if not (folder / SEAL).exists():
                shutil.rmtree(folder)  # what a kill left of one that was being thinned
            continue
        wrong = damage(folder)
        if not wrong:
            (folder / SEAL).unlink()
            shutil.rmtree(folder)
            said.append(f"{folder.name} is deleted: the run goes on from before it")
            continue
        said.append(f"{folder.name} cannot be used: {wrong}")
        kept = folder.with_name(DAMAGED + folder.name)
        shutil.rmtree(kept, ignore_errors=True)
        if (folder / SEAL).exists():
            folder.rename(kept)
        else:
            shutil.rmtree(folder)
    return said


def thin(run: Run, keep: int, best: str) -> None:
    """Delete the oldest complete checkpoints beyond `keep`, and what a kill left of others. The newest and the one named `best` stay."""
    complete = [folder for folder in all_of(run) if (folder / SEAL).exists()]
    others = [folder for folder in complete if folder.name != best]
    room = max(keep - (len(complete) - len(others)), 1 if complete[0] in others else 0)
    for folder in others[room:]:
        (folder / SEAL).unlink()  # first, so that half a checkpoint never passes for a damaged one
    for folder in all_of(run):
        if not (folder / SEAL).exists():
            shutil.rmtree(folder, ignore_errors=True)
