"""Where raw rows come from: bundled, uploaded, local or Hub. Knows nothing of what a row means."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qlora_ui.data import files, hub
from qlora_ui.data.files import SUFFIXES, Row
from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled

BUNDLED_PREFIX = "bundled:"
MOST_SLUG = 40  # characters
ASSETS = Path(__file__).resolve().parents[2] / "assets"

_ROWS_PER_PROGRESS = 500


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row as it was found; `values` is None when it cannot be read, and `problem` says why.

    `number` counts through all files; `place` is where it stands in a folder's file, as in `b.jsonl, row 3`, else empty.
    """

    number: int
    values: Mapping[str, object] | None
    problem: str = ""
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class BundledSet:
    """A data set that comes with the app."""

    name: str
    title: str
    path: Path
    licence: str
    about: str

    @property
    def rows(self) -> int:
        """Counted in the file, so that no number here can be wrong."""
        with self.path.open("rb") as file:
            return sum(1 for line in file if line.strip())


BUNDLED: dict[str, BundledSet] = {
    "guanaco-starter": BundledSet(
        name="guanaco-starter",
        title="Guanaco starter",
        path=ASSETS / "guanaco_starter.jsonl",
        licence="CC0-1.0",
        about="Short conversations written for this app, enough to see a small model change its manner within minutes.",
    )
}


def never() -> bool:
    """The `should_stop` of a caller that never stops."""
    return False


def shown(reference: str) -> str:
    """What to call the data set in a sentence: `answers.csv`, `answers.csv and 2 more`, `owner/name`, `guanaco-starter`."""
    path = Path(reference)
    if files.kind(path) or files.is_uploaded_folder(path):
        return files.shown(path)
    return files.printable(reference.removeprefix(BUNDLED_PREFIX))


def name_of(reference: str) -> str:
    """A slug for run names: lower-case letters, digits and hyphens; whole words of at most 40 characters in all, never empty."""
    # A Hub reference may have slashes after its own, in the name of a revision.
    is_path = files.kind(Path(reference)) or not hub.is_reference(reference)
    name = Path(shown(reference)).name if is_path else reference.partition("/")[2]
    plain = unicodedata.normalize("NFKD", _stem(name)).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "data"
    return slug if len(slug) <= MOST_SLUG else slug[: MOST_SLUG + 1].rpartition("-")[0] or slug[:MOST_SLUG]  # no half word


def check(reference: str, within: Path | None = None) -> None:
    """The cheap test before a run: raises UserError when this surely cannot be read. Hub ids pass, the network is not asked."""
    _locate(reference, within)


def is_hub(reference: str, within: Path | None = None) -> bool:
    """Whether this names a data set on the Hub. Raises UserError when it names nothing."""
    return _locate(reference, within) is None


def read(
    reference: str,
    within: Path | None = None,
    should_stop: Callable[[], bool] = never,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Iterator[RawRow]:
    """All rows in order, numbered from 1. Raises UserError when the whole is unreadable, Cancelled when told to stop."""
    path = _locate(reference, within)
    rows: Iterator[tuple[str, Row]]
    if path is None:
        rows = (("", row) for row in _in_background(hub.rows(reference), should_stop))
    elif path.is_dir():
        rows = _folder_rows(path)
    else:
        rows = (("", row) for row in files.rows(path))
    return _numbered(rows, should_stop, on_progress)


def import_uploads(paths: Sequence[Path], into: Path) -> str:
    """Copy uploaded files to `into`: one as `import_upload` does, several as one folder, which is complete or absent."""
    if not paths:
        raise _problem("No file is chosen: drop one or more.")
    if len(paths) == 1:
        return import_upload(paths[0], into)
    for path in paths:
        _check_file(path, None)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".upload-") as aside:
        folder = Path(aside) / "folder"
        folder.mkdir()
        copied = set()
        for path in paths:
            same = path.name, _digest(path)
            if same not in copied:  # dropping a file twice does not mean its rows twice
                shutil.copyfile(path, _free(folder, *_clean_name(path)))
            copied.add(same)
        if len(copied) == 1:
            return import_upload(paths[0], into)
        copies = _files_in(folder)
        whole = hashlib.sha256("".join(f"{copy.name}/{_digest(copy)}/" for copy in copies).encode()).hexdigest()
        target = into / f"{whole[:12]}-{copies[0].name}-and-{len(copies) - 1}-more"
        if not target.exists():
            os.replace(folder, target)
    return str(target)


def import_upload(path: Path, into: Path) -> str:
    """Copy an uploaded file to `into`, named by its content and its own name; the copy is complete or absent."""
    _check_file(path, None)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".upload-") as aside:
        copy = Path(shutil.copyfile(path, Path(aside) / "copy"))
        target = into / f"{_digest(copy)[:12]}-{''.join(_clean_name(path))}"
        os.replace(copy, target)
    return str(target)


