"""Exports that lie in the workspace: what each is, handed over as one file, deleted. Knows nothing of how they are made, torch or Gradio.

Each has its record beside it, NAME.json. It is written after the export is complete, so an export without one may have come from
anywhere; it is listed all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qlora_ui.disk import telling_trouble
from qlora_ui.errors import UserError
from qlora_ui.exports import AGAIN, Export, bytes_in, size_words
from qlora_ui.runs import Workspace, write_json

RECORD = ".json"
MOST_DOWNLOAD_BYTES = 500_000_000
"""What is larger is not handed through a browser: it would be copied twice first."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of an export. `made` is in seconds since 1970, UTC; `verified` a sentence; `pushed` an address on the Hub."""

    run: str = ""
    kind: str = ""
    step: int = 0
    quantized: bool = False
    bytes: int
    made: float
    verified: str = ""
    pushed: str = ""


def folder_of(workspace: Workspace) -> Path:
    """Where exports of the workspace lie; made when missing."""
    with telling_trouble(workspace.root, AGAIN):
        workspace.exports.mkdir(exist_ok=True)
    return workspace.exports


def free_name(workspace: Workspace, name: str) -> Path:
    """A place for an export of that name, which gets a number where there is one already."""
    folder, zipped = folder_of(workspace), ".zip" if name.endswith(".zip") else ""
    names = [name, *(f"{name.removesuffix('.zip')}-{number}{zipped}" for number in range(2, 10_000))]
    return next(folder / one for one in names if not (folder / one).exists())


def keep_record(wish: Export, count: int, verified: str, pushed: str = "") -> None:
    """Write down what an export is, if it lies among those of the workspace."""
    if wish.target.parent == wish.run.workspace.exports:
        record = Record(
            run=wish.run.id,
            kind=wish.kind,
            step=wish.weights.step,
            quantized=wish.quantize,
            bytes=count,
            made=time.time(),
            verified=verified,
            pushed=pushed,
        )
        with telling_trouble(wish.target.parent, AGAIN):
            write_json(_record_of(wish.target), asdict(record))


def past(workspace: Workspace) -> dict[str, Record]:
    """All exports by their name, newest first."""
    places = [place for place in folder_of(workspace).iterdir() if not place.name.startswith(".") and place.suffix != RECORD]
    found = {place.name: _read(place) for place in places}
    return dict(sorted(found.items(), key=lambda item: item[1].made, reverse=True))


def place_of(workspace: Workspace, name: str) -> Path:
    """Where an export is. Raises UserError when there is none of that name."""
    if name not in past(workspace):  # which also keeps the name within the folder
        raise UserError(f"There is no export {name!r} any more.")
    return folder_of(workspace) / name


@contextlib.contextmanager
def as_file(workspace: Workspace, name: str) -> Iterator[Path]:
    """The export as one file elsewhere, for a browser to fetch: itself, or a zip of it. Raises UserError when it is too large for that."""
    place = place_of(workspace, name)
    if (size := bytes_in(place)) > MOST_DOWNLOAD_BYTES:
        raise UserError(
            f"{name} has {size_words(size)}, more than the {size_words(MOST_DOWNLOAD_BYTES)} that are handed through a browser. "
            f"Copy it from {place.relative_to(workspace.root)} in the workspace."
        )
    with tempfile.TemporaryDirectory(prefix="export-") as aside:
        with telling_trouble(Path(aside), AGAIN):
            path = Path(shutil.make_archive(f"{aside}/{name}", "zip", place.parent, name) if place.is_dir() else shutil.copy(place, aside))
        yield path


def delete(workspace: Workspace, name: str) -> None:
    """It is gone at once, in one rename. Twice is no error."""
    place = folder_of(workspace) / name
    if name not in past(workspace):
        return
    gone = place.with_name(f".deleted-{secrets.token_hex(4)}")
    with telling_trouble(place.parent, "try again"):
        place.rename(gone)
        _record_of(place).unlink(missing_ok=True)
        if gone.is_dir():
            shutil.rmtree(gone)
        else:
            gone.unlink()


def sweep(workspace: Workspace) -> None:
    """Remove what a kill left half made or half deleted. Whoever calls has the device, so that nobody makes an export here."""
    for left in folder_of(workspace).glob(".*"):
        if ".partial-" in left.name or left.name.startswith(".deleted-"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _record_of(place: Path) -> Path:
    return place.with_name(place.name + RECORD)


def _read(place: Path) -> Record:
    """Its record; without one, or with one of another version, what the disk says."""
    try:
        written = json.loads(_record_of(place).read_text("utf-8"))
        return Record(**{field.name: written[field.name] for field in fields(Record)})
    except (OSError, ValueError, KeyError, TypeError):
        return Record(bytes=bytes_in(place), made=os.stat(place).st_mtime)
