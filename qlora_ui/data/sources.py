"""Where raw rows come from: bundled, uploaded, local or Hub. Knows nothing of what a row means."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled

BUNDLED_PREFIX = "bundled:"
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
ASSETS = Path(__file__).resolve().parents[2] / "assets"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(?::[\w.-]+)?", re.ASCII)
_UPLOAD_DIGEST = re.compile(r"\A[0-9a-f]{12}-")
_ROWS_PER_PROGRESS = 500

# What a reader yields: a row's columns, or in words why that row cannot be read.
_Row = Mapping[str, object] | str


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row as it was found; `values` is None when it cannot be read, and `problem` says why."""

    number: int
    values: Mapping[str, object] | None
    problem: str = ""


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
    """What to call the data set in a sentence: `answers.csv`, `owner/name`, `guanaco-starter`."""
    if Path(reference).suffix.lower() in SUFFIXES:
        return _UPLOAD_DIGEST.sub("", Path(reference).name)
    return reference.removeprefix(BUNDLED_PREFIX)


def name_of(reference: str) -> str:
    """A slug for run names: lower-case letters, digits and hyphens, at most 40 characters, never empty."""
    name = shown(reference).rsplit("/", 1)[-1]
    if Path(name).suffix.lower() in SUFFIXES:
        name = Path(name).stem
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "data"


def check(reference: str, within: Path | None = None) -> None:
    """The cheap test before a run: raises UserError when this surely cannot be read. Hub ids pass, the network is not asked."""
    _locate(reference, within)