def import_paste(text: str, into: Path) -> str:
    """Keep a pasted text as an upload. Raises UserError when it is neither JSON nor a table."""
    if not text.strip("\ufeff \t\r\n"):
        raise _problem("Nothing is pasted: paste JSON, JSON Lines, or a table with a header line.")
    with tempfile.TemporaryDirectory(prefix="pasted-") as folder:
        file = Path(folder) / f"pasted{files.kind_of_text(text)}"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))  # half a character is told when the rows are read
        return import_upload(file, into)


def _stem(name: str) -> str:
    return name[: len(name) - len(files.kind(Path(name)) or "")]


def _clean_name(path: Path) -> tuple[str, str]:
    """Stem and ending of an uploaded file's name, such as any disk takes them."""
    name = re.split(r"[\\/]", str(path))[-1]
    stem = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFKC", _stem(name)))
    short = stem.encode()[:150].decode("utf-8", "ignore")  # disks count bytes
    return short[:60].strip("._-") or "data", files.kind(path) or ""


def _free(folder: Path, stem: str, ending: str) -> Path:
    """A name in the folder that nothing has yet, also on a disk that does not tell capitals from small letters."""
    taken = {path.name.lower() for path in folder.iterdir()}
    names = (f"{stem}{number}{ending}" for number in ("", *(f"-{count}" for count in range(2, len(taken) + 3))))
    return folder / next(name for name in names if name.lower() not in taken)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(message: str) -> UserError:
    return UserError(message, field="data")


def _locate(reference: str, within: Path | None) -> Path | None:
    """The file or folder that is meant, or None for a Hub id."""
    if not reference.strip():
        raise _problem("No data set is chosen. Choose one on the Data tab.")
    path = Path(reference)
    if reference.startswith(BUNDLED_PREFIX):
        name = reference.removeprefix(BUNDLED_PREFIX)
        if name not in BUNDLED:
            raise _problem(f"There is no bundled data set {files.printable(name)!r}: use one of {', '.join(BUNDLED)}.")
        path, within = BUNDLED[name].path, None
    try:
        # A folder of that name would be read in place of the Hub's data set, so it never passes as an id.
        if hub.is_reference(reference) and not path.exists():
            return None
        _check_place(path, within)
        if not path.is_dir():
            _check_file(path, within)
        else:
            inside = _files_in(path)
            if not inside:
                raise _problem(f"{files.printable(str(path))} is an empty folder: put files into it ({', '.join(SUFFIXES)}).")
            for file in inside:
                _check_file(file, within)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, no permission, a loop of links
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _problem(f"{files.printable(reference)!r} cannot be opened ({reason}): choose another file.") from error
    return path


def _check_place(path: Path, within: Path | None) -> None:
    if within is not None and not path.resolve().is_relative_to(within.resolve()):
        outside = f"{files.printable(str(path))} lies outside the workspace {files.printable(str(within))}"
        raise _problem(f"{outside}: upload the file instead.")
    if not path.exists():
        missing = f"There is no file {files.printable(str(path))}"
        raise _problem(f"{missing}: check the path, upload the file, or give a Hugging Face id (owner/name).")


def _check_file(path: Path, within: Path | None) -> None:
    _check_place(path, within)
    called = files.shown(path)
    if path.is_dir():
        raise _problem(f"{called} is a folder: bring its files ({', '.join(SUFFIXES)}), not the folder in another.")
    if files.kind(path) is None:
        raise _problem(f"{called} is not a file this app reads: convert it to one of {', '.join(SUFFIXES)} (each also .gz).")
    if not path.is_file():
        raise _problem(f"{called} is not a file on a disk but a pipe or a device: save its rows to a file.")
    if path.stat().st_size == 0:
        raise _problem(f"{called} is empty (0 bytes): choose a file with rows.")


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _folder_rows(folder: Path) -> Iterator[tuple[str, Row]]:
    for file in _files_in(folder):
        for number, row in enumerate(files.rows(file), 1):
            yield f"{files.shown(file)}, row {number}", row


def _numbered(rows: Iterator[tuple[str, Row]], should_stop: Callable[[], bool], on_progress: Callable[[int], None]) -> Iterator[RawRow]:
    number = 0
    if should_stop():
        raise Cancelled
    for number, (place, row) in enumerate(rows, 1):
        if should_stop():
            raise Cancelled
        if number % _ROWS_PER_PROGRESS == 0:
            on_progress(number)
        if isinstance(row, str):
            yield RawRow(number=number, place=place, values=None, problem=f"{place}: {row}" if place else row)
        else:
            yield RawRow(number=number, place=place, values=row)
    on_progress(number)


def _in_background(rows: Iterator[Row], should_stop: Callable[[], bool]) -> Iterator[Row]:
    """The same rows, pulled by a thread: one read of a slow network may take a minute, and Stop must not wait for it."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub")
    try:
        while True:
            batch = pool.submit(lambda: list(islice(rows, 200)))
            while not wait([batch], timeout=0.1).done:
                if should_stop():
                    raise Cancelled
            if not batch.result():
                return
            yield from batch.result()
    finally:
        pool.shutdown(wait=False)