def read(
    reference: str,
    within: Path | None = None,
    should_stop: Callable[[], bool] = never,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Iterator[RawRow]:
    """All rows in order, numbered from 1. Raises UserError when the whole is unreadable, Cancelled when told to stop."""
    path = _locate(reference, within)
    rows = _in_background(_hub(reference), should_stop) if path is None else _file(path)
    return _numbered(rows, should_stop, on_progress)


def import_upload(path: Path, into: Path) -> str:
    """Copy an uploaded file to `into`, named by its content and its own name; the copy is complete or absent."""
    check(str(path))
    into.mkdir(parents=True, exist_ok=True)
    original = Path(re.split(r"[\\/]", str(path))[-1])
    stem = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFKC", original.stem)).strip("._-")[:60] or "data"
    with tempfile.TemporaryDirectory(dir=into, prefix=".upload-") as aside:
        copy = Path(shutil.copyfile(path, Path(aside) / "copy"))
        with copy.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        target = into / f"{digest[:12]}-{stem}{original.suffix.lower()}"
        os.replace(copy, target)
    return str(target)


def _problem(message: str) -> UserError:
    return UserError(message, field="data")


def _locate(reference: str, within: Path | None) -> Path | None:
    """The file that is meant, or None for a Hub id."""
    if not reference.strip():
        raise _problem("No data set is chosen. Choose one on the Data tab.")
    path = Path(reference)
    if reference.startswith(BUNDLED_PREFIX):
        name = reference.removeprefix(BUNDLED_PREFIX)
        if name not in BUNDLED:
            raise _problem(f"There is no bundled data set {name!r}: use one of {', '.join(BUNDLED)}.")
        path, within = BUNDLED[name].path, None
    try:
        # A folder of that name would be read in place of the Hub's data set, so it never passes as an id.
        if _HUB_ID.fullmatch(reference) and path.suffix.lower() not in SUFFIXES and not path.exists():
            return None
        if within is not None and not path.resolve().is_relative_to(within.resolve()):
            raise _problem(f"{reference} lies outside the workspace {within}: upload the file instead.")
        if not path.exists():
            raise _problem(f"There is no file {path}: check the path, upload the file, or give a Hugging Face id (owner/name).")
        if path.is_dir():
            raise _problem(f"{path} is a folder: choose one file in it ({', '.join(SUFFIXES)}).")
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise _problem(f"{path.name} is not a file this app reads: convert it to one of {', '.join(SUFFIXES)}.")
        if path.stat().st_size == 0:
            raise _problem(f"{shown(path.name)} is empty (0 bytes): choose a file with rows.")
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, no permission, a loop of links
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _problem(f"{reference[:80]!r} cannot be opened ({reason}): choose another file.") from error
    return path


def _numbered(rows: Iterator[_Row], should_stop: Callable[[], bool], on_progress: Callable[[int], None]) -> Iterator[RawRow]:
    number = 0
    if should_stop():
        raise Cancelled
    for number, row in enumerate(rows, 1):
        if should_stop():
            raise Cancelled
        if number % _ROWS_PER_PROGRESS == 0:
            on_progress(number)
        yield RawRow(number=number, values=None, problem=row) if isinstance(row, str) else RawRow(number=number, values=row)
    on_progress(number)


def _in_background(rows: Iterator[_Row], should_stop: Callable[[], bool]) -> Iterator[_Row]:
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


def _file(path: Path) -> Iterator[_Row]:
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    try:
        yield from readers[path.suffix.lower()](path)
    except OSError as error:
        raise _problem(f"{shown(path.name)} cannot be read ({error.strerror or error}): check the file and its permissions.") from error


def _row(value: object, place: str) -> _Row:
    if isinstance(value, dict):
        return value
    return f"{place} is {json.dumps(value)[:40]}, not an object with named columns"


def _parse(text: str) -> object:
    """json.loads with one kind of error; Python also refuses numbers of over 4,300 digits and very deep nesting."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, json.JSONDecodeError) else json.JSONDecodeError(str(error), text, 0) from error


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte 0x{error.object[error.start]:02x} in line {error.object[: error.start].count(10) + 1}"
        raise _problem(f"{shown(path.name)} is not UTF-8 text ({place}): save it as UTF-8.") from error


def _json(path: Path) -> Iterator[_Row]:
    text = _text(path)
    try:
        whole = _parse(text)
    except json.JSONDecodeError as error:
        if re.match(r"\s*\{.*\}\s*\n", text):  # JSON Lines with the wrong suffix
            yield from _lines(path)
            return
        place = f"line {error.lineno}, column {error.colno}"
        raise _problem(f"{shown(path.name)} is not valid JSON: {error.msg} at {place}; mend the file there or export it again.") from error
    for number, item in enumerate(_rows_in(whole, path), 1):
        yield _row(item, f"item {number}")


def _rows_in(whole: object, path: Path) -> list[object]:
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        raise _problem(f"{shown(path.name)} holds {json.dumps(whole)[:40]}: it must be a list of objects, one a row.")
    if "messages" in whole or "conversations" in whole:
        return [whole]  # that list holds the turns of one conversation, not rows
    lists = {name: value for name, value in whole.items() if isinstance(value, list) and any(isinstance(item, dict) for item in value)}
    if len(lists) > 1:
        raise _problem(f"{shown(path.name)} holds several lists of rows ({', '.join(lists)}): keep one list a file.")
    return next(iter(lists.values()), [whole])


def _json_lines(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        opening = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    return _json(path) if opening.startswith(b"[") else _lines(path)  # an array with the wrong suffix


def _lines(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield _row(_parse(line.decode().rstrip()), f"line {number}")
            except UnicodeDecodeError as error:
                yield f"line {number} is not UTF-8 text (byte 0x{line[error.start]:02x} at position {error.start + 1})"
            except json.JSONDecodeError as error:
                yield f"line {number} is not valid JSON: {error.msg} at column {error.colno}"


def _csv(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)  # Python's default refuses an answer of over 131,072 characters
    text, begins = _text(path), 1
    try:
        # Strict: otherwise one quote that is never closed swallows all rows after it without a word.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
        header = [name.strip() for name in next(reader, [])]
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise _problem(f"{shown(path.name)} has two columns called {twice[0]!r}: rename one of them.")
        begins = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield dict(zip(header, cells, strict=True))
            elif cells:  # an empty line is no row
                yield f"line {begins} has {len(cells)} cells, the header has {len(header)}"
            begins = reader.line_num + 1
    except csv.Error as error:
        reason = f"{error} in the row that begins at line {begins}"
        raise _problem(f"{shown(path.name)} is not valid CSV: {reason}; close or double the quotes there, or export it again.") from error


def _delimiter(text: str) -> str:
    """The one that gives columns, then the most rows as wide as the header, then the most columns; else a comma."""

    def fit(delimiter: str) -> tuple[bool, int, int]:
        widths = [len(cells) for cells in islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), 20) if cells]
        width = widths[0] if widths else 0
        return width > 1, widths.count(width), width

    return max(",;\t", key=fit)


def _parquet(path: Path) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _problem(
            f"{shown(path.name)} is not a readable Parquet file ({str(error).splitlines()[0]}): export or download it again."
        ) from error


def _hub(reference: str) -> Iterator[_Row]:
    """Rows of the split `train`, streamed: progress and Stop work row by row, and nothing of it ever runs as code."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # what its HTTP library raises, whichever that is

    name, _, subset = reference.partition(":")
    # Its own defaults are 20 attempts, 5 s apart, without a word.
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 2
    try:
        # load_dataset repeats a refused connection for 23 s before it says so; this one question does not.
        HfApi().dataset_info(name, timeout=5.0)
        splits = datasets.load_dataset(name, subset or None, streaming=True)
        if "train" not in splits and len(splits) != 1:
            raise _problem(f"{reference} has no split 'train', only {', '.join(splits)}: download the one you want and upload it.")
        yield from splits["train"] if "train" in splits else next(iter(splits.values()))
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, datasets.exceptions.DatasetsError, HTTPError) as error:
        raise _problem(_hub_problem(reference, name, error)) from error


def _hub_problem(reference: str, name: str, error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
    if "gated" in reason:
        return f"{name} is gated: accept its terms at https://huggingface.co/datasets/{name}, and start the app with HF_TOKEN set."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no data set {name} on the Hugging Face Hub, or it is private: check the name, or set HF_TOKEN."
    if "Config name is missing" in reason:
        subsets = re.findall(r"'([^']+)'", str(error).split("Example")[0])
        return f"{name} has several subsets ({', '.join(subsets)}): name one after a colon, as in {name}:{subsets[0]}."
    if isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, FileNotFoundError, HfHubHTTPError)):
        return f"{reference} cannot be read from the Hugging Face Hub ({reason}): download its rows and upload them as a file."
    return f"The Hugging Face Hub cannot be reached for {name} ({reason}): check the connection, or upload a file."
